"""The sampler of consistency trajectory models: jumps to any level, with noise added back or not."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Generator, Tensor

from hone.errors import ModelError
from hone.parts import part
from hone.solvers.base import Counted, noise_like
from hone.solvers.few import Multistep


@part(
    "solver", "gamma",
    papers=[
        ("Consistency Trajectory Models: Learning Probability Flow ODE Trajectory of Diffusion", "arXiv:2310.02279"),
    ],
    claim="With jumps that add no noise back (gamma 0) samples go on to improve with the number of steps.",
)  # fmt: skip
@dataclass(kw_only=True)
class Gamma(Multistep):
    """Jumps along a trajectory, each to a lower level than the next one, and noise that makes up for it.

    x <- G(x, s_i, sqrt(1 - gamma^2) s_i+1) + gamma s_i+1 z,  G(x, t, s) = (s / t) x + (1 - s / t) g(x, t, s)

    gamma 0 follows the deterministic flow, gamma 1 is the sampler of consistency models. Guidance is between jumps
    with and without the class, G(none) + guidance (G(class) - G(none)).

    Args:
        gamma: share of the noise that is new at each level.
    """

    gamma: Annotated[float, Field(ge=0, le=1)] = 0.0

    def solve(self, denoise: Counted, x: Tensor, sigmas: Tensor, generator: Generator | None) -> Tensor:
        """Return x at the last of the noise levels.

        Args:
            denoise: holds a model that takes the level to jump to.
            x: (B, *shape) at the first of them.
            sigmas: (n,) descending.
            generator: draws noise where gamma is not 0.

        Raises:
            ModelError: it takes none.
        """
        from hone.objectives.trajectory import Jumps

        if not isinstance(denoise.model, Jumps):
            raise ModelError(
                "solvers: gamma follows the jumps of a trajectory model, which the objectives ctm and soundctm train; "
                "draw from this one by multistep, ddim or heun"
            )
        for now, then in itertools.pairwise(sigmas):
            x = self._jump(denoise, x, now, (1 - self.gamma**2) ** 0.5 * then)
            if self.gamma and float(then) > 0:
                x = x + (self.gamma * then).to(x) * noise_like(x, generator)
        return x

    def _jump(self, denoise: Counted, x: Tensor, now: Tensor, then: Tensor) -> Tensor:
        from hone.objectives.trajectory import jump

        now, then, labels = now.to(x).expand(len(x)), then.to(x).expand(len(x)), denoise.labels
        denoise.calls += 1
        found: Tensor = jump(denoise.model, x, now, then, labels)
        if self.guidance == 1.0 or labels is None:
            return found
        denoise.calls += 1
        untold: Tensor = jump(denoise.model, x, now, then, labels.new_full(labels.shape, -1))
        return untold + self.guidance * (found - untold)
