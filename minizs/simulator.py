"""The simulated search engine: a language model that writes useful or noisy documents on demand.

Paper section 3.3 and Table 2. The prompt carries the query, the question and its gold answer, and
one word, "useful" or "noisy". Fine-tuned (train_sim.py) on what a real engine returned, the model
imitates that engine's style, and the word decides whether the answer is there. An untuned model is
shown an example of each kind; unlike the paper's, that prompt names the answer for noise, too.

The wording lives in one file beside the model's weights (`simulator_prompt.txt`), so that training
and use cannot drift apart. The reply to the first query of a two-hop question invents the bridge,
since only the final answer is in the prompt (the next reply then supports it).
"""

import re
from pathlib import Path

from minizs import protocol
from minizs.client import Client
from minizs.config import require
from minizs.engines import Engine
from minizs.generate import generate
from minizs.protocol import neutralize, number_documents, split_documents
from minizs.randomness import hash64
from minizs.sft import Segment
from minizs.trajectory import SearchRequest

PROMPT_FILE = "simulator_prompt.txt"
SHIPPED = {"tuned": "simulator.txt", "untuned": "simulator_untuned.txt"}  # in prompts/


def prompt(template: str, request: SearchRequest, top_k: int, tokenizer=None) -> str:
    """The simulator's whole input for one request; all gold answers are named, not the first."""
    words = {"query": request.query, "question": request.question,
             "answers": " or ".join(request.answers), "top_k": str(top_k),
             "quality": "noisy" if request.noisy else "useful"}  # fmt: skip
    words = {name: neutralize(text, tokenizer) for name, text in words.items()}
    # In one pass: a query that spells out "{answers}" must not have them filled in.
    return re.sub(r"\{(\w+)\}", lambda name: words.get(name[1], name[0]), template)


def training_text(template: str, request: SearchRequest, documents: list[str]) -> list[Segment]:
    """One supervised example: the loss is on the documents alone."""
    text = prompt(template, request, len(documents))
    return [(text, False), (number_documents([neutralize(d) for d in documents]), True)]


def load_template(spec: str | Path) -> str:
    """The wording in a file, the shipped one ("tuned" or "untuned"), or the one that a simulator's
    folder holds, if it holds one. Raises UserError for a file that is none."""
    own, shipped = Path(spec, PROMPT_FILE), Path(__file__).parent / "prompts"
    paths = [shipped / SHIPPED.get(spec, ""), Path(spec), own, shipped / SHIPPED["tuned"]]
    path = next(path for path in paths if path.is_file())
    text = path.read_text(encoding="utf-8", errors="replace")
    good = "{query}" in text and "\ufffd" not in text
    require(good, f"{path} is no simulator's prompt: it lacks {{query}}, or is not in UTF-8.")
    return text


def read_reply(text: str, unfinished: bool, top_k: int) -> list[str]:
    """At most `top_k` documents, none where the model wrote no `Doc n:`. The last one of an
    unfinished reply is left out, if only its number is there."""
    if unfinished:
        return split_documents(text + " ...", top_k + 1)[:-1]
    return split_documents(text, top_k)


class SimulatedSearch:
    """An engine whose documents a model writes. All requests of a turn are one batched generation.

    A request's random numbers hang on its `key` and `seed`, so that a reply does not depend on who
    else is searching. `max_new_tokens` is what the numbered documents may take."""

    def __init__(self, model, tokenizer, template: str, top_k: int = 3, seed: int = 0,
                 temperature: float = 0.8, max_new_tokens: int = 600):  # fmt: skip
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.top_k, self.seed = top_k, seed
        self.temperature, self.max_new_tokens = temperature, max_new_tokens

    def search(self, requests: list[SearchRequest]) -> list[list[str]]:
        """At most `top_k` documents for each request."""
        if not requests:
            return []
        texts = [prompt(self.template, request, self.top_k, self.tokenizer) for request in requests]
        replies = generate(
            self.model, protocol.prompt_ids(self.tokenizer, texts), self.max_new_tokens,
            temperature=self.temperature, seed=self.seed, keys=[r.key for r in requests],
            vocab_size=protocol.vocabulary_size(self.tokenizer),
            eos_id=self.tokenizer.eos_token_id)  # fmt: skip
        return [read_reply(self.tokenizer.decode(reply.ids, skip_special_tokens=True),
                           reply.reason == "length", self.top_k) for reply in replies]  # fmt: skip


class ServedSearch(Engine):
    """The same with the model behind an OpenAI-compatible server: vLLM, SGLang, llama.cpp or
    `transformers serve` (which has one seed for all, so that only greedy replies are repeatable).

    `model_name`: empty for the server's first. `api`: "completions", or "chat" for an instruct
    model. Of the server's own sampling settings top_p alone is overridden."""

    def __init__(self, client: Client, model_name: str, template: str, top_k: int = 3,
                 seed: int = 0, temperature: float = 0.8, max_new_tokens: int = 600,
                 api: str = "completions"):  # fmt: skip
        self.client, self.template, self.top_k, self.seed = client, template, top_k, seed
        self.path = "/v1/chat/completions" if api == "chat" else "/v1/completions"
        name = model_name or client.get("/v1/models", lambda answer, _: answer["data"][0]["id"])
        self.settings = {"model": name, "max_tokens": max_new_tokens, "temperature": temperature,
                         "top_p": 1.0}  # fmt: skip

    def find(self, requests: list[SearchRequest]) -> list[list[str] | None]:
        return self.client.post(self.path, map(self._body, requests), self._read)

    def _body(self, request: SearchRequest) -> dict:
        text, seed = prompt(self.template, request, self.top_k), hash64(self.seed, *request.key)
        chat = {"messages": [{"role": "user", "content": text}]}
        said = chat if "chat" in self.path else {"prompt": text}
        return self.settings | said | {"seed": seed % 2**31}

    def _read(self, answer: dict, asked: dict) -> list[str]:
        [choice] = answer["choices"]
        text = choice["message"]["content"] if "messages" in asked else choice["text"]
        return read_reply(text, choice["finish_reason"] == "length", self.top_k)
