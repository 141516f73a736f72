"""Adversarial training of one-step generators against a pool of discriminator heads that is renewed all the time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from hone.diffusion.critics import Critic, Game, Head, critic_loss, generator_loss
from hone.diffusion.denoiser import Denoiser
from hone.diffusion.levels import spread
from hone.diffusion.views import check_guidance
from hone.engine.devices import mixed_seed
from hone.objectives.arrays import Share
from hone.objectives.base import Turn
from hone.objectives.generators import Contested, Drawn, Strength
from hone.objectives.matching import fake_network
from hone.objectives.teachers import add_player, load_teacher
from hone.parts import part
from hone.solvers.ode import Heun

Count = Annotated[int, Field(ge=1)]


class Pool(Critic):
    """Many heads on the frozen features of a denoiser: for each part of the noise range and each layer, several.

    Every second head looks at the mean over all places instead of at each place, and of either kind every second one
    is not shown the class.
    """

    def __init__(self, denoiser: Denoiser, parts: int, copies: int) -> None:
        """Make the heads.

        Args:
            denoiser: gives the features; a copy is taken.
            parts: of the noise range.
            copies: heads for each part and layer.
        """
        super().__init__(denoiser)
        self.parts, self.copies = parts, copies
        self.heads = nn.ModuleList(
            self.fresh(number) for number in range(parts * len(self.sizes) * copies)
        ).to(next(denoiser.parameters()))  # fmt: skip

    def fresh(self, number: int) -> Head:
        """Return a new head for a place of the pool.

        Args:
            number: of the place.
        """
        channels, dimensions = self.sizes[number // self.copies % len(self.sizes)]
        return Head(channels, 2 if number % 2 else dimensions)

    def of_part(self, group: int) -> range:
        """Return the places of the heads of a part of the noise range.

        Args:
            group: its number.
        """
        size = len(self.sizes) * self.copies
        return range(group * size, (group + 1) * size)

    def logits(
        self, drawn: Drawn, chosen: Sequence[Sequence[int]], *others: Tensor
    ) -> Iterator[tuple[Tensor, list[Tensor], int]]:
        """Yield, for each chosen head, the arrays that are its own, its logits of them, and how many judge each.

        Args:
            drawn: B generated arrays with noise.
            chosen: places of the heads that judge, for each part of the noise range.
            others: (B, *shape) arrays at the same levels, whose logits come along.
        """
        part_of = (drawn.place * self.parts).long().clamp(0, self.parts - 1)
        seen = [self._views(x, drawn.sigma, drawn.labels) for x in (drawn.noisy, *others)]
        for group, heads in enumerate(chosen):
            mine = (part_of == group).nonzero().squeeze(1)
            for number in heads if len(mine) else ():
                layer, blind = number // self.copies % len(self.sizes), number // 2 % 2
                found = []
                for told, untold in seen:
                    states = (untold if blind else told)[layer][mine]
                    whole = number % 2 and states.dim() > 2
                    found.append(self.heads[number](states.flatten(2).mean(2) if whole else states))
                yield mine, found, len(heads)

    def _views(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
        """Return the features with the class and without it."""
        told = self.features(x, sigma, labels)
        return told, told if labels is None else self.features(x, sigma, None)


@part(
    "objective", "nitrofusion",
    papers=[
        (
            "NitroFusion: High-Fidelity Single-Step Diffusion through Dynamic Adversarial Training",
            "arXiv:2412.02030",
        ),
    ],
    claim="One-step samples are better where a large pool of discriminator heads, a part of which is drawn for each "
    "step and a hundredth renewed, judges them, than where the same heads judge always.",
    deviations="Noise levels within a part of the range are continuous. The sizes of pool and draw are ours, since the "
    "authors' code is not public; so is the loss, a hinge.",
    draws=[{"name": "multistep", "steps": "objective.student_steps"}],
)  # fmt: skip
@dataclass(kw_only=True)
class NitroFusion(Contested):
    """Dynamic adversarial training: heads grouped by noise level judge noisy generated arrays against the teacher's.

    critic: max(0, 1 - l(real)) + max(0, 1 + l(fake));  generator: -l(fake), the mean over the heads drawn for the step

    Args:
        teacher: a run of a denoiser, or "stage:N", or "truth" for the known distribution of generated points.
        guidance: of the teacher, by classifier-free guidance.
        real: what counts as real: arrays that the teacher draws, or the data.
        teacher_steps: of Heun's method by which the teacher draws.
        parts: groups of heads, each for a part of the noise range.
        copies: heads for each group and layer of the teacher's network.
        drawn: share of a group's heads that judge in a step.
        refresh: share of all heads that begin anew after a step.
        game: the adversarial loss.
        critic_updates: steps of the heads for each of the generator's.
        critic_rate: factor on the learning rate for the heads.
    """

    teacher: str
    guidance: Strength = 1.0
    real: Literal["teacher", "data"] = "teacher"
    teacher_steps: Count = 8
    parts: Count = 4
    copies: Count = 8
    drawn: Annotated[float, Field(gt=0, le=1)] = 0.25
    refresh: Share = 0.01
    game: Game = "hinge"
    critic_updates: Annotated[int, Field(ge=1, le=99)] = 1
    _teacher: Any = field(init=False, default=None, repr=False)
    _chosen: list[list[int]] = field(init=False, default_factory=list, repr=False)

    def prepare(self, run: Any) -> None:
        """Load the teacher and make the pool, whose features are the teacher's, or the student's at the start.

        Args:
            run: the run in progress.
        """
        super().prepare(run)
        check_guidance(self.guidance, bool(run.model.classes))
        self._teacher = load_teacher(self.teacher, run)
        self._range = (self._teacher.sigma_min, self._teacher.sigma_max)
        self._critic = Pool(fake_network(None, self._teacher, run.model), self.parts, self.copies)
        add_player(run, "heads", self._critic, self.critic_rate)
        self.watch("heads/loss", 2.0)

    def before_step(self, run: Any, trees: Any) -> None:
        """Draw the heads that judge in this step.

        Args:
            run: the run in progress.
            trees: all arrays of the step.
        """
        super().before_step(run, trees)
        generator = torch.Generator().manual_seed(mixed_seed(run.recipe.seed, run.step))
        self._chosen = []
        for number in range(self.parts):
            places = self._critic.of_part(number)
            order = torch.randperm(len(places), generator=generator)[: max(1, round(self.drawn * len(places)))]
            self._chosen.append([places[i] for i in order.tolist()])

    def critic_turn(self, model: Any, batch: Any, turn: str) -> Turn:
        """Return the loss of the heads that were drawn.

        Args:
            model: the generator.
            batch: B arrays of the data.
            turn: name of the turn.
        """
        with torch.no_grad():
            drawn = self.draw(model, batch, turn, self.least, self.most)
            real = self.real_arrays(model, batch, turn)
            real = real + spread(drawn.sigma, real) * self.normal(batch, f"r{turn}")
        losses = torch.zeros_like(drawn.sigma)
        for mine, (fake, right), count in self._critic.logits(drawn, self._chosen, real):
            losses = losses.index_add(0, mine, (critic_loss(right, fake, self.game) / count).to(losses))
        return Turn("heads", losses.sum())

    def real_arrays(self, model: Any, batch: Any, turn: str) -> Tensor:
        """Return what counts as real (B, *shape).

        Args:
            model: the generator.
            batch: B arrays of the data.
            turn: name of the turn.
        """
        if self.real == "data":
            found: Tensor = batch.arrays
            return found
        solver = Heun(steps=self.teacher_steps, guidance=self.guidance)
        return solver.sample(self._teacher, self.normal(batch, f"q{turn}"), self.classes_of(model, batch))[0]

    def losses(self, model: Any, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the generator's losses (B,), and figures (B,) to report by name.

        Args:
            model: the generator.
            drawn: B generated arrays with noise.
        """
        losses = torch.zeros_like(drawn.sigma)
        for mine, (fake,), count in self._critic.logits(drawn, self._chosen):
            losses = losses.index_add(0, mine, (generator_loss(fake, self.game) / count).to(losses))
        return losses, {}

    @torch.no_grad()
    def after_step(self, run: Any, row: dict[str, Any]) -> None:
        """Let some heads begin anew, and look whether the heads diverge.

        Args:
            run: the run in progress.
            row: metrics of the step.
        """
        super().after_step(run, row)
        generator = torch.Generator().manual_seed(mixed_seed(run.recipe.seed, run.step))
        gone = (torch.rand(len(self._critic.heads), generator=generator) < self.refresh).nonzero().flatten().tolist()
        optimizer = run.players["heads"].optimizer
        for number in gone:
            with torch.random.fork_rng():
                torch.manual_seed(mixed_seed(run.recipe.seed, run.step, 10_007, number))
                made = self._critic.fresh(number)
            for old, new in zip(self._critic.heads[number].parameters(), made.parameters(), strict=True):
                old.copy_(new)
                optimizer.state.pop(old, None)
