"""What training does, measured: ways to train, each with several seeds, tested on an unseen world.

    python benchmarks/arms.py --seeds 5 --parallel 2     # all arms: hours, but it goes on
    python benchmarks/arms.py --arms grpo no_noise --seeds 2
    python benchmarks/arms.py --table                    # only the table of what is there

An arm is one way to train; `all_arms` lists them. The arm "grpo" is the main job with its defaults,
and every other arm differs from it in the settings that stand there. "base" is the model before
training. The results of an arm lie in runs/arms/NAME-SEED. What is complete is not run again, and a
run that was stopped goes on at its last checkpoint. Flags that this script does not know go to all
trainings, and the arms' own settings follow from them; they need a --root of their own.

A seed draws the same questions in every arm, and a reply is noisy where the same random number is
below the noise. So arms are compared seed by seed. claims.py writes the page of these comparisons.
"""

import argparse
import importlib
import json
import math
import multiprocessing
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from benchmarks.measure import end_with_parent  # noqa: E402
from minizs import require  # noqa: E402
from minizs.curriculum import mean_noise  # noqa: E402
from minizs.runs.flags import parse, run_script  # noqa: E402
from minizs.runs.run_folder import RUNS, read_lines  # noqa: E402
from minizs.runs.settings import PolicyConfig  # noqa: E402

ROOT = str(RUNS / "arms")
BASE = "base"
TRAINING_QUESTIONS = 2400  # that the tiny world has
GROUPS = {"one_hop": "one-hop", "two_hop": "two-hop", "overall": "all"}  # of questions


class Test(NamedTuple):
    """A test of a policy with BM25 on the unseen world. It is greedy unless its settings differ."""

    heading: str
    settings: dict[str, float]  # of evaluate.py
    share: float = 0.5  # of the questions


TESTS = {
    "clean": Test("clean", {}, share=1),
    "noise_25": Test("noise 0.25", {"engine_noise": 0.25}),
    "noise_50": Test("noise 0.5", {"engine_noise": 0.5}, share=1),
    "noise_75": Test("noise 0.75", {"engine_noise": 0.75}),
    "sampled": Test("sampled, clean", {"temperature": 1.0}),
}


# ---- The arms ------------------------------------------------------------------------------------


class Arm(NamedTuple):
    """A way to train: in words, and as settings of train_policy.py or of a script like it."""

    words: str
    settings: dict[str, object]
    script: str = "train_policy"


def all_arms(default: PolicyConfig) -> dict[str, Arm]:
    """The arms by name. They differ from the settings of `default` in what is given here."""
    start = default.noise_start
    end = default.noise_end
    mean = round(mean_noise(default.steps, start, end, default.noise_base), 4)
    constant = {"noise_start": mean, "noise_end": mean}
    useful = {"noise_start": 0.0, "noise_end": 0.0}
    # From `end` to `start` with the inverse base the curve is the rising one in a mirror.
    falling = {"noise_start": end, "noise_end": start, "noise_base": 1 / default.noise_base}
    # Its advantages are smaller, since nothing divides them, and the same KL would weigh more.
    reinforce = {"algorithm": "reinforce", "kl_coef": default.kl_coef / 2}
    return {
        "grpo": Arm("The main job: GRPO against the simulator, with rising noise.", {}),
        "ppo": Arm("PPO in place of GRPO.", {"algorithm": "ppo"}),
        "reinforce": Arm("REINFORCE in place of GRPO.", reinforce),
        "bm25_noise": Arm("BM25 in place of the simulator, equally noisy.", {"engine": "bm25"}),
        "no_noise": Arm("The simulator writes useful documents only.", useful),
        "constant_noise": Arm("The mean noise of the main job in every step.", constant),
        "falling_noise": Arm("The curriculum of the main job, backwards.", falling),
        "empty_engine": Arm("The engine returns nothing.", {"engine": "none", **useful}),
        "random_engine": Arm(
            "The engine returns random documents.", useful, "benchmarks.random_engine"
        ),
        "unmasked": Arm("The loss is on documents too.", {}, "benchmarks.unmasked"),
        "imitation": Arm(
            "No RL: the base model imitates its own successes, out of about as many attempts.",
            constant | imitation(default),
        ),
        "untrained_simulator": Arm(
            "The base model plays the engine, without stage 1.", {"simulator": "tiny"}
        ),
    }


def imitation(default: PolicyConfig) -> dict[str, object]:
    """A warm start and no step after it, from as many attempts as `default` has."""
    attempts = default.steps * default.batch_questions * default.group_size
    return {
        "warm_start": "own",
        "warm_start_questions": TRAINING_QUESTIONS,
        "group_size": max(2, round(attempts / TRAINING_QUESTIONS)),
        "minibatches": 1,  # of the group's size this asks nothing
        "warm_start_held_out": 0.0,
        "warm_start_lr": default.lr,
        # Several times over the successes, which are few.
        "warm_start_steps": max(1, 3 * default.steps // 2),
        "warm_start_tokens": 3000,
        "steps": 0,
    }


# ---- Running -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What all runs have in common."""

    root: Path
    questions: int
    threads: int  # of each run; 0 is all cores
    flags: tuple[str, ...]  # of all trainings


def call(script: str, settings: dict[str, object], *flags: str) -> None:
    """Run one of the scripts in this process, so that libraries are imported once."""
    argv = list(flags)
    for name, value in settings.items():
        argv += [f"--{name}", str(value)]
    importlib.import_module(script).main(argv)


def run_arm(name: str, seed: int, plan: Plan) -> None:
    """Train an arm with this seed, unless it is done already, and make the tests that are left."""
    folder = plan.root / f"{name}-{seed}"
    policy = "tiny"
    if name != BASE:
        train(name, seed, folder, plan)
        policy = str(folder / "policy")
    folder.mkdir(parents=True, exist_ok=True)
    for test_name, test in TESTS.items():
        output = folder / f"{test_name}.json"
        if not output.exists():
            settings = {
                "policy": policy,
                "before": "none",
                "eval_noise": 0,  # the noisy tests are tests of their own here
                "output": output,
                "questions": max(1, round(test.share * plan.questions)),
                "seed": seed,
                "threads": plan.threads,
            }
            call("evaluate", settings | test.settings)


def train(name: str, seed: int, folder: Path, plan: Plan) -> None:
    """One run of an arm, which goes on where it was. Raises UserError where it was begun with other
    settings."""
    arm = all_arms(parse(PolicyConfig, list(plan.flags)))[name]
    run = {"seed": seed, "threads": plan.threads, "output": folder, "eval_every": 0}
    call(arm.script, arm.settings | run, *plan.flags, "--resume")


def run_all(names: list[str], seeds: int, parallel: int, plan: Plan) -> None:
    """All arms with all seeds, the first seed of each first, some at a time. Raises what a run
    raises, once the others are through."""
    jobs = [(name, seed) for seed in range(seeds) for name in names]
    if parallel == 1:
        for name, seed in jobs:
            run_arm(name, seed, plan)
        return
    # Threads of one process would share the state of PyTorch and of Accelerate.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(parallel, context, initializer=end_with_parent) as pool:
        futures = [pool.submit(run_arm, name, seed, plan) for name, seed in jobs]
    for future in futures:
        future.result()


# ---- Reading results -----------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean and its standard error, and the number of seeds behind them."""

    mean: float
    error: float
    seeds: int = 1

    def __str__(self) -> str:
        """In per cent."""
        return f"{100 * self.mean:.1f} ± {100 * self.error:.1f}"


def seeds_of(root: Path, arm: str) -> list[str]:
    """The seeds of an arm that have passed through all tests."""
    folders = sorted(root.glob(f"{arm}-[0-9]*"))
    complete = [
        folder for folder in folders if all((folder / f"{test}.json").exists() for test in TESTS)
    ]
    return [folder.name.rpartition("-")[2] for folder in complete]


def read_rows(root: Path, arm: str, test: str, group: str) -> dict[str, dict]:
    """The figures of an arm in a test, for one group of questions, by seed."""
    rows = {}
    for seed in seeds_of(root, arm):
        path = root / f"{arm}-{seed}" / f"{test}.json"
        rows[seed] = json.loads(path.read_text(encoding="utf-8"))[group]
    return rows


def read_scores(root: Path, arm: str, test: str, group: str = "overall") -> dict[str, Estimate]:
    """The F1 of an arm in a test, by seed; the errors are those over questions."""
    rows = read_rows(root, arm, test, group)
    return {seed: Estimate(row["f1"], row["f1_stderr"]) for seed, row in rows.items()}


def over_seeds(scores: Iterable[Estimate]) -> Estimate | None:
    """The mean over seeds with its standard error; None without any score.

    Where all seeds have the same score, as the base model's clean ones, the error is that of the
    first one.
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
    differences = []
    for seed in scores.keys() & other_scores.keys():
        a, b = scores[seed], other_scores[seed]
        differences.append(Estimate(a.mean - b.mean, math.hypot(a.error, b.error)))
    return over_seeds(differences)


def searched_again(root: Path, arm: str, label: str) -> Estimate | None:
    """How often a policy searched again after a "noisy" or a "useful" reply to a one-hop question,
    when half of the replies are noisy."""
    shares = []
    for row in read_rows(root, arm, "noise_50", "one_hop").values():
        if f"again_after_{label}" in row:
            shares.append(Estimate(row[f"again_after_{label}"], 0.0))
    return over_seeds(shares)


def read_training(root: Path, arm: str) -> dict[str, list[dict]]:
    """The lines of metrics of an arm's training, by seed."""
    return {
        seed: read_lines(root / f"{arm}-{seed}" / "metrics.jsonl") for seed in seeds_of(root, arm)
    }


# ---- The table -----------------------------------------------------------------------------------


def markdown_table(heading: Iterable, rows: Iterable[Iterable]) -> str:
    """A table in Markdown; an empty cell for None."""
    heading = list(heading)
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(
        "| " + " | ".join("" if cell is None else str(cell) for cell in line) + " |"
        for line in lines
    )


def score_table(root: Path, arms: Iterable[str]) -> str:
    """A row for each arm that was run: its F1 in each test, on all questions."""
    rows = []
    for arm in arms:
        scores = [over_seeds(read_scores(root, arm, test).values()) for test in TESTS]
        if scores[0]:
            rows.append([f"`{arm}`", *scores, scores[0].seeds])
    return markdown_table(["arm", *(test.heading for test in TESTS.values()), "seeds"], rows)


def main(argv: list[str]) -> None:
    names = [BASE, *all_arms(PolicyConfig())]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="*", default=names, choices=names)
    parser.add_argument("--seeds", type=int, default=3, help="how many runs each arm has")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument(
        "--questions", type=int, default=1000, help="of the tests; some have half as many"
    )
    parser.add_argument("--root", default=ROOT, help="the folder of all runs")
    parser.add_argument("--table", action="store_true", help="only print the table")
    settings, flags = parser.parse_known_args(argv)
    require(
        not flags or settings.root != ROOT,
        f"{' '.join(flags)} would mix with the real arms in {ROOT}; give a --root of its own.",
    )
    parse(PolicyConfig, flags)  # what is wrong with them is said now
    threads = 1 if settings.parallel > 1 else 0
    plan = Plan(Path(settings.root), settings.questions, threads, tuple(flags))
    if not settings.table:
        run_all(settings.arms, settings.seeds, settings.parallel, plan)
    print(score_table(plan.root, names))


if __name__ == "__main__":
    run_script(main)
