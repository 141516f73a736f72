"""Shapes of networks that a denoiser can have: small ones for points, images and series, and those of diffusers."""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import nn

from hone.diffusion.layers import Diffusers, PointNet, Transformer, UNetwork
from hone.errors import HoneError
from hone.parts import part

Size = Annotated[int, Field(ge=1)]


@dataclass(kw_only=True)
class Network:
    """A shape of network."""

    dimensions: ClassVar[tuple[int, ...]] = (1, 2, 3)  # lengths of array shapes that it takes

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return a fresh network.

        Args:
            shape: of one array.
            classes: of the data, 0 for none.

        Raises:
            HoneError: arrays of that shape do not fit.
        """
        if len(shape) not in self.dimensions:
            wanted = {1: "points (d,)", 2: "series (C, T)", 3: "images (C, H, W)"}
            fitting = " or ".join(wanted[n] for n in self.dimensions)
            name = getattr(self, "name", type(self).__name__)
            raise HoneError(f"model.network: {name} takes {fitting}, but the data's arrays are {shape}")
        return self.make(shape, classes)

    def make(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return a fresh network for a shape that fits.

        Args:
            shape: of one array.
            classes: of the data, 0 for none.
        """
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """Return the specification that builds it again."""
        return {"name": getattr(self, "name", ""), **asdict(self)}


@part("network", "mlp", papers="original")
@dataclass(kw_only=True)
class MLP(Network):
    """A residual perceptron, for points; anything else is flattened.

    Args:
        width: of every layer.
        depth: residual blocks.
    """

    width: Size = 128
    depth: Size = 4

    def make(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return a fresh network.

        Args:
            shape: of one array.
            classes: of the data, 0 for none.
        """
        return PointNet(shape, classes, self.width, self.depth)


@part("network", "unet", papers="original")
@dataclass(kw_only=True)
class UNet(Network):
    """A U-shaped convolutional network with attention in the middle, for images and series.

    Args:
        channels: of the first level; those below have twice as many.
        levels: each halves the sides.
        blocks: residual blocks in each level, on the way down and on the way up.
        heads: of the attention.
    """

    dimensions: ClassVar[tuple[int, ...]] = (2, 3)
    channels: Size = 32
    levels: Size = 2
    blocks: Size = 1
    heads: Size = 2

    def make(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return a fresh network.

        Args:
            shape: of one array.
            classes: of the data, 0 for none.
        """
        return UNetwork(shape, classes, self.channels, self.levels, self.blocks, self.heads)


@part(
    "network",
    "dit",
    papers=[("Scalable Diffusion Models with Transformers", "arXiv:2212.09748")],
    claim="A transformer with more computation, by depth, width or smaller patches, draws better samples.",
)
@dataclass(kw_only=True)
class DiT(Network):
    """A transformer over patches whose normalisations hold the condition (adaLN-zero), for images and series.

    Args:
        width: of its states.
        depth: blocks.
        heads: of the attention.
        patch: side of a patch.
    """

    dimensions: ClassVar[tuple[int, ...]] = (2, 3)
    width: Size = 64
    depth: Size = 4
    heads: Size = 4
    patch: Size = 2

    def make(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return a fresh network.

        Args:
            shape: of one array.
            classes: of the data, 0 for none.
        """
        return Transformer(shape, classes, self.width, self.depth, self.heads, self.patch)


@part("network", "diffusers", papers="original")
@dataclass(kw_only=True)
class DiffusersNetwork(Network):
    """A network of the diffusers library, fresh from a configuration.

    Args:
        kind: its class, UNet2DModel, DiTTransformer2DModel or whatever else is told a timestep and class_labels only.
        config: its options, in the words of diffusers; sizes and channels follow from the data.
    """

    dimensions: ClassVar[tuple[int, ...]] = (3,)
    kind: str = "UNet2DModel"
    config: dict[str, Any]

    def make(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """Return a fresh network.

        Args:
            shape: of one array.
            classes: of the data, 0 for none.

        Raises:
            HoneError: diffusers is not installed, or has no such class, or it is called with more than we have.
        """
        try:
            import diffusers
        except ImportError as error:
            raise HoneError(
                "model.network: diffusers is not installed; install it with pip install diffusers"
            ) from error
        found = getattr(diffusers, self.kind, None)
        if found is None:
            raise HoneError(f"model.network.kind: diffusers {diffusers.__version__} has no class '{self.kind}'")
        sizes = {"sample_size": shape[-1], "in_channels": shape[0], "out_channels": shape[0]}
        asked = list(inspect.signature(getattr(found, "forward", found)).parameters.values())
        needed = [one.name for one in asked[3:] if one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD]
        if needed or not {"timestep", "class_labels"} <= {one.name for one in asked}:
            why = f"it needs {', '.join(needed)}" if needed else "it takes no such arguments"
            raise HoneError(
                f"model.network.kind: '{self.kind}' cannot be called as network(x, timestep, class_labels=...): {why}; "
                "use UNet2DModel or DiTTransformer2DModel"
            )
        always = "num_embeds_ada_norm" in inspect.signature(found).parameters  # its blocks have no way without a class
        if always:  # it keeps a row more for "none" itself
            classes_of = {"num_embeds_ada_norm": max(1, classes)}
        else:
            classes_of = {"num_class_embeds": classes + 1} if classes else {}
        network = found(**{**sizes, **classes_of, **self.config})
        for module in network.modules():
            if hasattr(module, "token_drop"):  # its own, for 10% in training: objectives say which classes are left out
                module.dropout_prob = 0.0
        return Diffusers(network, classes, always)
