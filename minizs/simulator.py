"""The simulated search engine: a language model that writes useful or noisy documents on demand.

Paper section 3.3 and Table 2. The prompt carries the query, the question, its gold answers and one
word, "useful" or "noisy". Fine-tuned (train_sim.py) on what a real engine returned, the model has
its style, and the word decides whether the answer is there; a first hop's fact is invented. The
wording lies beside the weights, so that training and use cannot drift apart."""

import re
from pathlib import Path

from minizs import protocol, require
from minizs.generate import generate
from minizs.sft import Segment
from minizs.trajectory import SearchRequest

PROMPT_FILE = "simulator_prompt.txt"
SHIPPED = Path(__file__).parent / "prompts"
JUDGE = str(SHIPPED / "judge.txt")  # the template with which it is a judge, whose top_k is 0
JUDGE_READS = 6000  # characters of documents, the rest is cut: its context is bounded


def prompt(template: str, request: SearchRequest, top_k: int, tokenizer=None) -> str:
    """The simulator's whole input for one request; all gold answers are named, not the first."""
    words = {
        "query": request.query,
        "question": request.question,
        "answers": " or ".join(request.answers),
        "top_k": str(top_k),
        "quality": "noisy" if request.noisy else "useful",
        "documents": protocol.number_documents(request.documents)[:JUDGE_READS],
    }
    words = {name: protocol.neutralize(text, tokenizer) for name, text in words.items()}
    # In one pass: a query that spells out "{answers}" must not have them filled in.
    return re.sub(r"\{(\w+)\}", lambda name: words.get(name[1], name[0]), template)


def training_text(template: str, request: SearchRequest, documents: list[str]) -> list[Segment]:
    """One supervised example: the loss is on the documents alone."""
    text, documents = prompt(template, request, len(documents)), map(protocol.neutralize, documents)
    return [(text, False), (protocol.number_documents(documents), True)]


def load_template(spec: str | Path) -> str:
    """The wording in a file, the shipped one ("tuned" or "untuned"), or the one that a simulator's
    folder holds, if it holds one. Raises UserError for a file that is none."""
    paths = [SHIPPED / f"simulator_{spec}.txt", Path(spec), Path(spec, PROMPT_FILE)]
    path = next(filter(Path.is_file, paths), SHIPPED / "simulator_tuned.txt")
    text = path.read_text(encoding="utf-8", errors="replace")
    require(
        "{query}" in text and "\ufffd" not in text,
        f"{path} is no simulator's prompt with {{query}} in UTF-8; give another.",
    )
    return text


def read_reply(text: str, unfinished: bool, top_k: int) -> list[str]:
    """At most `top_k` documents; an unfinished reply's last one, which breaks off, is left out."""
    if not top_k:  # a judge's one word
        return re.findall("[a-z]+", text.lower())[:1]
    documents = protocol.split_documents(text + " ..." * unfinished, top_k + unfinished)
    return documents[:-1] if unfinished else documents


class SimulatedSearch:
    """An engine whose documents a model writes; all requests of a turn are one generation. Random
    numbers hang on a request's `key` and the `seed`: a reply does not depend on who else searches.
    `max_new_tokens` is what the numbered documents may take."""

    def __init__(
        self,
        model,
        tokenizer,
        template: str,
        top_k: int = 3,
        seed: int = 0,
        temperature: float = 0.8,
        max_new_tokens: int = 600,
    ):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.top_k, self.seed = top_k, seed
        self.temperature, self.max_new_tokens = temperature, max_new_tokens

    def search(self, requests: list[SearchRequest]) -> list[list[str]]:
        """At most `top_k` documents for each request, none where the model wrote no `Doc n:`."""
        if not requests:
            return []
        texts = [prompt(self.template, request, self.top_k, self.tokenizer) for request in requests]
        try:
            replies = generate(
                self.model,
                protocol.prompt_ids(self.tokenizer, texts),
                self.max_new_tokens,
                temperature=self.temperature,
                seed=self.seed,
                keys=[r.key for r in requests],
                vocab_size=protocol.vocabulary_size(self.tokenizer),
                eos_id=self.tokenizer.eos_token_id,
            )
        except ValueError as error:
            require("limit" not in str(error), f"Too long for the judge or simulator: {error}.")
            raise
        return [
            read_reply(
                self.tokenizer.decode(reply.ids, skip_special_tokens=True),
                reply.reason == "length",
                self.top_k,
            )
            for reply in replies
        ]
