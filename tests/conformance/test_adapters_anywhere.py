"""Promises of every adapter that no architecture changes: what trains, which files and bases it takes, one start."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conformance.adapters import (
    IDS,
    MODELS,
    QUIET,
    attach,
    build,
    calibration,
    cases,
    excused,
    keep_or_skip,
    logits,
    snapshot,
)
from hone.errors import HoneError

pytestmark = [pytest.mark.parametrize(("name", "options", "kind"), cases(once=True)), *QUIET]


def test_only_what_is_declared_trains(name: str, options: dict[str, Any], kind: str) -> None:
    adapter, model = attach(name, options, kind)
    declared = dict(adapter.trainable(model))
    assert declared
    before = snapshot(model)
    loss = model(input_ids=IDS, labels=IDS).loss
    for penalty in adapter.penalties():
        term = penalty.of_weights(model)
        loss = loss if term is None else loss + term
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    for key, parameter in model.named_parameters():
        assert (key in declared) == (parameter.grad is not None), key
        assert (key in declared) or torch.equal(parameter, before[key]), key
    changed = [key for key in declared if not torch.equal(before[key], declared[key])]
    assert len(changed) == len(declared) or excused(name, "all move")


def test_another_base_is_refused(name: str, options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    adapter, model = attach(name, options, kind)
    adapter.save(model, tmp_path, base="the/base")
    if not (tmp_path / "hone.json").is_file():
        pytest.skip("written without a note of its base: whole weights, or PEFT's own format")
    other = MODELS[kind]()
    with torch.no_grad():
        next(other.parameters()).mul_(1.1)
    with pytest.raises(HoneError, match="trained on another base"):
        build(name, options, other).load(other, tmp_path)


def test_one_seed_gives_one_start(name: str, options: dict[str, Any], kind: str) -> None:
    first, second = (snapshot(attach(name, options, kind, moved=False)[1]) for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_attaching_twice_is_refused(name: str, options: dict[str, Any], kind: str) -> None:
    keep_or_skip(name, "attached once")
    adapter, model = attach(name, options, kind)
    with pytest.raises(HoneError, match="already"):
        copy.copy(adapter).attach(model, calibration(model))


def test_loading_is_strict(name: str, options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    adapter, model = attach(name, options, kind)
    adapter.save(model, tmp_path, base="")
    (file,) = tmp_path.glob("*.safetensors")
    whole = load_file(file)
    key = next((key for key in whole if ".0." in key or ".1." in key), next(iter(whole)))
    bare = key.removeprefix("base_model.model.")
    plain = bare.rpartition(".")[0].removesuffix(".lora_A") or bare  # the layer, or the tensor
    for broken, word in (
        ({k: v for k, v in whole.items() if k != key}, plain),
        ({**whole, "base_model.model.stray.weight": torch.zeros(2)}, "stray"),
        ({**whole, key: torch.zeros(3, 3, 3, dtype=torch.float64)}, plain),
    ):
        save_file(broken, file, metadata={"format": "pt"})
        fresh = MODELS[kind]()
        with pytest.raises(HoneError, match=word.replace(".", r"\.")):
            build(name, options, fresh).load(fresh, tmp_path)


def test_strip_leaves_the_plain_model(name: str, options: dict[str, Any], kind: str, tmp_path: Path) -> None:
    adapter, model = attach(name, options, kind)
    if adapter.unmergeable:
        with pytest.raises(HoneError, match="cannot be merged"):
            adapter.strip(model)
        return
    adapted = logits(model)
    adapter.strip(model)
    plain = MODELS[kind]()
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert not adapter.trainable(model)
    torch.testing.assert_close(logits(model), adapted, rtol=0, atol=1e-10)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()  # type: ignore[attr-defined]
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-12)
