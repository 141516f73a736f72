"""T-Stitch: a small denoiser for the noisiest steps, the large one for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.denoiser import Denoiser
from hone.diffusion.saved import denoiser_folder
from hone.errors import ModelError
from hone.parts import part
from hone.solvers.around import Around
from hone.solvers.base import Counted
from hone.solvers.shifted import TimeShift


class Stitched(Counted):
    """Two denoisers as one: which one answers depends on the noise level."""

    def __init__(self, models: tuple[Any, Any], labels: Tensor | None, guidance: float, level: float) -> None:
        """Hold the two.

        Args:
            models: the large one and the small one.
            labels: (B,) classes of the samples, None for none.
            guidance: of classifier-free guidance, for both.
            level: the small one answers above it.
        """
        super().__init__(models[0], labels, guidance)
        self.models, self.level = models, level
        self.small_calls = 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return D(x, sigma)."""
        noisy = float(sigma.max()) > self.level
        self.model, before = self.models[noisy], self.calls
        found = super().__call__(x, sigma)
        self.small_calls += (self.calls - before) if noisy else 0
        return found


@part(
    "solver", "t-stitch",
    papers=[
        ("T-Stitch: Accelerating Sampling in Pre-Trained Diffusion Models with Trajectory Stitching",
         "arXiv:2402.14167"),
    ],
    claim="A smaller denoiser can take the noisiest 40% of the steps at no loss of quality.",
    deviations="Two denoisers; the paper also chains three.",
)  # fmt: skip
@dataclass(kw_only=True)
class TStitch(Around):
    """Any solver, which asks a small denoiser at the noisiest levels and the run's own at the others.

    The same state goes from one to the other. Both must be trained on arrays of one shape; their parameterisations may
    differ. The evaluations that are reported are those of both.

    Args:
        small: run of the small denoiser, or its `model` folder; "stage:N" in a recipe of stages.
        share: of the steps, the noisiest ones, that the small denoiser takes.
    """

    small: str
    share: Annotated[float, Field(ge=0, le=1)] = 0.4
    _loaded: Any = field(init=False, default=None, repr=False)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong, without loading anything."""
        yield from super().check()
        if getattr(self.inner, "churn", 0) or isinstance(self.inner, TimeShift):
            yield (
                "of",
                "expected a solver without churn, and not time-shift: they take steps to levels across the border",
            )
        later = self.small == "base" or self.small.startswith("stage:")  # what has not run yet
        if not later and denoiser_folder(self.small) is None:
            yield "small", f"there is no denoiser in '{self.small}'; expected a finished run of one"

    def asked(self, model: Any, labels: Tensor | None, sigmas: Tensor) -> Counted:
        """Return what the solver inside asks instead of the denoiser.

        Args:
            model: the denoiser.
            labels: (B,) classes, None for none.
            sigmas: (n,) levels that will be visited, descending.

        Raises:
            ModelError: the small denoiser is for other arrays, or was trained for less noise.
        """
        first = round(self.share * (len(sigmas) - 1))
        small, border = self._small(model), float(sigmas[first])
        high, low = float(sigmas[0]), max(border, model.sigma_min)
        if first and (high > small.sigma_max * 1.001 or low < small.sigma_min * 0.999):
            raise ModelError(
                f"solvers: t-stitch asks the small denoiser at noise from {high:g} down to {low:g}, but it was trained "
                f"for {small.sigma_min:g} to {small.sigma_max:g}; name another one as small, or change share"
            )
        return Stitched((model, small), labels, self.inner.guidance, border)

    def _small(self, model: Any) -> Denoiser:
        """Return the small denoiser, on the large one's device and in its precision."""
        if self._loaded is None:
            parameter: torch.Tensor = next(model.parameters())
            self._loaded = Denoiser.load(self.small, device=parameter.device, dtype=parameter.dtype)
            self._loaded.eval().requires_grad_(False)
        if self._loaded.shape != tuple(model.shape) or self._loaded.classes != model.classes:
            raise ModelError(
                f"solvers: t-stitch.small is for arrays {self._loaded.shape} of {self._loaded.classes} classes, the "
                f"model for {tuple(model.shape)} of {model.classes}"
            )
        return self._loaded
