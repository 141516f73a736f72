"""Distances between sets that need no network: energy, Wasserstein, kernels, moments, and coverage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hone.distances.base import Distance
from hone.errors import HoneError
from hone.parts import part


@part("distance", "energy", papers="original")
@dataclass(kw_only=True)
class Energy(Distance):
    """The energy distance: 0 where two distributions are equal, else above, in the data's own unit.

    sqrt(2 E|X - Y| - E|X - X'| - E|Y - Y'|), the means within a set without the pairs of a row with itself; a negative
    estimate counts as 0. Székely and Rizzo 2013.
    """

    def between(self, generated: Tensor, real: Tensor) -> float:
        """Return the distance between rows.

        Args:
            generated: (N, d) float64.
            real: (M, d) float64.
        """
        across = torch.cdist(generated, real).mean()
        squared = float(2 * across - _within(generated) - _within(real))
        return math.sqrt(max(0.0, squared)) if math.isfinite(squared) else math.nan  # a diverged model is not at 0


def _within(rows: Tensor) -> Tensor:
    """Return the mean distance of two different rows."""
    count = len(rows)
    return torch.cdist(rows, rows).sum() / (count * (count - 1))


@part("distance", "sliced-wasserstein", papers="original")
@dataclass(kw_only=True)
class SlicedWasserstein(Distance):
    """The sliced 2-Wasserstein distance: the root of the mean squared distance over random directions.

    sqrt(mean over u of W_2^2(X u, Y u)), each one-dimensional distance being that of sorted values at equal quantiles.

    Args:
        directions: random unit vectors, the same each time.
    """

    directions: Annotated[int, Field(ge=1)] = 256

    def between(self, generated: Tensor, real: Tensor) -> float:
        """Return the distance between rows.

        Args:
            generated: (N, d) float64.
            real: (M, d) float64.
        """
        generator = torch.Generator().manual_seed(0)
        ways = torch.randn(generated.shape[1], self.directions, generator=generator, dtype=torch.float64)
        ways = ways / ways.norm(dim=0)
        count = min(len(generated), len(real))
        left, right = (_quantiles(rows @ ways, count) for rows in (generated, real))
        return math.sqrt(float(((left - right) ** 2).mean()))


def _quantiles(rows: Tensor, count: int) -> Tensor:
    """Return the quantiles (i + 1/2) / `count` of each column, which are its sorted values where there are as many."""
    ordered = rows.sort(dim=0).values
    places = ((torch.arange(count, dtype=rows.dtype) + 0.5) * (len(rows) / count) - 0.5).clamp(0, len(rows) - 1)
    below = places.long()
    return torch.lerp(ordered[below], ordered[(below + 1).clamp(max=len(rows) - 1)], (places - below)[:, None])


@part("distance", "wasserstein", papers="original")
@dataclass(kw_only=True)
class Wasserstein(Distance):
    """The exact 2-Wasserstein distance between as many rows of each set: an assignment problem.

    sqrt(min over permutations of mean |X_i - Y_p(i)|^2), solved by scipy.

    Args:
        most: arrays of each set that are compared; the time grows with its cube.
    """

    most: Annotated[int, Field(ge=2)] = 500

    def between(self, generated: Tensor, real: Tensor) -> float:
        """Return the distance between rows.

        Args:
            generated: (N, d) float64.
            real: (M, d) float64.
        """
        from scipy.optimize import linear_sum_assignment

        count = min(len(generated), len(real))
        costs = (torch.cdist(generated[:count], real[:count]) ** 2).numpy()
        if not np.isfinite(costs).all():  # of a diverged model
            return math.nan
        rows, columns = linear_sum_assignment(costs)
        return math.sqrt(float(costs[rows, columns].mean()))


@part("distance", "mmd", papers="original")
@dataclass(kw_only=True)
class MMD(Distance):
    """The maximum mean discrepancy of rational quadratic kernels at several scales, without bias.

    MMD^2 = E k(X, X') + E k(Y, Y') - 2 E k(X, Y),  k = sum over a of (1 + |x - y|^2 / (2 a s^2))^-a

    with s the median distance within the real set; may be slightly below 0 where the sets agree. Gretton et al. 2012.

    Args:
        scales: the exponents a.
    """

    scales: list[float] | None = None

    def between(self, generated: Tensor, real: Tensor) -> float:
        """Return the distance between rows.

        Args:
            generated: (N, d) float64.
            real: (M, d) float64.
        """
        median = float(torch.cdist(real[:500], real[:500]).median())
        return float(mmd(generated, real, median, self.scales or [0.2, 0.5, 1.0, 2.0, 5.0]))


def mmd(left: Tensor, right: Tensor, scale: float, exponents: list[float]) -> Tensor:
    """Return the unbiased squared maximum mean discrepancy of rational quadratic kernels, which can be differentiated.

    Args:
        left: (N, d) rows, N at least 2.
        right: (M, d) rows, M at least 2.
        scale: unit of distance.
        exponents: the kernels' exponents, which are added up.
    """
    dtype = torch.float32 if left.device.type == "mps" else torch.float64  # which mps has not
    rows, others = left.to(dtype), right.to(dtype)

    def kernel(one: Tensor, two: Tensor) -> Tensor:
        # differences of all pairs would take N M d numbers; as a product, small distances are left to float64
        squared = one.square().sum(1)[:, None] + two.square().sum(1) - 2 * one @ two.T
        squared, found = squared.clamp(min=0) / scale**2, torch.zeros_like(squared)
        for exponent in exponents:
            found = found + (1 + squared / (2 * exponent)) ** -exponent
        return found

    own, other, across = kernel(rows, rows), kernel(others, others), kernel(rows, others)
    n, m = len(left), len(right)
    return (
        (own.sum() - own.diagonal().sum()) / (n * (n - 1))
        + (other.sum() - other.diagonal().sum()) / (m * (m - 1))
        - 2 * across.mean()
    ).to(left)


@dataclass(kw_only=True)
class Neighbourhood(Distance):
    """A share of rows that lie within a set: nearer to some row of it than that row's k-th neighbour there is.

    Args:
        neighbours: k.
    """

    higher_is_better: ClassVar[bool] = True
    neighbours: Annotated[int, Field(ge=1)] = 3

    def inside(self, rows: Tensor, others: Tensor) -> float:
        """Return the share.

        Args:
            rows: (N, d) float64.
            others: (M, d) float64, the set.
        """
        if len(others) <= self.neighbours:
            raise HoneError(
                f"precision and recall look at the {self.neighbours} nearest of a set, which needs more than "
                f"{self.neighbours} arrays; there are {len(others)}: raise eval_samples or lower `neighbours`"
            )
        radius = torch.cdist(others, others).kthvalue(self.neighbours + 1, dim=1).values  # the first is the row itself
        return float((torch.cdist(rows, others) <= radius).any(dim=1).double().mean())


@part(
    "distance", "precision",
    papers=[("Improved Precision and Recall Metric for Assessing Generative Models", "arXiv:1904.06991")],
    claim="Precision falls where samples leave the data, and not where they cover less of it.",
)  # fmt: skip
@dataclass(kw_only=True)
class Precision(Neighbourhood):
    """The share of generated rows that lie within the real set: nearer to some real row than its k-th neighbour is."""

    def between(self, generated: Tensor, real: Tensor) -> float:
        """Return the share.

        Args:
            generated: (N, d) float64.
            real: (M, d) float64.
        """
        return self.inside(generated, real)


@part(
    "distance", "recall",
    papers=[("Improved Precision and Recall Metric for Assessing Generative Models", "arXiv:1904.06991")],
    claim="Recall falls where samples cover less of the data.",
)  # fmt: skip
@dataclass(kw_only=True)
class Recall(Neighbourhood):
    """The share of real rows that lie within the generated set, in the same sense as for `precision`."""

    def between(self, generated: Tensor, real: Tensor) -> float:
        """Return the share.

        Args:
            generated: (N, d) float64.
            real: (M, d) float64.
        """
        return self.inside(real, generated)


@part(
    "distance", "frechet",
    papers=[("GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", "arXiv:1706.08500")],
    claim="The Fréchet distance grows with every disturbance of the samples.",
)  # fmt: skip
@dataclass(kw_only=True)
class Frechet(Distance):
    """The Fréchet distance of the sets' means and covariances, squared as in the FID.

    |m_x - m_y|^2 + trace(C_x + C_y - 2 (C_x C_y)^(1/2))
    """

    def between(self, generated: Tensor, real: Tensor) -> float:
        """Return the distance between rows.

        Args:
            generated: (N, d) float64.
            real: (M, d) float64.
        """
        return frechet(generated, real)


def frechet(left: Tensor, right: Tensor) -> float:
    """Return the squared Fréchet distance of two sets' means and covariances.

    The trace of (C_x C_y)^(1/2) is the sum of the roots of the eigenvalues of C_x^(1/2) C_y C_x^(1/2), which is
    symmetric. Rows that are not finite are at no distance that is a number.

    Args:
        left: (N, d) float64 rows.
        right: (M, d) float64 rows.
    """
    means = left.mean(0) - right.mean(0)
    first, second = (torch.atleast_2d(torch.cov(rows.T)) for rows in (left, right))
    if not bool(first.isfinite().all() and second.isfinite().all()):  # of a diverged model
        return math.nan
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float(means.square().sum() + first.trace() + second.trace() - 2 * mixed)
