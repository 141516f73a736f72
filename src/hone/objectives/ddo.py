"""Direct discriminative optimisation: a model told apart from its former self is a discriminator of real and drawn."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hone.diffusion.drawing import solve
from hone.diffusion.encoders import training_data
from hone.diffusion.levels import spread
from hone.objectives.arrays import ArrayObjective, Levels, Positive
from hone.objectives.consistency import Count
from hone.options import Nested
from hone.parts import part
from hone.precision import wide_dtype
from hone.solvers.ode import Heun


def discriminative(real: Tensor, fake: Tensor, alpha: float, beta: float) -> Tensor:
    """Return -log sigmoid(beta real) - alpha log sigmoid(-beta fake), for each pair (B,).

    Args:
        real: (B,) log p(x) / p_reference(x) of real arrays.
        fake: (B,) the same of arrays that the reference has drawn.
        alpha: weight of the drawn ones.
        beta: factor on the ratios.
    """
    return -F.logsigmoid(beta * real) - alpha * F.logsigmoid(-beta * fake)


@part(
    "objective", "ddo",
    papers=[
        (
            "Direct Discriminative Optimization: Your Likelihood-Based Visual Generative Model is Secretly a GAN "
            "Discriminator",
            "arXiv:2503.01103",
        ),
    ],
    claim="Short rounds of tuning a diffusion model to tell real arrays from its own, by its likelihood against its "
    "former self, draw clearly better samples without guidance.",
    deviations="A round ends after an equal part of the run and begins with its last weights, where the paper takes "
    "the best evaluated ones; the optimizer's state is carried over.",
)  # fmt: skip
@dataclass(kw_only=True)
class DDO(ArrayObjective):
    """Direct discriminative optimisation from a pretrained denoiser.

    -log sigmoid(beta d(y)) - alpha log sigmoid(-beta d(y')), y real, y' drawn by the reference, the same noise for both
    d(y) = -(|D(y + s n, s) - y|^2 - |D_reference(y + s n, s) - y|^2) / c_out(s)^2, summed over the array's numbers

    The optimum is p proportional to p_reference^(1 - 1/beta) p_data^(1/beta) for alpha 1.

    Args:
        alpha: weight of the drawn arrays.
        beta: factor on the log-ratios; those of larger arrays are larger, and want a smaller one.
        rounds: equal parts of the run; each begins with the model as its new reference.
        drawn: arrays that the reference draws for a round.
        solver: how it draws them; None takes Heun's method with 18 steps.
        levels: distribution of the noise levels, as for `denoise`.
        mean: of the log of the level.
        std: of the same.
    """

    measured: ClassVar[bool] = False  # real arrays alone say nothing
    alpha: Positive = 1.0
    beta: Positive = 0.1
    rounds: Count = 1
    drawn: Count = 2000
    solver: Annotated[Any, Nested("solver")] = None
    levels: Levels = "lognormal"
    mean: float = -0.4
    std: Positive = 1.0
    _reference: Any = field(init=False, default=None, repr=False)
    _pool: tuple[Tensor, Tensor] | None = field(init=False, default=None, repr=False)
    _round: int = field(init=False, default=0, repr=False)
    _labels: Tensor | None = field(init=False, default=None, repr=False)

    def setup(self, run: Any) -> None:
        """Take the model as the first reference, and let it draw.

        Args:
            run: the run in progress.
        """
        if run.loader is None:  # evaluation alone
            return
        self._labels = training_data(run)[1]
        self._reference = copy.deepcopy(run.model).eval().requires_grad_(False)
        self.fill(run)

    def fill(self, run: Any) -> None:
        """Let the reference draw the arrays of a round.

        Args:
            run: the run in progress.
        """
        assert self._labels is not None
        solver: Any = self.solver or Heun(steps=18)
        seed = (1_000_003 * (run.recipe.seed + 1) + self._round) % 2**63  # rounds draw different arrays
        generator, parameter = torch.Generator().manual_seed(seed), next(self._reference.parameters())
        noise = torch.randn(self.drawn, *self._reference.shape, generator=generator)
        noise = noise.to(parameter.device, wide_dtype(parameter))
        labels = self._labels[torch.arange(self.drawn) % len(self._labels)].to(parameter.device)
        told = labels if self._reference.classes else None
        with run.cluster.autocast():
            solver.prepare(self._reference, run.recipe.build("data"))
            self._pool = solve(self._reference, solver, noise, told, generator)[0], labels

    def before_step(self, run: Any, trees: Sequence[Any]) -> None:
        """Begin a new round when it is time.

        Args:
            run: the run in progress.
            trees: all arrays of the step.
        """
        super().before_step(run, trees)
        current = min(int(self._progress * self.rounds), self.rounds - 1)
        if current != self._round:
            self._round = current
            self._reference.load_state_dict(run.model.state_dict())
            self.fill(run)

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        assert self._pool is not None
        sigma = self.drawn_levels(model, batch, "level", self.levels, mean=self.mean, std=self.std).to(batch.arrays)
        noise = spread(sigma, batch.arrays) * self.normal(batch)
        chosen = (self.uniform(batch, "fake") * self.drawn).long().clamp(max=self.drawn - 1)
        arrays, labels = (kept[chosen.to(kept.device)] for kept in self._pool)
        real = self.ratio(model, batch.arrays, sigma, noise, batch.labels)
        fake = self.ratio(model, arrays.to(noise), sigma, noise, labels)
        figures = {"real": real.detach().sum(), "fake": fake.detach().sum()}
        return discriminative(real, fake, self.alpha, self.beta).sum(), figures

    def ratio(self, model: Any, arrays: Tensor, sigma: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        """Return the log-ratio d of arrays (B,), by one level of noise for each.

        Args:
            model: the denoiser.
            arrays: (B, *shape) clean arrays.
            sigma: (B,) noise levels.
            noise: (B, *shape) noise of those levels.
            labels: (B,) classes, -1 for none.
        """
        told = labels if model.classes else None
        weight = model.parameterisation.error_scale(sigma) ** -2

        def error(network: Any) -> Tensor:
            return weight * (network(arrays + noise, sigma, told) - arrays).square().flatten(1).sum(1)

        with torch.no_grad():
            former = error(self._reference)
        return former - error(model)

    def state_dict(self) -> dict[str, Any]:
        """Return the round, the reference and what it has drawn."""
        if self._pool is None:
            return {}
        arrays, labels = self._pool
        return {
            "round": self._round,
            "reference": dict(self._reference.state_dict()),
            "arrays": arrays,
            "labels": labels,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a round.

        Args:
            state: as `state_dict` returned it.
        """
        if self._reference is not None and "round" in state:
            self._round = state["round"]
            self._reference.load_state_dict(state["reference"])
            device = next(self._reference.parameters()).device  # checkpoints are read into the CPU's memory
            self._pool = state["arrays"].to(device), state["labels"].to(device)
