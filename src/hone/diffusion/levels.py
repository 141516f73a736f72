"""Parameterisations: what a network is shown at a noise level, and how its output becomes a denoised array.

Everything in hone's diffusion code speaks one language: an array y with noise of standard deviation sigma,
x = y + sigma n, and the denoiser D(x, sigma), which guesses y. A parameterisation translates it to what a network was,
or shall be, trained for:

    D(x, sigma) = c_skip x + c_out F(c_in x, c_noise)

    edm        c_skip = d^2 / (s^2 + d^2)   c_out = s d / r            c_in = 1 / r        c_noise = ln(s) / 4
    flow       c_skip = 1 - t               c_out = -t                 c_in = 1 - t        c_noise = t = s / (1 + s)
    trigflow   c_skip = cos^2 t             c_out = -d sin t           c_in = cos t / d    c_noise = t = atan(s / d)
    vp-eps     c_skip = 1                   c_out = -s                 c_in = a            c_noise = ln(s) / 4
    vp-v       c_skip = a^2                 c_out = -s a               c_in = a            c_noise = ln(s) / 4
    x0         c_skip = 0                   c_out = 1                  c_in = 1 / r        c_noise = ln(s) / 4
    consistency  as edm with s - s_min in the place of s in c_skip and the numerator of c_out

with s = sigma, d = sigma_data, r = sqrt(s^2 + d^2), a = 1 / sqrt(1 + s^2). A flow-matching state (1 - t) y + t n is
x times 1 - t, a variance-preserving one x times a, a TrigFlow one x times cos(t): the same point on another scale.
So a student of one kind learns from a teacher of another without a conversion of weights: both are denoisers of x.

Sources: Karras et al. 2022 (arXiv:2206.00364), table 1; Lipman et al. 2022 (arXiv:2210.02747); Lu and Song 2024
(arXiv:2410.11081), section 3; Salimans and Ho 2022 (arXiv:2202.00512); Song et al. 2023 (arXiv:2303.01469), appendix C.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Kind = Literal["edm", "flow", "trigflow", "vp-eps", "vp-v", "x0", "consistency"]
KINDS: tuple[str, ...] = get_args(Kind)


class Coefficients(NamedTuple):
    """The four numbers of a parameterisation at a noise level, each of the noise level's shape.

    Args:
        skip: c_skip.
        out: c_out.
        inside: c_in.
        noise: c_noise.
    """

    skip: Tensor
    out: Tensor
    inside: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Parameterisation:
    """What the output of a network means.

    Args:
        kind: a row of the table in this module's docstring.
        sigma_data: standard deviation of the data.
        sigma_min: noise level at which a "consistency" denoiser returns its input.
    """

    kind: Kind = "edm"
    sigma_data: float = 0.5
    sigma_min: float = 0.002

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return c_skip, c_out, c_in and c_noise.

        Args:
            sigma: noise levels of any shape, above 0 (0 is allowed where c_noise is no logarithm, and gives c_skip 1).
        """
        data = self.sigma_data
        radius = (sigma**2 + data**2).sqrt()
        log = sigma.clamp(min=1e-20).log() / 4
        if self.kind == "edm":
            return Coefficients(data**2 / radius**2, sigma * data / radius, 1 / radius, log)
        if self.kind == "consistency":
            above = sigma - self.sigma_min
            return Coefficients(data**2 / (above**2 + data**2), above * data / radius, 1 / radius, log)
        if self.kind == "x0":
            return Coefficients(torch.zeros_like(sigma), torch.ones_like(sigma), 1 / radius, log)
        if self.kind == "flow":
            time = sigma / (1 + sigma)
            return Coefficients(1 - time, -time, 1 - time, time)
        if self.kind == "trigflow":
            cos, sin, time = data / radius, sigma / radius, torch.atan(sigma / data)
            return Coefficients(cos**2, -data * sin, cos / data, time)
        scale = 1 / (1 + sigma**2).sqrt()
        if self.kind == "vp-eps":
            return Coefficients(torch.ones_like(sigma), -sigma, scale, log)
        return Coefficients(scale**2, -sigma * scale, scale, log)  # vp-v

    def error_scale(self, sigma: Tensor) -> Tensor:
        """Return what errors of the denoised array are divided by in pretraining: c_out, of the network's output.

        A "consistency" denoiser's c_out is 0 at sigma_min; its errors are divided by edm's.

        Args:
            sigma: noise levels of any shape.
        """
        plain = replace(self, kind="edm") if self.kind == "consistency" else self
        return plain.coefficients(sigma).out

    def output(self, denoised: Tensor, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return the network output that stands for a denoised array: (D - c_skip x) / c_out.

        Args:
            denoised: (B, *shape) D(x, sigma), of any network.
            noisy: (B, *shape) x.
            sigma: (B, 1, ...) noise levels that broadcast against the arrays.
        """
        found = self.coefficients(sigma)
        return (denoised - found.skip * noisy) / found.out


def flow_time(sigma: Tensor) -> Tensor:
    """Return t of flow matching, in [0, 1): x scaled by 1 - t is (1 - t) y + t n. t = s / (1 + s).

    Args:
        sigma: noise levels.
    """
    return sigma / (1 + sigma)


def from_flow_time(time: Tensor) -> Tensor:
    """Return the noise level of a flow-matching time: s = t / (1 - t).

    Args:
        time: in [0, 1).
    """
    return time / (1 - time)


def trig_time(sigma: Tensor, sigma_data: float) -> Tensor:
    """Return t of TrigFlow, in [0, pi / 2): x scaled by cos t is cos(t) y + sin(t) sigma_data n. t = atan(s / d).

    Args:
        sigma: noise levels.
        sigma_data: standard deviation of the data.
    """
    return torch.atan(sigma / sigma_data)


def from_trig_time(time: Tensor, sigma_data: float) -> Tensor:
    """Return the noise level of a TrigFlow time: s = d tan t.

    Args:
        time: in [0, pi / 2).
        sigma_data: standard deviation of the data.
    """
    return sigma_data * torch.tan(time)


def spread(values: Tensor, like: Tensor) -> Tensor:
    """Return (B,) values with as many trailing dimensions of 1 as arrays have.

    Args:
        values: (B,), or a number for all.
        like: (B, *shape).
    """
    return values.reshape(-1, *[1] * (like.dim() - 1)) if values.dim() else values


def karras(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> Tensor:
    """Return `steps` + 1 float64 noise levels from `sigma_max` down to `sigma_min`, and then 0.

    s_i = (s_max^(1/rho) + i / (steps - 1) (s_min^(1/rho) - s_max^(1/rho)))^rho, i = 0 ... steps - 1

    Args:
        steps: noise levels above 0.
        sigma_min: the smallest above 0.
        sigma_max: the largest.
        rho: how much they crowd near the smallest.
    """
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64) if steps > 1 else torch.zeros(1, dtype=torch.float64)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return torch.cat([(high + ramp * (low - high)) ** rho, torch.zeros(1, dtype=torch.float64)])
