"""The stored results of claims: which papers' statements were put to the test, on what, and what came of it.

They are JSON files that ship with the package, written by `hone verify` and read here without importing torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hone.errors import HoneError

RESULTS = Path(__file__).parent / "results"
VERDICTS = ("holds", "not at this scale", "contradicted", "failed")  # from best to worst
_NEEDED = ("kind", "name", "claim", "says", "verdict", "source")


@dataclass(frozen=True)
class Evidence:
    """The stored result of one claim.

    Args:
        kind: kind of the part that the claim is about, or "recipe".
        name: name of the part.
        claim: name of the claim.
        says: what is claimed, in a sentence.
        verdict: one of `VERDICTS`.
        finding: what was found, in a sentence or two.
        path: the file.
        record: all that the file holds.
    """

    kind: str
    name: str
    claim: str
    says: str
    verdict: str
    finding: str
    path: Path
    record: dict[str, Any] = field(compare=False, repr=False)

    @cached_property
    def stale(self) -> bool:
        """Whether the code of the part or of the claim has changed since; worked out when first asked for."""
        from hone.evidence import source

        return source.current(self.kind, self.name, self.claim) != self.record["source"]

    def plain(self) -> dict[str, Any]:
        """Return the result as the catalogue lists it."""
        shown = {"claim": self.claim, "says": self.says, "verdict": self.verdict, "stale": self.stale}
        return {**shown, "file": str(self.path)}

    def mark(self) -> str:
        """Return the verdict with "(stale)" where the code has changed since."""
        return self.verdict + (" (stale)" if self.stale else "")

    def seeds(self) -> list[int]:
        """Return the seeds that both sides were run with."""
        return list(self.record.get("seeds") or [])

    def checks(self) -> list[tuple[str, str, str, str]]:
        """Return (metric, what is expected of method - baseline, the difference found, verdict) of every check."""
        return [
            (check["metric"], check["expected"], _difference(check), check["verdict"])
            for check in self.record.get("checks") or []
        ]

    def figures(self) -> list[tuple[str, str, list[str]]]:
        """Return (metric, side, one value per seed) for the checked metrics; for all where nothing was checked."""
        sides = list((self.record.get("sides") or {}).values())
        checked = [check["metric"] for check in self.record.get("checks") or []]
        metrics = dict.fromkeys(checked or [metric for side in sides for metric in side["values"]])
        return [
            (metric, side["label"], [number(value) for value in side["values"][metric]])
            for metric in metrics
            for side in sides
            if metric in side["values"]
        ]

    def settings(self) -> list[tuple[str, str]]:
        """Return (side, its settings as a recipe's overrides) of the baseline and the method."""
        return [
            (side["label"], _settings(side.get("settings") or {}, side.get("tuned") or {}))
            for side in (self.record.get("sides") or {}).values()
        ]

    def circumstances(self) -> str:
        """Return the date, the machine, the time it took and the versions that matter most."""
        record = self.record
        seconds = f"{record['seconds']:.0f} s" if record.get("seconds") is not None else ""
        known = record.get("versions") or {}
        versions = [f"{name} {known[name]}" for name in ("hone", "torch", "transformers") if name in known]
        again = record.get("rechecked")
        looked = f"seed {again['seed']} gave the same with later code on {again['date']}" if again else ""
        return ", ".join(filter(None, [record.get("date"), record.get("machine"), seconds, *versions, looked]))

    def text(self) -> list[str]:
        """Return the result as lines for a terminal."""
        lines = [f"{self.claim}: {self.mark()}", f"  claimed: {self.says}"]
        lines += [f"  task: {self.record['task']}"] if self.record.get("task") else []
        for metric, expected, found, verdict in self.checks():
            lines.append(f"  {metric}: expected {expected}; difference found {found}: {verdict}")
        if rows := self.figures():
            head = ["metric", "side", *(f"seed {seed}" for seed in self.seeds())]
            lines += [f"  {line}" for line in columns([head, *([metric, side, *v] for metric, side, v in rows)])]
        said = (("finding", self.finding), (self.trouble(), self.reason()))
        lines += [f"  {label}: {text}" for label, text in said if text]
        lines += [f"  settings of {label}: {text}" for label, text in self.settings()]
        return [*lines, f"  run: {self.circumstances()}", f"  again: hone verify {self.name}"]

    def reason(self) -> str:
        """Return why the claim could not be tested, or why some of its runs failed; "" where none did."""
        return str(self.record.get("reason") or "")

    def trouble(self) -> str:
        """Return what a reason explains."""
        if self.verdict == "failed":
            return "failed"
        sides = (self.record.get("sides") or {}).values()
        whole = [all(values) for values in zip(*(_finished(side) for side in sides), strict=False)]
        return f"some runs failed ({sum(whole)} of {len(self.seeds())} pairs are compared)"


def stored(kind: str | None = None, name: str | None = None) -> list[Evidence]:
    """Return the stored results, by kind, name and claim.

    Args:
        kind: of one kind of part only.
        name: of one part only.

    Raises:
        HoneError: a file is not a stored result.
    """
    found = (_read(path) for path in sorted(RESULTS.glob("*.json")))
    kept = [e for e in found if kind in (None, e.kind) and name in (None, e.name)]
    return sorted(kept, key=lambda e: (e.kind, e.name, e.claim))


def overall(found: Iterable[Evidence]) -> str | None:
    """Return the verdict that results share, "mixed" where they differ, None without any."""
    verdicts = {evidence.verdict for evidence in found}
    return "mixed" if len(verdicts) > 1 else next(iter(verdicts), None)


def number(value: float | None) -> str:
    """Return a figure with four digits, "-" for a missing one."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"


def _read(path: Path) -> Evidence:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HoneError(f"{path}: expected the stored result of a claim, but it is not JSON: {error}") from error
    lacking = [key for key in _NEEDED if key not in record] if isinstance(record, dict) else list(_NEEDED)
    if lacking:
        raise HoneError(f"{path}: expected the stored result of a claim; it lacks {', '.join(lacking)}")
    if record["verdict"] not in VERDICTS:
        raise HoneError(f"{path}: expected a verdict of {', '.join(VERDICTS)}, got {record['verdict']!r}")
    shown = {key: record.get(key) or "" for key in ("kind", "name", "claim", "says", "verdict", "finding")}
    return Evidence(**shown, path=path, record=record)


def _finished(side: dict[str, Any]) -> list[bool]:
    """Return for each seed whether a side has figures of it."""
    return [any(value is not None for value in column) for column in zip(*side["values"].values(), strict=True)]


def _difference(check: dict[str, Any]) -> str:
    """Return "-0.31 (interval -0.35 to -0.27, p 0.0001)", less what is not known."""
    about = []
    if check.get("low") is not None and check.get("high") is not None:
        about.append(f"interval {number(check['low'])} to {number(check['high'])}")
    if check.get("p") is not None:
        about.append(f"p {check['p']:.2g}")
    return number(check.get("difference")) + (f" ({', '.join(about)})" if about else "")


def _settings(given: dict[str, Any], tuned: dict[str, Any]) -> str:
    shown = [f"{path}={_value(value)}" for path, value in given.items() if path not in tuned]
    return ", ".join([*shown, *(f"{path}={_value(value)} (tuned)" for path, value in tuned.items())]) or "as the recipe"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows as lines with their columns one under the other."""
    widths = [max(len(row[i]) if i < len(row) else 0 for row in rows) for i in range(max(map(len, rows)))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows]
