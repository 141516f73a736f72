"""Answers of a packed forest: which segments they are, how likely a model finds each, and which of them meet.

An answer is a segment with trained tokens. Answers to one prompt are children of one segment, so that the prompt is
computed once. Everything here works on whole answers: log pi(y|x) = sum_t w_t log p(y_t | x, y_<t), which takes one
`vocabulary_map` over the trained tokens of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hone.errors import DataError
from hone.objectives.base import trained
from hone.text.pack import CHOSEN, SCORE
from hone.text.vocabulary import token_logprobs

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed


@dataclass(frozen=True)
class Answers:
    """The A answers of a batch, in packed order.

    Args:
        segments: (A,) their segments; on the CPU.
        trees: (A,) number of the tree that each belongs to; on the CPU.
        tokens: (A,) number of trained tokens, as a float.
        token_answers: (N,) the answer that each trained token of the batch belongs to.
    """

    segments: Tensor
    trees: Tensor
    tokens: Tensor
    token_answers: Tensor

    def __len__(self) -> int:
        """Return A, the number of answers."""
        return len(self.segments)

    def sums(self, values: Tensor) -> Tensor:
        """Return the sums (A,) over each answer's tokens of values (N,) per trained token."""
        return values.new_zeros(len(self)).index_add(0, self.token_answers, values)


def answers_of(batch: Packed) -> Answers:
    """Return the answers of a batch: its segments with a trained token.

    Args:
        batch: packed forest of T tokens.
    """
    lengths = batch.starts.diff()
    owner = torch.arange(batch.segments).repeat_interleave(lengths)
    chosen = batch.weights.nonzero().squeeze(1).cpu()
    segments, token_answers, counts = owner[chosen].unique(return_inverse=True, return_counts=True)
    device = batch.tokens.device
    return Answers(
        segments=segments,
        trees=batch.trees[segments],
        tokens=counts.to(device=device, dtype=batch.weights.dtype),
        token_answers=token_answers.to(device),
    )


def token_values(model: LanguageModel, batch: Packed) -> Tensor:
    """Return w_t log p_t of each trained token (N,), in packed order.

    Args:
        model: gives hidden states (T, D) and the head.
        batch: packed forest of T tokens.
    """
    predictors, targets, weights = trained(batch)
    return weights * token_logprobs(model.hidden(batch)[predictors], model.head, targets)


def answer_logprobs(model: LanguageModel, batch: Packed, answers: Answers) -> Tensor:
    """Return log pi(y|x) of each answer (A,), summed over its trained tokens.

    Args:
        model: gives hidden states (T, D) and the head.
        batch: packed forest of T tokens.
        answers: its answers.
    """
    return answers.sums(token_values(model, batch))


@dataclass(frozen=True)
class Pairs:
    """The P pairs of a batch, as indices into its answers.

    Args:
        chosen: (P,) the preferred answers.
        rejected: (P,) those they are preferred to.
        trees: (P,) the trees of the pairs; on the CPU.
    """

    chosen: Tensor
    rejected: Tensor
    trees: Tensor

    def __len__(self) -> int:
        """Return P, the number of pairs."""
        return len(self.chosen)


def pairs_of(batch: Packed, answers: Answers) -> Pairs:
    """Return the pairs of a batch: in each tree, every answer with every one that is worse than it.

    Args:
        batch: packed forest with the field "chosen", or "score" where answers are ranked.
        answers: its answers.

    Raises:
        DataError: the answers of a tree are not said to differ.
    """
    worth = _worth(batch, answers)
    better = (answers.trees[:, None] == answers.trees[None]) & (worth[:, None] > worth[None])
    first, second = better.nonzero().unbind(1)
    trees = answers.trees[first]
    if len(trees.unique()) < len(batch.where):
        lacking = sorted(set(range(len(batch.where))) - set(trees.tolist()))[0]
        raise DataError(
            f"{batch.where[lacking]}: expected a preferred answer and another, each with trained tokens, found none "
            "that is better than another"
        )
    device = batch.tokens.device
    return Pairs(first.to(device), second.to(device), trees)


def best_of(batch: Packed, answers: Answers) -> Tensor:
    """Return the best answer of each tree (B,), the first of equals.

    Args:
        batch: packed forest with the field "chosen" or "score".
        answers: its answers.
    """
    worth = _worth(batch, answers)
    table = worth.new_full((len(batch.where), len(answers)), float("-inf"))
    table[answers.trees, torch.arange(len(answers))] = worth.nan_to_num(float("-inf"))
    return table.argmax(1).to(batch.tokens.device)


def _worth(batch: Packed, answers: Answers) -> Tensor:
    """Return the worth (A,) of each answer by which those of a tree are compared, NaN where it is not known."""
    marks = [batch.fields[name].cpu()[answers.segments] for name in (CHOSEN, SCORE) if name in batch.fields]
    if not marks:
        raise DataError("preference learning needs answers of which one is preferred, which this data lacks")
    return marks[0] if len(marks) == 1 else torch.where(marks[0].isnan(), marks[1], marks[0])


def tree_field(batch: Packed, name: str, trees: Tensor, default: float) -> Tensor:
    """Return a number that a sample carries, e.g. its margin, for each of some trees (n,).

    Args:
        batch: packed forest.
        name: name of the field.
        trees: (n,) numbers of trees.
        default: what stands where the data has no such number.
    """
    if name not in batch.fields:
        return batch.weights.new_full((len(trees),), default)
    first = torch.searchsorted(batch.trees, torch.arange(len(batch.where)))
    values = batch.fields[name][first.to(batch.tokens.device)][trees.to(batch.tokens.device)]
    return values.nan_to_num(default)
