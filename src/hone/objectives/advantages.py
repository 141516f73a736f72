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
    trees: Sequence[Tree], how: Advantage, combine: Combine = "sum", penalties: Sequence[np.ndarray] | None = None
) -> list[Tree]:
    """Return groups with the value "advantage" at each token of an answer.

    Where an answer earns something before its last token, a token is credited with what comes from it on, and compared
    with the mean of what the answers to the prompt earn in all.

    Args:
        trees: groups: prompts with their answers.
        how: what rewards are compared with.
        combine: "sum", or "advantages": the mean over the rewards of the advantages that each gives by itself.
        penalties: per tree (T,) what is taken off each token's credit.
    """
    found: list[tuple[Tree, list[int], list[np.ndarray]]] = []
    for number, tree in enumerate(trees):
        segments, _ = rewards_of(tree)
        if combine == "advantages":
            names = sorted(name for name in tree.fields if name.startswith(f"{REWARD}/"))
            worth = np.mean([compared(rewards_of(tree, name)[1], how) for name in names], axis=0)
            found.append(
                (tree, segments, [np.full(len(tree.tokens[s]), a) for s, a in zip(segments, worth, strict=True)])
            )
            continue
        taken = (
            None if penalties is None else np.split(penalties[number], np.cumsum([len(t) for t in tree.tokens])[:-1])
        )
        earned = [tree.values[CREDIT][s] - (0.0 if taken is None else taken[s]) for s in segments]
        found.append((tree, segments, _by_token(earned, how)))
    if how == "batch":
        found = _whitened(found)
    return [_with_advantages(*one) for one in found]


def _by_token(earned: list[np.ndarray], how: Advantage) -> list[np.ndarray]:
    """Return the advantage of each token of each answer to a prompt.

    An answer's first token stands for all of it: its advantage is that of the whole. Later ones are less what the
    answer has earned before them, in the same measure.
    """
    returns = [discounted(credit) for credit in earned]
    whole = np.array([each[0] for each in returns])
    compared_whole = compared(whole, how)
    spread = whole.std(ddof=1) + SMALL if how == "group" else 1.0
    return [a + (each - each[0]) / spread for a, each in zip(compared_whole, returns, strict=True)]


def _whitened(
    found: list[tuple[Tree, list[int], list[np.ndarray]]],
) -> list[tuple[Tree, list[int], list[np.ndarray]]]:
    """Return advantages less their mean over the answers of a phase, in units of their standard deviation."""
    firsts = np.array([each[0] for _, _, parts in found for each in parts])
    mean, spread = firsts.mean(), (firsts.std(ddof=1) if len(firsts) > 1 else 0.0) + SMALL
    return [(tree, segments, [(each - mean) / spread for each in parts]) for tree, segments, parts in found]


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
