"""Directions of preference in the prompt: answers chosen by a weighted sum of rewards that the prompt names."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from hone.data.sample import Sample
from hone.data.sampled import ModelMade, prompt_text, reference
from hone.data.source import Split
from hone.parts import part

Angle = Annotated[float, Field(ge=-180, le=180)]
FIRST = "first_prompt"  # column with the source's own prompt


def direction(degrees: float) -> tuple[float, float]:
    """Return the unit vector (cos, sin) of an angle.

    Args:
        degrees: the angle.
    """
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


@part(
    "data",
    "directed",
    papers=[
        (
            "Arithmetic Control of LLMs for Diverse User Preferences: Directional Preference Alignment with "
            "Multi-Objective Rewards",
            "arXiv:2402.18571",
        )
    ],
    claim="A model that learns, for directions written into the prompt, the sampled answer with the largest reward in "
    "that direction is steered by the user's weights, e.g. to more helpful or shorter answers.",
    deviations="The two rewards are the source's grade and the number of lines, both exact, in place of a regression "
    "model with several outputs. Weights are whole numbers of hundredths, as in the authors' prompts; theirs are named "
    "in a sentence of the system prompt.",
)
@dataclass(kw_only=True)
class Directed(ModelMade):
    """Rejection sampling along directions of preference, which stand in front of the prompt.

    v = (cos a, sin a), a drawn for each prompt;  answer = argmax_y v . (right(y), length(y))

    right is 1 for a right answer, length the number of lines over `lines`, at most 1. Repeat it in stages, each drawing
    from the model of the one before.

    Args:
        make: "best" (the best of the sampled answers), or "own" (the source's answer behind a drawn direction, for the
            first stage, in which a model only learns what the prompts look like).
        degrees: smallest and largest angle; 0 asks for right answers alone, positive ones for long, negative for short.
        asked: angle that evaluation asks for.
        lines: lines of an answer at which its length counts 1.
        frame: how a direction is written: {right}, {length} and {prompt}.
    """

    make: Literal["best", "own"] = "best"
    degrees: Annotated[list[Angle], Field(min_length=2, max_length=2)] = field(default_factory=lambda: [-45.0, 45.0])
    asked: Angle = 0.0
    lines: Annotated[int, Field(ge=1)] = 4
    frame: str = "right*{right} length*{length}\n{prompt}"

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the frame and the angles."""
        for name in ("right", "length", "prompt"):
            if f"{{{name}}}" not in self.frame:
                yield "frame", f"expected a text with {{{name}}} in it"
        if len(self.degrees) == 2 and self.degrees[0] > self.degrees[1]:
            yield "degrees", "expected the smaller angle first"

    def _choices(self) -> list[Any]:
        return [self.make, self.degrees, self.asked, self.lines, self.frame]

    def describe(self) -> str:
        """Return what is chosen from."""
        return f"{self.make} answers to the prompts of {self.of.describe()} along drawn directions"

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the chosen answers behind their directions, in the order of the source's prompts.

        Args:
            split: "train" or "eval"; held-out samples have the source's own answers.

        Raises:
            DataError: the source cannot tell right answers, or no model answers.
        """
        made = self._best(split) if self.make == "best" and split == "train" else self._own(split)
        return itertools.islice(made, self.limit if split == "train" else None)

    def questions(self, split: Split) -> Iterator[Sample]:
        """Yield the prompts of the source behind the direction that evaluation asks for.

        Args:
            split: "train" or "eval".
        """
        return (self.written(sample, self.asked) for sample in self.of.questions(split))

    def grade(self, sample: Sample, text: str) -> float | None:
        """Return the grade by the source, of the answer to its own prompt.

        Args:
            sample: a sample with or without a direction.
            text: the generated answer.
        """
        return super().grade(replace(sample, prompt=sample.extra.get(FIRST, sample.prompt)), text)

    def written(self, sample: Sample, degrees: float) -> Sample:
        """Return a sample with a direction in front of its prompt.

        Args:
            sample: of the source.
            degrees: the direction's angle.
        """
        right, length = (str(round(100 * part)) for part in direction(degrees))
        prompt = self.frame.replace("{right}", right).replace("{length}", length)
        return replace(
            sample, prompt=prompt.replace("{prompt}", prompt_text(sample)),
            extra={**sample.extra, FIRST: sample.prompt, "degrees": degrees},
        )  # fmt: skip

    def rewards(self, sample: Sample, text: str) -> tuple[float, float]:
        """Return what an answer is worth: whether it is right, and its length.

        Args:
            sample: what was asked.
            text: the answer.
        """
        lines = sum(bool(line.strip()) for line in text.splitlines())
        return float(self.is_right(sample, text)), min(1.0, lines / self.lines)

    def _drawn(self, split: Split) -> list[Sample]:
        low, high = self.degrees
        return [
            self.written(sample, low + (high - low) * Random(f"{self.seed}:{split}:{number}").random())
            for number, sample in enumerate(self.of.samples(split))
        ]

    def _own(self, split: Split) -> Iterator[Sample]:
        yield from (replace(sample, kind="completion", answers=(reference(sample),)) for sample in self._drawn(split))

    def _best(self, split: Split) -> Iterator[Sample]:
        asked = self._drawn(split)
        for sample, texts in zip(asked, self.answers(asked, split), strict=True):
            found = [text for text in dict.fromkeys(texts) if text.strip()]
            if found:
                weights = direction(sample.extra["degrees"])
                worth = [float(np.dot(weights, self.rewards(sample, text))) for text in found]
                yield replace(sample, kind="completion", answers=(found[worth.index(max(worth))],))
