"""Every schedule of the catalogue: finite, never negative, rising through the warmup and ending at its floor."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hone import options, parts

NAMES = [record.name for record in parts.catalogue() if record.kind == "schedule"]
VARIANTS: dict[str, list[dict[str, Any]]] = {  # beside the defaults: one per value of every axis
    "cosine": [{"cycles": 3}, {"cycles": 4, "growth": 2.0}],
    "wsd": [{"shape": "linear"}, {"shape": "cosine"}, {"decay": 7}, {"decay": 0.0}, {"decay": 10_000}],
}
SPECS = [{"name": name, **more} for name in NAMES for more in [{}, *VARIANTS.get(name, [])]]


def build(spec: dict[str, Any], **more: Any) -> Any:
    """Build a schedule; options that the part does not have are left out."""
    known = options.hints(parts.load("schedule", spec["name"]))
    return options.build_part("schedule", {**spec, **{k: v for k, v in more.items() if k in known}})


def factors(schedule: Any, total: int) -> list[float]:
    return [schedule.factor(step, total) for step in range(total + 1)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@settings(max_examples=40, deadline=None)
@given(total=st.integers(1, 400), warmup=st.one_of(st.floats(0, 0.99), st.integers(1, 500)), floor=st.floats(0, 1))
def test_factors_stay_between_zero_and_one_and_end_at_the_floor(
    spec: dict[str, Any], total: int, warmup: float, floor: float
) -> None:
    schedule = build(spec, warmup=warmup, floor=floor)
    found = factors(schedule, total)
    assert all(math.isfinite(f) and 0 <= f <= 1 + 1e-12 for f in found)
    assert all(f > 0 for f in found[:-1])  # no step is spent on a rate of zero
    assert found[-1] == getattr(schedule, "floor", 1.0)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.1, 10), (0.25, 25), (1, 1), (30, 30), (1000, 100)])
def test_the_warmup_rises_evenly_to_one(spec: dict[str, Any], warmup: float, steps: int) -> None:
    found = factors(build(spec, warmup=warmup, floor=0.1), 100)
    rise = max(warmup, steps)
    assert found[:steps] == pytest.approx([(s + 1) / rise for s in range(steps)])
    if steps < 100:
        assert found[steps] == 1.0


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_run_of_one_step_trains_at_the_full_rate(spec: dict[str, Any]) -> None:
    assert build(spec, warmup=0.05).factor(0, 1) == 1.0


@pytest.mark.parametrize("name", NAMES)
def test_after_the_warmup_the_rate_never_rises(name: str) -> None:
    found = factors(build({"name": name}, warmup=20, floor=0.05), 200)[19:]
    assert all(later <= earlier for earlier, later in itertools.pairwise(found))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_lengths_that_mean_nothing_are_problems_of_the_recipe(name: str, value: float) -> None:
    (problem,) = options.check_part("schedule", {"name": name, "warmup": value}, "schedule", options.Places())
    assert problem.field == "schedule.warmup"


def test_wsd_checks_its_decay_too() -> None:
    (problem,) = options.check_part("schedule", {"name": "wsd", "decay": 10.5}, "schedule", options.Places())
    assert problem.field == "schedule.decay"


def test_wsd_is_flat_between_warmup_and_decay() -> None:
    found = factors(build({"name": "wsd", "warmup": 10, "decay": 0.3}), 100)
    assert found[9:71] == [1.0] * 62
    assert found[71] < 1.0


def test_cosine_restarts_at_the_full_rate() -> None:
    found = factors(build({"name": "cosine", "cycles": 3, "growth": 2.0}), 70)
    assert [step for step, factor in enumerate(found) if factor == 1.0] == [0, 10, 30]
