"""Settings of the three scripts: a dataclass each, filled from YAML and flags, printed and saved.

    python train_policy.py --config my.yaml --lr 1e-4      # a flag wins over the file

Every field has a default and a help line; an unknown name, in a flag or in the file, is refused.
Nothing here is slow to import, so that `--help` and a wrong flag answer at once.
"""

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

Config = TypeVar("Config")
MACHINE = {  # words in errors of the machine, not of the code: what the user can do
    "No space left|Disk quota|disk is full|inline_container":  # the last of torch.save
    "the disk is full: free some space, then go on with --resume",
    "Permission denied|Read-only file system|not permitted": "choose another --output",
    "MemoryError|out of memory|allocate memory": "lower --micro_tokens, --max_context or the batch",
}


class UserError(Exception):
    """Something that the user can mend. Its one sentence says what is wrong and how."""


def require(condition: bool, message: str) -> None:
    """Raise UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(message)


def brief(error: BaseException) -> str:
    """What a library's error says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def option(default: Any, help: str, choices: tuple[str, ...] = (), bare: Any = None) -> Any:
    """A field with its help line; `bare` is what the flag without a value stands for."""
    bare = True if isinstance(default, bool) else bare
    metadata = {"help": help, "choices": choices or None, "const": bare, "nargs": bare and "?"}
    return dataclasses.field(default=default, metadata=metadata)


def parse(kind: type[Config], argv: list[str] | None = None) -> Config:
    """Read `--config FILE` and flags into a `kind`. Raises UserError for what is unknown."""
    defaults = argparse.ArgumentDefaultsHelpFormatter  # shows them
    parser = argparse.ArgumentParser(formatter_class=defaults, allow_abbrev=False)
    parser.error = _refuse  # one sentence, not argparse's usage page
    parser.add_argument("--config", help="A YAML file with any of these settings.")
    for field in dataclasses.fields(kind):
        read = _true_or_false if field.type is bool else field.type
        parser.add_argument(f"--{field.name}", type=read, default=field.default, **field.metadata)
    argv = sys.argv[1:] if argv is None else argv
    file = parser.parse_known_args(argv)[0].config
    flags = _read_yaml(file) if file else []
    try:
        parser.parse_args(flags)
    except UserError as error:
        raise UserError(f"In {file}: {error}") from error
    values = vars(parser.parse_args([*flags, *argv]))
    del values["config"]
    for name, value in values.items():
        finite = isinstance(value, str) or abs(value) < 2**63  # which NaN is not
        require(finite, f"--{name} {value} is too large, or no number; give another.")
    return kind(**values)


def _true_or_false(text: str) -> bool:
    return bool(("false", "true").index(text.lower()))  # argparse takes a ValueError for a refusal


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
        require(isinstance(value, str | int | float) and name != "config",
                f"{path} gives {name} no value or many; remove the line or give one.")  # fmt: skip
    return [f"--{name}={value}" for name, value in values.items()]


def save(config: Any, path: Path) -> None:
    """Write the resolved settings, in a form that `--config` reads."""
    path.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False))


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

    ours = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = len(ours(0)) if ours else os.cpu_count() or 1
    require(threads <= 1024, f"--threads {threads} is more than any CPU has; 0 takes all cores.")
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    require(processes.isdecimal(), f"LOCAL_WORLD_SIZE is {processes!r}; unset that variable.")
    torch.set_num_threads(threads or max(1, cores // max(1, int(processes))))


def run_script(main: Callable, argv: list[str] | None = None) -> None:
    """Call `main(argv)`. What the user can mend becomes one line and exit status 2, Ctrl-C 130."""
    try:
        return main(argv)
    except KeyboardInterrupt:
        sentence, status = "stopped by Ctrl-C; what was saved is kept.", 130
    except UserError as error:
        sentence, status = f"error: {error}", 2
    except Exception as error:
        said, status = brief(error), 2
        advice = [advice for words, advice in MACHINE.items() if re.search(words, said)]
        if not advice:
            raise
        sentence = f"error: {said}; {advice[0]}."
    print(sentence, file=sys.stderr)
    sys.exit(status)
