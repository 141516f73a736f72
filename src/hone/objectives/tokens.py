"""Losses that weigh tokens: by how well they are predicted, how frequent they are, and where they stand."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hone.errors import HoneError
from hone.objectives.answers import answers_of, tree_field
from hone.objectives.base import Objective, trained
from hone.objectives.language import next_token_loss
from hone.objectives.surrogates import log1mexp
from hone.parts import part

if TYPE_CHECKING:
    from collections.abc import Iterable

    from hone.text.model import LanguageModel
    from hone.text.pack import Packed, Tree

NonNegative = Annotated[float, Field(ge=0)]


def focal_loss(logits: Tensor, targets: Tensor, gamma: float) -> Tensor:
    """Return the focal loss of each token (n,).

    -(1 - p)^gamma log p

    Args:
        logits: (n, V).
        targets: (n,) token ids.
        gamma: focusing exponent; 0 is cross-entropy.
    """
    logprobs = _picked(logits, targets)
    return -(gamma * log1mexp(logprobs)).exp() * logprobs


def rectified(logits: Tensor, targets: Tensor, power: float) -> Tensor:
    """Return the negative log-likelihood of each token (n,), weighted by a power of its probability held fixed.

    -sg(p)^power log p

    Args:
        logits: (n, V).
        targets: (n,) token ids.
        power: 0 is cross-entropy, 1 dynamic fine-tuning.
    """
    logprobs = _picked(logits, targets)
    return -(power * logprobs.detach()).exp() * logprobs


def _picked(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)


@part(
    "objective",
    "focal",
    papers=[("Focal Loss for Dense Object Detection", "arXiv:1708.02002")],
    claim="Focusing on examples that are predicted badly helps when easy ones dominate.",
    deviations="The classes are the tokens of the vocabulary; there is no weight by class.",
)
@dataclass(kw_only=True)
class Focal(Objective):
    """Focal loss over trained tokens.

    loss = -sum_t w_t (1 - p_t)^gamma log p_t

    Args:
        gamma: focusing exponent; 0 is cross-entropy. The paper takes 2.
    """

    gamma: NonNegative = 2.0

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss over trained tokens, and the weight of those that are likeliest as "token_accuracy".

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        return next_token_loss(model, batch, trained(batch), partial(focal_loss, gamma=self.gamma))


def inverse_frequencies(counts: np.ndarray, power: float) -> np.ndarray:
    """Return a weight for each token of the vocabulary (V,): its count to a negative power, of mean 1 over the data.

    Args:
        counts: (V,) how often each is trained; one that never is counts as one that is once.
        power: 0 weighs all alike, 1 gives every token of the vocabulary the same sum of weights.
    """
    weights = np.maximum(counts, 1.0) ** -power
    total = counts.sum()
    return weights * (total / (counts * weights).sum()) if total else np.ones_like(weights)


def count_trained(trees: Iterable[Tree], size: int) -> np.ndarray:
    """Return how often each token of the vocabulary is trained (V,).

    Args:
        trees: the training data.
        size: of the vocabulary.
    """
    counts = np.zeros(size)
    for tree in trees:
        for tokens, weights in zip(tree.tokens, tree.weights, strict=True):
            counts += np.bincount(tokens[weights != 0], minlength=size)
    return counts


def last_lines(batch: Packed, breaks: Tensor) -> Tensor:
    """Return which tokens of a batch stand in the last line of an answer (T,), its end included.

    Args:
        batch: packed forest of T tokens.
        breaks: (V,) whether a token holds a line break; the one just before the end of the text opens no line.
    """
    marked = torch.zeros(len(batch), dtype=torch.bool)
    chosen, ends_line = batch.weights.cpu() != 0, breaks[batch.tokens.cpu()]
    for begin, end in zip(batch.starts[:-1].tolist(), batch.starts[1:].tolist(), strict=True):
        own = chosen[begin:end].nonzero().squeeze(1)
        if len(own):
            first, last = begin + int(own[0]), begin + int(own[-1])
            # The line break that opens the line counts to it: its token may hold more than the break.
            cuts = ends_line[first : max(first, last - 1)].nonzero().squeeze(1)
            marked[first + int(cuts[-1]) if len(cuts) else first : last + 1] = True
    return (marked & chosen).to(batch.tokens.device)


@part(
    "objective",
    "weighted",
    papers=[
        (
            "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
            "arXiv:2508.05629",
        ),
        ("Token-level Adaptive Training for Neural Machine Translation", "arXiv:2010.04380"),
    ],
    claim="Tokens deserve different weights: their own probability (dynamic fine-tuning), or more for rare ones.",
    deviations="Weights by frequency are a power of the count; those of the paper are an exponential or a chi-square "
    "function of it. Weights by length and for the last line are our own additions.",
)
@dataclass(kw_only=True)
class Weighted(Objective):
    """Negative log-likelihood with a weight for each trained token, all factors of which can be combined.

    loss = -sum_t w_t sg(p_t)^power log p_t
    w_t = weight_t sample n^(-length) count(token_t)^(-frequency) (last where t is in the last line of the answer)

    `weight` is 1 in answers, `sample` the field "weight" of the sample (1 where it has none), n the number of tokens
    of the answer; weights by count have the mean 1. The unit is the token, counted by w_t: the loop divides by sum_t
    w_t. Counts and line breaks are known once training starts; what is computed before leaves them out.

    Args:
        power: exponent of the probability, held fixed, that each token is weighted by.
        length: exponent of the answer's length; 1 makes all answers count alike, however long.
        frequency: exponent by which rare tokens weigh more; needs data of a known length.
        last: factor on the tokens of an answer's last line, where worked answers state the result.
    """

    power: NonNegative = 0.0
    length: Annotated[float, Field(ge=0, le=1)] = 0.0
    frequency: Annotated[float, Field(ge=0, le=1)] = 0.0
    last: NonNegative = 1.0
    _by_token: Tensor | None = field(init=False, default=None, repr=False)
    _breaks: Tensor | None = field(init=False, default=None, repr=False)

    def setup(self, run: Any) -> None:
        """Count the tokens of the data and find the tokens that end lines.

        Args:
            run: the run in progress.

        Raises:
            HoneError: weights by frequency need data of a known length.
        """
        size = run.model.hf.get_input_embeddings().weight.shape[0]
        if self.frequency:
            trees = getattr(run.loader, "trees", None)
            if trees is None:
                raise HoneError("objective 'weighted': frequency needs data of a known length; set streaming: false")
            counts = count_trained((trees[index] for index in range(len(trees))), size)
            self._by_token = torch.from_numpy(inverse_frequencies(counts, self.frequency)).float()
        if self.last != 1:
            pieces = run.model.tokenizer.batch_decode([[token] for token in range(len(run.model.tokenizer))])
            self._breaks = torch.zeros(max(size, len(pieces)), dtype=torch.bool)
            self._breaks[: len(pieces)] = torch.tensor(["\n" in piece for piece in pieces])

    def weigh(self, batch: Packed) -> Tensor:
        """Return the weight w_t of predicting each token (T,).

        Args:
            batch: B trees as a packed forest of T tokens.
        """
        weights, device = batch.weights, batch.tokens.device
        if "weight" in batch.fields:
            sizes = batch.starts.diff().to(device)
            weights = weights * tree_field(batch, "weight", batch.trees, 1.0).repeat_interleave(sizes)
        if self.length:
            answers = answers_of(batch)
            factors = answers.tokens[answers.token_answers] ** -self.length
            weights = weights.index_put((batch.weights.nonzero().squeeze(1),), weights[batch.weights != 0] * factors)
        if self._by_token is not None:
            weights = weights * self._by_token.to(device)[batch.tokens]
        if self._breaks is not None:
            weights = torch.where(last_lines(batch, self._breaks), self.last * weights, weights)
        return weights

    def count(self, batch: Packed) -> float:
        """Return the summed weights of the batch's tokens.

        Args:
            batch: B trees as a packed forest of T tokens.
        """
        return float(self.weigh(batch).double().sum())

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss over trained tokens, and the weight of those that are likeliest as "token_accuracy".

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        predictions = trained(batch, self.weigh(batch))
        return next_token_loss(model, batch, predictions, partial(rectified, power=self.power))


@part(
    "objective",
    "dynamic-ft",
    papers=[
        (
            "On the Generalization of SFT: A Reinforcement Learning Perspective with Reward Rectification",
            "arXiv:2508.05629",
        )
    ],
    claim="Weighing each token by its own probability takes away the inverse probability that the gradient of the "
    "likelihood hides, and generalises better than supervised fine-tuning (mathematics, by several points).",
)
@dataclass(kw_only=True)
class DynamicFT(Weighted):
    """Dynamic fine-tuning (DFT): `weighted` by the token's own probability.

    loss = -sum_t w_t sg(p_t) log p_t

    The options of `weighted` are there too.

    Args:
        power: exponent of the probability.
    """

    power: NonNegative = 1.0
