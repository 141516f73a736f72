"""Mixtures of low-rank experts: a router picks a few for each token (LLaVA-MoLE, MoR), and only those run.

Load balancing. A router with probabilities p_te, in a step of T tokens, adds

    strength * K / T * sum_e f_e sum_t p_te

averaged over routers, with f_e the share of choices that fell on expert e. f_e has no gradient, and it is that of the
step before, over all of its tokens and processes: so the gradient is the same however a step is split into
micro-batches. Before the first step all f_e are 1 / K, which pulls nowhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hone.adapters.host import Host
from hone.adapters.layers import Layout, Wrapped, beside, check_linear, check_rank, drawn, matrix_shape
from hone.adapters.shared import thinned
from hone.callbacks.base import Callback
from hone.errors import HoneError
from hone.parts import part
from hone.penalties.base import Penalty
from hone.precision import wide_dtype

if TYPE_CHECKING:
    from hone.engine.loop import Run

ROUTED = "which experts change a layer depends on the token, so no one weight matrix does what they do"


class Routes(NamedTuple):
    """What a router chose.

    Args:
        experts: (..., k) which experts.
        gates: (..., k) factors on their outputs.
    """

    experts: Tensor
    gates: Tensor


def top(probabilities: Tensor, active: int) -> Routes:
    """Return the most probable experts, with their probabilities made to add up to one when they are several.

    A single one keeps its probability: made to add up to one it would be 1, and would teach the router nothing.

    Args:
        probabilities: (..., K).
        active: k, how many to choose.
    """
    gates, experts = probabilities.topk(active, dim=-1)
    return Routes(experts, gates / gates.sum(-1, keepdim=True) if active > 1 else gates)


class Pairs(NamedTuple):
    """Pairs of a token and an expert, those of one expert together.

    Args:
        tokens: (P,) rows of the input.
        order: (P,) where each pair stands in the flattened (token, choice) list.
        sizes: pairs of every expert, K of them.
    """

    tokens: Tensor
    order: Tensor
    sizes: list[int]


def by_expert(chosen: Tensor, experts: int) -> Pairs:
    """Return the pairs of a choice, sorted by expert.

    Args:
        chosen: (N, k) which experts each token goes to.
        experts: K.
    """
    flat = chosen.flatten()
    order = torch.argsort(flat, stable=True)
    return Pairs(order // chosen.shape[1], order, torch.bincount(flat, minlength=experts).tolist())


def through(rows: Tensor, pairs: Pairs, down: Tensor, up: Tensor, gates: Tensor | None = None) -> Tensor:
    """Return g B_e A_e x for every pair of a token and an expert, in one product per expert that has tokens.

    Args:
        rows: (N, in) inputs x.
        pairs: which tokens go to which expert, P in all.
        down: A, (K, rank, in).
        up: B, (K, out, rank).
        gates: g by place in the flattened choice; None means 1.

    Returns:
        (P, out), in the order of the pairs.
    """
    inputs = rows[pairs.tokens].split(pairs.sizes)
    factors = [None] * len(inputs) if gates is None else gates.flatten()[pairs.order, None].split(pairs.sizes)
    found = []
    for x, factor, a, b in zip(inputs, factors, down.unbind(), up.unbind(), strict=True):
        if len(x):
            inner = F.linear(x, a)
            found.append(F.linear(inner if factor is None else inner * factor.to(inner.dtype), b))
    return torch.cat(found) if found else rows.new_zeros(0, up.shape[1])


class Balanced(nn.Module):
    """What a router remembers for load balancing.

    Args:
        experts: K.
        like: a weight, for precision and device.
    """

    load: Tensor

    def __init__(self, experts: int, like: Tensor) -> None:
        """Begin with equal loads."""
        super().__init__()
        self.register_buffer("load", torch.full((experts,), 1 / experts, dtype=wide_dtype(like), device=like.device))
        self.counts = torch.zeros(experts, dtype=torch.int64)
        self.mass: Tensor | None = None

    def watch(self, probabilities: Tensor, chosen: Tensor) -> None:
        """Keep the sums of a forward pass that is trained on; of several before a backward pass, the last.

        A layer that runs again inside the backward pass, to save memory, was watched already; kept a second time, it
        would hold on to what was recomputed.

        Args:
            probabilities: (N, ..., K) by token, and path where there are several.
            chosen: (N, ..., k) experts.
        """
        recomputed = torch._C._current_graph_task_id() != -1
        if not self.training or not torch.is_grad_enabled() or recomputed:
            return
        paths = math.prod(probabilities.shape[1:-1])
        self.mass = probabilities.flatten(0, -2).sum(0) / paths
        self.counts = self.counts.to(chosen.device) + torch.bincount(chosen.flatten(), minlength=len(self.load))

    def taken(self) -> Tensor | None:
        """Return K sum_e f_e sum_t p_te of the pass that has just run, and forget it; None when there was none."""
        mass, self.mass = self.mass, None
        return None if mass is None else (self.load * mass).sum() * len(self.load)

    @torch.no_grad()
    def settle(self, counts: Tensor) -> None:
        """Take the loads of the step that ends and begin to count anew.

        Args:
            counts: (K,) choices of the whole step that fell on each expert.
        """
        if counts.sum() > 0:
            self.load.copy_(counts.to(self.load.dtype) / counts.sum())
        self.counts = torch.zeros_like(self.counts)


def routers_of(model: nn.Module) -> list[Balanced]:
    """Return the routers of a model, each once."""
    return [module for module in model.modules() if isinstance(module, Balanced)]


@dataclass(kw_only=True)
class Balance(Penalty):
    """Keep the experts equally busy.

    strength * mean over routers of K sum_e f_e sum_t p_te, of which the loop takes the mean over tokens; at equal loads
    it is `strength`, and less is possible only where a router prefers the experts that it chooses less. S'MoRE's gates
    multiply theirs by the number of children that they choose.

    Args:
        strength: factor on the term.
    """

    name: ClassVar[str] = "balance"
    strength: float

    def of_batch(self, model: Any, batch: Any) -> Tensor | None:
        """Return the term of a batch that the model has just run, summed over its tokens."""
        terms = [term for router in routers_of(model) if (term := router.taken()) is not None]
        return torch.stack(terms).mean() * self.strength if terms and self.strength else None


@dataclass(kw_only=True)
class Loads(Callback):
    """After each step, tell every router how busy its experts were in all of it, on all processes."""

    def on_start(self, run: Run) -> None:
        """Forget what rehearsals counted."""
        for router in routers_of(run.model):
            router.counts = torch.zeros_like(router.counts)

    def on_step(self, run: Run, row: dict[str, Any]) -> None:
        """Settle the loads, and report the largest as a multiple of an equal share."""
        routers = routers_of(run.model)
        counts = torch.cat([router.counts.to(run.cluster.device) for router in routers])
        if run.cluster.world > 1:
            dist.all_reduce(counts)
        for router, own in zip(routers, counts.split([len(router.load) for router in routers]), strict=True):
            router.settle(own)
        row["busiest_expert"] = max(float(router.load.max()) * len(router.load) for router in routers)


class Router(Balanced):
    """p = sum_j m_j r_j over K experts, of which the most probable are chosen.

    r_j = softmax(R_j x + b_j) over the experts, m = softmax(M x + b) over the sub-routers; a single one has m = 1.

    Args:
        inputs: size of x.
        experts: K.
        active: how many are chosen.
        like: a weight, for precision and device.
        routers: number of sub-routers.
    """

    def __init__(self, inputs: int, experts: int, active: int, like: Tensor, routers: int = 1) -> None:
        """Make the sub-routers, in one matrix, and the main router that weighs them."""
        super().__init__(experts, like)
        self.inputs, self.active = inputs, active
        self.linear = nn.Linear(inputs, routers * experts)
        self.main = nn.Linear(inputs, routers) if routers > 1 else None
        self.to(dtype=wide_dtype(like), device=like.device)
        self._source: Tensor | None = None
        self._routes: Routes | None = None

    def probabilities(self, rows: Tensor) -> Tensor:
        """Return the probabilities of the experts, (N, K).

        Args:
            rows: (N, in), in the router's precision.
        """
        each = self.linear(rows).unflatten(-1, (-1, len(self.load))).softmax(-1)
        if self.main is None:
            return each.squeeze(1)
        return (self.main(rows).softmax(-1)[..., None] * each).sum(1)

    def forward(self, rows: Tensor) -> Routes:
        """Choose experts for every token, in at least float32 whatever the model computes in.

        Args:
            rows: (N, in).
        """
        with torch.autocast(rows.device.type, enabled=False):
            found = self.probabilities(rows.to(self.linear.weight.dtype))
        routes = top(found, self.active)
        self.watch(found, routes.experts)
        return routes

    def route(self, x: Tensor, rows: Tensor, last: bool = True) -> Routes:
        """Return the choice for the input of a layer.

        Layers that see what the first of the block sees choose by it, once; those behind them, whose input has another
        width, follow that choice.

        Args:
            x: the layer's input, as it came.
            rows: the same as rows (N, in).
            last: whether the layer is the last that asks, so that the choice, with its graph, can be dropped.

        Raises:
            HoneError: a layer that follows runs before the one that chooses.
        """
        if rows.shape[-1] == self.inputs and x is not self._source:
            self._source, self._routes = x, self(rows)
        if self._routes is None or len(self._routes.experts) != len(rows):
            raise HoneError("a layer follows the experts that an earlier one chose, which has not run on these tokens")
        found = self._routes
        if last:
            self._source = self._routes = None
        return found


class Experts(Wrapped):
    """W x + b + s sum_{e chosen} g_e B_e A_e x.

    Args:
        base: a linear layer.
        layout: how it stores its weight.
        router: chooses the experts.
        rank: of each expert.
        scale: s.
        dropout: probability of dropping an input of A in training.
        gated: whether gates multiply what experts give; without them g is 1.
        last: whether the layer is the last of those that share the router.
    """

    def __init__(
        self, base: nn.Module, layout: Layout, router: Router, *, rank: int, scale: float, dropout: float,
        gated: bool = True, last: bool = True,
    ) -> None:  # fmt: skip
        """Draw every expert as LoRA draws its factors."""
        super().__init__(base, layout)
        self.router, self.scale, self.dropout, self.gated, self.last = router, scale, dropout, gated, last
        outputs, inputs = matrix_shape(base)
        weight, experts = cast(Tensor, base.weight), len(router.load)
        self.expert_A = nn.Parameter(beside(drawn((experts, rank, inputs)), weight))
        self.expert_B = nn.Parameter(beside(torch.zeros(experts, outputs, rank), weight))

    def adapted(self, x: Tensor) -> Tensor:
        """Return the layer's output and what the chosen experts add."""
        rows = self.layout.rows(x)
        routes = self.router.route(x, rows, self.last)
        out = self.layout.output(self.base_layer, rows)
        pairs = by_expert(routes.experts, len(self.router.load))
        down, up = self.expert_A.to(out.dtype), self.expert_B.to(out.dtype)
        dropped = thinned(rows, self.dropout, self.training)
        found = through(dropped, pairs, down, up, routes.gates if self.gated else None)
        return self.layout.restore(out.index_add_(0, pairs.tokens, found.to(out.dtype), alpha=self.scale), x)

    def tensors(self) -> dict[str, Tensor]:
        """Return what the layer computes with; loads matter to training alone."""
        return without_loads(super().tensors())


def without_loads(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors by key suffix less the routers' loads."""
    return {name: tensor for name, tensor in tensors.items() if name.rpartition(".")[2] != "load"}


@dataclass(kw_only=True)
class ExpertHost(Host):
    """What adapters with experts share.

    Args:
        balance: strength of the load-balancing term.
    """

    unmergeable: ClassVar[str] = ROUTED
    balance: Annotated[float, Field(ge=0)] = 0.01

    def penalties(self) -> list[Any]:
        """Return the load-balancing term."""
        return [Balance(strength=self.balance)]

    def callbacks(self) -> list[Any]:
        """Return what counts loads."""
        return [Loads()]

    def refuse(self, name: str, base: nn.Module, layout: Layout, rank: int) -> None:
        """Check that a layer can have experts.

        Args:
            name: of the layer.
            base: the layer.
            layout: how it stores its weight.
            rank: of an expert.

        Raises:
            HoneError: it is not linear, or the rank is too high.
        """
        check_linear(name, layout, type(self).name)
        check_rank(name, matrix_shape(base), rank)


@part(
    "adapter",
    "llava-mole",
    papers=[
        (
            "LLaVA-MoLE: Sparse Mixture of LoRA Experts for Mitigating Data Conflicts in Instruction Finetuning MLLMs",
            "arXiv:2401.16160",
        )
    ],
    claim="With one of several low-rank experts chosen for each token, data that conflict are learned side by side "
    "where one LoRA of the same cost mixes them up.",
    deviations="The chosen expert's output is multiplied by its probability, so that the task trains the router; in "
    "the official code's sparse path it is not (gated: false). Load balancing uses the loads of the step before, over "
    "all its tokens, and is scaled by the number of experts; the official code balances every sequence for itself. "
    "Layers outside the MLP get no LoRA; rank and alpha are LoRA's defaults here. Where rows are padded instead of "
    "packed, padding counts as tokens.",
)
@dataclass(kw_only=True)
class LLaVAMoLE(ExpertHost):
    """Give each token the best one of K low-rank experts in the linear layers of the MLP.

    y = W x + b + s p_k B_k A_k x,  k = argmax_e p_e,  p = softmax(R x_0 + r),  s = alpha / rank, where x_0 is the input
    of the block: layers inside one module share a router and its choice. With K = 1 it is LoRA.

    Args:
        targets: patterns of the layers that get experts; those inside one module share a router.
        experts: K.
        rank: of each expert.
        alpha: numerator of the scale; None means 2 rank.
        dropout: probability of dropping an input of A in training.
        gated: multiply the expert's output by its probability.
    """

    targets: list[str] | Literal["all-linear", "all", "sublayers"] = field(default_factory=lambda: ["mlp.*"])
    experts: Annotated[int, Field(ge=1)] = 3
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gated: bool = True
    routers: dict[str, tuple[Router, bool]] = field(init=False, default_factory=dict, repr=False)

    def begin(self, model: nn.Module, names: list[str]) -> None:
        """Make a router for each block, which its first layer's input feeds."""
        blocks: dict[str, list[str]] = {}
        for name in names:
            blocks.setdefault(name.rpartition(".")[0], []).append(name)
        self.routers = {}
        for members in blocks.values():
            inputs = matrix_shape(model.get_submodule(members[0]))[1]
            router = Router(inputs, self.experts, 1, cast(Tensor, model.get_submodule(members[0]).weight))
            behind = [name for name in members if matrix_shape(model.get_submodule(name))[1] != inputs]
            last = (behind or members)[-1]
            self.routers.update({name: (router, name == last) for name in members})

    def wrap(self, name: str, base: nn.Module, layout: Layout) -> Experts:
        """Return the layer with its experts."""
        self.refuse(name, base, layout, self.rank)
        scale, (router, last) = 2.0 if self.alpha is None else self.alpha / self.rank, self.routers[name]
        return Experts(
            base, layout, router, rank=self.rank, scale=scale, dropout=self.dropout, gated=self.gated, last=last
        )


@part(
    "adapter",
    "mor",
    papers=[("Mixture of Routers", "arXiv:2503.23362")],
    claim="Several routers, weighted by a learned main router, choose better experts than one router does.",
    deviations="The paper's exact equations were not at hand: sub-routers and main router are linear with a softmax, "
    "all sub-routers count, and the gates of the chosen experts are made to add up to one. Load balancing uses the "
    "loads of the step before, over all its tokens. Where rows are padded instead of packed, padding counts as tokens.",
)
@dataclass(kw_only=True)
class MoR(ExpertHost):
    """Let several routers vote on the low-rank experts of a token, and a main router weigh their votes.

    y = W x + b + s sum_{e in top k} g_e B_e A_e x,  g = sum_j m_j r_j,  r_j = softmax(R_j x + b_j) over the experts,
    m = softmax(M x + b) over the sub-routers, the chosen g_e made to add up to one, s = alpha / rank

    Args:
        routers: number of sub-routers; with 1 it is a plain mixture of LoRA experts.
        experts: K.
        active: k, experts of a token.
        rank: of each expert.
        alpha: numerator of the scale; None means 2 rank.
        dropout: probability of dropping an input of A in training.
    """

    routers: Annotated[int, Field(ge=1)] = 2
    experts: Annotated[int, Field(ge=1)] = 8
    active: Annotated[int, Field(ge=1)] = 2
    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield that there are fewer experts than a token needs."""
        if self.active > self.experts:
            yield "active", f"{self.active} of {self.experts} experts cannot be chosen; lower it"

    def begin(self, model: nn.Module, names: list[str]) -> None:
        """Raise what `check` finds."""
        for option, text in self.check():
            raise HoneError(f"adapter.{option}: {text}")

    def wrap(self, name: str, base: nn.Module, layout: Layout) -> Experts:
        """Return the layer with its experts and routers."""
        self.refuse(name, base, layout, self.rank)
        scale = 2.0 if self.alpha is None else self.alpha / self.rank
        inputs, like = matrix_shape(base)[1], cast(Tensor, base.weight)
        router = Router(inputs, self.experts, self.active, like, self.routers)
        return Experts(base, layout, router, rank=self.rank, scale=scale, dropout=self.dropout)
