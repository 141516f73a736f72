"""EDICT: a sampler of two coupled states that can be run backwards exactly, and DDIM's inversion beside it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from hone.parts import part
from hone.solvers.base import Counted, Solver

Pair = list[Tensor]  # two states on the variance-preserving scale


@part(
    "solver", "edict",
    papers=[("EDICT: Exact Diffusion Inversion via Coupled Transformations", "arXiv:2211.12446")],
    claim="Real arrays are inverted to noise and rebuilt without error, where DDIM's inversion leaves one.",
)  # fmt: skip
@dataclass(kw_only=True)
class EDICT(Solver):
    """DDIM with two states in turn, each moved by the noise that the network sees in the other: exactly invertible.

    On the variance-preserving scale, a = 1 / sqrt(1 + s^2), e(v) = (v / a - D(v / a, s)) / s:
    x <- (a' / a) x + a' (s' - s) e(y);  y <- (a' / a) y + a' (s' - s) e(x)
    x <- p x + (1 - p) y;  y <- p y + (1 - p) x

    Every line is affine in the state that it changes, so the lines can be undone one after the other.

    Args:
        steps: noise levels above 0; the network runs twice at each.
        mix: p, how much of itself a state keeps.
        alternate: whether the other state goes first at every second step.
    """

    steps: Annotated[int, Field(ge=1)] = 50
    mix: Annotated[float, Field(gt=0.5, le=1)] = 0.93
    alternate: bool = True

    def solve(self, denoise: Counted, x: Tensor, sigmas: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the first of the two states at the last of the noise levels.

        Args:
            denoise: D(x, sigma).
            x: (B, *shape) at the first of them.
            sigmas: (n,) descending.
            generator: unused.
        """
        start = x * _scale(sigmas[0]).to(x)
        return self.descend(denoise, [start, start], sigmas)[0] / _scale(sigmas[-1]).to(x)

    def descend(self, denoise: Counted, pair: Pair, sigmas: Tensor) -> Pair:
        """Return the two states at the last of the levels.

        Args:
            denoise: D(x, sigma).
            pair: (B, *shape) states at the first level.
            sigmas: (n,) descending.
        """
        pair = list(pair)
        for number, (now, then) in enumerate(itertools.pairwise(sigmas)):
            first = number % 2 if self.alternate else 0
            for which in (first, 1 - first):
                ratio, shift = _step(now, then, pair[which])
                pair[which] = ratio * pair[which] + shift * _noise(denoise, pair[1 - which], now)
            pair[0] = self.mix * pair[0] + (1 - self.mix) * pair[1]
            pair[1] = self.mix * pair[1] + (1 - self.mix) * pair[0]
        return pair

    def ascend(self, denoise: Counted, pair: Pair, sigmas: Tensor) -> Pair:
        """Undo `descend`: return the two states at the first of the levels.

        Args:
            denoise: D(x, sigma).
            pair: (B, *shape) states at the last level.
            sigmas: (n,) descending, the same.
        """
        pair = list(pair)
        for number, (now, then) in reversed(list(enumerate(itertools.pairwise(sigmas)))):
            pair[1] = (pair[1] - (1 - self.mix) * pair[0]) / self.mix
            pair[0] = (pair[0] - (1 - self.mix) * pair[1]) / self.mix
            first = number % 2 if self.alternate else 0
            for which in (1 - first, first):
                ratio, shift = _step(now, then, pair[which])
                pair[which] = (pair[which] - shift * _noise(denoise, pair[1 - which], now)) / ratio
        return pair

    @torch.no_grad()
    def invert(self, model: Any, clean: Tensor, labels: Tensor | None = None) -> Pair:
        """Return the pair of noises, about of unit variance, from which `rebuild` makes the arrays again.

        Args:
            model: the denoiser.
            clean: (B, *shape) arrays.
            labels: (B,) classes that they are inverted under, None for none.
        """
        return self.ascend(Counted(model, labels, self.guidance), [clean, clean], self.sigmas(model))

    @torch.no_grad()
    def rebuild(self, model: Any, pair: Pair, labels: Tensor | None = None) -> Pair:
        """Return the pair of arrays of a pair of noises; both are those that were inverted.

        Args:
            model: the denoiser.
            pair: as `invert` returned it.
            labels: (B,) classes; others than those of the inversion edit the arrays.
        """
        return self.descend(Counted(model, labels, self.guidance), pair, self.sigmas(model))


def _scale(sigma: Tensor) -> Tensor:
    return 1 / (1 + sigma**2).sqrt()


def _step(now: Tensor, then: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of the state and of the noise in a step of DDIM on the variance-preserving scale."""
    return (_scale(then) / _scale(now)).to(like), (_scale(then) * (then - now)).to(like)


def _noise(denoise: Counted, state: Tensor, sigma: Tensor) -> Tensor:
    """Return the noise that the network sees in a state of the variance-preserving scale."""
    x = state / _scale(sigma).to(state)
    return (x - denoise(x, sigma)) / sigma.to(state)


@torch.no_grad()
def ddim_inversion(model: Any, clean: Tensor, sigmas: Tensor, labels: Tensor | None = None) -> Tensor:
    """Return arrays at the first of the levels by DDIM backwards, which is not exact: x + (s - s') e(x, s).

    The noise that the step down from s saw is guessed from the state after it.

    Args:
        model: the denoiser.
        clean: (B, *shape) arrays.
        sigmas: (n,) descending, the last one 0.
        labels: (B,) classes, None for none.
    """
    denoise, x = Counted(model, labels), clean
    for then, now in itertools.pairwise(sigmas.flip(0)):
        x = x + (now - then).to(x) * (x - denoise(x, now)) / now.to(x)
    return x
