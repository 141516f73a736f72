"""Post-hoc averages: lengths and exponents, and reconstructions against means that were kept directly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hone.callbacks.posthoc_ema import PostHocEMA, combination, exponent_of, overlaps
from hone.engine.folder import RunFolder


@pytest.mark.parametrize(("length", "exponent"), [(0.05, 16.97), (0.10, 6.94), (0.15, 3.56), (0.20, 1.83)])
def test_exponents_of_lengths(length: float, exponent: float) -> None:
    found = exponent_of(length)
    assert found == pytest.approx(exponent, abs=0.01)
    assert np.sqrt((found + 1) / ((found + 2) ** 2 * (found + 3))) == pytest.approx(length, rel=1e-9)


def test_inner_products_are_those_of_the_profiles() -> None:
    def profile(end: float, exponent: float) -> np.ndarray:
        return np.where(ticks <= end, (exponent + 1) * ticks**exponent / end ** (exponent + 1), 0.0)

    ticks = np.linspace(0, 100, 400_001)
    ends, exponents = np.array([40.0, 100.0, 100.0]), np.array([16.97, 6.94, 1.83])
    found = overlaps(ends, exponents, ends, exponents)
    for i in range(3):
        for j in range(3):
            values = profile(ends[i], exponents[i]) * profile(ends[j], exponents[j])
            assert found[i, j] == pytest.approx(np.trapezoid(values, ticks), rel=1e-3)


def test_a_snapshot_is_its_own_combination() -> None:
    steps, lengths = np.array([50.0, 100.0, 50.0, 100.0]), np.array([0.05, 0.05, 0.1, 0.1])
    np.testing.assert_allclose(combination(steps, lengths, 100.0, 0.1), [0, 0, 0, 1], atol=1e-8)


@pytest.mark.parametrize("length", [0.03, 0.05, 0.08, 0.12, 0.15])
def test_a_mean_of_another_length_is_the_one_that_was_kept_directly(length: float) -> None:
    total = 400
    made = torch.Generator().manual_seed(0)
    path = torch.randn(total, 300, generator=made, dtype=torch.float64).cumsum(0)  # weights that wander
    weight = torch.nn.Parameter(path[0].clone())
    run: Any = SimpleNamespace(trainable=[("w", weight)], total=total, step=0, folder=None)
    callback, direct = PostHocEMA(length=length), path[0].clone()
    callback.on_start(run)
    for step in range(1, total + 1):
        with torch.no_grad():
            weight.copy_(path[step - 1])
        callback.on_step(run, {})
        direct = direct + (1 - (1 - 1 / step) ** (exponent_of(length) + 1)) * (path[step - 1] - direct)
    callback.on_end(run)
    error = (weight.detach() - direct).norm() / (path[-1] - direct).norm()
    assert float(error) < 0.05
    other = callback.mean_of(0.05)["w"]
    torch.testing.assert_close(other, callback.means[0]["w"], rtol=1e-6, atol=1e-6)


def test_further_means_are_written_beside_the_model(tmp_path: Any) -> None:
    from safetensors.torch import load_file

    weight = torch.nn.Parameter(torch.zeros(3))
    cluster, folder = SimpleNamespace(main=True), RunFolder(tmp_path)
    run: Any = SimpleNamespace(trainable=[("w", weight)], total=20, step=0, folder=folder, cluster=cluster)
    callback = PostHocEMA(also=[0.07], every=2)
    callback.on_start(run)
    for step in range(20):
        with torch.no_grad():
            weight.fill_(float(step))
        callback.on_step(run, {})
    wanted = callback.mean_of(0.07)["w"]
    callback.on_end(run)
    assert torch.equal(load_file(tmp_path / "ema" / "0.07.safetensors")["w"], wanted)
    assert [message for _, message in PostHocEMA(lengths=[0.1]).check()]
