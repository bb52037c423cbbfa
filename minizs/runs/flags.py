"""How settings are read from the command line and from YAML files, checked, and saved.

    python train_policy.py --config my.yaml --lr 1e-4      # a flag wins over the file

The settings of a script are a dataclass whose fields are written with `option`. It can inherit
from several smaller ones (settings.py has them): flags stay flat, and `--help` shows the fields of
each class under the first line of its docstring.

What is slow to import is imported inside functions, so that `--help` and a wrong flag answer at
once.
"""

import argparse
import dataclasses
import inspect
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from minizs import UserError, brief, require

PACKAGE = Path(__file__).parents[1]
# Words in an error that come from the machine, not from the code.
DISK_IS_FULL = "No space left|disk is full|quota|inline_"
NOT_PERMITTED = "Permission denied|Read-?only|not permitted|name too long"
OUT_OF_MEMORY = "MemoryError|(of|enough|allocate) memory"
NOT_A_NUMBER = "logits are NaN"
SIZES = ("micro_tokens", "batch_tokens", "batch", "max_context")  # what lowers the use of memory
TRUE = ("true", "yes", "t", "y", "1")
FALSE = ("false", "no", "f", "n", "0")
INSTALL = "install it with: pip install -r requirements.txt"
# Each launcher sets one of these variables: `accelerate launch` and `torchrun`.
LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
SECTIONS = ("train_sim", "train_policy", "evaluate")  # of a file that serves several scripts
MAPPINGS = ("chat_template_args",)  # a file can hold these as a mapping of its own
METAVARS = {int: "N", float: "X", bool: "true|false"}


def option(
    default: Any,
    help: str,
    choices: tuple[str, ...] = (),
    *,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    bare: str = "",
    metavar: str = "",
    may_change: bool = False,
) -> Any:
    """A field of a settings dataclass: all that there is to know about one flag.

    `help` is one sentence or more, for a person who has not read the code. A number has to be at
    least `min`, at most `max` and greater than `above`. `bare` is the value that the flag stands
    for when no value follows it. `metavar` is what `--help` calls the value. With `may_change` a
    run that is resumed can be given another value, since its training would not become another.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "min": min,
        "max": max,
        "above": above,
        "bare": bare,
        "metavar": metavar,
        "may_change": may_change,
    }
    return dataclasses.field(default=default, metadata=metadata)


def parse(kind: type, argv: list[str], saved: Path | None = None) -> Any:
    """The settings of class `kind`: its defaults, then a file's values, then those of the flags.

    The file is the one that `--config` names; without that flag it is `saved`, if that exists.
    Raises UserError, with one sentence, for whatever cannot be accepted.
    """
    parser = make_parser(kind)
    path = parser.parse_known_args(argv)[0].config
    if path is None and saved is not None and saved.is_file():
        path = str(saved)
    flags = []
    if path:
        file = read_yaml(path)
        file.check(kind)
        flags = file.flags(script_of(kind))
    config = _settings(kind, parser.parse_args([*flags, *argv]))
    check_values(config)
    return config


def _settings(kind: type, parsed: argparse.Namespace) -> Any:
    values = dict(vars(parsed))
    del values["config"]
    return kind(**values)


def given(kind: type, argv: list[str]) -> set[str]:
    """The names of the settings to which the flags, or the file of `--config`, give a value."""
    parser = make_parser(kind)
    parser.set_defaults(**{field.name: None for field in dataclasses.fields(kind)})
    path = parser.parse_known_args(argv)[0].config
    flags = read_yaml(path).flags(script_of(kind)) if path else []
    values = vars(parser.parse_args([*flags, *argv]))
    return {name for name, value in values.items() if value is not None and name != "config"}


def make_parser(kind: type) -> argparse.ArgumentParser:
    """A parser with one flag for each field, under one heading for each class that `kind` is of."""
    parser = _Parser(
        usage="%(prog)s [--config FILE.yaml] [--SETTING VALUE ...]",
        description=inspect.getdoc(kind),
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="A YAML file with any of these settings, one a line, such as 'steps: 100'. "
        "A flag wins over it.",
    )
    for group, fields in fields_by_group(kind).items():
        heading = "settings" if group is kind else inspect.getdoc(group).splitlines()[0].rstrip(".")
        section = parser.add_argument_group(heading)
        for field in fields:
            _add_flag(section, field)
    return parser


def fields_by_group(kind: type) -> dict[type, list[dataclasses.Field]]:
    """The fields of a dataclass by the class that declares them first, in the order of its bases.

    A field that a class redefines, to give it another default, stays in the group of its base.
    """
    groups = {group: [] for group in kind.__mro__}
    for field in dataclasses.fields(kind):
        owners = [c for c in kind.__mro__ if field.name in vars(c).get("__dataclass_fields__", {})]
        groups[owners[-1]].append(field)
    return {group: fields for group, fields in groups.items() if fields}


def _add_flag(section, field: dataclasses.Field) -> None:
    option = field.metadata
    silent = field.default in ("", None) or field.type is bool
    default = "" if silent else f" [{field.default}]"
    arguments = {
        "type": _read_bool if field.type is bool else str,
        "default": field.default,
        "help": option["help"].replace("%", "%%") + default,
        "metavar": option["metavar"] or METAVARS.get(field.type, "TEXT"),
    }
    if field.type in (int, float):
        arguments["type"] = field.type
    if option["choices"]:
        arguments["choices"] = option["choices"]
        arguments["metavar"] = "|".join(filter(None, option["choices"]))
    if field.type is bool or option["bare"]:
        arguments["nargs"] = "?"
        arguments["const"] = option["bare"] or True
    section.add_argument(f"--{field.name}", **arguments)


def _read_bool(text: str) -> bool:
    if text.lower() in TRUE:
        return True
    if text.lower() in FALSE:
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        """Raise one sentence, where argparse would print a page of usage and exit."""
        sentence = message[0].upper() + message[1:]
        raise UserError(f"{sentence}; see --help for the settings there are.")


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str, **_) -> None:
        columns = min(100, shutil.get_terminal_size().columns)
        super().__init__(prog, max_help_position=26, width=columns - 2)


def script_of(kind: type) -> str:
    """The name of the script that has these settings, as a section of a file is called."""
    return getattr(kind, "SCRIPT", "")


@dataclasses.dataclass
class SettingsFile:
    """The settings in a file. What stands in a section, `train_policy:` for instance, is for that
    script alone, and wins over what stands outside, which is for all."""

    path: str
    shared: dict[str, Any]
    sections: dict[str, dict[str, Any]]

    def flags(self, script: str) -> list[str]:
        """What concerns a script, as flags: the same code checks both."""
        values = self.shared | self.sections.get(script, {})
        return [f"--{name}={value}" for name, value in values.items()]

    def check(self, kind: type) -> None:
        """Raise UserError for what the script of `kind`, or any other with a section, would refuse.

        The next script may read the file hours later.
        """
        kinds = script_settings() | {script_of(kind): kind}
        for script in dict.fromkeys([*self.sections, script_of(kind)]):
            self._check_shared(script, kinds)
            try:
                parsed = make_parser(kinds[script]).parse_args(self.flags(script))
                check_values(_settings(kinds[script], parsed))
            except UserError as error:
                section = f", for {script}" if script in self.sections else ""
                raise UserError(f"In {self.path}{section}: {error}") from error

    def _check_shared(self, script: str, kinds: dict[str, type]) -> None:
        """Raise UserError for a setting outside the sections that other scripts have, not this."""
        if not self.sections or script not in SECTIONS:
            return
        for name in self.shared:
            owners = [section for section in SECTIONS if has_setting(kinds[section], name)]
            suitable = " or ".join(owners)
            require(
                has_setting(kinds[script], name) or not owners,
                f"In {self.path}, {name} stands outside the sections and so is for all scripts, "
                f"but {script} has no such setting; move it into the section {suitable}.",
            )


def script_settings() -> dict[str, type]:
    """The settings class of each script that a file can have a section for."""
    from minizs.runs import settings  # which imports this module

    kinds = (settings.SimConfig, settings.PolicyConfig, settings.EvalConfig)
    return {script_of(kind): kind for kind in kinds}


def has_setting(kind: type, name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(kind))


def read_yaml(path: str) -> SettingsFile:
    """A file of settings, with or without sections. Raises UserError."""
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"The configuration {path} cannot be read: {brief(error)}") from error
    require(isinstance(values, dict), f"{path} should hold lines such as 'steps: 100'.")
    sections = {}
    for name in SECTIONS:
        if name in values:
            section = values.pop(name)
            if section is None:  # all its lines are commented out
                section = {}
            require(isinstance(section, dict), f"In {path} the section {name} holds no settings.")
            sections[name] = plain_values(section, path)
    return SettingsFile(path, plain_values(values, path), sections)


def plain_values(values: dict, path: str) -> dict[str, Any]:
    """The values as a flag can have them. Raises UserError for those that none can."""
    plain = {}
    for name, value in values.items():
        if isinstance(value, dict) and name in MAPPINGS:
            value = yaml_line(value)
        if isinstance(value, date):
            value = value.isoformat()
        require(
            isinstance(value, str | int | float) and name != "config",
            f"{path} gives {name} no value or many; remove the line or give one (or, for a "
            f"section, call it {', '.join(SECTIONS[:-1])} or {SECTIONS[-1]}).",
        )
        plain[name] = value
    return plain


def yaml_line(mapping: dict) -> str:
    import yaml

    return yaml.safe_dump(mapping, default_flow_style=True).strip()


def save_settings(config: Any, path: Path) -> None:
    """Write the resolved settings in a form that `--config` reads."""
    import yaml

    values = {}
    for fields in fields_by_group(type(config)).values():
        for field in fields:
            values[field.name] = getattr(config, field.name)
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")


def check_values(config: Any) -> None:
    """Raise UserError for a number that is none or lies outside the range of its `option`."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if type(value) in (int, float):
            _check_number(f"--{field.name}", value, field.metadata)


def _check_number(flag: str, value: float, option: dict) -> None:
    # NaN is not less than anything; a seed from 2**63 on is more than torch can take.
    require(abs(value) < 2**63, f"{flag} {value} is too large, or no number; give another.")
    low, high, above = option["min"], option["max"], option["above"]
    if above is not None:
        require(value > above, f"{flag} must be greater than {above}, not {value}.")
    if low is not None and high is not None:
        require(low <= value <= high, f"{flag} must be from {low} to {high}, not {value}.")
    elif low is not None:
        require(value >= low, f"{flag} must be {low} or more, not {value}.")
    elif high is not None:
        require(value <= high, f"{flag} must be {high} or less, not {value}.")


def may_change(config: Any) -> set[str]:
    """The names of the settings that a resumed run may be given other values of."""
    return {field.name for field in dataclasses.fields(config) if field.metadata["may_change"]}


def threads_set_by_user() -> bool:
    """Whether OMP_NUM_THREADS holds the user's wish.

    A launcher sets it to 1 by itself, so that 1 counts only without one. Any other number passes
    through a launcher unchanged.
    """
    threads = os.environ.get("OMP_NUM_THREADS", "")
    launched = any(name in os.environ for name in LAUNCHERS)
    return bool(threads) and not (threads == "1" and launched)


def set_threads(threads: int) -> None:
    """Compute with so many threads.

    With 0, keep to OMP_NUM_THREADS where the user has set it, and else share the cores among the
    processes of this machine: a launcher would leave most of them idle.
    """
    import torch

    if threads == 0 and threads_set_by_user():
        return  # torch has read it
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on Windows or macOS
        cores = len(os.sched_getaffinity(0))
    share = cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(max(1, min(threads, 1024) or share))


def run_script(main: Callable, argv: list[str] | None = None, settings: type | None = None) -> None:
    """Call `main(argv)` and turn the ways in which it can end into a sentence and an exit status.

    What the user can mend becomes one line and exit status 2, Ctrl-C one line and 130. An error
    in the code keeps its traceback. Only flags of the script's `settings` are advised.
    """
    sentence = ""
    status = 0
    warnings.showwarning = show_warning
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal may lack letters that a model writes
            stream.reconfigure(errors="replace")
    try:
        main(sys.argv[1:] if argv is None else argv)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            sentence = stop.code
            status = 1
        else:
            status = stop.code or 0
    except KeyboardInterrupt:
        sentence = "Stopped by Ctrl-C."
        status = 130
    except UserError as error:
        sentence = f"error: {error}"
        status = 2
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] == "minizs":
            raise
        sentence = f"error: the package {error.name} is missing; {INSTALL}"
        status = 2
    except Exception as error:
        advice = machine_advice(error, settings)
        if not advice:
            raise
        sentence = f"error: {brief(error)}; {advice}."
        status = 2
    if sentence:
        print(sentence, file=sys.stderr)
    torch = sys.modules.get("torch")
    if torch and torch.distributed.is_initialized():
        # Threads of the process group can abort a Python that cleans up, and hang one that waits.
        print(end="", flush=True)
        os._exit(status)
    if status:
        sys.exit(status)


def show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Print a warning, above a progress bar if there is one. Ours are sentences for the user, who
    has no use for the line of code that they come from."""
    from tqdm import tqdm

    text = f"Warning: {message}"
    if not Path(filename).is_relative_to(PACKAGE):
        text = warnings.formatwarning(message, category, filename, lineno, line).rstrip()
    tqdm.write(text, file=file or sys.stderr)


def machine_advice(error: Exception, settings: type | None = None) -> str:
    """What the user can do about an error that the machine caused; "" if it is another kind."""
    names = [field.name for field in dataclasses.fields(settings)] if settings else []
    text = brief(error)
    if re.search(DISK_IS_FULL, text):
        flag = " with --resume" if "resume" in names else ""
        return f"the disk is full; make room, then start the command again{flag}"
    if re.search(NOT_PERMITTED, text):
        return "choose another --output or file"
    if re.search(OUT_OF_MEMORY, text):
        sizes = [f"--{name}" for name in SIZES if name in names]
        return f"lower {' or '.join(sizes)}" if sizes else "make what is computed at once smaller"
    if re.search(NOT_A_NUMBER, text):
        return "give a larger --temperature or a model with sound weights"
    return ""
