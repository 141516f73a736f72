"""Calling rewards: what they give is checked, a bad one is named with its sample, and none can hang a run.

A reward that raises, or gives something that is no finite number, names the answers that it fails on; they end the run
with "file:line", or are left out and counted. One that does not come back is interrupted after `patience`: in the
main thread by an alarm, which also ends endless loops and slow regular expressions; elsewhere the thread that it runs
in is given up. Only foreign code that never returns to Python holds out against both.
"""

from __future__ import annotations

import logging
import math
import signal
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

from hone.errors import HoneError
from hone.rewards.base import Attempt, Reward, Score

if TYPE_CHECKING:
    from hone.data.source import Source

log = logging.getLogger("hone")
SKIP = "on_error: skip leaves such answers out and counts them"


@dataclass(frozen=True)
class Appraised:
    """What an attempt is worth by all rewards together.

    Args:
        total: the sum over all rewards.
        parts: what each reward added to it, by its name; a second one of a name is called "NAME-2".
        steps: (end, worth) of parts of the text, in order; they are in `total` already.
    """

    total: float
    parts: dict[str, float] = field(default_factory=dict)
    steps: tuple[tuple[int, float], ...] = ()

    @property
    def value(self) -> float:
        """What is credited to the answer as a whole: the total without the parts of the text."""
        return self.total - sum(worth for _, worth in self.steps)


class Impatient(BaseException):
    """A reward took too long; no `except Exception` inside it may catch this."""


class Watched(Sequence[Attempt]):
    """The attempts, which remember the one that was looked at last."""

    def __init__(self, attempts: Sequence[Attempt]) -> None:
        """Wrap attempts.

        Args:
            attempts: what is handed to a reward.
        """
        self.attempts = attempts
        self.last: Attempt | None = None

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self.attempts)

    @overload
    def __getitem__(self, index: int) -> Attempt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Attempt]: ...
    def __getitem__(self, index: int | slice) -> Attempt | Sequence[Attempt]:
        """Return one, or several, and remember the one."""
        found = self.attempts[index]
        if isinstance(found, Attempt):
            self.last = found
        return found


def judge(
    rewards: Sequence[Reward], attempts: Sequence[Attempt], source: Source, *, on_error: str, patience: float
) -> list[Appraised | None]:
    """Return what each attempt is worth, None for those that a reward could not score.

    Args:
        rewards: asked one after the other.
        attempts: all answers of a phase.
        source: the data that was asked.
        on_error: "raise" ends the run at the first bad score, "skip" leaves the answer out and says how many.
        patience: longest time that one reward may take for all attempts, in seconds.

    Raises:
        HoneError: a reward is bad, by `on_error`; or it takes too long, or fails on every answer, whatever that says.
    """
    if not attempts:
        return []
    found = [_scores(reward, attempts, source, on_error == "skip", patience) for reward in rewards]
    good = [i for i in range(len(attempts)) if all(scores[i] is not None for scores in found)]
    names = _names(rewards)
    parts: list[dict[str, float]] = [{} for _ in attempts]
    steps: list[list[tuple[int, float]]] = [[] for _ in attempts]
    for name, reward, scores in zip(names, rewards, found, strict=True):
        known = {i: score for i in good if (score := scores[i]) is not None}
        if reward.scale == "group":
            known = standardised(known, attempts)
        for i, score in known.items():
            parts[i][name] = reward.weight * score.total
            steps[i] += [(end, reward.weight * worth) for end, worth in score.steps]
    judged: list[Appraised | None] = [None] * len(attempts)
    for i in good:
        ordered = tuple(sorted(steps[i], key=lambda step: step[0]))
        judged[i] = Appraised(math.fsum(parts[i].values()), parts[i], ordered)
    return judged


def standardised(scores: dict[int, Score], attempts: Sequence[Attempt]) -> dict[int, Score]:
    """Return scores whose totals are z-scores among the answers to one prompt.

    The mean is taken off the worth of the whole, and everything is divided by the standard deviation (that of a
    sample, n - 1). Where all answers to a prompt are worth the same, they are worth nothing.

    Args:
        scores: by the number of the attempt.
        attempts: tell which of them share a prompt.
    """
    groups: dict[int, list[int]] = {}
    for i in scores:
        groups.setdefault(attempts[i].group, []).append(i)
    made: dict[int, Score] = {}
    for members in groups.values():
        totals = [scores[i].total for i in members]
        mean = math.fsum(totals) / len(totals)
        spread = statistics.stdev(totals) if len(totals) > 1 else 0.0
        factor = 1 / spread if spread > 1e-8 * max(1.0, abs(mean)) else 0.0
        for i in members:
            old = scores[i]
            made[i] = Score((old.value - mean) * factor, tuple((end, worth * factor) for end, worth in old.steps))
            if not factor:
                made[i] = Score(0.0)
    return {i: made[i] for i in scores}


def _names(rewards: Sequence[Reward]) -> list[str]:
    """Return a name for each reward; the second and later ones of a name get a number."""
    seen: Counter[str] = Counter()
    names = []
    for reward in rewards:
        seen[reward.name] += 1
        names.append(reward.name if seen[reward.name] == 1 else f"{reward.name}-{seen[reward.name]}")
    return names


def _scores(
    reward: Reward, attempts: Sequence[Attempt], source: Source, skip: bool, patience: float
) -> list[Score | None]:
    """Return what a reward gives for all attempts, None where it cannot."""
    patience = max(patience, reward.longest(len(attempts)))  # programs that all wait until their time is up are no hang
    end = time.monotonic() + patience
    try:
        return [_checked(reward, *pair) for pair in zip(attempts, _asked(reward, attempts, source, end), strict=True)]
    except _Late as late:
        raise HoneError(_late(reward, late.last, patience)) from None
    except Exception as error:  # of whatever a reward does
        whole = error
    found: list[Score | None] = []
    first: Exception | None = None
    for attempt in attempts:  # one by one, to learn which of them it fails on
        try:
            found.append(_checked(reward, attempt, _asked(reward, [attempt], source, end)[0]))
        except _Late as late:
            raise HoneError(_late(reward, late.last or attempt, patience)) from whole
        except Exception as error:
            if not skip:
                raise _told(reward, attempt, error) from error
            first = first or _told(reward, attempt, error)
            found.append(None)
    if first is None:  # each one alone goes well: the reward cannot take several
        raise _told(reward, None, whole) from whole
    bad = sum(score is None for score in found)
    if bad == len(attempts):
        raise HoneError(f"{first}\nIt is so with all {bad} answers, so that none can be left out") from whole
    log.warning("%d of %d answers are left out, the first because of %s", bad, len(attempts), first)
    kept = [i for i, score in enumerate(found) if score is not None]
    again = _scores(reward, [attempts[i] for i in kept], source, skip, max(end - time.monotonic(), 1.0))
    for i, score in zip(kept, again, strict=True):
        found[i] = score
    return found


def _asked(reward: Reward, attempts: Sequence[Attempt], source: Source, end: float) -> list[Any]:
    """Return what a reward gives, after checking how much it gives."""
    watched = Watched(attempts)
    try:
        made = bounded(lambda: list(reward.score(watched, source)), end - time.monotonic())
    except Impatient:
        raise _Late(watched.last) from None
    if len(made) != len(attempts):
        raise _Bad(f"gave {len(made)} scores for {len(attempts)} answers; expected one for each, in their order")
    return made


class _Late(Exception):
    def __init__(self, last: Attempt | None) -> None:
        self.last = last


class _Bad(Exception):
    """A reward gave something that is no score."""


def _checked(reward: Reward, attempt: Attempt, given: Any) -> Score:
    """Return a score whose numbers are finite and whose steps lie inside the text."""
    if isinstance(given, Score):
        worths = [given.value, *(worth for _, worth in given.steps)]
        places = [end for end, _ in given.steps]
    else:
        worths, places = [given], []
    numbers = [_number(worth) for worth in worths]
    for end in places:
        if not isinstance(end, int) or not 0 < end <= len(attempt.text):
            raise _Bad(f"gave a step that ends at {end!r}; expected a place from 1 to {len(attempt.text)} in the text")
    return Score(numbers[0], tuple(zip(places, numbers[1:], strict=True)))


def _number(worth: Any) -> float:
    try:
        number = math.nan if isinstance(worth, str | bytes | None) else float(worth)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise _Bad(f"gave {worth!r}; expected a finite number or a Score")
    return number


def _told(reward: Reward, attempt: Attempt | None, error: Exception) -> HoneError:
    """Return an error for the user; one that was written for the user already stays."""
    if isinstance(error, HoneError):
        return error
    what = str(error) if isinstance(error, _Bad) else f"raised {type(error).__name__}: {error}"
    if attempt is None:
        return HoneError(f"reward '{reward.name}' {what}; each answer alone goes well, so it must not mix them up")
    shown = attempt.text if len(attempt.text) <= 80 else attempt.text[:77] + "..."
    return HoneError(f"{attempt.sample.where}: reward '{reward.name}' {what}; the answer was {shown!r}. {SKIP}")


def _late(reward: Reward, last: Attempt | None, patience: float) -> str:
    place = f"; it looked last at an answer to {last.sample.where}" if last is not None else ""
    return (
        f"reward '{reward.name}' did not come back within {patience:g} s{place}. Mend what it waits for, or give it "
        "more time with `patience`"
    )


def bounded(call: Callable[[], Any], seconds: float) -> Any:
    """Return what a function gives, or interrupt it after some time.

    Args:
        call: the function.
        seconds: longest time it may take.

    Raises:
        Impatient: it took longer.
    """
    if seconds <= 0:
        raise Impatient
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        with _alarm(seconds):
            return call()
    return _apart(call, seconds)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise in this, the main, thread when time is up, and again where that was caught; an older alarm goes on."""

    def ring(number: int, frame: object) -> None:
        raise Impatient

    begun = time.monotonic()
    before = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - begun), 1e-3), interval)


def _apart(call: Callable[[], Any], seconds: float) -> Any:
    """Run a function in a thread that is given up when time is up; it ends with the process."""
    made: list[Any] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            made.append(call())
        except BaseException as error:  # handed to the thread that waits
            raised.append(error)

    thread = threading.Thread(target=run, name="reward", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise Impatient
    if raised:
        raise raised[0]
    return made[0]
