"""What solvers share that work around another one: they change what it asks, or which of its samples is taken."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from hone.options import Nested
from hone.solvers.base import Counted, Solver
from hone.solvers.ode import DDIM


@dataclass(kw_only=True)
class Around:
    """A solver around another one.

    Args:
        of: the solver inside, with its steps, levels and guidance; ddim where it is left out.
    """

    of: Annotated[Any, Nested("solver")] = None

    @property
    def inner(self) -> Solver:
        """The solver inside."""
        return DDIM() if self.of is None else self.of

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the solver inside."""
        if not getattr(self.inner, "goes_part_way", False):
            yield "of", "expected a solver that asks a denoiser level by level, such as ddim or heun"

    def prepare(self, model: Any, source: Any) -> None:
        """Learn what is needed before arrays are drawn.

        Args:
            model: the denoiser that arrays will be drawn from.
            source: the arrays it learned from.
        """
        self.inner.prepare(model, source)

    def asked(self, model: Any, labels: Tensor | None, sigmas: Tensor) -> Counted:
        """Return what the solver inside asks instead of the denoiser.

        Args:
            model: the denoiser.
            labels: (B,) classes, None for none.
            sigmas: (n,) levels that will be visited, descending.
        """
        return Counted(model, labels, self.inner.guidance)

    def sigmas(self, model: Any) -> Tensor:
        """Return the noise levels, the last one 0.

        Args:
            model: has `sigma_min`, `sigma_max` and `sigma_data`.
        """
        return self.inner.sigmas(model)

    @torch.no_grad()
    def sample(
        self, model: Any, noise: Tensor, labels: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, int]:
        """Return samples, and how often the network ran for each.

        Args:
            model: the denoiser.
            noise: (B, *shape) of unit variance.
            labels: (B,) classes, -1 for none; None for none at all.
            generator: draws what a stochastic solver adds on the way.
        """
        sigmas = self.sigmas(model)
        asked = self.asked(model, labels, sigmas)
        found = self.inner.solve(asked, noise * sigmas[0].to(noise), sigmas, generator)
        return found, asked.calls
