"""What a loss looks at in images beside single pixels: structural similarity, high frequencies and edges.

A series or spectrogram (B, C, T) counts as an image of one channel, C high and T wide.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def as_images(x: Tensor) -> Tensor:
    """Return arrays as (B, C, H, W).

    Args:
        x: (B, C, H, W) or (B, C, T).
    """
    return x[:, None] if x.dim() == 3 else x


def ssim(left: Tensor, right: Tensor, window: int = 11, span: float = 2.0) -> Tensor:
    """Return the structural similarity of each pair of arrays (B,): 1 where they are equal.

    ((2 m_l m_r + c_1) (2 s_lr + c_2)) / ((m_l^2 + m_r^2 + c_1) (s_l^2 + s_r^2 + c_2)), the mean over all places, with
    means m and variances s within a Gaussian window of deviation 1.5, c_1 = (0.01 span)^2 and c_2 = (0.03 span)^2.
    Wang et al. 2004. Values of -span / 2 count as black; beyond the border there is black, too.

    Args:
        left: (B, C, H, W) or (B, C, T).
        right: of the same shape.
        window: side of the window, odd.
        span: range of the values.
    """
    left, right = as_images(left) + span / 2, as_images(right) + span / 2
    offsets = torch.arange(window, dtype=left.dtype, device=left.device) - window // 2
    kernel = (-(offsets**2) / (2 * 1.5**2)).exp()
    kernel = kernel / kernel.sum()
    channels = left.shape[1]
    down = kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1)

    def blur(x: Tensor) -> Tensor:
        x = F.conv2d(x, down, padding=(window // 2, 0), groups=channels)
        return F.conv2d(x, down.transpose(2, 3), padding=(0, window // 2), groups=channels)

    mean_left, mean_right = blur(left), blur(right)
    var_left = blur(left * left) - mean_left**2
    var_right = blur(right * right) - mean_right**2
    both = blur(left * right) - mean_left * mean_right
    first, second = (0.01 * span) ** 2, (0.03 * span) ** 2
    above = (2 * mean_left * mean_right + first) * (2 * both + second)
    below = (mean_left**2 + mean_right**2 + first) * (var_left + var_right + second)
    return (above / below).flatten(1).mean(1)


def high_pass(x: Tensor, cutoff: float) -> Tensor:
    """Return what is left of arrays without their low frequencies.

    Args:
        x: (B, C, H, W) or (B, C, T).
        cutoff: lowest frequency that stays, as a share of the highest along one axis (half a cycle a pixel).
    """
    images = as_images(x)
    rows = torch.fft.fftfreq(images.shape[-2], device=x.device).to(x)
    columns = torch.fft.rfftfreq(images.shape[-1], device=x.device).to(x)
    kept = (rows[:, None] ** 2 + columns**2).sqrt() >= 0.5 * cutoff
    spectrum = torch.fft.rfft2(images) * kept
    return torch.fft.irfft2(spectrum, s=images.shape[-2:]).view_as(x)


def edges(x: Tensor) -> Tensor:
    """Return how steep arrays are at each place, by Sobel's filters.

    Args:
        x: (B, C, H, W) or (B, C, T).
    """
    images = as_images(x)
    channels = images.shape[1]
    across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]]).to(x) / 8
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    found = [F.conv2d(padded, kernel.expand(channels, 1, 3, 3), groups=channels) for kernel in (across, across.T)]
    return (found[0] ** 2 + found[1] ** 2 + 1e-8).sqrt().view_as(x)
