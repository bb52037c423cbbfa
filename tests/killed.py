"""Runs of train_policy that are killed: imported once, forked for each, in a process of its own.

    python killed.py FOLDER KILLS SEED FLAGS...

In FOLDER, `whole` is the run that nobody disturbs; then runs `cut-0`, `cut-1`, ... are killed with
SIGKILL at random moments of their lives and resumed, until there have been KILLS. Prints how many.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import accelerate  # noqa: F401 (here, so that no child has to)
import torch  # noqa: F401
import tqdm  # noqa: F401
import transformers  # noqa: F401

import train_policy
from minizs.runs.flags import run_script


def comes_to_its_end(flags: list[str], seconds: float | None = None) -> bool:
    """Start a run and kill it after so many seconds; without these, wait for its end.

    Returns whether it ended by itself. Raises AssertionError if it failed, or hangs.
    """
    child = os.fork()
    if child == 0:
        try:
            run_script(train_policy.main, flags)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)
    end = time.monotonic() + (seconds if seconds is not None else 600)
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0, status
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert seconds is not None, "a run that hangs"
    return False


def main(folder: str, kills: str, seed: str, *flags: str) -> None:
    os.chdir(folder)
    rng = random.Random(int(seed))
    killed = 0
    name = "whole"
    started = time.monotonic()
    assert comes_to_its_end([*flags, "--output", name])
    whole = time.monotonic() - started
    for run in range(int(kills)):
        name = f"cut-{run}"
        while killed < int(kills):
            if comes_to_its_end([*flags, "--output", name, "--resume"], rng.uniform(0, whole)):
                break
            killed += 1
        if killed == int(kills):
            Path(name).mkdir(exist_ok=True)  # which may have been killed before it began
            assert comes_to_its_end([*flags, "--output", name, "--resume"])
            break
    print(f"{killed} kills")


if __name__ == "__main__":
    main(*sys.argv[1:])
