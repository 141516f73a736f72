"""Runs on single judged answers, and runs whose last stage merges the others, from a recipe and by command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from end_to_end.support import back_to, files, hone, logits, repeatable, rows, train
from hone import resume
from hone.text.model import LanguageModel


@pytest.fixture(scope="module")
def judged_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty answers in a file of their own: those that say yes are good."""
    path = tmp_path_factory.mktemp("judged") / "judged.jsonl"
    made = [
        {"prompt": f"Is {n} a number? ", "completion": f"{'no, not' if n % 3 else 'yes,'} {n}", "label": n % 3 == 0}
        for n in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.mark.parametrize("objective", ["kto", "bco"])
def test_a_run_on_single_answers_goes_on_to_the_same_bytes(
    tiny_model: Path, judged_file: Path, tmp_path: Path, objective: str
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    changes: dict[str, Any] = {
        "objective": {"name": objective, "beta": 0.5}, "eval_samples": 0, "steps": 8, "checkpoint_every": 3,
    }  # fmt: skip
    for out in (whole, again):
        result = train(tiny_model, judged_file, out, **changes)
    assert result["after"]["loss"] < result["before"]["loss"]
    assert result["after"]["answer_accuracy"] > 0.8
    assert any(row["point"] for row in rows(whole / "metrics.jsonl"))
    back_to(again, 6)
    resume(again)
    assert files(again / "model") == files(whole / "model")
    assert [repeatable(row) for row in rows(again / "metrics.jsonl")] == [
        repeatable(row) for row in rows(whole / "metrics.jsonl")
    ]


def test_stages_side_by_side_are_merged(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    model = {
        "name": "merged", "base": "stage:0", "models": ["stage:1", "stage:2"],
        "merger": {"name": "task-arithmetic", "scale": 0.5},
    }  # fmt: skip
    stages = [
        {"name": "first", "steps": 3, "penalties": [{"name": "l1", "strength": 1e-5}]},
        {"name": "second", "model": "stage:0", "adapter": "full", "optimizer": {"name": "sgd", "lr": 0.1}, "steps": 2},
        {"name": "merged", "model": model, "adapter": "full", "steps": 0},
    ]
    whole = tmp_path / "run"
    result = train(tiny_model, qa_file, whole, steps=None, stages=stages)
    assert result["status"] == "finished" and result["after"]["loss"] < result["before"]["loss"]
    assert "sparsity" in rows(whole / "stage-1" / "metrics.jsonl")[-1]
    parts = [str(whole / f"stage-{n}" / "model") for n in (1, 2)]
    options = ["--base", tiny_model, "--method", "task-arithmetic", "--set", "scale=0.5", "--out", tmp_path / "made"]
    made = hone("merge", *parts, *options)
    assert made.status == 0 and "parameters" in made.out, made.err
    first, second = (logits(LanguageModel.load(path).hf, [5, 6, 7]) for path in (tmp_path / "made", whole / "model"))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    again = hone("merge", *parts, *options)
    assert again.status == 2 and "exists already" in again.err
