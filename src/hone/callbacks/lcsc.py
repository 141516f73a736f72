"""A linear combination of saved checkpoints: weights of several steps of a run, mixed by what a search found best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hone.callbacks.base import Callback
from hone.errors import HoneError
from hone.modes import evaluating
from hone.options import Nested
from hone.parts import part
from hone.precision import wide_dtype

if TYPE_CHECKING:
    from hone.engine.loop import Run

Count = Annotated[int, Field(ge=1)]
RATES = (0.3, 0.6, 0.8, 0.9, 0.95)  # of the running means that the search begins with


def averages(count: int) -> list[np.ndarray]:
    """Return what a search begins with, each (count,): the last checkpoint, the plain mean, and running means.

    Args:
        count: of checkpoints, oldest first.
    """
    last = np.zeros(count)
    last[-1] = 1.0
    ages = np.arange(count)[::-1].astype(float)
    return [last, np.full(count, 1 / count), *(rate**ages / (rate**ages).sum() for rate in RATES)]


def evolve(
    begin: list[np.ndarray], score: Callable[[np.ndarray], float], *, tries: int, parents: int, mutation: float,
    seed: int,
) -> tuple[np.ndarray, float]:  # fmt: skip
    """Return the coefficients with the smallest score that an evolutionary search finds, and that score.

    A child takes each coefficient from one of two parents, which are among the best so far; then all of them move by
    normal steps, and it is scaled to add up to 1.

    Args:
        begin: first coefficients, each adding up to 1.
        score: smaller is better.
        tries: children.
        parents: how many of the best may have children.
        mutation: standard deviation of the steps, over the root of the number of coefficients.
        seed: of the search.
    """
    rng = np.random.default_rng(seed)
    known = sorted(((score(one), number, one) for number, one in enumerate(begin)), key=lambda item: item[:2])
    size = len(begin[0])
    for number in range(len(begin), len(begin) + tries):
        best = [one for _, _, one in known[:parents]]
        first, second = best[rng.integers(len(best))], best[rng.integers(len(best))]
        child = np.where(rng.random(size) < 0.5, first, second)
        child = child + mutation / np.sqrt(size) * rng.standard_normal(size) * rng.random()
        child = child + (1 - child.sum()) / size
        known.append((score(child), number, child))
        known.sort(key=lambda item: item[:2])
        known = known[: max(parents, 1)]
    return known[0][2], known[0][0]


@part(
    "callback", "lcsc",
    papers=[
        ("Linear Combination of Saved Checkpoints Makes Consistency and Diffusion Models Better", "arXiv:2404.02241"),
    ],
    claim="Combining checkpoints of a run by coefficients of any sign, found by a search, draws better samples than "
    "the last one or any running mean.",
    deviations="The authors have not published their search; this one is written from the paper's description: "
    "crossing and normal mutation of the best coefficients, beginning with running means.",
)  # fmt: skip
@dataclass(kw_only=True)
class LCSC(Callback):
    """Keeps the weights of some steps, and ends the run with the combination that draws nearest to the training data.

    w = sum over checkpoints of a_i w_i, the a_i adding up to 1 and free in sign; an evolutionary search for the a_i
    that give the smallest distance of drawn arrays from training ones. The held-out arrays are not looked at.

    Costs a copy of the trained weights for each checkpoint. It is for denoisers.

    Args:
        every: steps between checkpoints; None takes a `kept`-th of the run.
        kept: most checkpoints, the latest ones.
        solver: draws the arrays; None takes the first one of the recipe.
        distance: compares them; None takes the first one of the recipe.
        samples: arrays that are drawn, and compared with as many of the data, for each try.
        tries: combinations that are tried, beside the running means.
        parents: how many of the best may have children.
        mutation: size of the steps of a search.
    """

    every: Count | None = None
    kept: Annotated[int, Field(ge=2)] = 20
    solver: Annotated[Any, Nested("solver")] = None
    distance: Annotated[Any, Nested("distance")] = None
    samples: Annotated[int, Field(ge=2)] = 500
    tries: Count = 200
    parents: Count = 10
    mutation: Annotated[float, Field(gt=0)] = 0.5
    checkpoints: list[dict[str, Tensor]] = field(init=False, default_factory=list, repr=False)
    newest: int = field(init=False, default=-1)  # step of the last checkpoint
    coefficients: list[float] = field(init=False, default_factory=list)

    def conflicts(self, recipe: Mapping[str, Any]) -> Iterator[str]:
        """Yield that the recipe keeps the best evaluated weights, which the combination would replace.

        Args:
            recipe: the recipe's fields.
        """
        if recipe.get("final") == "best":
            yield "'lcsc' and 'final: best' both replace the final weights: set final: last"

    def on_start(self, run: Run) -> None:
        """See that there are arrays to compare.

        Raises:
            HoneError: the model draws no arrays, or the objective draws from other weights than those that train.
        """
        if getattr(run.model, "medium", "text") != "arrays":
            raise HoneError("callback 'lcsc' compares arrays that a denoiser draws, and this run has none")
        if run.objective.drawn_by(run.model) is not run.model:
            raise HoneError("callback 'lcsc' combines the weights that train, but this objective draws from others")

    def on_step(self, run: Run, row: dict[str, Any]) -> None:
        """Keep the weights when it is time, and after the last step."""
        every = self.every or max(1, run.total // self.kept)
        if run.step % every == 0 or run.step == run.total:
            self._keep(run)

    def _keep(self, run: Run) -> None:
        self.newest = run.step
        self.checkpoints.append({
            name: weight.detach().to(wide_dtype(weight), copy=True) for name, weight in run.trainable
        })  # fmt: skip
        del self.checkpoints[: -self.kept]

    @torch.no_grad()
    def on_end(self, run: Run) -> None:
        """Search for the best combination, and give it to the model."""
        if self.newest != run.step and not self.coefficients:  # it ended early
            self._keep(run)
        if len(self.checkpoints) < 2 or run.loader is None:
            return
        score = self.scorer(run)
        begin = averages(len(self.checkpoints))
        found, _ = evolve(
            begin, score, tries=self.tries, parents=self.parents, mutation=self.mutation, seed=run.recipe.seed
        )
        self.coefficients = found.tolist()
        self.mix(run, found)

    def scorer(self, run: Run) -> Callable[[np.ndarray], float]:
        """Return what says how far arrays are from the data that are drawn with a combination, always of one noise.

        Args:
            run: the run in progress.
        """
        from hone.diffusion.drawing import draw, same_noise

        solver = self.solver or run.recipe.build("solvers")[0]
        distance = self.distance or run.recipe.build("distances")[0]
        solver.prepare(run.model, run.recipe.build("data"))
        trees: Any = run.loader.trees
        chosen = np.random.default_rng(run.recipe.seed).permutation(len(trees))[: self.samples]
        real, labels = trees.arrays[chosen], trees.labels[chosen]
        sign = -1.0 if distance.higher_is_better else 1.0

        def score(coefficients: np.ndarray) -> float:
            self.mix(run, coefficients)
            with evaluating(run.model), run.cluster.autocast(), same_noise(run.recipe.seed + 3):
                made, _ = draw(run.model, solver, self.samples, labels, run.recipe.seed + 4)
            value = sign * distance(made, real) if bool(made.isfinite().all()) else float("inf")
            return value if np.isfinite(value) else float("inf")

        return score

    def mix(self, run: Run, coefficients: np.ndarray) -> None:
        """Give a combination of the checkpoints to the model.

        Args:
            run: the run in progress.
            coefficients: one for each checkpoint, oldest first.
        """
        shares = coefficients.tolist()
        for name, weight in run.trainable:
            total = torch.zeros_like(weight, dtype=wide_dtype(weight))
            for share, kept in zip(shares, self.checkpoints, strict=True):
                total.add_(kept[name].to(total), alpha=share)
            weight.data.copy_(total)

    def state_dict(self) -> dict[str, Any]:
        """Return the checkpoints."""
        return {"checkpoints": [dict(kept) for kept in self.checkpoints], "newest": self.newest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: as `state_dict` returned it.
        """
        self.checkpoints, self.newest = [dict(kept) for kept in state["checkpoints"]], state["newest"]
