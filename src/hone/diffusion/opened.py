"""A split of a source of arrays, as the engine reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hone.data.arrays import ArraySource
from hone.data.loader import Loader
from hone.data.open import Batches
from hone.data.source import Split
from hone.diffusion.items import Collection, Item, collate


@dataclass
class Arrays:
    """Arrays that are ready to train or evaluate on: what `hone.data.open.Opened` is for text.

    Args:
        source: where they come from.
        split: "train" or "eval".
        trees: the arrays, as what the engine calls the units of a step.
    """

    source: ArraySource
    split: Split
    trees: Collection

    def first(self, count: int) -> list[Item]:
        """Return the first arrays.

        Args:
            count: at most so many.
        """
        return list(self.trees[:count])

    def describe(self) -> str:
        """Return one sentence for people."""
        return f"{self.source.describe()}, {len(self.trees):,} to {'train on' if self.split == 'train' else 'compare'}"

    def record(self) -> dict[str, Any]:
        """Return what identifies the data, for the manifest of a run."""
        return {
            "source": self.source.describe(), "split": self.split, "fingerprint": self.source.fingerprint(),
            "counts": {"samples": len(self.trees)}, "cache": None,
        }  # fmt: skip

    def loader(
        self, batch_tokens: int, seed: int, epochs: float | None = None, *, workers: int | None = None
    ) -> Loader:
        """Return the resumable loader.

        Args:
            batch_tokens: most arrays in one step.
            seed: seeds the order.
            epochs: passes over the data; None goes on for ever.
            workers: unused: arrays lie in memory.
        """
        trees: Any = self.trees
        return Loader(trees, batch_tokens=batch_tokens, seed=seed, shuffle=self.source.shuffle, epochs=epochs)

    def calibration(self, batch_tokens: int, seed: int, device: torch.device | str = "cpu") -> Batches:
        """Return batches for methods that look at data before they train.

        Args:
            batch_tokens: most arrays in one batch.
            seed: seeds the order.
            device: where the batches are wanted.
        """
        return Batches(self, batch_tokens, seed, device, collate)


def open_arrays(source: ArraySource, split: Split = "train") -> Arrays:
    """Read a split of a source of arrays.

    Args:
        source: gives the arrays.
        split: "train" or "eval".

    Raises:
        DataError: there is nothing to train on.
    """
    return Arrays(source, split, source.collection(split))
