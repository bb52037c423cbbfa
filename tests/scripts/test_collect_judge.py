"""`train_sim.py --collect --judge`: a language model, served or local, labels what was found."""

import json
import random
import re
from pathlib import Path

import pytest
import torch
from scripts import (
    MONTHS,
    NAMES,
    ROOT,
    simulator,
)
from servers import serving

from minizs import UserError, protocol, sft
from minizs.models import loading

COLLECT = """--max_turns 3 --max_turn_tokens 16 --max_context 160 --top_k 1 --collect
    --data many.jsonl --corpus ../corpus.txt --policy ../base --examples 200""".split()
KEPT = "query question answers documents".split()


def ask_for_many() -> None:
    """Questions in `many.jsonl`, each often: the tiny policy searches for some of them."""
    lines = [json.loads(x) for x in Path("../questions.jsonl").read_text().splitlines()]
    rows = [row | {"data_source": str(i)} for row in lines for i in range(16)]
    Path("many.jsonl").write_text("\n".join(map(json.dumps, rows)))


def rows_in(folder: str) -> list[dict]:
    return [json.loads(x) for x in Path(folder, "collected.jsonl").read_text().splitlines()]


def neither(out: str) -> int:
    return sum(int(n) for n in re.findall(r"The judge: (\d+) of \d+ words are neither", out))


def verdict(row: dict) -> str:
    """A judge of our own, who would not agree with the golds."""
    return {"Fota": "Useful.", "Holo": " noisy\n"}.get(row["question"].split()[2], "Well, useful")


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_served_model_judges(work, capsys, monkeypatch, api):
    """Each row has the label that the judge gave it; the judge reads all of the row, in the wording
    of its prompt, and is asked greedily."""
    monkeypatch.setenv("SIMULATOR_API_KEY", "s3cret")
    ask_for_many()
    simulator(*COLLECT, "--output", "gold")
    bodies = []

    def answer(path, body, headers):
        assert headers["Authorization"] == "Bearer s3cret"
        if path == "/v1/models":
            return 200, {"data": [{"id": "a-judge"}]}
        assert path == ("/v1/chat/completions" if api == "chat" else "/v1/completions")
        bodies.append(body)
        text = body["messages"][0]["content"] if api == "chat" else body["prompt"]
        [row] = [row for row in rows_in("gold") if shown(row) == text][:1]
        said = {"message": {"content": verdict(row)}} if api == "chat" else {"text": verdict(row)}
        return 200, {"choices": [said | {"finish_reason": "stop"}]}

    with serving(answer) as (url, _):
        simulator(
            *COLLECT,
            "--judge",
            url,
            "--simulator_api",
            api,
            "--output",
            "out",
            "--on_search_error",
            "empty",
        )
    rows = rows_in("out")
    assert {body["temperature"] for body in bodies} == {0.0} and len(bodies) == len(rows)
    assert {body["model"] for body in bodies} == {"a-judge"}
    assert [[r[k] for k in KEPT] for r in rows] == [[r[k] for k in KEPT] for r in rows_in("gold")]
    assert [row["label"] == "useful" for row in rows] == [verdict(r) == "Useful." for r in rows]
    assert {row["label"] for row in rows} == {"useful", "noisy"}
    assert [row["label"] for row in rows] != [row["label"] for row in rows_in("gold")]
    odd = sum(verdict(row) == "Well, useful" for row in rows)
    assert neither(capsys.readouterr().out) == odd > 0
    simulator("--data", "out/collected.jsonl", "--output", "sim")


def shown(row: dict) -> str:
    """What a judge reads of a row."""
    text = Path(ROOT, "minizs/prompts/judge.txt").read_text()
    numbered = "\n".join(f"Doc {i}: {text}" for i, text in enumerate(row["documents"], 1))
    words = {"documents": numbered, "answers": " or ".join(row["answers"])}
    words |= {"query": protocol.neutralize(row["query"]), "question": row["question"]}
    return text.format(**words)


def test_a_judge_that_dies_leaves_what_it_has_judged(work, monkeypatch):
    """What was judged before a server died is on the disk, and the message says how to go on."""
    monkeypatch.setattr("minizs.engines.client.FIRST_WAIT", 0.001)
    ask_for_many()
    alive = iter(range(10**6))

    def answer(path, body, headers):
        said = {"text": ("useful", "noisy")[len(body["prompt"]) % 2], "finish_reason": "stop"}
        failed = next(alive) >= 25  # one batch and a part of the next
        return (503, "") if failed else (200, {"choices": [said]})

    with serving(answer) as (url, seen):
        with pytest.raises(
            UserError,
            match="answered 503 .*check that this server runs.*saved.*--output cut --resume",
        ):
            simulator(
                *COLLECT,
                "--judge",
                url,
                "--simulator_model",
                "m",
                "--retries",
                "1",
                "--on_search_error",
                "empty",
                "--output",
                "cut",
            )
    rows = rows_in("cut.partial")
    assert 10 < len(rows) < 25 < len(seen)
    assert {row["label"] for row in rows} == {"useful", "noisy"}


def test_a_local_model_judges(work, capsys):
    """A local model's words are the labels, the same as `transformers` generates."""
    ask_for_many()
    model, tokenizer = loading.load_model("../base")
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    words = {"Fota": "useful", "Holo": "noisy", "Mirka": "January"}
    for _ in range(60):
        texts = []
        for name in NAMES:
            document = f"{name} was born on {rng.choice(MONTHS)}"
            row = {
                "query": f"{name} born on",
                "question": f"when was {name} born?",
                "answers": [rng.choice(MONTHS)],
                "documents": [document],
            }
            pair = [(shown(row), False), (words[name.split()[0]], True)]
            texts.append(sft.encode(tokenizer, pair, end=True))
        loss, count = sft.nll(model, *sft.collate(texts))
        (loss / count).backward()
        optimizer.step()
        optimizer.zero_grad()
    loading.save_model(model.eval(), tokenizer, Path("judge"))
    simulator(*COLLECT, "--judge", "judge", "--output", "out")
    rows = rows_in("out")
    said = []
    for row in rows:
        ids = torch.tensor([tokenizer(shown(row))["input_ids"]])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
        said.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).split()[0])
    assert {*said} == {*words.values()}
    assert [row["label"] == "useful" for row in rows] == [word == "useful" for word in said]
    golds = [row["answers"][0] in row["documents"][0] for row in rows]
    assert [row["label"] == "useful" for row in rows] != golds
    assert neither(capsys.readouterr().out) == said.count("January")
