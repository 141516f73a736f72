"""Which way the figures of a run are better, by their names."""

from __future__ import annotations

_LOWER = ("loss", "forgetting", "seconds", "memory", "trained", "flops", "tokens", "steps")
_DISTANCES = ("energy", "wasserstein", "mmd", "frechet", "fid")  # between drawn and real arrays, as in energy@2


def lower_is_better(name: str) -> bool:
    """Return whether less of a figure is better.

    Args:
        name: as evaluations and comparisons have it, e.g. loss, accuracy, training_seconds, energy@2.
    """
    kind, at, _ = name.partition("@")
    return kind.endswith(_DISTANCES) if at else kind.endswith(_LOWER)
