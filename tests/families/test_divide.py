"""Dividing a step into micro-batches: as few as the placing allows, found without trying every number."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hone.text.pack import Tree, divide


def trees_of(lengths: list[int]) -> list[Tree]:
    """Return trees of some lengths, each with its place as its name."""
    return [
        Tree((np.zeros(length, np.int32),), (np.ones(length, np.float32),), (-1,), where=str(place))
        for place, length in enumerate(lengths)
    ]


def one_by_one(lengths: list[int], limit: int, parts: int) -> list[list[int]]:
    """Return the division of trees by trying one micro-batch more after another."""
    count = max(1, min(-(-sum(lengths) // limit), len(lengths)))
    while True:
        count = -(-count // parts) * parts
        bins: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for tree in sorted(range(len(lengths)), key=lambda tree: -lengths[tree]):
            slot = loads.index(min(loads))
            bins[slot].append(tree)
            loads[slot] += lengths[tree]
        if max(loads) <= max(limit, *lengths) or count >= len(lengths):
            return bins
        count += 1


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 60), st.integers(1, 4))
def test_no_number_of_micro_batches_is_passed_over(lengths: list[int], limit: int, parts: int) -> None:
    made = [[int(tree.where) for tree in part] for part in divide(trees_of(lengths), limit, parts)]
    assert made == one_by_one(lengths, limit, parts)


@pytest.mark.parametrize(("sizes", "most"), [((2049, 2060), 1000), ((1366, 2048), 500), ((1024, 2457), 520)])
def test_a_thousand_trees_that_hardly_fit_together_are_divided_at_once(sizes: tuple[int, int], most: int) -> None:
    drawn = np.random.default_rng(0).integers(*sizes, 1000, endpoint=True).tolist()
    began = time.process_time()
    parts = divide(trees_of(drawn), 4096)
    assert time.process_time() - began < 2  # it took 13 s for those just above half the limit
    assert len(parts) <= most and max(sum(len(tree) for tree in part) for part in parts) <= 4096
    assert sum(len(part) for part in parts) == 1000
