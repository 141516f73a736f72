"""Consistency distillation in segments: a model that is consistent between neighbouring levels of a short sampler."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from hone.diffusion.levels import karras, spread
from hone.objectives.consistency import ConsistencyDistillation, Count, even_places
from hone.objectives.progressive import implied, step
from hone.parts import part
from hone.solvers.base import levels


@part(
    "objective", "multistep-cd",
    papers=[("Multistep Consistency Models", "arXiv:2403.06807")],
    claim="A model that is consistent within each of a few segments of the noise levels is easier to train than a "
    "consistency model, and with one deterministic step for each segment draws better samples.",
    deviations="Heun's step by the teacher instead of the paper's aDDIM, which gives DDIM's step back the variance "
    "that it loses. The target is a running mean, as in consistency distillation; with decay 0 it is the model itself, "
    "as in the paper. The grid does not grow finer in training.",
)  # fmt: skip
@dataclass(kw_only=True)
class MultistepDistillation(ConsistencyDistillation):
    """Consistency distillation within segments; a trajectory ends where its segment does, and DDIM steps lead there.

    d(f(x_t, t), D),  D = (z - (s / t) x_t) / (1 - s / t),  z = D' + (s / r) (x_r - D'),  D' = f_mean(x_r, r)

    s is the lower end of the segment that holds t > r >= s, and z = x_r where r = s: D is what leads from x_t to z in
    one step of first order. With one segment, s = 0, it is consistency distillation. The solver `ddim` with the same
    steps and schedule takes one step for each segment.

    Args:
        steps: segments, and evaluations of the sampler that this is for.
        schedule: how segments are spaced, as solvers have it: even in TrigFlow's time, which is the cosine schedule,
            or in that of flow matching.
        levels: of the grid, shared evenly among the segments; spaced in each as for the karras schedule.
    """

    steps: Count = 2
    schedule: Literal["trig", "flow"] = "trig"
    levels: Count = 18

    def ends(self, model: Any) -> Tensor:
        """Return the `steps` + 1 ascending ends of the segments, float64, from 0 to sigma_max.

        Args:
            model: the denoiser.
        """
        return levels(
            self.schedule, self.steps, model.sigma_min, model.sigma_max, sigma_data=model.sigma_data
        ).flip(0)  # fmt: skip

    def grid(self, model: Any, count: int) -> Tensor:
        """Return ascending noise levels from sigma_min to sigma_max, about `count`, the ends of segments among them.

        Args:
            model: the denoiser.
            count: how many.
        """
        ends = self.ends(model)
        ends[0] = model.sigma_min
        each = max(2, 1 + round((count - 1) / self.steps))
        grid = [ends[:1]]
        for low, high in pairwise(ends):
            inside = karras(each, float(low), float(high), self.rho)[1:-2].flip(0)
            grid += [inside, high[None]]  # the end itself: one that a rounding takes beyond it has no way to go
        return torch.cat(grid)

    def pair(self, model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return (t, r, weight), each (B,), with t > r.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        grid = self.grid(model, self.levels)
        later, sooner = self.neighbours(grid, even_places(self.uniform(batch, "pair").cpu(), len(grid)))
        return later, sooner, torch.ones_like(later)

    def seen(self, model: Any, noisy: Tensor, later: Tensor, nearer: Tensor, sooner: Tensor, aim: Tensor) -> Tensor:
        """Return what leads from x_t to the end of its segment where the target leads from x_r (B, *shape).

        Args:
            model: the denoiser.
            noisy: (B, *shape) x_t.
            later: (B,) t.
            nearer: (B, *shape) x_r.
            sooner: (B,) r.
            aim: (B, *shape) f_mean(x_r, r).
        """
        ends = self.ends(model).to(later)
        end = ends[torch.searchsorted(ends, later) - 1]
        there = step(nearer, aim, sooner, end)
        return implied(noisy, torch.where(spread(sooner <= end, there), nearer, there), later, end)
