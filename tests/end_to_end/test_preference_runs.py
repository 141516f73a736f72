"""Preference runs from a recipe: forms of the reference agree, a stopped run goes on exactly, figures are held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from end_to_end.support import back_to, files, hone, repeatable, rows, train
from hone import resume
from hone.errors import HoneError

FULL = {"name": "adamw", "lr": 1e-3}


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty pairs whose preferred answers say yes, in a file of their own."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    made = [{"prompt": f"Is {n} a number? ", "chosen": f"yes, {n}", "rejected": f"no, not {n}"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def prefer(model: Path, pairs: Path, out: Path, **changes: Any) -> dict[str, Any]:
    dpo = {"name": "dpo", "beta": 0.1, "reference": "auto", **changes.pop("dpo", {})}
    return train(model, pairs, out, **{"objective": dpo, "eval_samples": 0, "steps": 8, **changes})


@pytest.mark.parametrize("adapter", [{"name": "lora", "rank": 4}, "full"])
def test_every_form_of_the_reference_trains_alike(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, adapter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HONE_CACHE", str(tmp_path / "cache"))
    forms = ["copy", "cached"] + (["adapter"] if adapter != "full" else [])
    results = {}
    for form in forms:
        results[form] = prefer(
            tiny_model, pairs_file, tmp_path / form, adapter=adapter, dpo={"reference": form}, optimizer=FULL
        )
    for form in forms[1:]:
        assert results[form]["after"]["loss"] == pytest.approx(results["copy"]["after"]["loss"], abs=1e-5)
    before, after = results["copy"]["before"], results["copy"]["after"]
    assert before["loss"] == pytest.approx(0.6931, abs=1e-4) and after["loss"] < before["loss"]
    assert before["pair_accuracy"] < after["pair_accuracy"] <= 1 and after["margin"] > 0


def test_an_adapter_of_its_own_base_is_asked_for_where_there_is_one(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(HoneError, match=r"reference: adapter needs an adapter that leaves its base as it is.*'full'"):
        prefer(tiny_model, pairs_file, tmp_path / "run", adapter="full", dpo={"reference": "adapter"})


def test_a_preference_run_goes_on_to_the_same_bytes(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    for out in (whole, again):
        prefer(tiny_model, pairs_file, out, checkpoint_every=3, adapter="full", optimizer=FULL)
    back_to(again, 6)
    resume(again)
    assert files(again / "model") == files(whole / "model")
    assert [repeatable(row) for row in rows(again / "metrics.jsonl")] == [
        repeatable(row) for row in rows(whole / "metrics.jsonl")
    ]


def test_held_out_figures_can_be_had_again(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    result = prefer(tiny_model, pairs_file, tmp_path / "run")
    found = hone("eval", tmp_path / "run")
    assert found.status == 0, found.err
    assert "pair_accuracy" in found.out
    assert f"{result['after']['pair_accuracy']:.3f}"[:4] in found.out


def test_preference_data_fed_to_sft_names_what_fits(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    with pytest.raises(HoneError, match=r"pairs\.jsonl:\d+.*preference data.*such as dpo"):
        train(tiny_model, pairs_file, tmp_path / "run", objective="sft")
