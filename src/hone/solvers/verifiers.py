"""Scores of single arrays, by which a search among samples chooses; higher is better."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from hone.errors import HoneError

Verifier = Callable[[Tensor, Tensor | None], Tensor]  # ((B, *shape), (B,) classes or None) -> (B,)
Kind = Literal["density", "classifier", "nearest"]


def make_verifier(kind: Kind, source: Any) -> Verifier:
    """Return a verifier.

    density: the log density of the known distribution, of the class where there is one. classifier: the log probability
    of the class, by Gaussian classes of equal covariance that are fitted to the training arrays. nearest: minus the
    distance to the nearest training array of the class.

    Args:
        kind: which.
        source: the arrays that the denoiser learned from.

    Raises:
        HoneError: the data has no known density, or no classes.
    """
    judged = _judge(kind, source)

    def verdict(x: Tensor, labels: Tensor | None) -> Tensor:
        scores = judged(x.cpu().double(), None if labels is None else labels.cpu())  # MPS has no float64
        return scores.to(x.device, torch.float32 if x.device.type == "mps" else scores.dtype)

    return verdict


def _judge(kind: Kind, source: Any) -> Verifier:
    """Return a verifier of float64 arrays on the CPU."""
    if kind == "density":
        if (mixture := source.truth()) is None:
            raise HoneError(f"noise-search.verifier: nobody knows the density of {source.describe()}; take nearest")
        return lambda x, labels: mixture.to(x).log_density(x, 0.0, labels)
    known = source.collection("train")
    rows, classes = known.arrays.flatten(1).double(), known.labels
    if kind == "nearest":
        return lambda x, labels: -nearest(x.flatten(1), labels, rows, classes)
    if not source.classes:
        raise HoneError("noise-search.verifier: a classifier needs classes; set data.conditional: true")
    judge = linear_classifier(rows, classes)

    def verdict(x: Tensor, labels: Tensor | None) -> Tensor:
        logs = judge(x.flatten(1))
        best = logs.max(1).values
        if labels is None:
            return best
        return torch.where(labels < 0, best, logs.gather(1, labels.clamp(min=0)[:, None])[:, 0])  # -1 is any class

    return verdict


def nearest(x: Tensor, labels: Tensor | None, rows: Tensor, classes: Tensor) -> Tensor:
    """Return the distance (B,) to the nearest row, of the same class where there are classes.

    Args:
        x: (B, d).
        labels: (B,) classes, -1 for none; None for none at all.
        rows: (N, d).
        classes: (N,) of the rows.
    """
    apart = torch.cdist(x, rows)
    if labels is not None:
        other = (labels[:, None] != classes) & (labels[:, None] >= 0)
        apart = apart.masked_fill(other, math.inf)
    return apart.min(dim=1).values


def linear_classifier(rows: Tensor, classes: Tensor) -> Callable[[Tensor], Tensor]:
    """Return what gives the log probabilities (B, K) of classes: Gaussians of one covariance (linear discriminants).

    log p(k | x) = log softmax_k(x C^-1 m_k - m_k C^-1 m_k / 2 + log share_k)

    Args:
        rows: (N, d) float64.
        classes: (N,).
    """
    count = int(classes.max()) + 1
    hot = torch.nn.functional.one_hot(classes, count).to(rows)
    sizes = hot.sum(0)
    means = (hot.T @ rows) / sizes.clamp(min=1)[:, None]
    inner = rows - means[classes]
    spread = inner.T @ inner / len(rows)
    ridge = 1e-3 * spread.diagonal().mean() * torch.eye(len(spread), dtype=rows.dtype)  # pixels may never change
    weights = torch.linalg.solve(spread + ridge, means.T)
    shift = (sizes / len(rows)).log() - 0.5 * (means.T * weights).sum(0)
    return lambda x: (x @ weights + shift).log_softmax(1)
