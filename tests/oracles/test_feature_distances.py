"""Distances in features: the digits' network knows digits, and its distance grows with what is done to them."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from hone.data.arrays import Digits
from hone.diffusion.encoders import DIGITS, digit_network
from hone.distances.features import FID, DigitFrechet, _as_bytes
from hone.distances.train_digits import moved
from hone.errors import HoneError


def test_the_network_that_ships_knows_the_held_out_digits() -> None:
    held = Digits(conditional=True).collection("eval")
    found = digit_network()(held.arrays).argmax(1)
    assert float((found == held.labels).double().mean()) > 0.98
    assert DIGITS.stat().st_size < 100_000
    assert digit_network().features(held.arrays[:3]).shape == (3, 32)


def test_the_distance_grows_with_every_disturbance() -> None:
    source = Digits()
    real, other = source.collection("eval").arrays, source.collection("train").arrays[:400]
    distance = DigitFrechet()
    assert distance(real, real) == pytest.approx(0.0, abs=1e-6)
    floor = distance(other, real)
    made = torch.Generator().manual_seed(0)
    noise = torch.randn(other.shape, generator=made)
    noisy = [distance(other + level * noise, real) for level in (0.3, 0.6, 1.2)]
    assert floor < noisy[0] < noisy[1] < noisy[2]
    fewer = other[Digits(conditional=True).collection("train").labels[:400] < 5]
    assert distance(fewer, real) > 3 * floor
    assert distance(moved(other, 0, 2), real) > 2 * floor
    with pytest.raises(HoneError, match="looks at digits"):
        distance(torch.zeros(9, 2), torch.zeros(9, 2))


def test_moving_an_image_leaves_black_behind() -> None:
    image = torch.arange(64.0).view(1, 1, 8, 8)
    found = moved(image, 1, -2)[0, 0]
    assert torch.equal(found[:6, 1:], image[0, 0, 2:, :7]) and bool(
        (found[6:] == -1).all() and (found[:, 0] == -1).all()
    )


def test_fid_says_what_it_needs() -> None:
    assert FID().most == 50_000  # of 2048 features: the covariance of 2,000 arrays would be singular
    assert _as_bytes(torch.tensor([-1.0, 0.0, 2.0]).view(3, 1, 1, 1))[:, :, 0, 0].tolist() == [
        [0] * 3,
        [128] * 3,
        [255] * 3,
    ]
    with pytest.raises(HoneError, match="looks at images of 1 or 3 channels"):
        FID()(torch.zeros(4, 2), torch.zeros(4, 2))
    if importlib.util.find_spec("torchmetrics") is None:
        with pytest.raises(HoneError, match=r"pip install 'hone-ml\[fid\]'"):
            FID()(torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 8))
