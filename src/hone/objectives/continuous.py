"""Continuous-time consistency: the derivative along the trajectory instead of a pair of noise levels.

In TrigFlow's terms, t = atan(s / d) with d = sigma_data, x^ = cos(t) x, and F(x^, t) is what a TrigFlow network would
put out for the denoised array D: D = cos(t) x^ - d sin(t) F. Any parameterisation serves: a teacher or a student that
was trained as a flow is seen as F through its denoised array, which is SANA-Sprint's conversion without retraining.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hone.diffusion.layers import Fourier
from hone.diffusion.levels import from_trig_time, spread, trig_time
from hone.objectives.arrays import ArrayObjective, Positive, Share
from hone.objectives.base import Turn
from hone.objectives.judged import Judged
from hone.objectives.teachers import load_teacher
from hone.parts import part

Strength = Annotated[float, Field(ge=0)]


def trig_output(model: Any, scaled: Tensor, time: Tensor, labels: Tensor | None) -> Tensor:
    """Return F (B, *shape) of any denoiser, seen as a TrigFlow network: (cos(t) x^ - D) / (d sin(t)).

    Args:
        model: called with (x, sigma, labels); has `sigma_data`.
        scaled: (B, *shape) x^.
        time: (B,) t in (0, pi / 2).
        labels: (B,) classes, None for none.
    """
    wide = spread(time, scaled)
    denoised = model(scaled / wide.cos(), from_trig_time(time, model.sigma_data), labels)
    return (wide.cos() * scaled - denoised) / (model.sigma_data * wide.sin())


def forward_derivative(
    function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Return a function's value and its derivative along a direction, by forward-mode differentiation.

    Without autocast, under which normalisations mix types, and with attention in plain operations: fused kernels have
    no forward derivative.

    Args:
        function: of tensors.
        at: where.
        along: direction, one tensor for each argument.
    """
    full, plain = torch.autocast(at[0].device.type, enabled=False), sdpa_kernel(SDPBackend.MATH)
    with warnings.catch_warnings(), full, plain:  # torch 2.13 scripts its own formulas at first use, and warns of it
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
        found: Any = torch.func.jvp(function, at, along)
    return found[0], found[1]


def tangent(
    model: Any, scaled: Tensor, time: Tensor, velocity: Tensor, labels: Tensor | None, warmth: float
) -> tuple[Tensor, Tensor]:
    """Return sCM's tangent g (B, *shape) and F, without gradient.

    g = -cos^2(t) (d F - dx/dt) - r cos(t) sin(t) (x^ + d dF/dt),  dF/dt along the trajectory, by a forward derivative

    The derivative is taken in the direction cos(t) sin(t) (dx/dt, 1), which keeps it bounded near t = pi / 2.

    Args:
        model: the student.
        scaled: (B, *shape) x^.
        time: (B,) t.
        velocity: (B, *shape) dx/dt of the trajectory.
        labels: (B,) classes, None for none.
        warmth: r, the share of the second term.
    """
    wide = spread(time, scaled)
    both = wide.cos() * wide.sin()
    with torch.no_grad():
        value, change = forward_derivative(
            lambda x, t: trig_output(model, x, t, labels), (scaled, time), (both * velocity, time.cos() * time.sin())
        )
    data = model.sigma_data
    return -(wide.cos() ** 2) * (data * value - velocity) - warmth * (both * scaled + data * change), value


@part(
    "objective", "scm",
    papers=[("Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", "arXiv:2410.11081")],
    claim="Continuous-time consistency models draw better samples in two steps than discrete-time ones.",
    deviations="Adaptive double normalisation and the positional time embedding belong to a network, and ours have "
    "their own.",
    draws=[{"name": "multistep", "steps": 1}, {"name": "multistep", "steps": 2}],
)  # fmt: skip
@dataclass(kw_only=True)
class ContinuousConsistency(ArrayObjective):
    """Continuous-time consistency training, or distillation where a teacher is named.

    e^w(t) / n |F - sg F - g / (|g| + c)|^2 / (d tan t) - w(t),  n numbers in an array, g as in `tangent`, w learned

    dx/dt is d F_teacher with a teacher, else cos(t) d z - sin(t) y of the array itself.

    Args:
        teacher: a run of a denoiser, "stage:N", or "truth"; None trains without one.
        warmup: share of the run over which the second term of the tangent grows in.
        normalise: c of the tangent's normalisation.
        mean: of the log of the noise level.
        std: of the same.
        adaptive: whether the weight e^w(t) is learned.
        guidance: of the teacher, by classifier-free guidance.
    """

    teacher: str | None = None
    warmup: Share = 0.1
    normalise: Positive = 0.1
    mean: float = -1.0
    std: Positive = 1.4
    adaptive: bool = True
    guidance: Strength = 1.0
    _teacher: Any = field(init=False, default=None, repr=False)

    def equip(self, model: Any) -> None:
        """Put the learned weight beside the network.

        Args:
            model: the denoiser.
        """
        if self.adaptive:
            parameter = next(model.parameters())
            last = nn.Linear(64, 1)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
            model.extras["weight"] = nn.Sequential(Fourier(64), last).to(parameter)

    def setup(self, run: Any) -> None:
        """Load the teacher, where there is one.

        Args:
            run: the run in progress.
        """
        if self.teacher is not None:
            self._teacher = load_teacher(self.teacher, run)

    def times(self, model: Any, batch: Any) -> Tensor:
        """Return the times t (B,).

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        sigma = self.drawn_levels(model, batch, "level", mean=self.mean, std=self.std)
        return trig_time(sigma, model.sigma_data).to(batch.arrays)

    def errors(self, model: Any, batch: Any) -> Tensor:
        """Return the weighted losses (B,).

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        time, labels = self.times(model, batch), self.some_labels(model, batch)
        wide, noise = spread(time, batch.arrays), model.sigma_data * self.normal(batch)
        scaled = wide.cos() * batch.arrays + wide.sin() * noise
        velocity = wide.cos() * noise - wide.sin() * batch.arrays
        if self._teacher is not None:
            with torch.no_grad():
                taught = self._teacher.guided(
                    scaled / wide.cos(), from_trig_time(time, model.sigma_data), labels, self.guidance
                )
                velocity = (wide.cos() * scaled - taught) / wide.sin()
        warmth = min(1.0, self._progress / self.warmup) if self.warmup else 1.0
        slope, _ = tangent(model, scaled, time, velocity, labels, warmth)
        length = spread(slope.flatten(1).norm(dim=1), slope)
        output = trig_output(model, scaled, time, labels)
        aim = output.detach() + slope / (length + self.normalise)  # the tangent's F may have dropped out other things
        losses = (output - aim).square().flatten(1).mean(1) / (model.sigma_data * time.tan())
        if self.adaptive:
            weight = model.extras["weight"](time)[:, 0]
            losses = weight.exp() * losses - weight
        return losses

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        return self.errors(model, batch).sum(), {}


@part(
    "objective", "sana-sprint",
    papers=[("SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency Distillation", "arXiv:2503.09641")],
    claim="Continuous-time consistency distillation with an adversarial loss in the teacher's features draws better "
    "samples in one step than without it.",
    deviations="Points and small images instead of 1024-pixel text-to-image; the normalised queries and keys and the "
    "dense time embedding of the network are left out. The student and the critic learn from the same batch and pass, "
    "where the authors' alternate over steps; the critic sees no arrays with the text of others "
    "(`misaligned_pairs_D`). The guidance is one number, and not shown to the student.",
    draws=[{"name": "multistep", "steps": 1}, {"name": "multistep", "steps": 2}],
)  # fmt: skip
@dataclass(kw_only=True)
class SanaSprint(Judged, ContinuousConsistency):
    """Continuous-time consistency distillation of any teacher, with a hinge loss on heads over its frozen features.

    L = L_scm + adversarial max(0, ...) as `critic_loss` and `generator_loss` on arrays that are made noisy again

    The heads judge arrays that the student denoises in a pass of its own, from levels of which a share is the highest;
    L_scm has plain lognormal ones.

    Args:
        teacher: a run of a denoiser, or "stage:N".
        mean: of the log of the noise level.
        std: of the same.
        highest: share of the arrays that are judged which start from the highest noise level, as one-step generation
            does.
        critic_mean: of the log of the noise level at which the heads look.
    """

    teacher: str = field()
    mean: float = 0.2
    std: Positive = 1.6
    highest: Share = 0.5
    critic_mean: float = -0.6

    def setup(self, run: Any) -> None:
        """Load the teacher and let its heads train.

        Args:
            run: the run in progress.
        """
        super().setup(run)
        self.seat(run, self._teacher)

    def judged(self, model: Any, batch: Any) -> Tensor:
        """Return denoised arrays (B, *shape) for the heads, a share of them from the highest noise level.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        sigma = self.drawn_levels(model, batch, "judged", mean=self.mean, std=self.std).to(batch.arrays)
        sigma = torch.where(self.uniform(batch, "highest") < self.highest, model.sigma_max, sigma)
        noisy = batch.arrays + spread(sigma, batch.arrays) * self.normal(batch, "judged noise")
        found: Tensor = model(noisy, sigma, self.some_labels(model, batch))
        return found

    def turns(self, model: Any, batch: Any) -> Iterator[Turn]:
        """Yield the student's turn, and the critic's.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        errors, made = self.errors(model, batch), self.judged(model, batch)
        fooled = self.doubts(model, batch, made)
        figures = {"consistency": errors.detach().sum(), "fooled": fooled.detach().sum()}
        yield Turn("model", (errors + self.adversarial * fooled).sum(), figures)
        yield self.critic_turn(model, batch, made)
