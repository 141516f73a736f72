"""Denoisers that are seen in another way: with further numbers, or without any network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hone.errors import ModelError


def check_guidance(guidance: float, classes: bool) -> None:
    """Refuse guidance where there are no classes that it could lead to: it would do nothing and say nothing.

    Args:
        guidance: of classifier-free guidance; 1 for none.
        classes: whether there are some.

    Raises:
        ModelError: there are none.
    """
    if guidance != 1.0 and not classes:
        raise ModelError(
            f"guidance: {guidance:g} leads to a class, and there are none here; set data.conditional: true, or "
            "guidance: 1 in the objective or the solver"
        )


class View(nn.Module):
    """What is called like a denoiser, for the arrays and the noise range of one."""

    def __init__(self, like: Any) -> None:
        """Take over the shape, the classes and the noise range.

        Args:
            like: a denoiser.
        """
        super().__init__()
        self.shape, self.classes = like.shape, like.classes
        self.sigma_min, self.sigma_max, self.sigma_data = like.sigma_min, like.sigma_max, like.sigma_data

    def guided(self, x: Tensor, sigma: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
        """Return what lies between the answers with and without a class: none + guidance (class - none).

        Args:
            x: (B, *shape) noisy arrays.
            sigma: (B,) noise levels, or one number.
            labels: (B,) classes; None where guidance is 1.
            guidance: 1 leaves the answer as it is.
        """
        check_guidance(guidance, labels is not None)
        told: Tensor = self(x, sigma, labels)
        if labels is None or guidance == 1.0:
            return told
        untold = self(x, sigma, torch.full_like(labels, -1))
        return untold + guidance * (told - untold)
