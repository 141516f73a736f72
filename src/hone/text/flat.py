"""Trees as a few flat tensors and back, for checkpoints and for messages between processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hone.text.pack import Tree


def flatten(trees: Sequence[Tree]) -> dict[str, Any]:
    """Return trees as tensors and plain values.

    Args:
        trees: any number of them.
    """
    segments = [segment for tree in trees for segment in tree.tokens]
    fields = sorted({name for tree in trees for name in tree.fields})
    values = sorted({name for tree in trees for name in tree.values})
    return {
        "trees": torch.tensor([len(tree.tokens) for tree in trees], dtype=torch.int64),
        "lengths": torch.tensor([len(segment) for segment in segments], dtype=torch.int64),
        "parents": torch.tensor([parent for tree in trees for parent in tree.parents], dtype=torch.int64),
        "tokens": _joined(segments, np.int32),
        "weights": _joined([weight for tree in trees for weight in tree.weights], np.float32),
        "fields": {
            name: [list(tree.fields[name]) if name in tree.fields else None for tree in trees] for name in fields
        },
        "values": {name: _joined([part for tree in trees for part in tree.values.get(name, ())]) for name in values},
        "valued": {name: [name in tree.values for tree in trees] for name in values},
        "where": [tree.where for tree in trees],
    }


def unflatten(flat: dict[str, Any]) -> list[Tree]:
    """Invert `flatten`.

    Args:
        flat: what it returned.
    """
    ends = np.cumsum(_numpy(flat["lengths"]))
    tokens = np.split(_numpy(flat["tokens"]).astype(np.int32), ends[:-1])
    weights = np.split(_numpy(flat["weights"]).astype(np.float32), ends[:-1])
    parents = _numpy(flat["parents"]).tolist()
    at = {name: 0 for name in flat["values"]}
    trees, begin = [], 0
    for number, count in enumerate(_numpy(flat["trees"]).tolist()):
        span = slice(begin, begin + count)
        values: dict[str, tuple[np.ndarray, ...]] = {}
        for name, whole in flat["values"].items():
            if flat["valued"][name][number]:
                sizes = [len(segment) for segment in tokens[span]]
                part = _numpy(whole)[at[name] : at[name] + sum(sizes)]
                values[name] = tuple(np.split(part, np.cumsum(sizes)[:-1]))
                at[name] += sum(sizes)
        fields = {name: tuple(rows[number]) for name, rows in flat["fields"].items() if rows[number] is not None}
        own = tuple(tokens[span]), tuple(weights[span]), tuple(parents[span])
        trees.append(Tree(*own, fields, flat["where"][number], values))
        begin += count
    return trees


def _joined(parts: Sequence[np.ndarray], dtype: Any = np.float64) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype))


def _numpy(value: Any) -> np.ndarray:
    found: np.ndarray = value.cpu().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
    return found
