"""The simulated search engine: a language model that writes useful or noisy documents on demand.

Paper section 3.3 and Table 2. The prompt carries the query, the question and its gold answer, and
one word that is either "useful" or "noisy". Fine-tuned (train_sim.py) on what a real engine
returned, the model imitates that engine's style, and the word decides whether the answer is there.

The wording lives in one file beside the model's weights (`simulator_prompt.txt`), so that training
and use cannot drift apart. Two facts about it that surprise: a reply to the first query of a
two-hop question invents the bridge, since only the final answer is in the prompt (the next reply
then supports it); and the simulator is used in training only, never to test.
"""

import re
from pathlib import Path

from minizs.generate import Generated, generate
from minizs.protocol import number_documents, split_documents
from minizs.sft import Segment
from minizs.trajectory import SearchRequest

PROMPT_FILE = "simulator_prompt.txt"

PROMPT = """You are a search engine. Given a query, write {top_k} {quality} documents for it.
The user is trying to answer the question "{question}", whose answer is {answers}.
Each document is about 30 words long and holds {quality} information.
Query: {query}
{quality} output:
"""


def prompt(template: str, request: SearchRequest, top_k: int) -> str:
    """The simulator's whole input for one request; all gold answers are named, not the first."""
    words = {"query": request.query, "question": request.question,
             "answers": " or ".join(request.answers), "top_k": str(top_k),
             "quality": "noisy" if request.noisy else "useful"}  # fmt: skip
    # In one pass: a query that spells out "{answers}" must not have them filled in.
    return re.sub(r"\{(\w+)\}", lambda name: words.get(name[1], name[0]), template)


def training_text(template: str, request: SearchRequest, documents: list[str]) -> list[Segment]:
    """One supervised example: the loss is on the documents alone."""
    text = prompt(template, request, len(documents))
    return [(text, False), (number_documents(documents), True)]


def load_template(folder: str | Path) -> str:
    """The wording that a simulator's folder holds, or the default one."""
    path = Path(folder) / PROMPT_FILE
    return path.read_text() if path.exists() else PROMPT


class SimulatedSearch:
    """An engine whose documents a model writes. All requests of a turn are one batched generation.

    A request's random numbers hang on its `key` and `seed`, so that a reply does not depend on who
    else is searching. `max_new_tokens` is what the numbered documents may take; a document that
    they do not suffice for is left out, not passed on by halves.
    """

    def __init__(self, model, tokenizer, template: str = PROMPT, top_k: int = 3, seed: int = 0,
                 temperature: float = 0.8, max_new_tokens: int = 600):  # fmt: skip
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.top_k, self.seed = top_k, seed
        self.temperature, self.max_new_tokens = temperature, max_new_tokens

    def search(self, requests: list[SearchRequest]) -> list[list[str]]:
        """At most `top_k` documents for each request; none where the model wrote no `Doc n:`."""
        if not requests:
            return []
        texts = [prompt(self.template, request, self.top_k) for request in requests]
        replies = generate(
            self.model, self.tokenizer(texts)["input_ids"], self.max_new_tokens,
            temperature=self.temperature, seed=self.seed,
            keys=[request.key for request in requests],
            vocab_size=len(self.tokenizer), eos_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        return [self._documents(reply) for reply in replies]

    def _documents(self, reply: Generated) -> list[str]:
        text = self.tokenizer.decode(reply.ids, skip_special_tokens=True)
        if reply.reason == "length":  # the last document is unfinished, if only its number is there
            return split_documents(text + " ...", self.top_k + 1)[:-1]
        return split_documents(text, self.top_k)
