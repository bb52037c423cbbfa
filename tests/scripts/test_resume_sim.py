"""`train_sim.py --resume`, and runs that are killed, stopped, or started twice."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import make_dataclass
from pathlib import Path

import psutil
import pytest
from counts import COUNTS
from filelock import FileLock
from scripts import (
    COLLECTED,
    ROOT,
    SIM,
    everything,
    losses,
    simulator,
    two_processes,
    weights,
)

import train_sim
from minizs import UserError, sft
from minizs.imitation import quality, supervised
from minizs.models import loading
from minizs.runs import build
from minizs.runs.flags import option


def test_a_killed_run_leaves_no_simulator(work, collected, monkeypatch):
    """A run that is killed while it saves leaves nothing that a later run would take for a
    simulator, and the same command then makes one."""

    def killed(*arguments, **texts):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "save_model", killed)
    with pytest.raises(KeyboardInterrupt):
        simulator("--data", COLLECTED)
    assert not (work / "runs" / "simulator").exists()
    monkeypatch.undo()
    monkeypatch.chdir(work)
    simulator("--data", COLLECTED)
    assert {p.name for p in (work / "runs").iterdir()} == {"simulator", ".simulator.lock"}
    assert not (work / "runs" / "simulator" / "report.json").exists()  # no world to test it on


def test_of_two_processes_the_second_waits(work, collected, monkeypatch, capsys):
    """A run waits for another one that makes the same simulator, and uses that one's."""
    load = build.load_configured_model
    begun = threading.Event()

    def other():
        with FileLock("runs/.simulator.lock"):
            begun.set()
            time.sleep(2)
            shutil.copytree("../base", "runs/simulator")

    def overtaken(*arguments):
        threading.Thread(target=other).start()
        assert begun.wait(20)
        return load(*arguments)

    monkeypatch.setattr(build, "load_configured_model", overtaken)
    monkeypatch.setattr(supervised, "train", lambda *_: pytest.fail("it has not waited"))
    simulator("--data", COLLECTED)
    assert "Another run has made runs/simulator" in capsys.readouterr().out
    assert {p.name for p in (work / "runs").iterdir()} == {"simulator", ".simulator.lock"}
    assert not (work / "runs" / "simulator" / "config.yaml").exists()  # theirs


def test_nothing_trained_is_lost(work, collected, monkeypatch):
    """A trained simulator is on the disk, whatever fails after it or stands in its place."""

    def blocked(*arguments):
        Path("out").mkdir()
        Path("out/notes.txt").write_text("mine")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervised, "train", blocked)
        with pytest.raises(UserError, match="out.partial"):
            simulator("--data", COLLECTED, "--output", "out")
    loading.load_model("out.partial")
    assert [p.name for p in (work / "out").iterdir()] == ["notes.txt"]
    monkeypatch.setattr(quality, "measure_quality", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        simulator()
    loading.load_model("runs/simulator")


@pytest.fixture
def stop(monkeypatch):
    """`stop(4, SIGTERM)`: the fourth step from now on gets this signal. Without a signal the step
    fails, as if the process had been killed there."""

    def at(step: int, number: signal.Signals | None = None) -> None:
        steps = iter(range(1, step + 1))
        collate = sft.collate

        def patched(*arguments):
            if next(steps, 0) == step:
                monkeypatch.setattr(sft, "collate", collate)
                if number is None:
                    raise MemoryError
                signal.raise_signal(number)
            return collate(*arguments)

        monkeypatch.setattr(sft, "collate", patched)

    return at


LONG = ["--data", COLLECTED, "--steps", "6", "--save_every", "2"]


def same(one: str, other: str) -> None:
    assert weights(Path(one)) == weights(Path(other)) and losses(one) == losses(other)


def test_it_goes_on_where_it_was_killed(work, collected, stop, capsys):
    """Optimiser, order of the data and log come back: the weights are those of an unbroken run,
    with the same command, with `--resume --output` alone, and from a named checkpoint."""
    simulator(*LONG, "--output", "whole")
    ways = {
        "same": [*SIM, *LONG, "--output", "same"],
        "bare": ["--resume", "--output", "bare"],
        "named": ["--resume", "named.partial/checkpoints/step-2", "--output", "named"],
    }
    for name, flags in ways.items():
        stop(6)  # two checkpoints are there, and step 5 is lost
        with pytest.raises(MemoryError):
            simulator(*LONG, "--output", name)
        assert len(losses(f"{name}.partial")) == 5 and not Path(name).exists()
        train_sim.main(flags)
        same("whole", name)
        assert not Path(f"{name}.partial").exists()
    out = capsys.readouterr().out
    assert out.count("Going on from step 4") == 2 and "Going on from step 2 of named" in out
    train_sim.main(ways["bare"])  # exits well where all is done
    assert "The simulator is in bare already" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(work, collected, stop, number):
    """Ctrl-C and SIGTERM save the step, and the command in the message goes on to the same
    weights."""
    simulator(*LONG, "--output", "whole")
    stop(3, number)
    with pytest.raises(SystemExit, match="after step 3, .* --output out --resume"):
        simulator(*LONG, "--output", "out")
    assert Path("out.partial/checkpoints/step-3").is_dir() and not Path("out").exists()
    simulator(*LONG, "--output", "out", "--resume")
    same("whole", "out")


def test_other_settings_do_not_go_on(work, collected, stop, monkeypatch, capsys):
    """A run goes on with its own settings only. With --overwrite it begins anew, and so does the
    default one, since stage 2 waits for it."""
    for flags in ([], ["--output", "out"]):
        stop(3)
        with pytest.raises(MemoryError):
            simulator(*LONG, *flags)
    before = everything(work / "out.partial")
    for flags in (["--lr", "0.5"], ["--lr", "0.5", "--resume"]):
        with pytest.raises(UserError, match="--lr was 0.004 and is 0.5"):
            simulator(*LONG, "--output", "out", *flags)
    assert everything(work / "out.partial") == before
    simulator(*LONG, "--output", "out", "--lr", "0.5", "--overwrite")
    small = dict(
        base="../base",
        worlds=2,
        examples=40,
        steps=3,
        batch_tokens=400,
        save_every=1,
        report_queries=2,
        threads=1,
    )
    fields = [(name, type(value), option(value, "")) for name, value in small.items()]
    monkeypatch.setattr(
        train_sim, "SimConfig", make_dataclass("Small", fields, bases=(train_sim.SimConfig,))
    )
    stop(3)
    with pytest.raises(MemoryError):
        train_sim.main([])
    train_sim.main([])
    lines = [line for line in capsys.readouterr().out.splitlines() if "runs/simulator.p" in line]
    assert [line.split()[0] for line in lines] == ["A"] * 3
    assert Path("runs/simulator/report.json").is_file()


def killed(command: list[str], folder: Path, line: int, rng: random.Random) -> None:
    """Run it, and kill all of its processes a moment after this line of the log is there."""
    settings = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(
        command, env=os.environ | settings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = folder / "metrics.jsonl"
    while not log.exists() or len(log.read_bytes().splitlines()) < line:
        assert run.poll() is None
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.15))
    for process in [*psutil.Process(run.pid).children(recursive=True), run]:
        process.kill()
    run.wait()
    COUNTS["kills survived"] += 1


@pytest.mark.parametrize(
    "processes, kills",
    [
        (1, 1),
        pytest.param(1, 5, marks=pytest.mark.slow),
        pytest.param(2, 3, marks=pytest.mark.slow),
    ],
)
def test_kill_9(work, collected, processes, kills):
    """A killed run goes on to the weights of an unbroken one, wherever the kill came."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    flags = [*SIM, *LONG, "--steps", "12", "--save_every", "1", "--output"]
    script = [*(launch if processes > 1 else []), str(ROOT / "train_sim.py"), *flags]
    rng = random.Random(kills)
    for kill in range(kills):
        killed([sys.executable, *script, "out"], work / "out.partial", 2 + kill, rng)
        assert not Path("out").exists()
    for folder in ("out", "whole"):
        if processes > 1:
            two_processes("train_sim.py", *flags, folder)
        else:
            train_sim.main([*flags, folder])
    same("whole", "out")
    assert {p.name for p in work.iterdir()} == {"out", ".out.lock", "whole", ".whole.lock"}
