"""Consistency distillation of stochastic sampling."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from hone.diffusion.levels import spread
from hone.objectives.arrays import Share
from hone.objectives.base import Turn
from hone.objectives.consistency import huber_constant, pseudo_huber
from hone.objectives.consistency_distillation import Distillation
from hone.objectives.judged import Judged
from hone.parts import part


@part(
    "objective", "scott",
    papers=[("SCott: Accelerating Diffusion Models with Stochastic Consistency Distillation", "arXiv:2403.01505")],
    claim="Distilling a teacher's stochastic steps, with noise of a chosen strength, draws better and more varied "
    "samples than distilling its deterministic ones.",
    deviations="DDIM's stochastic step instead of SDE-DPM-Solver; heads on the teacher's features judge arrays instead "
    "of a discriminator with LoRA; the authors' code is not released, so that the pseudo-Huber distance and its "
    "constant are iCT's. With drop_labels the teacher's steps still see the class.",
    draws=[{"name": "multistep", "steps": 1}, {"name": "multistep", "steps": 2}],
)  # fmt: skip
@dataclass(kw_only=True)
class StochasticDistillation(Judged, Distillation):
    """Consistency distillation where x_r is reached from x_t by several stochastic steps of the teacher.

    x' = D + sqrt(s'^2 - u^2) (x - D) / s + u z,  u = eta (s' / s) sqrt(s^2 - s'^2), in `substeps` equal parts of ln s

    Args:
        levels: of the grid.
        eta: strength of the noise, 0 for the deterministic steps.
        substeps: of the teacher between two levels.
        adversarial: strength of a hinge loss on heads over the teacher's features; 0 for none.
    """

    levels: Annotated[int, Field(ge=2)] = 18
    eta: Share = 0.3
    substeps: Annotated[int, Field(ge=1)] = 2
    adversarial: Annotated[float, Field(ge=0)] = 0.0

    def setup(self, run: Any) -> None:
        """Load the teacher, begin the running mean, and let heads train where they are asked for.

        Args:
            run: the run in progress.
        """
        super().setup(run)
        if self.adversarial:
            self.seat(run, self._teacher)

    def earlier(self, model: Any, batch: Any, noisy: Tensor, noise: Tensor, later: Tensor, sooner: Tensor) -> Tensor:
        """Return where the teacher's stochastic steps lead (B, *shape).

        Args:
            model: the denoiser.
            batch: B arrays.
            noisy: (B, *shape) x_t.
            noise: (B, *shape) z.
            later: (B,) t.
            sooner: (B,) r.
        """
        ratio = (sooner / later) ** (1 / self.substeps)
        x, now = noisy, later
        for step in range(self.substeps):
            then = now * ratio
            denoised = x - spread(now, x) * self.slope(batch, x, now)
            fresh = self.eta * then / now * (now**2 - then**2).clamp(min=0).sqrt()
            kept = (then**2 - fresh**2).clamp(min=0).sqrt() / now
            x = denoised + spread(kept, x) * (x - denoised) + spread(fresh, x) * self.normal(batch, f"{step}sde")
            now = then
        return x

    def apart(self, guess: Tensor, aim: Tensor) -> Tensor:
        """Return the pseudo-Huber distance of each array (B,).

        Args:
            guess: (B, *shape).
            aim: (B, *shape).
        """
        return pseudo_huber(guess, aim, huber_constant(guess[0].numel()))

    def total(self, model: Any, batch: Any, losses: Tensor, guess: Tensor) -> Tensor:
        """Return the sum of the losses, with what the heads say of the student's arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
            losses: (B,) weighted distances.
            guess: (B, *shape) f(x_t, t).
        """
        if self._critic is None:
            return losses.sum()
        return (losses + self.adversarial * self.doubts(model, batch, guess)).sum()

    def turns(self, model: Any, batch: Any) -> Iterator[Turn]:
        """Yield the student's turn, and that of the heads where there are some.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        losses, guess = self.parts(model, batch)
        yield Turn("model", self.total(model, batch, losses, guess))
        if self._critic is not None:
            yield self.critic_turn(model, batch, guess)
