"""Running text whose beginnings evaluation asks to be continued."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from hone.data.derived import Derived
from hone.data.sample import Sample
from hone.data.source import Split
from hone.parts import part

OPENED = "opened"  # in `extra` of the samples that are asked
_WORD = re.compile(r"\s*\S+")


@part("data", "openings", papers="original")
@dataclass(kw_only=True)
class Openings(Derived):
    """Train on running text as it is, and ask in evaluation for what follows the first words of held-out passages.

    Training and the held-out loss see the whole text, every token of it. A passage without a word behind its opening
    is not asked.

    Args:
        words: words of an opening, separated by white space.
        holdout: not used; `of` holds out its own.
    """

    words: Annotated[int, Field(ge=1)] = 24

    def questions(self, split: Split) -> Iterator[Sample]:
        """Yield the openings of a split as prompts, with the rest of each passage as answer.

        Args:
            split: "train" or "eval".
        """
        for sample in self.of.questions(split):
            if sample.kind != "text":
                yield sample
            elif parts := opening(str(sample.answers[0]), self.words):
                yield replace(sample, kind="completion", prompt=parts[0], answers=(parts[1],), extra={OPENED: True})

    def grade(self, sample: Sample, text: str) -> float | None:
        """Return None for an opening, which may be continued in many ways, else the grade by the source.

        Args:
            sample: a sample that was asked.
            text: the generated answer.
        """
        return None if OPENED in sample.extra else super().grade(sample, text)

    def describe(self) -> str:
        """Return what is opened."""
        return f"{self.of.describe()}, asked by openings of {self.words} words"


def opening(text: str, words: int) -> tuple[str, str] | None:
    """Return the first words of a text and the rest, which put together give the text; None where no word is left.

    Args:
        text: a passage.
        words: how many words go to the opening.
    """
    ends = [match.end() for match in itertools.islice(_WORD.finditer(text), words)]
    rest = text[ends[-1] :] if ends else ""
    return (text[: ends[-1]], rest) if rest.strip() else None
