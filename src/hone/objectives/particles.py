"""Score distillation of a set of arrays, or of a generator: SDS, NFSD and VSD.

The arrays are what a generator makes; with the network `particles` it makes free arrays, each a parameter, which stand
for renderings of the scenes that these methods were made for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.levels import spread
from hone.errors import ModelError
from hone.objectives.arrays import Positive
from hone.objectives.generators import Distilled, Drawn, Strength, Weight
from hone.objectives.matching import Matching
from hone.parts import part


class GuidedByClass:
    """Mixed into objectives whose usual guidance is strong: data without classes goes without it."""

    if TYPE_CHECKING:
        guidance: float
        _teacher: Any

    def real(self, drawn: Drawn) -> Tensor:
        """Return the teacher's D_p (B, *shape), with guidance where there are classes.

        Args:
            drawn: B generated arrays with noise.
        """
        guidance = 1.0 if drawn.labels is None else self.guidance
        found: Tensor = self._teacher.guided(drawn.noisy, drawn.sigma, drawn.labels, guidance)
        return found


@part(
    "objective", "sds",
    papers=[("DreamFusion: Text-to-3D using 2D Diffusion", "arXiv:2209.14988")],
    claim="Arrays that a diffusion model's score pulls, with strong guidance, become likely ones without any training "
    "of that model.",
    deviations="There is no renderer: a generator, or free arrays, stand in its place.",
    draws=[{"name": "multistep", "steps": "objective.student_steps"}],
)  # fmt: skip
@dataclass(kw_only=True)
class ScoreDistillation(GuidedByClass, Distilled):
    """Score distillation sampling: y moves along w (n^ - n), the noise that the teacher finds less that which is there.

    n^ - n = (y - D_p(x, s)) / s: variational score distillation whose fake score is that of the one point y, D_q = y.

    Args:
        guidance: of the teacher, by classifier-free guidance; none where the data has no classes.
        weight: of the noise levels (`hone.objectives.generators.level_weight`).
    """

    guidance: Strength = 100.0
    weight: Weight = "sds"

    def fake(self, drawn: Drawn) -> Tensor:
        """Return the generated arrays themselves (B, *shape).

        Args:
            drawn: B generated arrays with noise.
        """
        return drawn.clean.detach()


def noise_free(
    x: Tensor, sigma: Tensor, told: Tensor, untold: Tensor, bad: Tensor | None, low: float, guidance: float
) -> Tensor:
    """Return s times NFSD's direction (B, *shape): delta_D + guidance delta_C.

    delta_C = n(class) - n(none);  delta_D = n(none) below the level `low`, else n(none) - n(unwanted class); 0 where no
    class is unwanted. n = (x - D) / s is the noise that the teacher finds.

    Args:
        x: (B, *shape) noisy arrays.
        sigma: (B,) s.
        told: (B, *shape) D for the class.
        untold: (B, *shape) D for none.
        bad: (B, *shape) D for the unwanted class, None without one.
        low: noise level.
        guidance: weight of the class.
    """
    domain = torch.zeros_like(x) if bad is None else bad - untold
    return torch.where(spread(sigma < low, x), x - untold, domain) + guidance * (untold - told)


@part(
    "objective", "nfsd",
    papers=[("Noise-Free Score Distillation", "arXiv:2310.17590")],
    claim="Without the noise that score distillation carries along, arrays become sharp at the usual strength of "
    "guidance instead of at a hundred.",
    deviations="There is no renderer: a generator, or free arrays, stand in its place. The unwanted prompt is a class "
    "of the data, or none. The noise level of time 200 of 1000 is Stable Diffusion's, in units of sigma_data.",
    draws=[{"name": "multistep", "steps": "objective.student_steps"}],
)  # fmt: skip
@dataclass(kw_only=True)
class NoiseFree(Distilled):
    """Noise-free score distillation: y moves against w (delta_D + guidance delta_C), without the noise that was added.

    Args:
        guidance: of the teacher, by classifier-free guidance.
        weight: of the noise levels (`hone.objectives.generators.level_weight`).
        low: noise level in units of sigma_data below which the teacher's own noise estimate is the way into the domain.
        unwanted: number of a class that arrays shall keep away from at larger noise, the paper's negative prompt.
    """

    guidance: Strength = 7.5
    weight: Weight = "sds"
    low: Positive = 0.57
    unwanted: int | None = None

    def prepare(self, run: Any) -> None:
        """Load the teacher, and see that there are classes.

        Args:
            run: the run in progress.

        Raises:
            ModelError: there are none.
        """
        super().prepare(run)
        if not run.model.classes:
            raise ModelError("objective: nfsd needs classes, and the data has none; set data.conditional: true")
        if self.unwanted is not None and not 0 <= self.unwanted < run.model.classes:
            raise ModelError(f"objective.unwanted: there is no class {self.unwanted}; there are {run.model.classes}")

    def real(self, drawn: Drawn) -> Tensor:
        """Return D_p (B, *shape) such that D_q - D_p is the noise-free direction.

        Args:
            drawn: B generated arrays with noise.
        """
        teacher, x, sigma = self._teacher, drawn.noisy, drawn.sigma
        untold = teacher(x, sigma, None)
        bad = None
        if self.unwanted is not None:
            bad = teacher(x, sigma, torch.full(sigma.shape, self.unwanted, device=x.device))
        told = teacher(x, sigma, drawn.labels)
        return drawn.clean.detach() - noise_free(
            x, sigma, told, untold, bad, self.low * teacher.sigma_data, self.guidance
        )

    def fake(self, drawn: Drawn) -> Tensor:
        """Return the generated arrays themselves (B, *shape), from which the direction leads.

        Args:
            drawn: B generated arrays with noise.
        """
        return drawn.clean.detach()


@part(
    "objective", "vsd",
    papers=[
        (
            "ProlificDreamer: High-Fidelity and Diverse Text-to-3D Generation with Variational Score Distillation",
            "arXiv:2305.16213",
        ),
    ],
    claim="Arrays that are treated as draws of a distribution, whose own score is learned beside them, are as good "
    "and more diverse at the usual strength of guidance than those of score distillation.",
    deviations="There is no renderer: a generator, or free arrays, stand in its place. The fake score is a whole "
    "network instead of a low-rank adapter that sees the camera.",
    draws=[{"name": "multistep", "steps": "objective.student_steps"}],
)  # fmt: skip
@dataclass(kw_only=True)
class Variational(GuidedByClass, Matching):
    """Variational score distillation: y moves against w (n_teacher - n_fake), the fake score being learned on all y.

    Args:
        guidance: of the teacher, by classifier-free guidance; none where the data has no classes.
        weight: of the noise levels (`hone.objectives.generators.level_weight`).
        critic_updates: steps of the fake score for each of the generator's.
        gan_weight: of a discriminator in the generator's loss; the paper has none.
    """

    guidance: Strength = 7.5
    weight: Weight = "sds"
    critic_updates: Annotated[int, Field(ge=1, le=99)] = 1
    gan_weight: Strength = 0.0
