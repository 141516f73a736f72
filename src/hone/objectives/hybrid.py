"""Learning from demonstrations and from the model's own answers at once: hints, entropy weights, adaptive turns.

What the model did not write stands in a group as well: the hint that it was given, and the data's own answer
(`hints` and `demonstrations` of the source `rollouts`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hone.data.groups import FOREIGN, HINT, REWARD
from hone.errors import DataError, HoneError
from hone.objectives.advantages import ADVANTAGE, rewards_of
from hone.objectives.policy import Normaliser, NotNegative, Policy, View, surrogate
from hone.parts import part
from hone.text.pack import Tree, some_segments

if TYPE_CHECKING:
    pass


@dataclass(kw_only=True)
class Hybrid(Policy):
    """The base of objectives that learn from tokens of others, too, whose losses are means over those tokens."""

    _scale: float = field(init=False, default=1.0, repr=False)  # units of a step for each of its foreign tokens

    def setup(self, run: Any) -> None:
        """Prepare the reference, where one is asked for, after a look at the source.

        Args:
            run: the run in progress.
        """
        if run.loader is not None:
            self.require(run.loader.source)
        super().setup(run)

    def require(self, source: Any) -> None:
        """Refuse a source that does not give what the objective learns from.

        Args:
            source: the rollouts.
        """
        raise NotImplementedError

    def before_step(self, run: Any, trees: Sequence[Tree]) -> None:
        """Find how many of a step's tokens are not the model's own, over which their loss is a mean.

        Args:
            run: the run in progress.
            trees: all trees of the step.
        """
        tokens, units = 0, 0.0
        for tree in trees:
            for size, weight, foreign, hint in zip(
                map(len, tree.tokens), tree.weights, tree.fields[FOREIGN], tree.fields[HINT], strict=True
            ):
                trains = bool(weight.any())
                tokens += size if foreign == 1 else 0
                units += (size if self.normalise == "tokens" else 1) if trains and hint != 1 else 0
        self._scale = units / tokens if tokens and units else 1.0

    def imitation(self, view: View, weights: Tensor | float = 1.0) -> Tensor:
        """Return the negative log-likelihood of the tokens of others, so summed that the step's mean is over them.

        Args:
            view: what the model makes of a batch.
            weights: a factor for each token (N,), or one for all.
        """
        return -self._scale * (weights * view.foreign.to(view.logprobs.dtype) * view.logprobs).sum()


@part(
    "objective",
    "uft",
    papers=[("UFT: Unifying Supervised and Reinforcement Fine-Tuning", "arXiv:2505.16984")],
    claim="Training from a hint that is drawn ever shorter, with the likelihood of the hint beside the reward, beats "
    "both supervised and reinforcement fine-tuning, most where the reward is rare.",
    deviations="Checked against the authors' code: the share of the hint falls along a cosine, the number of its "
    "parts is binomial, its mean negative log-likelihood is added. They cut the solution into at most five parts, "
    "here its lines are the parts. The policy objective is GRPO's, theirs PPO's or GRPO's.",
)
@dataclass(kw_only=True)
class UFT(Hybrid):
    """Policy gradient behind a hint, and the likelihood of the hint.

    loss = policy loss of what follows the hint + hint_weight * mean over hint tokens of -log pi

    Needs `hints: binomial` in the source `rollouts`.

    Args:
        hint_weight: weight of the hint's negative log-likelihood.
    """

    hint_weight: NotNegative = 0.001

    def require(self, source: Any) -> None:
        """Refuse a source without hints.

        Args:
            source: the rollouts.

        Raises:
            HoneError: it has none.
        """
        if source.hints == "none":
            raise HoneError("data.hints: objective 'uft' learns behind hints; set it to binomial, or take grpo")

    def policy_loss(self, view: View) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss, and what is reported.

        Args:
            view: what the model makes of a batch.
        """
        total, metrics = super().policy_loss(view)
        hint = self.imitation(view)
        return total + self.hint_weight * hint, {**metrics, "imitation": hint.detach()}


@part(
    "objective",
    "srft",
    papers=[
        (
            "SRFT: A Single-Stage Method with Supervised and Reinforcement Fine-Tuning for Reasoning",
            "arXiv:2506.19767",
        )
    ],
    claim="Supervised and reinforcement fine-tuning in one stage, weighed by entropy, beat one after the other and "
    "reinforcement alone.",
    deviations="The authors' code was not found; the four terms are those that summaries of the paper give. They "
    "differ in the sign of the entropy in the weight of right answers: exp(H) is taken, since the weight is said to "
    "rise with the entropy. The entropy is the mean over an answer's tokens, so that no cut into micro-batches "
    "matters.",
)
@dataclass(kw_only=True)
class SRFT(Hybrid):
    """Four terms in one stage, with H the policy's mean entropy over an answer, not differentiated.

    loss = demo_weight exp(-H) [-log pi(demo)] + clipped surrogate of the demo, whose sampler is said to be sure of it
           + own_weight exp(H) [-log pi(y)] of right answers + log pi(y) of wrong ones

    Needs `demonstrations: 1` in the source `rollouts`.

    Args:
        demo_weight: of the likelihood of demonstrations.
        own_weight: of the likelihood of the model's own right answers.
        solved: an answer is right when it is worth at least this.
    """

    demo_weight: NotNegative = 0.5
    own_weight: NotNegative = 0.1
    solved: float = 1.0

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield the options of policy objectives that its four terms have no place for."""
        if self.kl and self.kl_in == "loss":
            yield "kl", "the loss has no divergence from a reference; set kl_in: reward, or leave it at 0"
        if self.entropy:
            yield "entropy", "the loss has no bonus for the entropy, which enters the weights of its terms instead"
        if self.ratio != "token":
            yield "ratio", "the ratio is that of each token of a demonstration, so there is nothing to choose"

    def require(self, source: Any) -> None:
        """Refuse a source without demonstrations.

        Args:
            source: the rollouts.

        Raises:
            HoneError: it has none.
        """
        if not source.demonstrations:
            raise HoneError("data.demonstrations: objective 'srft' learns from one for each prompt; set it to 1")

    def policy_loss(self, view: View) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss, and what is reported.

        Args:
            view: what the model makes of a batch.
        """
        owner = view.answers.token_answers
        weights = self.unit_weights(view, ~view.hinted)
        with torch.no_grad():
            entropies = view.entropies()
            mean = view.answers.sums(entropies)[owner] / view.lengths
            right = (view.field(REWARD) >= self.solved)[owner]
        signs = torch.where(right, -self.own_weight * mean.exp(), 1.0)
        own = (weights * torch.where(view.foreign, 0.0, signs * view.logprobs)).sum()
        terms, clipped = surrogate(view.logprobs, view.values[ADVANTAGE], self.clip_low, self.clip_high)
        demonstrated = (weights * torch.where(view.foreign, terms, 0.0)).sum()
        imitation = self.demo_weight * self.imitation(view, (-mean).exp())
        return own + demonstrated + imitation, {
            "imitation": imitation.detach(), "entropy": (weights * entropies).sum(),
            "clip_fraction": (weights * (clipped & view.foreign)).sum(),
        }  # fmt: skip


@part(
    "objective",
    "sasr",
    papers=[
        (
            "Step-wise Adaptive Integration of Supervised Fine-tuning and Reinforcement Learning for Task-Specific "
            "LLMs",
            "arXiv:2505.13026",
        )
    ],
    claim="Choosing at each step between supervised fine-tuning and GRPO, by how far the model still is from the data, "
    "beats each of them and fixed mixtures.",
    deviations="The paper's text and code were not at hand: the probability of a supervised step is g / (g + gamma "
    "g_0), with g the gradient norm of the latest supervised step and g_0 the mean over the warm-up, from a summary.",
)
@dataclass(kw_only=True)
class SASR(Hybrid):
    """Supervised steps and GRPO steps in turns that are drawn.

    p(supervised) = g / (g + gamma g_0), g the norm of the latest supervised gradient, g_0 its mean in the warm-up

    A supervised phase samples nothing. Needs `demonstrations: 1` in the source `rollouts`, and one update a phase.

    Args:
        normalise: what the loss is a mean over: "tokens", "answers" or "length".
        warmup: supervised steps at first.
        gamma: the larger, the sooner the model learns from its own answers.
    """

    normalise: Normaliser = "answers"
    warmup: Annotated[int, Field(ge=1)] = 10
    gamma: Annotated[float, Field(gt=0)] = 1.0
    _first: list[float] = field(init=False, default_factory=list, repr=False)
    _latest: float = field(init=False, default=0.0, repr=False)
    _supervised: bool = field(init=False, default=True, repr=False)

    def require(self, source: Any) -> None:
        """Refuse phases of several steps, which could hold both kinds of answers.

        Args:
            source: the rollouts.

        Raises:
            HoneError: a phase is several steps, or earlier groups are replayed beside it.
        """
        for name, most in (("replay", 0), ("updates", 1), ("passes", 1)):
            if (given := getattr(source, name)) > most:
                raise HoneError(
                    f"data.{name}: objective 'sasr' makes one step of each phase, either a supervised one or one of "
                    f"the model's own answers; set it to {most}, got {given:g}"
                )

    def spares_rollouts(self, run: Any) -> bool:
        """Return whether the coming phase is a supervised one.

        Args:
            run: the run in progress.
        """
        if len(self._first) < self.warmup:
            return True
        base = float(np.mean(self._first))
        chance = self._latest / (self._latest + self.gamma * base)
        return bool(np.random.default_rng([run.recipe.seed, run.step, 4]).random() < chance)

    def appraise(self, run: Any, trees: list[Tree]) -> list[Tree]:
        """Return groups of the model's own answers with advantages, or demonstrations as they are.

        Args:
            run: the run in progress.
            trees: the groups.

        Raises:
            DataError: there are no demonstrations.
        """
        own = [_parted(tree, foreign=False) for tree in trees]
        if all(own):
            return super().appraise(run, [tree for tree in own if tree is not None])
        shown = [made for tree in trees if (made := _parted(tree, foreign=True)) is not None]
        if not shown:
            raise DataError("objective 'sasr' learns from the data's own answers, too; set data.demonstrations=1")
        return [
            replace(tree, values={**tree.values, ADVANTAGE: tuple(np.zeros(len(t)) for t in tree.tokens)})
            for tree in shown
        ]

    def before_step(self, run: Any, trees: Sequence[Tree]) -> None:
        """Tell a supervised step from one of the model's own answers.

        Args:
            run: the run in progress.
            trees: all trees of the step.
        """
        super().before_step(run, trees)
        self._supervised = all(map(_demonstrates, trees))

    def after_step(self, run: Any, row: dict[str, Any]) -> None:
        """Note how large a supervised gradient was.

        Args:
            run: the run in progress.
            row: the step's metrics.
        """
        row["supervised"] = float(self._supervised)
        if self._supervised:
            self._latest = float(row["grad_norm"])
            if len(self._first) < self.warmup:
                self._first.append(self._latest)

    def state_dict(self) -> dict[str, Any]:
        """Return the norms of supervised gradients."""
        return {"first": list(self._first), "latest": self._latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the norms of supervised gradients.

        Args:
            state: as `state_dict` returned it.
        """
        self._first, self._latest = list(state["first"]), state["latest"]

    def policy_loss(self, view: View) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed loss of a supervised step or of one of the model's own answers.

        Args:
            view: what the model makes of a batch.
        """
        if self._supervised and bool(view.foreign.any()):
            total = self.imitation(view)
            return total, {"imitation": total.detach()}
        return super().policy_loss(view)


def _parted(tree: Tree, *, foreign: bool) -> Tree | None:
    """Return a group with the answers of others alone, or with the model's own alone; None where there are none.

    Args:
        tree: a prompt with its answers.
        foreign: which.
    """
    answers = rewards_of(tree)[0]
    kept = [s for s in range(len(tree.tokens)) if s not in answers or (tree.fields[FOREIGN][s] == 1) == foreign]
    if not any(s in answers for s in kept):
        return None
    return some_segments(tree, kept)


def _demonstrates(tree: Tree) -> bool:
    """Return whether a group has an answer of others; what the model was given of one is none."""
    return any(f == 1 and h != 1 for f, h in zip(tree.fields[FOREIGN], tree.fields[HINT], strict=True))
