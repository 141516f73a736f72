"""The final answer in a text, in normal form, and when two of them are the same."""

from __future__ import annotations

import re
from fractions import Fraction

NUMBER = re.compile(r"-?\d{1,100}(/\d{1,100}|\.\d{1,100})?")  # bounded: 1e999999999 would take all memory to read
_MARK = re.compile(r"####|answer\s*:|<answer>|\\boxed\s*\{", re.IGNORECASE)
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")


def final_answer(text: str) -> str:
    r"""Return the final answer in a text in normal form: "So it is 1,002. #### 1,002." gives "1002".

    It is what the last of these marks says: "####" or "answer:", up to the end of the line; the body of <answer>; what
    stands in \boxed{}. A text without any of them is the answer itself. White space, emphasis, dollar signs, thousands
    separators and full stops at the end do not count.

    Args:
        text: an answer, or a reference.
    """
    marks = list(_MARK.finditer(text))
    if marks:
        text = _marked(marks[-1][0], text[marks[-1].end() :])
    text = " ".join(text.replace("\\$", "$").replace("\u2212", "-").split())
    text = _FRACTION.sub(r"\1/\2", text.lstrip("*$ ").rstrip("*$. "))
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)


def _marked(mark: str, rest: str) -> str:
    """Return what belongs to a mark, out of everything that follows it."""
    if mark.startswith("\\"):
        depth = 1
        for place, letter in enumerate(rest):
            depth += (letter == "{") - (letter == "}")
            if depth == 0:
                return rest[:place]
    inside = rest.partition("</answer>")[0]
    return inside if mark.startswith("<") else inside.strip().split("\n", 1)[0]


def number(text: str) -> Fraction | None:
    """Return the number that a text is, such as "-3/2", "0.5" or "7", None where it is none or has over 100 digits.

    Args:
        text: it.
    """
    written = text.strip().removesuffix(".")
    if not NUMBER.fullmatch(written):
        return None
    try:
        return Fraction(written)
    except ZeroDivisionError:
        return None


def same_answer(text: str, other: str) -> bool:
    """Return whether two texts end with the same answer: the same words, or numbers of the same value.

    Args:
        text: an answer, or a reference.
        other: another.
    """
    found, expected = final_answer(text), final_answer(other)
    value = number(found)
    return found == expected or (value is not None and value == number(expected))
