"""Stage 3: test a policy with a real search engine, beside what it began as; or ask it a question.

    python evaluate.py                                  # the newest run (or makes one), BM25
    python evaluate.py --policy DIR --engine_noise 0.5  # an engine that is wrong half of the time
    python evaluate.py --ask "where was Holo Trelmow born?"
    accelerate launch evaluate.py --policy DIR --data paper --engine http --engine_url URL

Greedy by default, every question counted. With a run's policy the model it started from is tested
beside it, on the same questions. What was interrupted goes on where it was when called again.
"""

import json
import re
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from minizs.config import check_ranges, option, parse, require, run_script, set_threads
from minizs.options import ENGINES, SearchConfig, check_search

METHODS = ("search", "direct", "cot", "rag")


@dataclass
class EvalConfig(SearchConfig):
    policy: str = option("", "A folder or hub name; empty: the newest finished run's, which is "
                         "made if there is none.")  # fmt: skip
    before: str = option("auto", "The model to compare with: 'auto' (what the run began with), "
                         "'none', a folder or a hub name.")  # fmt: skip
    method: str = option("search", "Or without searching by itself: answer at once, think first, "
                         "read what one search for the question finds.", METHODS)  # fmt: skip
    engine: str = option("bm25", "What answers the searches; 'none': an empty block.", ENGINES)
    questions: int = option(1000, "At most, spread evenly over the data sets; 0: all.")
    output: str = option("", "Where the figures go; empty: evaluation.json beside the policy, or "
                         "evaluation-ENGINE-....json where it is no plain test.")  # fmt: skip
    ask: str = option("", "Answer this one question and show the whole trajectory.")
    temperature: float = option(0.0, "0 is greedy.")
    batch: int = option(250, "Questions a process answers together.")


def check(config: EvalConfig) -> None:
    """Raise UserError for what is wrong with the settings, before anything expensive starts."""
    from minizs import models

    check_ranges(config, positive="batch", not_negative="questions")
    check_search(config)
    if config.before not in ("auto", "none"):
        models.check_model(config.before)
    require(config.method == "search" or not config.engine_noise,
            "--engine_noise is for --method search.")  # fmt: skip
    if config.output and not config.ask:
        path = Path(config.output)
        require(config.overwrite or not path.exists(),
                f"{path} exists; name another --output or add --overwrite.")  # fmt: skip
        require(path.suffix == ".json", f"--output {path} should end with .json.")
        require(path.parent.is_dir(), f"There is no folder {path.parent} to write {path.name} to.")


def default_output(config: EvalConfig) -> Path:
    """Beside a policy's folder, or here for a hub name; another kind of test has another name."""
    plain = EvalConfig()
    words = ["evaluation", *(Path(d).stem for d in config.data.split(",") if d != plain.data)]
    names = ("engine", "engine_noise", "temperature", "method")
    if any(getattr(config, name) != getattr(plain, name) for name in names):
        words += [] if config.method == "search" else [config.method]
        words += [] if config.method in ("direct", "cot") else [config.engine]
    words += [f"noise{config.engine_noise:g}"] if config.engine_noise else []
    words += [f"temperature{config.temperature:g}"] if config.temperature else []
    policy, name = Path(config.policy), re.sub(r"[^\w.]+", "-", "-".join(words))
    return (policy.parent if policy.is_dir() else Path()) / f"{name}.json"


def fingerprint(config: EvalConfig, name: str, examples) -> str:
    """Eight letters that differ where a model, question, corpus or setting does: an answer belongs
    to all of them."""
    folders = [Path(folder) for folder in (name, config.simulator or "runs/simulator")]
    files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    files += [Path(config.corpus)] if config.corpus else []
    stamp = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    settings = asdict(config) | {"overwrite": None, "batch": None, "threads": None}
    return f"{zlib.crc32(repr((name, stamp, settings, examples)).encode()):08x}"


def unfold(turn) -> None:
    """Print a turn as soon as it is there: the policy's own words, and what came back."""
    print(turn.text.strip())
    reply = [] if turn.documents is None else turn.documents or ["nothing found"]
    reply = ["no valid action"] if turn.action == "invalid" else reply
    print("".join(f"    {text}\n" for text in reply), end="", flush=True)


def main(argv: list[str] | None = None) -> None:
    config = parse(EvalConfig, argv)
    from minizs import baselines, data, evaluation, models, runs, stages
    from minizs.trajectory import Example

    chosen = config.policy or (str(stages.newest_policy()) if runs.newest_run() else "")
    config.policy = chosen or "tiny"  # where there is no run yet, one of the tiny model is made
    check(config)
    set_threads(config.threads)
    accelerator = stages.make_accelerator(config)
    examples = [Example(config.ask, ())]
    if not config.ask:
        examples = data.spread(data.load(config.data, "test", accelerator.print), config.questions)
    with accelerator.main_process_first():
        config.policy = chosen or str(stages.newest_policy())
    config.output = config.output or str(default_output(config))
    if config.before == "auto":
        config.before = runs.started_from(Path(config.policy)) or "none"
    names = [config.policy]
    if config.before != "none" and not config.ask:
        names.insert(0, config.before)
    if config.engine == "simulator":
        stages.check_simulator(config, examples)
    for name in names:
        stages.check_prompts(config, name, examples)
    # All weights before any answer, so that none is lost to what cannot be read.
    dtype = stages.compute_dtype(config)
    policies = {name: stages.load(config, name, accelerator.device, dtype) for name in names}
    engine = stages.build_engine(config, "test", accelerator)
    answers = {
        name: stages.searcher(config, *policies[name], models.load_prompt(name), engine,
                              config.temperature, seed=config.seed, noise=config.engine_noise)
        for name in names
    }  # fmt: skip
    if config.method != "search":
        answers = {
            name: partial(baselines.answer, config.method, *policies[name], engine=engine,
                          max_new_tokens=config.max_turn_tokens, seed=config.seed,
                          temperature=config.temperature)
            for name in names
        }  # fmt: skip
    if config.ask:
        print(f"question {config.ask}")
        [row] = answers[config.policy](examples, keys=[(0,)], on_turn=unfold)
        ending = "empty" if row.answer is not None else f"none: out of {row.truncated}"
        return print(f"answer   {row.answer or ending}")

    tables, parts, output = {}, [], Path(config.output)
    for name in names:
        log = output.with_suffix(".jsonl" if name == config.policy else ".before.jsonl")
        stamp = fingerprint(config, name, examples)
        rows = evaluation.answer_all(answers[name], examples, accelerator, config.batch, log, stamp)
        parts += evaluation.parts(log, stamp)
        tables[name] = evaluation.table(rows) if rows else {}
    if not accelerator.is_main_process:
        return
    figures = tables[config.policy] | {"settings": asdict(config)}
    if config.before != "none":
        figures["before"] = tables[config.before]
    output.write_text(json.dumps(figures, indent=1) + "\n")
    output.with_suffix(".md").write_text(evaluation.show(tables) + "\n")
    for part in parts:
        part.unlink(missing_ok=True)  # a policy may be compared with itself
    print(evaluation.show(tables))
    if config.engine == "simulator":
        print("The simulator has seen the gold answers: this is no test of the policy.")
    print(f"The figures are in {output}, each answer in {output.with_suffix('.jsonl')}")


if __name__ == "__main__":
    run_script(main)
