"""Stage 3: test a policy with a real search engine, beside what it began as; or ask it a question.

    python evaluate.py                                  # the newest run, BM25, 1,000 questions
    python evaluate.py --policy DIR --engine_noise 0.5  # an engine that is wrong half of the time
    python evaluate.py --ask "where was Holo Trelmow born?"

Greedy by default, every question counted. With a run's policy the model it started from is tested
beside it, on the same questions.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from minizs.config import option, parse, require, run_script, set_threads

ENGINES = ("bm25", "simulator", "none")


@dataclass
class EvalConfig:
    policy: str = option("", "A policy's folder; empty: that of the newest finished run.")
    before: str = option(
        "auto", "The model to compare with; 'auto': what the run began with; 'none'."
    )
    engine: str = option("bm25", "What answers the searches; 'none': an empty block.", ENGINES)
    engine_noise: float = option(
        0.0, "How often a reply is made of documents without what is needed."
    )
    simulator: str = option("", "For --engine simulator: its folder; empty: runs/simulator.")
    data: str = option(
        "world", "Questions: 'world' (unseen facts) or a .jsonl, .json, .parquet file."
    )
    corpus: str = option("", "For --engine bm25: a text file with one document a line.")
    questions: int = option(1000, "How many questions at most; 0: all.")
    output: str = option("", "Where the figures go; empty: evaluation.json beside the policy.")
    overwrite: bool = option(False, "Write over the output file.")
    ask: str = option("", "Answer this one question and show the whole trajectory.")
    temperature: float = option(0.0, "0 is greedy.")
    seed: int = option(0, "Decides sampling and which replies are noisy.")
    batch: int = option(250, "Questions answered together.")
    top_k: int = option(3, "Documents a search.")
    simulator_temperature: float = option(1.0, "At which the simulator writes.")
    max_turns: int = option(6, "Generations a question; there are at most one fewer searches.")
    max_turn_tokens: int = option(40, "Tokens the policy may write in a turn.")
    max_document_tokens: int = option(80, "Tokens of an engine's reply, tags included.")
    max_context: int = option(448, "Tokens of a whole trajectory.")
    threads: int = option(0, "CPU threads; 0: all cores.")


def check(config: EvalConfig) -> None:
    """Raise UserError for what is wrong with the settings, before anything expensive starts."""
    from minizs import data, models, stages

    require(0 <= config.engine_noise <= 1, "--engine_noise is a share: give a number from 0 to 1.")
    require(config.temperature >= 0, "--temperature must be 0 (greedy) or more.")
    for name in ("max_turns", "max_turn_tokens", "max_document_tokens", "batch", "top_k"):
        require(getattr(config, name) > 0, f"--{name} must be greater than 0.")
    for name in ("questions", "threads"):
        require(getattr(config, name) >= 0, f"--{name} must be 0 or more.")
    models.check_model(config.policy)
    models.check_positions(config.policy, config.max_context)
    if config.before not in ("auto", "none"):
        models.check_model(config.before)
    data.check(config.data)
    stages.check_engine(config)
    if not config.ask:
        path = Path(config.output)
        require(config.overwrite or not path.exists(),
                f"{path} exists; name another --output or add --overwrite.")  # fmt: skip
        require(path.parent.is_dir(), f"There is no folder {path.parent} to write {path.name} to.")


def fill_in(config: EvalConfig) -> None:
    """What was left empty: the newest run's policy, the model it began with, the output file."""
    from minizs import runs

    newest = runs.newest_run()
    if not config.policy:
        require(newest is not None, "There is no finished run in runs/; train one with "
                "'accelerate launch train_policy.py' or name a --policy.")  # fmt: skip
        config.policy = str(newest / "policy")
    if config.before == "auto":
        config.before = runs.started_from(Path(config.policy)) or "none"
    if not config.output:
        config.output = str(Path(config.policy).parent / "evaluation.json")
        config.overwrite = True  # our own file, in our own place


def engine_of(config: EvalConfig):
    from minizs import models, stages

    if config.engine == "simulator":
        folder = config.simulator or str(stages.make_default_simulator())
        return stages.simulated_engine(folder, config, models.device())
    return stages.real_engine(config, "test")


def evaluate(config: EvalConfig, policy: str, examples, engine) -> dict:
    """The table of one policy (see `evaluation.table`)."""
    from minizs import evaluation, models, stages

    model, tokenizer = models.load(policy, models.device())
    rows = evaluation.answer_all(
        model, tokenizer, examples, engine, config.batch, progress=True, seed=config.seed,
        temperature=config.temperature, noise=config.engine_noise,
        limits=stages.limits(config), template=models.load_prompt(policy),
    )  # fmt: skip
    return evaluation.table(rows)


def ask(config: EvalConfig, examples, engine) -> None:
    """One trajectory as it unfolds: each turn is printed as soon as it is there."""
    from minizs import models, stages
    from minizs.rollout import rollout

    model, tokenizer = models.load(config.policy, models.device())

    class Shown:
        def search(self, requests):
            replies = engine.search(requests)
            for request, documents in zip(requests, replies, strict=True):
                print(f"search   {request.query}")
                print("".join(f"           {text}\n" for text in documents), end="", flush=True)
            return replies

    print(f"question {config.ask}")
    [row] = rollout(model, tokenizer, examples, Shown(),
                    temperature=config.temperature, seed=config.seed,
                    noise=config.engine_noise, limits=stages.limits(config),
                    template=models.load_prompt(config.policy))  # fmt: skip
    print(f"answer   {row.answer}" if row.answer else f"no answer: out of {row.truncated}")


def show(tables: dict[str, dict], config: EvalConfig) -> str:
    """The figures of all policies as a table, in per cent, with standard errors."""
    lines = [f"{'':22}{'data':10}{'n':>6}{'F1':>14}{'EM':>14}{'contains':>14}{'searches':>10}"]
    for policy, table in tables.items():
        for name, row in table.items():
            cells = "".join(
                f"{100 * row[m]:7.1f} ± {100 * row[m + '_stderr']:4.1f}"
                for m in ("f1", "em", "sub_em")
            )
            lines.append(
                f"{policy[-20:]:22}{name:10}{row['n']:6}{cells}{row['searches_per_question']:10.2f}"
            )
    if config.engine == "simulator":
        lines.append("The simulator has seen the gold answers: this is no test of the policy.")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    config = parse(EvalConfig, argv)
    fill_in(config)
    check(config)
    set_threads(config.threads)
    from minizs import data, stages
    from minizs.trajectory import Example

    examples = [Example(config.ask, ())] if config.ask else data.load(config.data, "test")
    examples = examples[: config.questions] if config.questions else examples
    policies = [config.policy]
    if config.before != "none" and not config.ask:
        policies.insert(0, config.before)
    for policy in policies:
        stages.check_prompts(policy, examples, config.max_context)
    engine = engine_of(config)
    if config.ask:
        return ask(config, examples, engine)
    tables = {policy: evaluate(config, policy, examples, engine) for policy in policies}
    print(show(tables, config))
    figures = tables[config.policy] | {"settings": vars(config)}
    if config.before != "none":
        figures["before"] = tables[config.before]
    Path(config.output).write_text(json.dumps(figures, indent=1) + "\n")
    print(f"The figures are in {config.output}")


if __name__ == "__main__":
    run_script(main)
