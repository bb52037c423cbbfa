"""Stage 1's training pairs: what a simulator is asked, and what it should write, from a file.

A row of --collect is asked with the template. Rows of instruction (and input) and output, or of
messages, bring their own wording, which --template should repeat, so that training and use do not
drift apart. A chat template, where there is one, comes around all of them later.
"""

from collections.abc import Callable
from random import Random

from minizs import data
from minizs.collect import balanced, request_of
from minizs.config import require
from minizs.sft import Segment
from minizs.simulator import training_text


def pairs(spec: str, template: str, seed: int = 0,
          say: Callable[[str], None] = print) -> list[list[Segment]]:  # fmt: skip
    """A prompt, and a reply with the loss on it, for each row of files or hub names (see data). If
    all rows have a label, as many useful as noisy ones are taken, in their order; `say` is told how
    many. Raises UserError for a row of no layout, counted through all files."""
    rows = [row for part in data.check(spec) for row in data.rows(part, say=say)]
    texts = []
    for number, row in enumerate(rows, 1):
        texts.append(_pair(row, template))
        require(bool(texts[-1]), f"Row {number} of {spec} has neither query, question, answers, "
                "documents and a label, useful or noisy, nor instruction and output, nor messages "
                f"of (system,) user and assistant; it is {str(row)[:200]}")  # fmt: skip
    kept = range(len(rows))
    if all({"query", "label"} <= row.keys() for row in rows):
        kept = sorted(balanced(rows, len(rows), Random(f"pairs {seed}")))
    require(bool(kept), f"{spec} is empty, or its rows are all useful or all noisy.")
    say(f"{spec}: {len(kept)} of {len(rows)} pairs are taken.")
    return [texts[i] for i in kept]


def _pair(row: dict, template: str) -> list[Segment]:
    """The segments of a row, none where it fits no layout."""
    match row:
        case {"query": str(), "question": str(), "answers": list(), "documents": [str(), *_],
              "label": "useful" | "noisy"}:  # fmt: skip
            return training_text(template, request_of(row), row["documents"])
        case {"instruction": str(prompt), "output": str(reply)}:
            prompt += f"\n{row['input']}" if row.get("input") else ""
        case {"messages": [{"role": "user", "content": str(prompt)},
                           {"role": "assistant", "content": str(reply)}]}:  # fmt: skip
            pass
        case {"messages": [{"role": "system", "content": str(system)},
                           {"role": "user", "content": str(prompt)},
                           {"role": "assistant", "content": str(reply)}]}:  # fmt: skip
            prompt = f"{system}\n\n{prompt}".strip()
        case _:
            return []
    return [(prompt, False), (reply, True)] if prompt.strip() and reply.strip() else []
