"""LCSC: its search finds what is best, and a run ends with it, stopped and resumed or not."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from hone.callbacks.lcsc import LCSC, averages, evolve
from hone.distances.sets import Energy
from hone.engine.checkpoint import decode, encode
from hone.errors import HoneError
from hone.options import build_part
from hone.solvers.few import Multistep
from oracles.small_denoisers import as_run, points, tiny

TOTAL = 12


def new_run() -> Any:
    model = tiny("consistency")
    objective = build_part("objective", "ict")
    run = as_run(model, points(300), objective=objective)
    run.total, run.trainable = TOTAL, list(model.named_parameters())
    return run


def callback(**options: Any) -> LCSC:
    return LCSC(every=3, kept=3, solver=Multistep(), distance=Energy(), samples=60, tries=8, **options)


def train(run: Any, watcher: LCSC, until: int) -> None:
    while run.step < until:
        run.step += 1
        made = torch.Generator().manual_seed(run.step)
        with torch.no_grad():
            for _, weight in run.trainable:
                weight += 0.1 * torch.randn(weight.shape, generator=made, dtype=weight.dtype)
        watcher.on_step(run, {})


def weights(run: Any) -> torch.Tensor:
    return torch.cat([weight.detach().flatten() for _, weight in run.trainable])


def test_a_search_begins_with_averages_and_ends_better() -> None:
    begin = averages(6)
    assert all(one.sum() == pytest.approx(1.0) for one in begin) and begin[0][-1] == 1.0
    aim = np.array([0.3, -0.4, 0.1, 0.5, -0.5, 1.0])

    def score(one: np.ndarray) -> float:
        assert one.sum() == pytest.approx(1.0)
        return float(((one - aim) ** 2).sum())

    found, value = evolve(begin, score, tries=3000, parents=10, mutation=0.5, seed=0)
    assert value == score(found) < 0.05 * min(map(score, begin))


def test_the_run_ends_with_the_best_combination_that_was_tried() -> None:
    run, watcher = new_run(), callback()
    train(run, watcher, TOTAL)
    assert len(watcher.checkpoints) == 3  # those of steps 6, 9 and 12
    for name, weight in run.trainable:
        assert torch.equal(watcher.checkpoints[-1][name], weight)
    watcher.on_end(run)
    combined = weights(run)
    score = watcher.scorer(run)
    best = score(np.array(watcher.coefficients))
    torch.testing.assert_close(weights(run), combined)
    assert sum(watcher.coefficients) == pytest.approx(1.0)
    assert best <= min(score(one) for one in averages(3))


@pytest.mark.parametrize("cut", [1, 6, 7])
def test_a_run_that_was_stopped_and_resumed_ends_the_same_and_ends_once(cut: int) -> None:
    whole, watcher = new_run(), callback()
    train(whole, watcher, TOTAL)
    watcher.on_end(whole)
    once = weights(whole)
    watcher.on_end(whole)
    assert torch.equal(weights(whole), once)
    first, stopped = new_run(), callback()
    train(first, stopped, cut)
    tensors: dict[str, torch.Tensor] = {}
    state = decode(json.loads(json.dumps(encode(stopped.state_dict(), tensors))), tensors)
    again = callback()
    again.load_state_dict(state)
    train(first, again, TOTAL)
    again.on_end(first)
    assert torch.equal(weights(first), once)


def test_what_it_cannot_work_with_is_said() -> None:
    assert "set final: last" in next(callback().conflicts({"final": "best", "model": {"name": "denoiser"}}))
    assert not list(callback().conflicts({}))
    run = new_run()
    run.objective = build_part("objective", {"name": "ict"})
    run.objective.drawn_by = lambda model: tiny()
    with pytest.raises(HoneError, match="draws from others"):
        callback().on_start(run)
    run.model = torch.nn.Linear(1, 1)
    with pytest.raises(HoneError, match="this run has none"):
        callback().on_start(run)
