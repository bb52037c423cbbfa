"""What the scripts share: loading, which engine a setting means, the default simulator, tests."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from minizs import data, engines, models, remote, runs, simulator
from minizs.client import Client
from minizs.config import require
from minizs.options import SearchConfig, is_url
from minizs.protocol import build_prompt, prompt_ids
from minizs.rollout import Limits, rollout
from minizs.trajectory import Example, SearchRequest

DEFAULT_SIMULATOR = runs.RUNS / "simulator"


def load(config: SearchConfig, name: str, device: torch.device, dtype: torch.dtype):
    """(model, tokenizer) of a policy as the settings want them; `dtype` is the weights'."""
    attention = models.choose_attention(config.attention, models.device(), compute_dtype(config))
    return models.load(name, device, dtype, revision=revision(config, name), attention=attention,
                       chat_template=config.chat_template)  # fmt: skip


def revision(config: SearchConfig, name: str) -> str | None:
    """`--revision`, but not of the model that a policy is compared with."""
    return None if name == getattr(config, "before", None) else config.revision or None


def compute_dtype(config: SearchConfig) -> torch.dtype:
    """What generation and forward passes compute in."""
    return models.compute_dtype(config.dtype, models.device())


def limits(config: SearchConfig) -> Limits:
    return Limits(config.max_turns, config.max_turn_tokens, config.max_document_tokens,
                  config.max_context)  # fmt: skip


def check_prompts(config: SearchConfig, policy: str, examples: list[Example]) -> None:
    """Raise UserError for a question whose prompt leaves no room in the context."""
    tokenizer = models.load_tokenizer(policy, config.chat_template, revision(config, policy))
    template = models.load_prompt(policy)
    longest = _longest(tokenizer, [build_prompt(e.question, template) for e in examples])
    require(longest < config.max_context, f"--max_context {config.max_context} is too small: the "
            f"longest prompt has {longest} tokens.")  # fmt: skip


def check_simulator(config: SearchConfig, examples: list[Example]) -> None:
    """Raise UserError for a question on which a local simulator could run out of positions."""
    from transformers import AutoConfig

    if is_url(config.simulator):
        return
    made = DEFAULT_SIMULATOR if _is_made() else "tiny"  # what it will be made from
    folder = models.resolve(config.simulator or str(made))
    template = simulator.load_template(config.simulator_template or folder)
    requests = [SearchRequest("", e.question, e.answers) for e in examples]
    longest = _longest(models.load_tokenizer(folder),
                       [simulator.prompt(template, r, config.top_k) for r in requests])  # fmt: skip
    needed = longest + config.max_turn_tokens + config.max_document_tokens  # query and reply
    limit = getattr(AutoConfig.from_pretrained(folder), "max_position_embeddings", needed)
    require(needed <= limit, f"The simulator {folder} has {limit} positions and may need {needed}; "
            "lower --max_document_tokens or --max_turn_tokens.")  # fmt: skip


def _longest(tokenizer, prompts: list[str]) -> int:
    """Tokens of the longest."""
    return max(map(len, prompt_ids(tokenizer, prompts)))


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


def build_engine(config: SearchConfig, role: str, accelerator):
    """The engine that the settings name. In the tiny world a role is train, dev or test."""
    if config.engine == "none":
        return engines.NoDocuments()
    if config.engine == "bm25":
        return bm25(config, role)
    if config.engine == "simulator":
        return simulated(config, accelerator)
    if config.engine == "http":
        engine = remote.HttpSearch(client(config, config.engine_url), config.top_k,
                                   wiki=config.engine_api == "zerosearch")  # fmt: skip
    else:
        engine = remote.WebSearch(config.web, config.top_k, timeout=config.timeout,
                                  retries=config.retries)  # fmt: skip
    name = config.web if config.engine == "web" else config.engine_url
    return remote.Cached(engine, config.cache, name) if config.cache else engine


def bm25(config: SearchConfig, role: str):
    """BM25 over `--corpus`, or over the tiny world's documents of this role."""
    if config.corpus:
        return engines.BM25.of_corpus(config.corpus, config.top_k)
    from minizs.world import embedded

    world = embedded(role)
    return engines.BM25(world.documents, config.top_k, world.judge)


def client(config: SearchConfig, urls: str) -> Client:
    key = os.environ.get("SIMULATOR_API_KEY", "").strip()  # for a server that asks for one
    headers = {"Authorization": f"Bearer {key}"} if key and urls == config.simulator else None
    return Client(urls, timeout=config.timeout, retries=config.retries, headers=headers)


def simulated(config: SearchConfig, accelerator):
    """The simulator: a server's, or a model here. It writes no more than a policy may be shown.

    One process makes the default one where there is none.
    """
    writes = (config.top_k, config.seed, config.simulator_temperature, config.max_document_tokens)
    if is_url(config.simulator):
        template = simulator.load_template(config.simulator_template or "tuned")
        return simulator.ServedSearch(client(config, config.simulator), config.simulator_model,
                                      template, *writes, api=config.simulator_api)  # fmt: skip
    with accelerator.main_process_first():
        folder = models.resolve(config.simulator or str(make_default_simulator()))
    place = torch.device(config.simulator_device or accelerator.device)
    model, tokenizer = models.load(folder, place, models.compute_dtype(config.dtype, place))
    template = simulator.load_template(config.simulator_template or folder)
    return simulator.SimulatedSearch(model, tokenizer, template, *writes)


def agreed_folder(accelerator, config: SearchConfig, kind: str) -> Path:
    """The output folder of these settings, the same one on every process, made if it is new."""
    from accelerate.utils import broadcast_object_list

    chosen = [config.output]
    if accelerator.is_main_process and not config.output:
        chosen = [str(runs.new_folder(kind))]
    broadcast_object_list(chosen)
    return Path(chosen[0])


def held_out(config, accelerator, writer, tokenizer, template: str) -> Callable[[], dict] | None:
    """A function that answers held-out questions greedily, with BM25: the figures of all processes.

    In the tiny world these are another world's, with its documents; of a file, the questions that
    are not trained on, with `--corpus`. None where there are no such questions or no corpus: the
    simulator, which sees the gold answers, would be no test. `writer()` is the model.
    """
    from minizs.evaluation import answer_all, summary

    if not config.eval_every:
        return None
    examples = data.spread(data.load(config.data, "dev"), config.eval_questions)
    if not examples or config.data != "world" and not config.corpus:
        lacking = "a --corpus" if examples else "held-out questions"
        accelerator.print(f"No evaluation while it trains: {config.data} lacks {lacking}.")
        return None
    engine = bm25(config, "dev")

    def evaluate() -> dict[str, float]:
        rows = answer_all(searcher(config, writer(), tokenizer, template, engine, 0.0), examples,
                          accelerator)  # fmt: skip
        return summary(rows) if rows else {}

    return evaluate


def searcher(config, model, tokenizer, template: str, engine, temperature: float, **options):
    """`rollout` with the limits of the settings: a function of examples and their keys."""
    return partial(rollout, model, tokenizer, engine=engine, limits=limits(config),
                   temperature=temperature, template=template, **options)  # fmt: skip


def make_accelerator(config: SearchConfig):
    """Accelerate, computing in the settings' type. Raises UserError for what it cannot shard."""
    from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType

    half = compute_dtype(config) == torch.bfloat16
    # Else a model with tied weights would come untied, and all but one process load nothing.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    accelerator = Accelerator(
        mixed_precision="bf16" if half else "no",
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    kind = accelerator.distributed_type
    require(kind != DistributedType.DEEPSPEED and (kind != DistributedType.FSDP or
            accelerator.is_fsdp2), "To shard a model use FSDP2: fsdp_version: 2 in Accelerate's "
            "configuration (see configs/).")  # fmt: skip
    if kind == DistributedType.FSDP and half:
        # Else the scorer's float32 log-probabilities and sums of gradients would be rounded.
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None,
                                                reduce_dtype=torch.float32)  # fmt: skip
    return accelerator
