"""Progressive distillation whose students are judged by a discriminator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hone.diffusion.critics import Critic, Head, critic_loss, generator_loss
from hone.diffusion.levels import spread
from hone.modes import frozen
from hone.objectives.arrays import Positive, Share, squared
from hone.objectives.base import Turn
from hone.objectives.consistency import Count
from hone.objectives.matching import GUESSING
from hone.objectives.progressive import Progressive, implied, snr_weight, step
from hone.objectives.teachers import add_player
from hone.objectives.watch import Watching
from hone.parts import part


class StepCritic(Critic):
    """Judges a step from x to x': by the features of both, or by those of x' alone."""

    def __init__(self, denoiser: Any) -> None:
        """Take the features and make the heads.

        Args:
            denoiser: gives the features; a copy is taken, which trains along.
        """
        super().__init__(denoiser, train_body=True)
        self.pairs = nn.ModuleList(Head(2 * channels, dimensions) for channels, dimensions in self.sizes)
        self.pairs.to(next(denoiser.parameters()))

    def step(self, x: Tensor, now: Tensor, ahead: Tensor, then: Tensor, labels: Tensor | None) -> Tensor:
        """Return the logits (B, n) of a step: high for those of the teacher.

        Args:
            x: (B, *shape) at level `now`.
            now: (B,) noise levels.
            ahead: (B, *shape) at level `then`.
            then: (B,) lower noise levels, above 0.
            labels: (B,) classes, None for none.
        """
        pairs = zip(self.features(ahead, then, labels), self.features(x, now, labels), strict=True)
        heads = zip(self.pairs, pairs, strict=True)
        return torch.cat([head(torch.cat(states, dim=1)) for head, states in heads], dim=1)


@part(
    "objective", "lightning",
    papers=[("SDXL-Lightning: Progressive Adversarial Diffusion Distillation", "arXiv:2402.13929")],
    claim="Students of a progressive distillation that are judged by a discriminator instead of by squared distances "
    "draw sharper samples in one to four steps.",
    deviations="From memory of the paper; there is no official training code. The discriminator goes on from student "
    "to student. Its heads stand on every layer that the network shows, the paper's on the middle. Squared steps are "
    "weighted by the truncated signal-to-noise ratio.",
    draws=[{"name": "ddim", "steps": "objective.plan.-1", "schedule": "objective.schedule"}],
)  # fmt: skip
@dataclass(kw_only=True)
class Lightning(Watching, Progressive):
    """Progressive adversarial distillation.

    The student's x' = D(x, s) + (s' / s) (x - D(x, s)) shall look like the teacher's to a discriminator with the
    network of the teacher, by the non-saturating loss. It sees the step, D(x, x', s, s'), at first, so that students
    keep to the teacher's flow; then x' alone, D(x', s'), which lets them leave it. Students of more than `matched`
    steps learn by squared distances. Where s' is 0, noise of one of the levels `judged` is added before judgement.

    Sampled by `ddim` with the same schedule and the last of the plan's numbers of steps.

    Args:
        plan: numbers of steps: the teacher's, and those of the students, each of which teaches the next one.
        matched: most steps of a student that is judged.
        relax: share of a judged student's time after which the discriminator sees x' alone.
        judged: noise levels, each as likely, at which clean arrays are judged.
        critic_rate: factor on the learning rate of the discriminator.
    """

    plan: list[Count] = field(default_factory=lambda: [32, 8, 4, 2, 1])
    matched: Count = 8
    relax: Share = 0.5
    judged: list[Positive] = field(default_factory=lambda: [0.05, 0.5, 1.5, 5.0])
    critic_rate: Positive = 1.0
    _critic: Any = field(init=False, default=None, repr=False)

    measured = False

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the options."""
        yield from super().check()
        if not self.judged:
            yield "judged", "expected at least one noise level"

    def setup(self, run: Any) -> None:
        """Load the teacher, and let a discriminator join.

        Args:
            run: the run in progress.
        """
        super().setup(run)
        self._critic = StepCritic(self._teacher if hasattr(self._teacher, "hf") else run.model)
        add_player(run, "critic", self._critic, self.critic_rate)
        self.watch("critic/loss", GUESSING)

    def turns(self, model: Any, batch: Any) -> Iterator[Turn]:
        """Yield the model's turn and, where it is judged, the discriminator's.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        x, now, ahead, then, labels = self.lesson(model, batch)
        guess = model(x, now, labels)
        if self.plan[self._stage + 1] > self.matched:
            losses = snr_weight("truncated-snr", now) * squared(guess, implied(x, ahead, now, then))
            yield Turn("model", losses.sum(), {})
            return
        made, real, level = self.shown(batch, step(x, guess, now, then), ahead, then)
        with frozen(self._critic):
            fooled = generator_loss(self.verdict(x, now, made, level, labels), "non-saturating")
        yield Turn("model", fooled.sum(), {"distance": squared(made.detach(), real).sum()})
        caught = critic_loss(
            self.verdict(x, now, real, level, labels), self.verdict(x, now, made.detach(), level, labels),
            "non-saturating",
        )  # fmt: skip
        yield Turn("critic", caught.sum(), {})

    def shown(self, batch: Any, made: Tensor, real: Tensor, then: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return what the discriminator sees of the student's and the teacher's x', and at which level (B,).

        Args:
            batch: B arrays.
            made: (B, *shape) the student's x'.
            real: (B, *shape) the teacher's.
            then: (B,) s'.
        """
        choices = torch.tensor(self.judged).to(then)
        drawn = choices[(self.uniform(batch, "judged").double() * len(choices)).long().clamp(max=len(choices) - 1)]
        clean = then <= 0
        added = spread(torch.where(clean, drawn, torch.zeros_like(drawn)), made) * self.normal(batch, "added")
        return made + added, real + added, torch.where(clean, drawn, then)

    def verdict(self, x: Tensor, now: Tensor, ahead: Tensor, then: Tensor, labels: Tensor | None) -> Tensor:
        """Return the discriminator's logits (B, n), of the whole step or of its end.

        Args:
            x: (B, *shape) at level `now`.
            now: (B,) s.
            ahead: (B, *shape) at level `then`.
            then: (B,) above 0.
            labels: (B,) classes.
        """
        _, share = self.now()
        critic = self._critic
        found: Tensor = critic(ahead, then, labels) if share >= self.relax else critic.step(x, now, ahead, then, labels)
        return found
