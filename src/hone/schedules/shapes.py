"""Learning-rate schedules: a warmup that all share, then one of a few ways down to a floor.

A schedule is a factor on the learning rate as a function of the step, counted from 0, and of the total. No step is
spent on a rate of zero: step s of a warmup of W steps has factor (s + 1) / W, and the floor comes after the last step.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from hone.parts import part

Shape = Literal["linear", "cosine", "1-sqrt"]
Span = Annotated[float, Field(ge=0)]


def descend(shape: Shape, progress: float) -> float:
    """Return the height of a way down from 1 at progress 0 to 0 at progress 1.

    linear: 1 - p;  cosine: (1 + cos(pi p)) / 2;  1-sqrt: 1 - sqrt(p)

    Args:
        shape: which way.
        progress: share of the way behind, in [0, 1].
    """
    match shape:
        case "linear":
            return 1.0 - progress
        case "cosine":
            return (1.0 + math.cos(math.pi * progress)) / 2
        case "1-sqrt":
            return 1.0 - math.sqrt(progress)


def steps_of(span: float, total: int) -> int:
    """Return a length in steps.

    Args:
        span: a share of the run when below 1, else a number of steps.
        total: steps of the run.
    """
    return round(span * total) if span < 1 else int(span)


def misfits(option: str, span: float) -> list[tuple[str, str]]:
    """Return (option, message) when a length is neither a share nor a whole number of steps.

    Args:
        option: its name.
        span: the length.
    """
    if span < 1 or span == int(span):
        return []
    return [(option, f"expected a share of the run below 1 or a whole number of steps, got {span}")]


@dataclass(kw_only=True)
class Schedule(ABC):
    """A factor on the learning rate that rises linearly over the warmup and then follows a shape.

    Args:
        warmup: length of the rise: a share of the run when below 1, else a number of steps.
    """

    warmup: Span = 0.0

    def check(self) -> list[tuple[str, str]]:
        """Return what is wrong with the options; types alone cannot say it."""
        return misfits("warmup", self.warmup)

    def factor(self, step: int, total: int) -> float:
        """Return the factor on the learning rate.

        Args:
            step: finished steps; `total` gives the factor after the last one.
            total: steps of the run, at least 1.
        """
        rise = steps_of(self.warmup, total)
        if step < min(rise, total):
            return (step + 1) / rise
        return self.after_warmup(step, rise, total)

    @abstractmethod
    def after_warmup(self, step: int, rise: int, total: int) -> float:
        """Return the factor of a step that is not part of the warmup.

        Args:
            step: finished steps, at least `rise` or equal to `total`.
            rise: steps of the warmup.
            total: steps of the run.
        """


@part("schedule", "constant", papers="original")
@dataclass(kw_only=True)
class Constant(Schedule):
    """The full learning rate from the end of the warmup to the end of the run."""

    def after_warmup(self, step: int, rise: int, total: int) -> float:
        """Return 1."""
        return 1.0


@dataclass(kw_only=True)
class Descent(Schedule):
    """A schedule that ends at a floor.

    Args:
        floor: factor after the last step, in [0, 1].
    """

    floor: Annotated[float, Field(ge=0, le=1)] = 0.0

    def after_warmup(self, step: int, rise: int, total: int) -> float:
        """Return the floor plus the height of the shape, scaled to end there."""
        height = self.height(step - rise, total - rise) if step < total else 0.0
        return self.floor + (1.0 - self.floor) * height

    @abstractmethod
    def height(self, step: int, length: int) -> float:
        """Return the height of the shape, from 1 to 0.

        Args:
            step: steps since the warmup, below `length`.
            length: steps from the end of the warmup to the end of the run.
        """


@part("schedule", "linear", papers="original")
@dataclass(kw_only=True)
class Linear(Descent):
    """A straight line from the end of the warmup down to the floor."""

    def height(self, step: int, length: int) -> float:
        """Return 1 - step / length."""
        return descend("linear", step / length)


@part(
    "schedule",
    "cosine",
    papers=[("SGDR: Stochastic Gradient Descent with Warm Restarts", "arXiv:1608.03983")],
    claim="Cosine annealing with warm restarts needs two to four times fewer epochs than decay in steps.",
    deviations="One cycle unless cycles says otherwise; the cycles fill the run, so the length of the first follows "
    "from their number. A linear warmup may precede them. Any optimizer.",
)
@dataclass(kw_only=True)
class Cosine(Descent):
    """Half a cosine from the end of the warmup down to the floor, optionally several times.

    height = (1 + cos(pi t / T_i)) / 2 within cycle i, whose length is T_i = growth T_(i-1)

    Args:
        cycles: how often the rate comes down; each cycle after the first begins at the full rate again.
        growth: length of a cycle in units of the one before it (T_mult in the paper).
    """

    cycles: Annotated[int, Field(ge=1)] = 1
    growth: Annotated[float, Field(gt=0)] = 1.0

    def height(self, step: int, length: int) -> float:
        """Return the height within the cycle that the step falls into."""
        lengths = [self.growth**i for i in range(self.cycles)]
        left = step * sum(lengths) / length
        while left >= lengths[0] and len(lengths) > 1:
            left -= lengths.pop(0)
        return descend("cosine", min(1.0, left / lengths[0]))


@part(
    "schedule",
    "wsd",
    papers=[
        (
            "MiniCPM: Unveiling the Potential of Small Language Models with Scalable Training Strategies",
            "arXiv:2404.06395",
        ),
        ("Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", "arXiv:2405.18392"),
    ],
    claim="A constant rate followed by a short decay matches a cosine of the same length, and any step of the constant "
    "phase can be decayed from, so that one run serves all lengths.",
    deviations="MiniCPM decays exponentially, by half every fixed number of steps; here the decay ends at the floor.",
)
@dataclass(kw_only=True)
class WSD(Descent):
    """Warmup, stable, decay: the full learning rate until a short decay at the end of the run.

    Args:
        decay: length of the decay: a share of the run when below 1, else a number of steps; at most what the warmup
            leaves.
        shape: the way down: linear, cosine, or 1-sqrt, which drops fast and then flattens.
    """

    decay: Span = 0.2
    shape: Shape = "1-sqrt"

    def check(self) -> list[tuple[str, str]]:
        """Return what is wrong with the options; types alone cannot say it."""
        return super().check() + misfits("decay", self.decay)

    def after_warmup(self, step: int, rise: int, total: int) -> float:
        """Return 1 in the stable phase, then the shape."""
        begin = min(total, max(rise, total - steps_of(self.decay, total)))
        return super().after_warmup(step, begin, total) if step >= begin else 1.0

    def height(self, step: int, length: int) -> float:
        """Return the height of the chosen shape."""
        return descend(self.shape, step / length)
