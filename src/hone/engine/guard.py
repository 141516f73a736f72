"""The numeric guard: a loss or gradient that is not finite stops the run before it can touch the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hone.errors import NumericError


def check_loss(value: Tensor, step: int, where: Sequence[str]) -> None:
    """Stop when a loss is not finite.

    Args:
        value: the loss of one micro-batch, a scalar.
        step: the step it belongs to.
        where: the samples of the micro-batch.

    Raises:
        NumericError: names the step and the samples of the micro-batch.
    """
    if not bool(torch.isfinite(value)):
        raise NumericError(_message(f"the loss is {float(value)}", step, where))


def clip(parameters: Sequence[nn.Parameter], most: float | None, step: int, where: Sequence[str]) -> float:
    """Scale the gradients to a norm of at most `most` and return the norm before.

    Args:
        parameters: parameters of one player; those without a gradient are passed over.
        most: largest L2 norm over all gradients together; None only measures.
        step: for the message.
        where: the samples of the step, for the message.

    Raises:
        NumericError: the norm is not finite; the gradients are left unscaled and the weights untouched.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    if not math.isfinite(norm):
        raise NumericError(_message(f"the gradient norm is {norm}", step, where))
    if most is not None and norm > most:
        torch._foreach_mul_(gradients, most / (norm + 1e-6))
    return norm


def _message(what: str, step: int, where: Sequence[str]) -> str:
    names = list(dict.fromkeys(where))
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return (
        f"step {step}: {what}. The batch was: {shown or 'unknown'}. Try a smaller optimizer.lr, a longer "
        "schedule.warmup or a smaller clip, or look at those samples."
    )
