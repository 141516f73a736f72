"""What happens to a sample that is longer than the window, and the count of every such mishap.

A sample is too long when a chain of its tree, root to leaf, has more than `max_tokens` tokens. Whatever is done about
it, the trained part is looked at again afterwards: a sample whose trained part is gone is dropped and counted, never
trained on in silence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from hone.data.source import Overlong
from hone.errors import DataError
from hone.text.pack import CHOSEN, CLASS, SCORE, Tree

_NUMBERS = ("samples", "kept", "truncated", "split", "dropped", "nothing_trained", "masked", "tokens", "trained_tokens")
_MISHAPS = {
    "truncated": "cut to max_tokens",
    "split": "split into windows of max_tokens",
    "dropped": "dropped for being longer than max_tokens",
    "nothing_trained": "dropped because nothing in them is trained",
}
_EXAMPLES = 3
_REACHED = "value"  # per-segment field of steps: what is reached by the end of one


@dataclass
class Counts:
    """What became of the samples of a data set. Counts add up with `+`; `dataclasses.asdict` makes them JSON.

    Every sample is either kept, dropped or has nothing trained, so those three sum to `samples`.

    Args:
        samples: samples read.
        kept: samples of which at least one tree is used.
        truncated: kept samples whose end was cut off.
        split: kept samples that were divided into windows.
        dropped: samples left out for being too long.
        nothing_trained: samples left out because no trained token is in them, or is left in the window.
        masked: those of `nothing_trained` that had no trained token even before they were fitted.
        tokens: tokens of the kept trees.
        trained_tokens: tokens of the kept trees that are predicted with a non-zero weight.
        examples: by mishap, the places of its first three samples.
    """

    samples: int = 0
    kept: int = 0
    truncated: int = 0
    split: int = 0
    dropped: int = 0
    nothing_trained: int = 0
    masked: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    examples: dict[str, list[str]] = field(default_factory=dict)

    def __add__(self, other: Counts) -> Counts:
        """Return the counts of both, with the earliest examples."""
        examples = {
            name: [*self.examples.get(name, ()), *other.examples.get(name, ())][:_EXAMPLES]
            for name in {**self.examples, **other.examples}
        }
        return Counts(examples=examples, **{name: getattr(self, name) + getattr(other, name) for name in _NUMBERS})

    def describe(self) -> str:
        """Return one sentence for people."""
        all_kept = self.kept == self.samples
        parts = [
            f"{self.samples:,} samples, {'all' if all_kept else f'{self.kept:,}'} kept: "
            f"{self.tokens:,} tokens" + (f", {self.trained_tokens:,} of them trained" if self.trained_tokens else "")
        ]
        for name, text in _MISHAPS.items():
            if count := getattr(self, name):
                parts.append(f"{count:,} {text}{_such_as(self.examples.get(name, ()))}")
        return "; ".join(parts)

    def require_kept(self, max_tokens: int) -> None:
        """Raise if there were samples and none of them can be trained on.

        Args:
            max_tokens: the window in tokens, for the message.

        Raises:
            DataError: with the reason, the places of a few samples, and the fix.
        """
        if self.kept or not self.samples:
            return
        reasons = []
        if self.masked:
            reasons.append(
                f"{self.masked:,} without any trained token, whatever the window: a conversation needs an assistant "
                "turn and a completion needs an answer; see what is trained with: hone check RECIPE"
            )
        if cut := self.nothing_trained - self.masked:
            reasons.append(
                f"{cut:,} whose prompt fills the window of {max_tokens} tokens, so that no answer is left in it; raise "
                "max_tokens of the data"
            )
        if self.dropped:
            reasons.append(
                f"{self.dropped:,} longer than max_tokens={max_tokens} and dropped for it; raise max_tokens of the "
                "data or set its overlong to 'truncate'"
            )
        places = [place for name in ("nothing_trained", "dropped") for place in self.examples.get(name, ())]
        raise DataError(
            f"{places[0] if places else 'data'}: not one sample of {self.samples:,} can be trained on: "
            f"{'; '.join(reasons)}{_such_as(places)}"
        )


def _such_as(places: Sequence[str]) -> str:
    return f" (such as {', '.join(places[:_EXAMPLES])})" if places else ""


def trained_tokens(tree: Tree) -> int:
    """Return how many tokens are trained; the first token of a root is predicted from nothing and never is."""
    roots = (weight for weight, parent in zip(tree.weights, tree.parents, strict=True) if parent < 0)
    return tree.trained - sum(int(np.count_nonzero(weight[:1])) for weight in roots)


def longest_chain(tree: Tree) -> int:
    """Return the tokens of the longest chain from a root to a leaf, which is what must fit the window."""
    ends: list[int] = []
    for segment, parent in zip(tree.tokens, tree.parents, strict=True):
        ends.append(len(segment) + (ends[parent] if parent >= 0 else 0))
    return max(ends)


def fit(tree: Tree, max_tokens: int, how: Overlong) -> list[Tree]:
    """Make a tree fit a window.

    Chains are cut at the right, so an answer is cut before its prompt is. A tree with several segments cannot be split,
    since an answer means nothing without its prompt: there, "split" does what "truncate" does.

    Args:
        tree: one rendered sample.
        max_tokens: length of the window, the most tokens from a root to a leaf.
        how: "truncate" cuts every chain at the window; "drop" leaves the tree out; "split" divides a single segment
            into consecutive windows, in which every token is trained as before except the first of each window.

    Returns:
        The tree itself when it fits. Else what is left of it, without pieces in which nothing is trained: none when the
        prompt alone fills the window, or when cutting made all answers to a prompt the same or left nothing of those
        that were to be compared.
    """
    if longest_chain(tree) <= max_tokens:
        return [tree]
    if how == "drop":
        return []
    if how == "split" and len(tree.tokens) == 1:
        pieces = _windows(tree, max_tokens)
    else:
        cut = _truncate(tree, max_tokens)
        useless = (_no_contrast(cut) and not _no_contrast(tree)) or (_comparable(tree) and not _comparable(cut))
        pieces = [] if useless else [cut]
    whole = CLASS in tree.fields and len(tree.tokens) == 1  # a text with a class, of which no token trains
    return [piece for piece in pieces if whole or trained_tokens(piece)]


def _windows(tree: Tree, size: int) -> list[Tree]:
    (tokens,), (weights,) = tree.tokens, tree.weights
    starts = range(0, len(tokens), size)
    return [replace(tree, tokens=(tokens[at : at + size],), weights=(weights[at : at + size],)) for at in starts]


def _truncate(tree: Tree, size: int) -> Tree:
    ends: list[int] = []
    kept: dict[int, int] = {}  # index of a segment before -> after
    tokens: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    parents: list[int] = []
    for index, (segment, weight, parent) in enumerate(zip(tree.tokens, tree.weights, tree.parents, strict=True)):
        begin = ends[parent] if parent >= 0 else 0
        ends.append(begin + len(segment))
        if begin >= size:  # its parent fills the window; so do those of its children
            continue
        kept[index] = len(tokens)
        tokens.append(segment[: size - begin])
        weights.append(weight[: size - begin])
        parents.append(kept[parent] if parent >= 0 else -1)
    fields = {name: tuple(values[index] for index in kept) for name, values in tree.fields.items()}
    if _REACHED in fields:  # a step that was cut has not reached its end
        whole = [len(tree.tokens[before]) == len(tokens[after]) for before, after in kept.items()]
        values = zip(fields[_REACHED], whole, strict=True)
        fields[_REACHED] = tuple(value if ended else float("nan") for value, ended in values)
    return replace(tree, tokens=tuple(tokens), weights=tuple(weights), parents=tuple(parents), fields=fields)


def _no_contrast(tree: Tree) -> bool:
    """Whether there are several answers to a prompt and all are the same, so that preferring one teaches nothing."""
    siblings: dict[int, list[bytes]] = {}
    for segment, parent in zip(tree.tokens, tree.parents, strict=True):
        siblings.setdefault(parent, []).append(segment.tobytes())
    several = [group for group in siblings.values() if len(group) > 1]
    return bool(several) and all(len(set(group)) == 1 for group in several)


def _comparable(tree: Tree) -> bool:
    """Whether a tree has answers of which one is said to be better than another, each with trained tokens."""
    for name in (CHOSEN, SCORE):
        worth = {v for v, w in zip(tree.fields.get(name, ()), tree.weights, strict=False) if v == v and w.any()}
        if len(worth) > 1:
            return True
    return False


def fit_sample(
    trees: Sequence[Tree], max_tokens: int, how: Overlong, *, where: str = "", trains: bool = True
) -> tuple[list[Tree], Counts]:
    """Make the trees of one sample fit a window, and count what became of it.

    Args:
        trees: what the sample was rendered to.
        max_tokens: length of the window in tokens.
        how: what to do with what is too long, see `fit`.
        where: place of the sample, for the counts' examples.
        trains: whether a tree without a trained token is useless; False keeps prompts, of which none is trained, but
            drops those that are too long, since a cut prompt asks something else.

    Returns:
        The trees to use, and the counts of this one sample.
    """
    kept: list[Tree] = []
    fates: set[str] = set()
    for tree in trees:
        if trains and not trained_tokens(tree):
            fates.add("masked")
            continue
        fitted = fit(tree, max_tokens, how)
        kept.extend(fitted)
        fates.add(_fate(tree, fitted, how))
    return kept, _count(where, kept, fates)


def _fate(tree: Tree, fitted: list[Tree], how: Overlong) -> str:
    if not fitted:
        return "dropped" if how == "drop" or not trained_tokens(tree) else "nothing_trained"
    if fitted[0] is tree:
        return "kept"
    return "split" if how == "split" and len(tree.tokens) == 1 else "truncated"


def _count(where: str, kept: list[Tree], fates: set[str]) -> Counts:
    """Return the counts of one sample, given what became of its trees."""
    if kept:
        mishap = next((name for name in ("split", "truncated") if name in fates), "")
    else:
        mishap = "dropped" if "dropped" in fates else "nothing_trained"
    counts = Counts(
        samples=1,
        kept=int(bool(kept)),
        masked=int(not kept and fates <= {"masked"}),
        tokens=sum(len(tree) for tree in kept),
        trained_tokens=sum(trained_tokens(tree) for tree in kept),
    )
    if mishap:
        setattr(counts, mishap, 1)
        counts.examples = {mishap: [where]} if where else {}
    return counts
