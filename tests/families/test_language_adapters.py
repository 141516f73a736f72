"""Each sample goes through the adapter of its language, and each language ends with its own best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conformance.adapters import move
from end_to_end.support import rows, train
from hone.adapters.host import adapted_layers
from hone.adapters.languages import BestOfEach, LanguageAdapters
from hone.errors import HoneError
from hone.text.model import LanguageModel
from hone.text.pack import Tree, pack


def tree(ids: list[int], language: float | None) -> Tree:
    fields = {} if language is None else {"source": (language,)}
    return Tree((np.array(ids, np.int32),), (np.ones(len(ids), np.float32),), (-1,), fields)


@pytest.fixture
def model(tiny_model: Path) -> LanguageModel:
    loaded = LanguageModel.load(tiny_model, dtype=torch.float64).eval()
    adapter = LanguageAdapters(languages=2, width=4)
    adapter.attach(loaded.hf)
    move(adapter, loaded.hf)
    return loaded


@torch.no_grad()
def hidden(model: LanguageModel, *trees: Tree) -> torch.Tensor:
    return model.hidden(pack(trees))


def test_a_mixed_batch_equals_each_language_alone(model: LanguageModel) -> None:
    first, second = [5, 6, 7, 8], [9, 10, 11]
    together = hidden(model, tree(first, 0.0), tree(second, 1.0))
    torch.testing.assert_close(together[:4], hidden(model, tree(first, 0.0)), rtol=0, atol=1e-12)
    torch.testing.assert_close(together[4:], hidden(model, tree(second, 1.0)), rtol=0, atol=1e-12)
    assert float((together[4:] - hidden(model, tree(second, 0.0))).abs().max()) > 1e-3


def test_generation_speaks_the_default_language(model: LanguageModel) -> None:
    torch.testing.assert_close(hidden(model, tree([5, 6], None)), hidden(model, tree([5, 6], 0.0)), rtol=0, atol=0)


def test_training_data_without_languages_is_refused(model: LanguageModel) -> None:
    with pytest.raises(HoneError, match="mark: true"):
        model.train().hidden(pack([tree([5, 6], None)]))


def test_a_pass_of_the_base_before_the_backward_pass_changes_no_gradient(tiny_model: Path) -> None:
    found = []
    for again in (False, True):
        model = LanguageModel.load(tiny_model, dtype=torch.float64).train()
        model.checkpoint_layers(again)
        adapter, batch = (
            LanguageAdapters(languages=2, width=4),
            pack([tree([5, 6, 7], 0.0), tree([9, 10, 11, 12], 1.0)]),
        )
        torch.manual_seed(0)
        adapter.attach(model.hf)
        move(adapter, model.hf)
        states = model.hidden(batch)
        with torch.no_grad(), adapter.disabled(model.hf):
            model.hidden(batch)
        states.square().sum().backward()
        found.append([p.grad for _, p in adapter.trainable(model.hf)])
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def test_a_language_too_many_is_refused(model: LanguageModel) -> None:
    with pytest.raises(HoneError, match=r"adapter\.languages: 2, numbered from 0, but a sample is in language 2"):
        hidden(model, tree([5, 6], 2.0))


def test_the_run_ends_with_the_best_of_each(tiny_model: Path, tmp_path: Path) -> None:
    skills = [{"name": "chains", "skills": [skill], "count": 60, "holdout": 10} for skill in ("add", "sort")]
    found = {}
    for assemble in (True, False):
        changes: dict[str, Any] = {
            "adapter": {"name": "language-adapters", "assemble": assemble}, "eval_every": 1, "precision": "float64",
            "data": {"name": "mix", "mark": True, "sources": skills}, "steps": 9,
            "optimizer": {"name": "adamw", "lr": 4.0}, "schedule": "constant",
        }  # fmt: skip
        train(tiny_model, tmp_path, tmp_path / f"run-{assemble}", **changes)
        found[assemble] = rows(tmp_path / f"run-{assemble}" / "evaluations.jsonl")
    for key in ("loss/0", "loss/1"):
        losses = [row[key] for row in found[False]]
        assert found[True][-1][key] == pytest.approx(min(losses), rel=1e-9)


def test_each_language_goes_back_to_its_own_best(model: LanguageModel) -> None:
    adapter = LanguageAdapters(languages=2, width=4)
    run: Any = type("Run", (), {"model": model})()
    layer = next(iter(adapted_layers(model.hf).values()))
    first = BestOfEach(adapter=adapter)
    first.on_eval(run, {"loss/0": 1.0, "loss/1": 2.0})
    old = layer.up.detach().clone()
    move(adapter, model.hf)
    new = layer.up.detach().clone()
    again = BestOfEach(adapter=adapter)
    again.load_state_dict(first.state_dict())
    again.on_eval(run, {"loss/0": 3.0, "loss/1": 1.0})
    move(adapter, model.hf)
    again.on_end(run)
    assert torch.equal(layer.up[0], old[0]) and torch.equal(layer.up[1], new[1])
    assert not torch.equal(old[0], new[0]) and again.best == {"0": 1.0, "1": 1.0}
