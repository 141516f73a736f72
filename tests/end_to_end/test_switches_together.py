"""Switches that meet each other: callbacks at the end of a run, figures and their direction, overrides of stages."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from end_to_end.support import fields, files, hone, train, write_recipe
from hone import Recipe, options, parts, run
from hone.engine.checkpoint import damage
from hone.engine.devices import mixed_seed, seed_all
from hone.engine.evaluate import Evaluation
from hone.engine.stage import Stage
from hone.errors import HoneError, RecipeError
from hone.figures import is_share, lower_is_better
from hone.optimizers.standard import SGD
from hone.parts import catalogue
from hone.recipe import parse_value

POINTS: dict[str, Any] = {
    "model": {"name": "denoiser", "network": {"name": "mlp", "width": 8, "depth": 1}}, "data": "points",
    "objective": "denoise", "optimizer": {"name": "adamw", "lr": 1e-3}, "steps": 4, "batch_tokens": 32, "eval_every": 2,
    "eval_samples": 16, "solvers": [{"name": "heun", "steps": 2}], "distances": ["energy"],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "lower", "share"),
    [
        ("loss", True, False), ("loss/0", True, False), ("general_loss", True, False), ("energy@7", True, False),
        ("precision@2", False, True), ("accuracy", False, True), ("token_accuracy", False, True),
        ("repetition", True, True), ("average-lagging", True, False), ("accepted-wrong", True, True),
        ("copied", True, True), ("intruders", True, False), ("lines", False, False), ("reward", False, False),
    ],
)  # fmt: skip
def test_the_direction_of_figures_is_known(name: str, lower: bool, share: bool) -> None:
    assert (lower_is_better(name), is_share(name)) == (lower, share)


def test_every_metric_has_been_thought_of() -> None:
    lower = {"repetition", "average-lagging", "accepted-wrong", "copied"}
    higher = {"accuracy", "type-token-ratio", "accepted-right", "lines", "word-accuracy"}
    names = {record.name for record in catalogue() if record.kind == "metric"}
    assert names == lower | higher and {name for name in names if lower_is_better(name)} == lower


def test_a_run_does_not_stop_while_its_distance_falls() -> None:
    stop = options.build_part("callback", {"name": "early_stop", "metric": "energy@3", "patience": 1})
    run: Any = SimpleNamespace(step=1, total=9, stop="", interrupted=False)
    for value in (3.0, 2.0, 1.0):
        stop.on_eval(run, {"energy@3": value})
    assert not run.stop
    stop.on_eval(run, {"energy@3": 1.5})
    assert run.stop.startswith("early stop: energy@3 did not improve on 1 ")


def test_an_evaluation_that_is_no_number_is_never_the_best() -> None:
    assert Evaluation(loss=math.nan).rank() == [math.inf] and Evaluation(loss=1.0).rank() == [1.0]
    assert Evaluation(scores={"accuracy": math.nan}, loss=2.0).rank() == [math.inf, 2.0]


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        (["fpf", "average"], "callbacks.1: 'average' gives the model a mix of its weights and drops what 'fpf' does"),
        (["average", "average"], "callbacks.1: 'average' gives the model"),
        (["average", "posthoc_ema"], "drops what 'average' does: put it first"),
        ([{"name": "intruders", "shrink": 0.5}, "average"], "drops what 'intruders' does"),
        ([{"name": "intruders", "shrink": 0.5}, "fpf"], "'intruders' shrinks the factors that 'fpf' has copies of"),
    ],
)
def test_callbacks_that_undo_each_other_are_refused(callbacks: list[Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said.replace("[", r"\[")):
        Recipe.of(data="chains", steps=3, adapter="lora", callbacks=callbacks)
    Recipe.of(
        data="chains", steps=3, adapter="lora", callbacks=["average", "fpf", {"name": "intruders", "shrink": 0.5}]
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"name": "mix", "sources": "chains"}}, "data.sources: expected a list"),
        ({"callbacks": [{"name": "lcsc", "solver": ["heun", "heun"]}]}, "callbacks.0.solver: expected one solver"),
        ({"metrics": [{"name": "repetition", "n": 1}, {"name": "repetition", "n": 3}]}, "metrics.1: there is a metric"),
        ({"distances": ["mmd", "mmd"]}, "distances.1: there is a distance 'mmd' already"),
        ({"steps": None, "epochs": math.inf}, "epochs: expected a finite number"),
        ({"optimizer": {"name": "adamw", "lr": math.inf}}, "optimizer.lr: expected a finite number"),
    ],
)
def test_what_would_fail_later_or_in_silence_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe.of(**{"data": "chains", "steps": 3, **changes})


def test_the_default_of_an_option_may_be_written() -> None:
    built = options.build_part("callback", {"name": "lcsc", "solver": None})
    assert built.solver is None
    Recipe.of(**{**POINTS, "callbacks": [{"name": "lcsc", "solver": None}]})


def test_a_phase_on_a_buffer_works_on_arrays_and_classes(tmp_path: Path, tiny_model: Path) -> None:
    fpf = {"name": "fpf", "steps": 2, "buffer": 8, "window": 2}
    made = run(Recipe.of(**{**POINTS, "callbacks": [fpf], "out": str(tmp_path / "arrays")}))
    assert made["status"] == "finished" and (tmp_path / "arrays" / "fpf.json").exists()
    file = tmp_path / "classes.jsonl"
    file.write_text("".join(f'{{"text": "a word {i}", "label": "{"ab"[i % 2]}"}}\n' for i in range(40)))
    data = {"name": "files", "path": str(file)}
    recipe = fields(tiny_model, file, tmp_path / "classes", data=data, objective="classify", steps=2, adapter="full",
                    callbacks=[{**fpf, "data": data}])  # fmt: skip
    assert run(Recipe.of(**recipe))["status"] == "finished"


def test_an_evaluation_looks_at_what_is_set_though_the_last_stage_has_its_own(
    tiny_model: Path, qa_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "other.jsonl").write_text('{"question": "What?", "answer": "Quite another thing"}\n' * 3)
    data = {"name": "files", "path": str(qa_file), "holdout": 20}
    out = tmp_path / "run"
    train(tiny_model, qa_file, out, steps=None, stages=[{"steps": 1}, {"steps": 1, "eval_data": data}])
    own, other = (hone("eval", out, "--json", *more) for more in ([], ["--set", f"eval_data={tmp_path}/other.jsonl"]))
    assert own.status == other.status == 0 and own.out != other.out
    wrong = hone("eval", out, "--set", "eval_samples=-1")
    assert wrong.status == 2 and "eval_samples" in wrong.err


def test_the_result_of_stages_matches_its_sums(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    train(tiny_model, qa_file, tmp_path / "run", steps=None, adapter="full", stages=[{"steps": 1}, {"steps": 1}])
    assert damage(tmp_path / "run" / "model") == ""
    assert files(tmp_path / "run" / "model") == files(tmp_path / "run" / "stage-2" / "model")


def test_stages_are_judged_with_what_they_inherit_and_inherit_what_is_set(tmp_path: Path) -> None:
    stages = [{"steps": 2, "eval_every": 1}, {"steps": 2, "eval_every": 1}]
    Recipe.of(data="chains", final="best", callbacks=["early_stop"], stages=stages)
    file = write_recipe(tmp_path / "r.yaml", {"data": "chains", "schedule": "linear", "stages": stages})
    recipe = Recipe.load(file, ["stages.1.schedule.warmup=0.2"])
    assert recipe.stages[1]["schedule"] == {"name": "linear", "warmup": 0.2} and recipe.schedule == "linear"


def test_muon_keeps_the_rate_of_what_is_no_hidden_matrix() -> None:
    pytest.importorskip("pytorch_optimizer")
    named = [
        ("embed_tokens.weight", nn.Parameter(torch.zeros(4, 4))),
        ("layer.weight", nn.Parameter(torch.zeros(4, 4))),
    ]
    spec = {
        "name": "pytorch_optimizer:muon",
        "lr": 0.02,
        "adamw_lr": 3e-4,
        "rates": {"embed_tokens": 0.1, "layer": 0.5},
    }
    made = options.build_part("optimizer", spec).build(named)
    found = {id(p): group["lr"] for group in made.param_groups for p in group["params"]}
    assert [found[id(p)] for _, p in named] == pytest.approx([3e-5, 0.01])


def test_a_second_signal_does_not_cut_off_the_state(
    tiny_model: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, save = Stage._step, Stage._checkpoint

    def stopped(self: Stage) -> None:
        step(self)
        if self.run.step == 3:
            signal.raise_signal(signal.SIGTERM)

    def pestered(self: Stage) -> None:
        if self.run.stop:
            signal.raise_signal(signal.SIGTERM)
        save(self)

    monkeypatch.setattr(Stage, "_step", stopped)
    monkeypatch.setattr(Stage, "_checkpoint", pestered)
    made = train(tiny_model, qa_file, tmp_path / "run")
    assert made["status"] == "interrupted"
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


def test_seeds_may_be_large() -> None:
    assert mixed_seed(3, 5) == 3_000_014 and mixed_seed(10**18, 2**40, 1009, 7) < 2**63
    seed_all(1_700_000_000_000, 3)


@dataclass(kw_only=True)
class Mine(SGD):
    """Plain descent of the user's own.

    Args:
        lr: learning rate.
    """


def test_a_part_of_the_users_own_trains(
    tiny_model: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "_added", {})
    parts.add("optimizer", "mine", Mine)
    made = train(tiny_model, qa_file, tmp_path / "run", optimizer={"name": "mine", "lr": 0.1}, steps=1)
    assert made["status"] == "finished"


def test_what_stands_in_the_way_is_not_a_full_disk(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HoneError) as caught:
        train(tiny_model, qa_file, tmp_path / "file" / "run")
    assert "Free some space" not in str(caught.value) and "could not be written" in str(caught.value)


def test_a_run_that_only_gets_worse_says_so(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    recipe = fields(
        tiny_model, qa_file, tmp_path / "run", adapter="full", steps=4, eval_every=2, eval_samples=0, final="best",
        clip=None, optimizer={"name": "sgd", "lr": 5.0},
    )  # fmt: skip
    said = hone("run", write_recipe(tmp_path / "r.yaml", recipe))
    assert "no evaluation was better than the one before the first step" in said.out + said.err


@pytest.mark.parametrize(
    ("text", "value"),
    [("010", 10), ("08", 8), ("0x1f", 31), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("=", "="), ("-5", -5)],
)
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    assert parse_value(text) == value
