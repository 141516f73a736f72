"""Preferences that a model labels itself: how consistent its rankings are enters the loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hone.objectives.preference import Referenced, Side
from hone.objectives.step_preference import smoothed_logistic
from hone.parts import part


@part(
    "objective",
    "cream",
    papers=[("CREAM: Consistency Regularized Self-Rewarding Language Models", "arXiv:2410.12735")],
    claim="Weighing labels by how consistently two rounds rank the answers keeps self-rewarding from fading after a "
    "few rounds.",
    deviations="The consistency is had from the pair's margin, which `self-rewarded` sets to log(C / (1 - C)).",
)
@dataclass(kw_only=True)
class CREAM(Referenced):
    """DPO whose labels count as far as two rankings of the answers agree, and the other way round for the rest.

    loss = -C log s(m) - (1 - C) log s(-m),  m = beta (log u_w - log u_l),  C = s(margin)

    with u = pi(y|x) / pi_ref(y|x) and margin = log(C / (1 - C)), the field "margin" of the pair; a pair without one is
    trusted (C = 1). Unlike a smoothing, C may be below 1/2.
    """

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the answers that the model prefers.
            rejected: the others.
            margin: (P,) log(C / (1 - C)).
        """
        gap = self.beta * (chosen.logratio - rejected.logratio)
        return smoothed_logistic(gap, torch.sigmoid(-margin.nan_to_num(float("inf"))).to(gap.dtype))
