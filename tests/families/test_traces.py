"""Traces with backtracks, and random expressions: what stands in them follows from the rules by which they are made."""

from __future__ import annotations

from fractions import Fraction

import pytest

from hone.data.answers import number
from hone.data.chains import Chains
from hone.data.random_calculation import RandomCalculation
from hone.data.sample import Sample
from hone.data.traces import BACK, TAGS, Traces
from hone.errors import DataError
from hone.rewards.base import Attempt
from hone.rewards.closeness import Closeness


def source(**options: object) -> Traces:
    return Traces(of=Chains(skills=["sort"], difficulty=2, count=20, holdout=5), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [0, 1, 2])
def test_a_trace_takes_back_as_many_wrong_lines_as_asked(count: int) -> None:
    plain = list(source(backtracks=0).samples("train"))
    for before, made in zip(plain, source(backtracks=count).samples("train"), strict=True):
        lines = str(made.answers[0]).splitlines()
        places = [place for place, line in enumerate(lines) if line == BACK]
        assert len(places) == count
        for place in places:
            assert lines[place - 1] != lines[place + 1] and lines[place + 1] in str(before.answers[0])
        kept = [line for place, line in enumerate(lines) if place not in places and place + 1 not in places]
        assert "\n".join(kept) == before.answers[0]
    assert list(source(backtracks=count).samples("train")) == list(source(backtracks=count).samples("train"))


def test_marks_say_what_lines_are_for_and_answers_can_be_those_of_others() -> None:
    marked = next(source(backtracks=1, tags=True).samples("train"))
    lines = str(marked.answers[0]).splitlines()
    assert all(line.startswith(TAGS) for line in lines[:-1]) and lines[-1].startswith("answer:")
    assert lines[[line.startswith("<verify>") for line in lines].index(True)] == f"<verify>{BACK}"
    right = [str(sample.answers[0]).splitlines()[-1] for sample in source().samples("train")]
    shuffled = [str(sample.answers[0]).splitlines()[-1] for sample in source(answers="shuffled").samples("train")]
    assert shuffled[1:] == right[:-1] and source().grade(marked, str(marked.answers[0])) == 1


def test_expressions_have_the_value_that_their_steps_come_to() -> None:
    made = RandomCalculation(steps=[1, 3], operations=["+", "-", "*", "/"], count=200, holdout=50)
    train, held_out = list(made.samples("train")), list(made.samples("eval"))
    assert len(train) == 200 and len(held_out) == 50
    assert not {sample.prompt for sample in train} & {sample.prompt for sample in held_out}
    for sample in train:
        lines = str(sample.answers[0]).splitlines()
        assert len(lines) == sample.extra["steps"] + 1 and lines[-1] == f"answer: {sample.extra['answer']}"
        assert lines[-2].split(" = ")[1] == sample.extra["answer"] and made.grade(sample, lines[-1]) == 1
    assert made.fingerprint() != RandomCalculation(steps=2).fingerprint()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("text", ["1e999999999", "1e-999999999", "1" * 101, "1/" + "1" * 101, "0." + "1" * 101])
def test_a_number_that_takes_long_to_read_is_none(text: str) -> None:
    asked = Sample("completion", "7 + 8 =\n", ("answer: 15",), extra={"answer": "15"}, where="x:1")
    assert number(text) is None
    assert Closeness().score([Attempt(asked, f"answer: {text}")], RandomCalculation()) == [0.0]


def test_a_reward_for_nearness_and_its_controls() -> None:
    asked = Sample("completion", "7 + 8 =\n", ("answer: 15",), extra={"answer": "15"}, where="x:1")
    attempts = [Attempt(asked, text) for text in ("7 + 8 = 15\nanswer: 15", "answer: 18", "answer: none", "15")]
    plain = RandomCalculation()
    right = Closeness().score(attempts, plain)
    assert right == [1.0, pytest.approx(1 / 1.2), 0.0, 1.0]
    assert Closeness(signal="inverted").score(attempts, plain) == [pytest.approx(1 - worth) for worth in right]
    drawn = Closeness(signal="random").score(attempts, plain)
    assert drawn == Closeness(signal="random").score(attempts, plain) and len(set(drawn)) == 4
    assert number("-3/2") == Fraction(-3, 2) and number("seven") is None and number("1/0") is None
    assert number(" 0.5. ") == Fraction(1, 2) and number("1" * 100) is not None
    with pytest.raises(DataError, match="x:2: reward 'closeness' needs a number"):
        Closeness().score([Attempt(Sample("prompt", "?", where="x:2"), "answer: 1")], plain)
