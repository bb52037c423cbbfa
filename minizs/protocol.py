"""The language of policy and search engine: tags, prompt, actions, blocks of documents. No torch.

Paper section 3.6 and Table 1. A turn of the policy is `<think> ... </think>` followed by either
`<search> query </search>` or `<answer> answer </answer>`; the engine's reply stands between
`<information>` and `</information>`. A model folder's `prompt.txt` may word the prompt otherwise.
"""

import re
from dataclasses import dataclass
from functools import cache

STOP = ("</search>", "</answer>")  # a turn ends at the first of these
PROMPT = """Answer the question below. Think inside <think> and </think> first, and again whenever \
you are given new information. If you lack some knowledge, ask a search engine with <search> query \
</search>; its best results come back between <information> and </information>. Search as often as \
you like. When you need nothing more, give the answer alone inside <answer> and </answer>, without \
an explanation, for example <answer> Beijing </answer>.
Question: {question}
"""
INVALID_ACTION = "\n\nThat action is not valid. Let me try again.\n\n"
_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
_DOCUMENT = re.compile(r"Doc \d+:")


@dataclass(frozen=True)
class Action:
    kind: str  # "search", "answer" or "invalid"
    content: str = ""


def parse_action(text: str) -> Action:
    """What one policy turn asks for: the first closed pair of its text; a blank query is invalid.
    Its text alone is given: no prompt or document can search or answer (upstream defect D3)."""
    match = _ACTION.search(text)
    kind, content = (match[1], match[2].strip()) if match else ("invalid", "")
    return Action("invalid") if kind == "search" and not content else Action(kind, content)


def build_prompt(question: str, template: str = PROMPT) -> str:
    """The text that a rollout starts from; a missing question mark is added."""
    return template.replace("{question}", question.strip().removesuffix("?") + "?")


@cache
def vocabulary_size(tokenizer) -> int:
    """One more than the largest id the tokenizer knows: `len` is less where ids have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def prompt_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids that a model starts from, for each text, in training and in use alike: with a chat
    template a user's message and the reply's opening, else the text behind any opening token."""
    if not tokenizer.chat_template:
        return tokenizer(texts)["input_ids"]
    chats = [[{"role": "user", "content": text}] for text in texts]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)


def number_documents(documents: list[str]) -> str:
    """`Doc 1: ...` on a line each: the form in which a simulator writes and a policy reads."""
    return "\n".join(f"Doc {i}: {text}" for i, text in enumerate(documents, 1))


def split_documents(text: str, limit: int) -> list[str]:
    """Undo `number_documents` on a simulator's text: at most `limit` documents, none empty."""
    parts = [" ".join(part.split()) for part in _DOCUMENT.split(text)[1:]]
    return [part for part in parts if part][:limit]


def wrap_documents(numbered: str) -> str:
    """The whole block that is appended to the policy's context after a search."""
    return f"\n\n<information>\n{numbered}\n</information>\n\n"
