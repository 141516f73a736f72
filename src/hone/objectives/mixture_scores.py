"""Score-of-mixture training and distillation: scores of mixtures of real and generated arrays.

The mixture m = a p + (1 - a) q of real arrays (p) and generated ones (q) has, at each noise level, the score

    D_a = w D_p + (1 - w) D_q,  w = sigmoid(ln(p / q) + ln(a / (1 - a))),

and the a-skew Jensen-Shannon divergence has the gradient E[(1 / a) (grad log q - grad log m) dx/dtheta]: forward
Kullback-Leibler as a goes to 0, reverse at 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hone.diffusion.critics import Critic, features_of
from hone.diffusion.denoiser import Denoiser
from hone.diffusion.levels import spread
from hone.objectives.arrays import Share
from hone.objectives.base import Turn
from hone.objectives.generators import TINY, Drawn, Strength, denoising, level_weight, pull
from hone.objectives.matching import Critics, Matching
from hone.parts import part

GRID = 1000  # shares a of the mixture are multiples of 1 / GRID


class MixtureCritic(Critic):
    """Heads on the features that a score of mixtures has of arrays at the share 1/2."""

    def features(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> list[Tensor]:
        """Return the features of noisy arrays, channels second: a list of (B, C) or (B, C, ...).

        Args:
            x: (B, *shape) at noise level `sigma`.
            sigma: (B,) noise levels.
            labels: (B,) classes, None for none.
        """
        return features_of(self.body, x, sigma, labels, torch.full((len(x), 1), 0.5).to(x))


def odds(share: Tensor) -> Tensor:
    """Return ln(a / (1 - a)), with a kept off 0 and 1.

    Args:
        share: a.
    """
    return torch.logit(share, eps=1 / (10 * GRID))


def shares(uniforms: Tensor, least: int = 0) -> Tensor:
    """Return shares a, multiples of 1 / GRID from `least` / GRID to 1, all as likely.

    Args:
        uniforms: in [0, 1).
        least: the smallest of them.
    """
    return (least + (uniforms * (GRID + 1 - least)).floor()).clamp(max=GRID) / GRID


def shares_with_zeros(uniforms: Tensor, zeros: float) -> Tensor:
    """Return shares a, 0 in a part of the cases and else multiples of 1 / GRID from 0 to 1, all as likely.

    Args:
        uniforms: in [0, 1).
        zeros: the part.
    """
    rest = shares(((uniforms - zeros) / (1 - zeros)).clamp(min=0))
    return torch.where(uniforms < zeros, torch.zeros_like(rest), rest)


def skew_gap(fake: Tensor, mixed: Tensor, real: Tensor, share: Tensor, weighed: bool = True) -> Tensor:
    """Return (D_q - D_a) / a, or that times a |D_q - D_p| / |D_q - D_a|, which makes all shares pull alike.

    Args:
        fake: (B, *shape) D_q, the mixture's denoised array at a = 0.
        mixed: (B, *shape) D_a.
        real: (B, *shape) D_p, at a = 1.
        share: (B,) a.
        weighed: whether to.
    """
    gap = fake - mixed
    if not weighed:
        return gap / spread(share, gap)
    whole, part = ((fake - other).square().flatten(1).mean(1) for other in (real, mixed))
    return gap * spread(((whole + TINY) / (part + 1e-12)).sqrt(), gap)


def skew_discrimination(real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """Return a discriminator's losses (B,) for shares a, whose least is at ln(p / q) whatever a is.

    a softplus(-(l + ln(a / (1 - a)))) for real arrays, (1 - a) softplus(l + ln(a / (1 - a))) for generated ones

    Args:
        real: (B, n) logits l of real arrays.
        fake: (B, n) those of generated ones.
        share: (B,) a.
    """
    tilt = odds(share)[:, None]
    return share * F.softplus(-(real + tilt)).mean(1) + (1 - share) * F.softplus(fake + tilt).mean(1)


def skew_persuasion(fake: Tensor, share: Tensor) -> Tensor:
    """Return what the generator lowers (B,): softplus(-(l + ln(a / (1 - a)))).

    Args:
        fake: (B, n) logits l of generated arrays.
        share: (B,) a.
    """
    return F.softplus(-(fake + odds(share)[:, None])).mean(1)


@part(
    "objective", "smt",
    papers=[
        (
            "Score-of-Mixture Training: Training One-Step Generative Models Made Simple via Score Estimation of "
            "Mixture Distributions",
            "arXiv:2502.09609",
        ),
    ],
    claim="A one-step generator learns from data alone, and stably, from the scores of mixtures of real and generated "
    "arrays that one network estimates.",
    deviations="The network of the mixtures' scores begins as a copy of the generator, unless a shape is named for it. "
    "The share of the mixture is shown to it by our own embedding.",
    draws=[{"name": "multistep", "steps": "objective.student_steps"}],
)  # fmt: skip
@dataclass(kw_only=True)
class ScoreOfMixtures(Critics):
    """Score-of-mixture training: no teacher; the player "fake" is a denoiser D(x, s, a) of mixtures.

    min a |D(y_real + s n, s, a) - y_real|^2 + (1 - a) |D(y + s n, s, a) - y|^2, and y moves against
    (D(x, s, 0) - D(x, s, a)) |D_0 - D_1| / (|D_0 - D_a| mean|y - D_1|).

    Args:
        masses: share of the arrays of the score's training at which a is 0, 1/2 or 1, each as likely.
    """

    masses: Share = 0.5

    def make_critic(self, fake: Denoiser) -> Any:
        """Return the score of mixtures as `body`, with heads on its features.

        Args:
            fake: a denoiser.
        """
        fake.widen(1)
        made = MixtureCritic(fake)
        made.body = fake
        return made

    def critic_turn(self, model: Any, batch: Any, turn: str) -> Turn:
        """Return the loss of the score of mixtures and of the discriminator.

        Args:
            model: the generator.
            batch: B real arrays.
            turn: name of the turn.
        """
        with torch.no_grad():
            drawn = self.draw(model, batch, turn)
        share = shares(drawn.free)
        mass = (3 * self.uniform(batch, f"m{turn}")).floor().clamp(max=2) / 2
        share = torch.where(self.uniform(batch, f"b{turn}") < self.masses, mass, share)
        net, noise = self._critic.body, self.normal(batch, f"r{turn}")
        losses = (1 - share) * denoising(net, drawn.clean, drawn.noise, drawn.sigma, drawn.labels, share[:, None])
        losses = losses + share * denoising(net, batch.arrays, noise, drawn.sigma, drawn.labels, share[:, None])
        metrics = {"denoising": losses.detach().sum()}
        if self.judges():
            real = batch.arrays + spread(drawn.sigma, noise) * noise
            gan = self.discrimination(drawn, real, drawn.sigma, shares(self.uniform(batch, f"d{turn}"), 1))
            losses = losses + self.gan_critic_weight * gan
            metrics["gan"] = gan.detach().sum()
        return Turn("fake", losses.sum(), metrics)

    def discrimination(self, drawn: Drawn, real: Tensor, sigma: Tensor, share: Tensor | None = None) -> Tensor:
        """Return the discriminator's losses (B,), whose least is at logits of ln p / q.

        Args:
            drawn: B generated arrays with noise.
            real: (B, *shape) real ones with noise.
            sigma: (B,) their levels.
            share: (B,) a; None for 1/2.
        """
        share = torch.full_like(sigma, 0.5) if share is None else share
        right = self._critic(real, sigma, drawn.labels)
        return skew_discrimination(right, self._critic(drawn.noisy, drawn.sigma, drawn.labels), share)

    def losses(self, model: Any, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the generator's losses (B,), and figures (B,) to report by name.

        Args:
            model: the generator.
            drawn: B generated arrays with noise.
        """
        share = shares(drawn.free, 1)
        with torch.no_grad():
            net, zero = self._critic.body, torch.zeros_like(share)
            fake, mixed, real = (
                net(drawn.noisy, drawn.sigma, drawn.labels, a[:, None]) for a in (zero, share, zero + 1)
            )
            gap = skew_gap(fake, mixed, real, share)
            gap = gap * level_weight("adaptive", drawn.clean, real, drawn.sigma, model.sigma_data)
        return self.persuading(drawn, pull(drawn.clean, gap), {})

    def persuasion(self, drawn: Drawn) -> Tensor:
        """Return how much the discriminator doubts generated arrays (B,), with the share of the mixture.

        Args:
            drawn: B generated arrays with noise.
        """
        return skew_persuasion(self._critic(drawn.noisy, drawn.sigma, drawn.labels), shares(drawn.free, 1))


@part(
    "objective", "smd",
    papers=[
        (
            "Score-of-Mixture Training: Training One-Step Generative Models Made Simple via Score Estimation of "
            "Mixture Distributions",
            "arXiv:2502.09609",
        ),
    ],
    claim="With a pretrained teacher, the score of the mixture is made of the teacher's, an online fake score and a "
    "discriminator that the same regression trains, and one-step samples are as good as those of other distillations.",
    deviations="The discriminator reads all layers of the fake score.",
    draws=[{"name": "multistep", "steps": "objective.student_steps"}],
)  # fmt: skip
@dataclass(kw_only=True)
class MixtureDistillation(Matching):
    """Score-of-mixture distillation.

    w = sigmoid(l + ln(a / (1 - a))), l being the discriminator's logit; y moves
    against (w / a)(D_q - D_p) / mean|y - D_p|.
    The discriminator is trained by (1 - a) |w (D_p - D_q)|^2 at generated arrays and a |(1 - w)(D_p - D_q)|^2 at real
    ones: the distance of the mixture's denoised array from that of either side. There a is even in [0, 1] but for the
    `zeros`; for the generator it is even in [1/2, 1], so that w / a is at most 2.

    Args:
        zeros: share of the arrays of the discriminator's training at which a is 0.
        gan_critic_weight: of the discriminator's loss beside the fake score's.
    """

    zeros: Annotated[float, Field(ge=0, lt=1)] = 0.25
    gan_critic_weight: Strength = 1.0

    def judges(self) -> bool:
        """Return whether there is a discriminator: here always, since the mixture needs it."""
        return True

    def mixing(self, x: Tensor, sigma: Tensor, labels: Tensor | None, share: Tensor) -> Tensor:
        """Return w (B,), the weight of the real score in the mixture's.

        Args:
            x: (B, *shape) noisy arrays.
            sigma: (B,) their levels.
            labels: (B,) classes, None for none.
            share: (B,) a.
        """
        return torch.sigmoid(self._critic(x, sigma, labels).mean(1) + odds(share))

    def discrimination(self, drawn: Drawn, real: Tensor, sigma: Tensor) -> Tensor:
        """Return the discriminator's losses (B,): how far the mixture is from either side.

        Args:
            drawn: B generated arrays with noise.
            real: (B, *shape) real ones with noise.
            sigma: (B,) their levels.
        """
        share, total = shares_with_zeros(drawn.free, self.zeros), torch.zeros_like(sigma)
        for x, level, own in ((drawn.noisy, drawn.sigma, 1 - share), (real, sigma, share)):
            with torch.no_grad():
                teacher = self._teacher.guided(x, level, drawn.labels, self.guidance)
                apart = (teacher - self._critic.body(x, level, drawn.labels)).square().flatten(1).mean(1)
                apart = apart / self._critic.body.parameterisation.error_scale(level) ** 2
            mix = self.mixing(x, level, drawn.labels, share)
            total = total + own * apart * (mix if x is drawn.noisy else 1 - mix) ** 2
        return total

    def share(self, drawn: Drawn) -> Tensor:
        """Return the share a (B,) that the generator is trained with.

        Args:
            drawn: B generated arrays with noise.
        """
        return shares(drawn.free, GRID // 2)

    def factor(self, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """Return w / a (B,).

        Args:
            drawn: B generated arrays with noise.
        """
        share = self.share(drawn)
        return self.mixing(drawn.noisy, drawn.sigma, drawn.labels, share) / share, {}

    def persuasion(self, drawn: Drawn) -> Tensor:
        """Return how much the discriminator doubts generated arrays (B,), with the share of the mixture.

        Args:
            drawn: B generated arrays with noise.
        """
        return skew_persuasion(self._critic(drawn.noisy, drawn.sigma, drawn.labels), self.share(drawn))
