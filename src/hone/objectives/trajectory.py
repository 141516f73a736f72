"""Consistency trajectory models: jumps from any noise level to any lower one.

    G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s)

g is the network, which is shown s beside t; g(x, t, t) is a denoiser, G(x, t, 0) a consistency model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from hone.diffusion.critics import Critic, critic_loss, generator_loss
from hone.diffusion.levels import karras, spread
from hone.diffusion.views import View
from hone.modes import frozen
from hone.objectives.arrays import ArrayObjective, Positive, Share, output_error, squared
from hone.objectives.base import Turn
from hone.objectives.consistency import Count, Follows, huber_constant, pseudo_huber
from hone.objectives.teachers import Mean, add_player, load_teacher
from hone.objectives.watch import HINGE, Watching
from hone.parts import part

LOWEST = 1e-4  # what a jump to 0 shows its network, which sees logarithms
Weight = Annotated[float, Field(ge=0)]


def destination(s: Tensor) -> Tensor:
    """Return what the network is shown of the level that a jump leads to: ln(s) / 4, with s at least 1e-4.

    Args:
        s: noise levels.
    """
    return s.clamp(min=LOWEST).log() / 4


def intensity(strength: Tensor) -> Tensor:
    """Return what the network is shown of a guidance: ln(1 + w) / 4.

    Args:
        strength: w.
    """
    return strength.log1p() / 4


def jump(
    model: Any, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None = None, strength: Tensor | None = None
) -> Tensor:
    """Return G(x, t, s) (B, *shape): where the flow leads from noise level t to s.

    Args:
        model: a denoiser that has been widened by `ConsistencyTrajectory.equip`, or what `drawn_by` returned.
        x: (B, *shape) at level t.
        t: (B,) noise levels, or one for all; where it is 0 x stays.
        s: (B,) noise levels of at most t, or one for all.
        labels: (B,) classes, -1 for none; None for none at all.
        strength: (B,) guidance that the jump shall have, for models that were trained with one.
    """
    t, s = t.to(x).expand(len(x)), s.to(x).expand(len(x))
    shown = [destination(s)] if strength is None else [destination(s), intensity(strength.to(x).expand(len(x)))]
    share = spread(torch.where(t > 0, s / t.clamp(min=1e-20), torch.ones_like(t)), x)
    return share * x + (1 - share) * model(x, t, labels, torch.stack(shown, dim=-1))


class Jumps(View):
    """A trajectory model as solvers use it: called like a denoiser it jumps to 0, and `jump` takes it further."""

    def __init__(self, model: Any, strength: float | None = None) -> None:
        """Hold the model.

        Args:
            model: a widened denoiser.
            strength: guidance that it is shown, where it was trained with one.
        """
        super().__init__(model)
        self.model, self.strength, self.parameterisation = model, strength, model.parameterisation

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, extras: Tensor | None = None) -> Tensor:
        """Return g (B, *shape), which without `extras` is G(x, sigma, 0).

        Args:
            x: (B, *shape) noisy arrays.
            sigma: (B,) noise levels, or one number for all.
            labels: (B,) classes, -1 for none; None for none at all.
            extras: (B, 1) as `destination` returns it.
        """
        if extras is None:
            extras = destination(torch.zeros(len(x), 1).to(x))
        if self.strength is not None and extras.shape[1] == 1:
            shown = intensity(torch.full_like(extras, self.strength))
            extras = torch.cat([extras, shown], dim=1)
        found: Tensor = self.model(x, sigma, labels, extras)
        return found


class Balance:
    """Weights of further losses by which their gradients are as large as the main one's, at the last layer.

    w = |gradient of the main loss| / (|gradient of the other| + tiny) over a whole step, used in the next one, so that
    the weights do not depend on how a step is split; 1 in the first.
    """

    def __init__(self, limits: dict[str, tuple[float, float]], tiny: float = 1e-4) -> None:
        """Begin.

        Args:
            limits: smallest and largest weight of each further loss.
            tiny: added to what divides.
        """
        self.limits, self.tiny = limits, tiny
        self.weights = dict.fromkeys(limits, 1.0)
        self.sums: dict[str, Tensor] = {}

    def look(self, losses: dict[str, Tensor], layer: Tensor, counts: bool = True) -> None:
        """Add a micro-batch's gradients.

        Args:
            losses: sums of the losses by name, the main one's being "main".
            layer: the weights at which gradients are compared.
            counts: False for one that only keeps a process in step with the others; it adds nothing.
        """
        for name, loss in losses.items():
            found = torch.autograd.grad(loss, layer, retain_graph=True)[0] if counts else torch.zeros_like(layer)
            self.sums[name] = self.sums.get(name, torch.zeros_like(found)) + found

    def settle(self, cluster: Any) -> None:
        """Take the weights of the next step from the gradients of this one.

        Args:
            cluster: the processes, whose gradients are added up: the norm of a sum is no sum of norms.
        """
        whole = {name: nn.Parameter(torch.zeros_like(found)) for name, found in self.sums.items()}
        for name, found in self.sums.items():
            whole[name].grad = found
        cluster.reduce_gradients(whole.values())
        norms = {name: float(held.grad.norm()) for name, held in whole.items() if held.grad is not None}
        for name, (least, most) in self.limits.items():
            if name in norms:
                self.weights[name] = min(max(norms["main"] / (norms[name] + self.tiny), least), most)
        self.sums = {}


@part(
    "objective", "ctm",
    papers=[
        (
            "Consistency Trajectory Models: Learning Probability Flow ODE Trajectory of Diffusion",
            "arXiv:2310.02279",
        ),
    ],
    claim="A model that jumps between any two noise levels draws good samples in one step, and better ones in more "
    "steps, which consistency models do not.",
    deviations="Squared or pseudo-Huber distance instead of LPIPS. Trajectories end at 0 by a step of first order "
    "instead of at the smallest level. Adaptive weights are those of the step before. The discriminator judges noisy "
    "arrays by the frozen network of the teacher, where the authors' judges clean ones by image classifiers.",
    draws=[{"name": "gamma", "steps": 1}, {"name": "gamma", "steps": 2}],
)  # fmt: skip
@dataclass(kw_only=True)
class ConsistencyTrajectory(Watching, Follows, ArrayObjective):
    """Consistency trajectory distillation.

    d(G_m(G(x_t, t, s), s, 0), G_m(G_sg(x_u, u, s), s, 0)),  x_u = the teacher's Heun steps from x_t,  s <= u < t
    + w_1 |g(x, t, t) - y|^2 / c_out(t)^2 + w_2 (what a discriminator finds in G(x_t, t, 0))

    G_m is the running mean, through which the gradient passes; t is even on a grid of levels, u is h places lower with
    a chance in proportion to h, s is even below u.

    Args:
        teacher: a run of a denoiser, "stage:N", or "truth".
        levels: of the grid above 0.
        hops: most places between t and u; None for all.
        rho: spacing of the grid, as for the karras schedule.
        decay: of the running mean.
        distance: squared, or huber with iCT's constant.
        denoising: weight of the denoising term; its levels are half lognormal and half from the upper part of the grid.
        adversarial: weight of the adversarial term, 0 for none.
        begin: share of the run after which it begins.
        adaptive: whether both weights are multiplied so that gradients at the last layer are as large as the main
            loss's (`Balance`).
        mean: of the log of the level, for the lognormal half and for the discriminator.
        std: of the same.
    """

    teacher: str
    levels: Count = 18
    hops: Count | None = None
    rho: Positive = 7.0
    decay: Share = 0.999
    distance: Literal["squared", "huber"] = "squared"
    denoising: Weight = 1.0
    adversarial: Weight = 0.0
    begin: Share = 0.0
    adaptive: bool = True
    mean: float = -1.2
    std: Positive = 1.2
    _mean: Mean | None = field(init=False, default=None, repr=False)
    _teacher: Any = field(init=False, default=None, repr=False)
    _critic: Any = field(init=False, default=None, repr=False)
    _counted: list[Any] = field(init=False, default_factory=list, repr=False)
    _balance: Balance = field(
        init=False, default_factory=lambda: Balance({"denoising": (0.0, 1e4), "game": (0.01, 10.0)}), repr=False
    )

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the options."""
        if self.hops is not None and self.hops > self.levels:
            yield "hops", f"expected at most levels ({self.levels}), got {self.hops}"

    def equip(self, model: Any) -> None:
        """Let the network see the level that a jump leads to.

        Args:
            model: the denoiser.
        """
        model.widen(1)

    def drawn_by(self, model: Any) -> Any:
        """Return the model with its jumps.

        Args:
            model: the denoiser.
        """
        return Jumps(model)

    def setup(self, run: Any) -> None:
        """Load the teacher, begin the running mean, and let a discriminator join where one is asked for.

        Args:
            run: the run in progress.
        """
        super().setup(run)
        self._teacher = load_teacher(self.teacher, run)
        if self.adversarial:
            self._critic = Critic(self._teacher if hasattr(self._teacher, "hf") else run.model)
            add_player(run, "critic", self._critic)
            self.watch("critic/loss", HINGE)

    def before_step(self, run: Any, trees: Sequence[Any]) -> None:
        """Give every array its place, and forget which batches the step before had.

        Args:
            run: the run in progress.
            trees: all arrays of the step.
        """
        super().before_step(run, trees)
        self._counted = []

    def count(self, batch: Any) -> float:
        """Return the number of arrays, and keep the batch in mind: only those that count in a step are asked about.

        Args:
            batch: B arrays.
        """
        self._counted.append(batch)
        return super().count(batch)

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss without the adversarial term, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        terms, _, _ = self.terms(model, batch)
        return self.weighed(terms)

    def turns(self, model: Any, batch: Any) -> Iterator[Turn]:
        """Yield the model's turn and, with an adversarial term, the discriminator's.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        terms, noisy, later = self.terms(model, batch)
        if self._critic is None or self._progress < self.begin:
            self.compare(model, batch, terms)
            yield Turn("model", *self.weighed(terms))
            return
        labels = self.labels(model, batch)
        fake = self.leap(model, batch, noisy, later, torch.zeros_like(later), labels)
        level = self.drawn_levels(model, batch, "judged", mean=self.mean, std=self.std).to(fake)
        shown = spread(level, fake) * self.normal(batch, "fake")
        with frozen(self._critic):
            terms["game"] = generator_loss(self._critic(fake + shown, level, labels)).sum()
        self.compare(model, batch, terms)
        yield Turn("model", *self.weighed(terms))
        real = batch.arrays + spread(level, fake) * self.normal(batch, "real")
        judged = critic_loss(self._critic(real, level, labels), self._critic((fake + shown).detach(), level, labels))
        yield Turn("critic", judged.sum(), {})

    def compare(self, model: Any, batch: Any, terms: dict[str, Tensor]) -> None:
        """Measure the gradients of the terms, for the weights of the next step.

        Args:
            model: the denoiser.
            batch: B arrays.
            terms: sums by name.
        """
        if self.adaptive and len(terms) > 1:
            layer = [p for p in model.hf.parameters() if p.requires_grad and p.dim() > 1][-1]
            self._balance.look(terms, layer, any(batch is one for one in self._counted))

    def weighed(self, terms: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the whole loss, and its terms as metrics.

        Args:
            terms: sums by name.
        """
        weights = {"main": 1.0, "denoising": self.denoising, "game": self.adversarial}
        found = self._balance.weights if self.adaptive else {}
        total = torch.stack([weights[name] * found.get(name, 1.0) * value for name, value in terms.items()]).sum()
        return total, {name: value.detach() for name, value in terms.items() if name != "main"}

    def after_step(self, run: Any, row: dict[str, Any]) -> None:
        """Take the running mean and the weights further.

        Args:
            run: the run in progress.
            row: metrics of the step.
        """
        super().after_step(run, row)
        self._balance.settle(run.cluster)

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean and the weights of the terms."""
        return {**super().state_dict(), "weights": dict(self._balance.weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: as `state_dict` returned it.
        """
        super().load_state_dict(state)
        self._balance.weights.update(state.get("weights", {}))

    def terms(self, model: Any, batch: Any) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """Return the sums of the terms by name, x_t (B, *shape) and t (B,).

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        grid = karras(self.levels, model.sigma_min, model.sigma_max, self.rho).to(batch.arrays)
        first, hops, last = self.places(batch)
        later, between, sooner = grid[first], grid[first + hops], grid[last]
        labels = self.labels(model, batch)
        noisy = batch.arrays + spread(later, batch.arrays) * self.normal(batch)
        guess = self.leap(model, batch, noisy, later, sooner, labels)
        with torch.no_grad():
            ahead = self.taught(batch, noisy, grid, first, hops, labels)
            aim = self.leap(self.aimer(model), batch, ahead, between, sooner, labels)
        terms = {"main": self.apart(model, batch, guess, aim, sooner, labels).sum()}
        if self.denoising:
            terms["denoising"] = self.denoised(model, batch, labels).sum()
        return terms, noisy, later

    def places(self, batch: Any) -> tuple[Tensor, int, Tensor]:
        """Return the place of t (B,), the hops to u and the place of s (B,) on the descending grid with 0 at its end.

        Args:
            batch: B arrays.
        """
        most = self.hops or self.levels
        shares = torch.arange(1, most + 1, dtype=torch.float64).cumsum(0)
        hops = 1 + int((shares / shares[-1] <= self.once(batch, "hops")).sum())
        first = (self.uniform(batch, "first").double() * (self.levels + 1 - hops)).long()
        room = self.levels + 1 - first - hops
        last = first + hops + (self.uniform(batch, "last").double() * room).long()
        return first.clamp(max=self.levels - hops), hops, last.clamp(max=self.levels)

    def labels(self, model: Any, batch: Any) -> Tensor | None:
        """Return the classes (B,) of the arrays, None for data without.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        return self.some_labels(model, batch)

    def leap(self, model: Any, batch: Any, x: Tensor, t: Tensor, s: Tensor, labels: Tensor | None) -> Tensor:
        """Return G(x, t, s) (B, *shape).

        Args:
            model: the denoiser, or the running mean.
            batch: B arrays.
            x: (B, *shape) at level t.
            t: (B,).
            s: (B,).
            labels: (B,) classes.
        """
        return jump(model, x, t, s, labels)

    def aimer(self, model: Any) -> Any:
        """Return the network whose jump from x_u is aimed at; here the model itself, without gradient.

        Args:
            model: the denoiser.
        """
        return model

    def lead(self, batch: Any, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Return the teacher's D (B, *shape).

        Args:
            batch: B arrays.
            x: (B, *shape).
            sigma: (B,).
            labels: (B,) classes.
        """
        found: Tensor = self._teacher(x, sigma, labels)
        return found

    def taught(self, batch: Any, x: Tensor, grid: Tensor, first: Tensor, hops: int, labels: Tensor | None) -> Tensor:
        """Return x_u (B, *shape), by steps of Heun's method; one to 0 is of first order.

        Args:
            batch: B arrays.
            x: (B, *shape) x_t.
            grid: descending levels, 0 at the end.
            first: (B,) place of t.
            hops: steps.
            labels: (B,) classes.
        """
        for number in range(hops):
            now, then = grid[first + number], grid[first + number + 1]
            slope = (x - self.lead(batch, x, now, labels)) / spread(now, x)
            ahead = x + spread(then - now, x) * slope
            safe = torch.where(then > 0, then, now)
            second = (ahead - self.lead(batch, ahead, safe, labels)) / spread(safe, x)
            second = torch.where(spread(then > 0, x), second, slope)
            x = x + spread(then - now, x) * (slope + second) / 2
        return x

    def apart(self, model: Any, batch: Any, guess: Tensor, aim: Tensor, level: Tensor, labels: Tensor | None) -> Tensor:
        """Return the distance (B,) of two arrays at level s; here of where the running mean's jump leads from them.

        Args:
            model: the denoiser.
            batch: B arrays.
            guess: (B, *shape) G(x_t, t, s).
            aim: (B, *shape) G(x_u, u, s).
            level: (B,) s.
            labels: (B,) classes.
        """
        mean, end = self.target(model), torch.zeros_like(level)
        with torch.no_grad():
            aim = self.leap(mean, batch, aim, level, end, labels)
        guess = self.leap(mean, batch, guess, level, end, labels)
        if self.distance == "huber":
            return pseudo_huber(guess, aim, huber_constant(guess[0].numel()))
        return squared(guess, aim)

    def denoised(self, model: Any, batch: Any, labels: Tensor | None) -> Tensor:
        """Return the weighted error of g(x, t, t) as a denoiser (B,).

        Args:
            model: the denoiser.
            batch: B arrays.
            labels: (B,) classes.
        """
        uniforms = self.uniform(batch, "denoised").double()
        low, high = model.sigma_min ** (1 / self.rho), model.sigma_max ** (1 / self.rho)
        upper = (high + 0.7 * uniforms * (low - high)) ** self.rho  # 0.7: the authors' part of the grid
        lower = self.drawn_levels(model, batch, "lower", mean=self.mean, std=self.std)
        sigma = torch.where(self.uniform(batch, "half") < 0.5, lower, upper).to(batch.arrays)
        noisy = batch.arrays + spread(sigma, batch.arrays) * self.normal(batch, "other")
        found = self.still(model, batch, noisy, sigma, labels)
        return output_error(model, found, batch.arrays, sigma)

    def still(self, model: Any, batch: Any, x: Tensor, sigma: Tensor, labels: Tensor | None) -> Tensor:
        """Return g(x, t, t) (B, *shape).

        Args:
            model: the denoiser.
            batch: B arrays.
            x: (B, *shape).
            sigma: (B,) t.
            labels: (B,) classes.
        """
        found: Tensor = model(x, sigma, labels, destination(sigma)[:, None])
        return found
