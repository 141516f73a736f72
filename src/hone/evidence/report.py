"""The report page of a run: one self-contained HTML file with curves, samples, settings and cost."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from plotly.offline import get_plotlyjs

from hone.engine.folder import RunFolder
from hone.engine.progress import clock

SHOWN_SAMPLES = 12
BLUE, ORANGE = "#3b76d6", "#d9822b"


def write_report(path: Path) -> Path:
    """Write `report.html` into a run folder, from the files that lie there.

    Args:
        path: the run folder.

    Returns:
        The page. It opens offline: the plotting library is inside.
    """
    folder = RunFolder.open(path)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report.html").render(
        **contents(folder), plotly=get_plotlyjs(), recipe=(folder.path / "recipe.yaml").read_text(encoding="utf-8")
    )
    return folder.write("report.html", page)


def contents(folder: RunFolder) -> dict[str, Any]:
    """Return what the page shows: headline tiles, charts, samples, data and environment."""
    stages = [RunFolder(path) for path in sorted(folder.path.glob("stage-*"))] or [folder]
    rows, evaluations, answers = _logs(stages)
    result, manifest = folder.json("result.json"), stages[0].json("manifest.json")
    return {
        "name": folder.path.name,
        "status": result.get("status", "running"),
        "reason": result.get("reason", ""),
        "tiles": _tiles(result, manifest, rows),
        "charts": _charts(rows, evaluations),
        "samples": _pairs(answers),
        "asked": sum(1 for answer in answers if answer["step"] == answers[0]["step"]) if answers else 0,
        "data": manifest.get("data", {}),
        "facts": _facts(manifest),
        "run": str(folder.path),
    }


def _logs(stages: Sequence[RunFolder]) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of metrics, evaluations and samples of all stages, their steps counted on from stage to stage."""
    found: tuple[list[dict[str, Any]], ...] = ([], [], [])
    before = 0
    for stage in stages:
        for rows, name in zip(found, ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"), strict=True):
            rows.extend({**row, "step": row["step"] + before} for row in stage.rows(name))
        before = found[0][-1]["step"] if found[0] else 0
    return found[0], found[1], found[2]


def _tiles(result: dict[str, Any], manifest: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the headline figures: each a label, a value and a smaller note."""
    tiles = []
    for name, after in result.get("after", {}).items():
        before = result.get("before", {}).get(name)
        show = (lambda v: f"{v:.3f}") if name == "loss" else (lambda v: f"{v:.1%}")
        note = f"{show(before)} before" if before is not None else ""
        tiles.append({"label": f"held-out {name}", "value": show(after), "note": note})
    seconds = sum(row["seconds"] for row in rows)
    if rows and seconds > 0:
        speed = sum(row["tokens"] for row in rows) / seconds
        note = f"{speed:,.0f} tokens/s, {len(rows)} steps"
        tiles.append({"label": "training time", "value": clock(seconds), "note": note})
        peak = max(row["memory"] for row in rows) / 2**20
        tiles.append({"label": "peak memory", "value": f"{peak:,.0f} MiB", "note": manifest.get("device", "")})
    if model := manifest.get("model"):
        share = 100 * model["trained"] / max(1, model["parameters"])
        note = f"{share:.1f}% of {model['parameters']:,}"
        tiles.append({"label": "trained parameters", "value": f"{model['trained']:,}", "note": note})
    return tiles


def _charts(rows: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the charts as plotly figures in plain data; the page colours them for light or dark."""
    charts = []
    if rows:
        steps = [row["step"] for row in rows]
        losses = [row.get("loss") for row in rows]
        traces = [
            _line(steps, losses, "each step", BLUE, width=1, opacity=0.45),
            _line(steps, smooth(losses), "training, smoothed", BLUE, width=2.5),
        ]
        held = [(e["step"], e["loss"]) for e in evaluations if e.get("loss") is not None]
        if held:
            traces.append(_points([h[0] for h in held], [h[1] for h in held], "held-out", ORANGE))
        shown = [value for value in losses if value is not None and math.isfinite(value)]
        wide = bool(shown) and 0 < 20 * min(shown) < max(shown)  # else the end of the curve lies flat on the axis
        charts.append(_chart("loss", "Loss per trained token", traces, axis={"type": "log"} if wide else {}))
    for name in sorted({key for e in evaluations for key in e} - {"step", "loss"}):
        kept = [(e["step"], e[name]) for e in evaluations if e.get(name) is not None]
        traces = [_points([k[0] for k in kept], [k[1] for k in kept], f"held-out {name}", ORANGE)]
        percent = {"tickformat": ".0%", "range": [-0.02, 1.02]}
        charts.append(_chart(name, f"Held-out {name} of generated answers", traces, axis=percent))
    if rows:
        for key, title in (("lr", "Learning rate"), ("grad_norm", "Gradient norm before clipping")):
            values = [row.get(key) for row in rows]
            charts.append(_chart(key, title, [_line(steps, values, title, BLUE, width=1.5)]))
        speeds = [row["tokens"] / row["seconds"] if row["seconds"] else None for row in rows]
        charts.append(_chart("speed", "Tokens per second", [_line(steps, speeds, "tokens/s", BLUE, width=1.5)]))
    return charts


def smooth(values: Sequence[float | None], weight: float = 0.9) -> list[float | None]:
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


def _line(
    x: Sequence[int], y: Sequence[Any], name: str, colour: str, width: float, opacity: float = 1.0
) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines", "x": list(x), "y": list(y), "name": name, "opacity": opacity,
            "line": {"width": width, "color": colour}}  # fmt: skip


def _points(x: Sequence[int], y: Sequence[Any], name: str, colour: str) -> dict[str, Any]:
    return {"type": "scatter", "mode": "lines+markers", "x": list(x), "y": list(y), "name": name,
            "line": {"width": 2, "color": colour}, "marker": {"size": 8, "color": colour}}  # fmt: skip


def _chart(name: str, title: str, traces: list[dict[str, Any]], axis: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"id": f"chart-{name}", "title": title, "wide": name == "loss", "data": _script(traces),
            "yaxis": _script(axis or {})}  # fmt: skip


def _script(value: Any) -> str:
    """Return JSON that cannot end the script element it stands in."""
    return json.dumps(value).replace("</", "<\\/")


def _pairs(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return prompts with their first and last answers, those that changed from wrong to right first."""
    if not answers:
        return []
    first, last = answers[0]["step"], answers[-1]["step"]
    before = {row["where"]: row for row in answers if row["step"] == first}
    pairs = []
    for row in (row for row in answers if row["step"] == last):
        old = before.get(row["where"]) if first != last else None
        pairs.append({"prompt": row["prompt"], "expected": row["expected"], "after": row["answer"],
                      "after_right": row.get("accuracy"), "before": old["answer"] if old else None,
                      "before_right": old.get("accuracy") if old else None})  # fmt: skip
    pairs.sort(key=lambda p: (p["after_right"] or 0) - (p["before_right"] or 0), reverse=True)
    half = SHOWN_SAMPLES // 2  # gains first, then what is still wrong: both are worth a look
    wrong = [p for p in pairs[half:] if not p["after_right"]][: SHOWN_SAMPLES - half]
    rest = [p for p in pairs[half:] if p not in wrong]
    return (pairs[:half] + wrong + rest)[:SHOWN_SAMPLES]


def _facts(manifest: dict[str, Any]) -> dict[str, str]:
    if not manifest:
        return {}
    packages = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    model = manifest["model"]
    return {
        "device": manifest["device"], "platform": manifest["platform"], "packages": packages,
        "seed": str(manifest["seed"]), "starting model": f"{model['base'] or 'fresh'} {(model['sha256'] or '')[:12]}",
        "attention": "packed trees" if model["packed"] else "padded rows (this architecture cannot be packed)",
    }  # fmt: skip
