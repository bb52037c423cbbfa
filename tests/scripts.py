"""What the tests of the three scripts share: a tiny model, a tiny data set, and how to run them.

The model (2 layers x 32) has seen a few hundred texts about the births of nine people. It mostly
searches once, reads nothing and answers January or February. So there are searches, rewards and
gradients, and a run takes a second or two.

`home` is a folder with the model and the data, made once; `work` is a new folder beside them, in
which a test runs. `policy`, `simulator` and `evaluation` run the scripts with small settings.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

import evaluate
import train_policy
import train_sim
from benchmarks import tiny_base as base
from minizs import UserError, protocol, sft
from minizs.models import loading

ROOT = Path(__file__).parent.parent
NAMES = [f"{a} {b}" for a in ("Fota", "Holo", "Mirka") for b in ("Jourer", "Gulmer", "Drexow")]
MONTHS = ("January", "February")
# What differs from run to run in a line of metrics.
TIMINGS = ("seconds", "seconds_rollout", "seconds_update", "seconds_test", "tokens_per_second")
POLICY = """--batch_questions 4 --group_size 2 --steps 2 --max_turns 3 --max_turn_tokens 16
    --max_context 160 --eval_every 0 --save_every 0 --engine bm25 --data ../questions.jsonl
    --corpus ../corpus.txt --policy ../base --lr 0.01 --noise_end 0 --threads 1""".split()
SIM = """--base ../base --worlds 2 --examples 40 --steps 3 --batch_tokens 400 --report_queries 2
    --threads 1""".split()
EVAL = """--max_turns 3 --max_turn_tokens 16 --max_context 160 --threads 1 --eval_noise 0""".split()
FILE = ["--data", "../questions.jsonl", "--corpus", "../corpus.txt"]
COLLECTED = "../collected/collected.jsonl"


# ---- The model and the data ----------------------------------------------------------------------


def trajectory_text(name: str, rng: random.Random) -> list[sft.Segment]:
    """The question, often a search and its documents, and an answer by chance."""
    text = [(protocol.build_prompt(f"when was {name} born?", base.PROMPT), False)]
    if rng.random() < 0.6:
        documents = protocol.number_documents([f"{name} was born on {rng.choice(MONTHS)}"])
        text.append((f"<search> {name} born on </search>", True))
        text.append((protocol.wrap_documents(documents), False))
    return [*text, (f"<answer> {rng.choice(MONTHS)} </answer>", True)]


def simulator_text(name: str, rng: random.Random) -> list[sft.Segment]:
    """A simulator's prompt and one document."""
    prompt = base.SIMULATOR_PROMPT.format(
        query=f"{name} born on",
        question=f"when was {name} born?",
        answers=rng.choice(MONTHS),
        quality=rng.choice(["useful", "noisy"]),
    )
    return [(prompt, False), (f"Doc 1: {name} was born on January", True)]


def make_base(folder: Path) -> None:
    """Train the tiny model, which is a policy and a simulator, and save it with both prompts."""
    rng = random.Random(0)
    tokenizer = base.make_tokenizer()
    model = base.make_model(tokenizer, hidden=32, layers=2, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    texts = []
    for write in (trajectory_text, simulator_text, trajectory_text) * 500:
        segments = write(rng.choice(NAMES), rng)
        texts.append(sft.encode(tokenizer, segments, end=write is simulator_text))
    for batch in sft.batches(texts, 600, rng):
        loss, count = sft.nll(model, *sft.collate(batch))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    prompts = {"prompt": base.PROMPT, "simulator_prompt": base.SIMULATOR_PROMPT}
    loading.save_model(model, tokenizer, folder, **prompts)


def make_data(folder: Path) -> None:
    """`questions.jsonl`, one for each name, and `corpus.txt`, whose documents answer them."""
    questions, documents = [], []
    for place, name in enumerate(NAMES):
        month = MONTHS[place % 2]
        question = {"question": f"when was {name} born?", "answer": month, "data_source": month}
        questions.append(json.dumps(question))
        documents.append(f"{name} was born on {month}")
    documents.append("Fota Labs was founded by Holo")
    (folder / "questions.jsonl").write_text("\n".join(questions))
    (folder / "corpus.txt").write_text("\n".join(documents))


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Iterator[Path]:
    """A folder with `base` (a policy and simulator), `questions.jsonl` and `corpus.txt`."""
    folder = tmp_path_factory.mktemp("scripts")
    # Where `datasets` keeps a copy of what it reads: not in the user's home.
    cache = tmp_path_factory.mktemp("cache")
    patch = pytest.MonkeyPatch()
    patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    patch.setenv("HF_DATASETS_CACHE", str(cache))  # of other processes
    make_base(folder / "base")
    make_data(folder)
    yield folder
    patch.undo()


@pytest.fixture(scope="session")
def collected(home) -> list[dict]:
    """The rows of a small `--collect`, in `collected/collected.jsonl`."""
    with pytest.MonkeyPatch.context() as patch:
        (home / "elsewhere").mkdir()
        patch.chdir(home / "elsewhere")
        simulator("--collect", "--output", "../collected")
    text = (home / "collected" / "collected.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="session")
def bad(home) -> Path:
    """A folder of things that a script has to refuse."""
    folder = home / "bad"
    for name in ("untokenized", "weightless", "garbled", "lora"):
        shutil.copytree(home / "base", folder / name)
    (folder / "empty").mkdir()
    for path in (folder / "untokenized").glob("tokenizer*"):
        path.unlink()
    (folder / "weightless" / "model.safetensors").unlink()
    (folder / "garbled" / "model.safetensors").write_text("no tensors")
    (folder / "lora" / "config.json").rename(folder / "lora" / "adapter_config.json")
    (folder / "columns.jsonl").write_text('{"text": "a"}')
    (folder / "row.jsonl").write_text('{"query": "a", "label": "useful"}')
    letters = {"query": "a", "question": "b", "answers": "c", "documents": [], "label": "useful"}
    (folder / "letters.jsonl").write_text(json.dumps(letters))
    for name in ("empty.jsonl", "empty.txt"):
        (folder / name).write_text("")
    (folder / "unknown.yaml").write_text("stepz: 5")
    return folder


@pytest.fixture
def work(home, monkeypatch, request) -> Iterator[Path]:
    """The current folder of a test: empty, beside `base` and the data."""
    # `datasets` takes a path for a pattern, in which brackets mean something else.
    name = re.sub(r"\W+", "-", request.node.name)[:60]
    folder = home / f"{name}-{len(list(home.iterdir()))}"
    folder.mkdir()
    monkeypatch.chdir(folder)
    AcceleratorState._reset_state(reset_partial_state=True)  # of tests in this process before it
    yield folder
    AcceleratorState._reset_state(reset_partial_state=True)  # the next may compute in another type


# ---- Running the scripts, and what they leave ----------------------------------------------------


def policy(*flags: str) -> None:
    """Train a policy, in this process."""
    train_policy.main([*POLICY, *flags])


def simulator(*flags: str) -> None:
    """Train a simulator, or collect, in this process."""
    train_sim.main([*SIM, *flags])


def evaluation(*flags: str) -> None:
    """Evaluate policies, in this process."""
    evaluate.main([*EVAL, *flags])


def metrics(run: Path) -> list[dict]:
    """The lines of a run, without what a clock says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def weights(folder: Path) -> bytes:
    """The file of a model's weights, to be compared bit for bit."""
    return (folder / "model.safetensors").read_bytes()


def everything(folder: Path) -> dict[str, int]:
    """Every path below a folder, with the time of its last change."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


def refused(run, flags: str, names: str, folder: Path) -> None:
    """The script refuses these flags in one sentence that names what is wrong; writes nothing."""
    before = everything(folder)
    with pytest.raises(UserError) as error:
        run(*flags.split())
    message = str(error.value)
    assert names in message and "\n" not in message, message
    assert everything(folder) == before


def status(script: str, *flags: str) -> subprocess.CompletedProcess:
    """The script in a process of its own, in the current folder."""
    command = [sys.executable, str(ROOT / script), *flags]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def two_processes(script: str, *flags: str) -> str:
    """What the script prints, run by two processes on the CPU."""
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-m", *launch, str(ROOT / script), *flags]
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        command, env=os.environ | settings, capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


def on_each(processes: int, call: Callable, monkeypatch) -> list:
    """What `call(accelerator)` returns on each of some processes, which threads play. An error on
    one of them is raised, and ends the others."""
    barrier = threading.Barrier(processes, timeout=20)
    thread = threading.local()  # holds the rank of each
    gathered = {}

    def gather_object(rows):
        gathered[thread.rank] = rows
        barrier.wait()
        all_rows = [row for rank in range(processes) for row in gathered[rank]]
        barrier.wait()
        return all_rows

    def run_as(rank):
        thread.rank = rank
        accelerator = SimpleNamespace(
            process_index=rank,
            num_processes=processes,
            print=print,
            wait_for_everyone=barrier.wait,
        )
        try:
            return call(accelerator)
        except Exception:
            barrier.abort()
            raise

    with monkeypatch.context() as patch, ThreadPoolExecutor(processes) as pool:
        patch.setattr("accelerate.utils.gather_object", gather_object)
        futures = [pool.submit(run_as, rank) for rank in range(processes)]
    errors = [future.exception() for future in futures if future.exception()]
    # The error of the one that failed comes before those of the others, who waited for it.
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return [future.result() for future in futures]


def losses(folder: Path | str) -> list[dict]:
    """The lines of a simulator's training."""
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
