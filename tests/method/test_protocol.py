"""The texts that policy and search engine exchange."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from minizs import protocol
from minizs.models import loading
from minizs.protocol import Action, completes_action, neutralize, parse_action, split_documents
from minizs.sampling import StopStrings

repeatable = settings(max_examples=1000, derandomize=True, deadline=None, database=None)

# ---- Actions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, kind, content",
    [
        ("<think> hm </think> <search> a b </search>", "search", "a b"),
        ("<answer>\nParis\n</answer>\n", "answer", "Paris"),
        ("<answer></answer>", "answer", ""),  # it answered, with nothing
        ("<search> \n </search>", "invalid", ""),
        ("<search>a</answer>", "invalid", ""),
        ("<answer> Paris", "invalid", ""),
        ("Paris </answer>", "invalid", ""),
        ("<Search>a</Search>", "invalid", ""),
        ("", "invalid", ""),
    ],
)
def test_actions(text, kind, content):
    """An action is a pair of tags, each in its exact spelling, with something in it to search."""
    assert parse_action(text) == Action(kind, content)


def test_the_first_closing_tag_decides():
    """A search is not preferred to an answer that comes before it, nor the other way round."""
    answer, search = "<answer>a</answer>", "<search>b</search>"
    assert parse_action(answer + search) == Action("answer", "a")
    assert parse_action(search + answer) == Action("search", "b")
    assert parse_action("</search>" + answer) == Action("invalid")


@pytest.mark.parametrize(
    "text",
    [
        "I use <answer> tags.</think> <answer>Shakespeare</answer>",
        "<answer> or rather <answer>Shakespeare</answer>",
        "<search> or rather <answer>Shakespeare</answer>",
    ],
)
def test_the_last_opening_tag_begins_the_action(text):
    """Who mentions a tag and then uses it means the second one."""
    assert parse_action(text) == Action("answer", "Shakespeare")


@pytest.mark.parametrize(
    "text, action",
    [
        ("<think>so <answer>x</answer></think> <answer>y</answer>", Action("answer", "y")),
        ("<think>so <answer></think> y</answer>", Action("invalid")),
        ("<think>so <answer>x</answer>", Action("invalid")),  # a thought without an end
        ("<think>a</think><think><search>q</search></think>", Action("invalid")),
        ("<answer>New<think>or not?</think>York</answer>", Action("answer", "New York")),
        ("</ans<think></think>wer>", Action("invalid")),
    ],
)
def test_nothing_in_a_thought_acts(text, action):
    """Tags between <think> and </think> are words about tags."""
    assert parse_action(text) == action


@pytest.mark.parametrize(
    "text, kept",
    [
        ("<answer>x</answer> or </answer>", "<answer>x</answer>"),
        ("<think></search></think><search>q</search> <think></search>", None),
        ("</search> <answer>x</answer>", "</search>"),
        ("<think>only</answer>", "<think>only</answer>"),
    ],
)
def test_a_turn_up_to_its_action(text, kept):
    """It ends with the tag that decides, which is not always the last of its kind."""
    kept = kept or "<think></search></think><search>q</search>"
    assert protocol.up_to_action(text) == kept
    assert parse_action(kept) == parse_action(text)


FOLDER = Path(protocol.__file__).with_name("prompts")


@pytest.mark.parametrize("name", ["search", "direct", "cot", "rag"])
def test_to_quote_a_prompt_is_no_action(name):
    """Whatever stretch of the shipped prompts a policy repeats: it searches and answers nothing."""
    text = (FOLDER / f"{name}.txt").read_text()
    places = [i for i, letter in enumerate(text) if letter in "<. "] + [len(text)]
    for start in places:
        for end in places:
            assert parse_action(text[start:end]).kind == "invalid"


PIECES = [
    "<think>",
    "</think>",
    "<search>",
    "</search>",
    "<answer>",
    "</answer>",
    "a",
    " ",
    "<",
    ">",
]
TURNS = st.lists(st.sampled_from(PIECES), max_size=12).map("".join)


@repeatable
@given(TURNS, TURNS)
def test_what_follows_the_end_of_a_turn_changes_nothing(turn, more):
    """Once a turn is complete, its action is settled. Before that it has none."""
    if completes_action(turn):
        assert parse_action(turn + more) == parse_action(turn)
    else:
        assert parse_action(turn) == Action("invalid")


@repeatable
@given(TURNS, st.sampled_from([(), ("</search>", "</answer>\n"), ("</think></answer>", "er>")]))
def test_generation_stops_where_an_action_is_complete(turn, extra):
    """The stop condition and the parser agree, whatever tokens the tags are made of."""
    tokenizer = make_tokenizer(extra)
    ids = tokenizer.encode(turn, add_special_tokens=False)
    stop = StopStrings(protocol.STOP, tokenizer, completes_action)
    for length in range(1, len(ids) + 1):
        text = protocol.turn_text(tokenizer, ids[:length])
        assert stop.complete(ids[:length]) == completes_action(text)
        if completes_action(text):
            break


# ---- Prompts ------------------------------------------------------------------------------------


def test_a_prompt_holds_the_question():
    """The question stands in it as it is, with one question mark, and is no template itself."""
    text = protocol.build_prompt("  who wrote {question} ")
    assert text.endswith("Question: who wrote {question}?\n")
    assert protocol.build_prompt("who?", "Q: {question} A:") == "Q: who? A:"
    for tag in ("think", "search", "information", "answer"):
        assert f"<{tag}>" in protocol.PROMPT


@pytest.mark.parametrize("mark", protocol.QUESTION_MARKS)
def test_a_question_has_one_question_mark(mark):
    """A mark of any script is one; a question without any gets "?"."""
    assert protocol.build_prompt(f"谁{mark} ", "{question}") == f"谁{mark}"
    assert protocol.build_prompt("谁", "{question}") == "谁?"


def test_a_thought_is_opened_by_the_model():
    """A chat template that opens the reply's thought leaves that to the model here: whoever reads
    the turn can tell where the thought begins. A thought that the template closes stays."""
    tokenizer = make_tokenizer()
    template = "{% for m in messages %}{{ m['content'] }}|{% endfor %}"
    for ending, expected in (("<think>\n", ""), ("<think>\n\n</think>\n\n",) * 2):
        tokenizer.chat_template = template + ending.replace("\n", "{{ '\n' }}")
        [ids] = protocol.prompt_ids(tokenizer, ["hello"])
        assert tokenizer.decode(ids) == "hello|" + expected


@pytest.mark.parametrize("content", ["m['content'][0]['text']", "m['content'] | join('', 'text')"])
def test_a_template_that_takes_parts_is_given_parts(content):
    """Templates of models that read images leave out a plain text: the question would be lost."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ " + content + " }}>{% endfor %}"
    prompts = protocol.prompt_ids(tokenizer, ["hello", "you & {me}"])
    assert tokenizer.batch_decode(prompts) == ["<hello>", "<you & {me}>"]


# ---- Documents ----------------------------------------------------------------------------------


def test_documents_come_back_as_they_were_written():
    """`split_documents` undoes `number_documents`, up to the number of documents asked for."""
    documents = ["one", "two words", "3"]
    text = protocol.number_documents(documents)
    assert text == "Doc 1: one\nDoc 2: two words\nDoc 3: 3"
    assert split_documents(text, 9) == documents
    assert split_documents(text, 2) == documents[:2]
    assert split_documents("chat Doc 1:  a\n b Doc 2: \n\nDoc 10: c", 9) == ["a b", "c"]
    assert protocol.number_documents([]) == ""


@pytest.mark.parametrize(
    "mark",
    [
        "Doc {}:",
        "**Doc {}**:",
        "**Doc {}:**",
        "***Doc {}***",
        "**Doc {}**",
        "__Doc {}__ -",
        "`Doc {}`:",
        "### Doc {}\n",
        "# Document {}:",
        "Document {}:",
        "Doc {}：",
        "Doc {}.",
        "Doc {} –",
        "DOC {}:",
        "Doc #{}:",
        "[Doc {}]",
        "Document [{}]:",
        "- Doc {}:",
        "* **Document {}**:",
        "> Doc {}:",
        "[{}]",
        "({})",
        "{}.",
        "{})",
        "Doc. {}",
        "Doc {}",
        "Doc {} |",
        "Doc-{}:",
        "Doc {} of 2:",
        "1. Doc {}:",
        "【Doc {}】",
        "文档{}：",
        "문서 {}:",
        "Документ {}:",
        "Passage {}:",
        "**Result {}**",
        "**[{}]**",
        "- [{}]",
        "【{}】",
        "**{}.**",
        "### {}.",
        "{}\\.",
        "#{}:",
        "{}、",
        "{} –",
    ],
)
@pytest.mark.parametrize("between", ["\n", "\n\n---\n\n"])
def test_documents_are_read_in_markdown_and_otherwise(mark, between):
    """The marks that language models set are recognised, and nothing of them is left."""
    documents = ["Rome is *big*, since 753 BC.", "It is far [2]: 1,000 miles."]
    marked = [f"{mark.format(i)} {text}" for i, text in enumerate(documents, 1)]
    assert split_documents(f"Here you are:\n\n{between.join(marked)}\n", 5) == documents


@pytest.mark.parametrize(
    "text, documents",
    [
        ("Doc 1: He wrote Doc 2: the sequel.\nDoc 2: b", ["He wrote Doc 2: the sequel.", "b"]),
        (
            "Doc 1: He wrote Doc 2: a\nDoc 2: b, as Doc 1: says",
            ["He wrote Doc 2: a", "b, as Doc 1: says"],
        ),
        ("Doc 1: steps:\n1. x\n2. y\n[3] z\nDoc 2: b", ["steps: 1. x 2. y [3] z", "b"]),
        ("1. Born in\n1999. Died\n2. b", ["Born in 1999. Died", "b"]),
        ("[1] a cites\n[7] c\n[2] b", ["a cites [7] c", "b"]),
        ("[0] a\n[1] b", ["a", "b"]),
        ("1. a\n1. b", ["a", "b"]),
        ("```\nDoc 1: a\nDoc 2: b\n```", ["a", "b"]),
    ],
)
def test_marks_inside_a_document_are_text(text, documents):
    """Those of another kind, those that do not count on, and a reference within a line."""
    assert split_documents(text, 5) == documents


def test_documents_on_one_line():
    """A word-level model writes no line breaks, and a bad one may repeat a number."""
    assert split_documents("Doc 1: a Doc 2: b Doc 2: c", 5) == ["a", "b", "c"]
    assert split_documents("Doc 1: a Doc 1: b", 5) == ["a", "b"]


def test_a_title_beside_the_mark_belongs_to_the_document():
    """Bold type that opens in the mark and closes behind the title leaves no stars."""
    assert split_documents("**Doc 1: Rome** It is big", 3) == ["Rome It is big"]
    assert split_documents("Doc 1(Title: Rome) It is big", 3) == ["(Title: Rome) It is big"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no documents",
        "see doc 3 for more",
        "Documentary 1. It",
        "in 1999. Then",
        "1999. Then",
        "Document 5 was signed.",
    ],
)
def test_what_only_resembles_a_mark_is_none(text):
    """Words that begin alike, and numbers within a sentence, begin no document."""
    assert split_documents(text, 9) == []


def test_documents_are_wrapped():
    """The block opens and closes, whatever is in it."""
    block = protocol.wrap_documents("Doc 1: a")
    assert block == "\n\n<information>\nDoc 1: a\n</information>\n\n"


# ---- Neutral text (tests/scripts/test_hostile.py has what it must withstand) ---------------------


def with_special_tokens(*texts: str):
    """A stand-in for a tokenizer of which only the special tokens matter."""

    class Tokens(SimpleNamespace):
        __hash__ = object.__hash__

    tokens = [SimpleNamespace(content=text, special=True) for text in texts]
    return Tokens(added_tokens_decoder=dict(enumerate(tokens)))


def test_each_of_many_special_tokens_is_found():
    """Tokens with common beginnings, and tokens that begin others, each lose their force."""
    names = [f"[control_{i}]" for i in range(300)] + ["<unk", "<unk>", "<unknown>", "[INST]"]
    tokenizer = with_special_tokens(*names)
    for name in names:
        assert neutralize(f"a {name} b", tokenizer) == f"a ({name[1:]} b"
        assert neutralize(name.upper(), tokenizer) == "(" + name.upper()[1:]
    parentheses = with_special_tokens("(end)")
    assert neutralize("(end) (ends) (END)", parentheses) == "[end) (ends) [END)"
    assert neutralize("[control_300] [control_] <un>", tokenizer) == "[control_300] [control_] <un>"


@pytest.mark.parametrize(
    "names",
    [
        [f"[control_{i}]" for i in range(1000)] + [f"<SPECIAL_{i}>" for i in range(1000)],
        [f"<unused{i}>" for i in range(6000)],
        [f"madeupword{i:04d}" for i in range(1000)],
        [f"{chr(0x4E00 + i)}言葉" for i in range(5000)],
        [f"{a}{b}{c}.*+?" for a in "^$[](|-\\&" for b in "abcdefghij" for c in range(100)],
    ],
)
def test_neutralising_is_fast_for_any_vocabulary(names):
    """A document of a hundred words takes less than 0.3 ms, the best of twenty times."""
    tokenizer = with_special_tokens(*names)
    text = "the river [1] flows through a <b>city</b> in Europe — naïve, 日本 [control_ made " * 8
    neutralize(text, tokenizer)  # the first call compiles
    times = []
    for _ in range(20):
        start = time.perf_counter()
        assert neutralize(text, tokenizer) == text
        times.append(time.perf_counter() - start)
    assert min(times) < 0.3e-3


def test_the_tiny_worlds_prompt_is_its_own():
    """The tiny base model was made with its own wording, which lies in its folder."""
    assert loading.load_prompt("tiny") != protocol.PROMPT


# ---- Tokens as text -----------------------------------------------------------------------------


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte: every character that is not ASCII spans two to four of them."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@given(
    st.text(
        st.sampled_from("aé مرحبا北京😀👩\u200d👧 �") | st.characters(exclude_categories=["Cs"])
    )
)
def test_pieces_are_whole_characters_and_join_to_the_text(text):
    """A character that spans tokens is the piece of its last token; none is broken or lost."""
    tokenizer = byte_tokenizer()
    pieces = protocol.decode_pieces(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(pieces) == text and len(pieces) == len(text.encode())
    if "\ufffd" not in text:  # which looks like a character that is not complete yet
        assert [piece for piece in pieces if piece] == list(text)


def test_pieces_of_ids_that_spell_no_text():
    """Bytes that no character has are shown as such, and what follows them is whole."""
    tokenizer = byte_tokenizer()
    broken = tokenizer("é")["input_ids"][:1]
    good = tokenizer("ab é")["input_ids"]
    for ids in (broken + good, broken * 40 + good, good + broken):
        pieces = protocol.decode_pieces(tokenizer, ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces).replace("\ufffd", "") == "ab é"
    assert protocol.decode_pieces(tokenizer, []) == []


def test_pieces_of_a_tokenizer_that_puts_spaces_between_words():
    """A word's piece has the space before it, as the whole text has."""
    tokenizer = loading.load_tokenizer("tiny")
    ids = tokenizer("when was the founder born? <think> I know </think>")["input_ids"]
    pieces = protocol.decode_pieces(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) and pieces[1] == " was"
