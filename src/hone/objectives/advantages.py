"""What an answer's reward is compared with: the advantage of each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from hone.data.groups import CREDIT, REWARD
from hone.errors import HoneError
from hone.text.pack import Tree

Advantage = Literal["group", "centred", "leave-one-out", "batch", "raw"]
Combine = Literal["sum", "advantages"]
Earned = list[list[np.ndarray]]  # per group and answer: a number for each token (n,)
ADVANTAGE = "advantage"  # per-token value
SMALL = 1e-4  # added to a standard deviation, as in TRL


def compared(rewards: np.ndarray, how: Advantage) -> np.ndarray:
    """Return the advantage (G,) of each answer to one prompt, by itself for "batch".

    Args:
        rewards: (G,) what the answers are worth.
        how: what they are compared with.

    Raises:
        HoneError: one answer has no others to be compared with.
    """
    if how in ("raw", "batch"):
        return rewards
    if len(rewards) < 2:
        raise HoneError(f"objective.advantage: '{how}' compares answers to a prompt, and there is only one; use batch")
    if how == "leave-one-out":
        return (rewards - rewards.mean()) * len(rewards) / (len(rewards) - 1)
    centred = rewards - rewards.mean()
    found: np.ndarray = centred / (rewards.std(ddof=1) + SMALL) if how == "group" else centred
    return found


def discounted(credits: np.ndarray, discount: float = 1.0) -> np.ndarray:
    """Return what an answer earns from each token on (n,): sum_{s>=t} discount^(s-t) credit_s.

    Args:
        credits: (n,) what it earns at each token.
        discount: factor for each further token.
    """
    found, rest = np.zeros(len(credits)), 0.0
    for place in range(len(credits) - 1, -1, -1):
        rest = credits[place] + discount * rest
        found[place] = rest
    return found


def rewards_of(tree: Tree, name: str = REWARD) -> tuple[list[int], np.ndarray]:
    """Return the segments of a group's answers, and what each is worth (G,).

    Args:
        tree: a prompt with its answers.
        name: the field: of the whole reward, or of one of several.
    """
    row = np.array(tree.fields[name])
    segments = [int(place) for place in np.flatnonzero(~np.isnan(row))]
    return segments, row[segments]


def group_advantages(
    trees: Sequence[Tree],
    how: Advantage,
    combine: Combine = "sum",
    penalties: Sequence[Sequence[np.ndarray]] | None = None,
) -> list[Tree]:
    """Return groups with the value "advantage" at each token of an answer.

    Where an answer earns something before its last token, a token is credited with what comes from it on, and compared
    with the mean of what the answers to the prompt earn in all.

    Args:
        trees: groups: prompts with their answers.
        how: what rewards are compared with.
        combine: "sum", or "advantages": the mean over the rewards of the advantages that each gives by itself.
        penalties: per tree and segment (n,) what is taken off each token's credit, and off that of each reward where
            they are compared each by itself.

    Raises:
        HoneError: rewards that are compared each by itself credit parts of an answer.
    """
    segments = [rewards_of(tree)[0] for tree in trees]
    earned = [_credits(trees, segments)] if combine == "sum" else _each_reward(trees, segments)
    found = [_compared_in_phase(_less(one, segments, penalties), how) for one in earned]
    return [
        _with_advantages(tree, own, [np.mean(rows, axis=0) for rows in zip(*each, strict=True)])
        for tree, own, *each in zip(trees, segments, *found, strict=True)
    ]


def _credits(trees: Sequence[Tree], segments: Sequence[list[int]]) -> Earned:
    """Return what answers earn by all rewards."""
    return [[tree.values[CREDIT][s] for s in own] for tree, own in zip(trees, segments, strict=True)]


def _each_reward(trees: Sequence[Tree], segments: Sequence[list[int]]) -> list[Earned]:
    """Return what answers earn by each of the rewards, all of it at their last tokens."""
    for tree, credits in zip(trees, _credits(trees, segments), strict=True):
        if any(credit[:-1].any() for credit in credits):
            raise HoneError(
                f"{tree.where}: a reward credits parts of an answer, and objective.combine: advantages compares what "
                "whole answers are worth by each reward; set objective.combine=sum, or take rewards of whole answers"
            )
    names = sorted({name for tree in trees for name in tree.fields if name.startswith(f"{REWARD}/")})
    return [
        [
            [np.append(np.zeros(len(tree.tokens[s]) - 1), tree.fields[name][s]) for s in own]
            for tree, own in zip(trees, segments, strict=True)
        ]
        for name in names
    ]


def _less(earned: Earned, segments: Sequence[list[int]], penalties: Sequence[Sequence[np.ndarray]] | None) -> Earned:
    """Return what answers earn less what is taken off it."""
    if penalties is None:
        return earned
    return [
        [credit - taken[s] for s, credit in zip(own, credits, strict=True)]
        for own, credits, taken in zip(segments, earned, penalties, strict=True)
    ]


def _compared_in_phase(earned: Earned, how: Advantage) -> Earned:
    """Return the advantage of each token of each answer of a phase."""
    found = [_by_token(credits, how) for credits in earned]
    return _whitened(found) if how == "batch" else found


def _by_token(earned: list[np.ndarray], how: Advantage) -> list[np.ndarray]:
    """Return the advantage of each token of each answer to a prompt.

    An answer's first token stands for all of it: its advantage is that of the whole. Later ones are less what the
    answer has earned before them, in the same measure; see `_later`.
    """
    returns = [discounted(credit) for credit in earned]
    whole = np.array([each[0] for each in returns])
    compared_whole = compared(whole, how)
    later = _later(returns, float(whole.std(ddof=1))) if how == "group" else [each - each[0] for each in returns]
    return [a + rest for a, rest in zip(compared_whole, later, strict=True)]


def _later(returns: list[np.ndarray], spread: float) -> list[np.ndarray]:
    """Return how much less than the whole of an answer comes from each token on (n,), in units of a spread.

    Answers that are worth the same in all have no spread, and may earn it at different places: the unit is never less
    than the largest of the numbers themselves, so that none is beyond -1 or 1 where it is not so by a real spread.
    """
    less = [each - each[0] for each in returns]
    unit = max(spread, *(float(np.abs(one).max()) for one in less)) + SMALL
    return [one / unit for one in less]


def _whitened(found: Earned) -> Earned:
    """Return advantages less their mean over the answers of a phase, in units of their standard deviation."""
    firsts = np.array([each[0] for parts in found for each in parts])
    mean, spread = firsts.mean(), float(firsts.std(ddof=1)) if len(firsts) > 1 else 0.0
    later = iter(_later([each for parts in found for each in parts], spread))
    return [[(each[0] - mean) / (spread + SMALL) + next(later) for each in parts] for parts in found]


def _with_advantages(tree: Tree, segments: list[int], parts: list[np.ndarray]) -> Tree:
    rows = [np.zeros(len(tokens)) for tokens in tree.tokens]
    for segment, part in zip(segments, parts, strict=True):
        rows[segment] = part
    return replace(tree, values={**tree.values, ADVANTAGE: tuple(rows)})


def generalised(credits: np.ndarray, values: np.ndarray, discount: float, trace: float) -> np.ndarray:
    """Return the generalised advantage estimate at each token of an answer (n,).

    A_t = sum_{s>=t} (discount trace)^(s-t) [credit_s + discount V_{s+1} - V_s],  V behind the last token being 0

    Args:
        credits: (n,) what the answer earns at each token.
        values: (n,) V before each token is written.
        discount: factor for each further token.
        trace: how far estimates look ahead: 0 one token, 1 to the end.
    """
    following = np.append(values[1:], 0.0)
    return discounted(credits + discount * following - values, discount * trace)
