"""Two kinds of annotation bought from one budget: demonstrations, and preferences between answers."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from hone.data.sample import Sample
from hone.data.source import Source, Split
from hone.options import Nested
from hone.parts import part


@part(
    "data",
    "annotated",
    papers=[
        (
            "Balancing the Budget: Understanding Trade-offs Between Supervised and Preference-Based Finetuning",
            "arXiv:2502.11284",
        )
    ],
    claim="Preference tuning straight from the base model suffers a cold start; a tenth of the budget spent on "
    "demonstrations first mends it.",
    deviations="Verified from the abstract and summaries.",
)
@dataclass(kw_only=True)
class AnnotatedData(Source):
    """Share a budget out between demonstrations and preference pairs, so that one number decides both.

    Named once for a run with two stages: a stage whose objective learns from pairs gets the pairs, (1 - share) budget /
    price of them, any other stage the demonstrations, share budget. Either is at least one sample: a stage that shall
    train on none has steps: 0.

    Args:
        demonstrations: source of prompts with answers, which evaluation asks and grades.
        preferences: source of pairs.
        budget: what all annotations may cost, in demonstrations.
        share: share of the budget that is spent on demonstrations.
        price: cost of a pair, in demonstrations.
        holdout: not used; the sources hold out their own.
    """

    demonstrations: Annotated[Any, Nested("data")]
    preferences: Annotated[Any, Nested("data")]
    budget: Annotated[int, Field(gt=0)]
    share: Annotated[float, Field(ge=0, le=1)] = 0.25
    price: Annotated[float, Field(gt=0)] = 1.0
    _pairs: bool = field(default=False, init=False, repr=False)

    def suit(self, consumes: str) -> None:
        """Give pairs to an objective that learns from pairs, else demonstrations.

        Args:
            consumes: what the objective consumes.
        """
        super().suit(consumes)
        self._pairs = consumes in ("pairs", "judged")

    @property
    def bought(self) -> int:
        """How many samples of the kind that is asked for the budget buys."""
        cost = (1 - self.share) * self.budget / self.price if self._pairs else self.share * self.budget
        return max(1, round(cost))

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the samples of a split, in the order of their source.

        Args:
            split: "train" (as many as were bought) or "eval".
        """
        source = self.preferences if self._pairs else self.demonstrations
        return itertools.islice(source.samples(split), self.bought if split == "train" else None)

    def questions(self, split: Split) -> Iterator[Sample]:
        """Yield the samples that evaluation asks: those of the demonstrations.

        Args:
            split: "train" or "eval".
        """
        found: Iterator[Sample] = self.demonstrations.questions(split)
        return found

    def evaluation_split(self) -> Split:
        """Return the split that the demonstrations are evaluated on."""
        split: Split = self.demonstrations.evaluation_split()
        return split

    def grade(self, sample: Sample, text: str) -> float | None:
        """Return the grade by the source of the demonstrations.

        Args:
            sample: a sample of it.
            text: the generated answer.
        """
        grade: float | None = self.demonstrations.grade(sample, text)
        return grade

    def fingerprint(self) -> str:
        """Return a hash of the source that is asked for, of how much of it was bought, and of the code."""
        source = self.preferences if self._pairs else self.demonstrations
        code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        return hashlib.sha256(json.dumps(["annotated", source.fingerprint(), self.bought, code]).encode()).hexdigest()

    def describe(self) -> str:
        """Return what was bought."""
        source, what = (self.preferences, "pairs") if self._pairs else (self.demonstrations, "demonstrations")
        return f"{self.bought} {what} for {self.budget}: {source.describe()}"
