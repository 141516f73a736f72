"""LaMDA: a small square matrix trains between the singular vectors of the weight; LaMDA++ shares its ranks out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from hone.adapters.calibration import Calibration
from hone.adapters.host import Host, adapted_layers
from hone.adapters.layers import Factors, Layout, Wrapped, check_rank, layout_of, matrix_shape
from hone.callbacks.base import Callback
from hone.errors import HoneError
from hone.parts import part
from hone.precision import wide

if TYPE_CHECKING:
    from hone.engine.loop import Run


class Projected(Wrapped):
    """W x + (B S - U_r diag(s_r)) V_r^T x, which is what B S V_r^T does beside the rest of W.

    W = U diag(s) V^T;  A = V_r^T is frozen, B starts at U_r and S at diag(s_r), so that the start is W. Of the input
    only A x, (N, rank), is kept for the backward pass.

    Args:
        base: the layer that the factors go around.
        layout: how the layer stores its weight.
        rank: singular vectors on either side.
    """

    lora_A: Tensor
    start: Tensor

    def __init__(self, base: nn.Module, layout: Layout, *, rank: int) -> None:
        """Decompose the weight, in float32 or wider."""
        super().__init__(base, layout)
        self.rank = rank
        weight = cast(Tensor, base.weight)
        self.shapes = layout.shapes(weight, rank)  # asked for once: few bits would be dequantised
        matrix = wide(layout.matrix(weight).detach())
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        self.register_buffer("lora_A", right[:rank].contiguous())
        self.lora_S = nn.Parameter(torch.diag(values[:rank]))
        self.lora_B = nn.Parameter(left[:, :rank].contiguous())
        self.register_buffer("start", self.lora_B.detach() @ self.lora_S.detach())

    def moved(self) -> Tensor:
        """Return B S - U_r diag(s_r), (out, rank)."""
        return self.lora_B @ self.lora_S - self.start

    def delta(self) -> Tensor:
        """Return (B S - U_r diag(s_r)) V_r^T, (out, in)."""
        return self.moved() @ self.lora_A

    def _shaped(self) -> tuple[Tensor, Tensor]:
        """Return both factors in the shapes that the layout wants."""
        down, up = self.shapes
        return self.lora_A.view(down), self.moved().view(up)

    def adapted(self, x: Tensor) -> Tensor:
        """Return the output, the low-rank term added in place."""
        rows = self.layout.rows(x)
        out = self.layout.output(self.base_layer, rows)
        down, up = (factor.to(out.dtype) for factor in self._shaped())
        inner = self.layout.project(self.base_layer, rows, down)
        return self.layout.restore(self.layout.add(out, inner, up, 1.0), x)

    def factors(self) -> Factors | None:
        """Return a plain LoRA of the same rank, whose A is V_r^T."""
        return Factors(*self._shaped(), float(self.rank))


def frozen_columns(step: int, total: int, share: float, rank: int) -> int:
    """Return how many columns of B train no more, those of the largest singular values first.

    min(r, floor(r t / (eta T)))

    Args:
        step: t, finished steps.
        total: T, steps of the whole run.
        share: eta, the share of the run after which all of B is frozen.
        rank: r.
    """
    return rank if step >= share * total else int(rank * step / (share * total))


class Freezing(Callback):
    """Freezes B column by column, then as a whole, with its gradient and optimizer state."""

    def __init__(self, share: float) -> None:
        """Remember the schedule.

        Args:
            share: share of the run after which all of B is frozen.
        """
        self.share = share
        self.kept: list[tuple[Tensor, Tensor]] = []  # from on_gradients to on_step

    def on_start(self, run: Run) -> None:
        """Freeze what is frozen at this step."""
        self._freeze_whole(run)

    @torch.no_grad()
    def on_gradients(self, run: Run) -> None:
        """Take the gradient off frozen columns, and note what they are: an optimizer's momentum would move them yet."""
        self.kept = []
        for layer in _layers(run):
            count = frozen_columns(run.step, run.total, self.share, layer.rank)
            if count and layer.lora_B.grad is not None:
                layer.lora_B.grad[:, :count] = 0
                self.kept.append((layer.lora_B[:, :count], layer.lora_B[:, :count].clone()))

    @torch.no_grad()
    def on_step(self, run: Run, row: dict[str, Any]) -> None:
        """Put frozen columns back, and drop what trains no more."""
        for place, value in self.kept:
            place.copy_(value)
        frozen = sum(place.numel() for place, _ in self.kept)
        row["trained"] = sum(p.numel() for _, p in run.players["model"].params if p.requires_grad) - frozen
        self.kept = []
        self._freeze_whole(run)

    def _freeze_whole(self, run: Run) -> None:
        """Let B go for good once all its columns are frozen."""
        if run.step < self.share * run.total:
            return
        player, done = run.players["model"], {id(layer.lora_B) for layer in _layers(run)}
        if any(p.requires_grad and id(p) in done for _, p in player.params):
            player.activate([n for n, p in player.params if p.requires_grad and id(p) not in done])


def _layers(run: Run) -> list[Projected]:
    return [layer for layer in adapted_layers(run.model).values() if isinstance(layer, Projected)]


@part(
    "adapter",
    "lamda",
    papers=[
        ("LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation", "arXiv:2406.12832")
    ],
    claim="A small square matrix between the singular vectors of the weight learns as much as LoRA with several times "
    "fewer updated parameters, once the projection out of it has been trained for a while.",
    deviations="The base weight stays what it is and the start's product is taken off the adapter's instead, which is "
    "the same function and keeps the base's bits. Frozen columns stay where they are; in the authors' code only their "
    "gradient is zero, so that momentum and weight decay still move them. The decomposition is the paper's: the "
    "authors' code starts from random factors.",
)
@dataclass(kw_only=True)
class LaMDA(Host):
    """Train a square matrix between frozen singular vectors, and for a while the vectors on the output's side.

    W = U diag(s) V^T;  W' = (W - U_r diag(s_r) V_r^T) + B S V_r^T with B = U_r and S = diag(s_r) at the start

    Columns of B freeze one after the other, the largest singular value's first: min(r, floor(r t / (freeze T))) of them
    by step t of T. Then S alone trains, rank^2 numbers a layer. Saved as plain LoRA of the same rank.

    Args:
        rank: r, singular vectors on either side.
        freeze: share of the run after which all of B is frozen; 0 never trains it, 1 until the end.
    """

    rank: Annotated[int, Field(ge=1)] = 8
    freeze: Annotated[float, Field(ge=0, le=1)] = 0.3

    def rank_of(self, name: str) -> int:
        """Return the rank of a layer.

        Args:
            name: dotted name of the layer.
        """
        return self.rank

    def wrap(self, name: str, base: nn.Module, layout: Layout) -> Projected:
        """Return the layer with its weight decomposed.

        Args:
            name: dotted name of the layer.
            base: the layer.
            layout: how it stores its weight.

        Raises:
            HoneError: the rank is more than the rank that the matrix can have.
        """
        rank = self.rank_of(name)
        check_rank(name, matrix_shape(base), rank)
        return Projected(base, layout, rank=rank)

    def callbacks(self) -> list[Callback]:
        """Return what freezes B."""
        return [Freezing(self.freeze)]


def allocate(spectra: dict[str, Tensor], budget: int, least: int) -> dict[str, int]:
    """Share a budget of ranks out so that the layer whose spectrum is captured worst is captured as well as can be.

    E_l(r) = sum_{i <= r} s_i^2 / sum_i s_i^2 of layer l;  maximise min_l E_l(r_l) with sum_l r_l = budget

    Args:
        spectra: singular values of each layer, the largest first.
        budget: sum of all ranks.
        least: rank that every layer gets, where its matrix can have it.
    """
    energies = {name: (values.double() ** 2).cumsum(0) for name, values in spectra.items()}
    shares = {name: (energy / energy[-1].clamp(min=1e-300)).tolist() for name, energy in energies.items()}
    ranks = {name: min(least, len(share)) for name, share in shares.items()}
    for _ in range(budget - sum(ranks.values())):
        open_ = [name for name, share in shares.items() if ranks[name] < len(share)]
        poorest = min(open_, key=lambda name: shares[name][ranks[name] - 1])
        ranks[poorest] += 1
    return ranks


@part(
    "adapter",
    "lamda-plus",
    papers=[
        ("LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation", "arXiv:2406.12832")
    ],
    claim="Ranks that follow the normalised energy of each weight's singular values are at least as good as the same "
    "rank everywhere, at the same sum.",
    deviations="As for lamda. The rule of allocation is a best reading of the paper's normalised energy: ranks go one "
    "by one to the layer of which the least energy is captured; the authors' code does not have this part.",
)
@dataclass(kw_only=True)
class LaMDAPlus(LaMDA):
    """LaMDA with a rank for each layer, from the spectrum of its weight.

    E_l(r) = sum_{i <= r} s_i^2 / sum_i s_i^2;  ranks maximise the least E_l(r_l) with a mean of `rank`

    Args:
        least_rank: rank that every layer gets.
    """

    least_rank: Annotated[int, Field(ge=1)] = 1
    ranks: dict[str, int] = field(init=False, default_factory=dict, repr=False)

    def prepare(self, model: nn.Module, names: list[str], calibration: Calibration | None) -> None:
        """Take the spectra of the weights and share the ranks out.

        Args:
            model: a plain network.
            names: dotted names of the layers that will be adapted.
            calibration: not looked at.

        Raises:
            HoneError: the layers together cannot have the budget, or the least rank is above the mean.
        """
        if self.least_rank > self.rank:
            raise HoneError(f"adapter.least_rank: {self.least_rank} is above adapter.rank, the mean, {self.rank}")
        spectra = {name: _spectrum(model.get_submodule(name)) for name in names}
        most = sum(map(len, spectra.values()))
        if self.rank * len(names) > most:
            raise HoneError(
                f"adapter.rank: a mean of {self.rank} is more than the {len(names)} layers can have, which is "
                f"{most / len(names):.1f}; lower it"
            )
        self.ranks = allocate(spectra, self.rank * len(names), self.least_rank)

    def rank_of(self, name: str) -> int:
        """Return the rank of a layer.

        Args:
            name: dotted name of the layer.
        """
        return self.ranks[name]


@torch.no_grad()
def _spectrum(layer: nn.Module) -> Tensor:
    """Return the singular values of a layer's weight."""
    matrix = cast(Layout, layout_of(layer)).matrix(cast(Tensor, layer.weight))
    return torch.linalg.svdvals(wide(matrix)).cpu()
