"""Coconut: reasoning in continuous thoughts, which take the place of worked steps one after another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from hone.errors import DataError
from hone.objectives.base import Objective, trained
from hone.objectives.language import next_token_loss
from hone.objectives.reference import tree_keys
from hone.parts import part
from hone.text.latent import MARKERS, Insertion, Thinking, assemble, make_room, think, written
from hone.text.pack import pack
from hone.text.vocabulary import CrossEntropy

if TYPE_CHECKING:
    from hone.text.generate import Generation
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed, Tree

NAME = "coconut"  # of the markers among the model's extras


class Markers(nn.Embedding):
    """The two vectors around the thoughts, with the stage that they and the model beside them were trained to."""

    stage: Tensor

    def __init__(self, begun: Tensor, stage: int) -> None:
        """Begin with some vectors.

        Args:
            begun: (2, D) the vectors.
            stage: the present stage, a buffer so that it is saved and taken back together with the weights.
        """
        super().__init__(begun.shape[0], begun.shape[1], device=begun.device, dtype=begun.dtype)
        self.weight.data.copy_(begun)
        self.register_buffer("stage", torch.tensor(stage, device=begun.device))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.setdefault(f"{prefix}stage", self.stage)  # models were saved without one before
        super()._load_from_state_dict(state_dict, prefix, *rest)


@part(
    "objective",
    "coconut",
    papers=[("Training Large Language Models to Reason in a Continuous Latent Space", "arXiv:2412.06769")],
    claim="Thoughts in the hidden space, learned by replacing worked steps one after another, answer better than "
    "training without steps, with fewer tokens than written-out steps take.",
    deviations="Verified against the authors' code. The markers are two learned vectors beside the model, begun as the "
    "embedding of a line break, and not new words of the vocabulary. Stages go by optimizer steps, not epochs. "
    "Thoughts are always padded to their most (pad_latent_to_max), since a prompt does not tell its steps. "
    "Each thought recomputes the prompt before it; the authors keep its keys, which gives the same numbers.",
)
@dataclass(kw_only=True)
class Coconut(Objective):
    """Cross-entropy of what is left of an answer behind continuous thoughts.

    question <begin> h_1 ... h_n <end> rest: thought h_j is the last hidden state at the token before it, fed back as an
    input embedding, and gradients flow through all of them. In stage k the first k worked steps of the answer are
    replaced by n = k thoughts; after the last of these stages all steps are left out. Only the rest is trained.

    The model answers as it was trained: thoughts first, then text. Its stage is saved with it.

    Args:
        thoughts: continuous thoughts per replaced step (the paper's c).
        stages: most steps that are replaced by thoughts of their own; there are stages + 2 stages, the first of them
            with all steps written out and the last with none.
        steps_per_stage: optimizer steps of each stage but the last, which lasts to the end; None divides the run
            evenly.
        first: stage that training begins with; above 0 for a model that writes out steps already.
        separator: text that ends a worked step; what follows the last one is the answer, which always stays.
        uniform: share of the samples, drawn anew each step, whose stage is drawn evenly instead.
        reset_optimizer: forget the optimizer's state whenever a stage begins, as the paper does.
        ablate: what becomes of the thoughts when the model answers, to see what they are good for: kept ("none"),
            replaced by zeros ("zero") or left out ("drop").
    """

    thoughts: Annotated[int, Field(ge=1)] = 2
    stages: Annotated[int, Field(ge=1)] = 3
    steps_per_stage: Annotated[int, Field(ge=1)] | None = None
    first: Annotated[int, Field(ge=0)] = 0
    separator: Annotated[str, Field(min_length=1)] = "\n"
    uniform: Annotated[float, Field(ge=0, le=1)] = 0.0
    reset_optimizer: bool = True
    ablate: Literal["none", "zero", "drop"] = "none"
    _now: tuple[int, int] = field(default=(0, 0), init=False, repr=False)  # seed and step, which draws depend on
    _model: Any = field(default=None, init=False, repr=False)
    _stop: frozenset[int] = field(default=frozenset(), init=False, repr=False)
    _texts: dict[int, str] = field(default_factory=dict, init=False, repr=False)

    @property
    def stage(self) -> int:
        """The present stage of the model, from 0 to `stages` + 1."""
        return self.stages + 1 if self._model is None else int(_held(self._model).stage)

    def stage_at(self, step: int, total: int) -> int:
        """Return the stage of an optimizer step.

        Args:
            step: finished steps.
            total: steps of the whole run.
        """
        last = self.stages + 1
        each = self.steps_per_stage or max(1, total // max(1, last + 1 - self.first))
        return min(self.first + step // each, last)

    def equip(self, model: LanguageModel) -> None:
        """Put the markers beside the model.

        Args:
            model: the language model, as the run starts from it.
        """
        embed: Any = model.hf.get_input_embeddings()
        ids = model.tokenizer.encode("\n", add_special_tokens=False)[-1:]
        with torch.no_grad():
            begun = embed(torch.tensor(ids, device=embed.weight.device)).to(embed.weight.dtype).expand(MARKERS, -1)
        model.extras[NAME] = Markers(begun, self.stages + 1)
        self._model, self._stop = model, frozenset(model.renderer.stop_ids)

    def setup(self, run: Any) -> None:
        """Find the stage that the run is in.

        Args:
            run: the run in progress; one of no steps evaluates a finished model.
        """
        if total := getattr(run, "total", 0):
            _held(run.model).stage.fill_(self.stage_at(run.step, total))

    def before_step(self, run: Any, trees: Sequence[Tree]) -> None:
        """Go on to the stage of a step.

        Args:
            run: the run in progress.
            trees: all trees of the step.

        Raises:
            DataError: no answer has worked steps.
        """
        stage = self.stage_at(run.step, run.total)
        if self.reset_optimizer and run.step and stage != self.stage_at(run.step - 1, run.total):
            run.players["model"].optimizer.state.clear()
        _held(run.model).stage.fill_(stage)
        self._now = run.recipe.seed, run.step
        if run.step == 0 and not any(len(ends) for _, ends in self._worked(pack(trees)).values()):
            raise DataError(
                f"{trees[0].where}: expected worked steps before the last line of an answer, which thoughts replace, "
                f"found none in this or any other sample of the first step; set separator (now {self.separator!r}) to "
                "what ends a step"
            )

    def count(self, batch: Packed) -> float:
        """Return the summed weights of the tokens that are left.

        Args:
            batch: B trees as a packed forest of T tokens.
        """
        return float(self.arrange(batch).batch.weights.sum())

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed cross-entropy of what is left, and the weight of likeliest tokens as "token_accuracy".

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        thinking = self.arrange(batch)
        what = think(model, thinking, _markers(model))
        with written(model, thinking.batch, what):
            return next_token_loss(model, thinking.batch, trained(thinking.batch), CrossEntropy())

    def arrange(self, batch: Packed) -> Thinking:
        """Return a batch with room for thoughts, without the steps that these replace.

        A root thinks before its first trained token, or at its end where it has none, as the prompt of several answers.

        Args:
            batch: B trees as a packed forest of T tokens.
        """
        worked = self._worked(batch)
        drawn = self._drawn(batch) if self.uniform and self._model.training else {}
        present, changes = self.stage, {}
        for segment, (at, ends) in worked.items():
            stage = present
            if (tree := int(batch.trees[segment])) in drawn:
                stage = int(drawn[tree] * (len(ends) + 1))
            cut = len(ends) if stage > self.stages else min(stage, len(ends))
            changes[segment] = Insertion(at, min(stage, self.stages) * self.thoughts, ends[cut - 1] - at if cut else 0)
        return make_room(batch, changes)

    def _worked(self, batch: Packed) -> dict[int, tuple[int, list[int]]]:
        """Return, by root, where its answer begins and where each of its worked steps ends, counted from its start."""
        tokens, weights, starts = batch.tokens.cpu().numpy(), batch.weights.cpu().numpy(), batch.starts.tolist()
        found = {}
        for segment in (batch.parents < 0).nonzero().squeeze(1).tolist():
            own = slice(starts[segment], starts[segment + 1])
            marked = np.flatnonzero(weights[own])
            if not len(marked):
                found[segment] = own.stop - own.start, list[int]()
                continue
            at = int(marked[0])
            gaps = np.flatnonzero(np.diff(marked) > 1)  # an answer ends where the next turn begins
            found[segment] = at, self._ends(tokens[own][: int(marked[gaps[0] if len(gaps) else -1]) + 1], at)
        return found

    def _ends(self, tokens: np.ndarray, at: int) -> list[int]:
        """Return where the steps of an answer end, which begins at a place; its last line is no step."""
        last = len(tokens)
        while last > at and int(tokens[last - 1]) in self._stop:
            last -= 1
        tail, ends = "", list[int]()
        for place in range(at, last - 1):
            tail = (tail + self._text(int(tokens[place])))[-len(self.separator) :]
            if tail == self.separator:
                ends.append(place + 1)
                tail = ""
        return ends

    def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._model.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return self._texts[token]

    def _drawn(self, batch: Packed) -> dict[int, float]:
        """Return, by tree, a number in [0, 1) for those whose stage is drawn: a function of sample, seed and step."""
        drawn = {}
        for tree, key in enumerate(tree_keys(batch)):
            digest = hashlib.blake2b(key + repr(self._now).encode(), digest_size=16).digest()
            chance, place = (int.from_bytes(half, "big") / 2**64 for half in (digest[:8], digest[8:]))
            if chance < self.uniform:
                drawn[tree] = place
        return drawn

    def generate(self, model: LanguageModel, prompts: Sequence[np.ndarray], **options: Any) -> list[list[Generation]]:
        """Answer prompts behind as many thoughts as the present stage has.

        Args:
            model: the language model.
            prompts: token ids of each prompt.
            options: those of `hone.text.generate.generate`.
        """
        from hone.text.generate import generate

        count = 0 if self.ablate == "drop" else min(self.stage, self.stages) * self.thoughts
        longer = [np.append(prompt, np.repeat(prompt[-1:], count + MARKERS)) for prompt in prompts]
        return generate(model, longer, around=partial(self._thinking, model, count), **options)

    @contextmanager
    def _thinking(self, model: LanguageModel, count: int, prompts: Packed) -> Iterator[None]:
        """Let prompts that end with room for thoughts run with them."""
        ends = prompts.starts[1:].to(prompts.tokens.device)
        thinking = Thinking(prompts, ends - count - MARKERS, torch.full((len(ends),), count))
        markers = _markers(model)
        if self.ablate == "zero":
            nothing = markers.new_zeros(len(ends), markers.shape[1])
            what = assemble(thinking, markers, [nothing] * count)
        else:
            what = think(model, thinking, markers)
        with written(model, prompts, what):
            yield


def _markers(model: LanguageModel) -> Tensor:
    """Return the embeddings (2, D) of the markers."""
    return _held(model).weight


def _held(model: LanguageModel) -> Markers:
    held: Any = model.extras[NAME]
    found: Markers = held
    return found
