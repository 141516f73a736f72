"""Pretraining of denoisers: EDM, flow matching, TrigFlow and the rest, by the parameterisation of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hone.diffusion.levels import spread
from hone.objectives.arrays import ArrayObjective, Levels, Positive, Share, output_error
from hone.parts import part


@part(
    "objective", "denoise",
    papers=[
        ("Elucidating the Design Space of Diffusion-Based Generative Models", "arXiv:2206.00364"),
        ("Flow Matching for Generative Modeling", "arXiv:2210.02747"),
        ("Denoising Diffusion Probabilistic Models", "arXiv:2006.11239"),
    ],
    claim="A network that learns to take noise of every level off draws samples that are near the data.",
    deviations="One objective: what the network is asked for, and with that the weight of each noise level, is the "
    "model's parameterisation.",
)  # fmt: skip
@dataclass(kw_only=True)
class Denoise(ArrayObjective):
    """Denoising at random noise levels, weighed so that the network's own output is what is regressed.

    |D(y + s n, s) - y|^2 / c_out(s)^2 = |F - F*|^2, the mean over coordinates: EDM's weight with the model's
    parameterisation edm, the flow-matching loss with flow, the noise-prediction loss with vp-eps.

    Args:
        levels: distribution of the noise levels (`hone.objectives.arrays.noise_levels`); flow-lognormal is the
            logit-normal time of rectified flow, and flow its even one.
        mean: of the log of the level, for the lognormal ones.
        std: of the same.
        drop_labels: share of the arrays whose class is left out, for classifier-free guidance.
    """

    levels: Levels = "lognormal"
    mean: float = -1.2
    std: Positive = 1.2
    drop_labels: Share = 0.1

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        sigma = self.sigmas(model, batch)
        noisy = batch.arrays + spread(sigma, batch.arrays) * self.normal(batch)
        labels = self.some_labels(model, batch, self.drop_labels)
        return output_error(model, model(noisy, sigma, labels), batch.arrays, sigma).sum(), {}

    def sigmas(self, model: Any, batch: Any) -> Tensor:
        """Return the noise level of each array (B,).

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        return self.drawn_levels(model, batch, "level", self.levels, mean=self.mean, std=self.std).to(batch.arrays)
