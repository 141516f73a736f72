"""Preference pairs that a model labels itself: its own answers, ranked by rewards that are in the model already."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field
from scipy.stats import kendalltau, rankdata, spearmanr

from hone.data.sample import Sample
from hone.data.sampled import ModelMade, model_content, prompt_text
from hone.data.scoring import confidences, likelihoods
from hone.data.source import Split
from hone.parts import part

if TYPE_CHECKING:
    from hone.text.model import LanguageModel

Internal = Literal["implicit", "likelihood", "judge"]
Measure = Literal["kendall", "spearman", "top"]
MARGIN = "margin"  # field of a pair: log(C / (1 - C)) of the consistency of two rankings


def agreement(ours: Sequence[float], theirs: Sequence[float], measure: Measure) -> float | None:
    """Return how far two rewards rank the same answers alike, in [0, 1]; None where one of them ranks nothing.

    kendall, spearman: (1 + correlation of the ranks) / 2;  top: 1 where the best and the worst are the same, else 0

    Args:
        ours: a reward of each answer.
        theirs: another reward of each.
        measure: kendall, spearman or top.
    """
    first, second = (rankdata(scores, method="ordinal") for scores in (ours, theirs))
    if len(first) < 2 or len(set(ours)) < 2 or len(set(theirs)) < 2:
        return None
    if measure == "top":
        same = first.argmax() == second.argmax() and first.argmin() == second.argmin()
        return float(same)
    found = kendalltau(first, second) if measure == "kendall" else spearmanr(first, second)
    return float((1 + found.statistic) / 2)


def agreed_pairs(rewards: np.ndarray, most: int) -> list[tuple[int, int]]:
    """Return (better, worse) answers that all rewards prefer alike, those first that the first reward tells best apart.

    Args:
        rewards: (R, n) what each of R rewards says of each answer.
        most: at most so many pairs.
    """
    places = itertools.permutations(range(rewards.shape[1]), 2)
    agreed = [(a, b) for a, b in places if (rewards[:, a] > rewards[:, b]).all()]
    return sorted(agreed, key=lambda pair: rewards[0, pair[1]] - rewards[0, pair[0]])[:most]


def log_odds(share: float) -> float:
    """Return log(C / (1 - C)), at the ends the infinities.

    Args:
        share: C in [0, 1].
    """
    if share in (0.0, 1.0):
        return math.inf if share else -math.inf
    return math.log(share / (1 - share))


@part(
    "data",
    "self-rewarded",
    papers=[
        ("CREAM: Consistency Regularized Self-Rewarding Language Models", "arXiv:2410.12735"),
        (
            "Self-Consistency of the Internal Reward Models Improves Self-Rewarding Language Models",
            "arXiv:2502.08922",
        ),
        ("Self-Rewarding Language Models", "arXiv:2401.10020"),
    ],
    claim="Labels that a model gives its own answers go on improving it where they are weighed by how consistent the "
    "rankings of two rounds are (CREAM), or kept only where all rewards inside the model agree (SCIR).",
    deviations="CREAM was checked against the authors' code, where too, in a first round whose previous model is "
    "the reference itself, that one ranks by its mean log-probability. SCIR was verified from its "
    "abstract: its penalty on the difference of the rewards' predictions, which trains them to agree, is left out; "
    "the judge answers right or wrong instead of writing a grade, and sees one answer at a time, so that the order "
    "of a pair cannot bias it.",
)
@dataclass(kw_only=True)
class SelfRewarded(ModelMade):
    """Pairs of the model's own answers, labelled by rewards inside it.

    implicit: log pi(y|x) - log pi_0(y|x), pi_0 being `against`;  likelihood: log pi(y|x) / |y|;  judge: the probability
    that the model itself gives to the answer's being right (see data `verdicts`)

    Of the pairs on which all `rewards` agree, those that the first one tells best apart are taken. With `previous`, the
    first reward of the previous model ranks the same answers, and each pair carries the field "margin" =
    log(C / (1 - C)), C in [0, 1] being how consistent the two rankings are: objective `cream` takes C DPO(w > l) +
    (1 - C) DPO(l > w). Nothing here asks the source what is right.

    Args:
        rewards: implicit, likelihood or judge; with several, only pairs on which they agree are taken.
        against: model that the implicit reward compares with, e.g. "stage:0" for the run's own start in a later stage.
        previous: model of the round before, e.g. "stage:1"; None trusts the labels.
        consistency: C is that of each prompt ("sample"), or its mean over all prompts ("average", as in the paper).
        measure: of two rankings: kendall or spearman (a correlation, scaled to [0, 1]) or top (best and worst alike).
        pairs: most pairs to a prompt.
    """

    rewards: Annotated[list[Internal], Field(min_length=1)] = field(default_factory=lambda: ["implicit"])
    against: str = "base"
    previous: str | None = None
    consistency: Literal["average", "sample"] = "average"
    measure: Measure = "kendall"
    pairs: Annotated[int, Field(ge=1)] = 1

    def _choices(self) -> list[Any]:
        named = [None if name is None else model_content(name) for name in (self.against, self.previous)]
        return [self.rewards, *named, self.consistency, self.measure, self.pairs]

    def describe(self) -> str:
        """Return what labels what."""
        return f"{self.samples_each} answers to each prompt of {self.of.describe()}, labelled by the model itself"

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the pairs, in the order of the source's prompts.

        Args:
            split: "train" or "eval".

        Raises:
            DataError: no model answers.
        """
        return itertools.islice(self._made(split), self.limit if split == "train" else None)

    def _made(self, split: Split) -> Iterator[Sample]:
        asked = self._open(split)
        answered = [
            (sample, tuple(dict.fromkeys(text for text in texts if text.strip())))
            for sample, texts in zip(asked, self.answers(asked, split), strict=True)
        ]
        whole = [(sample, texts) for sample, texts in answered if len(texts) > 1]
        texts = [(prompt_text(sample), own) for sample, own in whole]
        model = self._answering()
        ours = [self.scores(kind, model, texts, self.against) for kind in self.rewards]
        rates = None if self.previous is None else self._rates(ours[0], texts)
        for number, (sample, own) in enumerate(whole):
            table = np.stack([scores[number] for scores in ours])
            fields = {} if rates is None else {MARGIN: log_odds(rates[number])}
            for better, worse in agreed_pairs(table, self.pairs):
                yield replace(
                    sample, kind="pair", answers=(own[better], own[worse]), fields={**sample.fields, **fields}
                )  # fmt: skip

    def _rates(self, ours: Sequence[np.ndarray], texts: Sequence[tuple[str, Sequence[str]]]) -> list[float]:
        """Return the consistency C of each prompt, the mean where the answers do not tell."""
        kind = self.rewards[0]
        if kind == "implicit" and self.previous == self.against:
            kind = "likelihood"  # it does not differ from itself
        theirs = self.scores(kind, self._named(str(self.previous)), texts, self.against)
        found = [agreement(a.tolist(), b.tolist(), self.measure) for a, b in zip(ours, theirs, strict=True)]
        known = [rate for rate in found if rate is not None]
        mean = float(np.mean(known)) if known else 1.0
        return [mean if rate is None or self.consistency == "average" else rate for rate in found]

    def scores(
        self, kind: Internal, model: LanguageModel, texts: Sequence[tuple[str, Sequence[str]]], against: str
    ) -> list[np.ndarray]:
        """Return what a reward says of the answers to each prompt.

        Args:
            kind: implicit, likelihood or judge.
            model: the model that is asked.
            texts: prompts with their answers.
            against: name of the model that the implicit reward compares with.
        """
        if kind == "judge":
            sure = confidences(model, [(prompt, answer) for prompt, answers in texts for answer in answers])
            return np.split(sure, np.cumsum([len(answers) for _, answers in texts])[:-1])
        own = likelihoods(model, texts)
        if kind == "likelihood":
            return [sums / tokens for sums, tokens in own]
        base = likelihoods(self._named(against), texts)
        return [sums - theirs for (sums, _), (theirs, _) in zip(own, base, strict=True)]

    def _named(self, name: str) -> LanguageModel:
        from hone.engine.devices import Cluster
        from hone.text.model import LanguageModel

        return LanguageModel.load(name, device=Cluster().device)
