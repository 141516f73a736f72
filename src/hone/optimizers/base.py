"""What every optimizer part shares: the learning rate, and which tensors weight decay applies to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn
from torch.distributed.tensor import DTensor

from hone.errors import HoneError

Params = Sequence[tuple[str, nn.Parameter]]
Groups = list[dict[str, Any]]
Rate = Annotated[float, Field(gt=0)]
Weight = Annotated[float, Field(ge=0)]


@dataclass(kw_only=True)
class Optimizer(ABC):
    """Moves the trained parameters along their gradients.

    Weight decay, where an optimizer has it, pulls matrices towards zero. It is not applied to tensors of fewer than two
    dimensions (norm gains, biases, per-channel scales): they hold few numbers and set the scale of what follows.
    Embeddings are matrices and decay, as in transformers' Trainer.

    Args:
        lr: learning rate; the schedule multiplies it by a factor at every step.
        decay_all: apply weight decay to every tensor, whatever its dimensions.
    """

    lr: Rate
    decay_all: bool = False

    def build(self, params: Params) -> torch.optim.Optimizer:
        """Return the optimizer of some parameters.

        Args:
            params: the named parameters that train; no others move.

        Raises:
            HoneError: there are none, or the method cannot take one of them.
        """
        if not params:
            raise HoneError("nothing trains: the adapter leaves no parameter with requires_grad")
        return self.make(self.groups(params))

    @abstractmethod
    def make(self, groups: Groups) -> torch.optim.Optimizer:
        """Return the optimizer of some parameter groups.

        Args:
            groups: as `groups` makes them; a group's own settings come before the optimizer's.
        """

    def groups(self, params: Params) -> Groups:
        """Divide parameters into those that weight decay applies to and those it does not.

        Args:
            params: the named parameters that train.

        Returns:
            At most two groups, none empty; the second, of the others, says `weight_decay: 0`.
        """
        decayed = [p for _, p in params if self.decay_all or p.ndim >= 2]
        others = [p for _, p in params if not self.decay_all and p.ndim < 2]
        found: Groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        return [group for group in found if group["params"]]


def fused(groups: Groups) -> bool | None:
    """Return whether to ask PyTorch for its fused kernel: one pass over all the tensors of a group.

    Args:
        groups: the parameter groups.

    Returns:
        True where all tensors are whole, floating-point and on the CPU or on CUDA; None leaves the choice to PyTorch.
    """
    tensors = [p for group in groups for p in group["params"]]
    able = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in tensors)
    return True if able and not shared(groups) else None


def shared(groups: Groups) -> bool:
    """Return whether processes hold shares of the tensors (FSDP), which some kernels cannot step.

    Args:
        groups: the parameter groups.
    """
    return any(isinstance(p, DTensor) for group in groups for p in group["params"])
