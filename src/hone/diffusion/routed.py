"""Networks that choose: one of several by an array's class, or one of several free arrays by its noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from hone.diffusion.networks import Network, Size
from hone.errors import HoneError
from hone.options import Nested
from hone.parts import part


class Students(nn.Module):
    """Several networks behind one: each answers for a group of classes; arrays without a class go to the first."""

    def __init__(self, students: Sequence[nn.Module], classes: int) -> None:
        """Hold the networks.

        Args:
            students: of one shape.
            classes: of the data; neighbouring ones form a group.
        """
        super().__init__()
        self.students: Any = nn.ModuleList(students)
        self.classes = classes

    def groups(self, labels: Tensor | None, count: int) -> Tensor:
        """Return which network answers for each array, (B,) on the labels' device.

        Args:
            labels: (B,) classes, -1 for none; None for none at all.
            count: B.
        """
        if labels is None:
            return torch.zeros(count, dtype=torch.int64)
        return labels.clamp(min=0) * len(self.students) // self.classes

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None, extras: Tensor | None = None) -> Tensor:
        """Return F (B, *shape).

        Args:
            x: (B, *shape) scaled noisy arrays, c_in x.
            noise: (B,) c_noise.
            labels: (B,) int64 classes, -1 for none.
            extras: (B, k) further numbers.
        """
        return self._each(lambda student, *given: [student(*given)], x, noise, labels, extras)[0]

    def inner(
        self, x: Tensor, noise: Tensor, labels: Tensor | None = None, extras: Tensor | None = None
    ) -> list[Tensor]:
        """Return the features of whichever network answers.

        Args:
            x: (B, *shape) scaled noisy arrays, c_in x.
            noise: (B,) c_noise.
            labels: (B,) int64 classes, -1 for none.
            extras: (B, k) further numbers.
        """
        return self._each(lambda student, *given: student.inner(*given), x, noise, labels, extras)

    def _each(self, call: Any, x: Tensor, noise: Tensor, labels: Tensor | None, extras: Tensor | None) -> list[Tensor]:
        """Return what the networks give, each for its own arrays, put together again."""
        groups = self.groups(labels, len(x)).to(x.device)
        parts, places = [], []
        for number, student in enumerate(self.students):
            mine = (groups == number).nonzero().squeeze(1)
            if len(mine):
                own = [None if value is None else value[mine] for value in (labels, extras)]
                parts.append(call(student, x[mine], noise[mine], *own))
                places.append(mine)
        order = torch.cat(places).argsort()
        return [torch.cat(states)[order] for states in zip(*parts, strict=True)]

    def widen(self, count: int) -> None:
        """Let each network take further numbers.

        Args:
            count: how many.
        """
        for student in self.students:
            student.widen(count)


@part(
    "network", "students",
    papers=[("Multi-student Diffusion Distillation for Better One-step Generators", "arXiv:2410.23274")],
    claim="Several one-step students, each for a part of the classes, draw better samples than one of the same shape.",
    deviations="The students train together in one run, each on the arrays of its classes. Groups are of neighbouring "
    "classes.",
)  # fmt: skip
@dataclass(kw_only=True)
class StudentsNetwork(Network):
    """Several networks of one shape, each for a group of neighbouring classes: no dearer to draw from than one of them.

    network of class c: floor(c groups / classes)

    Args:
        groups: how many.
        of: shape of each.
    """

    groups: Size = 2
    of: Annotated[Any, Nested("network")]

    def make(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return fresh networks.

        Args:
            shape: of one array.
            classes: of the data, 0 for none.

        Raises:
            HoneError: there are fewer classes than groups.
        """
        if classes < self.groups:
            raise HoneError(
                f"model.network.groups: the data has {classes} classes, which cannot form {self.groups} groups; use "
                "fewer, or data with classes (conditional: true)"
            )
        return Students([self.of.build(shape, classes) for _ in range(self.groups)], classes)

    def record(self) -> dict[str, Any]:
        """Return the specification that builds it again."""
        return {"name": "students", "groups": self.groups, "of": self.of.record()}


class FreeArrays(nn.Module):
    """Arrays that are parameters. The noise says which of them is meant: its first number, as a place in order."""

    denoises: ClassVar[bool] = False

    def __init__(self, shape: tuple[int, ...], classes: int, count: int) -> None:
        """Make the arrays.

        Args:
            shape: of one.
            classes: of the data, each with arrays of its own; 0 for none.
            count: of each class.
        """
        super().__init__()
        self.arrays = nn.Parameter(torch.randn(max(1, classes), count, *shape))

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None, extras: Tensor | None = None) -> Tensor:
        """Return one of the arrays for each row (B, *shape).

        Args:
            x: (B, *shape) noise of about unit deviation.
            noise: (B,), not looked at.
            labels: (B,) int64 classes, -1 for the first.
            extras: (B, k), not looked at.
        """
        count = self.arrays.shape[1]
        place = 0.5 * (1 + torch.erf(x.flatten(1)[:, 0] / math.sqrt(2)))  # even in [0, 1) for normal noise
        which = (place * count).long().clamp(max=count - 1)
        own = torch.zeros_like(which) if labels is None else labels.clamp(min=0)
        return self.arrays[own, which]


@part("network", "particles", papers="original")
@dataclass(kw_only=True)
class Particles(Network):
    """Free arrays in the place of a generator, for score distillation: no network, but a table of parameters.

    A drawn array is the one that the first number of its noise points at, all as likely. To be used with the
    parameterisation x0, where what is drawn is the array itself.

    Args:
        count: arrays of each class.
    """

    count: Size = 16

    def make(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return fresh arrays, drawn from a normal distribution.

        Args:
            shape: of one array.
            classes: of the data, 0 for none.
        """
        return FreeArrays(shape, classes, self.count)
