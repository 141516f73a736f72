"""Both sides of a trial, run: what a claim and the recheck of its result share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hone.engine.progress import Display
from hone.evidence.budget import Budget
from hone.evidence.cells import TO_READ, Store
from hone.evidence.claims.base import Side, Trial
from hone.evidence.contest import Comparison, Contest
from hone.evidence.pool import Pool
from hone.evidence.variants import Variant, changed


def run_sides(
    trial: Trial,
    sides: tuple[Side, Side],
    store: Store,
    pool: Pool,
    display: Display,
    *,
    seeds: int,
    budget: Budget,
    tune: Mapping[str, Sequence[Any]],
) -> Contest:
    """Return the finished contest of two sides, with the figures that the trial reads from run folders itself.

    Args:
        trial: what is tried.
        sides: its baseline and its method, or these at settings of their own.
        store: where cells lie; trials that share a baseline find it there.
        pool: what computes them.
        display: says how it goes.
        seeds: how many paired seeds.
        budget: of every run.
        tune: values by dotted path that each side tries first.

    Raises:
        Interrupted: the user stopped it; what has finished is kept.
    """
    comparison = Comparison(
        name="claim", variants=(_variant(trial, sides[0]), _variant(trial, sides[1])), seeds=seeds, budget=budget,
        tune=tune, metric=trial.metric if tune else "",
    )  # fmt: skip
    keeps = "" if trial.figures is None else TO_READ  # what the claim reads itself may be the model
    contest = Contest(comparison, store, pool, display, keeps=keeps, alone=trial.alone, retry=True)
    contest.run(lambda: None)
    contest.collect()
    if trial.figures is not None:
        for entrant in contest.entrants:
            for seed, found in entrant.figures.items():
                found.update(trial.figures(entrant.jobs[seed].run))
        for job in (job for entrant in contest.entrants for job in entrant.jobs.values()):
            if job.keeps == TO_READ:  # a comparison's run, which served as well, keeps its own
                job.drop_models()
    return contest


def _variant(trial: Trial, side: Side) -> Variant:
    settings = dict(side.settings)
    return Variant(side.label, changed(trial.recipe, settings), settings)
