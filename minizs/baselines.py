"""What a policy is compared with: a model that answers at once, thinks first, or reads first.

Paper section 4.2: direct answer, chain of thought, and retrieval-augmented generation with one
search for the question itself. A rollout of one turn each; the wording lies in `prompts/`.
"""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from minizs.protocol import build_prompt, neutralize, number_documents
from minizs.rollout import Limits, rollout
from minizs.trajectory import Example, SearchRequest, Trajectory, Turn

METHODS = ("direct", "cot", "rag")


def answer(method: str, model, tokenizer, examples: Sequence[Example], engine, *,
           max_new_tokens: int, temperature: float = 0.0,
           on_turn: Callable[[Turn], None] | None = None, **options,
           ) -> list[Trajectory]:  # fmt: skip
    """One trajectory of one turn for each example; `options` are those of `rollout`."""
    template = (Path(__file__).parent / "prompts" / f"{method}.txt").read_text(encoding="utf-8")
    asked = [neutralize(example.question, tokenizer) for example in examples]
    shown = [None for _ in examples]
    if method == "rag":
        found = engine.search([SearchRequest(text, text, example.answers)
                               for text, example in zip(asked, examples, strict=True)])  # fmt: skip
        shown = [[neutralize(text, tokenizer) for text in documents] for documents in found]
    wordings = [template.replace("{documents}", number_documents(some or [])) for some in shown]
    prompts = [build_prompt(*pair) for pair in zip(asked, wordings, strict=True)]
    rows = rollout(model, tokenizer, examples, engine, prompts=prompts, temperature=temperature,
                   limits=Limits(1, max_new_tokens, context=sys.maxsize), **options)  # fmt: skip
    for row, documents in zip(rows, shown, strict=True):
        row.turns[0].documents = documents
        if on_turn:
            on_turn(row.turns[0])
    return rows
