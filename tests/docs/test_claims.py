"""The paper's claims in miniature: a short arm from training to its row in the table."""

import pytest
from accelerate.state import AcceleratorState
from scripts import home, work  # noqa: F401 (fixtures)

import evaluate
import train_policy
from benchmarks import arms, claims, imitation, unmasked
from minizs import rollout
from minizs.trajectory import Example, Trajectory

MAIN = {
    "train_policy.py": train_policy,
    "evaluate.py": evaluate,
    "benchmarks/unmasked.py": unmasked,
    "benchmarks/imitation.py": imitation,
}
SHORT = """--steps 1 --batch_questions 2 --group_size 2 --policy ../base --simulator ../base
    --max_turns 2 --max_turn_tokens 16""".split()


def in_process(name: str, *arguments: str) -> None:
    """Instead of a process each, which would import everything again."""
    AcceleratorState._reset_state(reset_partial_state=True)
    MAIN[name].main(list(arguments))


@pytest.mark.parametrize("arm", ["no_noise", "unmasked"])
def test_a_short_arm_gets_its_row(work, monkeypatch, arm):  # noqa: F811
    """Guards a table that is not made from what was run."""
    monkeypatch.setattr(claims, "script", in_process)
    page = work / "CLAIMS.md"
    run = ["--arms", "reference", arm, "--seeds", "1", "--questions", "4", "--root", "runs/short"]
    claims.main([*run, "--output", str(page), *SHORT])
    lines = page.read_text().splitlines()
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in lines
        if line.startswith(f"| {arm} |")
    ]
    assert len(rows) == 1 and len(rows[0]) == 11 and rows[0][-1] == "1"
    assert all(0 <= float(cell.split(" ± ")[0]) <= 100 for cell in rows[0][1:-1])
    assert any(line.startswith(f"- reference minus {arm}, greedy") for line in lines)
    monkeypatch.setattr(claims, "script", lambda *_: pytest.fail("what is there is made again"))
    claims.main([*run, *SHORT])
    assert (work / "runs/short/CLAIMS.md").read_text() == page.read_text()


def test_a_short_arm_of_the_algorithms(work, monkeypatch, capsys):  # noqa: F811
    """Guards a table of the algorithms that is not made from what was run."""
    monkeypatch.setattr(arms, "script", in_process)
    run = ["--arms", "reinforce", "--seeds", "1", "--questions", "4", "--root", "runs/short"]
    arms.main([*run, *SHORT, "--eval_every", "0"])
    [row] = [line for line in capsys.readouterr().out.splitlines() if "| reinforce (1)" in line]
    assert row.count(" ± ") == 3 * len(arms.TESTS)
    settings = (work / "runs/short/reinforce-0/config.yaml").read_text()
    assert "algorithm: reinforce\n" in settings and "kl_coef: 0.01\n" in settings


def test_a_trial_does_not_pass_for_the_real_thing(work):  # noqa: F811
    """Guards arms of one step in the table, and the published table from being written over."""
    for script in (arms, claims):
        with pytest.raises(SystemExit, match="--root"):
            script.main(["--seeds", "1", "--steps", "1"])
    assert not list(work.iterdir())


def test_each_arm_of_the_table_can_be_run():
    """Guards a claim whose arm no file makes."""
    named = {path.stem for path in (claims.HERE / "configs" / "arms").glob("*.yaml")}
    assert named == set(arms.ARMS)
    assert {arm for *_, some in claims.CLAIMS for arm in some} <= {*claims.ARMS, *named}


def test_unmasked_counts_documents_and_not_the_prompt():
    row = Trajectory(Example("?", ("a",)))
    row.append([1, 2])
    row.append([3, 4], [-1.0, -1.0])
    row.append([5, 6, 7])
    assert unmasked.unmask(row).loss_mask == [0, 0, 1, 1, 1, 1, 1]
    assert rollout.rollout.__module__ == "minizs.rollout"  # it is put back
