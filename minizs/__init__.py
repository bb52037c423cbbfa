"""minizs: ZeroSearch (arXiv 2505.04588) from scratch; the README gives the order to read it in."""

import os


def wait_quietly() -> None:
    """Let threads that wait sleep, unless the user has set how they wait.

    By default those of GNU OpenMP spin for a while. As soon as one of their cores has other work,
    all of them spin for the thread that has lost its core, and a step takes many times as long.
    OpenMP reads this variable once, when torch is loaded. Processes started later inherit it.
    """
    if "OMP_WAIT_POLICY" not in os.environ and "GOMP_SPINCOUNT" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


wait_quietly()


class UserError(Exception):
    """Something that the user can mend. Its one sentence says what is wrong and how."""


def require(condition: bool, message: str) -> None:
    """Raise UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(message)


def brief(error: BaseException) -> str:
    """What a library's error says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
