"""Every registered adapter keeps the promises of the contract, on a Llama and a GPT-2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from conformance.adapters import (
    MODELS,
    QUIET,
    attach,
    build,
    cases,
    excused,
    keep_or_skip,
    logits,
    move,
    snapshot,
)  # fmt: skip
from hone.adapters.base import load_adapter
from hone.errors import HoneError

pytestmark = [pytest.mark.parametrize(("name", "options", "kind"), cases()), *QUIET]


def test_the_model_is_the_base_at_the_start(name: str, options: dict[str, Any], kind: str) -> None:
    keep_or_skip(name, "start")
    _, model = attach(name, options, kind, moved=False)
    close = 1e-12 if options.get("quantize", "none") == "none" else 1.0
    torch.testing.assert_close(logits(model), logits(MODELS[kind]()), rtol=0, atol=close)


def test_merged_is_unmerged_and_back_to_the_bit(name: str, options: dict[str, Any], kind: str) -> None:
    adapter, model = attach(name, options, kind)
    if adapter.unmergeable:
        with pytest.raises(HoneError, match="cannot be merged"):
            adapter.merge(model)
        return
    adapted, before = logits(model), snapshot(model)
    adapter.merge(model)
    adapter.merge(model)  # merging twice must not add twice
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-10)
    adapter.unmerge(model)
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(logits(model), adapted)


def settled(file: Path) -> dict[str, Any]:
    """Return a saved configuration; PEFT keeps the names of modules in a set, whose order says nothing."""
    found: dict[str, Any] = json.loads(file.read_text())
    names = found.get("target_modules")
    return {**found, "target_modules": sorted(names) if isinstance(names, list) else names}


def test_save_and_load_round_trip(name: str, options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    adapter, model = attach(name, options, kind)
    wanted = logits(model)
    adapter.save(model, tmp_path / "saved", base="the/base")
    fresh = MODELS[kind]()
    again = build(name, options, fresh)
    generator = torch.get_rng_state()
    again.load(fresh, tmp_path / "saved")
    assert name.startswith("peft:") or torch.equal(generator, torch.get_rng_state())
    found = logits(fresh.eval())
    if folded(tmp_path / "saved", name, model):  # other products in another order
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
        return
    assert torch.equal(found, wanted)
    move(adapter, model)
    assert not torch.equal(logits(model), wanted)
    adapter.load(model, tmp_path / "saved")  # into a model that has the adapter already
    assert torch.equal(logits(model), wanted)
    again.save(fresh, tmp_path / "again", base="the/base")
    for file in (tmp_path / "saved").glob("*.json"):
        assert settled(file) == settled(tmp_path / "again" / file.name)


def folded(folder: Path, name: str, model: torch.nn.Module) -> bool:
    """Whether an adapter was saved as a plain LoRA that is more than it trains; it then refuses to be taken apart."""
    note = folder / "hone.json"
    if not note.is_file() or json.loads((folder / "adapter_config.json").read_text())["peft_type"] != "LORA":
        return False
    try:
        build(name, json.loads(note.read_text())["options"], model).load(model, folder)
    except HoneError as error:
        assert "folded into a plain LoRA" in str(error), error
        return True
    return False


def test_other_libraries_load_what_is_saved_or_cannot_mistake_it(
    name: str, options: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    adapter, model = attach(name, options, kind)
    adapter.save(model, tmp_path, base="the/base")
    config = tmp_path / "adapter_config.json"
    if not config.is_file():
        again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()  # type: ignore[attr-defined]
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-12)
        return
    fresh = MODELS[kind]()
    load_adapter(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh.eval()), logits(model), rtol=0, atol=1e-12)
    if json.loads(config.read_text())["peft_type"] == "HONE":
        with pytest.raises(KeyError, match="HONE"):
            peft.PeftModel.from_pretrained(MODELS[kind](), str(tmp_path))
    elif options.get("quantize", "none") == "none" and not excused(name, "start"):
        theirs = peft.PeftModel.from_pretrained(MODELS[kind](), str(tmp_path)).eval()
        torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-12)


def test_disabling_restores_the_base_to_the_bit(name: str, options: dict[str, Any], kind: str) -> None:
    adapter, model = attach(name, options, kind)
    if excused(name, "disabled"):
        with pytest.raises(HoneError, match="base"):
            adapter.disabled(model)
        return
    adapted, base = logits(model), logits(MODELS[kind]())
    trained = [n for n, _ in adapter.trainable(model)]
    assert not torch.equal(adapted, base)
    with adapter.disabled(model):
        found = logits(model)
    if options.get("quantize", "none") == "none" and not excused(name, "start"):
        assert torch.equal(found, base)
    assert torch.equal(logits(model), adapted)
    assert [n for n, _ in adapter.trainable(model)] == trained
