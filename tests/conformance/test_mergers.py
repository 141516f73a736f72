"""Every registered merger: equal models, order, type, shape, single models and determinism."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from hone.errors import HoneError
from hone.parts import catalogue, load

RECORDS = {record.name: record for record in catalogue() if record.kind == "merger"}
# Options to test beside the defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "task-arithmetic": [{"scale": 0.4}, {"drop": 0.5}],
    "ties": [{"density": 1.0}, {"density": 1.0, "drop": 0.5}],
}
IN_ORDER = ("slerp",)  # goes from the first to the second
PAIRS_ALONE = ("slerp",)
CASES = [(name, options) for name in RECORDS for options in ({}, *VARIANTS.get(name, []))]
every_merger = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n} {' '.join(f'{k}={v}' for k, v in o.items())}".strip() for n, o in CASES]
)


def models(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """Return the base's tensor and those of models trained from it."""
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    changes = 0.1 * torch.randn(count, 6, 5, generator=generator, dtype=torch.float64)
    return base.to(dtype), [(base + change).to(dtype) for change in changes]


@every_merger
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_shape_and_type_are_kept_and_nothing_is_changed_in_place(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    base, tensors = models(2, dtype)
    before = [tensor.clone() for tensor in (base, *tensors)]
    merged = load("merger", name)(**options).merge("layer.weight", base, tensors)
    assert merged.shape == base.shape and merged.dtype == dtype and torch.isfinite(merged).all()
    assert all(torch.equal(tensor, kept) for tensor, kept in zip((base, *tensors), before, strict=True))


@every_merger
def test_models_equal_to_the_base_give_the_base(name: str, options: dict[str, Any]) -> None:
    base, _ = models(2)
    assert torch.equal(load("merger", name)(**options).merge("layer.weight", base, [base.clone(), base.clone()]), base)


@every_merger
def test_equal_models_give_one_of_them_where_no_changes_are_added_up(name: str, options: dict[str, Any]) -> None:
    merger = load("merger", name)(**options)
    base, (one, _) = models(2)
    merged = merger.merge("layer.weight", base, [one.clone(), one.clone()])
    if not merger.needs_base:
        assert torch.equal(merged, one)
    elif name == "ties" and options == {"density": 1.0}:  # the mean of what agrees
        torch.testing.assert_close(merged, one)
    else:
        assert not torch.equal(merged, one)


@every_merger
def test_the_order_of_the_models_does_not_matter(name: str, options: dict[str, Any]) -> None:
    if name in IN_ORDER or options.get("drop"):
        pytest.skip("a model's place is part of the method")
    base, tensors = models(3)
    merger = load("merger", name)(**options)
    first = merger.merge("layer.weight", base, tensors)
    for order in permutations(tensors):
        torch.testing.assert_close(merger.merge("layer.weight", base, list(order)), first, rtol=1e-6, atol=1e-6)


@every_merger
def test_it_is_deterministic_whatever_was_drawn_before(name: str, options: dict[str, Any]) -> None:
    base, tensors = models(2)
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(load("merger", name)(**options).merge("layer.weight", base, tensors))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(*found)


@every_merger
def test_a_single_model_is_taken_or_refused(name: str, options: dict[str, Any]) -> None:
    merger = load("merger", name)(**options)
    with pytest.raises(HoneError, match=r"no model to merge|takes two of them"):
        merger.check_count(0)
    if name in PAIRS_ALONE:
        with pytest.raises(HoneError, match="takes two of them, got 1"):
            merger.check_count(1)
        return
    merger.check_count(1)
    base, (one,) = models(1)
    merged = merger.merge("layer.weight", base, [one])
    if not options and not merger.needs_base:
        assert torch.equal(merged, one)
    assert merged.shape == one.shape


@every_merger
def test_a_scalar_and_an_empty_change_are_merged(name: str, options: dict[str, Any]) -> None:
    merged = load("merger", name)(**options).merge("scale", torch.tensor(1.0), [torch.tensor(1.0), torch.tensor(1.5)])
    assert merged.shape == () and torch.isfinite(merged)


def test_variants_name_what_exists() -> None:
    assert set(VARIANTS) | set(IN_ORDER) | set(PAIRS_ALONE) <= set(RECORDS)
