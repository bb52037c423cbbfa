"""What the settings mean: the objects that they name, made for a script.

Everything here takes settings and gives something that the scripts use: a policy, an engine,
Accelerate.
"""

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
from minizs.generate import check_decoding, generate
from minizs.judge import Judge
from minizs.models import loading, lora, weights
from minizs.models.chat import day_in_words
from minizs.protocol import build_prompt, prompt_ids
from minizs.rollout import Limits, Policy, rollout
from minizs.runs import run_folder
from minizs.runs.settings import (
    URL,
    EngineSettings,
    LimitSettings,
    ModelSettings,
    PolicyConfig,
    SearchConfig,
    ServiceSettings,
    SimConfig,
    read_day,
    read_template_args,
)
from minizs.trajectory import Example, SearchRequest, Trajectory
from minizs.world.facts import embedded

ROOT = Path(__file__).parent.parent.parent
# Variables that tell a process that it is one of several.
DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


# ---- The policy ----------------------------------------------------------------------------------


def compute_dtype(config: ModelSettings, name: str = "") -> torch.dtype:
    """What a model's generation and forward passes compute in. Without a name that is the model
    which is trained or tested."""
    if not name:
        name = config.base if isinstance(config, SimConfig) else config.policy
    return dtype_on(config, loading.device(), name)


def dtype_on(config: ModelSettings, device: torch.device | str, name: str) -> torch.dtype:
    """What the model of this name computes in on a device."""
    is_open = config.dtype == "auto" and torch.device(device).type == "cpu"
    return weights.named_dtype(config.dtype, device, loading.width(name) if is_open else 0)


def load_configured_model(
    config: ModelSettings, name: str, device: torch.device, dtype: torch.dtype | None = None
):
    """(model, tokenizer) of a policy. The weights are of `dtype`, or of the compute dtype."""
    computed = compute_dtype(config, name)
    attention = loading.choose_attention(config.attention, loading.device(), computed)
    return load_checked(
        name,
        device,
        dtype or computed,
        attention=attention,
        chat_template=config.chat_template,
        **template_options(config),
    )


def load_checked(name: str, *args, **options):
    """`load_model`, for a model that will generate. Raises UserError where it cannot."""
    model, tokenizer = loading.load_model(name, *args, **options)
    with loading.readable(name):
        check_decoding(model)
    return model, tokenizer


def template_options(config: ModelSettings) -> dict:
    """What chat templates are given besides the messages: arguments, and the day of the run."""
    return {
        "chat_template_args": read_template_args(config.chat_template_args),
        "day": read_day(config.day),
    }


def served_template_args(config: ModelSettings) -> dict:
    """The arguments for a server. Without any it gets no day either: some servers take none."""
    own = read_template_args(config.chat_template_args)
    return {"date_string": day_in_words(read_day(config.day)), **own} if own else {}


def load_trainable(config: PolicyConfig, accelerator):
    """(model, tokenizer) of the policy that is trained, on the CPU, with its LoRA if it has one.

    What the optimiser changes is float32: in bfloat16 small steps would be rounded away.
    """
    dtype = compute_dtype(config)
    weights_dtype = dtype if config.lora_rank else torch.float32
    model, tokenizer = load_configured_model(
        config, config.policy, torch.device("cpu"), weights_dtype
    )
    accelerator.print(f"Attention by {model.config._attn_implementation}, computed in {dtype}.")
    if config.freeze_embeddings:
        weights.freeze_embeddings(model, frozen_dtype(config, accelerator, model))
    if config.lora_rank:
        lora.add_lora(model, config.lora_rank, config.seed)
    return model, tokenizer


def merged_model(config: ModelSettings, base_name: str, adapter: Path):
    """A plain model: the base with the LoRA that was saved in the folder `adapter`."""
    base, _ = load_configured_model(config, base_name, torch.device("cpu"))
    return lora.merge_lora(base, adapter)


def frozen_dtype(config: ModelSettings, accelerator, model) -> torch.dtype:
    """In what frozen embeddings are kept: what is computed in. FSDP2 wants all weights in one
    format, and converts them itself."""
    return model.dtype if accelerator.is_fsdp2 else compute_dtype(config)


def limits(config: LimitSettings) -> Limits:
    return Limits(
        turns=config.max_turns,
        turn_tokens=config.max_turn_tokens,
        document_tokens=config.max_document_tokens,
        context=config.max_context,
    )


def make_policy(
    config: SearchConfig, model, tokenizer, template: str, temperature: float
) -> Policy:
    """The policy with the limits and the seed of the settings."""
    return Policy(
        model, tokenizer, template, limits(config), temperature, config.seed, config.cuda_graphs
    )


def make_player(
    config: PolicyConfig, writer: Callable, tokenizer, template: str, engine
) -> Callable[..., list[Trajectory]]:
    """A function that lets the policy as it is now, `writer()`, answer examples in groups."""

    def play(examples, keys, noise):
        policy = make_policy(config, writer(), tokenizer, template, config.temperature)
        return rollout(
            policy, examples, engine, group_size=config.group_size, keys=keys, noise=noise
        )

    return play


def check_lengths(config: SearchConfig, policies: list[str], examples: list[Example]) -> None:
    """Raise UserError for a question whose prompt leaves a policy no room in its context."""
    for name in policies:
        tokenizer = loading.load_tokenizer(name, config.chat_template, **template_options(config))
        template = loading.load_prompt(name)
        texts = [build_prompt(example.question, template, tokenizer) for example in examples]
        longest = longest_prompt(tokenizer, texts)
        require(
            longest < config.max_context,
            f"--max_context {config.max_context} is too small: a prompt has {longest} tokens.",
        )


def longest_prompt(tokenizer, texts: Sequence[str]) -> int:
    """The tokens of the longest of these prompts; 0 where there is none."""
    if not texts:
        return 0
    return max(len(ids) for ids in prompt_ids(tokenizer, texts))


# ---- The engine ----------------------------------------------------------------------------------


def build_engine(config: SearchConfig, role: str, accelerator, examples: Sequence[Example] = ()):
    """The engine that `--engine` names. Raises UserError.

    In the tiny world a `role`, "train", "dev" or "test", has documents of its own. A simulator
    that runs here has to have room for the `examples`, whose golds stand in its prompts.
    """
    match config.engine:
        case "none":
            return NoDocuments()
        case "bm25":
            return build_bm25(config, role)
        case "http":
            return build_http(config)
        case "web":
            return build_web(config)
        case "simulator":
            return build_simulator(config, accelerator, examples)
    raise ValueError(f"no engine is made for --engine {config.engine}")


def build_bm25(config: EngineSettings, role: str) -> BM25:
    """BM25 over `--corpus`, or over the tiny world's documents of this role."""
    if config.corpus:
        return BM25.of_corpus(config.corpus, config.top_k)
    world = embedded(role)
    return BM25(world.documents, config.top_k, world.judge)


def build_http(config: SearchConfig) -> HttpSearch | Cached:
    """A retriever's server. Without a cache, which may hold all replies, it has to be there."""
    client = build_client(config, config.engine_url)
    engine = HttpSearch(client, config.top_k, wiki=config.engine_api == "zerosearch")
    if config.cache:
        return Cached(engine, config.cache, config.engine_url)
    client.reach()
    return engine


def build_web(config: SearchConfig) -> WebSearch | Cached:
    key = api_key("SERPER_API_KEY")
    require(bool(key), "Set SERPER_API_KEY, the key of serper.dev, for --engine web.")
    engine = WebSearch(build_client(config, SERPER, {"X-API-KEY": key}), config.top_k)
    return Cached(engine, config.cache, SERPER) if config.cache else engine


def build_client(
    config: ServiceSettings, urls: str, headers: dict[str, str] | None = None
) -> Client:
    return Client(urls, config.timeout, config.retries, headers, on_error=config.on_search_error)


def api_key(variable: str) -> str:
    """A service's key, "" if there is none. UserError for letters that no header takes."""
    key = os.environ.get(variable, "").strip()
    require(key.isascii() and key.isprintable(), f"The key in {variable} is none; set it anew.")
    return key


# ---- The simulator -------------------------------------------------------------------------------


def build_simulator(config: SearchConfig, accelerator, examples: Sequence[Example] = ()):
    """The model that plays the search engine, on a server or here. Raises UserError.

    It writes no more than may be shown to the policy: `--max_document_tokens`.
    """
    if config.simulator.startswith(URL):
        return build_served_simulator(config)
    return build_local_simulator(config, accelerator, examples)


def build_served_simulator(config: SearchConfig) -> ServedSearch:
    template = simulator.load_template(config.simulator_template or "tuned")
    model = served_model(config, config.simulator)
    return ServedSearch(model, template, config.top_k, config.seed)


def served_model(config: SearchConfig, address: str) -> ServedModel:
    """The model at this address, with the key of the environment if there is one."""
    key = api_key("SIMULATOR_API_KEY")
    client = build_client(config, address, {"Authorization": f"Bearer {key}"} if key else {})
    client.reach()
    return ServedModel(
        client,
        config.simulator_model,
        config.simulator_api,
        temperature=config.simulator_temperature,
        max_new_tokens=config.max_document_tokens,
        template_args=served_template_args(config),
    )


def build_local_simulator(
    config: SearchConfig, accelerator, examples: Sequence[Example]
) -> simulator.SimulatedSearch:
    check_room(config.simulator or "tiny", config.max_document_tokens)
    with accelerator.main_process_first():  # which makes the default one where there is none
        folder = loading.resolve(config.simulator or str(make_default_simulator()))
    model, tokenizer = load_beside(config, folder, accelerator)
    template = simulator.load_template(config.simulator_template or folder)
    requests = [SearchRequest("", example.question, example.answers) for example in examples]
    texts = [
        simulator.fill_template(template, request, config.top_k, tokenizer) for request in requests
    ]
    query_tokens = config.max_turn_tokens
    prompt_tokens = longest_prompt(tokenizer, texts) + query_tokens
    check_room(folder, prompt_tokens + config.max_document_tokens)
    return simulator.SimulatedSearch(
        model,
        tokenizer,
        template,
        config.top_k,
        config.seed,
        config.simulator_temperature,
        config.max_document_tokens,
        config.on_search_error,
        config.cuda_graphs,
        config.simulator_contrast,
    )


def load_beside(config: SearchConfig, folder: str, accelerator):
    """(model, tokenizer) of a simulator or judge, on its device. Raises UserError."""
    device = config.simulator_device or accelerator.device
    with loading.readable(folder):  # on a device that may not be there
        if config.simulator_device.startswith("cuda"):
            index = torch.device(config.simulator_device).index or 0
            require(
                index < torch.cuda.device_count(),
                f"--simulator_device {config.simulator_device} is not here: this machine shows "
                f"{torch.cuda.device_count()} CUDA devices; choose another, or leave it out.",
            )
        dtype = dtype_on(config, device, folder)
        return load_checked(folder, device, dtype, **template_options(config))


def build_judge(config: SimConfig, accelerator) -> Judge:
    """The model of `--judge`, on a server or here. It decodes greedily. Raises UserError."""
    if config.judge.startswith(URL):
        greedy = replace(config, simulator_temperature=0.0, on_search_error="stop")
        return Judge(served_model(greedy, config.judge).write)
    model, tokenizer = load_beside(config, loading.resolve(config.judge), accelerator)

    def write(prompts: list[str]) -> list[str]:
        replies = simulator.write_replies(
            model,
            tokenizer,
            prompts,
            max_new_tokens=config.max_document_tokens,
            write=partial(generate, cuda_graphs=config.cuda_graphs),
        )
        return [reply.text for reply in replies]

    return Judge(write, tokenizer)


def check_room(name: str, tokens: int) -> None:
    """Raise UserError for a simulator without positions for so many tokens."""
    loading.check_model(name)
    limit = loading.positions(name)
    require(
        limit is None or tokens <= limit,
        f"The simulator's prompt and reply can take {tokens} tokens, and {name} has {limit} "
        "positions; lower --max_document_tokens or --max_turn_tokens, or leave out questions with "
        "very many gold answers.",
    )


def make_default_simulator() -> Path:
    """`runs/simulator`, made by stage 1 if it is not there yet."""
    folder = run_folder.RUNS / "simulator"
    if not (folder / "config.json").is_file():
        run_stage("train_sim.py")
    return folder


# ---- Scripts and processes -----------------------------------------------------------------------


def run_stage(script: str) -> None:
    """Run a script to its end, as one process, whatever this one is part of."""
    print(f"{script} makes what is not there yet.", flush=True)
    environment = {name: os.environ[name] for name in os.environ if name not in DISTRIBUTED}
    status = subprocess.run([sys.executable, str(ROOT / script)], env=environment).returncode
    require(status == 0, f"{script}, which this needs, has failed; see the message above.")


def agreed_folder(accelerator, config: SearchConfig) -> Path:
    """The output folder, the same one on every process. That of a new run is made."""
    from accelerate.utils import broadcast_object_list

    folder = config.output
    if accelerator.is_main_process and not folder:
        folder = run_folder.new_folder()
    return Path(broadcast_object_list([folder])[0])


def make_accelerator(config: ModelSettings):
    """Accelerate, computing in the type of the settings. Raises UserError for what it cannot do.

    Processes that started on both sides of midnight take the first one's day from here on.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import broadcast_object_list

    half = compute_dtype(config) == torch.bfloat16
    # With efficient loading all processes but one load nothing, and tied weights come untied.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"  # a sharded one is read by pickle
    buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # no second gradients
    try:
        accelerator = Accelerator(
            mixed_precision="bf16" if half else "no", kwargs_handlers=[buckets]
        )
    except (ImportError, ValueError) as error:
        raise UserError(f"Accelerate cannot start, mend its settings: {brief(error)}") from error
    sharded = accelerator.distributed_type in ("FSDP", "DEEPSPEED")
    require(accelerator.is_fsdp2 or not sharded, "To shard a model use FSDP2, as configs/ does.")
    if sharded and half:
        # Otherwise log-probabilities, and sums over the processes, would be rounded to bfloat16.
        plugin = accelerator.state.fsdp_plugin
        plugin.mixed_precision_policy = replace(
            plugin.mixed_precision_policy, output_dtype=None, reduce_dtype=torch.float32
        )
    [config.day] = broadcast_object_list([config.day])
    return accelerator
