"""What comparisons and claims must not mix up: other metrics, other counts, other lengths, other people's models."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from families.test_comparison_parts import Made, ask, learned, recipe, write
from hone.engine.folder import RunFolder
from hone.engine.run import _before
from hone.errors import HoneError
from hone.evidence import recheck
from hone.evidence.cells import TO_READ, Store, content_key, judged
from hone.evidence.layout import draws, sampling
from hone.evidence.pool import LocalPool
from hone.evidence.report import _pairs
from hone.evidence.store import Evidence
from hone.recipe import Recipe

__all__ = ["ask", "recipe"]  # fixtures
Ask = Callable[..., dict[str, Any]]


def finished(folder: Path, **result: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"status": "finished", **result}))


def test_a_metric_that_an_objective_reports_ranks(ask: Ask) -> None:
    result = ask(Made(lambda r: {**learned(r), "pair_accuracy": 0.5 + r.seed / 10}), "adapter.rank=2,8", seeds=2,
                 metric="pair_accuracy")  # fmt: skip
    assert result["metric"] == "pair_accuracy" and result["better"] == "higher"


def test_what_was_computed_is_not_thrown_away_for_a_metric_that_no_run_has(
    ask: Ask, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        result = ask(Made(learned), "adapter.rank=2,8", seeds=2, metric="class_accuracy")
    assert result["status"] == "finished" and result["metric"] == "accuracy"
    assert "the runs have no 'class_accuracy'" in caplog.text


def test_answers_are_no_metric_of_what_gives_none(ask: Ask, recipe: Path, tmp_path: Path) -> None:
    rows = tmp_path / "classes.jsonl"
    rows.write_text("".join(json.dumps({"text": f"t{i}", "label": "ab"[i % 2]}) + "\n" for i in range(40)))
    write(recipe, data=str(rows), objective={"name": "classify", "classes": ["a", "b"]}, steps=2)
    with pytest.raises(HoneError, match="--metric: the runs have no 'accuracy' "):
        ask(Made(learned), "optimizer.lr=0.1,0.2", metric="accuracy")


def test_what_changes_the_cost_of_a_step_is_not_tuned_under_a_budget_of_tokens(ask: Ask) -> None:
    with pytest.raises(HoneError, match="--tune: batch_tokens changes what a step costs"):
        ask(Made(learned), "optimizer.lr=0.1,0.2", budget="tokens=1000", tune=["batch_tokens=512,1024"])
    result = ask(Made(learned), "optimizer.lr=0.1,0.2", tune=["adapter.rank=1,2"], seeds=2)
    assert all("flops" not in row["values"] for row in result["variants"])  # those of the untuned rank


def test_a_share_moves_by_one_over_the_answers_that_were_judged(tmp_path: Path, recipe: Path) -> None:
    job = Store(tmp_path / "cells").job("run", Recipe.load(recipe), "x")
    finished(job.run)
    rows = [{"step": step, "where": str(i), "accuracy": 1.0 if i else None} for step in (0, 4) for i in range(6)]
    (job.run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (job.run / "manifest.json").write_text(json.dumps({"data": {"eval": {"counts": {"kept": 40}}}}))
    assert judged(job, "accuracy") == 5 and judged(job, "class_accuracy") == 40


def test_a_cell_whose_model_has_been_read_is_computed_again_and_a_comparisons_is_left_alone(
    tmp_path: Path, recipe: Path
) -> None:
    store, made = Store(tmp_path / "cells"), Recipe.load(recipe)
    read = store.job("run", made, "read", keeps=TO_READ)
    finished(read.run)
    assert not read.done
    (read.run / "model").mkdir()
    assert read.done
    kept = store.job("run", made, "kept", also="y")
    finished(kept.run)
    assert store.job("run", made, "other", keeps=TO_READ, also="y").folder != kept.folder  # it has no model to read
    (kept.run / "model").mkdir()
    other = store.job("run", made, "other", keeps=TO_READ, also="y")
    assert other.folder == kept.folder and other.keeps == "model"  # which says that the model stays


def test_another_model_in_the_same_place_is_another_cell(tmp_path: Path, qa_file: Path) -> None:
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    (teacher / "config.json").write_text("{}")
    fields = {"data": str(qa_file), "steps": 2, "sampler": {"name": "genarm", "guides": [str(teacher)]}}
    first = content_key(Recipe.load(write(tmp_path / "a.yaml", **fields)))
    save_file({"w": torch.zeros(3)}, teacher / "model.safetensors")
    assert content_key(Recipe.load(tmp_path / "a.yaml")) != first


def test_forgetting_is_that_of_all_stages() -> None:
    results = [{"before": {"loss": 5.0, "general_loss": 3.0}}, {"before": {"loss": 2.0, "general_loss": 3.8}}]
    stages: list[Any] = [
        SimpleNamespace(data=name, eval_data=None, objective="sft", general_data="pydocs") for name in ("a", "b")
    ]
    assert _before(results, stages) == {"loss": 2.0, "general_loss": 3.0}
    stages[1].general_data = "other"
    assert _before(results, stages) == {"loss": 2.0, "general_loss": 3.8}


def test_answers_are_paired_by_their_prompts() -> None:
    rows = [
        {"step": step, "where": "chains:eval:0", "prompt": prompt, "answer": f"{prompt} {step}", "expected": ""}
        for step in (0, 1)
        for prompt in ("sort 3 1", "add 2 2")
    ]
    assert [(pair["prompt"], pair["before"]) for pair in _pairs(rows)] == [
        ("sort 3 1", "sort 3 1 0"), ("add 2 2", "add 2 2 0"),
    ]  # fmt: skip


def test_a_run_of_arrays_is_sampled_without_a_prompt(tmp_path: Path) -> None:
    assert sampling(str(tmp_path)).endswith("--prompt '...'") and not draws(tmp_path)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "ddim-10-step-000005.png").touch()
    assert sampling(str(tmp_path)).endswith("--samples 64") and RunFolder(tmp_path).path == tmp_path


def test_a_recheck_compares_what_was_missing_too() -> None:
    differences = recheck._differences
    assert differences({"loss": [0.5, 0.7]}, {"loss": 0.54}) == []
    assert differences({"loss": [0.5, 0.7]}, {"loss": 0.56}) == ["loss was 0.5 and is 0.56"]
    assert differences({"trained": [500.0, 500.0]}, {"trained": 501.0}) == ["trained was 500 and is 501"]
    assert differences({"loss": [0.5, 0.7]}, {}) == ["loss was 0.5 and is missing"]
    assert differences({"loss": [None, 0.7]}, {"loss": 0.5}) == ["loss was missing and is 0.5"]
    assert differences({"loss": [None, 0.7], "training_seconds": [1.0, 2.0]}, {"training_seconds": 9.0}) == []


def test_runs_that_failed_are_told_beside_a_verdict() -> None:
    values = {"loss": [None, 0.5, 0.6]}
    record = {
        "kind": "objective", "name": "x", "claim": "y", "says": "z", "source": "", "seeds": [0, 1, 2],
        "verdict": "not at this scale", "reason": "infinite gradients",
        "sides": {"baseline": {"label": "b", "values": values}, "method": {"label": "m",
                                                                           "values": {"loss": [1, 2, None]}}},
    }  # fmt: skip
    evidence = Evidence("objective", "x", "y", "z", "not at this scale", "", Path("x.json"), record)
    assert evidence.trouble() == "some runs failed (1 of 3 pairs are compared)"
    assert any(line.strip().endswith("infinite gradients") for line in evidence.text())


@pytest.mark.parametrize(
    ("asked", "found"),
    [(None, [8, 4, 2, 1]), ("3", [3, 3, 2, 1]), ("1", [1] * 4), ("many", [8, 4, 2, 1]), ("0", [8, 4, 2, 1])],
)
def test_cells_share_the_cores_and_take_no_more_threads_than_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, found: list[int]
) -> None:
    monkeypatch.setattr("hone.evidence.pool.cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert [LocalPool().threads(width) for width in (1, 2, 3, 9)] == found
