"""The page of several runs side by side: figures, curves, what their recipes say differently, and their answers."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hone.engine.checkpoint import disk_error
from hone.engine.folder import RunFolder
from hone.errors import HoneError
from hone.evidence.charts import (
    AXES,
    Clock,
    Curve,
    Logs,
    axes,
    by_axis,
    figure,
    line,
    read_logs,
    stages,
    steep,
    ticks,
    trained,
)
from hone.evidence.layout import (
    NONE,
    cell,
    column,
    compared,
    finite,
    generator,
    heading,
    quantity,
    render,
    title,
)
from hone.figures import lower_is_better
from hone.files import write_whole
from hone.recipe import read_yaml

SHOWN_ANSWERS = 12
UNFINISHED = "not finished"  # it is still running, or something has ended it
TONES = {"finished": "good", "interrupted": "warn", UNFINISHED: "warn"}
TEMPLATE = "runs.html"


@dataclass(frozen=True)
class Shown:
    """A run on the page.

    Args:
        label: what it is called there.
        folder: its run folder.
        logs: what it has written so far.
        result: its result, empty while it is running.
        manifest: what it was made of, empty before it begins.
        recipe: its resolved recipe.
    """

    label: str
    folder: RunFolder
    logs: Logs
    result: dict[str, Any]
    manifest: dict[str, Any]
    recipe: dict[str, Any]


def write_runs(paths: Sequence[Path], out: Path) -> Path:
    """Write one page on which runs stand side by side.

    Args:
        paths: run folders; one that is given twice is shown once.
        out: the page's file; one that lies there is replaced only if it is such a page.

    Returns:
        The page. It opens offline: the plotting library is inside.

    Raises:
        HoneError: a path is no run folder, or `out` holds something else.
    """
    if not paths:
        raise HoneError("there is no run to show; give one or more run folders")
    out = Path(out).expanduser()
    _may_write(out)
    folders = list({RunFolder.open(path).path.resolve(): RunFolder.open(path) for path in paths}.values())
    runs = [_read(label, folder) for label, folder in zip(labels([_home(f) for f in folders]), folders, strict=True)]
    page = render(TEMPLATE, **contents(runs))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, page.encode())
    except OSError as error:
        raise disk_error(error, out) from error
    return out


def _home(folder: RunFolder) -> Path:
    """Return the folder that names a run: in a comparison, that of its cell, since all runs there are called alike."""
    return folder.path.parent if (folder.path.parent / "cell.json").is_file() else folder.path


def _may_write(out: Path) -> None:
    """Refuse to replace anything but a page that `write_runs` has made.

    Raises:
        HoneError: names what lies there.
    """
    if out.is_dir():
        raise HoneError(f"'{out}' is a folder; give the name of a file in it, e.g. {out / 'runs.html'}")
    if not out.exists():
        return
    with out.open("rb") as file:
        start = file.read(2000)  # the mark stands in the page's head
    if f'<meta name="generator" content="{generator(TEMPLATE)}">'.encode() not in start:
        raise HoneError(f"'{out}' exists and is not a page of runs side by side; nothing else is ever overwritten. "
                        "Give another file, or move that one away")  # fmt: skip


def labels(paths: Sequence[Path]) -> list[str]:
    """Return a name for each of several different folders: its own, with as many parents as tell it from the others."""
    parts = [path.absolute().parts for path in paths]
    resolved = [part[-1] for part in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        twice = {label for label in resolved if resolved.count(label) > 1}
        resolved = [str(Path(*part[-depth:])) if label in twice else label
                    for part, label in zip(parts, resolved, strict=True)]  # fmt: skip
    return resolved


def _read(label: str, folder: RunFolder) -> Shown:
    recipe, _ = read_yaml(folder.path / "recipe.yaml")
    manifest = stages(folder)[0].json("manifest.json")
    return Shown(label, folder, read_logs(folder), folder.json("result.json"), manifest, recipe)


def contents(runs: Sequence[Shown]) -> dict[str, Any]:
    """Return what the page shows."""
    figures = _charts(runs)
    return {
        "name": f"{len(runs)} runs side by side" if len(runs) > 1 else runs[0].label,
        "labels": [run.label for run in runs], "columns": _columns(runs), "remarks": [_remarks(run) for run in runs],
        "warnings": _warnings(runs), "figures": figures,
        "axes": {axis: AXES[axis] for axis in axes([trace for chart in figures for trace in chart["traces"]])},
        "settings": compared([run.recipe for run in runs], ("out", "name", "about")), "answers": answers(runs),
        "next": [f"{command} {shlex.quote(str(run.folder.path))}" for run in runs for command in _commands(run)],
    }  # fmt: skip


def _commands(run: Shown) -> list[str]:
    finished = run.result.get("status") == "finished"
    return ["hone sample"] if finished else ["hone resume"] if run.result else []


def _remarks(run: Shown) -> list[tuple[str, str]]:
    found = [("soft", str(run.folder.path))]
    return found + ([("warn", run.result["reason"])] if run.result.get("reason") else [])


def _columns(runs: Sequence[Shown]) -> list[dict[str, Any]]:
    made = [column("status", [_status(run) for run in runs])]
    for name in dict.fromkeys(name for run in runs for name in _ends(run)):
        made.append(column(heading(name).lower(), [_change(run, name) for run in runs]))
    spent = [_spent(run) for run in runs]
    for name in ("steps", "tokens", "training_seconds", "tokens_per_second", "peak_memory", "trained"):
        made.append(column(title(name), [_figure(name, one.get(name)) for one in spent]))
    made.append(column("data", [_data(run) for run in runs], text=True))
    return [found for found in made if found["known"]]


def _status(run: Shown) -> dict[str, Any]:
    status = run.result.get("status", UNFINISHED)
    return cell(status, "", TONES.get(status, "bad"), badge=True)


def _figure(name: str, value: Any) -> dict[str, Any]:
    return cell(f"{value:,}" if name == "steps" and finite(value) else quantity(name, value))


def _ends(run: Shown) -> dict[str, tuple[Any, Any]]:
    """Return the first and the last value of every metric of a run, its loss first.

    A finished run says itself what stood before: of stages with different objectives, the losses do not compare.
    """
    before, after = run.result.get("before"), run.result.get("after")
    if before and after and run.result.get("status") == "finished":
        ends = {name: (before.get(name), value) for name, value in after.items()}
        return dict(sorted(ends.items(), key=lambda item: item[0] != "loss"))
    found: dict[str, list[Any]] = {}
    for row in run.logs.evaluations:
        for name, value in row.items():
            found.setdefault(name, []).append(value)
    found.pop("step", None)
    return {name: (values[0], values[-1]) for name, values in sorted(found.items(), key=lambda item: item[0] != "loss")}


def _change(run: Shown, name: str) -> dict[str, Any]:
    if name not in (ends := _ends(run)):
        return cell(NONE)
    before, after = ends[name]
    return cell(quantity(name, after), f"{quantity(name, before)} before" if len(run.logs.evaluations) > 1 else "")


def _spent(run: Shown) -> dict[str, Any]:
    """Return what a run has cost so far."""
    rows = run.logs.rows
    if not rows:
        return {"trained": run.manifest.get("model", {}).get("trained")}
    tokens, seconds = (sum(row.get(key) or 0 for row in rows) for key in ("tokens", "seconds"))
    return {
        "steps": len(rows), "tokens": tokens, "training_seconds": seconds,
        "tokens_per_second": tokens / seconds if seconds else None,
        "peak_memory": max(row.get("memory") or 0 for row in rows) or None,
        "trained": run.manifest.get("model", {}).get("trained"),
    }  # fmt: skip


def _data(run: Shown) -> dict[str, Any]:
    return cell(run.manifest.get("data", {}).get("train", {}).get("text") or NONE)


def _warnings(runs: Sequence[Shown]) -> list[str]:
    """Return what makes the runs hard to compare: other data to train or to evaluate on."""
    found = []
    for split, why in (
        ("train", "The runs trained on different data; a difference between them may come from that."),
        ("eval", "The runs were evaluated on different data, so their held-out figures do not compare."),
    ):
        prints = {run.manifest.get("data", {}).get(split, {}).get("fingerprint") for run in runs} - {None}
        found += [why] if len(prints) > 1 else []
    return found


def _charts(runs: Sequence[Shown]) -> list[dict[str, Any]]:
    """Return the overlaid curves: losses, every metric, learning rate, gradient norm, speed."""
    clocks = [Clock(run.logs.rows) for run in runs]
    longest = max(len(run.logs.rows) for run in runs)

    def steps(key: str, smoothed: bool) -> list[Curve | None]:
        points = [trained(run.logs.rows, key, smoothed, longest) for run in runs]
        return [clock.curve(own) for clock, own in zip(clocks, points, strict=True)]

    def held(key: str) -> list[Curve | None]:
        points = [{e["step"]: e.get(key) for e in run.logs.evaluations} for run in runs]
        return [clock.curve(own) for clock, own in zip(clocks, points, strict=True)]

    names = list(dict.fromkeys(name for run in runs for name in _ends(run)))
    drawn = [("training_loss", "Training loss, smoothed", steps("loss", True), "curve")]
    drawn += [(name, heading(name), held(name), "points") for name in names]
    drawn += [
        ("lr", "Learning rate", steps("lr", False), "detail"),
        ("grad_norm", "Gradient norm before clipping, smoothed", steps("grad_norm", True), "detail"),
        ("speed", "Tokens or arrays per second, smoothed", steps("speed", True), "detail"),
    ]  # fmt: skip
    charts = []
    for name, words, curves, role in drawn:
        traces = [line(name, curve, role, f"{at + 1} {run.label}", at)
                  for at, (run, curve) in enumerate(zip(runs, curves, strict=True)) if curve is not None]  # fmt: skip
        axis = steep([value for trace in traces for value in trace["y"]]) if lower_is_better(name) else ticks(name)
        charts += [figure(name, words, traces, control="x", by=by_axis(axes(traces)), yaxis=axis)] if traces else []
    if charts:
        charts[0]["wide"] = len(charts) % 2 == 1
    return charts


def answers(runs: Sequence[Shown]) -> list[dict[str, Any]]:
    """Return prompts that all runs answered at their end, with the answers: those first on which the runs disagree."""
    last = [_last_answers(run) for run in runs]
    shared = [where for where in last[0] if all(where in other for other in last[1:])]
    if len(runs) < 2:
        shared = list(last[0])
    found = []
    for where in shared:
        rows = [one[where] for one in last]
        rights = [row.get("accuracy") for row in rows]
        rank = (len({*rights}) < 2, len({row["answer"].strip() for row in rows}) < 2)
        given = [{"text": row["answer"], "right": right} for row, right in zip(rows, rights, strict=True)]
        found.append((rank, {"prompt": rows[0]["prompt"], "expected": rows[0]["expected"], "answers": given}))
    found.sort(key=lambda pair: pair[0])
    return [pair[1] for pair in found if len(runs) < 2 or pair[0] != (True, True)][:SHOWN_ANSWERS]


def _last_answers(run: Shown) -> Mapping[tuple[str, str], dict[str, Any]]:
    """Return the answers of the last evaluation by place and prompt; other data may use the same places."""
    rows = run.logs.answers
    return {(row["where"], row["prompt"]): row for row in rows if row["step"] == rows[-1]["step"]}
