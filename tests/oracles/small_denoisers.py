"""Denoisers and runs that are small enough to know what must come out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hone.diffusion.denoiser import Denoiser
from hone.diffusion.items import Batch, Collection, collate
from hone.diffusion.levels import Kind, Parameterisation
from hone.diffusion.networks import MLP


class Guess(nn.Module):
    """A denoiser that guesses the same place whatever it sees."""

    medium, classes = "arrays", 0
    sigma_min, sigma_max, sigma_data = 0.01, 5.0, 0.5

    def __init__(self, place: list[float]) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.tensor(place, dtype=torch.float64))
        self.shape = (len(place),)
        self.collate = collate

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.place.expand_as(x)

    def guided(self, x: Tensor, sigma: Tensor, labels: Tensor | None, guidance: float) -> Tensor:
        return self(x, sigma, labels)


def tiny(kind: Kind = "edm", classes: int = 0, seed: int = 0) -> Denoiser:
    """Return a denoiser of points in float64 whose output is not zero."""
    torch.manual_seed(seed)
    made = Denoiser(
        MLP(width=8, depth=2).build((2,), classes), Parameterisation(kind, 0.7, 0.01), (2,), classes=classes,
        sigma_max=5.0,
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def points(count: int, labels: Tensor | None = None, seed: int = 1) -> Collection:
    arrays = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Collection(arrays, labels)


def as_run(model: Any, trees: Collection, **more: Any) -> Any:
    """Return what objectives see of a run."""
    device = torch.device("cpu")
    cluster = SimpleNamespace(device=device, autocast=lambda: torch.autocast("cpu", enabled=False), main=True)
    recipe = SimpleNamespace(seed=0, build=lambda name: None)
    return SimpleNamespace(
        model=model, loader=SimpleNamespace(trees=trees), recipe=recipe, cluster=cluster, step=0, total=10, folder=None,
        players={}, **more,
    )  # fmt: skip


def step_of(objective: Any, run: Any) -> Batch:
    """Let an objective see all arrays of a run as one step, and return them as a batch."""
    items = list(run.loader.trees)
    objective.before_step(run, items)
    return collate(items)
