"""Means of weights: model soups, and the way along the sphere between two models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hone.errors import HoneError
from hone.mergers.base import Merger, Weights, check_weights, common_dtype, widened
from hone.parts import part

PARALLEL = 0.9995  # from this cosine on, two directions count as one


@part(
    "merger",
    "linear",
    papers=[
        (
            "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing "
            "inference time",
            "arXiv:2203.05482",
        )
    ],
    claim="The mean of the weights of models fine-tuned from one start with different settings is more accurate than "
    "the best of them.",
    deviations="The uniform and the weighted soup; the greedy soup, which tries models on held-out data one by one, is "
    "left to the user.",
)
@dataclass(kw_only=True)
class Linear(Merger):
    """The weighted mean of the models.

    W = sum_i w_i W_i / sum_i w_i

    Args:
        weights: one for each model, which need not sum to 1; None for equal ones.
    """

    weights: Weights | None = None

    def check_count(self, count: int) -> None:
        """Refuse weights of another number than the models, or that cancel.

        Args:
            count: models that are merged.

        Raises:
            HoneError: they do not fit.
        """
        super().check_count(count)
        check_weights(self.weights, count)
        if self.weights is not None and abs(sum(self.weights)) < 1e-8:
            raise HoneError("merger.weights: they sum to 0, so that there is no mean")

    def merge(self, name: str, base: Tensor | None, tensors: list[Tensor]) -> Tensor:
        """Return the mean.

        Args:
            name: not used.
            base: not used.
            tensors: the models' tensors.
        """
        weights = self.weights or [1.0] * len(tensors)
        first, *others = widened(tensors)
        result = first.clone()  # equal models give their very bits
        for weight, other in zip(weights[1:], others, strict=True):
            result += weight / sum(weights) * (other - first)
        return result.to(common_dtype(tensors))


def slerp(first: Tensor, second: Tensor, t: float) -> Tensor:
    """Return the point at t on the arc between two tensors, by the angle between them as vectors.

    [sin((1 - t) a) W_1 + sin(t a) W_2] / sin a, a the angle; the mean (1 - t) W_1 + t W_2 where they are parallel

    Args:
        first: W_1, any shape.
        second: W_2, of the same shape.
        t: in [0, 1].
    """
    norms = first.norm() * second.norm()
    cosine = float((first * second).sum() / norms) if norms > 0 else 1.0
    if abs(cosine) > PARALLEL:
        return first + t * (second - first)
    angle = torch.tensor(cosine, dtype=torch.float64).acos()
    return float(((1 - t) * angle).sin() / angle.sin()) * first + float((t * angle).sin() / angle.sin()) * second


@part("merger", "slerp", papers="original")
@dataclass(kw_only=True)
class Slerp(Merger):
    """Spherical linear interpolation between two models, tensor by tensor.

    W = [sin((1 - t) a) W_1 + sin(t a) W_2] / sin a, a the angle between W_1 and W_2 as vectors

    The length of the tensors is kept, where a mean shortens them. K. Shoemake described it for rotations (1985).

    Args:
        t: 0 is the first model, 1 the second.
    """

    t: Annotated[float, Field(ge=0, le=1)] = 0.5

    def check_count(self, count: int) -> None:
        """Refuse anything but two models.

        Args:
            count: models that are merged.

        Raises:
            HoneError: there are more or fewer.
        """
        if count != 2:
            raise HoneError(f"merger: slerp goes from one model to another and takes two of them, got {count}")

    def merge(self, name: str, base: Tensor | None, tensors: list[Tensor]) -> Tensor:
        """Return the point on the arc.

        Args:
            name: not used.
            base: not used.
            tensors: the two models' tensors.
        """
        first, second = widened(tensors)
        return slerp(first, second, self.t).to(common_dtype(tensors))
