"""Tokens a second of minizs' generation beside `transformers`' own, on a rollout's workload.

    python benchmarks/generate.py [--threads 1] [--batch 64 128] [--repeats 5]

The model is a random Llama of 4 layers x 128 with 1,000 ids, in float32 on the CPU. Prompts of 20
to 60 tokens come in groups of 8 equal ones. Responses have mixed lengths, up to 64 tokens: the
head favours the end-of-sequence token so that about one token in 32 is one, and rows end there.

- `minizs`: `generate` once; it computes a group's prompt once, and a row that has ended leaves.
- `transformers`: `model.generate(do_sample=True)` once, prompts padded on the left, its default
  cache, pure sampling (top_k=0, top_p=1); rows that have ended stay until the last one has.

Three turns, a chunk of 24 tokens (documents) appended after each:

- `minizs`: one `Decoder`; the cache lives through the turns.
- `transformers`: `generate` anew on the whole text at each turn, as ZeroSearch's own loop does.

Both count only the tokens that rows wrote, the end-of-sequence token included. They take turns
(A B A B); the medians of their rates are shown.
"""

import argparse
import random
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from minizs.generate import Decoder, generate

VOCAB, EOS, NEW, GROUP, CHUNK = 1000, 1, 64, 8, 24


def make_model() -> LlamaForCausalLM:
    """A small random model; a head with a bias makes responses end after 32 tokens on average."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
        eos_token_id=EOS, bos_token_id=None, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    head = torch.nn.Linear(128, VOCAB)
    with torch.no_grad():
        head.weight.copy_(model.lm_head.weight)
        head.bias.zero_()
        head.bias[EOS] = torch.tensor((VOCAB - 1) / 31).log()  # p(eos) = 1/32 among flat logits
    model.lm_head = head
    return model


def make_prompts(batch: int) -> list[list[int]]:
    rng = random.Random(0)
    lengths = [rng.randint(20, 60) for _ in range(batch // GROUP)]
    prompts = [[rng.randrange(2, VOCAB) for _ in range(length)] for length in lengths]
    return [prompt for prompt in prompts for _ in range(GROUP)]


def library_turn(model: LlamaForCausalLM, texts: list[list[int]]) -> list[list[int]]:
    """What `transformers` writes after each text, cut after the end-of-sequence token."""
    width = max(map(len, texts))
    ids = torch.tensor([[0] * (width - len(text)) + text for text in texts])  # (B, T)
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=True, top_k=0, top_p=1.0
    )
    rows = out[:, width:].tolist()
    return [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]


def ours(model: LlamaForCausalLM, prompts: list[list[int]], turns: int, seed: int) -> int:
    """Tokens written in so many turns by minizs."""
    if turns == 1:
        return sum(len(result.ids) for result in generate(model, prompts, NEW, seed=seed))
    capacity = max(map(len, prompts)) + turns * (NEW + CHUNK)
    decoder = Decoder(model, prompts, capacity=capacity, seed=seed)
    rows, written = list(range(len(prompts))), 0
    for turn in range(turns):
        results = decoder.turn(rows, NEW, [(row, turn) for row in rows])
        written += sum(len(result.ids) for result in results)
        decoder.append(rows, [list(range(2, 2 + CHUNK))] * len(rows))
    return written


def theirs(model: LlamaForCausalLM, prompts: list[list[int]], turns: int, seed: int) -> int:
    """Tokens written in so many turns by `transformers`."""
    torch.manual_seed(seed)
    texts, written = prompts, 0
    for _ in range(turns):
        new = library_turn(model, texts)
        written += sum(map(len, new))
        texts = [t + n + list(range(2, 2 + CHUNK)) for t, n in zip(texts, new, strict=True)]
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of both sides")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128], help="rows, 8 a group")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each side")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = make_model()
    for turns in (1, 3):
        for batch in args.batch:
            prompts, rates = make_prompts(batch), {ours: [], theirs: []}
            for repeat in range(args.repeats + 1):  # the first is a warm-up
                for side, measured in rates.items():
                    start = time.perf_counter()
                    written = side(model, prompts, turns, seed=repeat)
                    measured.append(written / (time.perf_counter() - start))
            a, b = (statistics.median(measured[1:]) for measured in rates.values())
            print(
                f"{turns} turn(s), batch {batch:4}: minizs {a:7.0f} tokens/s, "
                f"transformers {b:7.0f} tokens/s, ratio {a / b:.2f}"
            )


if __name__ == "__main__":
    main()
