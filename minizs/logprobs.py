"""Log-probabilities (and entropies) of given tokens, computed only where they are needed.

A language model's logits over a whole batch are its largest tensor by far: 64 sequences of 2,000
tokens with a vocabulary of 150,000 are 77 GB in float32. In a searching trajectory most positions
are prompt or documents, which no loss ever looks at. So the backbone runs over everything, but the
head only where the *next* token has loss mask 1, a chunk at a time, and each chunk is computed
anew in the backward pass (checkpointing) instead of being kept.

The distribution is the one the tokens were sampled from: same temperature, same vocabulary cut
(`log_distribution` is shared with generate.py). Modules are called, never their weights used by
hand, so an adapted or replaced head works.

Left out: fused kernels, sequence packing, models that change their logits after the head.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

CHUNK = 1024  # positions that go through the head at once: 0.6 GB of float32 logits at 150,000 ids

# Configuration entries with which a family changes its logits after the head (Gemma, Cohere, ...).
AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


def check_supported(model: nn.Module) -> None:
    """Raise ValueError where backbone-then-head would silently differ from the model's logits."""
    for name in AFTER_THE_HEAD:
        value = getattr(model.config, name, None)
        if value not in (None, 1):
            kind = type(model).__name__
            raise ValueError(f"{kind} is not supported: it changes its logits ({name}={value})")


def log_distribution(logits: Tensor, temperature: float, vocab_size: int | None) -> Tensor:
    """(..., V) logits -> (..., vocab_size) log-probabilities in float32 at least.

    Ids from `vocab_size` on (rows that only pad the embedding) are cut off before the softmax.
    Temperature 0 stands for greedy decoding, whose log-probabilities are those of temperature 1.
    """
    logits = logits[..., :vocab_size]
    if logits.dtype != torch.float64:
        logits = logits.float()
    return torch.log_softmax(logits / (temperature or 1.0), dim=-1)


def score(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor,
          temperature: float = 1.0, vocab_size: int | None = None,
          ) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-probability and entropy at each position with loss mask 1, 0 elsewhere.

    input_ids, attention_mask, loss_mask: (B, T), padding on either side. Returns two (B, T) float32
    tensors; at [b, t] stand the log-probability of `input_ids[b, t]` given what precedes it, and
    the entropy of the distribution it was drawn from. Gradients flow through both. Raises
    ValueError for a loss mask on column 0, which has nothing before it, and by `check_supported`.
    """
    check_supported(model)
    wanted = loss_mask.bool()  # (B, T)
    if wanted[:, 0].any():
        raise ValueError("the loss mask holds a sequence's first token, which nothing precedes")
    positions = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # (B, T)
    output = model.get_decoder()(input_ids=input_ids, attention_mask=attention_mask,
                                 position_ids=positions, use_cache=False)  # fmt: skip
    picked = wanted[:, 1:]  # (B, T - 1): the hidden state at t predicts token t + 1
    hidden = output.last_hidden_state[:, :-1][picked]  # (M, d)
    targets = input_ids[:, 1:][picked]  # (M,)

    def through_head(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = model.get_output_embeddings()(hidden)  # (chunk, V)
        logp = log_distribution(logits, temperature, vocab_size)
        chosen = logp.gather(-1, targets[:, None]).squeeze(-1)
        return chosen.float(), -(logp.exp() * logp).sum(-1).float()

    # With nothing to score there is one empty chunk, and every parameter's gradient is zero, not
    # missing: under DDP, the other processes would wait for it for ever.
    chunks = [
        checkpoint(through_head, *chunk, use_reentrant=False)
        for chunk in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    results = []
    for values in zip(*chunks, strict=True):
        full = torch.zeros(input_ids.shape, device=input_ids.device)  # (B, T)
        results.append(full.masked_scatter(wanted, torch.cat(values)))
    return results[0], results[1]


def token_logprobs(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor,
                   temperature: float = 1.0, vocab_size: int | None = None) -> Tensor:  # fmt: skip
    """The log-probabilities of `score` alone: (B, T) float32."""
    return score(model, input_ids, attention_mask, loss_mask, temperature, vocab_size)[0]


class Scorer(nn.Module):
    """`score` as a module: what Accelerate prepares, so that its hooks see every forward."""

    def __init__(self, model: nn.Module, temperature: float = 1.0,
                 vocab_size: int | None = None) -> None:  # fmt: skip
        super().__init__()
        self.model, self.temperature, self.vocab_size = model, temperature, vocab_size
        # FSDP looks here for the layer classes to shard; without it, it would silently shard none.
        self._no_split_modules = getattr(model, "_no_split_modules", None)

    def forward(self, input_ids: Tensor, attention_mask: Tensor,
                loss_mask: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        """(B, T) each -> log-probabilities and entropies, (B, T) each; see `score`."""
        return score(self.model, input_ids, attention_mask, loss_mask, self.temperature,
                     self.vocab_size)  # fmt: skip
