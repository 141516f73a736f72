"""Runs of denoisers from a recipe: what they leave, how they go on, what is drawn from them, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from end_to_end.comparisons import prepare, say
from end_to_end.support import back_to, fields, files, heard, hone, repeatable, rows
from hone import Recipe, resume, run
from hone.data.arrays import Images, Points, Tones
from hone.diffusion.denoiser import Denoiser
from hone.engine.assemble import assemble
from hone.engine.devices import Cluster
from hone.engine.progress import Display
from hone.errors import DataError, HoneError, ModelError, RecipeError

SMALL: dict[str, Any] = {"name": "denoiser", "network": {"name": "mlp", "width": 16, "depth": 2}}


def recipe(out: Path, /, **changes: Any) -> dict[str, Any]:
    return {
        "model": SMALL, "data": {"name": "points", "count": 400, "holdout": 50}, "objective": "denoise",
        "optimizer": {"name": "adamw", "lr": 3e-3}, "steps": 6, "batch_tokens": 32, "eval_samples": 40,
        "solvers": [{"name": "heun", "steps": 3}, {"name": "ddim", "steps": 2}], "out": str(out), **changes,
    }  # fmt: skip


def train(out: Path, /, **changes: Any) -> dict[str, Any]:
    return run(Recipe.of(**recipe(out, **changes)))


def test_a_run_is_evaluated_by_what_it_draws(tmp_path: Path) -> None:
    result = train(tmp_path / "run", steps=60)
    assert {"loss", "energy@5", "energy@2"} <= result["after"].keys()
    assert result["after"]["loss"] < result["before"]["loss"]
    pictures = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert pictures == [
        "ddim-2-step-000000.png", "ddim-2-step-000060.png", "heun-5-step-000000.png", "heun-5-step-000060.png",
    ]  # fmt: skip
    page = (tmp_path / "run" / "report.html").read_text()
    assert len(re.findall("<img ", page)) == 4 and "step 60: heun, 5 evaluations each" in page
    assert "hone sample" in page and "--prompt" not in page


def test_a_recipe_without_solvers_draws_as_its_objective_trains(tmp_path: Path) -> None:
    stages = [
        {"name": "teacher"},
        {"name": "student", "objective": {"name": "sfd", "teacher": "stage:1", "steps": 4, "finer": 1}},
    ]
    result = train(tmp_path / "staged", solvers=None, stages=stages)
    assert "energy@35" in result["stages"][0]["after"] and "energy@3" in result["after"]  # its first step is free
    drawn = train(tmp_path / "run", solvers=None, objective="ict")["after"]
    assert {"energy@1", "energy@2"} <= drawn.keys() and len(drawn) == 3
    wanted = [{"name": "multistep", "steps": 1}, {"name": "multistep", "steps": 2}]
    assert Recipe.load(tmp_path / "run" / "recipe.yaml").solvers == wanted  # also for a version that knows others
    assert "30 arrays by multistep, 2 evaluations" in hone("sample", tmp_path / "run", "--samples", "30").out


def test_generators_are_compared_by_what_they_draw(tmp_path: Path) -> None:
    made = {name: value for name, value in recipe(tmp_path).items() if name not in ("solvers", "out")}
    mine = prepare(tmp_path, "mine", {**made, "steps": 2})
    said = say(mine, tmp_path / "out", "--vary", "objective=ict,denoise", "--seeds", "1")
    assert said.status == 0, said.err
    assert "mine: energy@1 (lower is better)" in said.out and "their losses" not in said.err
    assert "objective=denoise: finished with energy@35, without energy@1; to compare them give all" in said.out
    assert "are drawn from with different solvers" in said.err
    given = ("--seeds", "1", "--set", "solvers=[{name: multistep, steps: 2}, heun]")
    said = say(mine, tmp_path / "again", "--vary", "objective=ict,denoise", *given)
    assert said.status == 0 and "solvers" not in said.out + said.err
    assert re.search("objective=denoise +[0-9.]+ ", said.out) and "energy@2 (lower" in said.out


def test_what_is_drawn_later_is_what_evaluation_drew(tmp_path: Path) -> None:
    train(tmp_path / "run")
    shown = hone("sample", tmp_path / "run", "--samples", "30")
    assert shown.status == 0 and "30 arrays by heun, 5 evaluations" in shown.out
    drawn = load_file(tmp_path / "run" / "drawn-1" / "heun-5.safetensors")["arrays"]
    assert drawn.shape == (30, 2) and torch.isfinite(drawn).all()
    hone("sample", tmp_path / "run", "--samples", "30")
    again = load_file(tmp_path / "run" / "drawn-2" / "heun-5.safetensors")["arrays"]  # nothing is overwritten
    assert torch.equal(drawn, again)
    said = hone("eval", tmp_path / "run")
    last = rows(tmp_path / "run" / "evaluations.jsonl")[-1]
    assert f"energy@5: {last['energy@5']:.4f}" in said.out


def test_a_run_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    for out in (whole, again):
        train(out, objective="ct", checkpoint_every=2, callbacks=["average"])
    back_to(again, 4)
    resume(again)
    assert files(again / "model") == files(whole / "model")
    steady = [[repeatable(row) for row in rows(out / "metrics.jsonl")] for out in (again, whole)]
    assert steady[0] == steady[1]


def test_a_stage_starts_from_the_one_before_and_learns_from_its_result(tmp_path: Path) -> None:
    result = train(tmp_path / "run", stages=[
        {"name": "teacher"}, {"name": "student", "objective": {"name": "cd", "teacher": "stage:1"}},
    ])  # fmt: skip
    assert [stage["status"] for stage in result["stages"]] == ["finished", "finished"]
    first = load_file(tmp_path / "run" / "stage-1" / "model" / "model.safetensors")
    second = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert first.keys() == second.keys() and any(not torch.equal(first[name], second[name]) for name in first)


def test_frozen_weights_that_an_adapter_is_merged_into_keep_their_bits(
    tmp_path: Path, tiny_model: Path, qa_file: Path
) -> None:
    changes: dict[str, Any] = {"adapter": {"name": "lora", "rank": 2}, "precision": "bf16"}
    arrays, text = recipe(tmp_path / "a", **changes), fields(tiny_model, qa_file, tmp_path / "t", **changes)
    for given, dtype in ((arrays, torch.float32), (text, torch.bfloat16)):
        model = assemble(Recipe.of(**given), Cluster("cpu", "bf16"), Display(False)).run.model
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {dtype}
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_an_adapter_is_merged_into_what_is_saved(tmp_path: Path) -> None:
    train(tmp_path / "base")
    start = {"name": "denoiser", "path": str(tmp_path / "base")}
    train(tmp_path / "tuned", model=start, adapter={"name": "lora", "rank": 2}, steps=20)
    before, after = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("base", "tuned"))
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all(name.endswith("weight") for name in changed)


@pytest.mark.parametrize(("objective", "parameterisation"), [
    ({"name": "ict", "end": 160}, "consistency"), ("ct", "consistency"),
    ({"name": "progressive", "teacher": "truth", "plan": [8, 4, 2, 1]}, "vp-v"),
])  # fmt: skip
@pytest.mark.parametrize("more", [{}, {"steps": None, "epochs": 1, "batch_tokens": 20}], ids=["steps", "epochs"])
def test_evaluating_again_finds_the_loss_that_the_run_found(
    tmp_path: Path, objective: Any, parameterisation: str, more: dict[str, Any]
) -> None:
    model = {**SMALL, "parameterisation": parameterisation}
    train(tmp_path / "run", objective=objective, model=model, solvers=["ddim"], **{"steps": 20, **more})
    last = rows(tmp_path / "run" / "evaluations.jsonl")[-1]
    assert f"\nloss: {last['loss']:.4f}\n" in "\n" + hone("eval", tmp_path / "run").out


def test_evaluating_again_needs_the_checkpoint_of_what_an_objective_keeps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained: dict[str, Any] = {
        "ict": {"name": "ict", "end": 160}, "ct": "ct",
        "progressive": {"name": "progressive", "teacher": "truth", "plan": [4, 2, 1]},
    }  # fmt: skip
    for name, objective in trained.items():
        train(tmp_path / name, objective=objective, steps=20, stages=[{"name": "one", "steps": 1}, {"name": "two"}])
        last = rows(tmp_path / name / "stage-2" / "evaluations.jsonl")[-1]
        same = f"loss: {last['loss']:.4f}"
        with heard(caplog):
            assert same in hone("eval", tmp_path / name).out and "begins anew" not in caplog.text
            shutil.rmtree(tmp_path / name / "stage-2" / "checkpoints")
            said = hone("eval", tmp_path / name).out
        assert (same in said) == (name == "ict") != ("checkpoints is gone" in caplog.text)
        caplog.clear()


def test_evaluating_again_knows_the_curriculum_of_a_run_with_an_adapter(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objective = {"name": "ict", "end": 160}
    train(tmp_path / "run", objective=objective, adapter={"name": "lora", "rank": 2}, steps=20)
    last = rows(tmp_path / "run" / "evaluations.jsonl")[-1]
    assert f"loss: {last['loss']:.4f}" in hone("eval", tmp_path / "run").out
    train(tmp_path / "mean", objective="ct", adapter={"name": "lora", "rank": 2})
    with heard(caplog):
        assert hone("eval", tmp_path / "mean").status == 0
    assert "belongs to a model with an adapter, which is merged now" in caplog.text


def test_what_an_objective_adds_is_taken_over_where_the_next_one_knows_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repa = {"name": "repa", "encoder": "patches"}
    with heard(caplog):
        then = {"name": "denoiser", "path": "stage:1", "parameterisation": "trigflow"}
        train(tmp_path / "run", objective=repa, stages=[
            {"name": "aligned"}, {"name": "consistent", "objective": "scm", "model": then},
        ])  # fmt: skip
    assert "holds no weight, which begins anew; it holds projector" in caplog.text
    first = tmp_path / "run" / "stage-1"
    again = {"name": "denoiser", "path": str(first)}  # the folder of a run, not of its model
    train(tmp_path / "on", objective=repa, model=again, steps=1, optimizer={"name": "adamw", "lr": 1e-9})
    before, after = (load_file(run / "model" / "extras.safetensors") for run in (first, tmp_path / "on"))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    with pytest.raises(ModelError, match="does not fit what the objective puts beside the model"):
        train(tmp_path / "no", objective={**repa, "projector": 7}, model=again)


@pytest.mark.parametrize("precision", ["bf16", "float64"])
@pytest.mark.parametrize("objective", [
    {"name": "nitrofusion", "teacher": "truth", "teacher_steps": 2}, {"name": "ddo", "drawn": 40},
    {"name": "ctm", "teacher": "truth"}, {"name": "repa", "encoder_steps": 5}, {"name": "mmd-ddm", "steps": 2},
], ids=lambda objective: objective["name"])  # fmt: skip
def test_an_adapter_trains_in_every_precision(tmp_path: Path, objective: Any, precision: str) -> None:
    changes: dict[str, Any] = {"data": {"name": "points", "count": 400, "holdout": 50, "conditional": True}}
    for adapter in ("lora", "corda"):  # the latter looks at data first
        out = tmp_path / adapter
        train(out, objective=objective, adapter={"name": adapter, "rank": 2}, precision=precision, steps=2, **changes)
        assert hone("eval", out).status == 0 and hone("sample", out).status == 0


@pytest.mark.parametrize("precision", ["bf16", "float64"])
def test_an_adapter_that_looks_at_gradients_sees_them_in_every_precision(tmp_path: Path, precision: str) -> None:
    adapter = {"name": "lora-sb", "rank": 2}
    assert train(tmp_path / "run", adapter=adapter, precision=precision, steps=2)["status"] == "finished"


def test_a_model_that_is_shown_more_is_drawn_from_by_its_run_alone(tmp_path: Path) -> None:
    train(tmp_path / "run", objective={"name": "ctm", "teacher": "truth"}, solvers=[{"name": "gamma", "steps": 2}])
    assert hone("sample", tmp_path / "run", "--samples", "4").status == 0
    said = hone("sample", tmp_path / "run" / "model", "--samples", "4")
    assert said.status != 0 and "hone sample RUN" in said.err
    assert not list((tmp_path / "run" / "model").glob("drawn-*"))
    path = str(tmp_path / "run")
    stitched = {"name": "t-stitch", "small": path}
    for number, changes in enumerate((
        {"objective": {"name": "cd", "teacher": path}}, {"model": {"name": "denoiser", "path": path}},
        {"solvers": [stitched]},
    )):  # fmt: skip
        with pytest.raises(ModelError, match="trained with 1 more number beside the noise level"):
            train(tmp_path / str(number), **changes)
    with pytest.raises(ModelError, match="gamma follows the jumps of a trajectory model"):
        train(tmp_path / "no", solvers=["gamma"])


@pytest.mark.parametrize(("kind", "drawn"), [("consistency", "multistep-1"), ("edm", "heun-35")])
def test_a_model_folder_says_what_it_is_drawn_from_by(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, drawn: str
) -> None:
    train(tmp_path / "run", model={**SMALL, "parameterisation": kind})
    model = tmp_path / "run" / "model"
    with heard(caplog):
        assert hone("sample", model, "--samples", "4").status == 0
    assert (model / "drawn-1" / f"{drawn}.safetensors").is_file()
    assert f"what its run draws with: {drawn.partition('-')[0]} is taken" in caplog.text


def test_methods_that_look_at_data_run_a_widened_network_with_zeros(tmp_path: Path) -> None:
    train(
        tmp_path / "run", objective={"name": "ctm", "teacher": "truth"}, adapter={"name": "corda", "rank": 2}, steps=1
    )
    assert Denoiser.load(tmp_path / "run").widened == 1


@pytest.mark.parametrize("network", [{"name": "unet", "channels": 8}, {"name": "dit", "width": 16, "depth": 2}])
@pytest.mark.parametrize("data", [{"name": "digits", "conditional": True}, {"name": "tones", "count": 200}])
def test_networks_take_images_and_series(tmp_path: Path, network: dict[str, Any], data: dict[str, Any]) -> None:
    model = {"name": "denoiser", "network": network}
    result = train(tmp_path / "run", model=model, data=data, steps=2, eval_samples=20, distances=["energy", "mmd"])
    assert result["status"] == "finished" and "mmd@5" in result["after"]


def test_a_network_of_diffusers_trains(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    config = {
        "block_out_channels": [8, 8], "down_block_types": ["DownBlock2D", "DownBlock2D"], "norm_num_groups": 4,
        "up_block_types": ["UpBlock2D", "UpBlock2D"], "layers_per_block": 1,
    }  # fmt: skip
    model = {"name": "denoiser", "network": {"name": "diffusers", "config": config}}
    assert train(tmp_path / "run", model=model, data="digits", steps=2, eval_samples=8)["status"] == "finished"
    assert hone("sample", tmp_path / "run", "--samples", "4").status == 0


def test_text_and_arrays_are_not_mixed(tmp_path: Path) -> None:
    for field, value in (("model", "base"), ("data", "chains"), ("eval_data", "chains")):
        with pytest.raises(RecipeError, match=f"{field}: is for text, but the objective learns arrays"):
            train(tmp_path / "run", **{field: value})
    with pytest.raises(RecipeError, match="data: is for arrays"):
        train(tmp_path / "run", model="base", objective="sft")
    for changes in ({"general_data": "pydocs"}, {"model": "base", "objective": "sft", "general_data": "points"}):
        with pytest.raises(RecipeError, match="general_data: is text, whose loss a language model has"):
            train(tmp_path / "run", **changes)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "teacher", model={**SMALL, "sigma_max": 10.0})
    path = str(tmp_path / "teacher")
    student = {"name": "cd", "teacher": path}
    with pytest.raises(HoneError, match=r"noise goes from 0\.002 to 80\.0, but the teacher was trained for"):
        train(tmp_path / "a", objective=student)
    with pytest.raises(HoneError, match="the teacher knows 0 classes, the student 8"):
        train(tmp_path / "b", objective=student, data={"name": "points", "conditional": True},
              model={**SMALL, "sigma_max": 10.0})  # fmt: skip
    with pytest.raises(HoneError, match=r"is for arrays \(2,\), but the data's are \(1, 8, 8\)"):
        train(tmp_path / "c", model={"name": "denoiser", "path": path}, data="digits")
    with pytest.raises(HoneError, match=r"unet takes series \(C, T\) or images"):
        train(tmp_path / "d", model={"name": "denoiser", "network": "unet"})
    with pytest.raises(HoneError, match="nobody knows the true distribution"):
        train(tmp_path / "e", objective={"name": "cd", "teacher": "truth"}, data={"name": "points", "density": "moons"})
    refused = hone("export", tmp_path / "teacher", "--to", "hf")
    assert refused.status != 0 and "holds a denoiser" in refused.err


def images(folder: Path, sizes: list[tuple[int, int]], mode: str = "RGB") -> Path:
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate(sizes):
        place = folder / ("cats" if number % 2 else "dogs")
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(place / f"{number}.png")
    return folder


def test_a_folder_of_images_is_read_with_its_classes(tmp_path: Path) -> None:
    source = Images(path=str(images(tmp_path, [(8, 8)] * 8)), conditional=True)
    assert source.shape == (3, 8, 8) and source.classes == 2
    arrays = source.collection("train").arrays
    assert float(arrays.min()) >= -1 and float(arrays.max()) <= 1
    grey = Images(path=str(tmp_path), grey=True, side=4)
    assert grey.shape == (1, 4, 4)


def test_images_of_mixed_sizes_are_refused_by_name(tmp_path: Path) -> None:
    images(tmp_path, [(8, 8), (8, 8), (6, 8)])
    with pytest.raises(DataError, match=r"2\.png: this image is \(3, 8, 6\).*give side"):
        Images(path=str(tmp_path)).collection("train")
    assert Images(path=str(tmp_path), side=4).shape == (3, 4, 4)
    (tmp_path / "cats" / "9.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"9\.png: this is no image"):
        Images(path=str(tmp_path), side=4).collection("train")


def test_points_are_the_same_each_time_and_the_held_out_ones_clean() -> None:
    one, other = (Points(count=500, holdout=100).collection("train").arrays for _ in range(2))
    assert torch.equal(one, other)
    wild = Points(count=500, holdout=100, outliers=0.2)
    assert float(wild.collection("train").arrays.abs().max()) > 3 > float(wild.collection("eval").arrays.abs().max())
    assert Tones(count=50).classes == 6
