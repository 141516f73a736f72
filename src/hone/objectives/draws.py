"""Random numbers that belong to trees: a function of a tree's tokens and of the step, of nothing that stands beside it.

So neither the division of a step into micro-batches nor the number of processes changes what a token draws.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from hone.objectives.base import trained
from hone.objectives.language import SFT, next_token_loss
from hone.text.vocabulary import CrossEntropy

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed, Tree

Share = Annotated[float, Field(ge=0, le=1)]


def places(batch: Packed) -> Iterator[slice]:
    """Yield where the tokens of each tree are in a batch.

    Args:
        batch: B trees as a packed forest of T tokens.
    """
    firsts = torch.searchsorted(batch.trees, torch.arange(len(batch.where) + 1))
    starts = batch.starts[firsts].tolist()
    yield from (slice(begin, end) for begin, end in itertools.pairwise(starts))


def per_tree(batch: Packed, salt: str, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
    """Return what is drawn for each tree (T, ...), from a generator seeded with a hash of its tokens and of a salt.

    Args:
        batch: B trees as a packed forest of T tokens.
        salt: tells apart what is drawn for the same tree, e.g. at different steps.
        draw: (number of tokens n, generator on the batch's device) -> (n, ...).
    """
    device, tokens = batch.tokens.device, batch.tokens.cpu().numpy()
    drawn = []
    for place in places(batch):
        digest = hashlib.blake2b(tokens[place].tobytes() + salt.encode(), digest_size=7).digest()
        generator = torch.Generator(device=device).manual_seed(int.from_bytes(digest, "big"))
        drawn.append(draw(place.stop - place.start, generator))
    return torch.cat(drawn)


def uniform(batch: Packed, salt: str, *shape: int) -> Tensor:
    """Return numbers in [0, 1), (T, *shape).

    Args:
        batch: B trees as a packed forest of T tokens.
        salt: tells apart what is drawn for the same tree.
        shape: of a token's numbers.
    """
    device = batch.tokens.device
    return per_tree(batch, salt, lambda n, generator: torch.rand(n, *shape, generator=generator, device=device))


def normal(batch: Packed, salt: str, *shape: int) -> Tensor:
    """Return standard normal numbers (T, *shape).

    Args:
        batch: B trees as a packed forest of T tokens.
        salt: tells apart what is drawn for the same tree.
        shape: of a token's numbers.
    """
    device = batch.tokens.device
    return per_tree(batch, salt, lambda n, generator: torch.randn(n, *shape, generator=generator, device=device))


@dataclass(kw_only=True)
class Disturbed(SFT):
    """The base of fine-tuning on inputs that are changed at random in training; evaluation reports the loss of `sft`.

    A subclass gives `disturbed`. What is drawn depends on the run's seed, the step and the tokens of a tree.
    """

    _salt: str = field(init=False, default="", repr=False)
    _progress: float = field(init=False, default=1.0, repr=False)  # share of the run's steps that are done

    def before_step(self, run: Any, trees: Sequence[Tree]) -> None:
        """Note the step, for what is drawn in it.

        Args:
            run: the run in progress.
            trees: all trees of the step.
        """
        self._salt = f"{run.recipe.seed}:{run.step}"
        self._progress = run.step / max(1, run.total)

    def warmed(self, most: float, warmup: float) -> float:
        """Return a rate that rises linearly from 0 over the first part of the run.

        Args:
            most: what it rises to.
            warmup: share of the run's steps over which it rises; 0 starts with `most`.
        """
        return most if self._progress >= warmup else most * self._progress / warmup

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss on changed inputs; on the inputs as they are where the model is being evaluated.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        return self.disturbed(model, batch) if model.training else super().loss(model, batch)

    def disturbed(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss on changed inputs, and what `sft` reports.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.

        Raises:
            NotImplementedError: the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define disturbed(model, batch)")

    def on_tokens(self, model: LanguageModel, batch: Packed, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss of the batch's own targets behind other input tokens.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
            tokens: (T,) what is read instead of the batch's tokens.
        """
        function = CrossEntropy(label_smoothing=self.label_smoothing)
        return next_token_loss(model, replace(batch, tokens=tokens), trained(batch), function)
