"""What a batch of trajectories looked like, and what a run cost, as numbers for the log."""

import re
from collections.abc import Sequence
from itertools import pairwise

import torch

from minizs.models.precision import widest_float
from minizs.trajectory import Trajectory, Turn

# What can end a trajectory, as `Trajectory.truncated` names it, and the setting to raise.
LIMITS = {"turns": "max_turns", "turn_tokens": "max_turn_tokens", "context": "max_context"}
# The sources of the tiny world's questions, which say how many look-ups a question needs.
ONE_HOP = "one_hop"
TWO_HOP = "two_hop"
THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
SEARCH_PRICE = 9.17  # dollars for 1,000 queries to a web engine (paper, Table 8)
GPU_PRICE = 1.47  # dollars for an hour of a GPU (paper, Table 8)


def total(accelerator, count: int) -> int:
    """The sum of a count over all processes."""
    return int(accelerator.reduce(torch.tensor(int(count), device=accelerator.device), "sum"))


def searched_again(trajectories: Sequence[Trajectory], noisy: bool) -> tuple[int, int]:
    """How often the next turn after a noisy (or useful) reply searched, and how many there were."""
    repeats = 0
    replies = 0
    for trajectory in trajectories:
        for turn, next_turn in pairwise(trajectory.turns):
            if turn.documents is not None and turn.noisy == noisy:
                replies += 1
                repeats += next_turn.action == "search"
    return repeats, replies


def again_counts(trajectories: Sequence[Trajectory]) -> dict[str, tuple[int, int]]:
    """`searched_again` by the name of its metric.

    A second search means something where one look-up answers the question: the tiny world's
    two-hop questions, which need it as a matter of course, are counted nowhere. Of other data
    nobody knows how many look-ups a question needs: metrics of another name count all of it.
    """
    one_hop = [t for t in trajectories if t.example.source == ONE_HOP]
    unknown = [t for t in trajectories if t.example.source not in (ONE_HOP, TWO_HOP)]
    return {
        "one_hop_again_after_noisy": searched_again(one_hop, noisy=True),
        "one_hop_again_after_useful": searched_again(one_hop, noisy=False),
        "again_after_noisy": searched_again(unknown, noisy=True),
        "again_after_useful": searched_again(unknown, noisy=False),
    }


def means(sums: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Sum over count, by name. What did not occur at all has no mean and is left out."""
    return {name: total / count for name, (total, count) in sums.items() if count}


def thinking_characters(turn: Turn) -> int:
    """How much a turn thought. Characters, because some languages have no spaces."""
    return sum(len(thought) for thought in THOUGHT.findall(turn.text))


def of_trajectories(accelerator, trajectories: list[Trajectory]) -> dict[str, float]:
    """Means over the trajectories of all processes, or over their turns, searches or replies.

    What did not occur at all has no mean and is left out.
    """
    turns = [turn for trajectory in trajectories for turn in trajectory.turns]
    n = len(trajectories)
    searches = sum(t.searches for t in trajectories)
    sums = {  # name: (sum, count)
        "reward": (sum(t.reward for t in trajectories), n),
        "answered": (sum(t.answer is not None for t in trajectories), n),
        "truncated": (sum(bool(t.truncated) for t in trajectories), n),
        "searches_per_question": (searches, n),
        "response_tokens": (sum(sum(t.loss_mask) for t in trajectories), n),
        "trajectory_tokens": (sum(len(t.ids) for t in trajectories), n),
        "thinking_characters": (sum(map(thinking_characters, turns)), len(turns)),
        "valid_rate": (sum(turn.action != "invalid" for turn in turns), len(turns)),
        "empty_replies": (sum(turn.documents == [] for turn in turns), searches),
        "noisy_replies": (sum(turn.noisy for turn in turns), searches),
        **again_counts(trajectories),
    }
    for limit in LIMITS:
        sums[f"truncated_{limit}"] = (sum(t.truncated == limit for t in trajectories), n)
    device = accelerator.device
    table = torch.tensor(list(sums.values()), dtype=widest_float(device), device=device)
    return means(dict(zip(sums, accelerator.reduce(table, "sum").tolist(), strict=True)))


def cost(rows: list[dict], engine: str) -> dict[str, float]:
    """What a run cost, from its lines of metrics, at the prices of the paper (Table 8).

    A device is a GPU, or a process on a CPU. The device of a simulator's server and the writing of
    checkpoints are not counted. `saved_dollars` is what the queries would have cost beyond that at
    a web engine; with `--engine web` they were paid, and nothing was saved.
    """
    queries = sum(row["queries"] for row in rows)
    seconds = sum(row["processes"] * (row["seconds"] + row.get("seconds_test", 0)) for row in rows)
    search_dollars = queries / 1000 * SEARCH_PRICE
    device_dollars = seconds / 3600 * GPU_PRICE
    figures = {
        "queries": queries,
        "search_dollars": search_dollars,
        "device_hours": seconds / 3600,
        "device_dollars": device_dollars,
    }
    if engine != "web":
        figures["saved_dollars"] = search_dollars - device_dollars
    return figures


def cost_sentence(figures: dict[str, float]) -> str:
    """`cost` in words."""
    were_paid = "saved_dollars" not in figures
    price = "paid to a web engine" if were_paid else "at a web engine's price"
    return (
        f"{figures['queries']:,} queries (${figures['search_dollars']:,.2f} {price}); "
        f"this run took {figures['device_hours']:,.2f} device-hours "
        f"(${figures['device_dollars']:,.2f})."
    )
