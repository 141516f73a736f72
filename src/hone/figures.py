"""Which way the figures of a run are better, and which are shares, by their names."""

from __future__ import annotations

_LOWER = ("loss", "forgetting", "seconds", "memory", "trained", "flops", "tokens", "steps")
_LOWER_TOO = ("repetition", "copied", "average-lagging", "accepted-wrong", "intruders")
_SHARES = ("repetition", "copied", "type-token-ratio", "accepted-wrong", "accepted-right", "tags_right", "tags_found")
_DISTANCES = ("energy", "wasserstein", "mmd", "frechet", "fid")  # between drawn and real arrays, as in energy@2


def lower_is_better(name: str) -> bool:
    """Return whether less of a figure is better.

    Args:
        name: as evaluations and comparisons have it, e.g. loss, loss/0, accuracy, training_seconds, energy@2.
    """
    kind, at, _ = name.partition("@")
    return kind.endswith(_DISTANCES) if at else kind.startswith("loss/") or kind.endswith(_LOWER) or kind in _LOWER_TOO


def is_share(name: str) -> bool:
    """Return whether a figure lies between 0 and 1, to be shown in per cent.

    Args:
        name: as for `lower_is_better`.
    """
    kind, at, _ = name.partition("@")
    return kind in ("precision", "recall") if at else kind.endswith("accuracy") or kind in _SHARES
