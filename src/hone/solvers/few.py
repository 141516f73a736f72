"""Samplers of few-step generators: consistency models, by denoising and adding noise again in turn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hone.parts import part
from hone.solvers.base import Counted, Solver, levels, noise_like


@part(
    "solver",
    "multistep",
    papers=[("Consistency Models", "arXiv:2303.01469")],
    claim="A consistency model draws better samples when it denoises once more from a lower level of noise.",
)
@dataclass(kw_only=True)
class Multistep(Solver):
    """Denoise all at once, then add noise of the next level and denoise again: one evaluation for each level.

    y = D(x, s_1);  then x = y + sqrt(s_i^2 - s_min^2) z, y = D(x, s_i) for each further level

    Args:
        steps: levels; 1 draws in one step.
        between: levels after the first, descending; None spaces them by the schedule.
    """

    goes_part_way: ClassVar[bool] = False
    steps: Annotated[int, Field(ge=1)] = 1
    between: list[Annotated[float, Field(gt=0)]] | None = None

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the levels."""
        if self.between is not None and len(self.between) != self.steps - 1:
            yield "between", f"expected {self.steps - 1} levels after the first for {self.steps} steps"

    def sigmas(self, model: Any) -> Tensor:
        """Return the noise levels, the last one 0.

        Args:
            model: has `sigma_min`, `sigma_max` and `sigma_data`.
        """
        if self.between is None:
            # One level more is spaced and the smallest left out: sigma_max and 2.5 for 2 steps from 80 to 0.002.
            spaced = levels(self.schedule, self.steps + 1, model.sigma_min, model.sigma_max, self.rho, model.sigma_data)
            return torch.cat([spaced[: self.steps], torch.zeros(1, dtype=torch.float64)])
        return torch.tensor([model.sigma_max, *self.between, 0.0], dtype=torch.float64)

    def solve(self, denoise: Counted, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the last denoised arrays.

        Args:
            denoise: D(x, sigma).
            x: (B, *shape) at the first level.
            sigmas: (n,) descending.
            generator: draws noise between the steps.
        """
        lowest = float(getattr(denoise.model, "sigma_min", 0.0))
        clean = denoise(x, sigmas[0])
        for level in sigmas[1:-1]:
            added = (level**2 - lowest**2).clamp(min=0).sqrt().to(x)
            clean = denoise(clean + added * noise_like(x, generator), level)
        return clean
