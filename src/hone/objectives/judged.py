"""Distillation that heads on the teacher's frozen features judge, beside its own loss."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from hone.diffusion.critics import Critic, critic_loss, generator_loss
from hone.diffusion.levels import spread
from hone.modes import frozen
from hone.objectives.arrays import ArrayObjective, Positive
from hone.objectives.base import Turn
from hone.objectives.teachers import add_player
from hone.objectives.watch import HINGE, Watching


@dataclass(kw_only=True)
class Judged(Watching, ArrayObjective):
    """An objective with a teacher on whose features heads tell real from denoised arrays, by a hinge loss.

    Args:
        adversarial: strength of the heads' verdict in the student's loss.
        critic_mean: of the log of the noise level at which the heads look.
        critic_std: of the same.
    """

    adversarial: Annotated[float, Field(ge=0)] = 0.5
    critic_mean: float = -0.4
    critic_std: Positive = 1.0
    _critic: Any = field(init=False, default=None, repr=False)

    def seat(self, run: Any, teacher: Any) -> None:
        """Let heads on a teacher's features train.

        Args:
            run: the run in progress.
            teacher: a denoiser.
        """
        self._critic = Critic(teacher)
        add_player(run, "critic", self._critic)
        if run.loader is not None:  # who evaluates takes no steps
            self.watch("critic/loss", HINGE)

    def doubts(self, model: Any, batch: Any, made: Tensor) -> Tensor:
        """Return what the student lowers (B,).

        Args:
            model: the denoiser.
            batch: B arrays.
            made: (B, *shape) denoised arrays, with gradient.
        """
        with frozen(self._critic):
            return generator_loss(self._critic(*self._shown(model, batch, made)))

    def critic_turn(self, model: Any, batch: Any, made: Tensor) -> Turn:
        """Return the heads' turn.

        Args:
            model: the denoiser.
            batch: B real arrays.
            made: (B, *shape) denoised ones.
        """
        real = self._critic(*self._shown(model, batch, batch.arrays))
        fake = self._critic(*self._shown(model, batch, made.detach()))
        return Turn("critic", critic_loss(real, fake).sum())

    def _shown(self, model: Any, batch: Any, arrays: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return arrays with noise, its levels and the classes."""
        sigma = self.drawn_levels(model, batch, "critic", mean=self.critic_mean, std=self.critic_std).to(arrays)
        noisy = arrays + spread(sigma, arrays) * self.normal(batch, "critic noise")
        return noisy, sigma, self.some_labels(model, batch)
