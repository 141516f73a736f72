"""Representation alignment: a denoiser's states for a noisy array shall resemble an encoder's for the clean one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hone.diffusion.critics import features_of
from hone.diffusion.encoders import DIGIT_WIDTH, Encoder, frozen_encoder
from hone.diffusion.levels import spread
from hone.errors import ModelError
from hone.objectives.consistency import Count
from hone.objectives.denoising import Denoise
from hone.parts import part

NotNegative = Annotated[float, Field(ge=0)]
PROJECTOR = "projector"


@contextmanager
def overheard(network: nn.Module) -> Iterator[list[list[Tensor]]]:
    """Yield a list that is given the states of every call of a network's `inner` meanwhile.

    Args:
        network: has `inner`; where its forward pass does not use it, the list stays empty.
    """
    heard: list[list[Tensor]] = []
    inner: Any = network.inner

    def listening(*arguments: Any) -> list[Tensor]:
        heard.append(inner(*arguments))
        return heard[-1]

    before = network.__dict__.get("inner")
    network.__dict__["inner"] = listening  # which is found before the method of the class
    try:
        yield heard
    finally:
        del network.__dict__["inner"]
        if before is not None:
            network.__dict__["inner"] = before


def as_places(states: Tensor) -> Tensor:
    """Return features as (B, places, C).

    Args:
        states: (B, C) or (B, C, ...).
    """
    return states[:, None] if states.dim() == 2 else states.flatten(2).transpose(1, 2)


@part(
    "objective", "repa",
    papers=[
        (
            "Representation Alignment for Generation: Training Diffusion Transformers Is Easier Than You Think",
            "arXiv:2410.06940",
        ),
    ],
    claim="Aligning an early layer of a diffusion transformer with a frozen encoder's features of the clean array "
    "makes training many times faster, and the samples better.",
    deviations="The encoder is a small classifier that is trained on the data when the run starts, the digits' network "
    "that ships, or an array's own patches with their surroundings, in the place of DINOv2.",
)  # fmt: skip
@dataclass(kw_only=True)
class RepresentationAlignment(Denoise):
    """Denoising, and alignment of a layer's states h with an encoder's features e of the clean array, place by place.

    |F - F*|^2 - alignment mean over places of cos(projector(h), e),  projector: three layers with SiLU

    Where the network's places and the encoder's differ, the encoder's are averaged to the network's. In evaluation the
    loss is that of denoising alone.

    Args:
        alignment: weight of the alignment.
        depth: which of the network's inner states, from 1; None takes the one at 8/28 of the depth, as in the paper.
        encoder: classifier: trained on the data's labels when the run starts; digits: the network that ships; patches:
            each place's own numbers in the clean array and those around it, which needs no training.
        encoder_steps: that the classifier is trained for.
        width: channels of the classifier; the other encoders have their own.
        projector: width of the projector.
    """

    alignment: NotNegative = 0.5
    depth: Count | None = None
    encoder: Literal["classifier", "digits", "patches"] = "classifier"
    encoder_steps: Count = 300
    width: Count = 32
    projector: Count = 128
    _encoder: Encoder | None = field(init=False, default=None, repr=False)
    _layer: int = field(init=False, default=0, repr=False)
    _grid: tuple[int, ...] = field(init=False, default=(), repr=False)

    def equip(self, model: Any) -> None:
        """Put the projector beside the network.

        Args:
            model: the denoiser.

        Raises:
            ModelError: the network shows no states, none of places, or fewer than `depth`.
        """
        if not hasattr(model.hf, "inner"):
            raise ModelError(
                f"alignment looks at the inner states of its network, which {type(model.hf).__name__} does not show; "
                "use dit, unet or mlp"
            )
        parameter = next(model.parameters())
        with torch.no_grad():
            example = torch.zeros(1, *model.shape).to(parameter)
            states = model.hf.inner(example, torch.ones(1).to(parameter), None)
        depth = self.depth or max(1, round(8 / 28 * len(states)))
        if depth > len(states):
            raise ModelError(f"objective.depth: the network shows {len(states)} states, {depth} is not among them")
        self._layer = depth - 1
        inputs, *grid = states[self._layer].shape[1:]
        self._grid = tuple(grid)
        if len(grid) != len(model.shape) - 1:
            raise ModelError(
                f"model.network: alignment goes place by place, but the states of {type(model.hf).__name__} for arrays "
                f"{model.shape} have no places; use dit or unet"
            )
        width = DIGIT_WIDTH if self.encoder == "digits" else self.width
        outputs = self.features(example).shape[-1] if self.encoder == "patches" else width
        sizes = (inputs, self.projector, self.projector, outputs)
        layers = [nn.Linear(one, two) for one, two in itertools.pairwise(sizes)]
        made = nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])
        model.extras[PROJECTOR] = made.to(parameter)

    def setup(self, run: Any) -> None:
        """Prepare the encoder.

        Args:
            run: the run in progress.
        """
        if self.encoder != "patches" and run.loader is not None:
            self._encoder = frozen_encoder(
                self.encoder, run, width=self.width, steps=self.encoder_steps, what="objective.encoder"
            )

    @torch.no_grad()
    def features(self, arrays: Tensor) -> Tensor:
        """Return the features (B, places, C) of clean arrays.

        Args:
            arrays: (B, *shape).
        """
        if self._encoder is not None:
            maps = self._encoder.maps(arrays)
        elif arrays.dim() == 2:
            return arrays[:, None]
        else:
            maps = _surroundings(arrays, self._grid)
        if maps.dim() > 2 and tuple(maps.shape[2:]) != self._grid:
            pool: Any = F.adaptive_avg_pool1d if maps.dim() == 3 else F.adaptive_avg_pool2d
            maps = pool(maps, self._grid)
        return as_places(maps)

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        if not model.training:
            return super().loss(model, batch)
        with overheard(model.hf) as heard:
            found, figures = super().loss(model, batch)
        states = (heard[0] if heard else self.again(model, batch))[self._layer]
        projected = model.extras[PROJECTOR](as_places(states))
        alike = F.cosine_similarity(projected, self.features(batch.arrays), dim=-1).mean(1).sum()
        return found - self.alignment * alike, {**figures, "denoising": found.detach(), "alike": alike.detach()}

    def again(self, model: Any, batch: Any) -> list[Tensor]:
        """Return the inner states for the noisy arrays of the loss, from a pass of their own.

        Args:
            model: the denoiser, whose forward pass does not use `inner`.
            batch: B arrays.
        """
        sigma = self.sigmas(model, batch)
        noisy = batch.arrays + spread(sigma, batch.arrays) * self.normal(batch)
        return features_of(model, noisy, sigma, self.some_labels(model, batch, self.drop_labels))


def _surroundings(arrays: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Return the numbers of each place of a grid and of those around it, (B, C', *grid), less their mean."""
    pool: Any = F.adaptive_avg_pool1d if arrays.dim() == 3 else F.adaptive_avg_pool2d
    fine = pool(arrays, tuple(2 * side for side in grid))
    padded = F.pad(fine, [1, 1] * len(grid), mode="replicate")
    for axis in range(2, 2 + len(grid)):
        padded = padded.unfold(axis, 4, 2)  # a window of 4 around each 2
    found = padded.flatten(2 + len(grid)).movedim(-1, 2).flatten(1, 2)
    return found - found.mean(1, keepdim=True)
