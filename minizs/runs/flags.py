"""How settings are read: a dataclass (settings.py) filled from YAML and flags, and saved.

    python train_policy.py --config my.yaml --lr 1e-4      # a flag wins over the file

What is slow to import is imported late, so that `--help` and a wrong flag answer at once."""

import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, field
from pathlib import Path
from typing import Any

import yaml

from minizs import UserError, brief, require

MACHINE = {  # words in errors of the machine, not of the code: what the user can do
    "No space left|disk is full|quota|inline_": "the disk is full; --resume when it is not",
    "Permission denied|Read-?only|not permitted|name too long": "choose another --output or file",
    "MemoryError|(of|enough|allocate) memory": "lower --micro_tokens, --max_context or the batch",
    "logits are NaN": "give a larger --temperature or a model with sound weights",
}


def option(default: Any, help: str, choices: tuple[str, ...] = (), bare: str = "") -> Any:
    """A field with its help line; `bare` is what the flag without a value stands for."""
    metadata = {"nargs": "?", "const": bare} if bare else {}
    return field(default=default, metadata=metadata | {"help": help, "choices": choices or None})


def parse(kind: type, argv: list[str], own: Path = Path()) -> Any:
    """Fill a dataclass from `--config`, else from `own` if it is there, and flags; or UserError."""
    from transformers import HfArgumentParser  # loads no torch

    parser = HfArgumentParser(kind, allow_abbrev=False)
    parser.error = _refuse  # one sentence, not argparse's usage page
    parser.add_argument("--config", help="A YAML file with any of these settings.")
    file = parser.parse_known_args(argv)[0].config or (own if own.is_file() else None)
    flags = _read_yaml(file) if file else []
    try:
        parser.parse_args(flags)
    except UserError as error:
        raise UserError(f"In {file}: {error}") from error
    values = vars(parser.parse_args([*flags, *argv]))
    del values["config"]
    for name, value in values.items():
        finite = isinstance(value, str | None) or abs(value) < 2**63  # which NaN is not
        require(finite, f"--{name} {value} is too large, or no number; give another.")
    return kind(**values)


def _refuse(message: str) -> None:
    raise UserError(f"{message[0].upper()}{message[1:]}; see --help for the settings there are.")


def _read_yaml(path: str) -> list[str]:
    """The settings of a file as flags, so that both are checked in one place."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"The configuration {path} cannot be read: {brief(error)}") from error
    require(isinstance(values, dict), f"{path} should hold lines such as 'steps: 100'.")
    for name, value in values.items():
        require(
            isinstance(value, str | int | float) and name != "config",
            f"{path} gives {name} no value or many; remove the line or give one.",
        )
    return [f"--{name}={value}" for name, value in values.items()]


def save(config: Any, path: Path) -> None:
    """Write the resolved settings, in a form that `--config` reads."""
    path.write_text(yaml.safe_dump(asdict(config), sort_keys=False))


def check_ranges(config: Any, positive: str = "", not_negative: str = "", share: str = "") -> None:
    """Raise UserError for a number out of range; each argument names settings, spaces between."""
    for name in positive.split():
        require(getattr(config, name) > 0, f"--{name} must be greater than 0.")
    for name in not_negative.split():
        require(getattr(config, name) >= 0, f"--{name} must be 0 or more.")
    for name in share.split():
        require(0 <= getattr(config, name) <= 1, f"--{name} is a share: give a number from 0 to 1.")


def set_threads(threads: int) -> None:
    """Share the cores among this machine's processes, unless told how many threads each may have:
    `accelerate launch` sets one thread a process on a CPU, which would leave cores idle."""
    import torch

    cores = len(getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0))
    threads = min(threads, 1024) or cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(max(1, threads))


def run_script(main: Callable, argv: list[str] | None = None) -> None:
    """Call `main(argv)`. What the user can mend becomes one line and exit status 2, Ctrl-C 130."""
    sentence, status = "", 0
    try:
        main(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:
        sentence, status = (stop.code, 1) if isinstance(stop.code, str) else ("", stop.code)
    except KeyboardInterrupt:
        sentence, status = "stopped by Ctrl-C; what was saved is kept.", 130
    except Exception as error:
        said, status = brief(error), 2
        advice = [f"{said}; {what}." for words, what in MACHINE.items() if re.search(words, said)]
        if not advice and not isinstance(error, UserError):
            raise
        sentence = f"error: {error if isinstance(error, UserError) else advice[0]}"
    if sentence:
        print(sentence, file=sys.stderr)
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        # Threads of the process group can abort a Python that cleans up, and hang one that waits.
        print(end="", flush=True)
        os._exit(status or 0)
    if status:
        sys.exit(status)
