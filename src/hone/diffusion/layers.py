"""The modules of small networks F(x, noise, labels, extras) for points, images and series.

All are conditioned through one embedding (B, E) of the noise level, the class and whatever else an objective adds
(`Conditioned.widen`), and start from an output of zero, so that a fresh denoiser is its skip connection.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hone.errors import HoneError, ModelError


class Fourier(nn.Module):
    """Features of a number: sines and cosines of it at frequencies from 1 to 8, (B,) -> (B, size).

    Higher ones make the derivative along a trajectory, which continuous-time consistency learns from, mostly noise.
    """

    frequencies: Tensor

    def __init__(self, size: int) -> None:
        """Make `size` features, an even number."""
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, math.log10(8), size // 2), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """Return the features."""
        angles = values[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Conditioned(nn.Module):
    """A network with an embedding of its noise level, of classes (one more stands for "none"), and of extra numbers."""

    def __init__(self, width: int, classes: int) -> None:
        """Make the embedding.

        Args:
            width: E.
            classes: number of classes, 0 for data without.
        """
        super().__init__()
        self.width, self.classes = width, classes
        self.features = Fourier(64)
        self.embed_noise = nn.Sequential(nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width))
        self.embed_class = nn.Embedding(classes + 1, width) if classes else None
        self.embed_extras = nn.ModuleList()

    def widen(self, count: int) -> None:
        """Take `count` more numbers from now on; their effect is 0 at first.

        Args:
            count: numbers beside the noise level, such as the time that a jump leads to.
        """
        for _ in range(count - len(self.embed_extras)):
            first: Any = self.embed_noise[0]
            layer = nn.Linear(64, self.width).to(first.weight)
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
            self.embed_extras.append(layer)

    def embedding(self, noise: Tensor, labels: Tensor | None, extras: Tensor | None) -> Tensor:
        """Return the (B, E) embedding.

        Args:
            noise: (B,) as `Coefficients.noise`.
            labels: (B,) int64, -1 for none; None for none at all.
            extras: (B, k) of the k numbers that `widen` was called for.

        Raises:
            ModelError: there are more or fewer numbers than that.
        """
        shown = 0 if extras is None else extras.shape[-1]
        if shown != len(self.embed_extras):
            raise ModelError(misshown(shown, len(self.embed_extras)))
        found = self.embed_noise(self.features(noise))
        if self.embed_class is not None:
            found = found + self.embed_class(rows_of(labels, noise, self.classes))
        if extras is not None:
            for layer, values in zip(self.embed_extras, extras.unbind(-1), strict=True):
                found = found + layer(self.features(values))
        return F.silu(found)


def misshown(shown: int, wanted: int) -> str:
    """Return the message for a network that is not shown the numbers that it was trained with.

    Args:
        shown: numbers beside the noise level.
        wanted: that it was widened for.
    """
    if not wanted:
        return (
            f"a network without numbers beside its noise level is shown {shown}: only models that an objective such as "
            "ctm, soundctm or sfd-v has trained take them; train one, or use an objective and a solver of plain "
            "denoisers"
        )
    return (
        f"this denoiser was trained with {wanted} more number{'s' * (wanted > 1)} beside the noise level (by ctm, "
        f"soundctm or sfd-v) and is shown {shown}. It is no teacher, no small denoiser of t-stitch and no start of "
        "another objective: name the run of a plain denoiser there. To draw from it, name its run, not the model folder"
    )


def rows_of(labels: Tensor | None, noise: Tensor, classes: int) -> Tensor:
    """Return the row (B,) that each array has in a table of classes whose last one stands for "none".

    Args:
        labels: (B,) int64, -1 for none; None for none at all.
        noise: (B,), of which B and the device are taken.
        classes: how many there are.
    """
    none = torch.full_like(noise, classes, dtype=torch.int64)
    return none if labels is None else torch.where(labels < 0, none, labels)


def _zeroed(layer: nn.Module) -> Any:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class PointNet(Conditioned):
    """A residual perceptron for points (B, d)."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, depth: int) -> None:
        """Make the layers; see `MLP`."""
        super().__init__(width, classes)
        size = math.prod(shape)
        self.shape = shape
        self.enter = nn.Linear(size, width)
        self.blocks: Any = nn.ModuleList(
            nn.ModuleDict({
                "norm": nn.LayerNorm(width, elementwise_affine=False), "shift": nn.Linear(width, 2 * width),
                "first": nn.Linear(width, width), "second": nn.Linear(width, width),
            })
            for _ in range(depth)
        )  # fmt: skip
        self.leave = _zeroed(nn.Linear(width, size))

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None, extras: Tensor | None = None) -> Tensor:
        """Return F (B, *shape).

        Args:
            x: (B, *shape) scaled noisy arrays, c_in x.
            noise: (B,) c_noise.
            labels: (B,) int64 classes, -1 for none.
            extras: (B, k) further numbers.
        """
        return self.leave(self.inner(x, noise, labels, extras)[-1]).view(-1, *self.shape)

    def inner(
        self, x: Tensor, noise: Tensor, labels: Tensor | None = None, extras: Tensor | None = None
    ) -> list[Tensor]:
        """Return the (B, width) states after each block: features for discriminators.

        Args:
            x: (B, *shape) scaled noisy arrays, c_in x.
            noise: (B,) c_noise.
            labels: (B,) int64 classes, -1 for none.
            extras: (B, k) further numbers.
        """
        embedding = self.embedding(noise, labels, extras)
        states, found = self.enter(x.flatten(1)), []
        for block in self.blocks:
            scale, shift = block["shift"](embedding).chunk(2, dim=-1)
            hidden = block["first"](block["norm"](states) * (1 + scale) + shift)
            states = states + block["second"](F.silu(hidden))
            found.append(states)
        return found


class Block(nn.Module):
    """Two convolutions with the embedding between them, around a skip connection."""

    def __init__(self, conv: Any, inputs: int, outputs: int, embedding: int) -> None:
        """Make the layers.

        Args:
            conv: nn.Conv1d or nn.Conv2d.
            inputs: channels.
            outputs: channels.
            embedding: size of the embedding.
        """
        super().__init__()
        self.first_norm = nn.GroupNorm(_groups(inputs), inputs)
        self.first = conv(inputs, outputs, 3, padding=1)
        self.shift = nn.Linear(embedding, 2 * outputs)
        self.second_norm = nn.GroupNorm(_groups(outputs), outputs)
        self.second = _zeroed(conv(outputs, outputs, 3, padding=1))
        self.skip = conv(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Return (B, outputs, ...)."""
        scale, shift = self.shift(embedding).reshape(len(x), -1, *[1] * (x.dim() - 2)).chunk(2, dim=1)
        hidden = self.first(F.silu(self.first_norm(x)))
        hidden = self.second(F.silu(self.second_norm(hidden) * (1 + scale) + shift))
        return self.skip(x) + hidden


class Attend(nn.Module):
    """Self-attention over the places of a feature map. Written out, since forward-mode derivatives need it so."""

    def __init__(self, channels: int, heads: int) -> None:
        """Make the layers."""
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(_groups(channels), channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.leave = _zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return x with what each place has gathered, (B, C, ...)."""
        states = self.norm(x).flatten(2).transpose(1, 2)  # (B, places, C)
        query, key, value = self.qkv(states).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return x + self.leave(attention(query, key, value)).transpose(1, 2).reshape_as(x)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return softmax(q k^T / sqrt(d)) v with heads side by side.

    Args:
        query: (B, H, T, d), like the others.
        key: where it looks.
        value: what it takes.

    Returns:
        (B, T, H d).
    """
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2)


def _groups(channels: int) -> int:
    return math.gcd(channels, 8)


class UNetwork(Conditioned):
    """A U-shaped convolutional network for images (B, C, H, W) or series (B, C, T)."""

    def __init__(
        self, shape: tuple[int, ...], classes: int, channels: int, levels: int, blocks: int, heads: int
    ) -> None:
        """Make the layers; see `UNet`."""
        super().__init__(4 * channels, classes)
        series = len(shape) == 2
        conv: Any = nn.Conv1d if series else nn.Conv2d
        self.pool: Any = F.avg_pool1d if series else F.avg_pool2d
        self.levels = levels
        self.enter = conv(shape[0], channels, 3, padding=1)
        widths = [channels * (1 if level == 0 else 2) for level in range(levels)]
        self.down: Any = nn.ModuleList()
        self.up: Any = nn.ModuleList()
        current, skips = channels, [channels]
        for width in widths:
            stage = nn.ModuleList()
            for _ in range(blocks):
                stage.append(Block(conv, current, width, self.width))
                current = width
                skips.append(current)
            self.down.append(stage)
        self.middle = nn.ModuleList(
            [Block(conv, current, current, self.width), Block(conv, current, current, self.width)]
        )
        self.attend = Attend(current, heads)
        for width in reversed(widths):
            stage = nn.ModuleList()
            for _ in range(blocks):
                stage.append(Block(conv, current + skips.pop(), width, self.width))
                current = width
            self.up.append(stage)
        self.norm = nn.GroupNorm(_groups(current), current)
        self.leave = _zeroed(conv(current, shape[0], 3, padding=1))

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None, extras: Tensor | None = None) -> Tensor:
        """Return F (B, *shape).

        Args:
            x: (B, *shape) scaled noisy arrays, c_in x.
            noise: (B,) c_noise.
            labels: (B,) int64 classes, -1 for none.
            extras: (B, k) further numbers.
        """
        embedding = self.embedding(noise, labels, extras)
        states, skips = self._descend(x, embedding)
        for level, stage in enumerate(self.up):
            for block in stage:
                states = block(torch.cat([states, skips.pop()], dim=1), embedding)
            if level + 1 < self.levels:
                states = F.interpolate(states, size=skips[-1].shape[2:], mode="nearest")
        return self.leave(F.silu(self.norm(states)))

    def inner(
        self, x: Tensor, noise: Tensor, labels: Tensor | None = None, extras: Tensor | None = None
    ) -> list[Tensor]:
        """Return the feature maps of the way down and of the middle: features for discriminators.

        Args:
            x: (B, *shape) scaled noisy arrays, c_in x.
            noise: (B,) c_noise.
            labels: (B,) int64 classes, -1 for none.
            extras: (B, k) further numbers.
        """
        states, skips = self._descend(x, self.embedding(noise, labels, extras))
        return [*skips[1:], states]

    def _descend(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, list[Tensor]]:
        states = self.enter(x)
        skips = [states]
        for level, stage in enumerate(self.down):
            for block in stage:
                states = block(states, embedding)
                skips.append(states)
            if level + 1 < self.levels:
                states = self.pool(states, 2, ceil_mode=True)
        first, second = self.middle
        return second(self.attend(first(states, embedding)), embedding), skips


class Transformer(Conditioned):
    """Attention over patches with the embedding in every normalisation (adaLN-zero), for images or series."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int, depth: int, heads: int, patch: int) -> None:
        """Make the layers; see `DiT`."""
        super().__init__(width, classes)
        self.shape, self.patch, self.heads = shape, patch, heads
        if any(side % patch for side in shape[1:]):
            raise HoneError(f"model.network: patches of {patch} do not divide arrays of {shape}")
        self.grid = tuple(side // patch for side in shape[1:])
        places, size = math.prod(self.grid), shape[0] * patch ** (len(shape) - 1)
        self.enter = nn.Linear(size, width)
        self.positions = nn.Parameter(0.02 * torch.randn(1, places, width))
        self.blocks: Any = nn.ModuleList(
            nn.ModuleDict({
                "norm": nn.LayerNorm(width, elementwise_affine=False), "shift": _zeroed(nn.Linear(width, 6 * width)),
                "qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width),
                "first": nn.Linear(width, 4 * width), "second": nn.Linear(4 * width, width),
            })
            for _ in range(depth)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.leave = _zeroed(nn.Linear(width, size))

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None, extras: Tensor | None = None) -> Tensor:
        """Return F (B, *shape).

        Args:
            x: (B, *shape) scaled noisy arrays, c_in x.
            noise: (B,) c_noise.
            labels: (B,) int64 classes, -1 for none.
            extras: (B, k) further numbers.
        """
        places = self.inner(x, noise, labels, extras)[-1].flatten(2).transpose(1, 2)
        return self._merge(self.leave(self.norm(places)))

    def inner(
        self, x: Tensor, noise: Tensor, labels: Tensor | None = None, extras: Tensor | None = None
    ) -> list[Tensor]:
        """Return the states after each block as maps (B, width, *grid of patches), as other networks show theirs.

        Args:
            x: (B, *shape) scaled noisy arrays, c_in x.
            noise: (B,) c_noise.
            labels: (B,) int64 classes, -1 for none.
            extras: (B, k) further numbers.
        """
        embedding = self.embedding(noise, labels, extras)[:, None]
        states, found = self.enter(self._cut(x)) + self.positions, []
        for block in self.blocks:
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = block["shift"](embedding).chunk(6, dim=-1)
            hidden = block["qkv"](block["norm"](states) * (1 + scale) + shift)
            query, key, value = hidden.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            states = states + gate * block["out"](attention(query, key, value))
            hidden = block["first"](block["norm"](states) * (1 + scale_mlp) + shift_mlp)
            states = states + gate_mlp * block["second"](F.gelu(hidden, approximate="tanh"))
            found.append(states.transpose(1, 2).unflatten(2, self.grid))
        return found

    def _cut(self, x: Tensor) -> Tensor:
        """(B, C, ...) to (B, places, C patch^n)."""
        batch, channels, *sides = x.shape
        cells = [n for side in sides for n in (side // self.patch, self.patch)]
        x = x.reshape(batch, channels, *cells)
        grid, inside = range(2, x.dim(), 2), range(3, x.dim(), 2)
        return x.permute(0, *grid, 1, *inside).reshape(batch, math.prod(self.grid), -1)

    def _merge(self, rows: Tensor) -> Tensor:
        """Undo `_cut`."""
        channels, *sides = self.shape
        x = rows.reshape(len(rows), *self.grid, channels, *[self.patch] * len(sides))
        order = [n for axis in range(len(sides)) for n in (1 + axis, 2 + len(sides) + axis)]
        return x.permute(0, 1 + len(sides), *order).reshape(len(rows), *self.shape)


def _contiguous(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The forward derivative of group_norm takes no transposed array, which attention leaves behind."""
    return (given[0].contiguous(), *given[1:])


class Diffusers(nn.Module):
    """One of diffusers' networks: UNet2DModel and whatever is called as network(x, timestep, class_labels=...)."""

    def __init__(self, network: nn.Module, classes: int, always: bool = False) -> None:
        """Wrap a network; its noise input is `1000 c_noise`, whatever the parameterisation's c_noise is.

        Args:
            network: of diffusers.
            classes: of the data, 0 for none.
            always: whether it is told a class, the first one, where the data has none.
        """
        super().__init__()
        self.network, self.classes, self.told = network, classes, always or classes > 0
        for module in network.modules():
            if isinstance(module, nn.GroupNorm):
                module.register_forward_pre_hook(_contiguous)

    def forward(self, x: Tensor, noise: Tensor, labels: Tensor | None = None, extras: Tensor | None = None) -> Tensor:
        """Return F (B, *shape).

        Args:
            x: (B, *shape) scaled noisy arrays, c_in x.
            noise: (B,) c_noise.
            labels: (B,) int64 classes, -1 for none.
            extras: (B, k) further numbers.
        """
        if extras is not None:
            raise HoneError("this objective shows its network a second number, which diffusers' networks do not take")
        given: dict[str, Any] = {}
        if self.told:
            given["class_labels"] = rows_of(labels, noise, self.classes)
        found: Any = self.network(x, 1000 * noise, **given)
        return found.sample
