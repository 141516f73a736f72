"""The charts of a comparison: intervals, learning curves with bands over seeds, cost against quality, tuning."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hone.engine.folder import RunFolder
from hone.evidence.charts import (
    Clock,
    Curve,
    Logs,
    Trace,
    axes,
    band,
    by_axis,
    figure,
    line,
    mean,
    plotted,
    read_logs,
    steep,
    ticks,
    trained,
)
from hone.evidence.layout import SHARE, finite, gap, quantity, said, short, title
from hone.figures import lower_is_better

COSTS = ("training_seconds", "peak_memory", "trained", "flops", "tokens", "forgetting")
_UNITS = {"training_seconds": "training seconds", "peak_memory": "peak memory in MiB"}
ROW = 52  # pixels of a variant in a chart of intervals
BELOW = 0.22  # where the points of single seeds stand below the mean, in rows


@dataclass(frozen=True)
class Cell:
    """A run of one variant with one seed.

    Args:
        folder: its run folder.
        logs: what it has written so far.
        clock: places its steps on the axes.
        complete: whether its final value is in.
    """

    folder: RunFolder
    logs: Logs
    clock: Clock
    complete: bool


@dataclass(frozen=True)
class Variant:
    """What is known of one variant.

    Args:
        record: its part of the comparison's result.
        cells: its runs, those whose folder is there.
    """

    record: dict[str, Any]
    cells: list[Cell]

    @property
    def label(self) -> str:
        """What the variant is called."""
        return str(self.record["label"])

    def values(self, metric: str) -> list[Any]:
        """Return a metric's value of each seed, None where it is missing."""
        found = self.record.get("values", {}).get(metric) or []
        return [value if finite(value) else None for value in found]

    def summary(self, metric: str) -> dict[str, Any]:
        """Return a metric's mean, low and high; low and high are None where there is no interval."""
        known = {k: v for k, v in (self.record.get("summary", {}).get(metric) or {}).items() if finite(v)}
        seen = [value for value in self.values(metric) if value is not None]
        average = sum(seen) / len(seen) if seen else None
        return {"mean": known.get("mean", average), "low": known.get("low"), "high": known.get("high")}


def read_variants(result: Mapping[str, Any], home: Path) -> list[Variant]:
    """Return the variants of a comparison with the logs of their runs.

    Args:
        result: the comparison's result.
        home: the comparison's folder, which paths of cells may be relative to.
    """
    return [Variant(record, list(_cells(record, result, home))) for record in result["variants"]]


def _cells(record: dict[str, Any], result: Mapping[str, Any], home: Path) -> Iterator[Cell]:
    values = record.get("values", {})
    pairs = zip(values.get("flops") or [], values.get("tokens") or [], strict=False)
    rates = [flops / tokens for flops, tokens in pairs if finite(flops) and finite(tokens) and tokens]
    rate = sum(rates) / len(rates) if rates else None
    seeds = [str(seed) for seed in result["seeds"]]
    final = values.get(result["metric"]) or []
    for seed, path in (record.get("cells") or {}).items():
        found = next((p for p in (Path(path), home / path) if p.is_dir()), None)
        if found is None:
            continue
        logs = read_logs(RunFolder(found))
        at = seeds.index(seed) if seed in seeds else len(final)
        yield Cell(RunFolder(found), logs, Clock(logs.rows, rate), at < len(final) and finite(final[at]))


def interval_charts(result: Mapping[str, Any], variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Return a chart of the metric of every variant, and one of the differences to the baseline."""
    metric, level = result["metric"], f"{result['level']:.0%}"
    choices = {m: title(m) for m in judged(variants, metric)}
    rows = [(at, v) for at, v in enumerate(variants) if any(v.summary(m)["mean"] is not None for m in choices)]
    if not rows:
        return []
    base = next((v for _, v in rows if v.label == result["baseline"]), None)
    traces = [_guide({m: base.summary(m)["mean"] if base else None for m in choices}, len(rows))]
    for place, (at, variant) in enumerate(rows):
        seen = {m: [x for x in variant.values(m) if x is not None] for m in choices}
        traces.append(_seeds(at, {"by": {m: {"x": xs, "y": [place + BELOW] * len(xs)} for m, xs in seen.items()}}))
        traces.append(_mean(at, {"by": {m: _whisker(variant, variant.summary(m), m, place) for m in choices}}))
    heading = f"Mean with its {level} interval, and each seed" if len(result["seeds"]) > 1 else "Value of the one seed"
    under = {m: {"xaxis": {"title": {"text": better_way(m)}, **ticks(m), "rangemode": "normal"}} for m in choices}
    options: dict[str, Any] = {"hover": "closest", "height": 60 + ROW * len(rows)}
    charts = [figure("intervals", heading, traces, control="metric", choices=choices, by=under, yaxis=_rows_axis(rows),
                     **options)]  # fmt: skip
    others = [(at, v) for at, v in rows if v is not base]
    if base is not None and (compared := _difference_traces(metric, others, base)):
        side, what = "left" if result["better"] == "lower" else "right", "points" if metric == SHARE else "difference"
        words = f"{what} of {title(metric)} ({side} of 0 is better)"
        axis = {"title": {"text": words}, "zeroline": False, "hoverformat": ".1f" if metric == SHARE else ".4g"}
        heading = f"Difference to the baseline, seed by seed, with its {level} interval"
        charts.append(figure("differences", heading, compared, xaxis=axis, yaxis=_rows_axis(others), **options))
    charts[0]["wide"] = len(charts) == 1
    return charts


def _seeds(series: int, places: Mapping[str, Any]) -> Trace:
    return {
        "role": "seeds",
        "series": series,
        "name": "",
        "hovertemplate": "%{x}<extra>one seed</extra>",
        **places,
    }


def _mean(series: int, places: Mapping[str, Any]) -> Trace:
    return {"role": "mean", "series": series, "name": "", "hovertemplate": "%{customdata}<extra></extra>", **places}


def judged(variants: Sequence[Variant], first: str = "") -> list[str]:
    """Return the metrics that say how good a variant is, not what it cost.

    Args:
        variants: their values are looked through.
        first: the one to begin with.
    """
    costs = {*COSTS, "tokens_per_second", "steps"} - {"forgetting"}
    found = dict.fromkeys([*([first] if first else []), *(m for v in variants for m in v.record.get("values", {}))])
    return [m for m in found if m not in costs and any(v.summary(m)["mean"] is not None for v in variants)]


def better_way(metric: str) -> str:
    """Return a metric's name with the direction in which it is better."""
    return f"{title(metric)} ({'lower' if lower_is_better(metric) else 'higher'} is better)"


def _rows_axis(rows: Sequence[tuple[int, Variant]]) -> dict[str, Any]:
    """Return a y-axis with a row for each variant, from the top; narrow pages show their numbers alone."""
    texts = [f"{at + 1}  {plotted(short(variant.label, 28))} " for at, variant in rows]
    return {"tickvals": list(range(len(rows))), "ticktext": texts, "short": [f"{at + 1} " for at, _ in rows],
            "range": [len(rows) - 0.5, -0.5], "showgrid": False, "zeroline": False, "ticks": ""}  # fmt: skip


def _guide(at: Mapping[str, Any], rows: int) -> Trace:
    """Return the upright line of the baseline, by metric."""
    by = {m: {"x": [x, x], "y": [-0.5, rows - 0.5]} for m, x in at.items() if x is not None}
    return {"role": "guide", "series": None, "name": "", "by": by}


def _whisker(variant: Variant, summary: Mapping[str, Any], metric: str, place: int) -> dict[str, Any]:
    """Return a point with its interval along x, nothing without a mean."""
    if summary["mean"] is None:
        return {"x": [], "y": []}
    shown = f"{plotted(variant.label)}<br>{title(metric)} {spread(metric, summary)}"
    return {"x": [summary["mean"]], "y": [place], "customdata": [shown], "error_x": _bars(summary)}


def spread(metric: str, summary: Mapping[str, Any]) -> str:
    """Return a mean with its interval in words.

    Args:
        metric: gives the units.
        summary: mean, low and high.
    """
    text = quantity(metric, summary["mean"])
    if summary["low"] is None or summary["high"] is None:
        return text
    return f"{text} ({quantity(metric, summary['low'])} to {quantity(metric, summary['high'])})"


def _bars(summary: Mapping[str, Any], unit: float = 1.0) -> dict[str, Any]:
    if summary["low"] is None or summary["high"] is None:
        return {"visible": False}
    up, down = summary["high"] - summary["mean"], summary["mean"] - summary["low"]
    return {"type": "data", "symmetric": False, "array": [up / unit], "arrayminus": [down / unit]}


def _difference_traces(metric: str, rows: Sequence[tuple[int, Variant]], base: Variant) -> list[Trace]:
    unit = 0.01 if metric == SHARE else 1.0
    traces: list[Trace] = []
    for place, (at, variant) in enumerate(rows):
        difference = variant.record.get("difference")
        if not difference or not finite(difference.get("mean")):
            continue
        low, high = difference.get("low"), difference.get("high")
        known = finite(low) and finite(high)
        ends = {"mean": difference["mean"], "low": low if known else None, "high": high if known else None}
        pairs = zip(variant.values(metric), base.values(metric), strict=False)
        each = [(own - other) / unit for own, other in pairs if own is not None and other is not None]
        traces.append(_seeds(at, {"x": each, "y": [place + BELOW] * len(each)}))
        interval = f" ({gap(metric, low, '+')} to {gap(metric, high, '+')})" if known else ""
        shown = f"{plotted(variant.label)}<br>{gap(metric, difference['mean'], '+')}{interval}"
        point = {"x": [difference["mean"] / unit], "y": [place], "customdata": [shown], "error_x": _bars(ends, unit)}
        traces.append(_mean(at, point))
    zero = {"role": "guide", "series": None, "name": "", "x": [0, 0], "y": [-0.5, len(rows) - 0.5]}
    return [zero, *traces] if traces else []


def curve_charts(result: Mapping[str, Any], variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Return learning curves with bands over seeds: what is evaluated, and the training loss."""
    found = {name for v in variants for c in v.cells for e in c.logs.evaluations for name in e if name != "step"}
    order = [result["metric"], "loss", "general_loss", *sorted(found)]
    longest = max((len(c.logs.rows) for v in variants for c in v.cells), default=0)
    charts = []
    for name in dict.fromkeys(name for name in order if name in found):
        curves = [
            [cell.clock.curve({e["step"]: e.get(name) for e in cell.logs.evaluations}) for cell in v.cells]
            for v in variants
        ]
        forgotten = f"Loss on {general_text(result)}: what is forgotten" if name == "general_loss" else ""
        charts += _curves(name, forgotten or f"Held-out {better_way(name)}", variants, curves, "points")
    losses = [[cell.clock.curve(trained(cell.logs.rows, "loss", True, longest)) for cell in v.cells] for v in variants]
    charts += _curves("training_loss", "Training loss, smoothed", variants, losses, "curve")
    if len(charts) % 2:
        charts[0]["wide"] = True
    return charts


def _curves(
    name: str, heading: str, variants: Sequence[Variant], curves: Sequence[Sequence[Curve | None]], role: str
) -> list[dict[str, Any]]:
    """Return the chart of one quantity; runs that are not complete are thin lines beside the mean of those that are."""
    bands, lines = [], []
    for at, (variant, own) in enumerate(zip(variants, curves, strict=True)):
        label = f"{at + 1} {variant.label}"
        pairs = [(cell, curve) for cell, curve in zip(variant.cells, own, strict=True) if curve is not None]
        if average := mean([curve for cell, curve in pairs if cell.complete]):
            if max(average.count) > 1:
                bands.append(band(average, at))
            lines.append(line(name, average, role, label, at))
        lines += [line(name, curve, "thin", label, at) for cell, curve in pairs if not cell.complete]
    drawn = [value for trace in lines for value in trace["y"]]
    axis = steep(drawn) if lower_is_better(name) else ticks(name)
    return [figure(name, heading, bands + lines, control="x", by=by_axis(axes(lines)), yaxis=axis)] if lines else []


def general_text(result: Mapping[str, Any]) -> str:
    """Return the name of the data that shows forgetting, without its options."""
    return str(result.get("general") or "other text").partition("(")[0]


def cost_chart(result: Mapping[str, Any], variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Return the chart of cost against quality, with the line of those that nothing cheaper beats."""
    metric = result["metric"]
    shown = [(at, v) for at, v in enumerate(variants) if v.summary(metric)["mean"] is not None]
    costs = [c for c in COSTS if c != metric and any(v.summary(c)["mean"] is not None for _, v in shown)]
    if not costs:
        return []
    fronts, looks = {}, {}
    traces: list[Trace] = [
        {"role": "numbered", "series": at, "name": "", "text": [str(at + 1)], "by": {},
         "error_y": _bars(v.summary(metric)), "hovertemplate": "%{customdata}<extra></extra>"}
        for at, v in shown
    ]  # fmt: skip
    for cost in costs:
        unit, places = (2**20 if cost == "peak_memory" else 1), []
        for trace, (_, variant) in zip(traces, shown, strict=True):
            own, quality = variant.summary(cost), variant.summary(metric)
            if own["mean"] is None:
                continue
            said_of = f"{plotted(variant.label)}<br>{title(metric)} {spread(metric, quality)}<br>{title(cost)} "
            places.append((own["mean"] / unit, quality["mean"]))
            trace["by"][cost] = {"x": [places[-1][0]], "y": [quality["mean"]], "error_x": _bars(own, unit),
                                 "customdata": [said_of + spread(cost, own)]}  # fmt: skip
        front = pareto(places, result["better"] == "lower")
        fronts[cost] = {"x": [x for x, _ in front], "y": [y for _, y in front]}
        axis = {"title": {"text": f"{_UNITS.get(cost, title(cost))} (lower is better)"}, "exponentformat": "SI"}
        looks[cost] = {"xaxis": {**axis, **steep([x for x, _ in places])}}
    frontier = {"role": "front", "series": None, "name": "", "by": fronts}
    return [figure("cost", better_way(metric), [frontier, *traces], control="cost", hover="closest", wide=True,
                   yaxis=ticks(metric),
                   choices={c: f"by {_UNITS.get(c, title(c))}" for c in costs}, by=looks)]  # fmt: skip


def pareto(places: Sequence[tuple[float, float]], lower: bool) -> list[tuple[float, float]]:
    """Return the (cost, quality) points that no other point beats in both, by rising cost.

    Args:
        places: costs, lower being better, with qualities.
        lower: whether a lower quality is better, as of a loss.
    """
    sign = -1 if lower else 1
    front: list[tuple[float, float]] = []
    for cost, quality in sorted(places, key=lambda place: (place[0], -sign * place[1])):
        if not front or sign * quality > sign * front[-1][1]:
            front.append((cost, quality))
    return front


def tuning_chart(result: Mapping[str, Any], variants: Sequence[Variant]) -> list[dict[str, Any]]:
    """Return the chart of the trials where one numeric option was tuned; nothing otherwise."""
    names = list(result.get("tune") or {})
    values = result["tune"][names[0]] if len(names) == 1 else []
    if len(values) < 2 or not all(map(finite, values)):
        return []
    name, traces = names[0], []
    for at, variant in enumerate(variants):
        trials = [
            (t["settings"].get(name), t["value"]) for t in variant.record.get("trials", []) if finite(t.get("value"))
        ]
        points = sorted(trial for trial in trials if finite(trial[0]))
        best = [point for point in points if point[0] == (variant.record.get("tuned") or {}).get(name)]
        for role, some in (("points", points), ("chosen", best)):
            if some:
                traces.append({"role": role, "series": at, "name": plotted(f"{at + 1} {variant.label}"),
                               "x": [x for x, _ in some], "y": [y for _, y in some]})  # fmt: skip
    ratio = max(values) / min(values) if min(values) > 0 else 0
    tried = sorted(set(values))
    axis = {"title": {"text": plotted(name)}, "tickvals": tried, "ticktext": [said(value) for value in tried],
            "type": "log" if ratio >= 3 else "linear"}  # fmt: skip
    every = [trial for variant in variants for trial in variant.record.get("trials", [])]
    metric = next((trial["metric"] for trial in every if "metric" in trial), result["metric"])
    return [figure("tuning", f"{better_way(metric)} of each trial; the chosen ones are ringed", traces,
                   xaxis=axis, yaxis=ticks(metric), wide=True)] if traces else []  # fmt: skip
