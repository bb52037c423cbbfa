"""The benchmark of a GPU, in tiny shapes on whatever machine there is."""

import json

import pytest

from benchmarks import gpu


def test_the_parts_that_matter_run_to_their_ends(tmp_path, capsys):
    """Every part leaves its figures behind; nothing about a card is learnt here."""
    parts = ["machine", "correctness", "decode_1.5b", "rollout", "update"]
    gpu.main(["--dry_run", "--output", str(tmp_path), "--only", *parts])
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert {name: part["outcome"] for name, part in results["parts"].items()} == dict.fromkeys(
        parts, "done"
    )
    for name, figures in results["correctness"].items():
        assert "equal" not in figures or figures["equal"] == figures["of"], name
    assert results["correctness"]["bf16 |sampler - scorer|, graphs on"]["q99"] < 0.5
    assert "| rollout | graphs |" in capsys.readouterr().out


def test_a_part_that_fails_or_takes_too_long_does_not_stop_the_others(tmp_path, monkeypatch):
    """The rest of the device's time is still used, and the reason is kept."""

    def fail(_bench):
        raise RuntimeError("no kernel image")

    def wait(_bench):
        while True:
            pass

    monkeypatch.setitem(gpu.PARTS, "profile", (fail, 10))
    monkeypatch.setitem(gpu.PARTS, "variants", (wait, 0.2))
    monkeypatch.setattr(gpu, "LEAST", 0.0)
    with pytest.raises(SystemExit, match="profile, variants"):
        gpu.main(
            ["--dry_run", "--output", str(tmp_path), "--only", "profile", "variants", "machine"]
        )
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert "no kernel image" in parts["profile"]["outcome"]
    assert "cut short" in parts["variants"]["outcome"]
    assert parts["machine"]["outcome"] == "done"
