"""REINFORCE, plain and with a leave-one-out baseline: rows over the axes of `policy.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hone.objectives.advantages import Advantage
from hone.objectives.policy import Estimator, Normaliser, NotNegative, Policy
from hone.parts import part


@part(
    "objective",
    "rloo",
    papers=[
        (
            "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
            "arXiv:2402.14740",
        )
    ],
    claim="REINFORCE with the mean of the other answers as the baseline does as well as PPO, without critic or clips.",
    deviations="A token's gradient is divided by the longest allowed answer, a constant factor on the learning rate. "
    "Each token is charged with the divergence from it on, where the paper and TRL charge it with the whole answer's: "
    "another unbiased estimator of the same gradient.",
)
@dataclass(kw_only=True)
class RLOO(Policy):
    """REINFORCE with a leave-one-out baseline: A_i = R_i - mean of the other answers to the prompt.

    The divergence, where there is one, is taken off the reward.

    Args:
        advantage: what a reward is compared with.
        clip_low: how far below 1 the ratio counts; None for no bound.
        clip_high: how far above 1 the ratio counts; None for no bound.
        normalise: what the loss is a mean over: "tokens", "answers" or "length".
        estimator: of the divergence: k1, k2 or k3.
        kl_in: where the divergence enters: the "loss" or the "reward".
    """

    advantage: Advantage = "leave-one-out"
    clip_low: NotNegative | None = None
    clip_high: NotNegative | None = None
    normalise: Normaliser = "length"
    estimator: Estimator = "k1"
    kl_in: Literal["loss", "reward"] = "reward"


@part(
    "objective",
    "reinforce",
    papers=[
        (
            "Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning",
            "doi:10.1007/BF00992696",
        ),
        ("MusicRL: Aligning Music Generation to Human Preferences", "arXiv:2402.04229"),
    ],
    claim="Answers become likelier by how far their reward exceeds a baseline; a pull to the start keeps their form.",
    deviations="The baseline is the mean over the phase, and advantages have unit variance. Of MusicRL only the "
    "regularised policy gradient on sequence rewards is here. With kl_in: reward each token is charged with the "
    "divergence from it on, not with the whole answer's.",
)
@dataclass(kw_only=True)
class Reinforce(Policy):
    """The plain policy gradient: -A log pi, with A = (R - mean) / std over the phase.

    The ratio to the sampler stands for log pi: their gradients agree where one step is made of each phase, and further
    steps are corrected for what has changed.

    Args:
        advantage: what a reward is compared with.
        clip_low: how far below 1 the ratio counts; None for no bound.
        clip_high: how far above 1 the ratio counts; None for no bound.
        normalise: what the loss is a mean over: "tokens", "answers" or "length".
    """

    advantage: Advantage = "batch"
    clip_low: NotNegative | None = None
    clip_high: NotNegative | None = None
    normalise: Normaliser = "length"
