"""Stage 3: test a policy with a real search engine, beside what it began as; or ask it a question.

    python evaluate.py                                  # the newest run (or makes one), BM25
    python evaluate.py --policy DIR --engine_noise 0.5  # an engine that is wrong half of the time
    python evaluate.py --ask "where was Holo Trelmow born?"
    python evaluate.py --policy DIR --ask "how long is the warranty?" --corpus handbook.txt
    accelerate launch evaluate.py --policy DIR --data paper --engine http --engine_url URL

Greedy by default, every question counted. With a run's policy the model it started from is tested
beside it, on the same questions. What was interrupted goes on where it was when called again.
"""

import json
import os
import re
import shutil
import sys
import zlib
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path

from minizs import report
from minizs.config import check_ranges, option, parse, require, run_script, set_threads
from minizs.options import ENGINES, SearchConfig, check_search

METHODS = ("search", "direct", "cot", "rag")
INK = {"think": 2, "search": 36, "answer": 32, "useful": 34, "noisy": 33}  # ANSI: faint, cyan, ...


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
                         "evaluation-....json where it is no plain test.")  # fmt: skip
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
        fits = path.suffix == ".json" and not path.is_dir() and path.parent.is_dir()
        require(fits and os.access(path.parent, os.W_OK), f"--output {path} should end with .json "
                "and lie in a folder that can be written to.")  # fmt: skip


def default_output(config: EvalConfig) -> Path:
    """Beside a policy's folder, or here for a hub name; another kind of test has another name."""
    plain, policy = EvalConfig(), Path(config.policy)
    words = ["evaluation", *(Path(d).stem for d in config.data.split(",") if d != plain.data)]
    for name in ("method", "engine", "engine_noise", "temperature"):
        if getattr(config, name) != getattr(plain, name):
            words += [name, str(getattr(config, name))]
    name = re.sub(r"[^\w.]+", "-", "-".join(words))
    return (policy.parent if policy.is_dir() else Path()) / f"{name}.json"


def fingerprint(config: EvalConfig, name: str, examples) -> str:
    """Differs where a model, question, corpus or setting does: an answer belongs to all of them."""
    files = [Path(config.corpus)] if config.corpus else []
    for folder in (name, config.simulator or "runs/simulator"):
        files += sorted(Path(folder).glob("*.safetensors"))
    stamps = [(str(file), file.stat().st_mtime_ns) for file in files]
    settings = asdict(config) | dict.fromkeys(("overwrite", "batch", "threads"))
    return f"{zlib.crc32(repr((name, stamps, settings, examples)).encode()):08x}"


def show_turn(turn) -> None:
    """Print a turn as soon as it is there: the policy's words, and what came back."""
    tags = r"(?s)<(think|search|answer)>.*?</\1>"
    words = report.visible(turn.text.strip())
    print(re.sub(tags, lambda part: paint(part[0], part[1]), words))
    reply = [] if turn.documents is None else turn.documents or ["nothing found"]
    reply = ["no valid action"] if turn.action == "invalid" else reply
    for text in map(report.visible, reply):
        print("   ", paint(text, "noisy" if turn.noisy else "useful"), flush=True)


def paint(words: str, kind: str) -> str:
    """Coloured on a terminal, but where that is not wished (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or not sys.stdout.isatty()
    return words if plain else f"\033[{INK[kind]}m{words}\033[0m"


def main(argv: list[str] | None = None) -> None:
    config = parse(EvalConfig, argv)
    from accelerate.utils import gather_object

    from minizs import baselines, data, evaluation, models, runs, stages
    from minizs.trajectory import Example

    newest = runs.newest_run()
    missing = not config.policy and not newest
    config.policy = config.policy or (str(newest / "policy") if newest else "tiny")
    check(config)
    set_threads(config.threads)
    accelerator = stages.make_accelerator(config)
    examples = [Example(config.ask, ())]
    if not config.ask:
        examples = data.spread(data.load(config.data, "test", accelerator.print), config.questions)
        with accelerator.main_process_first():
            config.policy = str(stages.newest_policy()) if missing else config.policy
    config.output = config.output or str(default_output(config))
    if config.before == "auto":
        config.before = runs.started_from(Path(config.policy)) or "none"
    compared = [] if config.ask or config.before == "none" else [config.before]
    names = [*compared, config.policy]
    if config.engine == "simulator":
        stages.check_simulator(config, examples)
    for name in names:
        stages.check_prompts(config, name, examples)
    # All weights before any answer, so that none is lost to what cannot be read.
    dtype = stages.compute_dtype(config)
    policies = {name: stages.load(config, name, accelerator.device, dtype) for name in names}
    engine = stages.build_engine(config, "test", accelerator)

    def answerer(name: str) -> evaluation.Answer:
        sampling = {"temperature": config.temperature, "seed": config.seed}
        if config.method != "search":
            return partial(baselines.answer, config.method, *policies[name], engine=engine,
                           max_new_tokens=config.max_turn_tokens, **sampling)  # fmt: skip
        return stages.searcher(config, *policies[name], models.load_prompt(name), engine,
                               noise=config.engine_noise, **sampling)  # fmt: skip

    if config.ask:
        if missing:
            print("No run is finished yet: this is what the model does that training starts from.")
        print(f"question {report.visible(config.ask)}")
        [row] = answerer(config.policy)(examples, keys=[(0,)], on_turn=show_turn)
        ending = "empty" if row.answer is not None else f"none: out of {row.truncated}"
        return print(f"answer   {paint(report.visible(row.answer or ending), 'answer')}")

    tables, output = {}, Path(config.output)
    unfinished = output.with_suffix(".unfinished")  # a folder, until all is answered
    for name in names:
        kept = unfinished / fingerprint(config, name, examples)
        failed = getattr(engine, "failed", 0)
        rows = evaluation.answer_all(answerer(name), examples, accelerator, config.batch, kept)
        failed = gather_object([getattr(engine, "failed", 0) - failed])
        if accelerator.is_main_process:
            tables[name] = evaluation.table(rows)
            tables[name]["overall"]["search_errors"] = sum(failed)
            log = output.with_suffix(".jsonl" if name == config.policy else ".before.jsonl")
            log.write_text("".join(map(evaluation.as_line, count(), rows)))
    if not accelerator.is_main_process:
        return
    figures = tables[config.policy] | {"settings": asdict(config)}
    if compared:
        figures["before"] = tables[config.before]
    output.write_text(json.dumps(figures, indent=1) + "\n")
    output.with_suffix(".md").write_text(evaluation.show(tables) + "\n")
    shutil.rmtree(unfinished)
    if (output.parent / "metrics.jsonl").exists():  # a run's folder
        report.write(output.parent)
    print(evaluation.show(tables))
    if config.engine == "simulator":
        print("The simulator has seen the gold answers: this is no test of the policy.")
    print(f"The figures are in {output}, each answer in {output.with_suffix('.jsonl')}")


if __name__ == "__main__":
    run_script(main)
