"""Stage 3: test a policy with a real search engine, beside what it began as; or ask it a question.

    python evaluate.py                                  # the newest run (or makes one), BM25
    python evaluate.py --ask "how long is the warranty?" --policy MODEL --corpus handbook.txt
    accelerate launch evaluate.py --policy DIR --data paper --engine http --engine_url URL

The policy answers greedily, and every question counts. A policy that was trained here remembers
its limits, its documents and its questions: they are used where the flags are silent. A test that
was interrupted goes on where it was when the same command is given again.
"""

from dataclasses import replace
from pathlib import Path
from shlex import quote

from minizs import require
from minizs.evaluation.outputs import check_figures_path
from minizs.runs import data, run_folder
from minizs.runs.flags import check_values, given, parse, run_script, set_threads
from minizs.runs.settings import EvalConfig, check_search, has_noisy_test


def main(argv: list[str]) -> None:
    config, memory = read_settings(argv)
    check_settings(config)
    set_threads(config.threads)
    # These are slow to import: what is wrong with the flags has been said by now.
    from minizs.evaluation import stage3
    from minizs.runs import build

    accelerator = build.make_accelerator(config)
    for sentence in opening_sentences(config, memory, argv):
        accelerator.print(sentence)

    if config.ask:
        stage3.answer_question(config, accelerator)
        return

    role = "dev" if "data" in memory else "test"  # never what the policy was trained on
    examples = stage3.load_questions(config, role, accelerator)
    if not config.policy:
        config.policy = stage3.train_first_policy(config, examples, accelerator)
    names = stage3.policies_to_compare(config, accelerator)
    build.check_lengths(config, names, examples)
    # All weights are read before any answer, so that none is lost to what cannot be read.
    policies = {name: stage3.load_policy(config, name, accelerator) for name in names}
    engine = build.build_engine(config, "test", accelerator, examples)
    stage3.compare(config, accelerator, examples, policies, engine)


def read_settings(argv: list[str]) -> tuple[EvalConfig, dict]:
    """The settings, and those of them that come from the policy's training: where the flags say
    nothing, it is tested as it was trained. Raises UserError.

    Without `--policy` it is the newest run's; "" where there is none yet.
    """
    config = parse(EvalConfig, argv)
    newest = run_folder.newest_run()
    if not config.policy and newest:
        config.policy = str(newest / "policy")
    training = run_folder.trained_with(Path(config.policy)) if config.policy else {}
    for name in {"base"} | given(EvalConfig, argv):
        training.pop(name, None)
    if config.ask:
        check_ask(config, training)
    default = EvalConfig()
    memory = {}  # the settings that the policy brings along
    for name, value in training.items():
        if has_use(config, name, training) and value != getattr(default, name):
            memory[name] = value
    config = replace(config, **memory)
    check_values(config)
    check_files_of_training(config, memory)
    return config, memory


def has_use(config: EvalConfig, name: str, training: dict) -> bool:
    """Whether a setting of the training, on which the flags are silent, concerns this test."""
    if name == "data":
        return not config.ask  # whose one question is given
    if name == "corpus":
        # The tiny world has documents of its own.
        tests_world = not config.ask and "data" not in training and config.data == "world"
        return config.engine == "bm25" and not tests_world
    return True


def check_ask(config: EvalConfig, training: dict) -> None:
    """Raise UserError for a policy that knows other documents than the world's, and no corpus."""
    data_of_training = training.get("data", "world")
    corpus = config.corpus or training.get("corpus", "")
    require(
        config.engine != "bm25" or data_of_training == "world" or bool(corpus),
        f"{config.policy} was trained on {data_of_training}, without a corpus: give --corpus FILE, "
        "or another --engine.",
    )


def check_files_of_training(config: EvalConfig, memory: dict) -> None:
    """Raise UserError for a file that the policy was trained with and that is not here."""
    files = [("--data", path) for path in data.split_spec(memory.get("data", ""))]
    files.append(("--corpus", memory.get("corpus", "")))
    for flag, path in files:
        require(
            not data.looks_like_a_file(path) or Path(path).is_file(),
            f"{config.policy} was trained with {flag} {path}, which is not here: give {flag} with "
            "another file, or start this where the training was started.",
        )


def check_settings(config: EvalConfig) -> None:
    """Raise UserError for what is wrong with the settings, before anything expensive starts."""
    from minizs.models import loading

    check_search(replace(config, policy=config.policy or "tiny"))
    if config.before not in ("auto", "none"):
        loading.check_model(config.before)
    require(
        not config.engine_noise or config.method == "search",
        f"--engine_noise is for --method search; with --method {config.method} leave it out.",
    )
    require(config.ask is None or bool(config.ask.strip()), "--ask needs a question.")
    if not config.ask:
        check_figures_path(config)


def opening_sentences(config: EvalConfig, memory: dict, argv: list[str]) -> list[str]:
    """Which policy is tested, and what it brings along from its training."""
    sentences = []
    if config.policy and "policy" not in given(EvalConfig, argv):
        sentences.append(
            f"The policy is that of {run_folder.describe_run(Path(config.policy).parent)}"
        )
    if memory:
        flags = ", ".join(f"--{name} {quote(str(value))}" for name, value in memory.items())
        sentences.append(f"As in its training, where no flag says otherwise: {flags}.")
    trained_on = run_folder.trained_with(Path(config.policy)).get("data", "world")
    knows_questions = config.data == trained_on and trained_on != "world" and not config.ask
    if knows_questions and "data" not in memory:
        sentences.append(
            "The policy was trained on most of these questions. Without --data it is tested on the "
            "others alone."
        )
    wants_noisy_test = "eval_noise" in given(EvalConfig, argv) and config.eval_noise > 0
    if wants_noisy_test and not has_noisy_test(config):
        sentences.append(
            "--eval_noise has no effect here: a second, noisy test is for --engine bm25, --method "
            "search and --engine_noise 0."
        )
    if "data" in memory:
        sentences.append("It is tested on those of these questions that it was not trained on.")
    return sentences


if __name__ == "__main__":
    run_script(main, settings=EvalConfig)
