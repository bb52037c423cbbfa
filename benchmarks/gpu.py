"""What one GPU does with minizs, in one call of at most eight minutes: right, fast, and how near to
what the card could do.

    python benchmarks/gpu.py --output DIR                    # all parts, the most important first
    python benchmarks/gpu.py --only machine decode_1.5b
    python benchmarks/gpu.py --dry_run                       # tiny shapes, on any machine

Each part prints lines of a table as it goes, and everything is written to DIR/gpu.json after each
of them. A part that fails, or takes longer than its budget, is recorded as such, and the next one
begins. Models have the shapes of Qwen2.5 and random weights in bfloat16.

- `machine`: the rates at which the card reads memory and multiplies matrices, measured.
- `correctness`: greedy tokens in float32 against `transformers`; steps as CUDA graphs against steps
  run one by one; log-probabilities of the sampler against those of the scorer, in bfloat16.
- `decode_*`: rows with prompts of 100 to 600 tokens. In `equal` each writes 128 tokens or 48, in
  `mixed` 2 to 256, and leaves. Sides: minizs with CUDA graphs, with the model's pieces compiled or
  not, without graphs ("eager"), and `transformers` with its dynamic and its static cache, where
  rows stay until the last has its tokens.
- `floor`: the share of a step that reading the weights and the keys and values once would take.
- `profile`, `profile_update`: the kernels that take most of a replayed step, and of an update.
- `variants`: other ways to run a step: attention with masks, all of the model compiled.
- `rollout`: three turns with documents between them, against `generate` on the whole text a turn.
- `update`: one optimiser step at 1.5B, against full logits.
- `tests`: those marked `gpu`.  `job`: `train_policy.py` with its defaults.
"""

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Sizes:
    """Shapes and amounts; the tiny ones are those of `--dry_run`."""

    shapes: dict[str, tuple[int, ...]]  # hidden, layers, heads, kv heads, intermediate, ids
    rows: int = 64
    many_rows: int = 256
    prompt: tuple[int, int] = (100, 600)
    new: int = 128
    most_new: int = 256
    document: int = 300
    turn: int = 40  # tokens of a rollout's turn, on average
    micro_tokens: int = 8192
    update_length: tuple[int, int] = (400, 1600)


REAL = Sizes(
    {
        "check": (512, 8, 8, 2, 1536, 5000),
        "0.5b": (896, 24, 14, 2, 4864, 151936),
        "1.5b": (1536, 28, 12, 2, 8960, 151936),
        "3b": (2048, 36, 16, 2, 11008, 151936),
    }
)
TINY = Sizes(
    {name: (32, 2, 4, 2, 48, 300) for name in REAL.shapes},
    rows=6,
    many_rows=9,
    prompt=(3, 12),
    new=6,
    most_new=9,
    document=5,
    turn=4,
    micro_tokens=256,
    update_length=(10, 40),
)


LEAST = 5.0  # seconds that a part needs to be begun


class OutOfTime(BaseException):
    """A part has used up its budget. No `except Exception` on the way may keep it."""


@dataclass
class Bench:
    """What the parts share: sizes, where results go, and the card's rates once measured."""

    sizes: Sizes
    dry: bool
    output: Path
    results: dict[str, dict] = field(default_factory=dict)
    read_rate: float = 0.0
    matrix_rate: float = 0.0

    def record(self, part: str, name: str, **values) -> None:
        """A line of the table."""
        self.results.setdefault(part, {})[name] = values
        cells = ", ".join(f"{key} {_brief(value)}" for key, value in values.items())
        print(f"| {part} | {name} | {cells} |", flush=True)

    def save(self) -> None:
        text = json.dumps(self.results, indent=1, default=str)
        (self.output / "gpu.json").write_text(text, encoding="utf-8")


def _brief(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime inside the block once it has taken this long."""

    def ring(*_):
        raise OutOfTime(f"cut short after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- what the parts are made of -----------------------------------------------------------------


def make_model(bench: Bench, name: str, dtype, **settings):
    """A Qwen2 of this shape with random weights, made where it is used."""
    hidden, layers, heads, kv_heads, intermediate, vocab = bench.sizes.shapes[name]
    config = transformers.Qwen2Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        vocab_size=vocab,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        eos_token_id=None,
        pad_token_id=0,
        **settings,
    )
    torch.manual_seed(0)
    with loading.device():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.eval()


def make_prompts(bench: Bench, rows: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    vocab = min(shape[-1] for shape in bench.sizes.shapes.values())
    lengths = [rng.randint(*bench.sizes.prompt) for _ in range(rows)]
    return [[rng.randrange(3, vocab) for _ in range(length)] for length in lengths]


def mixed_budgets(rows: int, most: int, seed: int = 0) -> list[int]:
    """Tokens to write: 2 to `most`, a fourth of it on average; one row has `most`."""
    rng = random.Random(seed)
    budgets = [min(most, 2 + int(rng.expovariate(4 / most))) for _ in range(rows)]
    return [most, *budgets[1:]]


def library_generate(model, prompts: list[list[int]], new: int, cache: str, **options):
    """`transformers`: prompts padded on the left, pure sampling, all rows to the end."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    settings = {"do_sample": True, "top_k": 0, "top_p": 1.0, "pad_token_id": 0} | options
    out = model.generate(
        torch.tensor(ids, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=new,
        cache_implementation=cache,
        **settings,
    )
    return out[:, width:].tolist()


def seconds(work: Callable) -> float:
    measure.synchronize()
    start = time.perf_counter()
    work()
    measure.synchronize()
    return time.perf_counter() - start


def fresh_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def step_floor(bench: Bench, model, positions: float) -> float:
    """Seconds to read all weights, and keys and values at so many positions (of all rows), once."""
    config = model.config
    width = config.hidden_size // config.num_attention_heads
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * width
    weights = sum(weight.numel() for weight in model.parameters())
    return (weights + positions * cached) * model.dtype.itemsize / bench.read_rate


# ---- the parts ----------------------------------------------------------------------------------


def machine(bench: Bench) -> None:
    device = loading.device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bench.read_rate = measure.read_rate(device)
    bench.matrix_rate = measure.matrix_rate(device, dtype)
    bench.record(
        "machine",
        measure.machine(torch.get_num_threads()),
        read_GB_s=bench.read_rate / 1e9,
        matrix_TFLOP_s=bench.matrix_rate / 1e12,
    )


def correctness(bench: Bench) -> None:
    if torch.cuda.is_available():
        right = flash.kernel_is_right(loading.device(), torch.bfloat16)
        bench.record("correctness", "flash attention over rows", right=right)
        right = flash.packing_is_right(loading.device(), torch.bfloat16)
        bench.record("correctness", "flash attention over packed sequences", right=right)
    check_greedy_tokens(bench)
    check_graphs(bench)
    check_scorer(bench)


def check_greedy_tokens(bench: Bench) -> None:
    """Greedy tokens in float32, against the library one prompt at a time."""
    sizes = bench.sizes
    model = make_model(bench, "check", torch.float32, initializer_range=0.08)
    prompts = make_prompts(bench, 12)
    new = sizes.new // 3
    expected = [
        library_generate(model, [prompt], new, "dynamic", do_sample=False)[0] for prompt in prompts
    ]
    for setting in ("off", "on"):
        ours = generate(model, prompts, new, temperature=0, eos_id=(), cuda_graphs=setting)
        equal = sum(a.ids == b for a, b in zip(ours, expected, strict=True))
        name = f"float32 greedy, graphs {setting}"
        bench.record("correctness", name, equal=equal, of=len(prompts))


def check_graphs(bench: Bench) -> None:
    """Graphs, recorded and replayed, against single steps: float64, rows stop by themselves."""
    sizes = bench.sizes
    model = make_model(bench, "check", torch.float64, initializer_range=0.08)
    prompts = make_prompts(bench, 12)
    options = {"seed": 3, "eos_id": range(sizes.shapes["check"][-1] // 50)}
    budgets = mixed_budgets(len(prompts), sizes.most_new)
    expected = generate(model, prompts, budgets, cuda_graphs="off", **options)
    for name in ("recorded", "replayed"):
        ours = generate(model, prompts, budgets, cuda_graphs="on", **options)
        equal = sum(a.ids == b.ids for a, b in zip(ours, expected, strict=True))
        bench.record("correctness", f"float64 graphs, {name}", equal=equal, of=len(prompts))


def check_scorer(bench: Bench) -> None:
    """The sampler against the scorer, in bfloat16."""
    sizes = bench.sizes
    model = make_model(bench, "0.5b", torch.bfloat16, initializer_range=0.04)
    prompts = make_prompts(bench, sizes.rows // 2)
    for setting in ("off", "on"):
        written = generate(model, prompts, sizes.new, eos_id=(), cuda_graphs=setting)
        rows = [prompt + result.ids for prompt, result in zip(prompts, written, strict=True)]
        mask = [[0] * len(p) + [1] * sizes.new for p in prompts]
        sampled = torch.tensor([result.logprobs for result in written]).flatten()
        ids, loss_mask = (batches.pad(x).to(model.device) for x in (rows, mask))
        seen = batches.attention([len(row) for row in rows]).to(model.device)
        with torch.no_grad():
            scored = token_logprobs(model, ids, seen, loss_mask)[loss_mask == 1].cpu()
        gap = (scored - sampled).abs()
        record_gap(bench, f"bf16 |sampler - scorer|, graphs {setting}", gap)
    if flash.can_pack(model, torch.bfloat16):
        model.set_attn_implementation(flash.PACKED)
        with torch.no_grad():
            packed, _ = score(model, ids, seen, loss_mask, packed=True)
        gap = (packed[loss_mask == 1].cpu() - scored).abs()
        record_gap(bench, "bf16 |packed - padded scorer|", gap)


def record_gap(bench: Bench, name: str, gap) -> None:
    """The median, the 99th percentile and the largest of the differences (n,)."""
    quantiles = {f"q{q}": gap.quantile(q / 100).item() for q in (50, 99)}
    bench.record("correctness", name, **quantiles, max=gap.max().item())


@dataclass(frozen=True)
class Work:
    """What a decode part compares, and how much each row writes."""

    sides: tuple[str, ...] = ("graphs", "dynamic")
    new: int = 128
    mixed: bool = False
    many_rows: bool = False


def decode(bench: Bench, name: str, work: Work) -> None:
    """Tokens a second of these sides, `equal` and `mixed`; see the top of this file."""
    sizes = bench.sizes
    rows = sizes.many_rows if work.many_rows else sizes.rows
    new = min(work.new, sizes.new)
    part = f"decode {name}, {rows} rows"
    model = make_model(bench, name, torch.bfloat16)
    prompts = make_prompts(bench, rows)
    equal = [new] * rows
    mixed = mixed_budgets(rows, sizes.most_new)
    held = sum(len(prompt) + new / 2 for prompt in prompts)
    floor = step_floor(bench, model, held)
    first_side: dict[str, float] = {}
    for side in work.sides:
        run = generator(model, prompts, side)
        graphs.release(model)
        fresh_memory()
        first = seconds(lambda: run([min(8, new)] * rows))  # noqa: B023
        warm = seconds(lambda: run(equal)) if side.startswith("graphs") else 0.0  # noqa: B023
        prefill = seconds(lambda: run([1] * rows))  # noqa: B023
        taken = seconds(lambda: run(equal))  # noqa: B023
        step = (taken - prefill) / (new - 1)
        bench.record(
            part,
            f"{side}, equal",
            tokens_s=rows * new / taken,
            ms_a_step=1e3 * step,
            floor_ms=1e3 * floor,
            floor_share=floor / step,
            prefill_s=prefill,
            first_s=first,
            recorded_s=warm,
            times_the_first_side=taken / first_side.setdefault("equal", taken),
            new=new,
            peak_GB=peak_gb(),
        )
        bench.save()
        if not work.mixed:
            continue
        warm = seconds(lambda: run(mixed)) if side.startswith("graphs") else 0.0  # noqa: B023
        taken = seconds(lambda: run(mixed))  # noqa: B023
        bench.record(
            part,
            f"{side}, mixed",
            tokens_s=sum(mixed) / taken,
            recorded_s=warm,
            times_the_first_side=taken / first_side.setdefault("mixed", taken),
        )
        bench.save()


def generator(model, prompts: list[list[int]], side: str) -> Callable[[list[int]], object]:
    """A function from each row's budget to what this side writes."""
    if side.startswith(("graphs", "eager")):
        setting = "off" if side == "eager" else "on"

        def ours(budgets: list[int]):
            with compiling(side == "graphs"):
                return generate(model, prompts, budgets, eos_id=(), cuda_graphs=setting)

        return ours
    options = {"disable_compile": True} if side == "static" else {}
    cache = "static" if side.startswith("static") else "dynamic"
    return lambda budgets: library_generate(model, prompts, max(budgets), cache, **options)


@contextmanager
def compiling(allowed: bool) -> Iterator[None]:
    """Whether minizs may compile a large model's pieces inside the block."""
    large = fusion.LARGE
    if not allowed:
        fusion.LARGE = math.inf
    try:
        yield
    finally:
        fusion.LARGE = large


def kernel_times(work: Callable) -> dict[str, tuple[float, int]]:
    """Of each kernel that this work runs: the microseconds that it takes in all, and its calls."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    on_gpu = torch.cuda.is_available()
    with profiler(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        work()
        measure.synchronize()
    table = {}
    for event in trace.key_averages():
        spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if spent:  # calls on the host's side take no time of the card's
            table[event.key] = (spent, event.count)
    return table


def record_kernels(bench: Bench, part: str, name: str, table: dict, longest: int) -> None:
    """The sums over all kernels, and those that take longest."""
    total = sum(micro for micro, _ in table.values())
    bench.record(part, name, ms=total / 1e3, kernels=sum(count for _, count in table.values()))
    for key, (micro, count) in sorted(table.items(), key=lambda item: -item[1][0])[:longest]:
        bench.record(part, f"{name}: {key[:110]}", us=micro, calls=count)


def profile(bench: Bench) -> None:
    """The kernels of a replayed step."""
    sizes = bench.sizes
    model = make_model(bench, "1.5b", torch.bfloat16)
    prompts = make_prompts(bench, sizes.rows)
    few, many = (2, 12) if not bench.dry else (2, 4)
    for side in ("graphs", "graphs, nothing compiled"):
        graphs.release(model)
        run = generator(model, prompts, side)
        run([many] * sizes.rows)
        run([many] * sizes.rows)
        # The difference of two generations is that of their steps.
        less, more = (kernel_times(lambda n=n: run([n] * sizes.rows)) for n in (few, many))  # noqa: B023
        table = {}
        for key, (micro, count) in more.items():
            before = less.get(key, (0.0, 0))
            steps = many - few
            table[key] = ((micro - before[0]) / steps, (count - before[1]) / steps)
        record_kernels(bench, "profile", f"a step, 1.5b, {sizes.rows} rows, {side}", table, 20)


def profile_update(bench: Bench) -> None:
    """The kernels of an update of 16 trajectories."""
    rows = make_trajectories(bench, bench.sizes.shapes["1.5b"][-1])[: max(2, bench.sizes.rows // 4)]
    for name in ("padded", "packed"):
        fresh_memory()
        model = make_model(bench, "1.5b", torch.float32)
        try:
            work = learn(bench, model, rows, WAYS[name])
        except RuntimeError as error:
            bench.record("profile", f"update, {name}", skipped=str(error))
            continue
        work()
        work()
        record_kernels(bench, "profile", f"update, {name}", kernel_times(work), 20)
        del model, work


def variants(bench: Bench) -> None:
    """Steps of the 1.5B shape run in other ways. Each has its own model: graphs are kept by it."""
    sizes = bench.sizes
    part = "variants"
    prompts = make_prompts(bench, sizes.rows)

    def measure_steps(name: str, model) -> None:
        def run(count: int) -> float:
            with compiling(False):
                return seconds(lambda: generate(model, prompts, count, eos_id=(), cuda_graphs="on"))

        first = run(sizes.new)
        prefill = run(1)
        taken = run(sizes.new)
        step = (taken - prefill) / (sizes.new - 1)
        bench.record(part, name, ms_a_step=1e3 * step, first_s=first)
        bench.save()

    def attempt(name: str, change: Callable) -> None:
        model = make_model(bench, "1.5b", torch.bfloat16)
        undo = None
        try:
            undo = change(model)
            measure_steps(name, model)
        except OutOfTime:
            raise
        except Exception as error:
            bench.record(part, name, failed=repr(error)[:300])
        finally:
            if undo:
                undo()
            graphs.release(model)
            del model
            fresh_memory()

    attempt("as they are", lambda _: None)
    attempt("attention with masks", use_masks)
    if not bench.dry:  # a compiler may be missing where it is only tried out
        attempt("the whole decoder compiled", compile_decoder)


def use_masks(_model) -> Callable:
    """Attend with masks. Returns what undoes it."""
    can_use = flash.can_use
    flash.can_use = lambda _: False
    return lambda: setattr(flash, "can_use", can_use)


def compile_decoder(model) -> None:
    """Compile the decoder for steps of one token."""
    decoder = model.get_decoder()
    plain = decoder.forward
    fused = torch.compile(decoder.forward, dynamic=False)

    @functools.wraps(plain)
    def forward(*args, input_ids=None, **options):
        is_step = input_ids is not None and input_ids.shape[1] == 1
        return (fused if is_step else plain)(*args, input_ids=input_ids, **options)

    decoder.forward = forward


def rollout(bench: Bench) -> None:
    """64 rows in groups of 8, three turns, documents after the first two."""
    sizes = bench.sizes
    group = 8
    model = make_model(bench, "1.5b", torch.bfloat16)
    starts = make_prompts(bench, max(1, sizes.rows // group))
    prompts = [start for start in starts for _ in range(group)]
    rows = range(len(prompts))
    budgets = [mixed_budgets(len(prompts), 2 * sizes.turn, seed=turn) for turn in range(3)]
    rng = random.Random(0)
    documents = [
        [[rng.randrange(3, 300) for _ in range(sizes.document)] for _ in rows] for _ in range(2)
    ]

    def ours(setting: str) -> None:
        decoder = Decoder(model, prompts, eos_id=(), cuda_graphs=setting)
        for turn in range(3):
            decoder.turn(rows, budgets[turn], [(row, turn) for row in rows])
            if turn < 2:
                decoder.append(rows, documents[turn])

    def plainly() -> None:
        texts = prompts
        for turn in range(3):
            written = library_generate(model, texts, max(budgets[turn]), "dynamic")
            turns = [ids[:budget] for ids, budget in zip(written, budgets[turn], strict=True)]
            texts = [text + ids for text, ids in zip(texts, turns, strict=True)]
            if turn < 2:
                texts = [text + ids for text, ids in zip(texts, documents[turn], strict=True)]

    tokens = sum(map(sum, budgets))
    sides = {
        "graphs, first (records)": lambda: ours("on"),
        "graphs": lambda: ours("on"),
        "plain generate": plainly,
    }
    taken = {}
    for name, work in sides.items():
        fresh_memory()
        taken[name] = seconds(work)
        figures = {
            "seconds": taken[name],
            "tokens_s": tokens / taken[name],
            "times_graphs": taken[name] / taken.get("graphs", taken[name]),
            "peak_GB": peak_gb(),
        }
        bench.record("rollout", name, **figures)
        bench.save()


def make_trajectories(bench: Bench, vocab: int) -> list:
    """Trajectories of random tokens, half of them the policy's own, in blocks of 64."""
    rng = random.Random(0)
    rows = []
    for _ in range(bench.sizes.rows):
        row = Trajectory(Example("", ("",)))
        row.reward = rng.random()
        own = False
        left = rng.randint(*bench.sizes.update_length)
        while left > 0:
            ids = [rng.randrange(3, vocab) for _ in range(min(64, left))]
            row.append(ids, [-1.0] * len(ids)) if own else row.append(ids)
            left -= len(ids)
            own = not own
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Way:
    """How the update is computed. Compiled is "nothing", the "head" (as minizs does by itself), or
    with the head also the norms and MLPs ("pieces") or the whole "layers"."""

    packed: bool = False
    compiled: str = "head"
    checkpointing: bool = False


WAYS = {  # the most important first; None is the plain way, with all logits at once
    "padded, nothing compiled": Way(compiled="nothing"),
    "padded": Way(),
    "padded, pieces compiled": Way(compiled="pieces"),
    "full logits": None,
    "packed": Way(packed=True),
    "padded, layers compiled": Way(compiled="layers"),
    "padded, pieces compiled, checkpointing": Way(compiled="pieces", checkpointing=True),
}


def update(bench: Bench) -> None:
    """One optimiser step on 64 trajectories, weights in float32, computed in bfloat16."""
    rows = make_trajectories(bench, bench.sizes.shapes["1.5b"][-1])
    for name, way in WAYS.items():
        compiles_modules = way is not None and way.compiled in ("pieces", "layers")
        if compiles_modules and bench.dry:
            continue  # a compiler may be missing where it is only tried out
        if compiles_modules:
            torch._dynamo.reset()  # what was compiled before counts against a limit
        fresh_memory()
        try:
            measure_update(bench, name, way, rows)
        except Exception as error:
            bench.record("update", name, failed=repr(error)[:500])
        bench.save()


def measure_update(bench: Bench, name: str, way: Way | None, rows: list) -> None:
    model = make_model(bench, "1.5b", torch.float32)
    work = full_logits(bench, model, rows) if way is None else learn(bench, model, rows, way)
    with compiling(way is not None and way.compiled != "nothing"):
        first = seconds(work)  # makes the optimiser's state
        times = [seconds(work) for _ in range(2)]
    tokens = sum(len(row.ids) for row in rows)
    head_tokens = tokens if way is None else sum(sum(row.loss_mask) for row in rows)
    bench.record(
        "update",
        name,
        seconds=min(times),
        slower_of_two=max(times),
        first_s=first,
        tokens_s=tokens / min(times),
        matrix_share=arithmetic(model, rows, head_tokens) / min(times) / bench.matrix_rate,
        peak_GB=peak_gb(),
    )


def arithmetic(model, rows: list, head_tokens: int) -> float:
    """The floating-point operations of a forward and a backward pass, nothing computed twice."""
    config = model.config
    head = config.hidden_size * config.vocab_size
    body = sum(weight.numel() for weight in model.parameters()) - head
    pairs = sum(len(row.ids) ** 2 / 2 for row in rows)
    attention = 4 * config.num_hidden_layers * config.hidden_size * pairs
    return 3 * (2 * body * sum(len(row.ids) for row in rows) + 2 * head * head_tokens + attention)


def learn(bench: Bench, model, rows: list, way: Way) -> Callable:
    """An update of minizs. Raises RuntimeError where this way does not run on this machine."""
    from accelerate import Accelerator

    import train_policy
    from minizs.learner import build_learner

    if way.packed:
        if not flash.can_pack(model, torch.bfloat16):
            raise RuntimeError("PyTorch's packed attention does not run here")
        model.set_attn_implementation(flash.PACKED)
    if way.compiled in ("pieces", "layers"):
        fusion.compile_modules(model, whole_layers=way.compiled == "layers")
    settings = train_policy.PolicyConfig(
        lr=1e-6,
        group_size=8 if not bench.dry else 2,
        kl_coef=0.0,
        micro_tokens=bench.sizes.micro_tokens,
        gradient_checkpointing=way.checkpointing,
    )
    precision = "bf16" if torch.cuda.is_available() else "no"
    accelerator = Accelerator(mixed_precision=precision)
    learner = build_learner(accelerator, settings, model, model.config.vocab_size)
    learner.scorer.options["packed"] = way.packed
    return lambda: learner.update(rows)


def full_logits(bench: Bench, model, rows: list) -> Callable:
    """The plain way: all logits of a micro-batch at once, in float32."""
    on_gpu = torch.cuda.is_available()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-6, fused=on_gpu)
    groups = batches.by_budget([len(row.ids) for row in rows], bench.sizes.micro_tokens)
    marked = sum(sum(row.loss_mask) for row in rows)

    def work() -> None:
        for group in groups:
            part = batches.make_batch(rows, group, model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=on_gpu):
                logits = model(part.ids, attention_mask=part.attention, use_cache=False).logits
            logp = torch.log_softmax(logits[:, :-1].float(), -1)
            chosen = logp.gather(-1, part.ids[:, 1:, None]).squeeze(-1)
            (-(chosen * part.mask[:, 1:]).sum() / marked).backward()
            del logits, logp, chosen
        optimizer.step()
        optimizer.zero_grad()

    return work


def tests(bench: Bench) -> None:
    """The tests that are marked `gpu`, if there is a pytest. Other files are not even read: they
    may need packages that are not installed beside a card."""
    files = [
        path
        for path in ROOT.glob("tests/*/test_*.py")
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *map(str, files)]
    if bench.dry:
        command = [sys.executable, "-c", "pass"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=70)
    lines = (process.stdout + process.stderr).strip().splitlines()[-30:]
    bench.record("tests", "marked gpu", status=process.returncode, said=" / ".join(lines)[-1500:])


def job(bench: Bench) -> None:
    """`train_policy.py` as it is, its default simulator made first."""
    folder = Path(tempfile.mkdtemp()) / "job"
    command = [sys.executable, "train_policy.py", "--output", str(folder), "--overwrite"]
    if bench.dry:
        command = [sys.executable, "-c", "pass"]
    start = time.perf_counter()
    with open(bench.output / "job.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            status = process.wait()
        except OutOfTime:
            status = "cut short"
            process.kill()
    taken = time.perf_counter() - start
    metrics = folder / "metrics.jsonl"
    steps = []
    if metrics.is_file():
        steps = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    figures = {}
    for name in ("seconds", "seconds_rollout", "seconds_update", "reward"):
        values = [step[name] for step in steps if name in step]
        if values:
            figures[f"median_{name}"] = statistics.median(values)
    figures["said"] = (bench.output / "job.log").read_text(encoding="utf-8", errors="replace")[
        -300:
    ]
    bench.record(
        "job", "train_policy.py", seconds=taken, status=status, steps=len(steps), **figures
    )


THREE = ("graphs", "graphs, nothing compiled", "dynamic")
ALL = ("graphs", "graphs, nothing compiled", "eager", "dynamic", "static")

PARTS: dict[str, tuple[Callable, float]] = {  # each with its budget in seconds
    "machine": (machine, 20),
    "correctness": (correctness, 40),
    "decode_1.5b": (partial(decode, name="1.5b", work=Work(THREE)), 70),
    "rollout": (rollout, 55),
    "job": (job, 120),
    "decode_0.5b": (partial(decode, name="0.5b", work=Work(new=48)), 35),
    "decode_3b": (partial(decode, name="3b", work=Work(new=48)), 40),
    "decode_1.5b_256": (partial(decode, name="1.5b", work=Work(new=48, many_rows=True)), 40),
    "tests": (tests, 75),
    "update": (update, 150),
    "profile_update": (profile_update, 40),
    "profile": (profile, 30),
    "variants": (variants, 60),
    "decode_all": (partial(decode, name="1.5b", work=Work(ALL, mixed=True)), 120),
    "static_compiled": (partial(decode, name="1.5b", work=Work(("graphs", "static_compiled"))), 90),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=".", help="the folder for gpu.json")
    parser.add_argument("--dry_run", action="store_true", help="tiny shapes, on any machine")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), help="default: all")
    parser.add_argument("--seconds", type=float, default=445, help="budget of all parts together")
    args = parser.parse_args(argv)
    import_what_is_slow()
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    bench = Bench(TINY if args.dry_run else REAL, args.dry_run, output)
    end = time.perf_counter() + args.seconds
    print("| part | what | figures |\n|---|---|---|", flush=True)
    for name in args.only or PARTS:
        work, budget = PARTS[name]
        start = time.perf_counter()
        budget = min(budget, end - start)
        if budget < LEAST:
            bench.record("parts", name, skipped="no time left")
            continue
        try:
            with time_limit(budget):
                work(bench)
            outcome = "done"
        except OutOfTime as late:
            outcome = str(late)
        except Exception:
            outcome = traceback.format_exc()
            print(outcome, flush=True)
        for model in list(graphs._steps_of):
            graphs.release(model)
        torch._dynamo.reset()
        fresh_memory()
        taken = time.perf_counter() - start
        bench.record("parts", name, seconds=taken, outcome=outcome.strip().splitlines()[-1])
        bench.results["parts"][name]["outcome"] = outcome
        bench.save()
    failed = [n for n, part in bench.results["parts"].items() if part.get("outcome") != "done"]
    if args.dry_run and failed:
        raise SystemExit(f"these parts have failed: {', '.join(failed)}")


def import_what_is_slow() -> None:
    """After the arguments are read, so that `--help` answers at once."""
    global functools, gc, torch, transformers
    global batches, flash, fusion, graphs, loading, measure
    global Decoder, Example, Trajectory, generate, score, token_logprobs

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import functools
    import gc

    import torch
    import transformers

    from benchmarks import measure
    from minizs import graphs
    from minizs.generate import Decoder, generate
    from minizs.logprobs import score, token_logprobs
    from minizs.models import batches, flash, fusion, loading
    from minizs.trajectory import Example, Trajectory

    transformers.utils.logging.set_verbosity_error()


if __name__ == "__main__":
    main()
