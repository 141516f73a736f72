"""Next-token prediction: supervised fine-tuning on the answers, and pretraining on everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hone.objectives.base import Objective, Predictions, trained
from hone.parts import part
from hone.text.vocabulary import CrossEntropy, PerToken, vocabulary_sum

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed


@part(
    "objective",
    "sft",
    papers=[("Rethinking the Inception Architecture for Computer Vision", "arXiv:1512.00567")],
    claim="Label smoothing of 0.1 lowers the error on held-out data by about 0.2 points (ImageNet classification).",
    deviations="The paper is the source of the option label_smoothing only, which is off by default; here the classes "
    "are the tokens of the vocabulary. Fine-tuning on the likelihood of the answers has no paper of its own.",
)
@dataclass(kw_only=True)
class SFT(Objective):
    """Supervised fine-tuning: the negative log-likelihood of the tokens that the data marks as trained.

    loss = sum_t w_t [(1 - s) (-log p_t(token_t)) + s mean_v (-log p_t(v))], with s = label_smoothing and w_t the weight
    that rendering gave token t: 1 in answers, 0 in prompts. The unit is the token: the loop divides by sum_t w_t over
    the whole step.

    Args:
        label_smoothing: probability mass spread evenly over the vocabulary, in [0, 1).
    """

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss over trained tokens, and the weight of those that are likeliest as "token_accuracy".

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        return next_token_loss(model, batch, trained(batch), CrossEntropy(label_smoothing=self.label_smoothing))


@part(
    "objective",
    "pretrain",
    papers=[("PaLM: Scaling Language Modeling with Pathways", "arXiv:2204.02311")],
    claim="A z_loss of 1e-4 keeps the softmax normaliser log Z close to 0, which makes training more stable.",
    deviations="The paper is the source of the option z_loss only, which is off by default. Next-token prediction "
    "itself is older than any one paper.",
)
@dataclass(kw_only=True)
class Pretrain(Objective):
    """Language modelling: the negative log-likelihood of every token that has a predecessor, prompts included.

    loss = sum_t [-log p_t(token_t) + z_loss (log Z_t)^2], with Z_t the normaliser of the softmax that predicts token t.
    It consumes "tokens": data is rendered with a weight of 1 everywhere. The unit is the token.

    Args:
        z_loss: coefficient of (log Z)^2, which keeps logits from drifting; the paper uses 1e-4.
    """

    consumes: ClassVar[str] = "tokens"
    z_loss: Annotated[float, Field(ge=0)] = 0.0

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss over predicted tokens, and how many of them are likeliest as "token_accuracy".

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        return next_token_loss(model, batch, trained(batch), CrossEntropy(z_loss=self.z_loss))


def next_token_loss(
    model: LanguageModel, batch: Packed, predictions: Predictions, function: PerToken
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a weighted sum of a loss over predictions, and {"token_accuracy": weight of the correct ones}.

    Args:
        model: gives hidden states (T, D) and the head.
        batch: packed forest of T tokens.
        predictions: the N predictions that count.
        function: the loss of a token, e.g. the cross-entropy.
    """
    predictors, targets, weights = predictions
    hidden = model.hidden(batch)[predictors]
    hits = torch.empty_like(weights)
    loss = vocabulary_sum(hidden, model.head, targets, weights, function, hits=hits)
    return loss, {"token_accuracy": (weights * hits).sum()}
