"""TriAdaptLoRA: a square matrix between the factors, split into triangles, that grows where it learns most."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from hone.adapters.host import Host, adapted_layers
from hone.adapters.layers import Factors, Layout, Wrapped, check_rank, matrix_shape
from hone.callbacks.base import Callback
from hone.engine import sharding
from hone.errors import HoneError
from hone.parts import part
from hone.precision import wide_dtype

if TYPE_CHECKING:
    from hone.engine.loop import Run


class Triangular(Wrapped):
    """W x + s B (L + U) A x, of which a part is in use.

    Rank comes in blocks. A block brings rows of A, columns of B, the rows of L up to the diagonal and the columns of U
    above it, each a tensor of its own:  C_k = [[C_(k-1), U_k], [L_k]] with C = L + U.  A new block has B = 0, U = 0
    and L = [0, I], so it adds nothing until it has trained. Blocks that are not in use cost their weights alone: no
    gradient, no optimizer state, no time.

    Args:
        base: the layer that the factors go around.
        layout: how the layer stores its weight.
        sizes: ranks of the blocks.
        scale: s.
    """

    def __init__(self, base: nn.Module, layout: Layout, *, sizes: list[int], scale: float) -> None:
        """Make all blocks, all of them in use."""
        super().__init__(base, layout)
        weight = cast(Tensor, base.weight)
        self.sizes, self.scale, self.live = sizes, scale, len(sizes)
        outputs, inputs = layout.matrix(weight).shape
        down, up = layout.shapes(weight, 1)  # asked for once: few bits would be dequantised
        self._tails = down[1:], up[2:]
        kind: Any = {"dtype": wide_dtype(weight), "device": weight.device}
        groups: tuple[list[nn.Parameter], ...] = ([], [], [], [])
        before = 0
        for size in sizes:
            rows = nn.init.kaiming_uniform_(torch.empty(size, inputs), a=math.sqrt(5))  # as in LoRA
            lower = torch.eye(size, before + size).roll(before, 1)
            block = [rows, torch.zeros(outputs, size), lower, *([torch.zeros(before, size)] if before else [])]
            for group, tensor in zip(groups, block, strict=False):  # the first block has nothing above its diagonal
                group.append(nn.Parameter(tensor.to(**kind)))
            before += size
        self.lora_A, self.lora_B, self.lower, self.upper = (nn.ParameterList(group) for group in groups)

    @property
    def rank(self) -> int:
        """Rank of the blocks in use."""
        return sum(self.sizes[: self.live])

    @property
    def room(self) -> bool:
        """Whether a block is left to come into use."""
        return self.live < len(self.sizes)

    def block(self, index: int) -> list[nn.Parameter]:
        """Return the tensors of a block.

        Args:
            index: its place, from 0.
        """
        return [self.lora_A[index], self.lora_B[index], self.lower[index], *self.upper[max(0, index - 1) : index]]

    def middle(self) -> Tensor:
        """Return C = L + U of the blocks in use, (rank, rank)."""
        return assemble(list(self.lower)[: self.live], list(self.upper)[: self.live - 1])

    def pair(self) -> tuple[Tensor, Tensor]:
        """Return C A, (rank, in), and B, (out, rank)."""
        down, up = torch.cat(list(self.lora_A)[: self.live]), torch.cat(list(self.lora_B)[: self.live], 1)
        return self.middle() @ down, up

    def norm(self) -> float:
        """Return |C|_F / rank."""
        lower, upper = ([sharding.whole(t.detach()) for t in group] for group in (self.lower, self.upper))
        return float(assemble(lower[: self.live], upper[: self.live - 1]).norm()) / self.rank

    def delta(self) -> Tensor:
        """Return s B C A, (out, in)."""
        down, up = self.pair()
        return up @ down * self.scale

    def adapted(self, x: Tensor) -> Tensor:
        """Return W x + b + s B C A x, the low-rank term added in place."""
        layout, base = self.layout, self.base_layer
        rows = layout.rows(x)
        out = layout.output(base, rows)
        down, up = (factor.to(out.dtype) for factor in self._shaped())
        return layout.restore(layout.add(out, layout.project(base, rows, down), up, self.scale), x)

    def factors(self) -> Factors | None:
        """Return C A and B as the factors of a plain LoRA."""
        return Factors(*self._shaped(), self.scale * self.rank)

    def _shaped(self) -> tuple[Tensor, Tensor]:
        """Return C A and B in the shapes that the layout wants."""
        down, up = self.pair()
        return down.reshape(-1, *self._tails[0]), up.reshape(*up.shape, *self._tails[1])


def assemble(lower: list[Tensor], upper: list[Tensor]) -> Tensor:
    """Return the square matrix that the blocks of two triangles make.

    C_0 = L_0;  C_k = [[C_(k-1), U_k], [L_k]]

    Args:
        lower: L_k, (size of block k, rank of the blocks up to k).
        upper: U_k from the second block on, (rank of the blocks before k, size of block k).
    """
    square = lower[0]
    for rows, columns in zip(lower[1:], upper, strict=True):
        square = torch.cat([torch.cat([square, columns], 1), rows])
    return square


def growing(rule: str, left: int, progress: float, fixed: int) -> int:
    """Return how many layers may grow at once.

    linear: left * p;  exponential: left^p;  fixed: always as many;  never fewer than one

    Args:
        rule: one of the three.
        left: rank that the budget still has.
        progress: p, how far the run is, in [0, 1].
        fixed: the number of the fixed rule.
    """
    found = {"linear": left * progress, "exponential": left**progress, "fixed": fixed}[rule]
    return max(1, int(found))


class Growth(Callback):
    """Lets the layers grow whose middle matrix has gained most since the last look.

    score = |C_t|_F / rank - |C_before|_F / rank;  a layer grows when its score is among the n highest, n from `growing`
    """

    def __init__(self, options: TriAdaptLoRA) -> None:
        """Begin with the first block of every layer.

        Args:
            options: the adapter.
        """
        self.options = options
        self.live: dict[str, int] = {}
        self.before: dict[str, float] = {}

    def on_start(self, run: Run) -> None:
        """Put all blocks but the first out of use, or those that a resumed run had not reached."""
        asleep: set[int] = set()
        for name, layer in _layers(run).items():
            layer.live = self.live.setdefault(name, 1)
            self.before.setdefault(name, layer.norm())
            asleep.update(id(p) for index in range(layer.live, len(layer.sizes)) for p in layer.block(index))
        self._activate(run, asleep=asleep)

    def on_step(self, run: Run, row: dict[str, Any]) -> None:
        """Look at the layers when it is time to."""
        layers, options = _layers(run), self.options
        first = round(options.warmup * run.total)
        left = options.rank * len(layers) - sum(layer.rank for layer in layers.values())
        if first < run.step < run.total and run.step % options.interval == 0 and left > 0:
            progress = (run.step - first) / (run.total - first)
            self._grow(run, layers, left, growing(options.rule, left, progress, options.layers_at_once))
        row["rank"] = sum(layer.rank for layer in layers.values()) / len(layers)

    def _grow(self, run: Run, layers: dict[str, Triangular], left: int, count: int) -> None:
        """Take a block more into use in the layers with the highest scores, as far as the budget goes."""
        scores = {name: layer.norm() - self.before[name] for name, layer in layers.items()}
        able = [name for name, layer in layers.items() if layer.room]
        awake: set[int] = set()
        for name in sorted(able, key=lambda name: -scores[name])[:count]:
            layer = layers[name]
            if layer.sizes[layer.live] > left:
                continue
            left -= layer.sizes[layer.live]
            awake.update(id(p) for p in layer.block(layer.live))
            layer.live += 1
            self.live[name] = layer.live
        self.before = {name: layer.norm() for name, layer in layers.items()}
        self._activate(run, awake=awake)

    def _activate(self, run: Run, *, awake: Collection[int] = (), asleep: Collection[int] = ()) -> None:
        """Change which tensors train: these too, those no longer."""
        player = run.players["model"]
        player.activate([n for n, p in player.params if (p.requires_grad or id(p) in awake) and id(p) not in asleep])

    def state_dict(self) -> dict[str, Any]:
        """Return how many blocks each layer uses, and what it was measured at."""
        return {"live": dict(self.live), "before": dict(self.before)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: as `state_dict` returned it.
        """
        self.live, self.before = dict(state["live"]), dict(state["before"])


def _layers(run: Run) -> dict[str, Triangular]:
    return {name: layer for name, layer in adapted_layers(run.model).items() if isinstance(layer, Triangular)}


@part(
    "adapter",
    "triadaptlora",
    papers=[
        (
            "TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
            "arXiv:2501.08008",
        )
    ],
    claim="Letting rank grow where the middle matrix learns most is better than the same rank everywhere.",
    deviations="Built from an implementation and the paper's abstract; the text's equations were not compared. The "
    "scale is alpha / rank throughout, not over the rank of the moment, which would shrink what was learnt whenever a "
    "layer grows. C starts at the identity and A as LoRA's: with B and C both at zero no gradient leads away. Diagonal "
    "blocks are in L alone, not in both triangles. The budget is never exceeded. There is no orthogonality penalty.",
)
@dataclass(kw_only=True)
class TriAdaptLoRA(Host):
    """Train B (L + U) A beside each frozen weight, with more rank for the layers that learn most.

    W' = W + s B (L + U) A, s = alpha / rank;  L lower, U upper triangular, in blocks

    Every layer begins with `start_rank`; while the layers together have less than `rank` each, some grow by `growth`
    at a time: see `Growth`. Saved as plain LoRA of the rank that each layer has reached. Room for `max_rank` is made at
    the start, so that every checkpoint has the same tensors: 4 bytes for each number that is not in use yet.

    Args:
        rank: mean rank of the layers in the end.
        start_rank: rank of every layer at the start.
        growth: rank that a layer gains at once; None means half of `rank`.
        max_rank: highest rank of a layer; None means 4 rank, or what the layer can have.
        alpha: numerator of the scale; None means 2 rank.
        warmup: share of the run before the first growth.
        interval: steps from one look to the next.
        rule: how the number of layers that grow at once goes with the steps.
        layers_at_once: that number under the rule "fixed".
    """

    rank: Annotated[int, Field(ge=1)] = 8
    start_rank: Annotated[int, Field(ge=1)] = 1
    growth: Annotated[int, Field(ge=1)] | None = None
    max_rank: Annotated[int, Field(ge=1)] | None = None
    alpha: Annotated[float, Field(gt=0)] | None = None
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    interval: Annotated[int, Field(ge=1)] = 10
    rule: Literal["linear", "exponential", "fixed"] = "linear"
    layers_at_once: Annotated[int, Field(ge=1)] = 1

    def chosen(self, model: nn.Module) -> list[str]:
        """Return the names of the layers to adapt.

        Args:
            model: a plain network.

        Raises:
            HoneError: the ranks contradict each other.
        """
        most = math.inf if self.max_rank is None else self.max_rank
        if not self.start_rank <= self.rank <= most:
            raise HoneError(
                f"adapter.start_rank, adapter.rank and adapter.max_rank: {self.start_rank}, {self.rank} and {most}; "
                "expected each to be no more than the next"
            )
        return super().chosen(model)

    def wrap(self, name: str, base: nn.Module, layout: Layout) -> Triangular:
        """Return the layer with all its blocks.

        Args:
            name: dotted name of the layer.
            base: the layer.
            layout: how it stores its weight.

        Raises:
            HoneError: the mean rank is more than the matrix can have.
        """
        shape = matrix_shape(base)
        check_rank(name, shape, self.rank)
        growth, room = self.growth or max(1, self.rank // 2), min(*shape, self.max_rank or 4 * self.rank)
        sizes = [self.start_rank, *[growth] * ((room - self.start_rank) // growth)]
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        return Triangular(base, layout, sizes=sizes, scale=alpha / self.rank)

    def callbacks(self) -> list[Callback]:
        """Return what lets layers grow."""
        return [Growth(self)]
