"""Small networks that look at clean arrays: features, feature maps and classes, learned from labelled arrays."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from hone.errors import ModelError

DIGITS = Path(__file__).parents[1] / "distances" / "digits.safetensors"
DIGIT_SHAPE, DIGIT_CLASSES, DIGIT_WIDTH = (1, 8, 8), 10, 32
Looks = Literal["classifier", "digits"]


class Encoder(nn.Module):
    """A small classifier of arrays (B, *shape), whose features are used: linear for points, else convolutions."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int = 32) -> None:
        """Make the layers.

        Args:
            shape: of one array.
            classes: how many there are to tell apart, 0 for features alone.
            width: channels of the features.
        """
        super().__init__()
        self.shape, self.classes, self.width = tuple(shape), classes, width
        if len(shape) == 1:
            self.first, self.second, self.third = (nn.Linear(n, width) for n in (shape[0], width, width))
        else:
            conv: Any = nn.Conv1d if len(shape) == 2 else nn.Conv2d
            self.first = conv(shape[0], width, 3, padding=1)
            self.second = conv(width, width, 3, padding=1, stride=2 if min(shape[1:]) >= 8 else 1)
            self.third = conv(width, width, 3, padding=1)
        self.head = nn.Linear(width, classes) if classes else nn.Identity()

    def maps(self, arrays: Tensor) -> Tensor:
        """Return the features (B, width) of points, or feature maps (B, width, ...)."""
        hidden = F.silu(self.second(F.silu(self.first(arrays))))
        return F.silu(self.third(hidden))

    def features(self, arrays: Tensor) -> Tensor:
        """Return the features (B, width): the mean of the maps over their places."""
        return self.maps(arrays).flatten(2).mean(2) if len(self.shape) > 1 else self.maps(arrays)

    def forward(self, arrays: Tensor) -> Tensor:
        """Return the logits (B, classes)."""
        return self.head(self.features(arrays))


def train_classifier(
    arrays: Tensor, labels: Tensor, classes: int, *, width: int = 32, steps: int = 300, seed: int = 0,
    noise: float = 0.0, batch: int = 128,
) -> Encoder:  # fmt: skip
    """Return an encoder that was trained to tell classes, in evaluation mode and without gradients.

    Args:
        arrays: (N, *shape).
        labels: (N,) int64 classes.
        classes: how many.
        width: channels of the features.
        steps: of Adam.
        seed: of its weights and of the batches; the generators stay as they are.
        noise: standard deviation of noise that is added to what it sees, in units of the arrays' own.
        batch: arrays in each step.
    """
    arrays, spread = arrays.float(), float(arrays.float().std())
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        made = Encoder(tuple(arrays.shape[1:]), classes, width).to(arrays.device)
        optimizer = torch.optim.Adam(made.parameters(), lr=3e-3)
        for _ in range(steps):
            chosen = torch.randint(len(arrays), (batch,)).to(arrays.device)
            seen = arrays[chosen] + noise * spread * torch.randn(batch, *arrays.shape[1:]).to(arrays)
            optimizer.zero_grad()
            F.cross_entropy(made(seen), labels[chosen]).backward()
            optimizer.step()
    return made.eval().requires_grad_(False)


@cache
def digit_network() -> Encoder:
    """Return the classifier of scikit-learn's digits that ships with the package; `train_digits.py` has made it."""
    made = Encoder(DIGIT_SHAPE, DIGIT_CLASSES, DIGIT_WIDTH)
    made.load_state_dict(load_file(DIGITS))
    return made.eval().requires_grad_(False)


def training_data(run: Any) -> tuple[Tensor, Tensor, int]:
    """Return the run's training arrays, their classes (-1 for none) and how many classes there are.

    Args:
        run: the run in progress, or one without a loader that only evaluates.
    """
    trees = run.recipe.build("data").collection("train") if run.loader is None else run.loader.trees
    return trees.arrays, trees.labels, int(trees.labels.max()) + 1


def frozen_encoder(looks: Looks, run: Any, *, width: int = 32, steps: int = 300, what: str = "") -> Encoder:
    """Return a frozen encoder for a run, on its device and in its precision.

    Args:
        looks: "classifier" trains one on the run's labelled data, "digits" takes the one that ships.
        run: the run in progress.
        width: channels of a classifier's features.
        steps: that a classifier is trained for.
        what: the option that asks for it, for messages.

    Raises:
        ModelError: the data has no classes, or is no digits.
    """
    parameter = next(run.model.parameters())
    if looks == "digits":
        if tuple(run.model.shape) != DIGIT_SHAPE:
            raise ModelError(f"{what}: the digits' network sees {DIGIT_SHAPE}, the data's arrays are {run.model.shape}")
        made = Encoder(DIGIT_SHAPE, DIGIT_CLASSES, DIGIT_WIDTH)
        made.load_state_dict(digit_network().state_dict())
        return made.to(parameter).eval().requires_grad_(False)
    arrays, labels, classes = training_data(run)
    if not classes:
        raise ModelError(f"{what}: a classifier needs labelled data; set data.conditional: true")
    device = parameter.device
    return train_classifier(
        arrays.to(device), labels.to(device), classes, width=width, steps=steps, seed=run.recipe.seed
    ).to(parameter)
