"""Rectified flow from a teacher's pairs of noise and array, and one-step students of such pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.drawing import solve
from hone.diffusion.levels import flow_time, from_flow_time, spread
from hone.diffusion.spatial import edges, high_pass
from hone.objectives.arrays import ArrayObjective, Share, squared
from hone.objectives.consistency import Count
from hone.objectives.progressive import Weight, need_spatial, step
from hone.objectives.teachers import load_teacher
from hone.options import Nested
from hone.parts import part
from hone.solvers.ode import Heun


@dataclass(kw_only=True)
class Paired(ArrayObjective):
    """An objective of pairs: noise, and the array that a teacher's solver makes of it. They are made once.

    Args:
        teacher: a run of a denoiser, "stage:N", or "truth".
        pairs: how many; they lie in memory.
        solver: the teacher's; None takes heun with 18 levels.
        guidance: of the teacher, by classifier-free guidance, where no solver is given.
    """

    teacher: str
    pairs: Count = 4096
    solver: Annotated[Any, Nested("solver")] = None
    guidance: Weight = 1.0
    _teacher: Any = field(init=False, default=None, repr=False)
    _noise: Tensor = field(init=False, default_factory=lambda: torch.empty(0), repr=False)
    _clean: Tensor = field(init=False, default_factory=lambda: torch.empty(0), repr=False)
    _labels: Tensor | None = field(init=False, default=None, repr=False)

    def setup(self, run: Any) -> None:
        """Load the teacher and let it make the pairs: the same ones whenever the run is set up.

        Args:
            run: the run in progress.
        """
        super().setup(run)
        self._teacher = load_teacher(self.teacher, run)
        like = next(run.model.parameters())
        source = run.recipe.build("data")
        labels = source.collection("train").labels if run.model.classes else None
        generator = torch.Generator().manual_seed(run.recipe.seed)
        self._noise = torch.randn(self.pairs, *run.model.shape, generator=generator, dtype=torch.float64).to(like)
        if labels is not None:
            self._labels = labels[torch.arange(self.pairs) % len(labels)].to(like.device)
        solver: Any = self.solver or Heun(guidance=self.guidance)
        solver.prepare(self._teacher, source)
        self._clean = solve(self._teacher, solver, self._noise, self._labels, generator)[0]

    def pair(self, batch: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return noise and array (B, *shape) and the classes (B,) of pairs that are drawn for a batch.

        Args:
            batch: B arrays.
        """
        which = (self.uniform(batch, "pair").double() * self.pairs).long().clamp(max=self.pairs - 1)
        return self._noise[which], self._clean[which], None if self._labels is None else self._labels[which]


def velocity_error(guess: Tensor, aim: Tensor, sigma: Tensor) -> Tensor:
    """Return the mean squared error of the velocity of flow matching (B,): |D - y|^2 / t^2 with t = s / (1 + s).

    Args:
        guess: (B, *shape) D(x, s).
        aim: (B, *shape) y.
        sigma: (B,) s.
    """
    time = spread(flow_time(sigma), guess)
    return squared(guess / time, aim / time)


@part(
    "objective", "reflow",
    papers=[
        ("Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow", "arXiv:2209.03003"),
    ],
    claim="A flow that is trained again on its own pairs of noise and array is straighter, and draws good samples in "
    "few steps, even in one.",
    deviations="Squared distance in the distillation too, where the authors use LPIPS. Lines end where samples start, "
    "at sigma_max z, a hair before pure noise.",
    draws=[{"name": "ddim", "steps": 1, "schedule": "flow"}, {"name": "ddim", "steps": 2, "schedule": "flow"}],
)  # fmt: skip
@dataclass(kw_only=True)
class Reflow(Paired):
    """Flow matching on the pairs that a teacher's flow has made: the 2-rectified flow, or its one-step student.

    |v(x_t, t) - (n - y)|^2,  x_t = (1 - t) y + t n,  (n, y) a pair

    In hone's scale n = z - y / s_max, so that the line leads through s_max z at s_max, and the error of v is that of
    the denoiser over t. For models of parameterisation flow. Sampled by `ddim` with schedule flow.

    Args:
        times: even: of the whole line, which makes a flow; start: pure noise only, which distils it to one step.
    """

    times: Literal["even", "start"] = "even"

    def noise(self, batch: Any, noise: Tensor) -> Tensor:
        """Return the noise z (B, *shape) that a line starts from.

        Args:
            batch: B arrays.
            noise: (B, *shape) that of the pair.
        """
        return noise

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        noise, clean, labels = self.pair(batch)
        sigma = torch.full((len(clean),), model.sigma_max).to(clean)
        if self.times == "even":
            low, high = (level / (1 + level) for level in (model.sigma_min, model.sigma_max))
            sigma = from_flow_time(low + (high - low) * self.uniform(batch, "time").double()).to(clean)
        line = self.noise(batch, noise) - clean / model.sigma_max
        guess = model(clean + spread(sigma, clean) * line, sigma, labels)
        return velocity_error(guess, clean, sigma).sum(), {}


@part(
    "objective", "annealed-reflow",
    papers=[
        ("SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow", "arXiv:2407.12718"),
    ],
    claim="A small flow from fresh weights learns a straight flow better when its pairs become those of the teacher "
    "step by step.",
    draws=[{"name": "ddim", "steps": 1, "schedule": "flow"}, {"name": "ddim", "steps": 2, "schedule": "flow"}],
)  # fmt: skip
@dataclass(kw_only=True)
class AnnealedReflow(Reflow):
    """Reflow whose noise goes from any to that of the pair: from a flow of fresh weights to a 2-rectified one.

    as reflow with z' = sqrt(1 - b^2) z + b e in the place of z,  e fresh noise,  b from 1 to 0 over `warmup`

    Args:
        warmup: share of the run in which b falls to 0; with exp the share in which it falls to 1 / e.
        anneal: linear, cosine or exp: how b falls.
    """

    warmup: Annotated[float, Field(gt=0, le=1)] = 0.5
    anneal: Literal["linear", "cosine", "exp"] = "linear"

    def fresh(self) -> float:
        """Return b, the share of fresh noise at this step."""
        done = self._progress / self.warmup
        if self.anneal == "exp":
            return math.exp(-done)
        done = min(1.0, done)
        return (1 + math.cos(math.pi * done)) / 2 if self.anneal == "cosine" else 1 - done

    def noise(self, batch: Any, noise: Tensor) -> Tensor:
        """Return the noise z' (B, *shape) that a line starts from.

        Args:
            batch: B arrays.
            noise: (B, *shape) that of the pair.
        """
        share = self.fresh()
        return math.sqrt(1 - share**2) * noise + share * self.normal(batch, "fresh")


@part(
    "objective", "flow-guided",
    papers=[
        ("SlimFlow: Training Smaller One-Step Diffusion Models with Rectified Flow", "arXiv:2407.12718"),
    ],
    claim="A one-step student learns better from its teacher's pairs and two-step samples than from the pairs alone.",
    deviations="Squared distance, where the authors use LPIPS for images.",
    draws=[{"name": "ddim", "steps": 1, "schedule": "flow"}],
)  # fmt: skip
@dataclass(kw_only=True)
class FlowGuided(Paired):
    """Distillation of a straight flow to one step: from its pairs, and from two Euler steps of it for fresh noise.

    |v(z, 1) - (z - y)|^2 + online |v(z', 1) - (z' - Y)|^2

    (z, y) a pair;  Y = where two steps of the teacher lead from fresh noise z', the level between them with an even
    time in [0.2, 0.8], times that of sigma_max where it is below 0.8. Sampled by `multistep` or `ddim` in one step.

    Args:
        online: weight of the two-step samples.
        lead: whose is the first of the two steps: the teacher's, as in the paper, or the student's, as in the authors'
            code.
    """

    online: Weight = 1.0
    lead: Literal["teacher", "student"] = "teacher"

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        noise, clean, labels = self.pair(batch)
        top = torch.full((len(clean),), model.sigma_max).to(clean)
        matched = velocity_error(model(model.sigma_max * noise, top, labels), clean, top)
        if not self.online:
            return matched.sum(), {}
        x = model.sigma_max * self.normal(batch, "fresh")
        guess = model(x, top, labels)
        with torch.no_grad():
            end = model.sigma_max / (1 + model.sigma_max)
            end = 1.0 if end >= 0.8 else end  # no network is asked above sigma_max
            middle = from_flow_time(end * (0.2 + 0.6 * self.uniform(batch, "time")))
            first = guess if self.lead == "student" else self.taught(x, top, labels)
            aim = self.taught(step(x, first, top, middle), middle, labels)
        guided = velocity_error(guess, aim, top)
        return (matched + self.online * guided).sum(), {"online": guided.detach().sum()}

    def taught(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Return the teacher's D (B, *shape).

        Args:
            x: (B, *shape).
            sigma: (B,).
            labels: (B,) classes.
        """
        found: Tensor = self._teacher.guided(x, sigma, labels, self.guidance)
        return found


@part(
    "objective", "hipa",
    papers=[
        (
            "HiPA: Enabling One-Step Text-to-Image Diffusion Models via High-Frequency-Promoting Adaptation",
            "arXiv:2311.18158",
        ),
    ],
    claim="Low-rank adapters that learn to restore high frequencies make a frozen diffusion model draw well in one "
    "step, with a small share of the parameters and of the training.",
    deviations="After the abstract and descriptions of the paper; no code of it was found. Squared distance instead of "
    "a perceptual one; the filter is a sharp one and edges are Sobel's.",
    draws=[{"name": "multistep", "steps": 1}],
)  # fmt: skip
@dataclass(kw_only=True)
class HighFrequency(Paired):
    """One-step adaptation of a diffusion model that minds high frequencies, for use with `adapter: lora`.

    |D(s_max z, s_max) - y|^2 + highs |H(D) - H(y)|^2 + edges |S(D) - S(y)|^2

    (z, y) a pair;  H leaves frequencies above `cutoff`, S is the steepness at each place. Sampled by `multistep` or
    `ddim` in one step.

    Args:
        highs: weight of the high frequencies, for images and series.
        edges: weight of the edges, for images and series.
        cutoff: lowest frequency of H, as a share of the highest along one axis.
    """

    highs: Weight = 5.0
    edges: Weight = 1.0
    cutoff: Share = 0.5

    def setup(self, run: Any) -> None:
        """Load the teacher and let it make the pairs.

        Args:
            run: the run in progress.
        """
        need_spatial(run.model.shape, self.highs, "highs")
        need_spatial(run.model.shape, self.edges, "edges")
        super().setup(run)

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        noise, clean, labels = self.pair(batch)
        top = torch.full((len(clean),), model.sigma_max).to(clean)
        guess = model(model.sigma_max * noise, top, labels)
        losses, metrics = squared(guess, clean), {}
        if self.highs:
            sharp = squared(high_pass(guess, self.cutoff), high_pass(clean, self.cutoff))
            losses, metrics["high_frequencies"] = losses + self.highs * sharp, sharp.detach().sum()
        if self.edges:
            losses = losses + self.edges * squared(edges(guess), edges(clean))
        return losses.sum(), metrics
