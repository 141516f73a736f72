"""Noise consistency training: a control for a one-step generator, without data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hone.errors import ModelError
from hone.objectives.arrays import ArrayObjective, neighbours
from hone.objectives.consistency import even_places, huber_constant, pseudo_huber
from hone.parts import part

Count = Annotated[int, Field(ge=2)]


def quadrant(arrays: Tensor) -> Tensor:
    """Return 0 to 3 by the signs of the means of the first and the second half of each array's numbers (B,).

    Args:
        arrays: (B, *shape), at least two numbers each.
    """
    rows = arrays.flatten(1)
    half = rows.shape[1] // 2
    return (rows[:, :half].mean(1) > 0).long() + 2 * (rows[:, half:].mean(1) > 0).long()


def amount(arrays: Tensor) -> Tensor:
    """Return 0 or 1 by whether the mean of an array's numbers is above 0 (B,).

    Args:
        arrays: (B, *shape).
    """
    return (arrays.flatten(1).mean(1) > 0).long()


CONTROLS: dict[str, Callable[[Tensor], Tensor]] = {"quadrant": quadrant, "amount": amount}


@part(
    "objective", "nct",
    papers=[
        (
            "Noise Consistency Training: A Native Approach for One-Step Generator in Learning Additional Controls",
            "arXiv:2506.19741",
        ),
    ],
    claim="A one-step generator learns to obey a control without any data, and keeps drawing what it drew.",
    deviations="Checked against the paper's text, as the code could not be had; the control is a class that is "
    "computed from an array, and the adapter is whatever trains by the recipe.",
    draws=[{"name": "multistep", "steps": 1}],
)  # fmt: skip
@dataclass(kw_only=True)
class NoiseConsistency(ArrayObjective):
    """Teach the generator G that the run starts from a control c = C(G(z)), by consistency along a path of noises.

    z_i = sqrt(1 - s_i^2) z + s_i e,  s_i from 0 to 1;  d(f(z_i, c), sg f(z_{i-1}, c)) / (s_i - s_{i-1}), where
    f(z_0, c) is G(z) itself. Every z_i is as normal as z, but says ever less of c, which must therefore be obeyed.

    The data gives nothing but the size of a batch. Sampled in one step, with the control as the class.

    Args:
        control: quadrant (of an array's two halves) or amount (of the whole): what C tells of an array.
        levels: noises on the path.
    """

    measured = False
    control: Literal["quadrant", "amount"] = "quadrant"
    levels: Count = 32
    _start: Any = field(init=False, default=None, repr=False)

    def setup(self, run: Any) -> None:
        """Keep the generator that the run starts from.

        Args:
            run: the run in progress.

        Raises:
            ModelError: it has too few classes for the control, or arrays too small for it.
        """
        if self.control == "quadrant" and math.prod(run.model.shape) < 2:
            raise ModelError(
                f"objective.control: quadrant looks at two halves of an array, and arrays {run.model.shape} have one "
                "number; set it to amount"
            )
        needed = 4 if self.control == "quadrant" else 2
        if run.model.classes < needed:
            raise ModelError(
                f"objective.control: {self.control} has {needed} classes, but the generator has {run.model.classes}; "
                "train it on data with conditional: true and objective.drop_labels: 1.0, so that its classes are free"
            )
        self._start = copy.deepcopy(run.model).eval().requires_grad_(False)

    def made(self, model: Any, noise: Tensor, labels: Tensor) -> Tensor:
        """Return what a generator draws from noise (B, *shape) in one step.

        Args:
            model: the generator.
            noise: (B, *shape) of unit variance.
            labels: (B,) controls, -1 for none.
        """
        sigma = torch.full((len(noise),), model.sigma_max, device=noise.device, dtype=noise.dtype)
        found: Tensor = model(noise * model.sigma_max, sigma, labels)
        return found

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, summed over the arrays.

        Args:
            model: the generator.
            batch: B arrays, of which only the number counts.
        """
        start = model if self._start is None else self._start
        noise, other = self.normal(batch), self.normal(batch, "other")
        free = torch.full_like(batch.labels, -1)
        with torch.no_grad():
            drawn = self.made(start, noise, free)
            labels = CONTROLS[self.control](drawn)
        path = torch.linspace(0, 1, self.levels, dtype=noise.dtype, device=noise.device)
        place = even_places(self.uniform(batch, "place").cpu(), self.levels).to(noise.device)

        def mixed(share: Tensor) -> Tensor:
            share = share.reshape(-1, *[1] * (noise.dim() - 1))
            return (1 - share**2).clamp(min=0).sqrt() * noise + share * other

        guess, aim = neighbours(
            drawn,
            lambda: self.made(model, mixed(path[place + 1]), labels),
            lambda: self.made(model, mixed(path[place]), labels),
        )
        aim = torch.where((place == 0).reshape(-1, *[1] * (aim.dim() - 1)), drawn, aim)
        losses = pseudo_huber(guess, aim, huber_constant(guess[0].numel())) / (path[1] - path[0])
        return losses.sum(), {}
