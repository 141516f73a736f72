"""Losses over classes: functions of logits (n, K) and targets (n,), one value a row.

The classes may be labels (`classify.py`) or the tokens of the vocabulary (`LDR`). With f the logits, y the target and
d_k = f_k - f_y + margin [k != y]:

    cross-entropy   log sum_k exp(f_k) - f_y, its target smoothed where asked for
    focal           (1 - p_y)^gamma (-log p_y)
    LDR-KL          max_q sum_k q_k d_k - lambda KL(q, 1/K)  =  lambda log mean_k exp(d_k / lambda)
    ALDR-KL         the same with a lambda for each row, the smaller the surer the model is
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hone.objectives.base import Objective, trained
from hone.parts import part
from hone.text.vocabulary import vocabulary_sum

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed

ROUNDS = 5  # of the iteration that finds a row's own lambda
ClassLoss = Literal["cross-entropy", "focal", "ldr", "aldr"]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


def focal_loss(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Return (1 - p_y)^gamma (-log p_y), (n,).

    Args:
        logits: (n, K).
        targets: (n,) class numbers.
        gamma: how much less easy rows count; 0 is the cross-entropy.
    """
    logprob = -F.cross_entropy(logits, targets, reduction="none")
    # 1 - p by a function whose slope is finite at p = 1, where the power of a rounded 0 has none.
    rest = (-torch.expm1(logprob)).clamp_min(torch.finfo(logprob.dtype).tiny)
    return -(rest**gamma) * logprob


def bounded(logits: Tensor) -> Tensor:
    """Return softplus(f) / mean_k softplus(f_k), (n, K): outputs with mean 1 in every row, so that none can run away.

    Args:
        logits: f (n, K).
    """
    positive = F.softplus(logits)
    return positive / positive.mean(-1, keepdim=True)


def ldr_loss(logits: Tensor, targets: Tensor, temperature: float | Tensor, margin: float) -> Tensor:
    """Return the LDR-KL loss lambda log mean_k exp(d_k / lambda), (n,).

    lambda = 1 without margin is the cross-entropy less log K; lambda to 0 is the multi-class hinge loss, lambda to
    infinity a loss that is linear in the logits.

    Args:
        logits: f (n, K).
        targets: y (n,) class numbers.
        temperature: lambda, one or (n,).
        margin: by how much the target's logit shall exceed the others.
    """
    scale = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
    place = targets[:, None]
    gaps = (logits - logits.gather(-1, place) + margin).scatter(-1, place, 0.0)
    inner = (gaps / (scale[:, None] if scale.dim() else scale)).logsumexp(-1) - math.log(logits.shape[-1])
    return scale * inner


@torch.no_grad()
def adapted_temperature(logits: Tensor, temperature: float, adapt: float, rounds: int = ROUNDS) -> Tensor:
    """Return each row's own lambda (n,): the largest solution of l = lambda (1 - KL(softmax(f / l), 1/K) / (a log K)).

    The iteration from lambda falls monotonically, and never below lambda (1 - 1/a).

    Args:
        logits: f (n, K).
        temperature: lambda, which a row without any preference keeps.
        adapt: a, above 1: the larger, the less lambda adapts.
        rounds: iterations.
    """
    most = math.log(logits.shape[-1])
    found = logits.new_full(logits.shape[:-1], temperature)
    for _ in range(rounds):
        logprobs = (logits / found[..., None]).log_softmax(-1)
        divergence = (logprobs.exp() * logprobs).sum(-1) + most
        found = temperature * (1 - divergence / (adapt * most))
    return found


def aldr_loss(
    logits: Tensor, targets: Tensor, temperature: float, margin: float, adapt: float, rounds: int = ROUNDS
) -> Tensor:
    """Return the ALDR-KL loss (n,): LDR-KL at each row's own l, less a log K / (2 lambda) (l - lambda)^2.

    No gradient goes through l, at which the loss is stationary in it but for the margin.

    Args:
        logits: f (n, K).
        targets: y (n,) class numbers.
        temperature: lambda, which a row without any preference keeps.
        margin: by how much the target's logit shall exceed the others.
        adapt: a, above 1: the larger, the less lambda adapts.
        rounds: iterations in search of l.
    """
    own = adapted_temperature(logits, temperature, adapt, rounds)
    price = adapt * math.log(logits.shape[-1]) / (2 * temperature)
    return ldr_loss(logits, targets, own, margin) - price * (own - temperature).square()


@part(
    "objective",
    "ldr",
    papers=[
        (
            "Label Distributionally Robust Losses for Multi-class Classification: Consistency, Robustness and "
            "Adaptivity",
            "arXiv:2112.14869",
        )
    ],
    claim="A cross-entropy whose temperature adapts to each instance suffers less from wrong labels.",
    deviations="The classes are the tokens of the vocabulary; for labels, see `classify` with loss ldr or aldr. The "
    "logits are used as they are, where the authors' code divides softplus(f) by its mean, which would undo what a "
    "pretrained head means. Each row's lambda is found anew by five iterations, where theirs keeps the one that the "
    "sample had at its last visit and makes one more; as theirs, it looks at the logits without the margin.",
)
@dataclass(kw_only=True)
class LDR(Objective):
    """Label-distributionally robust loss of the next token: the worst case over how wrong its label may be.

    loss = sum_t w_t l log mean_v exp((f_v - f_y + margin [v != y]) / l)

    with l = temperature, or with `adapt` = a each token's own, less a log V / (2 temperature) (l - temperature)^2.

    Args:
        temperature: how far the worst case is kept from a uniform distribution; 1 without margin is the likelihood.
        margin: by how much the target's logit shall exceed the others.
        adapt: above 1, the larger the less temperatures adapt; None uses one for all.
    """

    temperature: Positive = 1.0
    margin: NotNegative = 0.0
    adapt: Annotated[float, Field(gt=1)] | None = None

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss over trained tokens, and the weight of those that are likeliest as "token_accuracy".

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        predictors, targets, weights = trained(batch)
        hits = torch.empty_like(weights)
        states = model.hidden(batch)[predictors]
        loss = vocabulary_sum(states, model.head, targets, weights, self._value, hits=hits)
        return loss, {"token_accuracy": (weights * hits).sum()}

    def _value(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.adapt is None:
            return ldr_loss(logits, targets, self.temperature, self.margin)
        return aldr_loss(logits, targets, self.temperature, self.margin, self.adapt)
