"""Sparse updates: a frozen weight plus trained values at chosen entries, and SpIEL, which moves the entries.

W' = W + scatter(values, entries). The forward pass makes W' a piece at a time, multiplies and forgets; the backward
pass makes it again for the gradient of the input and keeps, of every piece of the weight's gradient, the chosen
entries alone. So gradients and optimizer state exist for those only, and nothing as large as the weight stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple, Protocol, cast

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from hone.adapters.host import Host
from hone.adapters.layers import Convolution, Layout, Lookup, Wrapped
from hone.adapters.regrow import Regrow
from hone.errors import HoneError
from hone.parts import part
from hone.precision import wide_dtype

PIECE = 1 << 21  # entries of W' that are made at a time: 8 MiB in float32


class Observer(Protocol):
    """What may look at the gradient of a whole weight while it exists."""

    def see(self, start: int, gradient: Tensor, last: bool) -> None:
        """Look at some rows of it.

        Args:
            start: index of the first of these entries in the flattened matrix.
            gradient: (rows, in), gone afterwards.
            last: whether this backward pass has no more rows.
        """


class Piece(NamedTuple):
    """Some rows of a matrix.

    Args:
        rows: which.
        entries: which of the chosen entries lie in them.
        start: index of their first entry in the flattened matrix.
        last: whether no rows follow.
    """

    rows: slice
    entries: slice
    start: int
    last: bool


class _Product(torch.autograd.Function):
    """x W'^T + b; can be differentiated once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: Sparse) -> Tensor:
        ctx.save_for_backward(x, values)
        ctx.layer, ctx.bias = layer, None if bias is None else bias.dtype
        out, base = x.new_empty(len(x), layer.outputs), layer.matrix()  # once: few bits are dequantised as a whole
        for piece in layer.pieces():
            torch.mm(x, layer.rows_of(piece, base, values, x.dtype).t(), out=out[:, piece.rows])
        return out if bias is None else out.add_(bias.to(out.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, values = ctx.saved_tensors
        layer: Sparse = ctx.layer
        to_x, base = (torch.zeros_like(x), layer.matrix()) if ctx.needs_input_grad[0] else (None, None)
        to_values = torch.empty_like(values) if ctx.needs_input_grad[1] else None
        for piece in layer.pieces():
            part_ = gradient[:, piece.rows]
            if to_x is not None and base is not None:
                to_x.addmm_(part_, layer.rows_of(piece, base, values, x.dtype))
            if to_values is not None:
                layer.keep(piece, part_.t() @ x, to_values)
        to_bias = gradient.sum(0).to(ctx.bias) if ctx.bias is not None and ctx.needs_input_grad[2] else None
        return to_x, None if to_values is None else layer.trained(to_values), to_bias, None


class _Anything(torch.autograd.Function):
    """What a convolution or an embedding computes with W'; the backward pass computes it again, to differentiate it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, layer: Sparse) -> Tensor:
        ctx.save_for_backward(x, values, bias)
        ctx.layer = layer
        return layer.call(x, layer.whole(values, x), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, values, bias = ctx.saved_tensors
        layer: Sparse = ctx.layer
        with torch.enable_grad():
            inputs = x.detach().requires_grad_(ctx.needs_input_grad[0])
            weight = layer.whole(values.detach(), x).requires_grad_(ctx.needs_input_grad[1])
            own = None if bias is None else bias.detach().requires_grad_(ctx.needs_input_grad[2])
            wanted = [t for t in (inputs, weight, own) if t is not None and t.requires_grad]
            found = iter(torch.autograd.grad(layer.call(inputs, weight, own), wanted, gradient))
        to_x = next(found) if ctx.needs_input_grad[0] else None
        to_values = None
        if ctx.needs_input_grad[1]:
            to_values = torch.empty_like(values)
            whole = Piece(slice(0, layer.outputs), slice(0, len(values)), 0, True)
            layer.keep(whole, layer.layout.matrix(next(found)), to_values)
            to_values = layer.trained(to_values)
        return to_x, to_values, next(found, None), None


class Sparse(Wrapped):
    """W' x + b with W' = W + scatter(values, entries).

    Args:
        base: the frozen layer.
        layout: how it stores its weight.
        entries: (n,) indices of the chosen entries in the flattened (out, in) matrix.
    """

    index: Tensor

    def __init__(self, base: nn.Module, layout: Layout, entries: Tensor) -> None:
        """Start with values of zero."""
        super().__init__(base, layout)
        weight = cast(Tensor, base.weight)
        self.outputs, self.inputs = layout.matrix(weight).shape
        self.observer: Observer | None = None
        # Half precision swallows small optimizer steps.
        dtype = wide_dtype(weight)
        self.values = nn.Parameter(torch.zeros(len(entries), dtype=dtype, device=weight.device))
        wide = self.outputs * self.inputs > torch.iinfo(torch.int32).max
        index = entries.sort().values.to(device=weight.device, dtype=torch.int64 if wide else torch.int32)
        self.register_buffer("index", index)

    def total(self, values: Tensor) -> Tensor:
        """Return what is added to the chosen entries, (n,).

        Args:
            values: the values that train.
        """
        return values

    def trained(self, gradient: Tensor) -> Tensor:
        """Return the gradient of the values, zero at those that do not train; here all do.

        Args:
            gradient: (n,) numbers, one per entry.
        """
        return gradient

    def pieces(self) -> Iterator[Piece]:
        """Yield the rows of the matrix, at most `PIECE` entries at a time where one row is no more than that."""
        step = max(1, PIECE // self.inputs)
        starts = list(range(0, self.outputs, step))
        edges = [0, len(self.index)]
        if len(starts) > 1:
            inner = torch.tensor(starts[1:], device=self.index.device) * self.inputs
            edges[1:1] = torch.searchsorted(self.index, inner.to(self.index.dtype)).tolist()
        for number, start in enumerate(starts):
            rows = slice(start, min(start + step, self.outputs))
            entries = slice(edges[number], edges[number + 1])
            yield Piece(rows, entries, start * self.inputs, number == len(starts) - 1)

    def rows_of(self, piece: Piece, base: Tensor, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rows of W', (rows, in).

        Args:
            piece: which.
            base: W, (out, in).
            values: (n,) the values that train.
            dtype: of the result.
        """
        own = base[piece.rows]
        made = values.new_empty(own.shape).copy_(own)
        chosen = self.index[piece.entries].long() - piece.start
        made.view(-1).index_add_(0, chosen, self.total(values)[piece.entries])
        return made.to(dtype)

    def keep(self, piece: Piece, gradient: Tensor, into: Tensor) -> None:
        """Keep the chosen entries of some rows of the weight's gradient; an observer may look at the rest.

        Args:
            piece: which rows.
            gradient: (rows, in).
            into: (n,) where they go.
        """
        chosen = self.index[piece.entries].long() - piece.start
        into[piece.entries] = gradient.reshape(-1)[chosen].to(into.dtype)
        if self.observer is not None:
            self.observer.see(piece.start, gradient, piece.last)

    def whole(self, values: Tensor, x: Tensor) -> Tensor:
        """Return W' as the layer stores it.

        Args:
            values: (n,) the values that train.
            x: an input, whose precision it gets; ids have none, so that it is the base's.
        """
        base = cast(Tensor, self.base_layer.weight)
        everything = Piece(slice(0, self.outputs), slice(0, len(values)), 0, True)
        dtype = x.dtype if x.is_floating_point() else base.dtype
        made = self.rows_of(everything, self.layout.matrix(base), values, dtype)
        return self.layout.stored(made, base.shape)

    def call(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return what the base layer computes with another weight.

        Args:
            x: its input.
            weight: as it stores it.
            bias: its bias, None when it has none.
        """
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias.to(weight.dtype)}
        return cast(Tensor, functional_call(self.base_layer, tensors, (x,)))

    def chosen(self) -> Tensor:
        """Return the weights at the chosen entries as they are now, (n,)."""
        index = self.index.long()
        base = self.matrix()[index // self.inputs, index % self.inputs]
        return base.to(self.values.dtype) + self.total(self.values)

    def delta(self) -> Tensor:
        """Return the dense update, (out, in)."""
        flat = self.values.new_zeros(self.outputs * self.inputs)
        return flat.index_add_(0, self.index.long(), self.total(self.values)).view(self.outputs, self.inputs)

    def adapted(self, x: Tensor) -> Tensor:
        """Return W' x + b; W' is not kept for the backward pass."""
        device = x.device.type
        if x.is_floating_point() and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        bias = getattr(self.base_layer, "bias", None)
        if isinstance(self.layout, Lookup | Convolution):
            return cast(Tensor, _Anything.apply(x, self.values, bias, self))
        return self.layout.restore(_Product.apply(self.layout.rows(x), self.values, bias, self), x)

    def resize(self, saved: dict[str, Tensor]) -> None:
        """Make room for as many entries as were saved.

        Args:
            saved: the layer's tensors by key suffix.
        """
        found = saved.get("index")
        if found is None or found.ndim != 1:
            return
        for name, tensor in list(self.tensors().items()):
            empty = tensor.detach().new_zeros(len(found))
            setattr(self, name, nn.Parameter(empty) if name == "values" else empty)


def share_out(total: int, sizes: Mapping[str, int]) -> dict[str, int]:
    """Divide a number of entries among layers in proportion to their sizes.

    Args:
        total: entries of all layers together.
        sizes: entries that each layer has, by name.

    Returns:
        Entries by name, at least one each, which may come to a few more than `total`.
    """
    everything = sum(sizes.values())
    exact = {name: total * size / everything for name, size in sizes.items()}
    found = {name: min(sizes[name], max(1, int(share))) for name, share in exact.items()}
    rest = total - sum(found.values())
    for name in sorted(exact, key=lambda name: int(exact[name]) - exact[name])[: max(rest, 0)]:
        found[name] = min(sizes[name], found[name] + 1)
    return found


def draw(count: int, size: int) -> Tensor:
    """Return some of the numbers below `size`, each at most once, drawn on the CPU.

    Args:
        count: how many.
        size: from how many.
    """
    if 4 * count > size:
        return torch.randperm(size)[:count]
    found = torch.randint(size, (0,))
    while len(found) < count:  # one or two rounds: no permutation of the whole matrix, which would be 8 times its bytes
        found = torch.cat([found, torch.randint(size, (count + count // 8 + 8,))]).unique()
    return found[torch.randperm(len(found))[:count]]


@part(
    "adapter",
    "spiel",
    papers=[("Scaling Sparse Fine-Tuning to Large Language Models", "arXiv:2401.16405")],
    claim="A sparse update whose entries are dropped and regrown while it trains is often better than LoRA of as many "
    "parameters, at a comparable run time, also over a base in 4 bits.",
    deviations="As the authors' code, entries whose values are smallest are dropped, candidates are those with the "
    "largest gradients in the first micro-batch of an observation, and the first regrowth replaces all of the random "
    "entries. Optimizer state of grown entries starts at zero by default, where that code estimates Adam's moments; "
    "with state: estimated, squared gradients are those of whole steps and all entries have Adam's one age. With "
    "several processes the first step of an observation counts the first process's share alone. The momentum variant "
    "estimates momenta with SM3 accumulators of its own, whatever the optimizer is.",
)
@dataclass(kw_only=True)
class SpIEL(Host):
    """Train a fixed number of entries of each weight; drop those that moved least and regrow others.

    W' = W + scatter(values, entries). Every `every` steps gradients are observed for `observe` steps. Then of a layer's
    n entries the k with the smallest |value| are dropped, k = n rate (1 - t / T), and their weights are the base's
    again. As many are grown where the candidates' summed gradients are largest (gradient), or where the outer product
    of SM3's row and column accumulators is (momentum). Dropped entries take their optimizer state with them.

    Args:
        density: share of the weights of each layer that trains.
        entries: entries that train in all layers together, shared out by their sizes; None follows `density`.
        regrow: how entries are chosen; "none" keeps the first, random ones.
        every: steps from one regrowth to the next.
        observe: steps over which gradients are added up before a regrowth; also the step of the first regrowth.
        rate: share of the entries that a regrowth replaces at the start of the run.
        decay: how that share falls to zero; "linear" replaces all entries in the first regrowth.
        state: optimizer state of a grown entry: zero, or Adam's moments as estimated from the gradients observed, which
            start it at full speed: at large learning rates it overshoots.
    """

    density: Annotated[float, Field(gt=0, le=1)] = 0.01
    entries: Annotated[int, Field(ge=1)] | None = None
    regrow: Literal["gradient", "momentum", "none"] = "gradient"
    every: Annotated[int, Field(ge=1)] = 20
    observe: Annotated[int, Field(ge=1)] = 5
    rate: Annotated[float, Field(gt=0, le=1)] = 0.2
    decay: Literal["linear", "cosine"] = "linear"
    state: Literal["zero", "estimated"] = "zero"
    counts: dict[str, int] = field(init=False, default_factory=dict, repr=False)

    def begin(self, model: nn.Module, names: list[str]) -> None:
        """Share the entries out.

        Args:
            model: a plain network.
            names: dotted names of the layers that will be adapted.

        Raises:
            HoneError: there are not as many weights as entries, or fewer than one per layer, or an observation is
                longer than the time between two regrowths.
        """
        if self.observe > self.every:
            raise HoneError(f"adapter.observe: {self.observe} steps do not fit between two regrowths; lower it, or "
                            f"raise adapter.every, which is {self.every}")  # fmt: skip
        sizes = {name: cast(Tensor, model.get_submodule(name).weight).numel() for name in names}
        if self.entries is None:
            self.counts = {name: max(1, round(self.density * size)) for name, size in sizes.items()}
            return
        if not len(names) <= self.entries <= sum(sizes.values()):
            raise HoneError(
                f"adapter.entries: {self.entries} entries for {len(names)} layers of {sum(sizes.values())} weights "
                "together; expected at least one per layer and at most one per weight"
            )
        self.counts = share_out(self.entries, sizes)

    def wrap(self, name: str, base: nn.Module, layout: Layout) -> Sparse:
        """Return the layer with random entries.

        Args:
            name: dotted name of the layer.
            base: the layer.
            layout: how it stores its weight.
        """
        return Sparse(base, layout, draw(self.counts[name], cast(Tensor, base.weight).numel()))

    def callbacks(self) -> list[Any]:
        """Return what drops and regrows entries."""
        if self.regrow == "none":
            return []
        return [Regrow(how=self.regrow, every=self.every, observe=self.observe, rate=self.rate, decay=self.decay,
                       estimated=self.state == "estimated")]  # fmt: skip
