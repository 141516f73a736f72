"""AutoDiffusion: an evolutionary search for the few noise levels that draw the best arrays."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from hone.distances.sets import Energy
from hone.errors import HoneError
from hone.options import Nested
from hone.parts import part
from hone.solvers.around import Around
from hone.solvers.base import Counted, levels

Places = tuple[int, ...]
Count = Annotated[int, Field(ge=1)]


class Evolution:
    """A search over sets of K of N places, by mutation and crossover of the best ones; lower scores are better."""

    def __init__(self, score: Callable[[Places], float], places: int, chosen: int, seed: int = 0) -> None:
        """Begin with nothing scored.

        Args:
            score: of K ascending places.
            places: N.
            chosen: K.
            seed: of the search.
        """
        self.score, self.places, self.chosen = score, places, chosen
        self.random = random.Random(seed)
        self.scores: dict[Places, float] = {}

    def add(self, candidate: Places) -> bool:
        """Score a candidate; return whether it was new.

        Args:
            candidate: K ascending places.
        """
        if candidate in self.scores:
            return False
        self.scores[candidate] = self.score(candidate)
        return True

    def best(self, count: int) -> list[Places]:
        """Return the best candidates, the best first.

        Args:
            count: how many at most.
        """
        return sorted(self.scores, key=lambda candidate: self.scores[candidate])[:count]

    def fresh(self) -> Places:
        """Return K places at random."""
        return tuple(sorted(self.random.sample(range(self.places), self.chosen)))

    def mutated(self, parents: list[Places], rate: float) -> Places:
        """Return a parent with each place replaced by a free one with some probability.

        Args:
            parents: to choose from.
            rate: the probability.
        """
        child = list(self.random.choice(parents))
        free = [place for place in range(self.places) if place not in child]
        for number in range(len(child)):
            if free and self.random.random() < rate:
                child[number] = free.pop(self.random.randrange(len(free)))
        return tuple(sorted(child))

    def crossed(self, parents: list[Places]) -> Places:
        """Return places taken from one parent or the other; fewer than K where both give the same one.

        Args:
            parents: to choose from.
        """
        one, other = self.random.choice(parents), self.random.choice(parents)
        return tuple(sorted({self.random.choice(pair) for pair in zip(one, other, strict=True)}))

    def fill(self, make: Callable[[], Places], count: int) -> None:
        """Score new candidates, with ten tries for each.

        Args:
            make: returns a candidate.
            count: how many.
        """
        for _ in range(10 * count):
            if count <= 0:
                return
            candidate = make()
            if len(candidate) == self.chosen and self.add(candidate):
                count -= 1


@part(
    "solver", "autodiffusion",
    papers=[
        ("AutoDiffusion: Training-Free Optimization of Time Steps and Architectures for Automated Diffusion Model "
         "Acceleration", "arXiv:2309.10438"),
    ],
    claim="Levels that an evolutionary search has chosen draw far better samples in a few steps than evenly spaced "
    "ones.",
    deviations="Searches the levels alone; the paper's second stage also drops blocks of the network. Scores a batch "
    "by the energy distance unless told otherwise, where the paper takes the FID. All candidates draw from one noise.",
)  # fmt: skip
@dataclass(kw_only=True)
class AutoDiffusion(Around):
    """Any solver on K noise levels that are chosen from a fine grid by evolution, before arrays are drawn.

    A candidate is K places of the grid; its score is the distance of a small batch that it draws from as many training
    arrays. Each generation scores mutated and crossed children of the best candidates, and random ones. The first
    candidate is the grid's nearest to the solver's own spacing.

    Args:
        grid: levels to choose from, spaced by the schedule of the solver inside.
        distance: scores a batch; energy where it is left out.
        batch: arrays that a candidate draws.
        population: candidates scored at first, and at most random ones in a generation.
        generations: rounds of mutation and crossover.
        mutations: mutated candidates of a generation.
        crossings: crossed ones.
        parents: best candidates that children come from.
        rate: probability that a place of a mutated candidate moves.
    """

    grid: Count = 100
    distance: Annotated[Any, Nested("distance")] = None
    batch: Annotated[int, Field(ge=2)] = 512
    population: Count = 20
    generations: Count = 8
    mutations: Annotated[int, Field(ge=0)] = 10
    crossings: Annotated[int, Field(ge=0)] = 6
    parents: Count = 6
    rate: Annotated[float, Field(gt=0, le=1)] = 0.25
    _found: Tensor | None = field(init=False, default=None, repr=False)
    _trace: list[float] = field(init=False, default_factory=list, repr=False)

    def sigmas(self, model: Any) -> Tensor:
        """Return the levels that were found, the last one 0.

        Args:
            model: unused.

        Raises:
            HoneError: there was no search.
        """
        if self._found is None:
            raise HoneError("autodiffusion: its levels are not searched; call prepare(model, source) before sample")
        return self._found

    def fine(self, model: Any) -> Tensor:
        """Return the descending levels to choose from, and 0.

        Args:
            model: has `sigma_min`, `sigma_max` and `sigma_data`.
        """
        inner = self.inner
        count = max(self.grid, inner.steps)
        return levels(inner.schedule, count, model.sigma_min, model.sigma_max, inner.rho, model.sigma_data)

    def prepare(self, model: Any, source: Any) -> None:
        """Search the levels against training arrays.

        Args:
            model: the denoiser that arrays will be drawn from.
            source: the arrays it learned from.
        """
        super().prepare(model, source)
        inner, known = self.inner, source.collection("train")
        distance = Energy() if self.distance is None else self.distance
        worse = -1.0 if distance.higher_is_better else 1.0
        parameter, generator = next(model.parameters()), torch.Generator().manual_seed(0)
        noise = torch.randn(self.batch, *model.shape, generator=generator, dtype=torch.float64).to(parameter)
        chosen = torch.randperm(len(known), generator=generator)[: self.batch]
        labels = known.labels[chosen[torch.arange(self.batch) % len(chosen)]].to(parameter.device)
        fine = self.fine(model)

        @torch.no_grad()
        def score(places: Places) -> float:
            sigmas = torch.cat([fine[list(places)], fine[-1:]])
            asked = Counted(model, labels if model.classes else None, inner.guidance)
            made = inner.solve(asked, noise * sigmas[0].to(noise), sigmas, torch.Generator().manual_seed(1))
            value = worse * distance(made, known.arrays[chosen]) if bool(made.isfinite().all()) else math.inf
            return value if math.isfinite(value) else math.inf

        evolution = Evolution(score, len(fine) - 1, inner.steps)
        own = (fine[:-1, None] - inner.sigmas(model)[:-1]).abs().argmin(0).unique()
        if len(own) == inner.steps:
            evolution.add(tuple(own.tolist()))
        self._evolve(evolution)
        self._found = torch.cat([fine[list(evolution.best(1)[0])], fine[-1:]])

    def _evolve(self, evolution: Evolution) -> None:
        evolution.fill(evolution.fresh, self.population)
        self._trace = [evolution.scores[evolution.best(1)[0]]]
        for _ in range(self.generations):
            parents = evolution.best(self.parents)
            evolution.fill(lambda parents=parents: evolution.mutated(parents, self.rate), self.mutations)  # type: ignore[misc]
            evolution.fill(lambda parents=parents: evolution.crossed(parents), self.crossings)  # type: ignore[misc]
            evolution.fill(evolution.fresh, max(0, self.population - self.mutations - self.crossings))
            self._trace.append(evolution.scores[evolution.best(1)[0]])
