"""Tree attention on the CPU: fused attention by blocks, merged through their log-sum-exps.

A segment attends to itself causally, and all descendants of a segment attend to all of it; in packed order both are
contiguous slices. So the scores of a forest are S causal blocks, and a full block for each segment with descendants: no
key is copied, no mask is made, and no score is computed that is not needed. Each block i yields an output O_i and the
log-sum-exp L_i of its scores, and blocks with the same queries combine exactly:

    L = logaddexp(L_1, L_2),    O = O_1 exp(L_1 - L) + O_2 exp(L_2 - L).

Given the merged O and L, the gradients of a block need nothing from the other blocks (the identity that ring
attention rests on), so the backward pass runs block by block too and adds up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Block(NamedTuple):
    """Queries [start, end) on keys [first, last); a segment's block on itself has the same range for both.

    Args:
        start: first query.
        end: one past the last query.
        first: first key.
        last: one past the last key.
        causal: whether a query sees only keys up to its own index.
    """

    start: int
    end: int
    first: int
    last: int
    causal: bool


def can_use_blocks(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Tell whether block attention applies: on the CPU, for heads of one size, and when it is not switched off.

    It can be differentiated once, and not by torch.func. For more, switch fused kernels off as for torch itself:
    `with torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`.

    Args:
        query: (1, H, T, d).
        key: (1, H', T, d).
        value: (1, H', T, d').
    """
    on = torch.backends.cuda.flash_sdp_enabled()  # torch has one flag for all devices
    if not on or query.device.type != "cpu" or query.shape[-1] != value.shape[-1]:
        return False
    return all(x.stride(-1) == 1 for x in (query, key, value))


def block_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scaling: float) -> Tensor:
    """Return the attention of every query over the blocks it is in.

    Args:
        query: (1, H, T, d).
        key: (1, H', T, d), H' a divisor of H.
        value: (1, H', T, d).
        blocks: those of segments on themselves, which cover every token once, and after them those on ancestors.
        scaling: factor on the scores.

    Returns:
        (1, T, H, d).
    """
    return _BlockAttention.apply(query, key, value, blocks, scaling)


class _BlockAttention(torch.autograd.Function):
    """All blocks of a layer as one node, so that the graph does not grow with the number of segments.

    Inside, tensors are (H', H / H', T, d); keys and values are the same for the second dimension, without copies.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: Sequence[Block], scaling: float) -> Tensor:
        queries, keys, values = _grouped(query, key, value)
        wide = _accumulator(query.dtype)
        output, merged = _like(queries, wide)
        log_sums = query.new_empty(queries.shape[0], queries.shape[2], queries.shape[1], dtype=wide).transpose(1, 2)
        for start, end, first, last, causal in blocks:
            part, log_sum = _forward(
                queries[:, :, start:end], keys[:, :, first:last], values[:, :, first:last], 0.0, causal, scale=scaling
            )
            here, total = merged[:, :, start:end], log_sums[:, :, start:end]
            if start == first:
                here.copy_(part)
                total.copy_(log_sum)
            else:
                here.lerp_(part.to(wide), torch.sigmoid(log_sum - total)[..., None])
                torch.logaddexp(total, log_sum, out=total)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, log_sums)
        ctx.blocks, ctx.scaling = blocks, scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, log_sums = ctx.saved_tensors
        queries, keys, values = _grouped(query, key, value)
        heads = queries.shape[:2]
        merged, upstream = (x[0].unflatten(1, heads).permute(1, 2, 0, 3) for x in (output, upstream.contiguous()))
        wide = _accumulator(query.dtype)
        (to_query, by_query), (to_key, by_key), (to_value, by_value) = (
            _like(x, wide) for x in (queries, keys[:, :1], values[:, :1])
        )
        for start, end, first, last, causal in ctx.blocks:
            rows, columns = slice(start, end), slice(first, last)
            d_query, d_key, d_value = _backward(
                upstream[:, :, rows], queries[:, :, rows], keys[:, :, columns], values[:, :, columns],
                merged[:, :, rows], log_sums[:, :, rows], 0.0, causal, scale=ctx.scaling,
            )  # fmt: skip
            if queries.shape[1] > 1:
                d_key, d_value = (x.sum(1, keepdim=True, dtype=wide) for x in (d_key, d_value))
            into = (by_query[:, :, rows], d_query), (by_key[:, :, columns], d_key), (by_value[:, :, columns], d_value)
            for total, part in into:
                if start == first:  # these come first and cover every token once
                    total.copy_(part)
                else:
                    total.add_(part)
        gradients = (x.transpose(1, 2).to(query.dtype) for x in (to_query, to_key, to_value))
        return *gradients, None, None


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """View (1, H, T, d) as (H', H / H', T, d), the keys and values repeated with stride 0."""
    shared = key.shape[1], query.shape[1] // key.shape[1]
    keys, values = (x[0].unsqueeze(1).expand(*shared, *x.shape[2:]) for x in (key, value))
    return query[0].unflatten(0, shared), keys, values


def _like(grouped: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return new memory (1, T, H, d), the order in which linear layers read and write, and its view like `grouped`."""
    heads, shared, tokens, size = grouped.shape
    made = grouped.new_empty(1, tokens, heads * shared, size, dtype=dtype)
    return made, made[0].unflatten(1, (heads, shared)).permute(1, 2, 0, 3)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype
