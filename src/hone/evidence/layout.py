"""What every page shares: rendering a template, figures in units for people, and what differs between recipes."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from plotly.offline import get_plotlyjs

from hone.diffusion.saved import denoiser_folder
from hone.engine.progress import clock

NONE = "\N{EN DASH}"  # what stands where there is no figure
SHARE = "accuracy"  # the metric that is shown in percent
_WORDS = {
    "training_seconds": "training time", "peak_memory": "peak memory", "trained": "trained parameters",
    "flops": "FLOPs", "tokens_per_second": "tokens/s", "general_loss": "general loss",
}  # fmt: skip


def render(template: str, **values: Any) -> str:
    """Return a page: one HTML file that opens offline, the plotting library being inside.

    Args:
        template: name of a template of this folder that extends page.html.
        values: what it shows; `figures` are drawn by the script.
    """
    drawn = {"figures": plain(values.pop("figures")), "plotly": _plotly()}
    return _environment().get_template(template).render(generator=generator(template), **drawn, **values)


_plotly = cache(get_plotlyjs)  # 4.7 MB, read once


@cache
def _environment() -> Environment:
    """Return what compiles the templates, once: that takes 0.2 s, and every stage and comparison writes pages."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def generator(template: str) -> str:
    """Return the mark that a page of a template carries in its head."""
    return f"hone {template.removesuffix('.html')} page"


def draws(run: Path | str) -> bool:
    """Return whether a run's model draws arrays, which takes no prompts.

    Args:
        run: its folder.
    """
    return denoiser_folder(Path(run) / "model") is not None or any(Path(run).glob("**/samples/*-step-*.png"))


def sampling(run: str) -> str:
    """Return the command that samples from a run.

    Args:
        run: its folder.
    """
    return f"hone sample {shlex.quote(run)} " + ("--samples 64" if draws(run) else "--prompt '...'")


def plain(value: Any) -> Any:
    """Return a value as JSON can say it: a number that is not finite becomes None."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def finite(value: Any) -> bool:
    """Return whether a value is a number that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def title(metric: str) -> str:
    """Return a metric's name in words."""
    return _WORDS.get(metric, metric.replace("_", " "))


def heading(metric: str) -> str:
    """Return what a chart or column of an evaluated metric is called."""
    return f"Held-out {title(metric)}" if metric != "general_loss" else "General loss"


def quantity(metric: str, value: Any) -> str:
    """Return a metric's value in units for people, e.g. 312 MiB, 1.21M, 3 min 20 s, 79.0% or 2.346.

    Args:
        metric: its name.
        value: its value; bytes for memory, seconds for times.
    """
    if not finite(value):
        return NONE if value is None else str(value)
    if metric == SHARE:
        return f"{value:.1%}"
    if metric == "training_seconds":
        return clock(value) if abs(value) >= 10 else f"{value:.1f} s"
    if metric == "peak_memory":
        return f"{value / 2**20:,.0f} MiB" if abs(value) < 10 * 2**30 else f"{value / 2**30:,.1f} GiB"
    if metric in ("trained", "tokens", "flops", "tokens_per_second", "steps"):
        return scaled(value)
    return number(value)


def gap(metric: str, value: Any, sign: str = "") -> str:
    """Return a difference of two values of a metric; of shares in points.

    Args:
        metric: its name.
        value: the difference.
        sign: "+" writes the sign of a positive one too.
    """
    return f"{100 * value:{sign}.1f}" if metric == SHARE else f"{'+' if sign and value > 0 else ''}{number(value)}"


def number(value: float) -> str:
    """Return a number with three decimals, or three digits where those would show none or too many."""
    if value and not 5e-3 <= abs(value) < 1000:
        return f"{value:.2g}" if abs(value) < 1 else scaled(value)
    return f"{value:.3f}"


def scaled(value: float) -> str:
    """Return a number with three digits and k, M, G, T, P or E for a power of a thousand."""
    power = 0
    while abs(value) >= 999.5 and power < 6:
        value, power = value / 1000, power + 1
    digits = 0 if power == 0 else max(0, 2 - len(str(int(abs(value)))) + 1)
    return f"{value:.{digits}f}{['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}"


def share(p: Any) -> str:
    """Return a p-value, never as a plain 0."""
    if not finite(p):
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def said(value: Any) -> str:
    """Return a setting's value as one writes it in a recipe."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def together(settings: Mapping[str, Any]) -> str:
    """Return settings as one writes them on the command line."""
    return " ".join(f"{name}={said(value)}" for name, value in settings.items())


def flat(value: Any, at: str = "") -> dict[str, str]:
    """Return a recipe's settings by dotted name; a part's name stands for the part: adapter=lora, adapter.rank=8.

    Args:
        value: a recipe, or a value within one.
        at: the dotted name of that value.
    """
    if isinstance(value, Mapping) and value:
        found: dict[str, str] = {}
        for key, inner in value.items():
            found |= flat(inner, at if at and key == "name" else f"{at}.{key}".lstrip("."))
        return found
    if isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        return {k: v for index, item in enumerate(value) for k, v in flat(item, f"{at}.{index}").items()}
    return {at: said(value)}


@dataclass(frozen=True)
class Settings:
    """What several recipes say.

    Args:
        differing: values by dotted name, one per recipe, None where a recipe says nothing.
        same: the values that all of them share.
    """

    differing: dict[str, list[str | None]]
    same: dict[str, str]


def compared(recipes: Sequence[Mapping[str, Any]], ignored: Sequence[str] = ()) -> Settings:
    """Return what differs between recipes and what does not, in the order in which the recipes say it.

    Args:
        recipes: plain recipes.
        ignored: top-level fields to leave out.
    """
    all_flat = [flat({key: value for key, value in recipe.items() if key not in ignored}) for recipe in recipes]
    found = list(dict.fromkeys(name for one in all_flat for name in one))
    fields = list(dict.fromkeys(name.split(".")[0] for name in found))
    found.sort(key=lambda name: fields.index(name.split(".")[0]))  # the options of a part stand together
    names = {name: [one.get(name) for one in all_flat] for name in found}
    return Settings(
        {name: values for name, values in names.items() if len(set(values)) > 1},
        {name: values[0] or "" for name, values in names.items() if len(set(values)) == 1},
    )


def cell(text: str, note: str = "", tone: str = "", badge: bool = False) -> dict[str, Any]:
    """Return a cell of a table that has a row for each variant or run.

    Args:
        text: the figure.
        note: what stands below it in small letters.
        tone: "good", "bad", "warn" or "soft" colours it.
        badge: whether it stands in a badge.
    """
    return {"text": text, "note": note, "tone": tone, "badge": badge, "known": text != NONE}


def column(head: str, cells: Sequence[Mapping[str, Any]], text: bool = False) -> dict[str, Any]:
    """Return a column of such a table.

    Args:
        head: its heading.
        cells: one a row.
        text: whether it holds sentences, which wrap, rather than figures.
    """
    return {"head": head, "cells": list(cells), "text": text, "known": any(one["known"] for one in cells)}


def short(label: str, most: int = 40) -> str:
    """Return a label cut to a length, for places that do not wrap."""
    return label if len(label) <= most else label[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"
