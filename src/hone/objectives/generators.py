"""Generators of one or a few steps, G(z) = D(sigma_max z, sigma_max), and what pulls their arrays to the real ones.

A generator is a denoiser that is trained to be right in one evaluation at the largest noise level, or at each level of
the solver `multistep` with as many steps. What pulls is a difference of two denoised arrays: at a noised generated
array x = y + s n, the fake score's D_q(x, s) and the teacher's D_p(x, s). Since the score is (D - x) / s^2,

    D_q - D_p = s^2 (grad log q_s(x) - grad log p_s(x)),

and moving y against it, weighed by 1 / s^2, lowers the divergence KL(q_s | p_s) of generated from real arrays.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.levels import spread
from hone.errors import ModelError
from hone.modes import frozen
from hone.objectives.arrays import ArrayObjective, Positive, Share, output_error
from hone.objectives.base import Turn
from hone.objectives.teachers import load_teacher
from hone.objectives.watch import Watching
from hone.solvers.few import Multistep

Strength = Annotated[float, Field(ge=0)]
Weight = Literal["adaptive", "noise", "score", "sds"]
TINY = 1e-6  # added to what divides, as in the authors' code


def level_weight(kind: Weight, clean: Tensor, real: Tensor, sigma: Tensor, sigma_data: float) -> Tensor:
    """Return what D_q - D_p is multiplied with, (B, 1, ...).

    adaptive: 1 / mean|y - D_p|, as DMD does. score: 1 / s^2, which makes it the gradient of KL(q_s | p_s). noise:
    1 / s, the difference of predicted noises. sds: s / (s^2 + d^2), that times 1 - alpha-bar as in DreamFusion.

    Args:
        kind: which.
        clean: (B, *shape) y.
        real: (B, *shape) D_p.
        sigma: (B,) s.
        sigma_data: d, standard deviation of the data.
    """
    if kind == "adaptive":
        return 1 / (spread((clean - real).abs().flatten(1).mean(1), clean) + TINY)
    wide = spread(sigma, clean)
    if kind == "noise":
        return 1 / wide
    return 1 / wide**2 if kind == "score" else wide / (wide**2 + sigma_data**2)


def pull(clean: Tensor, gap: Tensor) -> Tensor:
    """Return losses (B,) whose gradient by each generated array is gap / size: |y - sg(y - gap)|^2 / 2, the mean.

    Args:
        clean: (B, *shape) generated arrays, with gradient.
        gap: (B, *shape) where they shall not go.
    """
    return 0.5 * (clean - (clean - gap).detach()).square().flatten(1).mean(1)


def denoising(net: Any, clean: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor | None, *extras: Tensor) -> Tensor:
    """Return the denoising losses (B,) of given arrays, weighed as in pretraining.

    |D(y + s n, s) - y|^2 / c_out(s)^2, the mean over coordinates

    Args:
        net: the denoiser.
        clean: (B, *shape) y.
        noise: (B, *shape) n.
        sigma: (B,) s.
        labels: (B,) classes, None for none.
        extras: (B, k) further numbers that it is shown, if any.
    """
    guess = net(clean + spread(sigma, clean) * noise, sigma, labels, *extras)
    return output_error(net, guess, clean, sigma)


@dataclass(frozen=True, eq=False)
class Drawn:
    """Generated arrays with noise on them.

    Args:
        clean: (B, *shape) y.
        noise: (B, *shape) n.
        noisy: (B, *shape) x = y + s n.
        sigma: (B,) s.
        place: (B,) where s lies between the smallest and the largest noise level, in [0, 1].
        labels: (B,) classes, None for none.
        free: (B,) in [0, 1), for whatever else a method draws for each.
    """

    clean: Tensor
    noise: Tensor
    noisy: Tensor
    sigma: Tensor
    place: Tensor
    labels: Tensor | None
    free: Tensor


@dataclass(kw_only=True)
class Generator(Watching, ArrayObjective):
    """What all generators share: how arrays are drawn for training.

    Args:
        student_steps: evaluations that the generator may take; from the second on it trains at arrays that it has drawn
            itself, as the solver `multistep` with as many steps does.
        least: smallest noise level that generated arrays are compared at, as a place in the karras schedule: 0 is the
            smallest of all.
        most: the largest; 1 is the largest of all.
        rho: of the karras schedule.
    """

    measured: ClassVar[bool] = False
    student_steps: Annotated[int, Field(ge=1, le=8)] = 1
    least: Share = 0.02
    most: Share = 0.98
    rho: Positive = 7.0
    _range: tuple[float, float] = field(init=False, default=(0.002, 80.0), repr=False)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the noise levels."""
        if self.least >= self.most:
            yield "least", f"expected less than most ({self.most}), got {self.least}"

    def setup(self, run: Any) -> None:
        """Remember the noise levels, and prepare who else plays where the run trains.

        Args:
            run: the run in progress; without a loader it only draws.
        """
        super().setup(run)
        self._range = (run.model.sigma_min, run.model.sigma_max)
        if run.loader is not None:
            self.prepare(run)

    def prepare(self, run: Any) -> None:
        """Load teachers and add players.

        Args:
            run: the run in progress.
        """

    def levels(self, places: Tensor) -> Tensor:
        """Return the noise levels at places in [0, 1] of the karras schedule.

        Args:
            places: (B,).
        """
        low, high = (sigma ** (1 / self.rho) for sigma in self._range)
        return (low + places * (high - low)) ** self.rho

    def classes_of(self, model: Any, batch: Any) -> Tensor | None:
        """Return the classes that arrays are drawn for, None for data without.

        Args:
            model: the generator.
            batch: B real arrays.
        """
        labels: Tensor | None = self.some_labels(model, batch)
        return labels

    def made(self, model: Any, batch: Any, turn: str) -> Tensor:
        """Return one generated array (B, *shape) for each real one, from noise of its own.

        With several steps, one of them is drawn for the whole batch; those before it are made without gradient.

        Args:
            model: the generator.
            batch: B real arrays.
            turn: name of the turn, which other noise belongs to.
        """
        sigmas = Multistep(steps=self.student_steps).sigmas(model)[:-1].to(batch.arrays)
        labels = self.classes_of(model, batch)
        x = sigmas[0] * self.normal(batch, f"z{turn}")
        which = 0
        if self.student_steps > 1:
            which = min(int(self.once(batch, f"c{turn}") * self.student_steps), self.student_steps - 1)
        with torch.no_grad():
            for step in range(1, which + 1):
                added = (sigmas[step] ** 2 - model.sigma_min**2).clamp(min=0).sqrt()
                x = model(x, sigmas[step - 1], labels) + added * self.normal(batch, f"{step}+{turn}")
        found: Tensor = model(x, sigmas[which], labels)
        return found

    def draw(self, model: Any, batch: Any, turn: str, least: float = 0.0, most: float = 1.0) -> Drawn:
        """Return generated arrays with noise of random levels on them.

        Args:
            model: the generator.
            batch: B real arrays.
            turn: name of the turn.
            least: place of the smallest noise level.
            most: place of the largest.
        """
        clean = self.made(model, batch, turn)
        place = least + (most - least) * self.uniform(batch, f"s{turn}")
        sigma, noise = self.levels(place), self.normal(batch, f"n{turn}")
        noisy = clean + spread(sigma, clean) * noise
        free = self.uniform(batch, f"a{turn}")
        return Drawn(clean, noise, noisy, sigma, place, self.classes_of(model, batch), free)

    def turns(self, model: Any, batch: Any) -> Iterator[Turn]:
        """Yield the generator's turn.

        Args:
            model: the generator.
            batch: B real arrays.
        """
        yield self.generator_turn(model, batch)

    def generator_turn(self, model: Any, batch: Any) -> Turn:
        """Return the generator's loss.

        Args:
            model: the generator.
            batch: B real arrays.
        """
        drawn = self.draw(model, batch, "g", self.least, self.most)
        losses, metrics = self.losses(model, drawn)
        return Turn("model", losses.sum(), {name: value.detach().sum() for name, value in metrics.items()})

    def losses(self, model: Any, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the generator's losses (B,), and figures (B,) to report by name.

        Args:
            model: the generator.
            drawn: B generated arrays with noise.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class Contested(Generator):
    """A generator against another player, which moves several times before each of its own turns.

    Args:
        critic_updates: steps of the other player for each of the generator's.
        critic_rate: factor on the learning rate for the other player.
    """

    critic_updates: Annotated[int, Field(ge=1, le=99)] = 5
    critic_rate: Positive = 1.0
    _critic: Any = field(init=False, default=None, repr=False)

    def turns(self, model: Any, batch: Any) -> Iterator[Turn]:
        """Yield the other player's turns, each with arrays of its own, and then the generator's.

        Args:
            model: the generator.
            batch: B real arrays.
        """
        for number in range(self.critic_updates):
            yield self.critic_turn(model, batch, str(number))
        with frozen(self._critic):
            turn = self.generator_turn(model, batch)
        yield turn

    def critic_turn(self, model: Any, batch: Any, turn: str) -> Turn:
        """Return a turn of the other player.

        Args:
            model: the generator.
            batch: B real arrays.
            turn: name of the turn.
        """
        raise NotImplementedError


@dataclass(kw_only=True)
class Distilled(Generator):
    """A generator that a teacher's score pulls.

    Args:
        teacher: a run of a denoiser, or "stage:N", or "truth" for the known distribution of generated points.
        guidance: of the teacher, by classifier-free guidance.
        weight: of the noise levels (`hone.objectives.generators.level_weight`).
        begin: "teacher" gives the student the teacher's weights first, each of several students.
    """

    teacher: str
    guidance: Strength = 1.0
    weight: Weight = "adaptive"
    begin: Literal["model", "teacher"] = "model"
    _teacher: Any = field(init=False, default=None, repr=False)

    def prepare(self, run: Any) -> None:
        """Load the teacher, and give the student its weights where that is asked for.

        Args:
            run: the run in progress.

        Raises:
            ModelError: an adapter goes around the student's weights, or the teacher's do not fit.
        """
        super().prepare(run)
        self._teacher = load_teacher(self.teacher, run)
        self._range = (self._teacher.sigma_min, self._teacher.sigma_max)
        if self.begin == "teacher":
            if run.adapter is not None and not run.adapter.saves_base:
                raise ModelError(
                    f"objective.begin: the adapter '{run.adapter.name}' is attached to the student, whose own weights "
                    "stay as they are; name the teacher's run as model.path, or set adapter: full"
                )
            take_weights(run.model, self._teacher)

    def losses(self, model: Any, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the generator's losses (B,), and figures (B,) to report by name.

        Args:
            model: the generator.
            drawn: B generated arrays with noise.
        """
        with torch.no_grad():
            real = self.real(drawn)
            factor, figures = self.factor(drawn)
            gap = (self.fake(drawn) - real) * spread(factor, real)
            gap = gap * level_weight(self.weight, drawn.clean, real, drawn.sigma, model.sigma_data)
        return pull(drawn.clean, gap), figures

    def factor(self, drawn: Drawn) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weight h (B,) of each array, here 1, and figures (B,) to report by name.

        Args:
            drawn: B generated arrays with noise.
        """
        return torch.ones_like(drawn.sigma), {}

    def real(self, drawn: Drawn) -> Tensor:
        """Return the teacher's D_p (B, *shape), with guidance.

        Args:
            drawn: B generated arrays with noise.
        """
        found: Tensor = self._teacher.guided(drawn.noisy, drawn.sigma, drawn.labels, self.guidance)
        return found

    def fake(self, drawn: Drawn) -> Tensor:
        """Return D_q (B, *shape), what the fake score makes of generated arrays.

        Args:
            drawn: B generated arrays with noise.
        """
        raise NotImplementedError


def take_weights(model: Any, teacher: Any) -> None:
    """Copy a teacher's weights into a student of the same shape, or into each of several students.

    Args:
        model: the student.
        teacher: a denoiser.

    Raises:
        ModelError: their networks differ, or their outputs mean different things.
    """
    what = "objective.begin: the student cannot begin with the teacher's weights: "
    if not hasattr(teacher, "hf"):
        raise ModelError(f"{what}it has no network")
    levels = torch.tensor([model.sigma_min, model.sigma_data, model.sigma_max], dtype=torch.float64)
    found, wanted = (one.parameterisation.coefficients(levels) for one in (model, teacher))
    if not all(torch.allclose(own, theirs, rtol=1e-3) for own, theirs in zip(found, wanted, strict=True)):
        own, theirs = (
            f"{one.kind}, sigma_data {one.sigma_data:g}, sigma_min {one.sigma_min:g}"
            for one in (model.parameterisation, teacher.parameterisation)
        )
        raise ModelError(
            f"{what}they would mean other arrays: its parameterisation is {theirs}; the student's is {own}. Set "
            "model.parameterisation, model.sigma_data and model.sigma_min to the teacher's"
        )
    for network in getattr(model.hf, "students", [model.hf]):
        try:
            network.load_state_dict(teacher.hf.state_dict())
        except RuntimeError as error:
            raise ModelError(f"{what}their networks have different shapes") from error
