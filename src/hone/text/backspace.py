"""Generation with a token that deletes the token before it.

After a deletion the network is where it was before the deleted token, for it sees neither that token nor the deletion.
The token that comes to the end again is fed once more, at its old position, while its first copy and the deleted token
are hidden; so every step feeds one token per sample, whatever was drawn, and the cache never shrinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hone.errors import ModelError
from hone.text.cache import DecodeCache
from hone.text.generate import COMPACT_BELOW, Generation, generate, prefill
from hone.text.model import LanguageModel
from hone.text.steering import has_windows, steering_of

PROMPT = -1  # column of a token that stands in the prompt and not among the sample's own


def remaining(drawn: Sequence[int] | np.ndarray, backspace: int) -> list[int]:
    """Return which of the drawn tokens are left, as indices.

    Args:
        drawn: ids, deletions among them.
        backspace: id that deletes; on nothing it has no effect.
    """
    kept: list[int] = []
    for place, token in enumerate(drawn):
        if token != backspace:
            kept.append(place)
        elif kept:
            kept.pop()
    return kept


def left_of(drawn: Generation, backspace: int) -> Generation:
    """Return what is left of a generation.

    Args:
        drawn: with its deletions and what they deleted.
        backspace: id that deletes.
    """
    kept = remaining(drawn.tokens, backspace)
    return replace(drawn, tokens=drawn.tokens[kept], logprobs=drawn.logprobs[kept])


def generate_deleting(
    model: LanguageModel, prompts: Sequence[np.ndarray], backspace: int, **options: Any
) -> list[list[Generation]]:
    """Continue prompts with a token that deletes, and return all that was drawn: `left_of` gives the answers.

    Where nothing is left of an answer, there is nothing to delete, and the log-probability is that of the other tokens.

    Args:
        model: the language model; it must pack.
        prompts: token ids of each prompt.
        backspace: id that deletes.
        options: those of `hone.text.generate.generate`; `max_new_tokens` counts deletions and what they delete.

    Raises:
        ModelError: the model or its adapter would notice what was deleted.
    """
    steering = steering_of(model.hf)
    if not model.packs or has_windows(model.hf):  # where tokens are near by their columns in the cache
        raise ModelError(
            f"answers that delete tokens need a model that packs and has full attention; {type(model.hf).__name__} "
            f"{'has sliding windows' if model.packs else 'does not pack'}"
        )
    if steering is not None and steering.watch(prompts, 1) is not None:
        raise ModelError(
            "this adapter follows the tokens of an answer, none of which can be deleted then; use another adapter"
        )
    return generate(model, prompts, decode=partial(_decode, backspace=backspace), **options)


def _decode(model: LanguageModel, prompts: list[np.ndarray], samples: int, draws: Any, *, backspace: int) -> None:
    """Run prompts and their samples until all samples have ended."""
    device, room = next(model.parameters()).device, int(draws.room.max())
    lengths = np.array([len(prompt) for prompt in prompts]) + model.front
    cache = DecodeCache(lengths.tolist(), samples, room - 1, device)
    logits = prefill(model, prompts, cache).repeat_interleave(samples, dim=0)
    ends = lengths.repeat(samples) - 1  # the position of each prompt's last token
    eraser = Eraser(backspace, prompts, samples, room)
    rows = np.arange(len(ends))
    for step in range(room):
        ids = draws.take(eraser.offered(logits, rows), rows, step)
        running = np.flatnonzero(draws.lengths[rows] == 0)
        if len(running) == 0:
            return
        if len(running) < COMPACT_BELOW * len(rows):
            kept = torch.from_numpy(running).to(device)
            cache.keep(kept)
            ids, rows = ids[kept], rows[running]
        fed, distances = eraser.feed(ids, rows, step)
        eraser.hide(cache, rows, step + 1)
        # A row that ended but is still carried along stays inside the model's context.
        positions = ends[rows] + np.minimum(distances, draws.room[rows])
        logits = model.head(model.states(fed, torch.from_numpy(positions).to(device), cache))


class Eraser:
    """What each sample of a generation has left, and which columns of the cache it no longer sees."""

    def __init__(self, backspace: int, prompts: Sequence[np.ndarray], samples: int, room: int) -> None:
        """Begin with empty answers.

        Args:
            backspace: id that deletes.
            prompts: ids of each prompt.
            samples: samples per prompt; row `i * samples + j` is sample j of prompt i.
            room: most tokens that a sample draws.
        """
        last = np.repeat([int(prompt[-1]) for prompt in prompts], samples)
        self.backspace = backspace
        self.left = [[(int(token), PROMPT)] for token in last]  # per row (token, column), the prompt's last one first
        self.hidden = np.zeros((len(last), room), dtype=bool)  # columns of its own tokens
        self.prompt_hidden = np.zeros(len(last), dtype=bool)  # whether the last token of the prompt is

    def offered(self, logits: Tensor, rows: np.ndarray) -> Tensor:
        """Return the logits (n, V) to draw from: where nothing is left there is nothing to delete.

        Args:
            logits: (n, V) of the next tokens.
            rows: (n,) the samples.
        """
        empty = torch.tensor([len(self.left[row]) == 1 for row in rows], device=logits.device)
        which = torch.tensor([self.backspace], device=logits.device)
        return logits.index_copy(1, which, logits[:, which].masked_fill(empty[:, None], float("-inf")))

    def feed(self, ids: Tensor, rows: np.ndarray, column: int) -> tuple[Tensor, np.ndarray]:
        """Take what was drawn, and return what is fed: tokens (n,) and their distances (n,) from the prompt's last one.

        Args:
            ids: (n,) drawn tokens.
            rows: (n,) the samples.
            column: where the cache will store what is fed.
        """
        fed = ids.cpu().numpy().copy()
        for place, row in enumerate(rows):
            stack = self.left[row]
            if fed[place] != self.backspace:
                stack.append((int(fed[place]), column))
                continue
            self.hidden[row, stack.pop()[1]] = True
            token, before = stack[-1]
            if before == PROMPT:
                self.prompt_hidden[row] = True
            else:
                self.hidden[row, before] = True
            stack[-1] = (token, column)
            fed[place] = token
        return torch.from_numpy(fed).to(ids), np.array([len(self.left[row]) - 1 for row in rows])

    def hide(self, cache: DecodeCache, rows: np.ndarray, columns: int) -> None:
        """Hide from each sample what it has deleted.

        Args:
            cache: holds the keys.
            rows: (n,) the samples that run.
            columns: number of tokens that each has fed, this step's included.
        """
        device = cache.lengths.device
        cache.erased = torch.from_numpy(self.hidden[rows, :columns]).to(device)
        unseen = torch.zeros(len(rows), cache.width, dtype=torch.bool)
        unseen[:, -1] = torch.from_numpy(self.prompt_hidden[rows])
        cache.unseen = unseen.to(device)
