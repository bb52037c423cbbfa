"""Whole multi-turn rollouts, policy and simulator: minizs beside the plain way.

    python benchmarks/rollout.py [--policy tiny] [--questions 16] [--repeats 5]

- `minizs`: `rollout` with `SimulatedSearch`, as in training.
- `plain`: at each turn `model.generate` anew on the whole text so far, padded on the left, of every
  row, until the last trajectory has ended. The simulator is called the same way, once a turn for
  all queries. Tags are single tokens and end a row as the end-of-sequence token does.
- `active`: the same without the trajectories that have ended, as in ZeroSearch's own loop; within
  a turn rows still wait for the longest.

All sample, with random numbers of their own: what they write differs a little from run to run, so
tokens and searches a trajectory are shown, and the ratio is also given for a trajectory's token.

Work: positions that went through the policy over the tokens in the trajectories, where a group's
prompt counts once. Padding, which is computed too, is shown beside it as a share of these tokens.
(minizs: `Decoder.positions`; the last token of a trajectory never goes through, while the last
token of a prompt does so once a row.)
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import minizs.rollout
from benchmarks import measure
from minizs import protocol, simulator
from minizs.models import loading
from minizs.reward import f1_score
from minizs.rollout import Limits, Policy, rollout
from minizs.runs import build, data, run_folder
from minizs.trajectory import Example, SearchRequest, Trajectory, Turn

LIMITS = Limits(6, 40, 80, 448)  # the scripts' defaults
SIMULATOR_TEMPERATURE = 0.8


class Positions:
    """Counts what goes through a model's decoder: positions, padding among them."""

    def __init__(self, model) -> None:
        self.count = 0
        model.get_decoder().register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _module, arguments: tuple, keywords: dict) -> None:
        self.count += (arguments[0] if arguments else keywords["input_ids"]).numel()


class Counted(minizs.rollout.Decoder):
    """The policy's decoder; the newest one can be asked afterwards."""

    def __init__(self, *arguments, **options) -> None:
        Counted.newest = self
        super().__init__(*arguments, **options)


def tokens(rows: list[Trajectory], group: int) -> int:
    """In the trajectories, a group's prompt once."""
    prompts = [row.loss_mask.index(1) for row in rows]
    return sum(len(row.ids) for row in rows) - sum(prompts) + sum(prompts[::group])


def report(rows: list[Trajectory], group: int, fed: int, computed: int) -> dict[str, float]:
    """`fed`: real tokens that went through the policy; `computed`: with padding."""
    once = tokens(rows, group)
    return {
        "length": sum(len(row.ids) for row in rows) / len(rows),
        "searches": sum(row.searches for row in rows) / len(rows),
        "f1": sum(f1_score(row.answer, row.example.answers) for row in rows) / len(rows),
        "fed": fed / once,
        "padding": (computed - fed) / once,
    }


def minizs_side(policy: str, simulated: str) -> Callable:
    model, tokenizer = loading.load_model(policy, loading.device())
    engine = loading.load_model(simulated, loading.device())
    wording = loading.resolve(simulated)
    engine = simulator.SimulatedSearch(
        *engine,
        simulator.load_template(wording),
        temperature=SIMULATOR_TEMPERATURE,
        max_new_tokens=LIMITS.document_tokens,
    )
    template = loading.load_prompt(policy)
    positions = Positions(model)
    minizs.rollout.Decoder = Counted

    def work(examples: list[Example], group: int, seed: int) -> dict[str, float]:
        before = positions.count
        writer = Policy(model, tokenizer, template, LIMITS, seed=seed)
        rows = rollout(writer, examples, engine, group_size=group)
        return report(rows, group, Counted.newest.positions, positions.count - before)

    return work


class PlainSide:
    """Turn by turn with `model.generate`. With `keep`, trajectories that have ended stay in the
    batch until the last one has."""

    def __init__(self, policy: str, simulated: str, keep: bool) -> None:
        self.keep = keep
        self.model, self.tokenizer = loading.load_model(policy, loading.device())
        self.engine, self.engine_tokenizer = loading.load_model(simulated, loading.device())
        self.prompt = loading.load_prompt(policy)
        self.wording = simulator.load_template(loading.resolve(simulated))
        self.positions = Positions(self.model)
        tags = self.tokenizer.convert_tokens_to_ids(protocol.STOP)
        self.stops = [self.tokenizer.eos_token_id, *tags]
        if self.tokenizer.unk_token_id in self.stops or None in self.stops:
            raise SystemExit(f"The tags are no single tokens of {policy}; take another --policy.")

    def work(self, examples: list[Example], group: int, seed: int) -> dict[str, float]:
        """Play all examples, and count what went through the policy."""
        torch.manual_seed(seed)
        before = self.positions.count
        fed = 0
        rows = self.start(examples, group)
        live = rows
        for turn in range(LIMITS.turns):
            batch = rows if self.keep else live
            texts = [row.ids for row in batch]
            written = write(self.model, texts, LIMITS.turn_tokens, 1.0, self.stops)
            fed += sum(len(text) + len(ids) - 1 for text, ids in zip(texts, written, strict=True))
            live_ids = {id(row) for row in live}
            going_on = []
            for row, ids in zip(batch, written, strict=True):
                is_last = turn == LIMITS.turns - 1
                if id(row) in live_ids and self.read_turn(row, ids, is_last):
                    going_on.append(row)
            self.search([row for row in going_on if row.turns[-1].action == "search"])
            live = [row for row in going_on if self.append_reply(row)]
            if not live:
                break
        return report(rows, group, fed, self.positions.count - before)

    def start(self, examples: list[Example], group: int) -> list[Trajectory]:
        rows = [Trajectory(example) for example in examples for _ in range(group)]
        texts = [protocol.build_prompt(row.example.question, self.prompt) for row in rows]
        for row, ids in zip(rows, protocol.prompt_ids(self.tokenizer, texts), strict=True):
            row.append(ids)
        return rows

    def read_turn(self, row: Trajectory, ids: list[int], is_last: bool) -> bool:
        """Add a turn to a trajectory. Returns whether it goes on."""
        row.append(ids, [0.0] * len(ids))
        text = self.tokenizer.decode(ids)
        action = protocol.parse_action(text)
        row.turns.append(Turn(text, action.kind, action.content))
        if action.kind == "answer":
            row.answer = action.content
        return row.answer is None and not is_last and ids[-1] in self.stops

    def search(self, rows: list[Trajectory]) -> None:
        """Let the simulator write the documents of these rows' newest turns."""
        if not rows:
            return
        requests = [
            SearchRequest(row.turns[-1].content, row.example.question, row.example.answers)
            for row in rows
        ]
        texts = [simulator.fill_template(self.wording, request, 3) for request in requests]
        replies = write(
            self.engine,
            protocol.prompt_ids(self.engine_tokenizer, texts),
            LIMITS.document_tokens,
            SIMULATOR_TEMPERATURE,
            [self.engine_tokenizer.eos_token_id],
        )
        for row, ids in zip(rows, replies, strict=True):
            text = self.engine_tokenizer.decode(ids, skip_special_tokens=True)
            is_unfinished = len(ids) == LIMITS.document_tokens
            row.turns[-1].documents = simulator.read_reply(text, is_unfinished, 3)

    def append_reply(self, row: Trajectory) -> bool:
        """Append what a turn brought. Returns whether the trajectory has room for another turn."""
        text = minizs.rollout.reply_text(row.turns[-1])
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(row.ids) + len(ids) + LIMITS.turn_tokens > LIMITS.context:
            return False
        row.append(ids)
        return True


def plain_side(policy: str, simulated: str, keep: bool) -> Callable:
    logging.set_verbosity_error()
    return PlainSide(policy, simulated, keep).work


def write(
    model, texts: list[list[int]], new: int, temperature: float, stops: list[int]
) -> list[list[int]]:
    """What `transformers` writes after each text, cut after the token that stopped it."""
    width = max(map(len, texts))
    ids = [[0] * (width - len(text)) + text for text in texts]
    mask = [[0] * (width - len(text)) + [1] * len(text) for text in texts]
    out = model.generate(
        torch.tensor(ids, device=model.device),
        max_new_tokens=new,
        do_sample=True,
        attention_mask=torch.tensor(mask, device=model.device),
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        eos_token_id=stops,
        pad_token_id=0,
    )
    rows = out[:, width:].tolist()
    ends = [next((i for i, token in enumerate(row) if token in stops), new) for row in rows]
    return [row[: end + 1] for row, end in zip(rows, ends, strict=True)]


def simulator_folder(name: str) -> str:
    """The simulator to use: the one named, or the scripts' default, made if it is missing."""
    return name or str(build.make_default_simulator())


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", default="", help="empty: the newest run's, else 'tiny'")
    parser.add_argument("--simulator", default="", help="empty: runs/simulator, made if missing")
    parser.add_argument("--questions", type=int, default=16)
    parser.add_argument("--group", type=int, default=8, help="trajectories a question")
    parser.add_argument("--threads", type=int, default=measure.cores(), help="CPU threads a side")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each side")
    args = parser.parse_args(argv)
    trained = run_folder.newest_run()
    args.policy = args.policy or (str(trained / "policy") if trained else "tiny")
    settings = (args.policy, simulator_folder(args.simulator))
    sides = {
        "minizs": measure.Side(minizs_side, *settings, threads=args.threads),
        "plain": measure.Side(plain_side, *settings, True, threads=args.threads),
        "active": measure.Side(plain_side, *settings, False, threads=args.threads),
    }
    print(measure.machine(args.threads))
    examples = data.load_examples("world", "train")[: args.questions]
    rows = args.questions * args.group
    print(f"{rows} trajectories of {args.policy}, {args.group} a question, {LIMITS}\n")
    with measure.together(sides):
        measured = measure.take_turns(sides, args.repeats, examples, args.group)
    print(
        "| side | seconds | trajectories/s | tokens/s | peak MB | tokens | searches | F1 "
        "| positions / token | padding / token |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    speeds = {}
    for name, calls in measured.items():
        means = {k: sum(call.value[k] for call in calls) / len(calls) for k in calls[0].value}
        taken = measure.seconds(calls)
        speeds[name] = (rows / taken, rows * means["length"] / taken)
        print(
            f"| {name} | {taken:.2f} | {rows / taken:.1f} | {speeds[name][1]:.0f} | "
            f"{measure.peak(calls):.0f} | {means['length']:.1f} | {means['searches']:.2f} | "
            f"{means['f1']:.3f} | {means['fed']:.3f} | {means['padding']:.3f} |"
        )
    ours, per_token = speeds.pop("minizs")
    for name, (theirs, theirs_per_token) in speeds.items():
        print(
            f"\nminizs is {ours / theirs:.2f} times as fast as '{name}', "
            f"{per_token / theirs_per_token:.2f} times for a trajectory's token."
        )


if __name__ == "__main__":
    main()
