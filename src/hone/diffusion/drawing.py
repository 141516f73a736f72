"""Drawing many arrays with a solver, a bounded number at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hone.precision import wide_dtype

DRAWN_AT_ONCE = 1024


@contextmanager
def same_noise(seed: int) -> Iterator[None]:
    """Draw the same random numbers within, whatever came before, and leave the generators as they were.

    Args:
        seed: of the numbers.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def solve(
    model: Any, solver: Any, noise: Tensor, classes: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, int]:
    """Return what a solver makes of noise (N, *shape), and how often the network ran for each array.

    Args:
        model: the denoiser.
        solver: makes arrays of noise.
        noise: (N, *shape) of unit variance.
        classes: (N,) class of each array, -1 for none; None for none at all.
        generator: draws what a stochastic solver adds on the way.
    """
    made, calls = [], 0
    for begin in range(0, len(noise), DRAWN_AT_ONCE):
        part = slice(begin, begin + DRAWN_AT_ONCE)
        found, calls = solver.sample(model, noise[part], None if classes is None else classes[part], generator)
        made.append(found)
    return torch.cat(made), calls


def draw(model: Any, solver: Any, count: int, labels: Tensor | None = None, seed: int = 0) -> tuple[Tensor, int]:
    """Return arrays that a solver draws, and how often the network ran for each.

    Args:
        model: the denoiser.
        solver: draws them.
        count: how many.
        labels: classes, of which each array gets one at random, -1 for none; None for none at all. Were they given in
            turn, as many of each as in a held-out set, the distance from that set would come out too small.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters())
    noise = torch.randn(count, *model.shape, generator=generator).to(parameter.device, wide_dtype(parameter))
    classes = None
    if labels is not None and model.classes:
        classes = labels[torch.randint(len(labels), (count,), generator=generator)].to(parameter.device)
    return solve(model, solver, noise, classes, generator)
