"""Runs of denoisers from a recipe: what they leave, how they go on, what is drawn from them, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from end_to_end.support import back_to, files, hone, repeatable, rows
from hone import Recipe, resume, run
from hone.data.arrays import Images, Points, Tones
from hone.errors import DataError, HoneError, RecipeError

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


def test_an_adapter_is_merged_into_what_is_saved(tmp_path: Path) -> None:
    train(tmp_path / "base")
    start = {"name": "denoiser", "path": str(tmp_path / "base")}
    train(tmp_path / "tuned", model=start, adapter={"name": "lora", "rank": 2}, steps=20)
    before, after = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("base", "tuned"))
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed and all(name.endswith("weight") for name in changed)


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
    for changes, field in (({"model": "base"}, "model"), ({"data": "chains"}, "data")):
        with pytest.raises(RecipeError, match=f"{field}: is for text, but the objective learns arrays"):
            train(tmp_path / "run", **changes)
    with pytest.raises(RecipeError, match="data: is for arrays"):
        train(tmp_path / "run", model="base", objective="sft")


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
