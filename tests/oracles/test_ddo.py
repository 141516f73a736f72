"""DDO: its optimum where the theory says, and its loss against a plain re-computation."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hone.objectives.ddo import DDO, discriminative
from oracles.known import Known, ring
from oracles.small_denoisers import as_run, points, step_of, tiny


@pytest.mark.parametrize(("beta", "mean"), [(1.0, 0.8), (0.5, 1.6), (2.0, 0.4)])
def test_the_optimum_is_the_datas_power_over_the_references(beta: float, mean: float) -> None:
    # Reference N(0, 1), data N(0.8, 1): p_ref^(1 - 1/beta) p_data^(1/beta) is N(0.8 / beta, 1), up to a constant that
    # the log-ratio of normalised densities does not have; so the ratio is left free to have one.
    x = torch.linspace(-9, 10, 4001, dtype=torch.float64)
    reference, data = (torch.exp(-((x - m) ** 2) / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0]) for m in (0.0, 0.8))
    slope, constant = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.LBFGS([slope, constant], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        ratio = slope * x + constant  # log N(slope, 1) / N(0, 1), shifted
        sure = torch.full((), 1e9)  # the other term is then 0
        real, fake = discriminative(ratio, -sure, 1.0, beta), discriminative(sure, ratio, 1.0, beta)
        loss = (data * real + reference * fake).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert float(slope.detach()) == pytest.approx(mean, abs=1e-5)


def test_the_loss_is_that_of_the_published_listing() -> None:
    model, labels = tiny(classes=2), torch.arange(12) % 2
    run = as_run(model, points(12, labels))
    objective = DDO(alpha=1.5, beta=0.3, drawn=20)
    objective.setup(run)
    batch = step_of(objective, run)
    start, _ = objective.loss(model, batch)
    # It is told apart from itself: there is no difference.
    assert float(start.detach()) == pytest.approx(12 * 2.5 * math.log(2), rel=1e-12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    found, _ = objective.loss(model, batch)
    from hone.objectives.arrays import noise_levels

    sigma = noise_levels(
        objective.uniform(batch, "level"), "lognormal", mean=-0.4, std=1.0, sigma_min=0.01, sigma_max=5.0
    )[:, None]
    weight = (sigma**2 + 0.7**2) / (sigma * 0.7) ** 2
    noise = sigma * objective.normal(batch)
    pool, told = objective._pool  # type: ignore[misc]
    chosen = (objective.uniform(batch, "fake") * 20).long()
    logs = [
        -(weight * (network(arrays + noise, sigma[:, 0], asked) - arrays) ** 2).sum(1)
        for network in (model, objective._reference)
        for arrays, asked in ((batch.arrays, batch.labels), (pool[chosen], told[chosen]))
    ]
    plain = -F.logsigmoid(0.3 * (logs[0] - logs[2])) - 1.5 * F.logsigmoid(-0.3 * (logs[1] - logs[3]))
    assert float(found.detach()) == pytest.approx(float(plain.sum().detach()), rel=1e-10)


def test_a_round_begins_with_the_model_and_what_it_draws() -> None:
    model = tiny()
    run = as_run(model, points(6))
    objective = DDO(rounds=2, drawn=10)
    objective.setup(run)
    step_of(objective, run)
    first = objective._pool[0].clone()  # type: ignore[index]
    with torch.no_grad():
        model.hf.leave.weight.add_(0.3)
    run.step = 4
    step_of(objective, run)
    assert torch.equal(objective._pool[0], first)  # type: ignore[index]
    run.step = 5  # half of the run
    step_of(objective, run)
    assert not torch.equal(objective._pool[0], first)  # type: ignore[index]
    assert torch.equal(objective._reference.hf.leave.weight, model.hf.leave.weight)


def test_a_resumed_round_lies_where_its_reference_does() -> None:
    run = as_run(tiny(classes=2), points(6, torch.arange(6) % 2))
    objective = DDO(drawn=10)
    objective.setup(run)
    saved = copy.deepcopy(objective.state_dict())
    elsewhere = torch.zeros(1, device="meta")  # stands for a GPU
    objective._reference = SimpleNamespace(load_state_dict=lambda state: None, parameters=lambda: iter([elsewhere]))
    objective.load_state_dict(saved)
    assert [kept.device.type for kept in objective._pool] == ["meta", "meta"]  # type: ignore[union-attr]


def test_the_reference_draws_each_array_for_the_class_that_it_is_given() -> None:
    model, labels = Known(ring(0.05)), torch.tensor([0, 0, 1, 2, 1])
    objective = DDO(drawn=64)
    objective.setup(as_run(model, points(5, labels)))
    arrays, told = objective._pool
    nearest = torch.cdist(arrays.double(), model.mixture.means).argmin(1)
    assert torch.equal(nearest, told) and torch.equal(told[:5], labels)
