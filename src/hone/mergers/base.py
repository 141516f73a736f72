"""What every merger is: a pure function of one tensor as several models have it, so that merging runs through files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hone.errors import HoneError
from hone.precision import wide

Weights = Annotated[list[float], Field(min_length=1)]


@dataclass(kw_only=True)
class Merger(ABC):
    """A way to merge; `merge` sees one tensor at a time and knows nothing but its name."""

    name: ClassVar[str]
    needs_base: ClassVar[bool] = False  # whether the models are taken as changes of a base

    def check_count(self, count: int) -> None:
        """Refuse a number of models that the options do not fit.

        Args:
            count: models that are merged.

        Raises:
            HoneError: there are none to merge, or the options do not fit so many.
        """
        if count < 1:
            raise HoneError("there is no model to merge")

    @abstractmethod
    def merge(self, name: str, base: Tensor | None, tensors: list[Tensor]) -> Tensor:
        """Return the merged tensor, in the models' own type, the widest where they differ.

        Args:
            name: name of the tensor, the same in every model.
            base: the base's tensor; None where there is no base.
            tensors: the models' tensors in their order, of one shape.
        """


def check_weights(weights: Sequence[float] | None, count: int) -> None:
    """Refuse a list of weights of another length than there are models.

    Args:
        weights: one for each model, None for equal ones.
        count: models that are merged.

    Raises:
        HoneError: the lengths differ.
    """
    if weights is not None and len(weights) != count:
        raise HoneError(f"merger.weights: expected {count} numbers, one for each model, got {len(weights)}")


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the widest type of some tensors."""
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def widened(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors in the precision in which they are merged: at least float32."""
    return [wide(tensor) for tensor in tensors]
