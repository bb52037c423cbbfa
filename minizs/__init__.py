"""minizs: ZeroSearch (arXiv 2505.04588) from scratch; the README gives the order to read it in."""


class UserError(Exception):
    """Something that the user can mend. Its one sentence says what is wrong and how."""


def require(condition: bool, message: str) -> None:
    """Raise UserError with this sentence unless the condition holds."""
    if not condition:
        raise UserError(message)


def brief(error: BaseException) -> str:
    """What a library's error says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
