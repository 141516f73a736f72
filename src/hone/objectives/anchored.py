"""Losses that judge each answer of a pair by itself, with the reference as an anchor, not their difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from hone.objectives.preference import Referenced, Side
from hone.parts import part


def apo_zero(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return 1 - s(r_w) + s(r_l) of rewards (P,): the preferred answer up, the other one down."""
    return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)


def apo_down(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return s(r_w) + 1 - s(r_w - r_l) of rewards (P,): both down, the other one further."""
    return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)


@part(
    "objective",
    "apo",
    papers=[
        (
            "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
            "arXiv:2408.06266",
        )
    ],
    claim="Saying which way the likelihood of each answer shall move, by how good the model is already, trains better "
    "than "
    "a difference alone.",
)
@dataclass(kw_only=True)
class APO(Referenced):
    """Anchored preference optimisation, with r = beta log(pi / pi_ref).

    zero: 1 - s(r_w) + s(r_l);  down: s(r_w) + 1 - s(r_w - r_l)

    Args:
        anchor: "zero" where the preferred answers are better than what the model gives, "down" where they are worse.
    """

    anchor: Literal["zero", "down"] = "zero"

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred answers.
            rejected: the others.
            margin: not used.
        """
        function = apo_zero if self.anchor == "zero" else apo_down
        return function(self.reward(chosen), self.reward(rejected))


@part(
    "objective",
    "nca",
    papers=[("Noise Contrastive Alignment of Language Models with Explicit Rewards", "arXiv:2402.05369")],
    claim="Judging each answer against the reference keeps the likelihood of the preferred one from falling, as it "
    "does "
    "under DPO.",
    deviations="The form for pairs of labels (NCA with binary preferences).",
)
@dataclass(kw_only=True)
class NCA(Referenced):
    """Noise contrastive alignment, with r = beta log(pi / pi_ref).

    loss = -log s(r_w) - [log s(-r_w) + log s(-r_l)] / 2
    """

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred answers.
            rejected: the others.
            margin: not used.
        """
        first, second = self.reward(chosen), self.reward(rejected)
        return -F.logsigmoid(first) - (F.logsigmoid(-first) + F.logsigmoid(-second)) / 2


@part(
    "objective",
    "sppo",
    papers=[("Self-Play Preference Optimization for Language Model Alignment", "arXiv:2405.00675")],
    claim="Regressing each answer's log-ratio on its rate of winning approximates the Nash equilibrium of a "
    "preference game.",
    deviations="Hard wins and losses of given pairs (rates 1 and 0); the rounds of self-play are a matter of the data.",
)
@dataclass(kw_only=True)
class SPPO(Referenced):
    """Self-play preference optimisation with hard labels.

    loss = [log u_w - 1 / (2 beta)]^2 + [log u_l + 1 / (2 beta)]^2,  u = pi / pi_ref
    """

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred answers.
            rejected: the others.
            margin: not used.
        """
        target = 1 / (2 * self.beta)
        return (chosen.logratio - target).square() + (rejected.logratio + target).square()


@part(
    "objective",
    "bco-pair",
    papers=[("Binary Classifier Optimization for Large Language Model Alignment", "arXiv:2404.04656")],
    claim="Telling each answer apart from the reference bounds DPO's loss, so pairs are not needed.",
    deviations="Pairs, and no shift of the reward (delta = 0); `bco` is the paper's method.",
)
@dataclass(kw_only=True)
class BCOPair(Referenced):
    """Binary classifier optimisation on pairs, with r = beta log(pi / pi_ref).

    loss = -log s(r_w) - log s(-r_l)
    """

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred answers.
            rejected: the others.
            margin: not used.
        """
        return -F.logsigmoid(self.reward(chosen)) - F.logsigmoid(-self.reward(rejected))
