"""Classifiers, taggers and reward models from a recipe to transformers: trained, evaluated, asked, exported, loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from conftest import ANIMALS, questions
from end_to_end.support import hone, rows, train
from hone.data.chains import Chains
from hone.data.sample import Sample
from hone.errors import DataError, ModelError
from hone.rewards.base import Attempt
from hone.rewards.models import ModelReward

HEAD: dict[str, Any] = {"steps": 30, "batch_tokens": 384, "eval_samples": 2, "adapter": {"name": "lora", "rank": 4}}


def write(path: Path, content: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def animal(text: str) -> str:
    return next(name for name in ANIMALS if f"{name}s" in text)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 questions, each with the animal that it is about as its class."""
    content = [{"text": row["question"], "label": animal(row["question"])} for row in questions(200)]
    return write(tmp_path_factory.mktemp("texts") / "labels.jsonl", content)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 questions as words, of which the animal is tagged."""
    content = []
    for row in questions(200):
        split = row["question"].split()
        content.append({"words": split, "tags": ["B" if w.rstrip("s") in ANIMALS else "O" for w in split]})
    return write(tmp_path_factory.mktemp("words") / "tags.jsonl", content)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 questions with their answer and one that is none of an animal."""
    content = []
    for row in questions(200):
        content.append({"prompt": f"{row['question']} ", "chosen": row["answer"], "rejected": "I am an answer"})
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", content)


@pytest.fixture(scope="module")
def classifier(tiny_model: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("classifier") / "run"
    train(tiny_model, texts, out, objective="classify", **HEAD)
    return out


def test_a_classifier_learns_and_answers_no_prompts(classifier: Path) -> None:
    first, *_, last = rows(classifier / "evaluations.jsonl")
    assert first["class_accuracy"] < 0.6 and last["class_accuracy"] > 0.9 and last["loss"] < first["loss"]
    assert "accuracy" not in last
    assert not (classifier / "samples.jsonl").exists() or not rows(classifier / "samples.jsonl")


def test_it_is_evaluated_and_asked_again(classifier: Path) -> None:
    done = hone("eval", classifier, "--json")
    assert done.status == 0, done.err
    last = rows(classifier / "evaluations.jsonl")[-1]
    assert json.loads(done.out)["class_accuracy"] == pytest.approx(last["class_accuracy"])
    asked = hone("sample", classifier, "--prompt", "What does animal 4 of the whales say?")
    assert asked.status == 0 and "whale (" in asked.out
    silent = hone("sample", classifier)
    assert silent.status == 2 and "does not answer but judges" in silent.err and "hone eval" in silent.err


def test_transformers_loads_the_exported_classifier(classifier: Path, texts: Path, tmp_path: Path) -> None:
    done = hone("export", classifier, "--to", "hf", "--out", tmp_path / "made", "--json")
    assert done.status == 0 and json.loads(done.out)["error"] < 1e-4, done.err
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "made")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert sorted(model.config.label2id) == sorted(ANIMALS)
    shown = rows(texts)[:40]
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    right = 0
    for row in shown:
        ids = start + tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        right += model.config.id2label[int(logits.argmax())] == row["label"]
    assert right > 35


def test_other_classes_than_those_of_the_head_are_refused(classifier: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(40)])
    with pytest.raises(ModelError, match=r"the saved head tells the classes cat, dog, .* but this run has a, b"):
        train(classifier / "model", other, tmp_path / "run", objective="classify", **HEAD)
    with pytest.raises(DataError, match=r"'b' is none of the classes .*a, c"):
        train(tiny_model, other, tmp_path / "run", objective={"name": "classify", "classes": ["a", "c"]}, **HEAD)
    with pytest.raises(DataError, match="at least two different classes, found a;"):
        same = write(tmp_path / "same.jsonl", [{"text": f"text {n}", "label": "a"} for n in range(40)])
        train(tiny_model, same, tmp_path / "run", objective="classify", **HEAD)
    with pytest.raises(DataError, match=r"mixed.jsonl:\d+: expected a class in a column called 'label', found none"):
        mixed = [{"text": f"text {n}", "label": "ab"[n % 2] if n != 7 else None} for n in range(40)]
        train(tiny_model, write(tmp_path / "mixed.jsonl", mixed), tmp_path / "run", objective="classify", **HEAD)


def test_a_long_text_is_cut_and_keeps_its_class(tiny_model: Path, texts: Path, tmp_path: Path) -> None:
    data = {"name": "files", "path": str(texts), "holdout": 20, "max_tokens": 6}
    result = train(tiny_model, texts, tmp_path / "run", objective="classify", **{**HEAD, "data": data, "steps": 2})
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    counts = manifest["data"]["train"]["counts"]
    assert result["status"] == "finished" and counts["kept"] == counts["truncated"] == 180


def test_a_tagger_is_exported_word_by_word(tiny_model: Path, words: Path, tmp_path: Path) -> None:
    adamw = {"name": "adamw", "lr": 3e-3}
    train(tiny_model, words, tmp_path / "run", objective="tag", **{**HEAD, "adapter": "full", "optimizer": adamw})
    last = rows(tmp_path / "run" / "evaluations.jsonl")[-1]
    f1 = 2 * last["tags_right"] / (last["tags_predicted"] + last["tags_there"])
    assert last["class_accuracy"] > 0.95 and f1 > 0.9
    asked = hone("sample", tmp_path / "run", "--prompt", "What does animal 4 of the whales say?")
    assert asked.status == 0 and "O O O O O O B O" in asked.out
    done = hone("export", tmp_path / "run", "--to", "hf", "--json")
    assert done.status == 0 and json.loads(done.out)["error"] < 1e-4, done.err
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "run" / "export-hf")
    assert model.config.id2label == {0: "B", 1: "O"}


def test_what_transformers_cannot_hold_is_said(tiny_model: Path, words: Path, tmp_path: Path) -> None:
    train(tiny_model, words, tmp_path / "run", objective={"name": "tag", "unmask": "all"}, **{**HEAD, "steps": 1})
    done = hone("export", tmp_path / "run", "--to", "hf")
    assert done.status == 2 and "causal mask" in done.err and "extras.safetensors" in done.err


def test_a_reward_model_that_knows_answers_of_its_start_is_used_again(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    of = {"name": "chains", "skills": ["first"], "count": 12, "holdout": 4}
    data = {"name": "sampled", "make": "rivals", "of": of, "samples_each": 6, "temperature": 2.0, "max_new_tokens": 24}
    fusion, short = {"name": "reward-fusion", "alike": 0.0}, {**HEAD, "steps": 2, "adapter": "full"}
    train(tiny_model, pairs, tmp_path / "run", objective=fusion, data=data, eval_data=str(pairs), **short)
    last = rows(tmp_path / "run" / "evaluations.jsonl")[-1]
    for more in ([], ["--set", "data.of.seed=1"]):  # it knows what it has trained on, whatever it is evaluated on
        done = hone("eval", tmp_path / "run", "--json", *more)
        assert done.status == 0 and json.loads(done.out)["loss"] == pytest.approx(last["loss"]), done.err
    asked = hone("sample", tmp_path / "run", "--prompt", "first 3 1 =\n3")
    assert asked.status == 0 and "reward " in asked.out, asked.err
    (score,) = ModelReward(path=str(tmp_path / "run")).score([Attempt(Sample("prompt", "a"), "b")], Chains())
    assert isinstance(score, float)


def test_held_out_prompts_are_asked_of_a_run_whose_data_its_start_made(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    of = {"name": "chains", "skills": ["first"], "count": 12, "holdout": 4}
    data = {"name": "mix", "sources": [{"name": "sampled", "make": "right", "of": of, "max_new_tokens": 4}]}
    train(tiny_model, pairs, tmp_path / "run", data=data, steps=1)
    asked = hone("sample", tmp_path / "run", "--max-new-tokens", "3", "--json")
    assert asked.status == 0 and len(json.loads(asked.out)) == 3, asked.err


def test_a_reward_model_is_a_classifier_of_one_class(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    train(tiny_model, pairs, tmp_path / "run", objective="reward-model", **HEAD)
    last = rows(tmp_path / "run" / "evaluations.jsonl")[-1]
    assert last["pair_accuracy"] > 0.8 and "accuracy" not in last
    asked = hone("sample", tmp_path / "run", "--prompt", "What does animal 4 of the whales say? I am a whale")
    assert asked.status == 0 and "reward " in asked.out
    done = hone("export", tmp_path / "run", "--to", "hf", "--json")
    assert done.status == 0 and json.loads(done.out)["error"] < 1e-4, done.err
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "export-hf")
    assert model.config.num_labels == 1 and model.config.id2label == {0: "reward"}
