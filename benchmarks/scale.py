"""How the time and memory of a step grow: batch, response length, turns, model size, processes.

    python benchmarks/scale.py [--only batch response turns model processes] [--repeats 2]

`batch`, `response`, `turns` and `model` change one thing of a base point: 64 rows in groups of 8,
prompts of 64 tokens, 2 turns of 32 tokens, a random Qwen3 of 3 layers of width 128. In each turn
every row writes exactly so many tokens with `Decoder`, and 64 tokens of documents follow each turn
but the last. These trajectories make one GRPO update with a reference.

`processes` is the rollout phase of training, with policy and simulator, one thread for each
process. One process and two play the same questions, which two share as those of `train_policy.py`
do; then four times as many questions.
"""

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_policy
from benchmarks import measure
from benchmarks.rollout import minizs_side, simulator_folder
from minizs.curriculum import draw_questions
from minizs.generate import Decoder
from minizs.learner import build_learner
from minizs.models import loading
from minizs.runs import build, data
from minizs.trajectory import Example, Trajectory

GROUP = 8  # rows that share a prompt
PROMPT = 64  # tokens
DOCUMENTS = 64  # tokens between two turns
VOCAB = 610
LAYERS = 3
HEADINGS = (
    "what grows",
    "rows",
    "response",
    "turns",
    "width",
    "tokens",
    "rollout s",
    "update s",
    "µs a token",
    "peak MB",
)


@dataclass(frozen=True)
class Point:
    """What a step consists of."""

    rows: int = 64
    response: int = 32  # tokens a turn
    turns: int = 2
    width: int = 128


GROWS = {"batch": "rows", "response": "response", "turns": "turns", "model": "width"}


def variants(base: Point, name: str, factors: list[int]) -> list[Point]:
    """The base with one thing multiplied by each of the factors."""
    field = GROWS[name]
    return [replace(base, **{field: getattr(base, field) * factor}) for factor in factors]


def make_step(width: int) -> Callable[[Point, int], dict[str, float]]:
    """A function that does one step at a point, with a model of this width. It returns the seconds
    of the two phases, and the tokens of the trajectories."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        head_dim=32,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).to(loading.device()).eval()
    settings = train_policy.PolicyConfig(lr=1e-6, group_size=GROUP)

    def work(point: Point, seed: int) -> dict[str, float]:
        learner = build_learner(build.make_accelerator(settings), settings, model, VOCAB)
        start = time.perf_counter()
        trajectories = write(model, point, seed)
        measure.synchronize()
        written = time.perf_counter()
        learner.update(trajectories)
        measure.synchronize()
        return {
            "rollout": written - start,
            "update": time.perf_counter() - written,
            "tokens": sum(len(row.ids) for row in trajectories),
        }

    return work


def write(model, point: Point, seed: int) -> list[Trajectory]:
    """Rollouts of just these lengths, with rewards by chance."""
    rng = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [rng.randrange(VOCAB) for _ in range(length)]

    rows = [Trajectory(Example("", ("",))) for _ in range(point.rows)]
    prompts = [ids(PROMPT) for _ in range(0, point.rows, GROUP)]
    for i, row in enumerate(rows):
        row.append(prompts[i // GROUP])
        row.reward = rng.random()
    decoder = Decoder(model, [row.ids for row in rows], seed=seed, eos_id=())
    everyone = range(point.rows)
    for turn in range(point.turns):
        written = decoder.turn(everyone, point.response, [(i, turn) for i in everyone])
        for row, out in zip(rows, written, strict=True):
            row.append(out.ids, out.logprobs)
        if turn < point.turns - 1:
            documents = [ids(DOCUMENTS) for _ in rows]
            decoder.append(everyone, documents)
            for row, chunk in zip(rows, documents, strict=True):
                row.append(chunk)
    return rows


def growth(name: str, points: list[Point], sides: dict[int, measure.Side], repeats: int) -> None:
    """Measure these points by turns and print a line for each. `sides` has one for each width."""
    calls = {point: [] for point in points}
    for repeat in range(repeats + 1):
        for point, runs in calls.items():
            runs.append(sides[point.width](point, repeat))
    for point, all_runs in calls.items():
        runs = all_runs[1:]  # the first has warmed up
        rollout = median(run.value["rollout"] for run in runs)
        update = median(run.value["update"] for run in runs)
        values = " | ".join(map(str, astuple(point)))
        tokens = runs[0].value["tokens"]
        print(
            f"| {name} | {values} | {tokens} | {rollout:.2f} | {update:.2f} | "
            f"{1e6 * (rollout + update) / tokens:.0f} | {measure.peak(runs):.0f} |",
            flush=True,
        )


def together(sides: list[measure.Side], examples: list[Example], group: int, seed: int) -> float:
    """Trajectories a second of these processes, which share the questions."""
    start = time.perf_counter()
    shares = [examples[rank :: len(sides)] for rank in range(len(sides))]
    running = [side.start(share, group, seed) for side, share in zip(sides, shares, strict=True)]
    for future in running:
        future.result()
    return len(examples) * group / (time.perf_counter() - start)


def processes(policy: str, simulated: str, questions: int, group: int, repeats: int) -> None:
    """Measure the rollouts of one process and of two, and print a table."""
    examples = data.load_examples("world", "train")
    # In training's order: in the file's one process would get all questions of two hops.
    examples = [examples[i] for i in draw_questions(1, len(examples), 4 * questions, seed=0)]
    sides = [measure.Side(minizs_side, policy, simulated, threads=1) for _ in range(2)]
    points = [(number, n) for n in (questions, 4 * questions) for number in (1, 2)]
    rates: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    with measure.together(dict(enumerate(sides))):
        for repeat in range(repeats + 1):
            for number, n in points:
                rate = together(sides[:number], examples[:n], group, repeat)
                rates[number, n].append(rate)
    print(f"\nRollouts of {policy}, groups of {group}, one thread a process\n")
    print("| questions | processes | trajectories/s | ratio |\n|---|---|---|---|")
    middle = {point: median(measured[1:]) for point, measured in rates.items()}
    for number, n in points:
        print(
            f"| {n} | {number} | {middle[number, n]:.1f} | {middle[number, n] / middle[1, n]:.2f} |"
        )


def grow(args: argparse.Namespace, names: list[str]) -> None:
    """Measure what grows, one thing after the other, and print a table."""
    print(f"\n| {' | '.join(HEADINGS)} |\n{'|---' * len(HEADINGS)}|")
    base = Point(args.rows, args.response)
    points = {name: variants(base, name, args.factors) for name in names}
    widths = {point.width for group in points.values() for point in group}
    sides = {width: measure.Side(make_step, width, threads=args.threads) for width in widths}
    with measure.together(sides):
        for name in names:
            growth(name, points[name], sides, args.repeats)


def main(argv: list[str] | None = None) -> None:
    names = [*GROWS, "processes"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, help="what is measured, by default all"
    )
    parser.add_argument("--rows", type=int, default=64, help="rows of the base, in groups of 8")
    parser.add_argument("--response", type=int, default=32, help="tokens of a turn of the base")
    parser.add_argument(
        "--factors", type=int, nargs="+", default=[1, 2, 4], help="multiples of the base"
    )
    parser.add_argument("--policy", default="tiny", help="the policy of 'processes'")
    parser.add_argument(
        "--simulator",
        default="",
        help="the simulator of 'processes', by default runs/simulator, made if it is missing",
    )
    parser.add_argument("--questions", type=int, default=16, help="the questions of 'processes'")
    parser.add_argument("--group", type=int, default=8, help="trajectories for each question")
    parser.add_argument("--threads", type=int, default=measure.cores(), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=2, help="measurements of each point")
    args = parser.parse_args(argv)
    print(measure.machine(args.threads))
    growing = [name for name in args.only if name in GROWS]
    if growing:
        grow(args, growing)
    if "processes" in args.only:
        simulated = simulator_folder(args.simulator)
        processes(args.policy, simulated, args.questions, args.group, args.repeats)


if __name__ == "__main__":
    main()
