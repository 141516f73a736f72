"""What every distance is: a number for two sets of arrays, 0 where they are the same distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor


@dataclass(kw_only=True)
class Distance:
    """A number for a generated and a real set.

    Args:
        most: arrays of each set that are compared, the first ones.
    """

    higher_is_better: ClassVar[bool] = False
    most: Annotated[int, Field(ge=2)] = 2000

    def __call__(self, generated: Tensor, real: Tensor) -> float:
        """Return the distance of (N, *shape) generated from (M, *shape) real arrays."""
        left, right = (rows[: self.most].flatten(1).cpu().double() for rows in (generated, real))  # MPS has no float64
        return self.between(left, right)

    def between(self, generated: Tensor, real: Tensor) -> float:
        """Return the distance between rows.

        Args:
            generated: (N, d) float64.
            real: (M, d) float64.
        """
        raise NotImplementedError
