"""What a batch of trajectories looked like, and what a run cost, as numbers for the log."""

from itertools import pairwise

import torch

from minizs.models.precision import widest_float
from minizs.trajectory import Trajectory

COST = (
    "{queries:,} queries (${search_dollars:,.2f} at a web engine's price); this run took "
    "{device_hours:,.2f} device-hours (${device_dollars:,.2f})."
)


def total(accelerator, count: int) -> int:
    """The sum of all processes' counts."""
    return int(accelerator.reduce(torch.tensor(int(count), device=accelerator.device), "sum"))


def searched_again(trajectories: list[Trajectory], noisy: bool) -> tuple[int, int]:
    """How often another search followed a noisy (or useful) reply, and how many there were."""
    after = [
        b.action == "search"
        for t in trajectories
        for a, b in pairwise(t.turns)
        if a.documents is not None and a.noisy == noisy
    ]
    return sum(after), len(after)


def of_trajectories(accelerator, trajectories: list[Trajectory]) -> dict[str, float]:
    """Means over all processes, of what a trajectory, a turn or a search was; if there was one."""
    turns, n = [turn for t in trajectories for turn in t.turns], len(trajectories)
    searches = sum(t.searches for t in trajectories)
    sums = {  # name: (sum, count)
        "reward": (sum(t.reward for t in trajectories), n),
        "answered": (sum(t.answer is not None for t in trajectories), n),
        "truncated": (sum(bool(t.truncated) for t in trajectories), n),
        "searches_per_question": (searches, n),
        "response_tokens": (sum(sum(t.loss_mask) for t in trajectories), n),
        "trajectory_tokens": (sum(len(t.ids) for t in trajectories), n),
        "valid_rate": (sum(turn.action != "invalid" for turn in turns), len(turns)),
        "empty_replies": (sum(turn.documents == [] for turn in turns), searches),
        "again_after_noisy": searched_again(trajectories, True),
        "again_after_useful": searched_again(trajectories, False),
    }
    device = accelerator.device
    table = torch.tensor(list(sums.values()), dtype=widest_float(device), device=device)
    totals = accelerator.reduce(table, "sum").tolist()
    return {name: a / b for name, (a, b) in zip(sums, totals, strict=True) if b}


def cost(rows: list[dict], search_price: float, gpu_price: float) -> dict[str, float]:
    """Of a run's lines, by the price of 1,000 queries to a web engine and of an hour of a device, a
    GPU or a CPU's process (paper Table 8). Left out: a simulator's own device, checkpoints."""
    queries = sum(row["queries"] for row in rows)
    seconds = sum(row["processes"] * (row["seconds"] + row.get("seconds_test", 0)) for row in rows)
    searches, devices = queries / 1000 * search_price, seconds / 3600 * gpu_price
    return {
        "queries": queries,
        "search_dollars": searches,
        "device_hours": seconds / 3600,
        "device_dollars": devices,
        "saved_dollars": searches - devices,
    }
