"""Promises of every adapter that no architecture changes: which base it takes, one start for a seed, attached once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.adapters import MODELS, QUIET, attach, build, calibration, cases, keep_or_skip, snapshot
from hone.errors import HoneError

pytestmark = [pytest.mark.parametrize(("name", "options", "kind"), cases(once=True)), *QUIET]


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
