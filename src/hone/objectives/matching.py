"""Distribution matching: a teacher's score against a fake score that is trained online on what the generator makes.

All move a generated array y against w h (D_q - D_p) at a noised copy of it. The axes: the score of real arrays D_p (a
teacher), the fake score D_q (the player "fake", which takes several steps for each of the generator's), the weight of
noise levels w, the weight h of a divergence (`divergences.py`), and a discriminator on the fake score's features.

    method        D_q                     w                 h                discriminator
    sds           y itself                sds               1                none
    nfsd          none: noise left out    sds               1                none
    vsd           trained                 sds               1                none
    dmd2          trained                 1 / mean|y - D_p| 1                yes
    f-distill     trained                 1 / mean|y - D_p| r^2 f''(r) of r  yes, which gives r
    uni-instruct  trained, differentiated 1 / mean|y - D_p| three of them    yes, which gives r
    smt, smd      score of mixtures       1 / mean|y - D_p| in the mixture   yes
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from hone.diffusion.critics import Critic, critic_loss, generator_loss
from hone.diffusion.denoiser import Denoiser
from hone.diffusion.levels import Parameterisation, spread
from hone.errors import ModelError
from hone.objectives import divergences
from hone.objectives.arrays import Positive
from hone.objectives.base import Turn
from hone.objectives.divergences import Divergence
from hone.objectives.generators import TINY, Contested, Distilled, Drawn, Strength, denoising
from hone.objectives.teachers import add_player
from hone.options import Nested
from hone.parts import part

Count = Annotated[int, Field(ge=1)]
GUESSING = 2 * math.log(2)  # a discriminator's loss when it cannot tell
CLAMP = 10.0  # of logits that are read as the log of a ratio


def fake_network(critic: Any, begin: Any, model: Any) -> Denoiser:
    """Return the denoiser that becomes a fake score: a fresh network, or a copy.

    Args:
        critic: shape of a fresh network; None takes a copy.
        begin: what is copied: a teacher; the student instead, where that is no denoiser with weights.
        model: the student.

    Raises:
        ModelError: there is nothing to copy.
    """
    if critic is not None:
        kept = Parameterisation("edm", model.sigma_data, model.sigma_min)
        plan = critic.build(model.shape, model.classes)
        made = Denoiser(plan, kept, model.shape, classes=model.classes, sigma_max=model.sigma_max)
        return made.to(next(model.parameters()))
    begin = begin if isinstance(begin, Denoiser) else model
    if not getattr(begin.hf, "denoises", True):
        raise ModelError(
            "objective.critic: the fake score needs a network, which neither this teacher nor the student has: name "
            "one, e.g. mlp"
        )
    return copy.deepcopy(begin).requires_grad_(True)


@dataclass(kw_only=True)
class Critics(Contested):
    """A generator beside a fake score, with heads on its features that tell real from generated arrays.

    Args:
        critic: network of the fake score; None takes a copy of the teacher, or of the student where the teacher has no
            network.
        critic_updates: steps of the fake score for each of the generator's.
        critic_rate: factor on the learning rate for the fake score and the discriminator.
        gan_weight: of the discriminator in the generator's loss; 0 leaves the discriminator out where nothing else
            needs it.
        gan_critic_weight: of the discriminator's loss beside the fake score's.
    """

    critic: Annotated[Any, Nested("network")] = None
    gan_weight: Strength = 0.003
    gan_critic_weight: Strength = 0.01

    def prepare(self, run: Any) -> None:
        """Add the fake score, and its heads where they are needed, as the player "fake".

        Args:
            run: the run in progress.
        """
        super().prepare(run)
        self._critic = self.make_critic(fake_network(self.critic, getattr(self, "_teacher", None), run.model))
        add_player(run, "fake", self._critic, self.critic_rate)
        self.watch("fake/denoising")
        if self.judges():
            self.watch("fake/gan", GUESSING)

    def make_critic(self, fake: Denoiser) -> Any:
        """Return the fake score as `body`, with heads on its features where they are needed.

        Args:
            fake: the fake score.
        """
        made: Any = Critic(fake) if self.judges() else nn.Module()
        made.body = fake
        return made

    def judges(self) -> bool:
        """Return whether there is a discriminator."""
        return self.gan_weight > 0

    def critic_turn(self, model: Any, batch: Any, turn: str) -> Turn:
        """Return the loss of the fake score and of the discriminator on generated arrays.

        Args:
            model: the generator.
            batch: B real arrays.
            turn: name of the turn.
        """
        with torch.no_grad():
            drawn = self.draw(model, batch, turn)
        losses = denoising(self._critic.body, drawn.clean, drawn.noise, drawn.sigma, drawn.labels)
        metrics = {"denoising": losses.detach().sum()}
        if self.judges():
            gan = self.discrimination(drawn, *self.noised_real(batch, turn))
            losses = losses + self.gan_critic_weight * gan
            metrics["gan"] = gan.detach().sum()
        return Turn("fake", losses.sum(), metrics)

    def noised_real(self, batch: Any, turn: str) -> tuple[Tensor, Tensor]:
        """Return the real arrays with noise (B, *shape), and its levels (B,).

        Args:
            batch: B real arrays.
            turn: name of the turn.
        """
        sigma = self.levels(self.uniform(batch, f"t{turn}"))
        return batch.arrays + spread(sigma, batch.arrays) * self.normal(batch, f"r{turn}"), sigma

    def discrimination(self, drawn: Drawn, real: Tensor, sigma: Tensor) -> Tensor:
        """Return the discriminator's losses (B,), whose least is at logits of ln p / q.

        Args:
            drawn: B generated arrays with noise.
            real: (B, *shape) real ones with noise.
            sigma: (B,) their levels.
        """
        right = self._critic(real, sigma, drawn.labels)
        return critic_loss(right, self._critic(drawn.noisy, drawn.sigma, drawn.labels), "non-saturating")

    def persuasion(self, drawn: Drawn) -> Tensor:
        """Return how much the discriminator doubts generated arrays (B,), which the generator lowers.

        Args:
            drawn: B generated arrays with noise.
        """
        return generator_loss(self._critic(drawn.noisy, drawn.sigma, drawn.labels), "non-saturating")

    def persuading(self, drawn: Drawn, losses: Tensor, figures: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the generator's losses (B,) and figures with the discriminator's among them.

        Args:
            drawn: B generated arrays with noise.
            losses: (B,) the others.
            figures: (B,) each, by name.
        """
        if not self.gan_weight:
            return losses, figures
        gan = self.persuasion(drawn)
        return losses + self.gan_weight * gan, {**figures, "gan": gan}


@dataclass(kw_only=True)
class Matching(Critics, Distilled):
    """A generator between a teacher's score and a fake score; see the module's docstring."""

    def fake(self, drawn: Drawn) -> Tensor:
        """Return the fake score's D_q (B, *shape).

        Args:
            drawn: B generated arrays with noise.
        """
        found: Tensor = self._critic.body(drawn.noisy, drawn.sigma, drawn.labels)
        return found

    def losses(self, model: Any, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the generator's losses (B,), and figures (B,) to report by name.

        Args:
            model: the generator.
            drawn: B generated arrays with noise.
        """
        return self.persuading(drawn, *super().losses(model, drawn))


@part(
    "objective", "dmd2",
    papers=[("Improved Distribution Matching Distillation for Fast Image Synthesis", "arXiv:2405.14867")],
    claim="A one-step generator that is pulled by the difference of a teacher's and an online fake score, the latter "
    "with several steps for each of the generator's, and that a discriminator shows real data, draws better samples "
    "than one without these two.",
    deviations="All steps of the fake score for one of the generator's see the same real arrays, with other noise. The "
    "discriminator judges the arrays that the scores compare, as NVIDIA's implementation does, and reads all layers.",
    draws=[{"name": "multistep", "steps": "objective.student_steps"}],
)  # fmt: skip
@dataclass(kw_only=True)
class DMD2(Matching):
    """Distribution matching distillation, second version.

    y moves against (D_q - D_p) / mean|y - D_p|, with D_q trained on generated arrays for `critic_updates` steps before,
    and a logistic discriminator on D_q's features adds gan_weight softplus(-logit).
    """


@dataclass(kw_only=True)
class Ratios(Matching):
    """A generator whose pull depends on r = p / q, which is the exponential of the discriminator's logit.

    Args:
        divergence: of generated from real arrays (`hone.objectives.divergences`).
        smallest: least r that is believed.
        largest: most.
        bins: parts of the noise range, within each of which r is divided by its running mean; 0 leaves it as it is.
        memory: share of a running mean that stays after a step.
    """

    divergence: Divergence = "jensen-shannon"
    smallest: Positive = 0.1
    largest: Positive = 20.0
    bins: Annotated[int, Field(ge=0, le=100)] = 10
    memory: Annotated[float, Field(ge=0, lt=1)] = 0.9
    _means: Tensor | None = field(init=False, default=None, repr=False)

    def judges(self) -> bool:
        """Return whether there is a discriminator: here always, since it gives r."""
        return True

    def ratio(self, drawn: Drawn) -> Tensor:
        """Return r (B,), with gradient by the arrays, without its mean at this noise level.

        Args:
            drawn: B generated arrays with noise.
        """
        logits = self._critic(drawn.noisy, drawn.sigma, drawn.labels).mean(1).clamp(-CLAMP, CLAMP)
        return logits.exp().clamp(self.smallest, self.largest)

    def means(self, like: Tensor) -> Tensor:
        """Return the running means (bins + 1,): of r in each bin, and last of the weight h.

        Args:
            like: a tensor of the wanted kind.
        """
        if self._means is None:
            self._means = torch.ones(self.bins + 1, dtype=torch.float64)
        return self._means.to(like)

    def levelled(self, drawn: Drawn, ratio: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return r (B,) over its running mean, and what the mean is taken further with, (B,) each.

        Args:
            drawn: B generated arrays with noise.
            ratio: (B,) r.
        """
        if not self.bins:
            return ratio, {}
        which = (drawn.place * self.bins).long().clamp(0, self.bins - 1)
        figures: dict[str, Tensor] = {}
        for number in range(self.bins):
            mine = (which == number).to(ratio)
            figures |= {f"ratio {number}": mine * ratio.detach(), f"count {number}": mine}
        return ratio / (self.means(ratio)[:-1][which] + TINY), figures

    def after_step(self, run: Any, row: dict[str, Any]) -> None:
        """Take the running means further.

        Args:
            run: the run in progress.
            row: metrics of the step; those that only the means need are taken out.
        """
        super().after_step(run, row)
        means = self.means(torch.ones((), dtype=torch.float64))
        for number in range(self.bins):
            total, count = row.pop(f"ratio {number}"), row.pop(f"count {number}")
            if count:
                means[number] = self.memory * means[number] + (1 - self.memory) * total / count
        if "h" in row:
            means[-1] = self.memory * means[-1] + (1 - self.memory) * row["h"]
        self._means = means

    def state_dict(self) -> dict[str, Any]:
        """Return the running means, and what the watches have seen."""
        means = self.means(torch.ones((), dtype=torch.float64))
        return {**super().state_dict(), "means": means.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: as `state_dict` returned it.
        """
        super().load_state_dict(state)
        self._means = state["means"].clone()


@part(
    "objective", "f-distill",
    papers=[("One-step Diffusion Models with $f$-Divergence Distribution Matching", "arXiv:2502.15681")],
    claim="Distillation by divergences that seek modes less than the reverse Kullback-Leibler divergence, above all "
    "Jensen-Shannon's, draws better one-step samples.",
    deviations="The means that r and h are divided by are running ones of the steps before, not those of the batch, so "
    "that micro-batches change nothing. The discriminator stands on the fake score's features, as in DMD2, not on the "
    "teacher's.",
    draws=[{"name": "multistep", "steps": "objective.student_steps"}],
)  # fmt: skip
@dataclass(kw_only=True)
class FDistill(Ratios):
    """Distribution matching by any f-divergence.

    y moves against h(r) / mean(h) (D_q - D_p) / mean|y - D_p|,  h(r) = r^2 f''(r),  r = p / q from the discriminator,
    kept between `smallest` and `largest` and divided by its mean at the noise level.
    """

    def factor(self, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """Return h (B,) over its mean, and figures (B,) to report by name.

        Args:
            drawn: B generated arrays with noise.
        """
        ratio, figures = self.levelled(drawn, self.ratio(drawn))
        h = divergences.weight(self.divergence, ratio)
        return h / (self.means(h)[-1] + TINY), {**figures, "h": h}
