"""Penalties on what a model computes inside: how many units of its MLP blocks are active."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from hone.adapters.base import select
from hone.adapters.layers import Wrapped
from hone.errors import HoneError
from hone.parts import part
from hone.penalties.base import Penalty, Strength
from hone.precision import wide
from hone.text.fallback import Rows

if TYPE_CHECKING:
    from hone.engine.loop import Run
    from hone.text.pack import Packed

HOMES = ("torch.nn.modules.activation", "transformers.activations")
NO_UNITS = ("Softmax", "LogSoftmax", "Softmax2d", "Softmin", "Sigmoid", "Tanh")  # gates, attention and heads


def smooth_count(activations: Tensor, eps: float) -> Tensor:
    """Return a^2 / (a^2 + eps), which is 0 where a = 0 and tends to 1: a smooth count of what is not 0.

    Args:
        activations: a, of any shape.
        eps: square of the size at which a unit counts half.
    """
    squared = activations.square()
    return squared / (squared + eps)


def activation_modules(model: nn.Module, patterns: list[str] | None) -> list[nn.Module]:
    """Return the modules whose outputs are the intermediate activations of MLP blocks.

    Args:
        model: a network.
        patterns: which modules they are; None takes every activation function that is a module of the model itself,
            none that an adapter has put beside its layers.

    Raises:
        HoneError: a pattern matches nothing, or there is no activation function.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    if patterns is not None:
        chosen = {n for p in patterns for n in select(p, modules, "penalties.activation-density.modules")}
        return [module for name, module in modules.items() if name in chosen]
    added = [f"{name}." for name, module in modules.items() if isinstance(module, Wrapped)]
    found = [
        m for name, m in modules.items()
        if type(m).__module__ in HOMES and type(m).__name__ not in NO_UNITS and not any(m.parameters())
        and not any(name.startswith(a) and not name.startswith(f"{a}base_layer.") for a in added)
    ]  # fmt: skip
    if not found:
        raise HoneError(
            "penalties: 'activation-density' finds no activation function in this model; name the modules whose "
            "outputs are the activations with modules: [pattern]"
        )
    return found


@part(
    "penalty",
    "activation-density",
    papers=[
        (
            "From PEFT to DEFT: Parameter Efficient Finetuning for Reducing Activation Density in Transformers",
            "arXiv:2402.01911",
        )
    ],
    claim="A penalty on the density of the MLP activations makes far fewer units active at a like accuracy, with only "
    "the adapter's parameters trained.",
    deviations="The mean is taken over the tokens of a whole step and over all blocks, however a step is split. The "
    "variant that learns a weight per layer and skips MLP blocks (ADA-DEFT) is not included.",
)
@dataclass(kw_only=True)
class ActivationDensity(Penalty):
    """Make few units of the MLP blocks active.

    mean over blocks, tokens and units of a^2 / (a^2 + eps), a the output of the block's activation function

    Reports "activation_density", the share of activations with |a| > threshold; with strength 0 it only reports. ReLU
    and, in the end, GELU reach 0; SiLU comes near it, where a larger `eps` lets the gradient reach from further away.

    Args:
        strength: factor on the term.
        eps: square of the activation that counts half.
        threshold: activations of at most this size count as none in the report; None takes the root of `eps`.
        modules: patterns of the modules whose outputs are the activations; None takes every activation function but
            those of adapters.
    """

    strength: Strength = 1.0
    eps: Annotated[float, Field(gt=0)] = 1e-7
    threshold: Annotated[float, Field(ge=0)] | None = None
    modules: list[str] | None = None
    _kept: dict[int, list[Tensor]] = field(default_factory=dict, init=False, repr=False)
    _open: bool = field(default=False, init=False, repr=False)
    _share: float = field(default=0.0, init=False, repr=False)
    _handles: list[Any] = field(default_factory=list, init=False, repr=False)

    def setup(self, run: Run) -> None:
        """Put hooks on the activation functions.

        Args:
            run: the run in progress.

        Raises:
            HoneError: the model has no such modules.
        """
        self.close()
        found = activation_modules(run.model.decoder, self.modules)
        self._handles = [run.model.decoder.register_forward_pre_hook(self._begin)]
        self._handles += [module.register_forward_hook(self._keeper(index)) for index, module in enumerate(found)]

    def close(self) -> None:
        """Take the hooks off and let go of what they kept."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._kept.clear()
        self._open = False

    def _begin(self, module: nn.Module, args: Any) -> None:
        """Start anew with a forward pass that will be trained on; the last one before the loss counts."""
        if module.training and torch.is_grad_enabled():
            self._kept.clear()
            self._open = True

    def _keeper(self, index: int) -> Callable[[nn.Module, Any, Tensor], None]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            # Closed once the term is taken, so that layers that run again in the backward pass leave nothing here.
            if self._open and module.training and torch.is_grad_enabled():
                self._kept.setdefault(index, []).append(output)

        return keep

    def of_batch(self, model: Any, batch: Packed) -> Tensor | None:
        """Return the mean smooth count times the batch's tokens.

        Args:
            model: the model that trains.
            batch: packed forest of T tokens, which the model has just run.

        Raises:
            HoneError: none of the modules has run.
        """
        kept = [[wide(output) for output in outputs] for outputs in self._kept.values()]
        if not model.packs:  # padding, and tokens that stand in several rows, would count
            rows = Rows.unroll(batch)
            kept = [[rows.packed(torch.cat(outputs, dim=1))] for outputs in kept]
        self._kept.clear()
        self._open = False
        if not kept:
            raise HoneError(
                "penalties: none of the modules of 'activation-density' runs when the model is trained; name others "
                "with modules: [pattern]"
            )
        threshold = self.eps**0.5 if self.threshold is None else self.threshold
        with torch.no_grad():
            self._share = len(batch) * float(_mean(kept, lambda a: (a.abs() > threshold).to(a.dtype)))
        if not self.strength:
            return None
        return self.strength * len(batch) * _mean(kept, lambda a: smooth_count(a, self.eps))

    def figures(self, batch: Packed) -> dict[str, float]:
        """Return the share of active units times the batch's tokens.

        Args:
            batch: the batch that `of_batch` has seen.
        """
        return {"activation_density": self._share}


def _mean(kept: list[list[Tensor]], function: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the mean over modules of the mean of a function over all that a module gave."""
    return torch.stack([torch.cat([function(a).flatten() for a in own]).mean() for own in kept]).mean()
