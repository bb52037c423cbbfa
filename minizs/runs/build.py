"""What the scripts share: loading, which engine a setting means, the default simulator, tests."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from minizs import UserError, brief, require, simulator
from minizs.engines.bm25 import BM25
from minizs.engines.cache import Cached
from minizs.engines.client import Client
from minizs.engines.http import HttpSearch
from minizs.engines.ranking import NoDocuments
from minizs.engines.served import ServedModel, ServedSearch
from minizs.engines.web import SERPER, WebSearch
from minizs.models import loading, weights
from minizs.protocol import build_prompt, prompt_ids
from minizs.rollout import Limits, Policy, rollout
from minizs.runs import data, run_folder
from minizs.runs.evaluation import answer_all, summary
from minizs.runs.settings import URL, SearchConfig
from minizs.trajectory import Example, SearchRequest
from minizs.world.facts import embedded


def load(config: SearchConfig, name: str, device: torch.device, dtype: torch.dtype | None = None):
    """(model, tokenizer) of a policy; `dtype` is the weights', if not what is computed in."""
    computed = compute_dtype(config)
    attention = loading.choose_attention(config.attention, loading.device(), computed)
    return loading.load_model(
        name,
        device,
        dtype or computed,
        attention=attention,
        chat_template=config.chat_template,
    )


def compute_dtype(config: SearchConfig) -> torch.dtype:
    """What generation and forward passes compute in."""
    return weights.named_dtype(config.dtype, loading.device())


def limits(config: SearchConfig) -> Limits:
    return Limits(
        config.max_turns, config.max_turn_tokens, config.max_document_tokens, config.max_context
    )


def check_lengths(config: SearchConfig, policies: list[str], examples: list[Example]) -> None:
    """Raise UserError for a question whose prompt leaves a policy no room in its context."""
    for name in policies:
        tokenizer = loading.load_tokenizer(name, config.chat_template)
        template = loading.load_prompt(name)
        texts = [build_prompt(e.question, template, tokenizer) for e in examples]
        longest, limit = max(map(len, prompt_ids(tokenizer, texts))), config.max_context
        require(longest < limit, f"--max_context {limit} is too small: a prompt has {longest}.")


def make_default_simulator() -> Path:
    """`runs/simulator`, made by stage 1 if it is not there yet."""
    folder = run_folder.RUNS / "simulator"
    if not (folder / "config.json").is_file():
        run_stage("train_sim.py")
    return folder


def run_stage(script: str) -> None:
    """Run a script to its end, as one process, whatever this one is part of."""
    print(f"{script} makes what is not there yet.", flush=True)
    distributed = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
    environment = {k: v for k, v in os.environ.items() if k not in distributed}
    command = [sys.executable, str(Path(__file__).parent.parent.parent / script)]
    status = subprocess.run(command, env=environment).returncode
    require(status == 0, f"{script}, which this needs, has failed; see the message above.")


def build_engine(config: SearchConfig, role: str, accelerator, examples: Sequence[Example] = ()):
    """The engine that the settings name. In the tiny world a role is train, dev or test."""
    if config.engine == "none":
        return NoDocuments()
    if config.engine == "bm25":
        return bm25(config, role)
    if config.engine == "simulator":
        return simulated(config, accelerator, examples)
    if config.engine == "web":
        key = api_key("SERPER_API_KEY")
        require(bool(key), "Set SERPER_API_KEY, the key of serper.dev, for --engine web.")
        url = SERPER
        engine = WebSearch(client(config, url, {"X-API-KEY": key}), config.top_k)
    else:
        url, wiki = config.engine_url, config.engine_api == "zerosearch"
        engine = HttpSearch(client(config, url), config.top_k, wiki=wiki)
        if not config.cache:  # which may hold all replies
            engine.client.reach()
    return Cached(engine, config.cache, url) if config.cache else engine


def bm25(config: SearchConfig, role: str) -> BM25:
    """BM25 over `--corpus`, or over the tiny world's documents of this role."""
    if config.corpus:
        return BM25.of_corpus(config.corpus, config.top_k)
    world = embedded(role)
    return BM25(world.documents, config.top_k, world.judge)


def api_key(variable: str) -> str:
    """A service's key, "" if there is none. UserError for letters that no header takes."""
    key = os.environ.get(variable, "").strip()
    require(key.isascii() and key.isprintable(), f"The key in {variable} is none; set it anew.")
    return key


def client(config: SearchConfig, urls: str, headers: dict[str, str] | None = None) -> Client:
    return Client(urls, config.timeout, config.retries, headers, on_error=config.on_search_error)


def simulated(config: SearchConfig, accelerator, examples: Sequence[Example] = ()):
    """A server's, or a model here, with room for these. It writes no more than may be shown."""
    writes = (config.top_k, config.seed, config.simulator_temperature, config.max_document_tokens)
    if config.simulator.startswith(URL):
        template = simulator.load_template(config.simulator_template or "tuned")
        key = api_key("SIMULATOR_API_KEY")  # for a server that asks for one
        asked = client(config, config.simulator, {"Authorization": f"Bearer {key}"} if key else {})
        asked.reach()
        served = ServedModel(
            asked,
            config.simulator_model,
            config.simulator_api,
            temperature=config.simulator_temperature,
            max_new_tokens=config.max_document_tokens,
        )
        return ServedSearch(served, template, config.top_k, config.seed)
    loading.check_model(config.simulator or "tiny", config.max_document_tokens)
    with accelerator.main_process_first():  # which makes the default one where there is none
        folder = loading.resolve(config.simulator or str(make_default_simulator()))
    place = config.simulator_device or accelerator.device
    with loading.readable(folder):  # on a device that may not be there
        model, tokenizer = loading.load_model(
            folder, place, weights.named_dtype(config.dtype, place)
        )
    template = simulator.load_template(config.simulator_template or folder)
    asked = (SearchRequest("", example.question, example.answers) for example in examples)
    texts = [simulator.prompt(template, request, config.top_k, tokenizer) for request in asked]
    longest = max(map(len, prompt_ids(tokenizer, texts or [""])))
    loading.check_model(folder, longest + config.max_turn_tokens + config.max_document_tokens)
    return simulator.SimulatedSearch(model, tokenizer, template, *writes)


def agreed_folder(accelerator, config: SearchConfig) -> Path:
    """The output folder, the same one on every process; a new run's is made."""
    from accelerate.utils import broadcast_object_list

    made = accelerator.is_main_process and not config.output and run_folder.new_folder()
    return Path(broadcast_object_list([made or config.output])[0])


def held_out(config, accelerator, writer, tokenizer, template: str) -> Callable[[], dict] | None:
    """A function that tests the model, `writer()`, on held-out questions, greedily with BM25; or
    None without a corpus: the simulator, which sees the golds, would be no test."""
    if not config.eval_every:
        return None
    examples = data.spread(data.load_examples(config.data, "dev"), config.eval_questions)
    if not examples or config.data != "world" and not config.corpus:
        return accelerator.print("No evaluation while it trains: it takes questions and --corpus.")
    engine = bm25(config, "dev")

    def evaluate() -> dict[str, float]:
        policy = make_policy(config, writer(), tokenizer, template, temperature=0.0)
        answer = partial(rollout, policy, engine=engine)
        rows = answer_all(answer, examples, accelerator)
        return summary(rows) if rows else {}

    return evaluate


def make_policy(
    config: SearchConfig, model, tokenizer, template: str, temperature: float
) -> Policy:
    """The policy with the limits and the seed of the settings."""
    return Policy(model, tokenizer, template, limits(config), temperature, config.seed)


def make_accelerator(config: SearchConfig):
    """Accelerate, computing in the settings' type. Raises UserError for what it cannot shard."""
    from accelerate import Accelerator, DistributedDataParallelKwargs

    precision = "bf16" if compute_dtype(config) == torch.bfloat16 else "no"
    # Else a model with tied weights would come untied, and all but one process load nothing.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"  # to read sharded ones runs a pickle
    buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # no second gradients
    try:
        accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[buckets])
    except (ImportError, ValueError) as error:
        raise UserError(f"Accelerate cannot start, mend its settings: {brief(error)}") from error
    sharded = accelerator.distributed_type in ("FSDP", "DEEPSPEED")
    require(accelerator.is_fsdp2 or not sharded, "To shard a model use FSDP2, as configs/ does.")
    if sharded and precision == "bf16":  # else log-probabilities and sums would be rounded
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )
    return accelerator
