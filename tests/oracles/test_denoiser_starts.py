"""What a fresh denoiser, and one that goes on, take from the data and from the options: noise levels and deviation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hone.data.arrays import Points
from hone.diffusion.networks import MLP
from hone.diffusion.starts import Denoisers
from hone.errors import DataError, ModelError


class Scaled(Points):
    """Points whose numbers are all this many times as large."""

    factor = 1.0

    def arrays(self) -> Any:
        points, labels = super().arrays()
        return points * self.factor, labels


def load(start: Denoisers, data: Any) -> Any:
    return start.load(device="cpu", dtype=torch.float32, data=data)


def scaled(factor: float) -> Scaled:
    data = Scaled(count=200)
    data.factor = factor
    return data


@pytest.mark.parametrize(("options", "field"), [
    ({"sigma_min": 100.0}, "sigma_min"), ({"sigma_max": 0.001}, "sigma_max"),
    ({"sigma_min": 3.0, "sigma_max": 3.0}, "sigma_min"), ({"sigma_min": 3.0, "sigma_max": 4.0}, None),
])  # fmt: skip
def test_noise_levels_are_compared_with_the_defaults(options: dict[str, Any], field: str | None) -> None:
    assert [name for name, _ in Denoisers(**options).check()] == ([] if field is None else [field])


@pytest.mark.parametrize("options", [{"sigma_max": 0.005}, {"sigma_min": 10.0}])
def test_noise_levels_are_compared_with_those_of_the_earlier_run(tmp_path: Path, options: dict[str, Any]) -> None:
    plan = MLP(width=8, depth=1)
    load(Denoisers(network=plan, sigma_min=0.01, sigma_max=5.0), Points(count=200)).save(tmp_path)
    again = Denoisers(path=str(tmp_path), **options)
    assert list(again.check()) == []  # the earlier run is not read there
    with pytest.raises(ModelError, match=f"model.{next(iter(options))}: expected sigma_min below sigma_max"):
        load(again, Points(count=200))


def test_the_deviation_is_measured_and_must_be_one() -> None:
    for factor in (1.0, 0.01):
        data = scaled(factor)
        assert load(Denoisers(network=MLP()), data).sigma_data == round(data.deviation(), 4)
    small = scaled(1e-6)
    assert load(Denoisers(network=MLP()), small).sigma_data == small.deviation() > 0
    for factor, said in ((0.0, "0"), (float("inf"), "nan")):
        with pytest.raises(DataError, match=f"deviation of the training arrays is {said}; expected numbers that are"):
            load(Denoisers(network=MLP()), scaled(factor))
    constant = scaled(1.0)
    constant.arrays = lambda: (torch.full((99, 2), 0.1), None)  # type: ignore[method-assign]
    with pytest.raises(DataError, match="finite and not all the same"):
        load(Denoisers(network=MLP()), constant)
