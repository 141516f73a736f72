"""Padding, for models that cannot run a packed tree: recurrent ones, and those that compute attention on their own.

Each chain from a root to a leaf becomes one row, filled up on the right, and a token's hidden state is read back from
the first row that holds it. No mask is needed, since in a causal model nothing to its right reaches a token; and masks
do harm where a padding place sees no key at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hone.text.pack import Packed


@dataclass(frozen=True)
class Rows:
    """A packed forest unrolled into one row per leaf.

    Args:
        tokens: (B, L) token ids; padding repeats the batch's last token.
        row: (T,) row in which each packed token is read back.
        column: (T,) its place in that row.
        index: (B, L) packed token at each place, -1 for padding.
    """

    tokens: Tensor
    row: Tensor
    column: Tensor
    index: Tensor

    @classmethod
    def unroll(cls, batch: Packed) -> Rows:
        """Make the rows of a batch, on the device of its tokens.

        Args:
            batch: the packed forest.
        """
        device = batch.tokens.device
        parents = set(batch.parents.tolist())
        leaves = [segment for segment in range(batch.segments) if segment not in parents]
        spans = [torch.arange(start, end) for start, end in zip(batch.starts[:-1], batch.starts[1:], strict=True)]
        chains = [torch.cat([spans[segment] for segment in batch.chain(leaf)]) for leaf in leaves]
        index = nn.utils.rnn.pad_sequence(chains, batch_first=True, padding_value=-1)
        row, column = torch.empty(2, len(batch), dtype=torch.int64)
        for number in reversed(range(len(chains))):  # so that the first row that holds a token wins
            row[chains[number]] = number
            column[chains[number]] = torch.arange(len(chains[number]))
        index = index.to(device)
        return cls(batch.tokens[index], row.to(device), column.to(device), index)

    def packed(self, values: Tensor) -> Tensor:
        """Return the values (T, ...) in packed order of values (B, L, ...) in rows.

        A token shared by several chains is read from one row only, and the gradient is still that of the packed tree:
        in each of its rows the token's value is the same function of the parameters, because nothing to its right
        reaches it, so the derivative of whatever reads it is the same through any one of them.

        Args:
            values: (B, L, ...) by row and column.
        """
        return values[self.row, self.column]


def padded_hidden(decoder: nn.Module, rows: Rows) -> Tensor:
    """Return the last hidden state (T, D) of every packed token, computed on padded rows.

    Args:
        decoder: a transformers model without its head, with an attention implementation of transformers.
        rows: the unrolled batch.
    """
    output = decoder(input_ids=rows.tokens, use_cache=False)
    return rows.packed(output.last_hidden_state)
