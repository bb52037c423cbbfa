"""The example with one's own data in docs/real_models.md: its commands as they stand, run small."""

import json
import re
import shlex
import shutil

from scripts import ROOT

import evaluate
import train_policy
import train_sim
from minizs.runs import data
from minizs.runs.run_folder import read_lines

SCRIPTS = {"train_sim.py": train_sim, "train_policy.py": train_policy, "evaluate.py": evaluate}
PAGE = (ROOT / "docs" / "real_models.md").read_text(encoding="utf-8")
FILES = ROOT / "docs" / "own_data"
# In the order of the page: what makes each command small enough for a model of two layers.
SMALL = [
    "",
    "--steps 2 --batch_tokens 400",
    "--steps 1 --group_size 2 --batch_questions 2 --max_turns 3 --max_turn_tokens 16 "
    "--max_document_tokens 60 --max_context 320",
    "",
    "",
]


def commands() -> list[list[str]]:
    """The words of each command of the example, in order; the launcher is left out."""
    section = PAGE.split("\n## ")[1]
    blocks = re.findall(r"^```bash\n(.*?)^```", section, flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[next(i for i, w in enumerate(line) if w in SCRIPTS) :] for line in words if line]


def test_the_files_are_what_the_page_says():
    """Twenty questions, twenty lines of text, and some questions that are held out. A line of the
    text holds each answer."""
    examples = data.load_examples(str(FILES / "questions.jsonl"), "test")
    lines = (FILES / "handbook.txt").read_text(encoding="utf-8").splitlines()
    assert len(examples) == len(lines) == 20
    assert sum(map(data.is_held_out, examples)) == 4
    for example in examples:
        assert any(answer in line for answer in example.answers for line in lines), example
    # The page quotes some of both.
    assert all(line in PAGE for line in lines[:2])
    assert (FILES / "questions.jsonl").read_text(encoding="utf-8").splitlines()[12] in PAGE


def test_the_commands_of_the_page(work, capsys):
    """Each command finds what the one before it left, and the test is of held-out questions."""
    shutil.copytree(FILES, "docs/own_data")
    lines = commands()
    assert len(lines) == len(SMALL)
    for (script, *flags), small in zip(lines, SMALL, strict=True):
        flags = ["../base" if flag == "MODEL" else flag for flag in flags]
        capsys.readouterr()
        SCRIPTS[script].main([*flags, *small.split(), "--threads", "1"])
    printed = capsys.readouterr().out
    assert "question how much does a lost key cost?" in printed
    assert "--max_context 320" in printed  # the limits of the training
    rows = read_lines(work / "runs/shop_pairs/collected.jsonl")
    assert {row["label"] for row in rows} == {"useful", "noisy"}
    figures = json.loads((work / "runs/shop/evaluation.json").read_text(encoding="utf-8"))
    assert figures["overall"]["n"] == figures["before"]["overall"]["n"] == 4
