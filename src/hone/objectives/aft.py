"""Alignment fine-tuning: likelihood, and a ranking of answers that keeps the worse ones in a reasonable range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from hone.objectives.answers import Pairs, answers_of, best_of, pairs_of, token_values, tree_field
from hone.objectives.preference import Preference, Side
from hone.parts import part

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed

Constraint = Literal["boundary", "detached", "none"]


def alignment_loss(scores: Tensor, pairs: Pairs, prompts: int, constraint: Constraint, boundary: float) -> Tensor:
    """Return the ranking loss of each prompt (B,).

    none: log(1 + sum_(i better than j) e^(s_j - s_i));  detached: the same, s_j without gradient;
    boundary: log(1 + sum [e^(s_j - s_i) + e^(T_j - s_j)]),  T_j = min_(i better than j) s_i - 2 boundary, detached too

    Args:
        scores: s (A,) mean log-probability of a token of each answer.
        pairs: which answers are better than which.
        prompts: B.
        constraint: what keeps worse answers from being pushed down without end.
        boundary: how far below the better answers a worse one may lie before it is held, in nats per token.
    """
    better, worse = scores[pairs.chosen], scores[pairs.rejected]
    trees = pairs.trees.to(scores.device)
    terms = (worse.detach() if constraint == "detached" else worse) - better
    if constraint == "boundary":
        lowest = torch.full_like(scores, float("inf")).scatter_reduce(0, pairs.rejected, better.detach(), "amin")
        terms = torch.cat([terms, lowest[pairs.rejected] - 2 * boundary - worse])
        trees = torch.cat([trees, trees])
    own = trees[None] == torch.arange(prompts, device=scores.device)[:, None]
    table = torch.where(own, terms[None], float("-inf"))
    return torch.cat([torch.zeros_like(table[:, :1]), table], 1).logsumexp(1)


@part(
    "objective",
    "aft",
    papers=[("Making Large Language Models Better Reasoners with Alignment", "arXiv:2309.02144")],
    claim="Ranking right chains of thought above wrong ones reasons better than likelihood alone if the wrong ones are "
    "kept in a reasonable range; without that constraint ranking makes the model worse.",
    deviations="Verified from abstract and reviews, not from the paper's equations: the boundary term is written so "
    "that a worse answer's gradient is 0 at `boundary` below the better one, where there is one; the default of "
    "`boundary` is ours. Of a list, every pair of unlike scores is ranked.",
)
@dataclass(kw_only=True)
class AFT(Preference):
    """Alignment fine-tuning, on pairs and on ranked lists.

    loss = -sft s_best + log(1 + sum_(i better than j) [e^(s_j - s_i) + e^(T_j - s_j)]),  s = log pi(y|x) / |y|

    with T_j = min_(i better than j) s_i - 2 boundary, without gradient. The unit is the prompt, whose pairs share one
    logarithm; the figures of pairs are means over those of a prompt.

    Args:
        constraint: what keeps worse answers from being pushed down without end: the second exponential ("boundary"), no
            gradient through their scores ("detached"), or nothing ("none").
        boundary: how far below the lowest better answer a worse one is let alone, in nats per token.
        sft: weight of the negative log-likelihood per token of the best answer.
    """

    constraint: Constraint = "boundary"
    boundary: Annotated[float, Field(ge=0)] = 1.0
    sft: Annotated[float, Field(ge=0)] = 1.0

    def reward(self, side: Side) -> Tensor:
        """Return the mean log-probability of a token of each answer (P,)."""
        return side.mean

    def count(self, batch: Packed) -> float:
        """Return the summed weights of the batch's prompts.

        Args:
            batch: B trees as a packed forest of T tokens.
        """
        return float(tree_field(batch, "weight", torch.arange(len(batch.where)), 1.0).sum())

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over the batch's prompts, and what is reported, summed alike.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        answers = answers_of(batch)
        pairs = pairs_of(batch, answers)
        scores = answers.sums(token_values(model, batch)) / answers.tokens
        weights = tree_field(batch, "weight", torch.arange(len(batch.where)), 1.0)
        ranking = alignment_loss(scores, pairs, len(batch.where), self.constraint, self.boundary)
        total = (weights * (ranking - self.sft * scores[best_of(batch, answers)])).sum()
        with torch.no_grad():
            trees = pairs.trees.to(scores.device)
            share = (weights / torch.bincount(trees, minlength=len(weights)))[trees]  # of each pair (P,)
            better, worse = scores[pairs.chosen], scores[pairs.rejected]
            metrics = {
                "pair_accuracy": (share * (better > worse)).sum(), "margin": (share * (better - worse)).sum(),
                "better": (share * better).sum(), "worse": (share * worse).sum(),
            }  # fmt: skip
        return total, metrics
