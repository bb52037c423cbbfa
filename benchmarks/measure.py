"""What the benchmarks share: contenders that take turns, medians, peak memory, and the machine.

Each contender (`Side`) lives in a process of its own with its own copy of the model, so that
neither its memory nor what it has warmed up touches the other's. While one works the others wait.
Peak memory is the highest resident size during a call above the size that the process had once its
modules and models were loaded. On a GPU it is what PyTorch had allocated. The resident size is read
from /proc, so on other systems than Linux only a GPU's memory is known.
"""

import ctypes
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from statistics import median
from threading import Thread
from typing import Any

import torch

MB = 2**20
STATUS = Path("/proc/self/status")  # has the memory in use, and its peak
CLEAR = Path("/proc/self/clear_refs")  # begins a new peak


@dataclass(frozen=True)
class Run:
    """One call: what it returned, how long it took, and its peak above the start, in bytes."""

    value: Any
    seconds: float
    peak: int


class Side:
    """A contender in a process of its own.

    There, `make(*settings)` is called once: it loads what is needed and returns the function that
    is measured. Both have to stand at the top of a module, so that the process finds them by name.
    """

    def __init__(self, make: Callable, *settings, threads: int) -> None:
        self.pool = ProcessPoolExecutor(
            1,
            mp_context=get_context("spawn"),
            initializer=_load,
            initargs=(make, settings, threads),
        )

    def start(self, *arguments) -> "Future[Run]":
        return self.pool.submit(_measure, arguments)

    def __call__(self, *arguments) -> Run:
        return self.start(*arguments).result()


@contextmanager
def together(sides: dict[str, Side]) -> Iterator[None]:
    """Inside, the sides can be called. Their processes end with the block."""
    try:
        yield
    finally:
        for side in sides.values():
            side.pool.shutdown(cancel_futures=True)


def _load(make: Callable, settings: tuple, threads: int) -> None:
    global _work, _at_start
    end_with_parent()
    torch.set_num_threads(threads)
    _work = make(*settings)
    _wake()
    _forget()
    _at_start = _memory("VmRSS")


def end_with_parent() -> None:
    """From now on this process ends when its parent does: a benchmark that is killed leaves none
    behind."""

    def wait() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=wait, daemon=True).start()


def _wake() -> None:
    """Have PyTorch import and start what it imports and starts when it is first used."""
    layer = torch.nn.Linear(64, 64)
    layer(torch.ones(1, 64)).sum().backward()
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.step()
    optimizer.zero_grad()


def _measure(arguments: tuple) -> Run:
    _forget()
    start = time.perf_counter()
    value = _work(*arguments)
    synchronize()
    seconds = time.perf_counter() - start
    peak = _memory("VmHWM") - _at_start
    return Run(value, seconds, max(0, peak))


def _forget() -> None:
    """Give freed memory back and begin a new peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif CLEAR.exists():
        ctypes.CDLL(None).malloc_trim(0)
        CLEAR.write_text("5", encoding="utf-8")


def _memory(name: str) -> int:
    """Bytes in use (VmRSS), or at most since the last `_forget` (VmHWM)."""
    if torch.cuda.is_available():
        if name == "VmHWM":
            return torch.cuda.max_memory_allocated()
        return torch.cuda.memory_allocated()
    if STATUS.exists():
        for line in STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith(name):
                return 1024 * int(line.split()[1])
    return 0  # not known on this system


def synchronize() -> None:
    """Wait until a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def take_turns(sides: dict[str, Side], repeats: int, *arguments) -> dict[str, list[Run]]:
    """Call every side `repeats` times, by turns (A B A B), after one call each to warm up.

    The last argument of a call is its number, which serves as a seed.
    """
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            runs[name].append(side(*arguments, repeat))
    return {name: measured[1:] for name, measured in runs.items()}


def seconds(runs: list[Run]) -> float:
    """The median of the calls."""
    return median(run.seconds for run in runs)


def peak(runs: list[Run]) -> float:
    """The highest peak of the calls, in MB."""
    return max(run.peak for run in runs) / MB


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # on Linux alone
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine(threads: int) -> str:
    """The machine, and the versions of what computes, in one line."""
    import transformers

    names = [line.split(":")[1].strip() for line in _cpu() if line.startswith("model name")]
    kind = names[0] if names else platform.processor() or platform.machine()
    if torch.cuda.is_available():
        kind = f"{torch.cuda.get_device_name()} beside {kind}"
    return (
        f"{kind}, {cores()} cores, {threads} thread(s) a side; Python "
        f"{sys.version.split()[0]}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )


def _cpu() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _best(work: Callable[[], Any], repeats: int = 5) -> float:
    """Seconds of the fastest of some calls, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        work()
        synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def read_rate(device: torch.device) -> float:
    """Bytes a second that can be read from memory: the better of a sum and a product with a vector,
    over 256 MB on a CPU (more than its caches hold) and 4 GB on a GPU."""
    size = 2**15 if device.type == "cuda" else 2**13
    matrix = torch.ones(size, size, device=device)
    vector = torch.ones(size, device=device)
    fastest = min(_best(lambda: matrix.sum()), _best(lambda: matrix @ vector))
    return matrix.nbytes / fastest


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of the best of some square matrix products."""
    rates = []
    for size in (4096, 8192) if device.type == "cuda" else (512, 1024, 2048):
        matrix = torch.ones(size, size, device=device, dtype=dtype)
        rates.append(2 * size**3 / _best(lambda m=matrix: m @ m))
    return max(rates)
