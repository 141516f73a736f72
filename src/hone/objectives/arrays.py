"""What objectives of denoisers share: what is drawn for each array, noise levels, and the norm of a difference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.levels import from_flow_time, from_trig_time
from hone.objectives.base import Objective

if TYPE_CHECKING:
    from hone.diffusion.items import Batch, Item

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(kw_only=True)
class ArrayObjective(Objective):
    """An objective of a denoiser. Its unit is the array."""

    medium: ClassVar[str] = "arrays"
    consumes: ClassVar[str] = "arrays"
    generates: ClassVar[bool] = False
    _seed: tuple[int, int] = field(init=False, default=(0, 0), repr=False)
    _count: int = field(init=False, default=0, repr=False)
    _drawn: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False)
    _progress: float = field(init=False, default=0.0, repr=False)

    def count(self, batch: Any) -> float:
        """Return the number of arrays.

        Args:
            batch: B arrays.
        """
        return float(len(batch))

    def before_step(self, run: Any, trees: Sequence[Any]) -> None:
        """Give every array of the step its place, so that what is drawn for it depends on no micro-batch.

        Args:
            run: the run in progress; `run.step` does not count this step.
            trees: all arrays of the step, the same on every process.
        """
        items: Sequence[Item] = trees
        for place, item in enumerate(items):
            item.place = place
        self._seed, self._count, self._drawn = (run.recipe.seed, run.step + 1), len(items), {}
        self._progress = run.step / max(1, run.total)

    def normal(self, batch: Batch, stream: str = "noise") -> Tensor:
        """Return normal noise (B, *shape), the same for an array whatever its micro-batch.

        Args:
            batch: B arrays.
            stream: name of this draw; another name draws other numbers.
        """
        return self._draw(batch, stream, tuple(batch.arrays.shape[1:]), torch.randn).to(batch.arrays)

    def uniform(self, batch: Batch, stream: str, *shape: int) -> Tensor:
        """Return numbers (B, *shape) in [0, 1), the same for an array whatever its micro-batch.

        Args:
            batch: B arrays.
            stream: name of this draw.
            shape: of what is drawn for each; nothing for one number.
        """
        return self._draw(batch, stream, shape, torch.rand).to(batch.arrays)

    def _draw(self, batch: Batch, stream: str, shape: tuple[int, ...], kind: Any) -> Tensor:
        if bool((batch.places < 0).any()):  # evaluation: the generator is seeded there
            found: Tensor = kind((len(batch), *shape), dtype=torch.float64)
            return found
        if stream not in self._drawn:
            seed, step = self._seed
            text = int.from_bytes(stream.encode()[:4].ljust(4, b"."), "big")
            generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 4_294_967_291 + text & (2**63 - 1))
            self._drawn[stream] = kind((self._count, *shape), generator=generator, dtype=torch.float64)
        return self._drawn[stream][batch.places]


def squared(left: Tensor, right: Tensor) -> Tensor:
    """Return the mean squared difference of each array (B,).

    Args:
        left: (B, *shape).
        right: (B, *shape).
    """
    return (left - right).square().flatten(1).mean(1)


def noise_levels(
    uniforms: Tensor, kind: Literal["lognormal", "loguniform", "flow", "flow-lognormal", "trig-lognormal"],
    *, mean: float, std: float, sigma_min: float, sigma_max: float, sigma_data: float = 0.5,
) -> Tensor:  # fmt: skip
    """Return noise levels of a distribution, by its quantiles.

    lognormal: ln s ~ N(mean, std^2). loguniform: ln s even between the ends. flow: t = s / (1 + s) even.
    flow-lognormal: the logit of t ~ N(mean, std^2), which is ln s. trig-lognormal: tan t = e^z, z ~ N(mean, std^2),
    that is s = sigma_data e^z. All are kept between `sigma_min` and `sigma_max`.

    Args:
        uniforms: (B,) in [0, 1).
        kind: the distribution.
        mean: of the normal ones.
        std: of the normal ones.
        sigma_min: smallest level.
        sigma_max: largest.
        sigma_data: standard deviation of the data.
    """
    uniforms = uniforms.double()
    if kind == "loguniform":
        low, high = math.log(sigma_min), math.log(sigma_max)
        return (low + uniforms * (high - low)).exp()
    if kind == "flow":
        low, high = (sigma / (1 + sigma) for sigma in (sigma_min, sigma_max))
        return from_flow_time(low + uniforms * (high - low))
    normal = mean + std * torch.special.ndtri(uniforms.clamp(1e-9, 1 - 1e-9))
    if kind == "trig-lognormal":
        return from_trig_time(torch.atan(normal.exp()), sigma_data).clamp(sigma_min, sigma_max)
    return normal.exp().clamp(sigma_min, sigma_max)
