"""How soon thinking ends: the temperature of the decision to stop, apart from that of all other tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hone.errors import HoneError, nearest
from hone.options import Nested
from hone.parts import part
from hone.samplers.text import greedy, of_tokens, pick, read_along
from hone.text.template import plain_ids

if TYPE_CHECKING:
    from hone.text.generate import History
    from hone.text.model import LanguageModel


def stopping_logits(logits: Tensor, stop: Tensor, temperature: float) -> Tensor:
    """Return log-probabilities (N, V) in which those of the tokens that stop are divided by a temperature.

    Args:
        logits: (N, V) scores of the next token.
        stop: (n,) ids of the tokens that stop.
        temperature: above 1 stops sooner, below 1 later.
    """
    found = logits.log_softmax(-1)
    found[:, stop] = found[:, stop] / temperature
    return found


@part(
    "sampler",
    "stop-temperature",
    papers=[
        (
            "Making Small Language Models Efficient Reasoners: Intervention, Supervision, Reinforcement",
            "arXiv:2505.07961",
        )
    ],
    claim="A temperature of the decision to end thinking trades length for accuracy better than cutting answers off.",
    deviations="The paper's text and code were not at hand. Which form its scaling has is open: here the "
    "log-probability of stopping is divided, so that the choice does not depend on a constant in the logits.",
)
@dataclass(kw_only=True)
class StopTemperature:
    """Pick by another sampler with the probability of stopping tempered: p(v)^(1 / stop), p(v) for all other tokens.

    Args:
        stop: temperature of stopping; above 1 answers are shorter, below 1 longer; 1 changes nothing.
        token: text of the token that ends thinking, e.g. "</think>", changed until it has been drawn; None takes those
            that end the answer.
        sampler: what picks; None takes the most probable token.
    """

    looks_back: ClassVar[bool] = True
    stop: Annotated[float, Field(gt=0)] = 1.0
    token: str | None = None
    sampler: Annotated[Any, Nested("sampler")] = None
    _id: int | None = field(init=False, default=None, repr=False)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the sampler inside."""
        yield from of_tokens(self.sampler, "sampler")

    def beside(self, model: LanguageModel) -> Sequence[LanguageModel]:
        """Return the models that the sampler inside has read along.

        Args:
            model: the one that answers.
        """
        return read_along(self.sampler, model)

    def __call__(self, logits: Tensor, uniforms: Tensor, history: History) -> Tensor:
        """Return (N,) token ids for (N, V) `logits`.

        Args:
            logits: (N, V) scores of the next token.
            uniforms: (N,) numbers in [0, 1).
            history: what each row has drawn, and the ids that end an answer.
        """
        scores = logits.double().cpu() if logits.device.type == "mps" else logits.double()
        if self.token is None:
            scores = stopping_logits(scores, torch.from_numpy(history.stop).to(scores.device), self.stop)
        else:
            end = self._ending(history)
            thinking = torch.from_numpy(~(history.tokens == end).any(axis=1)).to(scores.device)
            changed = stopping_logits(scores, torch.tensor([end], device=scores.device), self.stop)
            scores = torch.where(thinking[:, None], changed, scores)
        scores = scores.float() if logits.device.type == "mps" else scores  # which knows no float64
        return pick(self.sampler or greedy, scores.to(logits.device), uniforms, history)

    def _ending(self, history: History) -> int:
        """Return the id of the token that ends thinking."""
        if self._id is None:
            ids = [] if history.tokenizer is None else plain_ids(history.tokenizer, str(self.token))
            if len(ids) != 1:
                known = {} if history.tokenizer is None else history.tokenizer.get_vocab()
                raise HoneError(
                    f"sampler.token: '{self.token}' is no single token of the model "
                    f"({nearest(str(self.token), known) or 'none is near'})"
                )
            self._id = int(np.asarray(ids[0]))
        return self._id
