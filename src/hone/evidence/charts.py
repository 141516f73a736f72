"""From the logs of runs to the charts of a page, as plain data that the page's script draws and colours.

A trace has a `role`, which says how it looks, and a `series`, which gives its colour; `by` holds what depends on a
control of the page, e.g. what stands on the x-axis.
"""

from __future__ import annotations

import html
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hone.engine.folder import RunFolder, stage_folders
from hone.evidence.layout import SHARE, finite, quantity, scaled, short

AXES = {"step": "steps", "tokens": "tokens", "seconds": "seconds of training", "flops": "FLOPs"}
POINTS = 400  # most points of a curve where several are overlaid; a screen shows no more
Values = Sequence[float | None]
Trace = dict[str, Any]


@dataclass(frozen=True)
class Logs:
    """What a run has written so far, its stages one after the other.

    Args:
        rows: one a step.
        evaluations: one an evaluation.
        answers: to held-out prompts, of every evaluation.
        begins: where each stage begins among the rows and among the evaluations.
    """

    rows: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    begins: dict[str, list[int]] = field(default_factory=dict)

    def by_stage(self, kind: str, key: str) -> list[tuple[list[int], list[float | None]]]:
        """Return a curve cut where a stage ends: the loss of one objective does not go on from that of another.

        Args:
            kind: "rows" or "evaluations".
            key: what the curve shows; rows without it are left out.
        """
        logged = getattr(self, kind)
        cuts = itertools.pairwise([*self.begins.get(kind, [0]), len(logged)])
        parts = [[row for row in logged[a:b] if kind == "rows" or row.get(key) is not None] for a, b in cuts]
        return [([row["step"] for row in part], [row.get(key) for row in part]) for part in parts if part]


def stages(folder: RunFolder) -> list[RunFolder]:
    """Return the folders that a run logs to: those of its stages, or its own."""
    return [RunFolder(path) for path in stage_folders(folder.path)] or [folder]


def read_logs(folder: RunFolder) -> Logs:
    """Return the logs of all stages, their steps counted on from stage to stage."""
    logs = Logs([], [], [])
    before = 0
    for stage in stages(folder):
        for kind in ("rows", "evaluations"):
            logs.begins.setdefault(kind, []).append(len(getattr(logs, kind)))
        for rows, name in (
            (logs.rows, "metrics.jsonl"), (logs.evaluations, "evaluations.jsonl"), (logs.answers, "samples.jsonl")
        ):  # fmt: skip
            rows.extend({**row, "step": row["step"] + before} for row in stage.rows(name))
        before = logs.rows[-1]["step"] if logs.rows else 0
    return logs


def smooth(values: Values, weight: float = 0.9) -> list[float | None]:
    """Return the bias-corrected exponential moving average of a curve; gaps stay gaps.

    Args:
        values: one value a step, None where there is none.
        weight: share of the past in each value.
    """
    average, norm = 0.0, 0.0
    out: list[float | None] = []
    for value in values:
        if value is None or not math.isfinite(value):
            out.append(None)
            continue
        average = weight * average + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        out.append(average / norm)
    return out


@dataclass(frozen=True)
class Curve:
    """One quantity of one run, or its mean over runs.

    Args:
        x: where its points lie, by what the x-axis shows; an axis that is not known is left out.
        y: its values.
        low: the lowest of several runs at each point; empty for one run.
        high: the highest.
        count: how many runs each point is a mean of; empty for one run.
    """

    x: dict[str, list[float]]
    y: list[float]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    count: tuple[int, ...] = ()


class Clock:
    """How many tokens, seconds and FLOPs a run had spent after each of its steps."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], flops_per_token: float | None = None) -> None:
        """Count along the steps.

        Args:
            rows: the run's rows of metrics.
            flops_per_token: None leaves the FLOPs out.
        """
        self.per_token = flops_per_token
        self._spent = {0: (0.0, 0.0)}
        tokens = seconds = 0.0
        for row in rows:
            tokens, seconds = tokens + (row.get("tokens") or 0), seconds + (row.get("seconds") or 0)
            self._spent[row["step"]] = (tokens, seconds)

    def at(self, step: int) -> dict[str, float]:
        """Return where a step lies on every axis that is known."""
        place: dict[str, float] = {"step": step}
        if step in self._spent:
            tokens, seconds = self._spent[step]
            place |= {"tokens": tokens, "seconds": round(seconds, 3)}
            if self.per_token is not None:
                place["flops"] = tokens * self.per_token
        return place

    def curve(self, points: Mapping[int, Any]) -> Curve | None:
        """Return the curve through values by step, those that are no finite number left out; None without any."""
        kept = {step: value for step, value in points.items() if finite(value)}
        places = [self.at(step) for step in kept]
        axes = [axis for axis in AXES if all(axis in place for place in places)]
        x = {axis: [place[axis] for place in places] for axis in axes}
        return Curve(x, list(kept.values())) if kept else None


def trained(rows: Sequence[Mapping[str, Any]], name: str, smoothed: bool, longest: int = 0) -> dict[int, Any]:
    """Return a quantity of the training steps by step, at most `POINTS` of them.

    Args:
        rows: the run's rows of metrics.
        name: a key of the rows, or "speed" for tokens per second.
        smoothed: whether to smooth it.
        longest: steps of the longest run beside it, so that all show the same steps.
    """
    if name == "speed":
        values = [row["tokens"] / row["seconds"] if row.get("tokens") and row.get("seconds") else None for row in rows]
    else:
        values = [row.get(name) for row in rows]
    values = smooth(values) if smoothed else values
    stride = max(1, math.ceil(max(len(rows), longest) / POINTS))
    last = len(rows) - 1
    return {
        row["step"]: value
        for at, (row, value) in enumerate(zip(rows, values, strict=True))
        if row["step"] % stride == 0 or at in (0, last)
    }


def mean(curves: Sequence[Curve]) -> Curve | None:
    """Return the mean of several runs' curves with the lowest and highest at each step that any of them has."""
    if not curves:
        return None
    axes = [axis for axis in AXES if all(axis in curve.x for curve in curves)]
    at: dict[float, list[tuple[Curve, int]]] = {}
    for curve in curves:
        for index, step in enumerate(curve.x["step"]):
            at.setdefault(step, []).append((curve, index))
    points = [at[step] for step in sorted(at)]
    x = {axis: [sum(curve.x[axis][i] for curve, i in point) / len(point) for point in points] for axis in axes}
    values = [[curve.y[i] for curve, i in point] for point in points]
    return Curve(
        x, [sum(some) / len(some) for some in values], tuple(map(min, values)), tuple(map(max, values)),
        tuple(map(len, values)),
    )  # fmt: skip


def line(metric: str, curve: Curve, role: str, label: str, series: int) -> Trace:
    """Return the trace of a curve; the axes' control picks its x.

    Args:
        metric: what it shows.
        curve: the curve.
        role: how it looks: "curve", "points", "thin" or "raw".
        label: its name in what is shown under the pointer.
        series: its colour.
    """
    spread = [
        f" ({quantity(metric, low)} to {quantity(metric, high)}, {count} seeds)" if count > 1 else ""
        for low, high, count in zip(curve.low, curve.high, curve.count, strict=True)
    ]
    return {
        "role": role, "series": series, "name": plotted(label), "y": curve.y, "text": spread or None,
        "hovertemplate": "%{y:" + digits(metric) + "}" + ("%{text}" if spread else ""),
        "by": {axis: {"x": x} for axis, x in curve.x.items()},
    }  # fmt: skip


def band(curve: Curve, series: int) -> Trace:
    """Return the trace of the band from the lowest to the highest of several runs.

    Args:
        curve: a mean over runs.
        series: its colour.
    """
    return {
        "role": "band", "series": series, "y": [*curve.high, *reversed(curve.low)], "name": "",
        "by": {axis: {"x": [*x, *reversed(x)]} for axis, x in curve.x.items()},
    }  # fmt: skip


def plotted(label: str) -> str:
    """Return a label for the plotting library, which reads tags in its texts."""
    return html.escape(short(label), quote=False)


def figure(name: str, heading: str, traces: Sequence[Trace], **options: Any) -> dict[str, Any]:
    """Return a chart.

    Args:
        name: gives its id.
        heading: the words above it.
        traces: what it draws.
        options: xaxis, yaxis, legend, hover, height in pixels, wide; `control` names what `by` depends on, and
            `choices` (text by value) puts that control into the chart's head.
    """
    given: dict[str, Any] = {"control": None, "choices": None, "wide": False, "height": None, "legend": False,
                             "hover": "x unified", "xaxis": {}, "yaxis": {}, "by": None}  # fmt: skip
    return {"id": f"chart-{name}", "title": heading, "traces": list(traces), **given, **options}


def axes(traces: Sequence[Trace]) -> list[str]:
    """Return what the x-axis can show: all that any of the traces knows."""
    return [axis for axis in AXES if any(axis in trace["by"] for trace in traces)]


def by_axis(axes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what a chart of curves shows under its x-axis, by what the control picks."""
    return {axis: {"xaxis": {"title": {"text": AXES[axis]}, "exponentformat": "SI"}} for axis in axes}


def digits(metric: str) -> str:
    """Return how the plotting library writes values of a metric."""
    return ".1%" if metric == SHARE else ".4g"


def ticks(metric: str) -> dict[str, Any]:
    """Return how an axis shows values of a metric."""
    shown = {"hoverformat": digits(metric)}
    return {**shown, "tickformat": ".3~p", "rangemode": "nonnegative"} if metric == SHARE else shown


def steep(values: Sequence[Any]) -> dict[str, Any]:
    """Return a log axis for values so far apart that the small ones would lie flat on a linear one, else nothing."""
    shown = [value for value in values if finite(value)]
    if not shown or not 0 < 20 * min(shown) < max(shown):
        return {}
    first, last = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    leads = (1, 2, 5) if last - first <= 3 else (1,)
    marks = [lead * 10.0**power for power in range(first, last + 1) for lead in leads]
    return {"type": "log", "tickvals": marks, "ticktext": [_tick(mark) for mark in marks]}


def _tick(value: float) -> str:
    return f"{value:g}" if value < 1000 else re.sub(r"\.0+(?=\D)", "", scaled(value))
