"""Linear layers over the few rows of a decode step, on the CPU.

For up to 64 rows x of a layer with weight W (out, in), MKL computes W x^T faster than x W^T where W is large. With 16
rows and two threads, in microseconds of x W^T and of W x^T with the copy that turns it:

    Intel Xeon    384 -> 1024  164, 107     1024 -> 384   336, 114     384 -> 8192   2143, 969
    AMD EPYC      384 -> 1024  182, 196     1024 -> 1024  757, 467     384 -> 8192  5286, 2415

Small layers lose by the copy (AMD EPYC, one thread: 192 -> 512 with 8 rows 40, 81), and from 128 rows on there is no
difference.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

MOST_ROWS = 64
LEAST_WEIGHTS = 2**18  # numbers in W from which on it pays


def narrow_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weight^T + bias, computed transposed where `x` has few rows.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,), or None.

    Returns:
        (..., out), contiguous.
    """
    rows = x.shape[:-1].numel()
    if not 1 < rows <= MOST_ROWS or x.dtype != weight.dtype:
        return nn.functional.linear(x, weight, bias)
    columns = x.reshape(rows, -1).t()
    made = weight @ columns if bias is None else torch.addmm(bias[:, None], weight, columns)
    return made.t().contiguous().view(*x.shape[:-1], -1)


@contextmanager
def narrow_linears(*models: nn.Module) -> Iterator[None]:
    """Let the large linear layers of models run as `narrow_linear` meanwhile, those in float32 on the CPU.

    Args:
        models: the networks. Small layers, those of another type, such as quantised ones, and those that something else
            has already taken over stay as they are.
    """
    modules = {module for model in models for module in model.modules()}
    plain = [module for module in modules if type(module) is nn.Linear and "forward" not in vars(module)]
    changed = [layer for layer in plain if _pays(layer.weight)]
    for layer in changed:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def _pays(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.numel() >= LEAST_WEIGHTS


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    return narrow_linear(x, layer.weight, layer.bias)
