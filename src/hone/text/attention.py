"""Exact attention over the packed tree, for unmodified Hugging Face models.

transformers lets anyone register an attention function (`AttentionInterface`) and a mask function
(`AttentionMaskInterface`); keyword arguments of a model's forward reach every attention layer. Under the name "hone"
one function is registered here that hands queries, keys and values to the object passed as `plan=`:

    model.set_attn_implementation("hone")
    decoder(input_ids=tokens[None], position_ids=positions[None], use_cache=False, plan=TreePlan(batch))

`TreePlan` serves packed batches; `DecodeCache` (`text/cache.py`) serves generation. Without a plan the function is
plain causal attention, so that `model(input_ids)` and `model.generate` keep working on the same object.

With S segments cut out of T tokens, a token at position i of the chain sees the keys at positions j of the same chain
with 0 <= i - j, and i - j < window where the layer has a sliding window. That is computed in one of these ways:

- on the CPU as causal and full blocks of fused attention, merged by their log-sum-exps (`text/blocks.py`), or, where
  segments are so short that blocks would be too many, tree by tree under a mask;
- on CUDA by flex attention with a block mask (`text/flex.py`);
- everywhere else, and for soft caps, attention sinks, dropout and windows that bite, segment by segment on the gathered
  keys of its chain, segments of equal shape in one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from hone.errors import ModelError
from hone.text.blocks import Block, block_attention, can_use_blocks
from hone.text.flex import Intervals, can_use_flex, flex_tree_attention
from hone.text.pack import Packed

NAME = "hone"  # what the attention function is called in transformers' registries
FEW = 2  # tokens to a block: with fewer, a mask costs less than blocks do


class PackingError(ModelError):
    """A model asks its attention for something that packed attention cannot give."""


@dataclass(frozen=True)
class Scoring:
    """How one attention layer makes weights of scores.

    Args:
        scaling: factor on the scores, None for 1 / sqrt(d).
        dropout: probability of dropping an attention weight, 0 outside training.
        sliding_window: a token sees keys at most `sliding_window - 1` positions back; None for no limit.
        softcap: scores become softcap tanh(scores / softcap); None for no cap.
        sinks: (H,) score of one more key whose value is 0, None for none.
    """

    scaling: float | None = None
    dropout: float = 0.0
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class Plan(Protocol):
    """What the keyword argument `plan` of a model's forward must offer."""

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Return the attention output of one layer.

        Args:
            module: the attention layer.
            query: (B, H, T, d).
            key: (B, H', T, d), H' a divisor of H.
            value: (B, H', T, d').
            scoring: how the layer makes weights of scores.

        Returns:
            (B, T, H, d').
        """


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    plan: Plan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend as `plan` says; this is the function that transformers calls in every layer.

    Args:
        module: the attention layer.
        query: (B, H, T, d).
        key: (B, H', K, d).
        value: (B, H', K, d').
        attention_mask: None with a plan; without one also a mask (B, 1, T, K), boolean or additive.
        plan: who attends; None for causal attention over rows.
        scaling: see `Scoring`, as are the next four.
        dropout: probability of dropping an attention weight.
        sliding_window: width of the window in tokens.
        softcap: cap on the scores.
        s_aux: sinks, under the name that transformers gives them.
        others: what else the layer passes on; only what would change the result is looked at.

    Returns:
        The output (B, T, H, d'), and None for the attention weights.

    Raises:
        PackingError: the layer is not causal, adds a bias to its scores, or brings a mask of its own.
    """
    if others.get("position_bias") is not None:
        raise PackingError(f"{type(module).__name__} adds a position bias to its scores")
    if others.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise PackingError(f"{type(module).__name__} attends in both directions")
    scoring = Scoring(scaling, dropout, sliding_window, softcap, s_aux)
    if plan is None:
        if attention_mask is None:
            attention_mask = visible_keys(query.shape[2], key.shape[2], sliding_window, query.device)
        return masked_attention(query, key, value, attention_mask, scoring), None
    if attention_mask is not None:
        raise PackingError(f"{type(module).__name__} brings an attention mask of its own")
    return plan.attend(module, query, key, value, scoring), None


def attention_mask(*, attention_mask: Tensor | None = None, **arguments: Any) -> Tensor | None:
    """Make the mask for rows with padding; nothing for a plan, or for rows without padding.

    Args:
        attention_mask: (B, K) true at tokens that are not padding, None where nothing is padded.
        arguments: what else transformers gives to a mask function.
    """
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **arguments)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, attention_mask)


class TreePlan:
    """Attention over one packed batch; built once, used by every layer."""

    intervals: Intervals | None = None  # for flex attention, which knows trees only
    open: TreePlan | None = None  # the same forest without the causal mask in some segments
    two_way_layers: frozenset[int] | None = None  # the layers that use it, None for all
    two_way: Sequence[bool] = ()  # per segment whether its tokens see each other in both directions; () for none

    def __init__(self, batch: Packed) -> None:
        """Lay out the forest: what each segment's chain is and which blocks of scores are needed.

        Args:
            batch: the packed forest.
        """
        starts, parents, two_way = _joined(batch)
        chains: list[list[int]] = []
        for index, parent in enumerate(parents):
            chains.append([*(chains[parent] if parent >= 0 else []), index])
        self._lay_out(starts, chains)
        self.intervals = Intervals(starts, parents, batch.positions)
        self.two_way_layers = batch.two_way_layers
        if any(two_way):
            self.open = OpenPlan(starts, parents, chains, two_way, batch.positions)

    def _lay_out(self, starts: list[int], chains: list[list[int]]) -> None:
        """Work out the blocks of segments that see themselves causally and the rest of their chain in full."""
        self.tokens = starts[-1]
        self.lengths = [end - start for start, end in pairwise(starts)]
        self.chains = chains
        groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for index, chain in enumerate(chains):
            groups[self.lengths[index], sum(self.lengths[i] for i in chain[:-1])].append(index)
        self.groups = dict(groups)
        self.longest = max(own + before for own, before in self.groups)
        self.blocks = _blocks(starts, self.chains)
        self.starts = starts
        self.trees = _trees(chains) if len(self.blocks) * FEW > self.tokens else []
        self.tree_masks: list[Tensor] = []
        self.masks: dict[tuple[int, int, int | None], Tensor | None] = {}

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring = Scoring()
    ) -> Tensor:
        """Return the attention output (1, T, H, d') of one layer.

        Args:
            module: the attention layer.
            query: (1, H, T, d).
            key: (1, H', T, d).
            value: (1, H', T, d').
            scoring: how the layer makes weights of scores.

        Raises:
            PackingError: the layer does not see the packed row as it is.
        """
        if self.open is not None and (self.two_way_layers is None or _number(module) in self.two_way_layers):
            return self.open.attend(module, query, key, value, scoring)
        if query.shape[0] != 1 or query.shape[2] != self.tokens or key.shape[2] != self.tokens:
            raise PackingError(f"{type(module).__name__} makes {tuple(query.shape)} of a row of {self.tokens} tokens")
        # Under autocast the values are in low precision already, while rotary embeddings may have widened the others.
        query, key = query.to(value.dtype), key.to(value.dtype)
        scaling = query.shape[-1] ** -0.5 if scoring.scaling is None else scoring.scaling
        window = scoring.sliding_window
        if window is not None and window >= self.longest:
            window = None
        if scoring.sinks is None and scoring.dropout == 0:
            if window is None and scoring.softcap is None and can_use_blocks(query, key, value):
                if self.trees:
                    return self._by_trees(query, key, value, replace(scoring, scaling=scaling))
                return block_attention(query, key, value, self.blocks, scaling)
            if self.intervals is not None and can_use_flex(query, value):
                return flex_tree_attention(query, key, value, self.intervals, scaling, window, scoring.softcap)
        return self._by_chains(query, key, value, replace(scoring, scaling=scaling, sliding_window=window))

    def _by_trees(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Attend tree by tree under a mask."""
        if not self.tree_masks:
            self.tree_masks = [self._tree_mask(first, last) for first, last in self.trees]
        sizes = [self.starts[last] - self.starts[first] for first, last in self.trees]
        queries, keys, values = (x.split(sizes, dim=2) for x in (query, key, value))
        rows = zip(queries, keys, values, self.tree_masks, strict=True)
        return torch.cat([masked_attention(q, k, v, mask, scoring) for q, k, v, mask in rows], dim=1)

    def _tree_mask(self, first: int, last: int) -> Tensor:
        """Return which keys the queries of the segments from `first` to before `last` see, (n, n) boolean."""
        count = last - first
        above, open_ = torch.zeros(count, count, dtype=torch.bool), torch.zeros(count, dtype=torch.bool)
        for place in range(count):
            above[place, [ancestor - first for ancestor in self.chains[first + place]]] = True
            open_[place] = bool(self.two_way) and self.two_way[first + place]
        owner = torch.arange(count).repeat_interleave(torch.tensor(self.lengths[first:last]))
        both = (owner[:, None] == owner[None]) & open_[owner]
        return above[owner][:, owner] & (both | torch.ones(len(owner), len(owner), dtype=torch.bool).tril())

    def _by_chains(self, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Attend segment by segment to the gathered keys of its chain, segments of equal shape in one batch.

        The split is one operation whose backward pass is one concatenation; a slice per segment would zero and add
        a whole row per segment.
        """
        queries, keys, values = (tensor.split(self.lengths, dim=2) for tensor in (query, key, value))
        outputs: dict[int, Tensor] = {}
        for (own, before), members in self.groups.items():
            rows = _cat([queries[i] for i in members], 0)
            seen = [_cat([_cat([x[j] for j in self.chains[i]], 2) for i in members], 0) for x in (keys, values)]
            case = own, before, scoring.sliding_window
            if case not in self.masks:
                self.masks[case] = _mask(own, before, scoring.sliding_window, query.device)
            made = masked_attention(rows, seen[0], seen[1], self.masks[case], scoring)
            outputs.update(zip(members, made.split(1), strict=True))
        return torch.cat([outputs[i] for i in range(len(outputs))], dim=1)


class OpenPlan(TreePlan):
    """Attention over a forest in which the tokens of some segments see all of their own segment."""

    def __init__(
        self, starts: list[int], parents: list[int], chains: list[list[int]], two_way: Sequence[bool], positions: Tensor
    ) -> None:
        """Lay out the forest.

        Args:
            starts: S + 1 offsets of the segments, and T.
            parents: S indices of the parents, -1 for roots.
            chains: per segment the segments that it sees, itself last.
            two_way: per segment whether its tokens see each other in both directions.
            positions: (T,) position of each token on its chain.
        """
        self._lay_out(starts, chains)
        self.two_way = two_way
        self.blocks = [
            block._replace(causal=block.causal and not two_way[index]) if index < len(two_way) else block
            for index, block in enumerate(self.blocks)
        ]
        self.intervals = Intervals(starts, parents, positions, two_way)
        regrouped: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for (own, before), members in self.groups.items():
            for index in members:
                regrouped[own, -1 - before if two_way[index] else before].append(index)
        self.groups = dict(regrouped)


def _number(module: nn.Module) -> int:
    """Return which layer an attention module is in, as transformers counts them."""
    number = getattr(module, "layer_idx", None)
    if not isinstance(number, int):
        raise PackingError(f"{type(module).__name__} does not say which layer it is in")
    return number


def visible_keys(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which keys each query sees where the queries are the last of the keys, or None for plain causal order.

    Args:
        queries: Q, number of queries.
        keys: K >= Q, number of keys.
        window: a query sees the key of its own position and `window - 1` before; None for no limit.
        device: where the mask will be used.

    Returns:
        (Q, K) boolean; None when Q = K and the window does not bite.
    """
    if queries == keys and (window is None or window >= keys):
        return None
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    return causal if window is None else causal.triu(keys - queries - window + 1)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """Return softmax([cap(scaling Q K^T) + mask, sinks]) [V; 0] for rows that all have the same length.

    Args:
        query: (B, H, Q, d).
        key: (B, H', K, d).
        value: (B, H', K, d').
        mask: broadcast to (B, H, Q, K); boolean, true where a key is seen, or additive; None for causal order, Q = K.
        scoring: how scores become weights; its window is in the mask already.

    Returns:
        (B, Q, H, d').
    """
    scaling, dropout, softcap, sinks = scoring.scaling, scoring.dropout, scoring.softcap, scoring.sinks
    shared = query.shape[1] // key.shape[1]
    if shared > 1:
        key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    if softcap is None and sinks is None:
        output = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, is_causal=mask is None, scale=scaling
        )
        return output.transpose(1, 2)
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    # The lowest number instead of -inf, so that a padding place that sees no key gives an average, not NaN.
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    # Low precision is widened for the softmax; float64 stays what it is, where transformers would round to float32.
    weights = scores.softmax(-1, dtype=torch.float32 if scores.itemsize < 4 else None).to(value.dtype)
    weights = drop(weights[..., : key.shape[2]], dropout)
    return (weights @ value).transpose(1, 2)


def _mask(own: int, before: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return which keys a segment sees, `before` being that of its chain, or -1 less that where it sees both ways."""
    if before >= 0:
        return visible_keys(own, own + before, window, device)
    if window is not None:
        raise PackingError("a sliding window that bites cannot be opened to both sides")
    return torch.ones(own, own - 1 - before, dtype=torch.bool, device=device)


def _cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate without copying a part that is alone."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _joined(batch: Packed) -> tuple[list[int], list[int], list[bool]]:
    """Return starts, parents and marks of the forest with every only child that follows its parent joined to it.

    The chain of a token stays the same, so attention does; a conversation in many segments becomes one. A causal
    segment and one that is seen both ways stay apart.
    """
    starts, parents = batch.starts.tolist(), batch.parents.tolist()
    marks = [False] * len(parents) if batch.two_way is None else batch.two_way.tolist()
    children = [0] * len(parents)
    for parent in parents:
        if parent >= 0:
            children[parent] += 1
    new_starts: list[int] = []
    new_parents: list[int] = []
    new_marks: list[bool] = []
    place: list[int] = []  # of each old segment among the new ones
    for index, parent in enumerate(parents):
        if parent < 0 or parent != index - 1 or children[parent] > 1 or marks[index] != marks[parent]:
            new_starts.append(starts[index])
            new_parents.append(place[parent] if parent >= 0 else -1)
            new_marks.append(marks[index])
        place.append(len(new_starts) - 1)
    return [*new_starts, starts[-1]], new_parents, new_marks


def _trees(chains: list[list[int]]) -> list[tuple[int, int]]:
    """Return the segments [first, last) of each tree; none where the segments of a tree are not side by side."""
    roots = [chain[0] for chain in chains]
    if roots != sorted(roots):
        return []
    firsts = sorted(set(roots))
    return list(pairwise([*firsts, len(chains)]))


def _blocks(starts: list[int], chains: list[list[int]]) -> list[Block]:
    """Return the blocks of scores: each segment on itself, then each run of descendants on their common ancestor."""
    blocks = [Block(start, end, start, end, causal=True) for start, end in pairwise(starts)]
    runs: dict[int, list[tuple[int, int]]] = {}
    for index, chain in enumerate(chains):
        start, end = starts[index], starts[index + 1]
        for ancestor in chain[:-1]:
            found = runs.setdefault(ancestor, [])
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], end)
            else:
                found.append((start, end))
    for ancestor, found in runs.items():
        blocks.extend(Block(start, end, starts[ancestor], starts[ancestor + 1], causal=False) for start, end in found)
    return blocks
