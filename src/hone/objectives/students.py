"""What multi-student distillation needs beside distribution matching: students that learn the teacher's score first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.levels import spread
from hone.objectives.arrays import ArrayObjective, Levels, Positive, output_error
from hone.objectives.teachers import load_teacher
from hone.parts import part


@part(
    "objective", "tsm",
    papers=[("Multi-student Diffusion Distillation for Better One-step Generators", "arXiv:2410.23274")],
    claim="Students that are smaller than their teacher learn its score first, and from there distribution matching "
    "works as it does for students of the teacher's own shape.",
    deviations="The noisy arrays are real ones with noise, at the levels of pretraining.",
)  # fmt: skip
@dataclass(kw_only=True)
class TeacherScoreMatching(ArrayObjective):
    """Teacher score matching: |D(x, s) - D_teacher(x, s)|^2 / c_out(s)^2 at real arrays with noise, the mean.

    Args:
        teacher: a run of a denoiser, or "stage:N", or "truth" for the known distribution of generated points.
        guidance: of the teacher, by classifier-free guidance.
        levels: distribution of the noise levels (`hone.objectives.arrays.noise_levels`).
        mean: of the log of the level, for the lognormal ones.
        std: of the same.
    """

    teacher: str
    guidance: Annotated[float, Field(ge=0)] = 1.0
    levels: Levels = "lognormal"
    mean: float = -1.2
    std: Positive = 1.2
    _teacher: Any = field(init=False, default=None, repr=False)

    def setup(self, run: Any) -> None:
        """Load the teacher.

        Args:
            run: the run in progress.
        """
        self._teacher = load_teacher(self.teacher, run)

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, summed over the arrays.

        Args:
            model: the student.
            batch: B arrays.
        """
        sigma = self.drawn_levels(model, batch, "level", self.levels, mean=self.mean, std=self.std).to(batch.arrays)
        noisy, labels = batch.arrays + spread(sigma, batch.arrays) * self.normal(batch), self.some_labels(model, batch)
        with torch.no_grad():
            aim = self._teacher.guided(noisy, sigma, labels, self.guidance)
        return output_error(model, model(noisy, sigma, labels), aim, sigma).sum(), {}
