"""Stages run one after the other, each from the result of the one before; a run resumes between and inside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest

from end_to_end.support import back_to, fields, files, hone, logits, rows, train, write_recipe
from hone import resume
from hone.engine.manifest import folder_hash
from hone.text.model import LanguageModel

STAGES: list[dict[str, Any]] = [
    {"name": "adapter", "steps": 6},
    {"adapter": "full", "optimizer": {"name": "sgd", "lr": 0.1}, "steps": 4, "checkpoint_every": 2},
]


@pytest.fixture(scope="module")
def staged_run(tiny_model: Path, qa_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two stages: an adapter, then all weights."""
    out = tmp_path_factory.mktemp("staged") / "run"
    train(tiny_model, qa_file, out, steps=None, stages=STAGES)
    return out


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def test_the_second_stage_starts_from_the_result_of_the_first(staged_run: Path) -> None:
    first, second, whole = (result_of(staged_run / name) for name in ("stage-1", "stage-2", "."))
    assert second["before"]["loss"] == pytest.approx(first["after"]["loss"], abs=1e-5)
    started = json.loads((staged_run / "stage-2" / "manifest.json").read_text())["model"]
    assert started["sha256"] == folder_hash(staged_run / "stage-1" / "model")
    assert whole["before"] == first["before"] and whole["after"] == second["after"]
    assert whole["steps"] == 10 and whole["status"] == "finished"
    assert files(staged_run / "model").keys() == files(staged_run / "stage-2" / "model").keys()
    assert len(rows(staged_run / "stage-1" / "metrics.jsonl")) == 6
    assert (staged_run / "stage-1" / "report.html").exists() and (staged_run / "stage-2" / "report.html").exists()


def test_the_commands_take_the_last_stage(staged_run: Path) -> None:
    row = json.loads(hone("eval", staged_run, "--json").out)
    assert row["loss"] == pytest.approx(result_of(staged_run)["after"]["loss"], abs=1e-5)
    assert json.loads(hone("sample", staged_run, "--json").out)


@pytest.mark.parametrize("lost", ["the second stage", "a part of the second stage"])
def test_a_staged_run_resumes_between_and_inside_stages(staged_run: Path, tmp_path: Path, lost: str) -> None:
    out = tmp_path / "moved"
    shutil.copytree(staged_run, out)
    shutil.rmtree(out / "model")
    (out / "result.json").unlink()
    if lost == "the second stage":
        shutil.rmtree(out / "stage-2")
    else:
        back_to(out / "stage-2", 2)
    again = resume(out)
    assert files(out / "model") == files(staged_run / "model")
    assert again["after"] == result_of(staged_run)["after"] and again["model"] == str(out / "model")


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 on transformers 5.23
def test_an_adapter_on_an_adapter_loads_in_peft(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny_model, qa_file, out, steps=None, stages=[{"steps": 3}, {"steps": 3}])
    ids = list(range(10, 30))
    own = logits(LanguageModel.load(out / "model").hf, ids)
    assert float((own - logits(peft.AutoPeftModelForCausalLM.from_pretrained(out / "model"), ids)).abs().max()) < 1e-5
    assert float((own - logits(LanguageModel.load(out / "stage-1" / "model").hf, ids)).abs().max()) > 1e-3
    for to in ("hf", "peft"):
        made = hone("export", out, "--to", to)
        assert made.status == 0, made.err


def test_what_a_stage_cannot_change_is_said(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    stages = [{"steps": 1, "precision": "float64"}, {"steps": 1, "model": "stage:2"}]
    content = fields(tiny_model, qa_file, tmp_path / "run", stages=stages)
    del content["steps"]
    refused = hone("run", write_recipe(tmp_path / "mine.yaml", content))
    assert refused.status == 2 and not (tmp_path / "run").exists()
    assert "stages.0.precision: cannot differ between stages" in refused.err
    assert "stages.1.model: expected stage:0 to stage:1, which have run by then, got stage:2" in refused.err


def test_a_stage_may_start_from_any_model_that_an_earlier_one_has_made(
    tiny_model: Path, qa_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    stages = [{"steps": 2}, {"steps": 3, "model": "stage:0"}, {"steps": 0, "model": "stage:1"}]
    result = train(tiny_model, qa_file, out, steps=None, stages=stages)
    first, second, third = result["stages"]
    assert first["before"] == second["before"] and first["after"] != second["after"]
    assert third["before"] == third["after"] and third["steps"] == 0
    assert third["before"] == pytest.approx(first["after"], rel=1e-6)  # merged, the adapter rounds otherwise
