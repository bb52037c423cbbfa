"""Log-probabilities (and entropies) of given tokens, computed only where they are needed.

Logits over a whole batch are by far the largest tensor: 77 GB for 64 sequences of 2,000 tokens and
150,000 words. So the head runs only where the *next* token has loss mask 1, in chunks that the
backward pass computes anew. Modules are called, never their weights by hand.
Left out: fused kernels."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minizs.models import flash, fusion
from minizs.models.composite import text_config
from minizs.models.support import final_logits

CHUNK = 1024  # most positions that go through the head at once
LOGITS = {"cpu": 2**24, "cuda": 2**28}  # and most logits of them: 64 MB, on a GPU 1 GB in float32


def log_distribution(logits: Tensor, temperature: float, vocab_size: int | None) -> Tensor:
    """(..., V) logits -> (..., vocab_size) log-probabilities in float32 at least: ids that only pad
    the embedding are cut off before the softmax. Temperature 0 gives those of temperature 1."""
    logits = logits[..., :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    if temperature not in (0, 1):
        logits = logits / temperature
    return torch.log_softmax(logits, dim=-1)


def predictable(attention_mask: Tensor) -> Tensor:
    """(B, T) bool: the real tokens that have a real one before them, on whichever side one pads."""
    return attention_mask.bool() & (attention_mask.cumsum(-1) > 1)


def states_before(
    decoder: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    target_mask: Tensor,
    packed: bool = False,
) -> Tensor:
    """The decoder's last hidden states just before each of the M target tokens: (M, d), row by row.

    input_ids, attention_mask, target_mask (bool): (B, T). `packed` computes no padding. Raises
    ValueError where a target is padding or a first token, which nothing precedes."""
    if (target_mask & ~predictable(attention_mask)).any():
        raise ValueError("the loss mask holds padding, or a first token, which nothing precedes")
    real = attention_mask.bool()
    run = run_packed if packed else run_padded
    hidden = run(decoder, input_ids, attention_mask)  # (R, d): all real tokens, row after row
    # Shifted by one: the state before a token is its neighbour's. (No first token is a target.)
    return hidden[:-1][target_mask[real][1:]]


def run_padded(decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The last hidden states of all real tokens of a padded batch (B, T), row by row: (R, d)."""
    real = attention_mask.bool()
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # (B, T)
    padding_is_behind = bool((real.int().diff() <= 0).all())
    if padding_is_behind:  # no token sees it: without a mask attention is faster
        attention_mask = None
        positions = torch.arange(real.shape[1], device=real.device).expand_as(real)
    output = decoder(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        use_cache=False,
    )
    return output.last_hidden_state[real]


def run_packed(decoder: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The same, with all real tokens as one row, whose positions start anew with each sequence."""
    real = attention_mask.bool()
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # (B, T)
    options = {"attention_mask": None}  # `transformers` sees from the positions where one ends
    if decoder.config.get_text_config()._attn_implementation == flash.PACKED:
        lengths = [length for length in attention_mask.sum(-1).tolist() if length]
        options = flash.packed_arguments(lengths, real.device)
    output = decoder(
        input_ids=input_ids[real][None],  # (1, R)
        position_ids=positions[real][None],
        use_cache=False,
        **options,
    )
    return output.last_hidden_state[0]


def most_positions(model: nn.Module, device: torch.device) -> int:
    """How many positions go through the head at once, so that their logits stay within bounds."""
    return max(1, LOGITS.get(device.type, 2**24) // text_config(model).vocab_size)


def score(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    packed: bool = False,
) -> tuple[Tensor, Tensor]:
    """(B, T) each -> (B, T) float32, differentiable, 0 where the loss mask is 0: log-probability of
    `input_ids[b, t]` given what precedes it, and entropy of the distribution it was drawn from."""
    target_mask = loss_mask.bool()  # (B, T)
    decoder = model.get_decoder()
    hidden = states_before(decoder, input_ids, attention_mask, target_mask, packed)  # (M, d)

    evaluate = fusion.compiled(evaluate_tokens) if fusion.is_worth_it(model) else evaluate_tokens

    def through_head(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = final_logits(model, hidden)  # (chunk, V)
        return evaluate(logits, targets, temperature, vocab_size)

    # With nothing to score there is one empty chunk: every gradient is zero, not missing, or under
    # DDP the other processes would wait for it for ever.
    size = min(CHUNK, most_positions(model, hidden.device))
    pieces = zip(hidden.split(size), input_ids[target_mask].split(size), strict=True)
    chunks = [checkpoint(through_head, *piece, use_reentrant=False) for piece in pieces]
    scores = map(torch.cat, zip(*chunks, strict=True))  # (M,) each
    blank = torch.zeros(input_ids.shape, device=input_ids.device)  # (B, T)
    return tuple(blank.masked_scatter(target_mask, values) for values in scores)


def evaluate_tokens(
    logits: Tensor, targets: Tensor, temperature: float, vocab_size: int | None
) -> tuple[Tensor, Tensor]:
    """The log-probabilities of the targets (n,) under logits (n, V), and the distributions'
    entropies: (n,) float32 each."""
    logp = log_distribution(logits, temperature, vocab_size)  # (n, V)
    target_logp = logp.gather(-1, targets[:, None]).squeeze(-1)  # (n,)
    entropies = -(logp.exp() * logp).sum(-1)  # (n,)
    return target_logp.float(), entropies.float()


def token_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    temperature: float = 1.0,
    vocab_size: int | None = None,
) -> Tensor:
    """The log-probabilities of `score` alone: (B, T) float32."""
    return score(model, input_ids, attention_mask, loss_mask, temperature, vocab_size)[0]


class Scorer(nn.Module):
    """`score` with its options as a module: what Accelerate prepares and sees every call of."""

    def __init__(self, model: nn.Module, **options) -> None:
        super().__init__()
        self.model = model
        self.options = options
        # FSDP looks here for the layer classes to shard, and else shards none.
        self._no_split_modules = getattr(model, "_no_split_modules", None)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """`score` of (input_ids, attention_mask, loss_mask): see there."""
        return score(self.model, *inputs, **self.options)
