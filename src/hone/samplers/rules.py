"""A rule-based adapter: a hand-written distribution of the next token, in a product with the model's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hone.options import Nested
from hone.parts import part
from hone.precision import wide
from hone.samplers.text import greedy, of_tokens, pick, read_along

if TYPE_CHECKING:
    from hone.text.generate import History
    from hone.text.model import LanguageModel

# What begins formatting or goes on asking is less likely, what formats an answer is likelier.
SHIFTS = {
    "<": -4.0, " <": -4.0, "|": -4.0, " I": -5.0, "I": -5.0, " We": -3.0, "What": -5.0, " should": -6.0, " *": 1.0,
    " -": 1.0, "   ": 1.0, " #": 1.0, " ##": 1.0, "\n": 1.0, "!": 1.0,
}  # fmt: skip
_WRITTEN = {"\u2581": " ", "\u0120": " ", "\u010a": "\n", "<0x0A>": "\n"}  # how vocabularies write white space


def rule_scores(
    vocabulary: int,
    drawn: np.ndarray,
    seen: Sequence[np.ndarray],
    stop: np.ndarray,
    shifts: Mapping[int, float],
    *,
    end: float,
    length: int,
    repetition: float,
) -> Tensor:
    """Return the scores (N, V) of the hand-written distribution softmax(scores), float64 on the CPU.

    s(v) = end min(n / length, 1) [v ends an answer] - repetition [v was seen] + shift(v)

    Args:
        vocabulary: V.
        drawn: (N, n) ids of the answers so far.
        seen: per row further ids that count as seen, those of its prompt.
        stop: ids that end an answer.
        shifts: score of single tokens, everywhere in an answer.
        end: score of ending an answer of `length` tokens; it rises to that in a straight line.
        length: tokens.
        repetition: what a token's score falls by once it has been seen, however often.
    """
    scores = torch.zeros(len(drawn), vocabulary, dtype=torch.float64)
    for row, (own, before) in enumerate(zip(drawn, seen, strict=True)):
        known = np.setdiff1d(np.union1d(own, before), stop).astype(np.int64)  # a chat template ends turns before
        scores[row, torch.from_numpy(known)] -= repetition
    for token, shift in shifts.items():
        scores[:, token] += shift
    scores[:, torch.from_numpy(stop.astype(np.int64))] += end * min(drawn.shape[1] / length, 1.0)
    return scores


@part(
    "sampler",
    "rule-based",
    papers=[("Instruction Following without Instruction Tuning", "arXiv:2409.14254")],
    claim="A hand-written distribution of three rules, in a product with a pretrained model's, makes that follow "
    "instructions without any training.",
    deviations="Constants and words are those of the paper's repository, where the words are ids of Llama 2; those "
    "that are no single token of a vocabulary are passed over. The repository's further rule that an answer begins "
    "with 'Okay!' is left out. Behind `length` tokens the score of ending stays (there it goes back to 0).",
)
@dataclass(kw_only=True)
class RuleBased:
    """Pick from the product of the model's distribution and a hand-written one: p(v) q(v), made to sum to 1.

    log q(v) = end min(n / length, 1) [v ends an answer] - repetition [v stands in the prompt or the answer] + shift(v)
    + constant, with n the tokens of the answer so far. What ends an answer never counts as seen.

    Args:
        end: score of ending an answer of `length` tokens, in nats; it rises to that in a straight line.
        length: tokens of an answer at which that score is reached.
        repetition: what the score of a token falls by once it has been seen, however often, in nats.
        prompt: whether the tokens of the prompt count as seen.
        shifts: scores of single tokens by their text, in nats, everywhere in an answer.
        then: sampler that picks from the product; None takes the most probable token.
    """

    looks_back: ClassVar[bool] = True
    end: float = 15.0
    length: Annotated[int, Field(ge=1)] = 250
    repetition: Annotated[float, Field(ge=0)] = 1.5
    prompt: bool = True
    shifts: dict[str, float] = field(default_factory=lambda: dict(SHIFTS))
    then: Annotated[Any, Nested("sampler")] = None
    _ids: dict[int, float] | None = field(default=None, init=False, repr=False)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the sampler inside."""
        yield from of_tokens(self.then, "then")

    def beside(self, model: LanguageModel) -> Sequence[LanguageModel]:
        """Return the models that the sampler inside has read along.

        Args:
            model: the one that answers.
        """
        return read_along(self.then, model)

    def __call__(self, logits: Tensor, uniforms: Tensor, history: History) -> Tensor:
        """Return (N,) token ids.

        Args:
            logits: (N, V) scores of the next token.
            uniforms: (N,) numbers in [0, 1).
            history: what each row has drawn, and after which prompt.
        """
        asked = [history.prompts[which] for which in history.which] if self.prompt and len(history.prompts) else []
        scores = rule_scores(
            logits.shape[-1], history.tokens, asked or [np.zeros(0, np.int64)] * len(logits), history.stop,
            self._shifts(history.tokenizer), end=self.end, length=self.length, repetition=self.repetition,
        )  # fmt: skip
        logits = wide(logits)
        return pick(self.then or greedy, logits + scores.to(logits), uniforms, history)

    def _shifts(self, tokenizer: Any) -> dict[int, float]:
        """Return the shifts by token id, looked up once."""
        if tokenizer is None:
            return {}
        if self._ids is None:
            self._ids = token_shifts(tokenizer, self.shifts)
        return self._ids


def token_shifts(tokenizer: Any, shifts: Mapping[str, float]) -> dict[int, float]:
    """Return the shifts of single tokens by id; texts that are no token of the vocabulary are passed over.

    Args:
        tokenizer: the model's tokenizer.
        shifts: score by the token's text, white space written as such.
    """
    found = {}
    for token, number in tokenizer.get_vocab().items():
        text = str(token)
        for mark, space in _WRITTEN.items():
            text = text.replace(mark, space)
        if text in shifts:
            found[number] = shifts[text]
    return found
