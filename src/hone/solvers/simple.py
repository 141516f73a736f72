"""The sampler of simple and fast distillation: a few Euler steps, the first of them free."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.levels import karras
from hone.parts import part
from hone.solvers.base import Counted, Solver, step_ddim


def timestamps(steps: int, lowest: float, highest: float, rho: float) -> Tensor:
    """Return `steps` + 1 float64 noise levels of a polynomial schedule, with its smallest level at the end.

    Args:
        steps: between them.
        lowest: the last.
        highest: the first.
        rho: how much they crowd near the smallest.
    """
    return karras(steps + 1, lowest, highest, rho)[:-1]


def analytic(x: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """Return x after a step along x / sqrt(1 + s^2), which is nearly the flow where there is only noise.

    Args:
        x: (B, *shape) at level `now`.
        now: its noise level.
        then: the next one.
    """
    return x + (then - now) * x / (1 + now**2).sqrt()


@part(
    "solver", "sfd",
    papers=[("Simple and Fast Distillation of Diffusion Models", "arXiv:2409.19681")],
    claim="The first step of a sampler needs no network.",
)  # fmt: skip
@dataclass(kw_only=True)
class FewEuler(Solver):
    """Euler steps at the levels that the objectives sfd and sfd-v train, ending at the smallest level.

    Args:
        steps: in all, the analytic one among them.
        analytic: whether the first step is x / sqrt(1 + s^2) and takes no evaluation.
        lowest: noise level at which samples end.
    """

    goes_part_way: ClassVar[bool] = False  # its first step is a special one
    steps: Annotated[int, Field(ge=1)] = 3
    analytic: bool = True
    lowest: Annotated[float, Field(gt=0)] = 0.006

    def sigmas(self, model: Any) -> Tensor:
        """Return the (steps + 1) float64 noise levels for a denoiser.

        Args:
            model: has `sigma_max`.
        """
        return timestamps(self.steps, self.lowest, model.sigma_max, self.rho)

    def solve(self, denoise: Counted, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return x at the last of the noise levels.

        Args:
            denoise: D(x, sigma).
            x: (B, *shape) at the first of them.
            sigmas: (n,) descending.
            generator: unused.
        """
        if hasattr(denoise.model, "for_steps"):
            denoise.model = denoise.model.for_steps(self.steps)
        for number, (now, then) in enumerate(itertools.pairwise(sigmas)):
            if self.analytic and number == 0:
                x = analytic(x, now.to(x), then.to(x))
            else:
                x = step_ddim(x, denoise(x, now), now.to(x), then.to(x))
        return x
