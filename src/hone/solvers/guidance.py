"""Cheaper classifier-free guidance: the evaluation without a class is left out, or guessed from earlier ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hone.diffusion.levels import spread
from hone.errors import HoneError
from hone.parts import part
from hone.solvers.around import Around
from hone.solvers.base import Counted, Solver
from hone.solvers.ode import DDIM


@dataclass(kw_only=True)
class Guided(Around):
    """A solver that guides, around which guidance is made cheaper.

    Args:
        of: the solver inside, with its guidance; ddim with a guidance of 2 where it is left out.
    """

    @property
    def inner(self) -> Solver:
        """The solver inside."""
        return DDIM(guidance=2.0) if self.of is None else self.of

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield that there is no guidance to save."""
        yield from super().check()
        if self.inner.guidance == 1.0:
            yield "of", "expected a solver with guidance, such as {name: ddim, steps: 20, guidance: 2.0}"


class Gated(Counted):
    """A guided denoiser that stops asking without a class, for each array from when the two answers agree."""

    def __init__(self, model: Any, labels: Tensor, guidance: float, threshold: float) -> None:
        """Begin with guidance for every array.

        Args:
            model: the denoiser.
            labels: (B,) classes.
            guidance: of classifier-free guidance.
            threshold: cosine of the two answers above which they agree.
        """
        super().__init__(model, labels, guidance)
        self.threshold, self.evaluations = threshold, 0
        self.guiding = torch.ones(len(labels), dtype=torch.bool, device=labels.device)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return D, guided where it still is."""
        labels: Any = self.labels
        sigma = sigma.to(x)
        found = self.plain(x, sigma, labels)
        chosen = self.guiding.nonzero()[:, 0]
        self.evaluations += len(x) + len(chosen)
        self.calls = math.ceil(self.evaluations / len(x))
        if len(chosen):
            level = sigma if sigma.dim() == 0 else sigma[chosen]
            part, told = x[chosen], found[chosen]
            untold = self.plain(part, level, torch.full_like(labels[chosen], -1))
            found = found.index_copy(0, chosen, untold + self.guidance * (told - untold))
            data = self.model.sigma_data
            skip = spread(data**2 / (level**2 + data**2), part) * part
            likeness = F.cosine_similarity((told - skip).flatten(1), (untold - skip).flatten(1))
            self.guiding[chosen[likeness > self.threshold]] = False
        return found


@part(
    "solver", "adaptive-guidance",
    papers=[("Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", "arXiv:2312.12487")],
    claim="Guidance can end as soon as the answers with and without a class agree: the same samples with a quarter "
    "less computation.",
    deviations="The answers are compared as outputs of an EDM network, which is the clean array at high noise and the "
    "noise at low noise; the predicted noises themselves agree at high noise whatever the class is.",
)  # fmt: skip
@dataclass(kw_only=True)
class AdaptiveGuidance(Guided):
    """Classifier-free guidance until the answers with and without the class agree, for each array by itself.

    D(none) + w (D(class) - D(none)) while no cos(F(class), F(none)) has been above `threshold`, then D(class), with
    F = D - x d^2 / (s^2 + d^2), d = sigma_data. The evaluations reported are the mean over the arrays, rounded up.

    Args:
        threshold: cosine from which on the class alone is asked.
    """

    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.99

    def asked(self, model: Any, labels: Tensor | None, sigmas: Tensor) -> Counted:
        """Return what the solver inside asks instead of the denoiser.

        Args:
            model: the denoiser.
            labels: (B,) classes, None for none.
            sigmas: (n,) levels that will be visited, descending.
        """
        if labels is None or self.inner.guidance == 1.0:
            return Counted(model, labels)
        return Gated(model, labels, self.inner.guidance, self.threshold)


class Noises(Counted):
    """A guided denoiser that remembers the noises that it predicted with and without the class."""

    def __init__(self, model: Any, labels: Tensor | None, guidance: float) -> None:
        """Begin with no memory.

        Args:
            model: the denoiser.
            labels: (B,) classes.
            guidance: of classifier-free guidance.
        """
        super().__init__(model, labels, guidance)
        self.told: list[Tensor] = []
        self.untold: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return D, guided by a network's answer or a guess."""
        labels: Any = self.labels
        level = spread(sigma.to(x), x)
        self.told.append((x - self.plain(x, sigma, labels)) / level)
        self.untold.append(self.without(x, sigma))
        self.calls += 1
        return x - level * (self.untold[-1] + self.guidance * (self.told[-1] - self.untold[-1]))

    def without(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the noise that is predicted without a class.

        Args:
            x: (B, *shape).
            sigma: noise level, or (B,) levels.
        """
        labels: Any = self.labels
        self.calls += 1
        return (x - self.plain(x, sigma, torch.full_like(labels, -1))) / spread(sigma.to(x), x)

    def known(self) -> list[Tensor]:
        """Return what a guess is made of: all noises with the class, and the earlier ones without."""
        return [*self.told, *self.untold[: len(self.told) - 1]]


class Guessing(Noises):
    """The same, with a linear guess in the place of some of the answers without a class."""

    def __init__(self, model: Any, labels: Tensor, guidance: float, weights: list[Tensor | None]) -> None:
        """Take the weights.

        Args:
            model: the denoiser.
            labels: (B,) classes.
            guidance: of classifier-free guidance.
            weights: of the guess at each evaluation, None where the network is asked; 0 weights take the class's.
        """
        super().__init__(model, labels, guidance)
        self.weights = weights

    def without(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the noise that is predicted without a class.

        Args:
            x: (B, *shape).
            sigma: noise level.
        """
        weights = self.weights[len(self.told) - 1]
        if weights is None:
            return super().without(x, sigma)
        if not len(weights):
            return self.told[-1]
        return guess(weights, self.known())


class Fitting(Noises):
    """The same, which always asks the network, fits the weights of a guess to it, and goes on with the guess."""

    def __init__(self, model: Any, labels: Tensor, solver: LinearGuidance, total: int) -> None:
        """Begin without weights.

        Args:
            model: the denoiser.
            labels: (B,) classes.
            solver: says which answers are guessed.
            total: evaluations that there will be.
        """
        super().__init__(model, labels, solver.inner.guidance)
        self.solver, self.total = solver, total
        self.weights: list[Tensor | None] = []

    def without(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the noise that is predicted without a class.

        Args:
            x: (B, *shape).
            sigma: noise level.
        """
        found, number = super().without(x, sigma), len(self.weights)
        late = number >= self.total / 2
        if not late and number % self.solver.every == 0:
            self.weights.append(None)
            return found
        if late and self.solver.second_half == "class":
            self.weights.append(torch.zeros(0, dtype=torch.float64))
            return self.told[-1]
        known = self.known()
        self.weights.append(fit_guess(found, known, len(self.told) - 1, self.solver.ridge))
        return guess(self.weights[-1], known)


def guess(weights: Tensor | None, known: list[Tensor]) -> Tensor:
    """Return a weighted sum (B, *shape).

    Args:
        weights: (k,).
        known: k of (B, *shape).
    """
    assert weights is not None
    return torch.einsum("k,k...->...", weights.to(known[0]), torch.stack(known))


def fit_guess(target: Tensor, known: list[Tensor], near: int, ridge: float = 0.0) -> Tensor:
    """Return the weights (k,) of a linear guess by least squares over all coordinates of all arrays.

    Args:
        target: (B, *shape) what is guessed.
        known: k of (B, *shape) what it is guessed from.
        near: which of them the guess falls back to where the others add nothing.
        ridge: pull to that, as a share of the mean square of what is known.
    """
    columns = torch.stack([value.flatten().cpu().double() for value in known], dim=1)
    square = columns.T @ columns
    square = square + ridge * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    weights = torch.linalg.solve(square, columns.T @ (target.flatten().cpu().double() - columns[:, near]))
    weights[near] += 1
    return weights


@part(
    "solver", "linear-guidance",
    papers=[("Adaptive Guidance: Training-free Acceleration of Conditional Diffusion Models", "arXiv:2312.12487")],
    claim="Evaluations without a class can be replaced by affine maps of past ones, at some cost of fidelity to "
    "guidance.",
    deviations="Which evaluations are replaced follows the abstract and our notes, not the paper's own listing: every "
    "second one of the first half and all of the second half. The weights are fitted to states that earlier guesses "
    "led to, and drawn a little to the class's answer: plain least squares on guided trajectories diverged on points.",
)  # fmt: skip
@dataclass(kw_only=True)
class LinearGuidance(Guided):
    """Guidance (LinearAG) whose answer without a class is, at most evaluations, a linear guess from earlier ones.

    e(none)_i = sum over j <= i of b_ij e(class)_j + sum over j < i of c_ij e(none)_j,  e = (x - D) / s

    The weights are scalars, by least squares over all coordinates of `fit` arrays of the training data's classes; they
    are made anew before arrays are drawn.

    Args:
        every: in the first half of the evaluations the network is asked at one of so many.
        second_half: linear guesses on; class leaves guidance off, as adaptive guidance does.
        fit: trajectories that the weights are fitted to.
        ridge: pull of the weights to the class's answer alone, as a share of the noises' mean square.
    """

    every: Annotated[int, Field(ge=1)] = 2
    second_half: Literal["linear", "class"] = "linear"
    fit: Annotated[int, Field(ge=1)] = 256
    ridge: Annotated[float, Field(gt=0)] = 1e-6
    _weights: list[Tensor | None] | None = field(init=False, default=None, repr=False)

    def prepare(self, model: Any, source: Any) -> None:
        """Fit the weights on trajectories of fresh noise.

        Args:
            model: the denoiser that arrays will be drawn from.
            source: the arrays it learned from, for their classes.
        """
        super().prepare(model, source)
        self._weights = None
        if not model.classes or self.inner.guidance == 1.0:
            return
        classes = source.collection("train").labels
        generator, parameter = torch.Generator().manual_seed(0), next(model.parameters())
        labels = classes[torch.arange(self.fit) % len(classes)].to(parameter.device)
        noise = torch.randn(self.fit, *model.shape, generator=generator, dtype=torch.float64).to(parameter)
        sigmas = self.sigmas(model)
        start = noise * sigmas[0].to(noise)
        with torch.no_grad():
            once = Counted(model, labels[:1])  # how many evaluations there are
            self.inner.solve(once, start[:1], sigmas, generator)
            fitting = Fitting(model, labels, self, once.calls)
            self.inner.solve(fitting, start, sigmas, generator)
        self._weights = fitting.weights

    def asked(self, model: Any, labels: Tensor | None, sigmas: Tensor) -> Counted:
        """Return what the solver inside asks instead of the denoiser.

        Args:
            model: the denoiser.
            labels: (B,) classes, None for none.
            sigmas: (n,) levels that will be visited, descending.

        Raises:
            HoneError: the weights were not fitted.
        """
        if labels is None or self.inner.guidance == 1.0:
            return Counted(model, labels)
        if self._weights is None:
            raise HoneError("linear-guidance: its weights are not fitted; call prepare(model, source) before sample")
        return Guessing(model, labels, self.inner.guidance, self._weights)
