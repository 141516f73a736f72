"""Denoisers that are seen in another way: with further numbers, or without any network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


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
            labels: (B,) classes; None leaves the answer as it is.
            guidance: 1 leaves the answer as it is.
        """
        told: Tensor = self(x, sigma, labels)
        if labels is None or guidance == 1.0:
            return told
        untold = self(x, sigma, torch.full_like(labels, -1))
        return untold + guidance * (told - untold)
