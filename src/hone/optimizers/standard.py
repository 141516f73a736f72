"""The standard optimizers: AdamW, stochastic gradient descent and Adafactor, all PyTorch's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from hone.errors import HoneError
from hone.optimizers.base import Groups, Optimizer, Rate, Weight, fused, shared
from hone.parts import part

Decay = Annotated[float, Field(ge=0, lt=1)]


@part(
    "optimizer",
    "adamw",
    papers=[("Decoupled Weight Decay Regularization", "arXiv:1711.05101")],
    claim="Decoupling weight decay from the gradient makes Adam generalise better than Adam with L2 regularisation.",
    deviations="The decay of a step is lr * weight_decay, as in PyTorch; the paper multiplies it by the schedule only. "
    "Vectors (longer than 1 in at most one dimension) do not decay unless decay_all is set.",
)
@dataclass(kw_only=True)
class AdamW(Optimizer):
    """Adam with weight decay applied to the weights, not added to the gradient.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    w <- w - lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay w)

    Args:
        lr: learning rate. 2e-4 suits low-rank adapters; a small model trained whole takes about 1e-3, a model of
            billions of parameters trained whole 1e-5 to 5e-5.
        beta1: decay of the mean of gradients per step.
        beta2: decay of the mean of squared gradients per step.
        eps: added to the root of the second moment, in units of a gradient.
        weight_decay: share of a weight, in units of lr, taken off per step.
    """

    lr: Rate = 2e-4
    beta1: Decay = 0.9
    beta2: Decay = 0.999
    eps: Rate = 1e-8
    weight_decay: Weight = 0.01

    def make(self, groups: Groups) -> torch.optim.AdamW:
        """Return PyTorch's AdamW, fused where its kernel exists."""
        betas = (self.beta1, self.beta2)
        return torch.optim.AdamW(
            groups, lr=self.lr, betas=betas, eps=self.eps, weight_decay=self.weight_decay, fused=fused(groups)
        )


@part(
    "optimizer",
    "sgd",
    papers=[
        (
            "On the importance of initialization and momentum in deep learning",
            "https://proceedings.mlr.press/v28/sutskever13.html",
        )
    ],
    claim="Well-tuned momentum lets plain stochastic gradient descent train deep networks that were thought to need "
    "second-order methods.",
    deviations="lr multiplies the velocity when it is applied, as in PyTorch, not the gradient when it enters: the two "
    "agree at a constant lr. No schedule of the momentum. Weight decay is added to the gradient (L2).",
)
@dataclass(kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum.

    g <- g + weight_decay w;  v <- momentum v + g;  w <- w - lr v, or with Nesterov  w <- w - lr (g + momentum v)

    Args:
        lr: learning rate, typically 10 to 1000 times that of an adaptive method.
        momentum: decay of the velocity per step; 0 keeps none.
        nesterov: look ahead along the velocity; needs momentum.
        weight_decay: coefficient of the L2 penalty, half its gradient per weight.
    """

    lr: Rate = 1e-2
    momentum: Decay = 0.9
    nesterov: bool = False
    weight_decay: Weight = 0.0

    def check(self) -> list[tuple[str, str]]:
        """Return what is wrong with the options together."""
        if self.nesterov and self.momentum == 0:
            return [("nesterov", "needs a momentum above 0")]
        return []

    def make(self, groups: Groups) -> torch.optim.SGD:
        """Return PyTorch's SGD, fused where its kernel exists."""
        return torch.optim.SGD(
            groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay,
            fused=fused(groups),
        )  # fmt: skip


@part(
    "optimizer",
    "adafactor",
    papers=[("Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", "arXiv:1804.04235")],
    claim="Factored second moments match Adam with memory of rows plus columns of a matrix, not of their product.",
    deviations="PyTorch's implementation: eps1 is a lower bound on the root of the second moment and on the mean of "
    "its row factor, where the paper adds eps1^2 = 1e-30 to every squared gradient; 1e-15 makes the two agree unless "
    "gradients vanish. The schedule multiplies lr, the bound on the relative step. Weight decay, which the paper has "
    "not, is decoupled. No first moment.",
)
@dataclass(kw_only=True)
class Adafactor(Optimizer):
    """Adam without a first moment whose second moment is the outer product of a row and a column factor.

    R <- b R + (1 - b) rowmean(g^2);  C <- b C + (1 - b) colmean(g^2);  b = 1 - t^beta2_decay
    u = g / sqrt(R C / mean(R));  u <- u / max(1, rms(u) / threshold)
    w <- w - max(eps2, rms(w)) min(lr, 1 / sqrt(t)) u

    Args:
        lr: largest relative step: how far a weight moves per step, as a share of its tensor's root mean square.
        beta2_decay: exponent of the step in the decay of the second moment.
        eps1: lower bound on the root of the second moment, in units of a gradient.
        eps2: lower bound on the root mean square of a tensor that scales its step, in units of a weight.
        threshold: largest root mean square of an update before it is scaled by the step (d in the paper).
        weight_decay: share of a weight, in units of lr, taken off per step.
    """

    lr: Rate = 1e-2
    beta2_decay: Annotated[float, Field(le=0)] = -0.8
    eps1: Rate = 1e-15
    eps2: Rate = 1e-3
    threshold: Annotated[float, Field(ge=1)] = 1.0
    weight_decay: Weight = 0.0

    def make(self, groups: Groups) -> torch.optim.Adafactor:
        """Return PyTorch's Adafactor; its loop over tensors keeps the memory low that the method is for.

        Raises:
            HoneError: processes hold shares of the weights, whose row and column means PyTorch's Adafactor cannot take.
        """
        if shared(groups):
            raise HoneError("optimizer 'adafactor' cannot step weights that processes share: set sharding: none")
        return torch.optim.Adafactor(
            groups, lr=self.lr, beta2_decay=self.beta2_decay, eps=(self.eps1, self.eps2), d=self.threshold,
            weight_decay=self.weight_decay,
        )  # fmt: skip
