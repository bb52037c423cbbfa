"""Pin the newest versions that fit together, in requirements*.txt and constraints.txt.

    python .ci/renew_pins.py && pip install -r requirements.txt && python -m pytest -q

pip is asked what it would install for the names in the requirements, and nothing is installed. The
pins count once the suite has passed with them. What belongs to one platform alone, such as CUDA's
libraries or what a Windows terminal needs, stays free, so that one file serves all."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLATFORM = re.compile(r"nvidia-|cuda-|triton|colorama|pywin32|intel-|tbb|mkl|umf")
PIN = re.compile(r"^(([\w.-]+)(?:\[[\w,-]+\])?)==\S+$", re.MULTILINE)
SOMETIMES = ["setuptools"]  # torch needs it from Python 3.12 on
SOURCE = ["flash-attn"]  # whose needs pip cannot tell without compiling it; here they are
NEEDED_BY_SOURCE = ["einops"]
HEADER = """\
# What the packages in requirements*.txt need in turn, at the versions that the suite passed with.
# Packages of one platform alone are free. `python .ci/renew_pins.py` writes this file.
"""


def normal(name: str) -> str:
    """A distribution's name as indexes compare it: "PyYAML" is "pyyaml", "a_b" is "a-b"."""
    return re.sub(r"[-_.]+", "-", name).lower()


def resolve(requirements: list[str]) -> dict[str, str]:
    """The version of every distribution that pip would install for these, by normal name."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--upgrade", "--report", "-", *requirements]
    report = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    rows = [row["metadata"] for row in json.loads(report)["install"]]
    return {normal(row["name"]): row["version"].split("+")[0] for row in rows}


def newest(name: str) -> str:
    """The newest version of one distribution in the index, whatever it needs."""
    command = [sys.executable, "-m", "pip", "index", "versions", name]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return re.search(r"\((\S+)\)", told)[1]


def renewed(text: str, versions: dict[str, str]) -> str:
    """A requirements file with these versions in place of its own."""
    return PIN.sub(lambda pin: f"{pin[1]}=={versions[normal(pin[2])]}", text)


def constraints(versions: dict[str, str], direct: set[str]) -> str:
    """The text of constraints.txt: all that is neither direct nor of one platform alone."""
    names = sorted(versions.keys() - direct)
    lines = [f"{name}=={versions[name]}\n" for name in names if not PLATFORM.match(name)]
    return HEADER + "".join(lines)


def main() -> None:
    files = sorted(ROOT.glob("requirements*.txt"))
    pins = [pin for file in files for pin in PIN.findall(file.read_text(encoding="utf-8"))]
    direct = {normal(name) for _, name in pins}
    requirements = [whole for whole, name in pins if name not in SOURCE]
    versions = resolve([*requirements, *SOMETIMES, *NEEDED_BY_SOURCE])
    versions |= {name: newest(name) for name in SOURCE}
    for file in files:
        text = renewed(file.read_text(encoding="utf-8"), versions)
        file.write_text(text, encoding="utf-8")
    (ROOT / "constraints.txt").write_text(constraints(versions, direct), encoding="utf-8")
    print("The pins are renewed. They count once the suite has passed with them.")


if __name__ == "__main__":
    main()
