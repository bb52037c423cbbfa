"""A simulated search engine whose model runs on a server: OpenAI's protocol, as most servers have.

The prompt, the documents and the random numbers are those of the model that runs here
(simulator.py); only the generation happens elsewhere."""

import json
import warnings
from collections import deque
from typing import Any

from minizs import require
from minizs.engines.client import Call, Client, ServiceError, Unusable
from minizs.engines.ranking import Engine
from minizs.protocol import without_thoughts
from minizs.randomness import hash64
from minizs.simulator import RECENT, fill_template, read_reply
from minizs.trajectory import SearchRequest

EXCERPT = 80  # characters of a reply that an error shows


class ServedModel:
    """A language model behind an OpenAI-compatible server.

    `name` is the model's name there; the server's first model is taken where it is empty. `api` is
    "completions", or "chat" for an instruct model, whose chat template gets `template_args`. Of the
    server's own sampling settings top_p alone is overridden. Raises UserError."""

    def __init__(
        self,
        client: Client,
        name: str = "",
        api: str = "completions",
        *,
        temperature: float = 0.8,
        max_new_tokens: int = 600,
        template_args: dict | None = None,
    ) -> None:
        self.client = client
        self.is_chat = api == "chat"
        self.path = "/v1/chat/completions" if self.is_chat else "/v1/completions"
        self.name = served_name(client, name)
        self.max_new_tokens = max_new_tokens
        self.limit_name = "max_tokens"  # until the server asks for another one
        self.settings = {"model": self.name, "temperature": temperature, "top_p": 1.0}
        if self.is_chat and template_args:
            self.settings["chat_template_kwargs"] = template_args

    def call(self, text: str, seeds: tuple[int, ...], read) -> Call:
        """The request for one reply. `read(text, unfinished)` makes of it what is wanted; a reply
        for which it raises Unusable is asked for again, with another seed."""

        def body(unusable: int) -> dict:
            tries = (unusable,) if unusable else ()
            content: dict[str, Any] = {"prompt": text}
            if self.is_chat:
                content = {"messages": [{"role": "user", "content": text}]}
            seed = hash64(*seeds, *tries) % 2**31  # as large as every server takes
            limit = {self.limit_name: self.max_new_tokens}
            return {**self.settings, **content, **limit, "seed": seed}

        def read_answer(answer: Any) -> Any:
            [choice] = answer["choices"]
            reply = self._text(choice)
            return read(reply, choice["finish_reason"] == "length")

        return Call(self.path, read_answer, body, self._mend)

    def write(self, prompts: list[str], seed: int = 0) -> list[str]:
        """What the model replies to each of these prompts, without its thoughts. It is "" where all
        replies were of no use."""

        def read(text: str, unfinished: bool) -> str:
            words = without_thoughts(text)
            if words is None:
                raise Unusable("it is a thought without an end")
            if not words.strip():
                raise Unusable("it has no words")
            return words

        calls = [self.call(text, (seed, place), read) for place, text in enumerate(prompts)]
        return [reply or "" for reply in self.client.send(calls)]

    def _text(self, choice: dict) -> str:
        """The words of a reply, without the thought that some servers keep apart. A reply that is
        nothing but a thought is given as other servers write it."""
        if not self.is_chat:
            return choice["text"]
        message = choice["message"]
        thought = message.get("reasoning_content") or message.get("reasoning")
        content = message.get("content") if thought else message["content"]
        if isinstance(content, list):  # parts, some of which may be thoughts
            content = "".join(part["text"] for part in content if part["type"] == "text")
        if thought and not content:
            return f"<think>{thought}"
        return content or ""

    def _mend(self, answer: Any) -> bool:
        """OpenAI's newer models refuse `max_tokens`, and name what they take instead. Some of them
        take no temperature or no top_p but their own."""
        if "max_completion_tokens" in json.dumps(answer):
            self.limit_name = "max_completion_tokens"
            return True
        match answer:
            case {"error": {"param": "temperature" | "top_p" as name, "code": str(code)}}:
                if code.startswith("unsupported"):
                    if self.settings.pop(name, None) is not None:
                        warnings.warn(
                            f"{self.name} takes no {name}: its own is used.", stacklevel=2
                        )
                    return True
        return False


class ServedSearch(Engine):
    """An engine whose documents a served model writes: `SimulatedSearch` with the model elsewhere.

    A reply without documents is asked for again with another seed, and is an empty one in the end,
    counted in `failed`. Where most replies lack documents, a ServiceError says what they hold."""

    def __init__(self, model: ServedModel, template: str, top_k: int = 3, seed: int = 0) -> None:
        self.model = model
        self.template = template
        self.top_k = top_k
        self.seed = seed
        self.recent: deque[bool] = deque(maxlen=RECENT)  # whether a reply lacked documents

    def find(self, requests: list[SearchRequest]) -> list[list[str] | None]:
        odd: dict[int, str] = {}  # what was written instead of documents, by request
        calls = [self._call(i, request, odd) for i, request in enumerate(requests)]
        replies = self.model.client.send(calls)
        self.recent.extend(i in odd for i in range(len(requests)))
        self._check(odd)
        return replies

    def _call(self, i: int, request: SearchRequest, odd: dict[int, str]) -> Call:
        def read(text: str, unfinished: bool) -> list[str]:
            documents = read_reply(text, unfinished, self.top_k)
            odd.pop(i, None)
            if not documents:
                odd[i] = text
                raise Unusable("it holds no document")
            return documents

        text = fill_template(self.template, request, self.top_k)
        return self.model.call(text, (self.seed, *request.key), read)

    def _check(self, odd: dict[int, str]) -> None:
        """Raise ServiceError if most of the latest replies lacked documents."""
        client = self.model.client
        lacking = sum(self.recent)
        are_most = lacking > 1 and lacking > len(self.recent) / 2  # one alone proves nothing
        if not odd or not are_most or client.on_error == "empty":
            return
        excerpt = " ".join(client.redact(next(iter(odd.values()))).split())[:EXCERPT]
        raise ServiceError(
            f"{lacking} of the last {len(self.recent)} replies of the model {self.model.name} at "
            f"{client.bases[0]} hold no document (Doc 1: ...); one begins with {excerpt!r}. Give "
            "--simulator_template a wording that it follows, or another model."
        )


def served_name(client: Client, name: str) -> str:
    """The name of the model to ask for: this one, which the server must have, or its first one. A
    server that lists no models is believed to have it. Raises UserError."""
    try:
        names = client.get("/v1/models", lambda answer: [str(row["id"]) for row in answer["data"]])
    except ServiceError as error:
        if not name or error.status in (401, 403):
            raise
        return name
    require(bool(name or names), f"{client.bases[0]} serves no model; load one there.")
    require(
        not name or not names or name in names,
        f"{client.bases[0]} has no model {name!r}; it has {client.redact(', '.join(names[:9]))}.",
    )
    return name or names[0]
