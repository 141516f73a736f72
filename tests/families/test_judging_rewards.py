"""What becomes of rewards: weights and scales, and bad ones that are named with their sample, left out or stopped."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import sys
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
from hone.errors import DataError, HoneError, MissingPackage
from hone.rewards import text
from hone.rewards.base import Attempt, Reward, Score, from_function
from hone.rewards.closeness import Closeness
from hone.rewards.code import Code, Efficiency
from hone.rewards.exact import Exact
from hone.rewards.judge import Appraised, bounded, judge
from hone.rewards.process import Hackable, Process


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
    "gave nan; expected": lambda: Score(0.0, ((1, math.nan),)), "raised SystemExit: 2": lambda: sys.exit(2),
    "gave 1.2e.308 and has weight 1; expected numbers of at most 1e.30": lambda: 1.2e308,
    "gave -1e.31 and has weight 1": lambda: Score(0.0, ((1, -1e31),)),
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
    assert tried(reward, "bad", "bad", on_error="skip") == [None, None]
    assert "2 of 2 answers are left out, the first because of data.jsonl:1: reward 'bad'" in caplog.text


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


def test_a_weight_may_not_make_numbers_endless() -> None:
    for weight in (10.0, math.inf, math.nan):
        with pytest.raises(HoneError, match=r"data.jsonl:1: reward 'bad' gave 1e.30 and has weight"):
            tried(Bad(does=lambda: 1e30, weight=weight), "bad")
    found = judge([Bad(does=lambda: 1e30)] * 9, answers("bad"), SOURCE, on_error="raise", patience=20)
    assert found == [Appraised(pytest.approx(9e30), found[0].parts)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("reward", "extra", "message"),
    [
        (Code(), {}, "reward 'code': expected a list of tests"),
        (text.Length(), {"max_tokens": "x"}, "reward 'length': column 'max_tokens': expected a number"),
        (text.LengthPenalty(budgets={"a": 1}), {"level": "b"}, "reward 'length-penalty': column 'level' asks"),
        (Closeness(), {}, "reward 'closeness' needs a number"),
    ],
)
def test_errors_of_rewards_themselves_name_them_the_place_and_the_way_out(
    reward: Reward, extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=rf"^data.jsonl:1: {message}.*[^.]\. on_error: skip leaves such answers out"):
        judge([reward], [attempt("a", **extra)], SOURCE, on_error="raise", patience=60)


def test_an_error_of_any_class_keeps_it() -> None:
    def lack() -> None:
        raise MissingPackage("there", "reward 'bad'")

    with pytest.raises(
        MissingPackage, match=r"^data.jsonl:1: reward 'bad' needs the package 'there'.*. on_error: skip"
    ):
        tried(Bad(does=lack), "bad")


def test_an_inner_reward_that_gives_too_few_numbers_is_told() -> None:
    class One(Bad):
        name = "one"

        def score(self, attempts: Sequence[Attempt], source: Any) -> list[Any]:
            return [1.0]

    with pytest.raises(HoneError, match=r"^data.jsonl:1: reward 'process': reward 'one' gave 1 scores for 3 answers"):
        tried(Process(of=One()), "a\nb\nc")


def swallow() -> None:
    while True:
        with contextlib.suppress(Exception):
            time.sleep(30)


HANGS = {"sleep": lambda: time.sleep(30), "loop": lambda: all(iter(int, 1)) or swallow(), "swallow": swallow}


@pytest.mark.parametrize("name", ["sleep", "swallow"])
def test_a_reward_that_hangs_is_interrupted(name: str, caplog: pytest.LogCaptureFixture) -> None:
    begun = time.monotonic()
    with pytest.raises(
        HoneError,
        match=r"^reward 'bad' did not come back within 0.3 s; .*data.jsonl:2\. Mend .*`patience`; on_error: skip",
    ):
        tried(Bad(does=HANGS[name]), "good", "bad", patience=0.3)
    assert time.monotonic() - begun < 5
    with caplog.at_level(logging.WARNING, "hone"):
        found = tried(Bad(does=HANGS[name]), "good", "bad", on_error="skip", patience=0.3)
    assert [one is None for one in found] == [False, True] and time.monotonic() - begun < 10
    late = "data.jsonl:2: reward 'bad' did not come back within 0.3 s; the answer was 'bad'. Mend"
    assert f"1 of 2 answers are left out, the first because of {late}" in caplog.text


def test_a_reward_that_hangs_on_everything_is_given_up_whatever_on_error_says() -> None:
    begun = time.monotonic()
    with pytest.raises(HoneError, match=r"data.jsonl:4: .*\nSo it was with 3 answers in a row"):
        tried(Bad(does=HANGS["sleep"]), "good", *["bad"] * 40, on_error="skip", patience=0.3)
    assert time.monotonic() - begun < 5


@dataclass(kw_only=True)
class Slow(Bad):
    """Takes some time for each call, and some for each answer."""

    call: float = 0.0
    each: float = 0.0

    def score(self, attempts: Sequence[Attempt], source: Any) -> list[Any]:
        time.sleep(self.call + self.each * len(attempts))
        return super().score(attempts, source)


def test_each_call_of_the_search_has_a_time_of_its_own() -> None:
    texts, reward = (*["good"] * 5, "bad"), Slow(does=lambda: math.nan, call=0.2)
    with pytest.raises(HoneError, match=r"^data.jsonl:6: reward 'bad' gave nan"):
        tried(reward, *texts, patience=0.8)
    found = tried(reward, *texts, on_error="skip", patience=0.8)
    assert [one is None for one in found] == [False] * 5 + [True]


def test_an_answer_on_which_the_search_waits_is_named() -> None:
    class Waiting(Bad):
        def score(self, attempts: Sequence[Attempt], source: Any) -> list[Any]:
            return super().score(attempts, source) if len(attempts) == 1 else [math.nan] * len(attempts)

    with pytest.raises(HoneError, match=r"^data.jsonl:2: reward 'bad' did not come back within 0.3 s; the answer was"):
        tried(Waiting(does=HANGS["sleep"]), "good", "bad", patience=0.3)


def test_a_reward_that_is_late_with_all_answers_and_with_none_alone_is_told() -> None:
    with pytest.raises(HoneError, match=r"^reward 'bad' did not come .*; each answer alone goes well\. Mend .*time"):
        tried(Slow(each=0.3), *["good"] * 4, on_error="skip", patience=0.9)


def test_a_reward_with_limits_of_its_own_has_the_time_that_they_allow() -> None:
    class Bounded(Bad):
        def longest(self, answers: int) -> float:
            return 10.0 * answers

    assert tried(Bounded(does=lambda: time.sleep(0.3) or 1.0), "bad", patience=0.1) == tried(Bad(), "good")
    steps = Process(of=[Bounded(), Bounded()])
    assert steps.longest(steps.texts(answers("a\nb", "c"))) == 60 and Bad().texts(answers("a\nb", "c")) == 2
    assert tried(Process(of=Bounded(does=lambda: time.sleep(0.3) or 1.0)), "bad", patience=0.1)[0].total == 1  # type: ignore[union-attr]
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
