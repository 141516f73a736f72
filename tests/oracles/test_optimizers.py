"""Optimizers and schedules against the equations of their papers, PyTorch, transformers and pytorch_optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_optimizer
import torch
import transformers
from torch import nn
from torch.optim import lr_scheduler

from hone import options

STEPS, TOTAL = 25, 70
Trajectory = list[np.ndarray]
Make = Callable[[nn.Parameter], torch.optim.Optimizer]


def start(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


def gradients(shape: tuple[int, ...]) -> Trajectory:
    return list(np.random.default_rng(1).normal(size=(STEPS, *shape)))


def follow(make: Make, shape: tuple[int, ...], scale: float = 1.0) -> Trajectory:
    """Return the weights after every step of an optimizer that is given fixed gradients, in float64."""
    weight = nn.Parameter(torch.from_numpy(start(shape)))
    optimizer, path = make(weight), []
    for gradient in gradients(shape):
        weight.grad = torch.from_numpy(gradient * scale)
        optimizer.step()
        path.append(weight.detach().numpy().copy())
    return path


def hone(name: str, **given: Any) -> Make:
    return lambda weight: options.build_part("optimizer", {"name": name, **given}).build([("layer.weight", weight)])


def assert_same(found: Trajectory, expected: Trajectory, tolerance: float = 1e-12) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


def test_adamw_is_algorithm_2_of_its_paper() -> None:
    lr, b1, b2, eps, decay = 0.02, 0.8, 0.95, 1e-6, 0.1
    w, m, v, path = start((4, 3)), 0.0, 0.0, []
    for t, g in enumerate(gradients((4, 3)), start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        w = w - lr * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps) - lr * decay * w
        path.append(w)
    assert_same(follow(hone("adamw", lr=lr, beta1=b1, beta2=b2, eps=eps, weight_decay=decay), (4, 3)), path)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_the_momentum_of_its_paper_at_a_constant_rate(nesterov: bool) -> None:
    """Sutskever's velocity holds the rate: u <- mu u - lr g; his Nesterov iterate looks ahead by mu u."""
    lr, mu = 0.05, 0.9
    w, u, path = start((4, 3)), 0.0, []
    for g in gradients((4, 3)):
        u = mu * u - lr * g
        w = w + u
        path.append(w + mu * u if nesterov else w)
    assert_same(follow(hone("sgd", lr=lr, momentum=mu, nesterov=nesterov), (4, 3)), path)


@pytest.mark.parametrize("shape", [(6, 4), (5,)])
@pytest.mark.parametrize("threshold", [1.0, 2.0])
def test_adafactor_is_algorithms_4_and_5_of_its_paper(shape: tuple[int, ...], threshold: float) -> None:
    lr, e1, e2 = 1e-2, 1e-30, 1e-3
    w, row, column, whole, path = start(shape), 0.0, 0.0, 0.0, []
    for t, g in enumerate(gradients(shape), start=1):
        beta, square = 1 - t**-0.8, g**2 + e1
        alpha = max(e2, math.sqrt((w**2).mean())) * min(lr, 1 / math.sqrt(t))
        if g.ndim == 2:
            row = beta * row + (1 - beta) * square.sum(axis=1)
            column = beta * column + (1 - beta) * square.sum(axis=0)
            second = np.outer(row, column) / row.sum()
        else:
            second = whole = beta * whole + (1 - beta) * square
        u = g / np.sqrt(second)
        w = w - alpha * u / max(1, math.sqrt((u**2).mean()) / threshold)
        path.append(w)
    assert_same(follow(hone("adafactor", lr=lr, threshold=threshold), shape), path)


@pytest.mark.parametrize("scale", [1.0, 1e-7])
def test_adafactor_is_that_of_transformers_even_for_small_gradients(scale: float) -> None:
    theirs = follow(lambda weight: transformers.Adafactor([weight], relative_step=True), (6, 4), scale)
    assert_same(follow(hone("adafactor"), (6, 4), scale), theirs, 1e-9)


@pytest.mark.parametrize(
    ("name", "given", "make"),
    [
        ("torch:rmsprop", {"alpha": 0.9, "momentum": 0.5}, torch.optim.RMSprop),
        ("torch:RAdam", {"betas": [0.8, 0.95]}, torch.optim.RAdam),
        ("torch:nadam", {"weight_decay": 0.1}, torch.optim.NAdam),
        ("pytorch_optimizer:lion", {"betas": [0.8, 0.95]}, pytorch_optimizer.Lion),
        ("pytorch_optimizer:adabelief", {"eps": 1e-8}, pytorch_optimizer.AdaBelief),
    ],
)
def test_a_bridge_is_the_class_it_names(name: str, given: dict[str, Any], make: Callable[..., Any]) -> None:
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    theirs = follow(lambda weight: make([weight], lr=0.02, **plain), (4, 3))
    assert_same(follow(hone(name, lr=0.02, **given), (4, 3)), theirs, 0.0)


def theirs_at(make: Callable[[torch.optim.Optimizer], Any], steps: int) -> list[float]:
    """Return the factors of a PyTorch scheduler at steps 0 to `steps`."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, found = make(optimizer), []
    for _ in range(steps + 1):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


WARM = 10
PEERS: list[tuple[dict[str, Any], Callable[[Any], Any]]] = [
    ({"name": "constant"}, lambda o: transformers.get_constant_schedule_with_warmup(o, WARM)),
    ({"name": "linear"}, lambda o: transformers.get_linear_schedule_with_warmup(o, WARM, TOTAL)),
    ({"name": "cosine"}, lambda o: transformers.get_cosine_schedule_with_warmup(o, WARM, TOTAL)),
    (
        {"name": "cosine", "floor": 0.1},
        lambda o: transformers.get_cosine_with_min_lr_schedule_with_warmup(o, WARM, TOTAL, min_lr_rate=0.1),
    ),
    (
        {"name": "cosine", "cycles": 3},
        lambda o: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(o, WARM, TOTAL, num_cycles=3),
    ),
    *(
        (
            {"name": "wsd", "decay": 20, "shape": shape},
            lambda o, shape=shape: transformers.get_wsd_schedule(o, WARM, 20, TOTAL, decay_type=shape),
        )
        for shape in ("linear", "cosine", "1-sqrt")
    ),
]


@pytest.mark.parametrize(("spec", "make"), PEERS, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_schedules_are_those_of_transformers(spec: dict[str, Any], make: Callable[[Any], Any]) -> None:
    """After the warmup at the same step; within it one step later: transformers spends step 0 on a rate of 0."""
    schedule, theirs = options.build_part("schedule", {"warmup": WARM, **spec}), theirs_at(make, TOTAL)
    ours = [schedule.factor(step, TOTAL) for step in range(TOTAL + 1)]
    assert ours[: WARM - 1] == pytest.approx(theirs[1:WARM], abs=1e-12)
    assert ours[WARM:] == pytest.approx(theirs[WARM:], abs=1e-12)


@pytest.mark.parametrize(("cycles", "growth", "first"), [(3, 2, 10), (7, 1, 10), (2, 6, 10)])
def test_restarts_are_those_of_pytorch(cycles: int, growth: int, first: int) -> None:
    theirs = theirs_at(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=first, T_mult=growth), TOTAL - 1)
    schedule = options.build_part("schedule", {"name": "cosine", "cycles": cycles, "growth": float(growth)})
    assert [schedule.factor(step, TOTAL) for step in range(TOTAL)] == pytest.approx(theirs, abs=1e-12)
