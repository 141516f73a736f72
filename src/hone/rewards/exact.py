"""Rewards that compare an answer with what the data knows to be right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hone.errors import DataError
from hone.parts import part
from hone.rewards.base import Attempt, Reward

if TYPE_CHECKING:
    from hone.data.source import Source


@part("reward", "exact", papers="original")
@dataclass(kw_only=True)
class Exact(Reward):
    """Reward a right final answer, as the data's own grade tells it.

    r = right where the grade is 1, partial where an answer ended but is wrong, else wrong; an empty one is wrong

    Args:
        right: worth of a right answer.
        partial: worth of a wrong answer that the model ended itself, if it wrote one.
        wrong: worth of anything else.
    """

    right: float = 1.0
    partial: float = 0.0
    wrong: float = 0.0

    def score(self, attempts: Sequence[Attempt], source: Source) -> list[float]:
        """Return the worth of each attempt.

        Args:
            attempts: all answers of a phase.
            source: the data that was asked.

        Raises:
            DataError: the data cannot tell.
        """
        return [self._one(attempt, source.grade(attempt.sample, attempt.whole)) for attempt in attempts]

    def _one(self, attempt: Attempt, grade: float | None) -> float:
        if grade is None:
            raise DataError(
                f"{attempt.sample.where}: reward 'exact' needs data with right answers: a column 'answer', or "
                "completions to compare with"
            )
        if grade == 1:
            return self.right
        return self.partial if attempt.stopped and attempt.whole.strip() else self.wrong
