"""What the README and docs/ promise: every command is run, every name in them is there.

A command is fenced as bash or stands between backticks. A command that cannot be run here, or that
another test runs, is listed with the reason. One that stands in no list fails.
"""

import dataclasses
import importlib
import inspect
import operator
import re
import shlex
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
from scripts import ROOT, TIMINGS, metrics, policy

import evaluate
import train_policy
import train_sim

PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))]
TEXT = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
SCRIPTS = {"train_sim": train_sim, "train_policy": train_policy, "evaluate": evaluate}

# In the order of a reader, each with what makes it small.
ASK = 'python evaluate.py --ask "when was the founder of Farkva Press born?"'
HERE = {
    "accelerate launch train_sim.py": "--worlds 2 --examples 40 --steps 2 --report_queries 2",
    "accelerate launch train_policy.py": (
        "--steps 1 --group_size 2 --eval_every 1 --eval_questions 2"
    ),
    "python evaluate.py": "--questions 2",
    ASK: "",
}
# Another test runs these: the command, and the file and function of that test.
TWO_PROCESSES = "ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 train_policy.py"
OWN_DOCUMENTS = (
    'python evaluate.py --ask "how long is the warranty?" --corpus handbook.txt --policy MODEL '
    "--max_turn_tokens 500 --max_document_tokens 600 --max_context 4096"
)
ELSEWHERE = {
    "python -m pytest -q": "",
    "ruff check . && ruff format --check .": "",
    "python -m minizs.tour": "test_tour.",
    "python -m pytest tests/exercises.py -k advantage": "test_exercises.",
    "python -m pytest -m slow tests/scripts/test_survival.py": "test_survival.",
    TWO_PROCESSES: "test_train_policy.test_two_processes_do_what_one_does",
    f"{TWO_PROCESSES} …": "test_train_policy.test_two_processes_do_what_one_does",
    "train_policy.py --output FOLDER --resume": "test_resume.",
    "torchrun --nproc_per_node 2 benchmarks/tiny_base.py --output DIR": "test_tiny_base.",
    "train_sim.py --collect --data QUESTIONS --engine bm25|http|web": (
        "test_collect_sim.test_no_policy_is_needed"
    ),
    "train_sim.py --collect": "test_collect_sim.test_no_policy_is_needed",
    "python train_sim.py --overwrite": "test_resume_sim.test_other_settings_do_not_go_on",
    "python benchmarks/families.py": "test_sweep.test_all_families_are_right_or_refused",
    "python benchmarks/memory.py": "test_benchmarks.test_memory_runs",
    OWN_DOCUMENTS: "test_evaluate.test_ask_needs_nothing_but_the_repository",
    "python benchmarks/arms.py --seeds 5 --parallel 2": "test_claims.",
    "python -m minizs.engines.retriever": "test_retriever.test_the_command",
    "python -m minizs.engines.retriever --corpus FILE --port 8000": "test_retriever.",
}
NOT_HERE = {
    "pip install": "needs the package index",
    "python .ci/renew_pins.py": "needs the package index",
    "accelerate launch --config_file configs/accelerate/": "needs GPUs, and models of the hub",
    "accelerate launch evaluate.py --policy runs/qwen2.5_3b/policy --data paper": "needs the hub",
    "python evaluate.py --engine overlap": "is what a reader of the exercises adds",
    "python -m sglang.launch_server": "needs a GPU",
    "transformers serve FOLDER": "serves until it is stopped",
    "accelerate launch --cpu --num_processes 2": "named as what does not work",
    "python benchmarks/pictures.py": "needs a finished run, and a browser",
}  # by how they begin
# Where each module of ours is, by its name, the method's first; and the file of each test.
MODULES = {}
for path in sorted((ROOT / "minizs").rglob("*.py"), key=lambda path: -len(path.parts)):
    if path.stem != "__init__":
        MODULES[path.stem] = ".".join(path.relative_to(ROOT).with_suffix("").parts)
TESTS = {path.stem: path for path in (ROOT / "tests").rglob("*.py")}


def commands(text: str) -> list[str]:
    """Every command of a page: a line of a bash block, or a piece of one between `&&`; and what
    stands between backticks and begins as one or calls a script with flags."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    pieces = [part for line in lines for part in re.split(r"&&|\s#", line)[: 1 + line.count("&&")]]
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    starts = r"(?:[A-Z_]+=\S+ )?(?:python|accelerate|torchrun|pip|transformers|ruff) |\w+\.py --"
    codes = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)]
    pieces += [code for code in codes if re.match(starts, code)]
    pieces = [" ".join(piece.replace("\\|", "|").split()) for piece in pieces]
    return [piece for piece in pieces if piece and not piece.startswith("#")]


# The example with one's own data is its page's first section, and has a test of its own.
EXAMPLE = commands(TEXT["docs/real_models.md"].split("\n## ")[1])
ELSEWHERE |= dict.fromkeys(EXAMPLE, "test_own_data.test_the_commands_of_the_page")
# The next one is about a real model, and has a test of its own as well.
REAL = commands(TEXT["docs/real_models.md"].split("\n## ")[2])
ELSEWHERE |= dict.fromkeys(
    [command for command in REAL if not command.startswith("pip install")],
    "test_real.test_the_three_stages_of_a_real_model",
)


def test_every_command_is_in_a_list():
    """No command is written down that nobody tries, and no list names one that is gone."""
    written = [command for text in TEXT.values() for command in commands(text)]
    assert len(written) > 15
    listed = {*HERE, *ELSEWHERE}
    for command in written:
        assert command in listed or command.startswith(tuple(NOT_HERE)), command
    for known in [*listed, *NOT_HERE]:
        assert any(command.startswith(known) for command in written), f"no page has {known}"


@pytest.mark.parametrize("name", [test for test in ELSEWHERE.values() if test])
def test_a_test_that_is_named_is_there(name):
    """The list of commands that other tests run points to tests that exist."""
    file, function = name.split(".")
    assert f"def {function}" in TESTS[file].read_text(encoding="utf-8")


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
            process = subprocess.run([*launch, *flags], capture_output=True, text=True)
            assert process.returncode == 0, process.stderr[-3000:]
        else:
            SCRIPTS[script.removesuffix(".py")].main(flags)
    results = [
        "simulator/config.json",
        "policy-1/policy/config.json",
        "policy-1/report.html",
        "policy-1/metrics.jsonl",
        "policy-1/cost.json",
        "policy-1/evaluation.json",
    ]
    assert all((tmp_path / "runs" / path).is_file() for path in results)
    assert "question when was the founder of Farkva Press born?" in capfd.readouterr().out


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
    process = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    rows = metrics(tmp_path / "runs/policy-1")
    assert len(rows) == train_policy.PolicyConfig().steps
    assert rows[-1]["held_out_f1"] > 0.9 > 0.5 > rows[0]["reward"]
    assert (tmp_path / "runs/policy-1/evaluation.json").is_file()


SUFFIXES = (".json", ".jsonl", ".html", ".yaml", ".md", ".txt", ".gguf")  # of what runs leave
NEW_FILES = {"minizs/engines/overlap.py"}  # that a reader of the exercises writes


def resolve(code: str) -> None:
    """Fail unless a name between backticks is there: a test, a file, or something in a module."""
    if re.fullmatch(r"(?:minizs|benchmarks|tests|docs|configs)/[\w./]*", code):
        assert (ROOT / code).exists() or code in NEW_FILES, code
        return
    name = re.fullmatch(r"([a-z]\w+)\.([\w.]+)", code)
    if not name:
        return
    module, member = name.groups()
    if member == "py":
        assert module in TESTS or module in MODULES or module in SCRIPTS, code
    elif code.endswith(SUFFIXES):
        return
    elif module in TESTS:
        assert f"def {member}(" in TESTS[module].read_text(encoding="utf-8"), code
    elif module in SCRIPTS:
        operator.attrgetter(member)(SCRIPTS[module])
    elif module in MODULES:
        operator.attrgetter(member)(importlib.import_module(MODULES[module]))
    else:
        assert module in {"ground_truth", "model", "config"}, f"no module of ours: {code}"


@pytest.mark.parametrize("page", PAGES)
def test_names_are_those_of_the_code(page):
    """No page sends its reader to a test, a function or a file that is not there."""
    text = re.sub(r"^```.*?^```", "", TEXT[page], flags=re.DOTALL | re.MULTILINE)
    for code in re.findall(r"`([^`]+)`", text):
        resolve(" ".join(code.split()))
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (ROOT / page).parent.joinpath(link).exists(), link


def test_the_tree_of_the_readme_is_that_of_the_repository():
    """Each file that the annotated tree names exists, and it names every module of the method."""
    [tree] = re.findall(
        r"^```\n(train_sim\.py.*?)^```", TEXT["README.md"], re.DOTALL | re.MULTILINE
    )
    named = set(re.findall(r"\b(\w+)\.py\b", tree))
    assert named <= MODULES.keys() | SCRIPTS.keys()
    flat = {path.stem for path in (ROOT / "minizs").glob("*.py")} - {"__init__"}
    assert flat <= named, flat - named


def test_the_loop_of_the_readme_is_that_of_the_script():
    """The README shows the loop of `train_policy.train` as it stands there."""
    [loop] = re.findall(
        r"^```python\n(for step .*?)^```", TEXT["README.md"], re.DOTALL | re.MULTILINE
    )
    assert textwrap.indent(loop, "    ") in inspect.getsource(train_policy.train)


OTHERS = set(
    "check config_file cpu num_processes nproc_per_node port parallel index-url model-path "
    "no-build-isolation collect seeds".split()
)


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_is_one(page):
    """No page names an option that is not there; `OTHERS` are those of other programs."""
    kinds = (train_sim.SimConfig, train_policy.PolicyConfig, evaluate.EvalConfig)
    ours = {field.name for kind in kinds for field in dataclasses.fields(kind)} | {"config", "help"}
    text = TEXT[page]
    if page.endswith("exercises.md"):  # its readers add two
        ours |= {"search_cost", "noise_shape"}
    flags = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", text))
    assert flags <= ours | OTHERS, flags - ours - OTHERS


@pytest.mark.parametrize("algorithm", ["grpo", "ppo"])
def test_every_metric_is_explained(work, algorithm):
    """Each number in the log is explained, and nothing is explained that is not logged."""
    policy("--output", "run", "--algorithm", algorithm, "--steps", "1", "--eval_every", "1")
    logged = {name for name in metrics(work / "run")[0] if not name.endswith("_stderr")}
    logged |= set(TIMINGS)
    cells = re.findall(r"^\| (`.*?) \|", TEXT["docs/metrics.md"], flags=re.MULTILINE)
    explained = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)} - {"_stderr"}
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
    absent |= {"loss"}
    rare = {name for name in explained if "again_after" in name}
    assert len(rare) == 4 + 2 + 4
    rare |= {"empty_replies", "noisy_replies"}
    assert absent <= explained - logged <= absent | rare


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
    assert rates.index(max(rates)) == 3  # the fourth of eighty steps
    assert max(rates) == pytest.approx(config.lr, rel=0.05)
    assert rates[-1] == pytest.approx(config.lr * config.lr_end)


def test_pictures_have_words():
    """A picture has words for those who do not see it."""
    assert all(words for text in TEXT.values() for words in re.findall(r"!\[(.*?)\]", text))
