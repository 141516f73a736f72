r"""Sequence-to-sequence fine-tuning of one stack of layers: the source is seen both ways, the target left to right.

Three forms differ in where a target's token is predicted:

    causal          at the token before it, as every causal model does
    masked          at its own place, where a mask stands instead of it, for a random part of the target's tokens
    pseudo-masked   at a mask that stands beside it, at the same position, for all of them in one pass

A mask sees the source, the tokens of the target before it, and itself. As a packed tree: the target is cut before each
of its tokens, and the mask is one more child of what comes before.

    source -> y1 -> y2 -> y3        (the target; each of its tokens a segment)
         \-> M    \-> M   \-> ...  (the masks; M beside y2 sees the source and y1)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hone.objectives.base import Predictions, trained
from hone.objectives.draws import Share, places, uniform
from hone.objectives.language import SFT, next_token_loss
from hone.parts import part
from hone.text.pack import Packed, Tree, as_prefixes, pack
from hone.text.special import mask_id
from hone.text.vocabulary import CrossEntropy

if TYPE_CHECKING:
    from hone.text.generate import Generation
    from hone.text.model import LanguageModel

Task = tuple[Packed, Predictions]  # what is run, and what is predicted where


def with_copies(batch: Packed, beside: Tensor, ids: Tensor) -> tuple[Packed, Tensor]:
    """Return a batch with N more tokens, each at the place of one that is there, and where they are (N,).

    A copy sees what comes before the token that it stands beside, and itself; no other token sees a copy.

    Args:
        batch: packed forest of T tokens.
        beside: (N,) indices of tokens in rising order, in no segment that is seen both ways.
        ids: (N,) ids of the copies.
    """
    starts, parents, cuts = batch.starts.tolist(), batch.parents.tolist(), beside.cpu()
    begins = torch.cat([batch.starts[:-1], cuts]).unique()
    owners = torch.searchsorted(batch.starts, begins, right=True) - 1
    last_piece = {owner: number for number, owner in enumerate(owners.tolist())}
    joined = [
        number - 1 if begin != starts[owner] else last_piece[parents[owner]] if parents[owner] >= 0 else -1
        for number, (begin, owner) in enumerate(zip(begins.tolist(), owners.tolist(), strict=True))
    ]
    pieces = torch.searchsorted(begins, cuts)
    source, above = torch.cat([owners, owners[pieces]]), torch.tensor(joined)
    above = torch.cat([above, above[pieces]])
    # Pieces and copies by trees, so that the segments of a tree stay side by side.
    order = batch.trees[source].argsort(stable=True)
    rank = order.argsort()
    edges = torch.cat([begins, len(batch) + torch.arange(len(cuts) + 1)])
    lengths = edges.diff()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths[order].cumsum(0)])
    inside = torch.arange(len(batch) + len(cuts)) - offsets[:-1].repeat_interleave(lengths[order])
    moved = (edges[:-1][order].repeat_interleave(lengths[order]) + inside).to(beside.device)
    source, above = source[order], above[order]
    marked = torch.zeros(batch.segments, dtype=torch.bool) if batch.two_way is None else batch.two_way
    made = replace(
        batch,
        tokens=torch.cat([batch.tokens, ids])[moved], starts=offsets,
        positions=torch.cat([batch.positions, batch.positions[beside]])[moved],
        parents=torch.where(above >= 0, rank[above.clamp(min=0)], -1),
        weights=torch.cat([batch.weights, batch.weights.new_zeros(len(cuts))])[moved],
        fields={name: value[source.to(value.device)] for name, value in batch.fields.items()},
        trees=batch.trees[source], two_way=marked[source],
    )  # fmt: skip
    return made, moved.argsort()[len(batch) :]


def masked_part(batch: Packed, rate: float, salt: str) -> Tensor:
    """Return the indices (N,) of a random part of the trained tokens: of each tree the same share, at least one token.

    Args:
        batch: packed forest of T tokens.
        rate: share of a tree's trained tokens.
        salt: tells apart what is drawn for the same tree.
    """
    order = torch.where(batch.weights != 0, uniform(batch, salt).to(batch.weights), 2.0)
    chosen = torch.zeros_like(batch.weights, dtype=torch.bool)
    for place in places(batch):
        there = int((batch.weights[place] != 0).sum())
        count = max(1, round(rate * there)) if there else 0
        chosen[place.start + order[place].argsort(stable=True)[:count]] = True
    return chosen.nonzero().squeeze(1)


def decode_masked(model: LanguageModel, prompts: list[np.ndarray], samples: int, draws: Any, *, mask: int) -> None:
    """Answer prompts by a mask that is put after what there is, and gives way to the token drawn for it.

    Everything is run again for every token: a mask's place is taken by another token, so no plain cache serves.

    Args:
        model: the language model.
        prompts: token ids of each prompt, which is seen both ways.
        samples: answers to each prompt.
        draws: draws and keeps the tokens (see `hone.text.generate.generate`).
        mask: id of the mask.
    """
    device = next(model.parameters()).device
    for step in range(int(draws.room.max())):
        if not len(rows := draws.running()):
            return
        trees = []
        for row in rows:
            prompt, answer = prompts[row // samples], np.append(draws.tokens[row, :step], np.int32(mask))
            weights = np.zeros(len(prompt), np.float32), np.ones(len(answer), np.float32)
            trees.append(Tree((prompt.astype(np.int32), answer.astype(np.int32)), weights, (-1, 0)))
        forest = as_prefixes(pack(trees)).to(device)
        ends = (forest.starts[2::2] - 1).to(device)
        draws.take(model.head(model.hidden(forest)[ends]), rows, step)


@part(
    "objective",
    "s2s-ft",
    papers=[
        (
            "s2s-ft: Fine-Tuning Pretrained Transformer Encoders for Sequence-to-Sequence Learning",
            "arXiv:2110.13640",
        )
    ],
    claim="A bidirectional encoder, fine-tuned with a source that is seen both ways and targets at masks, generates as "
    "well as models made for that; the pseudo-masked form is best.",
    deviations="Checked against microsoft/unilm's s2s-ft (mask of attention, positions, shares of masks kept or "
    "random); of the paper, only the abstract. Models are causal decoders with positions of their own instead of BERT "
    "with token types. Where the tokenizer has no mask, a token serves that no text is made of. The masked form masks "
    "a fixed share of each target. Spans of masks (the toolkit's span_len) and beam search are left out; label "
    "smoothing is off by default, and 0.1 in the toolkit.",
)
@dataclass(kw_only=True)
class S2S(SFT):
    """Supervised fine-tuning with a prompt that is seen in both directions.

    loss = sum_t w_t (-log p(y_t | x, y_<t)), over all trained tokens, for the form "masked" over those that are masked

    Evaluation reports all trained tokens in every form, each masked form with a mask at the place of each, which is how
    it answers: its loss is the negative log-likelihood of the answer as it would be generated. Generation without a
    cache makes the masked forms slow on long answers.

    Args:
        label_smoothing: probability mass spread evenly over the vocabulary, in [0, 1).
        form: where the target's tokens are predicted.
        rate: share of a target's tokens that the form "masked" masks.
        keep: share of the masks that are the token itself in training.
        random: share of the masks that are a random token in training.
    """

    form: Literal["causal", "masked", "pseudo-masked"] = "pseudo-masked"
    rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    keep: Share = 0.1
    random: Share = 0.1
    _model: Any = field(init=False, default=None, repr=False)
    _salt: str = field(init=False, default="", repr=False)
    _made: tuple[Packed, str, bool, Task] | None = field(init=False, default=None, repr=False)

    def check(self) -> Any:
        """Yield what is wrong with the shares."""
        if self.keep + self.random > 1:
            yield "random", f"expected keep and random to be at most 1 together, got {self.keep} and {self.random}"

    def equip(self, model: LanguageModel) -> None:
        """Take the model, whose tokenizer gives the mask.

        Args:
            model: the language model.

        Raises:
            ModelError: the tokenizer has neither a mask nor a token that no text is made of.
        """
        self._model = model
        if self.form != "causal":
            mask_id(model.tokenizer)

    def before_step(self, run: Any, trees: Sequence[Tree]) -> None:
        """Note the step, on which it depends what is masked.

        Args:
            run: the run in progress.
            trees: all trees of the step.
        """
        self._salt = f"{run.recipe.seed}:{run.step}"

    def count(self, batch: Packed) -> float:
        """Return the summed weights of the tokens that are predicted.

        Args:
            batch: B trees as a packed forest of T tokens.
        """
        return float(self._task(self._model, batch)[1].weights.sum())

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss over predicted tokens, and the weight of those that are likeliest as "token_accuracy".

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        run, predictions = self._task(model, batch)
        return next_token_loss(model, run, predictions, CrossEntropy(label_smoothing=self.label_smoothing))

    def generate(self, model: LanguageModel, prompts: Sequence[np.ndarray], **options: Any) -> list[list[Generation]]:
        """Answer prompts that are seen in both directions, at masks where the form has them.

        Args:
            model: the language model.
            prompts: token ids of each prompt.
            options: those of `hone.text.generate.generate`.
        """
        from hone.text.generate import generate

        if self.form == "causal":
            return generate(model, prompts, prefix=True, **options)
        return generate(model, prompts, decode=partial(decode_masked, mask=mask_id(model.tokenizer)), **options)

    def _task(self, model: LanguageModel | None, batch: Packed) -> Task:
        training = model is None or model.training
        if self._made is None or self._made[0] is not batch or self._made[1:3] != (self._salt, training):
            self._made = batch, self._salt, training, self._make(model, batch, training)
        return self._made[3]

    def _make(self, model: LanguageModel | None, batch: Packed, training: bool) -> Task:
        opened = as_prefixes(batch)
        if self.form == "causal" or model is None:
            return opened, trained(opened)
        if self.form == "masked" and training:
            chosen = masked_part(batch, self.rate, f"part:{self._salt}")
            tokens = batch.tokens.index_copy(0, chosen, self._masks(model, batch, training)[chosen])
            return replace(opened, tokens=tokens), Predictions(chosen, batch.tokens[chosen], batch.weights[chosen])
        chosen = batch.weights.nonzero().squeeze(1)
        copied, found = with_copies(opened, chosen, self._masks(model, batch, training)[chosen])
        return copied, Predictions(found, batch.tokens[chosen], batch.weights[chosen])

    def _masks(self, model: LanguageModel, batch: Packed, training: bool) -> Tensor:
        """Return what stands at the masks (T,): the mask, in training also the token itself or a random one."""
        masks = torch.full_like(batch.tokens, mask_id(model.tokenizer))
        if not training or not self.keep + self.random:
            return masks
        kind, which = uniform(batch, f"mask:{self._salt}", 2).unbind(1)
        drawn = (which * model.hf.config.get_text_config().vocab_size).long()
        others = torch.where(kind < self.keep, batch.tokens, drawn)
        return torch.where(kind < self.keep + self.random, others, masks)
