"""The inputs of layers: which layers share one, its principal components, and ranks given out by them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hone.precision import wide

EXACT = 512  # widest matrix whose Gram matrix is decomposed: 0.06 s on a core for 1024 rows, a sketch takes 0.01 s


class SharedInputs:
    """Finds the layers that read the very input of another, such as queries, keys and values: one look serves all."""

    def __init__(self) -> None:
        """Know of no layer yet."""
        self.leaders: dict[str, str] = {}
        self._last: tuple[str, Tensor] | None = None

    def leader(self, name: str, rows: Tensor) -> str:
        """Return the layer that is looked at in a layer's place: itself, or the one before it that had this input.

        Args:
            name: a layer that runs.
            rows: (N, D) its input; compared the first time that the layer runs.
        """
        if name not in self.leaders:
            same = self._last is not None and torch.equal(self._last[1], rows)
            self.leaders[name] = self._last[0] if same and self._last is not None else name
            if not same:
                self._last = (name, rows)
        return self.leaders[name]


def leading(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the largest singular values of a matrix and its right singular vectors.

    Up to `EXACT` columns they come from the eigenvectors of the D x D Gram matrix in float64, which is cheaper than a
    singular value decomposition of the tall matrix and agrees with it to float32's precision; from wider ones by four
    rounds of subspace iteration on a random sketch of twice the vectors.

    Args:
        rows: (N, D) the matrix.
        count: how many are wanted, at most D.

    Returns:
        Values (count,) and vectors (count, D), orthonormal rows whose largest entry is positive; fewer when a wide
        matrix has fewer rows.
    """
    width = rows.shape[1]
    if width <= EXACT:
        wide = rows.double()
        squares, basis = torch.linalg.eigh(wide.t() @ wide)
        values, vectors = squares.flip(0)[:count].clamp_min(0).sqrt(), basis.t().flip(0)[:count]
    else:
        numbers = torch.randn(width, min(2 * count, *rows.shape), generator=torch.Generator().manual_seed(0))
        sketch = numbers.to(rows)
        for _ in range(4):
            sketch = torch.linalg.qr(rows.t() @ torch.linalg.qr(rows @ sketch).Q).Q
        _, values, inner = torch.linalg.svd(rows @ sketch, full_matrices=False)
        values, vectors = values[:count], inner[:count] @ sketch.t()
    signs = vectors.gather(1, vectors.abs().argmax(1, keepdim=True)).sign()
    return values.to(rows.dtype), (vectors * signs).to(rows.dtype)


class Spectrum:
    """Principal components of rows that come in batches, by incremental singular value decomposition.

    With n rows of mean m seen before and a batch X of b rows of mean c, the components are the right singular vectors
    of [S V^T; X - c; sqrt(n b / (n + b)) (m - c)], so that memory stays at `count` vectors.

    Args:
        count: how many components are kept.
    """

    def __init__(self, count: int) -> None:
        """Have seen nothing."""
        self.count, self.seen = count, 0
        self.mean = self.values = self.vectors = self.spread = torch.zeros(())
        self.alike = torch.zeros(count)  # |cosine| of each component with what it was one batch before

    def update(self, rows: Tensor) -> None:
        """Take in a batch.

        Args:
            rows: (N, D).
        """
        rows = wide(rows)
        mean, before = rows.mean(0), self.vectors
        stacked = rows - mean
        if self.seen:
            total = self.seen + len(rows)
            shift = math.sqrt(self.seen * len(rows) / total) * (self.mean - mean)
            self.spread = self.spread + stacked.square().sum() + shift.square().sum()
            mean = self.mean + (mean - self.mean) * (len(rows) / total)
            stacked = torch.cat([self.values[:, None] * self.vectors, stacked, shift[None]])
        else:
            self.spread = stacked.square().sum()
        self.values, self.vectors = leading(stacked, self.count)
        self.mean, self.seen = mean, self.seen + len(rows)
        if before.shape == self.vectors.shape:
            self.alike = (before * self.vectors).sum(1).abs()

    def ratios(self) -> Tensor:
        """Return the share of the variance that each component explains."""
        return self.values.square() / self.spread.clamp_min(torch.finfo(self.spread.dtype).tiny)


def share_ranks(ratios: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Give each layer as many ranks as it has components among the largest ratios of all layers.

    Args:
        ratios: by layer, the share of its input's variance that each component explains, descending.
        budget: ranks of all layers together.

    Returns:
        Ranks by layer, some of them 0; of equal ratios the earlier layer's count first.
    """
    owners = [name for name, values in ratios.items() for _ in values]
    order = torch.cat([values.cpu().double() for values in ratios.values()]).argsort(descending=True, stable=True)
    ranks = dict.fromkeys(ratios, 0)
    for index in order[:budget].tolist():
        ranks[owners[index]] += 1
    return ranks


class Survey:
    """Watches the inputs of layers until the components that ranks are given to have converged."""

    def __init__(self, own: dict[str, int], most: dict[str, int], widths: dict[str, int], tau: float) -> None:
        """Have seen nothing.

        Args:
            own: rank of each layer before ranks are shared out; their sum is the budget.
            most: the most ranks that each layer may get.
            widths: width of each layer's input.
            tau: cosine with its predecessor from which a component counts as converged.
        """
        self.own, self.most, self.widths, self.tau = own, most, widths, tau
        self.inputs = SharedInputs()
        self.spectra: dict[str, Spectrum] = {}
        self.settled: set[str] = set()
        self.ranks: dict[str, int] = {}

    def visit(self, name: str, rows: Tensor) -> None:
        """Take in the input of a layer unless another has the same, or its components have converged.

        Args:
            name: the layer.
            rows: (N, D) its input.
        """
        if self.inputs.leader(name, rows) != name or name in self.settled:
            return
        if name not in self.spectra:
            # As many as any layer of this input may want; which ones share it shows in the course of the first batch.
            count = max(most for n, most in self.most.items() if self.widths[n] == self.widths[name])
            self.spectra[name] = Spectrum(count)
        self.spectra[name].update(rows)

    def conclude(self) -> bool:
        """Share the ranks out after a batch; return whether all components that got one have converged."""
        seen = [name for name in self.own if name in self.inputs.leaders]
        of = {name: self.spectra[self.inputs.leaders[name]] for name in seen}
        ratios = {name: of[name].ratios()[: self.most[name]] for name in seen}
        self.ranks = share_ranks(ratios, sum(self.own[name] for name in seen))
        wanted = dict.fromkeys(self.spectra, 0)
        for name in seen:
            leader = self.inputs.leaders[name]
            wanted[leader] = max(wanted[leader], self.ranks[name])
        self.settled = {n for n, rank in wanted.items() if bool((self.spectra[n].alike[:rank] >= self.tau).all())}
        return len(self.settled) == len(self.spectra)

    def rounds(self, batches: Any, most: int) -> Iterator[Any]:
        """Yield batches to run until all has converged.

        Args:
            batches: the data.
            most: the most batches.
        """
        for batch in itertools.islice(batches, most):
            yield batch
            if self.conclude():
                return

    def components(self, name: str) -> Tensor:
        """Return the components that a layer starts from, (rank, D)."""
        return self.spectra[self.inputs.leaders[name]].vectors[: self.ranks[name]]
