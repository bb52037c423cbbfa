"""With which token does a reply end?

A model's own configuration often does not say. A base model's chat template closes a message with a
token of its own (Qwen2.5: `<|im_end|>`, where the configuration has `<|endoftext|>`); an instruct
model's generation configuration has several (Llama 3, Phi, Gemma 3) where its tokenizer has one. If
one is missed, a reply goes on and writes the user's next message, too."""

from torch import nn

from minizs.models.composite import text_config
from minizs.protocol import chat_texts

REPLY = "REPLY"  # stands for what an assistant says


def end_ids(model: nn.Module, tokenizer) -> tuple[int, ...]:
    """All ids that end a reply: those of the model's configuration, of its generation configuration
    and of the tokenizer, and the one with which the chat template closes a reply.

    A stand-in for a model, which has no configuration, adds none."""
    sources = [tokenizer, getattr(model, "generation_config", None)]
    if hasattr(model, "config"):
        sources += [model.config, text_config(model)]
    ids = set()
    for source in sources:
        value = getattr(source, "eos_token_id", None)  # one, several or none
        ids.update([value] if isinstance(value, int) else value or ())
    ids.update(closing_ids(tokenizer))
    return tuple(sorted(ids))


def closing_ids(tokenizer) -> list[int]:
    """The id of the special token that the chat template puts behind a reply, if it puts one there.

    Some templates close only a reply that something follows."""
    if not tokenizer.chat_template:
        return []
    question = {"role": "user", "content": "?"}
    chat = [question, {"role": "assistant", "content": REPLY}]
    for messages in (chat, [*chat, question]):
        try:
            [text] = chat_texts(tokenizer, [messages])
        except Exception:  # a template is a program, and this one takes no such conversation
            continue
        _, reply, rest = text.rpartition(REPLY)
        token = first_special_token(tokenizer, rest.strip()) if reply else None
        if token is not None:
            return [token]
    return []


def first_special_token(tokenizer, text: str) -> int | None:
    """The id of the special token that a text begins with, if it begins with one."""
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    names = [name for name in special if name and text.startswith(name)]
    return special[max(names, key=len)] if names else None
