"""Log-probabilities (and entropies) of given tokens, computed only where they are needed.

Logits over a whole batch are by far the largest tensor: 77 GB for 64 sequences of 2,000 tokens and
150,000 words. So the head runs only where the *next* token has loss mask 1, in chunks that the
backward pass computes anew. Modules are called, never their weights by hand.
Left out: fused kernels, models that change their logits after the head."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minizs.models.composite import text_config

CHUNK, LOGITS = 1024, 2**24  # most positions, and logits (64 MB), that leave the head at once
# With these settings a family changes its logits after the head (Gemma, Cohere, ...).
AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def check_supported(model: nn.Module) -> None:
    """Raise ValueError where backbone-then-head would silently differ from the model's logits."""
    for name in AFTER_THE_HEAD:
        if (value := getattr(text_config(model), name, None)) not in (None, 1):
            raise ValueError(f"a model that changes its logits is not supported: {name} = {value}")


def log_distribution(logits: Tensor, temperature: float, vocab_size: int | None) -> Tensor:
    """(..., V) logits -> (..., vocab_size) log-probabilities in float32 at least: ids that only pad
    the embedding are cut off before the softmax. Those of temperature 0 are those of 1."""
    logits = logits[..., :vocab_size].to(torch.promote_types(logits.dtype, torch.float32))
    return torch.log_softmax(logits / (temperature or 1.0), dim=-1)


def predictable(attention_mask: Tensor) -> Tensor:
    """(B, T) bool: the real tokens that have a real one before them, on whichever side one pads."""
    return attention_mask.bool() & (attention_mask.cumsum(-1) > 1)


def states_before(
    decoder: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    wanted: Tensor,
    packed: bool = False,
) -> Tensor:
    """The decoder's last hidden states just before each of the M wanted tokens: (M, d), row by row.
    input_ids, attention_mask, wanted (bool): (B, T). `packed` computes no padding: all real tokens
    are one row, whose sequences `transformers`, given no mask, keeps apart by their positions.
    Raises ValueError where padding or a first token is wanted."""
    if (wanted & ~predictable(attention_mask)).any():
        raise ValueError("the loss mask holds padding, or a first token, which nothing precedes")
    real, seen = attention_mask.bool(), None if packed else attention_mask
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # (B, T)
    if packed:
        input_ids, positions = input_ids[real][None], positions[real][None]  # (1, R)
    elif (real.int().diff() <= 0).all():  # padding is behind, which no token sees: the faster
        seen, positions = None, torch.arange(real.shape[1], device=real.device).expand_as(real)
    hidden = decoder(
        input_ids=input_ids, attention_mask=seen, position_ids=positions, use_cache=False
    ).last_hidden_state
    hidden = hidden[0] if packed else hidden[real]  # (R, d): all real tokens, row after row
    # Shifted by one: the state before a token is its neighbour's. (No first token is wanted.)
    return hidden[:-1][wanted[real][1:]]


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
    check_supported(model)
    wanted = loss_mask.bool()  # (B, T)
    hidden = states_before(model.get_decoder(), input_ids, attention_mask, wanted, packed)  # (M, d)

    def through_head(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.get_output_embeddings()(hidden)  # (chunk, V)
        logp = log_distribution(logits, temperature, vocab_size)
        chosen = logp.gather(-1, targets[:, None]).squeeze(-1)
        return chosen.float(), -(logp.exp() * logp).sum(-1).float()

    # With nothing to score there is one empty chunk: every gradient is zero, not missing, or under
    # DDP the other processes would wait for it for ever.
    size = max(1, min(CHUNK, LOGITS // text_config(model).vocab_size))
    pieces = zip(hidden.split(size), input_ids[wanted].split(size), strict=True)
    chunks = [checkpoint(through_head, *piece, use_reentrant=False) for piece in pieces]
    scores = map(torch.cat, zip(*chunks, strict=True))  # (M,) each
    blank = torch.zeros(input_ids.shape, device=input_ids.device)  # (B, T)
    return tuple(blank.masked_scatter(wanted, values) for values in scores)


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
        self.model, self.options = model, options
        # FSDP looks here for the layer classes to shard, and else shards none.
        self._no_split_modules = getattr(model, "_no_split_modules", None)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return score(self.model, *inputs, **self.options)
