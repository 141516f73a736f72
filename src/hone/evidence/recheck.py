"""Whether a result still stands after its code has changed, at a ninth of the cost of its claim.

A claim runs both sides on five seeds after four trials each. Where a later change touched no number (a message, say),
one seed of each side at its tuned setting shows so: it gives the figures that are stored, as near as another machine
comes to them.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hone.engine.manifest import machine, versions
from hone.engine.progress import Display
from hone.evidence import source
from hone.evidence.budget import Budget
from hone.evidence.cells import Store
from hone.evidence.claims.base import Claim, Side, Trial
from hone.evidence.pool import Pool
from hone.evidence.trials import run_sides
from hone.evidence.verify import choose, is_stale, results_folder, stoppable, stored_result, write

# Processors round sums differently: LoRA's loss after 40 steps differs by 0.4% between two machines of one name, a
# twentieth of its range over seeds, and runs that pick tokens drift further apart.
CLOSE, OF_THE_RANGE = 1e-3, 0.25
# Another run of the same code has others, and operations are counted for whole contests alone.
OF_THE_MACHINE = ("training_seconds", "tokens_per_second", "peak_memory", "flops")


def recheck_command(
    names: Sequence[str], *, on: str, jobs: int | None, out: Path | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Recheck the stale results of the claims that names ask for; return those that stand and what to print.

    Args:
        names: "all", kinds, parts or claims.
        on: "local", "ray" or "ray:ADDRESS".
        jobs: cells at a time.
        out: where results lie.

    Raises:
        HoneError: a name is unknown.
    """
    from hone.evidence.command import open_pool

    folder = out or results_folder()
    chosen = choose(names)
    due = [one for one in chosen if (kept := stored_result(one, folder)) and is_stale(one, folder)]
    display, pool, records, lines = Display(), open_pool(on, jobs), [], []
    for number, one in enumerate(due, 1):
        kept = stored_result(one, folder)
        display.say(f"{number} of {len(due)}: {one.id}", style="bold")
        with stoppable(display, "what stands is stored"):
            found = recheck(one, kept, Store(Path("runs/cells")), pool, display, Path("runs/claims") / one.id)
        if stored_result(one, folder) != kept:  # another process has run it meanwhile
            continue
        if not found:
            records.append(confirmed(one, kept))
            write(folder / one.file, records[-1])
        said = [f"{one.id}: {'as before' if not found else 'differs'}", *(f"  {text}" for text in found)]
        lines += said
        display.say("\n".join(said))
    again = (
        ""
        if len(records) == len(due)
        else f"; run the other {len(due) - len(records)} again: hone verify {' '.join(names)} --stale"
    )
    return records, [*lines, f"{len(records)} of {len(due)} stale results stand{again}"]


def recheck(
    one: Claim, kept: Mapping[str, Any], store: Store, pool: Pool, display: Display, scratch: Path
) -> list[str]:
    """Run one seed of both sides of a stored result again; return what came out otherwise, if anything.

    A figure is the same within 0.1% or a quarter of its range over the stored seeds, whichever is wider.

    Args:
        one: the claim.
        kept: its stored result.
        store: where cells lie; a claim that is then run whole finds these there.
        pool: what computes them.
        display: says how it goes.
        scratch: folder for data that the claim makes.

    Raises:
        Interrupted: the user stopped it.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    trial = one.make(scratch)
    if asked := _asks_otherwise(trial, kept):
        return [asked]
    if clocked := [check.metric for check in trial.checks if check.metric in OF_THE_MACHINE]:
        return [f"{clocked[0]} is a figure of the machine, which one run does not show"]
    sides = (_as_stored(trial.baseline, kept, "baseline"), _as_stored(trial.method, kept, "method"))
    contest = run_sides(trial, sides, store, pool, display, seeds=1, budget=Budget(), tune={})
    found = []
    for entrant, name in zip(contest.entrants, ("baseline", "method"), strict=True):
        label, failure = entrant.variant.label, entrant.failure
        figures = entrant.figures.get(contest.seeds[0], {})
        stored = kept["sides"][name]["values"]
        failed_before = all(column[0] is None for column in stored.values())
        if failure:
            found += [] if failed_before else [f"{label}: {failure}"]
        else:
            found += [f"{label}: {text}" for text in _differences(stored, figures)]
    return found


def confirmed(one: Claim, kept: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored result as one of the present code, with a note of what shows it.

    Args:
        one: the claim.
        kept: its stored result, which `recheck` found unchanged.
    """
    note = {
        "seed": kept["seeds"][0], "date": datetime.date.today().isoformat(), "machine": machine(),
        "versions": versions(), "measured_with": kept.get("rechecked", {}).get("measured_with", kept["source"]),
    }  # fmt: skip
    return {**kept, "source": source.current(one.kind, one.part, one.name), "rechecked": note}


def _asks_otherwise(trial: Trial, kept: Mapping[str, Any]) -> str:
    """Return which part of a trial is not what the stored result answers, "" when it is the same question."""
    stored = kept["sides"]
    pairs = {
        "the recipe": (trial.recipe, kept["recipe"]),
        "the baseline": (trial.baseline.settings, stored["baseline"]["settings"]),
        "the method": (trial.method.settings, stored["method"]["settings"]),
        "what is tuned": (trial.tune, kept["tune"]),
        "what the tuning looks at": (
            trial.metric if trial.tune else "",
            next((tried.get("metric", trial.metric) for side in stored.values() for tried in side["trials"]), ""),
        ),
        "the budget": (Budget.read(trial.budget).plain(), kept["budget"]),
        "the number of seeds": (trial.seeds, len(kept["seeds"])),
        "the checks": (
            [[check.metric, check.text()] for check in trial.checks],
            [[check["metric"], check["expected"]] for check in kept["checks"]],
        ),
    }
    return next(
        (
            f"{what} {'have' if what == 'the checks' else 'has'} changed"
            for what, (now, then) in pairs.items()
            if _plain(now) != _plain(then)
        ),
        "",
    )


def _plain(value: Any) -> Any:
    """Return a value as JSON gives it back."""
    return json.loads(json.dumps(dict(value) if isinstance(value, Mapping) else value, default=str))


def _as_stored(side: Side, kept: Mapping[str, Any], name: str) -> Side:
    """Return a side with the setting that was tuned and the length that the budget came to."""
    stored = kept["sides"][name]
    length = {} if kept["budget"]["kind"] == "recipe" else {"steps": stored["steps"], "epochs": None}
    return replace(side, settings={**side.settings, **stored["tuned"], **length})


def _differences(stored: Mapping[str, list[float | None]], figures: Mapping[str, float]) -> list[str]:
    """Return which figures of the first seed are others now."""
    found = []
    for metric, column in stored.items():
        then, now = column[0], figures.get(metric)
        if metric in OF_THE_MACHINE:
            continue
        if then is None:
            found += [] if now is None else [f"{metric} was missing and is {now:.6g}"]
            continue
        present = [value for value in column if value is not None]
        width = max(CLOSE * abs(then), OF_THE_RANGE * (max(present) - min(present)))
        if now is None or not abs(now - then) <= width:
            found.append(f"{metric} was {then:.6g} and is {'missing' if now is None else f'{now:.6g}'}")
    return found
