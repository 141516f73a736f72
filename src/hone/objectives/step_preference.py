"""Preferences between single steps that a tree search has found: how sure it is of a pair enters the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hone.errors import DataError
from hone.objectives.dpo import DPO
from hone.objectives.preference import Positive, Referenced, Side
from hone.parts import part


def required(margin: Tensor, what: str) -> Tensor:
    """Return the margins (P,) of pairs.

    Args:
        margin: (P,), NaN where the data says nothing.
        what: what they are, for the message.

    Raises:
        DataError: a pair has none.
    """
    if margin.isnan().any():
        raise DataError(
            f"every pair needs {what}: a number in a column called 'margin', or in another one named by columns: "
            "{margin: COLUMN}; the source `searched` makes such pairs"
        )
    return margin


def smoothed_logistic(gap: Tensor, doubt: Tensor) -> Tensor:
    """Return -(1 - a) log sigmoid(m) - a log sigmoid(-m) of each pair (P,).

    Args:
        gap: m (P,).
        doubt: a (P,), the probability that the label is the wrong way round.
    """
    return -(1 - doubt) * F.logsigmoid(gap) - doubt * F.logsigmoid(-gap)


@part(
    "objective",
    "mcts-dpo",
    papers=[
        (
            "Monte Carlo Tree Search Boosts Reasoning via Iterative Preference Learning",
            "arXiv:2405.00451",
        )
    ],
    claim="Preferences between steps from a tree search over the current model, renewed in rounds, teach reasoning "
    "better than preferences between whole answers.",
    deviations="The smoothing is had from the pair's margin, which `searched` sets to log(N_w / N_l); the authors' "
    "code counts no visit of the better step as one. The source's grade stands in for the model's evaluation of its "
    "own steps beside it.",
)
@dataclass(kw_only=True)
class MCTSDPO(Referenced):
    """DPO between sibling steps, its labels smoothed by how often a tree search went to each of the two.

    loss = -(1 - a) log s(m) - a log s(-m),  m = beta (log u_w - log u_l),  a = 1 / (N_w / N_l + 1) = s(-margin)

    with u = pi(y|x) / pi_ref(y|x) of a step and margin = log(N_w / N_l), the field "margin" of the pair, which the data
    must have (data source `searched`, make: pairs). a is at most 1/2: a worse step that was visited more often teaches
    nothing.

    Args:
        normalised: log-ratios are means over tokens instead of sums.
    """

    normalised: bool = False

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred steps.
            rejected: the others.
            margin: (P,) log(N_w / N_l).
        """
        doubt = torch.sigmoid(-required(margin, "the logarithm of how often its two steps were visited, as a ratio"))
        first, second = (s.logratio / s.tokens if self.normalised else s.logratio for s in (chosen, rejected))
        gap = self.beta * (first - second)
        return smoothed_logistic(gap, doubt.clamp(max=0.5).to(gap.dtype))


@part(
    "objective",
    "step-apo",
    papers=[
        (
            "CPL: Critical Plan Step Learning Boosts LLM Generalization in Reasoning Tasks",
            "arXiv:2409.08642",
        )
    ],
    claim="Steps whose advantage over their siblings is larger should be preferred by a larger margin: critical steps "
    "are learnt better than with plain DPO on the same pairs, also for tasks apart from training.",
    deviations="The paper searches abstract plans before solutions, with a value model of its own; here the steps are "
    "those of the answer itself. All siblings count fully, where the authors scale the last step's values by 0.3.",
)
@dataclass(kw_only=True)
class StepAPO(DPO):
    """Step-level advantage preference optimisation: DPO whose margin is the difference of two steps' advantages.

    loss = -log sigmoid(beta (log u_w - log u_l) - margin (A_w - A_l))

    A_w - A_l = Q_w - Q_l, since siblings share the state before them, is the field "margin" of the pair, which the data
    must have (data source `searched`, make: advantages). The options of `dpo` are there too.

    Args:
        beta: strength of the pull towards the reference.
        margin: alpha, how much the difference of the advantages counts.
    """

    beta: Positive = 0.3
    margin: Annotated[float, Field(ge=0)] = 1.0

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred steps.
            rejected: the others.
            margin: (P,) A_w - A_l.
        """
        return super().pair_loss(chosen, rejected, required(margin, "the difference of its two steps' advantages"))
