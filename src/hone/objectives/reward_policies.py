"""Reward tuning without gradients of the reward: a sampling chain is a policy, each step of it a Gaussian action.

    mean of step i: a_i D(x_i, s_i) + b_i x_i, standard deviation c_i (`hone.diffusion.chains`)

A training step draws chains for all of its arrays, judges where they end, and then moves the weights `updates` times on
them. The last action of a chain has no noise of its own, so that a little is added (`explore`), which the reward sees.
"""

from __future__ import annotations

import copy
import itertools
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from hone.diffusion.chains import Link, consistency_chain, follow, log_densities, means
from hone.objectives.arrays import Positive, Share
from hone.objectives.base import Turn
from hone.objectives.reward_tuning import Count, RewardTuning, Steps, stream
from hone.parts import part

TINY = 1e-6


@dataclass(frozen=True, eq=False)
class Rollouts:
    """The chains of a training step: C for each of N arrays.

    Args:
        links: n steps.
        states: (n + 1, N, C, *shape) along the chains.
        rewards: (N, C) where they end.
        logs: (n, N, C) log-density of each action when it was drawn, without constants.
    """

    links: list[Link]
    states: Tensor
    rewards: Tensor
    logs: Tensor


class Worths:
    """The latest rewards of each class, which say what a reward of that class is compared with."""

    def __init__(self, most: int, least: int) -> None:
        """Begin empty.

        Args:
            most: rewards of each class that are kept.
            least: a class with fewer is compared with all rewards of the step.
        """
        self.most, self.least = most, least
        self.kept: dict[int, deque[float]] = {}

    def advantages(self, rewards: Tensor, labels: Tensor) -> Tensor:
        """Return (reward - mean) / standard deviation of each (N,), and keep the rewards.

        Args:
            rewards: (N,).
            labels: (N,) classes, -1 for none.
        """
        found = torch.empty_like(rewards)
        for label in labels.unique().tolist():
            mine = labels == label
            kept = self.kept.setdefault(label, deque(maxlen=self.most))
            kept.extend(rewards[mine].tolist())
            known = rewards if len(kept) < self.least else torch.tensor(list(kept)).to(rewards)
            found[mine] = (rewards[mine] - known.mean()) / (known.std(correction=0) + TINY)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the rewards of each class."""
        return {"classes": list(self.kept), "kept": [list(values) for values in self.kept.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over rewards.

        Args:
            state: as `state_dict` returned it.
        """
        pairs = zip(state["classes"], state["kept"], strict=True)
        self.kept = {label: deque(values, maxlen=self.most) for label, values in pairs}


@dataclass(kw_only=True)
class Policy(RewardTuning):
    """An objective that draws chains of Gaussian steps and then weighs them.

    Args:
        eta: share of the ancestral noise; 0 leaves nothing to weigh but the last step.
        explore: noise of the last action, in standard deviations of the data.
        updates: moves of the weights on the chains of a step.
    """

    eta: Share = 1.0
    explore: Positive = 0.1
    updates: Count = 1
    _rolled: Rollouts | None = field(init=False, default=None, repr=False)

    def copies(self) -> int:
        """Return how many chains each array gets."""
        return 1

    def before_step(self, run: Any, trees: Sequence[Any]) -> None:
        """Draw the chains of the step, and judge them. Every process draws them all.

        Args:
            run: the run in progress.
            trees: all arrays of the step.
        """
        super().before_step(run, trees)
        batch = run.model.collate(trees).to(run.cluster.device)
        with torch.no_grad(), run.cluster.autocast():
            self._rolled = self.roll(run.model, batch)

    def roll(self, model: Any, batch: Any) -> Rollouts:
        """Return the chains of a whole step's arrays.

        Args:
            model: the denoiser.
            batch: N arrays; their classes are asked for.
        """
        links = self.links(model, last=self.explore * model.sigma_data)
        count = self.copies()

        def noise(step: int) -> Tensor:  # step n is where the chains begin
            return torch.stack([self.normal(batch, stream(step, one)) for one in range(count)], 1).flatten(0, 1)

        labels = batch.labels.repeat_interleave(count)
        told = labels if model.classes else None
        states = torch.stack(follow(model, links, noise(len(links)), noise, told, guidance=self.guidance))
        rewards = self.worth(states[-1], labels)
        logs = log_densities(links, states[1:], means(model, links, states[:-1], told, guidance=self.guidance))
        return Rollouts(
            links, states.unflatten(1, (-1, count)), rewards.unflatten(0, (-1, count)), logs.unflatten(1, (-1, count))
        )

    def logs(self, model: Any, batch: Any) -> tuple[Rollouts, Tensor]:
        """Return the chains of a batch's arrays, and the log-densities (n, B, C) that a model gives to their actions.

        Args:
            model: the denoiser.
            batch: B of the step's arrays.
        """
        assert self._rolled is not None, "before_step comes first"
        whole, places = self._rolled, batch.places.to(self._rolled.rewards.device)
        mine = replace(whole, states=whole.states[:, places], rewards=whole.rewards[places], logs=whole.logs[:, places])
        count = mine.rewards.shape[1]
        labels = batch.labels.repeat_interleave(count) if model.classes else None
        states = mine.states.flatten(1, 2)
        expected = means(model, mine.links, states[:-1], labels, guidance=self.guidance)
        return mine, log_densities(mine.links, states[1:], expected).unflatten(1, (-1, count))

    def turns(self, model: Any, batch: Any) -> Iterator[Turn]:
        """Yield a turn for each move on the chains.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        for _ in range(self.updates):
            yield Turn("model", *self.loss(model, batch))


@dataclass(kw_only=True)
class PolicyGradient(Policy):
    """The clipped policy gradient with advantages that are normalised within each class.

    sum over steps of max(-A r, -A clip(r, 1 - clip, 1 + clip)),  r = p(x' | x) / p_old(x' | x)
    A = (R - mean) / std of the latest rewards of the class, at most `most_advantage` in size

    Args:
        clip: how far r may go from 1 and still be rewarded.
        most_advantage: largest size of an advantage.
        memory: rewards of each class that are kept.
        least: a class with fewer rewards is compared with all of the step.
    """

    clip: Positive = 0.2
    most_advantage: Positive = 10.0
    memory: Count = 32
    least: Count = 16
    _worths: Worths | None = field(init=False, default=None, repr=False)
    _advantages: Tensor | None = field(init=False, default=None, repr=False)

    def setup(self, run: Any) -> None:
        """Prepare the rewards, and begin to remember them.

        Args:
            run: the run in progress.
        """
        super().setup(run)
        self._worths = Worths(self.memory, self.least)

    def before_step(self, run: Any, trees: Sequence[Any]) -> None:
        """Draw the chains of the step, and compare their rewards.

        Args:
            run: the run in progress.
            trees: all arrays of the step.
        """
        super().before_step(run, trees)
        assert self._rolled is not None and self._worths is not None
        labels = torch.tensor([item.label for item in trees]).to(self._rolled.rewards.device)
        found = self._worths.advantages(self._rolled.rewards[:, 0], labels)
        self._advantages = found.clamp(-self.most_advantage, self.most_advantage)

    def tuning(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of training, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        assert self._advantages is not None
        mine, logs = self.logs(model, batch)
        losses, clipped = clipped_gradient(
            logs[..., 0], mine.logs[..., 0], self._advantages[batch.places.to(logs.device)], self.clip
        )
        return losses.sum(), {"reward": mine.rewards.sum(), "clipped": clipped.mean(0).sum()}

    def state_dict(self) -> dict[str, Any]:
        """Return the rewards of each class."""
        return {} if self._worths is None else {"worths": self._worths.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over rewards.

        Args:
            state: as `state_dict` returned it.
        """
        if self._worths is not None and "worths" in state:
            self._worths.load_state_dict(state["worths"])


def clipped_gradient(logs: Tensor, old: Tensor, advantages: Tensor, clip: float) -> tuple[Tensor, Tensor]:
    """Return the clipped surrogate of each array (B,), summed over its steps, and which actions are clipped (n, B).

    Args:
        logs: (n, B) log-density of each action.
        old: (n, B) the same when it was drawn.
        advantages: (B,).
        clip: how far the ratio may go from 1.
    """
    ratio = (logs - old).exp()
    losses = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))
    return losses.sum(0), ((ratio - 1).abs() > clip).to(logs)


@part(
    "objective", "ddpo",
    papers=[("Training Diffusion Models with Reinforcement Learning", "arXiv:2305.13301")],
    claim="A policy gradient over the steps of denoising raises rewards that have no gradient, and more than weighing "
    "the denoising loss by them.",
    deviations="The last step, which has no noise, is given a little; log-densities are summed over an array's numbers "
    "and over steps where the authors' code takes means, and the clipping range is PPO's.",
    draws=[{"name": "ddim", "steps": "objective.steps", "schedule": "objective.schedule", "eta": 1.0}],
)  # fmt: skip
@dataclass(kw_only=True)
class DDPO(PolicyGradient):
    """The clipped policy gradient over a denoising chain (DDPO-IS): the sampler `ddim` with noise is the policy."""


@part(
    "objective", "rlcm",
    papers=[("RL for Consistency Models: Faster Reward Guided Text-to-Image Generation", "arXiv:2404.03673")],
    claim="A consistency model, tuned by a policy gradient over its few steps, reaches rewards with less training and "
    "drawing than a diffusion model does.",
    deviations="The last action has a little noise that the reward sees; the authors' code adds the last level's noise "
    "to it and judges the array without, so that this step learns nothing. Log-densities are summed over an array's "
    "numbers and over steps where the code takes means, and the clipping range is PPO's.",
    draws=[{"name": "multistep", "steps": "objective.steps", "schedule": "objective.schedule"}],
)  # fmt: skip
@dataclass(kw_only=True)
class RLCM(PolicyGradient):
    """The clipped policy gradient over a consistency model's multistep chain, x' = D(x, s) + sqrt(s'^2 - s_min^2) z.

    Args:
        steps: evaluations of the network in a chain.
        eta: unused: the noise is the chain's own.
        schedule: unused: the levels are those of the solver `multistep`.
    """

    steps: Steps = 2

    def links(self, model: Any, last: float = 0.0) -> list[Link]:
        """Return the chain that draws.

        Args:
            model: the denoiser.
            last: standard deviation of noise that the last step adds.
        """
        return consistency_chain(model, self.steps, last=last)


@part(
    "objective", "prdp",
    papers=[
        (
            "PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion Models",
            "arXiv:2402.08714",
        ),
    ],
    claim="Regressing the difference of two arrays' rewards on the difference of their log-likelihood ratios raises "
    "black-box rewards as policy gradients do, and stays stable where they do not.",
    deviations="The last step, which has no noise, is given a little.",
    draws=[{"name": "ddim", "steps": "objective.steps", "schedule": "objective.schedule", "eta": 1.0}],
)  # fmt: skip
@dataclass(kw_only=True)
class PRDP(Policy):
    """Proximal reward difference prediction, whose loss is 0 at the optimum of the reward less beta KL to the start.

    l = ((f_a - f_b) - (R_a - R_b) / beta)^2,  f = sum over steps of log p(x' | x) / p_start(x' | x)
    loss = max(l, l with each step's term kept within `clip` of what it was when the chain was drawn),
    the mean over all pairs of chains of the same array's class.

    Args:
        each: chains for each array of a step.
        beta: weight of the divergence from the model that the run starts from.
        clip: how far the log-ratio of a step may move before its change counts no more; None never clips.
        updates: moves of the weights on the chains of a step.
    """

    each: Annotated[int, Field(ge=2, le=99)] = 4
    beta: Positive = 1.0
    clip: Positive | None = 0.1
    updates: Count = 4
    _start: Any = field(init=False, default=None, repr=False)
    _gaps: Tensor | None = field(init=False, default=None, repr=False)

    def copies(self) -> int:
        """Return how many chains each array gets."""
        return self.each

    def setup(self, run: Any) -> None:
        """Prepare the rewards, and keep the model that the run starts from.

        Args:
            run: the run in progress.
        """
        super().setup(run)
        self._start = copy.deepcopy(run.model).eval().requires_grad_(False)

    def before_step(self, run: Any, trees: Sequence[Any]) -> None:
        """Draw the chains of the step, and see how likely the first model found them.

        Args:
            run: the run in progress.
            trees: all arrays of the step.
        """
        super().before_step(run, trees)
        batch = run.model.collate(trees).to(run.cluster.device)
        with torch.no_grad(), run.cluster.autocast():
            self._gaps = self.logs(self._start, batch)[1]

    def tuning(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of training, summed over the arrays.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        assert self._gaps is not None
        mine, logs = self.logs(model, batch)
        start = self._gaps[:, batch.places.to(logs.device)]
        losses = reward_differences(logs - start, mine.logs - start, mine.rewards / self.beta, self.clip)
        figures = {"reward": mine.rewards.mean(1).sum(), "divergence": (logs - start).detach().sum(0).mean(1).sum()}
        return losses.sum(), figures


def reward_differences(ratios: Tensor, old: Tensor, rewards: Tensor, clip: float | None) -> Tensor:
    """Return the mean over pairs of chains of the squared error of each array (B,), the larger of plain and clipped.

    Args:
        ratios: (n, B, C) log-ratio of each step to the first model.
        old: (n, B, C) the same when the chains were drawn.
        rewards: (B, C) over beta.
        clip: how far a step's ratio counts as moved; None never clips.
    """
    first, second = zip(*itertools.combinations(range(rewards.shape[1]), 2), strict=True)

    def errors(each: Tensor) -> Tensor:
        total = each.sum(0)
        predicted = total[:, list(first)] - total[:, list(second)]
        return (predicted - (rewards[:, list(first)] - rewards[:, list(second)])).square()

    plain = errors(ratios)
    if clip is None:
        return plain.mean(1)
    return torch.maximum(plain, errors(torch.minimum(torch.maximum(ratios, old - clip), old + clip))).mean(1)
