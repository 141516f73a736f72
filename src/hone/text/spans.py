"""Spans of a text that are taken out of it, and the two parts that are left: input and target of denoising."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def span_mask(length: int, rate: float, span: float, rng: np.random.Generator, *, roll: bool = False) -> np.ndarray:
    """Return which tokens of a text are taken out, as spans at random places: T5's mask, (length,) boolean.

    n = round(rate length) tokens, at least 1 and not all, go out in round(n / span) spans, at least 1. Lengths of the
    spans, and of the stretches between them, are uniform over all ways to divide n, and the rest, into so many parts.
    The text begins with a stretch that stays and ends with a span. Of one token nothing is taken out.

    Args:
        length: tokens of the text.
        rate: share of the tokens that is taken out.
        span: mean length of a span in tokens.
        rng: draws.
        roll: move the mask round by a random distance, so that no place of the text has a part of its own.
    """
    if length < 2:
        return np.zeros(length, bool)
    out = min(max(round(length * rate), 1), length - 1)
    spans = min(max(round(out / span), 1), length - out)
    stretches = np.stack([_divided(length - out, spans, rng), _divided(out, spans, rng)], axis=1)
    mask = np.tile([False, True], spans).repeat(stretches.ravel())
    return np.roll(mask, int(rng.integers(length))) if roll else mask


def _divided(items: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """Return the sizes (parts,) of a division of items into parts that are not empty, all divisions equally likely."""
    cuts = np.sort(rng.choice(items - 1, parts - 1, replace=False)) + 1
    return np.diff(cuts, prepend=0, append=items)


def corrupt(tokens: np.ndarray, mask: np.ndarray, sentinels: Sequence[int]) -> tuple[np.ndarray, ...]:
    """Return (input, target, own) of a text from which spans are taken out; every token stands in one of the first two.

    Sentinels are used in order, and again from the first where there are more spans; since input and target name them
    in the same order, the text can be put together again in any case.

    Args:
        tokens: (n,) the text.
        mask: (n,) which of its tokens are taken out.
        sentinels: ids of the sentinels.

    Returns:
        The input, the target, and which tokens of the target are the text's own.
    """
    edges = np.diff(mask.astype(np.int8), prepend=0, append=0)
    kept: list[np.ndarray] = [tokens[:0]]
    target: list[np.ndarray] = [tokens[:0]]
    begin = 0
    for number, (first, last) in enumerate(zip(np.flatnonzero(edges > 0), np.flatnonzero(edges < 0), strict=True)):
        sentinel = np.array([sentinels[number % len(sentinels)]], tokens.dtype)
        kept += [tokens[begin:first], sentinel]
        target += [sentinel, tokens[first:last]]
        begin = int(last)
    own = [np.full(len(piece), place % 2 == 0) for place, piece in enumerate(target)]
    return np.concatenate([*kept, tokens[begin:]]), np.concatenate(target), np.concatenate(own)
