"""KV-cached batched generation, written by hand, for rows that live through several turns.

    decoder = Decoder(model, prompts, ...)                  # equal prompts are computed once
    results = decoder.turn(rows, max_new_tokens, keys)      # sample until a tag, eos or the budget
    decoder.append(rows, documents)                         # they join the next turn, and so on

Each cache row has its own length: no padding. Every token is computed once: the cache outlives the
turn, whose last token is *pending*: sampled, but fed to the model with whatever follows it. Rows
that have stopped leave: the live ones are swapped to the front, and the batch is `cache[:n]`.
On a GPU the steps after a turn's first one run in graphs.py: the same tokens, sooner.
Left out: beam search, top-k and top-p, paged memory."""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from minizs import graphs
from minizs.cache import RowCache
from minizs.models import flash
from minizs.models.fusion import uncompiled
from minizs.models.support import attending, plain_attention, row_limit
from minizs.randomness import hash64
from minizs.sampling import StopStrings, sample, uniforms

Ints = int | Sequence[int]  # one number or several
# Most positions in one forward pass: more go in groups of rows.
FORWARD_TOKENS = {"cpu": 2048, "cuda": 16384}


@dataclass
class Generated:
    """What one row wrote in one turn. `reason` is "stop", "eos" or "length"."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    reason: str = "length"


@dataclass
class Draft:
    """A turn of one row while it is being written."""

    state: int  # the hash of its keys
    budget: int  # most tokens
    result: Generated = field(default_factory=Generated)
    has_stopped: bool = False  # at eos or a stop string, before its budget is used up

    def goes_on(self, position: int) -> bool:
        """Whether it still has a token to write at this position of the turn."""
        return not self.has_stopped and position < self.budget


@contextmanager
def decoding(model: nn.Module) -> Iterator[None]:
    """No gradients, eval mode, and an attention that computes rows of different lengths right."""
    attention = flash.ROWS if flash.can_use(model) else plain_attention(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(), attending(model, attention), uncompiled(model):
            yield
    finally:
        for module in training:
            module.training = True


class Decoder:
    """Rows, one a prompt, that grow turn by turn.

    `eos_id`: None is the model's own, `()` is none. `ends_turn` says of a turn's text whether it
    ends at a stop string; without it every one does. `cuda_graphs`: "auto" is on a GPU "on", else
    "off"; see graphs.py. `positions` counts tokens fed. Raises ValueError for what it, or the
    model, would get wrong."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        *,
        vocab_size: int | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        eos_id: Ints | None = None,
        tokenizer=None,
        stop: Sequence[str] = (),
        ends_turn: Callable[[str], bool] | None = None,
        cuda_graphs: str = "auto",
    ):
        check_decoding(model)
        check_prompts(prompts, model.get_input_embeddings().num_embeddings)
        self.model = model
        self.limit = row_limit(model)
        self.temperature = temperature
        self.vocab_size = vocab_size
        self.seed = seed
        self.eos = eos_ids(model, eos_id)
        self.stop = StopStrings(
            (stop,) if isinstance(stop, str) else tuple(stop), tokenizer, ends_turn
        )
        self.positions = 0

        # A prompt's last token is pending like any turn's; what is before it is computed now.
        self.pending = [[ids[-1]] for ids in prompts]  # of each row: the tokens to be fed next
        self.length = [len(ids) - 1 for ids in prompts]  # of each row: the tokens that it holds
        self.order = list(range(len(prompts)))  # the row in each slot of the cache
        columns = 2 * max(map(len, prompts), default=0)
        self.steps = graphs.steps_for(model, cuda_graphs, self, len(prompts), columns)
        self.cache = self.steps.cache if self.steps else RowCache(len(prompts), columns)
        with decoding(model):
            self._prefill([tuple(ids[:-1]) for ids in prompts])

    def _prefill(self, heads: list[tuple[int, ...]]) -> None:
        """Compute each different head (a prompt but for its last token) once, and copy its keys and
        values to the slots of all rows that begin with it."""
        # The longest come first, so that groups of them hold little padding.
        distinct = sorted(dict.fromkeys(heads), key=len, reverse=True)
        slots = {head: slot for slot, head in enumerate(distinct)}
        self._forward([(0, list(head)) for head in distinct if head])
        self.order.sort(key=lambda row: slots[heads[row]])
        if len(distinct) < len(heads):
            sources = [slots[heads[row]] for row in self.order]
            self.cache.copy(sources, range(len(heads)), max(self.length))

    def append(self, rows: Sequence[int], chunks: Sequence[Sequence[int]]) -> None:
        """Remember tokens (documents) that follow each row; the row's next turn feeds them."""
        for row, chunk in zip(rows, chunks, strict=True):
            self.pending[row] += chunk

    def turn(
        self, rows: Sequence[int], max_new_tokens: Ints, keys: Sequence[Ints]
    ) -> list[Generated]:
        """Let these (distinct) rows write until a stop string, eos (both are kept) or the budget of
        `max_new_tokens`, one number or one a row. Random numbers hang on the seed, the row's
        `keys`, which must differ from turn to turn, and the position, not on the batch's layout."""
        drafts = self.drafts(rows, max_new_tokens, keys)
        position = 0  # the place in the turn of the token that is sampled next
        live = live_rows(drafts, position)
        with decoding(self.model):
            if self.steps:
                self.steps.prepare(self, drafts)
            while live:
                if self.steps and position:  # from here on one token a row is pending
                    self.steps.finish(self, drafts, position)
                    break
                # 1. Feed each live row its pending tokens. (The prompts were fed by `_prefill`.)
                live, hidden = self.feed(live)
                # 2. Sample a token for each. Its random number hangs on the row and the position.
                uniform = uniforms([drafts[row].state for row in live], position)
                ids, logprobs = sample(
                    self.model, hidden, uniform, self.temperature, self.vocab_size
                )
                # One copy to the host a step; float32 holds every id below 2^24 exactly.
                values = torch.stack([ids.float(), logprobs.float()]).tolist()
                # 3. Add it to the row's turn, which stops at eos or a complete stop string.
                for row, token, logprob in zip(live, *values, strict=True):
                    self.accept(row, drafts[row], int(token), logprob)
                # 4. Rows that have stopped leave, and so do those whose budget is used up.
                position += 1
                live = live_rows(drafts, position)
        return [draft.result for draft in drafts.values()]

    def accept(self, row: int, draft: Draft, token: int, logprob: float) -> None:
        """What was pending of this row is now in the cache, and this token was sampled after it:
        it joins the row's turn and is pending next. The turn may stop here."""
        if math.isnan(logprob):
            graphs.release(self.model)  # its cache may hold NaNs
            raise FloatingPointError("the model's logits are NaN")
        self.length[row] += len(self.pending[row])
        self.pending[row] = [token]
        result = draft.result
        result.ids.append(token)
        result.logprobs.append(logprob)
        if token in self.eos:
            result.reason = "eos"
            draft.has_stopped = True
        elif self.stop.complete(result.ids):
            result.reason = "stop"
            draft.has_stopped = True

    def feed(self, live: Sequence[int]) -> tuple[list[int], Tensor]:
        """Feed these rows their pending tokens. Returns the rows in their order in the cache, and
        the last hidden state of each, (n, d)."""
        rows = self.to_front(live)
        return rows, self._forward([(self.length[row], self.pending[row]) for row in rows])

    def drafts(
        self, rows: Sequence[int], max_new_tokens: Ints, keys: Sequence[Ints]
    ) -> dict[int, Draft]:
        """A new turn of each row. Raises ValueError where one might grow too long for the model."""
        if isinstance(max_new_tokens, int):
            max_new_tokens = [max_new_tokens] * len(rows)
        drafts = {}
        for row, budget, key in zip(rows, max_new_tokens, keys, strict=True):
            if self.length[row] + len(self.pending[row]) + budget > self.limit:
                raise ValueError(f"a row may exceed the model's limit of {self.limit} tokens")
            key = (key,) if isinstance(key, int) else key
            drafts[row] = Draft(hash64(self.seed, *key), budget)
        return drafts

    def to_front(self, live: Sequence[int]) -> list[int]:
        """Swap these rows to the first slots of the cache. Returns them in their order there."""
        count = len(live)
        live = set(live)
        holes = [slot for slot in range(count) if self.order[slot] not in live]
        if holes:
            movers = [slot for slot in range(count, len(self.order)) if self.order[slot] in live]
            self.cache.copy(movers + holes, holes + movers, max(self.length))
            for hole, mover in zip(holes, movers, strict=True):
                self.order[hole], self.order[mover] = self.order[mover], self.order[hole]
        return self.order[:count]

    def _forward(self, parts: list[tuple[int, list[int]]]) -> Tensor:
        """parts[slot] = (start, chunk): a chunk of tokens that continues a row of `start` tokens.
        Returns the last hidden state of each, (n, d)."""
        if not parts:
            return torch.empty(0)
        longest = max(len(chunk) for _, chunk in parts)
        size = max(1, FORWARD_TOKENS.get(self.model.device.type, 2048) // longest)
        states = []
        for first in range(0, len(parts), size):
            states.append(self.cache.feed(self.model, first, parts[first : first + size]))
        self.positions += sum(len(chunk) for _, chunk in parts)
        return torch.cat(states)


def live_rows(drafts: dict[int, Draft], position: int) -> list[int]:
    """The rows that go on to write a token at this position of their turns."""
    return [row for row, draft in drafts.items() if draft.goes_on(position)]


def check_prompts(prompts: Sequence[Sequence[int]], size: int) -> None:
    """Raise ValueError for a prompt without tokens, or with ids that have no embedding."""
    if not all(len(ids) and min(ids) >= 0 and max(ids) < size for ids in prompts):
        raise ValueError(f"a prompt is empty, or outside the model's vocabulary of {size}")


def eos_ids(model: nn.Module, eos_id: Ints | None) -> set[int]:
    """The ids that end a turn: these, or where they are None the model's own."""
    for source in (model.generation_config, model.config):
        if eos_id is None:
            eos_id = getattr(source, "eos_token_id", None)
    return {eos_id} if isinstance(eos_id, int) else set(eos_id or ())


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: Ints,
    temperature: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    keys: Sequence[Ints] | None = None,
    vocab_size: int | None = None,
    tokenizer=None,
    eos_id: Ints | None = None,
    cuda_graphs: str = "auto",
) -> list[Generated]:
    """One turn for each prompt: see `Decoder`. `keys`: by default a row's index."""
    decoder = Decoder(
        model,
        prompts,
        vocab_size=vocab_size,
        temperature=temperature,
        seed=seed,
        eos_id=eos_id,
        tokenizer=tokenizer,
        stop=stop,
        cuda_graphs=cuda_graphs,
    )
    return decoder.turn(range(len(prompts)), max_new_tokens, keys or range(len(prompts)))


# ---- Which models are computed right -------------------------------------------------------------

_checked = weakref.WeakSet()  # models that `check_decoding` has tried


def check_decoding(model: nn.Module) -> None:
    """Raise ValueError for a model that does not compute rows of different lengths, in two parts
    each, as it computes every row alone and at once. It is tried on a few tokens, once."""
    if model in _checked:
        return
    name = type(model).__name__
    size = model.get_input_embeddings().num_embeddings
    rows = [[i % size for i in ids] for ids in ((4, 2, 5, 3, 7, 6), (3, 6, 2, 4))]
    heads = [row[:-2] for row in rows]
    tails = [row[-2:] for row in rows]
    cache = RowCache(len(rows), 8)
    try:
        with decoding(model):
            cache.feed(model, 0, [(0, head) for head in heads])
            parts = [(len(head), tail) for head, tail in zip(heads, tails, strict=True)]
            states = cache.feed(model, 0, parts)  # (2, d)
            with attending(model, plain_attention(model)):
                expected = torch.stack([last_state(model, row) for row in rows])  # (2, d)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a family does not expect
        raise ValueError(f"{name} is not supported: no cache of rows fits it") from error
    tolerance = 0.01 if model.dtype in (torch.float32, torch.float64) else 0.2
    if not (states - expected).norm() <= tolerance * expected.norm():
        raise ValueError(f"{name} is not supported: rows of different lengths come out wrong")
    _checked.add(model)


def last_state(model: nn.Module, row: list[int]) -> Tensor:
    """The decoder's state at the end of one row, computed at once: (d,)."""
    ids = torch.tensor([row], device=model.device)
    return model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
