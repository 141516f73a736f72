"""Decoding guided by other models: a product of next-token distributions, each model behind a cache of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from torch import Tensor

from hone.errors import ModelError
from hone.options import Nested
from hone.parts import part
from hone.precision import wide
from hone.samplers.text import greedy, of_tokens, pick

if TYPE_CHECKING:
    from hone.text.generate import History
    from hone.text.model import LanguageModel


def guided_scores(base: Tensor, guides: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Return log p(v) + sum_i w_i log q_i(v) (N, V), whose softmax is the product of the distributions.

    Models of one family pad their vocabularies to different sizes; what not all of them have is left out.

    Args:
        base: (N, V) logits of the model that is guided.
        guides: (N, V) logits of each guide.
        weights: w_i, one for each guide.
    """
    size = min(logits.shape[-1] for logits in (base, *guides))
    scores = wide(base[:, :size]).log_softmax(-1)
    for guide, weight in zip(guides, weights, strict=True):
        scores = scores + weight * wide(guide[:, :size]).log_softmax(-1).to(scores)
    return scores


@part(
    "sampler",
    "genarm",
    papers=[
        (
            "GenARM: Reward Guided Generation with Autoregressive Reward Model for Test-time Alignment",
            "arXiv:2410.08193",
        )
    ],
    claim="A small autoregressive reward model guides a frozen larger one token by token, as well as training that one "
    "does; several rewards are traded off by their weights without any training.",
    deviations="A weight is the paper's 1 / beta. The authors' code divides the summed log-probabilities by 1 + sum of "
    "the weights and undoes it with the temperature; here the temperature of `then` is that of the product itself.",
)
@dataclass(kw_only=True)
class GenARM:
    """Draw from the product of the model's distribution and those of autoregressive reward models, made to sum to 1.

    p(v | x, y) = pi(v | x, y) prod_i pi_i(v | x, y)^w_i / Z

    A guide is a model trained by the objective `arm`, or any other language model with the same tokenizer; it may be
    smaller. A negative weight leads away from it. Each guide reads along behind a key-value cache of its own.

    Args:
        guides: folders or Hub names of the guides; in a later stage "stage:1" and so on; none leaves the model alone.
        weights: w_i of each guide, the inverse of its beta; None takes 1 for each.
        then: sampler that picks from the product, e.g. sample, which draws from it as in the paper; None takes the most
            probable token.
    """

    looks_back: ClassVar[bool] = True
    guides: list[str] = field(default_factory=list)
    weights: list[float] | None = None
    then: Annotated[Any, Nested("sampler")] = None
    _loaded: list[Any] = field(default_factory=list, init=False, repr=False)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the weights."""
        if self.weights is not None and len(self.weights) != len(self.guides):
            yield "weights", f"expected a weight for each of {len(self.guides)} guides, got {len(self.weights)}"
        yield from of_tokens(self.then, "then")
        if hasattr(self.then, "beside"):
            yield "then", "expected a sampler that no other model reads along with; put all guides into one genarm"

    def beside(self, model: LanguageModel) -> Sequence[LanguageModel]:
        """Return the guides, loaded once, which read along.

        Args:
            model: the one that is guided.

        Raises:
            ModelError: a guide has another tokenizer, or a model must be padded.
        """
        if not self._loaded:
            self._loaded = [self._load(name, model) for name in self.guides]
        if not model.packs and self._loaded:
            raise ModelError(
                f"{type(model.hf).__name__} does not run packed, so that no guide can read along; use another sampler"
            )
        return self._loaded

    def _load(self, name: str, model: LanguageModel) -> LanguageModel:
        weight = next(model.hf.parameters())
        guide = type(model).load(name, device=weight.device, dtype=weight.dtype).eval()
        if model.tokenizer is not None and guide.tokenizer.get_vocab() != model.tokenizer.get_vocab():
            raise ModelError(
                f"sampler.guides: '{name}' has another tokenizer than the model that it shall guide, so that their "
                "next tokens are not the same; name a model of the same family"
            )
        if not guide.packs:
            raise ModelError(f"sampler.guides: '{name}' does not run packed, so that it cannot read along")
        return guide.requires_grad_(False)

    def __call__(self, logits: Tensor, uniforms: Tensor, history: History) -> Tensor:
        """Return (N,) token ids.

        Args:
            logits: (N, V) scores of the next token by the model that is guided.
            uniforms: (N,) numbers in [0, 1).
            history: what each row has drawn, with the logits of the guides.

        Raises:
            ModelError: the model answers in a way in which no other reads along.
        """
        if len(history.beside) != len(self.guides):
            raise ModelError(
                "sampler 'genarm' needs guides that read along, which this way of answering has not (thoughts that "
                "are states, tokens that take back, masked fillers); use an objective that answers token by token"
            )
        weights = [1.0] * len(self.guides) if self.weights is None else self.weights
        with torch.no_grad():
            scores = guided_scores(logits, history.beside, weights)
        return pick(self.then or greedy, scores, uniforms, history)
