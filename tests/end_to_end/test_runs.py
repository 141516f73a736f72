"""Whole runs: the loss falls, the run folder is complete, and other libraries load the model and agree with hone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from end_to_end.support import back_to, files, hone, logits, rows, train, weights
from hone import Recipe, resume
from hone.engine.checkpoint import read_state
from hone.text.model import LanguageModel
from hone.text.pack import pack

# PEFT 0.21 on transformers 5.23
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
STEPS = 30
EVERY_ROW = {"step", "loss", "tokens", "seconds", "lr", "grad_norm", "memory"}
LEFT = {
    "recipe.yaml", "manifest.json", "metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "model", "checkpoints",
    "report.html", "result.json", "lock",
}  # fmt: skip
ADAPTERS = ["full", "lora"]


@pytest.fixture(params=ADAPTERS)
def finished(request: pytest.FixtureRequest) -> Path:
    """A run with each adapter."""
    return request.getfixturevalue(f"{request.param}_run")


def load(folder: Path) -> Any:
    """Return a model folder as transformers, or PEFT where it holds an adapter, loads it."""
    adapted = (folder / "adapter_config.json").is_file()
    return (peft.AutoPeftModelForCausalLM if adapted else AutoModelForCausalLM).from_pretrained(folder)


def held_out(run: Path) -> list[tuple[list[int], list[int]]]:
    """Return the ids of the held-out prompts and answers, rendered by hand."""
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    pairs = []
    for sample in Recipe.load(run / "recipe.yaml").build("data").samples("eval"):
        prompt = tokenizer(sample.prompt, add_special_tokens=False).input_ids
        answer = tokenizer(sample.answers[0], add_special_tokens=False).input_ids
        pairs.append(([tokenizer.bos_token_id, *prompt], [*answer, tokenizer.eos_token_id]))
    return pairs


def test_the_loss_falls_and_every_step_has_its_row(finished: Path) -> None:
    found = rows(finished / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert all(row.keys() >= EVERY_ROW for row in found)
    assert all(row["tokens"] <= 256 and row["seconds"] > 0 and row["memory"] > 0 for row in found)
    assert sum(row["loss"] for row in found[-5:]) < 0.7 * sum(row["loss"] for row in found[:5])
    result = json.loads((finished / "result.json").read_text())
    assert result["status"] == "finished" and result["steps"] == STEPS
    assert result["tokens"] == sum(row["tokens"] for row in found)
    assert result["after"]["loss"] < 0.8 * result["before"]["loss"]


def test_the_run_folder_is_complete(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == LEFT
    evaluations = rows(finished / "evaluations.jsonl")
    wanted = [0, 15, STEPS] if finished.name == "full" else [0, STEPS]
    assert [row["step"] for row in evaluations] == wanted
    answers = rows(finished / "samples.jsonl")
    assert [row["step"] for row in answers] == [step for step in wanted for _ in range(2)]
    assert all(row["prompt"].startswith("Question: ") and isinstance(row["answer"], str) for row in answers)
    recorded = json.loads((finished / "manifest.json").read_text())
    assert {"torch", "transformers", "hone", "python"} <= recorded["versions"].keys()
    assert recorded["data"]["train"]["fingerprint"] and recorded["model"]["sha256"] and recorded["seed"] == 0
    assert {"objective:sft", "optimizer:adamw"} <= recorded["sources"].keys()
    steps = [path.name for path in sorted((finished / "checkpoints").iterdir())]
    assert steps == [f"step-000000{20 if finished.name == 'full' else 15}", "step-00000030"]


def test_the_saved_model_is_the_trained_one(finished: Path) -> None:
    state = read_state(finished / "checkpoints" / "step-00000030")
    trained = {name.removeprefix("hf."): tensor for name, tensor in state["players"]["model"]["weights"].items()}
    saved = weights(finished / "model")
    if finished.name == "lora":
        saved = {key.removeprefix("base_model.model.").removesuffix(".weight"): value for key, value in saved.items()}
        trained = {name.replace(".original", ""): value for name, value in trained.items()}
    assert saved.keys() == trained.keys()
    assert all(torch.equal(saved[name], trained[name]) for name in saved)


def test_other_libraries_load_the_model_and_agree(finished: Path) -> None:
    theirs, ours = load(finished / "model"), LanguageModel.load(finished / "model")
    for sample in list(Recipe.load(finished / "recipe.yaml").build("data").samples("eval"))[:4]:
        (tree,) = ours.renderer.render(sample)
        batch = pack([tree])
        with torch.no_grad():
            own = ours.head(ours.hidden(batch))
        assert float((own - logits(theirs, batch.tokens.tolist())).abs().max()) < 1e-5


def test_the_reported_loss_is_what_other_libraries_compute(finished: Path) -> None:
    model = load(finished / "model")
    total, count = 0.0, 0
    for prompt, answer in held_out(finished):
        scores = logits(model, prompt + answer).double().log_softmax(-1)[len(prompt) - 1 : -1]
        total -= float(scores[range(len(answer)), answer].sum())
        count += len(answer)
    result = json.loads((finished / "result.json").read_text())
    assert result["after"]["loss"] == pytest.approx(total / count, abs=1e-5)


def test_exports_load_elsewhere_and_agree(finished: Path, tmp_path: Path) -> None:
    ids, trained = held_out(finished)[0][0], load(finished / "model")
    formats = {"full": ["hf"], "lora": ["hf", "peft"]}[finished.name]
    for to in formats:
        made = hone("export", finished, "--to", to, "--out", tmp_path / to, "--json")
        assert made.status == 0 and json.loads(made.out)["path"] == str(tmp_path / to), made.err
        assert float((logits(load(tmp_path / to), ids) - logits(trained, ids)).abs().max()) < 1e-5
        assert (tmp_path / to / "adapter_config.json").is_file() == (to == "peft")
    again = hone("export", finished, "--to", "hf", "--out", tmp_path / "hf")
    assert again.status == 2 and "exists already" in again.err


def test_an_export_in_half_precision_loads_in_that_precision(lora_run: Path, tmp_path: Path) -> None:
    made = hone("export", lora_run, "--to", "hf", "--dtype", "bfloat16", "--out", tmp_path / "half", "--json")
    assert made.status == 0, made.err
    assert {tensor.dtype for tensor in weights(tmp_path / "half").values()} == {torch.bfloat16}


def test_whole_weights_have_no_adapter_to_export(full_run: Path) -> None:
    made = hone("export", full_run, "--to", "peft")
    assert made.status == 2 and "there is no adapter to export; use --to hf" in made.err


@pytest.mark.parametrize("method", ["ia3", "vera"])
def test_a_method_of_peft_trains_and_loads(tiny_model: Path, qa_file: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "run"
    adapter = {"name": f"peft:{method}", **({"target_modules": ["q_proj", "o_proj"]} if method == "vera" else {})}
    train(tiny_model, qa_file, out, adapter=adapter, optimizer={"name": "adamw", "lr": 0.1})
    found = rows(out / "metrics.jsonl")
    assert found[-1]["loss"] < 0.95 * found[0]["loss"]
    prompt, _ = held_out(out)[0]
    own = logits(LanguageModel.load(out / "model").hf, prompt)
    assert float((own - logits(load(out / "model"), prompt)).abs().max()) < 1e-5
    untouched = logits(AutoModelForCausalLM.from_pretrained(tiny_model), prompt)
    assert float((own - untouched).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["torch:rmsprop", "pytorch_optimizer:lion"])
def test_optimizers_of_other_libraries_train_and_resume(
    tiny_model: Path, qa_file: Path, tmp_path: Path, name: str
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    for folder in (whole, out):
        train(tiny_model, qa_file, folder, optimizer={"name": name, "lr": 5e-3}, checkpoint_every=5, keep=9)
    found = rows(whole / "metrics.jsonl")
    assert found[-1]["loss"] < 0.95 * found[0]["loss"]
    back_to(out, 5)
    resume(out)
    assert files(out / "model") == files(whole / "model")


def test_a_recipe_runs_twice_to_the_same_bytes(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        train(tiny_model, qa_file, tmp_path / name, steps=4)
    assert files(tmp_path / "first" / "model") == files(tmp_path / "second" / "model")
