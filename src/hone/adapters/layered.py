"""Full training by depth: lower layers learn slower or not at all, upper ones may start anew."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from hone.adapters.calibration import Calibration
from hone.adapters.full import Full
from hone.errors import HoneError
from hone.networks import blocks_of
from hone.parts import part

Count = Annotated[int, Field(ge=0)]


@part(
    "adapter",
    "layered",
    papers=[
        (
            "Fine-Tuning Large Neural Language Models for Biomedical Natural Language Processing",
            "arXiv:2112.07869",
        )
    ],
    claim="Freezing lower layers steadies the fine-tuning of base models on small data, a learning rate that falls "
    "layer by layer that of large ones, and starting the top layers anew helps where data is smallest.",
    deviations="Decoders instead of BERT and ELECTRA. The pooler that the paper starts anew with the top layers does "
    "not exist here: a head is always new. Verified from the abstract and from common practice: the paper has no code.",
)
@dataclass(kw_only=True)
class Layered(Full):
    """Train the weights themselves, each layer at a rate by its depth.

    lr_l = lr decay^(L - l)  for layers l = 1 ... L, the embeddings being l = 0; final norm and heads learn at lr

    A tied embedding counts as an embedding. The options of `full` are there too.

    Args:
        decay: factor on the learning rate from a layer to the one below it, in (0, 1].
        frozen_layers: so many of the lowest layers keep their weights, and the embeddings with them; 0 for none.
        new_layers: so many of the top layers start from the architecture's own random weights.
    """

    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    frozen_layers: Count = 0
    new_layers: Count = 0

    def narrow(self, model: nn.Module, names: list[str], calibration: Calibration | None) -> Collection[str]:
        """Return what is not frozen, and start the top layers anew.

        Args:
            model: the network, unchanged so far.
            names: what `train` and `freeze` leave.
            calibration: data for methods that look at some.

        Raises:
            HoneError: there are fewer layers than the options name, or none to start anew in such a network.
        """
        blocks = blocks_of(model)
        for option in ("frozen_layers", "new_layers"):
            if getattr(self, option) > len(blocks):
                raise HoneError(f"adapter.{option}: {getattr(self, option)}, but the model has {len(blocks)} layers")
        if self.frozen_layers + self.new_layers > len(blocks):
            raise HoneError(
                f"adapter.new_layers: {self.new_layers} new layers and {self.frozen_layers} frozen ones are more than "
                f"the model's {len(blocks)}: a frozen layer must not start anew"
            )
        depths = depths_of(model)
        kept = [name for name in names if not self.frozen_layers or depths[name] > self.frozen_layers]
        if kept and self.new_layers:
            for block in list(blocks.values())[-self.new_layers :]:
                start_anew(model, block)
        return kept

    def rates(self, model: nn.Module) -> dict[str, float]:
        """Return the factor on the learning rate of every parameter.

        Args:
            model: the network this adapter is attached to.
        """
        count = len(blocks_of(model))
        return {name: self.decay ** max(0, count - depth) for name, depth in depths_of(model).items()}


def depths_of(model: nn.Module) -> dict[str, int]:
    """Return the depth of every parameter by name: 0 for embeddings, 1 to L for layers, L + 1 above them.

    Args:
        model: the network.
    """
    blocks = list(blocks_of(model))
    embedded = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    found = {}
    for name, _ in model.named_parameters():
        above = 0 if name.rpartition(".")[0] in embedded else len(blocks) + 1
        own = (number for number, block in enumerate(blocks, 1) if name.startswith(f"{block}."))
        found[name] = next(own, above)
    return found


def start_anew(model: nn.Module, block: nn.Module) -> None:
    """Give a layer the random weights that its architecture starts from, drawn from torch's generator.

    Args:
        model: knows how its weights start.
        block: one of its layers.

    Raises:
        HoneError: the network does not say how its weights start.
    """
    initialise: Any = getattr(model, "_init_weights", None)
    if initialise is None:
        raise HoneError(
            f"adapter.new_layers: {type(model).__name__} does not say how its weights start; set new_layers: 0"
        )
    for module in reversed(list(block.modules())):  # a layer may have more to say of the modules inside it
        for marked in (module, *module.parameters(recurse=False), *module.buffers(recurse=False)):
            vars(marked)["_is_hf_initialized"] = False  # transformers leaves alone what is loaded
        initialise(module)
