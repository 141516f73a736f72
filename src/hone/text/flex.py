"""Tree attention on CUDA: flex attention with a block mask.

Number the segments of a forest in pre-order, and let a segment's interval be [enter, leave), the numbers of itself and
its descendants. Segment a is an ancestor of segment b, or b itself, exactly when enter_a <= enter_b < leave_a. So two
numbers per token decide what it sees, whatever the depth; whole tiles without a visible key are skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

MaskMod = Callable[[Any, Any, Tensor, Tensor], Tensor]


class Intervals:
    """Which tokens of a packed forest see which, by pre-order intervals."""

    def __init__(
        self, starts: list[int], parents: list[int], positions: Tensor, two_way: Sequence[bool] | None = None
    ) -> None:
        """Keep the shape of the forest; the numbers are worked out when they are first needed.

        Args:
            starts: S + 1 offsets of the segments, and T.
            parents: S indices of the parents, -1 for roots.
            positions: (T,) position of each token on its chain.
            two_way: per segment whether its tokens see each other in both directions; None for none.
        """
        self.starts, self.parents, self.positions, self.two_way = starts, parents, positions, two_way
        self.masks: dict[int | None, BlockMask] = {}

    @cached_property
    def of_tokens(self) -> tuple[Tensor, Tensor]:
        """The interval [enter, leave) of each token's segment, (T,) each, on the device of the positions."""
        children: list[list[int]] = [[] for _ in self.parents]
        roots: list[int] = []
        for index, parent in enumerate(self.parents):
            (children[parent] if parent >= 0 else roots).append(index)
        sizes = [1] * len(self.parents)
        for index in reversed(range(len(self.parents))):  # children come after their parents
            if self.parents[index] >= 0:
                sizes[self.parents[index]] += sizes[index]
        enter = [0] * len(self.parents)
        waiting, number = roots[::-1], 0
        while waiting:
            index = waiting.pop()
            enter[index], number = number, number + 1
            waiting.extend(reversed(children[index]))
        lengths = torch.tensor(self.starts).diff()
        first = torch.tensor(enter)
        pair = (first, first + torch.tensor(sizes))
        first_of, last_of = (x.repeat_interleave(lengths).to(self.positions.device) for x in pair)
        return first_of, last_of

    def mask_mod(self, window: int | None) -> MaskMod:
        """Return the function that tells, for indices of a query and a key, whether the query sees the key.

        Args:
            window: a query sees keys at most `window - 1` positions back; None for no limit.
        """
        (enter, leave), positions = self.of_tokens, self.positions
        if self.two_way is not None:
            lengths = torch.tensor(self.starts).diff()
            marked = torch.tensor(list(self.two_way)).repeat_interleave(lengths).to(positions.device)

            def sees_both_ways(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
                on_chain = (enter[key] <= enter[query]) & (enter[query] < leave[key]) & (key <= query)
                near = on_chain | (marked[query] & (enter[key] == enter[query]))
                return near if window is None else near & ((positions[query] - positions[key]).abs() < window)

            return sees_both_ways

        def sees(batch: Any, head: Any, query: Tensor, key: Tensor) -> Tensor:
            on_chain = (enter[key] <= enter[query]) & (enter[query] < leave[key]) & (key <= query)
            return on_chain if window is None else on_chain & (positions[query] - positions[key] < window)

        return sees

    def block_mask(self, window: int | None) -> BlockMask:
        """Return the block mask, made once for all layers with the same window."""
        if window not in self.masks:
            tokens, device = self.starts[-1], self.positions.device
            self.masks[window] = create_block_mask(
                self.mask_mod(window), None, None, tokens, tokens, device=device, _compile=device.type == "cuda"
            )
        return self.masks[window]


def can_use_flex(query: Tensor, value: Tensor) -> bool:
    """Tell whether flex attention applies: on CUDA, at most 32 bits, and heads that fill a tile of its kernel.

    Args:
        query: (1, H, T, d).
        value: (1, H', T, d').
    """
    return query.is_cuda and query.dtype.itemsize <= 4 and min(query.shape[-1], value.shape[-1]) >= 16


def flex_tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    intervals: Intervals,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Return the attention of every token over its chain.

    Args:
        query: (1, H, T, d).
        key: (1, H', T, d), H' a divisor of H.
        value: (1, H', T, d').
        intervals: the forest.
        scaling: factor on the scores.
        window: width of the sliding window in tokens, None for none.
        softcap: scores become softcap tanh(scores / softcap); None for no cap.

    Returns:
        (1, T, H, d').
    """
    output = _kernel(query.is_cuda)(
        query, key, value,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=intervals.block_mask(window), scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return output.transpose(1, 2)


def _capped(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, batch: Any, head: Any, query: Any, key: Any) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@cache
def _kernel(compiled: bool) -> Any:
    """Return flex attention, compiled where it has a kernel; without one it is only for checking."""
    return torch.compile(flex_attention) if compiled else flex_attention
