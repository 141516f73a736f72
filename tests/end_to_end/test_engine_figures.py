"""What the engine measures for comparisons: operations, set-up time, forgetting; padding that changes no gradient."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from end_to_end.comparisons import small
from end_to_end.support import fields, rows, train, weights
from hone.adapters.lora import LoRA
from hone.engine.assemble import Bench, assemble
from hone.engine.devices import Cluster
from hone.engine.flops import SHORT, count_flops
from hone.engine.loop import Trainer
from hone.engine.preflight import measure
from hone.engine.progress import Display
from hone.recipe import Recipe

SAME = 1e-12  # largest difference of a loss, a gradient norm or a weight in float64


def bench(model: Path, data: Path, **changes: Any) -> Bench:
    """Return the assembled parts of a small run."""
    recipe = Recipe.of(**small(model, data, general_data=None, device="cpu", **changes))
    return assemble(recipe, Cluster(recipe.device, recipe.precision, recipe.sharding), Display(False))


def counted(parts: Bench) -> tuple[int, list[Any]]:
    """Return the operations of a step, and the trees that it trained on."""
    trees = next(parts.run.loader)
    return count_flops(Trainer(parts.run), trees), trees


def products(parts: Bench) -> tuple[int, int]:
    """Return the weights that every token is multiplied with, and those of the head."""
    layers = [m for m in parts.run.model.hf.get_decoder().modules() if isinstance(m, nn.Linear)]
    return sum(layer.weight.numel() for layer in layers), parts.run.model.hf.lm_head.weight.numel()


def attention(parts: Bench, trees: list[Any], passes: int) -> int:
    """Return the operations of so many products of all queries with all keys of their own sample."""
    config = parts.run.model.hf.config
    squares = sum(len(tree) ** 2 for tree in trees)
    return passes * 2 * config.num_hidden_layers * config.hidden_size * squares


def test_operations_are_those_of_the_products_counted_by_hand(tiny_model: Path, qa_file: Path) -> None:
    parts = bench(tiny_model, qa_file, adapter="full", objective="pretrain")
    found, trees = counted(parts)
    tokens = sum(len(tree) for tree in trees)
    body, head = products(parts)
    predicted = tokens - len(trees)  # the first token of a sample is predicted from nothing
    # Forward, gradient of the inputs, gradient of the weights: 2 operations each, and 2 + 5 products in attention.
    assert found == 6 * body * tokens + 6 * head * predicted + attention(parts, trees, 7)
    assert found == pytest.approx(6 * (body + head) * tokens, rel=0.15)  # the usual estimate


def test_frozen_weights_cost_a_third_less(tiny_model: Path, qa_file: Path) -> None:
    parts = bench(tiny_model, qa_file, adapter={"name": "lora", "rank": 1}, objective="pretrain")
    body, head = products(bench(tiny_model, qa_file, adapter="full"))
    found, trees = counted(parts)
    tokens, predicted = sum(len(tree) for tree in trees), sum(len(tree) - 1 for tree in trees)
    least = 4 * body * tokens + 4 * head * predicted + attention(parts, trees, 7)
    rank = sum(p.numel() for _, p in parts.run.trainable)
    first = 0.05 * least  # no gradient is asked of the first layer's inputs
    assert least - first < found < least + 6 * rank * tokens


def test_counting_holds_for_long_steps_and_leaves_the_trainer_as_it_was(tiny_model: Path, qa_file: Path) -> None:
    parts = bench(tiny_model, qa_file, adapter="full", batch_tokens=3 * SHORT, objective="pretrain")
    trainer, trees = Trainer(parts.run), next(parts.run.loader)
    assert sum(len(tree) for tree in trees) > 2 * SHORT
    found = count_flops(trainer, trees)
    body, head = products(parts)
    tokens, predicted = sum(len(tree) for tree in trees), sum(len(tree) - 1 for tree in trees)
    assert found == 6 * body * tokens + 6 * head * predicted + attention(parts, trees, 7)
    assert trainer.limit == 3 * SHORT


def test_a_rehearsal_measures_a_typical_step(tiny_model: Path, qa_file: Path) -> None:
    changes: dict[str, Any] = {"adapter": "full", "objective": "pretrain"}
    recipe = Recipe.of(**small(tiny_model, qa_file, general_data=None, device="cpu", **changes))
    record = measure(recipe, Display(False)).record()
    parts = bench(tiny_model, qa_file, **changes)
    per_step = float(np.sum(parts.data.trees.lengths)) / parts.run.loader.steps_per_epoch
    assert record["step_tokens"] == pytest.approx(per_step) and record["steps"] == 3
    found, trees = counted(parts)
    per_token = found / sum(len(tree) for tree in trees)
    assert record["step_flops"] == pytest.approx(per_step * per_token, rel=0.02)
    assert record["step_seconds"] > 0 and record["evaluation_seconds"] == record["checkpoint_seconds"] == 0


def test_padding_instead_of_packing_changes_no_loss_and_no_gradient(
    tiny_model: Path, qa_file: Path, tmp_path: Path
) -> None:
    same: dict[str, Any] = {"adapter": "full", "precision": "float64", "device": "cpu", "steps": 3, "eval_samples": 0}
    packed = train(tiny_model, qa_file, tmp_path / "packed", **same, general_data=str(qa_file))
    padded = train(tiny_model, qa_file, tmp_path / "padded", **same, general_data=str(qa_file), packing=False)
    told = [json.loads((tmp_path / name / "manifest.json").read_text())["model"] for name in ("packed", "padded")]
    assert [model["packed"] for model in told] == [True, False]
    steps = [rows(tmp_path / name / "metrics.jsonl") for name in ("packed", "padded")]
    for one, other in zip(*steps, strict=True):
        assert [one[name] for name in ("loss", "grad_norm")] == pytest.approx(
            [other[name] for name in ("loss", "grad_norm")], rel=SAME
        )
    trained = [weights(tmp_path / name / "model") for name in ("packed", "padded")]
    for name, tensor in trained[0].items():
        assert (tensor - trained[1][name]).abs().max() <= 1e-9, name  # Adam divides by the root of small squares
    assert packed["after"] == pytest.approx(padded["after"], rel=1e-9)


def test_a_model_whose_recipe_does_not_pack_pads(tiny_model: Path, qa_file: Path) -> None:
    assert not bench(tiny_model, qa_file, packing=False).run.model.packs
    assert bench(tiny_model, qa_file).run.model.packs


def test_general_data_is_measured_before_and_after(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("The whale is in the sea.\n" * 5)
    result = train(tiny_model, qa_file, tmp_path / "run", steps=2, general_data=str(other))
    evaluations = rows(tmp_path / "run" / "evaluations.jsonl")
    assert [row["general_loss"] for row in evaluations] == [
        result[when]["general_loss"] for when in ("before", "after")
    ]
    assert result["before"]["general_loss"] != result["after"]["general_loss"]
    record = json.loads((tmp_path / "run" / "manifest.json").read_text())["data"]["general"]
    assert "other.txt" in record["text"] and record["fingerprint"]
    # By hand: the mean over the tokens that are predicted of a model that is as it was.
    parts = assemble(
        Recipe.of(**fields(tiny_model, qa_file, tmp_path / "x", general_data=str(other), device="cpu")),
        Cluster("cpu", "float32", "none"), Display(False),
    )  # fmt: skip
    assert parts.general_data is not None and parts.general_data.trees is not None
    total = count = 0.0
    for index in range(len(parts.general_data.trees)):
        ids = torch.from_numpy(np.concatenate(parts.general_data.trees[index].tokens)).long()
        with torch.no_grad():
            logits = parts.run.model.hf(input_ids=ids[None]).logits[0, :-1]
        total += float(nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
    assert result["before"]["general_loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_time_that_an_adapter_takes_to_attach_is_told_apart(
    tiny_model: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = LoRA.attach

    def slow(self: LoRA, *given: Any) -> None:
        time.sleep(0.5)
        real(self, *given)

    monkeypatch.setattr(LoRA, "attach", slow)
    result = train(tiny_model, qa_file, tmp_path / "run", steps=1, eval_samples=0)
    assert result["setup_seconds"] >= 0.5
    assert json.loads((tmp_path / "run" / "result.json").read_text())["setup_seconds"] == result["setup_seconds"]
    taken = sum(row["seconds"] for row in rows(tmp_path / "run" / "metrics.jsonl"))
    assert result["training_seconds"] == pytest.approx(taken, abs=0.01)
