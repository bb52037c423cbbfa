"""A trajectory in a terminal, turn by turn, with colours where they are welcome."""

import os
import re
import sys

from minizs.trajectory import Turn

# ANSI codes: thoughts are faint, then cyan, green, blue and orange.
INK = {"think": 2, "search": 36, "answer": 32, "useful": 34, "noisy": 33}
TAGGED = re.compile(r"<(think|search|answer)>.*?</\1>", re.DOTALL)
JOINERS = "\u200c\u200d"  # hidden, but many scripts and emoji are spelled with them


def visible(text: str) -> str:
    """Text in which what hides, moves or colours other text is a mark that can be seen.

    Documents come from anywhere: a terminal must not obey them, nor a page be turned by them.
    """
    return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    if character.isprintable() or character == "\n" or character in JOINERS:
        return character
    return " " if character.isspace() else "\ufffd"


def paint(text: str, kind: str) -> str:
    """Coloured text for a terminal, but where colours are not wished (https://no-color.org)."""
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty():
        return text
    return f"\033[{INK[kind]}m{text}\033[0m"


def show_turn(turn: Turn) -> None:
    """Print what is new in a turn. `rollout` calls this when the policy has written it, and again
    when its documents have come."""
    if turn.documents is None:
        text = visible(turn.text.strip())
        print(TAGGED.sub(lambda part: paint(part[0], part[1]), text), flush=True)
        notes = ["no valid action"] if turn.action == "invalid" else []
    else:
        notes = turn.documents or ["nothing found"]
    for note in notes:
        print("   ", paint(visible(note), "noisy" if turn.noisy else "useful"), flush=True)
