"""The language of policy and engine (paper 3.6, Table 1): tags, prompt, actions, documents."""

import re
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

STOP = ("</search>", "</answer>")  # a turn ends at the first of these
PROMPT = Path(__file__).with_name("prompts").joinpath("search.txt").read_text(encoding="utf-8")
INVALID_ACTION = "\n\nThat action is not valid. Let me try again.\n\n"
CLOSING = "\n</information>\n\n"
_ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)
_TAG = r"<[\s/\\]*(?:think|search|information|answer)|<\s*\|[^>]{0,80}\|\s*>"


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


def neutralize(text: str, tokenizer=None) -> str:
    """Data made harmless: whatever begins like one of our tags, `<|...|>` or a special token of the
    tokenizer, in any case and spacing, gets "(" for its first character; a lone surrogate is "?". A
    text whose tag hides in wide letters or behind accents and hidden characters (a tokenizer's
    normalizer may see it) comes back without these; all other text stays as it is."""
    marks = _marks(tokenizer)
    text = marks.sub("(", text.encode("utf-8", "replace").decode())
    bare = "".join(
        c
        for c in unicodedata.normalize("NFKD", text)
        if c.isspace() or unicodedata.category(c)[0] not in "MC"
    )
    return marks.sub("(", bare) if marks.search(bare) else text


@cache
def _marks(tokenizer) -> re.Pattern:
    """Matches a mark's first character, which is replaced. A special token of one ("?") is none."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    special = [re.findall(r"\w+|\S", token.content) for token in added if token.special]
    spaced = [r"\s*".join(map(re.escape, parts)) for parts in special if len("".join(parts)) > 1]
    return re.compile(f"(?={'|'.join([_TAG, *spaced])}).", re.IGNORECASE | re.DOTALL)


def build_prompt(question: str, template: str = PROMPT, tokenizer=None) -> str:
    """The text that a policy starts from; a missing question mark is added."""
    question = neutralize(question, tokenizer).strip().removesuffix("?") + "?"
    return template.replace("{question}", question)


@cache
def vocabulary_size(tokenizer) -> int:
    """One more than the largest id the tokenizer knows: `len` is less where ids have holes."""
    return max(tokenizer.get_vocab().values()) + 1


def prompt_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids that a model starts from: of its chat template, if any, up to the reply's opening."""
    if not tokenizer.chat_template:
        return tokenizer(texts)["input_ids"]
    chats = [[{"role": "user", "content": text}] for text in texts]
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)


def reply_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of texts that join a context: no opening token, no special token for a text's own."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def number_documents(documents: list[str]) -> str:
    """`Doc 1: ...` on a line each: the form in which a simulator writes and a policy reads."""
    return "\n".join(f"Doc {i}: {text}" for i, text in enumerate(documents, 1))


def split_documents(text: str, limit: int) -> list[str]:
    """Undo `number_documents` on a simulator's text: at most `limit` documents, none empty."""
    parts = [" ".join(part.split()) for part in re.split(r"Doc \d+:", text)[1:]]
    return [part for part in parts if part][:limit]


def wrap_documents(numbered: str) -> str:
    """The whole block that is appended to the policy's context after a search."""
    return f"\n\n<information>\n{numbered}{CLOSING}"
