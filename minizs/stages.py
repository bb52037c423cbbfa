"""What the scripts share: which engine a setting means, the default simulator, held-out tests."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from minizs import data, models, runs
from minizs.config import UserError, require
from minizs.protocol import build_prompt
from minizs.trajectory import Example, SearchRequest

DEFAULT_SIMULATOR = runs.RUNS / "simulator"


def check_engine(config) -> None:
    """Raise UserError where the engine that the settings name cannot be had."""
    if config.engine == "simulator" and config.simulator:
        models.check_model(config.simulator)
    if config.engine == "bm25" and config.data != "world":
        require(bool(config.corpus), "--engine bm25 on your own --data needs --corpus FILE.")
    there = not config.corpus or Path(config.corpus).is_file()
    require(there, f"There is no corpus {config.corpus!r}; check the path.")


def check_prompts(policy: str, examples: list[Example], context: int) -> None:
    """Raise UserError for a question whose prompt leaves no room in the context."""
    template = models.load_prompt(policy)
    longest = _longest(policy, [build_prompt(e.question, template) for e in examples])
    require(longest < context, f"--max_context {context} is too small: the longest prompt has "
            f"{longest} tokens.")  # fmt: skip


def check_simulator(config, examples: list[Example]) -> None:
    """Raise UserError for a question on which the simulator could run out of positions."""
    from transformers import AutoConfig

    from minizs.simulator import load_template, prompt

    made = DEFAULT_SIMULATOR if _is_made() else "tiny"  # what it will be made from
    folder = models.resolve(config.simulator or str(made))
    template = load_template(folder)
    requests = [SearchRequest("", e.question, e.answers) for e in examples]
    longest = _longest(folder, [prompt(template, r, config.top_k) for r in requests])
    needed = longest + config.max_turn_tokens + config.max_document_tokens  # query and reply
    limit = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", needed)
    require(needed <= limit, f"The simulator {folder} has {limit} positions and may need {needed}; "
            "lower --max_document_tokens or --max_turn_tokens.")  # fmt: skip


def _longest(model: str, prompts: list[str]) -> int:
    """Tokens of the longest."""
    return max(map(len, models.load_tokenizer(model)(prompts)["input_ids"]))


def _is_made() -> bool:
    return (DEFAULT_SIMULATOR / "config.json").is_file()


def make_default_simulator() -> Path:
    """`runs/simulator`, made by stage 1 if it is not there yet."""
    if not _is_made():
        print(f"There is no simulator in {DEFAULT_SIMULATOR} yet: making it (stage 1).", flush=True)
        run_stage("train_sim.py", "--output", str(DEFAULT_SIMULATOR))
    return DEFAULT_SIMULATOR


def newest_policy() -> Path:
    """The policy of the newest finished run, made by stage 2 if there is none yet."""
    if runs.newest_run() is None:
        print(f"There is no finished run in {runs.RUNS} yet: making one (stage 2).", flush=True)
        run_stage("train_policy.py")
    return runs.newest_run() / "policy"


def run_stage(script: str, *flags: str) -> None:
    """Run a script to its end. Its run has one process, whatever this one is part of."""
    distributed = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
    environment = {k: v for k, v in os.environ.items() if k not in distributed}
    command = [sys.executable, str(Path(__file__).parent.parent / script), *flags]
    done = subprocess.run(command, env=environment).returncode == 0
    require(done, f"{script}, which this needs, has failed; see the message above.")


def simulated_engine(folder: str, config, device):
    """The simulator of this folder. It writes no more than a policy may be shown."""
    from minizs.simulator import SimulatedSearch, load_template

    model, tokenizer = models.load(folder, device)
    template = load_template(models.resolve(folder))
    return SimulatedSearch(model, tokenizer, template, config.top_k, config.seed,
                           config.simulator_temperature, config.max_document_tokens)  # fmt: skip


def real_engine(config, role: str):
    """BM25 over the tiny world's documents of this role, or over the lines of `--corpus`."""
    from minizs.engines import BM25, NoDocuments

    if config.engine == "none":
        return NoDocuments()
    if config.corpus:
        try:
            text = Path(config.corpus).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"The corpus {config.corpus} is no text file: {error}.") from error
        documents = [line.strip() for line in text.splitlines() if line.strip()]
        require(bool(documents), f"The corpus {config.corpus} is empty.")
        return BM25(documents, config.top_k)
    from minizs.world import embedded

    world = embedded(role)
    return BM25(world.documents, config.top_k, world.judge)


def training_engine(config, accelerator):
    """What answers the searches in training. One process makes the simulator if there is none."""
    if config.engine != "simulator":
        return real_engine(config, "train")
    with accelerator.main_process_first():
        folder = config.simulator or str(make_default_simulator())
    return simulated_engine(folder, config, accelerator.device)


def agreed_folder(accelerator, config, kind: str) -> Path:
    """The output folder of these settings, the same one on every process, made if it is new."""
    from accelerate.utils import broadcast_object_list

    chosen = [config.output]
    if accelerator.is_main_process and not config.output:
        chosen = [str(runs.new_folder(kind))]
    broadcast_object_list(chosen)
    return Path(chosen[0])


def held_out(config, accelerator, model, tokenizer, template: str) -> Callable[[], dict] | None:
    """A function that answers held-out questions greedily, with BM25: the figures of all processes.

    In the tiny world these are another world's, with its documents; of a file, the questions that
    are not trained on, with `--corpus`. None where there are no such questions or no corpus: the
    simulator, which sees the gold answers, would be no test.
    """
    from accelerate.utils import gather_object

    from minizs.evaluation import answer_all, summary

    if not config.eval_every:
        return None
    examples = data.spread(data.load(config.data, "dev"), config.eval_questions)
    if not examples or config.data != "world" and not config.corpus:
        lacking = "a --corpus" if examples else "held-out questions"
        accelerator.print(f"No evaluation while it trains: {config.data} lacks {lacking}.")
        return None
    engine = real_engine(config, "dev")
    mine = range(accelerator.process_index, len(examples), accelerator.num_processes)

    def evaluate() -> dict[str, float]:
        rows = answer_all(model, tokenizer, [examples[i] for i in mine], engine,
                          keys=[(i,) for i in mine], temperature=0.0, limits=limits(config),
                          template=template)  # fmt: skip
        return summary(gather_object(rows))

    return evaluate


def limits(config):
    """The rollout limits that the settings name."""
    from minizs.rollout import Limits

    return Limits(config.max_turns, config.max_turn_tokens, config.max_document_tokens,
                  config.max_context)  # fmt: skip
