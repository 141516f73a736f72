"""The page of a comparison: which variant is best and by how much, what it cost, how it learned, what to run next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hone.engine.folder import RunFolder
from hone.engine.progress import clock
from hone.errors import HoneError, nearest
from hone.evidence.charts import AXES, axes
from hone.evidence.comparison_charts import (
    Variant,
    cost_chart,
    curve_charts,
    general_text,
    interval_charts,
    judged,
    read_variants,
    spread,
    tuning_chart,
)
from hone.evidence.layout import (
    NONE,
    SHARE,
    Settings,
    cell,
    column,
    compared,
    finite,
    gap,
    quantity,
    render,
    said,
    sampling,
    scaled,
    share,
    title,
    together,
)
from hone.figures import lower_is_better
from hone.recipe import read_yaml

TONES = {"better": "good", "worse": "bad", "failed": "bad", "baseline": "", "running": "warn"}
UNSHOWN = "no difference shown"
SPENT = ("training_seconds", "tokens_per_second", "peak_memory", "trained", "flops")  # what the table says it cost
OWN_FIELDS = ("out", "seed", "name", "about", "checkpoint_every")  # what every cell has its own of, or is no setting


def write_comparison(folder: Path) -> Path:
    """Write `report.html` into a comparison's folder, from its result and the run folders of its cells.

    Args:
        folder: the comparison's folder; the comparison may still be going on.

    Returns:
        The page. It opens offline: the plotting library is inside.

    Raises:
        HoneError: the folder holds no comparison.
    """
    home = RunFolder(Path(folder).expanduser())
    result = home.json("result.json")
    if not isinstance(result.get("variants"), list):
        why = "its result.json is that of a run" if result else "it has no result.json"
        there = [path.parent.name for path in home.path.parent.glob("*/result.json") if path.parent != home.path]
        hint = nearest(home.path.name, there)
        raise HoneError(f"'{home.path}' is not a comparison folder: {why}" + (f" ({hint})" if hint else ""))
    return home.write("report.html", render("comparison.html", **contents(result, home.path)))


def contents(result: dict[str, Any], home: Path) -> dict[str, Any]:
    """Return what the page shows.

    Args:
        result: the comparison's result.
        home: its folder.
    """
    variants = read_variants(result, home)
    sections = {
        "intervals": interval_charts(result, variants), "curves": curve_charts(result, variants),
        "cost": cost_chart(result, variants), "tuning": tuning_chart(result, variants),
    }  # fmt: skip
    every = [trial for variant in variants for trial in variant.record.get("trials", [])]
    ranked = next((trial["metric"] for trial in every if "metric" in trial), result["metric"])  # what tuning looked at
    drawn = [trace for chart in sections["curves"] for trace in chart["traces"]]
    best = next((v for v in variants if v.summary(result["metric"])["mean"] is not None), None)
    return {
        "name": result["name"], "status": result.get("status") or _status(variants),
        "outcome": outcome(result, variants), "facts": _facts(result, variants),
        "labels": [v.label for v in variants], "columns": columns(result, variants), "remarks": remarks(variants),
        "reading": _reading(result, variants), "sections": sections,
        "figures": [chart for charts in sections.values() for chart in charts],
        "axes": {axis: AXES[axis] for axis in axes(drawn)}, "curves_note": _curves_note(drawn),
        "trials": trials(result, variants),
        "tuned": next(iter(result["tune"])) if len(result.get("tune") or {}) == 1 else "settings",
        "metric": title(ranked),
        "settings": _settings(variants), "recipe": _recipe(best or variants[0]) if variants else None,
        "environment": _environment(result), "next": _next(result, variants, best),
    }  # fmt: skip


def _status(variants: Sequence[Variant]) -> str:
    found = {str(v.record.get("status")) for v in variants}
    return "running" if "running" in found or not found else "failed" if found == {"failed"} else "finished"


def outcome(result: Mapping[str, Any], variants: Sequence[Variant]) -> str:
    """Return in a sentence or two what the comparison found."""
    metric = result["metric"]
    measured = [v for v in variants if v.summary(metric)["mean"] is not None]
    failed = sum(v.record.get("status") == "failed" for v in variants)
    running = any(v.record.get("status") == "running" for v in variants)
    if not measured:
        return "Nothing is measured yet." if running or not variants else "Every variant failed; the table says why."
    best, others = measured[0], measured[1:]
    base = next((v for v in measured if v.label == result["baseline"]), None)
    if not others:
        text = f"Only {best.label} has a result: {title(metric)} {_value(result, best)}."
    elif best is base:
        text = _baseline_first(result, best, others)
    else:
        text = _variant_first(result, best, base, len(measured))
    lost = f" {failed} variant{'s' if failed > 1 else ''} failed." if failed else ""
    return ("Not finished, so this may change. " if running else "") + text + lost


def _baseline_first(result: Mapping[str, Any], best: Variant, others: Sequence[Variant]) -> str:
    name, value = title(result["metric"]), _value(result, best)
    tested = [v for v in others if _tested(v)]
    worse = [v for v in tested if _verdict(v) == "worse"]
    if not tested:
        return f"{best.label}, the baseline, has the best {name}, {value}. {_untested(result)}"
    if not worse:
        many = f"the difference of {tested[0].label} to it is {_gap(result, tested[0], False)}"
        many = many if len(tested) == 1 else f"none of the {len(tested)} others differs from it beyond chance"
        return f"No difference was shown: {best.label}, the baseline, has the best mean {name}, {value}, and {many}."
    if len(others) == 1:
        found = f"{worse[0].label} is worse by {_gap(result, worse[0])}"
    elif len(worse) == len(others):
        found = f"all {len(others)} others are worse"
    else:
        are = "is" if len(worse) == 1 else "are"
        found = f"{len(worse)} of {len(others)} others {are} worse, and for the rest no difference was shown"
    return f"{best.label}, the baseline, is best: {name} {value}; {found}."


def _variant_first(result: Mapping[str, Any], best: Variant, base: Variant | None, count: int) -> str:
    name, value = title(result["metric"]), _value(result, best)
    if base is None or not _tested(best):
        why = "The baseline has no value to compare it with." if base is None else _untested(result)
        return f"{best.label} has the best {name}, {value}. {why}"
    if _verdict(best) == "better":
        first = "is best" if count == 2 else "ranks first"
        return f"{best.label} {first}: {name} {value}, better than {base.label}, the baseline, by {_gap(result, best)}."
    shown = (
        f"{best.label} has the best mean {name}, {value}, but its difference to {base.label}, the baseline, is "
        f"{_gap(result, best, False)}"
    )
    return f"Nothing was shown to be better than the baseline: {shown}."


def _tested(variant: Variant) -> bool:
    difference = variant.record.get("difference") or {}
    return finite(difference.get("low")) or finite(difference.get("p"))


def _verdict(variant: Variant) -> str:
    return str((variant.record.get("difference") or {}).get("verdict") or "")


def _untested(result: Mapping[str, Any]) -> str:
    few = len(result["seeds"]) < 2
    return "With one seed, a difference cannot be told from chance." if few else "No difference could be tested yet."


def _value(result: Mapping[str, Any], variant: Variant) -> str:
    summary, metric = variant.summary(result["metric"]), result["metric"]
    interval = f" ({result['level']:.0%} interval " if summary["low"] is not None else ""
    return spread(metric, summary).replace(" (", interval, 1) if interval else spread(metric, summary)


def _gap(result: Mapping[str, Any], variant: Variant, unsigned: bool = True) -> str:
    """Return a variant's difference to the baseline with its interval; unsigned, for "better by" and "worse by"."""
    difference, metric = variant.record["difference"], result["metric"]
    flip = -1 if unsigned and difference["mean"] < 0 else 1
    notes = []
    if finite(difference.get("low")) and finite(difference.get("high")):
        low, high = sorted(flip * difference[end] for end in ("low", "high"))
        notes.append(f"{result['level']:.0%} interval {gap(metric, low)} to {gap(metric, high)}")
    notes += [f"adjusted p {share(difference['adjusted'])}"] if finite(difference.get("adjusted")) else []
    points = " points" if metric == SHARE else ""
    return f"{gap(metric, flip * difference['mean'])}{points}" + (f" ({', '.join(notes)})" if notes else "")


def _facts(result: Mapping[str, Any], variants: Sequence[Variant]) -> list[dict[str, str]]:
    varied = dict.fromkeys(key for v in variants for key in v.record.get("settings", {}))
    seeds = [str(seed) for seed in result["seeds"]]
    tune = result.get("tune") or {}
    trial_count = max((len(v.record.get("trials", [])) for v in variants), default=0)
    facts = [
        ("recipe", result["recipe"], ""), ("varied", ", ".join(varied) or "nothing", f"{len(variants)} variants"),
        ("equal budget", _budget(result["budget"], variants), "for every variant and seed"),
        ("seeds", str(len(seeds)), ", ".join(seeds)),
        ("tuned for each variant", ", ".join(tune) or "nothing", f"{trial_count} trials each" if tune else ""),
    ]  # fmt: skip
    return [{"label": label, "value": str(value), "note": note} for label, value, note in facts]


def _budget(budget: Mapping[str, Any], variants: Sequence[Variant]) -> str:
    kind, amount = budget["kind"], budget["amount"]
    various = len({v.record.get("steps") for v in variants} - {None}) > 1 or not amount
    if kind == "steps" and various:
        return "as many steps as each recipe says"
    words = {"steps": f"{amount:,.0f} steps", "seconds": clock(amount), "flops": f"{scaled(amount)} FLOPs"}
    return words.get(kind, f"{scaled(amount)} {kind}")


def columns(result: Mapping[str, Any], variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Return the columns of the ranked table; one that would be empty is left out.

    Args:
        result: the comparison's result.
        variants: one a row.
    """
    metric = result["metric"]
    shown = [m for m in judged(variants, metric) if m not in (metric, "general_loss")]  # forgetting says it already
    made = [
        column(title(metric), [_mean_cell(v, metric, True) for v in variants]),
        column("difference" + ", points" * (metric == SHARE), [_difference_cell(v, result) for v in variants]),
        column("verdict", [_verdict_cell(v, result) for v in variants]),
        *(column(title(name), [_mean_cell(v, name, name == "forgetting") for v in variants]) for name in shown),
        *(column(title(name), [_mean_cell(v, name, False) for v in variants]) for name in SPENT),
        column("seeds", [_seeds_cell(v, result) for v in variants]),
    ]
    return [found for found in made if found["known"]]


def _mean_cell(variant: Variant, metric: str, interval: bool) -> dict[str, Any]:
    summary = variant.summary(metric)
    note = spread(metric, summary).partition(" (")[2].rstrip(")") if interval else ""
    return cell(quantity(metric, summary["mean"]), note)


def _difference_cell(variant: Variant, result: Mapping[str, Any]) -> dict[str, Any]:
    difference = variant.record.get("difference") or {}
    if not finite(difference.get("mean")):
        return cell(NONE)
    good = (difference["mean"] < 0) == lower_is_better(result["metric"])
    tone = ("good" if good else "bad") if difference.get("verdict") in ("better", "worse") else ""
    ends = [difference.get("low"), difference.get("high")]
    interval = " to ".join(gap(result["metric"], end, "+") for end in ends) if all(map(finite, ends)) else ""
    return cell(gap(result["metric"], difference["mean"], "+"), interval, tone)


def _verdict_cell(variant: Variant, result: Mapping[str, Any]) -> dict[str, Any]:
    status = variant.record.get("status", "")
    word = status if status in ("failed", "running") else _verdict(variant)
    if status != "failed" and variant.label == result["baseline"]:
        word = "baseline"
    adjusted = (variant.record.get("difference") or {}).get("adjusted")
    note = f"adjusted p {share(adjusted)}" if finite(adjusted) and word in ("better", "worse", UNSHOWN) else ""
    return cell(word or NONE, note, TONES.get(word, "soft"), badge=bool(word))


def _seeds_cell(variant: Variant, result: Mapping[str, Any]) -> dict[str, Any]:
    done = sum(value is not None for value in variant.values(result["metric"]))
    return cell(f"{done} of {len(result['seeds'])}")


def remarks(variants: Sequence[Variant]) -> list[list[tuple[str, str]]]:
    """Return what the table says below each variant's name, as (tone, text)."""
    found = []
    for record in (v.record for v in variants):
        own = [("soft", f"with {together(record['tuned'])}")] if record.get("tuned") else []
        own += [("bad", record["reason"])] if record.get("reason") else []
        own += [("bad", f"seed {f['seed']}: {f['reason']}") for f in record.get("failures", [])
                if f["reason"] != record.get("reason")]  # fmt: skip
        own += [("warn", record["note"])] if record.get("note") else []
        found.append(own)
    return found


def _reading(result: Mapping[str, Any], variants: Sequence[Variant]) -> str:
    """Return how the table is to be read."""
    several = f"Figures are means over seeds, those below them {result['level']:.0%} intervals."
    parts = [several if len(result["seeds"]) > 1 else "One seed was run, so there are no intervals."]
    tested = sum(_tested(v) for v in variants)
    if tested:
        adjusted = f"; p-values are adjusted for {tested} comparisons ({result['correction'].title()})" * (tested > 1)
        parts.append(f"Differences are taken seed by seed, to the baseline {result['baseline']}{adjusted}.")
    if tested > 1:
        parts.append("Variants other than the baseline are not tested against each other.")
    if result.get("general"):
        parts.append(f"Forgetting is how far the loss on {general_text(result)} rose; below 0 it fell.")
    return " ".join(parts)


def _curves_note(traces: Sequence[Mapping[str, Any]]) -> str:
    roles = {trace["role"] for trace in traces}
    parts = ["Lines are means over seeds, bands reach from the lowest seed to the highest."] if "band" in roles else []
    parts += ["Dotted lines are single runs that have not finished, or failed."] if "thin" in roles else []
    return " ".join(parts)


def trials(result: Mapping[str, Any], variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Return the tuning of every variant that was tuned: its trials, the chosen one marked, and what is to be noted."""
    one = len(result.get("tune") or {}) == 1  # its name heads the column, and the rows give its values alone
    found = []
    for at, record in enumerate(v.record for v in variants):
        rows = []
        for trial in record.get("trials", []):
            settings = trial["settings"]
            text = ", ".join(map(said, settings.values())) if one else together(settings)
            chosen = bool(record.get("tuned")) and settings == record["tuned"]
            value = quantity(trial.get("metric", result["metric"]), trial.get("value"))
            rows.append({"settings": text, "value": value, "chosen": chosen, "reason": trial.get("reason") or ""})
        if rows:
            found.append({"series": at, "label": record["label"], "rows": rows, "note": record.get("note") or ""})
    return found


def _settings(variants: Sequence[Variant]) -> Settings:
    """Return what differs between the variants: their recipes where all are there, else what the comparison set."""
    files = [next((c.folder.path / "recipe.yaml" for c in v.cells if (c.folder.path / "recipe.yaml").is_file()), None)
             for v in variants]  # fmt: skip
    recipes = [read_yaml(path)[0] for path in files if path is not None]
    if len(recipes) == len(variants):
        return compared(recipes, OWN_FIELDS)
    return compared([{**v.record.get("settings", {}), **(v.record.get("tuned") or {})} for v in variants])


def _recipe(variant: Variant) -> dict[str, str] | None:
    path = next((cell.folder.path / "recipe.yaml" for cell in variant.cells), None)
    if path is None or not path.is_file():
        return None
    return {"label": variant.label, "text": path.read_text(encoding="utf-8")}


def _environment(result: Mapping[str, Any]) -> dict[str, str]:
    found = {"command": result.get("command", ""), "machine": result.get("machine", "")}
    found["packages"] = ", ".join(f"{name} {version}" for name, version in (result.get("versions") or {}).items())
    found["time in all"] = clock(result["seconds"]) if finite(result.get("seconds")) else ""
    return {label: str(text) for label, text in found.items() if text}


def _next(result: Mapping[str, Any], variants: Sequence[Variant], best: Variant | None) -> list[str]:
    """Return commands to try next."""
    firsts = [next(iter((v.record.get("cells") or {}).values()), "") for v in variants if v.cells]
    commands = []
    if best is not None:
        chosen = {**best.record.get("settings", {}), **(best.record.get("tuned") or {})}
        sets = [shlex.quote(together({name: value})) for name, value in chosen.items()]
        failed = {str(one["seed"]) for one in best.record.get("failures") or []}
        own = next((path for seed, path in (best.record.get("cells") or {}).items() if seed not in failed), None)
        commands += [sampling(own)] if own else []
        recipe = f"{own}/recipe.yaml" if own else str(result["recipe"])  # of a cell, which has all that was set
        more = ["--set out=null"] if own else [f"--set {text}" for text in sets]
        commands.append(" ".join(["hone run", shlex.quote(recipe), *more]))
    if len(firsts) > 1:
        commands.append(f"hone report {shlex.quote(firsts[0])} {shlex.quote(firsts[1])}")
    return commands
