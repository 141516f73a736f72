"""The time-shift sampler: the network is told the noise level that a state seems to have, not the planned one."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.levels import spread
from hone.errors import ModelError
from hone.parts import part
from hone.solvers.base import Counted, Solver


def ddpm_levels() -> Tensor:
    """Return the 1000 ascending noise levels of DDPM, whose betas grow evenly from 0.0001 to 0.02."""
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    return ((1 - kept) / kept).sqrt()


@part(
    "solver", "time-shift",
    papers=[
        ("Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps", "arXiv:2305.15583"),
    ],
    claim="Telling the network the level whose variance a state has, near the planned one, draws better samples in few "
    "steps without training.",
    deviations="Around DDIM only. The whole step, not only the network's input, takes the shifted level. `with_data` "
    "adds the variance of the data, which the paper leaves out.",
)  # fmt: skip
@dataclass(kw_only=True)
class TimeShift(Solver):
    """DDIM that asks the network at the level t_s near the planned one whose variance is that of the state.

    t_s = argmin over |t - t'| <= window / 2 of |var(v) - (1 - abar_t)|,  v the state on the variance-preserving scale,
    var over its coordinates; t counts DDPM's 1000 levels, 1 - abar_t = s_t^2 / (1 + s_t^2). Then
    x = v sqrt(1 + s^2), D = D(x, s), x' = D + (s' / s) (x - D) with the shifted s, for each array its own.

    Args:
        steps: noise levels above 0.
        window: how many of DDPM's 1000 levels the choice is from.
        cutoff: number of the level, of 1000, below which nothing is shifted.
        with_data: whether the variance of the data, sigma_data^2 abar_t, is added to that of the noise.
    """

    steps: Annotated[int, Field(ge=1)] = 10
    window: Annotated[int, Field(ge=0, le=1000)] = 40
    cutoff: Annotated[int, Field(ge=0, le=1000)] = 400
    with_data: bool = False

    def solve(self, denoise: Counted, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return x at the last of the noise levels.

        Args:
            denoise: D(x, sigma).
            x: (B, *shape) at the first of them.
            sigmas: (n,) descending.
            generator: unused.

        Raises:
            ModelError: arrays of one number have no variance over their coordinates.
        """
        if x[0].numel() < 2:
            raise ModelError(
                "solvers: time-shift looks at the variance of an array's numbers, and arrays of shape "
                f"{tuple(x.shape[1:])} have one; take ddim"
            )
        grid = ddpm_levels()
        level = sigmas[0].expand(len(x))
        for now, then in itertools.pairwise(sigmas):
            seen = spread((1 + level**2).sqrt() / (1 + now**2).sqrt(), x).to(x) * x
            guess = denoise(seen, level)
            x = guess + spread(then / level, x).to(x) * (seen - guess)
            level = self.shifted(x, then, grid, denoise.model.sigma_data)
        return x

    def shifted(self, x: Tensor, planned: Tensor, grid: Tensor, sigma_data: float) -> Tensor:
        """Return the level (B,) that each array is taken to have.

        Args:
            x: (B, *shape) at the planned level.
            planned: noise level.
            grid: (1000,) ascending levels.
            sigma_data: standard deviation of the data.
        """
        place = int((grid - planned).abs().argmin())
        if place < self.cutoff or float(planned) <= 0:
            return planned.expand(len(x))
        near = grid[max(0, place - self.window // 2) : place + self.window // 2 + 1]
        expected = near**2 / (1 + near**2)
        if self.with_data:
            expected = expected + sigma_data**2 / (1 + near**2)
        found = x.flatten(1).cpu().double().var(dim=1) / (1 + planned**2)
        return near[(found[:, None] - expected).abs().argmin(dim=1)]
