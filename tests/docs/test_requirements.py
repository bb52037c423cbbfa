"""What is installed: every import has its line, every line one version, and all they need too."""

import ast
import importlib.util
import re
import sys
from importlib import metadata

import pytest
from scripts import ROOT

spec = importlib.util.spec_from_file_location("renew_pins", ROOT / ".ci" / "renew_pins.py")
renew_pins = importlib.util.module_from_spec(spec)
spec.loader.exec_module(renew_pins)

FOLDERS = {
    "requirements.txt": ["*.py", "minizs/**/*.py", "tests/**/*.py"],
    "requirements-bench.txt": ["benchmarks/**/*.py"],
}


def lines(name: str) -> list[str]:
    """The lines of a requirements file and of those that it names, without comments."""
    rows = []
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if line.startswith("-r "):
            rows += lines(line.removeprefix("-r "))
        elif line and not line.startswith("#"):
            rows.append(line)
    return rows


def pinned(name: str) -> dict[str, str]:
    """The version of each distribution in a file, by its normal name."""
    pins = re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)$", "\n".join(lines(name)), re.MULTILINE)
    return {renew_pins.normal(distribution): version for distribution, version in pins}


def imported(patterns: list[str]) -> dict[str, str]:
    """The top-level modules of other projects that files import, each with one such file."""
    files = [file for pattern in patterns for file in sorted(ROOT.glob(pattern))]
    own = {path.stem for path in [*ROOT.glob("*"), *ROOT.glob("tests/**/*.py")]}
    modules = {}
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in names:
                modules.setdefault(name.partition(".")[0], file.name)
    return {m: file for m, file in modules.items() if m not in sys.stdlib_module_names | own}


@pytest.mark.parametrize("requirements", FOLDERS)
def test_every_import_is_a_direct_dependency(requirements):
    """What comes along with another package today may be gone with its next version."""
    direct = pinned(requirements)
    providers = metadata.packages_distributions()
    modules = imported(FOLDERS[requirements])
    assert {"torch", "transformers"} <= modules.keys()
    for module, file in modules.items():
        distributions = providers.get(module, [module])
        names = {renew_pins.normal(name) for name in distributions}
        assert names & direct.keys(), f"{file} imports {module}: add it to {requirements}"


def test_every_direct_dependency_has_one_version():
    """No range: next month's releases do not change what a new user installs."""
    for file in ROOT.glob("requirements*.txt"):
        for line in lines(file.name):
            assert line == "-c constraints.txt" or renew_pins.PIN.fullmatch(line), line
    assert "-c constraints.txt" in lines("requirements.txt")


def needs(name: str) -> list[str]:
    """What a distribution needs without its extras; nothing for one that is not installed here."""
    try:
        requirements = metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return []
    plain = [need for need in requirements if "extra ==" not in need]
    return [renew_pins.normal(re.match(r"[\w.-]+", need)[0]) for need in plain]


def test_what_they_need_is_fixed_too():
    """Every distribution that the direct ones bring along here has its line in constraints.txt."""
    direct, fixed = pinned("requirements.txt"), pinned("constraints.txt")
    installed = {renew_pins.normal(package.name) for package in metadata.distributions()}
    seen = set()
    waiting = list(direct)
    while waiting:
        name = waiting.pop()
        if name not in seen and name in installed and not renew_pins.PLATFORM.match(name):
            seen.add(name)
            waiting += needs(name)
    assert len(seen) > 40
    assert seen <= direct.keys() | fixed.keys()


def test_a_renewal_changes_versions_alone():
    """Names, extras, comments and order stay; platforms' packages stay free."""
    text = "# Why.\n-c constraints.txt\nPyYAML==6.0\ntransformers[serving]==5.0\n"
    versions = {"pyyaml": "7.1", "transformers": "6.2"}
    expected = "# Why.\n-c constraints.txt\nPyYAML==7.1\ntransformers[serving]==6.2\n"
    assert renew_pins.renewed(text, versions) == expected
    newer = versions | {"regex": "2.3", "nvidia-nccl-cu13": "2.29", "triton": "3.7", "anyio": "4.1"}
    fixed = renew_pins.constraints(newer, set(versions)).splitlines()
    assert [line for line in fixed if not line.startswith("#")] == ["anyio==4.1", "regex==2.3"]
