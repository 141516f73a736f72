"""Continuous thoughts: hidden states that go back into the network as the next input embeddings, over packed trees.

A root that thinks reads, from its place `begin` on,

    ... question  <begin>  h_1 ... h_n  <end>  rest ...

where h_j is the last hidden state at the token before it. Thoughts are computed one after another, each by one forward
pass over the roots' beginnings up to there, all roots at once; gradients flow through all of them. Neither markers nor
thoughts have ids: their embeddings are written over those of fillers by a hook on the input embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from hone.errors import ModelError
from hone.text.pack import Packed

if TYPE_CHECKING:
    from hone.text.model import LanguageModel

MARKERS = 2  # <begin> and <end>


class Written(NamedTuple):
    """Embeddings that stand in a packed row in place of its tokens' own.

    Args:
        places: (M,) indices among the batch's T tokens.
        vectors: (M, D) embeddings.
    """

    places: Tensor
    vectors: Tensor


class Insertion(NamedTuple):
    """What is changed in a root.

    Args:
        at: its tokens before this place are kept.
        thoughts: number of thoughts that follow, between the markers.
        cut: number of its own tokens from `at` on that are left out.
    """

    at: int
    thoughts: int
    cut: int = 0


@dataclass(frozen=True)
class Thinking:
    """A packed forest in which roots think.

    Args:
        batch: with fillers, of weight 0, where markers and thoughts stand.
        begins: (R,) index of the begin marker in each root that thinks.
        counts: (R,) its number of thoughts; on the CPU.
    """

    batch: Packed
    begins: Tensor
    counts: Tensor


def make_room(batch: Packed, insertions: dict[int, Insertion]) -> Thinking:
    """Return a forest with room for markers and thoughts in some of its roots.

    Args:
        batch: packed forest of T tokens.
        insertions: by segment, each a root, what is changed in it; `at` is at least 1.
    """
    starts, parents = batch.starts.tolist(), batch.parents.tolist()
    old: list[Tensor] = []  # per segment the old index of each new token, a filler being the token before it
    new: list[Tensor] = []  # whether it is a filler
    first: list[int] = []  # per segment the position of its first token
    begins, counts, ends, total = list[int](), list[int](), list[int](), 0
    for segment, parent in enumerate(parents):
        begin, end = starts[segment], starts[segment + 1]
        at, thoughts, cut = insertions.get(segment, Insertion(end - begin, -MARKERS))
        fillers = thoughts + MARKERS
        if fillers:
            begins.append(total + at)
            counts.append(thoughts)
        old += [torch.arange(begin, begin + at), torch.full((fillers,), begin + at - 1),
                torch.arange(begin + at + cut, end)]  # fmt: skip
        length = end - begin + fillers - cut
        new += [torch.zeros(at, dtype=torch.bool), torch.ones(fillers, dtype=torch.bool),
                torch.zeros(length - at - fillers, dtype=torch.bool)]  # fmt: skip
        first.append(ends[parent] if parent >= 0 else 0)
        ends.append(first[-1] + length)
        total += length
    device = batch.tokens.device
    index, filler = torch.cat(old).to(device), torch.cat(new).to(device)
    lengths = torch.tensor(ends) - torch.tensor(first)
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    offsets = (torch.tensor(first) - bounds[:-1]).repeat_interleave(lengths)
    changed = replace(
        batch, tokens=batch.tokens[index], positions=(torch.arange(total) + offsets).to(device), starts=bounds,
        weights=batch.weights[index].masked_fill(filler, 0.0),
    )  # fmt: skip
    return Thinking(changed, torch.tensor(begins, dtype=torch.int64, device=device), torch.tensor(counts))


def think(model: LanguageModel, thinking: Thinking, markers: Tensor) -> Written:
    """Return the embeddings of markers and thoughts.

    Args:
        model: the language model; it must pack.
        thinking: the forest with room for them.
        markers: (2, D) embeddings of <begin> and <end>.

    Raises:
        ModelError: the model's sequences are padded instead of packed.
    """
    if not model.packs:
        raise ModelError(
            f"{type(model.hf).__name__} runs padded instead of packed, so that thoughts cannot be written into its "
            "rows; use a model that packs, and packing: true"
        )
    begins, counts = thinking.begins, thinking.counts
    thoughts: list[Tensor] = []  # (R, D) each; zeros where a root has no such thought
    for number in range(int(counts.max()) if len(counts) else 0):
        rows = (counts > number).nonzero().squeeze(1)
        prefix = _beginnings(thinking.batch, begins[rows.to(begins.device)] + 1 + number)
        ends = prefix.starts[1:].to(begins.device)
        rows = rows.to(begins.device)
        inside = Written(
            torch.cat([ends - 1 - number + j for j in range(number + 1)]),
            torch.cat([markers[:1].expand(len(rows), -1), *(thought[rows] for thought in thoughts)]),
        )
        with written(model, prefix, inside):
            states = model.hidden(prefix)[ends - 1]
        thoughts.append(states.new_zeros(len(begins), states.shape[1]).index_copy(0, rows, states))
    return assemble(thinking, markers, thoughts)


def assemble(thinking: Thinking, markers: Tensor, thoughts: Sequence[Tensor]) -> Written:
    """Return what is written into a forest.

    Args:
        thinking: the forest.
        markers: (2, D) embeddings of <begin> and <end>.
        thoughts: (R, D) each; as many as the root with the most of them has.
    """
    begins = thinking.begins
    counts = thinking.counts.to(begins.device)
    having = [(counts > number).nonzero().squeeze(1) for number in range(len(thoughts))]
    ends = begins + 1 + counts
    places = [begins, ends, *(begins[rows] + 1 + number for number, rows in enumerate(having))]
    kinds = [marker.expand(len(begins), -1) for marker in markers[:, None]]
    chosen = [thought[rows] for thought, rows in zip(thoughts, having, strict=True)]
    dtype = chosen[0].dtype if chosen else markers.dtype  # autocast gives states of fewer bits
    return Written(torch.cat(places), torch.cat([vector.to(dtype) for vector in (*kinds, *chosen)]))


@contextmanager
def written(model: LanguageModel, batch: Packed, what: Written) -> Iterator[None]:
    """Write embeddings into every packed row that runs meanwhile; rows of another length are left alone.

    Args:
        model: the language model.
        batch: what runs.
        what: the embeddings.
    """
    made = model.arranged(batch)
    places = what.places if made.kept is None else made.kept[what.places]

    def put(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if output.shape[1] != len(made.tokens):
            return output
        return output[0].index_copy(0, places, what.vectors.to(output.dtype))[None]

    hook = model.hf.get_input_embeddings().register_forward_hook(put)
    try:
        yield
    finally:
        hook.remove()


def _beginnings(batch: Packed, ends: Tensor) -> Packed:
    """Return a forest of the beginnings of roots: each from its first token up to one of `ends` (R,)."""
    stops = ends.cpu()
    starts = batch.starts[torch.searchsorted(batch.starts, stops - 1, right=True) - 1]
    lengths = stops - starts
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    index = torch.arange(int(bounds[-1])) + (starts - bounds[:-1]).repeat_interleave(lengths)
    index = index.to(batch.tokens.device)
    return Packed(
        tokens=batch.tokens[index], positions=batch.positions[index], starts=bounds,
        parents=torch.full((len(lengths),), -1), weights=torch.zeros_like(batch.weights[index]),
    )  # fmt: skip
