"""Proximal policy optimisation: a value head says what each token could expect, and advantages are what it adds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hone.data.groups import CREDIT
from hone.objectives.advantages import ADVANTAGE, SMALL, generalised, rewards_of
from hone.objectives.base import trained
from hone.objectives.policy import Estimator, NotNegative, Policy, View, with_values
from hone.parts import part
from hone.text.pack import Tree

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed

CRITIC = "critic"  # in `model.extras`
VALUE, RETURN = "value", "return"  # per-token values
Factor = Annotated[float, Field(ge=0, le=1)]


def value_loss(values: Tensor, old: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """Return 1/2 max[(V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2] for each token (N,).

    Args:
        values: (N,) V.
        old: (N,) V when the answers were sampled.
        returns: (N,) G.
        clip: c; None for the first term alone.
    """
    plain = (values - returns).square()
    if clip is None:
        return plain / 2
    near = old + (values - old).clamp(-clip, clip)
    return torch.maximum(plain, (near - returns).square()) / 2


@part(
    "objective",
    "ppo",
    papers=[
        ("Proximal Policy Optimization Algorithms", "arXiv:1707.06347"),
        ("ReFT: Reasoning with Reinforced Fine-Tuning", "arXiv:2401.08967"),
        ("Fine-Grained Human Feedback Gives Better Rewards for Language Model Training", "arXiv:2306.01693"),
        ("FGAIF: Aligning Large Vision-Language Models with Fine-grained AI Feedback", "arXiv:2404.05046"),
    ],
    claim="Clipped steps on advantages from a learned critic raise the reward; fine-tuning so after a warm-up on "
    "worked answers beats fine-tuning alone (ReFT), and rewards for parts of an answer beat one for the whole.",
    deviations="The critic is a linear head on the policy's own states, as in ReFT (checked against its code: "
    "rewards less kl (log pi - log pi_ref), GAE, whitened advantages, ratio and value clipped at 0.2); the means are "
    "over the tokens of the step, where ReFT takes those of each answer. Fine-grained rewards are those that credit "
    "parts (`fine-grained`), which its authors scale to unit variance before the advantages are made; FGAIF's are of "
    "the same form, learned from images, which are not here.",
)
@dataclass(kw_only=True)
class PPO(Policy):
    """Clipped policy steps with a learned critic.

    loss = mean_t [ -min(r A, clip(r) A) + value_weight/2 max((V - G)^2, (clip(V) - G)^2) ],   G = A + V_old

    A is the generalised advantage estimate of what each token earns, less kl times its log-ratio to the reference.

    Args:
        discount: factor for each further token.
        trace: of the advantage estimate (lambda): 0 looks one token ahead, 1 to the end.
        value_weight: weight of the critic's loss.
        value_clip: how far the critic may move in a phase; None for no bound.
        estimator: of the divergence from the reference: k1, k2 or k3.
        kl_in: where the divergence enters: the "loss" or the "reward".
        whiten: give advantages zero mean and unit variance over the trained tokens of a phase.
    """

    estimator: Estimator = "k1"
    kl_in: Literal["loss", "reward"] = "reward"
    discount: Factor = 1.0
    trace: Factor = 0.95
    value_weight: NotNegative = 0.5
    value_clip: NotNegative | None = 0.2
    whiten: bool = True

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield the options of policy objectives that mean nothing beside a critic."""
        yield from super().check()
        if self.advantage != "group":
            yield "advantage", "the critic says what a reward is compared with, so there is nothing to choose"
        if self.combine != "sum":
            yield "combine", "the critic learns what is earned in all, so rewards are added up"

    def equip(self, model: LanguageModel) -> None:
        """Put the critic beside the model; it says 0 at first.

        Args:
            model: the language model, as the run starts from it.
        """
        width, like = model.hf.config.get_text_config().hidden_size, next(model.hf.parameters())
        critic = torch.nn.Linear(width, 1)
        torch.nn.init.zeros_(critic.weight)
        torch.nn.init.zeros_(critic.bias)
        model.extras[CRITIC] = critic.to(device=like.device, dtype=like.dtype)

    def values(self, model: LanguageModel, states: Tensor) -> Tensor:
        """Return V (n,) of states (n, D).

        Args:
            model: has the critic.
            states: (n, D) last hidden states.
        """
        found: Tensor = model.extras[CRITIC](states).squeeze(-1)
        return found.float() if found.dtype.itemsize < 4 else found

    def appraise(self, run: Any, trees: list[Tree]) -> list[Tree]:
        """Return a phase's groups with the critic's values, advantages and returns of each token.

        Args:
            run: the run in progress.
            trees: the groups.
        """
        run.model.eval()
        trees = with_values(run, self.with_reference(run, trees), VALUE, self._old_values)
        penalties = self._penalties(trees)
        made = []
        for number, tree in enumerate(trees):
            rows = {name: [np.zeros(len(tokens)) for tokens in tree.tokens] for name in (ADVANTAGE, RETURN)}
            for segment in rewards_of(tree)[0]:
                credit = tree.values[CREDIT][segment] - (0.0 if penalties is None else penalties[number][segment])
                values = tree.values[VALUE][segment]
                rows[ADVANTAGE][segment] = generalised(credit, values, self.discount, self.trace)
                rows[RETURN][segment] = rows[ADVANTAGE][segment] + values
            made.append(replace(tree, values={**tree.values, **{name: tuple(row) for name, row in rows.items()}}))
        return _whitened(made) if self.whiten else made

    def _old_values(self, model: LanguageModel, batch: Packed) -> Tensor:
        return self.values(model, model.hidden(batch)[trained(batch).predictors])

    def policy_loss(self, view: View) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the summed surrogate with the critic's loss, and what is reported.

        Args:
            view: what the model makes of a batch.
        """
        total, metrics = super().policy_loss(view)
        weights = self.unit_weights(view, ~view.hinted)
        values = self.values(view.model, view.states)
        losses = value_loss(values, view.values[VALUE], view.values[RETURN], self.value_clip)
        critic = (weights * losses).sum()
        return total + self.value_weight * critic, {
            **metrics, "value_loss": critic.detach(), "value": (weights * values).sum().detach(),
        }  # fmt: skip


def _whitened(trees: list[Tree]) -> list[Tree]:
    """Return groups whose advantages have zero mean and unit variance over the tokens of all answers that train."""
    segments = [[s for s in rewards_of(tree)[0] if tree.weights[s].any()] for tree in trees]
    every = np.concatenate([tree.values[ADVANTAGE][s] for tree, own in zip(trees, segments, strict=True) for s in own])
    mean, spread = every.mean(), every.std() + SMALL
    made = []
    for tree, own in zip(trees, segments, strict=True):
        rows = tuple((row - mean) / spread if s in own else row for s, row in enumerate(tree.values[ADVANTAGE]))
        made.append(replace(tree, values={**tree.values, ADVANTAGE: rows}))
    return made
