"""What objectives with a linear head on the last hidden states share: the head, the classes and the attention."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hone.data.open import ACCEPTED, mismatch
from hone.data.sample import Kind, Sample
from hone.errors import DataError, HoneError
from hone.networks import blocks_of
from hone.objectives.base import Objective
from hone.objectives.class_losses import (
    ClassLoss,
    NotNegative,
    Positive,
    aldr_loss,
    bounded,
    focal_loss,
    ldr_loss,
)
from hone.text.heads import HEAD, Readout, new_head, saved_names
from hone.text.pack import Packed, Tree, pack, seen_both_ways

if TYPE_CHECKING:
    from hone.data.source import Source
    from hone.text.model import LanguageModel

Groups = Annotated[str, Field(pattern="^(none|all|[01]{2,})$")]
Layers = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
KINDS: dict[str, Kind] = {"labelled": "text", "tagged": "tagged"}
CAUSAL = "transformers runs this architecture with the causal mask, and this run has removed it (unmask)"


def unmasked_layers(unmask: str | list[int], count: int) -> list[int]:
    """Return the layers without a causal mask.

    Args:
        unmask: "none", "all", layer numbers, or a digit for each group of layers, 1 where they have none.
        count: L, the number of layers.

    Raises:
        HoneError: there is no such layer, or there are more groups than layers.
    """
    if isinstance(unmask, list):
        if wrong := [layer for layer in unmask if layer >= count]:
            raise HoneError(f"objective.unmask: layer {wrong[0]} is not there: the layers are 0 to {count - 1}")
        return sorted(set(unmask))
    if unmask in ("none", "all"):
        return list(range(count)) if unmask == "all" else []
    if len(unmask) > count:
        raise HoneError(f"objective.unmask: {len(unmask)} groups, but the model has only {count} layers")
    return [layer for layer in range(count) if unmask[layer * len(unmask) // count] == "1"]


@dataclass(kw_only=True)
class Headed(Objective):
    """The base of objectives that read a linear head of the last hidden states instead of the vocabulary's.

    Args:
        unmask: where attention sees both ways: "none", "all", layer numbers, or one digit for each of equal groups of
            layers from below, e.g. "0011" for the upper half.
    """

    generates: ClassVar[bool] = False
    bias: ClassVar[bool] = False
    unmask: Groups | Layers = "none"

    def class_names(self) -> Sequence[str]:
        """Return the names of the head's outputs."""
        raise NotImplementedError(f"{type(self).__name__} must define class_names()")

    def equip(self, model: LanguageModel) -> None:
        """Put the head beside the model.

        Args:
            model: the language model, as the run starts from it.

        Raises:
            HoneError: `unmask` names layers that the model has not.
        """
        unmasked_layers(self.unmask, len(blocks_of(model.hf)))
        model.extras[HEAD] = new_head(model, list(self.class_names()), bias=self.bias)

    def hidden(self, model: LanguageModel, batch: Packed) -> Tensor:
        """Return the last hidden states (T, D), computed with the attention that `unmask` says.

        Args:
            model: the language model.
            batch: packed forest of T tokens.
        """
        layers = unmasked_layers(self.unmask, len(blocks_of(model.hf)))
        return model.hidden(seen_both_ways(batch, layers) if layers else batch)

    def outputs(self, model: LanguageModel, states: Tensor) -> Tensor:
        """Return the head's outputs (n, K) of states (n, D), in single precision at least.

        Args:
            model: has the head.
            states: (n, D) hidden states.
        """
        found: Tensor = model.extras[HEAD](states)
        return found.float() if found.dtype.itemsize < 4 else found

    def readout(self, model: LanguageModel) -> Readout:
        """Return how the head is read, for other libraries.

        Args:
            model: has the head.
        """
        head: Any = model.extras[HEAD]
        return Readout(head, "text", "" if self.unmask == "none" else CAUSAL)

    @torch.no_grad()
    def verdicts(self, model: LanguageModel, texts: Sequence[str]) -> list[str]:
        """Return what the model says of each text.

        Args:
            model: the trained model with its head.
            texts: what it shall judge.
        """
        model.eval()
        device = next(model.parameters()).device
        return [self.verdict(model, pack([self.asked(model, text)]).to(device)) for text in texts]

    def asked(self, model: LanguageModel, text: str) -> Tree:
        """Return a text as the model was trained on them; here with the end that a whole answer has.

        Args:
            model: renders it.
            text: what the model shall judge.
        """
        return model.renderer.render(Sample(kind="text", answers=(text,), where="--prompt"))[0]

    def verdict(self, model: LanguageModel, batch: Packed) -> str:
        """Return in words what the model says of the only tree of a batch.

        Args:
            model: the trained model with its head.
            batch: one tree.
        """
        raise NotImplementedError(f"{type(self).__name__} must define verdict(model, batch)")


@dataclass(kw_only=True)
class Labelled(Headed):
    """The base of objectives that tell classes: which ones there are, and what a wrong one costs.

    Args:
        classes: names of the classes; None finds them in the training data, sorted, numbers by their size.
        cost: what a row of logits costs: cross-entropy, focal, ldr or aldr (see `hone.objectives.class_losses`).
        label_smoothing: of the cross-entropy: probability mass spread evenly over the classes, in [0, 1).
        gamma: of focal: how much less easy rows count.
        temperature: of ldr and aldr: how far the worst case is kept from a uniform distribution, in units of a logit.
        margin: of ldr and aldr: by how much the target's logit shall exceed the others.
        adapt: of aldr: above 1; the larger, the less temperatures adapt.
        bounded: of ldr and aldr: take softplus(f) over its mean for the logits, as the authors do against noise.
    """

    classes: list[str] | None = None
    cost: ClassLoss = "cross-entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    gamma: NotNegative = 2.0
    temperature: Positive = 10.0
    margin: NotNegative = 0.1
    adapt: Annotated[float, Field(gt=1)] = 2.0
    bounded: bool = True
    _names: list[str] = field(init=False, default_factory=list, repr=False)

    def class_names(self) -> Sequence[str]:
        """Return the names of the classes in the order of their numbers, known after `look` or `recall`."""
        return self.classes if self.classes is not None else self._names

    def look(self, source: Source) -> None:
        """Find the classes of the training data, unless they are given.

        Args:
            source: the training data.

        Raises:
            DataError: there are fewer than two, they are given twice, or a stream would have to be read to its end.
        """
        if self.classes is None:
            if source.streaming:
                raise DataError(
                    "a stream is not read to its end to find its classes; name them: "
                    "objective: {name: classify, classes: [ONE, OTHER]}"
                )
            found: set[str] = set()
            for sample in source.samples("train"):
                if sample.kind not in ACCEPTED[self.consumes]:
                    raise mismatch(sample, self.consumes)
                found.update(sample.labels)
            self._names = in_order(found)
        names = self.class_names()
        if len(set(names)) < 2 or len(set(names)) < len(names):
            raise DataError(
                f"{source.describe()}: expected at least two different classes, found {', '.join(names) or 'none'}; "
                "a class stands in a column called 'label' (or 'tags' of words); name another with columns: {label: "
                "COLUMN}"
            )

    def recall(self, folder: Path) -> bool:
        """Take the classes of a saved model's head, unless they are given; return whether they are known.

        Args:
            folder: of the model.
        """
        if self.classes is None:
            self._names = saved_names(folder) or []
        return bool(self.class_names())

    def asked(self, model: LanguageModel, text: str) -> Tree:
        """Return a text as the model was trained on them, with some class that nobody looks at.

        Args:
            model: renders it.
            text: what the model shall judge; of tagged words, they are parted by white space.
        """
        words = (tuple(text.split()) or (text,)) if self.consumes == "tagged" else (text,)
        kind, names = KINDS[self.consumes], self.class_names()
        sample = Sample(kind=kind, answers=words, labels=(names[0],) * len(words), where="--prompt")
        return model.renderer.classified(sample, names)

    def costs(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return what each row of logits costs, (n,).

        Args:
            logits: (n, K).
            targets: (n,) class numbers.
        """
        if self.cost == "cross-entropy":
            return F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.label_smoothing)
        if self.cost == "focal":
            return focal_loss(logits, targets, self.gamma)
        given = bounded(logits) if self.bounded else logits
        if self.cost == "ldr":
            return ldr_loss(given, targets, self.temperature, self.margin)
        return aldr_loss(given, targets, self.temperature, self.margin, self.adapt)


def in_order(names: Collection[str]) -> list[str]:
    """Return names sorted: by size where all are numbers, else by their letters.

    Args:
        names: of classes.
    """
    try:
        return sorted(names, key=lambda name: (float(name), name))
    except ValueError:
        return sorted(names)
