"""The benchmarks: what they count, and that each runs to its end with the smallest settings."""

import importlib.util

import pytest
import torch
from conftest import make_model

from benchmarks import generate, logprobs, measure, memory, rollout, scale, step
from minizs import UserError
from minizs.protocol import number_documents, wrap_documents
from minizs.rollout import Limits
from minizs.trajectory import Example, Trajectory

ONE = "--threads 1 --repeats 1".split()


def trajectory(prompt: int, *parts: int) -> Trajectory:
    """Parts are by turns the policy's and others'."""
    row = Trajectory(Example("", ("",)))
    row.append([5] * prompt)
    for i, length in enumerate(parts):
        row.append([6] * length, None if i % 2 else [0.0] * length)
    return row


def lines(out: str) -> list[list[str]]:
    """The cells of the tables that were printed, headings and rules apart."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in out.splitlines()
        if line.startswith("|")
    ]
    return [row for row in rows if any(cell[:1].isdigit() for cell in row[1:])]


def test_sides_take_turns_and_warm_up():
    """Every side is called by turns, and its first call, which warms it up, does not count."""
    order = []

    def side(name: str):
        return lambda *arguments: order.append((name, *arguments)) or len(order)

    runs = measure.take_turns({"a": side("a"), "b": side("b")}, 2, "x")
    assert order == [(name, "x", repeat) for repeat in range(3) for name in "ab"]
    assert runs == {"a": [3, 5], "b": [4, 6]}  # without the first of each


def hold(megabytes: int):
    """A side that once takes as much memory as it is told, from a start of so much."""
    block = torch.ones(megabytes * measure.MB // 4)
    return lambda more, _: (torch.ones(more * measure.MB // 4) + block[0]).sum().item()


@pytest.mark.slow
def test_peak_memory_is_above_the_start_and_forgotten():
    """A peak leaves out what imports, models and earlier calls took."""
    sides = {"a": measure.Side(hold, 200, threads=1)}
    with measure.together(sides):
        much = measure.take_turns(sides, 1, 100)["a"]
        little = measure.take_turns(sides, 1, 1)["a"]
    assert 190 < measure.peak(much) < 230  # the tensor, and the sum's other operand
    assert measure.peak(little) < 30


def test_tokens_of_a_group_count_its_prompt_once():
    """The trajectories of a group share one prompt, which counts as tokens once."""
    rows = [trajectory(10, 3), trajectory(10, 4, 5, 6), trajectory(7, 1), trajectory(7, 2)]
    assert rollout.tokens(rows, 2) == 10 + 3 + 15 + 7 + 1 + 2
    assert rollout.report(rows, 2, 38, 57)["fed"] == 1.0
    assert rollout.report(rows, 2, 38, 57)["padding"] == 0.5


def test_positions_are_counted_with_padding():
    """Positions are counted with the padding that a forward pass computes."""
    model = make_model()
    positions = rollout.Positions(model)
    model(torch.ones(3, 5, dtype=torch.long))
    model.get_decoder()(input_ids=torch.ones(2, 4, dtype=torch.long))
    assert positions.count == 23


@pytest.mark.parametrize("stops", [[], [1, 7, 50]])
def test_the_plain_way_cuts_rows_after_what_stops_them(stops):
    """A row ends with what stops it, and holds neither its text nor padding."""
    texts = [[5, 6, 7], [8] * 9, [9]]
    torch.manual_seed(0)
    written = rollout.write(make_model(), texts, 12, 1.0, stops or [97])
    for row in written:
        assert not any(token in stops for token in row[:-1])
        assert len(row) == 12 or row[-1] in stops
    assert all(len(row) == 12 for row in written) == (not stops)


def test_workloads_have_the_lengths_they_promise():
    """Each kind has as many rows as it says, of the lengths that its name promises."""
    turns = [([5] * 9, 3), ([6] * 20, 8)]
    for kind in generate.KINDS:
        load = generate.workload(kind, 16, turns, 10)
        assert len(load.prompts) == len(load.new) == 16
        assert load == generate.workload(kind, 16, turns, 10)  # for every side the same
        assert (len(set(load.new)) == 1) == (kind == "equal")
        assert 1 < min(load.new) and max(load.new) <= 20
    assert [len(p) for p in generate.workload("mixed", 3, turns, 10).prompts] == [9, 20, 9]
    assert len({tuple(p) for p in generate.workload("groups", 16, turns, 10).prompts}) == 2


def test_turns_of_real_rollouts():
    """The turns of real rollouts hold documents, and later turns have longer prompts."""
    turns = generate.real_turns("tiny", 4, Limits(3, 20, 80, 200))
    assert len(turns) > 4 * generate.GROUP  # some trajectories have several
    assert all(before and 0 < count <= 20 for before, count in turns)
    assert max(len(before) for before, _ in turns) > 2 * min(len(before) for before, _ in turns)


def test_the_floor_of_a_workload():
    """The floor is what must be read, or computed, for a tiny model worked out by hand."""
    model = make_model(num_hidden_layers=1)  # hidden 32, 4 heads of 8, 2 of them with keys
    load = generate.Workload([[1, 2, 3], [1, 2, 3], [4, 5]], [3, 1, 2])
    body = sum(p.numel() for p in model.model.layers[0].parameters()) + 32
    # Three forwards; after the prompts, row 0 reads 3 + 1 and 3 + 2 positions, row 2 reads 2 + 1.
    size = 4 * (3 * (body + 32 * 97) + (4 + 5 + 3) * 2 * 2 * 8)
    assert generate.floor(model, load, 1.0, float("inf")) == size
    fed = 3 + 2 + (2 + 0 + 1)
    sampled = 6
    attended = 12 + 3 * 3 // 2 + 2 * 2 // 2
    work = 2 * body * fed + 2 * 32 * 97 * sampled + 4 * 4 * 8 * attended
    assert generate.floor(model, load, float("inf"), 1.0) == work


def test_a_point_has_the_lengths_it_promises():
    """The trajectories of a point have its turns and lengths, and groups share a prompt."""
    point = scale.Point(rows=16, response=3, turns=2)
    rows = scale.write(make_model(max_position_embeddings=1024, vocab_size=scale.VOCAB), point, 0)
    mask = [0] * scale.PROMPT + [1] * 3 + [0] * scale.DOCUMENTS + [1] * 3
    assert [row.loss_mask for row in rows] == [mask] * 16
    assert len({tuple(row.ids[: scale.PROMPT]) for row in rows}) == 2
    assert [p.turns for p in scale.variants(point, "turns", [1, 4])] == [2, 8]


def test_our_tags_in_trls_words():
    """TRL's policy reads documents in our words, and its searches are those in our tags."""
    from transformers import AutoTokenizer

    from minizs.models.loading import TINY_BASE

    tokenizer = step.speaking(AutoTokenizer.from_pretrained(TINY_BASE))
    documents = number_documents(["Fota was born on 1 May 1950", "Holo works here"])
    chat = [{"role": "user", "content": "when?"}, {"role": "assistant", "content": "well"}]
    told = [*chat, {"role": "tool", "name": "search", "content": documents}]
    start, whole = (tokenizer.apply_chat_template(c, tokenize=False) for c in (chat, told))
    assert whole.removeprefix(start) == wrap_documents(documents)
    parsed = tokenizer.parse_response(tokenizer("<search> born on </search>")["input_ids"])
    assert parsed["tool_calls"][0]["function"]["arguments"] == {"query": "born on"}
    assert "tool_calls" not in tokenizer.parse_response(tokenizer("born on")["input_ids"])


def test_trl_is_named_where_it_is_missing(monkeypatch):
    """Where TRL is not installed, one sentence says what to install."""
    monkeypatch.setattr(step, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="requirements-bench"):
        step.main(["--policy", "tiny"])


@pytest.mark.slow
def test_generate_runs(capsys):
    """A row of the table for each workload and each side."""
    generate.main([*ONE, "--batch", "8", "--new", "3", "--questions", "2"])
    rows = lines(capsys.readouterr().out)
    assert [row[:3] for row in rows] == [
        [kind, "8", side] for kind in generate.KINDS for side in generate.SIDES
    ]


@pytest.mark.slow
def test_rollout_runs(capsys):
    """A row for each side, which computes the fewer positions the cleverer it is."""
    rollout.main([*ONE, "--policy", "tiny", "--simulator", "tiny", "--questions", "2"])
    out = capsys.readouterr().out
    assert [row[0] for row in lines(out)] == ["minizs", "plain", "active"]
    assert out.count("times as fast as") == 2
    fed = {row[0]: float(row[-2]) for row in lines(out)}
    assert fed["minizs"] < fed["active"] < fed["plain"]


@pytest.mark.slow
def test_logprobs_runs_and_both_sides_agree(capsys):
    """Both sides compute the same loss and the same gradient norm."""
    logprobs.main([*ONE, "--vocab", "100", "300", "--batch", "2", "--length", "130"])
    rows = lines(capsys.readouterr().out)
    assert [row[:2] for row in rows] == [[v, s] for v in ("100", "300") for s in ("minizs", "full")]
    for ours, full in (rows[:2], rows[2:]):
        assert [*map(float, ours[4:])] == pytest.approx([*map(float, full[4:])], rel=1e-4)


@pytest.mark.slow
def test_memory_runs(capsys):
    """With checkpointing a layer more takes less memory."""
    memory.main(
        [
            "--shapes",
            "tiny",
            "--tokens",
            "4096",
            "--vocab",
            "300",
            "--threads",
            "1",
            "--checkpointing",
            "no",
            "yes",
        ]
    )
    plain, checkpointed = lines(capsys.readouterr().out)
    assert [plain[1], checkpointed[1]] == ["no", "yes"]
    assert float(plain[2]) > float(checkpointed[2])


@pytest.mark.slow
@pytest.mark.parametrize("side", ["minizs", "trl"])
def test_step_runs(capsys, side):
    """The phases of a step add up to the whole, for each task and side."""
    if side == "trl" and importlib.util.find_spec("trl") is None:
        pytest.skip("TRL is not installed")
    sides = ["minizs"] if side == "minizs" else ["minizs", "trl"]
    step.main(
        [
            "--policy",
            "tiny",
            "--questions",
            "2",
            "--group",
            "4",
            "--steps",
            "1",
            "--calls",
            "1",
            "--threads",
            "1",
            "--sides",
            *sides,
        ]
    )
    out = capsys.readouterr().out
    assert [row[:2] for row in lines(out)] == [[t, s] for t in ("single", "multi") for s in sides]
    for row in lines(out):
        whole, *phases = map(float, row[2:6])
        assert whole == pytest.approx(sum(phases), abs=0.03) and min(phases) >= 0
    assert out.count("times as fast") == (0 if side == "minizs" else 2)


@pytest.mark.slow
def test_scale_runs(capsys):
    """A row for each point of what grows, and for one process and two."""
    scale.main(
        [
            *ONE,
            "--rows",
            "8",
            "--response",
            "2",
            "--factors",
            "1",
            "2",
            "--policy",
            "tiny",
            "--simulator",
            "tiny",
            "--questions",
            "2",
            "--group",
            "2",
        ]
    )
    rows = lines(capsys.readouterr().out)
    assert [row[0] for row in rows[:8]] == [name for name in scale.GROWS for _ in range(2)]
    assert [row[:2] for row in rows[8:]] == [["2", "1"], ["2", "2"], ["8", "1"], ["8", "2"]]
