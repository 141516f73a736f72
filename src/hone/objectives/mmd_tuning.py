"""Tuning a short sampling chain as a whole, by the discrepancy of what it draws from the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hone.diffusion.encoders import Encoder, frozen_encoder, training_data
from hone.distances.sets import mmd
from hone.objectives.reward_tuning import Count, Drawing, Steps
from hone.parts import part

EXPONENTS = [0.2, 0.5, 1.0, 2.0, 5.0]  # of the rational quadratic kernels, as in the distance `mmd`


def polynomial_mmd(left: Tensor, right: Tensor, degree: int = 3) -> Tensor:
    """Return the unbiased squared discrepancy of the kernel (x y / d + 1)^degree, as in the kernel inception distance.

    Args:
        left: (N, d) rows, N at least 2.
        right: (M, d) rows, M at least 2.
        degree: of the polynomial.
    """

    def kernel(one: Tensor, other: Tensor) -> Tensor:
        return (one @ other.T / one.shape[1] + 1) ** degree

    def within(rows: Tensor) -> Tensor:
        found = kernel(rows, rows)
        return (found.sum() - found.diagonal().sum()) / (len(rows) * (len(rows) - 1))

    return within(left) + within(right) - 2 * kernel(left, right).mean()


@part(
    "objective", "mmd-ddm",
    papers=[("Fast Inference in Denoising Diffusion Models via MMD Finetuning", "arXiv:2301.07969")],
    claim="A diffusion model whose chain of few steps is tuned by the maximum mean discrepancy from the data draws far "
    "better samples in those steps.",
    deviations="Features of Inception or CLIP are those of a small classifier, or the arrays themselves; the rational "
    "quadratic kernel is the default for small batches, the paper's cubic one an option.",
    draws=[{"name": "ddim", "steps": "objective.steps", "schedule": "objective.schedule"}],
)  # fmt: skip
@dataclass(kw_only=True)
class MMDTuning(Drawing):
    """The unbiased squared maximum mean discrepancy between the arrays that a chain draws and those of the step.

    E k(X, X') + E k(Y, Y') - 2 E k(X, Y) over features of all N arrays of a step; the gradient goes through the chain.

    A step is judged as a whole: where it is split into micro-batches, all arrays are drawn once more without gradient,
    and each micro-batch gets its share of the gradient.

    Args:
        steps: evaluations of the network in the chain.
        features: what is compared: the arrays themselves, or features of a small classifier that is trained on the data
            when the run starts, or of the digits' network that ships.
        kernel: rational quadratic at several scales, or (x y / d + 1)^3.
        encoder_steps: that the classifier is trained for.
    """

    measured: ClassVar[bool] = False  # a discrepancy of micro-batches says little; distances of drawn arrays say more
    steps: Steps = 5
    features: Literal["arrays", "classifier", "digits"] = "arrays"
    kernel: Literal["rational", "cubic"] = "rational"
    encoder_steps: Count = 300
    _encoder: Encoder | None = field(init=False, default=None, repr=False)
    _scale: float = field(init=False, default=1.0, repr=False)
    _whole: Any = field(init=False, default=None, repr=False)
    _pull: tuple[Tensor, Tensor] | None = field(init=False, default=None, repr=False)

    def setup(self, run: Any) -> None:
        """Prepare the features and their scale.

        Args:
            run: the run in progress.
        """
        parameter = next(run.model.parameters())
        if self.features != "arrays":
            self._encoder = frozen_encoder(self.features, run, steps=self.encoder_steps, what="objective.features")
        rows = self.seen(training_data(run)[0][:500].to(parameter))
        self._scale = max(float(torch.cdist(rows, rows).median()), 1e-6)

    def seen(self, arrays: Tensor) -> Tensor:
        """Return the features (B, d) of arrays.

        Args:
            arrays: (B, *shape).
        """
        return arrays.flatten(1) if self._encoder is None else self._encoder.features(arrays)

    def discrepancy(self, drawn: Tensor, real: Tensor) -> Tensor:
        """Return the discrepancy of two sets of arrays.

        Args:
            drawn: (N, *shape).
            real: (N, *shape).
        """
        left, right = self.seen(drawn), self.seen(real)
        return mmd(left, right, self._scale, EXPONENTS) if self.kernel == "rational" else polynomial_mmd(left, right)

    def before_step(self, run: Any, trees: Sequence[Any]) -> None:
        """Keep the whole step, which micro-batches are parts of.

        Args:
            run: the run in progress.
            trees: all arrays of the step.
        """
        super().before_step(run, trees)
        self._whole, self._pull = run.model.collate(trees).to(run.cluster.device), None

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, summed over the arrays: the discrepancy of the step, once for each array.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        count = self._count
        if count < 2:
            return 0.0 * self.draw(model, batch).sum(), {}
        drawn = self.draw(model, batch)
        if len(batch) == count:
            return count * self.discrepancy(drawn, batch.arrays), {}
        value, pull = self.whole(model)
        mine = count * pull[batch.places.to(pull.device)]
        return len(batch) * value + (mine * (drawn - drawn.detach())).sum(), {}

    def whole(self, model: Any) -> tuple[Tensor, Tensor]:
        """Return the discrepancy of the whole step and its gradient for each drawn array, once for all micro-batches.

        Args:
            model: the denoiser.
        """
        if self._pull is None:
            with torch.no_grad():
                drawn = self.draw(model, self._whole)
            drawn.requires_grad_(True)
            with torch.enable_grad():
                value = self.discrepancy(drawn, self._whole.arrays)
            self._pull = value.detach(), torch.autograd.grad(value, drawn)[0]
        return self._pull
