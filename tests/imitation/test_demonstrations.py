"""Demonstrations: what is read from a file, what is worth imitating, and its tokens and mask."""

import json
from dataclasses import asdict, replace

import pytest
from conftest import ScriptedHead, make_model, make_tokenizer

from minizs import UserError
from minizs.engines.bm25 import BM25
from minizs.imitation import demonstrations
from minizs.imitation.plain_searcher import search_plainly
from minizs.rollout import Limits, Policy, rollout
from minizs.trajectory import Example, Turn

TOKENIZER = make_tokenizer()
DOCUMENTS = ["Rome lies in Italy", "Oslo lies in Norway"]
EXAMPLE = Example("Where is Rome?", ("Italy",), "atlas")
POLICY = Policy(None, TOKENIZER, "Q: {question}", Limits(4, 120, 200, 900))


def played(example: Example = EXAMPLE):
    [row] = search_plainly([example], BM25(DOCUMENTS, 1), max_searches=3)
    return row


def decoded(ids: list[int], mask: list[int], bit: int) -> str:
    return TOKENIZER.decode([token for token, m in zip(ids, mask, strict=True) if m == bit])


def test_the_loss_is_on_the_policys_own_turns():
    """Mask 1 is on each turn up to its closing tag; prompt and documents have 0; no
    end-of-sequence token follows the answer, where generation stops."""
    ids, mask = demonstrations.encode_demonstration(played(), POLICY)
    assert decoded(ids, mask, 1) == (
        "<think> I should look this up </think> <search> Where is Rome </search>"
        "<think> Rome lies in Italy </think> <answer> Italy </answer>"
    )
    assert decoded(ids, mask, 0) == (
        "Q: Where is Rome?\n\n<information>\nDoc 1: Rome lies in Italy\n</information>\n\n"
    )
    assert mask[-1] == 1


def test_tokens_are_those_of_a_rollout():
    """A policy that writes the demonstration's turns gets a trajectory of the same ids and mask."""
    demonstration = played()
    script = [
        token
        for turn in demonstration.turns
        for token in TOKENIZER(turn.text, add_special_tokens=False)["input_ids"]
    ]
    model = make_model(vocab_size=len(TOKENIZER), max_position_embeddings=1024)
    model.lm_head = ScriptedHead(script, len(TOKENIZER))
    for document_tokens in (200, 52):  # whole, and cut
        limits = replace(POLICY.limits, document_tokens=document_tokens)
        policy = replace(POLICY, model=model, limits=limits)
        model.lm_head.script = iter(script)
        [row] = rollout(policy, [EXAMPLE], BM25(DOCUMENTS, 1))
        assert row.answer == "Italy"
        expected = (row.ids, row.loss_mask)
        assert demonstrations.encode_demonstration(demonstration, policy) == expected


def test_a_chat_template_opens_the_prompt():
    """Where the tokenizer has one, the question stands in it, as in a rollout."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    policy = replace(POLICY, tokenizer=tokenizer)
    ids, mask = demonstrations.encode_demonstration(played(), policy)
    assert tokenizer.decode(ids).startswith("[Q: Where is Rome?]<think>")
    assert mask[: len("[Q: Where is Rome?]")] == [0] * len("[Q: Where is Rome?]")


@pytest.mark.parametrize(
    "limits",
    [Limits(1, 120, 200, 900), Limits(4, 60, 200, 900), Limits(4, 120, 200, 200)],
)
def test_what_exceeds_a_limit_is_no_demonstration(limits):
    """A policy could not write it: too many turns, too long a turn, too long a whole."""
    assert demonstrations.encode_demonstration(played(), POLICY) is not None
    policy = replace(POLICY, limits=limits)
    assert demonstrations.encode_demonstration(played(), policy) is None


def test_what_stands_behind_a_closing_tag_is_not_imitated():
    """Another model's end-of-turn token, for instance, which its text may hold."""
    demonstration = played()
    expected = demonstrations.encode_demonstration(demonstration, POLICY)
    for turn in demonstration.turns:
        turn.text = f" {turn.text}<|im_end|>\n"
    assert demonstrations.encode_demonstration(demonstration, POLICY) == expected
    for turn in demonstration.turns:
        turn.text += f"or </{turn.action}>, <think> or </{turn.action}>"
    assert demonstrations.encode_demonstration(demonstration, POLICY) == expected


def test_what_is_exemplary():
    """It searched, did nothing invalid, and answered with reward enough."""
    good = played()
    invalid, search, answer = Turn("?", "invalid", ""), *good.turns
    assert demonstrations.is_exemplary(good, 1.0)
    assert demonstrations.is_exemplary(replace(good, reward=0.5), 0.5)
    for other in (
        replace(good, reward=0.5),
        replace(good, turns=[answer]),
        replace(good, turns=[search]),
        replace(good, turns=[search, invalid, answer]),
        replace(good, turns=[replace(search, documents=None), answer]),
    ):
        assert not demonstrations.is_exemplary(other, 1.0)


def write(path, *rows) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def test_a_file_of_trajectories_is_read_back(tmp_path):
    """Lines of evaluation.jsonl (with an index, without tokens) and of trajectories.jsonl (with a
    step, tokens and pieces) give the turns that were played; what else they say is not believed."""
    rows = [played(), played(Example("Where is Oslo?", ("Norway",)))]
    path = tmp_path / "evaluation.jsonl"
    lies = {"reward": 0.0, "answer": "Mars", "ids": [5], "loss_mask": [1], "logprobs": [0.0]}
    lines = [{"index": 0, **asdict(rows[0])}, {**asdict(rows[1]), **lies, "pieces": ["a"]}]
    write(path, *lines)
    read = demonstrations.read_demonstrations(path)
    assert [row.turns for row in read] == [row.turns for row in rows]
    assert [row.example for row in read] == [row.example for row in rows]
    assert [row.answer for row in read] == ["Italy", "Norway"]
    assert [row.reward for row in read] == [1.0, 1.0]
    assert not any(row.ids for row in read)


GOOD_TURN = {"text": "<answer> a </answer>"}


@pytest.mark.parametrize(
    "row",
    [
        {"question": "a", "answers": ["b"]},
        {"example": {"question": "a", "answers": []}, "turns": [GOOD_TURN]},
        {"example": {"question": "a", "answers": "b"}, "turns": [GOOD_TURN]},
        {"example": {"question": "a", "answers": ["b"]}, "turns": []},
        {"example": {"question": "a", "answers": ["b"]}, "turns": ["text"]},
        {"example": {"question": "a", "answers": ["b"]}, "turns": [{"text": None}]},
        {
            "example": {"question": "a", "answers": ["b"]},
            "turns": [GOOD_TURN | {"documents": "Doc"}],
        },
    ],
)
def test_a_row_of_another_layout_is_named(tmp_path, row):
    """One sentence says which row it is, what it should have, and what it has."""
    path = tmp_path / "rows.jsonl"
    write(path, asdict(played()), row)
    with pytest.raises(UserError, match="Row 2 of .*rows.jsonl is no demonstration.*'turns'") as e:
        demonstrations.read_demonstrations(path)
    assert "\n" not in str(e.value)


def test_files_that_hold_nothing_to_imitate(tmp_path):
    """A file that is missing, empty or no JSON, or holds wrong answers alone, is one sentence."""
    with pytest.raises(UserError, match="no file .*nowhere.jsonl.*--warm_start"):
        demonstrations.read_demonstrations(tmp_path / "nowhere.jsonl")
    for name, text, message in (("a.jsonl", "", "no demonstration"), ("b.jsonl", "{", "row 1")):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=message):
            demonstrations.read_demonstrations(tmp_path / name)
    wrong = replace(played(), reward=0.0)
    with pytest.raises(UserError, match="nothing to imitate: 0 of 1 .* 1 did not search"):
        demonstrations.select([wrong], POLICY, 1.0)


def test_the_selection_says_what_is_left_out(capsys):
    """It counts what is wrong and what is too long, and gives the rest its tokens."""
    short = replace(POLICY, limits=replace(POLICY.limits, turn_tokens=100))
    long = played(Example("Where is Rome, the old town on the river, by the way?", ("Italy",)))
    chosen = demonstrations.select([played(), replace(played(), reward=0.0), long], short, 1.0)
    assert [(row.ids, row.loss_mask) for row in chosen] == [
        demonstrations.encode_demonstration(played(), short)
    ]
    assert len(chosen[0].logprobs) == len(chosen[0].ids)
    assert capsys.readouterr().out.startswith("1 of 3 demonstrations are taken. 1 did not")


def test_questions_are_held_out_whole():
    """All demonstrations of a question are on one side, about the share is held out, the order
    stays, and something is left to learn from."""
    rows = [played(Example(f"Where is Rome, {i}?", ("Italy",))) for i in range(200)]
    train, held_out = demonstrations.split_held_out(rows + rows, 0.2)
    learned = {row.example.question for row in train}
    assert 20 < len(held_out) / 2 < 60 and len(train) + len(held_out) == 400
    assert learned.isdisjoint(row.example.question for row in held_out)
    assert [row for row in rows + rows if row.example.question in learned] == train
    assert demonstrations.split_held_out(rows, 0.0) == (rows, [])
    for place in range(20):
        train, _ = demonstrations.split_held_out(rows[place : place + 1], 0.9)
        assert train
