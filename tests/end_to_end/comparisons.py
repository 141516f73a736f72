"""Comparisons of the tiny model, small enough to be run for real."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from end_to_end.support import Outcome, fields, hone, write_recipe


def small(model: Path, data: Path, /, **changes: Any) -> dict[str, Any]:
    """Return the fields of a run of three steps without an `out`, which a comparison gives each of its runs."""
    made = fields(model, data, Path(), adapter={"name": "lora", "rank": 4}, steps=3, general_data=str(data))
    del made["out"]
    return {**made, **changes}


def prepare(folder: Path, name: str, content: Mapping[str, Any]) -> Path:
    """Write a recipe into a folder."""
    return write_recipe(folder / f"{name}.yaml", content)


def say(recipe: Path, out: Path, *arguments: str | Path) -> Outcome:
    """Run `hone compare`, two cells at a time; its cells lie beside `out`, where other comparisons find them."""
    return hone("compare", recipe, "--out", out, "--jobs", "2", *arguments)


def found(recipe: Path, out: Path, *arguments: str | Path) -> dict[str, Any]:
    """Return the result of `hone compare`, which must have finished."""
    said = say(recipe, out, *arguments, "--json")
    assert said.status == 0, said.err
    return json.loads(said.out)


def row(result: Mapping[str, Any], label: str) -> dict[str, Any]:
    """Return the row of a variant."""
    return next(row for row in result["variants"] if row["label"] == label)


def times(store: Path) -> dict[str, int]:
    """Return when each file of the finished cells was written."""
    return {path.relative_to(store).as_posix(): path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
