"""What a batch of trajectories looked like, over all processes, as numbers for the log."""

import torch

from minizs.trajectory import Trajectory


def searched_again(trajectory: Trajectory, noisy: bool) -> tuple[int, int]:
    """How often another search followed a noisy (or useful) reply, and how many there were."""
    pairs = zip(trajectory.turns, trajectory.turns[1:], strict=False)
    after = [b.action == "search" for a, b in pairs if a.documents is not None and a.noisy == noisy]
    return sum(after), len(after)


def total(accelerator, count: int) -> int:
    """The sum of all processes' counts."""
    return int(accelerator.reduce(torch.tensor(int(count), device=accelerator.device), "sum"))


def of_trajectories(accelerator, trajectories: list[Trajectory]) -> dict[str, float]:
    """Means of all processes: of reward (F1), searches, tokens and so on per trajectory; the share
    of turns that were valid, and that of noisy or useful replies that another search followed."""
    turns, n = [turn for t in trajectories for turn in t.turns], len(trajectories)
    again = {kind: [searched_again(t, kind) for t in trajectories] for kind in (True, False)}
    sums = {  # name: (sum, count)
        "reward": (sum(t.reward for t in trajectories), n),
        "answered": (sum(t.answer is not None for t in trajectories), n),
        "truncated": (sum(bool(t.truncated) for t in trajectories), n),
        "searches_per_question": (sum(t.searches for t in trajectories), n),
        "response_tokens": (sum(sum(t.loss_mask) for t in trajectories), n),
        "trajectory_tokens": (sum(len(t.ids) for t in trajectories), n),
        "valid_rate": (sum(turn.action != "invalid" for turn in turns), len(turns)),
        "empty_replies": (sum(turn.documents == [] for turn in turns),
                          sum(t.searches for t in trajectories)),
        "again_after_noisy": tuple(map(sum, zip(*again[True], strict=True))),
        "again_after_useful": tuple(map(sum, zip(*again[False], strict=True))),
    }
    table = torch.tensor(list(sums.values()), dtype=torch.float64, device=accelerator.device)
    totals = accelerator.reduce(table, "sum").tolist()
    return {name: a / b if b else 0.0 for name, (a, b) in zip(sums, totals, strict=True)}
