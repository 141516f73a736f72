"""A denoiser that knows its distribution, for tests of solvers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hone.diffusion.mixture import Mixture


def ring(scale: float = 0.3) -> Mixture:
    """Return three Gaussians of three classes, wide enough for few steps to follow the flow."""
    means = torch.tensor([[1.0, 0.0], [-0.7, 0.8], [-0.2, -1.0]], dtype=torch.float64)
    scales = torch.tensor([scale, 1.3 * scale, 0.8 * scale], dtype=torch.float64)
    return Mixture(means, scales, torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.arange(3))


class Known(nn.Module):
    """The denoiser of a mixture, called as solvers call a `Denoiser`."""

    def __init__(self, mixture: Mixture | None = None, sigma_min: float = 0.01, sigma_max: float = 20.0) -> None:
        super().__init__()
        self.mixture = ring() if mixture is None else mixture
        self.one = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.shape, self.classes = self.mixture.shape, 3
        self.sigma_min, self.sigma_max, self.sigma_data = sigma_min, sigma_max, self.mixture.deviation()
        self.rows = 0  # arrays that it was asked for in all

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        self.rows += len(x)
        return self.mixture.denoise(x, sigma, labels)

    def guided(self, x: Tensor, sigma: Tensor, labels: Tensor, guidance: float) -> Tensor:
        told, untold = self(x, sigma, labels), self(x, sigma)
        return untold + guidance * (told - untold)


def noise(count: int, seed: int = 0) -> Tensor:
    """Return normal noise for points of two dimensions."""
    return torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_gaussian() -> Mixture:
    return Mixture(torch.zeros(1, 2).double(), torch.full((1,), 0.4, dtype=torch.float64), torch.ones(1).double())


def numbers(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found, wanted, atol=1e-10):
    torch.testing.assert_close(found.as_subclass(torch.Tensor), wanted, rtol=0, atol=atol)
