"""Arrays as pictures: a grid of images or spectrograms, a scatter of points."""

from __future__ import annotations

import io
import math

import numpy as np
from torch import Tensor

SHOWN = 64  # arrays in a grid
SIDE = 320  # pixels of a scatter


def picture(arrays: Tensor, around: Tensor | None = None) -> bytes:
    """Return arrays as a PNG file.

    Args:
        arrays: (N, d) points, of which the first two coordinates are shown; (N, C, T) spectrograms; (N, C, H, W) images
            in [-1, 1].
        around: points that set the scale of a scatter, real ones say; None takes the arrays' own.
    """
    from PIL import Image

    values = arrays.detach().float().cpu().nan_to_num().numpy()
    if values.ndim == 2:
        pixels = _scatter(values, values if around is None else around.detach().float().cpu().numpy())
    else:
        images = values[:SHOWN, None] if values.ndim == 3 else values[:SHOWN]
        pixels = _grid(np.clip((images + 1) * 127.5, 0, 255).astype(np.uint8))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _scatter(points: np.ndarray, around: np.ndarray) -> np.ndarray:
    """Return how many points fall on each pixel, dark where there are many."""
    if points.shape[1] == 1:
        points, around = (np.concatenate([rows, np.zeros_like(rows)], 1) for rows in (points, around))
    low, high = np.quantile(around[:, :2], 0.002, axis=0), np.quantile(around[:, :2], 0.998, axis=0)
    margin = 0.25 * (high - low) + 1e-6
    edges = [np.linspace(low[axis] - margin[axis], high[axis] + margin[axis], SIDE + 1) for axis in range(2)]
    counts, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=edges)
    shade = 255 * (1 - np.minimum(1, np.sqrt(counts / max(1.0, 4 * len(points) / SIDE**2 * 8))))
    return np.flipud(shade.T).astype(np.uint8)


def _grid(images: np.ndarray) -> np.ndarray:
    """Return (N, C, H, W) images side by side, enlarged where they are small."""
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = max(1, round(40 / max(height, width)))
    images = images[:, :3] if channels >= 3 else images[:, :1]
    images = images.repeat(scale, axis=2).repeat(scale, axis=3)
    tall, wide = images.shape[2] + 2, images.shape[3] + 2
    sheet = np.full((rows * tall, columns * wide, images.shape[1]), 255, np.uint8)
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        sheet[row * tall : row * tall + tall - 2, column * wide : column * wide + wide - 2] = image.transpose(1, 2, 0)
    return sheet[..., 0] if sheet.shape[2] == 1 else sheet
