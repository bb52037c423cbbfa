"""The layout of the code: who may import whom, one name for one thing, functions that fit a screen.

All of it is read from the syntax trees; nothing is imported.
"""

import ast
import re
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = ("train_sim", "train_policy", "evaluate")

# An import goes down or stays on its level. What stands flat in minizs/ is the method; it imports
# none of the folders but models/. What a pattern further up names is not of a level further down.
LEVELS = (
    r"minizs",
    r"minizs\.(trajectory|protocol|reward|curriculum|randomness)",
    r"minizs\.models(\..*)?",
    r"minizs\.\w+",
    r"minizs\.engines\..*",
    r"minizs\.world\..*",
    r"minizs\.runs\..*",
    r"minizs\.evaluation\..*",
    r"minizs\.imitation\..*",
)
WITHOUT_TORCH = 1  # this level and those below it import no library that does arithmetic

# Imports that go up nevertheless, each with its reason.
UPWARDS: dict[tuple[str, str], str] = {}

# Names that several modules have for functions or classes of their own, each with its reason.
SHARED_NAMES = {
    "main": "What a script is started by.",
    "train": "The loop of a stage, for the policy and for supervised learning.",
    "check_settings": "What a script refuses before it starts.",
    "read_settings": "What a script's flags mean, with what is silent filled in.",
}

LONGEST = 50  # lines, from the line with `def` to the last one
MOST_PARAMETERS = 8  # without `self`
# Functions beyond either, each with its reason.
LARGE = {
    "minizs.contrast.generate_with_contrast": "As `generate`, and what it stands in contrast to.",
    "minizs.generate.Decoder.__init__": "All that can be chosen of a generation, by keywords.",
    "minizs.generate.generate": "The one call that has all that can be chosen.",
    "minizs.losses.policy_loss": "Each option of the loss is an argument of its own.",
    "minizs.models.flash.attend_packed": "What `transformers` hands to an attention, by name.",
    "minizs.simulator.SimulatedSearch.__init__": "All that can be chosen of a simulator.",
    "minizs.runs.flags.option": "All that there is to know about a flag, by keywords.",
}


@cache
def sources() -> dict[str, Path]:
    """The files of the package and the scripts, by the name that they are imported by."""
    files = {name: ROOT / f"{name}.py" for name in SCRIPTS}
    for path in (ROOT / "minizs").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts).removesuffix(".__init__")] = path
    return files


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_script(path: Path) -> bool:
    """Whether it can be started: such a file stands above all levels, wherever it lies."""
    tests = [ast.unparse(node.test) for node in tree(path).body if isinstance(node, ast.If)]
    return "__name__ == '__main__'" in tests


def level(module: str) -> int:
    if module in sources() and is_script(sources()[module]):
        return len(LEVELS)
    return next(i for i, pattern in enumerate(LEVELS) if re.fullmatch(pattern, module))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, inside its functions too; ours down to the file."""
    modules = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                modules.add(inner if inner in sources() else node.module)
    return modules


def test_an_import_never_goes_up():
    """One can read the method without the folders, and the engines without the runs."""
    upwards = set()
    for module, path in sources().items():
        for imported in imports(path) & sources().keys():
            if level(imported) > level(module):
                upwards.add((module, imported))
    assert upwards == set(UPWARDS)


def test_the_lowest_level_needs_no_torch():
    """Trajectory, protocol, reward, curriculum and randomness run where nothing is installed."""
    heavy = {"torch", "transformers", "accelerate", "numpy", "peft"}
    for module, path in sources().items():
        if level(module) <= WITHOUT_TORCH:
            libraries = {name.split(".")[0] for name in imports(path)}
            assert not libraries & heavy, module


def test_one_name_is_one_thing():
    """No two modules have a public function or class of the same name."""
    modules = defaultdict(set)
    for module, path in sources().items():
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                modules[node.name].add(module)
    shared = {name: owners for name, owners in modules.items() if len(owners) > 1}
    assert shared.keys() == SHARED_NAMES.keys(), shared


def functions(node: ast.AST, prefix: str):
    """(name, node) of each function below a node; the name has those of what it stands in."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            name = f"{prefix}.{child.name}"
            if isinstance(child, ast.FunctionDef):
                yield name, child
            yield from functions(child, name)
        else:
            yield from functions(child, prefix)


def parameters(function: ast.FunctionDef) -> list[str]:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def test_a_function_fits_on_a_screen():
    """What does not, or takes more parameters than one can remember, needs a reason above."""
    large = set()
    for module, path in sources().items():
        for name, function in functions(tree(path), module):
            lines = function.end_lineno - function.lineno + 1
            if lines > LONGEST or len(parameters(function)) > MOST_PARAMETERS:
                large.add(name)
    assert large <= set(LARGE)


@pytest.mark.parametrize("folder", [".", "minizs", "tests", "benchmarks"])
def test_ruff_alone_decides_the_layout(folder):
    """A comment that switches it off hides what is too long."""
    paths = Path(ROOT, folder).glob("*.py") if folder == "." else Path(ROOT, folder).rglob("*.py")
    for path in paths:
        if path != Path(__file__):
            assert not re.search(r"#\s*fmt:", path.read_text(encoding="utf-8")), path
