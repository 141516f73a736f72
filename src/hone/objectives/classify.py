"""Classes of texts and of words, told by a linear head on the last hidden states of a language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

from hone.objectives.heads import Labelled
from hone.parts import part
from hone.text.heads import Readout
from hone.text.pack import CLASS

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed

OUTSIDE = "O"  # the class of words that are no part of anything


def pooled(values: Tensor, owners: Tensor, count: int, how: Literal["mean", "max"]) -> Tensor:
    """Return the mean or the largest of the rows of each segment, (S, K).

    Args:
        values: (T, K).
        owners: (T,) the segment of each row.
        count: S.
        how: mean or max.
    """
    if how == "mean":
        sizes = torch.bincount(owners, minlength=count).to(values.dtype)
        return values.new_zeros(count, values.shape[1]).index_add(0, owners, values) / sizes[:, None]
    lowest = values.new_full((count, values.shape[1]), float("-inf"))
    return lowest.scatter_reduce(0, owners[:, None].expand_as(values), values, "amax")


@part(
    "objective",
    "classify",
    papers=[("Label Supervised LLaMA Finetuning", "arXiv:2310.01208")],
    claim="A decoder that is fine-tuned with a linear head on its final states classifies better than one that is "
    "tuned to write the names of the classes, and than BERT.",
    deviations="Pooling over tokens leaves padding out, which the authors' code includes. The two-way attention of "
    "LS-unLLaMA is the option unmask.",
)
@dataclass(kw_only=True)
class Classify(Labelled):
    """Tell the class of a text: label-supervised fine-tuning of a decoder.

    logits = pool_t (W h_t),  loss = sum_texts w cost(logits, class)

    with h the last hidden states and w the text's field "weight", 1 where it has none. "class_accuracy" is reported
    beside the loss. It consumes "labelled": rows with a text and a label.

    Args:
        pooling: the logits of a text are those of its "last" token, or the "mean" or the "max" over its tokens.
    """

    consumes: ClassVar[str] = "labelled"
    pooling: Literal["last", "mean", "max"] = "last"

    def count(self, batch: Packed) -> float:
        """Return the summed weights of the batch's texts.

        Args:
            batch: B trees as a packed forest of T tokens.
        """
        return float(text_weights(batch).sum())

    def logits(self, model: LanguageModel, batch: Packed) -> Tensor:
        """Return the logits (S, K) of each segment.

        Args:
            model: the language model with its head.
            batch: packed forest of T tokens.
        """
        states = self.hidden(model, batch)
        if self.pooling == "last":
            return self.outputs(model, states[(batch.starts[1:] - 1).to(states.device)])
        owners = torch.arange(batch.segments).repeat_interleave(batch.starts.diff()).to(states.device)
        return pooled(self.outputs(model, states), owners, batch.segments, self.pooling)

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over texts, and the weight of those that are told rightly as "class_accuracy".

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        logits, targets, weights = self.logits(model, batch), batch.fields[CLASS].long(), text_weights(batch)
        right = logits.detach().argmax(-1) == targets
        return (weights * self.costs(logits, targets)).sum(), {"class_accuracy": (weights * right).sum()}

    def readout(self, model: LanguageModel) -> Readout:
        """Return how the head is read, for other libraries.

        Args:
            model: has the head.
        """
        found = super().readout(model)
        if self.pooling == "last":
            return found
        return Readout(found.head, "text", f"they read a text's last token alone, and this run takes {self.pooling}")

    def verdict(self, model: LanguageModel, batch: Packed) -> str:
        """Return the class of the only text of a batch, with its probability.

        Args:
            model: the trained model with its head.
            batch: one tree.
        """
        share, best = self.logits(model, batch)[0].softmax(-1).max(-1)
        return f"{self.class_names()[int(best)]} ({float(share):.0%})"


def text_weights(batch: Packed) -> Tensor:
    """Return what each segment (S,) weighs: the field "weight" of its sample, 1 where it has none.

    Args:
        batch: packed forest of T tokens.
    """
    if "weight" not in batch.fields:
        return batch.weights.new_ones(batch.segments)
    return batch.fields["weight"].nan_to_num(1.0)


@part(
    "objective",
    "tag",
    papers=[
        ("Label Supervised LLaMA Finetuning", "arXiv:2310.01208"),
        (
            "Do Not (Always) Look Right: Investigating the Capabilities of Decoder-Based Large Language Models for "
            "Sequence Labeling",
            "arXiv:2401.14556",
        ),
    ],
    claim="Without the causal mask in some of its layers, a decoder tags words better than a causal one, and often "
    "better than without the mask in all of them.",
    deviations="The class of a word is read at its last token, where the authors label the first one or all of them. "
    "No dropout before the head. Groups of layers may differ by one layer in size.",
)
@dataclass(kw_only=True)
class Tag(Labelled):
    """Tell the class of each word: sequence labelling with a decoder.

    logits = W h_t + b at the last token t of a word,  loss = sum_words cost(logits, class)

    Reported beside the loss: "class_accuracy"; and where there is a class "O", the shares of words "tags_right",
    "tags_predicted" and "tags_there" apart from it, so that micro-F1 = 2 right / (predicted + there). It consumes
    "tagged": rows with words and their tags.
    """

    consumes: ClassVar[str] = "tagged"
    bias: ClassVar[bool] = True

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over words, and what is reported, summed alike.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        logits, words = self._words(model, batch)
        weights, targets = batch.weights[words], self._owned(batch)[words]
        best = logits.detach().argmax(-1)
        metrics = {"class_accuracy": (weights * (best == targets)).sum()}
        names = list(self.class_names())
        if OUTSIDE in names:
            outside = names.index(OUTSIDE)
            said, there = best != outside, targets != outside
            metrics["tags_right"] = (weights * (said & (best == targets))).sum()
            metrics |= {"tags_predicted": (weights * said).sum(), "tags_there": (weights * there).sum()}
        return (weights * self.costs(logits, targets)).sum(), metrics

    def _words(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, Tensor]:
        """Return the logits (W, K) of a batch's words, and their last tokens (W,)."""
        words = batch.weights.nonzero().squeeze(1)
        return self.outputs(model, self.hidden(model, batch)[words]), words

    def _owned(self, batch: Packed) -> Tensor:
        """Return the class number of the word that each token (T,) belongs to."""
        return batch.fields[CLASS].repeat_interleave(batch.starts.diff().to(batch.tokens.device)).nan_to_num(0).long()

    def readout(self, model: LanguageModel) -> Readout:
        """Return how the head is read, for other libraries.

        Args:
            model: has the head.
        """
        return Readout(super().readout(model).head, "token", super().readout(model).obstacle)

    def verdict(self, model: LanguageModel, batch: Packed) -> str:
        """Return the classes of the words of the only text of a batch.

        Args:
            model: the trained model with its head.
            batch: one tree.
        """
        logits, _ = self._words(model, batch)
        return " ".join(self.class_names()[number] for number in logits.argmax(-1).tolist())
