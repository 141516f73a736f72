"""Evaluation of denoisers: the loss on held-out arrays, and the distance of drawn arrays from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hone.diffusion.opened import Arrays
from hone.engine.evaluate import Evaluation, means, totals
from hone.modes import evaluating

if TYPE_CHECKING:
    from hone.engine.devices import Cluster
    from hone.recipe import Recipe

DRAWN_AT_ONCE = 1024
KEPT = 1000  # drawn arrays that are kept as pictures: all points of a scatter, the first of a grid


@dataclass(frozen=True)
class ArrayJudges:
    """What a denoiser is evaluated on and by.

    Args:
        data: held-out arrays.
        solvers: draw arrays.
        distances: compare them with the held-out ones.
    """

    data: Arrays
    solvers: Sequence[Any]
    distances: Sequence[Any]


@contextmanager
def same_noise(seed: int) -> Iterator[None]:
    """Draw the same random numbers within, whatever came before, and leave the generators as they were.

    Args:
        seed: of the numbers.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def judge(model: Any, objective: Any, recipe: Recipe, cluster: Cluster, judges: ArrayJudges) -> Evaluation:
    """Return the objective's mean loss on held-out arrays, and the distances of drawn ones.

    Distances are named after the evaluations of the network for each array, energy@2 say.

    Args:
        model: the denoiser.
        objective: gives the loss, and the model that draws.
        recipe: says how many arrays are drawn.
        cluster: the processes and the device.
        judges: what to evaluate on and by.
    """
    found = Evaluation()
    if objective.measured:
        with same_noise(recipe.seed + 1):
            limit = recipe.micro_tokens or recipe.batch_tokens
            found.figures = means(totals(model, objective, judges.data.trees, limit, cluster))
        found.loss = found.figures.pop("loss", None)
    if not recipe.eval_samples or not judges.solvers:
        return found
    real = judges.data.trees
    for solver in judges.solvers:
        with evaluating(model), cluster.autocast(), same_noise(recipe.seed + 2):
            drawing = objective.drawn_by(model)
            solver.prepare(drawing, judges.data.source)
            made, calls = draw(drawing, solver, recipe.eval_samples, real.labels, recipe.seed)
        solved = str(getattr(solver, "name", "solver"))
        for distance in judges.distances:
            name = f"{distance.name}@{calls}"
            known = name in found.scores  # of a solver with as many evaluations
            found.scores[f"{name} {solved}" if known else name] = distance(made, real.arrays)
        found.drawn[f"{solved}-{calls}"] = made[:KEPT].cpu()
    return found


def draw(model: Any, solver: Any, count: int, labels: Tensor | None = None, seed: int = 0) -> tuple[Tensor, int]:
    """Return arrays that a solver draws, and how often the network ran for each.

    Args:
        model: the denoiser.
        solver: draws them.
        count: how many.
        labels: classes, of which each array gets one at random, -1 for none; None for none at all. Were they given in
            turn, as many of each as in a held-out set, the distance from that set would come out too small.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    noise = torch.randn(count, *model.shape, generator=generator).to(device=device, dtype=dtype)
    classes = None
    if labels is not None and model.classes:
        classes = labels[torch.randint(len(labels), (count,), generator=generator)].to(device)
    made, calls = [], 0
    for begin in range(0, count, DRAWN_AT_ONCE):
        part = slice(begin, begin + DRAWN_AT_ONCE)
        found, calls = solver.sample(model, noise[part], None if classes is None else classes[part], generator)
        made.append(found)
    return torch.cat(made), calls
