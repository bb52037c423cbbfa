"""The judge: a language model that says whether the documents of a search are useful or noisy.

Paper section 3.3: its word is the label with which the simulator learns to write such documents.
Stage 1 asks it where `--judge` names a model; otherwise a gold answer in the documents decides.
"""

import re
from collections.abc import Callable

from minizs import protocol
from minizs.simulator import GOLDS_SHOWN, SHIPPED, fill_fields
from minizs.trajectory import SearchRequest

DOCUMENTS_READ = 6000  # characters; the rest is cut off, so that the judge's context is bounded


class Judge:
    """A model and the question that it is asked. `write` gives its replies to prompts;
    for a served model it is `ServedModel.write`."""

    def __init__(self, write: Callable[[list[str]], list[str]], tokenizer=None) -> None:
        self.write = write
        self.tokenizer = tokenizer
        self.template = (SHIPPED / "judge.txt").read_text(encoding="utf-8")

    def prompt(self, request: SearchRequest, documents: list[str]) -> str:
        """What the judge reads of one search."""
        fields = {
            "query": request.query,
            "question": request.question,
            "answers": " or ".join(request.answers[:GOLDS_SHOWN]),
            "documents": protocol.number_documents(documents)[:DOCUMENTS_READ],
        }
        return fill_fields(self.template, fields, self.tokenizer)

    def verdicts(self, searches: list[tuple[SearchRequest, list[str]]]) -> list[str]:
        """One word for each search and its documents, which should be "useful" or "noisy". It is ""
        where the model said no word."""
        prompts = [self.prompt(request, documents) for request, documents in searches]
        return [read_verdict(text) for text in self.write(prompts)]


def read_verdict(text: str) -> str:
    """The first word behind a reply's thoughts, in lower case. A thought without an end is no word,
    and "not useful" is another word than "useful"."""
    words = re.findall("[a-z]+", (protocol.without_thoughts(text) or "").lower())
    return words[0] if words else ""
