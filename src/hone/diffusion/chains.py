"""Sampling as a chain of Gaussian steps, x' = a D(x, s) + b x + c z: what reward tuning differentiates or weighs.

    denoising     a = 1 - k / s, b = k / s, c = u,  u = eta (s' / s) sqrt(s^2 - s'^2),  k = sqrt(s'^2 - u^2)
    consistency   a = 1, b = 0, c = sqrt(s'^2 - s_min^2)

The last step is a = 1, b = 0, and c is 0 or a little noise that is asked for. The first is the sampler `ddim` (DDPM at
eta 1), the second `multistep`, at the same noise levels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hone.diffusion.levels import spread
from hone.solvers.base import Schedule
from hone.solvers.few import Multistep
from hone.solvers.ode import DDIM


class Link(NamedTuple):
    """One step of a chain.

    Args:
        sigma: noise level of x.
        ours: a, weight of the denoised array.
        stays: b, weight of x.
        noise: c, standard deviation of what is drawn.
    """

    sigma: float
    ours: float
    stays: float
    noise: float


def denoising_chain(
    model: Any, steps: int, *, eta: float = 0.0, schedule: Schedule = "karras", last: float = 0.0
) -> list[Link]:
    """Return the chain of the sampler `ddim`.

    Args:
        model: the denoiser.
        steps: evaluations.
        eta: share of the ancestral noise; 1 is DDPM.
        schedule: how the noise levels are spaced.
        last: standard deviation of noise that the last step adds.
    """
    sigmas = DDIM(steps=steps, schedule=schedule).sigmas(model).tolist()
    links = []
    for now, then in itertools.pairwise(sigmas):
        fresh = eta * then / now * math.sqrt(max(0.0, now**2 - then**2))
        kept = math.sqrt(max(0.0, then**2 - fresh**2)) / now
        links.append(Link(now, 1 - kept, kept, fresh))
    return [*links[:-1], links[-1]._replace(noise=last)]


def consistency_chain(model: Any, steps: int, *, last: float = 0.0) -> list[Link]:
    """Return the chain of the sampler `multistep`.

    Args:
        model: the denoiser.
        steps: evaluations.
        last: standard deviation of noise that the last step adds.
    """
    sigmas = Multistep(steps=steps).sigmas(model).tolist()
    added = [math.sqrt(max(0.0, then**2 - model.sigma_min**2)) for then in sigmas[1:-1]]
    return [Link(now, 1.0, 0.0, noise) for now, noise in zip(sigmas, [*added, last], strict=False)]


def follow(
    model: Any, links: Sequence[Link], start: Tensor, noise: Callable[[int], Tensor], labels: Tensor | None,
    *, guidance: float = 1.0, free: int = 0,
) -> list[Tensor]:  # fmt: skip
    """Return the states along a chain, n + 1 of (B, *shape).

    Args:
        model: the denoiser.
        links: n steps.
        start: (B, *shape) noise of unit variance.
        noise: returns what step i draws, (B, *shape).
        labels: (B,) classes, -1 for none; None for none at all.
        guidance: of classifier-free guidance.
        free: first steps that no gradient goes through.
    """
    states = [links[0].sigma * start]
    for number, link in enumerate(links):
        x = states[-1]
        with torch.set_grad_enabled(torch.is_grad_enabled() and number >= free):
            denoised = model.guided(x, torch.tensor(link.sigma, dtype=torch.float64).to(x), labels, guidance)
            moved = link.ours * denoised + link.stays * x
        states.append(moved + link.noise * noise(number) if link.noise else moved)
    return states


def means(model: Any, links: Sequence[Link], states: Tensor, labels: Tensor | None, *, guidance: float = 1.0) -> Tensor:
    """Return where each step of given chains would lead without noise, (n, B, *shape), in one pass of n B arrays.

    Args:
        model: the denoiser.
        links: n steps.
        states: (n, B, *shape) that the steps begin at.
        labels: (B,) classes, -1 for none; None for none at all.
        guidance: of classifier-free guidance.
    """
    count = states.shape[1]
    sigma, ours, stays = (
        torch.tensor([link[i] for link in links], dtype=torch.float64).to(states).repeat_interleave(count)
        for i in range(3)
    )
    flat = states.flatten(0, 1)
    told = None if labels is None else labels.repeat(len(links))
    denoised = model.guided(flat, sigma, told, guidance)
    return (spread(ours, flat) * denoised + spread(stays, flat) * flat).unflatten(0, (len(links), count))


def log_densities(links: Sequence[Link], reached: Tensor, expected: Tensor) -> Tensor:
    """Return log N(reached; expected, c^2 I) of each step (n, B), without what depends on c alone.

    A step without noise is no action that could be more or less likely: its log-density is 0.

    Args:
        links: n steps.
        reached: (n, B, *shape) where the steps led.
        expected: (n, B, *shape) where they would have led without noise.
    """
    scale = torch.tensor([2 * link.noise**2 for link in links], dtype=torch.float64).to(expected)[:, None]
    acts = scale > 0
    found = -(reached - expected).square().flatten(2).sum(2) / torch.where(acts, scale, torch.ones_like(scale))
    return torch.where(acts, found, torch.zeros_like(found))
