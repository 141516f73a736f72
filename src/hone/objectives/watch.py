"""A watch over critics: a run whose critic diverges is stopped, with its losses in the message."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hone.errors import NumericError

TIMES, PATIENCE = 100.0, 20  # diverged: so many times its least loss, for so many steps without a pause
HINGE = 2.0  # a hinge loss of a critic that cannot tell
FLOOR = 0.1  # of the least loss, so that a critic whose task was easy for a while is not called diverged later


class Watch:
    """Remembers the least loss of a critic, and stops the run when its loss stays far above."""

    def __init__(self, name: str, floor: float = FLOOR) -> None:
        """Begin.

        Args:
            name: of the critic, for the message.
            floor: losses below it count as this, e.g. the loss of guessing.
        """
        self.name, self.floor = name, floor
        self.least, self.above = float("inf"), 0
        self.curve: list[float] = []

    def look(self, loss: float, step: int) -> None:
        """Take the loss of a step.

        Args:
            loss: the critic's mean loss.
            step: finished steps, for the message.

        Raises:
            NumericError: it was `TIMES` its least for `PATIENCE` steps.
        """
        self.least = min(self.least, max(loss, self.floor))
        self.above = self.above + 1 if loss > TIMES * self.least else 0
        self.curve = [*self.curve[1 - PATIENCE :], loss]
        if self.above >= PATIENCE:
            shown = ", ".join(f"{value:.3g}" for value in self.curve[:: PATIENCE // 5])
            raise NumericError(
                f"step {step}: the critic '{self.name}' diverges: its loss has been above {TIMES:g} times its least, "
                f"{self.least:.3g}, for {PATIENCE} steps: {shown}. metrics.jsonl has the whole curve. Try a smaller "
                "optimizer.lr or, where the objective has them, a smaller critic_rate or more critic_updates"
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"least": self.least, "above": self.above, "curve": list(self.curve)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: as `state_dict` returned it.
        """
        self.least, self.above, self.curve = state["least"], state["above"], list(state["curve"])


@dataclass(kw_only=True)
class Watching:
    """Mixed into objectives with critics."""

    _watches: dict[str, Watch] = field(init=False, default_factory=dict, repr=False)

    def watch(self, name: str, floor: float | None = None) -> None:
        """Stop the run when the loss of a critic diverges.

        Args:
            name: of a figure in the rows of the run, e.g. "fake/denoising"; rows without it say nothing.
            floor: losses below it count as this; None takes the usual.
        """
        self._watches[name] = Watch(name) if floor is None else Watch(name, floor)

    def after_step(self, run: Any, row: dict[str, Any]) -> None:
        """Look whether a critic diverges.

        Args:
            run: the run in progress.
            row: metrics of the step.
        """
        super().after_step(run, row)  # type: ignore[misc]
        for name, watch in self._watches.items():
            if name in row:
                watch.look(row[name], run.step)

    def state_dict(self) -> dict[str, Any]:
        """Return what the watches have seen."""
        seen = {name: watch.state_dict() for name, watch in self._watches.items()}
        return {**super().state_dict(), **({"watches": seen} if seen else {})}  # type: ignore[misc]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: as `state_dict` returned it.
        """
        super().load_state_dict(state)  # type: ignore[misc]
        for name, seen in state.get("watches", {}).items():
            if name in self._watches:
                self._watches[name].load_state_dict(seen)
