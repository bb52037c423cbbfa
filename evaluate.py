"""Stage 3: test a policy with a real search engine, beside what it began as; or ask it a question.

    python evaluate.py                                  # the newest run (or makes one), BM25
    python evaluate.py --policy DIR --engine_noise 0.5  # an engine that is wrong half of the time
    python evaluate.py --ask "where was Holo Trelmow born?"

Greedy by default, every question counted. With a run's policy the model it started from is tested
beside it, on the same questions.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from minizs.config import check_ranges, option, parse, require, run_script, set_threads

ENGINES = ("bm25", "simulator", "none")


@dataclass
class EvalConfig:
    policy: str = option("", "A folder or hub name; empty: the newest finished run's, which is "
                         "made if there is none.")  # fmt: skip
    before: str = option("auto", "The model to compare with: 'auto' (what the run began with), "
                         "'none', a folder or a hub name.")  # fmt: skip
    engine: str = option("bm25", "What answers the searches; 'none': an empty block.", ENGINES)
    engine_noise: float = option(0.0, "How often a reply lacks what is needed; the simulator is "
                                 "then asked for noisy documents.")  # fmt: skip
    simulator: str = option("", "For --engine simulator: its folder; empty: runs/simulator.")
    data: str = option("world", "Questions: 'world' (unseen facts) or a .jsonl, .json or .parquet "
                       "file.")  # fmt: skip
    corpus: str = option("", "For --engine bm25: a text file with one document a line.")
    questions: int = option(1000, "At most, spread evenly over the data sets; 0: all.")
    output: str = option("", "Where the figures go; empty: evaluation.json beside the policy, or "
                         "evaluation-ENGINE-....json where it is no plain test.")  # fmt: skip
    overwrite: bool = option(False, "Write over the output file.")
    ask: str = option("", "Answer this one question and show the whole trajectory.")
    temperature: float = option(0.0, "0 is greedy.")
    seed: int = option(0, "Decides sampling and which replies are noisy.")
    batch: int = option(250, "Questions answered together.")
    top_k: int = option(3, "Documents a search.")
    simulator_temperature: float = option(0.8, "At which the simulator writes.")
    max_turns: int = option(6, "Generations a question; there are at most one fewer searches.")
    max_turn_tokens: int = option(40, "Tokens the policy may write in a turn.")
    max_document_tokens: int = option(80, "Tokens of an engine's reply, tags included.")
    max_context: int = option(448, "Tokens of a whole trajectory.")
    threads: int = option(0, "CPU threads; 0: all cores.")


def check(config: EvalConfig) -> None:
    """Raise UserError for what is wrong with the settings, before anything expensive starts."""
    from minizs import data, models, stages

    check_ranges(
        config,
        positive="max_turns max_turn_tokens max_document_tokens max_context batch top_k",
        not_negative="questions threads temperature simulator_temperature",
        share="engine_noise",
    )
    policy = config.policy or "tiny"  # where there is no run yet, one of the tiny model is made
    models.check_model(policy)
    models.check_positions(policy, config.max_context)
    if config.before not in ("auto", "none"):
        models.check_model(config.before)
    data.check(config.data)
    stages.check_engine(config)
    if config.output and not config.ask:
        path = Path(config.output)
        require(config.overwrite or not path.exists(),
                f"{path} exists; name another --output or add --overwrite.")  # fmt: skip
        require(path.parent.is_dir(), f"There is no folder {path.parent} to write {path.name} to.")


def default_output(config: EvalConfig) -> Path:
    """Beside a policy's folder, or here for a hub name; another kind of test has another name."""
    words, plain = ["evaluation"], EvalConfig()
    names = ("engine", "engine_noise", "temperature")
    if any(getattr(config, name) != getattr(plain, name) for name in names):
        words.append(config.engine)
    words += [f"noise{config.engine_noise:g}"] if config.engine_noise else []
    words += [f"temperature{config.temperature:g}"] if config.temperature else []
    policy = Path(config.policy)
    return (policy.parent if policy.is_dir() else Path()) / ("-".join(words) + ".json")


def engine_of(config: EvalConfig, examples):
    from minizs import models, stages

    if config.engine != "simulator":
        return stages.real_engine(config, "test")
    stages.check_simulator(config, examples)
    folder = config.simulator or str(stages.make_default_simulator())
    return stages.simulated_engine(folder, config, models.device())


def answers(config: EvalConfig, policy, template: str, examples, engine, **options):
    """The trajectories of one policy, a (model, tokenizer) pair."""
    from minizs import evaluation, stages

    return evaluation.answer_all(
        *policy, examples, engine, config.batch, seed=config.seed, template=template,
        temperature=config.temperature, noise=config.engine_noise, limits=stages.limits(config),
        **options,
    )  # fmt: skip


def unfold(turn) -> None:
    """Print a turn as soon as it is there: the policy's own words, and what came back."""
    print(turn.text.strip())
    reply = [] if turn.documents is None else turn.documents or ["nothing found"]
    reply = ["no valid action"] if turn.action == "invalid" else reply
    print("".join(f"    {text}\n" for text in reply), end="", flush=True)


def show(tables: dict[str, dict], config: EvalConfig) -> str:
    """The figures of all policies as a table, in per cent, with standard errors."""
    lines = [f"{'':22}{'data':10}{'n':>6}{'F1':>14}{'EM':>14}{'contains':>14}{'searches':>10}"]
    for policy, table in tables.items():
        for name, row in table.items():
            line = f"{policy[-20:]:22}{name:10}{row['n']:6}"
            for metric in ("f1", "em", "sub_em"):
                line += f"{100 * row[metric]:7.1f} ± {100 * row[metric + '_stderr']:4.1f}"
            lines.append(f"{line}{row['searches_per_question']:10.2f}")
    if config.engine == "simulator":
        lines.append("The simulator has seen the gold answers: this is no test of the policy.")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    config = parse(EvalConfig, argv)
    from minizs import data, evaluation, models, runs, stages
    from minizs.trajectory import Example

    if runs.newest_run():
        config.policy = config.policy or str(stages.newest_policy())
    check(config)
    set_threads(config.threads)
    examples = [Example(config.ask, ())] if config.ask else data.load(config.data, "test")
    examples = data.spread(examples, config.questions)
    config.policy = config.policy or str(stages.newest_policy())
    config.output = config.output or str(default_output(config))
    if config.before == "auto":
        config.before = runs.started_from(Path(config.policy)) or "none"
    names = [config.policy]
    if config.before != "none" and not config.ask:
        names.insert(0, config.before)
    for name in names:
        stages.check_prompts(name, examples, config.max_context)
    # All weights before any answer, so that none is lost to what cannot be read.
    policies = {name: models.load(name, models.device()) for name in names}
    engine = engine_of(config, examples)

    if config.ask:
        print(f"question {config.ask}")
        [row] = answers(config, policies[config.policy], models.load_prompt(config.policy),
                        examples, engine, on_turn=unfold)  # fmt: skip
        ending = "empty" if row.answer is not None else f"none: out of {row.truncated}"
        return print(f"answer   {row.answer or ending}")
    tables = {}
    for name in names:
        rows = answers(config, policies[name], models.load_prompt(name), examples, engine,
                       progress=True)  # fmt: skip
        tables[name] = evaluation.table(rows)
    print(show(tables, config))
    figures = tables[config.policy] | {"settings": vars(config)}
    if config.before != "none":
        figures["before"] = tables[config.before]
    Path(config.output).write_text(json.dumps(figures, indent=1) + "\n")
    print(f"The figures are in {config.output}")


if __name__ == "__main__":
    run_script(main)
