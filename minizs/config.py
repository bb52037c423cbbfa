"""Settings of the three scripts: a dataclass each, filled from YAML and flags, printed and saved.

    python train_policy.py --config my.yaml --lr 1e-4      # a flag wins over the file

Every field has a default and a help line; an unknown name, in a flag or in the file, is refused.
"""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

Config = TypeVar("Config")


class UserError(Exception):
    """Something that the user can mend. Its one sentence says what is wrong and how."""


def require(condition: bool, message: str) -> None:
    """Raise UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(message)


def option(default: Any, help: str, choices: tuple[str, ...] = (), bare: str = "") -> Any:
    """A field with its help line; `bare` is what the flag without a value stands for."""
    metadata = {"help": help, "choices": choices, "const": bare, "nargs": bare and "?"}
    metadata = {name: value for name, value in metadata.items() if value}
    return dataclasses.field(default=default, metadata=metadata)


def parse(kind: type[Config], argv: list[str] | None = None) -> Config:
    """Read `--config FILE` and flags into a `kind`. Raises UserError for what is unknown."""
    parser = HfArgumentParser(kind, allow_abbrev=False)
    parser.add_argument("--config", help="A YAML file with any of these settings.")
    parser.error = _refuse  # one sentence, not argparse's usage page
    argv = sys.argv[1:] if argv is None else argv
    file = parser.parse_known_args(argv)[0].config
    flags = _read_yaml(file) if file else []
    try:
        parser.parse_args(flags)
    except UserError as error:
        raise UserError(f"In {file}: {error}") from error
    values = vars(parser.parse_args([*flags, *argv]))
    del values["config"]
    return kind(**values)


def _refuse(message: str) -> None:
    raise UserError(f"{message[0].upper()}{message[1:]}; see --help for the settings there are.")


def _read_yaml(path: str) -> list[str]:
    """The settings of a file as flags, so that both are checked in one place."""
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"The configuration {path} cannot be read: {reason}") from error
    require(isinstance(values, dict), f"{path} should hold lines such as 'steps: 100'.")
    for name, value in values.items():
        require(value is not None, f"{path} gives {name} no value; remove the line or give one.")
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

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    ours = getattr(os, "sched_getaffinity", None)  # Linux alone has it
    cores = len(ours(0)) if ours else os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // processes))


def run_script(main: Any, argv: list[str] | None = None) -> None:
    """Call `main(argv)`; a UserError becomes one line and exit status 2."""
    try:
        main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
