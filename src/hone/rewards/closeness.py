"""A reward for numbers that are nearly right, and its two controls that say nothing or the opposite."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from hone.data.answers import final_answer, number
from hone.errors import DataError
from hone.parts import part
from hone.rewards.base import Attempt, Reward

if TYPE_CHECKING:
    from hone.data.source import Source


@part(
    "reward",
    "closeness",
    papers=[
        (
            "Reasoning or Memorization? Unreliable Results of Reinforcement Learning Due to Data Contamination",
            "arXiv:2507.10532",
        )
    ],
    claim="On problems that cannot have leaked into pretraining, only right rewards teach.",
    deviations="The form is ours: the paper's reward falls with the distance from the right number and could not be "
    "verified.",
)
@dataclass(kw_only=True)
class Closeness(Reward):
    """Reward a number by how near it is to the right one: r = 1 / (1 + |x - y| / max(1, |y|)), 0 without a number.

    Args:
        signal: "right"; "random": a number drawn from a hash of the answer, which says nothing; "inverted": 1 - r.
    """

    signal: Literal["right", "random", "inverted"] = "right"

    def score(self, attempts: Sequence[Attempt], source: Source) -> list[float]:
        """Return the worth of each attempt.

        Args:
            attempts: all answers of a phase.
            source: not looked at; the right number is the column "answer".

        Raises:
            DataError: a sample has no right number.
        """
        return [self._one(attempt) for attempt in attempts]

    def _one(self, attempt: Attempt) -> float:
        if self.signal == "random":
            text = f"{attempt.sample.where}:{attempt.whole}"
            return int(hashlib.blake2b(text.encode(), digest_size=4).hexdigest(), 16) / 2**32
        right = number(str(attempt.sample.extra.get("answer", "")))
        if right is None:
            raise DataError(
                f"{attempt.sample.where}: reward 'closeness' needs a number of at most 100 digits, such as -3/2 or "
                "0.5, in a column called 'answer'"
            )
        found = number(final_answer(attempt.whole))
        near = 0.0 if found is None else float(1 / (1 + abs(found - right) / max(Fraction(1), abs(right))))
        return near if self.signal == "right" else 1 - near
