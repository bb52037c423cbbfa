"""Decode steps on fixed shapes against steps of any shape: the same tokens and log-probabilities.

On a CPU the steps run one by one; the tests marked `gpu` replay them as CUDA graphs."""

import gc
import random

import pytest
import torch
from conftest import VOCAB, make_model

from minizs import graphs
from minizs.generate import Decoder, generate
from minizs.models import fusion, weights

LENGTHS = (9, 1, 17, 4, 30, 2, 9, 21, 5, 13, 3, 8, 12, 6)


def make_prompts(lengths=LENGTHS, seed=0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(2, VOCAB) for _ in range(n)] for n in lengths]


def play(model, cuda_graphs: str, turns: int = 3, **options):
    """Several turns with documents between them, rows that leave, and budgets that differ: each
    row's results, and the (length, pending) that it ends with."""
    prompts = make_prompts()
    prompts += prompts[:4]  # some are shared
    settings = {"seed": 5, "eos_id": range(6), "cuda_graphs": cuda_graphs} | options
    decoder = Decoder(model, prompts, **settings)
    results = [[] for _ in prompts]
    for turn in range(turns):
        rows = [row for row in range(len(prompts)) if turn == 0 or (row + turn) % 3]
        budgets = [1 + (7 * row + 5 * turn) % 13 for row in rows]
        keys = [(row, turn) for row in rows]
        for row, result in zip(rows, decoder.turn(rows, budgets, keys), strict=True):
            results[row].append(result)
        documents = make_prompts([1 + (3 * row) % 11 for row in rows], seed=turn)
        decoder.append(rows, documents)
    return results, list(zip(decoder.length, decoder.pending, strict=True))


def assert_equal_results(a, b, tolerance: float = 1e-9) -> None:
    for mine, theirs in zip(a[0], b[0], strict=True):
        for x, y in zip(mine, theirs, strict=True):
            assert x.ids == y.ids and x.reason == y.reason
            assert x.logprobs == pytest.approx(y.logprobs, abs=tolerance)
    assert a[1] == b[1]


@pytest.mark.parametrize(
    "name, options",
    [
        ("llama", {}),
        ("qwen2", {"temperature": 0}),
        ("qwen3", {"temperature": 0.7, "vocab_size": 90}),
    ],
)
def test_static_steps_equal_steps_of_any_shape(name, options):
    """Rows that stop or use up their budgets, buckets that shrink, documents and shared prompts
    change nothing: tokens, log-probabilities, and what the cache holds for the next turn."""
    model = make_model(name, torch.float64)
    expected = play(model, "off", **options)
    assert {r.reason for results in expected[0] for r in results} == {"eos", "length"}
    assert_equal_results(play(model, "on", **options), expected)


def test_static_steps_cross_width_buckets():
    """A row that grows beyond a multiple of 256 columns goes on in the next bucket."""
    model = make_model(dtype=torch.float64, max_position_embeddings=1024)
    prompts = make_prompts((250, 3, 500))
    budgets = [12, 260, 20]
    options = {"eos_id": (), "seed": 1}
    expected = generate(model, prompts, budgets, cuda_graphs="off", **options)
    actual = generate(model, prompts, budgets, cuda_graphs="on", **options)
    assert [r.ids for r in actual] == [r.ids for r in expected]


def test_a_row_may_use_the_last_position():
    """The token too many that a row computes after it has stopped needs no position beyond."""
    model = make_model(dtype=torch.float64, max_position_embeddings=32)
    prompts = make_prompts((20, 5, 31))
    budgets = [12, 27, 1]
    results = [generate(model, prompts, budgets, eos_id=(), cuda_graphs=s) for s in ("on", "off")]
    assert [r.ids for r in results[0]] == [r.ids for r in results[1]]


def test_the_cache_is_used_again_while_nobody_else_holds_it():
    """The next decoder of a model gets the same memory; one that lives beside another does not."""
    model = make_model(dtype=torch.float64)
    expected = play(model, "off")
    first = Decoder(model, make_prompts(), cuda_graphs="on")
    second = Decoder(model, make_prompts(), cuda_graphs="on")
    assert first.cache is not second.cache
    cache = second.cache
    del first, second
    gc.collect()
    assert_equal_results(play(model, "on"), expected)
    third = Decoder(model, make_prompts((4, 5)), cuda_graphs="on")
    assert third.cache is graphs._steps_of[model].cache
    assert third.cache.rows >= cache.rows
    graphs.release(model)
    assert model not in graphs._steps_of


def test_a_model_is_not_kept_alive():
    """Its cache and graphs go when the model goes."""
    before = len(graphs._steps_of)
    model = make_model()
    generate(model, [[5, 6]], 3, cuda_graphs="on")
    assert len(graphs._steps_of) == before + 1
    del model
    gc.collect()
    assert len(graphs._steps_of) == before


def test_logits_that_are_nan_leave_no_cache_behind():
    """A policy that has diverged must not spoil the next rollout."""
    model = make_model()
    weight = model.lm_head.weight.detach().clone()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(FloatingPointError):
        generate(model, [[5, 6]], 3, cuda_graphs="on")
    assert model not in graphs._steps_of
    model.lm_head.weight.data.copy_(weight)
    [replayed], [plain] = (generate(model, [[5, 6]], 3, cuda_graphs=s) for s in ("on", "off"))
    assert replayed.ids == plain.ids


def test_buckets():
    """Each holds the rows it is for, and few more."""
    assert [graphs.row_bucket(n) for n in (1, 2, 3, 5, 16, 17, 33, 128, 129, 256)] == [
        1,
        2,
        4,
        8,
        16,
        32,
        48,
        128,
        160,
        256,
    ]
    assert [graphs.width_bucket(n) for n in (1, 256, 257)] == [256, 256, 512]


# ---- on a card ----------------------------------------------------------------------------------


@pytest.mark.gpu
def test_graphs_equal_eager_steps_on_a_gpu(family):
    """Replayed steps give the tokens of steps run one by one."""
    model = make_model(family, torch.float64).cuda()
    expected = play(model, "off")
    assert_equal_results(play(model, "on"), expected, 1e-6)
    assert graphs._steps_of[model].graphs
    assert_equal_results(play(model, "on"), expected, 1e-6)  # replayed from the first step on


@pytest.mark.gpu
def test_graphs_see_weights_that_change_in_place_and_are_dropped_with_them():
    """A training step needs no new graphs; weights at other addresses do."""
    model = make_model(dtype=torch.float64).cuda()
    play(model, "on")
    recorded = dict(graphs._steps_of[model].graphs)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    assert_equal_results(play(model, "on"), play(model, "off"), 1e-6)
    assert recorded.items() <= graphs._steps_of[model].graphs.items()
    for weight in model.parameters():
        weight.data = weight.data * 0.9
    assert_equal_results(play(model, "on"), play(model, "off"), 1e-6)
    assert not set(recorded.values()) & set(graphs._steps_of[model].graphs.values())


@pytest.mark.gpu
def test_bfloat16_graphs_are_as_near_to_the_scorer_as_eager_steps():
    """The sampler of half precision differs from the scorer by rounding alone."""
    model = make_model(head_dim=32, initializer_range=0.1).cuda()
    model = weights.cast_weights(model, torch.bfloat16)
    exact = play(model, "off")
    graphed = play(model, "on")
    first = [(a[0], b[0]) for a, b in zip(exact[0], graphed[0], strict=True)]
    gaps = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in first if a.ids[0] == b.ids[0]]
    assert len(gaps) > len(first) / 2 and max(gaps) < 0.2


@pytest.mark.gpu
def test_compiled_pieces_in_graphs_give_the_same_tokens(monkeypatch):
    """As a large model has them; a small one is not compiled by itself."""
    monkeypatch.setattr(fusion, "LARGE", 0)
    model = make_model("qwen2", torch.float64).cuda()
    expected = play(model, "off")
    assert_equal_results(play(model, "on"), expected, 1e-6)
    assert_equal_results(play(model, "on"), expected, 1e-6)  # replayed
