"""Consistency training where the data has outliers, as the latents of autoencoders do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from hone.objectives.arrays import Positive, Share, squared
from hone.objectives.consistency import ImprovedConsistencyTraining
from hone.parts import part


def cauchy(left: Tensor, right: Tensor, c: float) -> Tensor:
    """Return log(1 + |l - r|^2 / (2 c^2)) of each array (B,), which grows slower than any power.

    Args:
        left: (B, *shape).
        right: (B, *shape).
        c: scale.
    """
    return ((left - right).square().flatten(1).sum(1) / (2 * c**2)).log1p()


def nearest_noise(arrays: Tensor, noise: Tensor) -> Tensor:
    """Return the order (N,) of noises that brings each array one near it: the cheapest assignment, by squared distance.

    Args:
        arrays: (N, *shape).
        noise: (N, *shape).
    """
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    costs = torch.cdist(arrays.flatten(1).double(), noise.flatten(1).double()).square()
    return torch.from_numpy(linear_sum_assignment(costs.cpu().numpy())[1])


@part(
    "objective", "slct",
    papers=[("Improved Training Technique for Latent Consistency Models", "arXiv:2502.01441")],
    claim="A Cauchy distance, a denoising loss at small noise and noise that is matched to the data train consistency "
    "models well on data with outliers, where the pseudo-Huber distance fails.",
    deviations="The schedule of c and the share of noise levels with a denoising loss could not be checked against the "
    "authors' code, which is not released; normalisation without scale belongs to the network, and ours has it.",
)  # fmt: skip
@dataclass(kw_only=True)
class RobustConsistencyTraining(ImprovedConsistencyTraining):
    """Improved consistency training with a distance that outliers cannot dominate.

    log(1 + |f(x_t, t) - sg f(x_r, r)|^2 / (2 c^2)) / (t - r)  +  denoising mean |f(x_t, t) - y|^2 at small noise,
    c = scale sqrt(size) / intervals: as the grid grows finer, so do the differences

    Args:
        end: most intervals.
        huber: unused: the distance is Cauchy's.
        scale: c with one interval, over the root of the size of an array.
        transport: whether the noise of a step is matched to its arrays, nearest first, by optimal transport.
        denoising: strength of the denoising loss.
        early: share of the grid, from the smallest level on, that has it.
    """

    end: Annotated[int, Field(ge=1)] = 640
    scale: Positive = 0.5
    transport: bool = True
    denoising: Annotated[float, Field(ge=0)] = 1.0
    early: Share = 0.25

    def before_step(self, run: Any, trees: Sequence[Any]) -> None:
        """Give every array its place, and match the step's noise to its arrays.

        Args:
            run: the run in progress.
            trees: all arrays of the step.
        """
        super().before_step(run, trees)
        if self.transport:
            whole = run.model.collate(trees)
            noise = self._draw(whole, "noise", tuple(whole.arrays.shape[1:]), torch.randn)
            self._drawn["noise"] = noise[nearest_noise(whole.arrays, noise)]

    def apart(self, guess: Tensor, aim: Tensor) -> Tensor:
        """Return the Cauchy distance of each array (B,).

        Args:
            guess: (B, *shape).
            aim: (B, *shape).
        """
        return cauchy(guess, aim, self.scale * math.sqrt(guess[0].numel()) / self.intervals_now())

    def total(self, model: Any, batch: Any, losses: Tensor, guess: Tensor) -> Tensor:
        """Return the sum of the losses, with the denoising loss of arrays at small noise.

        Args:
            model: the denoiser.
            batch: B arrays.
            losses: (B,) weighted distances.
            guess: (B, *shape) f(x_t, t).
        """
        later = self.pair(model, batch)[0].to(guess)
        grid = self.grid(model, self.intervals_now() + 1)
        small = (later <= grid[max(1, int(self.early * (len(grid) - 1)))]).to(guess)
        return (losses + self.denoising * small * squared(guess, batch.arrays)).sum()
