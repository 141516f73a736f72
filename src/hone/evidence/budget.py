"""Equal budgets: how many steps of each variant come to the same steps, tokens, seconds or operations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from hone.errors import HoneError, nearest

KINDS = ("steps", "tokens", "seconds", "flops")


@dataclass(frozen=True)
class Budget:
    """What every run may spend.

    Args:
        kind: "steps", "tokens", "seconds" (of training, the adapter's set-up included), "flops", or "recipe" for what
            each recipe says.
        amount: how much; 0 for "recipe".
    """

    kind: str = "recipe"
    amount: float = 0.0

    @classmethod
    def read(cls, text: str) -> Budget:
        """Read "steps=200" or "flops=1e15"; "" leaves the length to the recipes.

        Args:
            text: what the user gave.

        Raises:
            HoneError: it is not of that form.
        """
        if not text:
            return cls()
        kind, _, amount = text.partition("=")
        if kind not in KINDS:
            hint = nearest(kind, KINDS) or f"budgets: {', '.join(KINDS)}"
            raise HoneError(f"--budget: expected KIND=AMOUNT such as steps=200, got '{text}' ({hint})")
        try:
            value = float(amount)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf or (kind == "steps" and value != int(value)):
            raise HoneError(
                f"--budget: expected a positive {'whole ' * (kind == 'steps')}number after {kind}=, got '{amount}'"
            )
        return cls(kind, value)

    @property
    def measured(self) -> bool:
        """Whether the number of steps follows from a measurement."""
        return self.kind in ("tokens", "seconds", "flops")

    def steps(self, measured: dict[str, Any]) -> int:
        """Return the steps that come closest to the budget.

        Args:
            measured: a rehearsal's figures.

        Raises:
            HoneError: the budget does not suffice for one step.
        """
        if self.kind == "recipe":
            return int(measured["steps"])
        if self.kind == "steps":
            return int(self.amount)
        rest = self.amount - (measured["setup_seconds"] if self.kind == "seconds" else 0.0)
        each = measured[{"tokens": "step_tokens", "seconds": "step_seconds", "flops": "step_flops"}[self.kind]]
        steps = round(rest / each)
        if steps < 1:
            raise HoneError(
                f"a budget of {self.kind}={self.amount:g} does not suffice for one step, which takes {each:g}"
            )
        return steps

    def plain(self) -> dict[str, Any]:
        """Return kind and amount."""
        return {"kind": self.kind, "amount": self.amount}
