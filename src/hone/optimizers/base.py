"""What every optimizer part shares: the learning rate, and which tensors weight decay applies to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hone.adapters.base import matches, select
from hone.errors import HoneError

Params = Sequence[tuple[str, nn.Parameter]]
Groups = list[dict[str, Any]]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0)]


@dataclass(kw_only=True)
class Optimizer(ABC):
    """Moves the trained parameters along their gradients.

    Weight decay, where an optimizer has it, pulls matrices towards zero. It is not applied to tensors that are longer
    than 1 in one dimension at most (norm gains, biases, per-channel scales, whether they are stored as (n), (n, 1) or
    (1, n, 1, 1)): they hold few numbers and set the scale of what follows. Embeddings are matrices and decay, as in
    transformers' Trainer.

    Args:
        lr: learning rate; the schedule multiplies it by a factor at every step.
        decay_all: apply weight decay to every tensor, whatever its dimensions.
        rates: patterns of parameters ("lora_B", "layers.0") to a factor on their learning rate; the first that names
            a parameter, or a module that holds it, counts.
    """

    lr: Rate
    decay_all: bool = False
    rates: dict[str, Rate] = field(default_factory=dict)

    def build(self, params: Params, factors: Mapping[str, float] | None = None) -> torch.optim.Optimizer:
        """Return the optimizer of some parameters.

        Args:
            params: the named parameters that train; no others move.
            factors: factors on the learning rate by name of parameter, beside those of `rates`.

        Raises:
            HoneError: there are none, a pattern of `rates` names none of them, or the method cannot take one of them.
        """
        if not params:
            raise HoneError("nothing trains: the adapter leaves no parameter with requires_grad")
        by_factor: dict[float, list[tuple[str, nn.Parameter]]] = {}
        chosen = named_factors(self.rates, [name for name, _ in params])
        for name, p in params:
            by_factor.setdefault(chosen[name] * (factors or {}).get(name, 1.0), []).append((name, p))
        groups: Groups = []
        of_group: list[float] = []
        for factor, members in by_factor.items():
            groups += (own := self.groups(members))
            of_group += [factor] * len(own)
        optimizer = self.make(groups)
        for group, factor in zip(optimizer.param_groups, of_group, strict=True):
            if factor != 1.0:  # of its own rate: Muon's kin have another one for what is no hidden matrix
                group["lr"] = group.get("lr", self.lr) * factor
        return optimizer

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
        decayed = [p for _, p in params if self.decay_all or not _is_vector(p)]
        others = [p for _, p in params if not self.decay_all and _is_vector(p)]
        found: Groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
        return [group for group in found if group["params"]]


def _is_vector(tensor: Tensor) -> bool:
    """Return whether a tensor is longer than 1 in one dimension at most, as IA3's scales are, which start at 1."""
    return sum(size > 1 for size in tensor.shape) < 2


def named_factors(rates: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Return the factor on the learning rate of every name, 1 where no pattern names it.

    Args:
        rates: patterns of parameters or of modules that hold them, to factors.
        names: dotted names of parameters.

    Raises:
        HoneError: a pattern names nothing; the message gives the nearest name.
    """
    held = {name: [".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 2)] for name in names}
    for pattern in rates:
        select(pattern, dict.fromkeys(place for places in held.values() for place in places), "optimizer.rates")
    return {
        name: next((f for p, f in rates.items() if any(matches(p, place) for place in places)), 1.0)
        for name, places in held.items()
    }


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
