"""What sleeping threads cost on an idle machine, and what they save on a busy one.

    python benchmarks/waiting.py --repeats 5          # on a machine without other work
    python benchmarks/waiting.py --repeats 5 --busy   # beside one process that keeps a core busy

Each run is three steps of training with BM25 in a process of its own. On one side threads that wait
sleep, as the scripts ask for; on the other they spin first, as GNU OpenMP has it by default. The
sides take turns."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
FLAGS = "--engine bm25 --steps 3 --eval_every 0 --save_every 0".split()
# The default where the machine has a core for each thread. As it is set, the scripts keep it.
SPINS = {"GOMP_SPINCOUNT": "300000"}


def seconds_a_step(policy: dict[str, str]) -> float:
    """The median of three steps' seconds, as the run itself measures them."""
    names = [name for name in os.environ if not name.startswith(("OMP_", "GOMP_"))]
    own = {name: os.environ[name] for name in names}
    with TemporaryDirectory() as folder:
        output = Path(folder, "run")
        command = [sys.executable, str(ROOT / "train_policy.py"), *FLAGS, "--output", str(output)]
        subprocess.run(command, env=own | policy, check=True, capture_output=True)
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return median(json.loads(line)["seconds"] for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="Runs a side, by turns.")
    parser.add_argument("--busy", action="store_true", help="Keep one core busy meanwhile.")
    options = parser.parse_args()
    sides = {"spinning": SPINS, "sleeping": {}}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if options.busy else None
    try:
        for _ in range(options.repeats):
            for name, policy in sides.items():
                seconds[name].append(seconds_a_step(policy))
    finally:
        if other:
            other.kill()
    for name, values in seconds.items():
        cells = ", ".join(f"{value:.2f}" for value in values)
        print(f"{name} threads: {median(values):.2f} s a step, the median of {cells}")


if __name__ == "__main__":
    main()
