"""Recipes: every mistake is found at once, before any model is loaded, with its line and the nearest right name."""

from __future__ import annotations

from pathlib import Path

import pytest

from hone.errors import RecipeError
from hone.parts import catalogue
from hone.recipe import Recipe, dump, shipped

GOOD = """\
model: base
data: chains
adapter: {name: lora, rank: 4}
optimizer:
  name: adamw
  lr: 1e-4
steps: 10
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def problems(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        Recipe.load(write(folder, text), overrides)
    root = f"{folder / 'mine.yaml'}:"
    return [str(problem).removeprefix(root) for problem in caught.value.problems]


def test_a_good_recipe_loads_and_survives_a_round_trip(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, GOOD))
    assert recipe.name == "mine" and recipe.steps == 10
    assert recipe.build("optimizer").lr == 1e-4 and recipe.build("adapter").rank == 4
    assert Recipe.load(write(tmp_path, dump(recipe))) == recipe


def test_what_was_switched_off_and_odd_names_survive_a_round_trip(tmp_path: Path) -> None:
    recipe = Recipe.of(data="chains", steps=1, clip=None, metrics=[], name="1e-4")
    assert Recipe.load(write(tmp_path, dump(recipe))) == recipe


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("steps: 10", "stpes: 10"), "7: stpes: unknown option (did you mean 'steps'?)"),
        (("lora, rank: 4", "lora, rnak: 4"), "3: adapter.rnak: unknown option (did you mean 'rank'?)"),
        (("rank: 4", "rank: four"), "3: adapter.rank: expected an integer, got 'four'"),
        (("rank: 4", "rank: true"), "3: adapter.rank: expected an integer, got True"),
        (("lr: 1e-4", "lr: -1e-4"), "6: optimizer.lr: expected greater than 0, got -0.0001"),
        (("name: adamw", "name: adamv"), "4: optimizer: there is no optimizer called 'adamv' (did you mean 'adamw'?)"),
        (("data: chains", "data: chain"), "2: data: there is no data called 'chain' (did you mean 'chains'?)"),
        (("steps: 10", "steps: 10\nepochs: 2"), "8: epochs: is given together with 'steps'; give one of them"),
        (("steps: 10", "steps: 10\nmicro_tokens: 9999"),
         "8: micro_tokens: expected at most batch_tokens (4096), got 9999"),
        (("steps: 10", "steps: 10\nsteps: 11"), "8: steps: is given twice"),
        (("steps: 10", "steps: 10\nfinal: best"), "8: final: 'best' needs evaluations during the run (set eval_every)"),
        (("steps: 10", "steps: 10\nprecision: fp32"),
         "8: precision: expected 'auto', 'float32', 'bf16' or 'float64', got 'fp32'"),
    ],
)  # fmt: skip
def test_one_mistake_one_message(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    found = problems(tmp_path, GOOD.replace(*change))
    assert expected in [line.replace(" (did you mean 'float32'?)", "") for line in found]


def test_all_mistakes_are_listed_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("rank: 4", "rank: 0").replace("adamw", "adamx").replace("steps: 10", "step: 10")
    found = problems(tmp_path, text, "schedule.warmup=-1")
    assert len(found) == 5
    assert any(line.startswith("--set: schedule.warmup: ") for line in found)
    assert any("steps: is required and was not given (or give 'epochs')" in line for line in found)


def test_a_missing_model_folder_and_data_file_are_found_before_loading(tmp_path: Path) -> None:
    (tmp_path / "llama-small").mkdir()
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n')
    text = GOOD.replace("model: base", f"model: {tmp_path}/llama-smal")
    text = text.replace("data: chains", f"data: {tmp_path}/trian.jsonl")
    found = problems(tmp_path, text)
    assert any("there is no model folder" in line and "did you mean 'llama-small'?" in line for line in found)
    assert any("trian.jsonl" in line and "train.jsonl" in line for line in found)


def test_broken_yaml_names_its_line(tmp_path: Path) -> None:
    assert problems(tmp_path, "model: base\ndata: [chains\nsteps: 3\n")[0].startswith("3: not valid YAML")
    assert problems(tmp_path, "- model\n")[0].startswith("1: expected a mapping of fields")


def test_missing_recipe_files_and_names() -> None:
    with pytest.raises(RecipeError, match=r"there is no recipe called 'quickstat' \(did you mean 'quickstart'\?\)"):
        Recipe.load("quickstat")
    with pytest.raises(RecipeError, match=r"there is no recipe file 'nothing\.yaml'"):
        Recipe.load("nothing.yaml")


def test_overrides_reach_into_parts(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD)
    settings = ["adapter.rank=8", "optimizer.lr=2e-3", "schedule.warmup=0.1", "objective.label_smoothing=0.1"]
    recipe = Recipe.load(path, settings)
    assert recipe.build("adapter").rank == 8 and recipe.build("optimizer").lr == 2e-3
    assert recipe.build("schedule").warmup == 0.1 and recipe.build("objective").label_smoothing == 0.1
    assert Recipe.load(path, ["adapter=full"]).adapter == "full"


@pytest.mark.parametrize("place", ["callbacks.1", "callbacks.first", "callbacks.1.decay"])
def test_an_override_of_a_list_item_that_is_not_there(tmp_path: Path, place: str) -> None:
    assert problems(tmp_path, GOOD + "callbacks: [average]\n", f"{place}=0.5")[0].startswith(f"--set: {place}: ")
    recipe = Recipe.load(write(tmp_path, GOOD + "callbacks: [{name: average}]\n"), ["callbacks.0.decay=0.5"])
    assert recipe.callbacks == [{"name": "average", "decay": 0.5}]


def test_yaml_1_2_scalars(tmp_path: Path) -> None:
    recipe = Recipe.load(write(tmp_path, GOOD + "name: on\n"), ["optimizer.lr=1e-3"])
    assert recipe.name == "on" and recipe.build("optimizer").lr == 0.001


def test_stages_override_the_top_level(tmp_path: Path) -> None:
    text = GOOD.replace("steps: 10\n", "stages:\n  - {name: first, steps: 5}\n  - {epochs: 1, adapter: full}\n")
    first, second = Recipe.load(write(tmp_path, text)).staged()
    assert (first.name, first.steps, first.epochs) == ("first", 5, None)
    assert (second.name, second.steps, second.epochs, second.adapter) == ("stage-2", None, 1, "full")
    wrong = problems(tmp_path, text.replace("adapter: full", "adapter: ful"))
    assert wrong == ["9: stages.1.adapter: there is no adapter called 'ful' (did you mean 'full'?)"]
    endless = problems(tmp_path, text.replace("steps: 5", "clip: 1.0"))
    assert any("stages.0" in line and "steps" in line for line in endless)


DRAWN = [record.name for record in catalogue() if record.draws]


@pytest.mark.parametrize("name", DRAWN)
def test_what_an_objective_is_drawn_with_can_be_built(name: str) -> None:
    recipe = Recipe(objective=name)
    assert recipe.solvers is None and recipe.staged()[0].solvers
    assert all(solver.steps >= 1 for solver in recipe.build("solvers"))


def test_solvers_follow_the_options_of_the_objective() -> None:
    assert Recipe(objective={"name": "progressive", "plan": [8, 4]}).build("solvers")[0].steps == 4
    twice = Recipe(objective={"name": "sfd-v", "steps": 4, "most": 4, "lowest": 0.01}).build("solvers")
    assert [(one.steps, one.lowest) for one in twice] == [(4, 0.01)]
    assert (
        Recipe(objective="denoise").staged()[0].solvers == ["heun"] and Recipe(objective="sft").build("solvers") == []
    )
    assert Recipe(objective="ict", solvers=[]).staged()[0].solvers == []


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_right(name: str) -> None:
    recipe = Recipe.load(name)
    assert recipe.about["text"] and recipe.name == name


def test_an_adapter_needs_a_base(tmp_path: Path) -> None:
    fresh = GOOD.replace("model: base", "model: {name: fresh, config: {model_type: llama}}")
    assert problems(tmp_path, fresh) == [
        "3: adapter: is saved beside its base, and a fresh model has none (use adapter: full, or a pretrained model)"
    ]
    assert Recipe.load(write(tmp_path, fresh), ["adapter=full"]).adapter == "full"


def test_callbacks_and_trackers_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    found = problems(tmp_path, GOOD + "callbacks: [early_stop, average]\nfinal: best\ntrackers: [tensorbord]\n")
    assert (
        "8: callbacks.0: 'early_stop' watches evaluations, and the recipe makes none on its way: set eval_every"
        in found
    )
    assert "8: callbacks.1: 'average' and 'final: best' both replace the final weights: set final: last" in found
    assert "10: trackers: there is no tracker called 'tensorbord' (did you mean 'tensorboard'?)" in found
