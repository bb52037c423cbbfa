"""What training does, measured: each algorithm, several seeds, tested on unseen worlds.

    python benchmarks/arms.py                      # all arms, three seeds: long, but it resumes
    python benchmarks/arms.py --arms grpo --seeds 1
    python benchmarks/arms.py --table              # only the table of what is there

An arm is a file in configs/arms (`accelerate launch train_policy.py --config FILE` is one run of
it). Arms run one by one (or --parallel N at a time, one thread each), each in runs/arms/NAME-SEED;
what is complete is not run again. Flags that are not of this script go to train_policy.py, and
want a --root of their own. Every policy is tested on the same 1,000 questions with BM25: greedy,
sampled at temperature 1, and greedy with half of the replies noisy; and greedy without documents.
Standard errors are those of the mean over seeds; with one seed, and for the base model, of the mean
over questions. Real search has the mean noise of the curriculum (0.1) in all its steps.
"""

import argparse
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
ARMS = ["grpo", "ppo", "reinforce", "grpo_real_search"]
ROOT = "runs/arms"
TESTS = {
    "greedy": [],
    "sampled": ["--temperature", "1"],
    "noisy": ["--engine_noise", "0.5"],
    "no_search": ["--engine", "none"],
}


def script(name: str, *arguments: str) -> None:
    """Run one of the scripts; its output goes to the terminal. Raises if it fails."""
    subprocess.run([sys.executable, str(HERE / name), *arguments], check=True)


def train_and_test(
    arm: str, seed: int, threads: int, root: Path, questions: int, flags: list[str]
) -> None:
    folder = root / f"{arm}-{seed}"
    policy = "tiny" if arm == "base" else str(folder / "policy")
    if arm != "base":
        config = str(HERE / "configs" / "arms" / f"{arm}.yaml")
        script(
            "train_policy.py",
            "--config",
            config,
            "--seed",
            str(seed),
            "--threads",
            str(threads),
            "--output",
            str(folder),
            "--resume",
            *flags,
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, settings in TESTS.items():
        path = folder / f"{name}.json"
        if not path.exists():
            script(
                "evaluate.py",
                "--policy",
                policy,
                "--before",
                "none",
                "--output",
                str(path),
                "--questions",
                str(questions),
                "--seed",
                str(seed),
                "--threads",
                str(threads),
                *settings,
            )


def mean(values: list[tuple[float, float]]) -> str:
    """Mean ± standard error, in per cent, of (value, its own standard error) over seeds."""
    scores = [value for value, _ in values]
    n, centre = len(scores), sum(scores) / len(scores)
    error = values[0][1]
    if len(set(scores)) > 1:
        error = math.sqrt(sum((x - centre) ** 2 for x in scores) / (n - 1) / n)
    return f"{100 * centre:.1f} ± {100 * error:.1f}"


def difference(root: Path, one: str, other: str, test: str) -> str:
    """Overall F1 of one arm minus another's over the seeds that both have, paired by seed."""
    gaps = []
    for path in sorted(root.glob(f"{one}-[0-9]*/{test}.json")):
        seed = path.parent.name.rsplit("-", 1)[1]
        paths = [path, root / f"{other}-{seed}" / path.name]
        if paths[1].exists():
            a, b = (json.loads(path.read_text(encoding="utf-8"))["overall"] for path in paths)
            gaps.append((a["f1"] - b["f1"], math.hypot(a["f1_stderr"], b["f1_stderr"])))
    return f"{one} minus {other}, {test}: {mean(gaps)} ({len(gaps)} seeds)" if gaps else ""


def searches_again(root: Path, arm: str) -> str:
    """How often a one-hop question was searched again after a noisy and after a useful reply."""
    files = root.glob(f"{arm}-[0-9]*/noisy.json")
    rows = [json.loads(path.read_text(encoding="utf-8"))["one_hop"] for path in files]
    names = ("again_after_noisy", "again_after_useful")
    shares = [sum(row.get(name, 0.0) for row in rows) / len(rows) for name in names]
    return f"{arm}: {shares[0]:.1%} after a noisy reply, {shares[1]:.1%} after a useful one"


def table(root: Path) -> str:
    """Markdown: an arm a row, F1 by data set and test, from the result files alone."""
    columns = [(test, group) for test in TESTS for group in ("one_hop", "two_hop", "overall")]
    lines = ["| policy (seeds) | " + " | ".join(f"{t}, {g}" for t, g in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for arm in ("base", *ARMS):
        cells, seeds = [], 0
        for test, group in columns:
            files = sorted(root.glob(f"{arm}-[0-9]*/{test}.json"))
            rows = [json.loads(path.read_text(encoding="utf-8"))[group] for path in files]
            cells.append(mean([(r["f1"], r["f1_stderr"]) for r in rows]) if rows else "")
            seeds = max(seeds, len(rows))
        if seeds:
            lines.append(f"| {arm} ({seeds}) | " + " | ".join(cells) + " |")
    for test in ("greedy", "sampled", "noisy"):
        lines.append("\n" + difference(root, "grpo", "grpo_real_search", test))
    lines += ["\nSearched again, one-hop questions, half of the replies noisy:\n"]
    lines += [f"- {searches_again(root, a)}" for a in ARMS if any(root.glob(f"{a}-*/noisy.json"))]
    return "\n".join(lines)


def own_root(settings, flags: list[str], default: str) -> Path:
    """Where the arms lie. Raises SystemExit for other settings among those of the real table."""
    if flags and settings.root == default:
        raise SystemExit(
            f"error: {' '.join(flags)} would mix with the real arms in {default}; "
            "give a --root of its own."
        )
    return Path(settings.root)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="*", default=["base", *ARMS], choices=["base", *ARMS])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=1, help="arms at a time")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--root", default=ROOT)
    parser.add_argument("--table", action="store_true", help="only print the table")
    settings, flags = parser.parse_known_args(argv)
    root = own_root(settings, flags, ROOT)
    if not settings.table:
        threads = 1 if settings.parallel > 1 else 0
        jobs = [(arm, seed) for seed in range(settings.seeds) for arm in settings.arms]
        with ThreadPoolExecutor(settings.parallel) as pool:
            several = pool.map if settings.parallel > 1 else map
            list(
                several(
                    lambda job: train_and_test(*job, threads, root, settings.questions, flags), jobs
                )
            )
    print(table(root))


if __name__ == "__main__":
    main()
