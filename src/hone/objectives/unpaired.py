"""Losses over single answers, each said to be good or bad: no prompt needs two of them.

    r = beta [log pi(y|x) - log pi_ref(y|x)]        good: -log s(r - delta), bad: -log s(delta - r), or s itself

What the methods differ in is the point that rewards are measured from: KTO estimates a divergence with answers that
belong to other prompts, BCO keeps a running mean of the rewards. Both are found for a whole step before its first
micro-batch, without gradient, and evaluation takes the point of the latest step: 0 before the first one, and in
`hone eval`, which knows no step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hone.errors import DataError
from hone.objectives.answers import Answers, answers_of, token_values, tree_field
from hone.objectives.preference import Positive
from hone.objectives.reference import Referring, at_rest, make_reference
from hone.parts import part
from hone.text.pack import CHOSEN, SCORE, Tree

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed

LABEL = "label"  # per-sample field: 1 for a good answer, 0 for a bad one
NonNegative = Annotated[float, Field(ge=0)]


def verdicts(batch: Packed, answers: Answers, threshold: float) -> Tensor:
    """Return which of the answers (A,) are good: those marked "chosen" or 1, or scored above a threshold.

    Args:
        batch: packed forest with the field "chosen", "score" or "label".
        answers: its answers.
        threshold: a ranked answer is good when its score lies above it.

    Raises:
        DataError: nothing says whether an answer is good.
    """
    found = torch.full((len(answers),), float("nan"))
    for name, least in ((CHOSEN, 0.5), (SCORE, threshold), (LABEL, 0.5)):
        if name in batch.fields:
            marks = batch.fields[name].cpu()[answers.segments]
            good = (marks > least).to(found.dtype)
            found = torch.where(found.isnan() & ~marks.isnan(), good, found)
    if found.isnan().any():
        lacking = int(answers.trees[found.isnan()][0])
        raise DataError(
            f"{batch.where[lacking]}: expected an answer that is said to be good or bad: one of a pair, one of a list "
            "with scores, or a number 1 or 0 in a column called 'label', or in another one named by "
            "columns: {label: COLUMN}"
        )
    return (found > 0.5).to(batch.tokens.device)


def parts_of(tree: Tree) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """Return the prompt of a tree, (n,) token ids, and its answers as (token ids, weights).

    Args:
        tree: an answer behind its prompt in one segment, or a prompt with its answers as children.
    """

    def first(weights: np.ndarray) -> int:
        return max(1, int(np.argmax(weights != 0)) if weights.any() else len(weights))

    answers = []
    for tokens, weights, parent in zip(tree.tokens, tree.weights, tree.parents, strict=True):
        begin = first(weights) if parent < 0 else 0
        if weights[begin:].any():
            answers.append((tokens[begin:], weights[begin:]))
    return tree.tokens[0][: first(tree.weights[0])], answers


def mismatched(trees: Sequence[Tree], longest: int | None = None) -> list[Tree]:
    """Return trees in which every prompt has the answers of the prompt before it, the first one those of the last.

    Args:
        trees: the trees of a step.
        longest: most tokens of prompt and answer together, beyond which an answer is cut off; None for no bound.
    """
    parts = [parts_of(tree) for tree in trees]
    made = []
    for number, (tree, (prompt, _)) in enumerate(zip(trees, parts, strict=True)):
        room = None if longest is None else max(0, longest - len(prompt))
        others = [(tokens[:room], weights[:room]) for tokens, weights in parts[number - 1][1]]
        others = [(tokens, weights) for tokens, weights in others if weights.any()]
        if others:
            tokens, weights = zip(*others, strict=True)
            nothing = np.zeros(len(prompt), np.float32)
            made.append(Tree((prompt, *tokens), (nothing, *weights), (-1, *(0 for _ in others)), where=tree.where))
    return made


@dataclass(kw_only=True)
class Judged(Referring):
    """The base of losses over single answers; a subclass gives `answer_loss`.

    The unit is the answer; an answer weighs what its sample's field "weight" says, 1 where there is none. Reported
    beside the loss: "answer_accuracy" (share of answers whose reward lies on the right side of the point), "point"
    (where that is, as a reward), and of prompts with good and bad answers "pair_accuracy", "margin", "better" and
    "worse" as for pairs, means over their answers.

    Args:
        beta: strength of the pull towards the reference; the reward of an answer is beta times its log-ratio.
        threshold: of ranked answers, those with a score above it are good.
    """

    consumes: ClassVar[str] = "judged"
    beta: Positive = 0.1
    threshold: float = 0.5

    def answer_loss(self, reward: Tensor, good: Tensor) -> Tensor:
        """Return the loss of each answer (A,).

        Args:
            reward: (A,) beta times the log-ratio to the reference.
            good: (A,) whether it is a good answer.

        Raises:
            NotImplementedError: the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define answer_loss(reward, good)")

    def shift(self) -> float:
        """Return the point that rewards are measured from, as a reward; here 0."""
        return 0.0

    def count(self, batch: Packed) -> float:
        """Return the summed weights of the batch's answers.

        Args:
            batch: B trees as a packed forest of T tokens.
        """
        return float(tree_field(batch, "weight", answers_of(batch).trees, 1.0).sum())

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over the batch's answers, and what is reported, summed alike.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        answers = answers_of(batch)
        good = verdicts(batch, answers, self.threshold)
        reference = self.reference_values(model, batch)
        values = token_values(model, batch)
        logprobs = answers.sums(values)
        reward = self.beta * (logprobs - answers.sums(reference.to(values.dtype)))
        weights = tree_field(batch, "weight", answers.trees, 1.0)
        total = (weights * self.answer_loss(reward, good)).sum()
        with torch.no_grad():
            right = (reward > self.shift()) == good
            metrics = {"answer_accuracy": (weights * right).sum(), "point": self.shift() * weights.sum()}
            metrics |= compared(answers, good, reward.detach(), logprobs.detach() / answers.tokens, weights)
        return total, metrics

    def _logratios(self, run: Any, trees: Sequence[Tree]) -> tuple[float, float]:
        """Return the sum of the log-ratios of all answers of some trees over all processes, and their number."""
        from hone.engine.loop import divide_among

        cluster, model = run.cluster, run.model
        total = number = 0.0
        for share in divide_among(trees, run.recipe.micro_tokens or run.recipe.batch_tokens, cluster):
            with torch.no_grad(), at_rest(model), cluster.autocast():
                reference = self.reference_values(model, share.batch)
                values = token_values(model, share.batch)
            total += share.counts * float((values.cpu().double() - reference.cpu().double()).sum())
            number += share.counts * len(answers_of(share.batch))
        return cluster.sum(total), cluster.sum(number)


def compared(answers: Answers, good: Tensor, reward: Tensor, mean: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return what is reported of the prompts that have good and bad answers, each answer counting as its prompt does.

    Args:
        answers: the A answers of a batch.
        good: (A,) which are good.
        reward: (A,) their rewards.
        mean: (A,) mean log-probability of their tokens.
        weights: (A,) their weights.
    """
    trees = answers.trees.to(reward.device)
    same = (trees[:, None] == trees[None]).to(reward.dtype)  # (A, A)
    first, second = same * good[None], same * ~good[None]
    both = (first.sum(1) > 0) & (second.sum(1) > 0)
    if not both.any():
        return {}
    better, worse = ((one @ mean) / one.sum(1).clamp(min=1) for one in (first, second))
    gap = (first @ reward) / first.sum(1).clamp(min=1) - (second @ reward) / second.sum(1).clamp(min=1)
    won = ((reward[:, None] > reward[None]) & good[:, None] & ~good[None]).to(reward.dtype)  # (A, A): good one over bad
    pairs = (first.sum(1) * second.sum(1)).clamp(min=1)
    share = torch.einsum("ab,bc,ac->a", same, won, same) / pairs
    figures = {"pair_accuracy": share, "margin": gap, "better": better, "worse": worse}
    return {name: (weights * both * value).sum() for name, value in figures.items()}


def kto_loss(reward: Tensor, good: Tensor, point: float, desirable: float, undesirable: float) -> Tensor:
    """Return w_good [1 - s(r - z)] of good answers and w_bad [1 - s(z - r)] of bad ones, (A,).

    Args:
        reward: r (A,).
        good: (A,) which answers are good.
        point: z, the reference point as a reward.
        desirable: w_good.
        undesirable: w_bad.
    """
    gain = torch.where(good, reward - point, point - reward)
    return torch.where(good, desirable, undesirable).to(gain.dtype) * torch.sigmoid(-gain)


@part(
    "objective",
    "kto",
    papers=[
        ("KTO: Model Alignment as Prospect Theoretic Optimization", "arXiv:2402.01306"),
        (
            "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification in Alignment",
            "arXiv:2408.06266",
        ),
    ],
    claim="Single answers that are said to be good or bad align a model as well as pairs do, though they say less.",
    deviations="The reference point is estimated once for all answers of an optimizer step, with the answers of the "
    "prompt before each; TRL estimates it for each micro-batch. The second paper is the source of point: zero, its "
    "loss for answers without pairs as TRL has it.",
)
@dataclass(kw_only=True)
class KTO(Judged):
    """Kahneman-Tversky optimisation.

    good: desirable [1 - s(r - beta z)];  bad: undesirable [1 - s(beta z - r)];  r = beta log(pi / pi_ref)

    z = max(0, mean of log(pi / pi_ref) over prompts with the answers of other prompts), without gradient: an estimate
    of KL(pi || pi_ref). It costs a pass of the model and of the reference over the step. Where a step has one prompt,
    z stays as it is.

    Args:
        desirable: weight of good answers; the paper wants desirable times their number at 1 to 4/3 of the same for
            bad ones.
        undesirable: weight of bad answers.
        point: "kl" for the estimate above, "zero" for APO-zero without pairs.
        reference: where its values come from: "adapter" or "copy", with point: zero also "cached"; "auto" takes what
            costs least.
    """

    desirable: NonNegative = 1.0
    undesirable: NonNegative = 1.0
    point: Literal["kl", "zero"] = "kl"
    divergence: float = field(init=False, default=0.0, repr=False)  # z, in nats

    def setup(self, run: Any) -> None:
        """Prepare the reference.

        Args:
            run: the run in progress.

        Raises:
            HoneError: the run has no such reference.
        """
        self._reference = make_reference(run, self.reference, foreseen=self.point == "zero")

    def before_step(self, run: Any, trees: Sequence[Tree]) -> None:
        """Estimate the reference point of a step.

        Args:
            run: the run in progress.
            trees: all trees of the step.
        """
        others = mismatched(trees, run.model.context) if self.point == "kl" and len(trees) > 1 else []
        if others:
            total, number = self._logratios(run, others)
            self.divergence = max(0.0, total / number)

    def shift(self) -> float:
        """Return beta z."""
        return self.beta * self.divergence

    def answer_loss(self, reward: Tensor, good: Tensor) -> Tensor:
        """Return the loss of each answer (A,).

        Args:
            reward: (A,) beta times the log-ratio to the reference.
            good: (A,) whether it is a good answer.
        """
        return kto_loss(reward, good, self.shift(), self.desirable, self.undesirable)

    def state_dict(self) -> dict[str, Any]:
        """Return the reference point."""
        return {"divergence": self.divergence}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a reference point.

        Args:
            state: as `state_dict` returned it.
        """
        self.divergence = state["divergence"]


def bco_loss(reward: Tensor, good: Tensor, shift: float) -> Tensor:
    """Return -log s(r - delta) of good answers and -log s(delta - r) of bad ones, (A,).

    Args:
        reward: r (A,).
        good: (A,) which answers are good.
        shift: delta.
    """
    return -F.logsigmoid(torch.where(good, reward - shift, shift - reward))


@part(
    "objective",
    "bco",
    papers=[("Binary Classifier Optimization for Large Language Model Alignment", "arXiv:2404.04656")],
    claim="A classifier of good and bad answers bounds DPO's loss once its rewards are shifted, so that single answers "
    "teach as pairs do.",
    deviations="Without the weights that match the distributions of good and bad prompts, which need a classifier of "
    "embeddings from another model. Verified against TRL's trainer.",
)
@dataclass(kw_only=True)
class BCO(Judged):
    """Binary classifier optimisation.

    good: -log s(r - delta);  bad: -log s(delta - r);  r = beta log(pi / pi_ref)

    delta is the mean of the rewards of all answers of all steps up to this one, without gradient; those of the latest
    step cost a pass of the model before it.
    """

    mean: float = field(init=False, default=0.0, repr=False)
    seen: float = field(init=False, default=0.0, repr=False)
    _with_step: tuple[float, float] | None = field(init=False, default=None, repr=False)  # with a step in progress

    def before_step(self, run: Any, trees: Sequence[Tree]) -> None:
        """Take the running mean of the rewards further.

        Args:
            run: the run in progress.
            trees: all trees of the step.
        """
        total, number = self._logratios(run, trees)
        seen = self.seen + number
        self._with_step = self.mean + (self.beta * total - number * self.mean) / seen, seen

    def after_step(self, run: Any, row: dict[str, Any]) -> None:
        """Keep the running mean: a step that breaks off leaves it as it was, and is taken again.

        Args:
            run: the run in progress.
            row: metrics of the step.
        """
        super().after_step(run, row)
        assert self._with_step is not None
        (self.mean, self.seen), self._with_step = self._with_step, None

    def shift(self) -> float:
        """Return delta."""
        return self.mean if self._with_step is None else self._with_step[0]

    def answer_loss(self, reward: Tensor, good: Tensor) -> Tensor:
        """Return the loss of each answer (A,).

        Args:
            reward: (A,) beta times the log-ratio to the reference.
            good: (A,) whether it is a good answer.
        """
        return bco_loss(reward, good, self.shift())

    def state_dict(self) -> dict[str, Any]:
        """Return the running mean, and over how many answers it goes."""
        return {"mean": self.mean, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a running mean.

        Args:
            state: as `state_dict` returned it.
        """
        self.mean, self.seen = state["mean"], state["seen"]
