"""What training does, measured: each algorithm with several seeds, tested on an unseen world.

    python benchmarks/arms.py                      # all arms, three seeds: long, but it goes on
    python benchmarks/arms.py --arms grpo --seeds 1
    python benchmarks/arms.py --table              # only the table of what is there

An arm is a way to train, a file in configs/arms; `accelerate launch train_policy.py --config FILE`
is one run of it. The arm "base" is the model before training. The results of an arm lie in
runs/arms/NAME-SEED, and what is complete is not run again. Flags that this script does not know go
to train_policy.py; they need a --root of their own.

Every policy answers the same 1,000 questions in the ways that `TESTS` lists. With several seeds,
standard errors are those of the mean over seeds. With one seed, and for the base model, they are
those of the mean over questions. The arm "grpo_real_search" trains with BM25, whose replies have
the mean noise of the curriculum (0.1) in all steps.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent.parent
CONFIGS = HERE / "configs" / "arms"
ROOT = "runs/arms"
BASE = "base"
ARMS = ["grpo", "ppo", "reinforce", "grpo_real_search"]
TESTS = {  # the flags of evaluate.py for each
    "greedy": [],
    "sampled": ["--temperature", "1"],
    "noisy": ["--engine_noise", "0.5"],
    "no_search": ["--engine", "none"],
}
GROUPS = {"one_hop": "one-hop", "two_hop": "two-hop", "overall": "all"}  # of questions


# ---- Running -------------------------------------------------------------------------------------


def script(name: str, *arguments: str) -> None:
    """Run one of the scripts; its output goes to the terminal. Raises if it fails."""
    subprocess.run([sys.executable, str(HERE / name), *arguments], check=True)


def flags_of(**settings) -> list[str]:
    """Settings as a command line: `seed=3` becomes `--seed 3`."""
    words = []
    for name, value in settings.items():
        words += [f"--{name}", str(value)]
    return words


def train(arm: str, seed: int, threads: int, folder: Path, flags: list[str]) -> None:
    """One run of an arm, which goes on where it was. A run that is complete is left as it is."""
    config = CONFIGS / f"{arm}.yaml"
    settings = flags_of(config=config, seed=seed, threads=threads, output=folder)
    script("train_policy.py", *settings, "--resume", *flags)


def evaluate_policy(policy: str, folder: Path, tests: dict[str, list[str]], **settings) -> None:
    """Write NAME.json into a folder for each of the tests that has none there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, flags in tests.items():
        output = folder / f"{name}.json"
        if not output.exists():
            common = flags_of(policy=policy, before="none", eval_noise=0, output=output, **settings)
            script("evaluate.py", *common, *flags)


def run_all(job: Callable[[str, int], None], arms: list[str], seeds: int, parallel: int) -> None:
    """Call `job(arm, seed)` for each arm and seed, some at a time. Raises what a job raises."""
    jobs = [(arm, seed) for seed in range(seeds) for arm in arms]
    if parallel == 1:
        for arm, seed in jobs:
            job(arm, seed)
        return
    with ThreadPoolExecutor(parallel) as pool:
        for future in [pool.submit(job, arm, seed) for arm, seed in jobs]:
            future.result()


def own_root(settings: argparse.Namespace, flags: list[str], default: str) -> Path:
    """Where the arms lie. Raises SystemExit for other settings among those of the real table."""
    if flags and settings.root == default:
        raise SystemExit(
            f"error: {' '.join(flags)} would mix with the real arms in {default}; "
            "give a --root of its own."
        )
    return Path(settings.root)


# ---- Reading results -----------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean and its standard error, both as shares of 1, and the number of seeds behind them."""

    mean: float
    error: float
    seeds: int = 1

    def __str__(self) -> str:
        """In per cent."""
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f}"


def read_rows(root: Path, arm: str, test: str, group: str) -> dict[str, dict]:
    """The figures of an arm in a test, for one group of questions, by seed."""
    rows = {}
    for path in sorted(root.glob(f"{arm}-[0-9]*/{test}.json")):
        seed = path.parent.name.rpartition("-")[2]
        rows[seed] = json.loads(path.read_text(encoding="utf-8"))[group]
    return rows


def read_scores(root: Path, arm: str, test: str, group: str = "overall") -> dict[str, Estimate]:
    """The F1 of an arm in a test, by seed; the errors are those over questions."""
    rows = read_rows(root, arm, test, group)
    return {seed: Estimate(row["f1"], row["f1_stderr"]) for seed, row in rows.items()}


def over_seeds(scores: Iterable[Estimate]) -> Estimate | None:
    """The mean over seeds with its standard error; None without any score.

    Where all seeds have the same score, as the base model's greedy ones, the error is that over
    questions.
    """
    scores = list(scores)
    if not scores:
        return None
    values = [score.mean for score in scores]
    count = len(values)
    mean = sum(values) / count
    if len(set(values)) == 1:
        return Estimate(mean, scores[0].error, count)
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return Estimate(mean, math.sqrt(variance / count), count)


def paired_difference(root: Path, one: str, other: str, test: str) -> Estimate | None:
    """The F1 of one arm minus that of another, over the seeds that both arms have."""
    scores = read_scores(root, one, test)
    other_scores = read_scores(root, other, test)
    gaps = []
    for seed in scores.keys() & other_scores.keys():
        a, b = scores[seed], other_scores[seed]
        gaps.append(Estimate(a.mean - b.mean, math.hypot(a.error, b.error)))
    return over_seeds(gaps)


def searches_again(root: Path, arm: str) -> str:
    """How often a one-hop question was searched again after a noisy and after a useful reply."""
    rows = read_rows(root, arm, "noisy", "one_hop").values()
    shares = {}
    for name in ("again_after_noisy", "again_after_useful"):
        shares[name] = sum(row.get(name, 0.0) for row in rows) / len(rows)
    return (
        f"{arm}: {shares['again_after_noisy']:.1%} after a noisy reply, "
        f"{shares['again_after_useful']:.1%} after a useful one"
    )


# ---- The table -----------------------------------------------------------------------------------


def markdown_row(cells: Iterable) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def table(root: Path) -> str:
    """Markdown: a row for each arm, its F1 in each test by group of questions, and what the
    simulator costs against real search."""
    columns = [(test, group) for test in TESTS for group in GROUPS]
    names = [f"{test}, {GROUPS[group]}" for test, group in columns]
    lines = [markdown_row(["policy (seeds)", *names]), "|---" * (len(columns) + 1) + "|"]
    for arm in (BASE, *ARMS):
        cells = [over_seeds(read_scores(root, arm, *column).values()) for column in columns]
        seeds = max(cell.seeds if cell else 0 for cell in cells)
        if seeds:
            lines.append(markdown_row([f"{arm} ({seeds})", *(cell or "" for cell in cells)]))
    for name in ("greedy", "sampled", "noisy"):
        difference = paired_difference(root, "grpo", "grpo_real_search", name)
        if difference:
            text = f"grpo minus grpo_real_search, {name}: {difference} ({difference.seeds} seeds)"
            lines += ["", text]
    lines += ["", "Searched again, one-hop questions, half of the replies noisy:", ""]
    for arm in ARMS:
        if read_rows(root, arm, "noisy", "one_hop"):
            lines.append(f"- {searches_again(root, arm)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="*", default=[BASE, *ARMS], choices=[BASE, *ARMS])
    parser.add_argument("--seeds", type=int, default=3, help="how many runs each arm has")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--questions", type=int, default=1000, help="questions of each test")
    parser.add_argument("--root", default=ROOT, help="the folder of all runs")
    parser.add_argument("--table", action="store_true", help="only print the table")
    settings, flags = parser.parse_known_args(argv)
    root = own_root(settings, flags, ROOT)
    threads = 1 if settings.parallel > 1 else 0

    def job(arm: str, seed: int) -> None:
        folder = root / f"{arm}-{seed}"
        policy = "tiny"
        if arm != BASE:
            train(arm, seed, threads, folder, flags)
            policy = str(folder / "policy")
        evaluate_policy(
            policy, folder, TESTS, questions=settings.questions, seed=seed, threads=threads
        )

    if not settings.table:
        run_all(job, settings.arms, settings.seeds, settings.parallel)
    print(table(root))


if __name__ == "__main__":
    main()
