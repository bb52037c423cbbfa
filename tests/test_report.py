"""The page about a run: safe to open, and there however the run ended."""

import json
import re
from dataclasses import asdict

from minizs import report
from minizs.trajectory import Example, Trajectory, Turn

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \" ' & \ud800"


def page(folder, metrics="", trajectories=()) -> str:
    """The report of these logs; `metrics` is the file's text."""
    (folder / "metrics.jsonl").write_text(metrics)
    lines = [json.dumps({"step": step} | asdict(row)) + "\n" for step, row in trajectories]
    (folder / "trajectories.jsonl").write_text("".join(lines))
    report.write(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def trajectory(text: str, noisy: bool = False) -> Trajectory:
    """One search and an answer, with `text` wherever somebody else's words can stand."""
    row = Trajectory(Example(f"q {text}", (text, "gold")), answer=text, reward=0.5)
    row.turns = [Turn(text, "search", text, [text], noisy), Turn(text, "answer", text)]
    return row


def test_hostile_text_stays_text(tmp_path):
    """Guards markup that a model wrote, or the web, from running in the reader's browser."""
    run = tmp_path / "<script>run"
    run.mkdir()
    unanswered = trajectory(HOSTILE)
    unanswered.answer, unanswered.truncated = None, HOSTILE
    html = page(run, "", [(1, trajectory(HOSTILE)), (2, unanswered)])
    assert "<script" not in html and "<img" not in html and "\ud800" not in html
    # Each shows it 6 times: question, two turns, document, answer (or why there is none), gold.
    assert html.count("&lt;/script&gt;&lt;script&gt;alert(1)") == 12


def test_the_page_loads_nothing(tmp_path):
    """Guards readability offline, and a reader whose opening of the page nobody is told of."""
    html = page(tmp_path, '{"step": 1, "reward": 0.5}\n', [(1, trajectory("text"))])
    assert not re.search(r"https?:|//\w|\b(src|href)\s*=|url\(|@import|<script", html)
    assert "default-src 'none'" in html


def test_curves_show_the_numbers_that_were_logged(tmp_path):
    """Guards a curve that is about something else than the log; what is absent has no curve."""
    rows = [{"step": 1, "reward": 0.125}, {"step": 2, "reward": 0.875, "response_tokens": 12345}]
    rows += [{"step": 3, "reward": 0.625, "held_out_f1": 0.375}]
    html = page(tmp_path, "".join(json.dumps(row) + "\n" for row in rows))
    assert "<h3>reward <b>0.625</b>" in html and "min 0.125, max 0.875" in html
    assert 'points="0.0,76.0 157.0,20.0 314.0,38.7"' in html  # y grows downwards
    assert "<b>12,345</b>" in html and "<h3>held_out_f1 <b>0.375</b>" in html
    assert "<h3>kl" not in html


def test_a_killed_run_has_a_page(tmp_path):
    """Guards a report that fails on what a crash leaves: half a line, NaN, or no logs at all."""
    report.write(tmp_path)
    assert (tmp_path / "report.html").exists()
    rows = '{"step": 1, "reward": 0.25, "kl": NaN}\n{"step": 2, "reward": Infinity, "kl": null}\n'
    html = page(tmp_path, rows + '{"step": 3, "rewa')
    assert "<h3>reward <b>0.25</b>" in html and "<h3>kl" not in html
    assert "nan" not in html.lower() and "inf," not in html
    assert not list(tmp_path.glob("*.tmp"))


def test_first_and_last_step_are_shown_turn_by_turn(tmp_path):
    """Guards showing documents as the policy's words, or noisy ones as useful."""
    rows = [(1, trajectory("early")), (2, trajectory("middle")), (3, trajectory("late", True))]
    html = page(tmp_path, "", rows)
    own, document = "<div class=own>early</div>", "<b class=useful>useful</b>\nDoc 1: early"
    assert f"{own}<div class=other>{document}</div>{own}" in html
    assert "<b class=noisy>noisy</b>\nDoc 1: late" in html and "Doc 1: middle" not in html
    assert "<b>reward 0.5</b>" in html and "Gold: <b>late or gold</b>" in html
