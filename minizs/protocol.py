"""The language in which the policy and the search engine talk: tags, prompt, actions, documents.

The policy writes `<think>…</think>`, then `<search>…</search>` or `<answer>…</answer>`; documents
come back in an `<information>` block (paper section 3.6 and Table 1). All text that is not the
policy's own passes through `neutralize` first, so that it can be read but does nothing.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

PROMPT = Path(__file__).with_name("prompts").joinpath("search.txt").read_text(encoding="utf-8")
INVALID_ACTION = "\n\nThat action is not valid. Let me try again.\n\n"
CLOSING = "\n</information>\n\n"

# ---- Actions ------------------------------------------------------------------------------------

STOP = ("</search>", "</answer>")  # a turn ends at the first of these that is outside a thought
THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
CLOSING_TAG = re.compile(r"</(search|answer)>")
# The thoughts of other models, which may call them something else: [THINK], <thinking>, ◁think▷.
THOUGHT_NAME = r"(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning)"
THOUGHT_BEGIN = re.compile(rf"[<\[◁]{THOUGHT_NAME}[>\]▷]", re.IGNORECASE)
THOUGHT_END = re.compile(rf"[<\[◁]/{THOUGHT_NAME}[>\]▷]", re.IGNORECASE)


@dataclass(frozen=True)
class Action:
    """What a turn of the policy does."""

    kind: str  # "search", "answer" or "invalid"
    content: str = ""  # the query or the answer


def parse_action(text: str) -> Action:
    """The action of one turn, read from the policy's own words alone.

    Tags inside `<think>…</think>` do nothing, and a thought without an end goes on to the end of
    the turn. Outside, the first `</search>` or `</answer>` decides: its content begins behind the
    last opening tag of its kind before it. Without such a tag, or with a blank query, the action is
    invalid. Text behind the deciding tag changes nothing.
    """
    spoken = THOUGHT.sub(" ", text)
    closing = CLOSING_TAG.search(spoken)
    if closing is None:
        return Action("invalid")
    kind = closing[1]
    _, opening, content = spoken[: closing.start()].rpartition(f"<{kind}>")
    content = content.strip()
    if not opening or (kind == "search" and not content):
        return Action("invalid")
    return Action(kind, content)


def completes_action(text: str) -> bool:
    """Whether a turn that reads so far has to end: a closing tag stands outside every thought.
    It agrees with `parse_action`, which reads nothing behind that tag."""
    return CLOSING_TAG.search(THOUGHT.sub(" ", text)) is not None


def up_to_action(text: str) -> str:
    """A turn as far as the tag that decides its action: generation would have stopped there."""
    spoken = THOUGHT.sub(lambda thought: " " * len(thought[0]), text)  # all keeps its place
    closing = CLOSING_TAG.search(spoken)
    return text[: closing.end()] if closing else text


def without_thoughts(text: str) -> str | None:
    """What a reply of another model (a simulator or a judge) says behind its last thought. None if
    a thought has no end: then it has not said anything yet."""
    *_, words = THOUGHT_END.split(text)
    return None if THOUGHT_BEGIN.search(words) else words


def is_thought_tag(text: str) -> bool:
    """Whether a token is a tag at which a thought begins or ends."""
    return bool(THOUGHT_BEGIN.fullmatch(text) or THOUGHT_END.fullmatch(text))


def turn_text(tokenizer, ids: list[int]) -> str:
    """The words of a turn. Special tokens stay in it, since a model's own tag may be one."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# How many tokens wait for a character to be complete. It has at most four bytes, a token each;
# beyond this many the bytes are broken, and are shown as such.
MOST_TOKENS_A_CHARACTER = 16


def decode_pieces(tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text, so that the pieces join to the whole of it.

    A character can span tokens (Arabic, emoji, any script in a byte-level vocabulary). Until it is
    complete its tokens add nothing, and the last of them adds all of it.
    """
    decode = partial(tokenizer.batch_decode, clean_up_tokenization_spaces=False)
    groups: list[list[int]] = []  # tokens that spell whole characters together
    group: list[int] = []
    for token in ids:
        group.append(token)
        is_open = decode([group])[0].endswith("\ufffd")
        if not is_open or len(group) == MOST_TOKENS_A_CHARACTER:
            groups.append(group)
            group = []
    if group:
        groups.append(group)
    # Each is decoded behind its predecessor: some tokenizers put spaces only between words.
    predecessors = [[], *groups][: len(groups)]
    texts_before = decode(predecessors)
    texts = decode([[*first, *second] for first, second in zip(predecessors, groups, strict=True)])
    pieces: list[str] = []
    for group, text_before, text in zip(groups, texts_before, texts, strict=True):
        pieces += [""] * (len(group) - 1)
        pieces.append(text[len(text_before) :])
    return pieces


# ---- Prompts and replies as ids -----------------------------------------------------------------


QUESTION_MARKS = ("?", "？", "؟", "՞", "\u037e", "⸮", "﹖", "፧")  # also of other scripts


def build_prompt(question: str, template: str = PROMPT, tokenizer=None) -> str:
    """The text that a policy starts from. A question without its question mark gets one."""
    question = neutralize(question, tokenizer).strip()
    if not question.endswith(QUESTION_MARKS):
        question += "?"
    return template.replace("{question}", question)


def prompt_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids that a model starts from. With a chat template a text is one message of the user, and
    the ids end where the reply begins.

    Some templates open the reply's thought themselves. That `<think>` is left out here, so that the
    model writes it: a turn can then be read from its own words alone.
    """
    if not tokenizer.chat_template:
        return tokenizer(texts)["input_ids"]
    chats = [[{"role": "user", "content": text}] for text in texts]
    prompts = chat_texts(tokenizer, chats, add_generation_prompt=True)
    prompts = [re.sub(r"<think>\s*\Z", "", prompt) for prompt in prompts]
    return tokenizer(prompts, add_special_tokens=False)["input_ids"]


PROBE = "words"


def chat_texts(tokenizer, chats: list[list[dict]], **options) -> list[str]:
    """Conversations, in the form that the chat template gives them.

    Templates of models that also read images may want the parts of a message in a list, and leave
    out a plain text without a word: one that leaves out `PROBE` is given parts. Raises whatever a
    template raises, which is a program.
    """
    arguments = getattr(tokenizer, "chat_template_args", {})  # see models/loading.py

    def render(chats: list[list[dict]]) -> list[str]:
        return tokenizer.apply_chat_template(chats, tokenize=False, **options, **arguments)

    probe = [{"role": "user", "content": PROBE}]
    if all(PROBE not in text.lower() for text in render([probe])):
        if any(PROBE in text.lower() for text in render([_in_parts(probe)])):
            chats = [_in_parts(chat) for chat in chats]
    return render(chats)


def _in_parts(chat: list[dict]) -> list[dict]:
    return [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in chat]


def reply_ids(tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of texts that join a context: without an opening token, and without a special token
    where the text spells one out."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]


@cache
def vocabulary_size(tokenizer) -> int:
    """One more than the largest id the tokenizer knows. Its `len` is less where ids have holes."""
    return max(tokenizer.get_vocab().values()) + 1


# ---- Documents ----------------------------------------------------------------------------------

# What language models call a document, and what else they may call it.
DOCUMENT = r"documento?|dokument|документ|doc|文[档件書书]|ドキュメント|문서"
PASSAGE = "passage|result|snippet|source"
# Before the number, at the beginning of a line: a heading, a quotation or a list; bold, italics or
# code, which closes behind the number or behind the colon.
LINE = r"^[ \t]*(?:(?:[#>•*+-]+|\d+[.)])[ \t]+)*(?P<markup>\*\*\*|\*\*|__|[*_`])?"
CLOSED = r"(?P<closed>(?P=markup))?[ \t]*"
CLOSED_LATER = "(?P<closed_later>(?P=markup))?"


def _mark(number: str, colon: str) -> re.Pattern:
    return re.compile(LINE + number + CLOSED + colon + CLOSED_LATER, re.IGNORECASE | re.MULTILINE)


def _named(words: str) -> str:
    """ "Doc 1", "[Document 1]", "Doc #1", "Doc. 1", "Document [1]", "Document 1 of 3"."""
    return (
        rf"[\[【]?(?:{words})\.?[ \t_-]*(?:#|no\.?)?[ \t]*[\[(（]?(?P<number>\d+)[\])】）]*"
        r"(?:[ \t]*(?:of|/)[ \t]*\d+)?"
    )


# A colon or the like. Without one, the number is in brackets, in bold type or alone in its line.
COLON = r"(?:[:：.)–—-]+|(?<=[\]】])|(?=[ \t]*(?:\(|$))|(?(closed)|(?!)))"
DOCUMENT_MARK = _mark(_named(DOCUMENT), COLON)
INLINE_MARK = re.compile(r"Doc (?P<number>\d+)[:：]")  # in the middle of a line
# How a text numbers its documents if it has no such mark; the first of these that it has counts.
OTHER_MARKS = (
    _mark(_named(PASSAGE), COLON),
    _mark(r"[\[(【（](?P<number>\d+)[\])】）]", "[:：.-]*"),
    _mark(r"#?(?P<number>\d+)", r"(?:\\?[.)：:](?=[ \t*_`]|$)|、|[–—-](?=[ \t]))"),
    _mark(_named(DOCUMENT), r"(?:[,;|=→]+|(?<=[ \t]))"),
)
# Lines between documents or around them: rules, and the fences of a block of code.
RULE = re.compile(r"^[ \t]*(?:(?:[-*_=][ \t]*){3,}|```\w*[ \t]*)$", re.MULTILINE)


def number_documents(documents: Sequence[str]) -> str:
    """`Doc 1: …` on a line each: the form in which a simulator writes and a policy reads."""
    return "\n".join(f"Doc {number}: {text}" for number, text in enumerate(documents, 1))


def split_documents(text: str, limit: int) -> list[str]:
    """Undo `number_documents`: at most `limit` documents, none of them empty.

    Language models number documents in many ways, so Markdown and other words are read too. A text
    without the word "Doc" may number them `[1]` or, failing that, `1.`.
    """
    text = RULE.sub("", text)
    marks = _find_marks(text)
    if not marks:
        return []
    ends = [*(mark.start() for mark in marks[1:]), len(text)]
    documents = []
    for mark, end in zip(marks, ends, strict=True):
        document = _without_open_markup(mark, text[mark.end() : end])
        document = " ".join(document.split())
        if document:
            documents.append(document)
    return documents[:limit]


def _find_marks(text: str) -> list[re.Match]:
    """Where documents begin."""
    marks = list(DOCUMENT_MARK.finditer(text))
    numbers = {int(mark["number"]) for mark in marks}
    places = {place for mark in marks for place in range(*mark.span())}
    for mark in INLINE_MARK.finditer(text):
        # Where documents begin on lines of their own, "Doc 2:" within a line refers to one of them.
        is_reference = len(numbers) > 1 and int(mark["number"]) in numbers
        if mark.start() not in places and not is_reference:
            marks.append(mark)
    if marks:
        return sorted(marks, key=re.Match.start)
    candidates = (_counting(list(pattern.finditer(text))) for pattern in OTHER_MARKS)
    return next(filter(None, candidates), [])


def _counting(marks: list[re.Match]) -> list[re.Match]:
    """Those of the marks that count from 1 (or from 0), or all if they have the same number: what
    looks like a mark, but is out of order, is a year or a reference."""
    numbers = [int(mark["number"]) for mark in marks]
    first = 0 if 0 in numbers else 1
    if set(numbers) == {first}:
        return marks
    counting = []
    for mark, number in zip(marks, numbers, strict=True):
        if number == first + len(counting):
            counting.append(mark)
    return counting


def _without_open_markup(mark: re.Match, document: str) -> str:
    """Where `**Doc 1: Title** text` opens bold type in its mark, remove what closes it later."""
    groups = mark.groupdict()  # empty but for the number where the mark is within a line
    markup = groups.get("markup")
    if markup and not groups["closed"] and not groups["closed_later"]:
        return document.replace(markup, "", 1)
    return document


def wrap_documents(numbered: str) -> str:
    """The whole block that is appended to the policy's context after a search."""
    return f"\n\n<information>\n{numbered}{CLOSING}"


# ---- Text that is not the policy's own ----------------------------------------------------------

TAG = r"<[\s/\\]*(?:think|search|information|answer)|<\s*\|[^>]{0,80}\|\s*>"
SPACES = r"\s*"
PLAIN_ASCII = re.compile(r"[\t\n\v\f\r\x1c-\x1f\x20-\x7e]*")


def neutralize(text: str, tokenizer=None) -> str:
    """The text, changed so that nothing in it acts as a tag or as a special token.

    What begins like one of our tags, like `<|…|>` or like a special token of the tokenizer gets "("
    for its first character, or "[" for a "(". Upper and lower case and spaces inside change nothing
    about that. A lone surrogate becomes "?". A tokenizer may see through wide letters, accents and
    hidden characters: a text that hides a tag behind these loses them. All other text stays as it
    is.
    """
    marks = _marks(tokenizer)
    text = marks.sub(_disarm, text.encode("utf-8", "replace").decode())
    if PLAIN_ASCII.fullmatch(text):
        return text  # nothing can hide in it
    bare = unicodedata.normalize("NFKD", text).translate(_BARE)
    return marks.sub(_disarm, bare) if marks.search(bare) else text


def _disarm(mark: re.Match) -> str:
    """What stands for the first character of what could act."""
    return "[" if mark[0] == "(" else "("


class _BareCharacters(dict):
    """For `str.translate`: removes accents and what is invisible, and keeps the rest. A character
    is looked up in Unicode's tables when it is first met."""

    def __missing__(self, code: int) -> int | None:
        character = chr(code)
        visible = character.isspace() or unicodedata.category(character)[0] not in "MC"
        self[code] = code if visible else None
        return self[code]


_BARE = _BareCharacters()


@cache
def _marks(tokenizer) -> re.Pattern:
    """Matches the first character of whatever could act. A special token of one character ("?") is
    ordinary text and no mark."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    spellings = []
    for token in added:
        parts = re.findall(r"\w+|\S", token.content)
        if token.special and len("".join(parts)) > 1:
            spellings.append(_spelling(parts))
    alternatives = [TAG, _any_of(spellings)] if spellings else [TAG]
    return re.compile(f"(?={'|'.join(alternatives)}).", re.IGNORECASE | re.DOTALL)


def _spelling(parts: list[str]) -> list[str]:
    """A special token as a sequence of patterns: its characters, with spaces between parts."""
    atoms: list[str] = []
    for part in parts:
        atoms += [SPACES] if atoms else []
        atoms += [re.escape(character) for character in part]
    return atoms


FEW = 8  # branches that are tried one after the other


def _any_of(sequences: Iterable[list[str]]) -> str:
    """A pattern that matches any of these sequences of patterns. Common beginnings are tried once:
    with a thousand special tokens the search would take milliseconds a document otherwise."""
    branches: dict[str, list[list[str]]] = {}
    for first, *rest in sequences:
        branches.setdefault(first, []).append(rest)
    patterns = {}
    for first, rests in branches.items():
        whole = [] in rests  # one ends here, and what would follow in others does not matter
        patterns[first] = first if whole else first + _any_of(rests)
    spaces = [patterns.pop(first) for first in list(patterns) if first == SPACES]
    alternatives = [*_choice(sorted(patterns.items())), *spaces]
    return alternatives[0] if len(alternatives) == 1 else f"(?:{'|'.join(alternatives)})"


def _choice(branches: list[tuple[str, str]]) -> list[str]:
    """Alternatives, each with its first character. Many are halved again and again, so that few are
    looked at for a character, and only one set of characters where none begins with it."""
    if len(branches) <= FEW:
        return [pattern for _, pattern in branches]
    middle = len(branches) // 2
    halves = []
    for half in (branches[:middle], branches[middle:]):
        firsts = "".join(first for first, _ in half)
        halves.append(f"(?=[{firsts}])(?:{'|'.join(_choice(half))})")
    return halves
