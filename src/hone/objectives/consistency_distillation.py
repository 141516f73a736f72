"""Consistency distillation: the earlier point of a trajectory is where a teacher's step leads."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.levels import karras, spread
from hone.objectives.arrays import Share
from hone.objectives.consistency import Consistency, Count, Follows, even_places
from hone.objectives.progressive import implied, step
from hone.objectives.teachers import Mean, load_teacher
from hone.parts import part
from hone.solvers.base import levels


@dataclass(kw_only=True)
class Distillation(Follows, Consistency):
    """Consistency distillation: x_r is where a teacher's step from x_t leads.

    Args:
        teacher: a run of a denoiser, or "stage:N".
        levels: of the grid.
        decay: of the running mean that is the target.
        guidance: of the teacher, by classifier-free guidance.
    """

    teacher: str
    levels: Count = 18
    decay: Share = 0.95
    guidance: Annotated[float, Field(ge=0)] = 1.0
    _mean: Mean | None = field(init=False, default=None, repr=False)
    _teacher: Any = field(init=False, default=None, repr=False)

    def setup(self, run: Any) -> None:
        """Load the teacher, and begin the running mean with the student.

        Args:
            run: the run in progress.
        """
        self._teacher = load_teacher(self.teacher, run)
        super().setup(run)

    def pair(self, model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return (t, r, weight), each (B,), with t > r.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        grid = self.grid(model, self.levels)
        later, sooner = self.neighbours(grid, even_places(self.uniform(batch, "pair").cpu(), len(grid)))
        return later, sooner, torch.ones_like(later)

    def slope(self, batch: Any, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the teacher's dx / dsigma = (x - D(x, sigma)) / sigma.

        Args:
            batch: B arrays, for their classes.
            x: (B, *shape).
            sigma: (B,).
        """
        labels = batch.labels if self._teacher.classes else None
        return (x - self._teacher.guided(x, sigma, labels, self.guidance)) / spread(sigma, x)


@part(
    "objective", "cd",
    papers=[("Consistency Models", "arXiv:2303.01469")],
    claim="A consistency model that is distilled from a diffusion model draws better samples in one and two steps than "
    "progressive distillation.",
    deviations="Squared distance instead of LPIPS. With drop_labels the teacher's step still sees the class.",
    draws=[{"name": "multistep", "steps": 1}, {"name": "multistep", "steps": 2}],
)  # fmt: skip
@dataclass(kw_only=True)
class ConsistencyDistillation(Distillation):
    """Consistency distillation with one step of Heun's method by the teacher, or of Euler's.

    Args:
        step: the teacher's method; euler runs it once instead of twice.
    """

    step: Literal["heun", "euler"] = "heun"

    def earlier(self, model: Any, batch: Any, noisy: Tensor, noise: Tensor, later: Tensor, sooner: Tensor) -> Tensor:
        """Return where the teacher's step leads (B, *shape).

        Args:
            model: the denoiser.
            batch: B arrays.
            noisy: (B, *shape) x_t.
            noise: (B, *shape) z.
            later: (B,) t.
            sooner: (B,) r.
        """
        step = spread(sooner - later, noisy)
        slope = self.slope(batch, noisy, later)
        if self.step == "heun":
            slope = (slope + self.slope(batch, noisy + step * slope, sooner)) / 2
        return noisy + step * slope


@part(
    "objective", "multistep-cd",
    papers=[("Multistep Consistency Models", "arXiv:2403.06807")],
    claim="A model that is consistent within each of a few segments of the noise levels is easier to train than a "
    "consistency model, and with one deterministic step for each segment draws better samples.",
    deviations="Heun's step by the teacher instead of the paper's aDDIM, which gives DDIM's step back the variance "
    "that it loses. The target is a running mean, as in consistency distillation; with decay 0 it is the model itself, "
    "as in the paper. The grid does not grow finer in training.",
    draws=[{"name": "ddim", "steps": "objective.steps", "schedule": "objective.schedule"}],
)  # fmt: skip
@dataclass(kw_only=True)
class MultistepDistillation(ConsistencyDistillation):
    """Consistency distillation within segments; a trajectory ends where its segment does, and DDIM steps lead there.

    d(f(x_t, t), D),  D = (z - (s / t) x_t) / (1 - s / t),  z = D' + (s / r) (x_r - D'),  D' = f_mean(x_r, r)

    s is the lower end of the segment that holds t > r >= s, and z = x_r where r = s: D is what leads from x_t to z in
    one step of first order. With one segment, s = 0, it is consistency distillation. The levels of the grid are shared
    evenly among the segments, and spaced in each as for the karras schedule. The solver `ddim` with the same steps and
    schedule takes one step for each segment.

    Args:
        steps: segments, and evaluations of the sampler that this is for.
        schedule: how segments are spaced, as solvers have it: even in TrigFlow's time, which is the cosine schedule,
            or in that of flow matching.
    """

    steps: Count = 2
    schedule: Literal["trig", "flow"] = "trig"

    def ends(self, model: Any) -> Tensor:
        """Return the `steps` + 1 ascending ends of the segments, float64, from 0 to sigma_max.

        Args:
            model: the denoiser.
        """
        spaced = levels(self.schedule, self.steps, model.sigma_min, model.sigma_max, sigma_data=model.sigma_data)
        return spaced.flip(0)

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
