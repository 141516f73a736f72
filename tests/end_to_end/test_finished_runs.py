"""What one does with a run afterwards: go on with a changed recipe, take its model elsewhere, export and merge it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import yaml
from PIL import Image

from end_to_end.support import back_to, fields, hone, logits, train, write_recipe
from hone import Recipe, resume
from hone.data.arrays import Images
from hone.data.files import Files
from hone.data.sample import Sample
from hone.engine.evaluate import expected
from hone.errors import CheckpointError, DataError, RecipeError
from hone.text.model import LanguageModel

LORA = {"name": "lora", "rank": 2}


@pytest.fixture(scope="module")
def stopped(tiny_model: Path, qa_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has stopped at its fourth step of twelve."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    train(tiny_model, qa_file, out, checkpoint_every=4, keep=9)
    back_to(out, 4)
    return out


def edited(run: Path, to: Path, **changes: Any) -> Path:
    """Return a copy of a run whose recipe says something else."""
    shutil.copytree(run, to)
    recipe = yaml.safe_load((to / "recipe.yaml").read_text())
    write_recipe(to / "recipe.yaml", {**recipe, **changes, "out": str(to)})
    return to


@pytest.mark.parametrize(
    ("name", "value"),
    [("optimizer", {"name": "sgd", "lr": 0.1}), ("optimizer", {"name": "adamw", "lr": 1.0}), ("seed", 3),
     ("batch_tokens", 128), ("adapter", {"name": "lora", "rank": 2}), ("schedule", "linear"), ("clip", 0.5)],
)  # fmt: skip
def test_a_run_does_not_go_on_with_another_recipe(stopped: Path, tmp_path: Path, name: str, value: Any) -> None:
    run = edited(stopped, tmp_path / "run", **{name: value})
    with pytest.raises(CheckpointError, match=f"recipe.yaml: this run cannot go on to the same result: '{name}' was "):
        resume(run)


def test_a_run_may_become_longer_and_says_so(stopped: Path, tmp_path: Path) -> None:
    run = edited(stopped, tmp_path / "run", steps=14, keep=3)
    said = hone("resume", run)
    assert said.status == 0 and "'steps' became 14 in place of 12" in said.err
    manifest = json.loads((run / "manifest.json").read_text())
    assert [change["step"] for change in manifest["changes"]] == [4, 4] and manifest["recipe"]["steps"] == 14
    result = json.loads((run / "result.json").read_text())
    assert result["steps"] == 14 and result["seconds"] >= result["training_seconds"]
    with pytest.raises(CheckpointError, match="this run has taken 4 steps already"):
        resume(edited(stopped, tmp_path / "shorter", steps=3))


@pytest.fixture(scope="module", params=["full", LORA], ids=["full", "lora"])
def staged_run(
    request: pytest.FixtureRequest, tiny_model: Path, qa_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """All weights or an adapter, then an adapter on what they have become."""
    out = tmp_path_factory.mktemp("staged") / "run"
    stages = [{"steps": 2, "adapter": request.param}, {"steps": 2, "adapter": LORA}]
    train(tiny_model, qa_file, out, steps=None, stages=stages)
    return out


def read(folder: Path) -> Any:
    """Return the logits of a model folder, as hone loads it."""
    with torch.no_grad():
        return logits(LanguageModel.load(str(folder)).hf, list(range(1, 9)))


def test_a_run_of_stages_may_move(staged_run: Path, tmp_path: Path) -> None:
    wanted = read(staged_run / "model")
    shutil.copytree(staged_run, tmp_path / "moved")
    aside = staged_run.rename(staged_run.with_name("aside"))
    try:
        assert torch.equal(read(tmp_path / "moved" / "model"), wanted)
        assert hone("sample", tmp_path / "moved", "--prompt", "What").status == 0
    finally:
        aside.rename(staged_run)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 on transformers 5.23
def test_an_exported_adapter_brings_the_base_of_its_stage(staged_run: Path, tmp_path: Path) -> None:
    said = hone("export", staged_run, "--to", "peft", "--out", tmp_path / "peft")
    beside, stage = tmp_path / "peft" / "base", staged_run / "stage-1" / "model"
    assert said.status == 0 and f"load it on: {beside if beside.is_dir() else stage}" in said.out
    with torch.no_grad():
        found = logits(peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "peft")), list(range(1, 9)))
    torch.testing.assert_close(found, read(staged_run / "model"), rtol=0, atol=1e-4)


def test_a_finished_model_needs_no_training_data(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    shutil.copy(qa_file, data)
    train(tiny_model, data, tmp_path / "run", steps=1)
    data.unlink()
    assert hone("sample", tmp_path / "run", "--prompt", "What").status == 0
    assert hone("export", tmp_path / "run").status == 0
    refused = hone("eval", tmp_path / "run")
    assert refused.status == 2 and "there is no such file" in refused.err


def test_the_rounding_of_an_export_is_told(lora_run: Path, tmp_path: Path) -> None:
    said = hone("export", lora_run, "--out", tmp_path / "half", "--dtype", "bfloat16", "--json")
    made = json.loads(said.out)
    assert made["error"] <= 1e-4 < made["rounding"] < 1


def test_runs_are_merged_by_their_folders(lora_run: Path, tmp_path: Path) -> None:
    assert hone("merge", lora_run, lora_run, "--out", tmp_path / "merged").status == 0
    assert (tmp_path / "merged" / "config.json").is_file()


def test_figures_of_stages_are_compared_with_their_like(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    smooth = {"name": "sft", "label_smoothing": 0.3}
    one = train(tiny_model, qa_file, tmp_path / "a", steps=None, stages=[{"steps": 1}, {"steps": 1}])
    stages = [{"steps": 1}, {"steps": 1, "objective": smooth}]
    other = train(tiny_model, qa_file, tmp_path / "b", steps=None, stages=stages)
    assert one["before"]["loss"] == one["stages"][0]["before"]["loss"]
    assert other["before"]["loss"] == other["stages"][1]["before"]["loss"]
    assert other["before"]["accuracy"] == other["stages"][0]["before"]["accuracy"]


@pytest.mark.parametrize(
    ("name", "said"),
    [("learning_rate", "optimizer.lr"), ("gradient_checkpointing", "recompute"), ("sequence_len", "data.max_tokens")],
)
def test_names_of_other_trainers_are_known(name: str, said: str) -> None:
    with pytest.raises(RecipeError, match=rf"{name}: unknown option \(here it is {said}"):
        Recipe.of(data="chains", steps=1, **{name: 1})


def test_a_path_on_data_without_one_says_how_files_are_named() -> None:
    with pytest.raises(RecipeError, match="for one write data: FILE"):
        Recipe.of(data={"name": "chains", "path": "x.jsonl"}, steps=1)


def test_truths_in_tables_are_labels(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("prompt,completion,label\n" + "a,b,True\na,c,False\n" * 10)
    rows = list(Files(path=str(tmp_path / "d.csv")).samples("train"))
    assert {(sample.answers[0], sample.fields["label"]) for sample in rows} == {("b", 1.0), ("c", 0.0)}
    assert {sample.labels for sample in rows} == {("True",), ("False",)}  # still the names of classes


def test_the_answer_in_a_column_is_what_is_expected() -> None:
    assert expected(Sample("prompt", "add 9", extra={"answer": "9"})) == "9" and expected(Sample("prompt", "x")) == ""


def test_grey_pictures_among_coloured_ones(tmp_path: Path) -> None:
    for number in range(4):
        shape = (8, 8) if number == 2 else (8, 8, 3)
        Image.fromarray(np.full(shape, 40 * number, np.uint8)).save(tmp_path / f"{number}.png")
    with pytest.raises(DataError) as caught:
        Images(path=str(tmp_path)).arrays()
    assert "grey: false" in str(caught.value) and "side" not in str(caught.value)
    assert Images(path=str(tmp_path), grey=False).arrays()[0].shape == (4, 3, 8, 8)
    assert Images(path=str(tmp_path), grey=True).arrays()[0].shape == (4, 1, 8, 8)


def test_a_recipe_of_a_run_is_fields_of_a_recipe(tmp_path: Path, tiny_model: Path, qa_file: Path) -> None:
    file = write_recipe(tmp_path / "recipe.yaml", {**fields(tiny_model, qa_file, tmp_path), "stepz": 3})
    with pytest.raises(RecipeError, match=r"recipe.yaml:\d+: stepz: unknown option"):
        Recipe.kept(file)
