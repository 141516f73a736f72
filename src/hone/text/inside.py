"""A look into the network: what its modules give for the tokens of a batch, and what is added to that.

A network runs a batch packed, perhaps behind virtual tokens, or as padded rows; here it is always the batch's own T
tokens in packed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hone.text.fallback import Rows

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed

Change = Callable[[Tensor], Tensor | None]  # states (T, D) -> what is added to them (T, D), None for nothing


@contextmanager
def inside(model: LanguageModel, batch: Packed, changes: Mapping[nn.Module, Change]) -> Iterator[None]:
    """Show functions what modules give for a batch's tokens, and add what they return.

    It is for calls of `model.hidden(batch)` within. What is added is a constant: no gradient flows through it.

    Args:
        model: the language model.
        batch: packed forest of T tokens.
        changes: by module, of those that give states (..., D) for each token: the embedding, layers.
    """
    places = _packed_places(model, batch) if model.packs else _row_places(batch)
    with ExitStack() as hooks:
        for module, change in changes.items():
            hook = module.register_forward_hook(_hook(change, *places))
            hooks.callback(hook.remove)
        yield


def _packed_places(model: LanguageModel, batch: Packed) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return where the batch's tokens are among outputs (1, N, D), and the token that each output belongs to (1, N)."""
    kept = model.arranged(batch).kept
    own = torch.arange(len(batch), device=batch.tokens.device)
    column = own if kept is None else kept
    owner = own if kept is None else torch.full_like(model.arranged(batch).tokens, -1).index_copy(0, kept, own)
    return (torch.zeros_like(column), column), owner[None]


def _row_places(batch: Packed) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Return the same for outputs (B, L, D) of rows; a token that several rows share is found in the first."""
    rows = Rows.unroll(batch)
    return (rows.row, rows.column), rows.index


def _hook(change: Change, place: tuple[Tensor, Tensor], owner: Tensor) -> Callable[..., Any]:
    """Return a hook that adds what a function returns for the tokens wherever an output belongs to one of them."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        front = states.shape[1] - owner.shape[1]  # virtual tokens that an adapter puts in front of rows
        with torch.no_grad():
            added = change(states.detach()[place[0], place[1] + front])
            if added is None:
                return None
            spread = torch.zeros_like(states)
            spread[:, front:] = torch.where(owner[..., None] >= 0, added.to(states.dtype)[owner], 0)
        changed = states + spread
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook
