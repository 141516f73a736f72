"""Run folders and comparisons written by hand, and pages opened in a browser."""

from __future__ import annotations

import html
import json
import math
import random
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--v=0", "--dump-dom", "--virtual-time-budget=5000",
)  # fmt: skip
FLOPS_PER_TOKEN = 2.4e6
# What a page in a frame says: its width against the window's, how many charts it drew, what a script of the test finds.
PROBE = """<script>addEventListener('load', () => setTimeout(() => {
  const found = (() => { %s })(), root = document.documentElement;
  parent.postMessage({ found: found ?? null, page: root.scrollWidth, window: innerWidth,
    plots: document.querySelectorAll('.plot').length,
    drawn: [...document.querySelectorAll('.plot')].filter(plot => plot.querySelector('.scatterlayer .trace')).length,
  }, '*');
}, 300));</script>"""
OUTER = """<!doctype html>%s<pre id="said">[]</pre>
<script>const all = []; addEventListener('message', event => {
  all.push(event.data); all.sort((a, b) => b.window - a.window);
  document.getElementById('said').textContent = JSON.stringify(all);
});</script>"""
FRAME = '<iframe src="%s" style="width:%dpx;height:900px;border:0"></iframe>'


class Resources(HTMLParser):
    """Collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        for name in ("src", "href", "data", "srcset", "poster"):
            if given.get(name) and not (tag == "a" and name == "href"):
                self.loaded.append(str(given[name]))


def loaded_from_elsewhere(page: Path) -> list[str]:
    """Return what a page would fetch: sources of elements, imports and addresses in styles."""
    text, found = page.read_text(), Resources()
    found.feed(text)
    styles = "".join(re.findall(r"<style.*?</style>", text, re.DOTALL))
    return [source for source in found.loaded if not source.startswith(("#", "data:"))] + re.findall(
        r"@import|url\((?!['\"]?data:)", styles
    )


def opened(page: Path, folder: Path) -> tuple[str, str]:
    """Return the document that a browser makes of a page, and what it logs."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("there is no Chromium here")
    command = [browser, *QUIET, f"--user-data-dir={folder}", "--window-size=1500,1000", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout, done.stderr


def probed(
    page: Path, folder: Path, act: str = "", view: str = "", widths: Sequence[int] = (1400, 400)
) -> list[dict[str, Any]]:
    """Open a page in frames, which may be narrower than a window can be; return what it says in each, the widest first.

    Args:
        page: the page.
        folder: where the browser may write.
        act: statements that run in the page when it is drawn; `found` is what they return.
        view: the address's part after "#".
        widths: of the frames, in pixels.
    """
    folder.mkdir(parents=True)
    inner, outer = folder / "inner.html", folder / "outer.html"
    inner.write_text(page.read_text().replace("</body>", PROBE % act + "</body>"))
    outer.write_text(OUTER % "".join(FRAME % (html.escape(f"inner.html#{view}"), width) for width in widths))
    dom, log = opened(outer, folder / "browser")
    said = json.loads(html.unescape(dom.split('<pre id="said">')[1].split("</pre>")[0]))
    assert [one["window"] for one in said] == sorted(widths, reverse=True), log
    lines = [line for line in log.splitlines() if "CONSOLE" in line or "Uncaught" in line]
    return [{**one, "log": lines} for one in said]


def figures(page: Path) -> dict[str, Any]:
    """Return the charts in a page's script by id; what no JSON reader takes is an error."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = re.search(r"^const figures = (.*);$", page.read_text(), re.MULTILINE)
    assert found
    return {chart["id"]: chart for chart in json.loads(found.group(1), parse_constant=refuse)}


def shown(dom: str) -> str:
    """Return the text of a document without styles and scripts, blanks folded."""
    bare = re.sub(r"<[^>]*>", " ", re.sub(r"<(script|style).*?</\1>", " ", dom, flags=re.DOTALL))
    return html.unescape(re.sub(r"\s+", " ", bare))


def write_run(folder: Path, *, steps: int = 60, seed: int = 0, goal: float = 0.8, rate: float = 0.002,
              status: str = "finished", recipe: Mapping[str, Any] | None = None, data: str = "abc",
              general: bool = True) -> dict[str, float]:  # fmt: skip
    """Write the folder of a run that nothing trained, and return its final figures.

    Args:
        folder: where.
        steps: how many.
        seed: of the noise.
        goal: the accuracy it comes to.
        rate: the learning rate.
        status: "finished", "running" (stops at half) or "failed" (stops at a third, its last loss not finite).
        recipe: fields beside the usual ones.
        data: fingerprint of the training data.
        general: whether it is evaluated for forgetting.
    """
    folder.mkdir(parents=True)
    noise = random.Random(seed)
    done = {"finished": steps, "running": steps // 2, "failed": steps // 3}[status]
    rows, evaluations, answers = [], [], []
    for step in range(done + 1):
        share = 1 - math.exp(-4 * step / steps)
        if step:
            loss = 0.35 + 2.4 * (1 - goal * share) + noise.gauss(0, 0.12)
            rows.append({"step": step, "loss": loss, "lr": rate * (1 - step / steps), "grad_norm": 0.4 + noise.random(),
                         "tokens": 2000 + noise.randrange(90), "units": 900, "seconds": 0.1 + noise.random() / 50,
                         "memory": int(3e8 + 1e7 * seed)})  # fmt: skip
        if step % (steps // 6) == 0:
            row = {"step": step, "loss": 2.6 - 2 * goal * share + noise.gauss(0, 0.03),
                   "accuracy": min(1.0, max(0.0, goal * share + noise.gauss(0, 0.03)))}  # fmt: skip
            evaluations.append({**row, "general_loss": 2.1 + 0.4 * share * goal} if general else row)
            for number in range(20):
                right = noise.random() < goal * share
                answers.append({"step": step, "where": f"sort:{number}", "prompt": f"Sort {9 - number % 9} 4 {number}:",
                                "expected": f"4 {number}", "answer": f"4 {number}" if right else f"{number} ?",
                                "stopped": True, "accuracy": float(right)})  # fmt: skip
    if status == "failed":
        rows[-1]["loss"] = math.nan
    for name, lines in (("metrics", rows), ("evaluations", evaluations), ("samples", answers)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    trained = _describe(folder, {"steps": steps, "seed": seed, "out": str(folder),
                                 "optimizer": {"name": "adamw", "lr": rate}, **(recipe or {})}, data)  # fmt: skip
    tokens, seconds = sum(row["tokens"] for row in rows), sum(row["seconds"] for row in rows)
    last = evaluations[-1]
    final = {**{k: v for k, v in last.items() if k != "step"}, "training_seconds": seconds, "tokens": tokens,
             "peak_memory": max(row["memory"] for row in rows), "tokens_per_second": tokens / seconds,
             "trained": trained, "flops": tokens * FLOPS_PER_TOKEN}  # fmt: skip
    if general:
        final["forgetting"] = last["general_loss"] - evaluations[0]["general_loss"]
    if status == "finished":
        before, after = ({k: v for k, v in evaluations[at].items() if k != "step"} for at in (0, -1))
        (folder / "result.json").write_text(json.dumps({
            "run": str(folder), "status": "finished", "reason": "", "steps": done, "tokens": tokens,
            "training_seconds": seconds, "peak_memory": final["peak_memory"], "before": before, "after": after,
        }))  # fmt: skip
    return final


def _describe(folder: Path, fields: Mapping[str, Any], data: str) -> int:
    """Write a run's recipe and manifest; return how many parameters it trains."""
    usual = {"model": "base", "data": {"name": "chains", "skills": ["sort"]}, "adapter": "full", "objective": "sft"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**usual, **fields}, sort_keys=False))
    trained = 1_212_416 if fields.get("adapter", "full") == "full" else 49_152
    record = {split: {"text": f"chains {data}: 4,000 samples", "fingerprint": f"{data} {split}"}
              for split in ("train", "eval")}  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({
        "versions": {"hone": "0.1.0", "torch": "2.13"}, "platform": "Linux", "device": "2 CPU threads",
        "seed": fields["seed"], "data": record, "sources": {},
        "model": {"base": "base", "sha256": "0" * 64, "parameters": 1_212_416, "trained": trained, "packed": True},
    }))  # fmt: skip
    return trained


def summed(values: Sequence[float | None]) -> dict[str, float | None]:
    """Return a mean and an interval of two standard errors, None where there are too few values."""
    seen = [value for value in values if value is not None]
    if not seen:
        return {"mean": None, "low": None, "high": None}
    average = sum(seen) / len(seen)
    if len(seen) < 2:
        return {"mean": average, "low": None, "high": None}
    wide = 2 * math.sqrt(sum((v - average) ** 2 for v in seen) / (len(seen) - 1) / len(seen))
    return {"mean": average, "low": average - wide, "high": average + wide}


def write_comparison_folder(home: Path, sides: Mapping[str, Mapping[str, Any]], *, seeds: int = 3,
                            general: str = "pydocs", tune: Mapping[str, Sequence[Any]] | None = None,
                            metric: str = "accuracy") -> Path:  # fmt: skip
    """Write the folder of a comparison, its cells' run folders with it; return it.

    Args:
        home: where.
        sides: by label, in rank order, the first `baseline` key marking the baseline: settings, goal, status by seed.
        seeds: how many.
        general: what forgetting is measured on.
        tune: the options that are tuned, with their values.
        metric: what is compared.
    """
    variants = [_side(home, at, label, side, seeds, general, tune or {}) for at, (label, side) in
                enumerate(sides.items())]  # fmt: skip
    base = next((v for v in variants if sides[v["label"]].get("baseline")), variants[0])
    for variant in variants:
        pairs = zip(variant["values"].get(metric, []), base["values"].get(metric, []), strict=False)
        each = [own - other for own, other in pairs if own is not None and other is not None]
        if variant is not base and len(each) > 1:
            gap = summed(each)
            verdict = "no difference shown" if gap["low"] < 0 < gap["high"] else (
                "better" if gap["mean"] > 0 else "worse")  # fmt: skip
            p = {"no difference shown": 0.4}.get(verdict, 0.004)
            variant["difference"] = {**gap, "p": p, "adjusted": 2 * p, "verdict": verdict}
    home.mkdir(parents=True, exist_ok=True)
    (home / "result.json").write_text(json.dumps({
        "name": home.name, "recipe": "quickstart", "command": "hone compare quickstart --vary adapter=lora,full",
        "metric": metric, "better": "higher", "level": 0.95, "correction": "holm",
        "budget": {"kind": "steps", "amount": 60}, "seeds": list(range(seeds)), "baseline": base["label"],
        "tune": tune or {}, "general": general, "variants": variants, "seconds": 512.0,
        "machine": "AMD EPYC, 2 cores", "versions": {"hone": "0.1.0", "torch": "2.13"},
    }))  # fmt: skip
    return home


def _side(home: Path, at: int, label: str, side: Mapping[str, Any], seeds: int, general: str,
          tune: Mapping[str, Sequence[Any]]) -> dict[str, Any]:  # fmt: skip
    statuses = side.get("statuses", ["finished"] * seeds)
    values: dict[str, list[float | None]] = {}
    cells, failures = {}, []
    for seed, status in enumerate(statuses):
        if status == "missing":
            continue
        folder = home / f"cell-{at}-{seed}"
        found = write_run(folder, seed=seed + 10 * at, goal=side["goal"], rate=side.get("rate", 0.002), status=status,
                          recipe=side.get("recipe", side["settings"]), general=bool(general))  # fmt: skip
        cells[str(seed)] = str(folder)
        if status == "finished":
            for name, value in found.items():
                values.setdefault(name, [None] * seeds)[seed] = value
        if status == "failed":
            failures.append({"seed": seed, "reason": "step 20: the loss is not finite (nan)"})
    kinds = set(statuses)
    status = "running" if kinds & {"running", "missing"} else "failed" if kinds == {"failed"} else (
        "partial" if "failed" in kinds else "finished")  # fmt: skip
    name, tried = next(iter(tune.items()), ("", []))
    trials = [{"settings": {name: value}, "value": side["goal"] - 0.1 * abs(at % 2 - number), "reason": ""}
              for number, value in enumerate(tried)]  # fmt: skip
    best = max(trials, key=lambda trial: trial["value"], default=None)
    edge = best is not None and best["settings"][name] in (tried[0], tried[-1])
    return {
        "label": label, "settings": dict(side["settings"]), "status": status,
        "reason": side.get("reason", failures[0]["reason"] if status == "failed" else ""), "steps": 60,
        "tuned": best["settings"] if best else {}, "trials": trials, "values": values,
        "note": f"the best {name} lies at the end of those tried: {best['settings'][name]}" if best and edge else "",
        "summary": {name: summed(some) for name, some in values.items()}, "difference": None, "failures": failures,
        "cells": cells,
    }  # fmt: skip
