"""Comparisons whose variants begin with the same stage: it is trained once, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from end_to_end.comparisons import found, prepare, row, small
from hone.engine.progress import Display
from hone.evidence import contest
from hone.evidence.beginnings import begin, first_stage, share
from hone.evidence.cells import TO_READ, Job, Store
from hone.evidence.contest import Comparison, Contest
from hone.evidence.pool import LocalPool
from hone.evidence.variants import Variant
from hone.recipe import Recipe

PAIR = ("--vary", "objective.label_smoothing=0.0,0.2", "--seeds", "1", "--metric", "loss")


@pytest.fixture(scope="module")
def staged(tiny_model: Path, qa_file: Path) -> dict[str, Any]:
    """Fields of a recipe that trains all weights for two steps, and then for three with another objective."""
    stages = [{"name": "warm-up", "steps": 2, "objective": "sft"}, {"steps": 3}]
    return small(tiny_model, qa_file, adapter="full", steps=None, general_data=None, stages=stages)


def cells(folder: Path) -> list[str]:
    """Return the names of a store's cells without their keys."""
    return sorted(path.name.rsplit("-", 1)[0] for path in (folder / "cells").iterdir())


def test_the_first_stage_is_trained_once_and_all_is_as_if_each_had_trained_it(
    tmp_path: Path, staged: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = prepare(tmp_path, "mine", staged)
    shared = found(recipe, tmp_path / "one" / "compared", *PAIR)
    assert [name for name in cells(tmp_path / "one") if "warm-up" in name] == ["warm-up-warm-up-seed-0"]
    monkeypatch.setattr(contest, "share", lambda jobs, store, keeps: (list(jobs), []))
    apart = found(recipe, tmp_path / "two" / "compared", *PAIR)
    assert not [name for name in cells(tmp_path / "two") if "warm-up" in name]
    for ours in shared["variants"]:
        other = row(apart, ours["label"])
        for name in ("loss", "steps", "tokens", "trained"):
            assert ours["values"][name] == other["values"][name], name
        for seed, place in ours["cells"].items():
            mine, theirs = Path(place), Path(other["cells"][seed])
            for stage in ("stage-1", "stage-2"):
                left, right = (run / stage / "model" / "model.safetensors" for run in (mine, theirs))
                assert left.read_bytes() == right.read_bytes()
                left, right = (run / stage / "recipe.yaml" for run in (mine, theirs))
                assert left.read_text() == right.read_text().replace(str(theirs), str(mine))
            result = json.loads((mine / "stage-1" / "result.json").read_text())
            assert result["run"] == str(mine / "stage-1") and Path(result["model"]).is_dir()
            assert str(mine / "stage-1") in (mine / "result.json").read_text()
            assert "warm-up-seed" not in (mine / "result.json").read_text()
            said = (mine.parent / "log.txt").read_text()
            assert "stage 2 of 2" in said and "stage 1 of 2" not in said
            assert "stage 1 of 2" in (theirs.parent / "log.txt").read_text()


def test_a_stage_that_one_variant_alone_has_is_no_cell_of_its_own(tmp_path: Path, staged: dict[str, Any]) -> None:
    store = Store(tmp_path)
    slow, fast, shuffled = (
        store.job("run", Recipe.of(**{**staged, "optimizer": {"name": "adamw", "lr": rate}, "seed": seed}), "")
        for rate, seed in ((1e-3, 0), (2e-3, 0), (1e-3, 1))
    )
    assert share([slow, fast, shuffled], store, "model") == ([slow, fast, shuffled], [])


def test_only_a_first_stage_that_stands_alone_is_one(staged: dict[str, Any]) -> None:
    recipe = Recipe.of(**staged)
    first = first_stage(recipe)
    assert first is not None and first.steps == 2 and not first.stages and first.name == "warm-up"
    assert first_stage(first) is None
    from_start = first_stage(Recipe.of(**{**staged, "stages": [{"steps": 2, "model": "stage:0"}, {"steps": 3}]}))
    assert from_start is not None and from_start.model == recipe.model


def test_what_a_claim_keeps_no_models_of_leaves_none_behind(tmp_path: Path, staged: dict[str, Any]) -> None:
    variants = tuple(Variant(str(n), {**staged, "stages": [staged["stages"][0], {"steps": n}]}, {}) for n in (1, 2))
    asked: list[Job] = []

    class Watched(LocalPool):
        def run(self, jobs: Sequence[Job], width: int, tick: Any) -> None:
            asked.extend(jobs)
            super().run(jobs, width, tick)

    comparison = Comparison(name="claim", variants=variants, seeds=1)
    Contest(comparison, Store(tmp_path), Watched(2), Display(), keeps="").run(lambda: None)
    trained = [job for job in asked if job.task == "run"]
    assert [job.keeps for job in trained] == [TO_READ, "", ""]
    assert [job.begins for job in trained] == [None, trained[0].folder, trained[0].folder]
    assert all(job.result() is not None for job in trained) and not list(tmp_path.rglob("model"))
    assert not trained[0].done  # whoever needs its model trains it again
    assert not begin(Recipe.of(**{**variants[0].fields, "out": str(tmp_path / "new")}), trained[0].run)
    assert not (tmp_path / "new").exists()
