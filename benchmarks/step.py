"""One whole GRPO step (rollout, scores, update): minizs beside TRL's `GRPOTrainer`.

    pip install -r requirements-bench.txt
    python benchmarks/step.py [--tasks single multi] [--policy runs/policy-1/policy] [--calls 3]

Same model, questions, group size, lengths, loss (token average, clip 0.2 and 0.28, KL k3 at 0.02 to
a frozen reference) and AdamW, with a learning rate so small that the policy stays what it is.

- `single`: one turn without an engine; the reward is the F1 of the answer in it.
- `multi`: up to 6 turns with BM25 over the tiny world. TRL has it as an environment with a tool
  `search`, in its own loop, which calls the tool row by row (`--engine simulator` so runs the
  simulator on one query at a time); our tags are rendered by a chat template and parsed by our
  parser. A turn without a tag ends a trajectory in TRL, and is answered and continued in minizs.

TRL runs as it is meant to without a server: `model.generate` with the tags as end-of-sequence
tokens, no gradient checkpointing, its own fused AdamW, `--rows` trajectories in a micro-batch
(minizs: `--micro_tokens` positions).
Every call makes a learner or trainer and does a step to warm up and `--steps` that count. Phases:
`rollout` is generation and search, `scores` the reference's log-probabilities and rewards, `update`
the rest. Peak memory is above what imports and the loaded model take, the reference's copy in it.
"""

import argparse
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from statistics import mean, median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train_policy
from benchmarks import measure
from minizs import protocol, require, simulator
from minizs.engines.bm25 import BM25
from minizs.engines.ranking import NoDocuments
from minizs.learner import build_learner
from minizs.models import loading
from minizs.reward import f1_score
from minizs.rollout import Policy, rollout
from minizs.runs import build, data, run_folder
from minizs.runs.flags import run_script
from minizs.trajectory import Example, SearchRequest
from minizs.world.facts import embedded

CHAT = r"""{% for message in messages %}{% if message.role == 'tool' -%}
{{ '\n\n<information>\n' + message.content + '\n</information>\n\n' }}
{%- else -%}
{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function.name }}
{{- call.function.arguments | tojson }}{% endfor %}{% endif %}{% endfor %}"""


@dataclass(frozen=True)
class Task:
    """What a step consists of; `turns` of 1 is the single-turn task."""

    policy: str
    engine: str  # "none", "bm25" or a simulator's folder
    questions: int
    group: int
    turns: int
    turn_tokens: int
    rows: int  # in TRL's micro-batches
    micro_tokens: int  # in ours
    context: int = 448
    lr: float = 1e-6


def load_engine(name: str):
    if name == "none":
        return NoDocuments()
    if name == "bm25":
        world = embedded("train")
        return BM25(world.documents, 3, world.judge)
    template = simulator.load_template(loading.resolve(name))
    return simulator.SimulatedSearch(
        *loading.load_model(name, loading.device()), template, 3, 0, 0.8, 80
    )


def examples_of(task: Task, step: int) -> list[Example]:
    """The questions of a step, counted from 0."""
    examples = data.load_examples("world", "train")
    return [examples[(step * task.questions + i) % len(examples)] for i in range(task.questions)]


class Clock:
    """Seconds of each phase of the steps so far, the first of which warms up."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def begin(self) -> None:
        self.steps.append({"rollout": 0.0, "scores": 0.0})
        self.started = time.perf_counter()

    def end(self, **figures: float) -> None:
        measure.synchronize()
        step = self.steps[-1]
        step["step"] = time.perf_counter() - self.started
        step["update"] = step["step"] - step["rollout"] - step["scores"]
        step.update(figures)

    @contextmanager
    def phase(self, name: str):
        started = time.perf_counter()
        yield
        measure.synchronize()
        self.steps[-1][name] += time.perf_counter() - started


def minizs(task: Task) -> Callable[[int, int], list[dict[str, float]]]:
    """A function that makes a learner and does some steps: their figures."""
    config = train_policy.PolicyConfig(
        policy=task.policy,
        lr=task.lr,
        group_size=task.group,
        max_turns=task.turns,
        max_turn_tokens=task.turn_tokens,
        max_context=task.context,
        micro_tokens=task.micro_tokens,
    )
    model, tokenizer = loading.load_model(task.policy, loading.device())
    template = loading.load_prompt(task.policy)
    engine = load_engine(task.engine)

    def work(steps: int, seed: int) -> list[dict[str, float]]:
        clock = Clock()
        learner = build_learner(
            build.make_accelerator(config), config, model, protocol.vocabulary_size(tokenizer)
        )
        score = learner._score

        def timed(*arguments) -> None:
            with clock.phase("scores"):
                score(*arguments)

        learner._score = timed
        for step in range(1 + steps):
            clock.begin()
            with clock.phase("rollout"):
                policy = Policy(model, tokenizer, template, build.limits(config), seed=seed)
                rows = rollout(policy, examples_of(task, step), engine, group_size=task.group)
            for row in rows:
                row.reward = f1_score(row.answer, row.example.answers)
            learner.update(rows)
            clock.end(
                tokens=mean(len(row.ids) for row in rows), reward=mean(row.reward for row in rows)
            )
        return clock.steps[1:]

    return work


class Searching:
    """A trajectory's environment for TRL: its methods but `reset` are the tools."""

    engine = None  # set before the trainer makes the first of these
    keys = count()  # one for each search, for the engine's random numbers

    def reset(self, question: str, answers: list[str], **_) -> None:
        self._question = question
        self._answers = tuple(answers)

    def search(self, query: str) -> str:
        """Search for documents.

        Args:
            query: What to look for.

        Returns:
            The documents that were found.
        """
        request = SearchRequest(query, self._question, self._answers, key=(next(self.keys),))
        return protocol.number_documents(self.engine.search([request])[0])


def answer_in(text: str) -> str | None:
    action = protocol.parse_action(text)
    return action.content if action.kind == "answer" else None


def speaking(tokenizer):
    """The tokenizer with a chat template and a parser for our tags, as TRL's tools need them."""

    def parse_response(ids: list[int], **_) -> dict:
        text = tokenizer.decode(ids)
        action = protocol.parse_action(text)
        message = {"role": "assistant", "content": text}
        if action.kind == "search":
            call = {"name": "search", "arguments": {"query": action.content}}
            message["tool_calls"] = [{"type": "function", "function": call}]
        return message

    tokenizer.chat_template = CHAT
    tokenizer.response_template = {}
    tokenizer.parse_response = parse_response
    return tokenizer


def trl_options(task: Task, longest_prompt: int) -> dict:
    """The settings of TRL with which it does what minizs does."""
    multi = task.turns > 1
    return {
        "num_generations": task.group,
        "per_device_train_batch_size": task.rows,
        "shuffle_dataset": False,
        "gradient_accumulation_steps": task.questions * task.group // task.rows,
        "max_completion_length": task.context - longest_prompt if multi else task.turn_tokens,
        "generation_kwargs": {"max_new_tokens": task.turn_tokens},
        "max_tool_calling_iterations": task.turns - 1 if multi else None,
        "learning_rate": task.lr,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "beta": 0.02,
        "epsilon": 0.2,
        "epsilon_high": 0.28,
        "loss_type": "dapo",
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "gradient_checkpointing": False,
        "bf16": loading.device().type == "cuda",
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def trl(task: Task) -> Callable[[int, int], list[dict[str, float]]]:
    """The same with TRL."""
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from transformers.utils import logging
    from trl import GRPOConfig, GRPOTrainer

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")  # of what TRL and `transformers` call experimental or old
    model, tokenizer = loading.load_model(task.policy, loading.device())
    multi = task.turns > 1
    template = loading.load_prompt(task.policy)
    Searching.engine = load_engine(task.engine)
    stops = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(protocol.STOP)]
    model.generation_config.eos_token_id = stops
    if multi:
        tokenizer = speaking(tokenizer)

    def as_row(example: Example) -> dict:
        text = protocol.build_prompt(example.question, template)
        return {
            "prompt": [{"role": "user", "content": text}] if multi else text,
            "question": example.question,
            "answers": list(example.answers),
        }

    def reward(completions: list, completion_ids: list[list[int]], answers: list, **_):
        """F1 of each trajectory's last message, or of its only turn."""
        texts = (
            [c[-1]["content"] for c in completions]
            if multi
            else tokenizer.batch_decode(completion_ids)
        )
        pairs = zip(texts, answers, strict=True)
        return [f1_score(answer_in(text), golds) for text, golds in pairs]

    class Timed(GRPOTrainer):
        """Phases and lengths of each step."""

        def _generate(self, *arguments, **options):
            with clock.phase("rollout"):
                out = super()._generate(*arguments, **options)
            self.tokens = mean(map(len, out[0])) + mean(map(len, out[1]))
            return out

        def _generate_and_score_completions(self, *arguments, **options):
            before = clock.steps[-1]["rollout"]
            with clock.phase("scores"):
                out = super()._generate_and_score_completions(*arguments, **options)
            clock.steps[-1]["scores"] -= clock.steps[-1]["rollout"] - before
            return out

    class Steps(TrainerCallback):
        def on_step_begin(self, *_, **__):
            clock.begin()

        def on_step_end(self, *_, **__):
            clock.end(tokens=trainer.tokens, reward=trainer._metrics["train"]["reward"][-1])

    def work(steps: int, seed: int) -> list[dict[str, float]]:
        nonlocal clock, trainer
        rows = [as_row(example) for step in range(1 + steps) for example in examples_of(task, step)]
        prompts = [protocol.build_prompt(row["question"], template) for row in rows]
        longest = max(map(len, tokenizer(prompts)["input_ids"]))
        with tempfile.TemporaryDirectory() as folder:
            options = trl_options(task, longest)
            config = GRPOConfig(folder, seed=seed, max_steps=1 + steps, **options)
            clock = Clock()
            trainer = Timed(
                model,
                reward,
                config,
                Dataset.from_list(rows),
                processing_class=tokenizer,
                callbacks=[Steps()],
                environment_factory=Searching if multi else None,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        trainer = None
        return clock.steps[1:]

    clock = trainer = None
    return work


SIDES = {"minizs": minizs, "trl": trl}


def main(argv: list[str] | None = None) -> None:
    args = read_arguments(argv)
    require(
        "trl" not in args.sides or find_spec("trl") is not None,
        "TRL is not installed; run "
        "pip install -r requirements-bench.txt, or leave it out with --sides minizs.",
    )
    total = args.questions * args.group
    rows = args.rows or max(1, total // 4)
    require(total % rows == 0, f"--rows {rows} does not divide the {total} trajectories of a step.")
    engine = str(build.make_default_simulator()) if args.engine == "simulator" else args.engine
    print(measure.machine(args.threads))
    print(
        f"{args.policy}; {args.questions} questions x {args.group}; turns of {args.turn_tokens} "
        f"tokens; micro-batches of {rows} rows (TRL)\n"
    )
    print("| task | side | seconds a step | rollout | scores | update | peak MB | tokens | F1 |")
    print("|---|---|---|---|---|---|---|---|---|")
    ratios = []
    for name in args.tasks:
        is_multi = name == "multi"
        task = Task(
            args.policy,
            engine if is_multi else "none",
            args.questions,
            args.group,
            6 if is_multi else 1,
            args.turn_tokens,
            rows,
            args.micro_tokens,
        )
        runs = run_sides(task, args)
        for side, calls in runs.items():
            print(table_row(name, side, calls), flush=True)
        if len(runs) == 2:
            ratios.append(f"{name}: {comparison(runs)}")
    print("\n" + "\n".join(ratios))


def read_arguments(argv: list[str] | None) -> argparse.Namespace:
    trained = run_folder.newest_run()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--policy",
        default=str(trained / "policy") if trained else "tiny",
        help="default: the newest run's, else 'tiny'",
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=("single", "multi"), default=["single", "multi"]
    )
    parser.add_argument("--engine", default="bm25", help="of 'multi': bm25, simulator, a folder")
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--questions", type=int, default=16, help="a step")
    parser.add_argument("--group", type=int, default=8, help="trajectories a question")
    parser.add_argument("--turn_tokens", type=int, default=40)
    parser.add_argument("--rows", type=int, default=0, help="of TRL's micro-batches; 0: a quarter")
    parser.add_argument("--micro_tokens", type=int, default=2048, help="positions in minizs' own")
    parser.add_argument("--steps", type=int, default=2, help="that count, in each call")
    parser.add_argument("--calls", type=int, default=3, help="of each side, by turns")
    parser.add_argument("--threads", type=int, default=measure.cores(), help="CPU threads a side")
    return parser.parse_args(argv)


def run_sides(task: Task, args: argparse.Namespace) -> dict[str, list]:
    """The results of all calls, by side. The sides take turns, each in its own process."""
    sides = {side: measure.Side(SIDES[side], task, threads=args.threads) for side in args.sides}
    calls: dict[str, list] = {side: [] for side in sides}
    with measure.together(sides):
        # Each call warms up by itself, so the first ones count, too.
        for call in range(args.calls):
            for side, run in sides.items():
                calls[side].append(run(args.steps, call))
    return calls


def middle(calls: list) -> dict[str, float]:
    """The median of each figure over all steps of all calls."""
    steps = [step for call in calls for step in call.value]
    return {key: median(step[key] for step in steps) for key in steps[0]}


def table_row(name: str, side: str, calls: list) -> str:
    figures = middle(calls)
    return (
        f"| {name} | {side} | {figures['step']:.2f} | {figures['rollout']:.2f} | "
        f"{figures['scores']:.2f} | {figures['update']:.2f} | {measure.peak(calls):.0f} | "
        f"{figures['tokens']:.1f} | {figures['reward']:.3f} |"
    )


def comparison(runs: dict[str, list]) -> str:
    ours = runs["minizs"]
    theirs = runs["trl"]
    ratio = middle(theirs)["step"] / middle(ours)["step"]
    share = measure.peak(ours) / measure.peak(theirs)
    return f"{ratio:.2f} times as fast, {share:.2f} of the memory."


if __name__ == "__main__":
    run_script(main)
