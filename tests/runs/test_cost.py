"""What a run cost: arithmetic by hand, and the file beside a run."""

import json

import pytest
from scripts import metrics, policy

from minizs.runs.metrics import COST, cost
from train_policy import PolicyConfig


def test_the_paper_by_hand():
    """Guards a price per query for one per thousand, seconds for hours, one device of several."""
    config = PolicyConfig()
    rows = [
        {"queries": 40_000, "seconds": 1800.0, "processes": 4},
        {"queries": 24_000, "seconds": 1700.0, "seconds_test": 100.0, "processes": 8},
    ]
    spent = cost(rows, config.search_price, config.gpu_price)
    assert spent["queries"] == 64_000
    assert spent["search_dollars"] == pytest.approx(586.7, abs=0.5)  # paper Table 8
    assert spent["device_hours"] == pytest.approx(4 * 1.5)
    assert spent["device_dollars"] == pytest.approx(6 * 1.47)
    text = COST.format(**spent)
    assert "64,000 queries ($586.88 at" in text and "6.00 device-hours ($8.82)" in text


def test_a_run_without_steps_costs_nothing():
    """Guards a division by what is not there."""
    assert set(cost([], 9.17, 1.47).values()) == {0}


def test_a_run_counts_its_queries(work, capsys):
    """Guards queries that are counted per question, twice after a resume, or at another price."""
    prices = ["--search_price", "1000", "--gpu_price", "7200"]
    policy("--save_every", "1", "--output", "run", *prices)
    policy("--resume", "run/checkpoints/step-1", *prices)
    rows = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    shown = (work / "run" / "trajectories.jsonl").read_text().splitlines()  # all of them
    turns = [turn for line in shown for turn in json.loads(line)["turns"]]
    searches = sum(turn["documents"] is not None for turn in turns)
    assert len(shown) == 16 and searches == sum(row["queries"] for row in metrics(work / "run")) > 0
    spent = json.loads((work / "run" / "cost.json").read_text())
    assert spent["queries"] == spent["search_dollars"] == searches
    assert spent["device_dollars"] == pytest.approx(2 * sum(row["seconds"] for row in rows))
    assert capsys.readouterr().out.count(f"{searches} queries (${searches}.00") == 2
