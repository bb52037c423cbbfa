"""Token rewards, generalised advantages, whitening, value loss and critic."""

import math
import statistics

import pytest
import torch
from transformers import GPT2Config, GPT2Model

from minizs import ppo
from minizs.losses import merge_stats


def holed_mask():
    """Three rows: a hole and padding, no sampled token at all, everything sampled."""
    return torch.tensor([[0, 1, 1, 0, 0, 1, 0], [0] * 7, [1] * 7]).float()


def slow_gae(rewards, values, mask, gamma, lam):
    """A second computation: list the sampled tokens, then sum discounted deltas forwards."""
    advantages = torch.zeros_like(values)
    for b in range(len(values)):
        at = mask[b].nonzero().flatten().tolist()
        v = [values[b, t].item() for t in at] + [0.0]
        deltas = [rewards[b, t].item() + gamma * v[i + 1] - v[i] for i, t in enumerate(at)]
        for i, t in enumerate(at):
            advantages[b, t] = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:]))
    return advantages


# ---- rewards per token ------------------------------------------------------------------------


def test_token_rewards_by_hand():
    """The reward belongs on the last sampled token, not on padding or a document after it."""
    kl = torch.full((3, 7), 0.5)
    kl[holed_mask() == 0] = math.nan
    got = ppo.token_rewards(torch.tensor([1.0, 5.0, 0.0]), kl, holed_mask(), beta=0.1)
    expected = torch.zeros(3, 7)
    expected[0, 1] = expected[0, 2] = -0.05
    expected[0, 5] = 0.95
    expected[2] = -0.05
    assert torch.allclose(got, expected)


# ---- GAE --------------------------------------------------------------------------------------


def test_gae_by_hand():
    """Two tokens, gamma 0.9, lam 0.5: A_2 = 1 - 0.4, A_1 = (0.9 * 0.4 - 0.2) + 0.45 * A_2."""
    rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.2, 0.4]])
    advantages, returns = ppo.gae(rewards, values, torch.ones(1, 2), 0.9, 0.5)
    assert advantages[0].tolist() == pytest.approx([0.43, 0.6])
    assert returns[0].tolist() == pytest.approx([0.63, 1.0])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.7), (0.9, 0.0)])
def test_gae_against_second_computation(gamma, lam):
    """The recursion against its closed form, holes and an empty row included."""
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(3, 7, generator=g), torch.randn(3, 7, generator=g)
    mask = holed_mask()
    advantages, returns = ppo.gae(rewards, values, mask, gamma, lam)
    assert torch.allclose(advantages, slow_gae(rewards, values, mask, gamma, lam), atol=1e-5)
    assert torch.allclose(returns, (advantages + values) * mask, atol=1e-6)
    assert (advantages[1] == 0).all() and (returns[1] == 0).all()


def test_gae_with_a_document_equals_gae_without_it():
    """Walking through a document makes credit fade with its length as soon as lam < 1."""
    g = torch.Generator().manual_seed(1)
    rewards, values = torch.randn(2, 9, generator=g), torch.randn(2, 9, generator=g)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 1, 1, 0]] * 2)
    positions = mask[0].nonzero().flatten()
    with_document, _ = ppo.gae(rewards, values, mask, 0.9, 0.8)
    without, _ = ppo.gae(rewards[:, positions], values[:, positions], torch.ones(2, 4), 0.9, 0.8)
    assert torch.allclose(with_document[:, positions], without, atol=1e-6)
    assert (with_document[mask == 0] == 0).all()


@pytest.mark.parametrize("junk", [math.inf, -math.inf, math.nan])
def test_gae_ignores_masked_positions(junk):
    """A value after the last sampled token must not be bootstrapped from."""
    g = torch.Generator().manual_seed(2)
    rewards, values = torch.randn(3, 7, generator=g), torch.randn(3, 7, generator=g)
    mask = holed_mask()
    clean = ppo.gae(rewards, values, mask, 0.9, 0.8)
    spoiled = ppo.gae(
        rewards.masked_fill(mask == 0, junk), values.masked_fill(mask == 0, junk), mask, 0.9, 0.8
    )
    assert torch.equal(clean[0], spoiled[0]) and torch.equal(clean[1], spoiled[1])


def test_lambda_one_is_monte_carlo():
    """With gamma = lam = 1 (the paper's) every return is the trajectory's reward."""
    values = torch.rand(3, 7)
    mask = holed_mask()
    rewards = ppo.token_rewards(torch.tensor([0.7, 0.7, 0.7]), torch.zeros(3, 7), mask, 0.0)
    _, returns = ppo.gae(rewards, values, mask, 1.0, 1.0)
    assert torch.allclose(returns, 0.7 * mask, atol=1e-5)


# ---- whitening --------------------------------------------------------------------------------


def test_whiten_sees_sampled_tokens_only():
    """Mean and deviation over documents and padding too would shift every advantage."""
    mask = holed_mask()
    advantages = torch.randn(3, 7, generator=torch.Generator().manual_seed(3)) * 4 + 7
    got = ppo.whiten(advantages.masked_fill(mask == 0, math.nan), mask)
    sampled = advantages[mask == 1].tolist()
    mean = statistics.fmean(sampled)
    deviation = statistics.stdev(sampled)
    expected = torch.tensor([(x - mean) / deviation for x in sampled])
    assert torch.allclose(got[mask == 1], expected, atol=1e-5)
    assert (got[mask == 0] == 0).all()


def test_whiten_in_parts_equals_whiten_whole():
    """Processes that whiten with their own moments train on differently scaled advantages."""
    mask = holed_mask()
    advantages = torch.randn(3, 7, generator=torch.Generator().manual_seed(4))
    total = sum(ppo.moments(advantages[b : b + 1], mask[b : b + 1]) for b in range(3))
    parts = [ppo.whiten(advantages[b : b + 1], mask[b : b + 1], total) for b in range(3)]
    assert torch.allclose(torch.cat(parts), ppo.whiten(advantages, mask), atol=1e-6)


def test_whiten_of_equal_or_no_advantages_is_zero():
    """A deviation of 0 or of one token must not divide."""
    assert ppo.whiten(torch.full((2, 3), 0.1), torch.ones(2, 3)).abs().max() < 1e-6
    assert ppo.whiten(torch.ones(1, 3), torch.tensor([[0, 1, 0]])).abs().max() == 0
    assert ppo.whiten(torch.ones(1, 3), torch.zeros(1, 3)).abs().max() == 0


# ---- the critic's loss ------------------------------------------------------------------------


def value_loss_and_grad(values, *arguments, **options):
    """The loss and its gradient with respect to the values."""
    values = values.clone().requires_grad_()
    loss, _ = ppo.value_loss(values, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss, values)[0]


@pytest.mark.parametrize(
    ("value", "loss", "gradient"),
    [
        (0.2, 0.32, -0.8),  # within the clip: 1/2 (0.2 - 1)^2
        (0.8, 0.125, 0.0),  # moved 0.8 towards the return: held at 0.5, 1/2 (0.5 - 1)^2
        (-0.8, 1.62, -1.8),  # moved away: the full error pulls it back
    ],
)
def test_value_loss_by_hand(value, loss, gradient):
    """Old value 0, return 1, clip 0.5. A minimum for the maximum frees exactly the wrong ones."""
    one = torch.ones(1, 1)
    got, grad = value_loss_and_grad(value * one, 0 * one, one, one, 0.5)
    assert got.item() == pytest.approx(loss, abs=1e-6)
    assert grad.item() == pytest.approx(gradient, abs=1e-6)


def test_value_loss_against_loops_and_finite_differences():
    """A second computation, and autograd against a difference quotient in float64."""
    g = torch.Generator().manual_seed(5)
    values, old, returns = torch.randn(3, 3, 7, generator=g, dtype=torch.float64).unbind()
    mask = holed_mask()

    def slow(values):
        total = 0.0
        for b, t in mask.nonzero().tolist():
            v = values[b, t].item()
            o = old[b, t].item()
            r = returns[b, t].item()
            total += 0.5 * max((v - r) ** 2, (min(max(v, o - 0.5), o + 0.5) - r) ** 2)
        return total / mask.sum().item()

    loss, grad = value_loss_and_grad(values, old, returns, mask, 0.5)
    assert loss.item() == pytest.approx(slow(values))
    for b in range(3):
        for t in range(7):
            nudge = torch.zeros_like(values)
            nudge[b, t] = 1e-6
            quotient = (slow(values + nudge) - slow(values - nudge)) / 2e-6
            assert grad[b, t].item() == pytest.approx(quotient, abs=1e-6)
    held = (grad[mask == 1] == 0).float().mean()  # the clip takes the whole gradient away
    _, stats = ppo.value_loss(values, old, returns, mask, 0.5)
    assert 0 < held < 1
    assert stats["value_clip_fraction"].item() == pytest.approx(held.item())


@pytest.mark.parametrize("junk", [math.inf, math.nan])
def test_value_loss_ignores_masked_positions(junk):
    """The paper's code trains its critic on document positions too."""
    g = torch.Generator().manual_seed(6)
    inputs = list(torch.randn(3, 3, 7, generator=g).unbind())
    mask = holed_mask()
    clean = value_loss_and_grad(*inputs, mask, 0.5)
    spoiled = [x.masked_fill(mask == 0, junk) for x in inputs]
    assert all(map(torch.equal, clean, value_loss_and_grad(*spoiled, mask, 0.5)))


def test_value_loss_of_micro_batches_adds_up():
    """One global normaliser, and statistics that merge."""
    g = torch.Generator().manual_seed(7)
    inputs = list(torch.randn(3, 3, 7, generator=g).unbind())
    mask = holed_mask()
    whole, stats = ppo.value_loss(*inputs, mask, 0.5)
    parts = [
        ppo.value_loss(*(x[b : b + 1] for x in inputs), mask[b : b + 1], 0.5, mask.sum())
        for b in range(3)
    ]
    assert sum(loss for loss, _ in parts).item() == pytest.approx(whole.item(), abs=1e-6)
    merged = merge_stats([part for _, part in parts])
    assert {k: v.item() for k, v in merged.items()} == pytest.approx(
        {k: v.item() for k, v in stats.items()}, abs=1e-6
    )


# ---- the critic -------------------------------------------------------------------------------


def tiny_critic():
    torch.manual_seed(0)
    # GPT-2 has learned positions: rotary ones are relative and would forgive a shift.
    config = GPT2Config(vocab_size=30, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    return ppo.Critic(GPT2Model(config)).eval()


def test_critic_starts_at_zero_and_learns():
    """A random head's values would be the first thing the policy is trained on."""
    critic = tiny_critic()
    ids = torch.arange(8).view(1, 8)
    values = critic(ids, torch.ones_like(ids))
    assert values.dtype == torch.float32 and torch.equal(values, torch.zeros(1, 8))
    ppo.value_loss(values, values, torch.ones(1, 8), torch.ones(1, 8), 0.5)[0].backward()
    assert critic.head.weight.grad.abs().sum() > 0


def test_critic_sees_what_stands_before_a_token_and_no_more():
    """Off by one, the critic would know the token whose advantage it is the baseline of."""
    critic = tiny_critic()
    ids = torch.arange(8).view(1, 8)
    torch.nn.init.normal_(critic.head.weight)
    changed = ids.clone()
    changed[0, 4] = 20
    mask = torch.ones_like(ids)
    before, after = critic(ids, mask)[0], critic(changed, mask)[0]
    assert before[0] == 0
    assert torch.allclose(before[:5], after[:5], atol=1e-6)  # token 4 is unknown at 0 … 4
    assert (before[5:] - after[5:]).abs().min() > 1e-5  # and known from 5 on


def test_critic_ignores_padding_on_either_side():
    """Without explicit position ids, left padding moves every token."""
    critic = tiny_critic()
    ids = torch.arange(1, 7).view(1, 6)
    torch.nn.init.normal_(critic.head.weight)
    alone = critic(ids, torch.ones_like(ids))
    pad = torch.nn.functional.pad
    padded = critic(pad(ids, (3, 2)), pad(torch.ones_like(ids), (3, 2)))
    assert torch.allclose(padded[:, 4:9], alone[:, 1:], atol=1e-5)
