"""Consistency training where the data has outliers, as the latents of autoencoders do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from hone.objectives.arrays import Share, output_error, squared
from hone.objectives.consistency import ImprovedConsistencyTraining
from hone.parts import part


def cauchy(left: Tensor, right: Tensor, c: float) -> Tensor:
    """Return log(1 + |l - r|^2 / (2 n c^2)) of each array (B,) of n numbers, which grows slower than any power.

    Args:
        left: (B, *shape).
        right: (B, *shape).
        c: scale.
    """
    return (squared(left, right) / (2 * c**2)).log1p()


def nearest_noise(arrays: Tensor, noise: Tensor) -> Tensor:
    """Return the order (N,) of noises that brings each array one near it: the cheapest assignment, by squared distance.

    Args:
        arrays: (N, *shape).
        noise: (N, *shape).
    """
    from scipy.optimize import linear_sum_assignment

    costs = torch.cdist(arrays.flatten(1).double(), noise.flatten(1).double()).square()
    return torch.from_numpy(linear_sum_assignment(costs.cpu().numpy())[1])


@part(
    "objective", "slct",
    papers=[("Improved Training Technique for Latent Consistency Models", "arXiv:2502.01441")],
    claim="A Cauchy distance, a denoising loss at small noise and noise that is matched to the data train consistency "
    "models well on data with outliers, where the pseudo-Huber distance fails.",
    deviations="The numbers are those of the code that the authors developed (quandao10/LCT), not of the paper's own "
    "repository, which holds none; its versions differ by a root of 2 in c. Normalisation without scale belongs to the "
    "network, and ours has it.",
    draws=[{"name": "multistep", "steps": 1}, {"name": "multistep", "steps": 2}],
)  # fmt: skip
@dataclass(kw_only=True)
class RobustConsistencyTraining(ImprovedConsistencyTraining):
    """Improved consistency training with a distance that outliers cannot dominate.

    log(1 + |f(x_t, t) - sg f(x_r, r)|^2 / (2 n c^2)) / (t - r)  +  denoising mean |f(x_t, t) - y|^2 / c_out(t)^2,
    the second term at small noise only, and its mean over those arrays of a step that have it; n numbers in an array,
    c = huber sqrt(n) on the first grid, then sqrt(2) exp(-1.15 ln N - 0.85) with N intervals

    Args:
        end: most intervals.
        huber: c of the first grid over the root of the size of an array.
        transport: whether the noise of a step is matched to its arrays, nearest first, by optimal transport.
        denoising: strength of the denoising loss.
        early: share of the grid, from the smallest level on, that has it.
    """

    end: Annotated[int, Field(ge=1)] = 640
    transport: bool = True
    denoising: Annotated[float, Field(ge=0)] = 5.0
    early: Share = 0.25
    _later: Tensor = field(init=False, default_factory=lambda: torch.empty(0), repr=False)
    _small: Tensor = field(init=False, default_factory=lambda: torch.empty(0), repr=False)
    _part: float = field(init=False, default=1.0, repr=False)

    def before_step(self, run: Any, trees: Sequence[Any]) -> None:
        """Give every array its place, match the step's noise to its arrays, and count those at small noise.

        Args:
            run: the run in progress.
            trees: all arrays of the step.
        """
        super().before_step(run, trees)
        whole = run.model.collate(trees)
        if self.transport:
            noise = self._draw(whole, "noise", tuple(whole.arrays.shape[1:]), torch.randn)
            self._drawn["noise"] = noise[nearest_noise(whole.arrays, noise)]
        self.pair(run.model, whole)
        self._part = float(self._small.double().mean())

    def pair(self, model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return (t, r, weight), each (B,), with t > r, and keep t in mind.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        self._later, sooner, weight = super().pair(model, batch)
        grid = self.grid(model, self.intervals_now() + 1)
        self._small = self._later <= grid[max(1, int(self.early * (len(grid) - 1)))]
        return self._later, sooner, weight

    def scale_now(self, size: int) -> float:
        """Return c at this step.

        Args:
            size: of an array.
        """
        intervals = self.intervals_now()
        if intervals <= self.start:
            return self.huber * math.sqrt(size)
        return math.sqrt(2) * math.exp(-1.15 * math.log(intervals) - 0.85)

    def apart(self, guess: Tensor, aim: Tensor) -> Tensor:
        """Return the Cauchy distance of each array (B,).

        Args:
            guess: (B, *shape).
            aim: (B, *shape).
        """
        return cauchy(guess, aim, self.scale_now(guess[0].numel()))

    def total(self, model: Any, batch: Any, losses: Tensor, guess: Tensor) -> Tensor:
        """Return the sum of the losses, with the denoising loss of arrays at small noise.

        Args:
            model: the denoiser.
            batch: B arrays.
            losses: (B,) weighted distances.
            guess: (B, *shape) f(x_t, t).
        """
        small, level = self._small.to(guess), self._later.to(guess)
        outside = bool((batch.places < 0).any())  # evaluation knows no whole step
        part = float(small.mean()) if outside else self._part
        errors = output_error(model, guess, batch.arrays, level)
        return (losses + self.denoising / max(part, 1e-9) * small * errors).sum()
