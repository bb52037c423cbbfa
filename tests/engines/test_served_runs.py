"""Training against servers: what a local engine gives, a clear end when they die, and going on."""

import threading

import pytest
from scripts import POLICY, metrics, policy
from servers import openai, serving

import train_policy
from minizs import UserError
from minizs.engines import retriever
from minizs.engines.bm25 import BM25
from minizs.models import loading

SIMULATED = [
    "--engine",
    "simulator",
    "--simulator_temperature",
    "0",
    "--simulator_contrast",
    "0",  # which a server does not do
    "--steps",
    "3",
    "--max_document_tokens",
    "30",
    "--noise_end",
    "1",
]
SERVED = ["--simulator_template", "../base/simulator_prompt.txt", "--simulator_model", "tiny"]


def trajectories(run) -> str:
    return (run / "trajectories.jsonl").read_text()


def test_training_against_a_served_simulator(work):
    """Training against a served simulator gives the numbers of the same one here."""
    policy(*SIMULATED, "--simulator", "../base", "--output", "local")
    with serving(openai(*loading.load_model("../base"), seen := [], ["tiny"])) as (url, _):
        policy(*SIMULATED, *SERVED, "--simulator", f"{url},{url}", "--output", "served")
    assert trajectories(work / "served") == trajectories(work / "local")
    assert metrics(work / "served") == metrics(work / "local")
    assert len(seen) - 1 == sum(row["queries"] for row in metrics(work / "served")) > 0


def test_a_server_that_dies_loses_nothing_that_was_saved(work, monkeypatch):
    """A server that dies ends the run in one sentence, and what was saved can go on."""
    monkeypatch.setattr("minizs.engines.client.FIRST_WAIT", 0.01)
    answer = openai(*loading.load_model("../base"), [], ["tiny"])
    dead = threading.Event()
    mortal = lambda *call: (503, {}) if dead.is_set() else answer(*call)  # noqa: E731
    written = train_policy.run_folder.write_lines

    def killing(path, rows, *mode):
        written(path, rows, *mode)
        if path.name == "trajectories.jsonl" and rows[0]["step"] == 2:
            dead.set()

    monkeypatch.setattr(train_policy.run_folder, "write_lines", killing)
    flags = [*SIMULATED, *SERVED, "--save_every", "1", "--retries", "2", "--output"]
    with serving(mortal) as (url, _):
        with pytest.raises(UserError, match="answered 503.*check that this server runs"):
            policy(*flags, "cut", "--simulator", url)
        assert (work / "cut" / "checkpoints" / "step-2").is_dir()
        monkeypatch.setattr(train_policy.run_folder, "write_lines", written)
        dead.clear()
        train_policy.main(["--output", "cut", "--resume"])
        policy(*flags, "whole", "--simulator", url)
    assert trajectories(work / "cut") == trajectories(work / "whole")
    assert metrics(work / "cut") == metrics(work / "whole")


def test_training_against_our_retriever(work):
    """Our retriever and a cache of its replies give the run that BM25 gives here."""
    half = ["--noise_start", "0.5", "--noise_end", "0.5"]
    policy("--output", "here", *half)
    server = retriever.make_server(BM25.of_corpus("../corpus.txt"), "127.0.0.1", 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = "http://{}:{}".format(*server.server_address)
    flags = [*POLICY, "--engine", "http", "--engine_url", url, *half]
    train_policy.main([*flags, "--cache", "replies.db", "--output", "there"])
    server.shutdown()
    server.server_close()
    train_policy.main([*flags, "--cache", "replies.db", "--output", "again"])  # paid for already
    assert trajectories(work / "there") == trajectories(work / "here")
    assert trajectories(work / "again") == trajectories(work / "here")
