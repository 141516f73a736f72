"""What a claim is: a trial of a method against the baseline that its paper names, and what must come out."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Direction = Literal["higher", "lower", "same", "not higher", "not lower"]
Figures = Callable[[Path], dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One figure that must come out as claimed.

    Args:
        metric: its name, e.g. "loss", "forgetting", "accuracy", "peak_memory".
        direction: how the method's figure lies to the baseline's.
        effect: "higher" and "lower": least difference of the means; otherwise the margin within which two figures
            count as the same. In the metric's units, or a share of the baseline's mean when `relative`.
        relative: whether `effect` is a share.
    """

    metric: str
    direction: Direction
    effect: float = 0.0
    relative: bool = False

    def text(self) -> str:
        """Return what is expected, in words."""
        amount = f"{self.effect:.0%}" if self.relative else f"{self.effect:g}"
        if self.direction in ("higher", "lower"):
            return f"{self.direction} by at least {amount}" if self.effect else self.direction
        return (
            f"{self.direction} within {amount}"
            if self.direction == "same"
            else f"{self.direction} by more than {amount}"
        )


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two that meet.

    Args:
        label: what tables call it.
        settings: fields of the recipe by dotted path.
    """

    label: str
    settings: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A method against its baseline.

    Args:
        recipe: the fields that both sides share.
        baseline: what the paper compares with.
        method: what the claim is about.
        checks: what must come out, all of it.
        tune: values by dotted path that each side tries on one seed before it runs with its best.
        metric: what the tuning looks at.
        budget: "KIND=N" of every run, "" for the recipe's own length.
        seeds: paired seeds.
        alone: whether runs have the machine to themselves, for figures of time.
        figures: further figures read from a run folder.
        paper: (title, identifier) of what says so, None where it is common knowledge or our own.
    """

    recipe: Mapping[str, Any]
    baseline: Side
    method: Side
    checks: tuple[Check, ...]
    tune: Mapping[str, list[Any]] = field(default_factory=dict)
    metric: str = "loss"
    budget: str = ""
    seeds: int = 5
    alone: bool = False
    figures: Figures | None = None
    paper: tuple[str, str] | None = None


@dataclass(frozen=True)
class Claim:
    """A claim with the part that it is about.

    Args:
        kind: kind of the part, or "recipe".
        part: its name.
        name: name of the claim among those of the part.
        make: returns the trial, given a folder to write data into.
    """

    kind: str
    part: str
    name: str
    make: Callable[[Path], Trial]

    @property
    def id(self) -> str:
        """KIND.PART.NAME, as `hone verify` takes it."""
        return f"{self.kind}.{self.part}.{self.name}"

    @property
    def file(self) -> str:
        """Name of the file that holds its result."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.id) + ".json"

    def about(self) -> dict[str, str]:
        """Return what the docstring says: the claim ("says"), the "task" and the "finding"."""
        found = {"says": "", "task": "", "finding": ""}
        key = "says"
        for block in inspect.cleandoc(self.make.__doc__ or "").split("\n\n"):
            text = " ".join(block.split())
            for name in ("task", "finding"):
                if text.lower().startswith(f"{name}:"):
                    key, text = name, text[len(name) + 1 :].strip()
            found[key] = f"{found[key]} {text}".strip()
        return found


REGISTRY: dict[str, Claim] = {}


def claim(kind: str, part: str, name: str) -> Callable[[Callable[[Path], Trial]], Callable[[Path], Trial]]:
    """Register the decorated function as a claim about a part. All arguments must be literals.

    Args:
        kind: kind of the part.
        part: its name.
        name: name of the claim, in words joined by hyphens.

    Raises:
        ValueError: the part has a claim of that name.
    """

    def register(make: Callable[[Path], Trial]) -> Callable[[Path], Trial]:
        made = Claim(kind, part, name, make)
        if made.id in REGISTRY:
            raise ValueError(f"two claims are called {made.id}")
        REGISTRY[made.id] = made
        return make

    return register
