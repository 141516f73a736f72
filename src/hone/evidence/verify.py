"""`hone verify`: run the experiments behind what methods claim, and store what came out."""

from __future__ import annotations

import datetime
import importlib
import json
import pkgutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hone.engine.manifest import machine, versions
from hone.engine.progress import Display, clock
from hone.errors import HoneError, nearest
from hone.evidence import claims, source
from hone.evidence.budget import Budget
from hone.evidence.cells import Store
from hone.evidence.claims.base import REGISTRY, Check, Claim
from hone.evidence.contest import LEVEL, Contest, Entrant
from hone.evidence.pool import Interrupted, Pool
from hone.evidence.statistics import judge, paired
from hone.evidence.store import RESULTS, VERDICTS
from hone.evidence.trials import run_sides
from hone.files import write_whole


def every_claim() -> dict[str, Claim]:
    """Return every claim by KIND.PART.NAME."""
    for module in pkgutil.iter_modules(claims.__path__):
        importlib.import_module(f"{claims.__name__}.{module.name}")
    return dict(sorted(REGISTRY.items()))


def choose(names: Sequence[str]) -> list[Claim]:
    """Return the claims that names ask for, each once.

    Args:
        names: "all", kinds, parts, KIND.PART, or KIND.PART.CLAIM.

    Raises:
        HoneError: a name is none of these.
    """
    known = every_claim()
    chosen: dict[str, Claim] = {}
    for name in names:
        found = {
            key: one
            for key, one in known.items()
            if name in ("all", one.kind, one.part, f"{one.kind}.{one.part}", one.id, f"{one.part}.{one.name}")
        }
        if not found:
            words = {word for one in known.values() for word in (one.kind, one.part, one.id)}
            hint = nearest(name, words) or "see: hone verify all --list"
            raise HoneError(f"there is no claim about '{name}' ({hint})")
        chosen.update(found)
    return list(chosen.values())


def results_folder() -> Path:
    """Return where results go: into the project's documentation, or beside the user where hone is installed."""
    in_project = (RESULTS.parent.parent.parent.parent / "pyproject.toml").is_file()
    return RESULTS.resolve() if in_project else Path("evidence")


def stored_result(one: Claim, folder: Path) -> dict[str, Any]:
    """Return the stored result of a claim, empty without one; a trial that failed has none.

    Args:
        one: the claim.
        folder: where results lie.
    """
    path = folder / one.file
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {} if kept.get("verdict") == "failed" else kept


def is_stale(one: Claim, folder: Path) -> bool:
    """Return whether a claim has no result for the code as it is; one that failed has none.

    Args:
        one: the claim.
        folder: where results lie.
    """
    kept = stored_result(one, folder)
    return not kept or kept.get("source") != source.current(one.kind, one.part, one.name)


def verify(one: Claim, store: Store, pool: Pool, display: Display, scratch: Path) -> dict[str, Any]:
    """Run a claim's trial and return its record.

    Args:
        one: the claim.
        store: where cells lie; trials that share a baseline find it there.
        pool: what computes them.
        display: says how it goes.
        scratch: folder for data that the claim makes.

    Raises:
        Interrupted: the user stopped it; what has finished is kept.
    """
    began = time.monotonic()
    scratch.mkdir(parents=True, exist_ok=True)
    trial = one.make(scratch)
    budget = Budget.read(trial.budget)
    contest = run_sides(
        trial, (trial.baseline, trial.method), store, pool, display, seeds=trial.seeds, budget=budget, tune=trial.tune
    )
    baseline, method = contest.entrants
    checks = [_checked(check, baseline, method, contest) for check in trial.checks]
    failure = baseline.failure or method.failure
    usable = all(row["verdict"] for row in checks)
    verdict = max((row["verdict"] for row in checks), key=VERDICTS.index) if usable else "failed"
    return {
        "kind": one.kind, "name": one.part, "claim": one.name, **one.about(),
        "paper": None if trial.paper is None else {"title": trial.paper[0], "id": trial.paper[1]},
        "verdict": verdict, "reason": failure, "checks": checks, "seeds": contest.seeds,
        "sides": {"baseline": _side(baseline, contest), "method": _side(method, contest)},
        "budget": budget.plain(), "tune": dict(trial.tune), "recipe": dict(trial.recipe),
        "seconds": round(time.monotonic() - began, 1), "machine": machine(), "versions": versions(),
        "source": source.current(one.kind, one.part, one.name), "date": datetime.date.today().isoformat(),
    }  # fmt: skip


def _checked(one: Check, baseline: Entrant, method: Entrant, contest: Contest) -> dict[str, Any]:
    """Return the paired difference of a figure and what it says of the claim; no verdict where figures are missing."""
    columns = [[e.figures.get(seed, {}).get(one.metric) for seed in contest.seeds] for e in (method, baseline)]
    difference = paired(columns[0], columns[1], LEVEL, contest.resolution(one.metric))
    present = [value for value in columns[1] if value is not None]
    scale = abs(sum(present) / len(present)) if one.relative and present else 1.0
    said = "" if difference.low is None else judge(difference, one.direction, one.effect * scale)
    return {"metric": one.metric, "expected": one.text(), "difference": difference.mean, "low": difference.low,
            "high": difference.high, "p": difference.p, "verdict": said}  # fmt: skip


def _side(entrant: Entrant, contest: Contest) -> dict[str, Any]:
    names = list(dict.fromkeys(name for figures in entrant.figures.values() for name in figures))
    found = {name: [_short(entrant.figures.get(seed, {}).get(name)) for seed in contest.seeds] for name in names}
    trials = [{**trial, "value": _short(trial["value"])} for trial in entrant.trials]
    return {"label": entrant.variant.label, "settings": entrant.variant.settings, "tuned": entrant.tuned,
            "note": entrant.note, "steps": entrant.length, "trials": trials, "values": found}  # fmt: skip


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.6g}")


@contextmanager
def stoppable(display: Display, stays: str) -> Iterator[None]:
    """Let the user stop a claim: say what stays, and end the command.

    Args:
        display: says it.
        stays: what is not lost.

    Raises:
        SystemExit: the user stopped it.
    """
    try:
        yield
    except Interrupted:
        display.say(f"stopped; {stays}, and the same command goes on")
        raise SystemExit(130) from None


def verify_command(
    names: Sequence[str], *, stale: bool, show_only: bool, on: str, jobs: int | None, out: Path | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Verify the claims that names ask for; return their records and what to print.

    Args:
        names: "all", kinds, parts or claims.
        stale: leave out those whose result is that of the present code.
        show_only: run nothing.
        on: "local", "ray" or "ray:ADDRESS".
        jobs: cells at a time.
        out: where results go.

    Raises:
        HoneError: a name is unknown.
    """
    from hone.evidence.command import open_pool

    folder = out or results_folder()
    chosen = choose(names)
    due = [one for one in chosen if not stale or is_stale(one, folder)]
    if show_only:
        return [], [f"{one.id}: {one.about()['says']}" for one in due]
    display, pool, records, lines = Display(), open_pool(on, jobs), [], []
    for one in chosen:
        _retell(one, folder)
    for number, one in enumerate(due, 1):
        if stale and not is_stale(one, folder):  # another process has done it meanwhile
            continue
        display.say(f"{number} of {len(due)}: {one.id}: {one.about()['says']}", style="bold")
        with stoppable(display, "finished runs are kept"):
            record = verify(one, Store(Path("runs/cells")), pool, display, Path("runs/claims") / one.id)
        if record["verdict"] != "failed" or not stored_result(one, folder):  # an older result says more than a failure
            write(folder / one.file, record)
        records.append(record)
        lines += summary(record)
        display.say("\n".join(summary(record)))
    fresh = len(chosen) - len(due)
    return records, [*lines, f"{len(records)} claims run, {fresh} up to date; results are in {folder}"]


def _retell(one: Claim, folder: Path) -> None:
    """Put what a claim's docstring says into its stored result: telling it better changes no figure."""
    path = folder / one.file
    record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if record and {**record, **one.about()} != record:
        write(path, {**record, **one.about()})


def write(path: Path, record: dict[str, Any]) -> None:
    """Store the result of a claim.

    Args:
        path: its file.
        record: what it holds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())


def summary(record: dict[str, Any]) -> list[str]:
    """Return a record as a few lines of text.

    Args:
        record: what `verify` returned.
    """
    lines = [f"{record['kind']}.{record['name']}.{record['claim']}: {record['verdict']} ({clock(record['seconds'])})"]
    for row in record["checks"]:
        if row["low"] is None:
            lines.append(f"  {row['metric']}: no figures")
            continue
        lines.append(
            f"  {row['metric']}: difference {row['difference']:+.4g} ({row['low']:+.4g} to {row['high']:+.4g}), "
            f"expected {row['expected']}: {row['verdict']}"
        )
    return [*lines, *([f"  {record['reason']}"] if record["reason"] else [])]
