"""Rewards of arrays that a denoiser draws: numbers (B,) for arrays (B, *shape) and the classes that were asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.encoders import Encoder, frozen_encoder, training_data
from hone.errors import ModelError
from hone.parts import part

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(kw_only=True)
class ArrayReward:
    """A way to judge arrays. Several are added up, each with its weight.

    Args:
        weight: factor on what this reward gives.
    """

    medium: ClassVar[str] = "arrays"
    differentiable: ClassVar[bool] = True
    weight: float = 1.0

    def setup(self, run: Any) -> None:
        """Prepare once, e.g. look at the data; here nothing.

        Args:
            run: the run in progress.
        """

    def of(self, arrays: Tensor, labels: Tensor) -> Tensor:
        """Return the worth of each array (B,), without the weight.

        Args:
            arrays: (B, *shape) clean arrays.
            labels: (B,) classes that were asked for, -1 for none.
        """
        raise NotImplementedError


def worth(rewards: Sequence[ArrayReward], arrays: Tensor, labels: Tensor) -> Tensor:
    """Return the weighted sum of rewards of each array (B,).

    Args:
        rewards: at least one, set up.
        arrays: (B, *shape).
        labels: (B,) classes that were asked for, -1 for none.
    """
    return torch.stack([reward.weight * reward.of(arrays, labels) for reward in rewards]).sum(0)


def unfit(rewards: Sequence[Any], *, differentiable: bool = False) -> Iterator[tuple[str, str]]:
    """Yield (option, message) of what cannot reward arrays, for the `check` of objectives.

    Args:
        rewards: what a recipe names.
        differentiable: whether gradients must go through them.
    """
    for reward in rewards:
        if not isinstance(reward, ArrayReward):
            yield "reward", f"'{reward.name}' judges text; for arrays there are near, within, classifier and brightness"
        elif differentiable and not reward.differentiable:
            name = getattr(reward, "name", "")
            yield (
                "reward",
                f"'{name}' has no gradient, which this objective needs; use one that has, or ddpo, rlcm, prdp",
            )


@dataclass(kw_only=True)
class _Placed(ArrayReward):
    """What looks at the distance from a place.

    Args:
        place: numbers of an array, row after row; None takes the mean of the training arrays of the wanted class, or of
            all where none is wanted.
    """

    place: list[float] | None = None
    _places: Tensor | None = field(init=False, default=None, repr=False)

    def setup(self, run: Any) -> None:
        """Find the places: one for each class, and one more for none.

        Args:
            run: the run in progress.

        Raises:
            ModelError: the place has another size than an array.
        """
        arrays, labels, classes = training_data(run)
        if self.place is not None:
            if len(self.place) != arrays[0].numel():
                raise ModelError(f"reward.place: expected {arrays[0].numel()} numbers, got {len(self.place)}")
            found = torch.tensor(self.place, dtype=torch.float64).expand(classes + 1, -1)
        else:
            means = [arrays[labels == label].double().mean(0) for label in range(classes)]
            found = torch.stack([*means, arrays.double().mean(0)])
        self._places = found.reshape(classes + 1, -1)

    def squared(self, arrays: Tensor, labels: Tensor) -> Tensor:
        """Return the squared distance of each array from its place (B,).

        Args:
            arrays: (B, *shape).
            labels: (B,) classes, -1 for none.
        """
        assert self._places is not None, "setup comes first"
        places = self._places.to(arrays)
        return (arrays.flatten(1) - places[labels]).square().sum(1)  # -1 takes the last place


@part("reward", "near", papers="original")
@dataclass(kw_only=True)
class Near(_Placed):
    """Closeness to a place: -|x - place|^2 / (2 width^2).

    Args:
        width: distance at which the reward is -1/2.
    """

    width: Positive = 1.0

    def of(self, arrays: Tensor, labels: Tensor) -> Tensor:
        """Return the worth of each array (B,).

        Args:
            arrays: (B, *shape) clean arrays.
            labels: (B,) classes that were asked for, -1 for none.
        """
        return -self.squared(arrays, labels) / (2 * self.width**2)


@part("reward", "within", papers="original")
@dataclass(kw_only=True)
class Within(_Placed):
    """1 for what lies within a distance of a place, else 0. It has no gradient.

    Args:
        width: the distance.
    """

    differentiable: ClassVar[bool] = False
    width: Positive = 1.0

    def of(self, arrays: Tensor, labels: Tensor) -> Tensor:
        """Return the worth of each array (B,).

        Args:
            arrays: (B, *shape) clean arrays.
            labels: (B,) classes that were asked for, -1 for none.
        """
        return (self.squared(arrays, labels) < self.width**2).to(arrays)


@part("reward", "brightness", papers="original")
@dataclass(kw_only=True)
class Brightness(ArrayReward):
    """The mean of an array's numbers, or how near it is to a wanted one: -|mean - wanted|.

    Args:
        wanted: the mean that is best; None takes more for better.
    """

    wanted: float | None = None

    def of(self, arrays: Tensor, labels: Tensor) -> Tensor:
        """Return the worth of each array (B,).

        Args:
            arrays: (B, *shape) clean arrays.
            labels: (B,) classes that were asked for, -1 for none.
        """
        found = arrays.flatten(1).mean(1)
        return found if self.wanted is None else -(found - self.wanted).abs()


@part("reward", "classifier", papers="original")
@dataclass(kw_only=True)
class Classifier(ArrayReward):
    """The log-probability of the wanted class, by a small classifier that is trained on the data when the run starts.

    Args:
        label: the wanted class, the same for all; None takes the class that each array was asked for.
        steps: that the classifier is trained for.
    """

    label: Annotated[int, Field(ge=0)] | None = None
    steps: Count = 300
    _network: Encoder | None = field(init=False, default=None, repr=False)

    def setup(self, run: Any) -> None:
        """Train the classifier.

        Args:
            run: the run in progress.

        Raises:
            ModelError: there is no such class.
        """
        self._network = frozen_encoder("classifier", run, steps=self.steps, what="reward")
        classes = self._network.classes
        if self.label is not None and self.label >= classes:
            raise ModelError(f"reward.label: expected a class below {classes}, got {self.label}")

    def of(self, arrays: Tensor, labels: Tensor) -> Tensor:
        """Return the worth of each array (B,), 0 for one that no class was asked for.

        Args:
            arrays: (B, *shape) clean arrays.
            labels: (B,) classes that were asked for, -1 for none.
        """
        assert self._network is not None, "setup comes first"
        wanted = labels if self.label is None else torch.full_like(labels, self.label)
        found = self._network(arrays).log_softmax(1).gather(1, wanted.clamp(min=0)[:, None])[:, 0]
        return torch.where(wanted >= 0, found, torch.zeros_like(found))
