"""The report page of a run: one self-contained HTML file with curves, samples, settings and cost."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hone import parts
from hone.engine.folder import RunFolder
from hone.engine.progress import clock
from hone.engine.summary import unit
from hone.evidence.charts import Logs, Trace, Values, figure, read_logs, smooth, stages, steep
from hone.evidence.layout import draws, heading, render
from hone.figures import is_share

SHOWN_SAMPLES = 12


def write_report(path: Path) -> Path:
    """Write `report.html` into a run folder, from the files that lie there.

    Args:
        path: the run folder.

    Returns:
        The page. It opens offline: the plotting library is inside.
    """
    folder = RunFolder.open(path)
    recipe = (folder.path / "recipe.yaml").read_text(encoding="utf-8")
    return folder.write("report.html", render("report.html", **contents(folder), recipe=recipe))


def contents(folder: RunFolder) -> dict[str, Any]:
    """Return what the page shows: headline tiles, charts, samples, data and environment."""
    logs = read_logs(folder)
    result, manifest = folder.json("result.json"), stages(folder)[0].json("manifest.json")
    return {
        "name": folder.path.name,
        "status": result.get("status", "running"),
        "reason": result.get("reason", ""),
        "tiles": _tiles(result, manifest, logs.rows),
        "figures": _charts(logs, unit(result)),
        "samples": _pairs(logs.answers),
        "pictures": _pictures(folder),
        "draws": draws(folder.path),
        "asked": sum(1 for answer in logs.answers if answer["step"] == logs.answers[0]["step"]),
        "data": manifest.get("data", {}),
        "facts": _facts(manifest),
        "run": str(folder.path),
    }


def _tiles(result: dict[str, Any], manifest: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the headline figures: each a label, a value and a smaller note."""
    tiles = []
    for name, after in result.get("after", {}).items():
        before = result.get("before", {}).get(name)
        show = (lambda v: f"{v:.1%}") if is_share(name) else (lambda v: f"{v:.3f}")
        note = f"{show(before)} before" if before is not None else ""
        tiles.append({"label": heading(name).lower(), "value": show(after), "note": note})
    seconds = sum(row["seconds"] for row in rows)
    if rows and seconds > 0:
        speed = sum(row["tokens"] for row in rows) / seconds
        note = f"{speed:,.0f} {unit(result)}/s, {len(rows)} steps"
        tiles.append({"label": "training time", "value": clock(seconds), "note": note})
        peak = max(row["memory"] for row in rows) / 2**20
        tiles.append({"label": "peak memory", "value": f"{peak:,.0f} MiB", "note": manifest.get("device", "")})
    if model := manifest.get("model"):
        share = 100 * model["trained"] / max(1, model["parameters"])
        note = f"{share:.1f}% of {model['parameters']:,}"
        tiles.append({"label": "trained parameters", "value": f"{model['trained']:,}", "note": note})
    return tiles


def _charts(logs: Logs, counted: str) -> list[dict[str, Any]]:
    """Return the charts of a run that counts tokens or arrays."""
    rows, evaluations, charts = logs.rows, logs.evaluations, []
    steps = [row["step"] for row in rows]
    axis = {"title": {"text": "step"}}
    if rows:
        losses = [row.get("loss") for row in rows]
        cut = logs.by_stage("rows", "loss")
        traces = [
            _trace("raw", 0, "each step", *_with_gaps(cut)),
            _trace("curve", 0, "training, smoothed", *_with_gaps([(x, smooth(y)) for x, y in cut])),
        ]
        if held := logs.by_stage("evaluations", "loss"):
            traces.append(_trace("points", 1, "held-out", *_with_gaps(held)))
        per = "Loss per trained token" if counted == "tokens" else "Loss per array"
        charts.append(figure("loss", per, traces, xaxis=axis, yaxis=steep(losses), wide=True, legend=True))
    charts += _rollouts(rows, axis)
    for name in sorted({key for e in evaluations for key in e} - {"step", "loss"}):
        if not (kept := logs.by_stage("evaluations", name)):
            continue
        title = heading(name) + (" of generated answers" if parts.find("metric", name) else "")
        percent = {"tickformat": ".0%", "range": [-0.02, 1.02]} if is_share(name) else {}
        traces = [_trace("points", 1, heading(name).lower(), *_with_gaps(kept))]
        charts.append(figure(name, title, traces, xaxis=axis, yaxis=percent))
    if rows:
        speeds = [row["tokens"] / row["seconds"] if row["seconds"] else None for row in rows]
        for key, title, values in (
            ("lr", "Learning rate", [row.get("lr") for row in rows]),
            ("grad_norm", "Gradient norm before clipping", [row.get("grad_norm") for row in rows]),
            ("speed", f"{counted.capitalize()} per second", speeds),
        ):
            charts.append(figure(key, title, [_trace("detail", 0, title, steps, values)], xaxis=axis))
    return charts


def _with_gaps(parts: Sequence[tuple[list[int], list[float | None]]]) -> tuple[list[int], list[float | None]]:
    """Return curves as one that is interrupted between them."""
    steps: list[int] = []
    values: list[float | None] = []
    for x, y in parts:
        steps += [*x[:1], *x] if steps else x  # a point without a value interrupts the line
        values += [None, *y] if values else y
    return steps, values


def _rollouts(rows: Sequence[dict[str, Any]], axis: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the charts of what the model answered while it trained: rewards, and how long answers were."""
    charts = []
    for name, title in (
        ("reward", "Reward of the model's own answers"), ("passed", "Own answers that pass"),
        ("length", "Length of own answers in tokens"),
    ):  # fmt: skip
        kept = [(row["step"], row[f"rollout/{name}"]) for row in rows if f"rollout/{name}" in row]
        if kept:
            steps, values = zip(*kept, strict=True)
            traces = [
                _trace("raw", 0, "each phase", steps, values), _trace("curve", 0, "smoothed", steps, smooth(values)),
            ]  # fmt: skip
            charts.append(figure(f"rollout-{name}", title, traces, xaxis=axis))
    return charts


def _trace(role: str, series: int, name: str, x: Sequence[int], y: Values) -> Trace:
    return {"role": role, "series": series, "name": name, "x": list(x), "y": list(y)}


def _pairs(answers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return prompts with their first and last answers, those that changed from wrong to right first."""
    if not answers:
        return []
    first, last = answers[0]["step"], answers[-1]["step"]
    before = {(row["where"], row["prompt"]): row for row in answers if row["step"] == first}
    pairs = []
    for row in (row for row in answers if row["step"] == last):
        old = before.get((row["where"], row["prompt"])) if first != last else None
        pairs.append({"prompt": row["prompt"], "expected": row["expected"], "after": row["answer"],
                      "after_right": row.get("accuracy"), "before": old["answer"] if old else None,
                      "before_right": old.get("accuracy") if old else None})  # fmt: skip
    pairs.sort(key=lambda p: (p["after_right"] or 0) - (p["before_right"] or 0), reverse=True)
    half = SHOWN_SAMPLES // 2  # gains first, then what is still wrong: both are worth a look
    wrong = [p for p in pairs[half:] if not p["after_right"]][: SHOWN_SAMPLES - half]
    rest = [p for p in pairs[half:] if p not in wrong]
    return (pairs[:half] + wrong + rest)[:SHOWN_SAMPLES]


def _pictures(folder: RunFolder) -> list[dict[str, str]]:
    """Return the pictures of drawn arrays, of the first and the last evaluation of the last stage that has some."""
    for stage in reversed(stages(folder)):
        found: dict[str, list[Path]] = {}
        for path in sorted((stage.path / "samples").glob("*-step-*.png")):
            found.setdefault(path.stem.rpartition("-step-")[0], []).append(path)
        if found:
            chosen = [path for paths in found.values() for path in dict.fromkeys((paths[0], paths[-1]))]
            return [{"title": _drawn_title(path), "data": b64encode(path.read_bytes()).decode()} for path in chosen]
    return []


def _drawn_title(path: Path) -> str:
    what, _, step = path.stem.rpartition("-step-")
    solver, _, calls = what.rpartition("-")
    return f"step {int(step)}: {solver}, {calls} evaluation{'' if calls == '1' else 's'} each"


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
