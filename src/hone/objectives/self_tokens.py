"""Fine-tuning behind the model's own tokens, so that it meets in training what it will meet when it generates."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from hone.modes import evaluating
from hone.objectives.base import trained
from hone.objectives.draws import Disturbed, Share, uniform
from hone.objectives.masked_thought import masked_tokens
from hone.objectives.reference import starting_model
from hone.parts import part
from hone.samplers.text import Greedy, Sample
from hone.text.vocabulary import vocabulary_map

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed


@torch.no_grad()
def predicted_tokens(model: LanguageModel, batch: Packed, read: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """Return the tokens that a model generates at the batch's trained places, (T,); elsewhere the batch's own.

    All places are predicted in one pass: token t behind the tokens before t that the model reads.

    Args:
        model: generates.
        batch: packed forest of T tokens.
        read: (T,) the tokens that it reads.
        uniforms: (T,) numbers in [0, 1) that decide what is drawn.
        temperature: of the sampling; 0 picks the most probable token.
    """
    predictors, targets, _ = trained(batch)
    chosen = batch.weights != 0
    pick = Sample(temperature=temperature) if temperature > 0 else Greedy()

    def draw(logits: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
        return pick(logits, uniforms).to(logits.dtype)  # exact: ids are far below 2^24

    with evaluating(model):
        hidden = model.hidden(replace(batch, tokens=read))[predictors]
    found = vocabulary_map(hidden, model.head, targets, draw, extras=[uniforms[chosen]])
    return batch.tokens.masked_scatter(chosen, found.long())


@part(
    "objective",
    "scheduled-sampling",
    papers=[
        (
            "Bridging the Training-Inference Gap in LLMs by Leveraging Self-Generated Tokens",
            "arXiv:2410.14655",
        )
    ],
    claim="Behind contexts in which the data's tokens alternate with the model's own, models learn to go on from "
    "their own mistakes (batch-scheduled sampling).",
    deviations="Verified from the abstract and summaries only: no official code is public. The mixed contexts are "
    "drawn anew in every epoch instead of being stored once, from predictions for all places at once, and the share "
    "of the model's tokens rises linearly.",
)
@dataclass(kw_only=True)
class ScheduledSampling(Disturbed):
    """Supervised fine-tuning behind a mixture of the data's tokens and the model's own.

    loss = sum_t w_t [-log p(token_t | x, y~_<t)],  y~_s drawn from the model with probability rate, else token_s

    The model's token at a place is drawn behind what it reads before it: the data's tokens in the first pass, the
    mixture of the pass before in later ones. The targets stay. Evaluation mixes nothing. The options of `sft` are
    there too.

    Args:
        rate: probability of reading the model's token instead of the data's.
        warmup: share of the run's steps over which the rate rises from 0.
        passes: passes over an answer; n of them see chains of n generated tokens.
        temperature: of the model's tokens; 0 picks the most probable one.
        generator: who generates: the model that the run "start"s from, as in the paper (offline), which is held in
            memory as well, or the "current" one (online).
    """

    rate: Share = 0.3
    warmup: Share = 0.5
    passes: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0)] = 1.0
    generator: Literal["start", "current"] = "start"
    _start: Any = field(init=False, default=None, repr=False)

    def setup(self, run: Any) -> None:
        """Load the starting model where it generates.

        Args:
            run: the run in progress.

        Raises:
            HoneError: the run starts from random weights.
        """
        if self.generator == "start":
            self._start = starting_model(run, "generator: start", "generator: current").requires_grad_(False).eval()

    def mixed(self, model: LanguageModel, batch: Packed) -> Tensor:
        """Return what the model reads (T,): the data's tokens, some replaced by generated ones.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        rate, read = self.warmed(self.rate, self.warmup), batch.tokens
        if rate == 0:
            return read
        coins = uniform(batch, f"{self._salt}:mix")
        generator = model if self._start is None else self._start
        for turn in range(self.passes):
            drawn = uniform(batch, f"{self._salt}:{turn}")
            own = predicted_tokens(generator, batch, read, drawn, self.temperature)
            read = masked_tokens(batch.tokens, batch.weights, coins, rate, own)
        return read

    def disturbed(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss behind mixed contexts.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        return self.on_tokens(model, batch, self.mixed(model, batch))
