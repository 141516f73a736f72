"""Group relative policy optimisation and its published corrections: rows over the axes of `policy.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hone.objectives.advantages import Advantage
from hone.objectives.policy import Normaliser, NotNegative, Policy
from hone.parts import part


@part(
    "objective",
    "grpo",
    papers=[
        ("DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", "arXiv:2402.03300"),
        (
            "LongWriter-Zero: Mastering Ultra-Long Text Generation via Reinforcement Learning",
            "arXiv:2506.18841",
        ),
    ],
    claim="The mean over the answers to a prompt is a baseline that needs no critic: training raises accuracy.",
    deviations="The divergence from the reference is off by default (kl: 0), as in most later work; the paper has "
    "0.04. With kl_in: reward each token is charged with the divergence from it on, not with the whole answer's. "
    "LongWriter-Zero's mean of the advantages of each reward is combine: advantages.",
)
@dataclass(kw_only=True)
class GRPO(Policy):
    """Group relative policy optimisation: the clipped surrogate with advantages (R - mean) / std of a group.

    loss = mean over answers of the mean over their tokens of [ -min(r A, clip(r) A) + kl KL ]

    See `Policy` for the other axes, which are options here too.

    Args:
        normalise: what the loss is a mean over: "tokens", "answers" or "length".
    """

    normalise: Normaliser = "answers"


@part(
    "objective",
    "dr-grpo",
    papers=[("Understanding R1-Zero-Like Training: A Critical Perspective", "arXiv:2503.20783")],
    claim="Without the division by the group's standard deviation and by each answer's length, wrong answers do not "
    "grow longer.",
)
@dataclass(kw_only=True)
class DrGRPO(Policy):
    """GRPO without its two biases: advantages R - mean, and sums over tokens divided by one constant length.

    Args:
        advantage: what a reward is compared with.
        normalise: what the loss is a mean over: "tokens", "answers" or "length".
    """

    advantage: Advantage = "centred"
    normalise: Normaliser = "length"


@part(
    "objective",
    "dapo",
    papers=[("DAPO: An Open-Source LLM Reinforcement Learning System at Scale", "arXiv:2503.14476")],
    claim="A higher upper clip and a mean over all tokens of the step keep the entropy up and raise accuracy.",
    deviations="The objective alone; dynamic sampling is drop: even with refill, and overlong filtering is "
    "unfinished: mask, both options of `rollouts`.",
)
@dataclass(kw_only=True)
class DAPO(Policy):
    """GRPO with asymmetric clipping and the mean over the tokens of the step.

    Args:
        clip_high: how far above 1 the ratio counts; None for no bound.
    """

    clip_high: NotNegative | None = 0.28


@part(
    "objective",
    "gspo",
    papers=[("Group Sequence Policy Optimization", "arXiv:2507.18071")],
    claim="A ratio of whole answers, clipped as one, trains more stably than ratios of tokens.",
)
@dataclass(kw_only=True)
class GSPO(Policy):
    """GRPO with one ratio for an answer: the geometric mean of its tokens' ratios.

    Args:
        ratio: by "token" or by "answer".
        clip_low: how far below 1 the ratio counts; None for no bound.
        clip_high: how far above 1 the ratio counts; None for no bound.
        normalise: what the loss is a mean over: "tokens", "answers" or "length".
    """

    ratio: Literal["token", "answer"] = "answer"
    clip_low: NotNegative | None = 3e-4
    clip_high: NotNegative | None = 4e-4
    normalise: Normaliser = "answers"
