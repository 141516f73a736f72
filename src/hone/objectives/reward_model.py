"""Reward models: a number for an answer, learned from which of two answers people prefer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from hone.errors import DataError
from hone.objectives.answers import Answers, answers_of, pairs_of, tree_field
from hone.objectives.class_losses import NotNegative
from hone.objectives.heads import Headed
from hone.parts import part

if TYPE_CHECKING:
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | float, centring: float) -> Tensor:
    """Return -log sigmoid(r_w - r_l - margin) + centring (r_w + r_l)^2 of each pair (P,).

    Args:
        chosen: r_w (P,), rewards of the preferred answers.
        rejected: r_l (P,), rewards of the others.
        margin: by how much the one shall be ahead, one or (P,).
        centring: pull of the two rewards' mean towards 0.
    """
    return -F.logsigmoid(chosen - rejected - margin) + centring * (chosen + rejected).square()


@part(
    "objective",
    "reward-model",
    papers=[
        ("Llama 2: Open Foundation and Fine-Tuned Chat Models", "arXiv:2307.09288"),
        (
            "Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking",
            "arXiv:2312.09244",
        ),
    ],
    claim="A margin that grows with how much better the preferred answer is makes a reward model more accurate, above "
    "all on pairs that differ clearly.",
    deviations="The margin is the number that the data has, times an option; Llama 2 maps four ratings to it. The "
    "centring is squared and unweighted by the ensemble's spread, as in TRL.",
)
@dataclass(kw_only=True)
class RewardModel(Headed):
    """Learn a reward from preferences: the Bradley-Terry likelihood of a scalar head.

    loss = sum_pairs w [-log sigmoid(r_w - r_l - margin m) + centring (r_w + r_l)^2],  r = W h at an answer's last token

    with m the field "margin" and w the field "weight" of the pair. Ranked lists give all their pairs. Reported:
    "pair_accuracy", "margin" (r_w - r_l) and "reward" (the mean of both).

    Args:
        margin: factor on the data's margins; 0 leaves them out.
        centring: pull of the mean of two rewards towards 0, which their difference leaves open; 0.01 is usual.
    """

    consumes: ClassVar[str] = "pairs"
    margin: NotNegative = 0.0
    centring: NotNegative = 0.0

    def class_names(self) -> Sequence[str]:
        """Return the name of the only output."""
        return ("reward",)

    def count(self, batch: Packed) -> float:
        """Return the summed weights of the batch's pairs.

        Args:
            batch: B trees as a packed forest of T tokens.
        """
        pairs = pairs_of(batch, answers_of(batch))
        return float(tree_field(batch, "weight", pairs.trees, 1.0).sum())

    def rewards(self, model: LanguageModel, batch: Packed, answers: Answers) -> Tensor:
        """Return the reward of each answer (A,).

        Args:
            model: the language model with its head.
            batch: packed forest of T tokens.
            answers: its answers.
        """
        states = self.hidden(model, batch)
        ends = (batch.starts[answers.segments + 1] - 1).to(states.device)
        return self.outputs(model, states[ends]).squeeze(-1)

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss summed over the batch's pairs, and what is reported, summed alike.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.

        Raises:
            DataError: a margin is asked for and the data has none.
        """
        answers = answers_of(batch)
        pairs = pairs_of(batch, answers)
        rewards = self.rewards(model, batch, answers)
        chosen, rejected = rewards[pairs.chosen], rewards[pairs.rejected]
        given = tree_field(batch, "margin", pairs.trees, float("nan"))
        if self.margin and given.isnan().any():
            where = batch.where[int(pairs.trees[given.isnan().cpu()][0])]
            raise DataError(
                f"{where}: objective.margin needs by how much the one answer is better: a number in a column called "
                "'margin', or in another one named by columns: {margin: COLUMN}"
            )
        weights = tree_field(batch, "weight", pairs.trees, 1.0)
        margin = self.margin * given if self.margin else 0.0
        total = (weights * bradley_terry(chosen, rejected, margin, self.centring)).sum()
        gap, middle = (chosen - rejected).detach(), (chosen + rejected).detach() / 2
        return total, {
            "pair_accuracy": (weights * (gap > 0)).sum(), "margin": (weights * gap).sum(),
            "reward": (weights * middle).sum(),
        }  # fmt: skip

    def verdict(self, model: LanguageModel, batch: Packed) -> str:
        """Return the reward of the only text of a batch.

        Args:
            model: the trained model with its head.
            batch: one tree.
        """
        last = torch.tensor([len(batch.starts) - 2])
        whole = Answers(last, batch.trees[last], torch.ones(1), torch.zeros(1, dtype=torch.int64))
        return f"reward {float(self.rewards(model, batch, whole)):.3f}"
