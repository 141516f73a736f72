"""Solvers of the probability flow: DDIM, Heun, DPM-Solver and DPM-Solver++.

In hone's terms, x = y + sigma n, the flow is dx / dsigma = (x - D(x, sigma)) / sigma. A variance-preserving state is
this x times a = 1 / sqrt(1 + sigma^2), and DPM-Solver's lambda = ln(a / (a sigma)) = -ln sigma on both scales; so the
published formulas hold with a = 1 (checked against diffusers' schedulers).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hone.parts import part
from hone.solvers.base import Counted, Solver, noise_like, step_ddim


@part(
    "solver", "ddim",
    papers=[("Denoising Diffusion Implicit Models", "arXiv:2010.02502")],
    claim="Samples of few deterministic steps are better than those of as many stochastic ones.",
)  # fmt: skip
@dataclass(kw_only=True)
class DDIM(Solver):
    """Steps of first order, which are Euler's in this scale of x, with as much fresh noise as `eta` says.

    x' = D + sqrt(s'^2 - u^2) (x - D) / s + u z,  u = eta (s' / s) sqrt((s^2 - s'^2))

    On the variance-preserving scale this is DDIM; eta = 1 is ancestral sampling (DDPM).

    Args:
        eta: share of the ancestral noise, 0 for none.
    """

    eta: Annotated[float, Field(ge=0, le=1)] = 0.0

    def solve(self, denoise: Counted, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return x at the last of the noise levels.

        Args:
            denoise: D(x, sigma).
            x: (B, *shape) at the first of them.
            sigmas: (n,) descending.
            generator: draws noise where eta is not 0.
        """
        for now, then in itertools.pairwise(sigmas):
            fresh = self.eta * float(then / now) * math.sqrt(max(0.0, float(now**2 - then**2)))
            kept = (then**2 - fresh**2).clamp(min=0).sqrt()
            x = step_ddim(x, denoise(x, now), now.to(x), kept.to(x))
            if fresh:
                x = x + fresh * noise_like(x, generator)
        return x


@part(
    "solver", "heun",
    papers=[("Elucidating the Design Space of Diffusion-Based Generative Models", "arXiv:2206.00364")],
    claim="Heun's method reaches the quality of first-order sampling with several times fewer network evaluations.",
)  # fmt: skip
@dataclass(kw_only=True)
class Heun(Solver):
    """Heun's method of second order, with noise that is added before each step where `churn` is not 0.

    x^ = x + sqrt(s^2' - s^2) z with s' = s (1 + g);  Euler to the next level; the mean of the slopes at both ends.
    g = min(churn / steps, sqrt(2) - 1) for levels in [churn_low, churn_high], else 0.

    Args:
        churn: how much noise is renewed in all, 0 for the deterministic flow.
        churn_low: smallest level at which noise is added.
        churn_high: largest.
        churn_scale: standard deviation of the added noise.
    """

    churn: Annotated[float, Field(ge=0)] = 0.0
    churn_low: Annotated[float, Field(ge=0)] = 0.05
    churn_high: Annotated[float, Field(ge=0)] = 50.0
    churn_scale: Annotated[float, Field(gt=0)] = 1.003

    def solve(self, denoise: Counted, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return x at the last of the noise levels.

        Args:
            denoise: D(x, sigma).
            x: (B, *shape) at the first of them.
            sigmas: (n,) descending.
            generator: draws noise where `churn` is not 0.
        """
        most = min(self.churn / (len(sigmas) - 1), math.sqrt(2) - 1)
        for now, then in itertools.pairwise(sigmas):
            more = most if self.churn_low <= float(now) <= self.churn_high else 0.0
            level = now * (1 + more)
            if more:
                x = x + float((level**2 - now**2).sqrt()) * self.churn_scale * noise_like(x, generator)
            slope = (x - denoise(x, level)) / level.to(x)
            ahead = x + (then - level).to(x) * slope
            if float(then) > 0:
                slope = (slope + (ahead - denoise(ahead, then)) / then.to(x)) / 2
                ahead = x + (then - level).to(x) * slope
            x = ahead
        return x


@part(
    "solver", "dpm-solver",
    papers=[
        (
            "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps",
            "arXiv:2206.00927",
        ),
    ],
    claim="Solving the linear part exactly and the rest to order 2 or 3 samples well in about 10 evaluations.",
)  # fmt: skip
@dataclass(kw_only=True)
class DPMSolver(Solver):
    """DPM-Solver on the predicted noise e = (x - D) / s, singlestep, of order 1 (which is DDIM), 2 or 3.

    With h = ln(s / s') and inner points at h / 2 (order 2), or h / 3 and 2 h / 3 (order 3):
    2: x' = x - s' (e^h - 1) e - s' (e^h - 1) (e_1 - e)
    3: x' = x - s' (e^h - 1) e - (s' / r_2) ((e^h - 1) / h - 1) (e_2 - e),  r_2 = 2/3
    The step to 0 is of first order.

    Args:
        order: evaluations in each step.
        schedule: how the levels are spaced; even in the log of the level, as in the paper.
    """

    order: Literal[1, 2, 3] = 2
    schedule: Literal["karras", "log", "flow", "trig"] = "log"

    def solve(self, denoise: Counted, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return x at the last of the noise levels.

        Args:
            denoise: D(x, sigma).
            x: (B, *shape) at the first of them.
            sigmas: (n,) descending.
            generator: unused.
        """

        def noise(state: Tensor, level: Tensor) -> Tensor:
            return (state - denoise(state, level)) / level.to(state)

        for now, then in itertools.pairwise(sigmas):
            first = noise(x, now)
            if self.order == 1 or float(then) == 0:
                x = x + (then - now).to(x) * first
            elif self.order == 2:
                middle = (now * then).sqrt()
                second = noise(x + (middle - now).to(x) * first, middle)
                x = x + (then - now).to(x) * second
            else:
                x = _third(noise, x, first, now, then)
        return x


def _third(noise: object, x: Tensor, first: Tensor, now: Tensor, then: Tensor) -> Tensor:
    """Return x after a step of order 3 whose first evaluation is known."""
    predict: Counted = noise  # type: ignore[assignment]
    h = float((now / then).log())
    one, two = now * math.exp(-h / 3), now * math.exp(-2 * h / 3)
    change = predict(x + (one - now).to(x) * first, one) - first
    bend = float(two) * 2.0 * (math.expm1(2 * h / 3) / (2 * h / 3) - 1)
    later = predict(x + (two - now).to(x) * first - bend * change, two) - first
    return x + (then - now).to(x) * first - float(then) * 1.5 * (math.expm1(h) / h - 1) * later


@part(
    "solver", "dpm-solver-pp",
    papers=[
        ("DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models", "arXiv:2211.01095"),
    ],
    claim="Predicting the data instead of the noise, and reusing earlier predictions, samples well in 15 to 20 steps.",
    deviations="Order 3 takes twice the second difference that the authors' code and diffusers take: half of it makes "
    "a method of order 2, as derivation and measurement show.",
)  # fmt: skip
@dataclass(kw_only=True)
class DPMSolverPP(Solver):
    """DPM-Solver++ on the denoised array, multistep: one evaluation a step, and the earlier ones once more.

    With h = ln(s / s'), r_0 = h_-1 / h, r_1 = h_-2 / h, and D_0, D_1, D_2 the latest three predictions:
    1: x' = (s' / s) x + (1 - e^-h) D_0
    2: x' = (s' / s) x + (1 - e^-h) (D_0 + (D_0 - D_1) / (2 r_0))
    3: with A = (D_0 - D_1) / r_0, B = (D_1 - D_2) / r_1, C = (A - B) / (r_0 + r_1), E = A + r_0 C, G = 2 C:
       x' = (s' / s) x + (1 - e^-h) D_0 + ((e^-h - 1) / h + 1) E - ((e^-h - 1 + h) / h^2 - 1/2) G
    The first steps, and the step to 0, are of lower order.

    Args:
        order: predictions that a step uses.
    """

    order: Literal[1, 2, 3] = 2

    def solve(self, denoise: Counted, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return x at the last of the noise levels.

        Args:
            denoise: D(x, sigma).
            x: (B, *shape) at the first of them.
            sigmas: (n,) descending.
            generator: unused.
        """
        found: list[Tensor] = []
        gaps: list[float] = []
        for now, then in itertools.pairwise(sigmas):
            found.insert(0, denoise(x, now))
            if float(then) == 0:
                return found[0]
            h = float((now / then).log())
            guess = found[0]
            order = min(self.order, len(found))
            if order == 1:
                x = (then / now).to(x) * x - math.expm1(-h) * guess
            elif order == 2:
                guess = guess + (found[0] - found[1]) * (h / (2 * gaps[0]))
                x = (then / now).to(x) * x - math.expm1(-h) * guess
            else:
                x = self._order_three(x, found, gaps, h, (then / now).to(x))
            found, gaps = found[:2], [h, *gaps[:1]]
        return x

    def _order_three(self, x: Tensor, found: list[Tensor], gaps: list[float], h: float, ratio: Tensor) -> Tensor:
        near, far = gaps[0] / h, gaps[1] / h
        one, two = (found[0] - found[1]) / near, (found[1] - found[2]) / far
        slope = one + near / (near + far) * (one - two)
        bend = 2 * (one - two) / (near + far)  # h^2 times the second derivative
        decay = math.expm1(-h)
        return ratio * x - decay * found[0] + (decay / h + 1) * slope - ((decay + h) / h**2 - 0.5) * bend
