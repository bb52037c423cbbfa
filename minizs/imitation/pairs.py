"""From rows to training texts of a simulator: a prompt, and a reply with the loss on it.

Three layouts of rows are read: our own (see collect.py), `instruction` and `output` (Alpaca's, with
an `input` perhaps), and `messages` of a user and an assistant. The last two keep their own wording,
which the simulator's later use should repeat.
"""

from collections.abc import Sequence
from random import Random

from minizs import require
from minizs.imitation.collect import draw_balanced, request_of
from minizs.sft import Segment
from minizs.simulator import training_text


def make_pairs(rows: Sequence[dict], template: str, seed: int = 0) -> list[list[Segment]]:
    """A training text for each row, in the order of the rows. Where all rows are of our own layout,
    a random half of the commoner label is left out, so that there are as many useful as noisy ones.

    `template` is the wording of our own rows' prompts. Raises UserError for a row of no layout.
    """
    texts = [read_row(row, number, template) for number, row in enumerate(rows, 1)]
    if all({"query", "label"} <= row.keys() for row in rows):
        places = draw_balanced(rows, len(rows), Random(f"pairs {seed}"))
        texts = [texts[place] for place in sorted(places)]
    require(bool(texts), "--data is empty, or its rows are all useful or all noisy.")
    return texts


def read_row(row: dict, number: int, template: str) -> list[Segment]:
    """The training text of one row, the `number`-th of its file. Raises UserError."""
    prompt = reply = ""
    match row:
        case {
            "query": str(),
            "question": str(),
            "answers": list(),
            "documents": [str(), *_],
            "label": "useful" | "noisy",
        }:
            return training_text(template, request_of(row), row["documents"])
        case {"instruction": str(prompt), "output": str(reply)}:
            if row.get("input"):
                prompt = f"{prompt}\n{row['input']}"
        case {
            "messages": [
                {"role": "user", "content": str(prompt)},
                {"role": "assistant", "content": str(reply)},
            ]
        }:
            pass
        case _:
            prompt = reply = ""  # a pattern that fails may have bound them
    require(
        bool(prompt.strip() and reply.strip()),
        f"Row {number} of --data lacks query, "
        "question, answers, documents and label (useful or noisy), or instruction and "
        f"output, or messages of user and assistant; it is {str(row)[:200]}",
    )
    return [(prompt, False), (reply, True)]
