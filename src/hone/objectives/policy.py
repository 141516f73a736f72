"""Policy gradients over rollouts: what all of them share, and where they differ.

Five axes, each chosen on its own:

    advantage    what an answer's reward is compared with (`advantages.py`)
    ratio        policy over sampler, by token or as the geometric mean over an answer; or none
    clipping     where the ratio stops to count, below and above
    normaliser   mean over the tokens of the step, over answers of token means, or of sums over a fixed length
    KL           to the reference: estimator k1, k2 or k3, in the loss or taken off the reward

All answers to a prompt are one tree, so that the prompt is computed once for them, in sampling and in training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hone.data.groups import FOREIGN, HINT, LOGPROB
from hone.errors import HoneError
from hone.objectives.advantages import ADVANTAGE, Advantage, Combine, group_advantages
from hone.objectives.answers import Answers, answers_of
from hone.objectives.base import trained
from hone.objectives.reference import Referring, make_reference
from hone.text.pack import Tree, divide, pack
from hone.text.vocabulary import token_entropies, token_logprobs

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed

NotNegative = Annotated[float, Field(ge=0)]
Normaliser = Literal["tokens", "answers", "length"]
Estimator = Literal["k1", "k2", "k3"]
REFERENCE = "reference"  # per-token value: log-probability under the reference model


def kl_estimate(logprobs: Tensor, reference: Tensor, estimator: Estimator) -> Tensor:
    """Return an estimate of KL(policy, reference) for each token (N,), with d = log p_ref - log p.

    k1 = -d,   k2 = d^2 / 2,   k3 = exp(d) - 1 - d

    Args:
        logprobs: (N,) log p of tokens that the policy drew.
        reference: (N,) log p_ref of the same tokens.
        estimator: k1 is unbiased, k2 has an unbiased gradient, k3 is unbiased and never negative.
    """
    difference = reference - logprobs
    if estimator == "k1":
        return -difference
    return difference.square() / 2 if estimator == "k2" else difference.exp() - 1 - difference


def surrogate(logratio: Tensor, advantage: Tensor, low: float | None, high: float | None) -> tuple[Tensor, Tensor]:
    """Return the clipped surrogate -min(r A, clip(r, 1 - low, 1 + high) A) for each token, and whether it is clipped.

    Args:
        logratio: (N,) log r, policy over sampler.
        advantage: (N,) A.
        low: how far below 1 the ratio counts; None without bound.
        high: how far above.
    """
    ratio = logratio.exp()
    if low is None and high is None:
        return -ratio * advantage, torch.zeros_like(ratio, dtype=torch.bool)
    clipped = ratio.clamp(None if low is None else 1 - low, None if high is None else 1 + high)
    plain, bounded = ratio * advantage, clipped * advantage
    return -torch.minimum(plain, bounded), (bounded < plain).detach()


@dataclass(kw_only=True)
class Policy(Referring):
    """The base of objectives that make good answers of the model itself likelier and bad ones less likely.

    loss = sum over answers i and tokens t of  n_i [ -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl KL ]

    with r = pi(t) / pi_sampler(t). Reported: "ratio" (mean r), "clip_fraction", "kl" (to the sampler, k3), and
    "reference_kl" and "entropy" where they are computed; means over what the loss is a mean of.

    Args:
        advantage: "group": (R - mean) / std of the answers to a prompt; "centred": R - mean; "leave-one-out": R - mean
            of the others; "batch": (R - mean) / std over all answers of a phase; "raw": R.
        combine: of several rewards: take advantages of their "sum", or the mean of the "advantages" of each, for which
            rewards must be for whole answers; what the divergence takes off a reward comes off each of them.
        ratio: by "token", or the geometric mean over the "answer", whose tokens then share one ratio.
        clip_low: how far below 1 the ratio counts; None for no bound.
        clip_high: how far above 1 the ratio counts; None for no bound.
        normalise: the loss is a mean over the "tokens" of the step, over "answers" of the mean over their tokens, or
            over answers of sums over tokens divided by the longest answer's allowed "length".
        kl: strength of the divergence from the reference; 0 needs no reference.
        estimator: of that divergence: k1, k2 or k3.
        kl_in: "loss", or "reward", which takes it off what each token of the model's own that is trained on earns,
            without gradient.
        entropy: strength of a bonus for the entropy of the next token.
    """

    consumes: ClassVar[str] = "rollouts"
    advantage: Advantage = "group"
    combine: Combine = "sum"
    ratio: Literal["token", "answer"] = "token"
    clip_low: NotNegative | None = 0.2
    clip_high: NotNegative | None = 0.2
    normalise: Normaliser = "tokens"
    kl: NotNegative = 0.0
    estimator: Estimator = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    entropy: NotNegative = 0.0
    _temperature: float = field(init=False, default=1.0, repr=False)
    _longest: int = field(init=False, default=1, repr=False)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield an option that would do nothing."""
        if self.kl and self.kl_in == "loss" and self.estimator == "k1":
            yield (
                "estimator",
                "the gradient of k1 is 0 on average, so in the loss it regularises nothing; take k2 or k3",
            )

    def setup(self, run: Any) -> None:
        """Prepare the reference, where one is asked for.

        Args:
            run: the run in progress.

        Raises:
            HoneError: the run has no such reference, or samples at a temperature that it is not compared at.
        """
        if run.loader is None:  # evaluation, which computes no policy loss
            return
        source = run.loader.source
        self._temperature, self._longest = source.temperature, source.max_new_tokens
        if self.kl and self._temperature != 1:
            raise HoneError(
                f"objective.kl: the divergence is one between the models themselves, at temperature 1, and the data is "
                f"sampled at {self._temperature:g}; set data.temperature=1, or objective.kl=0"
            )
        if self.kl:
            self._reference = make_reference(run, self.reference, foreseen=False)

    def appraise(self, run: Any, trees: list[Tree]) -> list[Tree]:
        """Return a phase's groups with the advantage of each token, and the reference's log-probabilities.

        Args:
            run: the run in progress.
            trees: the groups.
        """
        trees = self.with_reference(run, trees)
        return group_advantages(trees, self.advantage, self.combine, self._penalties(trees))

    def with_reference(self, run: Any, trees: list[Tree]) -> list[Tree]:
        """Return a phase's groups with the reference's log-probabilities, where there is one.

        Args:
            run: the run in progress.
            trees: the groups.
        """
        return with_values(run, trees, REFERENCE, self._reference_logprobs) if self.kl else trees

    def _penalties(self, trees: Sequence[Tree]) -> list[list[np.ndarray]] | None:
        """Return what the divergence takes off each token's reward, per tree and segment; None where it does not."""
        if not self.kl or self.kl_in == "loss":
            return None
        return [[self._penalty(tree, segment) for segment in range(len(tree.tokens))] for tree in trees]

    def _penalty(self, tree: Tree, segment: int) -> np.ndarray:
        """Return what comes off the reward of each token of a segment (n,).

        An estimate needs tokens that the model drew, and the reference's view of them, which is had where they train.
        """
        found = np.zeros(len(tree.tokens[segment]))
        drawn = (tree.weights[segment] != 0) & (tree.fields[FOREIGN][segment] != 1)
        own, other = (torch.from_numpy(tree.values[name][segment][drawn]) for name in (LOGPROB, REFERENCE))
        found[drawn] = self.kl * kl_estimate(own, other, self.estimator).numpy()
        return found

    def _reference_logprobs(self, model: LanguageModel, batch: Packed) -> Tensor:
        """Return log p_ref (N,) of the trained tokens."""
        if self._reference is None:
            raise RuntimeError("the reference is made in setup")
        return self._reference.token_values(model, batch)

    def count(self, batch: Packed) -> float:
        """Return the number of trained tokens of answers, or of answers, by `normalise`.

        Args:
            batch: B groups as a packed forest of T tokens.
        """
        answers = answers_of(batch)
        mine = ~_hinted(batch, answers)
        return float(answers.tokens[mine].sum()) if self.normalise == "tokens" else float(mine.sum())

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over the batch's units, and what is reported, summed alike.

        Args:
            model: the language model that trains.
            batch: B groups as a packed forest of T tokens.
        """
        return self.policy_loss(self.look_at(model, batch))

    def look_at(self, model: LanguageModel, batch: Packed) -> View:
        """Return what the model makes of a batch, for losses to be built on.

        Args:
            model: the language model that trains.
            batch: B groups as a packed forest of T tokens.
        """
        answers = answers_of(batch)
        predictors, targets, _ = trained(batch)
        states = model.hidden(batch)[predictors]
        logprobs = token_logprobs(states, model.head, targets, temperature=self._temperature)
        chosen = batch.weights.nonzero().squeeze(1)
        values = {name: value[chosen].to(logprobs.dtype) for name, value in batch.values.items()}
        hinted = _hinted(batch, answers)[answers.token_answers]
        foreign = (_field(batch, answers, FOREIGN) == 1)[answers.token_answers]
        return View(model, batch, answers, states, logprobs, values, hinted, foreign, self._temperature)

    def policy_loss(self, view: View) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed surrogate with its penalties, and what is reported.

        Args:
            view: what the model makes of a batch.
        """
        mine = ~view.hinted
        drawn = mine & ~view.foreign  # by the model: what both kinds of divergence are estimates over
        weights = self.unit_weights(view, mine)
        shares = weights if self.normalise == "tokens" else mine / view.lengths
        old = view.values[LOGPROB]
        logratio = torch.where(mine, view.logprobs - old, 0.0)
        used = self._answer_ratio(logratio, view) if self.ratio == "answer" else logratio
        terms, clipped = surrogate(used, view.values[ADVANTAGE], self.clip_low, self.clip_high)
        total = (weights * terms).sum()
        with torch.no_grad():
            metrics = {
                "ratio": (shares * used.exp()).sum(), "clip_fraction": (shares * clipped).sum(),
                "kl": (shares * kl_estimate(view.logprobs, torch.where(drawn, old, view.logprobs), "k3")).sum(),
            }  # fmt: skip
        if self.kl:
            reference = torch.where(drawn, view.values[REFERENCE], view.logprobs)
            divergence = kl_estimate(view.logprobs, reference, self.estimator)
            if self.kl_in == "loss":
                total = total + self.kl * (weights * divergence).sum()
            metrics["reference_kl"] = (shares * divergence).sum().detach()
        if self.entropy:
            entropies = view.entropies()
            total = total - self.entropy * (weights * entropies).sum()
            metrics["entropy"] = (shares * entropies).sum().detach()
        return total, metrics

    def unit_weights(self, view: View, mine: Tensor) -> Tensor:
        """Return what each trained token (N,) weighs in the loss, 0 where it is no token of the model's own.

        Args:
            view: what the model makes of a batch.
            mine: (N,) which tokens the policy loss is over.
        """
        ones = mine.to(view.logprobs.dtype)
        if self.normalise == "tokens":
            return ones
        return ones / (view.lengths if self.normalise == "answers" else self._longest)

    def _answer_ratio(self, logratio: Tensor, view: View) -> Tensor:
        """Return log of the geometric mean of an answer's ratios, the same at each of its tokens.

        Its gradient reaches each token through the mean alone, as in GSPO.
        """
        return view.answers.sums(logratio)[view.answers.token_answers] / view.lengths


@dataclass(frozen=True, eq=False)
class View:
    """What a model makes of a batch of groups.

    Args:
        model: the language model.
        batch: the packed forest.
        answers: its answers, what was given of an answer among them.
        states: (N, D) last hidden states that predict the trained tokens.
        logprobs: (N,) log-probabilities of the trained tokens, at the temperature of sampling.
        values: (N,) per-token numbers by name.
        hinted: (N,) which tokens the model was given.
        foreign: (N,) which tokens the model did not write.
        temperature: of sampling.
    """

    model: LanguageModel
    batch: Packed
    answers: Answers
    states: Tensor
    logprobs: Tensor
    values: dict[str, Tensor]
    hinted: Tensor
    foreign: Tensor
    temperature: float

    @property
    def lengths(self) -> Tensor:
        """Number of trained tokens of the answer that each of them (N,) belongs to."""
        return self.answers.tokens.to(self.logprobs.dtype)[self.answers.token_answers]

    def entropies(self) -> Tensor:
        """Return the entropy of the distribution that each trained token (N,) was drawn from, in nats."""
        return token_entropies(self.states, self.model.head, temperature=self.temperature)

    def field(self, name: str) -> Tensor:
        """Return a number of each answer (A,).

        Args:
            name: of the per-segment field.
        """
        return _field(self.batch, self.answers, name)


def _field(batch: Packed, answers: Answers, name: str) -> Tensor:
    return batch.fields[name][answers.segments.to(batch.tokens.device)]


def _hinted(batch: Packed, answers: Answers) -> Tensor:
    """Return which of the answers (A,) are no answers but what the model was given of one."""
    return _field(batch, answers, HINT) == 1


def with_values(run: Any, trees: list[Tree], name: str, compute: Any) -> list[Tree]:
    """Return trees with a number for each trained token that a model computes, 0 elsewhere.

    Args:
        run: the run in progress.
        trees: any number of them.
        name: of the values.
        compute: called with (model, batch), returns (N,) per trained token.
    """
    limit = run.recipe.micro_tokens or run.recipe.batch_tokens
    found: dict[int, Tree] = {}
    for group in divide(trees, limit):
        batch = pack(group).to(run.cluster.device)
        with torch.no_grad(), run.cluster.autocast():
            computed = compute(run.model, batch)
        whole = np.zeros(len(batch))
        whole[batch.weights.cpu().numpy() != 0] = computed.cpu().double().numpy()
        parts = np.split(whole, batch.starts[1:-1].numpy())
        begin = 0
        for tree in group:
            own = tuple(parts[begin : begin + len(tree.tokens)])
            found[id(tree)] = replace(tree, values={**tree.values, name: own})
            begin += len(tree.tokens)
    return [found[id(tree)] for tree in trees]
