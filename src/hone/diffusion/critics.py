"""Discriminators of noisy arrays, and the losses of adversarial training."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hone.diffusion.denoiser import Denoiser
from hone.diffusion.levels import spread
from hone.errors import ModelError


class Critic(nn.Module):
    """Small heads on the features of a denoiser's network: one number for each place, from each chosen layer.

    The network is shown noisy arrays at their noise level, as it was trained. It is frozen, or trains along with the
    heads where `train_body` is true.
    """

    def __init__(self, denoiser: Denoiser, *, train_body: bool = False) -> None:
        """Take the features and make the heads.

        Args:
            denoiser: gives the features; a copy is taken.
            train_body: whether the copy trains.

        Raises:
            ModelError: there is no network, or it shows no features.
        """
        super().__init__()
        if not hasattr(denoiser, "hf"):
            raise ModelError(
                "objective.teacher: a discriminator needs the features of a network, which the known distribution of "
                "the data has not; name the run of a denoiser, or leave the discriminator out"
            )
        if not hasattr(denoiser.hf, "inner"):
            raise ModelError(
                f"a discriminator needs the features of its network, which {type(denoiser.hf).__name__} does not show; "
                "use one of hone's own networks: mlp, unet or dit"
            )
        self.body: Any = copy.deepcopy(denoiser).requires_grad_(train_body)
        parameter = next(denoiser.parameters())
        with torch.no_grad():
            example = torch.zeros(1, *denoiser.shape, device=parameter.device, dtype=parameter.dtype)
            found = self.features(example, torch.ones(1).to(parameter), None)
        self.sizes = [(features.shape[1], features.dim()) for features in found]  # channels and dimensions
        self.heads = nn.ModuleList(Head(*size) for size in self.sizes).to(parameter)

    def features(self, x: Tensor, sigma: Tensor, labels: Tensor | None) -> list[Tensor]:
        """Return the features of noisy arrays, channels second: a list of (B, C) or (B, C, ...).

        Numbers that the denoiser was widened for are 0: features are asked for, no jump and no number of steps.

        Args:
            x: (B, *shape) at noise level `sigma`.
            sigma: (B,) noise levels.
            labels: (B,) classes, None for none.
        """
        count = self.body.widened
        return features_of(self.body, x, sigma, labels, torch.zeros(len(x), count).to(x) if count else None)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the logits (B, n) of all heads at all places: high for real arrays.

        Args:
            x: (B, *shape) at noise level `sigma`.
            sigma: (B,) noise levels.
            labels: (B,) classes, None for none.
        """
        found = self.features(x, sigma, labels)
        return torch.cat([head(states) for head, states in zip(self.heads, found, strict=True)], dim=1)


def features_of(
    denoiser: Any, x: Tensor, sigma: Tensor, labels: Tensor | None, extras: Tensor | None = None
) -> list[Tensor]:
    """Return the features that a denoiser's network has of noisy arrays, channels second: (B, C) or (B, C, ...) each.

    Args:
        denoiser: its network shows them.
        x: (B, *shape) at noise level `sigma`.
        sigma: (B,) noise levels.
        labels: (B,) classes, None for none.
        extras: (B, k) further numbers that the network is shown.
    """
    found = denoiser.parameterisation.coefficients(sigma)
    states: list[Tensor] = denoiser.hf.inner(spread(found.inside, x) * x, found.noise.to(x.dtype), labels, extras)
    return states


class Head(nn.Module):
    """Two layers over the channels of features, the same at each place."""

    def __init__(self, channels: int, dimensions: int) -> None:
        """Make the layers.

        Args:
            channels: of the features.
            dimensions: of the features, 2 for (B, C).
        """
        super().__init__()
        hidden = max(16, channels // 2)
        self.first, self.second = nn.Linear(channels, hidden), nn.Linear(hidden, 1)
        self.dimensions = dimensions

    def forward(self, states: Tensor) -> Tensor:
        """Return the logits (B, places).

        Args:
            states: (B, C) or (B, C, ...).
        """
        rows = states[:, None] if self.dimensions == 2 else states.flatten(2).transpose(1, 2)
        return self.second(F.silu(self.first(rows)))[..., 0]


Game = Literal["hinge", "non-saturating"]


def critic_loss(real: Tensor, fake: Tensor, game: Game = "hinge") -> Tensor:
    """Return what a discriminator minimises, for each array (B,), the mean over its logits.

    hinge: max(0, 1 - real) + max(0, 1 + fake).  non-saturating: softplus(-real) + softplus(fake)

    Args:
        real: (B, n) logits of real arrays.
        fake: (B, n) logits of generated ones.
        game: which.
    """
    if game == "hinge":
        return (F.relu(1 - real) + F.relu(1 + fake)).mean(1)
    return (F.softplus(-real) + F.softplus(fake)).mean(1)


def generator_loss(fake: Tensor, game: Game = "hinge") -> Tensor:
    """Return what the generator minimises for each array (B,): -fake, or softplus(-fake).

    Args:
        fake: (B, n) logits of generated arrays.
        game: which.
    """
    return (-fake if game == "hinge" else F.softplus(-fake)).mean(1)
