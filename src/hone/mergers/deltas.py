"""Merging changes: what each model has changed in a common base is added up, after what interferes is taken out."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hone.mergers.base import Merger, Weights, check_weights, common_dtype, widened
from hone.parts import part


def dropped(delta: Tensor, rate: float, key: str) -> Tensor:
    """Return a change of which a share is set to 0 at random and the rest is made larger to the same mean (DARE).

    Args:
        delta: any shape.
        rate: share that is dropped, in [0, 1).
        key: what the random numbers are a function of.
    """
    if rate == 0:
        return delta
    seed = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=7).digest(), "big")
    kept = torch.rand(delta.shape, generator=torch.Generator().manual_seed(seed)) >= rate
    return delta * kept.to(delta) / (1 - rate)


def trimmed(delta: Tensor, density: float) -> Tensor:
    """Return a change of which the largest entries are kept and the others set to 0.

    Args:
        delta: any shape.
        density: share that is kept, in (0, 1]; at least one entry is.
    """
    count = max(1, int(density * delta.numel()))
    if count >= delta.numel():
        return delta
    chosen = delta.abs().flatten().topk(count).indices
    return torch.zeros_like(delta).flatten().index_put((chosen,), delta.flatten()[chosen]).view_as(delta)


def agreed(deltas: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of the changes whose sign is the one that weighs more, entry by entry (TIES).

    Where changes cancel, it is the sign that most entries of the tensor have, and negative where there is none, as in
    the authors' code.

    Args:
        deltas: (n, ...) changes, already trimmed.
        weights: (n,) weight of each.
    """
    shaped = weights.view(-1, *(1 for _ in deltas.shape[1:]))
    sign = (shaped * deltas).sum(0).sign()
    positive = torch.where(sign == 0, sign.sum(), sign) > 0
    joined = shaped * torch.where(positive, shaped * deltas > 0, shaped * deltas < 0)
    total = joined.abs().sum(0)  # a model of negative weight is led away from, and its sign stays
    return (joined * deltas).sum(0) / torch.where(total == 0, torch.ones_like(total), total)


@dataclass(kw_only=True)
class DeltaMerger(Merger):
    """The base of mergers of changes; a subclass gives `combine`.

    Args:
        weights: of each model's change; None for 1 each.
        scale: factor on what is added to the base; papers find it on held-out data.
        drop: share of each change that is dropped at random, in [0, 1); the rest is divided by 1 - drop (DARE).
        seed: of the entries that are dropped, which also depend on the tensor's name and the model's place.
    """

    needs_base: ClassVar[bool] = True
    weights: Weights | None = None
    scale: float = 1.0
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0

    def check_count(self, count: int) -> None:
        """Refuse weights of another number than the models.

        Args:
            count: models that are merged.

        Raises:
            HoneError: they do not fit.
        """
        super().check_count(count)
        check_weights(self.weights, count)

    @abstractmethod
    def combine(self, deltas: list[Tensor], weights: list[float]) -> Tensor:
        """Return what is added to the base, before it is scaled.

        Args:
            deltas: each model's change of one tensor.
            weights: their weights.
        """

    def merge(self, name: str, base: Tensor | None, tensors: list[Tensor]) -> Tensor:
        """Return the base with the changes.

        Args:
            name: name of the tensor.
            base: the base's tensor.
            tensors: the models' tensors.

        Raises:
            ValueError: there is no base.
        """
        if base is None:
            raise ValueError(f"merger '{self.name}' needs a base")
        start, *others = widened([base, *tensors])
        deltas = [
            dropped(other - start, self.drop, f"{self.seed}:{place}:{name}") for place, other in enumerate(others)
        ]
        found = self.combine(deltas, self.weights or [1.0] * len(deltas))
        return (start + self.scale * found).to(common_dtype(tensors))


@part(
    "merger",
    "task-arithmetic",
    papers=[
        ("Editing Models with Task Arithmetic", "arXiv:2212.04089"),
        (
            "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
            "arXiv:2311.03099",
        ),
    ],
    claim="Adding what several models have learned from one start makes a model that can do all their tasks; taking "
    "one away makes it forget.",
    deviations="The second paper is the source of `drop` (DARE), which is off by default.",
)
@dataclass(kw_only=True)
class TaskArithmetic(DeltaMerger):
    """Add up what the models have changed; a negative weight takes a change away.

    W = W_0 + scale sum_i w_i (W_i - W_0)
    """

    def combine(self, deltas: list[Tensor], weights: list[float]) -> Tensor:
        """Return the weighted sum.

        Args:
            deltas: each model's change.
            weights: their weights.
        """
        return torch.stack([weight * delta for weight, delta in zip(weights, deltas, strict=True)]).sum(0)


@part(
    "merger",
    "ties",
    papers=[
        ("TIES-Merging: Resolving Interference When Merging Models", "arXiv:2306.01708"),
        (
            "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
            "arXiv:2311.03099",
        ),
    ],
    claim="Models interfere through small changes and through signs that disagree; trimming the one and electing the "
    "other merges better than adding up.",
    deviations="The largest entries are found in each tensor, and so is the sign that most entries have; the paper's "
    "code finds them over a whole model, which would hold all of it in memory. With `drop` in place of trimming "
    "(density: 1) it is DARE with TIES.",
)
@dataclass(kw_only=True)
class Ties(DeltaMerger):
    """Trim, elect signs, and take the mean of what agrees.

    Of each change the largest `density` stays; the sign of an entry is that of the weighted sum, or where that is 0 the
    one that most entries of the tensor have; what is added is the weighted mean of the changes that have this sign,
    entry by entry.

    Args:
        density: share of each change that is kept, in (0, 1].
    """

    density: Annotated[float, Field(gt=0, le=1)] = 0.2

    def combine(self, deltas: list[Tensor], weights: list[float]) -> Tensor:
        """Return the disjoint mean.

        Args:
            deltas: each model's change.
            weights: their weights.
        """
        kept = torch.stack([trimmed(delta, self.density) for delta in deltas])
        return agreed(kept, torch.tensor(weights, dtype=kept.dtype))
