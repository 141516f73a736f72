"""Evaluation of denoisers: the loss on held-out arrays, and the distance of drawn arrays from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hone.diffusion.drawing import draw, same_noise
from hone.diffusion.opened import Arrays
from hone.engine.evaluate import Evaluation, means, totals
from hone.modes import evaluating

if TYPE_CHECKING:
    from hone.engine.devices import Cluster
    from hone.recipe import Recipe

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
