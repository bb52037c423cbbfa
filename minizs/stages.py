"""What the scripts share: which engine a setting means, the default simulator, held-out tests."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from minizs import data, models, runs
from minizs.config import UserError, require
from minizs.protocol import build_prompt
from minizs.trajectory import Example

DEFAULT_SIMULATOR = runs.RUNS / "simulator"


def check_engine(config) -> None:
    """Raise UserError where the engine that the settings name cannot be had."""
    if config.engine == "simulator" and config.simulator:
        models.check_model(config.simulator)
    if config.engine == "bm25" and config.data != "world":
        require(bool(config.corpus), "--engine bm25 on your own --data needs --corpus FILE.")
        require(
            Path(config.corpus).is_file(), f"There is no corpus {config.corpus!r}; check the path."
        )


def check_prompts(policy: str, examples: list[Example], context: int) -> None:
    """Raise UserError for a question whose prompt leaves no room in the context."""
    tokenizer, template = models.load_tokenizer(policy), models.load_prompt(policy)
    prompts = [build_prompt(example.question, template) for example in examples]
    longest = max(map(len, tokenizer(prompts)["input_ids"]))
    require(longest < context, f"--max_context {context} is too small: the longest prompt has "
            f"{longest} tokens.")  # fmt: skip


def make_default_simulator() -> Path:
    """`runs/simulator`, made by `train_sim.py` in a process of its own if it is not there yet."""
    if not (DEFAULT_SIMULATOR / "config.json").is_file():
        print(f"There is no simulator in {DEFAULT_SIMULATOR} yet: making it (stage 1).", flush=True)
        script = Path(__file__).parent.parent / "train_sim.py"
        # It is a run of one process, whatever this one is part of.
        distributed = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
        environment = {k: v for k, v in os.environ.items() if k not in distributed}
        command = [sys.executable, str(script), "--output", str(DEFAULT_SIMULATOR)]
        if subprocess.run(command, env=environment).returncode:
            raise UserError("The default simulator could not be made; see the message above.")
    return DEFAULT_SIMULATOR


def simulated_engine(folder: str, config, device):
    """The simulator of this folder. It writes no more than a policy may be shown."""
    from minizs.simulator import SimulatedSearch, load_template

    model, tokenizer = models.load(folder, device)
    return SimulatedSearch(model, tokenizer, load_template(folder), config.top_k, config.seed,
                           config.simulator_temperature, config.max_document_tokens)  # fmt: skip


def real_engine(config, role: str):
    """BM25 over the tiny world's documents of this role, or over the lines of `--corpus`."""
    from minizs.engines import BM25, NoDocuments

    if config.engine == "none":
        return NoDocuments()
    if config.corpus:
        lines = [line.strip() for line in Path(config.corpus).read_text().splitlines()]
        documents = [line for line in lines if line]
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
    """The output folder of these settings, the same one on every process."""
    from accelerate.utils import broadcast_object_list

    chosen = [config.output or str(runs.output_folder(kind, config.resume))]
    broadcast_object_list(chosen)
    return Path(chosen[0])


def held_out(config, accelerator, model, tokenizer, template: str, engine) -> Callable[[], dict]:
    """A function that answers held-out questions greedily and gives f1, em and searches a question.

    In the tiny world these are another world's, with BM25 over its documents; questions of a file
    have no second half here, and are answered with the training engine.
    """
    from minizs.evaluation import answer_all

    examples = data.load(config.data, "dev")[: config.eval_questions]
    if config.data == "world":
        from minizs.engines import BM25
        from minizs.world import embedded

        world = embedded("dev")
        engine = BM25(world.documents, config.top_k, world.judge)
    rank, processes = accelerator.process_index, accelerator.num_processes

    def evaluate() -> dict[str, float]:
        from minizs import metrics

        rows = answer_all(model, tokenizer, examples[rank::processes], engine, temperature=0.0,
                          limits=limits(config), template=template)  # fmt: skip
        return metrics.of_scores(accelerator, rows)

    return evaluate


def limits(config):
    """The rollout limits that the settings name."""
    from minizs.rollout import Limits

    return Limits(
        config.max_turns, config.max_turn_tokens, config.max_document_tokens, config.max_context
    )
