"""Penalties on the weights themselves: how much of them training changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hone.adapters.layers import Wrapped
from hone.adapters.scaling import Shifted
from hone.errors import HoneError
from hone.parts import part
from hone.penalties.base import Penalty, Strength
from hone.precision import wide

if TYPE_CHECKING:
    from hone.engine.loop import Run


def change_of(layer: Wrapped) -> Tensor:
    """Return by what an adapter changes a layer's weight matrix, (out, in), with gradient."""
    plain = type(layer).effective is Wrapped.effective
    return layer.delta() if plain else layer.effective() - layer.matrix()


def moved(parameter: nn.Parameter, start: Tensor) -> Tensor:
    """Return by how much a parameter has moved from where it started, with gradient."""
    return wide(parameter) - start


def l1(change: Callable[[], Tensor]) -> Tensor:
    """Return sum |change|, made again in the backward pass, so that the changes of one layer are held at a time.

    Args:
        change: returns it.
    """
    found: Tensor = checkpoint(lambda: change().abs().sum(), use_reentrant=False)
    return found


@part(
    "penalty",
    "l1",
    papers=[("PAFT: A Parallel Training Paradigm for Effective LLM Fine-Tuning", "arXiv:2406.17923")],
    claim="An L1 penalty on what supervised fine-tuning changes leaves most entries alone, so that its change "
    "interferes less with another one when both are merged.",
    deviations="Of a low-rank adapter it is the change of the weights that is penalised, not the factors. Verified "
    "from abstract and reviews, which do not say which. Adam leaves entries near 0, not at it.",
)
@dataclass(kw_only=True)
class L1(Penalty):
    """Change few entries of the weights.

    strength sum |W - W_0|, over the entries of all that trains, W_0 what training began with

    Reports "sparsity", the share of entries that have changed by at most `threshold`; with strength 0 it only reports.
    An adapter's change costs a product of its factors for each layer and step; where weights train themselves, a copy
    of their start is held.

    Args:
        strength: factor on the sum, per unit of a weight.
        threshold: entries that have changed by at most this count as unchanged in the report.
    """

    strength: Strength = 1e-4
    threshold: Annotated[float, Field(ge=0)] = 1e-5
    _changes: list[Callable[[], Tensor]] = field(default_factory=list, init=False, repr=False)
    _share: float | None = field(default=None, init=False, repr=False)  # of this step, once it has been asked for

    def setup(self, run: Run) -> None:
        """Find what trains, and remember where it starts.

        Args:
            run: the run in progress.

        Raises:
            HoneError: the adapter is no change of weights.
        """
        adapter = getattr(run, "adapter", None)
        reason = getattr(adapter, "unmergeable", "")
        if not reason and hasattr(getattr(run.model, "hf", None), "peft_config"):
            reason = "PEFT's layers do not say what they add"
        if reason:
            raise HoneError(f"penalty 'l1' is on the change of weights, which this adapter does not offer: {reason}")
        self._changes = list(_changes(run.model))

    def close(self) -> None:
        """Let go of the start."""
        self._changes = []

    def figures(self, batch: Any) -> dict[str, float]:
        """Return the share of unchanged entries times the batch's tokens.

        Args:
            batch: packed forest of T tokens.
        """
        if self._share is None:
            still = entries = 0
            with torch.no_grad():
                for change in self._changes:
                    found = change()
                    still += int((found.abs() <= self.threshold).sum())
                    entries += found.numel()
            self._share = still / max(entries, 1)
        return {"sparsity": self._share * len(batch)}

    def of_weights(self, model: Any) -> Tensor | None:
        """Return the weighted sum.

        Args:
            model: not used; what trains is known since `setup`.
        """
        self._share = None
        if not self.strength or not self._changes:
            return None
        return self.strength * torch.stack([l1(change) for change in self._changes]).sum()


def _changes(model: nn.Module) -> Iterator[Callable[[], Tensor]]:
    """Yield what returns the change of each adapted layer, and of each parameter that trains outside of those."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Wrapped)}
    for layer in layers.values():
        if not isinstance(layer, Shifted):  # which leaves the matrix as it is
            yield partial(change_of, layer)
        elif layer.added is not None:
            yield partial(moved, layer.added, torch.zeros_like(layer.added))
    own = {id(p) for layer in layers.values() for name, p in layer.named_parameters() if "base_layer" not in name}
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in own:
            yield partial(moved, parameter, wide(parameter.detach()).clone())
