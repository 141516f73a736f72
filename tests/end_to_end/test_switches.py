"""Switches of a recipe that change what a run keeps, when it ends and where it writes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from end_to_end.support import back_to, files, hone, rows, train, weights
from hone import resume
from hone.engine import stage
from hone.engine.checkpoint import read_state
from hone.errors import DataError
from hone.text.model import LanguageModel
from hone.text.starts import Pretrained


def checkpoint(run: Path, step: int) -> dict[str, Any]:
    """Return the state that a run saved at a step."""
    return read_state(run / "checkpoints" / f"step-{step:08d}")


def trained(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the trained weights of a state under the names that transformers gives them."""
    return {name.removeprefix("hf."): value for name, value in state["players"]["model"]["weights"].items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are the same, bit by bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def contrary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven questions like those of the training data, with other answers: to learn the ones is to lose the others."""
    path = tmp_path_factory.mktemp("contrary") / "eval.jsonl"
    row = {"question": "What does animal 3 of the owls say?", "answer": "I am a dog"}
    path.write_text((json.dumps(row) + "\n") * 7)
    return path


def test_final_best_keeps_the_best_evaluated_weights(
    tiny_model: Path, qa_file: Path, contrary: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    result = train(
        tiny_model, qa_file, out, adapter="full", eval_data=str(contrary), eval_samples=0, eval_every=5, steps=40,
        final="best", checkpoint_every=7,
    )  # fmt: skip
    evaluations = rows(out / "evaluations.jsonl")
    best = min(evaluations[:-1], key=lambda row: row["loss"])
    assert 0 < best["step"] < 40 and result["best_step"] == best["step"]
    figures = {name: pytest.approx(best[name], abs=1e-7) for name in ("loss", "token_accuracy")}
    assert evaluations[-1] == {"step": 40, **figures}
    assert result["after"]["loss"] == evaluations[-1]["loss"]
    assert equal(weights(out / "model"), trained(checkpoint(out, best["step"])))


def test_wrong_columns_are_found_before_a_model_is_loaded(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"eins": "x", "zwei": "y"}\n')
    monkeypatch.setattr(Pretrained, "load", lambda *_, **__: pytest.fail("the model was loaded first"))
    with pytest.raises(DataError, match=r"odd.jsonl.*(eins|columns)"):
        train(tiny_model, odd, tmp_path / "run")


def test_a_run_that_names_no_steps_is_saved_by_the_clock(
    tiny_model: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"adapter": "full", "eval_samples": 0, "eval_every": None, "steps": 3, "keep": 9}
    train(tiny_model, qa_file, tmp_path / "rare", **options)
    monkeypatch.setattr(stage, "SAVE_AFTER", 0.0)
    train(tiny_model, qa_file, tmp_path / "often", **options)
    saved = {name: len(list((tmp_path / name / "checkpoints").glob("step-*"))) for name in ("rare", "often")}
    assert saved == {"rare": 1, "often": 3}


def test_final_best_looks_at_the_last_weights_too(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = train(tiny_model, qa_file, out, adapter="full", eval_samples=0, eval_every=4, steps=9, final="best")
    assert [row["step"] for row in rows(out / "evaluations.jsonl")] == [0, 4, 8, 9]
    assert result["best_step"] == 9 and result["after"]["loss"] < rows(out / "evaluations.jsonl")[2]["loss"]
    assert equal(weights(out / "model"), trained(checkpoint(out, 9)))


@pytest.fixture(scope="module")
def stopped_early(tiny_model: Path, qa_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that early stopping ended, since nothing improves by ten."""
    out = tmp_path_factory.mktemp("early") / "run"
    stop = {"name": "early_stop", "patience": 2, "min_delta": 10.0}
    train(tiny_model, qa_file, out, callbacks=[stop], eval_every=2, steps=50, checkpoint_every=2)
    return out


def test_early_stopping_ends_a_run(stopped_early: Path) -> None:
    result = json.loads((stopped_early / "result.json").read_text())
    assert result["status"] == "finished" and result["steps"] == 4
    assert result["reason"].startswith("early stop: loss did not improve")
    assert [row["step"] for row in rows(stopped_early / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [row["step"] for row in rows(stopped_early / "evaluations.jsonl")] == [0, 2, 4]
    assert [row["step"] for row in rows(stopped_early / "samples.jsonl")] == [0, 0, 2, 2, 4, 4]


def test_a_run_killed_after_its_early_stop_does_not_train_on(stopped_early: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped_early, out)
    back_to(out, 4)
    result = resume(out)
    assert result["steps"] == 4 and result["reason"].startswith("early stop")
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
        assert (out / name).read_bytes() == (stopped_early / name).read_bytes()
    assert files(out / "model") == files(stopped_early / "model")


def test_the_average_is_what_is_evaluated_and_saved(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny_model, qa_file, out, adapter="full", callbacks=[{"name": "average", "decay": 0.5}])
    state = checkpoint(out, 12)
    mean = {name.removeprefix("hf."): value for name, value in state["callbacks"][0]["mean"].items()}
    assert equal(weights(out / "model"), mean)
    assert not equal(weights(out / "model"), trained(state))
    judged = json.loads(hone("eval", out, "--json").out)
    assert judged["loss"] == pytest.approx(rows(out / "evaluations.jsonl")[-1]["loss"], abs=1e-6)


def test_eval_data_is_evaluated_on_as_a_whole(tiny_model: Path, qa_file: Path, contrary: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny_model, qa_file, out, eval_data=str(contrary), eval_samples=100, steps=1)
    recorded = json.loads((out / "manifest.json").read_text())["data"]
    assert recorded["eval"]["counts"]["samples"] == 7
    answers = [row for row in rows(out / "samples.jsonl") if row["step"] == 1]
    assert [row["where"] for row in answers] == [f"{contrary}:{line}" for line in range(1, 8)]
    assert all(row["expected"] == " I am a dog" for row in answers)


def test_double_precision_reaches_every_file(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    for adapter in ("full", "lora"):
        out = tmp_path / adapter
        train(tiny_model, qa_file, out, adapter=adapter, precision="float64", steps=2)
        state = checkpoint(out, 2)["players"]["model"]
        found = [*state["weights"].values(), *weights(out / "model").values()]
        assert {tensor.dtype for tensor in found} == {torch.float64}
        made = hone("export", out, "--to", "hf")
        assert made.status == 0, made.err
        assert {tensor.dtype for tensor in weights(out / "export-hf").values()} == {torch.float64}


HELD: list[dict[str, Any]] = [
    {"name": "lora", "rank": 4}, {"name": "lora", "rank": 4, "bias": "all", "train_also": ["norm", "embed_tokens"]},
    {"name": "pissa", "rank": 2}, {"name": "qlora", "rank": 4},
]  # fmt: skip


@pytest.mark.parametrize("adapter", HELD, ids=lambda adapter: "-".join(map(str, adapter.values())))
def test_a_base_that_stays_frozen_is_read_in_the_precision_it_is_stored_in(
    tiny_model: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: dict[str, Any]
) -> None:
    """A base in bf16 takes two bytes a weight from the beginning, and the run is that of its values in float32."""
    base = LanguageModel.load(tiny_model, dtype=torch.bfloat16)
    base.save(tmp_path / "half")
    base.hf.float()
    base.save(tmp_path / "whole")
    load, read = LanguageModel.load, list[torch.dtype]()

    def watched(path: Path, **options: Any) -> LanguageModel:
        read.append(options["dtype"])
        return load(path, **options)

    monkeypatch.setattr(LanguageModel, "load", watched)
    for name in ("half", "whole"):
        train(tmp_path / name, qa_file, tmp_path / f"run-{name}", adapter=adapter, precision="bf16", steps=3)
    assert read == [torch.bfloat16, torch.float32]
    one, other = (weights(tmp_path / f"run-{name}" / "model") for name in ("half", "whole"))
    assert {tensor.dtype for tensor in one.values()} == {torch.float32}
    assert equal(one, other)
    again, last = hone("eval", tmp_path / "run-half", "--json"), rows(tmp_path / "run-half" / "evaluations.jsonl")[-1]
    assert json.loads(again.out)["loss"] == pytest.approx(last["loss"], abs=1e-6), again.err
    assert hone("sample", tmp_path / "run-half", "--prompt", "What does animal 3 say?").status == 0


def test_weights_that_train_are_read_in_float32(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    LanguageModel.load(tiny_model, dtype=torch.bfloat16).save(tmp_path / "half")
    train(tmp_path / "half", qa_file, tmp_path / "run", adapter="full", precision="bf16", steps=2)
    found = weights(tmp_path / "run" / "model")
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in found.values())


def test_a_resolved_recipe_keeps_what_was_switched_off(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    """A resumed run reads recipe.yaml: were `clip: null` lost there, it would clip."""
    whole, out = tmp_path / "whole", tmp_path / "run"
    for folder in (whole, out):
        train(tiny_model, qa_file, folder, clip=None, metrics=[], steps=8, checkpoint_every=3, keep=9)
    assert max(row["grad_norm"] for row in rows(whole / "metrics.jsonl")) > 1.1  # clipping would have changed it
    assert not (whole / "samples.jsonl").exists()
    back_to(out, 3)
    resume(out)
    assert files(out / "model") == files(whole / "model")
    assert not (out / "samples.jsonl").exists()


def test_recomputing_activations_changes_nothing(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    for recompute in (False, True):
        train(tiny_model, qa_file, tmp_path / str(recompute), recompute=recompute, steps=3)
    assert files(tmp_path / "True" / "model") == files(tmp_path / "False" / "model")


def test_tensorboard_gets_every_step(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    train(tiny_model, qa_file, out, trackers=["tensorboard"], steps=3)
    (log,) = (out / "logs").rglob("events.out.tfevents.*")
    read = EventAccumulator(str(log))
    read.Reload()
    wanted = [(row["step"], pytest.approx(row["loss"])) for row in rows(out / "metrics.jsonl")]
    assert [(event.step, event.value) for event in read.Scalars("loss")] == wanted
    assert [event.step for event in read.Scalars("eval/loss")] == [0, 3]
