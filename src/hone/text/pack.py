"""The packed tree: the one batch form of all language-model work.

A batch is a flat row of T tokens cut into S segments; a segment may have a parent. A token attends causally inside its
own segment and to its chain of parents, and to nothing else. Plain packing is a forest of roots, a preference pair is a
prompt with two children, a group of rollouts is a prompt with G children. The shared part is computed once.

    tokens (T,)   positions (T,)   starts (S+1,)   parents (S,) or -1   weights (T,)
    + per-segment fields (S,) + per-token values (T,)

`weights[t]` is the weight of *predicting* token t from what precedes it on its chain. The first token of a child is
predicted from the last token of its parent; the first token of a root is predicted from nothing and weighs 0.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

CHOSEN = "chosen"  # per-segment field: 1 for a preferred answer, 0 for a rejected one, NaN elsewhere
CLASS = "class"  # per-segment field of texts and words whose class is told: its number
SCORE = "score"  # per-segment field of ranked answers: the higher the better, NaN elsewhere


@dataclass(frozen=True)
class Tree:
    """One rendered sample, before packing.

    Args:
        tokens: one int32 array of token ids per segment, parents before children, none empty.
        weights: one float32 array per segment, the same lengths; the weight of predicting each token.
        parents: per segment the index of its parent segment, -1 for a root.
        fields: per-segment numbers by name, e.g. {"reward": [0, 1, 0]}; NaN where a segment has none.
        where: "file:line" of the sample, for messages.
        values: per-token numbers by name, e.g. the log-probabilities that a sampler had: one float array per segment.
    """

    tokens: tuple[np.ndarray, ...]
    weights: tuple[np.ndarray, ...]
    parents: tuple[int, ...]
    fields: dict[str, tuple[float, ...]] = field(default_factory=dict)
    where: str = ""
    values: dict[str, tuple[np.ndarray, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return the number of tokens over all segments."""
        return sum(len(segment) for segment in self.tokens)

    @property
    def trained(self) -> int:
        """Number of tokens with a non-zero weight."""
        return int(sum(np.count_nonzero(w) for w in self.weights))


@dataclass(frozen=True)
class Packed:
    """A batch: the packed forest described at the top of this module.

    Args:
        tokens: (T,) int64 token ids.
        positions: (T,) int64 distance from the root's first token along the chain.
        starts: (S+1,) int64, segment s is tokens[starts[s]:starts[s+1]]; kept on the CPU.
        parents: (S,) int64 index of the parent segment, always smaller than s; -1 for a root; kept on the CPU.
        weights: (T,) float32 weight of predicting each token; 0 at the first token of every root.
        fields: (S,) float32 per-segment numbers by name.
        where: per tree the "file:line" it came from, for messages.
        trees: (S,) int64 number of the tree that each segment belongs to; kept on the CPU. Empty where nobody needs it.
        two_way: (S,) boolean, whether the tokens of a segment see each other in both directions; kept on the CPU. A
            marked segment whose marked parent has no other child forms one block with it. None where all are causal.
        two_way_layers: the layers in which that holds; None for all of them.
        values: (T,) float64 per-token numbers by name, 0 in trees that have none.
    """

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    parents: Tensor
    weights: Tensor
    fields: dict[str, Tensor] = field(default_factory=dict)
    where: tuple[str, ...] = ()
    trees: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    two_way: Tensor | None = None
    two_way_layers: frozenset[int] | None = None
    values: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        """Return T, the number of tokens."""
        return int(self.tokens.shape[0])

    @property
    def segments(self) -> int:
        """S, the number of segments."""
        return int(self.parents.shape[0])

    @cached_property
    def previous(self) -> Tensor:
        """(T,) index of the token whose hidden state predicts token t; -1 at the first token of a root."""
        before = torch.arange(-1, len(self) - 1)
        first = self.starts[:-1]
        last_of_parent = torch.where(self.parents >= 0, self.starts[self.parents + 1] - 1, -1)
        before[first] = last_of_parent
        return before.to(self.tokens.device)

    def chain(self, segment: int) -> list[int]:
        """Return the segments from the root down to and including `segment`."""
        path = [segment]
        while (parent := int(self.parents[path[-1]])) >= 0:
            path.append(parent)
        return path[::-1]

    def to(self, device: torch.device | str) -> Packed:
        """Return the batch with its token-sized tensors and fields on `device`."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            positions=self.positions.to(device),
            weights=self.weights.to(device),
            fields={name: value.to(device) for name, value in self.fields.items()},
            values={name: _moved(value, device) for name, value in self.values.items()},
        )


def _moved(value: Tensor, device: torch.device | str) -> Tensor:
    """Return per-token numbers on a device, in single precision where it has no other (MPS)."""
    return (value.float() if torch.device(device).type == "mps" else value).to(device)


def pack(trees: Sequence[Tree]) -> Packed:
    """Concatenate trees into one packed forest.

    Args:
        trees: at least one tree; per-segment fields absent from some trees are NaN there, per-token values 0.

    Returns:
        The batch on the CPU. Segments keep the order of the trees, so a parent always precedes its children.

    Raises:
        ValueError: a tree has an empty segment, or a parent that does not precede its child.
    """
    names = sorted({name for tree in trees for name in tree.fields})
    tokens: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    parents: list[int] = []
    fields: dict[str, list[float]] = {name: [] for name in names}
    for tree in trees:
        offset, ends = len(parents), list[int]()
        for index, (segment, weight, parent) in enumerate(zip(tree.tokens, tree.weights, tree.parents, strict=True)):
            if len(segment) == 0 or len(segment) != len(weight) or not -1 <= parent < index:
                raise ValueError(f"{tree.where or 'tree'}: segment {index} is empty, mis-sized or before its parent")
            begin = ends[parent] if parent >= 0 else 0
            ends.append(begin + len(segment))
            tokens.append(segment)
            weights.append(weight if parent >= 0 else np.concatenate([[0.0], weight[1:]]))
            positions.append(np.arange(begin, ends[-1]))
            parents.append(parent + offset if parent >= 0 else -1)
        for name in names:
            fields[name].extend(tree.fields.get(name, (float("nan"),) * len(tree.tokens)))
    lengths = [0, *(len(segment) for segment in tokens)]
    return Packed(
        tokens=torch.from_numpy(np.concatenate(tokens).astype(np.int64)),
        positions=torch.from_numpy(np.concatenate(positions).astype(np.int64)),
        starts=torch.from_numpy(np.cumsum(lengths).astype(np.int64)),
        parents=torch.tensor(parents, dtype=torch.int64),
        weights=torch.from_numpy(np.concatenate(weights).astype(np.float32)),
        fields={name: torch.tensor(values, dtype=torch.float32) for name, values in fields.items()},
        where=tuple(tree.where for tree in trees),
        trees=torch.tensor([n for n, tree in enumerate(trees) for _ in tree.tokens], dtype=torch.int64),
        values={name: _values(trees, name) for name in sorted({name for tree in trees for name in tree.values})},
    )


def _values(trees: Sequence[Tree], name: str) -> Tensor:
    """Return the (T,) per-token numbers of a name."""
    parts = [np.concatenate(tree.values.get(name, (np.zeros(len(tree)),))) for tree in trees]
    return torch.from_numpy(np.concatenate(parts).astype(np.float64))


def seen_both_ways(batch: Packed, layers: Collection[int] | None = None) -> Packed:
    """Return a batch in which every token sees all of its own segment: attention without the causal mask.

    Args:
        batch: packed forest of T tokens.
        layers: in these layers alone; None for all.
    """
    chosen = None if layers is None else frozenset(layers)
    return replace(batch, two_way=torch.ones(batch.segments, dtype=torch.bool), two_way_layers=chosen)


def as_prefixes(batch: Packed) -> Packed:
    """Return a batch whose prompts see themselves in both directions: the attention of a prefix language model.

    A root is cut before its first trained token; what stands before it is the prefix, a segment of its own. Roots
    without a trained token, such as the prompt of a preference pair, are prefixes as a whole.

    Args:
        batch: packed forest of T tokens, whose trees are kept apart by `trees`.
    """
    weights, starts = batch.weights.cpu(), batch.starts.tolist()
    places: list[int] = []  # of each old segment's last part among the new ones
    begins: list[int] = []
    parents: list[int] = []
    marked: list[bool] = []
    kept: list[int] = []  # the old segment of each new one, for the fields
    for index, parent in enumerate(batch.parents.tolist()):
        begin, end = starts[index], starts[index + 1]
        own = weights[begin:end].nonzero()
        cut = begin + int(own[0]) if len(own) else end
        ends = [cut] if parent < 0 and begin < cut < end else []
        for number, first in enumerate([begin, *ends]):
            begins.append(first)
            parents.append(len(begins) - 2 if number else (places[parent] if parent >= 0 else -1))
            marked.append(parent < 0 and number == 0 and cut > begin)
            kept.append(index)
        places.append(len(begins) - 1)
    picked = torch.tensor(kept)
    return replace(
        batch, starts=torch.tensor([*begins, starts[-1]]), parents=torch.tensor(parents),
        fields={name: value[picked.to(value.device)] for name, value in batch.fields.items()},
        trees=batch.trees[picked] if len(batch.trees) else batch.trees, two_way=torch.tensor(marked),
    )  # fmt: skip


def some_segments(tree: Tree, kept: Sequence[int]) -> Tree:
    """Return a tree with some of its segments alone.

    Args:
        tree: a tree.
        kept: ascending numbers of the segments; the parent of each is among them.
    """
    places = {-1: -1, **{segment: place for place, segment in enumerate(kept)}}
    return replace(
        tree, tokens=tuple(tree.tokens[s] for s in kept), weights=tuple(tree.weights[s] for s in kept),
        parents=tuple(places[tree.parents[s]] for s in kept),
        fields={name: tuple(row[s] for s in kept) for name, row in tree.fields.items()},
        values={name: tuple(row[s] for s in kept) for name, row in tree.values.items()},
    )  # fmt: skip


def divide(trees: Sequence[Tree], limit: int, parts: int = 1) -> list[list[Tree]]:
    """Divide the trees of one step into micro-batches of at most `limit` tokens, a multiple of `parts` of them.

    Trees are placed longest first into the emptiest micro-batch, so that ranks and micro-batches take equal time.
    The division never changes a gradient: losses are sums, normalised over the whole step.

    Args:
        trees: the trees of one optimizer step.
        limit: most tokens in one forward pass; a single longer tree still gets a micro-batch of its own.
        parts: the count is a multiple of this (the number of processes); of several, some may be empty when trees are
            few.
    """
    total = sum(len(tree) for tree in trees)
    longest = max((len(tree) for tree in trees), default=0)
    count = max(1, min(-(-total // limit), len(trees)))  # of a tree longer than the limit there is nothing to divide
    ordered, most = sorted(trees, key=len, reverse=True), max(limit, longest)
    if count == parts == 1:
        return [ordered]
    count = max(count, _fewest([len(tree) for tree in ordered], most))
    while True:
        count = -(-count // parts) * parts
        bins: list[list[Tree]] = [[] for _ in range(count)]
        loads = [(0, slot) for slot in range(count)]
        for tree in ordered:
            load, slot = loads[0]
            bins[slot].append(tree)
            heapq.heapreplace(loads, (load + len(tree), slot))
        if max(loads)[0] <= most or count >= len(trees):
            return bins
        count += max(1, count // 128)  # one by one, 10,000 trees of 0.25 to 0.6 of the limit took 27 s, so 1.6 s


def _fewest(lengths: Sequence[int], most: int) -> int:
    """Return a number of micro-batches that trees need at the least: of those above most / (k + 1), k go into one.

    Args:
        lengths: tokens of the trees, longest first.
        most: tokens of a micro-batch.
    """
    found = above = 0
    for together in range(1, 9):  # of shorter ones a micro-batch takes so many that their sum says enough
        while above < len(lengths) and lengths[above] * (together + 1) > most:
            above += 1
        found = max(found, -(-above // together))
    return found
