"""The paper's claims in miniature: arms of training, each with several seeds, and their table.

    python benchmarks/claims.py                     # all arms, three seeds; it resumes
    python benchmarks/claims.py --arms reference no_noise --seeds 5
    python benchmarks/claims.py --table --output benchmarks/CLAIMS.md  # only the table

An arm is a file in configs/claims (`accelerate launch train_policy.py --config FILE` is one run of
it), or one of two scripts here. The arm "reference" is 40 steps of GRPO with the default simulator
and noise (0 to 0.25); another arm of 40 steps differs from it in what its name says. (The reference
of the KL is something else: the model that a run starts from.) Arms lie in runs/claims/NAME-SEED;
what is complete is not run again. Each policy answers the same 600 questions with BM25 on an unseen
world: greedy, sampled at temperature 1, and greedy with half of the replies noisy. The arms of
arms.py (100 steps, tested on 1,000 questions), if they were run, are in the table, too. It is
written to runs/claims/CLAIMS.md. Flags that are not of this script go to train_policy.py, and want
a --root of their own.
"""

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(HERE))

from benchmarks import arms as of_100_steps  # noqa: E402
from benchmarks.arms import difference, mean, own_root  # noqa: E402

TESTS = {"greedy": [], "sampled": ["--temperature", "1"], "noisy": ["--engine_noise", "0.5"]}
SCRIPTS = {"unmasked": "benchmarks/unmasked.py", "imitation": "benchmarks/imitation.py"}
CONFIGS = HERE / "configs" / "claims"
ROOT = "runs/claims"
ARMS = [*sorted(path.stem for path in CONFIGS.glob("*.yaml")), *SCRIPTS]
CLAIMS = [  # what the paper says, its figures (average EM of its seven sets), and our arms
    (
        "Training with a simulator is as good as with a real engine",
        "Qwen2.5-3B: ZeroSearch 34.47, Search-R1 32.81 (Table 3)",
        ["grpo", "grpo_real_search"],
    ),
    (
        "REINFORCE, GRPO and PPO all work, REINFORCE best",
        "34.47, 33.17, 32.67 (Table 5)",
        ["reinforce", "grpo", "ppo"],
    ),
    (
        "A curriculum of noise beats random noise",
        "34.47 against 32.59 with p = 0.5 (Table 6); none and reversed are not in it",
        ["reference", "no_noise", "random_noise", "reversed_noise"],
    ),
    (
        "A fine-tuned simulator beats a prompted one",
        "fine-tuned 30.47 to 34.47, prompted 29.44 to 31.50 (Table 4)",
        ["reference", "hasty_simulator", "untrained_simulator"],
    ),
    (
        "Masking documents out of the loss helps",
        "Llama-3.2-3B: 36.07 with, 34.53 without (Table 7)",
        ["reference", "unmasked"],
    ),
    (
        "RL beats supervised learning on the same model's successes",
        "not in it",
        ["reference", "imitation"],
    ),
    (
        "More turns are needed for more hops",
        "a figure of turns over steps, no score",
        ["reference", "three_turns", "two_turns"],
    ),
]


def script(name: str, *arguments: str) -> None:
    """Run one of the scripts; its output goes to the terminal. Raises if it fails."""
    subprocess.run([sys.executable, str(HERE / name), *arguments], check=True)


def train_and_test(arm: str, seed: int, root: Path, questions: int, flags: list[str]) -> None:
    folder = root / f"{arm}-{seed}"
    config = CONFIGS / f"{'reference' if arm in SCRIPTS else arm}.yaml"
    if not (folder / "policy" / "prompt.txt").is_file():
        script(
            SCRIPTS.get(arm, "train_policy.py"),
            "--config",
            str(config),
            "--seed",
            str(seed),
            "--threads",
            "1",
            "--output",
            str(folder),
            "--eval_every",
            "0",
            "--save_every",
            "0",
            *(["--overwrite"] if folder.exists() else []),
            *flags,
        )
    turns = {"two_turns": "2", "three_turns": "3"}.get(arm, "6")
    for name, settings in TESTS.items():
        path = folder / f"{name}.json"
        if not path.exists():
            script(
                "evaluate.py",
                "--policy",
                str(folder / "policy"),
                "--before",
                "none",
                "--questions",
                str(questions),
                "--output",
                str(path),
                "--seed",
                str(seed),
                "--threads",
                "1",
                "--max_turns",
                turns,
                *settings,
            )


def cells(arm: str, roots: list[Path]) -> list[str]:
    """An arm's F1 in each test, one-hop, two-hop and all; its seeds. Empty if it was not run."""
    root = next((root for root in roots if any(root.glob(f"{arm}-[0-9]*/greedy.json"))), None)
    if root is None:
        return []
    out = []
    for test in TESTS:
        files = sorted(root.glob(f"{arm}-[0-9]*/{test}.json"))
        found = [json.loads(path.read_text(encoding="utf-8")) for path in files]
        for group in ("one_hop", "two_hop", "overall"):
            rows = [table[group] for table in found]
            out.append(mean([(row["f1"], row["f1_stderr"]) for row in rows]) if rows else "")
    seeds = len(list(root.glob(f"{arm}-[0-9]*/greedy.json")))
    return [*out, str(seeds)]


def table(roots: list[Path]) -> str:
    """Markdown: a claim, the paper's figures, a row for each arm, and differences to the first."""
    lines = [
        "# The paper's claims in miniature",
        "",
        __doc__.split("\n\n")[2].replace("\n", " "),
        "",
        "F1 in per cent, mean and standard error over seeds (with one seed, over "
        "questions, which says nothing about other seeds). The paper's figures are EM, the "
        "average of its seven data sets, of other models: compare which side is ahead, not by "
        "how much. Arms of configs/claims and the two scripts have the steps that their files "
        "say (40), those of arms.py 100. A difference is paired by seed, over the seeds that "
        "both arms have, so it may not be that of two means. Written by "
        "`python benchmarks/claims.py --table`.",
    ]
    names = [f"{test}, {group}" for test in TESTS for group in ("one-hop", "two-hop", "all")]
    for claim, paper, arms in CLAIMS:
        there = {arm: row for arm in arms if (row := cells(arm, roots))}
        if not there:
            continue
        name = "arms" if arms[0] in of_100_steps.ARMS else "claims"
        command = f"python benchmarks/{name}.py --arms {' '.join(arms)} --seeds 5"
        lines += [
            "",
            f"## {claim}",
            f"The paper: {paper}. `{command}`",
            "",
            f"| arm | {' | '.join(names)} | seeds |",
            "|---" * (len(names) + 2) + "|",
        ]
        lines += [f"| {arm} | {' | '.join(row)} |" for arm, row in there.items()]
        gaps = [
            difference(root, arms[0], arm, test)
            for arm in arms[1:]
            for test in TESTS
            for root in roots
        ]
        lines += ["", *[f"- {gap.replace('(1 seeds)', '(1 seed)')}" for gap in gaps if gap]]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="*", default=ARMS, choices=ARMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=600)
    parser.add_argument("--parallel", type=int, default=1, help="arms at a time")
    parser.add_argument("--root", default=ROOT)
    parser.add_argument("--output", help="where the table goes, by default CLAIMS.md in the root")
    parser.add_argument("--table", action="store_true", help="only write the table")
    settings, flags = parser.parse_known_args(argv)
    root = own_root(settings, flags, ROOT)
    if not settings.table:
        if "hasty_simulator" in settings.arms and not Path("runs/simulator_40").exists():
            script("train_sim.py", "--steps", "40", "--output", "runs/simulator_40")
        jobs = [(arm, seed) for seed in range(settings.seeds) for arm in settings.arms]
        with ThreadPoolExecutor(settings.parallel) as pool:
            several = pool.map if settings.parallel > 1 else map
            list(several(lambda job: train_and_test(*job, root, settings.questions, flags), jobs))
    output = Path(settings.output or root / "CLAIMS.md")
    output.write_text(table([root, Path(of_100_steps.ROOT)]), encoding="utf-8")
    print(f"The table is in {output}")


if __name__ == "__main__":
    main()
