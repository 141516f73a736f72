"""Drawing many arrays with a solver, a bounded number at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hone.diffusion.views import check_guidance
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

    The evaluations of a solver that takes more for some arrays than for others are their mean, rounded up.

    Args:
        model: the denoiser.
        solver: makes arrays of noise.
        noise: (N, *shape) of unit variance.
        classes: (N,) class of each array, -1 for none; None for none at all.
        generator: draws what a stochastic solver adds on the way.

    Raises:
        ModelError: the solver guides, and no array has a class.
    """
    check_guidance(guidance_of(solver), classes is not None and bool((classes >= 0).any()))
    made, evaluations = [], 0
    for begin in range(0, len(noise), DRAWN_AT_ONCE):
        part = slice(begin, begin + DRAWN_AT_ONCE)
        found, calls = solver.sample(model, noise[part], None if classes is None else classes[part], generator)
        made.append(found)
        evaluations += calls * len(found)
    return torch.cat(made), -(-evaluations // len(noise))


def guidance_of(solver: Any) -> float:
    """Return the guidance that a solver draws with, or the one inside it.

    Args:
        solver: makes arrays of noise.
    """
    while (inside := getattr(solver, "inner", None)) is not None:
        solver = inside
    return float(getattr(solver, "guidance", 1.0))


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
