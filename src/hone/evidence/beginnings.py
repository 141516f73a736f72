"""First stages that cells begin with alike: each is trained once, as a cell of its own, and copied into their runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hone.engine.folder import LOCK, RunFolder
from hone.engine.run import stages_of
from hone.evidence.report import write_report
from hone.files import beside
from hone.recipe import Recipe, dump

if TYPE_CHECKING:
    from hone.evidence.cells import Job, Store


def share(jobs: Sequence[Job], store: Store, keeps: str) -> tuple[list[Job], list[Job]]:
    """Return the jobs, those that begin alike told with which cell, and the cells that they begin with.

    Args:
        jobs: cells that train.
        store: where cells lie.
        keeps: what stays of a cell that others begin with, once they have.
    """
    firsts = [_first_cell(job, store, keeps) for job in jobs]
    places = [first.folder for first in firsts if first is not None]
    common = {first.folder: first for first in firsts if first is not None and places.count(first.folder) > 1}
    told = [
        job if first is None or first.folder not in common else replace(job, begins=first.folder)
        for job, first in zip(jobs, firsts, strict=True)
    ]
    return told, list(common.values())


def _first_cell(job: Job, store: Store, keeps: str) -> Job | None:
    first = first_stage(job.recipe)
    return None if first is None else store.job("run", first, f"{first.name} seed {first.seed}", keeps=keeps)


def first_stage(recipe: Recipe) -> Recipe | None:
    """Return the first of several stages as a recipe of its own, None where there is none.

    Args:
        recipe: a checked recipe.
    """
    if len(recipe.stages) < 2:
        return None
    first = recipe.staged()[0]
    model = recipe.model if first.model == "stage:0" else first.model
    fields = {**first.plain(), "model": model, "out": None}
    return None if '"stage:' in json.dumps(fields) else Recipe.of(**fields)


def begin(recipe: Recipe, first: Path) -> bool:
    """Copy the finished run of a first stage to where the run of a recipe is to be; return whether there was one.

    Args:
        recipe: of the run, its folder `out` not there yet.
        first: the run folder of its first stage.
    """
    found = RunFolder(first).json("result.json")
    if found.get("status") != "finished" or not (first / "model").is_dir():
        return False
    place = Path(str(recipe.out))
    own = place / "stage-1"
    with beside(place, "staging") as staging:
        shutil.copytree(first, staging / own.name, ignore=shutil.ignore_patterns(LOCK, "checkpoints"))
        copied = RunFolder(staging / own.name)
        paths = {"run": str(own), "report": str(own / "report.html"), "model": str(own / "model")}
        copied.write("result.json", {**found, **{name: paths[name] for name in paths if name in found}})
        copied.write("recipe.yaml", dump(stages_of(recipe, RunFolder(place))[0]))
        RunFolder(staging).write("recipe.yaml", dump(recipe))
        staging.rename(place)
    write_report(own)
    return True
