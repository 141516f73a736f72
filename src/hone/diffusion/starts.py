"""Where a run's denoiser comes from: fresh weights, or an earlier run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from hone.diffusion.denoiser import Denoiser
from hone.diffusion.levels import Kind, Parameterisation
from hone.diffusion.networks import MLP, UNet
from hone.diffusion.saved import denoiser_folder
from hone.errors import DataError, ModelError
from hone.options import Nested
from hone.parts import part

Level = Annotated[float, Field(gt=0)]
LOWEST, HIGHEST = 0.002, 80.0  # noise levels of a fresh denoiser


@part("model", "denoiser", papers="original")
@dataclass(kw_only=True)
class Denoisers:
    """A denoiser of arrays: fresh, or from an earlier run.

    Args:
        path: a run, or the `model` folder of one, to start from; "" starts from fresh weights.
        network: shape of a fresh network; None takes `mlp` for points and `unet` for everything else.
        parameterisation: what the network's output means; None takes edm, or what the earlier run had. Another one than
            the earlier run's gives its weights another meaning.
        sigma_data: standard deviation of the data; None measures it.
        sigma_min: smallest noise level; None takes 0.002, or the earlier run's.
        sigma_max: noise level from which samples start; None takes 80, or the earlier run's.
    """

    medium: ClassVar[str] = "arrays"
    from_nothing: ClassVar[bool] = False  # a denoiser is saved whole, with its adapter merged
    path: str = ""
    network: Annotated[Any, Nested("network")] = None
    parameterisation: Kind | None = None
    sigma_data: Level | None = None
    sigma_min: Level | None = None
    sigma_max: Level | None = None

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong, without loading anything."""
        if self.path not in ("", "base"):  # "base" stands for a stage that has not run yet
            if denoiser_folder(self.path) is None:
                yield (
                    "path",
                    f"there is no denoiser in '{self.path}'; expected a finished run of one, or its model folder",
                )
            if self.network is not None:
                yield "network", "cannot be given together with path: the earlier run has one"
        fresh = not self.path
        low, high = self.sigma_min or (LOWEST if fresh else 0.0), self.sigma_max or (HIGHEST if fresh else math.inf)
        if low >= high and self.sigma_min is not None:
            yield "sigma_min", f"expected less than sigma_max ({high}), got {low}"
        elif low >= high:
            yield "sigma_max", f"expected more than sigma_min ({low}), got {high}"

    def load(self, *, device: torch.device | str, dtype: torch.dtype, data: Any) -> Denoiser:
        """Build or load the denoiser.

        Args:
            device: where it computes.
            dtype: of its weights.
            data: the run's source, which gives the shape, the classes and the standard deviation.

        Raises:
            ModelError: the earlier run's arrays have another shape or other classes than the data.
            DataError: the data has no deviation that can be measured.
        """
        if self.path:
            return self._earlier(device, dtype, data)
        kept = Parameterisation(
            self.parameterisation or "edm", self.sigma_data or measured(data), self.sigma_min or LOWEST
        )
        shape, classes = data.shape, data.classes
        plan = self.network or (MLP() if len(shape) == 1 else UNet())
        made = Denoiser(
            plan.build(shape, classes), kept, shape, classes=classes, sigma_max=self.sigma_max or HIGHEST,
            built=plan.record(),
        )  # fmt: skip
        return made.to(device=device, dtype=dtype)

    def _earlier(self, device: torch.device | str, dtype: torch.dtype, data: Any) -> Denoiser:
        made = Denoiser.load(self.path, device=device, dtype=dtype)
        if made.shape != data.shape:
            raise ModelError(
                f"model.path: the denoiser in '{self.path}' is for arrays {made.shape}, but the data's are {data.shape}"
            )
        if data.classes and made.classes != data.classes:
            raise ModelError(
                f"model.path: the denoiser in '{self.path}' knows {made.classes} classes, but the data has "
                f"{data.classes}; set data.conditional: {'true' if made.classes else 'false'}, or train another one"
            )
        old = made.parameterisation
        if self.sigma_min is not None and self.sigma_min < old.sigma_min:
            raise ModelError(
                f"model.sigma_min: {self.sigma_min} is below the {old.sigma_min} that the earlier run was trained for"
            )
        if self.sigma_max is not None and self.sigma_max > made.sigma_max:
            raise ModelError(
                f"model.sigma_max: {self.sigma_max} is above the {made.sigma_max} that the earlier run was trained for"
            )
        low, high = self.sigma_min or old.sigma_min, self.sigma_max or made.sigma_max
        if low >= high:
            given = "sigma_max" if self.sigma_min is None else "sigma_min"
            raise ModelError(
                f"model.{given}: expected sigma_min below sigma_max, got {low} and {high}; the earlier run was trained "
                f"for {old.sigma_min} to {made.sigma_max}"
            )
        made.parameterisation = Parameterisation(
            self.parameterisation or old.kind, self.sigma_data or old.sigma_data, low
        )
        made.sigma_max = high
        return made


def measured(data: Any) -> float:
    """Return the standard deviation of the data, to four places where that leaves something of it.

    Args:
        data: a source of arrays.

    Raises:
        DataError: its numbers are all the same, or not finite.
    """
    found = float(data.deviation())
    if not 0 < found < math.inf:  # NaN is neither
        raise DataError(
            f"{data.describe()}: the standard deviation of the training arrays is {found:g}; expected numbers that are "
            "finite and not all the same"
        )
    return round(found, 4) or found
