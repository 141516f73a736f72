"""Reward tuning by gradients: what a reward says of drawn arrays goes back through the chain of steps that drew them.

Objectives that tune for a reward draw from the model themselves; the data only says which classes are asked for, and
what the drawn arrays are compared with in evaluation. There they report "reward", the mean over drawn arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import NormalDist
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.chains import Link, denoising_chain, follow
from hone.objectives.arrays import ArrayObjective, Share
from hone.options import Nested
from hone.parts import part
from hone.rewards.arrays import ArrayReward, Near, unfit, worth
from hone.solvers.base import Schedule

Steps = Annotated[int, Field(ge=1, le=99)]
Count = Annotated[int, Field(ge=1)]


def stream(step: int, copy: int = 0) -> str:
    """Return the name of what a step of a chain draws.

    Args:
        step: number of the step.
        copy: number of the chain, where an array has several.
    """
    return f"{step:02d}{copy:02d}"


@dataclass(kw_only=True)
class Drawing(ArrayObjective):
    """An objective that draws arrays by a short chain of steps.

    Args:
        steps: evaluations of the network in a chain.
        eta: share of the ancestral noise, 0 for none (DDIM), 1 for DDPM.
        schedule: how the noise levels are spaced; see the solvers.
        guidance: of classifier-free guidance while drawing; 1 for none.
    """

    steps: Steps = 10
    eta: Share = 0.0
    schedule: Schedule = "karras"
    guidance: Annotated[float, Field(ge=0)] = 1.0

    def links(self, model: Any, last: float = 0.0) -> list[Link]:
        """Return the chain that draws.

        Args:
            model: the denoiser.
            last: standard deviation of noise that the last step adds.
        """
        return denoising_chain(model, self.steps, eta=self.eta, schedule=self.schedule, last=last)

    def draw(self, model: Any, batch: Any, free: int = 0) -> Tensor:
        """Return arrays (B, *shape) of the classes of a batch.

        Args:
            model: the denoiser.
            batch: B arrays; their classes are asked for.
            free: first steps that no gradient goes through.
        """
        labels = self.some_labels(model, batch)
        chain = self.links(model)
        return follow(
            model, chain, self.normal(batch), lambda step: self.normal(batch, stream(step)), labels,
            guidance=self.guidance, free=free,
        )[-1]  # fmt: skip


@dataclass(kw_only=True)
class Rewarded:
    """Mixed into objectives that a reward judges.

    Args:
        reward: a reward of arrays, or several that are added up; None takes `near`.
    """

    reward: Annotated[Any, Nested("reward", several=True)] = None
    _rewards: list[ArrayReward] = field(init=False, default_factory=list, repr=False)

    def needs_gradients(self) -> bool:
        """Return whether gradients go through the reward."""
        return False

    def named(self) -> list[Any]:
        """Return the rewards that the recipe names."""
        if self.reward is None:
            return [Near()]
        return list(self.reward) if isinstance(self.reward, list) else [self.reward]

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the rewards."""
        yield from unfit(self.named(), differentiable=self.needs_gradients())

    def setup(self, run: Any) -> None:
        """Prepare the rewards.

        Args:
            run: the run in progress.
        """
        super().setup(run)  # type: ignore[misc]
        self._rewards = self.named()
        for reward in self._rewards:
            reward.setup(run)

    def worth(self, arrays: Tensor, labels: Tensor) -> Tensor:
        """Return the reward of each array (B,).

        Args:
            arrays: (B, *shape).
            labels: (B,) classes that were asked for.
        """
        return worth(self._rewards, arrays, labels)


@dataclass(kw_only=True)
class RewardTuning(Rewarded, Drawing):
    """An objective that tunes a denoiser for a reward of what it draws."""

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, summed over the arrays; in evaluation what drawn arrays lack in reward.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        if not bool((batch.places < 0).any()):
            return self.tuning(model, batch)
        with torch.no_grad():
            found = self.worth(self.draw(model, batch), batch.labels).sum()
        return -found, {"reward": found}

    def tuning(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of training, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        raise NotImplementedError


@part(
    "objective", "alignprop",
    papers=[("Aligning Text-to-Image Diffusion Models with Reward Backpropagation", "arXiv:2310.03739")],
    claim="The gradient of a reward, taken back through the sampling chain, raises it in fewer steps than policy "
    "gradients do.",
    deviations="Activations of the chain are kept instead of recomputed; which weights train is the adapter's business "
    "(the paper trains LoRA).",
    draws=[{"name": "ddim", "steps": "objective.steps", "schedule": "objective.schedule", "eta": 1.0}],
)  # fmt: skip
@dataclass(kw_only=True)
class AlignProp(RewardTuning):
    """Reward backpropagation: -R(x_0), through the last K steps of the chain that draws x_0, K anew in each step.

    With n steps, the first n - K are without gradient: n - K even among 1 ... n - 1 (uniform), or near 42/50 n with a
    spread of 5/50 n (gaussian, as in the authors' code).

    Args:
        eta: share of the ancestral noise; 1 in the authors' code.
        truncation: how many of the first steps are without gradient: uniform, gaussian, fixed (all but `kept`) or none.
        kept: last steps with gradient, for `fixed`.
        wanted: the reward that is best, |R - wanted|; None takes more for better.
    """

    eta: Share = 1.0
    truncation: Literal["uniform", "gaussian", "fixed", "none"] = "uniform"
    kept: Count = 1
    wanted: float | None = None

    def needs_gradients(self) -> bool:
        """Return whether gradients go through the reward: always."""
        return True

    def free(self, batch: Any) -> int:
        """Return how many of the first steps of this training step have no gradient, the same for all arrays.

        Args:
            batch: B arrays of it.
        """
        if self.truncation == "none" or self.steps == 1:
            return 0
        if self.truncation == "fixed":
            return max(0, self.steps - self.kept)
        drawn = self.once(batch, "trun")
        if self.truncation == "uniform":
            return 1 + int(drawn * (self.steps - 1))
        place = self.steps * NormalDist(0.84, 0.1).inv_cdf(min(max(drawn, 1e-9), 1 - 1e-9))
        return min(max(1, int(place)), self.steps - 1)

    def tuning(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of training, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        found = self.worth(self.draw(model, batch, self.free(batch)), batch.labels)
        losses = -found if self.wanted is None else (found - self.wanted).abs()
        return losses.sum(), {"reward": found.detach().sum()}
