"""What objectives of denoisers share: what is drawn for each array, noise levels, and the norm of a difference."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.levels import from_flow_time, from_trig_time, spread
from hone.objectives.base import Objective

if TYPE_CHECKING:
    from hone.diffusion.items import Batch, Item

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Levels = Literal["lognormal", "loguniform", "flow", "flow-lognormal", "trig-lognormal"]


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

    def drawn_levels(
        self, model: Any, batch: Batch, stream: str, kind: Levels = "lognormal", *, mean: float, std: float
    ) -> Tensor:
        """Return a noise level for each array (B,), float64, within the model's range.

        Args:
            model: the denoiser.
            batch: B arrays.
            stream: name of this draw.
            kind: of their distribution (`noise_levels`).
            mean: of the normal ones.
            std: of the normal ones.
        """
        return noise_levels(
            self.uniform(batch, stream), kind, mean=mean, std=std, sigma_min=model.sigma_min,
            sigma_max=model.sigma_max, sigma_data=model.sigma_data,
        )  # fmt: skip

    def some_labels(self, model: Any, batch: Batch, dropped: float = 0.0) -> Tensor | None:
        """Return the classes (B,), a share of them left out in training; None for data without.

        Args:
            model: the denoiser.
            batch: B arrays.
            dropped: the share.
        """
        if not model.classes:
            return None
        if not model.training or not dropped:
            return batch.labels
        gone = (self.uniform(batch, "drop") < dropped).to(batch.labels.device)
        return torch.where(gone, torch.full_like(batch.labels, -1), batch.labels)

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

    def once(self, batch: Batch, stream: str) -> float:
        """Return one number in [0, 1), the same for all arrays of a step.

        Args:
            batch: B arrays of it.
            stream: name of this draw.
        """
        if bool((batch.places < 0).any()):
            return float(torch.rand((), dtype=torch.float64))
        return float(self._draw(replace(batch, places=torch.zeros(1, dtype=torch.int64)), stream, (), torch.rand)[0])

    def _draw(self, batch: Batch, stream: str, shape: tuple[int, ...], kind: Any) -> Tensor:
        if bool((batch.places < 0).any()):  # evaluation: the generator is seeded there
            found: Tensor = kind((len(batch), *shape), dtype=torch.float64)
            return found
        if stream not in self._drawn:
            text = f"{self._seed[0]} {self._seed[1]} {stream}"
            number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
            generator = torch.Generator().manual_seed(number)
            self._drawn[stream] = kind((self._count, *shape), generator=generator, dtype=torch.float64)
        return self._drawn[stream][batch.places]


def output_error(net: Any, guess: Tensor, aim: Tensor, sigma: Tensor) -> Tensor:
    """Return |guess - aim|^2 / c_out(s)^2 of each array (B,), the mean: the squared error of the network's own output.

    Args:
        net: the denoiser, whose parameterisation says what its output is.
        guess: (B, *shape) denoised arrays.
        aim: (B, *shape) what they shall be.
        sigma: (B,) noise levels.
    """
    scale = spread(net.parameterisation.error_scale(sigma), aim)
    return ((guess - aim) / scale).square().flatten(1).mean(1)


def neighbours(x: Tensor, guess: Callable[[], Tensor], aim: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Return what two passes give whose small difference is the loss, the second without gradients.

    Neither runs under autocast, whose rounding would drown the difference, and both drop out the same.

    Args:
        x: (B, *shape), tells the device.
        guess: the first pass.
        aim: the second.
    """
    with torch.autocast(x.device.type, enabled=False):
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            found = guess()
        with torch.no_grad():
            return found, aim()


def squared(left: Tensor, right: Tensor) -> Tensor:
    """Return the mean squared difference of each array (B,).

    Args:
        left: (B, *shape).
        right: (B, *shape).
    """
    return (left - right).square().flatten(1).mean(1)


def noise_levels(
    uniforms: Tensor, kind: Levels,
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
