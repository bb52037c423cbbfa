"""The paper's claims in miniature: a short arm from training to its row in the table."""

import json

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


def cells(page: str, name: str) -> list[list[str]]:
    """The rows of a page's tables that begin with this name."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]
    return [row for row in rows if row[0] == name]


@pytest.mark.parametrize("arm", ["no_noise", "unmasked"])
def test_a_short_arm_gets_its_row(work, monkeypatch, arm):  # noqa: F811
    """An arm that was run has a row of all questions, a row of one and two hops, and a sentence
    that compares it; what is complete is not run again."""
    monkeypatch.setattr(arms, "script", in_process)
    page = work / "CLAIMS.md"
    run = ["--arms", "reference", arm, "--seeds", "1", "--questions", "4", "--root", "runs/short"]
    claims.main([*run, "--output", str(page), *SHORT])
    text = page.read_text()
    whole, by_hops = cells(text, f"`{arm}`")
    assert len(whole) == 5 and whole[-1] == "1" and len(by_hops) == 7
    scores = whole[1:-1] + by_hops[1:]
    assert all(0 <= float(score.split(" ± ")[0]) <= 100 for score in scores)
    assert f"- Compared with `{arm}`, `reference` is " in text
    monkeypatch.setattr(arms, "script", lambda *_: pytest.fail("a complete arm is run again"))
    claims.main([*run, *SHORT])
    assert (work / "runs/short/CLAIMS.md").read_text() == text


def test_a_short_arm_of_the_algorithms(work, monkeypatch, capsys):  # noqa: F811
    """An arm is trained with the settings of its file and has a score in each test."""
    monkeypatch.setattr(arms, "script", in_process)
    run = ["--arms", "reinforce", "--seeds", "1", "--questions", "4", "--root", "runs/short"]
    arms.main([*run, *SHORT, "--eval_every", "0"])
    [row] = cells(capsys.readouterr().out, "reinforce (1)")
    assert sum(" ± " in cell for cell in row) == len(arms.GROUPS) * len(arms.TESTS)
    settings = (work / "runs/short/reinforce-0/config.yaml").read_text()
    assert "algorithm: reinforce\n" in settings and "kl_coef: 0.01\n" in settings


def write_scores(root, arm: str, scores: list[float]) -> None:
    """The files of an arm that has these scores in all tests, one for each seed."""
    for seed, score in enumerate(scores):
        folder = root / f"{arm}-{seed}"
        folder.mkdir()
        figures = dict.fromkeys(arms.GROUPS, {"f1": score, "f1_stderr": 0.01})
        for name in arms.TESTS:
            (folder / f"{name}.json").write_text(json.dumps(figures))


def test_means_and_differences_by_hand(tmp_path):
    """Errors are those over seeds; a difference is paired by seed, over the seeds of both arms."""
    write_scores(tmp_path, "reference", [0.5, 0.7, 0.9])
    write_scores(tmp_path, "no_noise", [0.6, 0.7])
    write_scores(tmp_path, "random_noise", [0.1, 0.31])
    claim = claims.Claim("", "", ("reference", "no_noise", "random_noise", "reversed_noise"))
    result = claims.read_result(claim, [tmp_path])
    # 0.2 / sqrt(3) = 0.115; gaps -0.1 and 0.0, 0.4 and 0.39.
    assert str(result.scores["reference", "greedy", "overall"]) == "70.0 ± 11.5"
    assert result.differences["no_noise", "sampled"] == pytest.approx((-0.05, 0.05, 2))
    assert claims.gap(result.differences["no_noise", "greedy"]) == "5.0 ± 5.0 points behind"
    assert claims.gap(result.differences["random_noise", "noisy"]) == "**39.5 ± 0.5 points** ahead"
    assert result.seeds("reversed_noise") == 0
    assert claims.comparison(result, "reversed_noise") == ""
    assert claims.comparison(result, "no_noise").endswith("are noisy (2 seeds).")


def test_one_score_has_the_error_over_questions():
    """One seed, or the same score in all of them, says nothing about other seeds."""
    same = [arms.Estimate(0.3, 0.02)] * 3
    assert arms.over_seeds(same) == (0.3, 0.02, 3)
    assert arms.over_seeds(same[:1]) == (0.3, 0.02, 1)
    assert arms.over_seeds([]) is None


def test_a_trial_does_not_pass_for_the_real_thing(work):  # noqa: F811
    """Other settings are refused where they would mix with the results that are published."""
    for script in (arms, claims):
        with pytest.raises(SystemExit, match="--root"):
            script.main(["--seeds", "1", "--steps", "1"])
    assert not list(work.iterdir())


def test_each_arm_of_the_table_can_be_run():
    """Each arm of a claim has a file of settings or a script."""
    named = {path.stem for path in (claims.HERE / "configs" / "arms").glob("*.yaml")}
    assert named == set(arms.ARMS)
    assert {arm for claim in claims.CLAIMS for arm in claim.arms} <= {*claims.ARMS, *named}


def test_the_published_page_is_what_the_script_writes():
    """The page has the introduction and each claim as they stand in the script."""
    text = (claims.HERE / "benchmarks" / "CLAIMS.md").read_text(encoding="utf-8")
    assert text.startswith(claims.INTRODUCTION)
    for claim in claims.CLAIMS:
        assert f"## {claim.title}\n\n{claim.paper}\n" in text
        assert all(len(cells(text, f"`{arm}`")) >= 2 for arm in claim.arms)


def test_unmasked_counts_documents_and_not_the_prompt():
    row = Trajectory(Example("?", ("a",)))
    row.append([1, 2])
    row.append([3, 4], [-1.0, -1.0])
    row.append([5, 6, 7])
    assert unmasked.unmask(row).loss_mask == [0, 0, 1, 1, 1, 1, 1]
    assert rollout.rollout.__module__ == "minizs.rollout"  # it is put back
