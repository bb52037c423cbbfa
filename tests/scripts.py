"""What the tests of the three scripts share: a tiny model, a tiny data set, and how to run them.

The model (2 layers x 32) has seen a few dozen texts: it mostly searches once, reads nothing and
answers January or February. So rewards, searches and gradients are there, in a second or two.
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
TIMINGS = ("seconds", "seconds_rollout", "seconds_update", "seconds_test", "tokens_per_second")
POLICY = """--batch_questions 4 --group_size 2 --steps 2 --max_turns 3 --max_turn_tokens 16
    --max_context 160 --eval_every 0 --save_every 0 --engine bm25 --data ../questions.jsonl
    --corpus ../corpus.txt --policy ../base --lr 0.01 --threads 1""".split()
SIM = """--base ../base --worlds 2 --examples 40 --steps 3 --batch_tokens 400 --report_queries 2
    --threads 1""".split()
EVAL = """--max_turns 3 --max_turn_tokens 16 --max_context 160 --threads 1""".split()
FILE = ["--data", "../questions.jsonl", "--corpus", "../corpus.txt"]
COLLECTED = "../collected/collected.jsonl"


def born(name: str, rng: random.Random) -> list[sft.Segment]:
    """A trajectory: the question, often a search and its documents, and an answer by chance."""
    text = [(protocol.build_prompt(f"when was {name} born?", base.PROMPT), False)]
    if rng.random() < 0.6:
        found = protocol.number_documents([f"{name} was born on {rng.choice(MONTHS)}"])
        text.append((f"<search> {name} born on </search>", True))
        text.append((protocol.wrap_documents(found), False))
    return [*text, (f"<answer> {rng.choice(MONTHS)} </answer>", True)]


def written(name: str, rng: random.Random) -> list[sft.Segment]:
    """A simulator's prompt and one document."""
    prompt = base.SIMULATOR_PROMPT.format(
        query=f"{name} born on",
        question=f"when was {name} born?",
        answers=rng.choice(MONTHS),
        quality=rng.choice(["useful", "noisy"]),
    )
    return [(prompt, False), (f"Doc 1: {name} was born on January", True)]


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Iterator[Path]:
    """A folder with `base` (a policy and simulator), `questions.jsonl` and `corpus.txt`."""
    folder, rng = tmp_path_factory.mktemp("scripts"), random.Random(0)
    # Where `datasets` keeps a copy of what it reads: not in the user's home.
    cache = tmp_path_factory.mktemp("cache")
    patch = pytest.MonkeyPatch()
    patch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    patch.setenv("HF_DATASETS_CACHE", str(cache))  # of other processes
    tokenizer = base.make_tokenizer()
    model = base.make_model(tokenizer, hidden=32, layers=2, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    texts = [
        sft.encode(tokenizer, kind(rng.choice(NAMES), rng), end=kind is written)
        for kind in (born, written, born) * 500
    ]
    for batch in sft.batches(texts, 600, rng):
        loss, count = sft.nll(model, *sft.collate(batch))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    loading.save_model(
        model,
        tokenizer,
        folder / "base",
        prompt=base.PROMPT,
        simulator_prompt=base.SIMULATOR_PROMPT,
    )
    rows = [(f"when was {name} born?", MONTHS[i % 2]) for i, name in enumerate(NAMES)]
    lines = [json.dumps({"question": q, "answer": a, "data_source": a}) for q, a in rows]
    (folder / "questions.jsonl").write_text("\n".join(lines))
    documents = [f"{name} was born on {MONTHS[i % 2]}" for i, name in enumerate(NAMES)]
    (folder / "corpus.txt").write_text("\n".join(documents + ["Fota Labs was founded by Holo"]))
    yield folder
    patch.undo()


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
    yield folder
    AcceleratorState._reset_state(reset_partial_state=True)  # the next may compute in another type


def policy(*flags: str) -> None:
    train_policy.main([*POLICY, *flags])


def simulator(*flags: str) -> None:
    train_sim.main([*SIM, *flags])


def evaluation(*flags: str) -> None:
    evaluate.main([*EVAL, *flags])


def metrics(run: Path) -> list[dict]:
    """The lines of a run, without what a clock says."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def weights(folder: Path) -> bytes:
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
    done = subprocess.run(
        command, env=os.environ | settings, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def on_each(processes: int, call: Callable, monkeypatch) -> list:
    """What `call(accelerator)` gives on each of some processes, which threads play."""
    barrier, rank_of, gathered = threading.Barrier(processes, timeout=20), threading.local(), {}

    def gather_object(rows):
        gathered[rank_of.value] = rows
        barrier.wait()
        everyone = [row for rank in range(processes) for row in gathered[rank]]
        barrier.wait()
        return everyone

    def play(rank):
        rank_of.value = rank
        accelerator = SimpleNamespace(
            process_index=rank, num_processes=processes, print=print, wait_for_everyone=barrier.wait
        )
        try:
            return call(accelerator)
        except Exception:
            barrier.abort()
            raise

    with monkeypatch.context() as patch, ThreadPoolExecutor(processes) as pool:
        patch.setattr("accelerate.utils.gather_object", gather_object)
        played = [pool.submit(play, rank) for rank in range(processes)]
    errors = [error for future in played if (error := future.exception())]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error  # that of one, not of those who waited for it
    return [future.result() for future in played]


@pytest.fixture(scope="session")
def collected(home):
    """The rows of a small `--collect`, in `collected/collected.jsonl`."""
    with pytest.MonkeyPatch.context() as patch:
        (home / "elsewhere").mkdir()
        patch.chdir(home / "elsewhere")
        simulator("--collect", "--output", "../collected")
    text = (home / "collected" / "collected.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def losses(folder) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
