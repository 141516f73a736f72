"""Post-hoc averages: power-function means of the weights, and others of any length made of what was kept of them.

A mean of exponent g weighs the weights of step t at step T like t^g; its relative length is the standard deviation of
that profile over T, sqrt((g + 1) / ((g + 2)^2 (g + 3))). Snapshots of two such means along a run span many others: the
nearest combination of them, by least squares of the profiles, is the mean of another length (Karras et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from safetensors.torch import save
from torch import Tensor

from hone.callbacks.base import Callback
from hone.engine.sharding import copy_into, whole
from hone.parts import part
from hone.precision import wide_dtype

if TYPE_CHECKING:
    from hone.engine.loop import Run

Length = Annotated[float, Field(gt=0, lt=0.28)]  # that of the plain mean is sqrt(1 / 12) = 0.289


def exponent_of(length: float) -> float:
    """Return the exponent g of a relative length: the root of (g + 1) / ((g + 2)^2 (g + 3)) = length^2.

    Args:
        length: standard deviation of the profile, as a share of the run.
    """
    inverse = length**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def overlaps(steps: np.ndarray, exponents: np.ndarray, others: np.ndarray, their: np.ndarray) -> np.ndarray:
    """Return the inner products (n, m) of power profiles that end at some steps.

    Args:
        steps: (n,) where profiles end.
        exponents: (n,) of them.
        others: (m,) where other profiles end.
        their: (m,) exponents of those.
    """
    t_one, t_two, g_one, g_two = steps[:, None], others[None], exponents[:, None], their[None]
    ratio = (t_one / t_two) ** np.where(t_one < t_two, g_two, -g_one)
    return (g_one + 1) * (g_two + 1) * ratio / ((g_one + g_two + 1) * np.maximum(t_one, t_two))


def combination(steps: np.ndarray, lengths: np.ndarray, end: float, length: float) -> np.ndarray:
    """Return the coefficients (n,) of snapshots that come nearest to a mean of another length; they add up to 1.

    Args:
        steps: (n,) after which the snapshots were taken.
        lengths: (n,) relative lengths of the means that they are of.
        end: step at which the wanted mean ends.
        length: its relative length.
    """
    own = np.array([exponent_of(value) for value in lengths])
    wanted = np.array([exponent_of(length)])
    matrix = overlaps(steps, own, steps, own)
    found = np.linalg.lstsq(matrix, overlaps(steps, own, np.array([end]), wanted)[:, 0], rcond=1e-12)[0]
    return found / found.sum()


@part(
    "callback", "posthoc_ema",
    papers=[("Analyzing and Improving the Training Dynamics of Diffusion Models", "arXiv:2312.02696")],
    claim="A mean of the weights of any length can be made after training from a few snapshots of two others, and the "
    "best length beats one that was fixed before.",
    deviations="Least squares are solved by singular values, so that snapshots that are nearly alike do no harm.",
)  # fmt: skip
@dataclass(kw_only=True)
class PostHocEMA(Callback):
    """Keeps power-function means of the weights with snapshots, and ends the run with a mean of any length.

    mean_t <- b mean_{t-1} + (1 - b) w_t,  b = (1 - 1 / t)^(g + 1);  at the end sum over snapshots of x_i mean_i

    Costs a copy of the trained weights for each of `lengths`, and one more for each snapshot of it.

    Args:
        length: relative length of the mean that the run ends with: its standard deviation as a share of the run.
        lengths: of the means that are kept on the way.
        every: steps between snapshots; None takes a 16th of the run.
        also: lengths of further means, which are written beside the model as ema/LENGTH.safetensors.
    """

    length: Length = 0.1
    lengths: list[Length] = field(default_factory=lambda: [0.05, 0.1])
    every: Annotated[int, Field(ge=1)] | None = None
    also: list[Length] = field(default_factory=list)
    updates: int = field(init=False, default=0)
    means: list[dict[str, Tensor]] = field(init=False, default_factory=list, repr=False)
    snapshots: list[tuple[int, int, dict[str, Tensor]]] = field(init=False, default_factory=list, repr=False)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield that the means on the way are too few or too alike."""
        if len(set(self.lengths)) < 2:
            yield "lengths", "expected at least two different ones: others are made of them"

    def conflicts(self, recipe: Mapping[str, Any]) -> Iterator[str]:
        """Yield that the recipe keeps the best evaluated weights, which the mean would replace.

        Args:
            recipe: the recipe's fields.
        """
        if recipe.get("final") == "best":
            yield "'posthoc_ema' and 'final: best' both replace the final weights: set final: last"

    def on_start(self, run: Run) -> None:
        """Make room for the means, or put resumed ones where the weights are."""
        saved: list[dict[str, Tensor] | None] = [*self.means] or [None] * len(self.lengths)
        self.means = [_placed(run, mean) for mean in saved]
        self.snapshots = [(step, number, _placed(run, kept)) for step, number, kept in self.snapshots]

    def on_step(self, run: Run, row: dict[str, Any]) -> None:
        """Take the means further, and keep copies of them when it is time."""
        self.updates += 1
        weights = [weight.detach().to(wide_dtype(weight)) for _, weight in run.trainable]
        for length, mean in zip(self.lengths, self.means, strict=True):
            kept = (1 - 1 / self.updates) ** (exponent_of(length) + 1)
            torch._foreach_lerp_(list(mean.values()), weights, 1 - kept)
        if self.updates % (self.every or max(1, run.total // 16)) == 0:
            self._keep()

    def _keep(self) -> None:
        for number, mean in enumerate(self.means):
            self.snapshots.append((self.updates, number, {name: t.clone() for name, t in mean.items()}))

    @torch.no_grad()
    def mean_of(self, length: float) -> dict[str, Tensor]:
        """Return the mean of a length that ends at the latest step, made of the snapshots and of the means themselves.

        Args:
            length: its relative length.
        """
        now = [(self.updates, number, mean) for number, mean in enumerate(self.means)]
        found = [one for one in self.snapshots if one[0] < self.updates] + now
        steps = np.array([step for step, _, _ in found], dtype=np.float64)
        lengths = np.array([self.lengths[number] for _, number, _ in found])
        parts = combination(steps, lengths, float(self.updates), length)
        made = {name: torch.zeros_like(t) for name, t in self.means[0].items()}
        for share, (_, _, kept) in zip(parts.tolist(), found, strict=True):
            for name, total in made.items():
                total.add_(kept[name], alpha=share)
        return made

    @torch.no_grad()
    def on_end(self, run: Run) -> None:
        """Give the wanted mean to the model, and write the others."""
        if not self.updates:
            return
        for length in self.also:
            made = whole(self.mean_of(length), keep=run.cluster.main)  # all processes hold their shares
            if run.cluster.main and run.folder is not None:
                written = {name: t.contiguous().cpu() for name, t in made.items()}
                run.folder.write(f"ema/{length:g}.safetensors", save(written))
        made = self.mean_of(self.length)
        for name, weight in run.trainable:
            weight.copy_(made[name])

    def state_dict(self) -> dict[str, Any]:
        """Return the means and their snapshots."""
        kept = [{"step": step, "mean": number, "weights": dict(weights)} for step, number, weights in self.snapshots]
        return {"updates": self.updates, "means": [dict(mean) for mean in self.means], "snapshots": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: as `state_dict` returned it; its tensors are copied when the run starts.
        """
        self.updates, self.means = state["updates"], [dict(mean) for mean in state["means"]]
        self.snapshots = [(one["step"], one["mean"], dict(one["weights"])) for one in state["snapshots"]]


def _placed(run: Run, saved: dict[str, Tensor] | None) -> dict[str, Tensor]:
    """Return saved weights where the run's own are, or copies of those where None are saved."""
    found = {}
    for name, weight in run.trainable:
        found[name] = weight.detach().to(wide_dtype(weight), copy=True)
        if saved is not None:
            copy_into(found[name], saved[name])
    return found
