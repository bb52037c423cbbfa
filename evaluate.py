"""Stage 3: test a policy with a real search engine, beside what it began as; or ask it a question.

    python evaluate.py                                  # the newest run (or makes one), BM25
    python evaluate.py --ask "how long is the warranty?" --policy MODEL --corpus handbook.txt
    accelerate launch evaluate.py --policy DIR --data paper --engine http --engine_url URL

Greedy by default, every question counted. What was interrupted goes on where it was."""

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

from minizs import require
from minizs.runs import run_folder
from minizs.runs.flags import option, parse, run_script, set_threads
from minizs.runs.settings import ENGINES, SearchConfig, check_search

METHODS = ("search", "direct", "cot", "rag")
INK = {"think": 2, "search": 36, "answer": 32, "useful": 34, "noisy": 33}  # ANSI: faint, cyan, ...


@dataclass
class EvalConfig(SearchConfig):
    """Stage 3: test a policy with a real search engine, or ask it one question.

    Without any flag it tests the newest run's policy in the tiny world, beside the model that its
    training began with.
    """

    ask: str | None = option(
        None, "Answer this one question and show the whole trajectory.", metavar="QUESTION"
    )
    policy: str = option(
        "",
        "The policy to test: a folder or a hub name. By default that of the newest run, which is "
        "trained if there is none.",
        metavar="MODEL",
    )
    before: str = option(
        "auto",
        "The model to compare with: 'auto' is the one that the policy was trained from, 'none' is "
        "no other.",
        metavar="MODEL",
    )
    method: str = option(
        "search",
        "How the policy answers: it searches, answers at once, thinks first, or reads the "
        "documents of one search for the question.",
        METHODS,
    )
    engine: str = option(
        "bm25",
        "What answers the searches: a real engine, the simulator, which has seen the gold answers, "
        "or nothing.",
        ENGINES,
    )
    questions: int = option(
        1000, "The number of questions, spread evenly over the data sets. 0 takes all.", min=0
    )
    output: str = option(
        "",
        "A .json file for the figures. By default evaluation.json beside the policy's folder, or "
        "evaluation-2.json and so on.",
        metavar="FILE",
    )
    temperature: float = option(
        0.0, "The temperature at which the policy samples. 0 is greedy.", min=0
    )
    batch: int = option(250, "The number of questions that a process answers together.", min=1)


def check(config: EvalConfig) -> None:
    """Raise UserError for what is wrong with the settings, before anything expensive starts."""
    check_search(config)
    require(not config.engine_noise or config.method == "search", "--engine_noise is for searches.")
    require(config.ask is None or config.ask.strip(), "--ask needs a question.")
    if not config.ask:
        path = Path(config.output or default_output(config.policy))
        fits = (
            path.suffix == ".json" and path.parent.is_dir() and run_folder.can_be_made(path.parent)
        )
        require(fits and not path.is_dir(), f"--output {path}: no .json file can be written there.")
        made = map(path.with_suffix, (".json", ".md", ".jsonl", ".before.jsonl"))
        there = [os.path.realpath(file) for file in made if file.exists()]
        require(config.overwrite or not there, f"{'; '.join(there)} exists; add --overwrite.")
        read = map(os.path.realpath, (*config.data.split(","), config.corpus, config.cache))
        require(set(there).isdisjoint(read), f"--output {path} would overwrite what is read.")


def default_output(policy: str) -> Path:
    """evaluation.json beside a policy's folder, or here for a hub name; else -2, -3, ..."""
    folder = Path(policy).parent if Path(policy).is_dir() else Path()
    paths = (folder / f"evaluation{f'-{n}' if n > 1 else ''}.json" for n in count(1))
    return next(path for path in paths if not path.exists())


def fingerprint(config: EvalConfig, examples) -> str:
    """Differs where a setting, a question or a model's weights do: an answer belongs to these."""
    files = (f for name in (config.before, config.policy) for f in Path(name).glob("*.safetensors"))
    stamps = sorted((str(file), file.stat().st_mtime_ns) for file in files)
    settings = asdict(config) | dict.fromkeys(("output", "overwrite", "batch", "threads"))
    return f"{zlib.crc32(repr((settings, examples, stamps)).encode()):08x}"


def paint(words: str, kind: str) -> str:
    """Coloured on a terminal, but where that is not wished (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or not sys.stdout.isatty()
    return words if plain else f"\033[{INK[kind]}m{words}\033[0m"


def show_turn(turn) -> None:
    """Print a turn as soon as it is there: the policy's words; called again, what came back."""
    from minizs.runs import report

    words, tags = report.visible(turn.text.strip()), r"(?s)<(think|search|answer)>.*?</\1>"
    if turn.documents is None:
        print(re.sub(tags, lambda part: paint(part[0], part[1]), words), flush=True)
    told = ["no valid action"] if turn.action == "invalid" else []
    for text in told if turn.documents is None else turn.documents or ["nothing found"]:
        print("   ", paint(report.visible(text), "noisy" if turn.noisy else "useful"), flush=True)


def test(config: EvalConfig, accelerator, examples, answers: dict, engine) -> None:
    """Let each policy answer all questions; write the figures and every answer, print the table."""
    from minizs.runs import evaluation, metrics, report

    config.output = config.output or str(default_output(config.policy))
    tables, logs, output = {}, {}, Path(config.output)
    kept = output.with_name(f"unfinished-{fingerprint(config, examples)}")
    for name, answer in answers.items():
        ending = "jsonl" if name == config.policy else "before.jsonl"
        failed = getattr(engine, "failed", 0)
        rows = evaluation.answer_all(answer, examples, accelerator, config.batch, kept / ending)
        failed = metrics.total(accelerator, getattr(engine, "failed", 0) - failed)
        if accelerator.is_main_process:
            tables[name] = evaluation.table(rows)
            tables[name]["overall"]["search_errors"] = failed
            logs[ending] = map(evaluation.as_line, count(), rows)
    if not accelerator.is_main_process:
        return
    more = {"settings": asdict(config), "before": tables.get(config.before)}
    output.write_text(json.dumps(tables[config.policy] | more, indent=1) + "\n", encoding="utf-8")
    output.with_suffix(".md").write_text(evaluation.show(tables) + "\n", encoding="utf-8")
    for ending, lines in logs.items():
        output.with_suffix(f".{ending}").write_text("".join(lines), encoding="utf-8")
    shutil.rmtree(kept)
    if (output.parent / "metrics.jsonl").exists():  # a run's folder
        report.write(output.parent)
    print(evaluation.show(tables))
    if config.engine == "simulator":
        print("The simulator has seen the gold answers: this is no test of the policy.")
    print(f"The figures are in {output}, each answer in {output.with_suffix('.jsonl')}")


def main(argv: list[str]) -> None:
    config = parse(EvalConfig, argv)
    from minizs.models import loading
    from minizs.rollout import rollout
    from minizs.runs import build, data, evaluation, report
    from minizs.trajectory import Example

    missing = not config.policy and not run_folder.newest_run()
    config.policy = config.policy or (
        "tiny" if missing else str(run_folder.newest_run() / "policy")
    )
    check(config)
    loading.check_model("tiny" if config.before in ("auto", "none") else config.before)
    set_threads(config.threads)
    accelerator = build.make_accelerator(config)
    if config.ask:
        examples, config.before = [Example(config.ask, ())], "none"
    else:
        examples = data.spread(
            data.load_examples(config.data, "test", accelerator.print), config.questions
        )
    if missing and not config.ask:
        build.build_engine(config, "test", accelerator, examples)  # or its error, before a run
        with accelerator.main_process_first():
            if not run_folder.newest_run():  # else the main process has just made it
                build.run_stage("train_policy.py")
        config.policy = str(run_folder.newest_run() / "policy")
    if config.before == "auto":
        config.before = run_folder.started_from(Path(config.policy))
    names = [config.policy] if config.before == "none" else [config.before, config.policy]
    build.check_lengths(config, names, examples)
    # All weights before any answer, so that none is lost to what cannot be read.
    policies = {name: build.load(config, name, accelerator.device) for name in names}
    engine = build.build_engine(config, "test", accelerator, examples)
    answers = {}
    for name, (model, tokenizer) in policies.items():
        template = loading.load_prompt(name)
        policy = build.make_policy(config, model, tokenizer, template, config.temperature)
        if config.method == "search":
            answers[name] = partial(rollout, policy, engine=engine, noise=config.engine_noise)
        else:
            answers[name] = partial(evaluation.baseline, config.method, policy, engine=engine)
    if not config.ask:
        return test(config, accelerator, examples, answers, engine)
    if missing:
        print("No run is finished yet: this is what the model does that training starts from.")
    print(f"question {report.visible(config.ask)}")
    [row] = answers[config.policy](examples, keys=[(0,)], on_turn=show_turn)
    ending = "empty" if row.answer is not None else f"none: out of {row.truncated}"
    print(f"answer   {paint(report.visible(row.answer or ending), 'answer')}")


if __name__ == "__main__":
    run_script(main)
