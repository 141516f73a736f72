"""Task accuracy: whether a generated answer is right, by the data's own notion of right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hone.data.sample import Sample
from hone.parts import part

if TYPE_CHECKING:
    from hone.data.source import Source


@part("metric", "accuracy", papers="original")
@dataclass(kw_only=True)
class Accuracy:
    """Share of correct answers: of those generated, how many the data source grades as right."""

    def __call__(self, source: Source, sample: Sample, text: str) -> float | None:
        """Return the source's grade of a generated answer.

        Args:
            source: the source that the sample came from.
            sample: the sample that was asked.
            text: the generated answer.

        Returns:
            1 for right, 0 for wrong, None when the source has no notion of right for the sample.
        """
        return source.grade(sample, text)
