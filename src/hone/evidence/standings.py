"""A comparison as rows of text: the ranked variants, what differs, what each cost, and what failed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from hone.evidence.layout import SHARE, quantity, title

COSTS = ("training_seconds", "peak_memory", "trained", "flops", "forgetting")
LONGEST = 160  # characters of a reason; the log has the rest


class Standings(NamedTuple):
    """What a comparison found, in words.

    Args:
        head: what was compared, under which budget.
        quality: a row of headings, then variant, metric, its interval and the difference from the baseline.
        costs: a row of headings, then variant and what it cost.
        notes: failures, and what else is said of variants.
    """

    head: str
    quality: list[list[str]]
    costs: list[list[str]]
    notes: list[str]


def standings(result: Mapping[str, Any]) -> Standings:
    """Return the rows of a comparison, the best variant first.

    Args:
        result: what `compare` returned, or its file holds.
    """
    metric, rows = result["metric"], result["variants"]
    measured = [row for row in rows if metric in row["summary"]]
    percent = metric == SHARE
    amount = f"{result['budget']['kind']}={result['budget']['amount']:,g} each"
    various = len({row["steps"] for row in rows} - {None}) > 1 or not result["budget"]["amount"]
    if various and result["budget"]["kind"] == "steps":
        amount = "as many steps as each recipe says"
    head = f"{result['name']}: {metric} ({result['better']} is better), {amount}, seeds {result['seeds']}"
    quality = [["variant", metric, "95% interval", "against the baseline"]]
    quality += [
        [row["label"], _number(row["summary"][metric]["mean"], percent), _span(row["summary"][metric], percent),
         _against(row, result, percent)] for row in measured
    ]  # fmt: skip
    cost = [["cost", *(title(name) for name in COSTS)]]
    cost += [
        [row["label"], *(quantity(name, row["summary"].get(name, {}).get("mean")) for name in COSTS)]
        for row in measured
    ]
    others = [row for row in rows if row not in measured]
    notes = [": ".join(filter(None, (r["label"], _left(r, metric), short(r["reason"])))) for r in others]
    notes += [f"note: {row['label']}: {row['note']}" for row in rows if row["note"]]
    notes += [f"note: {row['label']}: {short(row['reason'])}" for row in measured if row["reason"]]
    return Standings(head, quality, cost, notes)


def _left(row: Mapping[str, Any], metric: str) -> str:
    """Return how a variant stands that has no figure to be ranked by."""
    kind, at, _ = metric.partition("@")
    own = [name for name in row["summary"] if at and name.startswith(f"{kind}@")]
    if row["status"] != "finished" or not own:
        return str(row["status"])
    return f"finished with {' and '.join(own)}, without {metric}; to compare them give all the same solvers"


def short(reason: str) -> str:
    """Return a reason on one line of a terminal."""
    text = " ".join(reason.split())
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def _number(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else f"{value:.4g}"


def _span(found: Mapping[str, Any], percent: bool) -> str:
    if found["low"] is None:
        return "-"
    return f"{_number(found['low'], percent)} to {_number(found['high'], percent)}"


def _against(row: Mapping[str, Any], result: Mapping[str, Any], percent: bool) -> str:
    if row["label"] == result["baseline"]:
        return "the baseline"
    difference = row["difference"]
    if difference is None or difference["low"] is None:
        return "-"
    shown = f"{difference['mean'] * (100 if percent else 1):+.3g}{' points' if percent else ''}"
    return f"{shown}: {difference['verdict']} (p {difference['adjusted']:.2g})"
