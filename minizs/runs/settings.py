"""All that can be set, in small groups: each is what one part of the code needs to know.

A script's settings inherit from the groups that it needs, so that access and flags stay flat
(`config.max_turns`, `--max_turns`). The first line of a group's docstring is its heading in
`--help`. The functions below the groups check what concerns more than one setting; the range of
each number stands in its field. Nothing here imports torch.
"""

import json
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from minizs import UserError, require
from minizs.runs import run_folder
from minizs.runs.flags import option

REAL_ENGINES = ("bm25", "http", "web")
ENGINES = ("simulator", *REAL_ENGINES, "none")
BASELINES = ("direct", "cot", "rag")  # ways to answer without searching, see baselines.py
SCRIPTED, OWN = "scripted", "own"  # sources of demonstrations that are no file
URL = ("http://", "https://")  # how the name of a server begins, not that of a folder


# ---- What all scripts need -----------------------------------------------------------------------


@dataclass
class ModelSettings:
    """The policy, and how models are computed."""

    policy: str = option(
        "tiny",
        "The model to train or to test: a folder, a name on the Hugging Face hub, or 'tiny', the "
        "small one that comes with minizs.",
        metavar="MODEL",
    )
    chat_template: str = option(
        "auto",
        "Whether the question is put into the tokenizer's chat template. 'auto' uses it where the "
        "tokenizer has one.",
        ("auto", "none"),
    )
    chat_template_args: str = option(
        "",
        "What chat templates are given besides the messages: a mapping in YAML or JSON, such as "
        "'{enable_thinking: false}'. A served model gets it as chat_template_kwargs.",
        metavar="MAPPING",
    )
    day: str = option(
        "",
        "The day that chat templates print, such as 2026-02-28. By default the one on which the "
        "run began.",
        metavar="DATE",
    )
    attention: str = option(
        "auto",
        "The implementation of attention. 'auto' takes flash attention where it can run.",
        ("auto", "sdpa", "flash_attention_2"),
    )
    cuda_graphs: str = option(
        "auto",
        "Whether the steps of generation are recorded once and replayed, which is several times "
        "faster on a GPU. 'auto' does so there. 'on' runs the same steps elsewhere too.",
        ("auto", "on", "off"),
        may_change=True,
    )
    dtype: str = option(
        "auto",
        "The number format of forward passes. 'auto' is the faster one: bfloat16 on a GPU, and for "
        "models of width 256 or more on a CPU with instructions for it; else float32.",
        ("auto", "float32", "bfloat16"),
    )

    def __post_init__(self) -> None:
        self.day = self.day or date.today().isoformat()  # saved with the run, which keeps it


@dataclass
class DataSettings:
    """The questions."""

    data: str = option(
        "world",
        "The questions with their answers: 'world' is the tiny world, 'paper' the data sets of "
        "the paper. Otherwise files and hub names, with commas between them.",
    )


@dataclass
class OutputSettings:
    """The run: its folder, its seed and its threads."""

    output: str = option(
        "",
        "The folder that the results go to. By default a new one in runs/.",
        metavar="PATH",
        may_change=True,
    )
    overwrite: bool = option(
        False, "Delete what an earlier run left in the output.", may_change=True
    )
    seed: int = option(0, "Every random number of the run follows from this one.")
    threads: int = option(
        0,
        "How many CPU threads each process computes with. 0 shares all cores among the processes.",
        min=0,
        may_change=True,
    )


@dataclass
class EngineSettings:
    """The search engine."""

    engine: str = option(
        "simulator",
        "What answers the policy's searches: a language model that simulates an engine, BM25 over "
        "a corpus, a retriever's server (http), the web, or nothing.",
        ENGINES,
    )
    top_k: int = option(3, "The number of documents that a search returns.", min=1)
    corpus: str = option(
        "",
        "The documents that --engine bm25 searches: a .txt, .jsonl, .json, .csv, .tsv or .parquet "
        "file, which can be compressed (.gz). By default those of the tiny world.",
        metavar="FILE",
    )
    engine_url: str = option(
        "",
        "The address of the retriever for --engine http, or several with commas between them.",
        metavar="URL",
        may_change=True,
    )
    engine_api: str = option(
        "search-r1",
        "The protocol of that retriever: that of Search-R1's server or that of ZeroSearch's.",
        ("search-r1", "zerosearch"),
    )
    cache: str = option(
        "",
        "A file that keeps the replies of --engine http and web, so that no query is sent twice.",
        metavar="FILE",
        may_change=True,
    )


@dataclass
class SimulatorSettings:
    """The simulator (for --engine simulator)."""

    simulator: str = option(
        "",
        "The model that plays the search engine: a folder, a hub name, or the address of an "
        "OpenAI-compatible server. By default runs/simulator, which is trained if it is missing.",
        metavar="MODEL",
    )
    simulator_template: str = option(
        "",
        "A file with the prompt of the simulator, or 'untuned' for a model that stage 1 has not "
        "trained. By default the prompt that lies beside its weights.",
        metavar="FILE",
    )
    simulator_model: str = option(
        "",
        "The name of the model at the simulator's server. By default the first one there.",
        metavar="NAME",
    )
    simulator_api: str = option(
        "completions",
        "The endpoint of that server that is asked. 'chat' is for a model that was tuned from an "
        "instruct model.",
        ("completions", "chat"),
    )
    simulator_device: str = option(
        "",
        "Where a simulator without a server runs, such as cuda:1. By default where the policy is.",
        metavar="DEVICE",
        may_change=True,
    )
    simulator_temperature: float = option(
        0.8, "The temperature at which the simulator writes. 0 is greedy.", min=0
    )
    simulator_contrast: float = option(
        20.0,
        "How strictly noisy documents avoid what the simulator would write as useful ones: a token "
        "is made rarer by how much likelier the word 'useful' would make it, to this power. 0 "
        "leaves them as they are, in half the time, and on a GPU with CUDA graphs. A simulator at "
        "a server does not do it.",
        min=0,
    )


@dataclass
class ServiceSettings:
    """Servers: of a retriever, the web or a simulator."""

    timeout: float = option(
        60.0, "The seconds that one request to a server may take.", above=0, may_change=True
    )
    retries: int = option(
        5, "How often a request that failed is sent again.", min=0, may_change=True
    )
    on_search_error: str = option(
        "stop",
        "What to do about a search that failed for good: stop, or go on with no documents and "
        "count it as a search error.",
        ("stop", "empty"),
        may_change=True,
    )


@dataclass
class LimitSettings:
    """The limits of a trajectory."""

    max_turns: int = option(
        6,
        "The number of times that the policy may write. A search in the last turn is not carried "
        "out, so there is at most one search fewer.",
        min=1,
    )
    max_turn_tokens: int = option(40, "The tokens that the policy may write in one turn.", min=1)
    max_document_tokens: int = option(
        80, "The tokens of one reply of the engine, its tags included. The rest is cut off.", min=1
    )
    max_context: int = option(
        448, "The tokens of a whole trajectory: prompt, turns and documents.", min=1
    )
    temperature: float = option(
        1.0,
        "The temperature at which the policy samples. Training scores its tokens at the same one.",
        above=0,
    )


@dataclass
class SearchConfig(
    ModelSettings,
    DataSettings,
    OutputSettings,
    EngineSettings,
    SimulatorSettings,
    ServiceSettings,
    LimitSettings,
):
    """What it takes to let a policy answer questions with a search engine: all scripts do."""


@dataclass
class NoiseSettings:
    """Noise, where there is no curriculum."""

    engine_noise: float = option(
        0.0,
        "The probability that a reply of the engine is made noisy. That of a real engine then has "
        "the best documents that do not hold what the query needs.",
        min=0,
        max=1,
    )


# ---- What training the policy needs as well ------------------------------------------------------


@dataclass
class TrainingSettings:
    """The training: its length and its batches."""

    steps: int = option(
        80,
        "The number of training steps. Each plays and learns from one batch. 0 makes only the warm "
        "start.",
        min=0,
    )
    batch_questions: int = option(
        16, "The number of questions in a step, over all processes.", min=1
    )
    group_size: int = option(8, "The number of trajectories for each question.", min=1)
    minibatches: int = option(2, "The number of optimiser steps for each batch.", min=1)
    resume: str = option(
        "",
        "Go on from the newest checkpoint in the output, or from the one that is named.",
        bare="latest",
        metavar="CHECKPOINT",
        may_change=True,
    )


@dataclass
class WarmStartSettings:
    """The warm start: supervised learning from demonstrations before the first step."""

    warm_start: str = option(
        "",
        "Where the demonstrations come from. 'scripted': a script asks the training engine, which "
        "needs no model. 'own': the policy's own right answers. Otherwise a file that evaluate.py "
        "or train_policy.py left (evaluation.jsonl, trajectories.jsonl), of another model perhaps. "
        "By default there is no warm start.",
        metavar="SOURCE",
    )
    warm_start_steps: int = option(100, "The number of supervised steps.", min=1)
    warm_start_tokens: int = option(
        2000, "The positions in a supervised step, over all processes and with padding.", min=1
    )
    warm_start_lr: float = option(1e-4, "The peak learning rate of the supervised steps.", above=0)
    warm_start_questions: int = option(
        1000, "The number of training questions that 'scripted' and 'own' try to answer.", min=1
    )
    warm_start_reward: float = option(
        1.0, "Demonstrations whose answer has a lower F1 are left out.", min=0, max=1
    )
    warm_start_held_out: float = option(
        0.1,
        "The share of the demonstrations' questions that is not learned from: loss, valid actions "
        "and F1 on these are printed before and after.",
        min=0,
        max=0.9,
    )


@dataclass
class CurriculumSettings:
    """The curriculum: how noisy the engine is, simulated or real."""

    noise_start: float = option(
        0.0,
        "The probability of a noisy reply at the start of training. A noisy reply of a real engine "
        "has the best documents that do not hold what the query needs. Give 0 here and for "
        "--noise_end to train with a real engine as it is.",
        min=0,
        max=1,
    )
    noise_end: float = option(
        0.5, "The probability of a noisy reply at the last step.", min=0, max=1
    )
    noise_base: float = option(
        1.0,
        "How late most of the noise comes: it rises like this base to the power of the share of "
        "the steps that is done. 1 is a straight line, and the paper has 4.",
        above=0,
    )


@dataclass
class AlgorithmSettings:
    """The algorithm: advantages and loss."""

    algorithm: str = option("grpo", "How rewards become advantages.", ("grpo", "ppo", "reinforce"))
    advantage_scale: str = option(
        "group",
        "What GRPO divides advantages by: the standard deviation of the rewards in the group, that "
        "in the batch, or nothing.",
        ("group", "batch", "none"),
    )
    baseline: str = option(
        "leave_one_out",
        "What REINFORCE subtracts from a reward: the mean of the group's other rewards, the mean "
        "of the whole group, or nothing.",
        ("leave_one_out", "mean", "none"),
    )
    clip_low: float = option(
        0.2, "The probability ratio is clipped below 1 minus this number.", above=0
    )
    clip_high: float = option(
        0.28,
        "The probability ratio is clipped above 1 plus this number. It can be larger than "
        "clip_low (arXiv 2503.14476).",
        above=0,
    )
    loss_average: str = option(
        "token",
        "Over what the loss is averaged: all tokens of the batch, the tokens of each trajectory "
        "and then the trajectories, or a constant number of tokens.",
        ("token", "sequence", "constant"),
    )
    kl_coef: float = option(
        0.02,
        "The weight of the KL divergence from the model that training starts from. 0 turns it off.",
        min=0,
    )
    kl_kind: str = option(
        "k3",
        "The estimator of that KL in the loss of GRPO and REINFORCE. PPO has k1 in its reward.",
        ("k2", "k3"),
    )
    entropy_coef: float = option(0.0, "The weight of a bonus for the policy's entropy.", min=0)


@dataclass
class CriticSettings:
    """The critic (for --algorithm ppo)."""

    critic_lr: float = option(1e-3, "The peak learning rate of the critic.", above=0)
    value_clip: float = option(0.5, "How far a value may move in one update.", above=0)
    gamma: float = option(1.0, "The discount for each token.", min=0, max=1)
    lam: float = option(1.0, "The lambda of generalised advantage estimation (GAE).", min=0, max=1)


@dataclass
class OptimizerSettings:
    """The optimiser (AdamW) and its memory."""

    lr: float = option(1.5e-3, "The peak learning rate of the policy.", above=0)
    warmup: float = option(
        0.05, "The share of the steps in which the learning rate rises to its peak.", min=0, max=1
    )
    lr_end: float = option(
        0.1,
        "The share of the peak that is left at the last step. 1 keeps the rate constant after the "
        "warm-up.",
        min=0,
        max=1,
    )
    weight_decay: float = option(0.0, "The weight decay of AdamW.", min=0)
    max_grad_norm: float = option(
        1.0, "A gradient with a larger norm is scaled down to this one.", above=0
    )
    max_skipped: int = option(
        10,
        "The number of steps that may be skipped because their loss or gradient is not finite. "
        "One more ends the run.",
        min=0,
        may_change=True,
    )
    freeze_embeddings: bool = option(
        False,
        "Leave the token embeddings and the output head as they are. They are most of a small "
        "model with a large vocabulary, and need no gradient and no optimiser then.",
    )
    lora_rank: int = option(0, "Train a LoRA adapter of this rank. 0 trains all weights.", min=0)
    merge: bool = option(
        False,
        "Merge the LoRA into the final policy, which then is a model like any other.",
        may_change=True,
    )
    micro_tokens: int = option(
        2048,
        "The positions in one forward pass, padding included. Fewer take less memory.",
        min=1,
        may_change=True,
    )
    gradient_checkpointing: bool = option(
        False,
        "Compute activations twice instead of keeping them: less memory, about a third more work.",
        may_change=True,
    )
    compile_layers: bool = option(
        False,
        "Compile the model's layers for the update, on a GPU: of a 1.5B model it takes 0.72 of the "
        "time and 0.83 of the memory then, and the first step some 14 s more.",
        may_change=True,
    )


@dataclass
class LoggingSettings:
    """Watching and saving the run."""

    eval_every: int = option(
        20,
        "The steps between two tests on held-out questions. 0 turns them off.",
        min=0,
        may_change=True,
    )
    eval_questions: int = option(
        200,
        "The number of held-out questions. They are answered greedily, with BM25.",
        min=1,
        may_change=True,
    )
    eval_noise: float = option(
        0.5,
        "The probability of a noisy reply in a second test on the same questions. A noisy reply "
        "has the best documents that do not hold what the query needs. 0 leaves that test out.",
        min=0,
        max=1,
        may_change=True,
    )
    save_every: int = option(
        20,
        "The steps between two checkpoints. 0 saves the final model only.",
        min=0,
        may_change=True,
    )
    keep: int = option(2, "The number of checkpoints that are kept.", min=1, may_change=True)
    log_with: str = option(
        "",
        "A tracker that gets the metrics as well.",
        ("", "tensorboard", "wandb", "trackio"),
        may_change=True,
    )


@dataclass
class PolicyConfig(
    TrainingSettings,
    WarmStartSettings,
    CurriculumSettings,
    AlgorithmSettings,
    CriticSettings,
    OptimizerSettings,
    SearchConfig,
    LoggingSettings,
):
    """Stage 2: teach a language model to search, by reinforcement learning.

    Without any flag it trains the tiny model in the tiny world, on any machine and offline.
    """

    SCRIPT: ClassVar[str] = "train_policy"  # its section in a file for several scripts


# ---- What training the simulator needs as well ---------------------------------------------------


@dataclass
class CollectSettings:
    """The pairs to learn from, and collecting them."""

    collect: bool = option(False, "Only collect pairs to learn from, into OUTPUT/collected.jsonl.")
    examples: int = option(
        12_000, "The number of pairs to collect, useful and noisy in equal number.", min=2
    )
    worlds: int = option(40, "The number of re-drawn tiny worlds to collect pairs from.", min=1)
    searcher: str = option(
        "auto",
        "With --collect and --data: who searches. 'plain' is a script that needs no model: it asks "
        "the question, and then narrower queries. 'auto' is the policy where --policy names one, "
        "and else the script.",
        ("auto", "plain", "policy"),
    )
    judge: str = option(
        "gold",
        "With --collect and --data: what tells useful documents from noisy ones. 'gold' looks for "
        "the answer in them; otherwise a model's folder, hub name or address.",
        metavar="MODEL",
    )


@dataclass
class FineTuningSettings:
    """The training of the simulator."""

    base: str = option(
        "tiny",
        "The model to start from: a folder, a hub name, or 'tiny', the one that comes with minizs.",
        metavar="MODEL",
    )
    steps: int = option(400, "The number of optimiser steps.", min=1)
    batch_tokens: int = option(
        3000, "The positions in a step, over all processes and with padding.", min=1
    )
    lr: float = option(
        4e-3, "The peak learning rate of AdamW. It rises linearly, then falls to 0.", above=0
    )
    warmup: float = option(
        0.05, "The share of the steps in which the learning rate rises.", min=0, max=1
    )
    max_grad_norm: float = option(
        1.0, "A gradient with a larger norm is scaled down to this one.", above=0
    )
    freeze_embeddings: bool = option(
        False,
        "Leave the token embeddings and the output head as they are. They are most of a small "
        "model with a large vocabulary, and need no gradient and no optimiser then.",
    )
    lora_rank: int = option(
        0,
        "Train a LoRA adapter of this rank, which is merged into the model at the end. 0 trains "
        "all weights.",
        min=0,
    )
    gradient_checkpointing: bool = option(
        False,
        "Compute activations twice instead of keeping them: less memory, about a third more work.",
        may_change=True,
    )
    save_every: int = option(
        100,
        "The steps between two checkpoints, in OUTPUT.partial. 0 saves none.",
        min=0,
        may_change=True,
    )
    keep: int = option(
        2, "The number of checkpoints that are kept until the end.", min=1, may_change=True
    )
    resume: str = option(
        "",
        "Go on from the newest checkpoint, or from the one that is named. A collection goes on "
        "after the last question.",
        bare="latest",
        metavar="CHECKPOINT",
        may_change=True,
    )
    report_queries: int = option(
        500,
        "The number of useful and of noisy queries for the simulator's report. 0 writes none.",
        min=0,
        may_change=True,
    )


@dataclass
class SimConfig(CollectSettings, FineTuningSettings, SearchConfig, NoiseSettings):
    """Stage 1: fine-tune a language model into a search engine that writes documents.

    Without any flag it trains the simulator of the tiny world, in runs/simulator.
    """

    SCRIPT: ClassVar[str] = "train_sim"  # its section in a file for several scripts

    data: str = option(
        "world",
        "The pairs to learn from: 'world' collects them in the tiny world; otherwise files and hub "
        "names, with commas between them. With --collect: the questions to collect pairs for.",
    )
    output: str = option(
        "",
        "The simulator's folder. By default runs/simulator, or runs/collected with --collect.",
        metavar="PATH",
        may_change=True,
    )
    engine: str = option(
        "bm25",
        "With --collect and --data: the engine that answers the searches.",
        REAL_ENGINES,
    )
    policy: str = option(
        "tiny",
        "With --collect and --data: the model that searches (see --searcher), a folder or a hub "
        "name.",
        metavar="MODEL",
    )


# ---- What testing the policy needs as well -------------------------------------------------------


@dataclass
class EvaluationSettings:
    """The test: its questions, and what the policy is compared with."""

    ask: str | None = option(
        None, "Answer this one question and show the whole trajectory.", metavar="QUESTION"
    )
    questions: int = option(
        1000, "The number of questions, spread evenly over the data sets. 0 takes all.", min=0
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
        ("search", *BASELINES),
    )
    eval_noise: float = option(
        0.5,
        "With --engine bm25: the probability of a noisy reply in a second test on the same "
        "questions, whose F1 is the table's last column. 0 leaves that test out.",
        min=0,
        max=1,
    )
    batch: int = option(250, "The number of questions that a process answers together.", min=1)


@dataclass
class EvalConfig(EvaluationSettings, SearchConfig, NoiseSettings):
    """Stage 3: test a policy with a real search engine, or ask it one question.

    Without any flag it tests the newest run's policy in the tiny world, beside the model that its
    training began with.
    """

    SCRIPT: ClassVar[str] = "evaluate"  # its section in a file for several scripts

    policy: str = option(
        "",
        "The policy to test: a folder or a hub name. By default that of the newest run, which is "
        "trained if there is none.",
        metavar="MODEL",
    )
    output: str = option(
        "",
        "A .json file for the figures. By default evaluation.json beside the policy's folder, or "
        "evaluation-2.json and so on.",
        metavar="FILE",
    )
    engine: str = option(
        "bm25",
        "What answers the searches: a real engine, the simulator, which has seen the gold answers, "
        "or nothing.",
        ENGINES,
    )
    temperature: float = option(
        0.0, "The temperature at which the policy samples. 0 is greedy.", min=0
    )


# ---- What concerns more than one setting ---------------------------------------------------------


def check_search(config: SearchConfig) -> None:
    """Raise UserError, before anything expensive starts, for what cannot work together."""
    check_models(config)
    check_questions(config)
    check_engine(config)
    check_files(config)


def read_template_args(text: str) -> dict[str, Any]:
    """The mapping in `--chat_template_args`. Raises UserError."""
    import yaml

    try:
        mapping = yaml.safe_load(text or "{}")
        json.dumps(mapping)  # servers get it so
    except (yaml.YAMLError, TypeError, ValueError, RecursionError):
        mapping = None
    require(
        isinstance(mapping, dict) and all(isinstance(name, str) for name in mapping),
        f"--chat_template_args {text!r} is no mapping; write one such as "
        "'{enable_thinking: false}', and dates in quotes.",
    )
    return mapping


def read_day(text: str) -> date:
    """The day in `--day`. Raises UserError."""
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise UserError(f"--day {text!r} is no date; write one such as 2026-02-28.") from error


def check_models(config: SearchConfig) -> None:
    """The policy and a simulator that runs here have to be models with room for what they read."""
    from minizs.models import loading

    read_template_args(config.chat_template_args)
    read_day(config.day)
    if not isinstance(config, SimConfig) or searches_with_policy(config):
        loading.check_model(config.policy, config.max_context)
    served = config.simulator.startswith(URL)
    if config.engine == "simulator" and config.simulator and not served:
        loading.check_model(config.simulator)


def searches_with_policy(config: SimConfig) -> bool:
    """Whether a policy searches for the examples that are collected, or the plain searcher does. By
    default a policy does if one is named: the shipped one knows the words of the tiny world alone.
    """
    if config.searcher == "auto":
        return config.policy != "tiny"
    return config.searcher == "policy"


def check_questions(config: DataSettings) -> None:
    from minizs.runs import data

    data.check_spec(config.data)


def check_engine(config: SearchConfig) -> None:
    """BM25 needs documents that fit the questions, and a retriever an address."""
    if config.engine == "bm25" and config.data != "world":
        require(bool(config.corpus), "--engine bm25 on your own --data needs --corpus FILE.")
    if config.engine == "http":
        require(
            config.engine_url.startswith(URL),
            "--engine http needs --engine_url http://HOST:PORT.",
        )


def check_files(config: SearchConfig) -> None:
    paths = [config.corpus]
    if config.simulator_template not in ("tuned", "untuned"):
        paths.append(config.simulator_template)
    for path in filter(None, paths):
        require(Path(path).is_file(), f"There is no file {path!r}; check the path.")


def check_training(config: PolicyConfig) -> None:
    """Raise UserError for what is wrong with the settings, before anything expensive starts."""
    require(
        config.steps > 0 or bool(config.warm_start),
        "--steps 0 trains nothing: give 1 or more, or a --warm_start.",
    )
    check_groups(config)
    require(
        config.max_turns > 1 or config.engine == "none",
        "--max_turns 1 leaves no turn for an answer after a search: give 2 or more, or --engine "
        "none.",
    )
    check_lora(config)
    check_tracker(config)
    check_search(config)
    require(not (config.resume and config.overwrite), "--resume or --overwrite: give only one.")
    if config.output:
        run_folder.check_free(Path(config.output), bool(config.resume), config.overwrite)
    else:
        require(
            run_folder.can_be_made(run_folder.RUNS),
            f"{run_folder.RUNS} cannot be made or written to; choose an --output.",
        )


def check_groups(config: PolicyConfig) -> None:
    """An algorithm that compares the answers to a question needs two; minibatches divide groups."""
    compares = config.algorithm == "grpo"
    if config.algorithm == "reinforce":
        compares = config.baseline != "none"
    require(
        config.group_size > 1 or not compares,
        f"--algorithm {config.algorithm} compares answers to a question: give --group_size 2.",
    )
    # So that every minibatch, on every process, has equal parts of each group.
    require(
        config.group_size % config.minibatches == 0,
        f"--minibatches {config.minibatches} does not divide --group_size {config.group_size}: "
        "give --minibatches 1.",
    )


def has_noisy_test(config: EvalConfig) -> bool:
    """Whether the questions are put a second time, with noisy replies.

    It is for BM25: a simulator or no engine at all makes it no test, and a server, or the web,
    which is paid for, is not asked more than the user says. With `--engine_noise` the one test is
    noisy already.
    """
    searches_bm25 = config.engine == "bm25" and config.method == "search"
    return searches_bm25 and config.eval_noise > 0 and config.engine_noise == 0


def check_lora(config: PolicyConfig) -> None:
    require(config.lora_rank > 0 or not config.merge, "--merge is for --lora_rank N.")
    check_trainable(config.policy)


def check_trainable(model: str) -> None:
    """Raise UserError for a folder that holds only an adapter, not a whole model."""
    require(
        not Path(model, "adapter_config.json").is_file(),
        f"{model} is a LoRA, which cannot be trained further; make it with --merge.",
    )


def check_tracker(config: LoggingSettings) -> None:
    require(
        not config.log_with or find_spec(config.log_with) is not None,
        f"--log_with {config.log_with} needs its package: pip install {config.log_with}.",
    )
