"""What becomes of rewards: weights and scales, and bad ones that are named with their sample, left out or stopped."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from families.test_rewards import SOURCE, attempt
from hone import options, parts
from hone.data.sample import Sample
from hone.errors import HoneError
from hone.rewards import text
from hone.rewards.base import Attempt, Reward, Score, from_function
from hone.rewards.code import Code, Efficiency
from hone.rewards.exact import Exact
from hone.rewards.judge import Appraised, bounded, judge
from hone.rewards.process import Hackable


@dataclass(kw_only=True)
class Bad(Reward):
    """Does something for answers that say so."""

    name = "bad"
    does: Any = None

    def score(self, attempts: Sequence[Attempt], source: Any) -> list[Any]:
        return [self.does() if one.text == "bad" else 1.0 for one in attempts]


def answers(*texts: str) -> list[Attempt]:
    return [attempt(one, group=i // 2, where=f"data.jsonl:{i + 1}") for i, one in enumerate(texts)]


def tried(reward: Reward, *texts: str, on_error: str = "raise", patience: float = 20) -> list[Appraised | None]:
    return judge([reward], answers(*texts), SOURCE, on_error=on_error, patience=patience)


def fail() -> None:
    raise ZeroDivisionError("by nothing")


BAD = {
    "raised ZeroDivisionError: by nothing": fail, "gave nan": lambda: math.nan, "gave inf": lambda: math.inf,
    "gave None": lambda: None, "gave '1'": lambda: "1", "gave \\[1\\]": lambda: [1],
    "gave a step that ends at 9": lambda: Score(0.0, ((9, 1.0),)), "ends at 0": lambda: Score(0.0, ((0, 1.0),)),
    "gave nan; expected": lambda: Score(0.0, ((1, math.nan),)),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_a_bad_reward_is_named_with_its_sample(message: str, caplog: pytest.LogCaptureFixture) -> None:
    reward = Bad(does=BAD[message])
    with pytest.raises(HoneError, match=rf"^data.jsonl:2: reward 'bad' .*{message}(.|\n)*'bad'. on_error: skip"):
        tried(reward, "good", "bad", "good", "bad")
    with caplog.at_level(logging.WARNING, "hone"):
        found = tried(reward, "good", "bad", "good", "bad", on_error="skip")
    assert [one is None for one in found] == [False, True, False, True]
    assert "2 of 4 answers are left out, the first because of data.jsonl:2" in caplog.text
    with pytest.raises(HoneError, match="It is so with all 2 answers"):
        tried(reward, "bad", "bad", on_error="skip")


def test_a_wrong_count_is_told() -> None:
    class Short(Bad):
        def score(self, attempts: Sequence[Attempt], source: Any) -> list[Any]:
            return [1.0] * (len(attempts) + 1)

    class Mixing(Bad):
        def score(self, attempts: Sequence[Attempt], source: Any) -> list[Any]:
            return [1.0]

    with pytest.raises(HoneError, match=r"data.jsonl:1: reward 'bad' gave 2 scores for 1 answers"):
        tried(Short(), "a", "b")
    with pytest.raises(HoneError, match=r"gave 1 scores for 2 answers; .* each answer alone goes well"):
        tried(Mixing(), "a", "b", on_error="skip")


def swallow() -> None:
    while True:
        with contextlib.suppress(Exception):
            time.sleep(30)


HANGS = {"sleep": lambda: time.sleep(30), "loop": lambda: all(iter(int, 1)) or swallow(), "swallow": swallow}


@pytest.mark.parametrize("name", ["sleep", "swallow"])
@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_reward_that_hangs_is_interrupted(name: str, on_error: str) -> None:
    begun = time.monotonic()
    with pytest.raises(
        HoneError, match=r"reward 'bad' did not come back within 0.3 s; .*data.jsonl:2\. Mend .*`patience`"
    ):
        tried(Bad(does=HANGS[name]), "good", "bad", on_error=on_error, patience=0.3)
    assert time.monotonic() - begun < 5


def test_a_reward_with_limits_of_its_own_has_the_time_that_they_allow() -> None:
    class Bounded(Bad):
        def longest(self, answers: int) -> float:
            return 10.0 * answers

    assert tried(Bounded(does=lambda: time.sleep(0.3) or 1.0), "bad", patience=0.1) == tried(Bad(), "good")
    assert Code(wall=3, workers=2).longest(5) == 3 * 5.0 and Efficiency(wall=3, workers=2).longest(2) == 3 * 5.0


def test_a_slow_expression_is_interrupted() -> None:
    reward = text.Regex(pattern=r"(a+)+b", match="full")
    with pytest.raises(HoneError, match=r"reward 'regex' did not come back within 0\.5 s"):
        tried(reward, "a" * 40, patience=0.5)


def test_in_another_thread_a_hanging_reward_is_given_up() -> None:
    found: list[Any] = []

    def work() -> None:
        try:
            tried(Bad(does=lambda: time.sleep(3)), "bad", patience=0.2)
        except HoneError as error:
            found.append(str(error))
        found.append(tried(Bad(), "good")[0])
        try:
            tried(Bad(does=fail), "bad")
        except HoneError as error:
            found.append(str(error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert "did not come back within 0.2 s" in found[0] and found[1].total == 1 and "ZeroDivisionError" in found[2]


def test_an_older_alarm_still_rings() -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    left, _ = signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        assert bounded(lambda: time.sleep(0.01) or 5, 10) == 5
        time.sleep(0.4)
    finally:
        signal.signal(signal.SIGALRM, before)
        if left:
            signal.setitimer(signal.ITIMER_REAL, left)
    assert rung == [1]


# Several rewards together


def test_weights_names_and_steps_add_up() -> None:
    rewards = [text.Regex(pattern="a", weight=2.0), text.Regex(pattern="b"), Hackable(weight=0.5), Exact(weight=3.0)]
    sample = SOURCE.train_sample(0)
    right = f"1+1=2\nb{sample.answers[0]}"
    found = judge(rewards, [Attempt(sample, right), Attempt(sample, "a")], SOURCE, on_error="raise", patience=60)
    first, second = found
    assert first is not None and second is not None
    lines = sum(1 for _, worth in first.steps if worth)
    assert first.parts == {"regex": 2.0, "regex-2": 1.0, "hackable-process": 0.5 * lines, "exact": 3.0} and lines > 1
    assert first.total == pytest.approx(6 + 0.5 * lines) and first.value == pytest.approx(6)
    assert second.parts == {"regex": 2.0, "regex-2": 0.0, "hackable-process": 0.0, "exact": 0.0} and second.total == 2
    assert list(first.steps) == sorted(first.steps)
    assert judge(rewards, [], SOURCE, on_error="raise", patience=60) == []


def test_group_scaling_gives_z_scores() -> None:
    asked = [attempt("x" * n, group=group) for group, n in ((0, 1), (0, 2), (0, 6), (1, 5), (1, 5), (2, 3))]
    big = from_function("big-numbers", lambda prompt, answer, sample: 1e6 * len(answer))
    found = judge([big(scale="group", weight=0.5)], asked, SOURCE, on_error="raise", patience=60)
    z = (np.array([1, 2, 6]) - 3) / np.std([1, 2, 6], ddof=1)
    assert [one.total for one in found] == pytest.approx([*(0.5 * z), 0, 0, 0])  # type: ignore[union-attr]
    stepped = Hackable(scale="group")
    one, two = judge(
        [stepped], [attempt("1+1=2\n1+2=3"), attempt("1+1=2\n1+2=4")], SOURCE, on_error="raise", patience=60
    )
    assert one is not None and two is not None
    assert one.total == pytest.approx(1 / math.sqrt(2)) and two.total == pytest.approx(-1 / math.sqrt(2))
    assert one.steps[0][1] == two.steps[0][1] > 0 == two.steps[1][1]


def test_steps_of_a_function_are_counted_behind_a_hint() -> None:
    from_function("by-lines", lambda _, whole, __: Score(1.0, ((2, 0.25), (4, 0.5), (len(whole), 2.0))))
    told = Attempt(Sample(kind="prompt", prompt="ask: "), "b\nc\n", before="a\n", stopped=True)
    (found,) = options.build_part("reward", "by-lines").score([told], SOURCE)
    assert found == Score(1.25, ((2, 0.5), (4, 2.0))) and found.total == 3.75


def test_functions_of_the_users_own() -> None:
    def short(prompt: Any, answer: str, sample: Sample) -> float:
        """Reward short answers."""
        return float(len(answer) < sample.extra["most"]) + float(prompt == "ask: ")

    made = from_function("short-ones", short)
    assert options.check_part("reward", {"name": "short-ones", "weight": 2.0}, "r", options.Places()) == []
    built = options.build_part("reward", {"name": "short-ones", "weight": 2.0})
    assert isinstance(built, made) and built.name == "short-ones"
    found = judge([built], [attempt("ab", most=3), attempt("abcd", most=3)], SOURCE, on_error="raise", patience=60)
    assert [one.total for one in found] == [4, 2]  # type: ignore[union-attr]
    with pytest.raises(HoneError, match="reward 'short-ones' raised KeyError: 'most'"):
        judge([built], [attempt("ab")], SOURCE, on_error="raise", patience=60)
    assert "short-ones" not in [record.name for record in parts.catalogue()]
    from_function("short-ones", lambda *_: 7.0)
    assert options.build_part("reward", "short-ones").score([attempt("")], SOURCE) == [7.0]
    for name in ("exact", "a:b", ""):
        with pytest.raises(HoneError, match="cannot be the name of a reward of your own"):
            from_function(name, short)
    hint = options.check_part("reward", "short-oness", "r", options.Places())[0].hint
    assert "see: hone list" in hint or "did you mean" in hint
