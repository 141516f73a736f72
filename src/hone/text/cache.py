"""The key-value cache of generation: one copy of a prompt's keys for all its samples, preallocated room for the rest.

A decode step runs all N samples as one flat row of N tokens. Its attention sees, per sample, the shared prompt and the
sample's own tokens so far, under one softmax:

    softmax([q K_prompt^T, q K_own^T, sinks]) [V_prompt; V_own; 0]

Keys are kept heads first, so that every product is one batched matrix product over views: the queries of a prompt's
samples (and of the heads that share its keys) are the rows of one matrix. Prompts are aligned at their *end*, so that
the distance from a query to a column is the same for all rows: a sliding window is then a slice, and the only mask is
for the padding in front of shorter prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hone.precision import wide_dtype
from hone.text.attention import Plan, Scoring

FIRST_CAPACITY = 32  # tokens per sample that buffers have room for at first; they double from there


@dataclass
class _Layer:
    """What one call of attention in a forward pass has seen: P prompt columns, room for C tokens per sample, Hkv heads.

    Args:
        prompt_key: (Hkv, prompts, P, d) aligned at the end; a layer with a sliding window keeps only what it can reach.
        prompt_value: (Hkv, prompts, P, dv).
        key: (Hkv, N, C, d), of which the first `filled` columns hold tokens.
        value: (Hkv, N, C, dv).
        filled: number of generated tokens stored so far.
    """

    prompt_key: Tensor
    prompt_value: Tensor
    key: Tensor
    value: Tensor
    filled: int = 0


class DecodeCache:
    """Keys and values of prompts and of N samples of them, and the attention over both.

    First the prompts go through the model, in order and in as many parts as memory asks for, each with a `PromptPlan`;
    then the cache itself is the plan of every decode step. Layers are told apart by the order in which a forward pass
    calls them, so that models which run one module several times need nothing special.
    """

    def __init__(self, lengths: Sequence[int], samples: int, limit: int, device: torch.device) -> None:
        """Make an empty cache; buffers are made when a layer first stores something.

        Args:
            lengths: number of tokens of each prompt.
            samples: samples per prompt; row `i * samples + j` is sample j of prompt i.
            limit: most tokens that a sample will ever feed back.
            device: where the model runs.
        """
        self.lengths = torch.as_tensor(lengths, device=device)
        self.limit = max(1, limit)
        self.owner = torch.arange(len(lengths), device=device).repeat_interleave(samples)  # (N,) prompt of each row
        self.width = max(lengths)
        self.layers: list[_Layer] = []
        self.unseen: Tensor | None = None  # (N, width) columns of its prompt that a row does not see; None for none
        self.erased: Tensor | None = None  # (N, filled) own columns that a row does not see; None for none
        self._next = 0  # the layer that attends next
        self._arrange()

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Store one new token per sample and attend from it to its prompt and to all tokens of the sample.

        Args:
            module: the attention layer, unused.
            query: (1, H, N, d).
            key: (1, Hkv, N, d).
            value: (1, Hkv, N, dv).
            scoring: how the layer makes weights of scores; there is no dropout, as the model is in evaluation mode.

        Returns:
            (1, N, H, dv) attention outputs.
        """
        # Under autocast the values are in low precision already, while rotary embeddings may have widened the others.
        query, key = query.to(value.dtype), key.to(value.dtype)
        layer = self.layers[self._next]
        self._next = (self._next + 1) % len(self.layers)
        self._append(layer, key[0], value[0])
        prompt_key, prompt_value, own_key, own_value = _visible(layer, scoring.sliding_window)
        near, total, (heads, rows) = prompt_key.shape[2], prompt_key.shape[2] + own_key.shape[2], key.shape[1:3]
        scaling = query.shape[-1] ** -0.5 if scoring.scaling is None else scoring.scaling
        softcap, sinks = scoring.softcap, scoring.sinks
        queries = (query[0] * scaling).unflatten(0, (heads, -1)).transpose(1, 2)  # (Hkv, N, H / Hkv, d)

        shared = self._spread(queries) @ prompt_key.transpose(-1, -2)
        own = queries @ own_key.transpose(-1, -2)
        if softcap is not None:
            shared, own = softcap * torch.tanh(shared / softcap), softcap * torch.tanh(own / softcap)
        if self.padding is not None:
            shared = shared.masked_fill(self.padding[:, None, self.width - near :], float("-inf"))
        collected = self._collect(shared)
        if self.unseen is not None:
            collected = collected.masked_fill(self.unseen[:, None, self.width - near :], float("-inf"))
        if self.erased is not None:
            own = own.masked_fill(self.erased[:, None, layer.filled - own.shape[-1] :], float("-inf"))
        parts = [collected, own]
        if sinks is not None:
            parts.append(sinks.to(own).view(heads, 1, -1, 1).expand(-1, rows, -1, -1))
        wide = wide_dtype(own)
        probs = torch.cat(parts, dim=-1).softmax(dim=-1, dtype=wide).to(value.dtype)

        out = self._collect(self._spread(probs[..., :near]) @ prompt_value) + probs[..., near:total] @ own_value
        return out.permute(1, 0, 2, 3).reshape(1, rows, -1, out.shape[-1])

    def keep(self, rows: Tensor) -> None:
        """Drop every sample but `rows`, every prompt that has none left, and the columns that only those needed.

        Args:
            rows: (n,) ascending indices of the samples to keep, at least one.
        """
        owner = self.owner[rows]
        prompts, self.owner = torch.unique(owner, return_inverse=True)
        self.lengths = self.lengths[prompts]
        width = int(self.lengths.max())
        for layer in self.layers:
            layer.key, layer.value = layer.key[:, rows], layer.value[:, rows]
            if len(prompts) < layer.prompt_key.shape[1]:
                spare = max(0, layer.prompt_key.shape[2] - width)
                layer.prompt_key = layer.prompt_key[:, prompts, spare:]
                layer.prompt_value = layer.prompt_value[:, prompts, spare:]
        self.width = width
        self._arrange()

    def store(self, layer: int, key: Tensor, value: Tensor, first: int, index: Tensor) -> None:
        """Store what one layer has seen of some prompts.

        Args:
            layer: how many layers attended before it in the same forward pass.
            key: (Hkv, T, d) of the packed prompts.
            value: (Hkv, T, dv).
            first: index of the first prompt.
            index: (m, columns) which token of the packed row stands in each column of the prompts.
        """
        if layer == len(self.layers):
            self.layers.append(self._empty(key, value, index.shape[1]))
        buffers = self.layers[layer]
        buffers.prompt_key[:, first : first + len(index)] = key[:, index]
        buffers.prompt_value[:, first : first + len(index)] = value[:, index]

    def _empty(self, key: Tensor, value: Tensor, columns: int) -> _Layer:
        """Make buffers for keys like (Hkv, T, d) and values like (Hkv, T, dv)."""
        prompts, rows, room = len(self.lengths), len(self.owner), min(FIRST_CAPACITY, self.limit)
        return _Layer(
            key.new_empty(key.shape[0], prompts, columns, key.shape[-1]),
            value.new_empty(key.shape[0], prompts, columns, value.shape[-1]),
            key.new_empty(key.shape[0], rows, room, key.shape[-1]),
            value.new_empty(key.shape[0], rows, room, value.shape[-1]),
        )

    def _append(self, layer: _Layer, key: Tensor, value: Tensor) -> None:
        """Store (Hkv, N, d) keys and values in the next column, doubling the room when it is full."""
        if layer.filled == layer.key.shape[2]:
            room = min(2 * layer.filled, self.limit)
            for name, old in (("key", layer.key), ("value", layer.value)):
                new = old.new_empty(*old.shape[:2], room, old.shape[3])
                new[:, :, : layer.filled] = old
                setattr(layer, name, new)
        layer.key[:, :, layer.filled] = key
        layer.value[:, :, layer.filled] = value
        layer.filled += 1

    def _arrange(self) -> None:
        """Work out which cell of the (prompts, most samples of a prompt) grid each row takes, and the padding mask."""
        counts = torch.bincount(self.owner, minlength=len(self.lengths))
        self.per_prompt = int(counts.max())
        rank = torch.arange(len(self.owner), device=counts.device) - (counts.cumsum(0) - counts)[self.owner]
        full = len(self.owner) == len(counts) * self.per_prompt
        self.cells = None if full else self.owner * self.per_prompt + rank
        column = torch.arange(self.width, device=counts.device)
        padding = column < self.width - self.lengths[:, None]  # (prompts, width)
        self.padding = padding if bool(padding.any()) else None

    def _spread(self, rows: Tensor) -> Tensor:
        """(Hkv, N, r, k) per sample to (Hkv, prompts, samples * r, k) per prompt; cells without a sample hold zeros."""
        if self.cells is not None:
            grid = rows.new_zeros(rows.shape[0], len(self.lengths) * self.per_prompt, *rows.shape[2:])
            grid[:, self.cells] = rows
            rows = grid
        return rows.reshape(rows.shape[0], len(self.lengths), self.per_prompt * rows.shape[2], rows.shape[3])

    def _collect(self, grid: Tensor) -> Tensor:
        """(Hkv, prompts, samples * r, k) per prompt back to (Hkv, N, r, k) per sample: the inverse of `_spread`."""
        heads, prompts, queries, width = grid.shape
        rows = grid.reshape(heads, prompts * self.per_prompt, queries // self.per_prompt, width)
        return rows if self.cells is None else rows[:, self.cells]


def _visible(layer: _Layer, window: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the keys and values of the prompts and of the samples that a window leaves to each sample's last token."""
    columns, end = layer.prompt_key.shape[2], layer.filled
    if window is None:
        return layer.prompt_key, layer.prompt_value, layer.key[:, :, :end], layer.value[:, :, :end]
    # The last column of the prompt is at distance `end`, own column j at distance `end - 1 - j`; all below `window`.
    first, begin = columns - min(columns, max(0, window - end)), max(0, end - window)
    return (
        layer.prompt_key[:, :, first:],
        layer.prompt_value[:, :, first:],
        layer.key[:, :, begin:end],
        layer.value[:, :, begin:end],
    )


class PromptPlan:
    """Attention over packed prompts that stores what it sees in a `DecodeCache` on the way."""

    def __init__(self, cache: DecodeCache, plan: Plan, first: int, starts: Tensor, front: int = 0) -> None:
        """Hold the plan that computes, and where its prompts go.

        Args:
            cache: where the keys are stored.
            plan: attention over the packed forest of the prompts.
            first: index in the cache of the first prompt.
            starts: (m+1,) where each prompt begins in the packed row, after the virtual tokens.
            front: virtual tokens at the beginning of the row, which stand in front of every prompt.
        """
        self.cache, self.plan, self.first = cache, plan, first
        self._next = 0  # the layer that attends next
        starts = starts.to(cache.lengths.device)
        columns = torch.arange(-cache.width, 0, device=starts.device)
        before = columns + starts.diff()[:, None]  # places from the prompt's first token on, negative in front of it
        # Padding in front of a shorter prompt repeats the first row: any finite value does, as it is masked.
        self.index = torch.where(before < 0, before, starts[:-1, None] + before).add_(front).clamp_(min=0)  # (m, width)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Store keys and values and return what the wrapped plan computes.

        Args:
            module: the attention layer.
            query: (1, H, T, d).
            key: (1, Hkv, T, d).
            value: (1, Hkv, T, dv).
            scoring: how the layer makes weights of scores.
        """
        window = scoring.sliding_window
        reach = self.cache.width if window is None else min(self.cache.width, window - 1)
        index = self.index[:, self.cache.width - reach :]
        self.cache.store(self._next, key[0].to(value.dtype), value[0], self.first, index)
        self._next += 1
        return self.plan.attend(module, query, key, value, scoring)
