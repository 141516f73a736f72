"""What answers are compared with: their parts, whole phases, and groups that earn the same in other places."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hone.data.groups import CREDIT
from hone.objectives.advantages import ADVANTAGE, discounted, group_advantages, rewards_of
from hone.text.pack import Tree
from oracles.test_policy import group, groups


def test_credit_for_parts_counts_from_where_it_is_earned() -> None:
    (tree,) = group_advantages([group(0, (3, 3))], "centred")
    credit = tree.values[CREDIT]
    credit[1][:], credit[2][:] = [0.5, 0.0, 1.0], [0.0, 0.0, 0.5]
    (tree,) = group_advantages([tree], "centred")
    assert tree.values[ADVANTAGE][1].tolist() == [0.5, 0.0, 0.0]  # 1.5 - 1, less what was earned before
    assert tree.values[ADVANTAGE][2].tolist() == [-0.5, -0.5, -0.5]
    assert discounted(np.array([1.0, 2.0, 4.0]), 0.5).tolist() == [3.0, 4.0, 4.0]


def earning(*credits: list[float]) -> Tree:
    """Return a group whose answers earn so much at each token."""
    tree = group(0, tuple(len(credit) for credit in credits))
    for place, credit in enumerate(credits, start=1):
        tree.values[CREDIT][place][:] = credit
    return tree


@pytest.mark.parametrize("how", ["group", "batch"])
@pytest.mark.parametrize("more", [0.0, 1e-3], ids=["the same", "nearly the same"])
def test_answers_of_one_worth_that_earn_it_in_parts_are_not_blown_up(how: Any, more: float) -> None:
    (tree,) = group_advantages([earning([1.0, 0.0, 1.0], [0.5, 1.5 + more, 0.0])], how)
    found = np.concatenate([tree.values[ADVANTAGE][1], tree.values[ADVANTAGE][2]])
    assert np.abs(found).max() < 1.75
    np.testing.assert_allclose(tree.values[ADVANTAGE][1][1:] - tree.values[ADVANTAGE][1][0], -1 / (2 + 1e-4), rtol=1e-3)


def test_parts_are_measured_by_the_spread_of_the_group_where_that_is_larger() -> None:
    (tree,) = group_advantages([earning([0.1, 4.0], [0.0, 0.0])], "group")
    spread = np.array([4.1, 0.0]).std(ddof=1) + 1e-4
    first, later = tree.values[ADVANTAGE][1]
    np.testing.assert_allclose([first, later - first], [2.05 / spread, -0.1 / spread], rtol=1e-12)


def test_whole_phase_is_the_measure_of_batch_advantages() -> None:
    made = group_advantages(groups(), "batch")
    rewards = np.concatenate([rewards_of(tree)[1] for tree in made])
    found = [tree.values[ADVANTAGE][s][0] for tree in made for s in rewards_of(tree)[0]]
    np.testing.assert_allclose(found, (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4), rtol=1e-12)
