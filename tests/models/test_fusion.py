"""Compiled pieces of a model: used where they pay, and never the reason that something fails.

The compiler itself is PyTorch's. It is tried on a card, by the tests marked `gpu`.
"""

import pytest
import torch
from conftest import make_model

from minizs.generate import generate
from minizs.logprobs import score
from minizs.models import fusion


@pytest.fixture
def compiler(monkeypatch) -> list[str]:
    """In place of the compiler: the names of the functions that were called in its place."""
    calls = []

    def stand_in(function, **_options):
        def call(*args, **kwargs):
            calls.append(function.__qualname__)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", stand_in)
    fusion.compiled.cache_clear()
    yield calls
    fusion.compiled.cache_clear()


def test_norms_mlps_and_rotary_positions_are_compiled_inside_the_block(compiler):
    """And nothing of it is left behind it, whatever happens inside."""
    model = make_model("qwen2")
    ids = torch.tensor([[5, 6, 7]])
    expected = model(ids).logits
    with pytest.raises(KeyError), fusion.compiled_pieces(model):
        assert torch.equal(model(ids).logits, expected)
        raise KeyError
    names = {name.split(".")[0] for name in compiler}
    assert names == {"Qwen2RMSNorm", "Qwen2MLP", "apply_rotary_pos_emb"}
    compiler.clear()
    model(ids)
    assert not compiler


def test_a_compiler_that_fails_is_not_asked_again(monkeypatch):
    """The function runs as it is, and a warning says why."""
    calls = []

    def stand_in(_function, **_options):
        def call(*_args):
            calls.append(1)
            raise RuntimeError("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", stand_in)
    function = fusion.compiled.__wrapped__(abs)
    with pytest.warns(UserWarning, match="no compiler here"):
        assert function(-3) == 3
    assert function(-4) == 4 and len(calls) == 1


def test_scores_and_gradients_go_through_the_compiled_function(monkeypatch, compiler):
    """The backward pass, which computes the head's chunks again, calls it again."""
    model = make_model("qwen2", torch.float64)
    ids = torch.arange(3, 33).view(2, 15)
    mask = torch.ones_like(ids)
    loss_mask = mask.clone()
    loss_mask[:, 0] = 0

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        score(model, ids, mask, loss_mask)[0].sum().backward()
        return [weight.grad.clone() for weight in model.parameters()]

    expected = gradients()
    assert not compiler  # a small model, on a CPU
    monkeypatch.setattr(fusion, "is_worth_it", lambda _: True)
    for ours, plain in zip(gradients(), expected, strict=True):
        assert torch.equal(ours, plain)
    assert compiler == ["evaluate_tokens"] * 2


def test_a_model_on_a_cpu_is_never_worth_it(monkeypatch):
    """There, nothing is started one kernel at a time."""
    monkeypatch.setattr(fusion, "LARGE", 0)
    assert not fusion.is_worth_it(make_model())


def test_layers_compiled_for_learning_are_not_used_in_generation(compiler):
    """Each width of the cache would be another shape to compile for."""
    model = make_model("qwen2")
    fusion.compile_modules(model, whole_layers=True)
    generate(model, [[5, 6, 7], [8]], 4)
    assert not compiler
    model(torch.tensor([[5, 6, 7]]))
    assert len(compiler) == 2


def test_compiled_modules_are_the_same_model(compiler):
    """They keep their names, so that a checkpoint of one can be loaded by the other."""
    model = make_model("qwen2")
    names = list(model.state_dict())
    fusion.compile_modules(model)
    assert list(model.state_dict()) == names
    model(torch.tensor([[5, 6, 7]]))
    assert len(compiler) == len(list(m for m in model.modules() if fusion.is_piece(m)))
