"""The simulated search engine: a language model that writes useful or noisy documents on demand.

Paper section 3.3 and Table 2. The prompt carries the query, the question, its gold answers and one
word, "useful" or "noisy". Stage 1 (train_sim.py) has trained the model on what a real engine
returned: it writes in that engine's style, and the word decides whether the answer is there. The
wording of the prompt lies beside the weights, so that training and use cannot drift apart.

The same model on a server is in engines/served.py.
"""

import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from minizs import protocol, require
from minizs.contrast import generate_with_contrast
from minizs.generate import generate
from minizs.models.ends import end_ids
from minizs.sft import Segment
from minizs.trajectory import SearchRequest

PROMPT_FILE = "simulator_prompt.txt"
SHIPPED = Path(__file__).parent / "prompts"
GOLDS_SHOWN = 8  # of a question's gold answers; some have hundreds of aliases
RECENT = 64  # replies: a run stops where most of the latest ones hold no document
FEW = 16  # replies, which are too few to say so

# ---- What the simulator reads -------------------------------------------------------------------


def fill_template(template: str, request: SearchRequest, top_k: int, tokenizer=None) -> str:
    """The whole prompt for one request. It names the first `GOLDS_SHOWN` gold answers."""
    fields = {
        "query": request.query,
        "question": request.question,
        "answers": " or ".join(request.answers[:GOLDS_SHOWN]),
        "top_k": str(top_k),
        "quality": "noisy" if request.noisy else "useful",
    }
    return fill_fields(template, fields, tokenizer)


def fill_fields(template: str, fields: dict[str, str], tokenizer=None) -> str:
    """The template with each `{name}` replaced by the field of that name, made neutral. All happens
    in one pass: a query that spells out "{answers}" must not have them filled in."""
    neutral = {name: protocol.neutralize(text, tokenizer) for name, text in fields.items()}
    return re.sub(r"\{(\w+)\}", lambda name: neutral.get(name[1], name[0]), template)


def training_text(template: str, request: SearchRequest, documents: list[str]) -> list[Segment]:
    """One supervised example: the prompt, and the documents, which alone the loss is on."""
    prompt = fill_template(template, request, len(documents))
    reply = protocol.number_documents([protocol.neutralize(text) for text in documents])
    return [(prompt, False), (reply, True)]


def load_template(spec: str | Path) -> str:
    """The wording of a simulator's prompt.

    `spec` is "tuned" or "untuned" for the shipped ones, a file, or a simulator's folder. A folder
    without a wording of its own, a GGUF file or a hub name gets "tuned". Raises UserError for
    another file.
    """
    paths = [SHIPPED / f"simulator_{spec}.txt", Path(spec), Path(spec, PROMPT_FILE)]
    if Path(spec).suffix == ".gguf":  # a model
        paths = []
    path = next(filter(Path.is_file, paths), SHIPPED / "simulator_tuned.txt")
    text = path.read_text(encoding="utf-8", errors="replace")
    require(
        "{query}" in text and "\ufffd" not in text,
        f"{path} is no simulator's prompt with {{query}} in UTF-8; give another.",
    )
    return text


# ---- What a model writes ------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """What a model wrote. It is unfinished where it ran out of tokens."""

    text: str
    unfinished: bool = False


def write_replies(
    model,
    tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    keys: Sequence[tuple[int, ...]] | None = None,
    write: Callable | None = None,
) -> list[Reply]:
    """The model's reply to each prompt, all in one generation: `generate`, or `write`. The random
    numbers of a reply depend on the seed and its key alone. Raises UserError for a prompt that
    leaves no room."""
    if not prompts:
        return []
    try:
        replies = (write or generate)(
            model,
            protocol.prompt_ids(tokenizer, list(prompts)),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            keys=keys,
            vocab_size=protocol.vocabulary_size(tokenizer),
            eos_id=end_ids(model, tokenizer),
        )
    except ValueError as error:
        require("limit" not in str(error), f"Too long for the judge or simulator: {error}.")
        raise
    silent = silent_ids(tokenizer)
    return [
        Reply(
            tokenizer.decode([i for i in reply.ids if i not in silent], skip_special_tokens=False),
            unfinished=reply.reason == "length",
        )
        for reply in replies
    ]


@cache
def silent_ids(tokenizer) -> frozenset[int]:
    """The special tokens, which are no words; but the tags of a thought stay, if they are such."""
    added = tokenizer.added_tokens_decoder.items()
    return frozenset(
        number
        for number, token in added
        if token.special and not protocol.is_thought_tag(token.content)
    )


def read_reply(text: str, unfinished: bool, top_k: int) -> list[str]:
    """At most `top_k` documents, without what the model thought before it wrote them.

    The last document of an unfinished reply breaks off, and is left out. A reply that is nothing
    but a thought has no documents.
    """
    words = protocol.without_thoughts(text)
    if words is None:
        return []
    if not unfinished:
        return protocol.split_documents(words, top_k)
    # The dots make sure that a mark at the very end begins a document, which is then left out.
    return protocol.split_documents(words + " ...", top_k + 1)[:-1]


class SimulatedSearch:
    """An engine whose documents a model writes. All requests of a turn are one generation.

    Random numbers depend on a request's `key` and on `seed`: a reply is the same whoever else
    searches. The documents may take `max_new_tokens` with their numbers. With a `contrast` above 0,
    noisy documents avoid what the model would write as useful ones (see contrast.py). A reply
    without a document is an empty one, counted in `failed`; where `on_error` is "stop" and most of
    the latest replies are of that kind, `search` raises UserError.
    """

    def __init__(
        self,
        model,
        tokenizer,
        template: str,
        top_k: int = 3,
        seed: int = 0,
        temperature: float = 0.8,
        max_new_tokens: int = 600,
        on_error: str = "empty",
        cuda_graphs: str = "auto",
        contrast: float = 0.0,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.top_k = top_k
        self.seed = seed
        self.temperature = temperature
        self.max_new_tokens = max_new_tokens
        self.on_error = on_error
        self.cuda_graphs = cuda_graphs
        self.contrast = contrast
        self.failed = 0
        self.recent: deque[bool] = deque(maxlen=RECENT)  # whether a reply lacked documents

    def search(self, requests: list[SearchRequest]) -> list[list[str]]:
        """At most `top_k` documents for each request."""
        if not requests:
            return []
        write = partial(generate, cuda_graphs=self.cuda_graphs)
        if self.contrast:
            write = partial(
                generate_with_contrast, others=self._opposites(requests), weight=self.contrast
            )
        replies = write_replies(
            self.model,
            self.tokenizer,
            self._prompts(requests),
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=self.seed,
            keys=[request.key for request in requests],
            write=write,
        )
        documents = [read_reply(reply.text, reply.unfinished, self.top_k) for reply in replies]
        self._count_failures(replies, documents)
        return documents

    def _prompts(self, requests: list[SearchRequest]) -> list[str]:
        return [fill_template(self.template, r, self.top_k, self.tokenizer) for r in requests]

    def _opposites(self, requests: list[SearchRequest]) -> list[list[int] | None]:
        """The prompt that asks for useful documents in place of noisy ones; None for a request that
        does so itself. Useful replies need no contrast: they would become more alike than real
        ones are, with the answer always in the first document."""
        noisy = [request for request in requests if request.noisy]
        if not noisy:
            return [None] * len(requests)
        opposites = self._prompts([replace(request, noisy=False) for request in noisy])
        ids = iter(protocol.prompt_ids(self.tokenizer, opposites))
        return [next(ids) if request.noisy else None for request in requests]

    def _count_failures(self, replies: list[Reply], documents: list[list[str]]) -> None:
        """Count the replies without a document. Raises UserError if most of the latest are so."""
        empty = [reply for reply, texts in zip(replies, documents, strict=True) if not texts]
        self.failed += len(empty)
        self.recent.extend(not texts for texts in documents)
        if self.on_error == "empty" or not empty or len(self.recent) < FEW:
            return
        excerpt = " ".join(empty[0].text.split())[:80]
        require(
            sum(self.recent) <= len(self.recent) / 2,
            f"{sum(self.recent)} of the simulator's last {len(self.recent)} replies hold no "
            f"document (Doc 1: ...); one begins with {excerpt!r}. Raise --max_document_tokens, or "
            "give a --simulator_template that it follows, or another --simulator.",
        )
