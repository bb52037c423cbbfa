"""The README's pictures are made by a command, from a run and from what a terminal shows."""

import sys
from xml.etree import ElementTree

import pytest
from scripts import policy
from test_page import CHROMIUM

from benchmarks import pictures


def test_a_terminals_text_becomes_a_picture():
    """Colours begin and end where they did, long lines are broken, and no text is markup."""
    text = "plain \033[32m<green>\033[0m plain\n" + "word " * 40 + "\n\n    \033[33mnoisy\033[0m"
    lines = pictures.terminal_lines(text)
    assert lines[0][0] == ("", "plain")
    assert all(sum(len(word) for _, word in line) <= pictures.COLUMNS for line in lines)
    tree = ElementTree.fromstring(pictures.terminal_picture(text))
    rows = [row for row in tree if row.tag.endswith("text")]
    texts = ["".join(span.text or "" for span in row) for row in rows]
    assert texts[0] == "plain <green> plain" and texts[-1] == "    noisy" and len(texts) == 5
    assert "".join(texts[1:3]).split() == ["word"] * 40
    colours = {span.text: span.get("fill") for row in rows for span in row}
    assert colours["<green>"] == pictures.COLOURS["32"] and colours["noisy"] == "#ffa657"
    assert colours["plain"] == colours["word"] == "#e6edf3"


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no chromium here")
def test_every_picture_is_made_of_a_run(work, monkeypatch):
    """One command makes all pictures of the README from a run."""
    policy("--output", "run")
    # The run's policy has a small context; the question is one of its world.
    monkeypatch.setattr(sys, "argv", ["pictures.py", "run", "--docs", "docs", "--ask", "who?"])
    pictures.main()
    sizes = {path.name: path.stat().st_size for path in (work / "docs").iterdir()}
    assert sorted(sizes) == ["ask.svg", "report-phone.png", "report.png", "trajectory.png"]
    assert min(sizes.values()) > 500 and "who?" in (work / "docs" / "ask.svg").read_text()
