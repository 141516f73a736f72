"""Search among starting noises, and among paths, at inference: more computation for samples that score better."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.levels import flow_time, from_flow_time
from hone.errors import HoneError
from hone.parts import part
from hone.solvers.around import Around
from hone.solvers.base import Counted, noise_like
from hone.solvers.verifiers import Kind, Verifier, make_verifier

Count = Annotated[int, Field(ge=1)]
Time = Annotated[float, Field(gt=0, lt=1)]


def neighbour(noise: Tensor, similarity: float, generator: torch.Generator | None) -> Tensor:
    """Return noise (B, *shape) of the same length and at a given cosine from another, in a random direction.

    Args:
        noise: (B, *shape).
        similarity: the cosine.
        generator: draws the direction.
    """
    flat = noise.flatten(1)
    length = flat.norm(dim=1, keepdim=True)
    along = flat / length
    way = noise_like(flat, generator)
    way = way - (way * along).sum(1, keepdim=True) * along
    way = way / way.norm(dim=1, keepdim=True)
    return (length * (similarity * along + (1 - similarity**2) ** 0.5 * way)).view_as(noise)


@part(
    "solver", "noise-search",
    papers=[
        ("Inference-Time Scaling for Diffusion Models beyond Scaling Denoising Steps", "arXiv:2501.09732"),
    ],
    claim="Evaluations that are spent on a search among noises go on to raise what a verifier measures when more steps "
    "do not.",
    deviations="Neighbours lie at a cosine from the pivot, as in a public implementation that the authors helped with; "
    "the paper says only that they are at a distance. Verifiers fit small data. The search draws with the steps "
    "of the final sample.",
)  # fmt: skip
@dataclass(kw_only=True)
class NoiseSearch(Around):
    """Keeps, for each array by itself, the best of several samples by a verifier of single arrays.

    random: the best of `candidates` noises. zero-order: in each round, the best of the pivot and `candidates` noises
    near it is the next pivot. paths: `candidates` states at flow time `begin`; in rounds, each is noised to `forward`
    later by `branches` noises, solved `back` earlier, and the best by the verifier of D are kept; at 0 the best sample.

    Args:
        algorithm: which search.
        verifier: density, where the data's is known; classifier, with classes; nearest, minus the distance to a
            training array.
        candidates: noises, neighbours in a round, or paths.
        rounds: of the zero-order search.
        similarity: cosine of a neighbour and its pivot.
        branches: noises that are tried on each path in a round.
        begin: time t = s / (1 + s) of the first states of the paths.
        forward: how much time noise is added for.
        back: how much time is solved back; more than `forward`.
    """

    algorithm: Literal["random", "zero-order", "paths"] = "random"
    verifier: Kind = "density"
    candidates: Count = 4
    rounds: Count = 4
    similarity: Annotated[float, Field(gt=-1, lt=1)] = 0.95
    branches: Count = 2
    begin: Time = 0.11
    forward: Time = 0.78
    back: Time = 0.81
    _verdict: Verifier | None = field(init=False, default=None, repr=False)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the options."""
        if self.algorithm != "paths":
            return  # any solver will do
        yield from super().check()
        if self.back <= self.forward:
            yield "back", f"expected more than forward ({self.forward}), got {self.back}"
        if self.begin + self.forward >= 1:
            yield "forward", f"begin + forward must stay below 1, got {self.begin + self.forward}"

    def prepare(self, model: Any, source: Any) -> None:
        """Make the verifier.

        Args:
            model: the denoiser that arrays will be drawn from.
            source: the arrays it learned from.
        """
        super().prepare(model, source)
        self._verdict = make_verifier(self.verifier, source)

    @torch.no_grad()
    def sample(
        self, model: Any, noise: Tensor, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, int]:
        """Return samples, and how often the network ran for each.

        Args:
            model: the denoiser.
            noise: (B, *shape) of unit variance, the first candidate.
            labels: (B,) classes, -1 for none; None for none at all.
            generator: draws further noises.

        Raises:
            HoneError: there is no verifier yet, or the paths would go above the model's noise.
        """
        if self._verdict is None:
            raise HoneError("noise-search: it has no verifier yet; call prepare(model, source) before sample")
        if self.algorithm == "paths":
            return self._paths(model, noise, labels, generator, self._verdict)
        return self._noises(model, noise, labels, generator, self._verdict)

    def _noises(
        self, model: Any, noise: Tensor, labels: Tensor | None, generator: torch.Generator | None, verdict: Verifier
    ) -> tuple[Tensor, int]:
        """Search among starting noises."""
        best, calls = self.inner.sample(model, noise, labels, generator)
        score, pivot = verdict(best, labels), noise
        zero_order = self.algorithm == "zero-order"
        for _ in range(self.rounds if zero_order else 1):
            centre = pivot
            for _ in range(self.candidates - (not zero_order)):
                start = neighbour(centre, self.similarity, generator) if zero_order else noise_like(noise, generator)
                made, more = self.inner.sample(model, start, labels, generator)
                calls += more
                worth = verdict(made, labels)
                better = (worth > score).reshape(-1, *[1] * (noise.dim() - 1))
                best, pivot = torch.where(better, made, best), torch.where(better, start, pivot)
                score = torch.maximum(score, worth)
        return best, calls

    def _paths(
        self, model: Any, noise: Tensor, labels: Tensor | None, generator: torch.Generator | None, verdict: Verifier
    ) -> tuple[Tensor, int]:
        """Search among paths."""
        highest = float(from_flow_time(torch.tensor(self.begin + self.forward, dtype=torch.float64)))
        if highest > model.sigma_max * 1.001:
            raise HoneError(
                f"solvers: noise-search goes to noise {highest:.3g}, at time begin + forward, and the model was "
                f"trained up to {model.sigma_max:g}; lower begin, or forward and back"
            )
        asked = Counted(model, labels, self.inner.guidance)
        grid, time = self.inner.sigmas(model), self.begin
        starts = [noise, *(noise_like(noise, generator) for _ in range(self.candidates - 1))]
        level = from_flow_time(torch.tensor(time, dtype=torch.float64))
        states = [self._along(asked, start * grid[0].to(start), grid[0], level, generator) for start in starts]
        lowest = float(flow_time(torch.tensor(model.sigma_min)))
        while (time := time + self.forward - self.back) > lowest:
            up, down = (from_flow_time(torch.tensor(t, dtype=torch.float64)) for t in (time + self.back, time))
            tried, scores = [], []
            for state in states:
                for _ in range(self.branches):
                    noisy = state + (up**2 - level**2).sqrt().to(state) * noise_like(state, generator)
                    tried.append(self._along(asked, noisy, up, down, generator))
                    scores.append(verdict(asked(tried[-1], down), labels))
            states, level = best_of(torch.stack(tried), torch.stack(scores), len(states)), down
        ends = [self._along(asked, state, level, grid[-1], generator) for state in states]
        scores = [verdict(end, labels) for end in ends]
        return best_of(torch.stack(ends), torch.stack(scores), 1)[0], asked.calls

    def _along(
        self, asked: Counted, x: Tensor, begin: Tensor, end: Tensor, generator: torch.Generator | None
    ) -> Tensor:
        """Return x solved from one level to another, over those of the solver's levels that lie between."""
        grid = self.inner.sigmas(asked.model)
        between = grid[(grid < begin) & (grid > end)]
        return self.inner.solve(asked, x, torch.cat([begin[None], between, end[None]]), generator)


def best_of(states: Tensor, scores: Tensor, count: int) -> list[Tensor]:
    """Return the best states of each array: `count` of (B, *shape), the best first.

    Args:
        states: (n, B, *shape).
        scores: (n, B), higher is better.
        count: how many.
    """
    order = scores.topk(count, dim=0).indices
    rows = torch.arange(states.shape[1], device=states.device)
    return [states[which, rows] for which in order]
