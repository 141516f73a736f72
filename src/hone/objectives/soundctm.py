"""SoundCTM: trajectories that know their guidance, compared in the features of the teacher."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hone.diffusion.critics import features_of
from hone.diffusion.levels import spread
from hone.errors import ModelError
from hone.objectives.arrays import Share, squared
from hone.objectives.trajectory import Balance, ConsistencyTrajectory, Jumps, Weight, destination, intensity, jump
from hone.parts import part


def alike(left: list[Tensor], right: list[Tensor]) -> Tensor:
    """Return the sum over layers of the mean squared difference of features of length 1 at each place (B,).

    Args:
        left: features (B, C) or (B, C, ...) of each layer.
        right: the same of other arrays.
    """
    apart = []
    for one, other in zip(left, right, strict=True):
        one, other = (states / (states.norm(dim=1, keepdim=True) + 1e-10) for states in (one, other))
        apart.append((one - other).square().flatten(1).mean(1))
    return torch.stack(apart).sum(0)


@part(
    "objective", "soundctm",
    papers=[
        (
            "SoundCTM: Uniting Score-based and Consistency Models for Text-to-Sound Generation",
            "arXiv:2405.18503",
        ),
    ],
    claim="Trajectories that are compared in the features of their own teacher draw better samples than those compared "
    "by squared differences, without another network.",
    deviations="Classes instead of texts. The features are those that hone's networks show: all blocks of mlp and dit, "
    "the way down and the middle of unet. The loss-based control of the paper is not here.",
    draws=[{"name": "gamma", "steps": 1}, {"name": "gamma", "steps": 2}],
)  # fmt: skip
@dataclass(kw_only=True)
class SoundTrajectory(ConsistencyTrajectory):
    """Consistency trajectory distillation of a guided teacher, with and without classes.

    sum over layers |f(G(x_t, t, s, w)) - f(G_m(x_u, u, s, w))|^2,  f = the teacher's features at level s, of length 1
    + w_1 |g(x, t, t, w) - y|^2 / c_out(t)^2

    x_u follows the teacher under classifier-free guidance w, which is even between `least` and `most` and which the
    network is shown. Drawing goes between the jumps with and without the class: the guidance of the solver is the
    paper's nu.

    Args:
        distance: features: as above; squared: of the arrays at level s themselves.
        least: smallest guidance.
        most: largest.
        drawn: guidance that arrays are drawn with; None takes the middle of both.
        drop_labels: share of the arrays whose class is left out.
    """

    distance: Literal["features", "squared"] = "features"  # type: ignore[assignment]
    least: Weight = 2.0
    most: Weight = 5.0
    drawn: Weight | None = None
    drop_labels: Share = 0.1
    _last: Any = field(init=False, default=None, repr=False)
    _balance: Balance = field(
        init=False, default_factory=lambda: Balance({"denoising": (0.0, 1e3), "game": (0.01, 10.0)}, 1e-8), repr=False
    )

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the options."""
        yield from super().check()
        if self.least > self.most:
            yield "least", f"expected at most the largest guidance ({self.most}), got {self.least}"

    def equip(self, model: Any) -> None:
        """Let the network see the level that a jump leads to, and a guidance.

        Args:
            model: the denoiser.
        """
        model.widen(2)

    def drawn_by(self, model: Any) -> Any:
        """Return the model with its jumps, at one guidance.

        Args:
            model: the denoiser.
        """
        return Jumps(model, (self.least + self.most) / 2 if self.drawn is None else self.drawn)

    def setup(self, run: Any) -> None:
        """Load the teacher and begin the running mean.

        Args:
            run: the run in progress.

        Raises:
            ModelError: there are no classes, or the teacher shows no features.
        """
        if not run.model.classes:
            raise ModelError("objective: soundctm distils guidance, which needs classes; set data.conditional: true")
        super().setup(run)
        if self.distance == "features" and not hasattr(getattr(self._teacher, "hf", None), "inner"):
            raise ModelError(
                "objective.teacher: soundctm compares features, which this teacher does not show; name a run of one of "
                "hone's own networks, mlp, unet or dit, or set distance: squared"
            )

    def labels(self, model: Any, batch: Any) -> Tensor | None:
        """Return the classes (B,), a share of them left out in training.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        return self.some_labels(model, batch, self.drop_labels)

    def strength(self, batch: Any) -> Tensor:
        """Return the guidance (B,) of each array.

        Args:
            batch: B arrays.
        """
        if self._last is None or self._last[0] is not batch:  # in evaluation each draw is another one
            self._last = batch, self.least + (self.most - self.least) * self.uniform(batch, "strength")
        found: Tensor = self._last[1]
        return found

    def leap(self, model: Any, batch: Any, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """Return G(x, t, s, w) (B, *shape).

        Args:
            model: the denoiser, or the running mean.
            batch: B arrays.
            x: (B, *shape) at level t.
            t: (B,).
            s: (B,).
            labels: (B,) classes.
        """
        return jump(model, x, t, s, labels, self.strength(batch))

    def still(self, model: Any, batch: Any, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Return g(x, t, t, w) (B, *shape).

        Args:
            model: the denoiser.
            batch: B arrays.
            x: (B, *shape).
            sigma: (B,) t.
            labels: (B,) classes.
        """
        shown = torch.stack([destination(sigma), intensity(self.strength(batch))], dim=-1)
        found: Tensor = model(x, sigma, labels, shown)
        return found

    def aimer(self, model: Any) -> Any:
        """Return the network whose jump from x_u is aimed at: the running mean.

        Args:
            model: the denoiser.
        """
        return self.target(model)

    def lead(self, batch: Any, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Return the teacher's D (B, *shape) under guidance.

        Args:
            batch: B arrays.
            x: (B, *shape).
            sigma: (B,).
            labels: (B,) classes.
        """
        given = None if labels is None else torch.cat([labels, torch.full_like(labels, -1)])
        both: Tensor = self._teacher(torch.cat([x, x]), torch.cat([sigma, sigma]), given)
        told, untold = both.chunk(2)
        return untold + spread(self.strength(batch), x) * (told - untold)

    def apart(self, model: Any, batch: Any, guess: Tensor, aim: Tensor, level: Tensor, labels: Tensor | None) -> Tensor:
        """Return the distance (B,) of two arrays at level s, in the teacher's features or as they are.

        Args:
            model: the denoiser.
            batch: B arrays.
            guess: (B, *shape) G(x_t, t, s, w).
            aim: (B, *shape) G_m(x_u, u, s, w).
            level: (B,) s.
            labels: (B,) classes.
        """
        if self.distance == "squared":
            return squared(guess, aim)
        shown = level.clamp(min=model.sigma_min)
        with torch.no_grad():
            wanted = features_of(self._teacher, aim, shown, labels)
        return alike(features_of(self._teacher, guess, shown, labels), wanted)
