"""Floating-point operations of a training step, counted as they are dispatched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_backward_flop_count, sdpa_flop_count

if TYPE_CHECKING:
    from hone.engine.loop import Trainer
    from hone.text.pack import Tree

# While it counts, torch runs flex attention uncompiled, which makes a square of scores: short rows keep that small.
SHORT = 1024


def _forward(query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(
    gradient: Sequence[int], query: Sequence[int], key: Sequence[int], value: Sequence[int], *args: Any, **kwargs: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


def _added(total: Sequence[int], left: Sequence[int], right: Sequence[int], *args: Any, **kwargs: Any) -> int:
    return mm_flop(left, right)


# What torch has no formula for; those of attention count the masked half of causal scores, as its own do.
_UNCOUNTED = {
    torch.ops.aten.addmm_: _added,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


def counting() -> FlopCounterMode:
    """Return a context that counts the operations within: matrix products, convolutions and attention."""
    return FlopCounterMode(display=False, custom_mapping=_UNCOUNTED)


def count_flops(trainer: Trainer, trees: Sequence[Tree]) -> int:
    """Return the operations of one training step: matrix products, convolutions and attention, 2 per multiply and add.

    Args:
        trainer: takes the step, which moves the weights.
        trees: what it trains on.
    """
    limit, trainer.limit = trainer.limit, min(trainer.limit, SHORT)
    with counting() as counter:
        trainer.train_step(trees)
    trainer.limit = limit
    return int(counter.get_total_flops())
