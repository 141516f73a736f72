"""Two processes train the denoisers that one trains, where gradients of a whole step say how losses are weighed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from end_to_end.support import Outcome, hone, rows, weights, write_recipe
from end_to_end.test_processes import ELASTIC, launched
from hone.engine.sharding import shard
from hone.errors import HoneError

OBJECTIVES: dict[str, dict[str, Any]] = {
    "ctm": {"name": "ctm", "teacher": "truth", "adversarial": 0.1, "begin": 0.5},
    "soundctm": {"name": "soundctm", "teacher": "truth", "distance": "squared"},
}


def settings(objective: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a run whose steps are three micro-batches, so that the second process has one to spare."""
    return {
        "model": {"name": "denoiser", "network": {"name": "mlp", "width": 16, "depth": 2}}, "objective": objective,
        "data": {"name": "points", "count": 200, "holdout": 40, "conditional": True}, "batch_tokens": 12,
        "micro_tokens": 5, "steps": 6, "eval_samples": 4, "solvers": [{"name": "gamma", "steps": 2}],
        "optimizer": {"name": "adamw", "lr": 1e-3, "eps": 1e-6}, "precision": "float64", "device": "cpu",
    }  # fmt: skip


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this file's runs, with those in one process."""
    top = tmp_path_factory.mktemp("array-processes")
    for name, objective in OBJECTIVES.items():
        done = hone("run", write_recipe(top / f"{name}.yaml", {**settings(objective), "out": str(top / name)}))
        assert done.status == 0, done.err
    return top


@pytest.fixture(scope="module")
def said(top: Path) -> dict[str, list[Outcome]]:
    """What the two processes said in each of their runs."""
    return launched(top / "launch", {
        name: ["run", str(top / f"{name}.yaml"), "--set", f"out={top / f'{name}-two'}"] for name in OBJECTIVES
    })  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_two_processes_train_the_denoiser_of_one(top: Path, said: dict[str, list[Outcome]], name: str) -> None:
    main, other = said[name]
    assert (main.status, other.status, other.err) == (0, 0, ""), main.err + other.err
    assert "2 processes" in main.err
    found, wanted = (weights(top / run / "model") for run in (f"{name}-two", name))
    assert found.keys() == wanted.keys()
    assert all((found[key] - wanted[key]).abs().max() <= ELASTIC for key in wanted)
    steps = zip(*(rows(top / run / "metrics.jsonl") for run in (f"{name}-two", name)), strict=True)
    for mine, expected in steps:  # held-out losses are of other noise: processes draw it as they evaluate
        told = {key: mine[key] for key in expected if key not in ("seconds", "memory")}
        assert told == pytest.approx({key: expected[key] for key in told}, rel=ELASTIC, abs=ELASTIC)


def test_denoisers_are_not_shared_among_processes() -> None:
    model: Any = SimpleNamespace(medium="arrays")
    with pytest.raises(HoneError, match="denoisers are trained whole on every process; set sharding: none"):
        shard(model, SimpleNamespace(world=2))  # type: ignore[arg-type]
