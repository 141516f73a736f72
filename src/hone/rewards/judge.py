"""Calling rewards: what they give is checked, a bad one is named with its sample, and none can hang a run.

A reward that raises, gives something that is no finite number, or does not come back, names the answers that it fails
on; they end the run with "file:line", or are left out and counted. A call that takes longer than `patience` is
interrupted: in the main thread by an alarm, which also ends endless loops and slow regular expressions; elsewhere the
thread that it runs in is given up. Only foreign code that never returns to Python holds out against both.
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
from hone.rewards.base import Attempt, Reward, Score, complete

if TYPE_CHECKING:
    from hone.data.source import Source

log = logging.getLogger("hone")
SKIP = "on_error: skip leaves such answers out and counts them"
MEND = "Mend what it waits for, or give it more time with `patience`"
HANGS = 3  # answers in a row, each for `patience`: what waits for a server that is gone would wait for days
LARGEST = 1e30  # of a number, with its weight and without: float32 holds it, and no sum or square of such overflows


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
        on_error: "raise" ends the run at the first bad score, "skip" leaves the answer out and says how many; these
            may be all.
        patience: longest time that one call of a reward may take, in seconds: for all attempts, and for one alone when
            those are sought that it fails on.

    Raises:
        HoneError: a reward is bad, by `on_error`; or, whatever that says, it fails on all attempts together and on none
            alone, or hangs on several in a row.
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
    if not attempts:
        return []
    whole: BaseException
    try:
        return list(_asked(reward, attempts, source, patience))
    except (Exception, SystemExit) as error:  # of whatever a reward does
        whole = error
    if isinstance(whole, _Late) and not skip:  # one by one, each might take as long again
        raise _together(reward, whole, skip)
    found, first = _one_by_one(reward, attempts, source, skip, patience)
    if first is None:  # each one alone goes well: the reward cannot take several
        raise _together(reward, whole, skip) from whole
    bad = sum(score is None for score in found)
    log.warning("%d of %d answers are left out, the first because of %s", bad, len(attempts), first)
    kept = [i for i, score in enumerate(found) if score is not None]
    again = _scores(reward, [attempts[i] for i in kept], source, skip, patience)
    for i, score in zip(kept, again, strict=True):
        found[i] = score
    return found


def _one_by_one(
    reward: Reward, attempts: Sequence[Attempt], source: Source, skip: bool, patience: float
) -> tuple[list[Score | None], HoneError | None]:
    """Return what a reward gives for each attempt alone, None where it fails, and how it failed first."""
    found: list[Score | None] = []
    first: HoneError | None = None
    hung = 0
    for attempt in attempts:
        try:
            found += _asked(reward, [attempt], source, patience)
            hung = 0
        except (Exception, SystemExit) as error:
            told = _told(reward, attempt, error)
            if not skip:
                raise told from error
            hung = hung + 1 if isinstance(error, _Late) else 0
            if hung == HANGS:
                raise _retold(told, f"{told}\nSo it was with {HANGS} answers in a row, so none is left out") from error
            first = first or told
            found.append(None)
    return found, first


def _asked(reward: Reward, attempts: Sequence[Attempt], source: Source, patience: float) -> list[Score]:
    """Return what a reward gives, after checking it."""
    watched = Watched(attempts)
    seconds = max(patience, reward.longest(reward.texts(attempts)))  # programs that wait until their end are no hang
    try:
        made = bounded(lambda: complete(reward, watched, source), seconds)
    except Impatient:
        raise _Late(seconds, watched.last) from None
    return [_checked(reward, *pair) for pair in zip(attempts, made, strict=True)]


class _Late(Exception):
    """A reward did not come back."""

    def __init__(self, seconds: float, last: Attempt | None) -> None:
        super().__init__(f"did not come back within {seconds:g} s")
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
    numbers = [_number(worth, reward.weight) for worth in worths]
    for end in places:
        if not isinstance(end, int) or not 0 < end <= len(attempt.text):
            raise _Bad(f"gave a step that ends at {end!r}; expected a place from 1 to {len(attempt.text)} in the text")
    return Score(numbers[0], tuple(zip(places, numbers[1:], strict=True)))


def _number(worth: Any, weight: float) -> float:
    """Return a worth as a number that can be weighted and added up."""
    try:
        number = math.nan if isinstance(worth, str | bytes | None) else float(worth)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        raise _Bad(f"gave {worth!r}; expected a finite number or a Score")
    if not (abs(number) <= LARGEST and abs(weight * number) <= LARGEST):
        raise _Bad(
            f"gave {worth!r} and has weight {weight:g}; expected numbers of at most {LARGEST:g}, with the weight and "
            "without"
        )
    return number


def _told(reward: Reward, attempt: Attempt, error: BaseException) -> HoneError:
    """Return an error for the user that names the reward, the sample and the way out."""
    if isinstance(error, HoneError):  # written for the user already, but by code that may not know all of these
        return _retold(error, f"{_named(reward, attempt.sample.where, str(error)).rstrip('.')}. {SKIP}")
    shown = attempt.text if len(attempt.text) <= 80 else attempt.text[:77] + "..."
    way = f"{MEND}; {SKIP}" if isinstance(error, _Late) else SKIP
    return HoneError(f"{attempt.sample.where}: reward '{reward.name}' {_what(error)}; the answer was {shown!r}. {way}")


def _together(reward: Reward, error: BaseException, skip: bool) -> HoneError:
    """Return an error for the user about a reward that fails on several attempts together."""
    alone = "; each answer alone goes well"
    if isinstance(error, _Late):
        place = f"; it looked last at an answer to {error.last.sample.where}" if error.last is not None else ""
        way = f"{alone}. {MEND}" if skip else f". {MEND}; {SKIP}"
        return HoneError(f"reward '{reward.name}' {error}{place}{way}")
    alone += ", so it must not mix them up"
    if isinstance(error, HoneError):
        return _retold(error, _named(reward, "", str(error)) + alone)
    return HoneError(f"reward '{reward.name}' {_what(error)}{alone}")


def _what(error: BaseException) -> str:
    """Return what a reward did."""
    return str(error) if isinstance(error, _Bad | _Late) else f"raised {type(error).__name__}: {error}"


def _named(reward: Reward, place: str, text: str) -> str:
    """Return a message that begins with the place, and names the reward behind it, as far as it did not do so."""
    begins = text.startswith(f"{place}: ")
    said = text.removeprefix(f"{place}: ")
    if f"reward '{reward.name}'" not in said:
        said = f"reward '{reward.name}': {said}"
    return f"{place}: {said}" if begins or place not in said else said


def _retold(error: HoneError, text: str) -> HoneError:
    """Return an error of the same class with another message; some classes make theirs of other arguments."""
    made = type(error).__new__(type(error), text)
    vars(made).update(vars(error))
    return made


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
