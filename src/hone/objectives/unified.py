"""Uni-Instruct: f-divergences, expanded along the diffusion into squared differences of scores, as losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from hone.objectives import divergences
from hone.objectives.arrays import Share
from hone.objectives.divergences import Divergence
from hone.objectives.generators import TINY, Drawn, Strength, level_weight
from hone.objectives.matching import Ratios
from hone.parts import part


def expanded(name: Divergence, drawn: Drawn, fake: Tensor, real: Tensor, ratio: Tensor, exact: bool = True) -> Tensor:
    """Return losses (B,) with the gradient of sum |D_q - D_p|^2 h(r), in the mean over drawn arrays.

    2 h (D_p - D_q) . (D_q - y) + (h - r h') |D_q - D_p|^2, sums over coordinates. The first term stands for how the
    fake score moves with the generator, the second for how the density does. D_q, D_p and r are functions of x, through
    which the gradient goes.

    Args:
        name: the divergence.
        drawn: B generated arrays with noise.
        fake: (B, *shape) D_q.
        real: (B, *shape) D_p.
        ratio: (B,) r = p / q.
        exact: False takes h as a number, leaves the change of |D_q - D_p|^2 out of the second term, and finds the
            change of r there from the scores, as the authors do.
    """
    apart = fake - real
    square = apart.square().flatten(1).sum(1)
    first = -2 * (apart * (fake - drawn.clean)).flatten(1).sum(1)
    if exact:
        return divergences.weight(name, ratio) * first + divergences.fisher_weight(name, ratio) * square
    known = ratio.detach()
    along = divergences.ratio_weight(name, known) * square.detach() / drawn.sigma**2
    moved = (apart.detach() * drawn.noisy).flatten(1).sum(1)  # grad r = r (score of p - score of q)
    return divergences.weight(name, known) * first + along * moved


@part(
    "objective", "uni-instruct",
    papers=[
        (
            "Uni-Instruct: One-step Diffusion Model through Unified Diffusion Divergence Instruction",
            "arXiv:2505.20755",
        ),
    ],
    claim="One-step generators that are trained by f-divergences expanded along the diffusion, above all the forward "
    "Kullback-Leibler divergence, draw better samples than those of the divergences at each noise level, and than "
    "their teacher.",
    deviations="Any of our divergences, the authors' weights following from h. The means that r and h are divided by "
    "are running ones, as in f-distill. The term along r has its exact factor 1 / sigma^2, which the authors' code "
    "leaves out. The generator starts from sigma_max, where theirs starts from 2.5; the fake score and the "
    "discriminator learn at levels even in the karras schedule, where theirs are lognormal (-1.2, 1.2) and weigh the "
    "discriminator by 1 / c_out^2 / 2; the generator's levels begin at 0.02 instead of 0, and its two losses are "
    "balanced by `gan_weight` as in dmd2, where theirs has 0.01 against 100 over mean|y - D_p|.",
    draws=[{"name": "multistep", "steps": "objective.student_steps"}],
)  # fmt: skip
@dataclass(kw_only=True)
class UniInstruct(Ratios):
    """A divergence of clean arrays, as an integral of squared differences of scores over the noise levels.

    D_f = int s E_q[h(r) |grad log q - grad log p|^2] ds, minimised by the loss of `expanded`, over mean|y - D_p|.

    Args:
        divergence: of generated from real arrays (`hone.objectives.divergences`).
        critic_updates: steps of the fake score for each of the generator's.
        most: largest noise level that generated arrays are compared at, as a place in the karras schedule.
        gan_critic_weight: of the discriminator's loss beside the fake score's.
        exact: whether the gradient is that of the integral; else the authors' cheaper one, which is the same for the
            forward Kullback-Leibler divergence as far as r does not change with x.
    """

    divergence: Divergence = "forward-kl"
    critic_updates: Annotated[int, Field(ge=1, le=99)] = 1
    most: Share = 0.8
    gan_critic_weight: Strength = 1.0
    exact: bool = False

    def losses(self, model: Any, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the generator's losses (B,), and figures (B,) to report by name.

        Args:
            model: the generator.
            drawn: B generated arrays with noise.
        """
        real, fake = self.real(drawn), self.fake(drawn)
        with torch.set_grad_enabled(self.exact):
            ratio, figures = self.levelled(drawn, self.ratio(drawn))
        with torch.no_grad():
            h = divergences.weight(self.divergence, ratio)
            scale = level_weight(self.weight, drawn.clean, real, drawn.sigma, model.sigma_data).flatten()
            if self.weight != "adaptive":
                scale = scale**2  # two differences of denoised arrays stand here, not one
        found = expanded(self.divergence, drawn, fake, real, ratio, self.exact)
        losses = found * scale / ((self.means(h)[-1] + TINY) * drawn.clean[0].numel())
        return self.persuading(drawn, losses, {**figures, "h": h})
