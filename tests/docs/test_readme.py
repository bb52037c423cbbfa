"""What the README and docs/ promise: every command is run, every name in them is there.

A command is fenced as bash or stands between backticks. Those that cannot be run here, or that
another test runs, are listed with the reason; one that stands in no list fails.
"""

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from scripts import ROOT, TIMINGS, metrics, policy

import evaluate
import train_policy
import train_sim

PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
SCRIPTS = {"train_sim": train_sim, "train_policy": train_policy, "evaluate": evaluate}
LATER: set[str] = set()  # pages that are still to be made from long runs

# In the order of a reader, each with what makes it small.
ASK = 'python evaluate.py --ask "when was the founder of Tatco Mining born?"'
HERE = {
    "accelerate launch train_sim.py": "--worlds 2 --examples 40 --steps 2 --report_queries 2",
    "accelerate launch train_policy.py": "--steps 1 --group_size 2 --eval_every 1 --eval_questions 2",
    "python evaluate.py": "--questions 2",
    ASK: "",
}
ELSEWHERE = {
    "python -m pytest -q": "it is this suite",
    "python -m pytest tests/exercises.py -k advantage": "test_exercises.test_what_is_missing_is_said",
    "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train_policy.py": "test_train_policy.test_two_processes_do_what_one_does",
    "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train_policy.py …": "test_train_policy.test_two_processes_do_what_one_does",
    "torchrun --nproc_per_node 2 benchmarks/tiny_base.py --output DIR": "test_tiny_base.test_it_leaves_a_model_with_both_prompts",
    "train_sim.py --collect --data QUESTIONS --policy MODEL --engine bm25|http|web": "test_train_sim.test_a_policy_collects_from_a_real_engine",
    'python evaluate.py --ask "how long is the warranty?" --corpus handbook.txt --policy MODEL '
    "--max_turn_tokens 500 --max_document_tokens 600 --max_context 4096": "test_evaluate.test_ask_needs_nothing_but_the_repository",
    "python benchmarks/arms.py --seeds 5 --parallel 2": "test_claims.test_a_short_arm_of_the_algorithms",
    "python benchmarks/claims.py --seeds 5 --parallel 2": "test_claims.test_a_short_arm_gets_its_row",
    "python -m minizs.engines.retriever": "test_retriever.test_the_command",
    "python -m minizs.engines.retriever --corpus FILE --port 8000": "test_retriever.test_the_command",
}
NOT_HERE = {
    "pip install": "needs the package index",
    "python .ci/renew_pins.py": "needs the package index",
    "accelerate launch --config_file configs/accelerate/": "needs GPUs, and models of the hub",
    "accelerate launch evaluate.py --policy runs/policy-1/policy --data paper": "needs the hub",
    "python -m sglang.launch_server": "needs a GPU",
    "accelerate launch --cpu --num_processes 2": "named as what does not work",
    "python benchmarks/pictures.py": "needs a finished run, and a browser",
}  # by how they begin


def commands(text: str) -> list[str]:
    """Every command of a page: a line of a bash block, or a piece of one between `&&`; and what
    stands between backticks and begins as one or calls a script with flags."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    pieces = [part for line in lines for part in re.split(r"&&|\s#", line)[: 1 + line.count("&&")]]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    starts = r"(?:[A-Z_]+=\S+ )?(?:python|accelerate|torchrun|pip|transformers) |\w+\.py --"
    pieces += [code for code in re.findall(r"`([^`]+)`", prose) if re.match(starts, code)]
    found = [" ".join(piece.replace("\\|", "|").split()) for piece in pieces]
    return [piece for piece in found if piece and not piece.startswith("#")]


def test_every_command_is_in_a_list():
    """Guards a command that nobody has tried since it was written down."""
    found = [command for text in TEXT.values() for command in commands(text)]
    assert len(found) > 15
    listed = {*HERE, *ELSEWHERE}
    for command in found:
        assert command in listed or command.startswith(tuple(NOT_HERE)), command
    for known in [*listed, *NOT_HERE]:
        assert any(command.startswith(known) for command in found), f"no page has {known}"


@pytest.mark.parametrize("name", [test for test in ELSEWHERE.values() if "." in test])
def test_a_test_that_is_named_is_there(name):
    """Guards a list that points to a test of long ago."""
    file, function = name.split(".")
    assert f"def {function}(" in (ROOT / "tests" / f"{file}.py").read_text()


def test_the_commands_of_a_first_evening(tmp_path, work, monkeypatch, capfd):
    """The three stages and a question in a reader's order and small: what one leaves behind, the
    next one finds by itself. One goes through its launcher, in a process of its own."""
    monkeypatch.chdir(tmp_path)
    for command, small in HERE.items():
        words = [*shlex.split(command), *small.split(), "--threads", "1"]
        script = next(word for word in words if word.endswith(".py"))
        flags = words[words.index(script) + 1 :]
        if script == "train_policy.py":
            launch = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / script)]
            done = subprocess.run([*launch, *flags], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
        else:
            SCRIPTS[script.removesuffix(".py")].main(flags)
    made = [
        "simulator/config.json",
        "policy-1/policy/config.json",
        "policy-1/report.html",
        "policy-1/metrics.jsonl",
        "policy-1/cost.json",
        "policy-1/evaluation.json",
    ]
    assert all((tmp_path / "runs" / path).is_file() for path in made)
    assert "question when was the founder of Tatco Mining born?" in capfd.readouterr().out


@pytest.mark.slow
def test_the_main_job(tmp_path):
    """The README's first command as it stands there, but for pip: it learns to search."""
    [line] = re.findall(
        r"^pip install -r requirements.txt && (accelerate.*)$",
        TEXT["README.md"],
        flags=re.MULTILINE,
    )
    launch = f"{sys.executable} -m accelerate.commands.launch {ROOT}/"
    line = line.replace("accelerate launch ", launch)
    line = line.replace("python evaluate.py", f"{sys.executable} {ROOT}/evaluate.py")
    done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = metrics(tmp_path / "runs/policy-1")
    assert len(rows) == train_policy.PolicyConfig().steps
    assert rows[-1]["held_out_f1"] > 0.9 > 0.5 > rows[0]["reward"]
    assert (tmp_path / "runs/policy-1/evaluation.json").is_file()


@pytest.mark.parametrize("page", PAGES)
def test_names_are_those_of_the_code(page):
    """Guards a page that sends its reader to a test, a function or a file of long ago."""
    text = re.sub(r"^```.*?^```", "", TEXT[page], flags=re.DOTALL | re.MULTILINE)
    codes = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]
    for code in codes:
        if named := re.fullmatch(r"(test_\w+)\.(test_\w+)", code):
            file = (ROOT / "tests" / f"{named[1]}.py").read_text()
            assert f"def {named[2]}(" in file, code
        elif re.fullmatch(r"(?:minizs|benchmarks|tests|docs|configs)/[\w./]*", code):
            assert (ROOT / code).exists() or code in LATER, code
        elif named := re.fullmatch(r"([a-z]\w+)\.(?!py$|json|html|yaml|md$|txt$)([\w.]+)", code):
            if (ROOT / "minizs" / f"{named[1]}.py").is_file() or named[1] in SCRIPTS:
                thing = SCRIPTS.get(named[1]) or importlib.import_module(f"minizs.{named[1]}")
                for part in named[2].split("."):
                    thing = getattr(thing, part)
            else:
                assert named[1] in {"reward_model", "model"}, f"no module of ours: {code}"
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        path = Path(page).parent / link
        assert link.startswith("https://") or str(path) in LATER or (ROOT / path).exists(), link


OTHERS = set(
    "config_file cpu num_processes nproc_per_node port parallel index-url model-path "
    "no-build-isolation collect seeds".split()
)


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_is_one(page):
    """Guards an option that was renamed or has gone; `OTHERS` are those of other programs."""
    kinds = (train_sim.SimConfig, train_policy.PolicyConfig, evaluate.EvalConfig)
    ours = {field.name for kind in kinds for field in dataclasses.fields(kind)} | {"config", "help"}
    text = TEXT[page]
    if page.endswith("exercises.md"):  # its readers add two
        ours |= {"search_cost", "noise_shape"}
    flags = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))
    assert flags <= ours | OTHERS, flags - ours - OTHERS


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_every_metric_is_explained(work, algorithm):
    """Guards a number in the log that nobody can read, and an explanation of none."""
    policy("--output", "run", "--algorithm", algorithm, "--steps", "1", "--eval_every", "1")
    logged = {name for name in metrics(work / "run")[0] if not name.endswith("_stderr")}
    logged |= set(TIMINGS)
    table = TEXT["README.md"].split("## Every metric")[1].split("\n## ")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, flags=re.MULTILINE)
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    explained = {f"held_out{name}" if name[0] == "_" else name for name in named}
    assert logged <= explained, logged - explained
    absent = {
        "grpo": {
            "value_error",
            "value_mean",
            "return_mean",
            "value_clip_fraction",
            "critic_grad_norm",
        },
        "ppo": {"flat_groups"},
    }[algorithm]
    # Of stage 1; an ending of others; and what is only there where there was such a reply.
    absent |= {"loss", "held_out_stderr"}
    rare = {"again_after_noisy", "again_after_useful", "empty_replies"}
    assert absent <= explained - logged <= absent | rare | {"held_out_again_after_useful"}


def test_the_warm_up_is_short():
    """The paper's code warms up over 95 % of the steps, and so never reaches its learning rate."""
    config = train_policy.PolicyConfig()
    group = {"lr": 0.0}
    optimizer = SimpleNamespace(param_groups=[group])
    learner = SimpleNamespace(optimizer=optimizer, critic_optimizer=None)
    rates = []
    for step in range(1, config.steps + 1):
        train_policy.set_learning_rates(config, learner, step)
        rates.append(group["lr"])
    assert rates.index(max(rates)) == 4  # the fifth of a hundred steps
    assert max(rates) == pytest.approx(config.lr, rel=0.05)
    assert rates[-1] == pytest.approx(config.lr * config.lr_end)


def test_the_page_stays_short():
    """What would drown the README belongs in docs/; a picture has words for those who see none."""
    assert TEXT["README.md"].count("\n") <= 260
    assert all(alt for alt in re.findall(r"!\[(.*?)\]", TEXT["README.md"]))
