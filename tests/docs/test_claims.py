"""The paper's claims in miniature: short arms from training to their rows on the page."""

import json
from dataclasses import replace

import pytest
from scripts import everything, home, work  # noqa: F401 (fixtures)

from benchmarks import arms, claims, random_engine, unmasked
from minizs import UserError, rollout
from minizs.curriculum import mean_noise
from minizs.runs import build
from minizs.runs.flags import parse
from minizs.runs.run_folder import read_lines
from minizs.runs.settings import PolicyConfig
from minizs.trajectory import Example, SearchRequest, Trajectory
from minizs.world.facts import embedded

RUN = "--seeds 1 --questions 4 --root runs/short".split()
SHORT = """--steps 2 --batch_questions 4 --group_size 2 --simulator tiny --max_turns 3
    --noise_start 0.5 --noise_end 1""".split()


def cells(page: str, name: str) -> list[list[str]]:
    """The rows of a page's tables that begin with this name."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]
    return [row for row in rows if row[0] == name]


def trajectories(arm: str) -> list[dict]:
    """Those that the training of an arm has logged."""
    return read_lines(arms.Path("runs/short", f"{arm}-0", "trajectories.jsonl"))


def replies(arm: str) -> list[list[str]]:
    """What the searches of an arm's training were answered."""
    turns = [turn for row in trajectories(arm) for turn in row["turns"]]
    return [turn["documents"] for turn in turns if turn["documents"] is not None]


def test_short_arms_get_their_rows(work, capsys):  # noqa: F811
    """Arms are trained and tested: each has a row in the table, and a claim of two arms a section
    with scores and differences. What is complete is not run again."""
    names = ["base", "grpo", "no_noise", "unmasked", "empty_engine", "random_engine", "bm25_noise"]
    arms.main(["--arms", *names, *RUN, *SHORT])
    table = capsys.readouterr().out
    for name in names:
        [[_, *scores, seeds]] = cells(table, f"`{name}`")
        assert seeds == "1" and len(scores) == len(arms.TESTS)
        assert all(0 <= float(score.split(" ± ")[0]) <= 100 for score in scores)

    claims.main(["--root", "runs/short", "--output", "page.md"])
    page = (work / "page.md").read_text()
    titles = [claim.title for claim in claims.CLAIMS if f"## {claim.title}\n" in page]
    assert len(titles) == 4  # those whose first arm and another one were run
    for other in ("no_noise", "unmasked", "empty_engine", "random_engine", "bm25_noise"):
        [difference] = cells(page, f"minus `{other}`")
        assert len(difference) == len(arms.TESTS) + 2

    before = everything(work / "runs")
    arms.main(["--arms", *names, *RUN, *SHORT])
    assert everything(work / "runs") == before
    with pytest.raises(UserError, match="cannot go on with other settings: --lr"):
        arms.main(["--arms", "grpo", *RUN, *SHORT, "--lr", "0.1"])
    check_trainings(work / "runs/short")


def check_trainings(root) -> None:
    """A seed draws the same questions in every arm, and each arm is what its name says."""
    questions = [row["example"] for row in trajectories("grpo")]
    for name in ("no_noise", "unmasked", "random_engine"):
        assert [row["example"] for row in trajectories(name)] == questions
    assert replies("empty_engine") and not any(replies("empty_engine"))
    documents = set(embedded("train").documents)
    assert replies("random_engine") and all(
        text in documents for reply in replies("random_engine") for text in reply
    )
    searching = [row for row in trajectories("unmasked") if len(row["turns"]) > 1]
    assert searching
    for row in searching:
        own = row["loss_mask"].index(1)
        assert all(row["loss_mask"][own:])
    steps = read_lines(root / "no_noise-0/metrics.jsonl")
    assert [step["noisy_replies"] for step in steps] == [0, 0]
    assert build.rollout is rollout.rollout  # what two of the scripts replace is put back
    assert build.build_engine.__module__ == "minizs.runs.build"


def test_a_short_imitation(work, monkeypatch, capsys):  # noqa: F811
    """Imitation is a warm start without a step after it; its policy is tested as others are."""
    monkeypatch.setattr(arms, "TRAINING_QUESTIONS", 80)
    arms.main(["--arms", "imitation", *RUN, *SHORT, "--group_size", "4"])
    assert len(cells(capsys.readouterr().out, "`imitation`")) == 1
    folder = work / "runs/short/imitation-0"
    assert len(read_lines(folder / "warm_start/metrics.jsonl")) == 3  # 3/2 of two steps
    assert read_lines(folder / "metrics.jsonl") == []


@pytest.mark.slow
def test_runs_side_by_side(work, capsys):  # noqa: F811
    """Two processes at a time give what one gives."""
    for parallel, root in (("1", "runs/one"), ("2", "runs/two")):
        run = ["--seeds", "2", "--questions", "4", "--root", root, "--parallel", parallel]
        arms.main(["--arms", "base", "no_noise", *run, *SHORT, "--threads", "1"])
    one, two = (
        table for table in capsys.readouterr().out.split("| arm |") if "`no_noise`" in table
    )
    assert cells(one, "`no_noise`") == cells(two, "`no_noise`") != []


def test_arms_follow_from_the_main_job():
    """Whatever its curriculum is, the noise of the arms that are compared has the same mean, and
    each arm has settings that its script accepts."""
    for default in (
        PolicyConfig(),
        PolicyConfig(steps=150, noise_start=0.1, noise_end=0.75),
        PolicyConfig(steps=30, noise_start=0.0, noise_end=0.5, noise_base=1.0),
    ):
        means = {}
        for name, arm in arms.all_arms(default).items():
            flags = [f"--{setting}={value}" for setting, value in arm.settings.items()]
            config = parse(PolicyConfig, flags)
            assert flags == [] or config != PolicyConfig()
            config = replace(default, **arm.settings)
            means[name] = mean_noise(
                default.steps, config.noise_start, config.noise_end, config.noise_base
            )
        rising = means["grpo"]
        assert means["constant_noise"] == pytest.approx(rising, abs=5e-5)
        assert means["imitation"] == means["constant_noise"]
        assert means["bm25_noise"] == means["ppo"] == rising
        step = (default.noise_end - default.noise_start) / default.steps
        assert means["falling_noise"] == pytest.approx(rising - step)
        assert means["no_noise"] == means["empty_engine"] == means["random_engine"] == 0


def write_results(root, arm: str, scores: list[float], training: list[dict] = ()) -> None:
    """The files of an arm that has these scores in all tests, one for each seed."""
    for seed, score in enumerate(scores):
        folder = root / f"{arm}-{seed}"
        folder.mkdir()
        row = {
            "f1": score,
            "f1_stderr": 0.01,
            "searches_per_question": 1.5,
            "again_after_noisy": score / 2,
        }
        for name in arms.TESTS:
            (folder / f"{name}.json").write_text(json.dumps(dict.fromkeys(arms.GROUPS, row)))
        lines = [json.dumps(line) + "\n" for line in training]
        (folder / "metrics.jsonl").write_text("".join(lines))


def test_means_and_differences_by_hand(tmp_path):
    """Errors are those over seeds; a difference is paired by seed, over the seeds of both arms."""
    write_results(tmp_path, "grpo", [0.5, 0.7, 0.9])
    write_results(tmp_path, "no_noise", [0.6, 0.7])
    write_results(tmp_path, "constant_noise", [0.1, 0.31])
    score = arms.over_seeds(arms.read_scores(tmp_path, "grpo", "clean").values())
    assert str(score) == "70.0 ± 11.5"  # 0.2 / sqrt(3)
    difference = arms.paired_difference(tmp_path, "grpo", "no_noise", "sampled")
    assert difference == pytest.approx((-0.05, 0.05, 2))
    assert claims.signed(difference) == "-5.0 ± 5.0"
    difference = arms.paired_difference(tmp_path, "grpo", "constant_noise", "clean")
    assert claims.signed(difference) == "+39.5 ± 0.5"  # of two seeds, which prove little
    assert claims.signed(difference._replace(seeds=3)) == "**+39.5 ± 0.5**"
    assert arms.paired_difference(tmp_path, "grpo", "falling_noise", "clean") is None
    again = arms.searched_again(tmp_path, "constant_noise", "noisy")
    assert again == pytest.approx((0.1025, 0.0525, 2))
    assert arms.searched_again(tmp_path, "constant_noise", "useful") is None


def test_one_score_has_the_error_over_questions():
    """One seed, or the same score in all of them, says nothing about other seeds."""
    same = [arms.Estimate(0.3, 0.02)] * 3
    assert arms.over_seeds(same) == (0.3, 0.02, 3)
    assert arms.over_seeds(same[:1]) == (0.3, 0.02, 1)
    assert arms.over_seeds([]) is None


def test_a_half_finished_set_is_a_smaller_page(tmp_path):
    """A seed that lacks a test does not count, and a claim without its first arm is left out."""
    write_results(tmp_path, "grpo", [0.5, 0.7])
    write_results(tmp_path, "unmasked", [0.2])
    write_results(tmp_path, "ppo", [0.9])
    (tmp_path / "grpo-1" / "noise_75.json").unlink()
    assert arms.seeds_of(tmp_path, "grpo") == ["0"]
    page = claims.page(tmp_path)
    assert page.startswith(claims.introduction())
    assert page.count("\n## ") == 1 and "## Masking documents" in page
    assert "--arms grpo unmasked --seeds 1 --parallel 2\n" in page
    [row] = cells(page, "minus `unmasked`")
    assert row[1] == "+30.0 ± 1.4" and row[-1] == "1"
    empty = claims.page(tmp_path / "nothing")
    assert empty == claims.introduction()


def test_noise_and_searches_of_training_by_hand(tmp_path):
    """Replies are counted from the metrics: queries, and the share of them that was noisy. A step
    without a search has no such share."""
    steps = [
        {"queries": 1000, "noisy_replies": 0.25, "searches_per_question": 2.0},
        {"queries": 3000, "noisy_replies": 0.5, "searches_per_question": 1.0},
        {"queries": 0, "searches_per_question": 0.0},
    ]
    write_results(tmp_path, "grpo", [0.5, 0.5], steps)
    write_results(tmp_path, "no_noise", [0.5], steps[:1])
    write_results(tmp_path, "empty_engine", [0.5], 5 * steps[:2])
    page = claims.page(tmp_path)
    [row] = [row for row in cells(page, "`grpo`") if "4.0 ± 0.0" in row]
    assert row[1:] == ["4.0 ± 0.0", "1.8 ± 0.0", "25.0 ± 0.0"]
    [row] = [row for row in cells(page, "`empty_engine`") if len(row) == 7 and row[1] == "1.50"]
    assert row[1:] == ["1.50"] * 6


def test_a_trial_does_not_pass_for_the_real_thing(work):  # noqa: F811
    """Other settings are refused where they would mix with the results that are published."""
    with pytest.raises(UserError, match="--root"):
        arms.main(["--seeds", "1", "--steps", "1"])
    with pytest.raises(UserError, match="--stepz"):
        arms.main(["--root", "runs/short", "--stepz", "1"])
    assert not list(work.iterdir())


def test_each_arm_of_a_claim_can_be_run():
    """Every claim is tried by arms that there are, and every arm has a claim."""
    named = {arm for claim in claims.CLAIMS for arm in claim.arms}
    assert named == {arms.BASE, *arms.all_arms(PolicyConfig())}


def test_the_published_page_is_what_the_script_writes():
    """It has the arms with the settings that they have now, and what the script says of a claim."""
    text = (claims.Path(claims.__file__).parent / "CLAIMS.md").read_text(encoding="utf-8")
    assert text.startswith(claims.introduction())
    for claim in claims.CLAIMS:
        assert f"## {claim.title}\n" not in text or claim.paper in text


def test_unmasked_counts_documents_and_not_the_prompt():
    row = Trajectory(Example("?", ("a",)))
    row.append([1, 2])
    row.append([3, 4], [-1.0, -1.0])
    row.append([5, 6, 7])
    assert unmasked.unmask(row).loss_mask == [0, 0, 1, 1, 1, 1, 1]


def test_random_documents_are_a_function_of_seed_and_key():
    """They do not depend on who else searches, and another search draws others."""
    documents = list("abcdefghij")
    requests = [SearchRequest("x", "y", ("z",), key=(1, place)) for place in range(50)]
    engine = random_engine.RandomDocuments(documents, top_k=3, seed=0)
    drawn = engine.search(requests)
    assert drawn[7:] == engine.search(requests[7:])
    assert {len(reply) for reply in drawn} == {3}
    assert {text for reply in drawn for text in reply} == set(documents)
    assert drawn != random_engine.RandomDocuments(documents, 3, seed=1).search(requests)
