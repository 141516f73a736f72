"""f-divergences between generated arrays (density q) and real ones (p), as what they ask of a generator.

D_f = E_q f(r), r = p / q, f convex with f(1) = 0. At each noise level, its gradient by the generator's parameters is

    -E[h(r) (grad log p - grad log q) dx/dtheta],  h(r) = r^2 f''(r)

which is the gradient of the reverse Kullback-Leibler divergence, weighed by h. The scale of f is that of f-distill's
code, where h(r) is the plainest form; it does not matter there, since h is divided by its mean.

    reverse-kl           f = -ln r                             h = 1            stays in the modes that it has
    softened-reverse-kl  f = (r + 1) ln((r + 1) / (2 r))       h = 1 / (r + 1)
    jensen-shannon       f = r ln r - (r + 1) ln((r + 1) / 2)  h = r / (r + 1)
    hellinger            f = 2 (1 - sqrt(r))^2                 h = sqrt(r)
    forward-kl           f = r ln r                            h = r            covers all modes
    jeffreys             f = (r - 1) ln r                      h = 1 + r
    neyman               f = (1 / r - 1) / 2                   h = 1 / r        chi^2 of q from p
    pearson              f = (r - 1)^2                         h = 2 r^2        chi^2 of p from q
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal[
    "reverse-kl", "softened-reverse-kl", "jensen-shannon", "hellinger", "forward-kl", "jeffreys", "neyman", "pearson"
]


def convex(name: Divergence, r: Tensor) -> Tensor:
    """Return f(r), of r's shape.

    Args:
        name: the divergence.
        r: p / q, above 0.
    """
    log = r.log()
    if name == "reverse-kl":
        return -log
    if name == "softened-reverse-kl":
        return (r + 1) * ((r + 1).log() - log - math.log(2))
    if name == "jensen-shannon":
        return r * log - (r + 1) * ((r + 1) / 2).log()
    if name == "hellinger":
        return 2 * (1 - r.sqrt()) ** 2
    if name == "forward-kl":
        return r * log
    if name == "jeffreys":
        return (r - 1) * log
    return (1 / r - 1) / 2 if name == "neyman" else (r - 1) ** 2


def weight(name: Divergence, r: Tensor) -> Tensor:
    """Return h(r) = r^2 f''(r), of r's shape.

    Args:
        name: the divergence.
        r: p / q, above 0.
    """
    found = {
        "reverse-kl": lambda: torch.ones_like(r), "softened-reverse-kl": lambda: 1 / (1 + r),
        "jensen-shannon": lambda: r / (1 + r), "hellinger": r.sqrt, "forward-kl": lambda: r,
        "jeffreys": lambda: 1 + r, "neyman": lambda: 1 / r, "pearson": lambda: 2 * r**2,
    }  # fmt: skip
    return found[name]()


def fisher_weight(name: Divergence, r: Tensor) -> Tensor:
    """Return h(r) - r h'(r), the weight of the squared difference of scores in the gradient of the expanded divergence.

    Args:
        name: the divergence.
        r: p / q, above 0.
    """
    found = {
        "reverse-kl": lambda: torch.ones_like(r), "softened-reverse-kl": lambda: (1 + 2 * r) / (1 + r) ** 2,
        "jensen-shannon": lambda: r**2 / (1 + r) ** 2, "hellinger": lambda: r.sqrt() / 2,
        "forward-kl": lambda: torch.zeros_like(r), "jeffreys": lambda: torch.ones_like(r), "neyman": lambda: 2 / r,
        "pearson": lambda: -2 * r**2,
    }  # fmt: skip
    return found[name]()


def ratio_weight(name: Divergence, r: Tensor) -> Tensor:
    """Return r^2 h''(r), the weight with which that squared difference moves arrays along the ratio of densities.

    Args:
        name: the divergence.
        r: p / q, above 0.
    """
    found = {
        "softened-reverse-kl": lambda: 2 * r**2 / (1 + r) ** 3, "jensen-shannon": lambda: -2 * r**2 / (1 + r) ** 3,
        "hellinger": lambda: -r.sqrt() / 4, "neyman": lambda: 2 / r, "pearson": lambda: 4 * r**2,
    }  # fmt: skip
    return found.get(name, lambda: torch.zeros_like(r))()
