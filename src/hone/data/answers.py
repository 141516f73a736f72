"""The final answer in a text, in normal form, the tools that it calls, and when two answers are the same."""

from __future__ import annotations

import json
import re
from fractions import Fraction

NUMBER = re.compile(  # bounded: 1e999999999 would take all memory to read
    r"(?P<sign>[-+]?)(?:(?P<whole>\d{1,100}) )?"  # of a mixed number
    r"(?P<rest>\d{1,100}/\d{1,100}|(?:\d{1,100}(?:\.\d{1,100})?|\.\d{1,100})(?:e[-+]?\d{1,3})?)",
    re.IGNORECASE,
)
_MARK = re.compile(r"####|answer[\s*_]*:|<answer>|\\boxed\s*\{", re.IGNORECASE)
_CLOSED = re.compile("</answer>", re.IGNORECASE)
_FRACTION = re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}")


def final_answer(text: str) -> str:
    r"""Return the final answer in a text in normal form: "So it is 1,002. #### 1,002." gives "1002".

    It is what the last of these marks says: "####" or "answer:", up to the end of the line; the body of <answer>; what
    stands in \boxed{}. A text without any of them is the answer itself. White space, emphasis, dollar signs, thousands
    separators and full stops at the end do not count; "3\frac{1}{2}" is "3 1/2".

    Args:
        text: an answer, or a reference.
    """
    text = re.sub(r"^([-+]) ?\$ ?", r"\1", _stated(text).lstrip("*$ ").rstrip("*$. "))
    text = _FRACTION.sub(r"\1/\2", re.sub(r"(?<=\d)(?=\\[dt]?frac\{)", " ", text))
    return re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)


def _stated(text: str) -> str:
    """Return the final answer in a text as it is written."""
    marks = list(_MARK.finditer(text))
    if marks:
        text = _marked(marks[-1][0], text[marks[-1].end() :])
    return " ".join(text.replace("\\$", "$").replace("\u2212", "-").split())


def _marked(mark: str, rest: str) -> str:
    """Return what belongs to a mark, out of everything that follows it."""
    if mark.startswith("\\"):
        depth = 1
        for place, letter in enumerate(rest):
            depth += (letter == "{") - (letter == "}")
            if depth == 0:
                return rest[:place]
    inside = _CLOSED.split(rest, maxsplit=1)[0]
    return inside if mark.startswith("<") else inside.strip().split("\n", 1)[0]


def number(text: str) -> Fraction | None:
    """Return the number that a text is, such as "-3/2", "1 1/2", "0.5", "1e-05" or "7".

    Args:
        text: it.

    Returns:
        None where it is no number, or one of over 100 digits or 3 of its exponent.
    """
    found = NUMBER.fullmatch(text.strip().removesuffix("."))
    if found is None or (found["whole"] and "/" not in found["rest"]):
        return None
    try:
        size = Fraction(found["rest"]) + int(found["whole"] or 0)
    except ZeroDivisionError:
        return None
    return -size if found["sign"] == "-" else size


def calls(text: str) -> list[tuple[str, object]]:
    """Return the calls of tools that a text makes as JSON, each as (name, arguments), whatever stands around them.

    Args:
        text: an answer, e.g. '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'.
    """
    found: list[tuple[str, object]] = []
    place, decoder = text.find("{"), json.JSONDecoder()
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            value, end = None, place + 1
        named = value.get("function", value) if isinstance(value, dict) else None
        arguments = named.get("arguments", named.get("parameters")) if isinstance(named, dict) else None
        if isinstance(arguments, dict) and isinstance(named, dict) and isinstance(named.get("name"), str):
            found.append((named["name"], arguments))
        place = text.find("{", end)
    return found


def same_answer(text: str, other: str) -> bool:
    """Return whether two texts end with the same answer: the same words, numbers of the same value, or calls of tools.

    Where the reference calls tools, the same tools must be called with equal arguments, in the same order; how the JSON
    is laid out does not matter. Signs that do not count do so in a reference of nothing else, such as "*"; no answer is
    the same as an empty one.

    Args:
        text: an answer, or a reference.
        other: another.
    """
    if wanted := calls(other):
        return calls(text) == wanted
    found, expected = final_answer(text), final_answer(other)
    if not expected:
        return bool(_stated(other)) and _stated(text) == _stated(other)
    value = number(found)
    return found == expected or (value is not None and value == number(expected))
