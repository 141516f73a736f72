"""Direct preference optimisation and its relatives: losses of the difference of two log-ratios to a reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from hone.errors import DataError
from hone.objectives import surrogates
from hone.objectives.answers import Answers, Pairs
from hone.objectives.preference import Positive, Referenced, Share, Side
from hone.objectives.surrogates import Divergence
from hone.parts import part

Flips = Annotated[float, Field(ge=0, lt=0.5)]


def shortened(values: Tensor, answers: Answers, pairs: Pairs, tail: float) -> tuple[Tensor, Tensor]:
    """Return token values summed over each pair's answers, tokens beyond the shorter one's length weighing less.

    Args:
        values: (N,) per trained token.
        answers: the batch's answers.
        pairs: P of them that meet; an answer may be in several.
        tail: weight of the tokens after as many as the shorter answer has.
    """
    begins = torch.searchsorted(answers.token_answers, torch.arange(len(answers), device=values.device))
    place = torch.arange(len(values), device=values.device) - begins[answers.token_answers]
    shorter = torch.minimum(answers.tokens[pairs.chosen], answers.tokens[pairs.rejected])
    made = []
    for side in (pairs.chosen, pairs.rejected):
        own = answers.token_answers[None] == side[:, None]  # (P, N)
        weight = torch.where(place[None] < shorter[:, None], 1.0, tail).to(values.dtype)
        made.append((own * weight * values).sum(1))
    return made[0], made[1]


@part(
    "objective",
    "dpo",
    papers=[
        (
            "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
            "arXiv:2305.18290",
        ),
        (
            "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence Constraints",
            "arXiv:2309.16240",
        ),
        ("Provably Robust DPO: Aligning Language Models with Noisy Feedback", "arXiv:2403.00409"),
        ("Disentangling Length from Quality in Direct Preference Optimization", "arXiv:2403.19159"),
        ("Length Desensitization in Direct Preference Optimization", "arXiv:2409.06411"),
    ],
    claim="Preference pairs teach more than supervised fine-tuning on the preferred answers, without a reward model "
    "and "
    "without sampling.",
    deviations="Conservative DPO (flips without debias) was proposed by E. Mitchell in a note that is no paper. The "
    "margin "
    "of the data is an addition, as in reward models.",
)
@dataclass(kw_only=True)
class DPO(Referenced):
    """Direct preference optimisation.

    loss = -log sigmoid(m),  m = beta [f'(u_w) - f'(u_l)] + length_penalty (|y_w| - |y_l|) - margin

    with u = pi(y|x) / pi_ref(y|x), of which reverse KL takes f' = log u. A share `flips` of the labels is taken to be
    wrong: -(1 - e) log s(m) - e log s(-m) (conservative DPO), or its unbiased form with `debias` (robust DPO).

    Args:
        divergence: which f-divergence keeps the model near the reference: reverse_kl, forward_kl, js or alpha.
        alpha: order of the alpha-divergence; 1 is the reverse KL, 0 the forward KL.
        flips: share of pairs whose labels are taken to be the wrong way round, in [0, 0.5).
        debias: correct for the flips without bias instead of smoothing the labels.
        normalised: log-ratios are means over tokens instead of sums.
        length_penalty: what each token by which the preferred answer is longer counts as margin that it has already, so
            that the likelihoods need not tell it apart by its length (R-DPO).
        tail: weight of tokens beyond the length of the shorter answer (LD-DPO); 1 counts them fully.
        margin: how much the field "margin" of the data counts as a margin that the rewards must exceed.
    """

    divergence: Divergence = "reverse_kl"
    alpha: float = 0.5
    flips: Flips = 0.0
    debias: bool = False
    normalised: bool = False
    length_penalty: Annotated[float, Field(ge=0)] = 0.0
    tail: Share = 1.0
    margin: Annotated[float, Field(ge=0)] = 0.0

    def whole(self, answers: Answers, pairs: Pairs, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return token values summed over each pair's answers, the tail of the longer one weighing `tail`.

        Args:
            answers: the batch's answers.
            pairs: which of them meet.
            values: (N,) per trained token.
        """
        if self.tail == 1:
            return super().whole(answers, pairs, values)
        return shortened(values, answers, pairs, self.tail)

    def difference(self, chosen: Side, rejected: Side) -> Tensor:
        """Return f'(u_w) - f'(u_l) of each pair (P,)."""
        scores = []
        for side in (chosen, rejected):
            score = surrogates.divergence_score(side.logratio, self.divergence, self.alpha)
            scores.append(score / side.tokens if self.normalised else score)
        return scores[0] - scores[1]

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred answers.
            rejected: the others.
            margin: (P,) by how much the data says that the one is better.
        """
        gap = self.strength(margin) * self.difference(chosen, rejected)
        if self.length_penalty:
            gap = gap + self.length_penalty * (chosen.tokens - rejected.tokens)
        if self.margin:
            gap = gap - self.margin * margin.nan_to_num(0.0)
        return self.surrogate(gap)

    def strength(self, margin: Tensor) -> Tensor | float:
        """Return beta, one for all pairs or one for each (P,)."""
        return self.beta

    def surrogate(self, gap: Tensor) -> Tensor:
        """Return what margins (P,) cost: the logistic loss."""
        return surrogates.logistic(gap, self.flips, self.debias)


@part(
    "objective",
    "rso",
    papers=[("Statistical Rejection Sampling Improves Preference Optimization", "arXiv:2309.06657")],
    claim="A hinge on the normalised likelihood, with pairs sampled by rejection from the optimal policy, beats SLiC "
    "and "
    "DPO.",
    deviations="The loss alone (rso-hinge, SLiC with a reference): where the pairs come from is the data's matter.",
)
@dataclass(kw_only=True)
class RSO(DPO):
    """The hinge loss of DPO's margin.

    loss = max(0, 1 - m), m as in `dpo`; flips and debias play no part.
    """

    def surrogate(self, gap: Tensor) -> Tensor:
        """Return what margins (P,) cost: the hinge loss."""
        return surrogates.hinge(gap)


@part(
    "objective",
    "ipo",
    papers=[("A General Theoretical Paradigm to Understand Learning from Human Preferences", "arXiv:2310.12036")],
    claim="A bounded target for the margin keeps the model near its reference where preferences are deterministic, "
    "which "
    "DPO overfits.",
)
@dataclass(kw_only=True)
class IPO(Referenced):
    """Identity preference optimisation: the margin of the mean log-ratios is drawn to 1 / (2 beta).

    loss = [log u_w / |y_w| - log u_l / |y_l| - 1 / (2 beta)]^2

    Args:
        normalised: log-ratios are means over tokens, as the authors say their results were had; False takes sums, as
            the
            paper's equation 17 reads.
    """

    normalised: bool = True

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred answers.
            rejected: the others.
            margin: not used.
        """
        first, second = (s.logratio / s.tokens if self.normalised else s.logratio for s in (chosen, rejected))
        return surrogates.squared(first - second, 1 / (2 * self.beta))


@part(
    "objective",
    "exo",
    papers=[("Towards Efficient Exact Optimization of Language Model Alignment", "arXiv:2402.00856")],
    claim="Minimising the reverse instead of the forward divergence to the labels seeks modes, and beats DPO.",
    deviations="EXO-pref, for two answers a prompt.",
)
@dataclass(kw_only=True)
class EXO(Referenced):
    """Efficient exact optimisation: the reverse KL from the model's preference of a pair to the labels'.

    loss = KL([s(m), s(-m)] || [1 - e, e]),  m = beta (log u_w - log u_l)

    Args:
        flips: e, the probability that the labels give to the rejected answer, in (0, 0.5).
    """

    flips: Annotated[float, Field(gt=0, lt=0.5)] = 1e-3

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred answers.
            rejected: the others.
            margin: not used.
        """
        return surrogates.reverse_logistic(self.beta * (chosen.logratio - rejected.logratio), self.flips)


@part(
    "objective",
    "discopop",
    papers=[
        (
            "Discovering Preference Optimization Algorithms with and for Large Language Models",
            "arXiv:2406.08414",
        )
    ],
    claim="A loss found by a language model's search, no longer convex, beats DPO on MT-Bench and in summaries.",
    deviations="Beyond a margin of -60 the exponential goes on as its tangent, so that nothing overflows.",
)
@dataclass(kw_only=True)
class DiscoPOP(Referenced):
    """The log-ratio modulated loss: logistic where the margin is negative, exponential where it is positive.

    loss = (1 - g) [-log s(m)] + g e^(-m),  g = s(m / temperature),  m = beta (log u_w - log u_l)

    Args:
        temperature: of the gate g.
    """

    temperature: Positive = 0.05

    def pair_loss(self, chosen: Side, rejected: Side, margin: Tensor) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            chosen: the preferred answers.
            rejected: the others.
            margin: not used.
        """
        gap = self.beta * (chosen.logratio - rejected.logratio)
        return surrogates.logistic_exponential(gap, self.temperature)


def margin_scale(margin: Tensor, weight: float, rate: float) -> Tensor:
    """Return by how much each pair's beta is scaled for its reward margin (P,): 1 + w (1 - e^(-k d)).

    Args:
        margin: d (P,), how much better the preferred answer is said to be.
        weight: w, the most that is added.
        rate: k, how soon.
    """
    return 1 + weight * -torch.expm1(-rate * margin.clamp(min=0))


@part(
    "objective",
    "mm-dpo",
    papers=[("MM-RLHF: The Next Step Forward in Multimodal LLM Alignment", "arXiv:2502.10391")],
    claim="Pairs that a reward model is surer of should pull harder: a beta that grows with the margin beats a "
    "constant one.",
    deviations="Text alone; the reward margins come with the data (field 'margin'). The authors' script adds the "
    "preferred answer's likelihood with weight 0.25 (`sft: 0.25`) and lets beta grow by 0.1 at most (`scale: 0.1`); "
    "their code also has a beta from the batch's own margins, which is not built.",
)
@dataclass(kw_only=True)
class MMDPO(DPO):
    """DPO with dynamic reward scaling: each pair's beta grows with the margin of its rewards.

    loss = -log sigmoid(beta_d (log u_w - log u_l)),  beta_d = beta [1 + scale (1 - e^(-rate d))]

    d is the field "margin" of the pair, which the data must have. The options of `dpo` are there too.

    Args:
        scale: w, the most by which beta grows.
        rate: k, how soon it does with the margin, per unit of reward.
    """

    scale: Annotated[float, Field(ge=0)] = 0.5
    rate: Positive = 0.5

    def strength(self, margin: Tensor) -> Tensor | float:
        """Return beta of each pair (P,).

        Args:
            margin: (P,) difference of the two answers' rewards.

        Raises:
            DataError: the data does not say it.
        """
        if margin.isnan().any():
            raise DataError(
                "mm-dpo needs the difference of the two rewards of every pair: a number in a column called 'margin', "
                "or "
                "in another one named by columns: {margin: COLUMN}"
            )
        return self.beta * margin_scale(margin, self.scale, self.rate)
