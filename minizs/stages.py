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
from minizs.config import UserError, brief, require
from minizs.options import SearchConfig, is_url
from minizs.protocol import build_prompt, prompt_ids
from minizs.rollout import Limits, rollout
from minizs.trajectory import Example, SearchRequest

DEFAULT_SIMULATOR = runs.RUNS / "simulator"
MADE = DEFAULT_SIMULATOR / "config.json"  # is there as soon as the simulator is


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
    longest = _longest(tokenizer, [build_prompt(e.question, template, tokenizer) for e in examples])
    require(longest < config.max_context, f"--max_context {config.max_context} is too small: the "
            f"longest prompt has {longest} tokens.")  # fmt: skip


def check_simulator(config: SearchConfig, examples: list[Example]) -> None:
    """Raise UserError for a question on which a local simulator could run out of positions."""
    from transformers import AutoConfig

    if is_url(config.simulator):
        return
    made = str(DEFAULT_SIMULATOR) if MADE.is_file() else "tiny"  # what it will be made from
    folder = models.resolve(config.simulator or made)
    template = simulator.load_template(config.simulator_template or folder)
    tokenizer = models.load_tokenizer(folder)
    requests = [SearchRequest("", e.question, e.answers) for e in examples]
    longest = _longest(tokenizer, [simulator.prompt(template, request, config.top_k, tokenizer)
                                   for request in requests])  # fmt: skip
    needed = longest + config.max_turn_tokens + config.max_document_tokens  # query and reply
    with models.readable(folder):
        settings = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    limit = getattr(settings, "max_position_embeddings", needed)
    require(needed <= limit, f"The simulator {folder} has {limit} positions and may need {needed}; "
            "lower --max_document_tokens or --max_turn_tokens.")  # fmt: skip


def _longest(tokenizer, prompts: list[str]) -> int:
    return max(map(len, prompt_ids(tokenizer, prompts)))


def make_default_simulator() -> Path:
    """`runs/simulator`, made by stage 1 if it is not there yet."""
    if not MADE.is_file():
        run_stage(DEFAULT_SIMULATOR, "train_sim.py", "--output", str(DEFAULT_SIMULATOR))
    return DEFAULT_SIMULATOR


def newest_policy() -> Path:
    """The policy of the newest finished run, made by stage 2 if there is none yet."""
    if runs.newest_run() is None:
        run_stage("A trained policy", "train_policy.py")
    return runs.newest_run() / "policy"


def run_stage(lacking: str | Path, script: str, *flags: str) -> None:
    """Run a script to its end, as one process, whatever this one is part of."""
    print(f"{lacking} is not there yet: {script} makes it.", flush=True)
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
    if config.engine == "web":
        key, url = os.environ.get("SERPER_API_KEY", "").strip(), remote.SERPER
        require(bool(key), "--engine web needs a key; set the variable SERPER_API_KEY to yours.")
        engine = remote.WebSearch(client(config, url, {"X-API-KEY": key}), config.top_k)
    else:
        url, wiki = config.engine_url, config.engine_api == "zerosearch"
        engine = remote.HttpSearch(client(config, url), config.top_k, wiki=wiki)
    return remote.Cached(engine, config.cache, url) if config.cache else engine


def bm25(config: SearchConfig, role: str):
    """BM25 over `--corpus`, or over the tiny world's documents of this role."""
    if config.corpus:
        return engines.BM25.of_corpus(config.corpus, config.top_k)
    from minizs.world import embedded

    world = embedded(role)
    return engines.BM25(world.documents, config.top_k, world.judge)


def client(config: SearchConfig, urls: str, headers: dict[str, str] | None = None) -> Client:
    for key in (headers or {}).values():
        require(key.isascii() and key.isprintable(), "The key in SERPER_API_KEY or "
                "SIMULATOR_API_KEY holds letters that no key has; set it anew.")  # fmt: skip
    return Client(urls, config.timeout, config.retries, headers, config.on_search_error)


def simulated(config: SearchConfig, accelerator):
    """The simulator: a server's, or a model here. It writes no more than a policy may be shown."""
    writes = (config.top_k, config.seed, config.simulator_temperature, config.max_document_tokens)
    if is_url(config.simulator):
        template = simulator.load_template(config.simulator_template or "tuned")
        key = os.environ.get("SIMULATOR_API_KEY", "").strip()  # for a server that asks for one
        asked = client(config, config.simulator, {"Authorization": f"Bearer {key}"} if key else {})
        return simulator.ServedSearch(asked, config.simulator_model, template, *writes,
                                      api=config.simulator_api)  # fmt: skip
    with accelerator.main_process_first():  # which makes the default one where there is none
        folder = models.resolve(config.simulator or str(make_default_simulator()))
    try:
        place = torch.empty(0, device=config.simulator_device or accelerator.device).device
    except (AssertionError, RuntimeError) as error:
        raise UserError(f"--simulator_device is of no use here: {brief(error)}") from error
    model, tokenizer = models.load(folder, place, models.compute_dtype(config.dtype, place))
    template = simulator.load_template(config.simulator_template or folder)
    return simulator.SimulatedSearch(model, tokenizer, template, *writes)


def agreed_folder(accelerator, config: SearchConfig, kind: str) -> Path:
    """The output folder of these settings, the same one on every process, made if it is new."""
    from accelerate.utils import broadcast_object_list

    new = accelerator.is_main_process and not config.output
    chosen = str(runs.new_folder(kind)) if new else config.output
    return Path(broadcast_object_list([chosen])[0])


def held_out(config, accelerator, writer, tokenizer, template: str) -> Callable[[], dict] | None:
    """A function that answers held-out questions greedily, with BM25: the figures of all processes.

    In the tiny world these are another world's, with its documents; of a file, the questions that
    are not trained on, with `--corpus`. None where there are no such questions or no corpus: the
    simulator, which sees the gold answers, would be no test. `writer()` is the model."""
    from minizs.evaluation import answer_all, summary

    if not config.eval_every:
        return None
    examples = data.spread(data.load(config.data, "dev"), config.eval_questions)
    if not examples or config.data != "world" and not config.corpus:
        lacking = "a --corpus" if examples else "held-out questions"
        return accelerator.print(f"No evaluation while it trains: {config.data} lacks {lacking}.")
    engine = bm25(config, "dev")

    def evaluate() -> dict[str, float]:
        answer = searcher(config, writer(), tokenizer, template, engine, 0.0)
        rows = answer_all(answer, examples, accelerator)
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
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if half else "no",
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)])
    except (ImportError, ValueError) as error:
        raise UserError(f"Accelerate cannot start, mend its settings: {brief(error)}") from error
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
