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
    attention: str = option("auto", "'auto': flash-attn if it is there and of use, else PyTorch's.",
                            ("auto", "sdpa", "flash_attention_2"))  # fmt: skip
    dtype: str = option("auto", "What the models compute in; 'auto': bfloat16 on a GPU.",
                        ("auto", "float32", "bfloat16"))  # fmt: skip
    data: str = option("world", "Questions: 'world', or .jsonl, .json, .parquet files and hub "
                       "names, commas between; 'paper': its seven test sets.")  # fmt: skip
    output: str = option("", "Where the results go; empty: a new place in runs/.")
    overwrite: bool = option(False, "Delete what the output holds.")
    seed: int = option(0, "Decides every random number of the run.")
    threads: int = option(0, "CPU threads a process; 0: all cores, shared by the processes.")

    engine: str = option("simulator", "What answers the searches; 'none': nothing does.", ENGINES)
    engine_noise: float = option(0.0, "How often a real engine's reply lacks what is needed.")
    engine_url: str = option("", "For --engine http: the retriever's address, or several.")
    engine_api: str = option("search-r1", "Whose protocol it speaks.", ("search-r1", "zerosearch"))
    web: str = option("serper", "For --engine web: whose API; its key is in SERPER_API_KEY or "
                      "SERPAPI_API_KEY.", ("serper", "serpapi"))  # fmt: skip
    corpus: str = option("", "For --engine bm25 on your own data: .txt (a document a line), .jsonl "
                         "or .parquet.")  # fmt: skip
    cache: str = option("", "A file that keeps what http and web engines answered.")
    top_k: int = option(3, "Documents a search.")
    simulator: str = option("", "A folder, a hub name, or addresses of a server; empty: "
                            "runs/simulator, made if it is missing.")  # fmt: skip
    simulator_template: str = option("", "A file with its prompt's wording, or 'untuned'; empty: "
                                     "what lies beside its weights.")  # fmt: skip
    simulator_model: str = option("", "Its name at the server (`transformers serve`: its folder); "
                                  "empty: the first there is.")  # fmt: skip
    simulator_api: str = option("completions", "Of the server; 'chat' if the simulator has a chat "
                                "template.", ("completions", "chat"))  # fmt: skip
    simulator_device: str = option("", "Where the simulator runs, such as cuda:1.")
    simulator_temperature: float = option(0.8, "At which the simulator writes.")
    timeout: float = option(60.0, "Seconds that one request to a server may take.")
    retries: int = option(5, "How often a failed request is sent again.")

    max_turns: int = option(6, "Generations a trajectory; there are at most one fewer searches.")
    max_turn_tokens: int = option(40, "Tokens the policy may write in a turn.")
    max_document_tokens: int = option(80, "Tokens of an engine's reply, tags included.")
    max_context: int = option(448, "Tokens of a whole trajectory.")
    temperature: float = option(1.0, "At which the policy samples, and is scored.")


def check_search(config: SearchConfig) -> None:
    """Raise UserError for what is wrong with these, before anything expensive starts."""
    from minizs import data, models

    check_ranges(
        config,
        positive="top_k max_turns max_turn_tokens max_document_tokens max_context timeout",
        not_negative="threads simulator_temperature temperature retries",
        share="engine_noise",
    )
    models.check_model(config.policy)
    models.check_positions(config.policy, config.max_context)
    data.check(config.data)
    if config.engine == "simulator" and config.simulator and not is_url(config.simulator):
        models.check_model(config.simulator)
    if config.engine == "bm25" and config.data != "world":
        require(bool(config.corpus), "--engine bm25 on your own --data needs --corpus FILE.")
    require(config.engine != "http" or is_url(config.engine_url),
            "--engine http needs --engine_url http://HOST:PORT.")  # fmt: skip
    for path in (config.corpus, config.simulator_template):
        there = path in ("", "tuned", "untuned") or Path(path).is_file()
        require(there, f"There is no file {path!r}; check the path.")


def is_url(text: str) -> bool:
    """Whether this names a server, not a folder."""
    return text.startswith(("http://", "https://"))
