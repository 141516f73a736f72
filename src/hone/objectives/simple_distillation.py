"""Simple and fast distillation: a student of a few Euler steps follows its teacher's trajectory, one step at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from hone.diffusion.views import View, check_guidance
from hone.objectives.arrays import ArrayObjective, Positive
from hone.objectives.base import Turn
from hone.objectives.consistency import Count
from hone.objectives.progressive import Weight, step
from hone.objectives.teachers import load_teacher
from hone.options import Nested
from hone.parts import part
from hone.solvers.base import Counted
from hone.solvers.edict import EDICT
from hone.solvers.ode import DPMSolverPP
from hone.solvers.shifted import TimeShift
from hone.solvers.simple import analytic, timestamps


def shown_steps(count: float) -> float:
    """Return what a network is shown of its number of steps: a tenth of it.

    Args:
        count: steps.
    """
    return count / 10


class Steps(View):
    """A model that knows how many steps it is sampled with, called like a denoiser."""

    def __init__(self, model: Any, steps: int) -> None:
        """Hold the model.

        Args:
            model: a widened denoiser.
            steps: their number.
        """
        super().__init__(model)
        self.model, self.steps = model, steps

    def for_steps(self, steps: int) -> Steps:
        """Return the same model for another number of steps.

        Args:
            steps: their number.
        """
        return Steps(self.model, steps)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return D (B, *shape).

        Args:
            x: (B, *shape) noisy arrays.
            sigma: (B,) noise levels, or one number for all.
            labels: (B,) classes, -1 for none; None for none at all.
        """
        shown = torch.full((len(x), 1), shown_steps(self.steps)).to(x)
        found: Tensor = self.model(x, sigma, labels, shown)
        return found


class Watched(Counted):
    """A denoiser that remembers where a solver was at each noise level."""

    def __init__(self, model: Any, labels: Tensor | None, guidance: float) -> None:
        """Wrap a denoiser.

        Args:
            model: called with (x, sigma, labels).
            labels: (B,) classes of the samples, None for none.
            guidance: of classifier-free guidance; 1 for none.
        """
        super().__init__(model, labels, guidance)
        self.seen: dict[float, Tensor] = {}

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return D(x, sigma)."""
        self.seen[round(float(sigma), 9)] = x  # of several at one level the last one is where the solver went on
        return super().__call__(x, sigma)


@part(
    "objective", "sfd",
    papers=[
        ("Simple and Fast Distillation of Diffusion Models", "arXiv:2409.19681"),
    ],
    claim="A student of two steps that is tuned on its own trajectory for a short time draws far better samples than "
    "fast solvers do in as many steps.",
    deviations="The last step of the teacher's DPM-Solver++ keeps its order. The authors' second "
    "stage, for one evaluation, is not here.",
    draws=[{
        "name": "sfd", "steps": "objective.steps", "analytic": "objective.analytic", "lowest": "objective.lowest",
        "rho": "objective.rho",
    }],
)  # fmt: skip
@dataclass(kw_only=True)
class SimpleDistillation(ArrayObjective):
    """Simple and fast distillation: one optimizer step for each step of the student's own trajectory.

    x_0 = s_max z;  |x_i + (s_i+1 - s_i) (x_i - D(x_i, s_i)) / s_i - X_i+1|, the mean over coordinates;
    x_i+1 = the student's step, without gradient;  X = the teacher's solver from x_0, at the same levels

    Levels s_0 ... s_n are those of a polynomial schedule from sigma_max to `lowest`; the teacher makes `finer` steps
    for each of the student's. The data is not looked at. Sampled by the solver `sfd` with the same options.

    Args:
        teacher: a run of a denoiser, "stage:N", or "truth".
        steps: of the student, the analytic one among them.
        finer: steps of the teacher for each of the student's.
        analytic: whether the first step is x / sqrt(1 + s^2) instead of the network's slope, and free.
        lowest: noise level at which trajectories end.
        rho: spacing of the levels.
        solver: the teacher's, which goes from level to level without noise; None takes dpm-solver-pp of order 3.
        guidance: of the teacher, by classifier-free guidance.
    """

    teacher: str
    steps: Count = 3
    finer: Count = 4
    analytic: bool = True
    lowest: Positive = 0.006
    rho: Positive = 7.0
    solver: Annotated[Any, Nested("solver")] = None
    guidance: Weight = 1.0
    _teacher: Any = field(init=False, default=None, repr=False)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the options."""
        if self.analytic and self.steps < 2:
            yield "steps", "expected at least 2, since the first one is analytic and trains nothing"
        odd = isinstance(self.solver, EDICT | TimeShift)  # two states at a level, and levels of each array's own
        noisy = getattr(self.solver, "churn", 0) or getattr(self.solver, "eta", 0)
        if self.solver is not None and (odd or noisy or not getattr(self.solver, "goes_part_way", False)):
            yield (
                "solver",
                "expected a solver that goes from level to level without noise, such as dpm-solver-pp or ddim",
            )

    def setup(self, run: Any) -> None:
        """Load the teacher.

        Args:
            run: the run in progress.
        """
        super().setup(run)
        check_guidance(self.guidance, bool(run.model.classes))
        self._teacher = load_teacher(self.teacher, run)

    def steps_now(self, batch: Any) -> int:
        """Return the student's number of steps.

        Args:
            batch: B arrays.
        """
        return self.steps

    def student(self, model: Any, steps: int) -> Any:
        """Return what is called like a denoiser.

        Args:
            model: the denoiser.
            steps: of the student.
        """
        return model

    def trajectory(self, batch: Any, x: Tensor, grid: Tensor, labels: Tensor | None) -> list[Tensor]:
        """Return where the teacher is at each of the student's levels but the first.

        Args:
            batch: B arrays.
            x: (B, *shape) at the first level.
            grid: (n finer + 1,) float64 levels of the teacher.
            labels: (B,) classes.
        """
        watched = Watched(self._teacher, labels, self.guidance)
        with torch.no_grad():
            end = (self.solver or DPMSolverPP(order=3)).solve(watched, x, grid, None)
        return [*(watched.seen[round(float(level), 9)] for level in grid[self.finer : -1 : self.finer]), end]

    def walk(self, model: Any, batch: Any) -> Iterator[Tensor]:
        """Yield the loss of each step of the student, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        steps = self.steps_now(batch)
        grid = timestamps(steps * self.finer, self.lowest, model.sigma_max, self.rho)
        labels = self.some_labels(model, batch)
        x = model.sigma_max * self.normal(batch)
        goals = self.trajectory(batch, x, grid, labels)
        student, own = self.student(model, steps), grid[:: self.finer].to(x)
        for number, goal in enumerate(goals):
            now, then = own[number], own[number + 1]
            if self.analytic and number == 0:
                x = analytic(x, now, then)
                continue
            x = step(x, student(x, now, labels), now, then)
            yield (x - goal).abs().flatten(1).mean(1).sum()
            x = x.detach()

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of all steps, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        return torch.stack(list(self.walk(model, batch))).sum(), {}

    def turns(self, model: Any, batch: Any) -> Iterator[Turn]:
        """Yield a turn of the model for each of its steps.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        for number, loss in enumerate(self.walk(model, batch), start=1):
            yield Turn("model", loss, {f"step_{number}": loss.detach()})


@part(
    "objective", "sfd-v",
    papers=[
        ("Simple and Fast Distillation of Diffusion Models", "arXiv:2409.19681"),
    ],
    claim="One model that is shown its number of steps is as good at each of several as models for one number are.",
    deviations="As for sfd. The number of steps is shown as one more number beside the noise level.",
    draws=[
        {
            "name": "sfd", "steps": "objective.steps", "analytic": "objective.analytic", "lowest": "objective.lowest",
            "rho": "objective.rho",
        },
        {
            "name": "sfd", "steps": "objective.most", "analytic": "objective.analytic", "lowest": "objective.lowest",
            "rho": "objective.rho",
        },
    ],
)  # fmt: skip
@dataclass(kw_only=True)
class VariableDistillation(SimpleDistillation):
    """Simple and fast distillation for several numbers of steps: the network is shown a number, drawn anew each time.

    Args:
        steps: that arrays are drawn with where a solver does not say.
        most: largest number of steps; the smallest is `steps`.
    """

    most: Count = 6

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the options."""
        yield from super().check()
        if self.most < self.steps:
            yield "most", f"expected at least steps ({self.steps}), got {self.most}"

    def equip(self, model: Any) -> None:
        """Let the network see its number of steps.

        Args:
            model: the denoiser.
        """
        model.widen(1)

    def drawn_by(self, model: Any) -> Any:
        """Return the model with a number of steps.

        Args:
            model: the denoiser.
        """
        return Steps(model, self.steps)

    def steps_now(self, batch: Any) -> int:
        """Return the student's number of steps, the same for all arrays of a step of the run.

        Args:
            batch: B arrays.
        """
        return self.steps + int(self.once(batch, "steps") * (self.most + 1 - self.steps))

    def student(self, model: Any, steps: int) -> Any:
        """Return what is called like a denoiser.

        Args:
            model: the denoiser.
            steps: of the student.
        """
        return Steps(model, steps)
