"""Consistency training: a model that gives the same array all along a trajectory. Distillation is in its own file.

All minimise weight(t, r) d(f(x_t, t), f_target(x_r, r)) for pairs of noise levels t > r of one trajectory, f being the
denoiser itself. The axes are methods of `Consistency`: which pair (`pair`), which x_r (`earlier`), which target network
(`target`), which distance (`apart`) and which weight. A published method is a row:

    method          pair                         x_r                   target   distance      weight
    ct              neighbours, even, growing N  y + r z               mean     squared       1
    cd              neighbours, even             teacher's Heun step   mean     squared       1
    ict             neighbours, lognormal, x 2   y + r z               itself   pseudo-Huber  1 / (t - r)
    ect             t lognormal, r(t) nearing t  y + r z               itself   norm          1 / (t - r)
    slct            as ict, exponential N        y + r z, optimal z    itself   Cauchy        1 / (t - r)
    scott           neighbours, even             teacher's SDE steps   mean     pseudo-Huber  1
    comospeech      neighbours, even             teacher's Euler step  mean     squared       1
    multistep-cd    neighbours, even             teacher's Heun step   mean     squared       1

The last is consistent within each of several segments of noise levels (`seen`), the others all the way down.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.levels import karras, spread
from hone.errors import ModelError
from hone.modes import draws
from hone.objectives.arrays import ArrayObjective, Positive, Share, neighbours, squared
from hone.objectives.teachers import Mean
from hone.parts import part

Count = Annotated[int, Field(ge=1)]
MOST_STAGE = 8  # halvings of ECT's gap, as in the authors' code: after them r is within 0.4% of t


def pseudo_huber(left: Tensor, right: Tensor, c: float) -> Tensor:
    """Return sqrt(|l - r|^2 + c^2) - c of each array (B,).

    Args:
        left: (B, *shape).
        right: (B, *shape).
        c: where it turns from square to linear.
    """
    return ((left - right).square().flatten(1).sum(1) + c**2).sqrt() - c


def huber_constant(size: int) -> float:
    """Return iCT's constant for arrays of `size` numbers: 0.00054 sqrt(size)."""
    return 0.00054 * math.sqrt(size)


@dataclass(kw_only=True)
class Consistency(ArrayObjective):
    """A consistency objective; see the module's docstring.

    Args:
        rho: spacing of the discrete noise levels, as for the karras schedule.
        drop_labels: share of the arrays whose class is left out; 1 leaves all classes free.
    """

    anchored: ClassVar[bool] = False  # whether some aims are the arrays themselves
    rho: Positive = 7.0
    drop_labels: Share = 0.0

    def setup(self, run: Any) -> None:
        """Refuse a model whose answer is free at every noise level: the same one everywhere would have no loss.

        Args:
            run: the run in progress.

        Raises:
            ModelError: it is one.
        """
        super().setup(run)
        if run.model.parameterisation.kind == "x0" and not self.anchored:
            raise ModelError(
                "model.parameterisation: x0 ties a consistency model to its input nowhere, so that one answer to "
                "everything has no loss; set it to consistency, or to edm, flow, trigflow, vp-eps or vp-v"
            )

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        losses, guess = self.parts(model, batch)
        return self.total(model, batch, losses, guess), {}

    def parts(self, model: Any, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the weighted distances (B,), and f(x_t, t) (B, *shape), without autocast and with the same dropout.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        later, sooner, weight = (value.to(batch.arrays) for value in self.pair(model, batch))
        labels = self.some_labels(model, batch, self.drop_labels)
        noise = self.noise(batch)
        noisy = batch.arrays + spread(later, noise) * noise

        def sought() -> Tensor:
            nearer = self.earlier(model, batch, noisy, noise, later, sooner)
            aim: Tensor = self.target(model)(nearer, sooner, labels)
            clean = spread(sooner <= 0, aim)  # at no noise the answer is known, and c_noise may be -inf
            return self.seen(model, noisy, later, nearer, sooner, torch.where(clean, nearer, aim.nan_to_num()))

        guess, aim = neighbours(noisy, lambda: model(noisy, later, labels), sought)
        return weight * self.apart(guess, aim), guess

    def total(self, model: Any, batch: Any, losses: Tensor, guess: Tensor) -> Tensor:
        """Return the sum of the losses (B,), with whatever a method adds.

        Args:
            model: the denoiser.
            batch: B arrays.
            losses: (B,) weighted distances.
            guess: (B, *shape) f(x_t, t).
        """
        return losses.sum()

    def pair(self, model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return (t, r, weight), each (B,), with t > r.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        raise NotImplementedError

    def noise(self, batch: Any) -> Tensor:
        """Return the noise (B, *shape) of a trajectory.

        Args:
            batch: B arrays.
        """
        return self.normal(batch)

    def earlier(self, model: Any, batch: Any, noisy: Tensor, noise: Tensor, later: Tensor, sooner: Tensor) -> Tensor:
        """Return x_r (B, *shape); here the same array with less of the same noise.

        Args:
            model: the denoiser.
            batch: B arrays.
            noisy: (B, *shape) x_t.
            noise: (B, *shape) z.
            later: (B,) t.
            sooner: (B,) r.
        """
        return batch.arrays + spread(sooner, noise) * noise

    def target(self, model: Any) -> Any:
        """Return the network that is aimed at; here the model itself, without gradient.

        Args:
            model: the denoiser.
        """
        return model

    def seen(self, model: Any, noisy: Tensor, later: Tensor, nearer: Tensor, sooner: Tensor, aim: Tensor) -> Tensor:
        """Return what f(x_t, t) shall be (B, *shape); here f_target(x_r, r), for a trajectory that ends at no noise.

        Args:
            model: the denoiser.
            noisy: (B, *shape) x_t.
            later: (B,) t.
            nearer: (B, *shape) x_r.
            sooner: (B,) r.
            aim: (B, *shape) f_target(x_r, r).
        """
        return aim

    def apart(self, guess: Tensor, aim: Tensor) -> Tensor:
        """Return the distance of each array (B,); here the mean squared difference.

        Args:
            guess: (B, *shape).
            aim: (B, *shape).
        """
        return squared(guess, aim)

    def grid(self, model: Any, count: int) -> Tensor:
        """Return `count` ascending noise levels from sigma_min to sigma_max.

        Args:
            model: the denoiser.
            count: how many.
        """
        return karras(count, model.sigma_min, model.sigma_max, self.rho)[:-1].flip(0)

    def neighbours(self, grid: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Return the levels (t, r) of neighbouring places of a grid.

        Args:
            grid: (N,) ascending.
            which: (B,) place of r, below N - 1.
        """
        return grid[which + 1], grid[which]


def even_places(uniforms: Tensor, count: int) -> Tensor:
    """Return places (B,) below `count` - 1, all as likely.

    Args:
        uniforms: (B,) in [0, 1).
        count: levels of the grid.
    """
    return (uniforms.double() * (count - 1)).long().clamp(max=count - 2)


def lognormal_places(uniforms: Tensor, grid: Tensor, mean: float, std: float) -> Tensor:
    """Return places (B,) of a grid with the probability that a lognormal level falls between a place and the next.

    p_i proportional to erf((ln s_{i+1} - mean) / (sqrt(2) std)) - erf((ln s_i - mean) / (sqrt(2) std))

    Args:
        uniforms: (B,) in [0, 1).
        grid: (N,) ascending levels.
        mean: of the log.
        std: of the log.
    """
    edges = torch.erf((grid.log() - mean) / (math.sqrt(2) * std))
    cumulative = (edges.diff() / (edges[-1] - edges[0])).cumsum(0)
    return torch.searchsorted(cumulative, uniforms.double(), right=True).clamp(max=len(grid) - 2)


class Follows:
    """Mixed into objectives whose target is a running mean of the student."""

    _mean: Mean | None
    if TYPE_CHECKING:  # a field of those that are mixed with it; here it would come before their own
        decay: float

    def setup(self, run: Any) -> None:
        """Begin the running mean with the student.

        Args:
            run: the run in progress.
        """
        super().setup(run)  # type: ignore[misc]
        self._mean = Mean(run.model)

    def target(self, model: Any) -> Any:
        """Return the running mean; the model itself before there is one.

        Args:
            model: the denoiser.
        """
        return model if self._mean is None else self._mean.model

    def decay_now(self, run: Any) -> float:
        """Return the share of the mean that stays after this step.

        Args:
            run: the run in progress.
        """
        return self.decay

    def after_step(self, run: Any, row: dict[str, Any]) -> None:
        """Take the mean further.

        Args:
            run: the run in progress.
            row: metrics of the step.
        """
        super().after_step(run, row)  # type: ignore[misc]
        if self._mean is not None:
            self._mean.move(run.model, self.decay_now(run))

    def state_dict(self) -> dict[str, Any]:
        """Return the mean's weights."""
        return {} if self._mean is None else {"mean": self._mean.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a mean.

        Args:
            state: as `state_dict` returned it.
        """
        if self._mean is not None and "mean" in state:
            self._mean.load_state_dict(state["mean"])


@part(
    "objective", "ct",
    papers=[("Consistency Models", "arXiv:2303.01469")],
    claim="A consistency model that is trained without a teacher draws good samples in one or two steps.",
    deviations="Squared distance instead of LPIPS, which the paper's ablation has too.",
    draws=[{"name": "multistep", "steps": 1}, {"name": "multistep", "steps": 2}],
)  # fmt: skip
@dataclass(kw_only=True)
class ConsistencyTraining(Follows, Consistency):
    """Consistency training as first published: even neighbours of a grid that grows, and a running mean as target.

    N(k) = ceil(sqrt(k / K ((s_1 + 1)^2 - s_0^2) + s_0^2) - 1) + 1,  decay(k) = exp(s_0 ln(mu_0) / N(k))

    Args:
        start: levels of the grid at the beginning, s_0.
        end: at the end, s_1.
        decay: of the running mean at the beginning, mu_0.
    """

    start: Count = 2
    end: Count = 150
    decay: Share = 0.9
    _mean: Mean | None = field(init=False, default=None, repr=False)

    def levels_now(self) -> int:
        """Return the levels of the grid at this step."""
        grown = math.sqrt(self._progress * ((self.end + 1) ** 2 - self.start**2) + self.start**2)
        return max(2, math.ceil(grown - 1) + 1)

    def decay_now(self, run: Any) -> float:
        """Return the share of the mean that stays after this step.

        Args:
            run: the run in progress.
        """
        return math.exp(self.start * math.log(max(self.decay, 1e-12)) / self.levels_now())

    def pair(self, model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return (t, r, weight), each (B,), with t > r.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        grid = self.grid(model, self.levels_now())
        later, sooner = self.neighbours(grid, even_places(self.uniform(batch, "pair").cpu(), len(grid)))
        return later, sooner, torch.ones_like(later)


@part(
    "objective", "ict",
    papers=[("Improved Techniques for Training Consistency Models", "arXiv:2310.14189")],
    claim="Consistency training without a running mean, with a pseudo-Huber distance, lognormal noise levels and a "
    "grid that doubles, draws better samples in one and in two steps than consistency training did.",
    deviations="Dropout is the network's own; the paper's networks use more of it than ours.",
    draws=[{"name": "multistep", "steps": 1}, {"name": "multistep", "steps": 2}],
)  # fmt: skip
@dataclass(kw_only=True)
class ImprovedConsistencyTraining(Consistency):
    """Improved consistency training.

    weight d = (sqrt(|f(x_t, t) - sg f(x_r, r)|^2 + c^2) - c) / (t - r),  c = huber sqrt(size of an array)
    N(k) = min(start 2^floor(k / K'), end) + 1,  K' = floor(K / (log2(floor(end / start)) + 1))

    Args:
        start: intervals of the grid at the beginning.
        end: most intervals.
        mean: of the log of the noise level.
        std: of the same.
        huber: c over the root of the size of an array.
    """

    start: Count = 10
    end: Count = 1280
    mean: float = -1.1
    std: Positive = 2.0
    huber: Annotated[float, Field(ge=0)] = 0.00054

    def intervals_now(self) -> int:
        """Return the intervals of the grid at this step: doubled at equal distances over the run."""
        doublings = math.log2(max(1, self.end // self.start))
        return min(self.start * 2 ** int(self._progress * (doublings + 1)), self.end)

    def pair(self, model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return (t, r, weight), each (B,), with t > r.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        grid = self.grid(model, self.intervals_now() + 1)
        places = lognormal_places(self.uniform(batch, "pair").cpu(), grid, self.mean, self.std)
        later, sooner = self.neighbours(grid, places)
        return later, sooner, 1 / (later - sooner)

    def apart(self, guess: Tensor, aim: Tensor) -> Tensor:
        """Return the pseudo-Huber distance of each array (B,).

        Args:
            guess: (B, *shape).
            aim: (B, *shape).
        """
        return pseudo_huber(guess, aim, self.huber * math.sqrt(guess[0].numel()))


@part(
    "objective", "ect",
    papers=[("Consistency Models Made Easy", "arXiv:2406.14548")],
    claim="A consistency model that is tuned from a diffusion model, its two noise levels drawing together, needs a "
    "fraction of the training that one from scratch does.",
    draws=[{"name": "multistep", "steps": 1}, {"name": "multistep", "steps": 2}],
)  # fmt: skip
@dataclass(kw_only=True)
class EasyConsistencyTuning(Consistency):
    """Easy consistency tuning, from a pretrained denoiser: at first r = 0, which is denoising; then r nears t.

    r = max(0, t (1 - (1 + k sigmoid(-b t)) / q^(stage + 1))),  weight d = |f(x_t, t) - sg f(x_r, r)| / (t - r)

    There is no grid of levels, so that rho does nothing. Where r = 0, as for 81% of the arrays in the first stage and
    58% in the second, f(x_r, r) is the array itself, and the network does not run on them.

    Args:
        q: how much smaller the gap is after each stage.
        k: how much larger it is at small noise.
        b: how fast that ends.
        stages: equal parts of the run; 8 in the authors' code.
        mean: of the log of the noise level.
        std: of the same.
        huber: constant of a pseudo-Huber distance, 0 for the norm.
    """

    anchored = True
    q: Positive = 2.0
    k: Annotated[float, Field(ge=0)] = 8.0
    b: Positive = 1.0
    stages: Count = MOST_STAGE
    mean: float = -1.1
    std: Positive = 2.0
    huber: Annotated[float, Field(ge=0)] = 0.0
    _draws: bool | None = field(init=False, default=None, repr=False)  # whether the network drops out

    def pair(self, model: Any, batch: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return (t, r, weight), each (B,), with t > r.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        later = self.drawn_levels(model, batch, "pair", mean=self.mean, std=self.std).cpu()
        gap = (1 + self.k * torch.sigmoid(-self.b * later)) / self.q ** (int(self._progress * self.stages) + 1)
        sooner = (later * (1 - gap)).clamp(min=0)
        return later, sooner, 1 / (later - sooner)

    def target(self, model: Any) -> Any:
        """Return the model, run where noise is left; on all arrays if it drops out, so that both passes do it alike.

        Args:
            model: the denoiser.
        """

        def aim(x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
            if self._draws is None:
                self._draws = draws(lambda: model(x[:1], sigma[:1], None if labels is None else labels[:1]), x.device)
            noisy = (sigma > 0).nonzero()[:, 0]
            if self._draws or len(noisy) == len(x):
                return model(x, sigma, labels)
            found = x.clone()
            if len(noisy):
                found[noisy] = model(x[noisy], sigma[noisy], None if labels is None else labels[noisy]).to(x.dtype)
            return found

        return aim

    def apart(self, guess: Tensor, aim: Tensor) -> Tensor:
        """Return the norm of the difference of each array (B,), or its pseudo-Huber form.

        Args:
            guess: (B, *shape).
            aim: (B, *shape).
        """
        return pseudo_huber(guess, aim, self.huber) if self.huber else (guess - aim).flatten(1).norm(dim=1)
