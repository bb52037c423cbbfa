"""What a run cost: arithmetic by hand, and the file beside a run."""

import json

import pytest
from scripts import metrics, policy

from minizs.runs.metrics import cost, cost_sentence


def test_the_paper_by_hand():
    """64,000 queries at a web engine cost 586.70 dollars (paper, Table 8); devices by the hour."""
    rows = [
        {"queries": 40_000, "seconds": 1800.0, "processes": 4},
        {"queries": 24_000, "seconds": 1700.0, "seconds_test": 100.0, "processes": 8},
    ]
    spent = cost(rows, "simulator")
    assert spent["queries"] == 64_000
    assert spent["search_dollars"] == pytest.approx(586.7, abs=0.5)
    assert spent["device_hours"] == pytest.approx(4 * 1.5)
    assert spent["device_dollars"] == pytest.approx(6 * 1.47)
    assert spent["saved_dollars"] == pytest.approx(586.88 - 8.82)
    sentence = cost_sentence(spent)
    assert "64,000 queries ($586.88 at a web engine's price)" in sentence
    assert "6.00 device-hours ($8.82)" in sentence


def test_the_web_engine_saves_nothing():
    """Its searches were paid, so that a run which used it does not claim to have saved them."""
    spent = cost([{"queries": 1000, "seconds": 0.0, "processes": 1}], "web")
    assert "saved_dollars" not in spent
    assert "1,000 queries ($9.17 paid to a web engine)" in cost_sentence(spent)


def test_a_run_without_steps_costs_nothing():
    """No step, no cost, and no division by zero."""
    assert set(cost([], "simulator").values()) == {0}


def test_a_run_counts_its_queries(work, capsys):
    """Each search that was executed is one query, also after a resume, which drops some."""
    policy("--save_every", "1", "--output", "run")
    policy("--resume", "run/checkpoints/step-1")
    rows = [json.loads(line) for line in (work / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = (work / "run" / "trajectories.jsonl").read_text().splitlines()  # all of them
    turns = [turn for line in logged for turn in json.loads(line)["turns"]]
    searches = sum(turn["documents"] is not None for turn in turns)
    assert (
        len(logged) == 16 and searches == sum(row["queries"] for row in metrics(work / "run")) > 0
    )
    spent = json.loads((work / "run" / "cost.json").read_text())
    assert spent["queries"] == searches
    assert spent["search_dollars"] == pytest.approx(searches * 0.00917)
    assert spent["device_hours"] == pytest.approx(sum(row["seconds"] for row in rows) / 3600)
    assert capsys.readouterr().out.count(f"{searches} queries ($") == 2
