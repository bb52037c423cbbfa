"""Settings: `SearchConfig`, which all scripts share, and `PolicyConfig` of training. No torch."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from minizs import require
from minizs.runs import run_folder
from minizs.runs.flags import check_ranges, option

ENGINES = ("simulator", "bm25", "http", "web", "none")
URL = ("http://", "https://")  # how the name of a server begins, not of a folder


@dataclass
class SearchConfig:
    policy: str = option("tiny", "The policy: 'tiny' (shipped), a folder or a hub name.")
    revision: str = option("", "Which revision of a hub name.")
    chat_template: str = option("auto", "'auto': the tokenizer's, if it has one.", ("auto", "none"))
    attention: str = option("auto", "flash-attn if it runs.", ("auto", "sdpa", "flash_attention_2"))
    dtype: str = option("auto", "'auto': bfloat16 on a GPU.", ("auto", "float32", "bfloat16"))
    data: str = option("world", "'world', files and hub names (commas between), or 'paper'.")
    output: str = option("", "Where the results go; empty: a new place in runs/.")
    overwrite: bool = option(False, "Delete what the output holds.")
    seed: int = option(0, "Decides every random number of the run.")
    threads: int = option(0, "CPU threads a process; 0: all cores, shared by the processes.")

    engine: str = option("simulator", "What answers the searches; 'none': nothing does.", ENGINES)
    engine_noise: float = option(0.0, "How often a real engine's reply lacks what is needed.")
    engine_url: str = option("", "For --engine http: the retriever's address, or several.")
    engine_api: str = option("search-r1", "Whose protocol it speaks.", ("search-r1", "zerosearch"))
    corpus: str = option("", "For --engine bm25 on your own data: a .txt, .jsonl or .parquet file.")
    cache: str = option("", "A file that keeps what http and web engines answered.")
    top_k: int = option(3, "Documents a search.")
    simulator: str = option("", "Folder, hub name or address; empty: runs/simulator, made at need.")
    simulator_template: str = option("", "A file with its prompt, or 'untuned'; empty: its own.")
    simulator_model: str = option("", "Its name at the server; empty: the first there is.")
    simulator_api: str = option("completions", "Of the server.", ("completions", "chat"))
    simulator_device: str = option("", "Where the simulator runs, such as cuda:1.")
    simulator_temperature: float = option(0.8, "At which the simulator writes.")
    timeout: float = option(60.0, "Seconds that one request to a server may take.")
    retries: int = option(5, "How often a failed request is sent again.")
    on_search_error: str = option("stop", "'empty': count it, find nothing.", ("stop", "empty"))

    max_turns: int = option(6, "Generations a trajectory; there are at most one fewer searches.")
    max_turn_tokens: int = option(40, "Tokens the policy may write in a turn.")
    max_document_tokens: int = option(80, "Tokens of an engine's reply, tags included.")
    max_context: int = option(448, "Tokens of a whole trajectory.")
    temperature: float = option(1.0, "At which the policy samples, and is scored.")


@dataclass
class PolicyConfig(SearchConfig):
    resume: str = option("", "Go on from the newest checkpoint, or the one named.", bare="latest")
    algorithm: str = option("grpo", "How rewards become advantages.", ("grpo", "ppo", "reinforce"))
    steps: int = option(100, "Training steps; each is one batch of rollouts.")
    batch_questions: int = option(16, "Questions a step, over all processes.")
    group_size: int = option(8, "Trajectories a question.")

    noise_start: float = option(0.0, "Probability of noisy documents before the first step.")
    noise_end: float = option(0.25, "The same at the last step.")
    noise_base: float = option(4.0, "The curriculum's base; 1 is a straight line.")

    lr: float = option(1.5e-3, "Peak learning rate of the policy (AdamW).")
    lr_end: float = option(0.1, "Share of the peak that is left at the last step; 1: constant.")
    warmup: float = option(0.05, "Share of the steps in which the learning rate rises to its peak.")
    weight_decay: float = option(0.0, "AdamW's.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm.")
    lora_rank: int = option(0, "Train a LoRA of this rank, not all weights; 0: all.")
    merge: bool = option(False, "With LoRA: make the final policy a plain model.")
    gradient_checkpointing: bool = option(False, "Less memory, a third more work in the update.")
    minibatches: int = option(1, "Optimiser steps a batch of rollouts.")
    micro_tokens: int = option(2048, "Positions in a forward pass, padding too: bounds memory.")
    clip_low: float = option(0.2, "The ratio is clipped below 1 minus this.")
    clip_high: float = option(0.28, "And above 1 plus this (clip-higher, arXiv 2503.14476).")
    loss_average: str = option("token", "How tokens average.", ("token", "sequence", "constant"))
    kl_coef: float = option(0.02, "Weight of the KL to the starting model; 0 turns it off.")
    kl_kind: str = option("k3", "KL estimator in the loss; PPO has k1 in the reward.", ("k2", "k3"))
    entropy_coef: float = option(0.0, "Weight of an entropy bonus.")
    advantage_scale: str = option("group", "GRPO: divides by that std.", ("group", "batch", "none"))
    baseline: str = option("leave_one_out", "REINFORCE's.", ("leave_one_out", "mean", "none"))
    critic_lr: float = option(1e-3, "PPO: learning rate of the critic.")
    value_clip: float = option(0.5, "PPO: how far a value may move in an update.")
    gamma: float = option(1.0, "PPO: discount a token.")
    lam: float = option(1.0, "PPO: GAE's lambda.")

    eval_every: int = option(20, "Steps between evaluations on held-out questions; 0: never.")
    eval_questions: int = option(200, "Held-out questions, answered greedily with BM25.")
    save_every: int = option(20, "Steps between checkpoints; 0: only the final model.")
    keep: int = option(2, "Checkpoints kept.")
    search_price: float = option(9.17, "Dollars for 1,000 queries to a web engine (paper Table 8).")
    gpu_price: float = option(1.47, "Dollars for an hour of a GPU (paper Table 8).")
    max_skipped: int = option(10, "Steps that may be skipped, their loss or gradient not finite.")
    log_trajectories: int = option(8, "Trajectories a step that are written to trajectories.jsonl.")
    log_with: str = option("", "Log there, too.", ("", "tensorboard", "wandb", "trackio"))


# What a resumed run may have otherwise: its training would not be another.
FREE = set(
    """output resume overwrite threads save_every keep eval_every eval_questions merge
    log_with log_trajectories max_skipped search_price gpu_price timeout retries cache
    on_search_error engine_url simulator_device micro_tokens gradient_checkpointing""".split()
)


def check_search(config: SearchConfig) -> None:
    """Raise UserError for what is wrong with these, before anything expensive starts."""
    from minizs.models import loading
    from minizs.runs import data

    check_ranges(
        config,
        "top_k max_turns max_turn_tokens max_document_tokens max_context timeout",
        "threads simulator_temperature temperature retries",
        "engine_noise",
    )
    loading.check_model(config.policy, config.max_context)
    data.check_spec(config.data)
    if config.engine == "simulator" and config.simulator and not config.simulator.startswith(URL):
        loading.check_model(config.simulator)
    if config.engine == "bm25" and config.data != "world":
        require(bool(config.corpus), "--engine bm25 on your own --data needs --corpus FILE.")
    require(
        config.engine != "http" or config.engine_url.startswith(URL),
        "--engine http needs --engine_url http://HOST:PORT.",
    )
    for path in {config.corpus, config.simulator_template} - {"", "tuned", "untuned"}:
        require(Path(path).is_file(), f"There is no file {path!r}; check the path.")


def check(config: PolicyConfig) -> None:
    """Raise UserError for what is wrong with the settings, before anything expensive starts."""
    check_ranges(
        config,
        positive="steps batch_questions group_size temperature lr minibatches "
        "micro_tokens keep max_grad_norm critic_lr noise_base eval_questions clip_low "
        "clip_high value_clip",
        not_negative="kl_coef entropy_coef weight_decay "
        "eval_every save_every log_trajectories lora_rank search_price gpu_price "
        "max_skipped",
        share="noise_start noise_end warmup lr_end gamma lam",
    )
    compares = {"grpo": True, "ppo": False, "reinforce": config.baseline != "none"}
    require(
        config.group_size > 1 or not compares[config.algorithm],
        f"--algorithm {config.algorithm} compares answers to a question: give --group_size 2.",
    )
    # So that every minibatch, on every process, has equal parts of each group.
    require(
        config.group_size % config.minibatches == 0,
        f"--minibatches {config.minibatches} does not divide --group_size {config.group_size}.",
    )
    require(
        config.engine != "simulator" or not config.engine_noise,
        "--engine_noise is for real engines; the simulator has --noise_start and --noise_end.",
    )
    require(not (config.resume and config.overwrite), "--resume or --overwrite: give only one.")
    require(config.lora_rank > 0 or not config.merge, "--merge is for --lora_rank N.")
    require(
        not Path(config.policy, "adapter_config.json").is_file(),
        f"{config.policy} is a LoRA, which cannot be trained further; make it with --merge.",
    )
    require(
        not config.log_with or find_spec(config.log_with) is not None,
        f"--log_with {config.log_with} needs its package: pip install {config.log_with}.",
    )
    check_search(config)
    if config.output:
        run_folder.check_free(Path(config.output), bool(config.resume), config.overwrite)
