"""One question of the tiny world, taken through the whole method with real numbers.

    python -m minizs.tour

It takes a few seconds on any machine and is meant to be read beside the code: each chapter names
the functions that have computed what it shows.
"""

import copy
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from minizs.curriculum import noise_probability
from minizs.generate import Decoder
from minizs.grpo import group_advantages
from minizs.logprobs import token_logprobs
from minizs.losses import average, kl, policy_loss
from minizs.models import loading
from minizs.models.batches import attention, pad
from minizs.protocol import (
    build_prompt,
    completes_action,
    decode_pieces,
    neutralize,
    parse_action,
    prompt_ids,
    vocabulary_size,
    wrap_documents,
)
from minizs.randomness import uniform
from minizs.reward import f1_score, words
from minizs.rollout import Limits, Policy, append_replies, make_request, rollout
from minizs.simulator import SimulatedSearch, fill_template, load_template
from minizs.trajectory import Example, SearchRequest, Trajectory
from minizs.world.facts import embedded

WIDTH = 96  # columns
GROUP = 8  # trajectories of the question
SEED = 3
QUESTION = 10  # of the tiny world's training questions: some of its answers are right, some are not
STEP, STEPS = 35, 80  # where in a run of training this is, which decides how noisy searches are
LEARNING_RATE = 1e-4


def main() -> None:
    say(
        """The tiny base model plays both parts here: the policy before any training, and the search
        engine before stage 1 has taught it to heed the words "useful" and "noisy". It makes
        mistakes in both. Below each headline stand the functions that have computed the rest."""
    )
    policy = tiny_policy()
    example = tiny_question()
    print_prompt(policy, example)

    engine = Recorder(tiny_simulator(policy))
    noise = noise_probability(STEP, STEPS, start=0.0, end=0.5, base=1.0)
    group = rollout(policy, [example], engine, group_size=GROUP, noise=noise)
    for trajectory in group:
        trajectory.reward = f1_score(trajectory.answer, example.answers)
    best = max(group, key=lambda trajectory: (trajectory.reward, trajectory.searches > 0))

    print_turn(policy, best)
    request = engine.requests[best.turns[0].content]
    print_request(request, noise)
    print_documents(policy, engine.simulator, request, best)
    print_trajectory(policy, best)
    print_reward(group)
    advantages = print_group(group)
    print_update(policy, group, advantages)


# ---- What the tour is made of --------------------------------------------------------------------


def tiny_policy() -> Policy:
    """The tiny base model, with the limits that training has in the tiny world."""
    model, tokenizer = loading.load_model("tiny")
    limits = Limits(turns=6, turn_tokens=40, document_tokens=80, context=448)
    return Policy(model, tokenizer, loading.load_prompt("tiny"), limits, seed=SEED)


def tiny_question() -> Example:
    question = embedded("train").questions()[QUESTION]
    return Example(question.text, (question.answer,), "one_hop")


def tiny_simulator(policy: Policy) -> SimulatedSearch:
    """The same model as a search engine, with a copy of the weights: one learns, the other not."""
    template = load_template(loading.resolve("tiny"))
    model = copy.deepcopy(policy.model)
    return SimulatedSearch(model, policy.tokenizer, template, max_new_tokens=80)


class Recorder:
    """An engine that passes its requests on and remembers them, by query."""

    def __init__(self, simulator: SimulatedSearch) -> None:
        self.simulator = simulator
        self.requests: dict[str, SearchRequest] = {}

    def search(self, requests: list[SearchRequest]) -> list[list[str]]:
        for request in requests:
            self.requests.setdefault(request.query, request)
        return self.simulator.search(requests)


# ---- The chapters --------------------------------------------------------------------------------


def print_prompt(policy: Policy, example: Example) -> None:
    chapter("The prompt", [build_prompt, prompt_ids])
    text = build_prompt(example.question, policy.template, policy.tokenizer)
    [ids] = prompt_ids(policy.tokenizer, [text])
    say(
        f"""The question is "{example.question}" and its gold answer "{example.answers[0]}". Only
        the reward and the simulator know the answer. The policy starts from {len(ids)} tokens:"""
    )
    print_tokens(policy, ids, {"id": [str(number) for number in ids]})


def print_turn(policy: Policy, trajectory: Trajectory) -> None:
    chapter("A turn, token by token", [Decoder.turn, completes_action, parse_action])
    start = trajectory.loss_mask.index(1)
    end = start + trajectory.loss_mask[start:].index(0)
    logprobs = trajectory.logprobs[start:end]
    turn = trajectory.turns[0]
    say(
        """The policy samples one token after the other. Below each stands its log-probability: 0 is
        certain, -0.69 is one chance in two, -2.30 one in ten. The turn ends with the tag that
        completes an action."""
    )
    print_tokens(
        policy,
        trajectory.ids[start:end],
        {"log p": [f"{p:.2f}".replace("-0.00", "0.00") for p in logprobs]},
    )
    say(f'The action is "{turn.action}" and its content "{turn.content}".')


def print_request(request: SearchRequest, noise: float) -> None:
    chapter("The request", [make_request, noise_probability, uniform])
    say(
        f"""In step {STEP} of {STEPS} a search asks for noisy documents with probability
        {noise:.3f}. Whether this one does depends on a random number, which is a function of the
        question, the sample and the turn. So are the engine's own random numbers: the key has these
        three behind a number for the purpose. The request carries all that an engine may need:"""
    )
    for name in ("query", "question", "answers", "noisy", "key"):
        print(f"    {name:9} {getattr(request, name)}")
    print()


def print_documents(
    policy: Policy, simulator: SimulatedSearch, request: SearchRequest, trajectory: Trajectory
) -> None:
    chapter("The documents", [fill_template, SimulatedSearch.search, neutralize])
    prompt = fill_template(simulator.template, request, simulator.top_k, policy.tokenizer)
    kind = "noisy" if request.noisy else "useful"
    say(f'The simulator reads the prompt below, in which one word says "{kind}", and writes:')
    print(textwrap.indent(textwrap.fill(prompt, WIDTH - 8), "    > "))
    for number, document in enumerate(trajectory.turns[0].documents or ["nothing"], 1):
        print(textwrap.indent(textwrap.fill(f"Doc {number}: {document}", WIDTH - 8), "    < "))
    print()


def print_trajectory(policy: Policy, trajectory: Trajectory) -> None:
    chapter("Ids and mask", [Trajectory.append, wrap_documents, append_replies])
    count = sum(trajectory.loss_mask)
    say(
        f"""All of it is one row of {len(trajectory.ids)} tokens. The mask is 1 on the {count} that
        the policy sampled, and the loss sees these alone. Without the mask the policy would learn
        to write questions and documents."""
    )
    rows = {
        "id": [str(number) for number in trajectory.ids],
        "mask": [str(bit) for bit in trajectory.loss_mask],
    }
    print_tokens(policy, trajectory.ids, rows)


def print_reward(group: Sequence[Trajectory]) -> None:
    chapter("The reward", [f1_score, words])
    golds = group[0].example.answers
    say(
        f"""With IN shared words, PN predicted and RN right ones F1 = 2 IN / (PN + RN). The gold
        answer "{golds[0]}" has RN = {len(words(golds[0]))}. The policy has answered the question
        {len(group)} times, and these are its different rewards:"""
    )
    examples = {trajectory.reward: trajectory for trajectory in group}
    for reward, trajectory in sorted(examples.items(), reverse=True):
        predicted = words(trajectory.answer or "")
        shared = Counter(predicted) & Counter(words(golds[0]))
        print(
            f"    F1 = 2 * {shared.total()} / ({len(predicted)} + {len(words(golds[0]))}) "
            f"= {reward:.2f}   {trajectory.answer or '(no answer)'}"
        )
    print()


def print_group(group: Sequence[Trajectory]) -> Tensor:
    """Print rewards and advantages of the group. Returns the advantages, (N,)."""
    chapter("Rewards and advantages of a group", [rollout, group_advantages])
    rewards = torch.tensor([trajectory.reward for trajectory in group])  # (N,)
    advantages = group_advantages(rewards, len(group))
    say(
        f"""An advantage says how much better than its group a trajectory is: A = (reward - mean) /
        standard deviation. The mean is {rewards.mean():.3f} and the standard deviation
        {rewards.std():.3f}. Had all eight scored the same, nothing could be learned from them."""
    )
    print("      searches  answer                        reward  advantage")
    for number, trajectory in enumerate(group):
        answer = trajectory.answer if trajectory.answer is not None else "(none)"
        print(
            f"    {number} {trajectory.searches:>6}    {answer[:28]:28}  {rewards[number]:6.2f}"
            f"  {advantages[number]:+9.2f}"
        )
    print()
    return advantages


def print_update(policy: Policy, group: Sequence[Trajectory], advantages: Tensor) -> None:
    chapter("The loss before and after one update", [token_logprobs, policy_loss, kl])
    ids = pad([trajectory.ids for trajectory in group])  # (N, T)
    attended = attention([len(trajectory.ids) for trajectory in group])  # (N, T)
    mask = pad([trajectory.loss_mask for trajectory in group])  # (N, T)
    advantages_by_token = advantages[:, None].expand(mask.shape)  # (N, T)

    def score() -> Tensor:
        vocab_size = vocabulary_size(policy.tokenizer)
        return token_logprobs(policy.model, ids, attended, mask, vocab_size=vocab_size)  # (N, T)

    before = score()
    loss_before, _ = policy_loss(before, before, advantages_by_token, mask)
    optimizer = torch.optim.AdamW(policy.model.parameters(), LEARNING_RATE, weight_decay=0.0)
    loss_before.backward()
    optimizer.step()
    with torch.no_grad():
        after = score()
        loss_after, figures = policy_loss(after, before, advantages_by_token, mask)
        clipped = figures["clip_fraction"].item()
        moved = average(kl(after, before, "k3", mask), mask)

    sampled = pad([trajectory.logprobs for trajectory in group], dtype=torch.float32)
    gap = ((before.detach() - sampled) * mask).abs().max()
    say(
        f"""The model scores the same tokens again, in one pass without a cache. That agrees with
        what the sampler noted to within {gap:.0e}. Then the optimiser makes one step (AdamW,
        learning rate {LEARNING_RATE:g}). On the whole, what had a positive advantage becomes
        likelier and the rest less likely. The rows share the weights, so that one of them can also
        move against its advantage:"""
    )
    print("      advantage   log p of its own tokens, before and after")
    for number in range(len(group)):
        old = before[number].sum().item()
        new = after[number].sum().item()
        sign = "up" if new > old else "down"
        print(f"    {number} {advantages[number]:+9.2f} {old:10.2f} {new:8.2f}  {sign}")
    print()
    print(f"    loss before  {loss_before.item():+.4f}")
    print(f"    loss after   {loss_after.item():+.4f}")
    print(f"    KL           {moved.item():.4f}  (k3, to the model before)")
    print(f"    clipped      {clipped:.0%}  of the tokens\n")
    say(
        """In training, `Learner.update` (minizs/learner.py) does this with micro-batches, several
        processes and a KL penalty, and `train` (train_policy.py) is the loop around it all."""
    )


# ---- How it is printed ---------------------------------------------------------------------------


def chapter(title: str, functions: Iterable[Callable]) -> None:
    """A headline, and where the functions of this chapter are."""
    print(f"-- {title} ".ljust(WIDTH, "-"))
    places: dict[str, list[str]] = {}
    for function in functions:
        file = inspect.unwrap(function).__module__.replace(".", "/") + ".py"
        places.setdefault(file, []).append(function.__qualname__)
    texts = [f"{file}: {', '.join(names)}" for file, names in places.items()]
    print(textwrap.fill("; ".join(texts), WIDTH) + "\n")


def say(text: str) -> None:
    print(textwrap.fill(" ".join(text.split()), WIDTH) + "\n")


def print_tokens(policy: Policy, ids: Sequence[int], rows: dict[str, list[str]]) -> None:
    """Tokens beside each other, in as many lines as they take, each with its cells below it."""
    pieces = [printable(piece) for piece in decode_pieces(policy.tokenizer, list(ids))]
    columns = list(zip(pieces, *rows.values(), strict=True))
    label_width = max(map(len, rows))
    line: list[tuple[str, ...]] = []
    used = 0  # of the line's characters
    for column in columns:
        width = max(map(len, column)) + 2
        if line and used + width > WIDTH - label_width - 6:
            print_columns(line, list(rows), label_width)
            line = []
            used = 0
        line.append(column)
        used += width
    print_columns(line, list(rows), label_width)


def print_columns(columns: list[tuple[str, ...]], labels: list[str], label_width: int) -> None:
    for place, label in enumerate(["", *labels]):
        cells = [column[place].rjust(max(map(len, column))) for column in columns]
        print(f"    {label:{label_width}}  {'  '.join(cells)}")
    print()


def printable(piece: str) -> str:
    """A token's text without the spaces around it, and with line breaks that can be seen."""
    return piece.strip(" ").replace("\n", "\\n") or "·"


if __name__ == "__main__":
    main()
