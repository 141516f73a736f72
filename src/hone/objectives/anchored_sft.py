"""Supervised fine-tuning that looks at other models' likelihood of each answer: the starting one's, or better ones'.

The unit is the answer, whose tokens are averaged: every answer pulls equally, however long it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hone.objectives.answers import answers_of, token_values, tree_field
from hone.objectives.base import Objective
from hone.objectives.named_reference import named_reference
from hone.objectives.preference import Positive
from hone.objectives.reference import Reference, Referring
from hone.parts import part

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed


@dataclass(kw_only=True)
class PerAnswer(Objective):
    """The base of losses over single answers that each weigh what their sample's field "weight" says, 1 by default."""

    def count(self, batch: Packed) -> float:
        """Return the summed weights of the batch's answers.

        Args:
            batch: B trees as a packed forest of T tokens.
        """
        return float(tree_field(batch, "weight", answers_of(batch).trees, 1.0).sum())


def learnt_less(logratio: Tensor, beta: float) -> Tensor:
    """Return by how much answers still count that a model finds more likely than its reference does: 2 s(-beta r).

    1 where the two agree, falling to 0 as an answer is learnt.

    Args:
        logratio: (A,) r = log pi(y|x) - log pi_ref(y|x).
        beta: how fast they count less; 0 never.
    """
    return 2 * torch.sigmoid(-beta * logratio)


@part(
    "objective",
    "minor-sft",
    papers=[
        (
            "Minor SFT loss for LLM fine-tune to increase performance and reduce model deviation",
            "arXiv:2408.10642",
        )
    ],
    claim="Weighing each answer by how little it has been learnt yet gives better answers than plain fine-tuning while "
    "the model moves less from where it started.",
    deviations="The log-ratio inside the sigmoid is summed over the answer, as the paper has it; TorchRL's version "
    "takes its mean and leaves the factor 2 / beta out. What is reported as the loss is the weighted likelihood, whose "
    "gradient is the paper's, not its antiderivative 2 / (beta |y|) log(1 + e^(-beta r)).",
)
@dataclass(kw_only=True)
class MinorSFT(PerAnswer, Referring):
    """Fine-tuning in which an answer weighs less the more likely it has become.

    loss = sum_answers -(2 / |y|) s(-beta r) log pi(y|x),  r = log pi(y|x) - log pi_ref(y|x)

    where the coefficient, that of DPO for a single answer, is a constant. Reported beside the loss: "nll" (mean
    negative log-likelihood of an answer's tokens) and "deviation" (mean of r / |y|, by which the model has moved).

    Args:
        beta: how fast an answer counts less as it is learnt, per nat of its log-ratio; 0 is plain fine-tuning with
            every answer's tokens averaged.
    """

    beta: Annotated[float, Field(ge=0)] = 0.1

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over the batch's answers, and what is reported, summed alike.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        answers = answers_of(batch)
        reference = self.reference_values(model, batch)
        values = token_values(model, batch)
        mean = answers.sums(values) / answers.tokens
        ratio = answers.sums(values.detach() - reference.to(values.dtype))
        weights = tree_field(batch, "weight", answers.trees, 1.0)
        total = -(weights * learnt_less(ratio, self.beta) * mean).sum()
        metrics = {"nll": -(weights * mean.detach()).sum(), "deviation": (weights * ratio / answers.tokens).sum()}
        return total, metrics


def favour(score: Tensor, others: Sequence[Tensor], beta: float) -> Tensor:
    """Return -log s(beta (score - mean_j other_j)) of each answer (A,).

    Args:
        score: (A,) the trained model's.
        others: J scores (A,) of other models.
        beta: sharpness of the comparison.
    """
    return -F.logsigmoid(beta * (score - torch.stack(list(others)).mean(0)))


@part(
    "objective",
    "poft",
    papers=[
        (
            "Preference-Oriented Supervised Fine-Tuning: Favoring Target Model Over Aligned Large Language Models",
            "arXiv:2412.12865",
        )
    ],
    claim="Preferring the trained model to aligned ones on the same data weighs samples by the likelihood that those "
    "give them, which makes fine-tuning robust to bad samples.",
    deviations="Verified against the authors' code, whose beta is 1. References must share the tokenizer; there each "
    "may have its own, since only its mean over tokens enters.",
)
@dataclass(kw_only=True)
class PoFT(PerAnswer):
    """Preference-oriented fine-tuning: the trained model shall find each answer likelier than reference models do.

    loss = sum_answers -log s(beta (s - mean_j s_j)),  s = log pi(y|x) / |y|

    An answer's gradient is weighed by s(beta (mean_j s_j - s)): more where the references find it likely, less where
    they do not. The references' values are computed once, before the first step, and kept on disk. Reported beside the
    loss: "nll" (mean negative log-likelihood of an answer's tokens) and "favoured" (share of answers that the trained
    model finds likelier than the references do in the mean).

    Args:
        references: the aligned models: "base", folders or Hub names; "start" is the model that the run starts from.
        beta: sharpness of the comparison, per nat a token.
    """

    references: Annotated[list[str], Field(min_length=1)] = field(default_factory=lambda: ["start"])
    beta: Positive = 1.0
    _references: list[Reference] = field(init=False, default_factory=list, repr=False)

    def setup(self, run: Any) -> None:
        """Score the data with the references.

        Args:
            run: the run in progress.

        Raises:
            HoneError: a reference is missing, or has another tokenizer.
        """
        self._references = [named_reference(run, name) for name in self.references]

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over the batch's answers, and what is reported, summed alike.

        Args:
            model: the language model that trains; before `setup` it is itself the reference.
            batch: B trees as a packed forest of T tokens.
        """
        answers = answers_of(batch)
        found = [reference.token_values(model, batch) for reference in self._references]
        values = token_values(model, batch)
        score = answers.sums(values) / answers.tokens
        others = [answers.sums(v.to(values.dtype)) / answers.tokens for v in found or [values.detach()]]
        weights = tree_field(batch, "weight", answers.trees, 1.0)
        total = (weights * favour(score, others, self.beta)).sum()
        ours = score.detach()
        ahead = ours > torch.stack(others).mean(0)
        return total, {"nll": -(weights * ours).sum(), "favoured": (weights * ahead).sum()}
