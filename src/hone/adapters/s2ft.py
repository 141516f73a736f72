"""S2FT: train whole columns or rows of weights, those of a few attention heads and feed-forward channels."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from hone.adapters.base import matches
from hone.adapters.calibration import Calibration, mean_gradients, required, watch_inputs
from hone.adapters.host import Host
from hone.adapters.layers import Factors, Layout, Wrapped, check_linear, layout_of
from hone.errors import HoneError
from hone.parts import part
from hone.precision import wide, wide_dtype

Role = Literal["q", "k", "v", "qkv", "o", "up", "gate", "down"]
Share = Annotated[float, Field(ge=0, le=1)]
# What architectures call the layers of a block, by what they do in it.
ROLES: dict[Role, tuple[str, ...]] = {
    "q": ("q_proj", "query", "q_lin"),
    "k": ("k_proj", "key", "k_lin"),
    "v": ("v_proj", "value", "v_lin"),
    "qkv": ("attn.c_attn", "query_key_value", "qkv_proj"),
    "o": (
        "o_proj",
        "out_proj",
        "attn.c_proj",
        "attention.dense",
        "attention.output.dense",
        "self_attn.dense",
        "self_attention.dense",
    ),
    "up": ("up_proj", "mlp.c_fc", "fc1", "dense_h_to_4h", "fc_in"),
    "gate": ("gate_proj",),
    "down": ("down_proj", "mlp.c_proj", "fc2", "dense_4h_to_h", "fc_out"),
}
INTO = ("o", "down")  # roles whose inputs are what heads and channels give out; of the others it is the outputs


def role_of(name: str) -> Role | None:
    """Return what a layer does in its block, None when its name does not tell.

    Args:
        name: dotted name of the layer.
    """
    return next((role for role, ends in ROLES.items() if any(matches(end, name) for end in ends)), None)


def known_names(roles: tuple[Role, ...]) -> str:
    """Return the names by which layers of some roles are known, for a message."""
    return ", ".join(end for role in roles for end in ROLES[role])


class Slice(Wrapped):
    """W x + D x[selected] where columns train, W x with D x added to the selected outputs where rows do.

    In the first case a backward pass needs the selected inputs alone.

    Args:
        base: the frozen layer.
        layout: how it stores its weight.
        selected: (n,) indices of the columns, or of the rows.
        columns: whether columns train.
    """

    selected: Tensor

    def __init__(self, base: nn.Module, layout: Layout, selected: Tensor, columns: bool) -> None:
        """Start with D = 0."""
        super().__init__(base, layout)
        weight = cast(Tensor, base.weight)
        self.outputs, self.inputs = layout.matrix(weight).shape
        self.columns = columns
        shape = (self.outputs, len(selected)) if columns else (len(selected), self.inputs)
        dtype = wide_dtype(weight)
        self.values = nn.Parameter(torch.zeros(shape, dtype=dtype, device=weight.device))
        self.register_buffer("selected", selected.to(weight.device))

    def delta(self) -> Tensor:
        """Return the dense update, (out, in)."""
        empty = self.values.new_zeros(self.outputs, self.inputs)
        return empty.index_copy(1 if self.columns else 0, self.selected, self.values)

    def factors(self) -> Factors:
        """Return a LoRA of which one factor is one-hot: it picks the selected inputs, or places the outputs."""
        count = len(self.selected)
        places = torch.arange(count, device=self.selected.device)
        if self.columns:
            picks = self.values.new_zeros(count, self.inputs)
            picks[places, self.selected] = 1
            return Factors(picks, self.values, float(count))
        puts = self.values.new_zeros(self.outputs, count)
        puts[self.selected, places] = 1
        return Factors(self.values, puts, float(count))

    def adapted(self, x: Tensor) -> Tensor:
        """Return the output, the update added in place."""
        rows = self.layout.rows(x)
        out = self.layout.output(self.base_layer, rows)
        values = self.values.to(out.dtype)
        if self.columns:
            out = self.layout.add(out, rows.index_select(1, self.selected).to(out.dtype), values, 1.0)
        else:
            out = out.index_add_(1, self.selected, nn.functional.linear(rows, values))
        return self.layout.restore(out, x)


@part(
    "adapter",
    "s2ft",
    papers=[
        (
            "S^{2}FT: Efficient, Scalable and Generalizable LLM Fine-tuning by Structured Sparsity",
            "arXiv:2412.06289",
        )
    ],
    claim="Training a few heads and channels of each block learns more than LoRA and forgets less, with less memory "
    "and time.",
    deviations="Indices stand in for the permutation that makes the selected part contiguous: the same function and "
    "the same updates, with the base left in its order. Every block gives the same number of heads and channels; the "
    "authors' code draws over all blocks at once. That code selects at random only: the other scores follow the "
    "paper's description.",
)
@dataclass(kw_only=True)
class S2FT(Host):
    """Train the parts of the weights that belong to selected attention heads and feed-forward channels.

    o, down: y = W x + D x[selected];  q, k, v, up, gate: y[selected] = (W x)[selected] + D x

    A share of 0 leaves the matrix alone; any other selects at least one head or channel. Saved as a plain LoRA of
    which one factor is one-hot.

    Args:
        q: share of the heads whose rows of the query projection train.
        k: of the key projection.
        v: of the value projection.
        o: share of the heads whose columns of the attention's output projection train.
        up: share of the channels whose rows of the up projection train.
        gate: of the gate projection.
        down: share of the channels whose columns of the down projection train.
        select: how they are selected: at random, or by a score: the norm of their weights, of their activations on
            the task's data, the product of the two, or the norm of the weights' gradients there.
        prefer: the end of the scores that is taken.
        batches: batches of data to look at for a score that needs some.
    """

    q: Share = 0.0
    k: Share = 0.0
    v: Share = 0.0
    o: Share = 0.05
    up: Share = 0.0
    gate: Share = 0.0
    down: Share = 0.02
    select: Literal["random", "weight", "activation", "product", "gradient"] = "random"
    prefer: Literal["largest", "smallest"] = "smallest"
    batches: Annotated[int, Field(ge=1)] = 4
    units: dict[str, int] = field(init=False, default_factory=dict, repr=False)  # features of a head or channel
    scores: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False)

    folds: ClassVar[bool] = True

    def chosen(self, model: nn.Module) -> list[str]:
        """Return the names of the layers of which a part trains.

        Args:
            model: a plain network.

        Raises:
            HoneError: every share is 0, or a share above 0 is of a role that no layer's name tells.
        """
        wanted: tuple[Role, ...] = tuple(
            role for role in ROLES if role != "qkv" and getattr(self, role) > 0
        )  # fmt: skip
        if not wanted:
            raise HoneError("adapter 's2ft': every share is 0; set one of q, k, v, o, up, gate, down above 0")
        names = [name for name in super().chosen(model) if role_of(name) in wanted]
        found = {role_of(name) for name in names}
        if missing := tuple(role for role in wanted if role not in found):
            raise HoneError(
                f"adapter 's2ft' finds no layer for {', '.join(missing)} among its targets; it knows them by the names "
                f"{known_names(missing)}; set the share of what the model does not have to 0"
            )
        return names

    def prepare(self, model: nn.Module, names: list[str], calibration: Calibration | None) -> None:
        """Find out what a head is, and score heads and channels.

        Args:
            model: a plain network.
            names: dotted names of the layers that will be adapted.
            calibration: the data.

        Raises:
            HoneError: the heads do not divide a layer, or the score needs data and there are none.
        """
        self.units = {name: _unit(model, name) for name in names}
        self.scores = {}
        if self.select != "random":
            features = self._features(model, names, calibration)
            self.scores = {n: s.view(-1, self.units[n]).square().sum(1).sqrt().cpu() for n, s in features.items()}

    def _features(self, model: nn.Module, names: list[str], calibration: Calibration | None) -> dict[str, Tensor]:
        """Return a score of every input of the layers that columns are taken of, of every output of the others."""
        weights = {n: _matrix(model, n) for n in names}
        if self.select == "weight":
            return {n: _norms(w, role_of(n) in INTO) for n, w in weights.items()}
        data = required(calibration, self.name)
        if self.select == "gradient":
            found = mean_gradients(model, names, data, self.batches)
            layouts = {n: cast(Layout, layout_of(model.get_submodule(n))) for n in names}
            return {n: _norms(layouts[n].matrix(g), role_of(n) in INTO) for n, g in found.items()}
        sums: dict[str, Tensor] = {}

        def visit(name: str, rows: Tensor) -> None:
            if role_of(name) not in INTO:
                module: Any = model.get_submodule(name)  # calling it would show its input once more
                rows = cast(Layout, layout_of(module)).product(module, rows)
                rows = rows if module.bias is None else rows + module.bias
            seen = wide(rows).square().sum(0)
            sums[name] = sums[name] + seen if name in sums else seen

        watch_inputs(model, names, data, self.batches, visit)
        activations = {n: total.sqrt() for n, total in sums.items()}
        if self.select == "activation":
            return activations
        return {n: a * _norms(weights[n], role_of(n) in INTO).to(a) for n, a in activations.items()}

    def wrap(self, name: str, base: nn.Module, layout: Layout) -> Slice:
        """Return the layer with the columns or rows of the selected heads or channels training.

        Args:
            name: dotted name of the layer.
            base: the layer.
            layout: how it stores its weight.

        Raises:
            HoneError: the layer is none of the linear ones.
        """
        check_linear(name, layout, self.name)
        columns, unit = role_of(name) in INTO, self.units[name]
        count = layout.matrix(cast(Tensor, base.weight)).shape[1 if columns else 0] // unit
        wanted = max(1, round(getattr(self, cast(str, role_of(name))) * count))
        if self.select == "random":
            picked = torch.randperm(count)[:wanted]
        else:
            picked = self.scores[name].topk(wanted, largest=self.prefer == "largest").indices
        places = picked.sort().values[:, None] * unit + torch.arange(unit)
        return Slice(base, layout, places.flatten(), columns)


def _matrix(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name)
    return cast(Layout, layout_of(layer)).matrix(cast(Tensor, layer.weight).detach())


def _norms(matrix: Tensor, columns: bool) -> Tensor:
    return torch.linalg.vector_norm(wide(matrix), dim=0 if columns else 1)


def _unit(model: nn.Module, name: str) -> int:
    """Return how many inputs or outputs of a layer make a head, 1 for channels."""
    role = role_of(name)
    if role in ("up", "gate", "down"):
        return 1
    config: Any = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if role in ("k", "v"):
        heads = getattr(config, "num_key_value_heads", None) or heads
    size = _matrix(model, name).shape[1 if role in INTO else 0]
    if not isinstance(heads, int) or size % heads:
        raise HoneError(
            f"adapter 's2ft' cannot tell the attention heads in '{name}', which has {size} features: expected a model "
            "configuration with num_attention_heads, and num_key_value_heads where they differ, that divides them; set "
            f"adapter.{role}: 0 to leave it alone"
        )
    return size // heads
