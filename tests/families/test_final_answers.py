"""Final answers that are written in unusual ways: which are found, which are numbers, and which are the same."""

from __future__ import annotations

from fractions import Fraction

import pytest

from hone.data.answers import final_answer, number, same_answer


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("0.00001", str(0.00001)), ("10000000000000000", str(1e16)), ("1E3", "1000"), (".5e2", "50"),
        (r"\boxed{3\frac{1}{2}}", "3.5"), (r"-3 \dfrac{1}{2}", "-3.5"), ("3 1/2", "7/2"),
        (r"x = 3\frac{1}{2}", "x = 3 1/2"), ("<ANSWER>5</ANSWER>", "5"), ("<Answer>5</Answer> so", "5"),
        (".5", "0.5"), ("#### .5", "0.5"), ("+5", "5"), ("#### -$5", "-5"), (r"-\$1,000", "-1000"), ("$-5", "-5"),
        ("**Answer**: 42", "42"), ("so\n__Answer__ : 42\n", "42"), ("answer: *", "*"), ("$", "$"),
    ],
)  # fmt: skip
def test_the_same_answer_written_otherwise(text: str, reference: str) -> None:
    assert same_answer(text, reference)


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        (r"3\frac{1}{2}", "31/2"), (r"2^3\frac{1}{2}", "2^31/2"), ("3 4", "7"), ("-5", "+5"), ("1e-05", "1e-06"),
        ("", "."), ("", "$"), ("answer:", "*"), ("", ""), ("  ", ""), (r"\boxed{}", ""), ("$", "*"), ("", "####"),
    ],
)  # fmt: skip
def test_other_answers(text: str, reference: str) -> None:
    assert not same_answer(text, reference)


def test_numbers_of_many_forms() -> None:
    assert number("1e-05") == Fraction(1, 100_000) and number("-1 1/2") == Fraction(-3, 2) and number("+.5") == 0.5
    for none in ("1e1000", "1e-1000", "1/2e3", "1 2", "1 1.5", "+-1", "e5", ".", "1 1/0", "1." + "1" * 101):
        assert number(none) is None
    assert final_answer("<answer>one</answer> <ANSWER>two</Answer> three") == "two"
