"""Surrogates: convex stand-ins for the 0-1 loss of a pair, as functions of a margin; and divergences as scores.

A margin m (P,) is how much better a model finds the preferred answer of each pair, in units of the loss. Every function
here is finite for |m| up to 1e4 and beyond: `logsigmoid` and `softplus` instead of logarithms of sums, and exponentials
that go on along their tangent where they would overflow.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
STEEP = 60.0  # an exponential goes on as a straight line from here: e^60 is 1e26, and float32 ends at 1e38


def logistic(margin: Tensor, flips: float = 0.0, debias: bool = False) -> Tensor:
    """Return the logistic loss, for labels of which a share is flipped.

    conservative: -(1 - e) log s(m) - e log s(-m);   unbiased: [-(1 - e) log s(m) + e log s(-m)] / (1 - 2 e)

    Args:
        margin: (P,).
        flips: e, the share of labels taken to be flipped, in [0, 1/2).
        debias: whether to take the estimate whose mean over flips is the loss of clean labels.
    """
    right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
    if debias:
        return -((1 - flips) * right - flips * wrong) / (1 - 2 * flips)
    return -(1 - flips) * right - flips * wrong if flips else -right


def hinge(margin: Tensor) -> Tensor:
    """Return max(0, 1 - m) of margins (P,)."""
    return F.relu(1 - margin)


def squared(margin: Tensor, target: float) -> Tensor:
    """Return (m - target)^2 of margins (P,).

    Args:
        margin: (P,).
        target: the margin that is wanted.
    """
    return (margin - target).square()


def reverse_logistic(margin: Tensor, flips: float) -> Tensor:
    """Return KL(model || labels) over the two answers of a pair (EXO).

    s(m) [log s(m) - log(1 - e)] + s(-m) [log s(-m) - log e]

    Args:
        margin: (P,).
        flips: e, the probability that the labels give to the rejected answer, in (0, 1/2).
    """
    right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
    return right.exp() * (right - math.log1p(-flips)) + wrong.exp() * (wrong - math.log(flips))


def logistic_exponential(margin: Tensor, temperature: float) -> Tensor:
    """Return the blend of a logistic and an exponential loss that an evolutionary search found (DiscoPOP).

    (1 - g) [-log s(m)] + g e^(-m),  g = s(m / temperature)

    Args:
        margin: (P,).
        temperature: of the gate g.
    """
    gate = torch.sigmoid(margin / temperature)
    # g e^(-m) with m << 0: log g is about m / temperature, so the product overflows only where e^(-m (1 - 1/t)) does.
    blended = exponential(F.logsigmoid(margin / temperature) - margin)
    return (1 - gate) * -F.logsigmoid(margin) + blended


def exponential(value: Tensor) -> Tensor:
    """Return e^x, continued along its tangent from x = 60 on, so that neither it nor its gradient overflows."""
    inside = value.clamp(max=STEEP)
    return inside.exp() * (1 + value - inside)


def divergence_score(logratio: Tensor, divergence: Divergence, alpha: float = 0.5) -> Tensor:
    """Return f'(u) of the density ratio u = pi / pi_ref, up to a constant that cancels in a pair.

    reverse_kl: log u;  forward_kl: -1 / u;  js: log(u / (1 + u));  alpha: (u^(alpha - 1) - 1) / (alpha - 1)

    Args:
        logratio: log u, any shape.
        divergence: the f-divergence that keeps the model near its reference.
        alpha: order of the alpha-divergence; 1 is the reverse KL.
    """
    if divergence == "forward_kl":
        return -exponential(-logratio)
    if divergence == "js":
        return F.logsigmoid(logratio)
    if divergence == "alpha" and abs(alpha - 1) > 1e-6:
        return (exponential((alpha - 1) * logratio) - 1) / (alpha - 1)
    return logratio


def log_odds(mean_logprob: Tensor) -> Tensor:
    """Return log(p / (1 - p)) of p = exp(mean log-probability), which must be below 1 to be finite.

    Args:
        mean_logprob: log p < 0, any shape.
    """
    return mean_logprob - log1mexp(mean_logprob)


def log1mexp(value: Tensor) -> Tensor:
    """Return log(1 - e^x) for x < 0; where x is -0 to rounding, it is taken to be the smallest number below.

    Args:
        value: any shape, not positive.
    """
    x = value.clamp(max=-torch.finfo(value.dtype).eps)
    near = x > -math.log(2)  # each formula where it is exact; the other gets a harmless argument, for its gradient
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, torch.full_like(x, -1.0)))),
        torch.log1p(-torch.exp(torch.where(near, torch.full_like(x, -1.0), x))),
    )
