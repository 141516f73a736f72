"""What every reward is: numbers for the answers that a model gave, and for parts of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from hone import parts
from hone.data.sample import Sample
from hone.errors import HoneError

if TYPE_CHECKING:
    from hone.data.source import Source


@dataclass(frozen=True, eq=False)
class Attempt:
    """One answer of the model to one prompt.

    Args:
        sample: what was asked; its extra columns hold what the source knows, e.g. the exact answer.
        text: the answer.
        tokens: (n,) its ids, without the stop token.
        stopped: whether the model ended it; False where it ran out of tokens.
        group: number of the prompt in its phase; attempts on one prompt share it.
        before: what the model has been given of the answer already, in front of `text`.
    """

    sample: Sample
    text: str
    tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    stopped: bool = True
    group: int = 0
    before: str = ""

    @property
    def whole(self) -> str:
        """The answer with what the model was given of it."""
        return self.before + self.text


@dataclass(frozen=True)
class Score:
    """What an attempt is worth.

    Args:
        value: the worth of the whole, credited at its end.
        steps: (end, worth) of parts, each credited at the last token of `text[:end]`; they come beside `value`.
    """

    value: float
    steps: tuple[tuple[int, float], ...] = ()

    @property
    def total(self) -> float:
        """The worth of the whole and of all parts."""
        return self.value + sum(worth for _, worth in self.steps)


@dataclass(kw_only=True)
class Reward(ABC):
    """A way to judge answers. Several are added up, each with its weight.

    Args:
        weight: factor on what this reward gives.
        scale: "none", or "group": give z-scores among the answers to one prompt, so that no scale dominates.
    """

    name: ClassVar[str]
    kind: ClassVar[str]
    weight: float = 1.0
    scale: Literal["none", "group"] = "none"

    def setup(self, run: Any) -> None:  # noqa: B027 - most have nothing to prepare
        """Prepare once before the first phase, e.g. load a model onto the run's device; here nothing.

        Args:
            run: the run in progress (`engine/loop.py: Run`).
        """

    def longest(self, answers: int) -> float:
        """Return how many seconds the reward takes at most by limits of its own, 0 where it has none.

        Args:
            answers: how many it judges.
        """
        return 0.0

    def texts(self, attempts: Sequence[Attempt]) -> int:
        """Return how many answers the reward judges for some attempts, which is what `longest` is asked about.

        Args:
            attempts: all answers of a phase; most rewards judge each as a whole.
        """
        return len(attempts)

    @abstractmethod
    def score(self, attempts: Sequence[Attempt], source: Source) -> Sequence[float | Score]:
        """Return the worth of each attempt, in their order.

        Args:
            attempts: all answers of a phase.
            source: the data that was asked, which knows how to grade.
        """


def complete(reward: Reward, attempts: Sequence[Attempt], source: Source) -> list[Any]:
    """Return what a reward gives for attempts, one for each.

    Args:
        reward: it.
        attempts: what it judges.
        source: the data that was asked.

    Raises:
        HoneError: it gives more or fewer.
    """
    made = list(reward.score(attempts, source))
    if len(made) != len(attempts):
        raise HoneError(
            f"reward '{reward.name}' gave {len(made)} scores for {len(attempts)} answers; expected one for each, in "
            "their order"
        )
    return made


Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


@dataclass(kw_only=True)
class Called(Reward):
    """The base of rewards that a function of the user's gives; `from_function` makes a subclass of it."""

    function: ClassVar[Callable[[Any, str, Sample], float | Score]]

    def score(self, attempts: Sequence[Attempt], source: Source) -> list[float | Score]:
        """Return what the function gives for each attempt.

        Args:
            attempts: all answers of a phase.
            source: not looked at.
        """
        return [
            _behind(len(attempt.before), type(self).function(attempt.sample.prompt, attempt.whole, attempt.sample))
            for attempt in attempts
        ]


def _behind(given: int, score: float | Score) -> float | Score:
    """Return a score of a whole answer with its steps counted in what the model wrote.

    Args:
        given: characters of a hint before it; what steps inside the hint are worth goes to the whole.
        score: what a function gave.
    """
    if not given or not isinstance(score, Score):
        return score
    inside = sum(worth for end, worth in score.steps if end <= given)
    return Score(score.value + inside, tuple((end - given, worth) for end, worth in score.steps if end > given))


def from_function(name: str, function: Callable[[Any, str, Sample], float | Score]) -> type[Reward]:
    """Make a reward of a function, under a name that recipes of this process may use from now on.

    >>> def short(prompt, text, sample):
    ...     return 1.0 if len(text) < 80 else 0.0
    >>> from_function("short", short)
    >>> recipe = Recipe.of(data={"name": "rollouts", "of": "chains", "rewards": ["short"]}, objective="grpo")

    This is the way for code of one's own: a recipe never makes hone import anything. Several processes, and whoever
    opens the run later, must call it too. Calling it again with the same name replaces the function.

    Args:
        name: what recipes call it; no name that hone's own rewards have.
        function: (prompt, answer, sample) -> worth; the sample's `extra` holds other columns of the data.

    Returns:
        The part's class, with the options `weight` and `scale`.

    Raises:
        HoneError: hone has a reward of this name, or it holds a colon.
    """
    made = type("Called", (Called,), {"__doc__": function.__doc__ or f"Call {function.__name__}.", "function": None})
    made.function = staticmethod(function)  # type: ignore[attr-defined]
    return parts.add("reward", name, dataclass(kw_only=True)(made))
