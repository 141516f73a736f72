"""Structural mixture of residual experts: low-rank experts in layers, put together as a tree for each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hone.adapters.experts import Balanced, ExpertHost, Pairs, Routes, through, top, without_loads
from hone.adapters.layers import Layout, Wrapped, beside, drawn, matrix_shape
from hone.errors import HoneError
from hone.parts import part
from hone.precision import wide_dtype

Size = Annotated[int, Field(ge=1)]
_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "silu": F.silu}


class Gate(Balanced):
    """softmax_e <k_e, MLP(z)>, with a key k_e per expert of one level.

    Args:
        inputs: size of z.
        experts: s, experts of the level.
        active: f, how many are chosen.
        width: of the keys and of the MLP's hidden layer.
        like: a weight, for precision and device.
    """

    def __init__(self, inputs: int, experts: int, active: int, width: int, like: Tensor) -> None:
        """Draw the MLP as PyTorch does, and keys uniform in [0, 1), as the official code does."""
        super().__init__(experts, like)
        self.active = active
        self.query = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width))
        self.keys = nn.Parameter(torch.rand(experts, width))
        self.to(dtype=wide_dtype(like), device=like.device)

    def forward(self, states: Tensor) -> Routes:
        """Choose experts.

        Args:
            states: z, (N, P, inputs) for P paths.
        """
        found = (self.query(states) @ self.keys.t()).softmax(-1)
        routes = top(found, self.active)
        self.watch(found, routes.experts)
        return routes

    def taken(self) -> Tensor | None:
        """Return f K sum_e f_e sum_t p_te: the loads f f_e of the official code add up to f, not to 1."""
        term = super().taken()
        return None if term is None else self.active * term


class Tree(Wrapped):
    """W x + b + V h_L, where h_L is the root of the tree of experts that was chosen for x.

    Args:
        base: a linear layer.
        layout: how it stores its weight.
        experts: s_l, experts of each level from the leaves to the root.
        active: f_l, children that are chosen at each level.
        ranks: r_l, of the experts of each level.
        narrow: size of what the gates see of x.
        width: of the gates.
        activation: name of sigma.
    """

    def __init__(
        self, base: nn.Module, layout: Layout, *, experts: list[int], active: list[int], ranks: list[int], narrow: int,
        width: int, activation: str,
    ) -> None:  # fmt: skip
        """Draw everything but V, which is zero."""
        super().__init__(base, layout)
        outputs, inputs = matrix_shape(base)
        weight = cast(Tensor, base.weight)
        self.activation = _ACTIVATIONS[activation]
        widths = [0]
        for count, rank in zip(experts, ranks, strict=True):
            widths.append(widths[-1] + count * rank)  # wide enough for any choice of experts to keep its rank
        self.down, self.up, self.mix = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for level, (count, rank) in enumerate(zip(experts, ranks, strict=True)):
            self.down.append(nn.Parameter(beside(drawn((count, rank, inputs)), weight)))
            self.up.append(nn.Parameter(beside(drawn((count, widths[level + 1], rank)), weight)))
            if level:
                self.mix.append(nn.Parameter(beside(drawn((widths[level + 1], widths[level])), weight)))
        self.final = nn.Parameter(beside(torch.zeros(outputs, widths[-1]), weight))
        self.narrow = nn.Linear(inputs, narrow).to(dtype=wide_dtype(weight), device=weight.device)
        above = range(len(experts) - 1, -1, -1)  # a gate sees the keys of all levels above it
        self.gates = nn.ModuleList(
            Gate(narrow + width * depth, count, chosen, width, weight)
            for depth, count, chosen in zip(above, experts, active, strict=True)
        )

    def route(self, rows: Tensor) -> list[Routes]:
        """Choose a tree for every token from the root down; level l has (N, P_l, f_l), P_l the paths that lead to it.

        Args:
            rows: (N, in).
        """
        with torch.autocast(rows.device.type, enabled=False):
            states = self.narrow(rows.to(self.narrow.weight.dtype))[:, None]
            found: list[Routes] = []
            for gate in reversed(list(self.gates)):
                routes = cast(Routes, gate(states))
                found.insert(0, routes)
                parents = states[:, :, None].expand(*routes.experts.shape, states.shape[-1])
                states = torch.cat([parents, cast(Gate, gate).keys[routes.experts]], -1).flatten(1, 2)
        return found

    def level(self, level: int, rows: Tensor, routes: Routes, children: Tensor | None) -> Tensor:
        """Return sum_c g_c sigma(B_c A_c x + M h_c) for every path, (N, P, d).

        B_c A_c x is the same wherever in its tree a token meets expert c, and is computed once.

        Args:
            level: l, 0 at the leaves.
            rows: x, (N, in).
            routes: the children c of every path with their gates g.
            children: h_c, (N, P f, d of the level below); None at the leaves.
        """
        down, up = self.down[level].to(rows.dtype), self.up[level].to(rows.dtype)
        met = torch.zeros(len(down), len(rows), dtype=torch.bool, device=rows.device)
        met[routes.experts.flatten(1).t(), torch.arange(len(rows), device=rows.device)] = True
        experts, tokens = met.nonzero(as_tuple=True)  # sorted by expert
        sizes = torch.bincount(experts, minlength=len(down)).tolist()
        terms = through(rows, Pairs(tokens, tokens, sizes), down, up)
        places = met.flatten().cumsum(0).view_as(met) - 1
        hidden = terms[places.t().gather(1, routes.experts.flatten(1)).view_as(routes.experts)]
        if children is not None:
            below = children.view(*routes.experts.shape, children.shape[-1])
            hidden = hidden + F.linear(below, self.mix[level - 1].to(rows.dtype))
        return (self.activation(hidden) * routes.gates[..., None].to(hidden.dtype)).sum(2)

    def adapted(self, x: Tensor) -> Tensor:
        """Return the layer's output and what the tree of each token adds."""
        rows = self.layout.rows(x)
        out = self.layout.output(self.base_layer, rows)
        state, given = None, rows.to(out.dtype)
        for number, routes in enumerate(self.route(rows)):
            state = self.level(number, given, routes, state)
        added = F.linear(cast(Tensor, state).squeeze(1), self.final.to(out.dtype))
        return self.layout.restore(out.add_(added.to(out.dtype)), x)

    def tensors(self) -> dict[str, Tensor]:
        """Return what the layer computes with; loads matter to training alone."""
        return without_loads(super().tensors())


@part(
    "adapter",
    "smore",
    papers=[
        (
            "S'MoRE: Structural Mixture of Residual Experts for LLM Fine-tuning",
            "arXiv:2504.06426",
        )
    ],
    claim="Low-rank experts in several levels, which each token puts together as a tree of its own, learn more than "
    "the same parameters in one level.",
    deviations="Experts and projections have no biases, as in the paper's equation; the official code has some. Of its "
    "three gates it is the one with a softmax and the k best. Load balancing uses the loads of the step before, over "
    "all its tokens, and its mean over gates, where the official code adds them up. Where rows are padded instead of "
    "packed, padding counts as tokens.",
)
@dataclass(kw_only=True)
class SMoRE(ExpertHost):
    """Arrange low-rank experts in levels and let each token choose a tree of them: a parent, then its children.

    h_1 = sum_c g_c sigma(B_0c A_0c x),  h_(l+1) = sum_c g_c sigma(B_lc A_lc x + M_l h_l(c)),  y = W x + b + V h_L

    over the f_l children c of each path, with A_lc (r_l, in), B_lc (d_(l+1), r_l), M_l (d_(l+1), d_l), V (out, d_L)
    zero at the start, d_(l+1) = d_l + s_l r_l and d_0 = 0. The gates of a level are a softmax over its s_l experts of
    <k_c, MLP([D x, keys of the experts above])>, of which the f_l largest are made to add up to one.

    Args:
        targets: patterns of the layers that get experts.
        experts: s_l from the leaves to the root; as many levels as numbers.
        active: f_l, children chosen at each level.
        ranks: r_l of the experts of each level.
        narrow: size of D x, what the gates see of a token.
        width: of keys and gates.
        activation: sigma.
    """

    targets: list[str] | Literal["all-linear", "all", "sublayers"] = field(default_factory=lambda: ["mlp.*"])
    experts: Annotated[list[Size], Field(min_length=1)] = field(default_factory=lambda: [4, 4])
    active: Annotated[list[Size], Field(min_length=1)] = field(default_factory=lambda: [2, 2])
    ranks: Annotated[list[Size], Field(min_length=1)] = field(default_factory=lambda: [8, 8])
    narrow: Size = 32
    width: Size = 32
    activation: Literal["tanh", "relu", "silu"] = "tanh"

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield where the levels do not fit together."""
        for option in ("active", "ranks"):
            if len(getattr(self, option)) != len(self.experts):
                yield option, f"expected a number for each of the {len(self.experts)} levels that `experts` has"
                return
        if fault := next(((f, s) for f, s in zip(self.active, self.experts, strict=True) if f > s), None):
            yield "active", f"{fault[0]} of {fault[1]} experts cannot be chosen; lower it"

    def begin(self, model: nn.Module, names: list[str]) -> None:
        """Raise what `check` finds."""
        for option, text in self.check():
            raise HoneError(f"adapter.{option}: {text}")

    def wrap(self, name: str, base: nn.Module, layout: Layout) -> Tree:
        """Return the layer with its experts."""
        self.refuse(name, base, layout, max(self.ranks))
        return Tree(
            base, layout, experts=self.experts, active=self.active, ranks=self.ranks, narrow=self.narrow,
            width=self.width, activation=self.activation,
        )  # fmt: skip
