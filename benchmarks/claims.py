"""The paper's claims in miniature: a page that compares the arms of arms.py, claim by claim.

    python benchmarks/claims.py --output benchmarks/CLAIMS.md

It runs nothing: it reads what arms.py has left in runs/arms. A claim is on the page if its first
arm and another one were run, and an arm counts with the seeds that have passed through all tests.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.arms import (  # noqa: E402
    BASE,
    GROUPS,
    ROOT,
    TESTS,
    Estimate,
    all_arms,
    markdown_table,
    over_seeds,
    paired_difference,
    read_rows,
    read_scores,
    read_training,
    score_table,
    searched_again,
    seeds_of,
)
from minizs.runs.flags import run_script  # noqa: E402
from minizs.runs.settings import PolicyConfig  # noqa: E402

PARTS = 5  # of a training, whose means are shown
SURE = 3  # standard errors
SEEDS = 3  # fewer say too little about chance

INTRODUCTION = f"""\
# The paper's claims in miniature

Each section takes one claim of the ZeroSearch paper, or a question beside it, and tries it in the
tiny world with a model of 0.7 million parameters.

An **arm** is one way to train, repeated with several seeds. The arm `grpo` is the main job with its
defaults. Each other arm differs from it in the settings that stand beside it. They are flags of
`train_policy.py`, but for two arms that are a script like it.

{{arms}}

Each trained policy answers the same questions with BM25 in a world that it has not seen. *Clean* is
BM25 as it is. With *noise* 0.25, 0.5 or 0.75 that share of its replies is noisy: a noisy reply has
the best documents that do not help. Decoding is greedy, except for *sampled*, which draws tokens at
temperature 1 as training does. Clean and noise 0.5 have 1,000 questions and the others 500; half of
the questions need one look-up and half need two.

Figures are F1 in per cent: the mean over the seeds ± one standard error of that mean. Differences
are paired by seed, over the seeds that both arms have. A difference of more than {SURE} standard
errors is in bold where there are at least {SEEDS} seeds. Chance alone makes about one in 25 as
large as that with five seeds, and one in 10 with three. The paper's figures are exact match,
averaged over seven data sets, of models thousands of times as large: compare which side is ahead,
and not by how much.

`python benchmarks/arms.py --seeds 5 --parallel 2` runs everything, and the command of a section
runs its arms alone. `python benchmarks/claims.py --output benchmarks/CLAIMS.md` writes this page
from the results.
"""


class Claim(NamedTuple):
    """What the paper says, what it reports, and the arms that try it. The first is compared with
    each of the others; `details` are more tables about them."""

    title: str
    paper: str
    arms: tuple[str, ...]
    details: Callable[[Path, list[str]], Iterator[str]] | None = None


# ---- Details -------------------------------------------------------------------------------------


def noise_details(root: Path, arms: list[str]) -> Iterator[str]:
    """How much noise each arm has met, and what its policy does about it."""
    rows = []
    for arm in arms:
        rows.append(
            [
                f"`{arm}`",
                thousands(root, arm, searches),
                thousands(root, arm, noisy_replies),
                searched_again(root, arm, "noisy"),
                searched_again(root, arm, "useful"),
            ]
        )
    yield (
        "What the arms have met in training, in thousands of replies, and how often, in per cent, "
        "the policy searches again after a reply to a one-hop question in the test with noise 0.5:"
    )
    yield ""
    yield markdown_table(
        [
            "arm",
            "searches in training",
            "noisy replies in training",
            "again after a noisy reply",
            "again after a useful reply",
        ],
        rows,
    )
    yield ""


def searches(rows: list[dict]) -> float:
    return sum(row["queries"] for row in rows)


def noisy_replies(rows: list[dict]) -> float:
    return sum(row.get("noisy_replies", 0.0) * row["queries"] for row in rows)


def thousands(root: Path, arm: str, count: Callable[[list[dict]], float]) -> str | None:
    """The mean over the seeds of a count in the training of an arm, and its standard error."""
    counts = [Estimate(count(rows), 0.0) for rows in read_training(root, arm).values()]
    mean = over_seeds(counts)
    return f"{mean.mean / 1000:.1f} ± {mean.error / 1000:.1f}" if mean else None


def search_details(root: Path, arms: list[str]) -> Iterator[str]:
    """How often each arm searches, over its training and in the clean test."""
    rows = []
    for arm in arms:
        trainings = read_training(root, arm)
        parts = [part_means(training) for training in trainings.values()]
        means = [f"{fmean(part):.2f}" for part in zip(*parts, strict=True)]
        tests = read_rows(root, arm, "clean", "overall").values()
        rows.append(
            [f"`{arm}`", *means, f"{fmean(row['searches_per_question'] for row in tests):.2f}"]
        )
    heading = [f"part {number} of {PARTS}" for number in range(1, PARTS + 1)]
    yield "Searches for each question, in equal parts of the training and in the clean test:"
    yield ""
    yield markdown_table(["arm", *heading, "clean test"], rows)
    yield ""


def part_means(training: list[dict]) -> list[float]:
    """The mean number of searches for a question in each of the equal parts of a training."""
    ends = [round(len(training) * part / PARTS) for part in range(PARTS + 1)]
    means = []
    for start, end in zip(ends[:-1], ends[1:], strict=True):
        steps = training[start:end]
        means.append(fmean(row["searches_per_question"] for row in steps) if steps else 0.0)
    return means


# ---- The claims ----------------------------------------------------------------------------------

CLAIMS = [
    Claim(
        "REINFORCE, GRPO and PPO all work, REINFORCE best",
        "In the paper they reach 34.47, 33.17 and 32.67 (Table 5).",
        ("reinforce", "grpo", "ppo", BASE),
    ),
    Claim(
        "A curriculum of noise beats random noise",
        "In the paper the curriculum reaches 34.47 and constant noise of 0.5 reaches 32.59 (Table "
        "6). Here the constant noise is the mean of the curriculum. Training without noise and "
        "noise that falls are not in the paper.",
        ("grpo", "constant_noise", "falling_noise", "no_noise"),
        noise_details,
    ),
    Claim(
        "Training with a simulator is as good as with a real engine",
        "In the paper, with Qwen2.5-3B, ZeroSearch reaches 34.47 and Search-R1 32.81 (Table 3). "
        "Here both engines follow the same curriculum of noise.",
        ("grpo", "bm25_noise"),
        noise_details,
    ),
    Claim(
        "A policy stops searching where searches are worth nothing",
        "This comparison is not in the paper.",
        ("grpo", "empty_engine", "random_engine"),
        search_details,
    ),
    Claim(
        "A fine-tuned simulator beats a prompted one",
        "In the paper fine-tuned simulators lead to 30.47 to 34.47, and prompted ones to 29.44 to "
        "31.50 (Table 4).",
        ("grpo", "untrained_simulator"),
        noise_details,
    ),
    Claim(
        "Masking documents out of the loss helps",
        "In the paper, Llama-3.2-3B reaches 36.07 with the mask and 34.53 without it (Table 7).",
        ("grpo", "unmasked"),
    ),
    Claim(
        "RL beats supervised learning on the same model's successes",
        "This comparison is not in the paper.",
        ("grpo", "imitation"),
    ),
]


# ---- The page ------------------------------------------------------------------------------------


def page(root: Path) -> str:
    """Markdown: the introduction, and a section for each claim of which enough was run."""
    sections = [introduction()]
    for claim in CLAIMS:
        arms = [arm for arm in claim.arms if seeds_of(root, arm)]
        if len(arms) > 1 and arms[0] == claim.arms[0]:
            sections.append("\n".join(section(root, claim, arms)) + "\n")
    return "\n".join(sections)


def introduction() -> str:
    """What an arm is, all arms, and how they are tested."""
    rows = [[f"`{BASE}`", "The model before training.", ""]]
    for name, arm in all_arms(PolicyConfig()).items():
        flags = " ".join(f"--{setting} {value}" for setting, value in arm.settings.items())
        script = "" if arm.script == "train_policy" else f"{arm.script.replace('.', '/')}.py"
        cell = f"{script} {flags}".strip()
        rows.append([f"`{name}`", arm.words, f"`{cell}`" if cell else ""])
    return INTRODUCTION.format(arms=markdown_table(["arm", "what it is", "settings"], rows))


def section(root: Path, claim: Claim, arms: list[str]) -> Iterator[str]:
    """The lines of a claim's section; `arms` are those of its arms that were run."""
    seeds = max(len(seeds_of(root, arm)) for arm in arms)
    yield f"## {claim.title}"
    yield ""
    yield claim.paper
    yield ""
    yield "```bash"
    yield f"python benchmarks/arms.py --arms {' '.join(arms)} --seeds {seeds} --parallel 2"
    yield "```"
    yield ""
    yield score_table(root, arms)
    yield ""
    yield f"In points of F1, paired by seed, `{arms[0]}` minus the other arm:"
    yield ""
    yield difference_table(root, arms)
    yield ""
    if claim.details:
        yield from claim.details(root, arms)
    yield from hops(root, arms)


def difference_table(root: Path, arms: list[str]) -> str:
    """The first arm minus each of the others, in every test."""
    rows = []
    for arm in arms[1:]:
        differences = [paired_difference(root, arms[0], arm, test) for test in TESTS]
        if differences[0]:
            seeds = differences[0].seeds
            rows.append([f"minus `{arm}`", *map(signed, differences), seeds])
    return markdown_table(
        [f"`{arms[0]}`", *(test.heading for test in TESTS.values()), "seeds"], rows
    )


def signed(difference: Estimate) -> str:
    """In points, with its sign; in bold where it is more than `SURE` standard errors, of at least
    `SEEDS` seeds."""
    mean = round(100 * difference.mean, 1)
    error = round(100 * difference.error, 1)
    text = f"{mean:+.1f} ± {error:.1f}"
    is_sure = difference.seeds >= SEEDS and abs(mean) > SURE * error
    return f"**{text}**" if is_sure else text


def hops(root: Path, arms: list[str]) -> Iterator[str]:
    """One-hop and two-hop questions apart, folded."""
    groups = [group for group in GROUPS if group != "overall"]
    rows = []
    for arm in arms:
        for group in groups:
            scores = [over_seeds(read_scores(root, arm, test, group).values()) for test in TESTS]
            rows.append([f"`{arm}`, {GROUPS[group]}", *scores])
    yield "<details><summary>Questions of one and of two hops</summary>"
    yield ""
    yield markdown_table(["arm", *(test.heading for test in TESTS.values())], rows)
    yield ""
    yield "</details>"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default=ROOT, help="the folder of all runs")
    parser.add_argument("--output", help="where the page goes, by default CLAIMS.md in the root")
    settings = parser.parse_args(argv)
    root = Path(settings.root)
    output = Path(settings.output or root / "CLAIMS.md")
    output.write_text(page(root), encoding="utf-8")
    print(f"The page is in {output}")


if __name__ == "__main__":
    run_script(main)
