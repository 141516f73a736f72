"""Mini-sequences: the feed-forward blocks of a network run over a few tokens at a time and again in the backward pass.

A feed-forward block acts on each token by itself, and widens it several times on the way. Over a long row these wide
activations are most of what a layer keeps for its backward pass. Run over chunks of tokens, whose activations are
computed again when their gradients are due, the block keeps its input alone:

    y = [f(x_1), ..., f(x_M)],   kept: x, and one chunk of the inside of f at a time

Outputs and gradients are the same; the block's products are computed twice. What the vocabulary costs is bounded anyway
(`text/vocabulary.py`), which is the paper's other half.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hone.errors import ModelError
from hone.networks import blocks_of

NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe")  # what transformers calls the feed-forward part of a block


def chunk_feed_forward(network: nn.Module, tokens: int) -> None:
    """Let the feed-forward part of every block run over chunks of tokens, recomputed in the backward pass.

    Args:
        network: a causal model of transformers; changed in place, names and weights stay.
        tokens: most tokens in a chunk.

    Raises:
        ModelError: a block has no part that is known as its feed-forward one.
    """
    for block in blocks_of(network).values():
        part = next((getattr(block, name) for name in NAMES if hasattr(block, name)), None)
        if part is None:
            named = ", ".join(name for name, _ in block.named_children())
            raise ModelError(
                f"mlp_chunk: the blocks of {type(network).__name__} have none of {', '.join(NAMES)} (found {named}); "
                "leave the option out"
            )
        part.forward = partial(in_chunks, part.forward, tokens)


def in_chunks(forward: Any, tokens: int, hidden: Tensor) -> Tensor:
    """Return a function of each token, (..., T, D) to (..., T, D), computed over chunks of tokens.

    Args:
        forward: the function.
        tokens: most tokens in a chunk.
        hidden: (..., T, D).

    Raises:
        ModelError: the function gives more than a tensor, as some mixtures of experts do.
    """
    count = -(-hidden.shape[-2] // tokens)
    if count <= 1:
        return _tensor(forward(hidden))
    recompute = torch.is_grad_enabled()
    made = [
        checkpoint(forward, part, use_reentrant=False) if recompute else forward(part)
        for part in hidden.chunk(count, dim=-2)
    ]
    return torch.cat([_tensor(part) for part in made], dim=-2)


def _tensor(output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise ModelError("mlp_chunk: this feed-forward part gives more than its output; leave the option out")
    return output
