"""Preference losses that need no reference model: of the likelihood of answers itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from hone.objectives import surrogates
from hone.objectives.preference import Positive, Preference, Side
from hone.parts import part

NonNegative = Annotated[float, Field(ge=0)]


def alpha_reward(logprob: Tensor, alpha: float) -> Tensor:
    """Return (1 - p^(-alpha)) / alpha of p = e^logprob, log p for alpha = 0 (AlphaPO's shape of the reward).

    Args:
        logprob: any shape.
        alpha: the larger, the more improbable answers count.
    """
    return logprob if alpha == 0 else (1 - surrogates.exponential(-alpha * logprob)) / alpha


@part(
    "objective",
    "cpo",
    papers=[
        (
            "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine Translation",
            "arXiv:2401.08417",
        )
    ],
    claim="A uniform reference and the likelihood of the preferred translation beside it beat DPO, at less memory.",
)
@dataclass(kw_only=True)
class CPO(Preference):
    """Contrastive preference optimisation.

    loss = -log s(beta [log pi(y_w) - log pi(y_l)]) - sft log pi(y_w) / |y_w|

    Args:
        beta: factor on the difference of the log-probabilities.
        sft: weight of the negative log-likelihood per token of the preferred answer.
        flips: share of pairs whose labels are taken to be the wrong way round, in [0, 0.5).
    """

    beta: Positive = 0.1
    sft: NonNegative = 1.0
    flips: Annotated[float, Field(ge=0, lt=0.5)] = 0.0

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred answers.
            rejected: the others.
            margin: not used.
        """
        return surrogates.logistic(self.beta * (chosen.logprob - rejected.logprob), self.flips)


@part(
    "objective",
    "arm",
    papers=[
        (
            "GenARM: Reward Guided Generation with Autoregressive Reward Model for Test-time Alignment",
            "arXiv:2410.08193",
        )
    ],
    claim="A reward that is a sum of log-probabilities of tokens is learned from pairs of whole answers and says what "
    "the next token is worth.",
    deviations="The options of `cpo` are there too; the paper's loss has none of them.",
)
@dataclass(kw_only=True)
class ARM(CPO):
    """Autoregressive reward model, which guides another model's decoding (sampler `genarm`).

    loss = -log s(beta [log pi_r(y_w) - log pi_r(y_l)]),  log pi_r(y) = sum_t log pi_r(y_t | x, y_<t)

    Args:
        beta: factor on the rewards, which are log-probabilities (the paper's beta_r).
        sft: weight of the negative log-likelihood per token of the preferred answer.
    """

    beta: Positive = 0.05
    sft: NonNegative = 0.0

    def reward(self, side: Side) -> Tensor:
        """Return beta log pi_r of each answer (P,)."""
        return self.beta * side.logprob


@part(
    "objective",
    "simpo",
    papers=[
        ("SimPO: Simple Preference Optimization with a Reference-Free Reward", "arXiv:2405.14734"),
        ("AlphaPO: Reward Shape Matters for LLM Alignment", "arXiv:2501.03884"),
    ],
    claim="The mean log-probability as the reward, with a margin, beats DPO by up to 6 points on AlpacaEval 2, and "
    "answers do not grow longer.",
)
@dataclass(kw_only=True)
class SimPO(Preference):
    """Simple preference optimisation, and with `alpha` AlphaPO.

    loss = -log s(beta [r_w - r_l] - gamma),  r = (1 - p^(-alpha)) / alpha or, for alpha = 0, log p

    with log p = log pi(y|x) / |y|.

    Args:
        beta: factor on the difference of the rewards.
        gamma: margin by which they must differ.
        alpha: shape of the reward; 0 is SimPO, the paper of AlphaPO takes 0.25.
        flips: share of pairs whose labels are taken to be the wrong way round, in [0, 0.5).
    """

    beta: Positive = 2.0
    gamma: NonNegative = 1.0
    alpha: float = 0.0
    flips: Annotated[float, Field(ge=0, lt=0.5)] = 0.0

    def reward(self, side: Side) -> Tensor:
        """Return beta r of each answer (P,)."""
        return self.beta * alpha_reward(side.mean, self.alpha)

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred answers.
            rejected: the others.
            margin: not used.
        """
        return surrogates.logistic(self.reward(chosen) - self.reward(rejected) - self.gamma, self.flips)


@part(
    "objective",
    "orpo",
    papers=[("ORPO: Monolithic Preference Optimization without Reference Model", "arXiv:2403.07691")],
    claim="An odds-ratio term beside the likelihood aligns a base model in one stage, better than SFT and then DPO.",
    deviations="The likelihood is that of the answer, a mean over its tokens, as in the paper's equation; the authors' "
    "code and TRL count the prompt's tokens too, and average over all tokens of a batch.",
)
@dataclass(kw_only=True)
class ORPO(Preference):
    """Odds ratio preference optimisation.

    loss = -log pi(y_w) / |y_w| - beta log s(log odds_w - log odds_l),  odds = p / (1 - p),  log p = log pi(y|x) / |y|

    Args:
        beta: weight of the odds-ratio term (the paper's lambda).
        sft: weight of the negative log-likelihood per token of the preferred answer.
    """

    beta: NonNegative = 0.1
    sft: NonNegative = 1.0

    def reward(self, side: Side) -> Tensor:
        """Return the log-odds of each answer (P,)."""
        return surrogates.log_odds(side.mean)

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred answers.
            rejected: the others.
            margin: not used.
        """
        return -self.beta * F.logsigmoid(self.reward(chosen) - self.reward(rejected))


@part(
    "objective",
    "asft",
    papers=[("ASFT: Aligned Supervised Fine-Tuning through Absolute Likelihood", "arXiv:2409.10571")],
    claim="Absolute instead of relative likelihoods, each answer with a gradient of its own, beat DPO and ORPO on "
    "MT-Bench.",
)
@dataclass(kw_only=True)
class ASFT(Preference):
    """Aligned supervised fine-tuning.

    loss = -log pi(y_w) / |y_w| + beta [-log s(log odds_w) - log s(-log odds_l)] = ... + beta [-log p_w - log(1 - p_l)]

    with log p = log pi(y|x) / |y| and odds = p / (1 - p).

    Args:
        beta: weight of the alignment term.
        sft: weight of the negative log-likelihood per token of the preferred answer.
    """

    beta: NonNegative = 0.1
    sft: NonNegative = 1.0

    def reward(self, side: Side) -> Tensor:
        """Return the log-odds of each answer (P,)."""
        return surrogates.log_odds(side.mean)

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred answers.
            rejected: the others.
            margin: not used.
        """
        return -self.beta * (chosen.mean + surrogates.log1mexp(rejected.mean))


@part(
    "objective",
    "slic",
    papers=[("SLiC-HF: Sequence Likelihood Calibration with Human Feedback", "arXiv:2305.10425")],
    claim="Calibrating likelihoods on human preferences improves summaries as PPO does, more simply.",
    deviations="The regulariser is the likelihood of the preferred answer; the paper also tries the reference summary.",
)
@dataclass(kw_only=True)
class SLiC(Preference):
    """Sequence likelihood calibration: a hinge on the log-probabilities.

    loss = max(0, delta - log pi(y_w) + log pi(y_l)) - sft log pi(y_w) / |y_w|

    Args:
        delta: margin by which the log-probabilities must differ, in nats.
        normalised: log-probabilities are means over tokens instead of sums.
        sft: weight of the negative log-likelihood per token of the preferred answer.
    """

    delta: NonNegative = 1.0
    normalised: bool = False
    sft: NonNegative = 0.5

    def reward(self, side: Side) -> Tensor:
        """Return the log-probability of each answer (P,)."""
        return side.mean if self.normalised else side.logprob

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred answers.
            rejected: the others.
            margin: not used.
        """
        return F.relu(self.delta - self.reward(chosen) + self.reward(rejected))


@part(
    "objective",
    "rrhf",
    papers=[
        (
            "RRHF: Rank Responses to Align Language Models with Human Feedback without tears",
            "arXiv:2304.05302",
        )
    ],
    claim="Ranking answers by their likelihood aligns as well as PPO, with one model instead of four.",
    deviations="The loss is divided by the number of pairs of a step; the paper's sums over the pairs of a prompt.",
)
@dataclass(kw_only=True)
class RRHF(Preference):
    """Rank responses: every better answer of a list shall be likelier than every worse one.

    loss = sum_(i better than j) max(0, p_j - p_i) - sft log pi(y_best) / |y_best|,  p = log pi(y|x) / |y|

    Args:
        sft: weight of the negative log-likelihood per token of the best answer.
    """

    sft: NonNegative = 1.0

    def reward(self, side: Side) -> Tensor:
        """Return the mean log-probability of each answer (P,)."""
        return side.mean

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred answers.
            rejected: the others.
            margin: not used.
        """
        return F.relu(rejected.mean - chosen.mean)
