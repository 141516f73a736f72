"""Every registered adapter trains from a recipe, saves a model that loads, and resumes to the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.adapters import about, keep_or_skip
from end_to_end.support import rows, train
from hone import Recipe, parts
from hone.engine.run import resume
from hone.text.model import LanguageModel
from hone.text.pack import pack

NAMES = [r.name for r in parts.catalogue() if r.kind == "adapter" and not r.name.endswith(":")]
STEPS = 4


@pytest.fixture(scope="module", params=NAMES)
def finished(
    request: pytest.FixtureRequest, tiny_model: Path, qa_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The name of an adapter, and a finished run of it."""
    name = request.param
    general = tmp_path_factory.mktemp("general") / "few.jsonl"  # evaluated whole, four times with the resumed run
    general.write_text("".join(qa_file.read_text().splitlines(keepends=True)[:20]))
    out = tmp_path_factory.mktemp(name) / "run"
    row = (about(name).get("rows") or [{}])[0] if not about(name).get("defaults", True) else {}
    changes: dict[str, Any] = {
        "adapter": {"name": name, **row, **about(name).get("options", {})}, "steps": STEPS, "checkpoint_every": 2,
        "precision": "float64", "general_data": {"name": "files", "path": str(general)},
        "eval_samples": 2, "max_new_tokens": 4, **about(name).get("run", {}),
    }  # fmt: skip
    train(tiny_model, qa_file, out, **changes)
    return name, out


def test_it_trains_from_a_recipe(finished: tuple[str, Path]) -> None:
    _, out = finished
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "finished"
    assert result["after"]["loss"] < result["before"]["loss"]


def test_the_saved_model_is_the_trained_one(finished: tuple[str, Path]) -> None:
    _, out = finished
    result = json.loads((out / "result.json").read_text())
    recipe = Recipe.load(out / "recipe.yaml")
    model = LanguageModel.load(out / "model", dtype=torch.float64)
    from hone.data.open import open_data

    source = recipe.build("data")
    opened = open_data(source, model.renderer, consumes="sequences", split="eval", context=model.context)
    batch = pack(opened.trees.head(10_000) if hasattr(opened.trees, "head") else list(opened.trees))
    model.eval()
    with torch.no_grad():
        objective = recipe.build("objective")
        loss = float(objective.loss(model, batch)[0]) / objective.count(batch)
    assert loss == pytest.approx(result["after"]["loss"], rel=1e-6)


def test_resumed_equals_uninterrupted(finished: tuple[str, Path], tmp_path: Path) -> None:
    name, out = finished
    keep_or_skip(name, "resumed")
    again = tmp_path / "run"
    shutil.copytree(out, again)
    shutil.rmtree(again / "model")
    (again / "result.json").unlink()
    shutil.rmtree(again / "checkpoints" / f"step-{STEPS:08d}")
    resume(again)
    for log in ("metrics.jsonl", "evaluations.jsonl"):
        found, wanted = ([strip(row) for row in rows(path / log)] for path in (again, out))
        assert found == wanted
    for file in (out / "model").glob("*.safetensors"):
        assert (again / "model" / file.name).read_bytes() == file.read_bytes()


def strip(row: dict[str, Any]) -> dict[str, Any]:
    """Return what two runs must agree on."""
    return {key: value for key, value in row.items() if key not in ("seconds", "memory")}
