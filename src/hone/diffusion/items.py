"""Arrays on their way to a denoiser: one sample, a batch of them, and a data set that fits into memory.

An array has any shape: (d,) for points, (C, H, W) for images, (C, T) for series and spectrograms. It counts as one
token wherever a recipe counts tokens, so that `batch_tokens: 256` makes steps of 256 arrays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import numpy as np
import torch
from torch import Tensor


@dataclass(eq=False, slots=True)
class Item:
    """One array.

    Args:
        array: (*shape) float32.
        label: number of its class, -1 where it has none.
        where: what messages call it.
        fields: numbers beside it, by name.
        place: its place in the step that it is trained in, -1 in evaluation; objectives give it, so that what they draw
            for an array does not depend on the micro-batch that it falls into.
    """

    array: Tensor
    label: int = -1
    where: str = ""
    fields: dict[str, tuple[float, ...]] = field(default_factory=dict)
    place: int = -1

    def __len__(self) -> int:
        """Return what it counts: 1."""
        return 1


@dataclass(frozen=True, eq=False)
class Batch:
    """B arrays of one shape.

    Args:
        arrays: (B, *shape).
        labels: (B,) int64 number of each class, -1 for none.
        places: (B,) int64 place of each in its step, -1 in evaluation; kept on the CPU.
        where: what messages call each.
    """

    arrays: Tensor
    labels: Tensor
    places: Tensor
    where: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return B."""
        return len(self.arrays)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on a device."""
        return replace(self, arrays=self.arrays.to(device), labels=self.labels.to(device))


def collate(items: Sequence[Item]) -> Batch:
    """Return items as a batch.

    Args:
        items: arrays of one shape, at least one.
    """
    return Batch(
        torch.stack([item.array for item in items]),
        torch.tensor([item.label for item in items]),
        torch.tensor([item.place for item in items]),
        tuple(item.where for item in items),
    )


class Collection(Sequence[Item]):
    """Arrays in memory, as what a loader reads."""

    def __init__(self, arrays: Tensor, labels: Tensor | None = None, name: str = "arrays") -> None:
        """Hold the arrays.

        Args:
            arrays: (N, *shape) float32.
            labels: (N,) int64, None for data without classes.
            name: what messages call the data; item 7 of "digits" is "digits:7".
        """
        self.arrays, self.name = arrays, name
        self.labels = torch.full((len(arrays),), -1) if labels is None else labels.long()
        self.lengths = np.ones(len(arrays), dtype=np.int64)

    def __len__(self) -> int:
        """Return N."""
        return len(self.arrays)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        """Return one item, or a list of them."""
        if isinstance(index, slice):
            return self.__getitems__(range(*index.indices(len(self))))
        return Item(self.arrays[index], int(self.labels[index]), f"{self.name}:{index}")

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """Return the items of a step, read at once: 256 of them one by one took 10% of a small network's step.

        Args:
            indices: places in the data.
        """
        rows = torch.as_tensor(indices, dtype=torch.int64)
        arrays, labels = self.arrays[rows].unbind(), self.labels[rows].tolist()
        return [Item(a, label, f"{self.name}:{i}") for a, label, i in zip(arrays, labels, indices, strict=True)]

    def __iter__(self) -> Iterator[Item]:
        """Yield every item."""
        return (self[i] for i in range(len(self)))
