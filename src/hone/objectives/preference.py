"""Learning from preferences: what all losses over pairs of answers share.

Four axes, each chosen on its own; a published name is a row of choices (`dpo.py`, `anchored.py`, `reference_free.py`):

    score        of an answer: its log-probability, its log-ratio to a reference, or a function of one (a divergence)
    length       scores as sums over tokens, or as means
    surrogate    what the margin of a pair costs (`surrogates.py`)
    regulariser  the likelihood of the preferred answer beside it

One prompt with its answers is one tree, so the prompt is computed once for all of them, and the policy's values of a
batch take one pass over the trained tokens. The unit is the pair: the loop divides by the pairs of the whole step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hone.objectives.answers import Answers, Pairs, answers_of, best_of, pairs_of, token_values, tree_field
from hone.objectives.base import Objective
from hone.objectives.reference import Referring

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Side:
    """One side of P pairs: the preferred answers, or those they are preferred to.

    Args:
        logprob: (P,) log pi(y|x), summed over tokens.
        reference: (P,) log pi_ref(y|x); zeros where there is no reference.
        tokens: (P,) number of trained tokens.
    """

    logprob: Tensor
    reference: Tensor
    tokens: Tensor

    @property
    def logratio(self) -> Tensor:
        """Log-ratio to the reference, log pi(y|x) - log pi_ref(y|x), (P,)."""
        return self.logprob - self.reference

    @property
    def mean(self) -> Tensor:
        """Mean log-probability of a token, (P,)."""
        return self.logprob / self.tokens


@dataclass(kw_only=True)
class Preference(Objective):
    """The base of losses over pairs; a subclass gives `pair_loss`, and its reward if that is not the log-probability.

    loss = sum_pairs weight pair_loss - sum_prompts weight sft log pi(y_best|x) / |y_best|

    A pair weighs what its sample's field "weight" says, 1 where there is none. Reported beside the loss:
    "pair_accuracy"
    (share of pairs whose preferred answer has the larger reward), "margin" (difference of the rewards), "better" and
    "worse" (mean log-probability of a token of the preferred and of the other answers).

    Args:
        sft: weight of the negative log-likelihood per token of the preferred answer, of a list the best.
    """

    consumes: ClassVar[str] = "pairs"
    sft: Annotated[float, Field(ge=0)] = 0.0

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred answers.
            rejected: the others.
            margin: (P,) by how much the data says that the one is better, NaN where it says nothing.

        Raises:
            NotImplementedError: the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define pair_loss(chosen, rejected, margin)")

    def reward(self, side: Side) -> Tensor:
        """Return what the loss takes for the worth of each answer (P,), for reports; here log pi(y|x)."""
        return side.logprob

    def count(self, batch: Packed) -> float:
        """Return the summed weights of the batch's pairs.

        Args:
            batch: B trees as a packed forest of T tokens.
        """
        pairs = pairs_of(batch, answers_of(batch))
        return float(tree_field(batch, "weight", pairs.trees, 1.0).sum())

    def reference_values(self, model: LanguageModel, batch: Packed) -> Tensor | None:
        """Return w_t log p_ref of each trained token (N,), None without a reference; here none."""
        return None

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over the batch's pairs, and what is reported, summed alike.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        answers = answers_of(batch)
        pairs = pairs_of(batch, answers)
        reference = self.reference_values(model, batch)
        values = token_values(model, batch)
        chosen, rejected = self._sides(answers, pairs, values, reference)
        weights = tree_field(batch, "weight", pairs.trees, 1.0)
        margin = tree_field(batch, "margin", pairs.trees, float("nan"))
        losses = self.pair_loss(chosen, rejected, margin)
        total = (weights * losses).sum()
        if self.sft:
            best = best_of(batch, answers)
            likelihood = answers.sums(values)[best] / answers.tokens[best]
            total = total - self.sft * (tree_field(batch, "weight", answers.trees[best.cpu()], 1.0) * likelihood).sum()
        with torch.no_grad():
            gap = self.reward(chosen) - self.reward(rejected)
            metrics = {
                "pair_accuracy": (weights * (gap > 0)).sum(), "margin": (weights * gap).sum(),
                "better": (weights * chosen.mean).sum(), "worse": (weights * rejected.mean).sum(),
            }  # fmt: skip
        return total, metrics

    def _sides(self, answers: Answers, pairs: Pairs, values: Tensor, reference: Tensor | None) -> tuple[Side, Side]:
        """Return the two sides of the batch's pairs."""
        reference = torch.zeros_like(values) if reference is None else reference.to(values.dtype)
        ours, theirs = self.whole(answers, pairs, values), self.whole(answers, pairs, reference)
        tokens = answers.tokens[pairs.chosen], answers.tokens[pairs.rejected]
        return Side(ours[0], theirs[0], tokens[0]), Side(ours[1], theirs[1], tokens[1])

    def whole(self, answers: Answers, pairs: Pairs, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return token values (N,) summed over each pair's two answers, (P,) and (P,).

        Args:
            answers: the batch's answers.
            pairs: which of them meet.
            values: (N,) per trained token.
        """
        sums = answers.sums(values)
        return sums[pairs.chosen], sums[pairs.rejected]


@dataclass(kw_only=True)
class Referenced(Referring, Preference):
    """The base of losses over log-ratios to a reference model: the model that the run starts from.

    Args:
        beta: strength of the pull towards the reference; the reward of an answer is beta times its log-ratio.
    """

    beta: Positive = 0.1

    def reward(self, side: Side) -> Tensor:
        """Return beta (log pi - log pi_ref) of each answer (P,)."""
        return self.beta * side.logratio
