"""Which figure ranks the variants of a comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hone.engine.progress import Display
from hone.errors import HoneError
from hone.evidence.cells import Store
from hone.evidence.contest import Comparison, Contest
from hone.evidence.pool import LocalPool
from hone.evidence.variants import Variant

TEXT = {"data": "chains", "steps": 5}


def arrays(**fields: Any) -> Variant:
    given = {
        "name": "points",
        "model": {"name": "denoiser", "network": "mlp"},
        "data": "points",
        "objective": "denoise",
        "steps": 5,
    }
    return Variant("points", {**given, "distances": ["energy", "mmd"], **fields}, {})


def test_distances_of_drawn_arrays_may_rank() -> None:
    Comparison(name="points", variants=(arrays(),), metric="energy@2")
    with pytest.raises(HoneError, match=r"did you mean 'energy@n'"):
        Comparison(name="points", variants=(arrays(),), metric="energi@2")
    with pytest.raises(HoneError, match=r"the runs have no 'energy@2'"):
        Comparison(name="points", variants=(arrays(eval_samples=0),), metric="energy@2")


@pytest.mark.parametrize(
    ("variant", "figures", "metric"),
    [
        (arrays(), {"loss": 1.0, "mmd@1": 0.1, "energy@16": 0.1, "energy@2 heun": 0.2, "energy@2": 0.3}, "energy@2"),
        (arrays(), {"loss": 1.0}, "loss"),
        (Variant("text", TEXT, {}), {"loss": 1.0, "accuracy": 0.2}, "accuracy"),
        (Variant("text", TEXT, {}), {"loss": 1.0, "accuracy": 0.0}, "loss"),
        (Variant("text", TEXT, {}), {"accuracy": 0.0}, "accuracy"),
    ],
)
def test_what_ranks_when_nobody_says(tmp_path: Path, variant: Variant, figures: dict[str, float], metric: str) -> None:
    contest = Contest(Comparison(name="some", variants=(variant,)), Store(tmp_path), LocalPool(1), Display())
    assert contest.metric([figures]) == metric
