"""Decode steps on fixed shapes, so that a GPU can replay them: the same tokens, without launches.

A decode step of a 1.5B model is some 1,500 small kernels. Started from Python one by one they take
ten times as long as the card needs to read the weights. A CUDA graph starts all of them at once,
but repeats exactly what it recorded: the same shapes at the same addresses. Hence

- rows come in buckets (1, 2, 4, 8, 16, 32, ...), and the cache in widths of 256 columns; a graph is
  recorded for each (rows, width) when it is first met;
- ids, positions and random numbers lie in buffers that are filled before each step; a sampled id is
  fed to the next step without leaving the card;
- the host reads a step's tokens while the next one runs. A row that turns out to have stopped has
  then computed one token too many, which is dropped: nothing was counted for it;
- a row that has stopped keeps its slot until the rows fit a smaller bucket. It writes its keys
  behind its own end, where the next turn's tokens overwrite them.

The pieces of a large model are compiled into fewer kernels first (models/fusion.py).

Cache and graphs outlive a `Decoder`: the next one for the same model uses them again. Weights may
change in place; where they are replaced, the graphs are recorded anew. Without a GPU the same steps
run one by one, which is how they are tested. Generation can be understood without this file."""

import warnings
import weakref
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minizs.cache import RowCache, Step
from minizs.models import flash, fusion
from minizs.models.composite import text_config
from minizs.models.precision import widest_float
from minizs.sampling import sample, uniforms

WIDTH = 256  # columns of the cache that a bucket is a multiple of
_steps_of = weakref.WeakKeyDictionary()  # model -> its `StaticSteps`


def steps_for(
    model: nn.Module, setting: str, decoder, rows: int, columns: int
) -> "StaticSteps | None":
    """The `StaticSteps` of a model, with a cache of this size that is the decoder's from now on, or
    None where steps of any shape are the faster ones. `setting` is "auto", "on" or "off"."""
    on_gpu = model.device.type == "cuda"
    if setting == "off" or rows == 0 or (setting == "auto" and not on_gpu):
        return None
    steps = _steps_of.get(model)
    if steps is None or steps.owner() is not None:  # another decoder is in the middle of its turns
        steps = StaticSteps(model, capture=on_gpu and can_capture(model))
        _steps_of[model] = steps
    steps.owner = weakref.ref(decoder)
    steps.make_room(row_bucket(rows), columns)
    return steps


def release(model: nn.Module) -> None:
    """Give back the memory of a model's cache and graphs."""
    _steps_of.pop(model, None)


def row_bucket(rows: int) -> int:
    """The least of 1, 2, 4, 8, 16, 32, 48, ..., 128, 160, 192, ... that holds so many."""
    if rows <= 16:
        return 1 << (rows - 1).bit_length()
    size = 16 if rows <= 128 else 32
    return -(-rows // size) * size


def width_bucket(columns: int) -> int:
    """The least multiple of `WIDTH` columns that holds so many."""
    return -(-columns // WIDTH) * WIDTH


def can_capture(model: nn.Module) -> bool:
    """Not where Python computes rotary frequencies from the longest row: a graph freezes them."""
    rope = getattr(text_config(model), "rope_parameters", None) or {}
    kinds = [rope.get("rope_type")]
    kinds += [value.get("rope_type") for value in rope.values() if isinstance(value, dict)]
    return not any(kind and "dynamic" in kind for kind in kinds)


@dataclass
class Buffers:
    """What the steps of one number of rows read and write, always at the same addresses."""

    ids: Tensor  # (R,) the tokens to be fed
    inputs: Tensor  # (2, R) floats: their positions, and the random numbers
    samples: Tensor  # (2, R) the sampled tokens and their log-probabilities


@dataclass
class Flight:
    """A step that was started: the rows that it was for, and what it sampled, once it is over."""

    rows: list[int | None]  # by slot; None where the slot's row was not writing
    samples: Tensor  # (2, R) on the host
    end: torch.cuda.Event | None

    def read(self) -> tuple[list[float], list[float]]:
        """The sampled tokens and their log-probabilities by slot, once the step is over."""
        if self.end is not None:
            self.end.synchronize()
        return self.samples.tolist()


class StaticSteps:
    """A model's cache, buffers and graphs."""

    def __init__(self, model: nn.Module, capture: bool) -> None:
        self.model_ref = weakref.ref(model)  # or the dictionary above would keep the model alive
        self.capture = capture
        self.cache = RowCache(0, 0)
        self.owner = lambda: None  # the decoder that uses the cache, while there is one
        self.buffers: dict[int, Buffers] = {}  # by rows
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}  # by rows, width, and how one samples
        self.addresses: list[int] = []  # of the weights and the cache in the graphs, and its size
        self.pool = None
        self.reads_lengths = False

    def make_room(self, rows: int, columns: int) -> None:
        """An empty cache of at least this size; the memory of the last one, where it is enough."""
        if rows > self.cache.rows or columns > self.cache.capacity:
            rows = max(rows, self.cache.rows)
            columns = max(width_bucket(columns), self.cache.capacity)
            self.cache = RowCache(rows, columns)

    def prepare(self, decoder, drafts: dict) -> None:
        """Before a turn: columns for all that it may write, and no graph of other addresses."""
        columns = 0
        for row, draft in drafts.items():
            columns = max(columns, decoder.length[row] + len(decoder.pending[row]) + draft.budget)
        self.cache.reserve(width_bucket(columns))
        model = self.model_ref()
        attention = text_config(model)._attn_implementation
        self.reads_lengths = attention == flash.ROWS  # and no columns behind a row's end
        if not self.capture:
            return
        tensors = [*model.parameters(), *model.buffers(), *self.cache.stores]
        addresses = [tensor.data_ptr() for tensor in tensors]
        addresses += [self.cache.rows, self.cache.capacity]
        if addresses != self.addresses:
            self.graphs.clear()
            self.pool = None
        self.addresses = addresses

    def finish(self, decoder, drafts: dict, position: int) -> None:
        """Write the rest of a turn whose rows have one pending token each, from this position on.
        Each pass starts a step, and then reads the tokens of the step before it."""
        flight = None  # the step that was started and is not read yet
        size = 0  # rows of the bucket in use
        while True:
            live = [row for row, draft in drafts.items() if draft.goes_on(position)]
            if flight is not None and (not live or row_bucket(len(live)) < size):
                self.land(flight, decoder, drafts)
                flight = None
                continue  # some may have stopped
            if not live:
                return
            if row_bucket(len(live)) != size:
                size = row_bucket(len(live))
                live = decoder.to_front(live)
                self.load_ids(decoder, size)
            next_flight = self.start(decoder, drafts, live, position, size, flight)
            if flight is not None:
                self.land(flight, decoder, drafts)
            flight = next_flight
            position += 1

    def load_ids(self, decoder, size: int) -> None:
        """The pending tokens of the rows in the first slots; a slot without a row gets any."""
        if size not in self.buffers:
            device = self.model_ref().device
            self.buffers[size] = Buffers(
                torch.zeros(size, dtype=torch.long, device=device),
                torch.zeros(2, size, dtype=widest_float(device), device=device),
                torch.zeros(2, size, device=device),
            )
        ids = [decoder.pending[row][-1] for row in decoder.order[:size]]
        ids += [0] * (size - len(ids))
        self.buffers[size].ids.copy_(torch.tensor(ids))

    def start(
        self,
        decoder,
        drafts: dict,
        live: list[int],
        position: int,
        size: int,
        unread: Flight | None,
    ) -> Flight:
        """Fill the buffers and start a step. The decoder does not know yet of the tokens that the
        `unread` step before it has put into the cache."""
        slots = decoder.order[:size]
        blanks = [0] * (size - len(slots))
        under_way = set(unread.rows) if unread else set()
        places = []
        for row in slots:
            ahead = row in under_way and not drafts[row].has_stopped
            places.append(decoder.length[row] + ahead)
        states = [drafts[row].state if row in drafts else 0 for row in slots]
        inputs = torch.tensor(places + blanks, dtype=torch.float64)
        inputs = torch.stack([inputs, uniforms(states + blanks, position)])  # (2, R)

        buffers = self.buffers[size]
        if buffers.inputs.is_cuda:
            inputs = inputs.pin_memory()  # or the copy might wait for the step before it
        buffers.inputs.copy_(inputs, non_blocking=True)
        width = self.cache.capacity
        if not self.reads_lengths:
            width = width_bucket(max(places) + 1)
        self.run(size, width, decoder.temperature, decoder.vocab_size)

        samples = torch.empty(2, size, pin_memory=buffers.samples.is_cuda)
        samples.copy_(buffers.samples, non_blocking=True)
        end = None
        if buffers.samples.is_cuda:
            end = torch.cuda.Event()
            end.record()
        live = set(live)
        return Flight([row if row in live else None for row in slots], samples, end)

    def land(self, flight: Flight, decoder, drafts: dict) -> None:
        """Read a step's tokens. Rows that had stopped before it drop theirs."""
        for row, token, logprob in zip(flight.rows, *flight.read(), strict=False):
            if row is not None and not drafts[row].has_stopped:
                decoder.accept(row, drafts[row], int(token), logprob)
                decoder.positions += 1

    def run(self, size: int, width: int, temperature: float, vocab_size: int | None) -> None:
        """One step: replayed, or run as it is and recorded for the next time."""
        settings = (size, width, temperature, vocab_size)
        if settings in self.graphs:
            self.graphs[settings].replay()
            return
        if not self.capture:
            self.step(*settings)
            return
        compiles = fusion.is_worth_it(self.model_ref())
        with fusion.compiled_pieces(self.model_ref()) if compiles else nullcontext():
            self.step(*settings)
            self.record(settings)

    def record(self, settings: tuple) -> None:
        """Make the graph of a step that has just been run. This runs nothing."""
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                self.step(*settings)
            self.graphs[settings] = graph
        except RuntimeError as error:  # a model that asks its tensors questions on the way
            self.capture = False
            warnings.warn(f"decoding goes on without CUDA graphs: {error}", stacklevel=2)

    def step(self, size: int, width: int, temperature: float, vocab_size: int | None) -> None:
        """Feed the ids at their positions, and sample the next ones into the same buffer."""
        model = self.model_ref()
        buffers = self.buffers[size]
        positions = buffers.inputs[0].long()[:, None]  # (R, 1)
        states = self.cache.forward(model, buffers.ids[:, None], Step(0, positions, width))
        uniform = buffers.inputs[1]
        ids, logprobs = sample(model, states[:, -1], uniform, temperature, vocab_size)
        buffers.ids.copy_(ids)
        buffers.samples.copy_(torch.stack([ids.float(), logprobs.float()]))
