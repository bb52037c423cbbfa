"""Wrong inputs, far more than a hundred: each script ends at once with one sentence about each.

The sentence says what is wrong and how to mend it; nothing is trained, made or written over. The
libraries below would have their say in forty lines, make up weights, or wait for an answer.
"""

import errno
import json
import os
import pickle
import shlex
import shutil
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
from accelerate.state import AcceleratorState
from conftest import make_tokenizer
from counts import COUNTS
from scripts import EVAL, FILE, POLICY, ROOT, SIM, everything
from transformers import BloomConfig, BloomForCausalLM, MambaConfig, MambaForCausalLM

import evaluate
import train_policy
import train_sim
from benchmarks import tiny_base as tiny
from minizs import UserError
from minizs.models import loading
from minizs.runs import build, checkpoint

RIGHT = {  # what each script is given before the wrong flags: without these it would run
    "train_sim": (train_sim.main, SIM),
    "train_policy": (train_policy.main, POLICY),
    "evaluate": (evaluate.main, [*EVAL, *FILE, "--policy", "../base", "--before", "none"]),
}
YAML = {
    "unknown": "stepz: 5",
    "nothing": "seed:",
    "list": "- seed",
    "many": "seed: [1, 2]",
    "mapping": "seed: {a: 1}",
    "syntax": "a: b: c",
    "word": "seed: many",
    "half": "seed: 1.5",
    "truth": "overwrite: 7",
    "nested": "config: other.yaml",
    "nan": "temperature: .nan",
    "text": "hello",
    "tab": "seed: 1\n\tthreads: 1",
    "choice": "engine: google",
    "deep": "[" * 300,
    "binary": b"\x80\x81",
    "minus": "timeout: -1",
    "spelled": "seed : x: y",
}
ROW = {"question": "who is it?", "answer": "x"}
DATA = {
    "empty.jsonl": "",
    "blank.jsonl": "\n \n",
    "no_list.json": "[]",
    "broken.jsonl": [ROW, "{"],
    "half.json": '[{"question": "a"',
    "numbers.jsonl": ["1", "2"],
    "listed.json": "[1, 2]",
    "columns.jsonl": [{"text": "a"}],
    "golds.jsonl": [{"question": "a"}],
    "unanswered.jsonl": [ROW | {"answer": ""}],
    "marks.jsonl": [ROW | {"answer": "?!"}],
    "long.jsonl": [ROW | {"question": "a" * 3000}],
    "lists.jsonl": [ROW | {"question": ["a"]}],
    "latin.jsonl": b'{"question": "a", "answer": "Malm\xf6"}',
    "false.parquet": "PAR1 PAR1",
    "deep.json": "[" * 100_000,
    "digits.jsonl": '{"answer": ' + "1" * 5000 + "}",
    "table.xlsx": "question,answer",
    "words.txt": "who is it?",
    "latin.txt": b"\xff\xfe",
    "body.jsonl": [{"body": "x"}],
    "spaces.jsonl": [{"contents": "  "}],
    "label.jsonl": [
        {"query": "a", "question": "b", "answers": ["c"], "documents": ["d"], "label": "good"}
    ],
    "letters.jsonl": [
        {"query": "a", "question": "b", "answers": "c", "documents": ["d"], "label": "useful"}
    ],
    "useful.jsonl": [
        {"query": "a", "question": "b", "answers": ["c"], "documents": ["d"], "label": "useful"}
    ],
    "silent.jsonl": [{"instruction": "a", "output": " "}],
    "turns.jsonl": [{"messages": [{"role": "user", "content": "a"}]}],
    "template.txt": "Write something about {question}.",
    "replies.db": "no data base",
}


def settings(**changed):
    """A model folder whose config.json says otherwise."""

    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    return change


def file(name: str, text: str | bytes = ""):
    """A model folder in which this file holds something else, or is missing."""

    def change(folder: Path) -> None:
        (folder / name).unlink()
        if text:
            (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


class Bomb:
    """Unpickled, it leaves a file behind."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


def pickled(folder: Path) -> None:
    file("model.safetensors")(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def with_code(folder: Path) -> None:
    settings(model_type="theirs", auto_map={"AutoConfig": "theirs.Config"})(folder)
    (folder / "theirs.py").write_text("import os\nos.mkdir('ran')\nConfig = object\n")


def layer_lost(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    del weights[next(name for name in weights if "layers.1.mlp" in name)]
    safetensors.torch.save_file(weights, path, metadata={"format": "pt"})


def cut_short(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def adapter(**changed):
    """A LoRA of no known base."""

    def change(folder: Path) -> None:
        (folder / "config.json").unlink()
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | changed))

    return change


MODELS = {
    "untokenized": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "weightless": file("model.safetensors"),
    "garbled": file("model.safetensors", "no tensors"),
    "cut_short": cut_short,
    "layer_lost": layer_lost,
    "layer_more": settings(num_hidden_layers=3, layer_types=None),
    "wider": settings(hidden_size=64),
    "unheard": settings(model_type="unheard_of"),
    "untyped": file("config.json", "{}"),
    "half_config": file("config.json", "{"),
    "listed": file("config.json", "[]"),
    "positions": settings(max_position_embeddings="many"),
    "mamba": lambda folder: MambaForCausalLM(
        MambaConfig(vocab_size=4000, hidden_size=32, num_hidden_layers=1)
    ).save_pretrained(folder),
    "bloom": lambda folder: BloomForCausalLM(
        BloomConfig(vocab_size=4000, hidden_size=32, n_layer=1, n_head=2)
    ).save_pretrained(folder),
    "half_tokenizer": file("tokenizer.json", "{"),
    "no_tokenizer": file("tokenizer.json", "{}"),
    "more_tokens": lambda folder: make_tokenizer(
        tuple(f"<{i}>" for i in range(2000))
    ).save_pretrained(folder),
    "unasked": file("prompt.txt", "Answer!"),
    "latin": file("prompt.txt", b"\xff {question}"),
    "unqueried": file("simulator_prompt.txt", "Write."),
    "latin_sim": file("simulator_prompt.txt", b"\xff {query}"),
    "pickled": pickled,
    "with_code": with_code,
    "lora": adapter(base_model_name_or_path="../nowhere"),
    "lora_alone": adapter(),
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """The folder of all these, a right model and right data; scripts run in one below."""
    root = tmp_path_factory.mktemp("wrong")
    tokenizer = tiny.make_tokenizer()
    loading.save_model(
        tiny.make_model(tokenizer, hidden=32, layers=2, seed=0),
        tokenizer,
        root / "base",
        prompt=tiny.PROMPT,
        simulator_prompt=tiny.SIMULATOR_PROMPT,
    )
    (root / "questions.jsonl").write_text(json.dumps(ROW))
    (root / "corpus.txt").write_text("it is x\nit is y\n")
    for name in ("yaml", "data", "models", "empty", "closed"):
        (root / name).mkdir()
    (root / "closed").chmod(0o500)
    files = {f"yaml/{name}.yaml": text for name, text in YAML.items()}
    for name, text in (files | {f"data/{name}": text for name, text in DATA.items()}).items():
        if isinstance(text, list):
            text = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in text)
        (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    for name, change in MODELS.items():
        shutil.copytree(root / "base", root / "models" / name)
        change(root / "models" / name)
    run = root / "run"
    shutil.copytree(root / "base", run / "policy")
    shutil.copytree(root / "base", run / "checkpoints" / "step-1")
    (run / "checkpoints" / "step-1" / checkpoint.SUMS).write_text("{")
    (run / "config.yaml").write_text("seed: 3\nlr: 0.5\n")
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    (root / "figures.json").write_text("{}")
    (root / "folder.json").mkdir()
    (root / "here").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield root


# What is wrong of any script, and words that the sentence has to hold, "|" between them.
EVERYWHERE = [
    ("--stepz 5", "--stepz|--help"),
    ("--see 5", "--see"),
    ("extra", "extra"),
    ("--seed", "--seed|expected one"),
    ("--seed many", "--seed|many"),
    ("--seed 99999999999999999999", "--seed|too large"),
    ("--threads -1", "--threads"),
    ("--timeout 0", "--timeout"),
    ("--retries -1", "--retries"),
    ("--top_k 0", "--top_k"),
    ("--temperature nan", "--temperature|no number"),
    ("--max_turns 0", "--max_turns"),
    ("--overwrite perhaps", "--overwrite|perhaps"),
    ("--engine google", "--engine|google|choose from"),
    ("--dtype float8", "--dtype|choose from"),
    ("--config", "--config"),
    ("--config ../nowhere.yaml", "nowhere.yaml|cannot be read"),
    ("--config ../base", "../base|cannot be read"),
    *[
        (f"--config ../yaml/{name}.yaml", f"{name}.yaml|{words}")
        for name, words in (
            ("unknown", "--stepz"),
            ("nothing", "seed|give one"),
            ("list", "'steps: 100'"),
            ("many", "seed|give one"),
            ("mapping", "seed|give one"),
            ("syntax", "cannot be read"),
            ("word", "--seed|many"),
            ("half", "--seed|1.5"),
            ("truth", "--overwrite"),
            ("nested", "config"),
            ("text", "'steps: 100'"),
            ("tab", "cannot be read"),
            ("choice", "google"),
            ("deep", "cannot be read"),
            ("binary", "cannot be read"),
            ("spelled", "cannot be read"),
        )
    ],
    ("--config ../yaml/nan.yaml", "--temperature"),
    ("--config ../yaml/minus.yaml", "--timeout"),
    ("--data ../nowhere.jsonl", "../nowhere.jsonl|check the path"),
    ("--data ../base", "../base|neither"),
    ("--data ../data/table.xlsx", "table.xlsx|.jsonl"),
    ("--data world,../questions.jsonl", "'world'|neither"),
    ("--data ../questions.jsonl,", "neither"),
]
POLICIES = [  # wrong policies, of stage 2 and of stage 3
    ("--policy ../nowhere", "../nowhere|check the path"),
    ("--policy ../corpus.txt", "corpus.txt|config.json"),
    ("--policy ../empty", "../empty|config.json"),
    ("--policy org/name", "org/name|cannot be loaded"),
    *[
        (f"--policy ../models/{name}", f"{name}|{words}")
        for name, words in (
            ("untokenized", "no tokenizer"),
            ("weightless", "model.safetensors"),
            ("garbled", "cannot be loaded"),
            ("cut_short", "cannot be loaded"),
            ("layer_lost", "lack"),
            ("layer_more", "lack"),
            ("wider", "cannot be loaded"),
            ("unheard", "unheard_of"),
            ("untyped", "model_type"),
            ("half_config", "cannot be loaded"),
            ("listed", "cannot be loaded"),
            ("positions", "cannot be loaded"),
            ("mamba", "MambaForCausalLM is not supported|linear_attention"),
            ("bloom", "BloomForCausalLM is not supported"),
            ("half_tokenizer", "cannot be loaded"),
            ("no_tokenizer", "cannot be loaded"),
            ("more_tokens", "tokens"),
            ("unasked", "{question}"),
            ("latin", "cannot be loaded"),
            ("pickled", "model.safetensors"),
            ("with_code", "cannot be loaded"),
            ("lora_alone", ""),
        )
    ],
    ("--max_context 100000", "--max_context 100000|positions"),
    ("--max_context 3", "--max_context 3"),
    ("--attention flash_attention_2", "--attention|CUDA"),
]
QUESTIONS = [
    *[
        (f"--data ../data/{name}", f"{name}|{words}")
        for name, words in (
            ("empty.jsonl", "no rows"),
            ("blank.jsonl", "no rows"),
            ("no_list.json", "no rows"),
            ("broken.jsonl", "near row 2"),
            ("half.json", "cannot be read"),
            ("numbers.jsonl", "row 1 is no object"),
            ("listed.json", "row 1 is no object"),
            ("columns.jsonl", "'question'|'text'"),
            ("golds.jsonl", "'golden_answers'|'question'"),
            ("unanswered.jsonl", "no row|1 without"),
            ("marks.jsonl", "no row|1 without"),
            ("long.jsonl", "1 over-long"),
            ("lists.jsonl", "1 without"),
            ("latin.jsonl", "utf-8"),
            ("false.parquet", "cannot be read"),
            ("deep.json", "cannot be read"),
            ("digits.jsonl", "cannot be read"),
            ("words.txt", "'question'"),
            ("latin.txt", "cannot be read"),
        )
    ],
    ("--data org/name", "org/name|cannot be read"),
    ("--data org/name:config@v1", "org/name|neither"),
]
ENGINES = [
    ("--corpus ''", "--corpus FILE"),
    ("--corpus ../nowhere.txt", "../nowhere.txt|check the path"),
    ("--corpus ../base", "../base|check the path"),
    *[
        (f"--corpus ../data/{name}", f"{name}|{words}")
        for name, words in (
            ("table.xlsx", ".jsonl"),
            ("empty.jsonl", "no text"),
            ("body.jsonl", "'contents'"),
            ("spaces.jsonl", "no text"),
            ("latin.txt", "cannot be read"),
            ("broken.jsonl", "row 2"),
            ("false.parquet", "cannot be read"),
        )
    ],
    ("--engine http", "--engine_url"),
    ("--engine http --engine_url localhost:8000", "--engine_url"),
    ("--engine http --engine_url ftp://host/", "--engine_url"),
    ("--engine http --engine_url http://", "http://HOST:PORT"),
    ("--engine http --engine_url http://me:secret@host:80", "http://HOST:PORT"),
    ("--engine http --engine_url http://host,host:81", "http://HOST:PORT"),
    ("--engine http --engine_url http://host --engine_api ours", "--engine_api"),
    ("--engine http --engine_url http://host --cache ../data/replies.db", "replies.db"),
    ("--engine http --engine_url http://host --cache ../base", "../base"),
    ("--engine http --engine_url http://host --cache ../nowhere/replies.db", "nowhere"),
    ("--engine web", "SERPER_API_KEY"),
    ("--engine web --timeout 0", "--timeout"),
    ("--engine simulator --simulator ../nowhere", "../nowhere|check the path"),
    ("--engine simulator --simulator ../empty", "config.json"),
    *[
        (f"--engine simulator --simulator ../models/{name}", f"{name}|{words}")
        for name, words in (
            ("untokenized", "no tokenizer"),
            ("weightless", "model.safetensors"),
            ("garbled", "cannot be loaded"),
            ("unqueried", "{query}"),
            ("half_config", "loaded"),
            ("listed", "cannot be loaded"),
            ("layer_lost", "lack"),
            ("more_tokens", "tokens"),
            ("pickled", "model.safetensors"),
        )
    ],
    ("--engine simulator --simulator org/name", "org/name"),
    ("--engine simulator --simulator ../base --simulator_template ../nowhere", "../nowhere"),
    ("--engine simulator --simulator ../base --simulator_template ../base", "../base"),
    ("--engine simulator --simulator ../base --simulator_template ../corpus.txt", "{query}"),
    ("--engine simulator --simulator ../base --simulator_api talk", "--simulator_api"),
    ("--engine simulator --simulator http://127.0.0.1:9 --retries 0", "127.0.0.1:9"),
    ("--engine simulator --simulator ../base --max_document_tokens 90000", "positions"),
    ("--engine simulator --simulator ../base --simulator_temperature -1", "--simulator_temp"),
]
ROWS = [(script, flags, {}, words) for script, (flags, words) in zip(cycle(RIGHT), EVERYWHERE)]
ROWS += [
    (script, flags, {}, words)
    for script, (flags, words) in zip(
        cycle(["train_policy", "evaluate"]), POLICIES + QUESTIONS + ENGINES
    )
]
ROWS += [
    ("train_sim", flags, {}, words)
    for flags, words in [
        ("--steps 0", "--steps"),
        ("--lr inf", "--lr|too large"),
        ("--worlds 0", "--worlds"),
        ("--batch_tokens 0", "--batch_tokens"),
        ("--warmup 2", "--warmup|0 to 1"),
        ("--examples 1", "--examples"),
        ("--report_queries -1", "--report_queries"),
        ("--save_every -1", "--save_every"),
        ("--keep 0", "--keep"),
        ("--base ../nowhere", "../nowhere|check the path"),
        ("--base ../empty", "config.json"),
        ("--base org/name", "org/name|cannot be loaded"),
        (
            "--collect --searcher policy --data ../questions.jsonl --corpus ../corpus.txt "
            "--max_context 100000",
            "--max_context 100000|positions",
        ),
        ("--resume nowhere", "no checkpoint nowhere"),
        *[
            (f"--base ../models/{name}", f"{name}|{words}")
            for name, words in (
                ("untokenized", "no tokenizer"),
                ("garbled", "cannot be loaded"),
                ("layer_lost", "lack"),
                ("pickled", "model.safetensors"),
                ("with_code", "cannot be loaded"),
                ("lora_alone", "LoRA"),
                ("unqueried", "{query}"),
            )
        ],
        *[
            (f"--data ../data/{name}", words)
            for name, words in (
                ("empty.jsonl", "is empty"),
                ("columns.jsonl", "Row 1"),
                ("broken.jsonl", "row 2"),
                ("label.jsonl", "Row 1"),
                ("letters.jsonl", "Row 1"),
                ("silent.jsonl", "Row 1"),
                ("turns.jsonl", "Row 1"),
                ("useful.jsonl", "useful"),
                ("latin.jsonl", "utf-8"),
                ("deep.json", "cannot be read"),
            )
        ],
        ("--engine none", "--engine"),
        ("--collect --engine simulator", "simulator"),
        ("--collect --data ../questions.jsonl", "--corpus"),
        ("--collect --data ../questions.jsonl --engine http", "--engine_url"),
        ("--output ../base", "../base is not empty"),
        ("--output ../corpus.txt", "corpus.txt is a file"),
        ("--output ../corpus.txt/sim", "corpus.txt is a file"),
        ("--output ../base --overwrite", "holds no run"),
        ("--output .. --overwrite", "--overwrite"),
        ("--output ../closed/sim", "closed"),
    ]
]
ROWS += [
    ("train_policy", flags, {}, words)
    for flags, words in [
        ("--algorithm dpo", "--algorithm|choose from"),
        ("--steps 1e3", "--steps|1e3"),
        ("--lr 0", "--lr|greater than 0"),
        ("--kl_coef -1", "--kl_coef"),
        ("--group_size 1", "--group_size 2"),
        ("--minibatches 4", "--group_size"),
        ("--noise_end 1.5", "--noise_end|0 to 1"),
        ("--noise_base 0", "--noise_base"),
        ("--temperature 0", "--temperature"),
        ("--lam 2", "--lam|0 to 1"),
        ("--save_every -1", "--save_every"),
        ("--keep 0", "--keep"),
        ("--lora_rank -1", "--lora_rank"),
        ("--merge", "--lora_rank"),
        ("--steps 0", "--steps 0|--warm_start"),
        ("--log_with pigeon", "--log_with"),
        ("--log_with trackio", "pip install trackio"),
        ("--policy ../models/lora", "is a LoRA"),
        ("--output ../base", "../base is not empty"),
        ("--output ../corpus.txt", "corpus.txt is a file"),
        ("--output ../corpus.txt/run", "corpus.txt is a file"),
        ("--output ../base --overwrite", "holds no run"),
        ("--output .. --overwrite", "--overwrite"),
        ("--output . --overwrite", "--overwrite"),
        ("--output ../closed/run", "closed"),
        ("--output ../run", "--resume"),
        ("--output new --resume --overwrite", "--resume"),
        ("--resume ../run/checkpoints/step-9 --lr 0.5 --seed 3", "no checkpoint"),
        ("--resume ../run/checkpoints/step-1 --lr 0.5 --seed 3", "step-1 is damaged"),
        ("--resume ../run/checkpoints/step-1 --lr 0.2", "--lr was 0.5"),
        ("--resume ../run/checkpoints/step-1 --output new", "step-1"),
        ("--config ../run/metrics.jsonl", "--step"),
        ("--eval_every -1", "--eval_every"),
        ("--data ''", "--data|neither"),
        ("--policy ''", "config.json"),
    ]
]
COLLECT = "--collect --data ../questions.jsonl --corpus ../corpus.txt --judge "
ROWS += [
    ("train_sim", COLLECT + judge, {}, words)
    for judge, words in [
        ("../nowhere", "../nowhere|check the path"),
        ("../models/untokenized", "no tokenizer"),
        ("../models/garbled", "garbled|cannot be loaded"),
        ("org/name", "org/name|cannot be loaded"),
        ("http://", "http://HOST:PORT"),
        ("http://127.0.0.1:9 --retries 0", "127.0.0.1:9|check that this server runs"),
    ]
]
ROWS += [
    ("train_sim", "--judge ../base", {}, "--judge|leave it out"),
    ("train_sim", "--collect --judge ../base", {}, "--judge|leave it out"),
]
ROWS += [
    ("evaluate", flags, {}, words)
    for flags, words in [
        ("--questions -1", "--questions"),
        ("--questions few", "--questions"),
        ("--batch 0", "--batch"),
        ("--method guess", "--method|choose from"),
        ("--engine_noise 1.5", "--engine_noise|0 to 1"),
        ("--method rag --engine_noise 0.5", "--engine_noise"),
        ("--before ../nowhere", "../nowhere"),
        ("--before ../models/garbled", "garbled|cannot be loaded"),
        ("--before ../models/unasked", "{question}"),
        ("--before org/name", "org/name|cannot be loaded"),
        ("--before ../models/lora", "cannot be loaded"),
        ("--policy ../models/lora", "cannot be loaded"),
        ("--output ../figures.json", "figures.json exists"),
        ("--output figures.txt", ".json"),
        ("--output ../nowhere/figures.json", "nowhere"),
        ("--output ../corpus.txt/figures.json", "corpus.txt"),
    ]
]
ROWS += [
    ("evaluate", "--engine web", {"SERPER_API_KEY": "  "}, "SERPER_API_KEY"),
    ("train_policy", "--engine web", {"SERPER_API_KEY": ""}, "SERPER_API_KEY"),
    ("train_policy", "--engine web", {"SERPER_API_KEY": "a\nb"}, "SERPER_API_KEY|set it anew"),
]
ROWS += [
    ("evaluate", "--output ../folder.json --overwrite", {}, "folder.json"),
    ("evaluate", "--output ../closed/figures.json", {}, "closed"),
    ("train_policy", "", {"WORLD_SIZE": "2", "RANK": "x", "LOCAL_RANK": "0"}, "Accelerate"),
    ("evaluate", "", {"ACCELERATE_USE_CPU": "perhaps"}, "Accelerate"),
    ("train_policy", "", {"ACCELERATE_USE_DEEPSPEED": "true"}, "Accelerate"),
    ("evaluate", "--engine web", {"SERPER_API_KEY": "a\nb"}, "key"),
    ("train_policy", "--engine web", {"SERPER_API_KEY": "\u043a\u043b\u044e\u0447"}, "key"),
    (
        "train_policy",
        "--engine simulator --simulator ../base --simulator_device cuda:7",
        {},
        "CUDA",
    ),
    ("evaluate", "--engine simulator --simulator ../base --simulator_device here", {}, "here"),
    ("train_policy", "--engine simulator --simulator ../models/with_code", {}, "cannot be loaded"),
    ("evaluate", "--engine simulator --simulator ../models/lora", {}, "cannot be loaded"),
    ("train_policy", "--engine simulator --simulator ../models/latin_sim", {}, "UTF-8"),
    ("train_sim", "--base ../models/latin_sim", {}, "UTF-8"),
    ("train_policy", "--output ../run/policy/new", {}, "lies in a run"),
    ("train_sim", "--output ../run/new", {}, "lies in a run"),
]


MKDIR = os.mkdir


def as_no_root(path, *rest, **options) -> None:
    """`os.mkdir`, with the permissions that root passes over."""
    if not os.stat(Path(path).absolute().parent).st_mode & 0o200:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    MKDIR(path, *rest, **options)


def test_there_are_more_than_a_hundred():
    """The table has more than a hundred rows, each of them once."""
    assert (
        len({(script, flags, *environment.items()) for script, flags, environment, _ in ROWS})
        == len(ROWS)
        > 130
    )


@pytest.mark.parametrize(
    "script, flags, environment, words",
    ROWS,
    ids=[" ".join([s, f, *e.values()]) for s, f, e, _ in ROWS],
)
def test_it_is_one_sentence_and_nothing_is_made(
    wrong, monkeypatch, script, flags, environment, words
):
    """The sentence says what is wrong. No other stage has run, nor a stranger's code, and no file
    or folder is new, changed or gone."""
    monkeypatch.chdir(wrong / "here")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(build, "run_stage", lambda *_: pytest.fail("another stage is run"))
    monkeypatch.setattr(os, "mkdir", as_no_root)
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    main, right = RIGHT[script]
    before = everything(wrong)
    try:
        with pytest.raises(UserError) as error:
            main([*right, *shlex.split(flags)])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    message = str(error.value)
    assert all(word in message for word in words.split("|")), message
    assert "\n" not in message and 20 < len(message) < 700, message
    assert everything(wrong) == before
    COUNTS["bad inputs tried"] += 1


QUICK = """
import runpy, sys
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    slow = {"torch", "accelerate", "datasets"} & sys.modules.keys()
    assert not slow, slow
"""


@pytest.mark.parametrize("script", RIGHT)
def test_a_process_answers_at_once(wrong, script):
    """--help and a wrong flag need no slow library, and an error is one line and exit status 2."""
    code = QUICK.replace("sys.argv[0]", repr(str(ROOT / f"{script}.py")))
    commands = [["--help"], ["--stepz", "5"], ["--seed", "x"], ["--config", "yaml/deep.yaml"]]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, *flags],
            cwd=wrong,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for flags in commands
    ]
    (text, nothing), *refused = [process.communicate() for process in processes]
    assert "--seed" in text and "Delete what an earlier run left" in text and not nothing
    assert [process.returncode for process in processes] == [0, 2, 2, 2]
    for (out, error), flags in zip(refused, commands[1:], strict=True):
        assert out == "" and error.startswith("error: ") and error.count("\n") == 1
        assert flags[0] in error or flags[1] in error
        COUNTS["bad inputs tried"] += 1
