"""Distances between sets in the features of a network: Fréchet distances for digits, and the FID."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.encoders import DIGIT_SHAPE, digit_network
from hone.distances.base import Distance
from hone.distances.sets import frechet
from hone.errors import HoneError
from hone.parts import part

AT_ONCE = 256


@part("distance", "digit-frechet", papers="original")
@dataclass(kw_only=True)
class DigitFrechet(Distance):
    """The squared Fréchet distance in the features of a classifier of 8 x 8 digits, which ships with the package.

    |m_x - m_y|^2 + trace(C_x + C_y - 2 (C_x C_y)^(1/2)) over 32 features of `digits.safetensors`
    """

    def __call__(self, generated: Tensor, real: Tensor) -> float:
        """Return the distance of (N, 1, 8, 8) generated from (M, 1, 8, 8) real digits.

        Raises:
            HoneError: the arrays are no digits.
        """
        for arrays in (generated, real):
            if tuple(arrays.shape[1:]) != DIGIT_SHAPE:
                raise HoneError(
                    f"distance 'digit-frechet' looks at digits {DIGIT_SHAPE}, and the arrays are "
                    f"{tuple(arrays.shape[1:])}; use frechet, or fid for photographs"
                )
        network = digit_network()
        with torch.no_grad():
            left, right = (network.features(arrays[: self.most].float().cpu()).double() for arrays in (generated, real))
        return frechet(left, right)


@part(
    "distance", "fid",
    papers=[("GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", "arXiv:1706.08500")],
    claim="The Fréchet distance grows with every disturbance of the samples.",
    deviations="Computed by torchmetrics, which loads the Inception network that it needs.",
)  # fmt: skip
@dataclass(kw_only=True)
class FID(Distance):
    """The Fréchet inception distance of images in [-1, 1], by torchmetrics when that is installed.

    Fewer arrays than features make a singular covariance, and distances of other numbers of arrays do not compare.

    Args:
        most: arrays of each set that are compared, the first ones; 50,000 are usual.
        features: of the Inception network that are compared: 64, 192, 768 or 2048.
    """

    most: Annotated[int, Field(ge=2)] = 50_000
    features: Literal[64, 192, 768, 2048] = 2048

    def __call__(self, generated: Tensor, real: Tensor) -> float:
        """Return the distance of (N, C, H, W) generated from (M, C, H, W) real images of 1 or 3 channels.

        Raises:
            HoneError: the arrays are no images, or torchmetrics is not installed, or not whole.
        """
        if generated.dim() != 4 or generated.shape[1] not in (1, 3):
            raise HoneError(f"distance 'fid' looks at images of 1 or 3 channels, not {tuple(generated.shape[1:])}")
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance

            metric = FrechetInceptionDistance(feature=self.features)
        except ImportError as error:  # also raised where torch-fidelity, which has the network, is missing
            raise HoneError("distance 'fid': install it with pip install 'hone-ml[fid]'") from error
        for arrays, is_real in ((generated, False), (real, True)):
            for begin in range(0, min(self.most, len(arrays)), AT_ONCE):
                metric.update(_as_bytes(arrays[begin : min(begin + AT_ONCE, self.most)]), real=is_real)
        found: Any = metric.compute()
        return float(found)


def _as_bytes(images: Tensor) -> Tensor:
    """Return images (B, C, H, W) in [-1, 1] as (B, 3, H, W) bytes."""
    found = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return found.expand(-1, 3, -1, -1)
