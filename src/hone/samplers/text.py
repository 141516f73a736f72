"""How the next token is picked from logits: greedy, and sampling from a tempered and truncated distribution.

A sampler is a function of the logits and of one uniform number per row, and of nothing else, so that what a row draws
does not depend on which other rows stand beside it:

    sampler(logits (N, V), uniforms (N,)) -> (N,) token ids

The filters are pure functions that set the logits of excluded tokens to minus infinity.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from hone.parts import part


def greedy(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Return the most probable token of each row, the first of equals.

    Args:
        logits: (N, V) scores of the next token.
        uniforms: (N,) numbers in [0, 1), unused.

    Returns:
        (N,) int64 token ids.
    """
    return logits.argmax(dim=-1)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Exclude every token that scores below the k-th best of its row; equals of the k-th best stay.

    Args:
        logits: (N, V) scores.
        k: how many tokens stay, at least 1.
    """
    kth = logits.topk(min(k, logits.shape[-1]), dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the smallest set of most probable tokens whose probabilities sum to at least `p` (the nucleus).

    Args:
        logits: (N, V) scores.
        p: probability that the kept tokens reach together, in (0, 1].
    """
    ordered, ids = logits.sort(dim=-1)
    out = ordered.softmax(dim=-1).cumsum(dim=-1) <= 1 - p  # ascending: what is left after dropping it still reaches p
    out[:, -1] = False
    return logits.masked_fill(torch.zeros_like(out).scatter(-1, ids, out), float("-inf"))


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Exclude every token less probable than `p` times the most probable token of its row.

    Args:
        logits: (N, V) scores.
        p: fraction of the largest probability, in [0, 1].
    """
    probs = logits.softmax(dim=-1)
    return logits.masked_fill(probs < p * probs.amax(dim=-1, keepdim=True), float("-inf"))


def draw(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row by inverting its cumulative distribution: the first id where the sum exceeds u.

    Args:
        probs: (N, V) non-negative weights, normalised or not; use float64, as float32 sums lose rare tokens.
        uniforms: (N,) numbers in [0, 1).

    Returns:
        (N,) int64 token ids; none has weight 0.
    """
    total = probs.cumsum(dim=-1)
    target = uniforms.to(total)[:, None] * total[:, -1:]
    ids = torch.searchsorted(total, target, right=True)[:, 0]
    return ids.clamp(max=probs.shape[-1] - 1)  # only rows with a NaN reach V; whoever called reports those


def pick(sampler: Any, logits: Tensor, uniforms: Tensor, history: Any) -> Tensor:
    """Return what a sampler picks, shown what was drawn before when it looks back.

    Args:
        sampler: called with logits and uniforms, and with the history where its `looks_back` is true.
        logits: (N, V) scores of the next token.
        uniforms: (N,) numbers in [0, 1).
        history: what each row has drawn (`hone.text.generate.History`).

    Returns:
        (N,) int64 token ids.
    """
    ids: Tensor = sampler(logits, uniforms, *([history] if getattr(sampler, "looks_back", False) else []))
    return ids


def of_tokens(sampler: Any, field: str) -> Iterator[tuple[str, str]]:
    """Yield that a sampler inside another one does not pick tokens, if so.

    Args:
        sampler: the one inside, None for the most probable token.
        field: the option that holds it.
    """
    if hasattr(sampler, "choose"):
        yield field, f"expected a sampler that picks tokens; '{sampler.name}' chooses among whole answers"


def read_along(sampler: Any, model: Any) -> Sequence[Any]:
    """Return the models that a sampler inside another one has read along, () for none.

    Args:
        sampler: the one inside.
        model: the one that answers.
    """
    found: Sequence[Any] = sampler.beside(model) if hasattr(sampler, "beside") else ()
    return found


@part("sampler", "greedy", papers="original")
@dataclass(kw_only=True)
class Greedy:
    """Take the most probable token at every step."""

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Return (N,) token ids for (N, V) `logits`; `uniforms` is unused."""
        return greedy(logits, uniforms)


@part(
    "sampler",
    "sample",
    papers=[
        ("The Curious Case of Neural Text Degeneration", "arXiv:1904.09751"),
        ("Hierarchical Neural Story Generation", "arXiv:1805.04833"),
        ("Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs", "arXiv:2407.01082"),
    ],
    claim="Sampling from the nucleus gives text that repeats itself less than greedy search does and is less "
    "incoherent than sampling from the whole distribution.",
)
@dataclass(kw_only=True)
class Sample:
    """Draw from softmax(logits / temperature), truncated.

    The truncations apply after the temperature, in the order top-k, top-p, min-p, each on what the one before left.

    Args:
        temperature: divides the logits; below 1 sharpens, above 1 flattens, 0 takes the most probable token.
        top_k: number of most probable tokens that stay; None keeps all.
        top_p: probability that the kept most probable tokens reach together, in (0, 1]; 1 keeps all.
        min_p: tokens less probable than this fraction of the most probable one are dropped, in [0, 1]; 0 keeps all.
    """

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return the (N, V) float64 distribution that tokens are drawn from, for (N, V) `logits`.

        The temperature must not be 0. It is computed on the CPU when `logits` are on a device without float64 (MPS).
        """
        logits = logits.cpu() if logits.device.type == "mps" else logits
        scores = logits.double()
        # Subtracting the maximum first keeps a temperature near 0 from overflowing to inf - inf.
        scores = (scores - scores.amax(dim=-1, keepdim=True)) / self.temperature
        if self.top_k is not None:
            scores = keep_top_k(scores, self.top_k)
        if self.top_p < 1:
            scores = keep_top_p(scores, self.top_p)
        if self.min_p > 0:
            scores = keep_min_p(scores, self.min_p)
        return scores.softmax(dim=-1)

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Return (N,) token ids drawn for (N, V) `logits` with the (N,) `uniforms` in [0, 1)."""
        if self.temperature == 0:
            return greedy(logits, uniforms)
        return draw(self.probabilities(logits), uniforms).to(logits.device)
