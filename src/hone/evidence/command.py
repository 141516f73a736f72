"""The command `hone compare`: from what the user typed to a comparison, and to what is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hone.engine.progress import Display
from hone.errors import HoneError
from hone.evidence.budget import Budget
from hone.evidence.claims.tasks import GENERAL
from hone.evidence.compare import compare, table
from hone.evidence.contest import Comparison, draws_arrays
from hone.evidence.layout import sampling
from hone.evidence.pool import LocalPool, Pool
from hone.evidence.variants import Settings, expand, read_settings
from hone.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user typed.

    Args:
        recipes: names or files; the first is the one that is varied.
        vary: "FIELD=A,B" texts.
        seeds: how many paired seeds.
        budget: "KIND=N", "" leaves the length to the recipes.
        tune: "FIELD=X,Y" texts.
        metric: what ranks, "" for the default.
        baseline: label of the variant to compare with, "" for the first.
        general: data that shows forgetting, "" for the default, "none" for none.
        on: "local", "ray" or "ray:ADDRESS".
        jobs: cells at a time, None for what the machine allows.
        retry: run cells again that failed.
        out: the comparison's folder, None for one that its content names.
        overrides: "a.b=value" settings of all variants.
        command: the command line itself.
    """

    recipes: Sequence[str]
    vary: Sequence[str] = ()
    seeds: int = 3
    budget: str = ""
    tune: Sequence[str] = ()
    metric: str = ""
    baseline: str = ""
    general: str = ""
    on: str = "local"
    jobs: int | None = None
    retry: bool = False
    out: Path | None = None
    overrides: Sequence[str] = ()
    command: str = ""

    def comparison(self) -> Comparison:
        """Return the comparison that is asked for.

        Raises:
            HoneError: something in it is wrong.
        """
        budget = Budget.read(self.budget)
        vary = _settings(self.vary, "--vary")
        tune = _settings(self.tune, "--tune")
        first = Recipe.load(self.recipes[0], self.overrides)
        variants = expand(self.recipes, self.overrides, vary, _general(self.general, first), tune)
        return Comparison(
            name=first.name, variants=tuple(variants), seeds=self.seeds, budget=budget, tune=tune, metric=self.metric,
            baseline=self.baseline, command=self.command,
        )  # fmt: skip


def run_comparison(request: Request) -> tuple[dict[str, Any], list[str]]:
    """Run a comparison; return its result and what to print.

    Args:
        request: what the user typed.

    Raises:
        HoneError: something in it is wrong.
    """
    comparison = request.comparison()
    out = request.out or Path("runs") / f"compare-{comparison.name}-{comparison.key}"
    display = Display()
    count = len(comparison.variants)
    display.say(f"{count} variant{'s' * (count > 1)}, {comparison.seeds} seed{'s' * (comparison.seeds > 1)}: {out}")
    differing = [v for v in comparison.variants if _own_loss(v.fields) != _own_loss(comparison.variants[0].fields)]
    by_loss = request.metric == "loss" or (not request.metric and not draws_arrays(comparison.variants[0].recipe()))
    if differing and by_loss:  # generators are ranked by the distance of what they draw
        display.say(
            "note: the variants differ in objective or data, so that their losses measure different things; rank by "
            "something else, e.g. --metric accuracy or general_loss", style="yellow",
        )  # fmt: skip
    solvers = [variant.recipe().staged()[-1].solvers for variant in comparison.variants]
    if any(one != solvers[0] for one in solvers) and "solvers" not in " ".join(request.vary):
        display.say(
            "note: the variants are drawn from with different solvers, and only figures after as many evaluations are "
            "compared; to compare all, name some, e.g. --set 'solvers=[{name: multistep, steps: 1}, heun]'",
            style="yellow",
        )
    result = compare(comparison, out, pool=open_pool(request.on, request.jobs), display=display, retry=request.retry)
    lines = table(result)
    if result["status"] != "finished":
        return result, [*lines, "", f"stopped; finished runs are kept. Go on with:  {comparison.command}"]
    cells = [next(iter(row["cells"].values())) for row in result["variants"] if row["status"] == "finished"]
    following = [f"  {sampling(cells[0])}"] if cells else []
    following += [f"  hone report {' '.join(cells)}"] if len(cells) > 1 else []
    return result, [*lines, "", f"report: {result['report']}", "next:", *following]


def _own_loss(fields: Mapping[str, Any]) -> list[Any]:
    """Return what the meaning of a held-out loss depends on."""
    held_out = fields.get("eval_data") or fields.get("data")
    return [fields.get("objective", "sft"), held_out]


def open_pool(on: str, jobs: int | None) -> Pool:
    """Return what computes cells.

    Args:
        on: "local", "ray" or "ray:ADDRESS".
        jobs: cells at a time, None for what there is room for.

    Raises:
        HoneError: there is no such place.
    """
    if on == "local":
        return LocalPool(jobs)
    if on == "ray" or on.startswith("ray:"):
        from hone.evidence.ray_pool import RayPool

        return RayPool(on.partition(":")[2] or None, jobs)
    raise HoneError(f"--on: expected local, ray or ray:ADDRESS, got '{on}'")


def _settings(texts: Sequence[str], flag: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for text in texts:
        path, values = read_settings(text, flag)
        if path in found:
            raise HoneError(f"{flag}: {path} is given twice; put all its values into one")
        found[path] = values
    return found


def _general(asked: str, recipe: Recipe) -> Settings:
    """Return the field that says on which text forgetting is measured; a denoiser of arrays reads none."""
    if asked == "none":
        return {"general_data": None}
    if asked:
        return {"general_data": {**GENERAL, "name": asked} if asked == GENERAL["name"] else asked}
    return {} if recipe.general_data is not None or draws_arrays(recipe) else {"general_data": dict(GENERAL)}
