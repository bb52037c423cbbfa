"""The paper's claims in miniature: for each claim, a few ways to train and how they compare.

    python benchmarks/claims.py                     # all arms, three seeds; it goes on
    python benchmarks/claims.py --arms reference no_noise --seeds 5
    python benchmarks/claims.py --table --output benchmarks/CLAIMS.md  # only the page

The page begins with what an arm is and how it is tested (`INTRODUCTION` below). The results of an
arm lie in runs/claims/NAME-SEED, and what is complete is not run again. Arms of arms.py stand on
the page if they were run. It is written to runs/claims/CLAIMS.md by default. Flags that this script
does not know go to train_policy.py; they need a --root of their own.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from benchmarks import arms as algorithms  # noqa: E402
from benchmarks.arms import (  # noqa: E402
    GROUPS,
    Estimate,
    evaluate_policy,
    flags_of,
    markdown_row,
    over_seeds,
    own_root,
    paired_difference,
    read_scores,
    run_all,
)

CONFIGS = HERE / "configs" / "claims"
ROOT = "runs/claims"
REFERENCE = "reference"
SCRIPTS = {"unmasked": "benchmarks/unmasked.py", "imitation": "benchmarks/imitation.py"}
ARMS = [*sorted(path.stem for path in CONFIGS.glob("*.yaml")), *SCRIPTS]
TURNS = {"two_turns": 2, "three_turns": 3}  # a policy is tested with the turns it was trained with
OTHER_TURNS = 6
TESTS = {name: algorithms.TESTS[name] for name in ("greedy", "sampled", "noisy")}
COLUMNS = {"greedy": "greedy", "sampled": "sampled", "noisy": "half of the replies noisy"}
CONDITIONS = {
    "greedy": "when greedy",
    "sampled": "when sampled",
    "noisy": "when half of the replies are noisy",
}

INTRODUCTION = """\
# The paper's claims in miniature

Each section takes one claim of the ZeroSearch paper and tries it in the tiny world, with a model of
0.7 million parameters.

An **arm** is one way to train, repeated with several seeds. Most arms are files of settings in
`configs/claims` or `configs/arms`; `accelerate launch train_policy.py --config FILE` is one run of
such an arm. `unmasked` and `imitation` are scripts in `benchmarks/`. The arm **reference** is what
the others are compared with: 40 steps of GRPO against the default simulator, whose noise rises from
0 to 0.25. Its file is `configs/claims/reference.yaml`. Another arm of 40 steps differs from it in
what its name says. The arms `grpo`, `ppo`, `reinforce` and `grpo_real_search` have 100 steps.

Each trained policy answers the same questions with BM25 in a world that it has not seen: 600
questions after 40 steps, 1,000 after 100. It answers them three times:

- *greedy*: it takes the likeliest token;
- *sampled*: it draws its tokens at temperature 1, as training does;
- *half of the replies noisy*: it is greedy, and half of the replies are the best documents that do
  not help.

Figures are F1 in per cent: the mean over the seeds ± one standard error of that mean. Differences
are paired by seed, over the seeds that both arms have. A difference of more than two standard
errors is in bold; a smaller one may be chance. The paper's figures are exact match, averaged over
seven data sets, of models thousands of times as large: compare which side is ahead, and not by how
much.

`python benchmarks/claims.py --table --output benchmarks/CLAIMS.md` writes this page from the
results.
"""


@dataclass(frozen=True)
class Claim:
    """What the paper says, what it reports, and the arms that try it. The others are compared with
    the first."""

    title: str
    paper: str
    arms: tuple[str, ...]


CLAIMS = [
    Claim(
        "Training with a simulator is as good as with a real engine",
        "In the paper, with Qwen2.5-3B, ZeroSearch reaches 34.47 and Search-R1 32.81 (Table 3).",
        ("grpo", "grpo_real_search"),
    ),
    Claim(
        "REINFORCE, GRPO and PPO all work, REINFORCE best",
        "In the paper they reach 34.47, 33.17 and 32.67 (Table 5).",
        ("reinforce", "grpo", "ppo"),
    ),
    Claim(
        "A curriculum of noise beats random noise",
        "In the paper the curriculum reaches 34.47 and constant noise of 0.5 reaches 32.59 (Table "
        "6). Training without noise and a reversed curriculum are not in it.",
        (REFERENCE, "no_noise", "random_noise", "reversed_noise"),
    ),
    Claim(
        "A fine-tuned simulator beats a prompted one",
        "In the paper fine-tuned simulators lead to 30.47 to 34.47, and prompted ones to 29.44 to "
        "31.50 (Table 4).",
        (REFERENCE, "hasty_simulator", "untrained_simulator"),
    ),
    Claim(
        "Masking documents out of the loss helps",
        "In the paper, Llama-3.2-3B reaches 36.07 with the mask and 34.53 without it (Table 7).",
        (REFERENCE, "unmasked"),
    ),
    Claim(
        "RL beats supervised learning on the same model's successes",
        "This comparison is not in the paper.",
        (REFERENCE, "imitation"),
    ),
    Claim(
        "More turns are needed for more hops",
        "The paper has a figure of the turns over the steps, and no score.",
        (REFERENCE, "three_turns", "two_turns"),
    ),
]


# ---- Running -------------------------------------------------------------------------------------


def train(arm: str, seed: int, folder: Path, flags: list[str]) -> None:
    """One run of an arm, from its beginning. A run that is complete is left as it is."""
    if (folder / "policy" / "prompt.txt").is_file():
        return
    config = CONFIGS / f"{REFERENCE if arm in SCRIPTS else arm}.yaml"
    settings = flags_of(config=config, seed=seed, threads=1, output=folder)
    settings += flags_of(eval_every=0, save_every=0)
    if folder.exists():
        settings.append("--overwrite")
    algorithms.script(SCRIPTS.get(arm, "train_policy.py"), *settings, *flags)


def make_hasty_simulator() -> None:
    """The simulator of an arm that has its own: a tenth of the usual training."""
    folder = Path("runs/simulator_40")
    if not folder.exists():
        algorithms.script("train_sim.py", *flags_of(steps=40, output=folder))


# ---- Results -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What was measured for a claim."""

    claim: Claim
    scores: dict[tuple[str, str, str], Estimate]  # by arm, test and group of questions
    differences: dict[tuple[str, str], Estimate]  # the first arm minus another, by arm and test

    def seeds(self, arm: str) -> int:
        """0 for an arm that was not run."""
        score = self.scores.get((arm, "greedy", "overall"))
        return score.seeds if score else 0


def read_result(claim: Claim, roots: list[Path]) -> Result:
    """The result of a claim, from the files below the first root that holds an arm."""
    scores, differences = {}, {}
    first = claim.arms[0]
    for arm in claim.arms:
        root = next((root for root in roots if any(root.glob(f"{arm}-[0-9]*/greedy.json"))), None)
        if root is None:
            continue
        for test in TESTS:
            for group in GROUPS:
                score = over_seeds(read_scores(root, arm, test, group).values())
                if score:
                    scores[arm, test, group] = score
            difference = paired_difference(root, first, arm, test)
            if arm != first and difference:
                differences[arm, test] = difference
    return Result(claim, scores, differences)


# ---- The page ------------------------------------------------------------------------------------


def page(results: list[Result]) -> str:
    """Markdown: the introduction and a section for each claim of which something was run."""
    sections = [INTRODUCTION]
    for result in results:
        if result.scores:
            sections.append("\n".join(section(result)) + "\n")
    return "\n".join(sections)


def section(result: Result) -> Iterator[str]:
    claim = result.claim
    name = "arms" if claim.arms[0] in algorithms.ARMS else "claims"
    arms = [arm for arm in claim.arms if result.seeds(arm)]
    yield f"## {claim.title}"
    yield ""
    yield claim.paper
    yield ""
    yield "```bash"
    yield f"python benchmarks/{name}.py --arms {' '.join(claim.arms)} --seeds 5"
    yield "```"
    yield ""
    yield markdown_row(["arm", *COLUMNS.values(), "seeds"])
    yield "|---" * (len(COLUMNS) + 2) + "|"
    for arm in arms:
        cells = [result.scores.get((arm, test, "overall"), "") for test in TESTS]
        yield markdown_row([f"`{arm}`", *cells, result.seeds(arm)])
    yield ""
    for arm in claim.arms[1:]:
        if sentence := comparison(result, arm):
            yield f"- {sentence}"
    yield ""
    yield from details(result, arms)


def comparison(result: Result, arm: str) -> str:
    """How far the first arm is ahead of another one, in a sentence; "" if nothing is known."""
    parts = []
    for test in TESTS:
        difference = result.differences.get((arm, test))
        if difference:
            parts.append(f"{gap(difference)} {CONDITIONS[test]}")
    if not parts:
        return ""
    seeds = min(d.seeds for (name, _), d in result.differences.items() if name == arm)
    first = result.claim.arms[0]
    listed = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    counted = "1 seed" if seeds == 1 else f"{seeds} seeds"
    return f"Compared with `{arm}`, `{first}` is {listed} ({counted})."


def gap(difference: Estimate) -> str:
    """ "14.9 ± 6.1 points ahead", in bold where it is more than two standard errors."""
    mean = round(100 * difference.mean, 1)
    error = round(100 * difference.error, 1)
    figure = f"{abs(mean):.1f} ± {error:.1f} points"
    if abs(mean) > 2 * error:
        figure = f"**{figure}**"
    return f"{figure} {'behind' if mean < 0 else 'ahead'}"


def details(result: Result, arms: list[str]) -> Iterator[str]:
    """One-hop and two-hop questions apart, folded."""
    columns = [(test, group) for test in TESTS for group in GROUPS if group != "overall"]
    names = [f"{COLUMNS[test]}, {GROUPS[group]}" for test, group in columns]
    yield "<details><summary>Questions of one and of two hops</summary>"
    yield ""
    yield markdown_row(["arm", *names])
    yield "|---" * (len(columns) + 1) + "|"
    for arm in arms:
        cells = [result.scores.get((arm, *column), "") for column in columns]
        yield markdown_row([f"`{arm}`", *cells])
    yield ""
    yield "</details>"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="*", default=ARMS, choices=ARMS)
    parser.add_argument("--seeds", type=int, default=3, help="how many runs each arm has")
    parser.add_argument("--questions", type=int, default=600, help="questions of each test")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time, a thread each")
    parser.add_argument("--root", default=ROOT, help="the folder of all runs")
    parser.add_argument("--output", help="where the page goes, by default CLAIMS.md in the root")
    parser.add_argument("--table", action="store_true", help="only write the page")
    settings, flags = parser.parse_known_args(argv)
    root = own_root(settings, flags, ROOT)

    def job(arm: str, seed: int) -> None:
        folder = root / f"{arm}-{seed}"
        train(arm, seed, folder, flags)
        evaluate_policy(
            str(folder / "policy"),
            folder,
            TESTS,
            questions=settings.questions,
            seed=seed,
            threads=1,
            max_turns=TURNS.get(arm, OTHER_TURNS),
        )

    if not settings.table:
        if "hasty_simulator" in settings.arms:
            make_hasty_simulator()
        run_all(job, settings.arms, settings.seeds, settings.parallel)
    roots = [root, Path(algorithms.ROOT)]
    output = Path(settings.output or root / "CLAIMS.md")
    output.write_text(page([read_result(claim, roots) for claim in CLAIMS]), encoding="utf-8")
    print(f"The page is in {output}")


if __name__ == "__main__":
    main()
