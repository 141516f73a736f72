"""Confidence in words: answers that end with a tone, and pairs that a listener's judgement of that tone makes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from hone.data.derived import Derived, plain_pair
from hone.data.sample import Sample
from hone.data.sampled import ModelMade
from hone.data.source import Split
from hone.parts import part

TONES = {"certainly": 0.95, "probably": 0.7, "perhaps": 0.3, "no idea": 0.05}
Chance = Annotated[float, Field(ge=0, le=1)]
# Worth of an answer that is (right, accepted): the authors' numbers.
WORTH = {(True, True): 1.0, (False, False): 1.0, (True, False): -0.5, (False, True): -1.0}


def acceptance(text: str, tones: dict[str, float]) -> float | None:
    """Return how likely a listener accepts an answer who hears its tone alone; None where it has none.

    Args:
        text: the answer, whose last line is its tone.
        tones: how likely an answer with each is accepted.
    """
    lines = text.rstrip("\n").split("\n")
    return tones.get(lines[-1].strip()) if len(lines) > 1 else None


def untoned(text: str, tones: dict[str, float]) -> str:
    """Return an answer without the line of its tone, which is no part of what is right or wrong.

    Args:
        text: the answer, with a tone or without.
        tones: how likely an answer with each is accepted.
    """
    return text if acceptance(text, tones) is None else text.rstrip("\n").rpartition("\n")[0]


@part("data", "toned", papers="original")
@dataclass(kw_only=True)
class Toned(Derived):
    """Let every answer of another source end with a line that says how sure it is, drawn blindly.

    A model that learns from it says each tone as often, right or wrong: the start for learning to mean it.

    Args:
        tones: what may be said, and how likely a listener accepts an answer that says so.
        seed: tones are drawn from it and the prompt.
    """

    tones: dict[str, Chance] = field(default_factory=lambda: dict(TONES))
    seed: int = 0

    def changed(self, samples: Iterator[Sample], split: Split) -> Iterator[Sample]:
        """Yield the samples with a tone behind their answers.

        Args:
            samples: those of the source.
            split: "train" or "eval".

        Raises:
            DataError: a sample is no prompt with an answer in plain text.
        """
        names = sorted(self.tones)
        for sample in samples:
            prompt, answer = plain_pair(sample, "toned")
            tone = names[int(Random(f"{self.seed}:{split}:{prompt}").random() * len(names))]
            yield replace(sample, answers=(f"{answer}\n{tone}",))

    def grade(self, sample: Sample, text: str) -> float | None:
        """Return the grade by the source, whatever the tones of the answer and of the sample's own.

        Args:
            sample: a sample with or without a tone.
            text: the generated answer.
        """
        plain = tuple(untoned(one, self.tones) if isinstance(one, str) else one for one in sample.answers)
        return super().grade(replace(sample, answers=plain), untoned(text, self.tones))

    def describe(self) -> str:
        """Return whose answers have a tone."""
        return f"toned answers of {self.of.describe()}"


@part(
    "data",
    "lacie",
    papers=[
        (
            "LACIE: Listener-Aware Finetuning for Confidence Calibration in Large Language Models",
            "arXiv:2405.21028",
        )
    ],
    claim="Preferring answers by whether a listener who hears their tone alone judges rightly calibrates what a model "
    "says of its confidence: fewer wrong answers are accepted, and as many right ones.",
    deviations="Ranks, threshold and margin were checked against the authors' code. The listener is a table of words "
    "instead of a language model that sees the answer without its content, so tone is explicit only.",
)
@dataclass(kw_only=True)
class Lacie(ModelMade):
    """Pairs of the model's own answers by what a listener makes of their tone, for preference objectives.

    worth: right and accepted 1, wrong and rejected 1, right and rejected -1/2, wrong and accepted -1

    An answer is accepted when its chance is above the threshold. Pairs of equal worth, or whose chances differ by less
    than `apart`, are left out. Answers without a tone are left out.

    Args:
        tones: how likely a listener accepts an answer by the tone in its last line.
        threshold: chance above which an answer counts as accepted; None takes the median over all answers, each as
            often as it was drawn.
        apart: least difference of the chances of a pair.
        pairs: most pairs to a prompt.
        listener: judge by the listener; otherwise by right and wrong alone, the baseline of the paper.
    """

    tones: dict[str, Chance] = field(default_factory=lambda: dict(TONES))
    threshold: Chance | None = None
    apart: Chance = 0.1
    pairs: Annotated[int, Field(ge=1)] = 3
    listener: bool = True

    def _choices(self) -> list[Any]:
        return [sorted(self.tones.items()), self.threshold, self.apart, self.pairs, self.listener]

    def describe(self) -> str:
        """Return whose answers are heard."""
        return f"{self.samples_each} answers to each prompt of {self.of.describe()}, as a listener judges them"

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the pairs, in the order of the source's prompts.

        Args:
            split: "train" or "eval".

        Raises:
            DataError: the source cannot tell right answers, or no model answers.
        """
        return itertools.islice(self._made(split), self.limit if split == "train" else None)

    def grade(self, sample: Sample, text: str) -> float | None:
        """Return the grade by the source, whatever the tone of the answer.

        Args:
            sample: a sample of the source.
            text: the generated answer.
        """
        return super().grade(sample, untoned(text, self.tones))

    def _made(self, split: Split) -> Iterator[Sample]:
        asked = self._open(split)
        heard = [
            [(text, chance) for text in texts if (chance := acceptance(text, self.tones)) is not None]
            for texts in self.answers(asked, split)
        ]
        chances = [chance for found in heard for _, chance in found]
        threshold = self.threshold if self.threshold is not None else float(np.median(chances)) if chances else 0.5
        for sample, found in zip(asked, heard, strict=True):
            judged = {text: (self.is_right(sample, text), chance) for text, chance in dict(found).items()}
            pairs = self.ranked(judged, threshold)
            yield from (replace(sample, kind="pair", answers=pair) for pair in pairs)

    def ranked(self, judged: dict[str, tuple[bool, float]], threshold: float) -> list[tuple[str, str]]:
        """Return the (preferred, other) pairs of answers to one prompt.

        Args:
            judged: whether each answer is right, and its chance of being accepted.
            threshold: chance above which it counts as accepted.
        """
        found = []
        for (one, (right, chance)), (other, (good, odds)) in itertools.combinations(judged.items(), 2):
            if self.listener:
                first, second = WORTH[right, chance > threshold], WORTH[good, odds > threshold]
                if abs(chance - odds) < self.apart:
                    continue
            else:
                first, second = float(right), float(good)
            if first != second:
                found.append((one, other) if first > second else (other, one))
        return found[: self.pairs]
