"""What a listener makes of answers: how often wrong ones are accepted, and right ones; and how much is said."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hone.data.listener import TONES, acceptance, untoned
from hone.data.sample import Sample
from hone.parts import part

if TYPE_CHECKING:
    from hone.data.source import Source


@part(
    "metric",
    "accepted-wrong",
    papers=[
        (
            "LACIE: Listener-Aware Finetuning for Confidence Calibration in Large Language Models",
            "arXiv:2405.21028",
        )
    ],
    claim="Listener-aware fine-tuning lowers the share of wrong answers that people accept by 47%.",
    deviations="The listener is a table of words, as in data `lacie`.",
)
@dataclass(kw_only=True)
class AcceptedWrong:
    """Share of wrong answers that a listener accepts for their tone; answers without a tone are accepted.

    Args:
        tones: how likely a listener accepts an answer by the tone in its last line.
    """

    tones: dict[str, float] = field(default_factory=lambda: dict(TONES))
    right = 0.0

    def __call__(self, source: Source, sample: Sample, text: str) -> float | None:
        """Return how likely a generated answer is accepted.

        Args:
            source: the source that the sample came from, which grades.
            sample: the sample that was asked.
            text: the generated answer.

        Returns:
            None where the answer is not of the kind that is counted.
        """
        if source.grade(sample, untoned(text, self.tones)) != self.right:
            return None
        chance = acceptance(text, self.tones)
        return 1.0 if chance is None else chance


@part("metric", "accepted-right", papers="original")
@dataclass(kw_only=True)
class AcceptedRight(AcceptedWrong):
    """Share of right answers that a listener accepts for their tone; answers without a tone are accepted."""

    right = 1.0


@part("metric", "lines", papers="original")
@dataclass(kw_only=True)
class Lines:
    """Mean number of lines of a generated answer that hold something."""

    def __call__(self, source: Source, sample: Sample, text: str) -> float | None:
        """Return the number of lines.

        Args:
            source: not used.
            sample: not used.
            text: the generated answer.
        """
        return float(sum(bool(line.strip()) for line in text.splitlines()))
