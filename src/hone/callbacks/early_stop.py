"""Early stopping: end a run when its evaluations no longer improve."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from hone.callbacks.base import Callback
from hone.errors import HoneError, nearest
from hone.figures import lower_is_better
from hone.parts import part

if TYPE_CHECKING:
    from hone.engine.loop import Run


@part("callback", "early_stop", papers="original")
@dataclass(kw_only=True)
class EarlyStop(Callback):
    """Ends the run after some evaluations in a row without an improvement.

    The evaluation before the first step counts as the first to beat. With `final: best` the run keeps its best weights.

    Args:
        metric: figure of the evaluation to watch: "loss", "general_loss" or the name of a metric.
        patience: evaluations in a row without an improvement that end the run.
        mode: whether a smaller or a larger figure is better; "auto" knows it of hone's own figures.
        min_delta: least change that counts as an improvement, in units of the figure.
    """

    metric: str = "loss"
    patience: Annotated[int, Field(ge=1)] = 3
    mode: Literal["auto", "min", "max"] = "auto"
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    best: float | None = field(init=False, default=None)
    waited: int = field(init=False, default=0)

    def conflicts(self, recipe: Mapping[str, Any]) -> Iterator[str]:
        """Yield that a run is not evaluated on its way.

        Args:
            recipe: the recipe's fields.
        """
        if recipe.get("eval_every") is None:
            yield "'early_stop' watches evaluations, and the recipe makes none on its way: set eval_every"

    def on_eval(self, run: Run, row: dict[str, Any]) -> None:
        """Compare the figure with the best so far, and stop when patience runs out.

        Raises:
            HoneError: the evaluation has no such figure.
        """
        # A run that ends anyway: this evaluation decides nothing. One that a signal stops goes on, and never makes this
        # evaluation again.
        if (run.stop and not run.interrupted) or run.step >= run.total:
            return
        if self.metric not in row:
            figures = [name for name in row if name != "step"]
            hint = nearest(self.metric, figures) or f"it has: {', '.join(figures) or 'none'}"
            raise HoneError(f"callback 'early_stop': the evaluation has no figure '{self.metric}' ({hint})")
        value = float(row[self.metric])
        larger = self.mode == "max" or (self.mode == "auto" and not lower_is_better(self.metric))
        gain = 0.0 if self.best is None else (value - self.best if larger else self.best - value)
        if math.isfinite(value) and (self.best is None or gain > self.min_delta):
            self.best, self.waited = value, 0
            return
        if self.best is None:  # nothing to beat yet: an untrained generator may draw what has no distance
            return
        self.waited += 1
        if self.waited >= self.patience:
            run.stop = f"early stop: {self.metric} did not improve on {self.best:.4g} in {self.waited} evaluations"

    def state_dict(self) -> dict[str, Any]:
        """Return the best figure and how many evaluations have passed since."""
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: as `state_dict` returned it.
        """
        self.best, self.waited = state["best"], state["waited"]
