"""What every solver is: a way from noise to samples through a denoiser, at noise levels that it chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.levels import from_flow_time, from_trig_time, karras

Denoise = Callable[[Tensor, Tensor], Tensor]  # (x (B, *shape), sigma ()) -> D (B, *shape), labels and guidance inside
Schedule = Literal["karras", "log", "flow", "trig"]


class Counted:
    """A denoiser with its labels and guidance, which counts how often the network runs for each sample."""

    def __init__(self, model: Any, labels: Tensor | None = None, guidance: float = 1.0) -> None:
        """Wrap a denoiser.

        Args:
            model: called with (x, sigma, labels); `guided` is used where `guidance` is not 1.
            labels: (B,) classes of the samples, None for none.
            guidance: of classifier-free guidance; 1 for none.
        """
        self.model, self.labels, self.guidance = model, labels, guidance
        self.calls = 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return D(x, sigma)."""
        sigma = sigma.to(x)
        if self.guidance != 1.0 and self.labels is not None:
            self.calls += 2
            found: Tensor = self.model.guided(x, sigma, self.labels, self.guidance)
            return found
        self.calls += 1
        return self.plain(x, sigma, self.labels)

    def plain(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Return D(x, sigma) for some labels, without guidance and uncounted.

        Args:
            x: (B, *shape).
            sigma: noise level.
            labels: (B,) classes, -1 for none; None for none at all.
        """
        found: Tensor = self.model(x, sigma.to(x), labels)
        return found


def levels(
    schedule: Schedule, steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0, sigma_data: float = 0.5
) -> Tensor:
    """Return `steps` + 1 float64 noise levels from `sigma_max` to 0.

    Args:
        schedule: karras; log: even in ln sigma; flow: even in t = s / (1 + s), without `sigma_min`; trig: even in
            t = atan(s / sigma_data), without `sigma_min`.
        steps: levels above 0.
        sigma_min: the smallest above 0, for karras and log.
        sigma_max: the largest.
        rho: of karras.
        sigma_data: standard deviation of the data, for trig.
    """
    zero = torch.zeros(1, dtype=torch.float64)
    if schedule == "karras":
        return karras(steps, sigma_min, sigma_max, rho)
    if schedule == "log":
        ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64).log()
        return torch.cat([torch.linspace(float(ends[0]), float(ends[1]), steps, dtype=torch.float64).exp(), zero])
    if schedule == "flow":
        times = torch.linspace(sigma_max / (1 + sigma_max), 0, steps + 1, dtype=torch.float64)
        return torch.cat([from_flow_time(times[:-1]), zero])
    high = float(torch.atan(torch.tensor(sigma_max / sigma_data, dtype=torch.float64)))
    return torch.cat([from_trig_time(torch.linspace(high, 0, steps + 1, dtype=torch.float64)[:-1], sigma_data), zero])


@dataclass(kw_only=True)
class Solver:
    """A way from noise to samples.

    Args:
        steps: noise levels above 0 that it visits.
        schedule: how they are spaced: karras (with `rho`), log (even in the log of the level), flow (even in the time
            of flow matching), trig (even in that of TrigFlow).
        rho: of the karras schedule; larger crowds the levels near the smallest.
        guidance: of classifier-free guidance, D(none) + guidance (D(class) - D(none)); 1 for none.
    """

    goes_part_way: ClassVar[bool] = True  # whether `solve` leads to any level, and asks nothing but D(x, sigma)
    steps: Annotated[int, Field(ge=1)] = 18
    schedule: Schedule = "karras"
    rho: Annotated[float, Field(gt=0)] = 7.0
    guidance: Annotated[float, Field(ge=0)] = 1.0

    def prepare(self, model: Any, source: Any) -> None:
        """Learn what is needed before arrays are drawn, e.g. by a search; most solvers need nothing.

        Args:
            model: the denoiser that arrays will be drawn from.
            source: the arrays it learned from; only those of its "train" split may be looked at.
        """

    def sigmas(self, model: Any) -> Tensor:
        """Return the (steps + 1) float64 noise levels for a denoiser, the last one 0.

        Args:
            model: has `sigma_min`, `sigma_max` and `sigma_data`.
        """
        return levels(self.schedule, self.steps, model.sigma_min, model.sigma_max, self.rho, model.sigma_data)

    @torch.no_grad()
    def sample(
        self, model: Any, noise: Tensor, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, int]:
        """Return samples, and how often the network ran for each.

        Args:
            model: a `Denoiser`, or anything that is called like one and has its noise range.
            noise: (B, *shape) of unit variance.
            labels: (B,) classes, -1 for none; None for none at all.
            generator: draws what a stochastic solver adds on the way.
        """
        denoise = Counted(model, labels, self.guidance)
        sigmas = self.sigmas(model)
        found = self.solve(denoise, noise * sigmas[0].to(noise), sigmas, generator)
        return found, denoise.calls

    def solve(self, denoise: Counted, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return x at the last of the noise levels.

        Args:
            denoise: D(x, sigma).
            x: (B, *shape) at the first of them.
            sigmas: (n,) descending.
            generator: draws noise, for stochastic solvers.
        """
        raise NotImplementedError


def step_ddim(x: Tensor, denoised: Tensor, sigma: Tensor, then: Tensor) -> Tensor:
    """Return x at the next noise level by a step of first order: D + (s' / s)(x - D).

    Args:
        x: (B, *shape) at level `sigma`.
        denoised: (B, *shape) D(x, sigma).
        sigma: its noise level.
        then: the next one.
    """
    return denoised + (then / sigma) * (x - denoised)


def noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Return normal noise, drawn on the CPU so that devices agree.

    Args:
        x: what it shall look like.
        generator: draws it; None takes torch's own.
    """
    return torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
