"""train_policy.py with the loss on documents, too: what the mask is for (the paper's Table 7).

    python benchmarks/unmasked.py --output runs/unmasked

All that follows the first sampled token counts as the policy's own, documents and notes included.
"""

import sys
from functools import wraps
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_policy  # noqa: E402
from minizs.runs import build  # noqa: E402
from minizs.runs.flags import run_script  # noqa: E402
from minizs.trajectory import Trajectory  # noqa: E402


def unmask(trajectory: Trajectory) -> Trajectory:
    """Mask 1 from the first sampled token on."""
    start = trajectory.loss_mask.index(1)
    trajectory.loss_mask = [int(i >= start) for i in range(len(trajectory.ids))]
    return trajectory


def main(argv: list[str]) -> None:
    masked = build.rollout

    @wraps(masked)
    def unmasked(*args, **options):
        return [unmask(row) for row in masked(*args, **options)]

    build.rollout = unmasked  # which plays in training
    try:
        train_policy.main(argv)
    finally:
        build.rollout = masked


if __name__ == "__main__":
    run_script(main)
