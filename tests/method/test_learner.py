"""One update from a batch of trajectories: what may change it, and what must not."""

import itertools
import math
import random
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from conftest import EOS, VOCAB, make_model
from torch.utils._python_dispatch import TorchDispatchMode

from minizs import losses, ppo
from minizs.learner import Learner, PPOLearner, build_learner, prepare
from minizs.logprobs import Scorer, score, token_logprobs
from minizs.models.batches import attention, make_batch, pad
from minizs.models.weights import freeze_embeddings
from minizs.runs.settings import PolicyConfig
from minizs.trajectory import Example, Trajectory

# What these tests need to be other than the defaults: small groups, no limit that interferes.
SETTINGS = PolicyConfig(
    minibatches=1,
    group_size=2,
    micro_tokens=10_000,
    clip_high=0.2,
    kl_coef=0.0,
    max_grad_norm=1e9,
    max_turns=3,
    max_turn_tokens=5,
)
REWARDS = (1.0, 0.0, 0.2, 0.7, 0.5, 0.4)
TOGETHER = 1e-5  # what rounding may change


def make_trajectories(rewards=REWARDS, seed=0) -> list[Trajectory]:
    """Prompt, own tokens, a document, own tokens: random lengths, with pad and eos inside."""
    rng = random.Random(seed)

    def tokens(low, high):
        return [rng.choice([0, EOS, *range(2, VOCAB)]) for _ in range(rng.randint(low, high))]

    trajectories = []
    for reward in rewards:
        row = Trajectory(Example("q", ("a",)), reward=reward)
        row.append([EOS, 0, *tokens(1, 9)])
        for _ in range(rng.randint(0, 2)):
            own = tokens(1, 5)
            row.append(own, [0.0] * len(own))
            row.append(tokens(2, 9))
        own = [*tokens(1, 5), EOS]
        row.append(own, [0.0] * len(own))
        trajectories.append(row)
    return with_logprobs(make_model(), trajectories)


def with_logprobs(model, rows: list[Trajectory]) -> list[Trajectory]:
    """The trajectories with the log-probabilities that a rollout of this model would have noted."""
    ids, mask = pad([row.ids for row in rows]), pad([row.loss_mask for row in rows])
    with torch.no_grad():
        scored = token_logprobs(model, ids, attention([len(row.ids) for row in rows]), mask)
    for row, logprobs in zip(rows, scored.tolist(), strict=True):
        row.logprobs = logprobs[: len(row.ids)]
    return rows


def make_learner(reference=None, lr: float = 0.05, **settings) -> Learner:
    """With plain SGD, so that a change of the weights is the gradient times `lr`."""
    settings = replace(SETTINGS, **settings)
    accelerator = Accelerator(cpu=True)

    def prepared(module):
        optimizer = torch.optim.SGD(module.parameters(), lr=lr)
        return accelerator.prepare(module, optimizer)

    if reference is not None:
        reference = Scorer(reference)
    scorer, optimizer = prepared(Scorer(make_model()))
    if settings.algorithm != "ppo":
        return Learner(accelerator, settings, scorer, optimizer, reference)
    critic, critic_optimizer = prepared(ppo.Critic(make_model(seed=2).model))
    return PPOLearner(
        accelerator,
        settings,
        scorer,
        optimizer,
        reference,
        critic=critic,
        critic_optimizer=critic_optimizer,
    )


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def update(trajectories=None, times: int = 1, **settings):
    """Metrics of the last update, and all weights (policy's, critic's) after it."""
    trajectories = make_trajectories() if trajectories is None else trajectories
    learner = make_learner(**settings)
    for _ in range(times):
        metrics = learner.update(trajectories)
    if isinstance(learner, PPOLearner):
        return metrics, torch.cat([weights(learner.scorer), weights(learner.critic)])
    return metrics, weights(learner.scorer)


def start() -> torch.Tensor:
    return weights(make_model())


# ---- against a second computation ---------------------------------------------------------------


def test_update_is_the_policy_gradient():
    """The step is the gradient of the mean of A_i log p over the policy's tokens."""
    rows = make_trajectories()
    model = make_model()
    total = 0.0
    for i, row in enumerate(rows):
        advantage = row.reward - (REWARDS[i] + REWARDS[i ^ 1]) / 2
        ids = torch.tensor([row.ids])
        logp = model(ids).logits[0, :-1].log_softmax(-1)
        chosen = logp.gather(-1, ids[0, 1:, None]).squeeze(-1)
        total = total + advantage * (chosen * torch.tensor(row.loss_mask[1:])).sum()
    (-total / sum(sum(row.loss_mask) for row in rows)).backward()
    expected = start() - 0.05 * torch.cat([p.grad.flatten() for p in model.parameters()])
    metrics, after = update(rows, advantage_scale="none")
    torch.testing.assert_close(after, expected, atol=TOGETHER, rtol=0)
    assert metrics["tokens"] == sum(sum(row.loss_mask) for row in rows)
    assert metrics["logprob_gap_max"] < 1e-4


def test_better_trajectories_become_likelier():
    """After an update the better trajectory is more probable than before, the worse one less."""
    rows = make_trajectories((1.0, 0.0))
    learner = make_learner()
    learner.update(rows)
    after = with_logprobs(learner.scorer.model, make_trajectories((1.0, 0.0)))
    gains = [sum(b.logprobs) - sum(a.logprobs) for a, b in zip(rows, after, strict=True)]
    assert gains[0] > 0.01 and gains[1] < -0.01


# ---- what must not change anything --------------------------------------------------------------


OPTIONS = [
    {"algorithm": "grpo", "kl_coef": 0.1, "entropy_coef": 0.1},
    {"algorithm": "grpo", "loss_average": "sequence", "advantage_scale": "batch"},
    {"algorithm": "reinforce", "loss_average": "constant"},
    {"algorithm": "ppo", "kl_coef": 0.1, "lam": 0.9},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_the_split_into_micro_batches_changes_nothing(options):
    """Normaliser, whitening and statistics are those of the whole batch (D6, D18)."""
    reference = make_model(seed=1) if options.get("kl_coef") else None
    metrics, whole = update(reference=reference, **options)
    for micro_tokens in (1, 60):
        part_metrics, parts = update(reference=reference, micro_tokens=micro_tokens, **options)
        torch.testing.assert_close(parts, whole, atol=TOGETHER, rtol=0)
        assert part_metrics == pytest.approx(metrics, abs=1e-4)
    assert (whole[: len(start())] - start()).abs().max() > 1e-3  # it did learn


@pytest.mark.parametrize("options", OPTIONS)
def test_the_order_of_groups_changes_nothing(options):
    """Every row has its own advantage and its own padding, wherever it stands."""
    reference = make_model(seed=1) if options.get("kl_coef") else None
    rows = make_trajectories()
    _, expected = update(rows, reference=reference, **options)
    turned = [*rows[4:], *reversed(rows[2:4]), *rows[:2]]
    _, got = update(turned, reference=reference, micro_tokens=90, **options)
    torch.testing.assert_close(got, expected, atol=TOGETHER, rtol=0)


def test_a_longer_batch_of_padding_changes_nothing():
    """Padding is not attended to, not averaged over and not learned from."""
    rows = make_trajectories()
    expected = update(rows)[1]

    def wide(lists, **options):
        return torch.nn.functional.pad(pad(lists, **options), (0, 7))

    def wide_attention(lengths):
        return torch.nn.functional.pad(attention(lengths), (0, 7))

    with mock.patch.multiple("minizs.models.batches", pad=wide, attention=wide_attention):
        torch.testing.assert_close(update(rows)[1], expected, atol=TOGETHER, rtol=0)


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
@pytest.mark.parametrize("junk", [math.inf, math.nan])
def test_masked_positions_can_hold_anything(algorithm, junk):
    """Infinities and NaN where the mask is 0 reach neither loss nor statistics (D8, D14)."""
    options = {"algorithm": algorithm, "kl_coef": 0.1, "reference": make_model(seed=1)}
    rows = make_trajectories()
    metrics, expected = update(rows, **options)
    for row in rows:
        pairs = zip(row.logprobs, row.loss_mask, strict=True)
        row.logprobs = [x if m else junk for x, m in pairs]
    spoiled_metrics, spoiled = update(rows, **options)
    assert torch.equal(spoiled, expected) and spoiled_metrics == metrics


def test_masks_are_never_guessed_from_ids():
    """A pad id, or eos as pad, may stand inside a prompt or at the end of a turn (D11)."""
    rows = make_trajectories()
    batch = make_batch(rows, [3, 1])
    for b, i in enumerate((3, 1)):
        n = len(rows[i].ids)
        assert {0, EOS} <= set(rows[i].ids)
        assert batch.ids[b, :n].tolist() == rows[i].ids
        assert batch.attention[b].tolist() == [1] * n + [0] * (batch.ids.shape[1] - n)
        assert batch.mask[b, :n].tolist() == rows[i].loss_mask and not batch.mask[b, n:].any()


# ---- equal rewards ------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["grpo", "reinforce"])
def test_equal_rewards_change_nothing(algorithm):
    """Groups that differ from each other and not within teach exactly nothing (D16)."""
    rows = make_trajectories((0.1, 0.1, 0.7, 0.7, 0.0, 0.0))
    metrics, after = update(rows, algorithm=algorithm)
    assert torch.equal(after, start())
    assert metrics["flat_groups"] == 1.0


def test_flat_groups_stay_in_the_normaliser_and_keep_their_kl():
    """Groups without spread have no advantage; their tokens still count and have a KL."""
    rows = make_trajectories((1.0, 0.0, 0.5, 0.5))
    live, everything = (sum(sum(row.loss_mask) for row in part) for part in (rows[:2], rows))
    alone = update(rows[:2])[1] - start()
    diluted = update(rows)[1] - start()
    torch.testing.assert_close(diluted, alone * live / everything, atol=TOGETHER, rtol=0)
    _, with_kl = update(rows[2:], kl_coef=0.1, reference=make_model(seed=1))
    assert (with_kl - start()).abs().max() > 1e-3


# ---- KL and entropy -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["k2", "k3"])
def test_kl_moves_the_policy_towards_the_reference(kind):
    """With equal rewards each update lowers the KL. The paper's code raises it (D2)."""
    rows = make_trajectories((0.5,) * 6)
    reference = make_model()
    with torch.no_grad():
        for p in reference.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5)))
    learner = make_learner(reference, lr=0.01, kl_coef=1.0, kl_kind=kind)
    distances = [learner.update(rows)["kl"] for _ in range(4)]
    assert distances[0] > distances[1] > distances[2] > distances[3] > 0


def test_no_kl_at_the_reference():
    """The KL of a policy to itself is 0: both are scored in the same way."""
    metrics, after = update(make_trajectories((0.5,) * 6), kl_coef=1.0, reference=make_model())
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(after, start(), atol=1e-4, rtol=0)


def test_entropy_bonus_raises_entropy():
    """With equal rewards every update raises the entropy."""
    rows = make_trajectories((0.5,) * 6)
    learner = make_learner(lr=0.01, entropy_coef=1.0)
    entropies = [learner.update(rows)["entropy"] for _ in range(3)]
    assert entropies[0] < entropies[1] < entropies[2]


# ---- ratios and minibatches ---------------------------------------------------------------------


def ratios(trajectories=None, **settings) -> list[float]:
    """The largest |log ratio| of each call of the loss."""
    seen = []

    def spy(logprobs, old, advantages, mask, *rest, **options):
        seen.append(losses.keep(logprobs - old, mask).abs().max().item())
        return original(logprobs, old, advantages, mask, *rest, **options)

    original = losses.policy_loss
    with mock.patch("minizs.losses.policy_loss", spy):
        update(trajectories, **settings)
    return seen


def test_ratio_is_exactly_one_on_policy():
    """With one optimiser step a batch the ratio is 1, even where the sampler rounds otherwise."""
    rows = make_trajectories()
    for row in rows:  # a sampler that rounds otherwise
        row.logprobs = [x - 1e-3 for x in row.logprobs]
    assert set(ratios(rows, micro_tokens=60)) == {0.0}


def test_ratio_leaves_one_with_the_second_minibatch():
    """Old log-probabilities are those of before the first step, so later ratios differ from 1."""
    first, second, third = ratios(minibatches=3)
    assert first < 1e-5 and second > 1e-3 and third > 1e-3


def test_minibatches_cover_every_trajectory_once():
    """Each trajectory is in one minibatch, and each minibatch has a part of every group."""
    learner = make_learner(minibatches=3, micro_tokens=40)
    parts = learner._split(make_trajectories())
    assert [sorted(i for part in m for i in part.rows) for m in parts] == [[0, 3], [1, 4], [2, 5]]


def test_a_sampler_that_differs_is_seen():
    """`logprob_gap_max` is the largest difference between sampler and scorer (D7)."""
    rows = make_trajectories()
    rows[0].logprobs[-1] -= 0.5
    assert update(rows)[0]["logprob_gap_max"] == pytest.approx(0.5, abs=1e-4)


# ---- several processes --------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_fillers_change_nothing(options):
    """A process with fewer micro-batches adds empty ones, which teach nothing; so none waits."""
    reference = make_model(seed=1) if options.get("kl_coef") else None
    rows = make_trajectories()
    calls = []
    gather = Accelerator.gather
    _, expected = update(rows, reference=reference, **options)

    def another_process_has_five(self, tensor):
        if tensor.dtype == torch.long and tensor.shape == (1,):
            return torch.cat([tensor, torch.tensor([5])])
        return gather(self, tensor)

    def spy(*arguments, **named):
        calls.append(1)
        return score(*arguments, **named)

    with (
        mock.patch.object(Accelerator, "gather", another_process_has_five),
        mock.patch("minizs.logprobs.score", spy),
    ):
        _, filled = update(rows, reference=reference, **options)
    torch.testing.assert_close(filled, expected, atol=TOGETHER, rtol=0)
    assert len(calls) == 5 * (1 if reference is None else 2)


# ---- PPO ----------------------------------------------------------------------------------------


def test_ppo_trains_policy_and_critic():
    """The critic starts at 0 and learns the returns, and the policy learns from its advantages."""
    rows = make_trajectories()
    learner = make_learner(algorithm="ppo", lr=0.02)
    head = learner.critic.head.weight.clone()
    history = [learner.update(rows) for _ in range(12)]
    assert (weights(learner.scorer) - start()).abs().max() > 1e-3
    assert not torch.equal(learner.critic.head.weight, head)
    assert history[0]["value_mean"] == 0.0  # the head starts at 0
    assert history[0]["return_mean"] == pytest.approx(
        sum(row.reward * sum(row.loss_mask) for row in rows)
        / sum(sum(row.loss_mask) for row in rows)
    )
    assert history[-1]["value_error"] < 0.5 * history[0]["value_error"]


def test_both_gradient_norms_are_logged(monkeypatch):
    """The policy's is `grad_norm` and the critic's is `critic_grad_norm`, each before clipping."""
    learner = make_learner(algorithm="ppo")
    norms = {}
    clip = learner.accelerator.clip_grad_norm_

    def spied(parameters, limit):
        parameters = list(parameters)
        squares = [weight.grad.square().sum() for weight in parameters if weight.grad is not None]
        norms[len(parameters)] = sum(squares).sqrt().item()
        return clip(parameters, limit)

    monkeypatch.setattr(learner.accelerator, "clip_grad_norm_", spied)
    figures = learner.update(make_trajectories())
    policy, critic = (len([*m.parameters()]) for m in (learner.scorer, learner.critic))
    assert norms[policy] != norms[critic]
    assert figures["grad_norm"] == pytest.approx(norms[policy])
    assert figures["critic_grad_norm"] == pytest.approx(norms[critic])


def test_ppo_puts_the_kl_into_the_reward():
    """Returns are the reward minus beta times the KL to come; the loss has no KL."""
    rows = make_trajectories((0.5,) * 6)
    learner = make_learner(make_model(seed=1), algorithm="ppo", kl_coef=0.1)
    metrics = learner.update(rows)
    ids, mask = pad([row.ids for row in rows]), pad([row.loss_mask for row in rows])
    lengths = attention([len(row.ids) for row in rows])
    logprobs, reference = (score(make_model(seed=s), ids, lengths, mask)[0] for s in (0, 1))
    k1 = logprobs - reference
    assert metrics["kl"] == pytest.approx((k1.sum() / mask.sum()).item(), abs=1e-4)
    to_go = (0.5 - 0.1 * k1.flip(1).cumsum(1).flip(1)) * mask  # gamma = lam = 1
    expected = (to_go.sum() / mask.sum()).item()
    assert metrics["return_mean"] == pytest.approx(expected, abs=1e-4)


def test_the_critic_shares_frozen_embeddings():
    """They are one matrix, which does not learn; the layers are the critic's own."""
    model = make_model()
    freeze_embeddings(model, torch.float32)
    settings = replace(SETTINGS, algorithm="ppo", lr=0.1, critic_lr=0.1)
    critic = build_learner(Accelerator(cpu=True), settings, model, VOCAB).critic
    embedding = model.get_input_embeddings().weight
    for mine, own in zip(critic.backbone.parameters(), model.model.parameters(), strict=True):
        assert (mine is own) == (own is embedding)


def test_build_learner():
    """Reference and critic are copies: they stay as they are when the policy moves."""
    settings = replace(
        SETTINGS, algorithm="ppo", kl_coef=0.1, lr=0.1, critic_lr=0.1, temperature=0.5
    )
    learner = build_learner(Accelerator(cpu=True), settings, model := make_model(), VOCAB)
    for scorer in (learner.scorer, learner.reference):
        options = {"temperature": 0.5, "vocab_size": VOCAB, "packed": False}
        assert scorer.options == options
    learner.update(make_trajectories())
    assert torch.equal(weights(learner.reference), start())
    assert (weights(model) - start()).abs().max() > 1e-3  # the model that rolls out learns
    for p, own in zip(learner.critic.backbone.parameters(), model.model.parameters(), strict=True):
        assert p.data_ptr() != own.data_ptr()
    settings.kl_coef = 0.0
    settings.algorithm = "grpo"
    bare = build_learner(Accelerator(cpu=True), settings, make_model(), VOCAB)
    assert bare.reference is None and not isinstance(bare, PPOLearner)


# ---- speed --------------------------------------------------------------------------------------


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor, for which a GPU has to be waited for."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **kwargs or {})


def test_micro_batches_do_not_wait_for_each_other():
    """Between two micro-batches nothing is read from the device."""
    learner = make_learner(micro_tokens=40)
    [minibatch] = learner._split(make_trajectories())
    assert len(minibatch) > 2
    weights, normalizer = learner._weigh(minibatch, "token")

    def loss(batch, weights, normalizer):  # without the scorer, which counts the tokens to score
        total = sum(p.sum() for p in learner.scorer.parameters())
        return total * weights.sum() / normalizer, losses.statistics(batch.mask)

    with Reads() as reads:
        learner._backward(learner.scorer, minibatch, weights, normalizer, loss)
    assert reads.count == 0
    with Reads() as reads:
        float(torch.ones(1))
    assert reads.count == 1  # it does count


@pytest.mark.parametrize("device, fused", [("cuda", True), ("cpu", None)])
def test_the_optimiser_is_fused_on_cuda(device, fused):
    """There one kernel steps all weights; on a CPU the numbers stay those of the plain AdamW."""
    accelerator = SimpleNamespace(device=torch.device(device), prepare=lambda *prepared: prepared)
    _, optimizer = prepare(accelerator, make_model(), 0.1, SETTINGS)
    assert optimizer.defaults["fused"] is fused


# ---- every option does something ----------------------------------------------------------------


@pytest.mark.parametrize(
    "choices",
    [
        [{"algorithm": "grpo"}, {"algorithm": "reinforce"}, {"algorithm": "ppo"}],
        [{"loss_average": kind} for kind in ("token", "sequence", "constant")],
        [{"advantage_scale": scale} for scale in ("group", "batch", "none")],
        [{"algorithm": "reinforce", "baseline": b} for b in ("leave_one_out", "mean", "none")],
        [{"kl_kind": kind, "kl_coef": 0.1} for kind in ("k2", "k3")],
        [{"clip_high": clip, "minibatches": 3} for clip in (1e-4, 0.2)],
        [{"clip_low": clip, "minibatches": 3} for clip in (1e-4, 0.2)],
        [{"max_grad_norm": norm} for norm in (0.01, 1e9)],
        [{"algorithm": "ppo", "lam": lam} for lam in (0.5, 1.0)],
        [{"algorithm": "ppo", "gamma": gamma} for gamma in (0.5, 1.0)],
        [{"algorithm": "ppo", "value_clip": clip, "minibatches": 3} for clip in (1e-5, 0.5)],
    ],
    ids=lambda choices: "-".join(choices[0]),
)
def test_every_option_acts(choices):
    """Each choice of each option leads to other weights (D17)."""
    results = []
    for choice in choices:
        reference = make_model(seed=1) if "kl_coef" in choice else None
        results.append(update(times=2, reference=reference, **choice)[1])
        assert results[-1].isfinite().all()
    for a, b in itertools.combinations(results, 2):
        n = min(len(a), len(b))  # only PPO has a critic
        assert (a[:n] - b[:n]).abs().max() > 1e-6


def test_an_update_with_compiled_layers_is_the_same_update(monkeypatch):
    """The policy, its reference and PPO's critic run compiled layers, and learn the same."""
    calls = []

    def stand_in(function, **_options):
        def call(*args, **kwargs):
            calls.append(function)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", stand_in)
    figures = {}
    for compiled in (False, True):
        settings = replace(SETTINGS, algorithm="ppo", kl_coef=0.1, compile_layers=compiled)
        learner = build_learner(Accelerator(cpu=True), settings, make_model(), VOCAB)
        assert not calls
        figures[compiled] = learner.update(make_trajectories())
    assert figures[True] == pytest.approx(figures[False], nan_ok=True)
    assert len({id(function.__self__) for function in calls}) == 6  # two layers in each of three
