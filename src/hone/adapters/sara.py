"""SaRA: train the weights that are nearly zero, and keep the matrix of them low in rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from hone.adapters.calibration import Calibration
from hone.adapters.host import Host, adapted_layers
from hone.adapters.layers import Layout, layout_of
from hone.adapters.regrow import refuse_company
from hone.adapters.sparse import Sparse
from hone.callbacks.base import Callback
from hone.errors import HoneError
from hone.parts import part
from hone.penalties.base import Penalty

if TYPE_CHECKING:
    from hone.engine.loop import Run

ROUNDS = 50  # halvings of the interval in which a threshold lies


@torch.no_grad()
def threshold_of(weights: list[Tensor], share: float) -> float:
    """Return the number below which a share of all weights together lies, in magnitude.

    Found by halving an interval, so that the weights need not be put into one tensor.

    Args:
        weights: tensors of any shape.
        share: of all their elements, in (0, 1].
    """
    wanted = share * sum(w.numel() for w in weights)
    low, high = 0.0, 2 * max(float(w.abs().max()) for w in weights)
    for _ in range(ROUNDS):
        middle = (low + high) / 2
        if sum(int((w.abs() < middle).sum()) for w in weights) < wanted:
            low = middle
        else:
            high = middle
    return high


class Settling(Sparse):
    """A sparse layer of which some entries stop training: what they have learnt becomes part of the frozen weight.

    Args:
        base: the frozen layer.
        layout: how it stores its weight.
        entries: (n,) indices of the chosen entries in the flattened (out, in) matrix.
    """

    live: Tensor
    settled: Tensor

    def __init__(self, base: nn.Module, layout: Layout, entries: Tensor) -> None:
        """Start with all entries training."""
        super().__init__(base, layout, entries)
        self.register_buffer("live", torch.ones_like(self.values, dtype=torch.bool))
        self.register_buffer("settled", torch.zeros_like(self.values))

    def total(self, values: Tensor) -> Tensor:
        """Return what training has added so far."""
        return values + self.settled

    def trained(self, gradient: Tensor) -> Tensor:
        """Return the gradient, zero where an entry has settled."""
        return gradient * self.live

    @torch.no_grad()
    def reselect(self, limit: float) -> None:
        """Go on with those entries that are still below the threshold.

        Args:
            limit: the threshold.
        """
        self.live.logical_and_(self.chosen().abs() < limit)
        self.settled.add_(torch.where(self.live, 0.0, self.values))
        self.values.mul_(self.live)


@dataclass(kw_only=True)
class Reselect(Callback):
    """Ends the training of entries that have grown above the threshold, once.

    Args:
        at: share of the run after which it happens.
    """

    at: float

    def on_start(self, run: Run) -> None:
        """Refuse what cannot go with it."""
        refuse_company(run, run.adapter.name)

    def on_step(self, run: Run, row: dict[str, Any]) -> None:
        """Reselect when it is time; the optimizer starts anew, as in the authors' code."""
        if run.step != round(self.at * run.total) or run.step >= run.total:
            return
        layers = adapted_layers(run.model.hf).values()
        for layer in layers:
            layer.reselect(run.adapter.limit)
            run.players["model"].optimizer.state.pop(layer.values, None)
        row["reselected"] = sum(int(layer.live.sum()) for layer in layers)


@dataclass(kw_only=True)
class LowRankEntries(Penalty):
    """Penalises the nuclear norm of the matrix of trained entries, of one layer a step.

    strength |W' o M|_*, M being 1 at the entries that train

    Args:
        strength: factor of the norm.
    """

    name: ClassVar[str] = "nuclear_norm"
    strength: float
    seed: int = field(init=False, default=0)
    run: Run | None = field(init=False, default=None, repr=False)

    def setup(self, run: Run) -> None:
        """Remember the run, whose step says which layer it is.

        Args:
            run: the run in progress.
        """
        self.run, self.seed = run, run.recipe.seed

    def of_weights(self, model: Any) -> Tensor | None:
        """Return the term of the layer whose turn it is.

        Args:
            model: the model that trains.
        """
        layers = [layer for layer in adapted_layers(model).values() if len(layer.index)]
        if not layers:
            return None
        drawn = torch.Generator().manual_seed(self.seed * 1_000_003 + (0 if self.run is None else self.run.step))
        layer = layers[int(torch.randint(len(layers), (), generator=drawn))]
        flat = layer.values.new_zeros(layer.outputs * layer.inputs)
        matrix = flat.index_put((layer.index.long(),), layer.trained(layer.chosen())).view(layer.outputs, layer.inputs)
        return self.strength * torch.linalg.matrix_norm(matrix, "nuc")


@part(
    "adapter",
    "sara",
    papers=[
        (
            "SaRA: High-Efficient Diffusion Model Fine-tuning with Progressive Sparse Low-Rank Adaptation",
            "arXiv:2409.06633",
        )
    ],
    claim="Training only the weights of the smallest magnitudes, kept low in rank, keeps more of what the model could "
    "do before than LoRA does, at much lower memory.",
    deviations="Only weights of linear and convolutional layers (adapter.targets), not norms and biases. As in the "
    "authors' code the norm is that of the trained weights themselves, not of their change, and one layer is drawn per "
    "step; here of all adapted layers, there of the matrices whose sizes are both above 64. The values of "
    "entries that no longer train stay in the vector, with a zero gradient, so memory does not fall after the "
    "reselection; what Adam knew of all entries is forgotten then.",
)
@dataclass(kw_only=True)
class SaRA(Host):
    """Train the weights whose magnitude is below a threshold; later those of them that still are.

    W' = W + P o M,  M = 1 where |W| < t;  loss + low_rank |W' o M|_*;  after `reselect` of the run  M <- M and |W'| < t

    Args:
        share: share of the weights of all adapted layers together that trains; the threshold follows from it.
        threshold: the threshold itself, in units of a weight; None takes it from `share`.
        reselect: share of the run after which entries that have outgrown the threshold stop training; None never.
        low_rank: strength of the penalty on the nuclear norm; 0 leaves it out.
    """

    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    threshold: Annotated[float, Field(gt=0)] | None = None
    reselect: Annotated[float, Field(gt=0, lt=1)] | None = 0.5
    low_rank: Annotated[float, Field(ge=0)] = 5e-4
    limit: float = field(init=False, default=0.0, repr=False)
    entries: dict[str, Tensor] = field(init=False, default_factory=dict, repr=False)

    def prepare(self, model: nn.Module, names: list[str], calibration: Calibration | None) -> None:
        """Find the threshold and the weights below it.

        Args:
            model: a plain network.
            names: dotted names of the layers that will be adapted.
            calibration: not looked at.

        Raises:
            HoneError: no weight lies below the threshold.
        """
        found = {}
        for name in names:
            layer = model.get_submodule(name)
            layout = layout_of(layer)
            if layout is not None:
                found[name] = layout.matrix(cast(Tensor, layer.weight).detach())
        self.limit = threshold_of(list(found.values()), self.share) if self.threshold is None else self.threshold
        self.entries = {name: (w.abs() < self.limit).flatten().nonzero()[:, 0].cpu() for name, w in found.items()}
        if not any(map(len, self.entries.values())):
            least = min(float(w.abs().min()) for w in found.values())
            raise HoneError(f"adapter.threshold: no weight is below {self.limit:g}; the smallest is {least:g}")

    def wrap(self, name: str, base: nn.Module, layout: Layout) -> Sparse:
        """Return the layer with its small weights training; a saved adapter brings its own entries.

        Args:
            name: dotted name of the layer.
            base: the layer.
            layout: how it stores its weight.
        """
        kind = Sparse if self.reselect is None else Settling
        return kind(base, layout, self.entries.pop(name, torch.zeros(0, dtype=torch.int64)))

    def callbacks(self) -> list[Any]:
        """Return what reselects the entries."""
        return [] if self.reselect is None else [Reselect(at=self.reselect)]

    def penalties(self) -> list[Any]:
        """Return the penalty on the nuclear norm."""
        return [LowRankEntries(strength=self.low_rank)] if self.low_rank else []
