"""What the beginning of an answer is worth: a linear head on the last hidden states that says how it will end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hone.errors import ModelError
from hone.modes import evaluating
from hone.text.heads import HEAD, ClassHead, saved_names
from hone.text.model import EXTRAS_FILE, LanguageModel
from hone.text.pack import Tree, pack

BATCH_TOKENS = 16384  # most tokens that are valued in one forward pass, which bounds its activations
Ids = tuple[int, ...]


class ValueHead(ClassHead):
    """The value of a state, v = w h + b, or tanh of it; which of the two is saved with it as its name."""

    known = False  # whether its weights were read, not drawn

    def __init__(self, width: int, *, squashed: bool) -> None:
        """Make a layer with torch's random weights.

        Args:
            width: D of the hidden states.
            squashed: whether values are between -1 (wrong) and 1 (right) instead of 0 and 1.
        """
        super().__init__(width, ["tanh value" if squashed else "value"], bias=True)
        self.squashed = squashed

    def forward(self, states: Tensor) -> Tensor:
        """Return the values (n,) of states (n, D), in single precision at least."""
        found = super().forward(states).squeeze(-1)
        found = found.float() if found.dtype.itemsize < 4 else found
        return torch.tanh(found) if self.squashed else found

    def signed(self, states: Tensor) -> Tensor:
        """Return the values (n,) between -1 and 1, whichever kind they are."""
        return self(states) if self.squashed else 2 * self(states) - 1

    def set_extra_state(self, state: Tensor) -> None:
        """Check that saved weights are those of such a head.

        Args:
            state: the name as bytes.
        """
        super().set_extra_state(state)
        self.known = True


def add_value_head(model: LanguageModel, *, squashed: bool) -> None:
    """Put a value head beside a model, drawn like transformers' own: normal weights, no bias yet.

    Args:
        model: gives width, type and device.
        squashed: whether values are between -1 and 1 instead of 0 and 1.
    """
    config = model.hf.config.get_text_config()
    head = ValueHead(config.hidden_size, squashed=squashed)
    nn.init.normal_(head.weight, std=getattr(config, "initializer_range", 0.02))
    nn.init.zeros_(head.bias)
    like = next(model.hf.parameters())
    model.extras[HEAD] = head.to(device=like.device, dtype=like.dtype)


def load_valued(path: str, device: torch.device | str) -> LanguageModel:
    """Load a model with the value head that was saved beside it.

    Args:
        path: folder of the model.
        device: where it computes.

    Raises:
        ModelError: there is no value head.
    """
    folder = Path(path).expanduser()
    names = saved_names(folder) or []
    if names not in (["value"], ["tanh value"]):
        raise ModelError(
            f"{folder / EXTRAS_FILE}: expected the value head of a model that objective ovm or alphamath has trained, "
            f"found {', '.join(names) or 'none'}"
        )
    model = LanguageModel.load(path, device=device)
    add_value_head(model, squashed=names == ["tanh value"])
    model.load_extras(folder)
    return model


def value_head(model: LanguageModel) -> ValueHead | None:
    """Return the value head beside a model, None where there is none.

    Args:
        model: the language model.
    """
    return next((head for name, head in model.extras.items() if name == HEAD and isinstance(head, ValueHead)), None)


@torch.no_grad()
def continuation_values(
    model: LanguageModel, head: ValueHead, groups: Sequence[tuple[Ids, Sequence[Ids]]]
) -> list[list[float]]:
    """Return the value after each of several continuations of texts, between -1 and 1; each text is computed once.

    Args:
        model: gives hidden states.
        head: reads that of a continuation's last token.
        groups: a text and its continuations, all as token ids and none empty.
    """
    device = next(model.parameters()).device
    found: list[list[float]] = []
    with evaluating(model):
        for part in _parts(groups):
            trees = [_tree(text, continuations) for text, continuations in part]
            batch = pack(trees).to(device)
            ends = (batch.starts[1:] - 1)[batch.parents >= 0].to(device)
            values = head.signed(model.hidden(batch)[ends]).tolist()
            for _, continuations in part:
                found.append(values[: len(continuations)])
                values = values[len(continuations) :]
    return found


def _parts(groups: Sequence[tuple[Ids, Sequence[Ids]]]) -> list[list[tuple[Ids, Sequence[Ids]]]]:
    """Return groups cut in order into parts of at most `BATCH_TOKENS` tokens, at least one group each."""
    parts: list[list[tuple[Ids, Sequence[Ids]]]] = []
    room = 0
    for text, continuations in groups:
        size = len(text) + sum(len(one) for one in continuations)
        if not parts or size > room:
            parts.append([])
            room = BATCH_TOKENS
        parts[-1].append((text, continuations))
        room -= size
    return parts


def _tree(text: Ids, continuations: Sequence[Ids]) -> Tree:
    tokens = tuple(np.array(ids, np.int32) for ids in (text, *continuations))
    nothing = tuple(np.zeros(len(ids), np.float32) for ids in tokens)
    return Tree(tokens, nothing, (-1, *(0 for _ in continuations)))
