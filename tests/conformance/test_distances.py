"""Every distance: near nothing between two halves of a sample, more for a shifted one; and closed forms of some."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hone.data.arrays import Digits
from hone.distances.sets import MMD, Energy, Frechet, Precision, Recall, SlicedWasserstein, Wasserstein, frechet, mmd
from hone.options import build_part
from hone.parts import catalogue, load

NEEDS_DOWNLOAD = {"fid": "its network is downloaded"}
DIGITS = {"digit-frechet"}  # distances that look at digits only
SYMMETRIC = {"energy", "sliced-wasserstein", "wasserstein", "frechet", "digit-frechet"}
NAMES = [record.name for record in catalogue() if record.kind == "distance" and record.name not in NEEDS_DOWNLOAD]
every_distance = pytest.mark.parametrize("name", NAMES)


def normal(count: int, size: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sets(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return two halves of a sample, and a disturbed one."""
    if name in DIGITS:
        images = Digits().arrays()[0]
        first, second = images[:800], images[800:1600]
        return first, second, first + 0.7 * normal(800, 64, 1).reshape_as(first).float()
    return normal(600, seed=0), normal(600, seed=1), normal(600, seed=2) + 1.5


@every_distance
def test_a_disturbed_sample_is_farther_than_the_other_half(name):
    distance: Any = build_part("distance", name)
    first, second, disturbed = sets(name)
    near, far = distance(first, second), distance(disturbed, second)
    assert math.isfinite(near) and math.isfinite(far)
    assert far < near if distance.higher_is_better else far > near
    if distance.higher_is_better:
        assert 0 <= far <= 1 and near > 0.8
    else:
        assert near < 0.3 * far


@every_distance
def test_the_same_set_is_at_no_distance(name):
    distance: Any = build_part("distance", name)
    first = sets(name)[0]
    found = distance(first, first)
    assert found == pytest.approx(1.0 if distance.higher_is_better else 0.0, abs=0.02)


@every_distance
def test_symmetric_where_it_should_be(name):
    distance: Any = build_part("distance", name)
    _, second, disturbed = sets(name)
    if name in SYMMETRIC:
        assert distance(disturbed, second) == pytest.approx(distance(second, disturbed), rel=1e-6)


@every_distance
def test_the_same_sets_give_the_same_number_whatever_was_drawn_before(name):
    first, second, _ = sets(name)
    torch.manual_seed(0)
    one = build_part("distance", name)(first, second)
    torch.manual_seed(5)
    assert build_part("distance", name)(first, second) == one


@every_distance
def test_arrays_of_any_shape_and_at_most_so_many(name):
    if name in DIGITS:
        pytest.skip("digits have one shape")
    first, second = normal(60, 8), normal(60, 8, 1)
    distance = build_part("distance", {"name": name, "most": 40})
    flat = distance(first[:40], second[:40])
    assert distance(first.reshape(60, 2, 2, 2), second.reshape(60, 2, 2, 2)) == pytest.approx(flat)


def test_precision_and_recall_swap():
    first, second = normal(200), 0.3 * normal(200, seed=1)
    assert Precision()(first, second) == Recall()(second, first)
    narrow = 0.3 * normal(400, seed=2)  # within the real set, and over a part of it
    assert Precision()(narrow, normal(400)) > 0.9 and Recall()(narrow, normal(400)) < 0.5


def test_frechet_of_two_gaussians():
    # |m|^2 + sum of (s_i - t_i)^2 for diagonal covariances; here of sets whose moments are exact
    left, right = (whitened(normal(500, seed=seed)) for seed in (0, 1))
    left, right = left * torch.tensor([1.0, 2.0, 0.5]).double(), right * torch.tensor([1.5, 1.0, 0.5]).double() + 2.0
    assert frechet(left, right) == pytest.approx(3 * 4 + 0.25 + 1.0, abs=1e-9)
    assert Frechet()(left, right) == pytest.approx(13.25, abs=1e-9)


def whitened(rows: Tensor) -> Tensor:
    """Return rows of mean 0 and covariance I, exactly."""
    rows = rows - rows.mean(0)
    root = torch.linalg.cholesky(torch.cov(rows.T))
    return torch.linalg.solve_triangular(root, rows.T, upper=False).T


def test_wasserstein_of_a_shift_and_of_a_line():
    rows = normal(200)
    shift = torch.tensor([3.0, -4.0, 0.0]).double()
    assert Wasserstein()(rows + 0.01 * shift, rows) == pytest.approx(0.05, abs=1e-9)  # the identity is best
    line = torch.sort(normal(300, 1)[:, 0]).values
    other = torch.sort(2 * normal(300, 1, 1)[:, 0] + 1).values
    wanted = float(((line - other) ** 2).mean().sqrt())
    mixed = line[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    assert Wasserstein()(mixed[:, None], other[:, None]) == pytest.approx(wanted, abs=1e-9)
    assert SlicedWasserstein()(mixed[:, None], other[:, None]) == pytest.approx(wanted, abs=1e-9)


def test_sliced_wasserstein_of_a_shift():
    # the mean over directions of (u . c)^2 is |c|^2 / d
    rows, shift = normal(400, 2), torch.tensor([3.0, 4.0]).double()
    found = SlicedWasserstein(directions=4000)(rows + shift, rows)
    assert found == pytest.approx(math.sqrt(25 / 2), rel=0.02)


def test_energy_of_two_gaussians_on_a_line():
    # E|X - Y| of N(m, s^2) differences: s sqrt(2 / pi) exp(-m^2 / 2 s^2) + m erf(m / (s sqrt 2)), with s^2 = 2
    def mean_distance(shift: float) -> float:
        return 2 / math.sqrt(math.pi) * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)

    wanted = math.sqrt(2 * mean_distance(1.0) - 2 * mean_distance(0.0))
    found = Energy(most=4000)(normal(4000, 1) + 1.0, normal(4000, 1, 1))
    assert found == pytest.approx(wanted, rel=0.05)


class Largest(TorchDispatchMode):
    """Remembers how many numbers the largest tensor has that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, made.numel() if isinstance(made, Tensor) else 0)
        return made


def test_mmd_is_its_formula_and_holds_no_difference_of_all_pairs():
    left, right = normal(30, 50), normal(20, 50, 1)
    right[:5] = left[:5]  # rows that coincide
    left = left.requires_grad_()

    def kernel(one: Tensor, two: Tensor) -> Tensor:
        return (1 + (one[:, None] - two[None]).square().sum(-1) / (2 * 3.0**2 * 0.5)) ** -0.5

    wanted = ((kernel(left, left).sum() - 30) / (30 * 29) + (kernel(right, right).sum() - 20) / (20 * 19)) \
        - 2 * kernel(left, right).mean()  # fmt: skip
    with Largest() as largest:
        found = mmd(left, right, 3.0, [0.5])
    assert float(found.detach()) == pytest.approx(float(wanted.detach()), abs=1e-9)
    assert largest.numbers <= 30 * 50
    slopes = [torch.autograd.grad(value, left)[0] for value in (found, wanted)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)


def test_mmd_is_without_bias():
    found = [MMD()(normal(50, 2, seed), normal(50, 2, seed + 1000)) for seed in range(60)]
    assert abs(sum(found) / 60) < 3 * torch.tensor(found).std() / math.sqrt(60)
    assert min(found) < 0


def test_a_distance_that_needs_a_download_is_known():
    assert all(load("distance", name) and reason for name, reason in NEEDS_DOWNLOAD.items())
