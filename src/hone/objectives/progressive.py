"""Progressive distillation: a student makes in one step what its teacher makes in several, and then teaches itself."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.levels import spread
from hone.diffusion.spatial import ssim
from hone.errors import ModelError
from hone.objectives.arrays import ArrayObjective, Levels, Positive, squared
from hone.objectives.consistency import Count
from hone.objectives.teachers import load_teacher
from hone.parts import part
from hone.solvers.base import levels

Weight = Annotated[float, Field(ge=0)]


def implied(x: Tensor, ahead: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """Return the denoised array D with which one step of first order leads from x to `ahead`.

    (x' - (s' / s) x) / (1 - s' / s), which is x' where s' is 0

    Args:
        x: (B, *shape) at level `now`.
        ahead: (B, *shape) at level `then`.
        now: (B,) s.
        then: (B,) s', below s.
    """
    share = spread(then / now, x)
    return (ahead - share * x) / (1 - share)


def step(x: Tensor, denoised: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """Return x at the next level by a step of first order (DDIM's): D + (s' / s) (x - D).

    Args:
        x: (B, *shape) at level `now`.
        denoised: (B, *shape) D(x, s).
        now: (B,) s.
        then: (B,) s'.
    """
    return denoised + spread(then / now, x) * (x - denoised)


@dataclass(kw_only=True)
class Progressive(ArrayObjective):
    """A student that halves its steps again and again; see the module's docstring.

    Args:
        teacher: a run of a denoiser, "stage:N", or "truth"; it teaches the first student only.
        plan: numbers of steps: the teacher's, and those of the students, each of which teaches the next one.
        schedule: how steps are spaced, as solvers have it: even in TrigFlow's time, which is the cosine schedule, or
            in that of flow matching. In both, each second level of 2 N steps is one of N.
        late: how many times as long students of 1 and 2 steps train.
        guidance: of the teacher, by classifier-free guidance.
    """

    teacher: str
    plan: list[Count] = field(default_factory=lambda: [16, 8, 4, 2, 1])
    schedule: Literal["trig", "flow"] = "trig"
    late: Positive = 2.0
    guidance: Weight = 1.0
    _teacher: Any = field(init=False, default=None, repr=False)
    _student: Any = field(init=False, default=None, repr=False)
    _stage: int = field(init=False, default=0, repr=False)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the options."""
        if len(self.plan) < 2 or any(more <= less or more % less for more, less in pairwise(self.plan)):
            yield (
                "plan",
                f"expected at least two numbers, each a multiple of the next, e.g. [8, 4, 2, 1]; got {self.plan}",
            )

    def setup(self, run: Any) -> None:
        """Load the teacher.

        Args:
            run: the run in progress.
        """
        super().setup(run)
        self._teacher, self._student = load_teacher(self.teacher, run), run.model

    def now(self) -> tuple[int, float]:
        """Return the number of the student that trains, from 0, and the share of its time that is over."""
        times = [self.late if steps <= 2 else 1.0 for steps in self.plan[1:]]
        done = self._progress * sum(times)
        for stage, time in enumerate(times):
            if done < time or stage == len(times) - 1:
                return stage, min(1.0, done / time)
            done -= time
        raise AssertionError("a plan has at least one student")

    def before_step(self, run: Any, trees: Sequence[Any]) -> None:
        """Let a student that is ready become the teacher; the next one starts from it, with a fresh optimizer.

        Args:
            run: the run in progress.
            trees: all arrays of the step.
        """
        super().before_step(run, trees)
        stage, _ = self.now()
        if stage != self._stage:
            self._stage = stage
            self._teacher = copy.deepcopy(run.model).eval().requires_grad_(False)
            run.players["model"].optimizer.state.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the number of the student, and its teacher's weights where that is an earlier student."""
        return {"stage": self._stage, "teacher": dict(self._teacher.state_dict()) if self._stage else {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: as `state_dict` returned it.
        """
        self._stage = state["stage"]
        if self._stage:
            self._teacher = copy.deepcopy(self._student).eval().requires_grad_(False)
            self._teacher.load_state_dict(state["teacher"])

    def lesson(self, model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Return x (B, *shape), the level s of each, where the teacher leads (B, *shape), the level s' there, classes.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        taught, steps = self.plan[self._stage], self.plan[self._stage + 1]
        each = taught // steps
        grid = levels(self.schedule, taught, model.sigma_min, model.sigma_max, sigma_data=model.sigma_data)
        grid = grid.to(batch.arrays)
        place = each * (self.uniform(batch, "place").double() * steps).long().clamp(max=steps - 1)
        labels = self.some_labels(model, batch)
        x = batch.arrays + spread(grid[place], batch.arrays) * self.normal(batch)
        ahead = x
        with torch.no_grad():
            for number in range(each):
                now, then = grid[place + number], grid[place + number + 1]
                ahead = step(ahead, self.lead(ahead, now, labels), now, then)
        return x, grid[place], ahead, grid[place + each], labels

    def lead(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Return the teacher's D (B, *shape): guided, where it is the first one.

        Args:
            x: (B, *shape).
            sigma: (B,).
            labels: (B,) classes.
        """
        found: Tensor = self._teacher.guided(x, sigma, labels, 1.0 if self._stage else self.guidance)
        return found

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        x, now, ahead, then, labels = self.lesson(model, batch)
        return self.apart(model(x, now, labels), implied(x, ahead, now, then), now).sum(), {}

    def apart(self, guess: Tensor, aim: Tensor, sigma: Tensor) -> Tensor:
        """Return the distance of two denoised arrays (B,).

        Args:
            guess: (B, *shape) the student's.
            aim: (B, *shape) what the teacher's steps imply.
            sigma: (B,) s.
        """
        raise NotImplementedError


@part(
    "objective", "progressive",
    papers=[("Progressive Distillation for Fast Sampling of Diffusion Models", "arXiv:2202.00512")],
    claim="Halving the steps again and again takes a sampler from many steps to a few with little loss of quality.",
    deviations="One learning rate schedule for the whole run, where the authors anneal it anew for each student.",
    draws=[{"name": "ddim", "steps": "objective.plan.-1", "schedule": "objective.schedule"}],
)  # fmt: skip
@dataclass(kw_only=True)
class ProgressiveDistillation(Progressive):
    """Progressive distillation: the student's step from s to s' shall lead where the teacher's two steps do.

    weight(s) |D(x, s) - (x'' - (s' / s) x) / (1 - s' / s)|^2,  x'' = the teacher's DDIM steps from x

    Sampled by `ddim` with the same schedule and the last of the plan's numbers of steps.

    Args:
        weight: truncated-snr, max(1 / s^2, 1); v, 1 / s^2 + 1, the squared error of v; snr, 1 / s^2, that of the noise;
            constant, that of the array.
    """

    weight: Literal["truncated-snr", "v", "snr", "constant"] = "truncated-snr"

    def apart(self, guess: Tensor, aim: Tensor, sigma: Tensor) -> Tensor:
        """Return the weighted squared distance of two denoised arrays (B,).

        Args:
            guess: (B, *shape) the student's.
            aim: (B, *shape) what the teacher's steps imply.
            sigma: (B,) s.
        """
        return snr_weight(self.weight, sigma) * squared(guess, aim)


def snr_weight(kind: str, sigma: Tensor) -> Tensor:
    """Return the weight of a squared error of the array at each noise level.

    Args:
        kind: truncated-snr, v, snr or constant.
        sigma: noise levels.
    """
    ratio = sigma**-2
    if kind == "truncated-snr":
        return ratio.clamp(min=1)
    return {"v": ratio + 1, "snr": ratio, "constant": torch.ones_like(ratio)}[kind]


def spectral(guess: Tensor, aim: Tensor, mae: float, similar: float) -> Tensor:
    """Return mae |l - r| + similar (1 - SSIM(l, r)) of each array (B,).

    Args:
        guess: (B, *shape).
        aim: (B, *shape).
        mae: weight of the mean absolute difference.
        similar: weight of the structural similarity; 0 leaves it out.
    """
    found = mae * (guess - aim).abs().flatten(1).mean(1)
    return found + similar * (1 - ssim(guess, aim)) if similar else found


def need_spatial(shape: tuple[int, ...], weight: float, option: str) -> None:
    """Refuse arrays that have no neighbours.

    Args:
        shape: of one array.
        weight: of what looks at neighbours.
        option: that sets it.

    Raises:
        ModelError: the arrays are points.
    """
    if weight and len(shape) < 2:
        raise ModelError(f"objective.{option}: points of shape {shape} have no neighbours to look at; set it to 0")


@part(
    "objective", "prodiff",
    papers=[
        ("ProDiff: Progressive Fast Diffusion Model For High-Quality Text-to-Speech", "arXiv:2207.06389"),
    ],
    claim="A student of two steps that learns from its teacher's steps of denoised arrays has the teacher's quality.",
    deviations="Classes instead of texts, without durations and pitches. Steps are spaced by the cosine schedule, the "
    "authors' by a variance-preserving one of five levels. Their code trains the student by the absolute difference "
    "only; set ssim: 0 for that. SSIM is that of values in [-1, 1]; the authors' adds 6 to log energies.",
    draws=[{"name": "ddim", "steps": "objective.plan.-1", "schedule": "objective.schedule"}],
)  # fmt: skip
@dataclass(kw_only=True)
class ProDiff(Progressive):
    """Progressive distillation of a model that predicts the array itself, with the losses of spectrograms.

    mae |D(x, s) - a| + ssim (1 - SSIM(D(x, s), a)),  a = what the teacher's two DDIM steps imply

    For models of parameterisation x0. Sampled by `ddim` with the same schedule.

    Args:
        plan: numbers of steps: the teacher's, and those of the students, each of which teaches the next one.
        mae: weight of the mean absolute difference.
        ssim: weight of the structural similarity, for images and series.
    """

    plan: list[Count] = field(default_factory=lambda: [4, 2])
    mae: Weight = 0.5
    ssim: Weight = 0.5

    def setup(self, run: Any) -> None:
        """Load the teacher.

        Args:
            run: the run in progress.
        """
        need_spatial(run.model.shape, self.ssim, "ssim")
        super().setup(run)

    def apart(self, guess: Tensor, aim: Tensor, sigma: Tensor) -> Tensor:
        """Return the distance of two denoised arrays (B,).

        Args:
            guess: (B, *shape) the student's.
            aim: (B, *shape) what the teacher's steps imply.
            sigma: (B,) s.
        """
        return spectral(guess, aim, self.mae, self.ssim)


@part(
    "objective", "reconstruct",
    papers=[
        ("ProDiff: Progressive Fast Diffusion Model For High-Quality Text-to-Speech", "arXiv:2207.06389"),
    ],
    claim="Predicting the array itself needs fewer steps than predicting the noise.",
    deviations="Noise levels are continuous, the authors' are the five of their teacher.",
)  # fmt: skip
@dataclass(kw_only=True)
class Reconstruct(ArrayObjective):
    """ProDiff's teacher: denoising at random noise levels with the losses of spectrograms, and no weight.

    mae |D(y + s n, s) - y| + ssim (1 - SSIM(D(y + s n, s), y))

    Args:
        levels: distribution of the noise levels (`hone.objectives.arrays.noise_levels`).
        mean: of the log of the level, for the lognormal ones.
        std: of the same.
        mae: weight of the mean absolute difference.
        ssim: weight of the structural similarity, for images and series.
    """

    levels: Levels = "trig-lognormal"
    mean: float = 0.0
    std: Positive = 1.6
    mae: Weight = 0.5
    ssim: Weight = 0.5

    def setup(self, run: Any) -> None:
        """Refuse points.

        Args:
            run: the run in progress.
        """
        need_spatial(run.model.shape, self.ssim, "ssim")

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        sigma = self.drawn_levels(model, batch, "level", self.levels, mean=self.mean, std=self.std).to(batch.arrays)
        noisy = batch.arrays + spread(sigma, batch.arrays) * self.normal(batch)
        guess = model(noisy, sigma, self.some_labels(model, batch))
        return spectral(guess, batch.arrays, self.mae, self.ssim).sum(), {}
