"""FlashAttention as PyTorch carries it, for rows of different lengths: no masks, no padding read.

- `ROWS`: generation. Queries stand at the ends of rows of a key-value cache.
- `PACKED`: scoring and learning. All sequences of a batch are one row, without padding. (The
  package flash-attn does the same, where it is installed.)

Both give what `scaled_dot_product_attention` gives with a mask, on a CUDA device in half precision,
for a fraction of the time. A reader of the method can skip this file. `transformers` finds the
functions by their names, which stand in a model's `_attn_implementation`."""

from functools import cache
from inspect import signature

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from minizs.models.composite import text_config
from minizs.models.support import attending, plain_attention

ROWS = "minizs_rows"
PACKED = "minizs_packed"


def takes_packed(model: nn.Module) -> bool:
    """Whether the model's attention keeps sequences apart that are packed into one row."""
    attention = text_config(model)._attn_implementation
    return attention in ("flash_attention_2", PACKED) and keeps_apart(model)


@torch.no_grad()
def keeps_apart(model: nn.Module) -> bool:
    """Whether this family tells from positions that start anew that another sequence begins: not
    all do. It is tried on a few tokens, with the attention that every device has."""
    decoder = model.get_decoder()
    was_training = model.training
    model.eval()
    ids = torch.tensor([[3, 2, 4, 5, 5, 3, 2]], device=model.device)
    ids = ids % model.get_input_embeddings().num_embeddings
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2]], device=model.device)
    # Frozen embeddings may be in another format than the layers. Some families need autocast then,
    # as they have it in training.
    formats = {weight.dtype for weight in model.parameters()}
    computing = torch.autocast(model.device.type, torch.bfloat16, enabled=len(formats) > 1)
    try:
        with attending(model, plain_attention(model)), computing:
            packed = decoder(input_ids=ids, position_ids=positions, use_cache=False)
            second = decoder(input_ids=ids[:, 4:], use_cache=False)
    except (RuntimeError, TypeError, ValueError):  # a family without such positions, or masks
        return False
    finally:
        model.train(was_training)
    expected = second.last_hidden_state.float()
    gap = packed.last_hidden_state[:, 4:].float() - expected
    return bool(gap.norm() <= 0.1 * expected.norm())


def can_use(model: nn.Module) -> bool:
    """Whether generation with this model can use `attend_rows`."""
    return suits(model, model.dtype) and kernel_is_right(model.device, model.dtype)


def can_pack(model: nn.Module, dtype: torch.dtype) -> bool:
    """Whether scoring with this model, computed in this type, can use `attend_packed`."""
    return suits(model, dtype) and packing_is_right(model.device, dtype)


def suits(model: nn.Module, dtype: torch.dtype) -> bool:
    """The kernels are CUDA's, for half precision; and the model must hand its layers what it is
    given, and add nothing to the scores."""
    return (
        model.device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and bool(getattr(model, "_supports_attention_backend", False))
        and bool(getattr(model, "_supports_flash_attn", False))
        and plain_attention(model) == "sdpa"
    )


# ---- generation ---------------------------------------------------------------------------------


def row_lengths(positions: Tensor) -> Tensor:
    """In place of a mask: how many keys the last of each row's queries (n, C) sees, (n, 1, 1, 1).
    (`transformers` hands a mask of four dimensions to each layer as it is.)"""
    return (positions[:, -1] + 1).int()[:, None, None, None]


def attend_rows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Attention of the last C tokens of each row: (n, H, C, D) queries, (n, H_k, capacity, D) keys
    and values of the whole cache, and the `row_lengths` -> (n, C, H, D).

    Query j of a row of `length` tokens is its token `length - C + j` and sees nothing behind it."""
    n, heads, count, dim = query.shape
    capacity = key.shape[2]
    device = str(query.device)
    # A compiler traces what it meets, and would warn that it does not keep what a cache keeps.
    edges = _edges.__wrapped__ if torch.compiler.is_compiling() else _edges
    output = torch.ops.aten._flash_attention_forward(
        query.transpose(1, 2).reshape(n * count, heads, dim),
        key.transpose(1, 2).reshape(n * capacity, -1, dim),
        value.transpose(1, 2).reshape(n * capacity, -1, dim),
        edges(n, count, device),
        edges(n, capacity, device),
        count,
        capacity,
        0.0,  # dropout
        count > 1,  # causal
        False,  # no debug mask
        scale=scaling,
        window_size_left=sliding_window - 1 if sliding_window else -1,
        window_size_right=0 if sliding_window else -1,
        seqused_k=attention_mask.flatten(),
    )[0]
    return output.view(n, count, heads, dim), None


@cache
def _edges(count: int, size: int, device: str) -> Tensor:
    """Where each of `count` sequences of equal size begins, and the last one ends: (count + 1,)."""
    return torch.arange(0, count * size + 1, size, dtype=torch.int32, device=device)


def attend_rows_plainly(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, window: int):
    """What `attend_rows` computes, by a mask: the definition, for the check below and for tests."""
    n, heads, count, _ = query.shape
    groups = heads // key.shape[1]
    columns = torch.arange(key.shape[2], device=query.device)
    queries = torch.arange(count, device=query.device)[:, None]
    ends = lengths.view(n, 1, 1, 1) - count + queries  # (n, 1, C, 1)
    mask = (columns <= ends) & (columns > ends - (window or key.shape[2] + 1))
    key = key.repeat_interleave(groups, 1)
    value = value.repeat_interleave(groups, 1)
    output = nn.functional.scaled_dot_product_attention(query, key, value, mask)
    return output.transpose(1, 2)  # (n, C, H, D)


@cache
def kernel_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has the kernel, and it means by its arguments what is meant
    here. (It is called by its inner name, whose arguments may change.)"""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([9, 200, 77], dtype=torch.int32, device=device)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    # In memory as in the cache: a token's heads side by side.
    key = random(3, 256, 2, 64).transpose(1, 2)
    value = random(3, 256, 2, 64).transpose(1, 2)
    try:
        for count, window in ((1, None), (5, None), (1, 20), (5, 20)):
            query = random(3, 6, count, 64)
            mask = lengths.view(3, 1, 1, 1)
            ours, _ = attend_rows(None, query, key, value, mask, sliding_window=window)
            expected = attend_rows_plainly(query, key, value, lengths, window)
            if (ours - expected).abs().max() > 0.03:
                return False
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return True


# ---- scoring and learning -----------------------------------------------------------------------


def packed_arguments(lengths: list[int], device: torch.device) -> dict:
    """What a decoder takes beside the ids and positions of sequences that are one row: where each
    ends. The mask of four dimensions stands for none: layers get it as it is."""
    edges = torch.tensor([0, *lengths], device=device).cumsum(0).int()  # (B + 1,)
    return {
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),
        "cu_seq_lens_q": edges,
        "cu_seq_lens_k": edges,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def attend_packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int = 0,
    **options,
) -> tuple[Tensor, None]:
    """Causal attention inside each of the sequences in (1, H, R, D) queries and (1, H_k, R, D) keys
    and values -> (1, R, H, D). Without `packed_arguments` it is `transformers`' sdpa."""
    if cu_seq_lens_q is None:
        options |= {"scaling": scaling, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    grouped = {}
    if "enable_gqa" in signature(varlen_attn).parameters:  # of torch 2.11 takes groups unasked
        grouped["enable_gqa"] = query.shape[1] != key.shape[1]
    output = varlen_attn(
        query[0].transpose(0, 1).contiguous(),  # (R, H, D)
        key[0].transpose(0, 1).contiguous(),
        value[0].transpose(0, 1).contiguous(),
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        **grouped,
    )
    return output[None], None


@cache
def packing_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch attends, and differentiates, as `attend_packed` means it to."""
    lengths = [37, 1, 90]
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 6, 128, 64), (1, 2, 128, 64), (1, 2, 128, 64)]
    inputs = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    weights = torch.randn(1, 128, 6, 64, generator=generator).to(device, dtype)
    try:
        for window in (None, 20):
            results = []  # of each: the output, and the gradients of its inputs
            for attend in (attend_packed, _attend_packed_plainly):
                leaves = [x.detach().clone().requires_grad_() for x in inputs]
                options = packed_arguments(lengths, device)
                output, _ = attend(None, *leaves, sliding_window=window, **options)
                results.append([output, *torch.autograd.grad(output, leaves, weights)])
            for ours, expected in zip(*results, strict=True):
                if (ours - expected).abs().max() > 0.03 * expected.abs().max():
                    return False
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return True


def _attend_packed_plainly(_, query, key, value, cu_seq_lens_q, sliding_window=None, **__):
    """What `attend_packed` computes, by a mask: the definition."""
    count = query.shape[2]
    place = torch.arange(count, device=query.device)
    sequence = torch.bucketize(place, cu_seq_lens_q, right=True)
    ahead = place[:, None] - place  # how far a key stands before a query
    mask = (sequence[:, None] == sequence) & (ahead >= 0) & (ahead < (sliding_window or count))
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, 1)
    value = value.repeat_interleave(groups, 1)
    output = nn.functional.scaled_dot_product_attention(query, key, value, mask)
    return output.transpose(1, 2), None


AttentionInterface.register(ROWS, attend_rows)
AttentionInterface.register(PACKED, attend_packed)
AttentionMaskInterface.register(PACKED, sdpa_mask)  # where nothing is packed
