"""Value heads on language models: how an answer will end, learned at each of its tokens or steps, and a beam by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hone.errors import HoneError, ModelError
from hone.objectives.answers import answers_of, tree_field
from hone.objectives.base import Objective, trained
from hone.objectives.unpaired import verdicts
from hone.parts import part
from hone.text.vocabulary import token_logprobs

if TYPE_CHECKING:
    from hone.text.generate import Generation
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed
    from hone.text.values import ValueHead

Weight = Annotated[float, Field(ge=0)]
Many = Annotated[int, Field(ge=1)]
VALUE, LABEL = "value", "label"  # fields: the value after a step, NaN elsewhere; 1 for a right path, 0 for a wrong one


@dataclass(kw_only=True)
class Valued(Objective):
    """The base of objectives that train a value head: the head, and answers by a beam over steps that it guides.

    A beam of `width` states samples `expansions` steps for each, by the sampler of the recipe, and keeps the `width`
    most valuable; the most valuable answer is given. Where both are 1, answers are generated as by any model.

    Args:
        width: states of the beam that are kept after each step.
        expansions: steps that are sampled for each of them.
        separator: what ends a step; the end of an answer does, too.
    """

    squashed: ClassVar[bool] = False  # whether values are between -1 and 1
    width: Many = 1
    expansions: Many = 5
    separator: Annotated[str, Field(min_length=1)] = "\n"
    _ends: list[int] = field(init=False, default_factory=list, repr=False)

    def equip(self, model: LanguageModel) -> None:
        """Put the head beside the model.

        Args:
            model: the language model, as the run starts from it.
        """
        from hone.text.values import add_value_head

        add_value_head(model, squashed=self.squashed)

    def head(self, model: LanguageModel) -> ValueHead:
        """Return the value head, (n, D) -> (n,).

        Args:
            model: has it.
        """
        from hone.text.values import value_head

        found = value_head(model)
        if found is None:
            raise HoneError("the model has no value head; an objective puts it there by equip(model)")
        return found

    def generator(self, model: LanguageModel) -> LanguageModel:
        """Return the model that continues answers; here the one with the head.

        Args:
            model: the trained model.
        """
        return model

    def roll_out(self, model: LanguageModel, prompts: Sequence[np.ndarray], **options: Any) -> list[list[Generation]]:
        """Sample the answers that the values are learned from, without the beam: what is valued is how it goes on.

        Args:
            model: the trained model with its head.
            prompts: token ids of each prompt.
            options: those of `hone.text.generate.generate`.
        """
        from hone.text.generate import generate

        return generate(self.generator(model), prompts, **options)

    def generate(self, model: LanguageModel, prompts: Sequence[np.ndarray], **options: Any) -> list[list[Generation]]:
        """Answer prompts by the beam.

        Args:
            model: the trained model with its head.
            prompts: token ids of each prompt.
            options: those of `hone.text.generate.generate`; "prefix", "around" and "decode" are not used, and
                "samples" are the most valuable of the beam.

        Raises:
            HoneError: more samples are asked for than the beam is wide.
        """
        from hone.text.generate import generate
        from hone.text.search import beam_search
        from hone.text.steps import Steps, step_ends

        generator = self.generator(model)
        if self.width * self.expansions == 1:
            return generate(generator, prompts, **options)
        samples = options.get("samples", 1)
        if samples > self.width:
            raise HoneError(f"objective.width: a beam of {self.width} has no {samples} answers; set it to {samples}")
        self._ends = self._ends or step_ends(generator, self.separator)
        kept = {name: options[name] for name in ("max_new_tokens", "sampler", "seed") if name in options}
        steps = Steps(
            generator, prompts, self._ends, options.get("stop", ()), samples=self.expansions,
            judge=(model, self.head(model)), **kept,
        )  # fmt: skip
        beams = beam_search(steps, steps.roots(), self.width)
        # Equal answers are taken once, so that a beam may end narrower than it is.
        return [[beam[min(n, len(beam) - 1)].state.generation() for n in range(samples)] for beam in beams]


@part(
    "objective",
    "ovm",
    papers=[("Outcome-supervised Verifiers for Planning in Mathematical Reasoning", "arXiv:2311.09724")],
    claim="A value model that learns from the outcomes of whole answers alone guides the choice of steps, and a beam "
    "by it answers better than sampling and than choosing among whole answers.",
    deviations="The head has no gain, bias vector or dropout and starts from small random weights instead of the mean "
    "output embedding; its loss is a mean over tokens, where the authors' code divides sums by answers. The likelihood "
    "beside it is that of right answers alone, where their script takes all.",
)
@dataclass(kw_only=True)
class OVM(Valued):
    """Outcome-supervised value model: every token of a judged answer learns whether the answer is right.

    loss = sum_t w_t [(v_t - y)^2 - nll y log p_t],  v_t = w h_t + b, y = 1 for a right answer and 0 for a wrong one

    h_t has read token t, the end of the answer among them, so that v_t estimates the probability that what begins so
    ends well. Reported: "value_accuracy" (share of tokens whose value lies on the right side of 1/2) and "end_accuracy"
    (the same of the value at an answer's last token, each of its tokens counting).

    Args:
        width: states of the beam that are kept after each step.
        threshold: of ranked answers, those with a score above it are right.
        nll: weight of the negative log-likelihood of right answers beside it, for one model that generates and values.
        generate_with: folder or Hub name of the model that generates, e.g. "stage:0"; None takes the trained one.
    """

    consumes: ClassVar[str] = "judged"
    width: Many = 4
    threshold: float = 0.5
    nll: Weight = 0.0
    generate_with: str | None = None
    _generator: Any = field(init=False, default=None, repr=False)

    def generator(self, model: LanguageModel) -> LanguageModel:
        """Return the model that continues answers, loaded when it is first asked for.

        Args:
            model: the trained model.

        Raises:
            ModelError: the generator has another tokenizer.
        """
        from hone.text.model import LanguageModel

        if self.generate_with is None:
            return model
        if self._generator is None:
            self._generator = LanguageModel.load(self.generate_with, device=next(model.parameters()).device)
            if self._generator.tokenizer.get_vocab() != model.tokenizer.get_vocab():
                raise ModelError(
                    f"objective.generate_with: '{self.generate_with}' has another tokenizer than the model that values "
                    "its answers; name a model of the same family"
                )
        found: LanguageModel = self._generator
        return found

    def count(self, batch: Packed) -> float:
        """Return the summed weights of the answers' tokens.

        Args:
            batch: B trees as a packed forest of T tokens.
        """
        return float(self._weights(batch).sum())

    def _weights(self, batch: Packed) -> Tensor:
        """Return the weight of each trained token (N,), that of its sample included."""
        answers = answers_of(batch)
        own = tree_field(batch, "weight", answers.trees, 1.0)[answers.token_answers]
        return trained(batch).weights * own

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over the answers' tokens, and what is reported, summed alike.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        answers, weights = answers_of(batch), self._weights(batch)
        right = verdicts(batch, answers, self.threshold)
        states = model.hidden(batch)
        values = self.head(model)(states[batch.weights.nonzero().squeeze(1)])
        labels = right[answers.token_answers].to(values.dtype)
        losses = (values - labels).square()
        if self.nll:
            predictors, targets, _ = trained(batch)
            losses = losses - self.nll * labels * token_logprobs(states[predictors], model.head, targets)
        with torch.no_grad():
            last = torch.searchsorted(
                answers.token_answers, torch.arange(len(answers), device=values.device), right=True
            )
            at_end = ((values[last - 1] > 0.5) == right)[answers.token_answers]
            metrics = {
                "value_accuracy": (weights * ((values > 0.5) == (labels > 0.5))).sum(),
                "end_accuracy": (weights * at_end).sum(),
            }
        return (weights * losses).sum(), metrics


@part(
    "objective",
    "alphamath",
    papers=[("AlphaMath Almost Zero: process Supervision without process", "arXiv:2405.03553")],
    claim="Search trees over a model's own steps teach it and a value head together, without worked solutions; with "
    "the head, a beam over steps answers better than greedy decoding does.",
    deviations="The likelihood is a mean over a path's tokens and the value loss one over its steps, as the authors' "
    "code averages over batches, where the paper's equation has sums. Solutions have no calls of a code interpreter. "
    "In step-wise beam search finished answers stay in the beam, as in OVM; the authors' shrinks by each.",
)
@dataclass(kw_only=True)
class AlphaMath(Valued):
    """Learn the right paths of search trees, and beside them what each step of right and wrong paths is worth.

    loss = sum_paths [-y mean_t log p_t + beta mean_s (v_s - Q_s)^2],  v_s = tanh(w h_s + b)

    y is 1 for a right path and 0 for a wrong one (field "label"); h_s has read step s to its end, and Q_s is the value
    that the search has found there, between -1 and 1 (data source `searched`, make: paths). A path weighs what its
    sample's field "weight" says. Reported: "nll" of right paths (as a mean over all) and "value_error".

    Args:
        beta: weight of the value loss.
    """

    consumes: ClassVar[str] = "steps"
    squashed: ClassVar[bool] = True
    beta: Weight = 0.1

    def count(self, batch: Packed) -> float:
        """Return the summed weights of the batch's paths.

        Args:
            batch: B trees as a packed forest of T tokens.
        """
        return float(tree_field(batch, "weight", torch.arange(len(batch.where)), 1.0).sum())

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over the batch's paths, and what is reported, summed alike.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens, each a chain of steps behind a prompt.
        """
        trees, device = torch.arange(len(batch.where)), batch.tokens.device
        states = model.hidden(batch)
        steps = (~batch.fields[VALUE].cpu().isnan()).nonzero().squeeze(1)
        values = self.head(model)(states[(batch.starts[steps + 1] - 1).to(device)])
        errors = (values - batch.fields[VALUE][steps.to(device)].to(values.dtype)).square()
        error = _means(errors, torch.ones_like(errors), batch.trees[steps].to(device), len(trees))
        predictors, targets, weights = trained(batch)
        logprobs = token_logprobs(states[predictors], model.head, targets)
        owner = torch.arange(batch.segments).repeat_interleave(batch.starts.diff()).to(device)
        of_tree = batch.trees.to(device)[owner[batch.weights.nonzero().squeeze(1)]]
        nll = -tree_field(batch, LABEL, trees, 1.0) * _means(logprobs, weights, of_tree, len(trees))
        path = tree_field(batch, "weight", trees, 1.0)
        metrics = {"nll": (path * nll).sum().detach(), "value_error": (path * error).sum().detach()}
        return (path * (nll + self.beta * error)).sum(), metrics


def _means(values: Tensor, weights: Tensor, groups: Tensor, count: int) -> Tensor:
    """Return the weighted mean of values (N,) in each of some groups (count,), 0 in empty ones."""
    zeros = values.new_zeros(count)
    weights = weights.to(values.dtype)
    return zeros.index_add(0, groups, weights * values) / zeros.index_add(0, groups, weights).clamp(min=1e-9)
