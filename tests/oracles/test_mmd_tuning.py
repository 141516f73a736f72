"""MMD tuning: the gradient through the chain against finite differences, and the estimators against plain sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hone.diffusion.items import collate
from hone.objectives.mmd_tuning import MMDTuning, polynomial_mmd
from oracles.small_denoisers import as_run, points, step_of, tiny


def test_the_cubic_estimate_is_the_mean_over_different_rows() -> None:
    left, right = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def kernel(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one @ other / 3 + 1) ** 3)

    def within(rows: torch.Tensor) -> float:
        pairs = [kernel(rows[i], rows[j]) for i in range(len(rows)) for j in range(len(rows)) if i != j]
        return sum(pairs) / len(pairs)

    across = sum(kernel(one, other) for one in left for other in right) / 20
    assert float(polynomial_mmd(left, right)) == pytest.approx(within(left) + within(right) - 2 * across, rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"kernel": "cubic"}, {"eta": 1.0}, {"features": "classifier"}])
def test_the_gradient_is_that_of_the_discrepancy_whole_or_in_parts(options: dict[str, Any]) -> None:
    model = tiny(classes=2)
    run = as_run(model, points(10, torch.arange(10) % 2))
    objective = MMDTuning(steps=3, encoder_steps=20, **options)
    objective.setup(run)
    batch = step_of(objective, run)
    value = objective.loss(model, batch)[0]
    value.backward()
    weight: Any = model.hf.leave.weight
    found, before = weight.grad.clone(), weight.detach().clone()
    for index in ((0, 3), (1, 6)):
        ends = []
        for change in (1e-5, -1e-5):
            with torch.no_grad():
                weight.copy_(before)[index] += change
                ends.append(float(objective.loss(model, batch)[0]))
        assert float(found[index]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-9)
    with torch.no_grad():
        weight.copy_(before)
    model.zero_grad()
    items = list(run.loader.trees)
    objective.before_step(run, items)
    parts = [objective.loss(model, collate(items[begin : begin + 3]))[0] for begin in (0, 3, 6, 9)]
    torch.stack(parts).sum().backward()
    torch.testing.assert_close(weight.grad, found, rtol=1e-9, atol=1e-12)
    assert float(torch.stack(parts).sum().detach()) == pytest.approx(float(value.detach()), rel=1e-9)


def test_tuning_a_short_chain_lowers_its_discrepancy() -> None:
    model = tiny()
    run = as_run(model, points(64))
    objective = MMDTuning(steps=2)
    objective.setup(run)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    values = []
    for run.step in range(60):
        loss, _ = objective.loss(model, step_of(objective, run))
        values.append(float(loss.detach()) / 64)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert sum(values[-10:]) < 0.5 * sum(values[:10])
