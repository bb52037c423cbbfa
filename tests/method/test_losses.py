"""The policy loss, KL estimators and averaging."""

import math

import pytest
import torch

from minizs import losses
from minizs.grpo import group_advantages


def batch(rows: int = 6, length: int = 9, dtype: torch.dtype = torch.float32):
    """Log-probabilities, old ones, advantages and a mask with a hole (a document) and padding."""
    g = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(rows, length, generator=g, dtype=dtype) * 3
    old = logprobs + 0.4 * torch.randn(rows, length, generator=g, dtype=dtype)
    advantages = torch.randn(rows, 1, generator=g, dtype=dtype).expand(rows, length).clone()
    mask = torch.zeros(rows, length)
    for row in range(rows):
        mask[row, 1:3] = 1  # a search
        mask[row, 5 : 6 + row % 3] = 1  # an answer, after a document at 3 and 4
    return logprobs, old, advantages, mask


def loss_and_grad(logprobs, *arguments, **options):
    """The loss and its gradient with respect to the log-probabilities."""
    logprobs = logprobs.clone().requires_grad_()
    loss, _ = losses.policy_loss(logprobs, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss, logprobs)[0]


# ---- the surrogate ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.5, 2.0, -2.56, 0.0),  # above 1.28: clipped, no gradient
        (0.5, 2.0, -1.0, -1.0),  # too rare and good: never clipped
        (0.5, -2.0, 1.6, 0.0),  # below 0.8: clipped
        (1.5, -2.0, 3.0, 3.0),  # too frequent and bad: never clipped
    ],
)
def test_one_token_by_hand(ratio, advantage, loss, gradient):
    """Ratio, advantage, loss and gradient of one token: when the clip takes the gradient away."""
    got, grad = loss_and_grad(
        torch.tensor([[math.log(ratio)]]),
        torch.zeros(1, 1),
        torch.tensor([[advantage]]),
        torch.ones(1, 1),
        clip_low=0.2,
        clip_high=0.28,
    )
    assert got.item() == pytest.approx(loss, abs=1e-5)
    assert grad.item() == pytest.approx(gradient, abs=1e-5)


def test_loss_and_stats_against_loops():
    """A second computation in plain Python, token by token."""
    logprobs, old, advantages, mask = batch()
    weights = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1))
    loss, stats = losses.policy_loss(logprobs, old, advantages, mask, 0.2, 0.28, 7.0, weights)
    terms = []
    ratios = []
    clipped = 0
    for b, t in mask.nonzero().tolist():
        ratio = math.exp(logprobs[b, t] - old[b, t])
        a = advantages[b, t].item()
        free, limited = ratio * a, min(max(ratio, 0.8), 1.28) * a
        terms.append(-min(free, limited) * weights[b, t].item())
        clipped += limited < free
        ratios.append(ratio)
    n = len(terms)
    assert 0 < clipped < n  # both branches are in play
    assert loss.item() == pytest.approx(sum(terms) / 7, abs=1e-5)
    assert stats["tokens"].item() == n
    assert stats["clip_fraction"].item() == pytest.approx(clipped / n)
    assert stats["ratio_mean"].item() == pytest.approx(sum(ratios) / n, abs=1e-5)
    assert stats["ratio_max"].item() == pytest.approx(max(ratios), abs=1e-5)
    k3 = sum(r - 1 - math.log(r) for r in ratios) / n
    assert stats["approx_kl_k3"].item() == pytest.approx(k3, abs=1e-5)


def test_gradient_against_finite_differences():
    """Autograd through clip, minimum and masks against a difference quotient in float64."""
    logprobs, old, advantages, mask = batch(dtype=torch.float64)
    _, grad = loss_and_grad(logprobs, old, advantages, mask)
    step = 1e-6
    for b, t in [(0, 1), (1, 2), (2, 5), (3, 1), (4, 6), (5, 7), (0, 3), (0, 8)]:
        up, down = logprobs.clone(), logprobs.clone()
        up[b, t] += step
        down[b, t] -= step
        above, _ = losses.policy_loss(up, old, advantages, mask)
        below, _ = losses.policy_loss(down, old, advantages, mask)
        quotient = ((above - below) / (2 * step)).item()
        assert grad[b, t].item() == pytest.approx(quotient, abs=1e-6)
    assert grad.abs().sum() > 0


def test_on_policy_ratio_is_exactly_one_and_its_gradient_is_the_policy_gradient():
    """ "The ratio is always 1, is that a bug?" No: the value is trivial, the gradient is not."""
    logprobs, _, advantages, mask = batch()
    _, stats = losses.policy_loss(logprobs, logprobs.detach(), advantages, mask)
    assert stats["ratio_max"] == stats["ratio_mean"] == 1.0
    assert stats["clip_fraction"] == stats["approx_kl_k3"] == 0.0
    _, grad = loss_and_grad(logprobs, logprobs, advantages, mask)
    assert torch.allclose(grad, -advantages * mask / mask.sum(), atol=1e-7)


def test_equal_rewards_give_exactly_no_gradient():
    """A group that is all right or all wrong teaches nothing, rounding included."""
    logprobs, old, _, mask = batch(rows=3)
    advantages = group_advantages(torch.full((3,), 0.1), 3).unsqueeze(1).expand_as(logprobs)
    loss, grad = loss_and_grad(logprobs, old, advantages, mask)
    assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))


def test_huge_ratios_stay_finite():
    """exp(200) is infinite, and an infinite loss ends a training run."""
    far = torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]])
    loss, grad = loss_and_grad(*far, torch.tensor([[-1.0, 1.0]]), torch.ones(1, 2))
    assert loss.isfinite() and grad.isfinite().all()


# ---- what must not change anything ------------------------------------------------------------


@pytest.mark.parametrize("junk", [math.inf, -math.inf, math.nan, 1e30])
def test_masked_positions_can_hold_anything(junk):
    """inf * 0 is NaN: multiplying by the mask afterwards poisons the loss or only its gradient."""
    *inputs, mask = batch()
    weights, _ = losses.token_weights(mask, "sequence")
    options = {"weights": weights, "normalizer": 6}
    loss, grad = loss_and_grad(*inputs, mask, **options)
    for which in range(3):
        spoiled = [
            x.masked_fill(mask == 0, junk) if i == which else x for i, x in enumerate(inputs)
        ]
        got, got_grad = loss_and_grad(*spoiled, mask, **options)
        assert torch.equal(got, loss) and torch.equal(got_grad, grad)
        _, stats = losses.policy_loss(*spoiled, mask)
        assert all(value.isfinite() for value in stats.values())


@pytest.mark.parametrize("kind", ["token", "sequence", "constant"])
def test_padding_row_order_and_micro_batches_change_nothing(kind):
    """A normaliser per micro-batch or per padded length silently rescales the gradient."""
    logprobs, old, advantages, mask = batch()
    weights, normalizer = losses.token_weights(mask, kind, max_tokens=20)
    whole, grad = loss_and_grad(
        logprobs, old, advantages, mask, weights=weights, normalizer=normalizer
    )
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    for sizes in ([6], [1] * 6, [4, 2]):
        total = 0.0
        shares = 0.0
        grads = torch.zeros_like(logprobs)
        for rows in order.split(sizes):
            parts = [torch.nn.functional.pad(x[rows], (2, 3)) for x in (logprobs, old, advantages)]
            part_mask = torch.nn.functional.pad(mask[rows], (2, 3))
            weights, share = losses.token_weights(part_mask, kind, max_tokens=20)
            loss, part_grad = loss_and_grad(
                *parts, part_mask, weights=weights, normalizer=normalizer
            )
            total, shares = total + loss, shares + share
            grads[rows] = part_grad[:, 2:-3]
        assert shares == normalizer
        assert total.item() == pytest.approx(whole.item(), abs=1e-5)
        assert torch.allclose(grads, grad, atol=1e-5)


def test_token_weights_by_hand():
    """Sequences of 1 and 3 tokens with losses 4 and 1: means 7/4, 5/2, and 7/2 over the limit."""
    mask = torch.tensor([[1.0, 0, 0], [1, 1, 1], [0, 0, 0]])  # the last row is a filler
    per_token = torch.tensor([[4.0, 9, 9], [1, 1, 1], [9, 9, 9]])
    for kind, expected in (("token", 7 / 4), ("sequence", 5 / 2), ("constant", 7 / 10 / 2)):
        weights, normalizer = losses.token_weights(mask, kind, max_tokens=10)
        got = losses.average(per_token * weights, mask, normalizer)
        assert got.item() == pytest.approx(expected)
    with pytest.raises(ValueError, match="max_tokens"):
        losses.token_weights(mask, "constant")
    with pytest.raises(ValueError, match="token weights"):
        losses.token_weights(mask, "mean")


def test_an_empty_mask_gives_zero():
    """A process without any row left still takes part, with a loss of 0 and not NaN."""
    logprobs, old, advantages, mask = batch()
    loss, grad = loss_and_grad(logprobs, old, advantages, torch.zeros_like(mask))
    assert loss == 0 and torch.equal(grad, torch.zeros_like(grad))


def test_stats_of_parts_merge_to_those_of_the_whole():
    """Averaging averages over unequal parts, or keeping the last part only, is wrong."""
    whole = losses.policy_loss(*batch())[1]
    parts = [
        losses.policy_loss(*(x[rows] for x in batch()))[1] for rows in ([0], [1, 2], [3, 4, 5])
    ]
    at_once = losses.merge_stats(parts)
    in_two = losses.merge_stats([losses.merge_stats(parts[:2]), parts[2]])
    for name, value in whole.items():
        assert at_once[name].item() == pytest.approx(value.item(), abs=1e-6)
        assert in_two[name].item() == pytest.approx(value.item(), abs=1e-6)


# ---- KL ---------------------------------------------------------------------------------------


def test_kl_by_hand():
    """Policy 1/2, reference 1/4: d = log 2, and k3 = 1/2 - 1 + log 2."""
    logprobs = torch.tensor([[0.5]]).log()
    reference = torch.tensor([[0.25]]).log()
    for kind, expected in (("k1", 0.693147), ("k2", 0.240227), ("k3", 0.193147)):
        assert losses.kl(logprobs, reference, kind).item() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="k1"):
        losses.kl(logprobs, reference, "k4")


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
@pytest.mark.parametrize("junk", [math.inf, -math.inf, math.nan])
def test_kl_ignores_masked_positions(kind, junk):
    """The reference has never seen padding: what it says there may be anything."""
    logprobs, reference, _, mask = batch()
    clean = logprobs.clone().requires_grad_()
    spoiled = logprobs.masked_fill(mask == 0, junk).requires_grad_()
    first = losses.kl(clean, reference, kind, mask)
    second = losses.kl(spoiled, reference.masked_fill(mask == 0, -junk), kind, mask)
    assert torch.equal(first, second) and (first[mask == 0] == 0).all()
    grads = [torch.autograd.grad(x.sum(), y)[0] for x, y in ((first, clean), (second, spoiled))]
    assert torch.equal(*grads) and grads[0].isfinite().all()


def expected_under_policy(logits, reference, kind):
    """Mean of an estimator over all tokens, sampling probabilities held constant (as samples)."""
    logprobs = logits.log_softmax(-1)
    return (logprobs.detach().exp() * losses.kl(logprobs, reference, kind)).sum()


def test_kl_values_and_gradients_over_a_whole_distribution():
    """Right as a value is not right as a loss: every estimator against the exact KL."""
    g = torch.Generator().manual_seed(3)
    logits = torch.randn(7, generator=g, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(7, generator=g, dtype=torch.float64).log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    exact = (logprobs.exp() * (logprobs - reference)).sum()  # KL(policy || reference)
    reverse = (reference.exp() * (reference - logprobs)).sum()  # KL(reference || policy)
    for kind in ("k1", "k3"):
        assert expected_under_policy(logits, reference, kind).item() == pytest.approx(exact.item())
    gradient = {
        kind: torch.autograd.grad(expected_under_policy(logits, reference, kind), logits)[0]
        for kind in ("k1", "k2", "k3")
    }
    (exact_grad,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (reverse_grad,) = torch.autograd.grad(reverse, logits)
    assert torch.allclose(gradient["k1"], torch.zeros(7, dtype=torch.float64))
    assert torch.allclose(gradient["k2"], exact_grad)
    assert torch.allclose(gradient["k3"], reverse_grad)
    assert not torch.allclose(exact_grad, reverse_grad, atol=1e-2)


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_adding_kl_pulls_towards_the_reference(kind):
    """The paper's code subtracts its KL loss, and so pushes away from the reference."""
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(7, generator=g, requires_grad=True)
    reference = torch.randn(7, generator=g).log_softmax(-1)

    def exact(logits):
        logprobs = logits.log_softmax(-1)
        return (logprobs.exp() * (logprobs - reference)).sum().item()

    loss = expected_under_policy(logits, reference, kind)
    (grad,) = torch.autograd.grad(loss, logits)
    assert exact(logits - 0.1 * grad) < exact(logits) < exact(logits + 0.1 * grad)
