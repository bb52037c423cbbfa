"""The settings that training and testing a searching policy have in common. No torch."""

from dataclasses import dataclass
from pathlib import Path

from minizs.config import check_ranges, option, require

ENGINES = ("simulator", "bm25", "http", "web", "none")


@dataclass
class SearchConfig:
    """Which model searches with which engine, and how far."""

    policy: str = option("tiny", "The policy: 'tiny' (shipped), a folder or a hub name.")
    revision: str = option("", "Which revision of a hub name.")
    chat_template: str = option("auto", "'auto': the tokenizer's, if it has one.", ("auto", "none"))
    attention: str = option("auto", "'auto': flash-attn where it can run, else PyTorch's.",
                            ("auto", "sdpa", "flash_attention_2"))  # fmt: skip
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
    on_search_error: str = option("stop", "Then: end the run, or find nothing and count it.",
                                  ("stop", "empty"))  # fmt: skip

    max_turns: int = option(6, "Generations a trajectory; there are at most one fewer searches.")
    max_turn_tokens: int = option(40, "Tokens the policy may write in a turn.")
    max_document_tokens: int = option(80, "Tokens of an engine's reply, tags included.")
    max_context: int = option(448, "Tokens of a whole trajectory.")
    temperature: float = option(1.0, "At which the policy samples, and is scored.")


def check_search(config: SearchConfig) -> None:
    """Raise UserError for what is wrong with these, before anything expensive starts."""
    from minizs import data, models

    check_ranges(
        config, "top_k max_turns max_turn_tokens max_document_tokens max_context timeout",
        "threads simulator_temperature temperature retries", share="engine_noise")  # fmt: skip
    models.check_model(config.policy)
    models.check_positions(config.policy, config.max_context)
    data.check(config.data)
    if config.engine == "simulator" and config.simulator and not is_url(config.simulator):
        models.check_model(config.simulator)
    if config.engine == "bm25" and config.data != "world":
        require(bool(config.corpus), "--engine bm25 on your own --data needs --corpus FILE.")
    require(config.engine != "http" or is_url(config.engine_url),
            "--engine http needs --engine_url http://HOST:PORT.")  # fmt: skip
    for path in {config.corpus, config.simulator_template} - {"", "tuned", "untuned"}:
        require(Path(path).is_file(), f"There is no file {path!r}; check the path.")


def is_url(text: str) -> bool:
    """Whether this names a server, not a folder."""
    return text.startswith(("http://", "https://"))
