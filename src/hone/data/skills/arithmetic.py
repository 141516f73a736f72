"""Arithmetic skills: each worked line is one small computation on what stands before it.

Column arithmetic writes a line per column, e.g. `7+8+0=15 c1 5`: the two digits and the carry, their sum, the carry
into the next column and the digits found so far.
"""

from __future__ import annotations

import math
import operator
import re
from collections import deque
from collections.abc import Iterator
from itertools import zip_longest
from random import Random

from hone.data.skills.base import Skill, between, pick

_SMALL = (20, 30, 50, 99, 99)  # largest operand at difficulty 1 to 5 where a step is done in the head
_NAMES = ("Ann", "Ben", "Eva", "Mia", "Sam", "Tom")
_THINGS = ("apples", "cards", "coins", "eggs", "pens", "shells")
_GAINS = ("buys", "finds", "gets", "wins")
_LOSSES = ("drops", "loses", "sells", "gives")

Work = tuple[list[str], str]


def _integers(body: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", body)]


def _digits(rng: Random, count: int) -> int:
    """Draw an integer of exactly `count` digits."""
    return between(rng, 10 ** (count - 1), 10**count - 1)


def _columns(a: int, b: int) -> Iterator[tuple[int, int]]:
    """Yield the digits of two numbers column by column, from the units on."""
    for x, y in zip_longest(reversed(str(a)), reversed(str(b)), fillvalue="0"):
        yield int(x), int(y)


def _draw_add(rng: Random, difficulty: int) -> str:
    a, b = (_digits(rng, between(rng, difficulty, difficulty + 1)) for _ in range(2))
    return f"{a} + {b}"


def _add(a: int, b: int) -> Work:
    steps: list[str] = []
    found, carry = "", 0
    columns = deque(_columns(a, b))
    while columns or carry:
        x, y = columns.popleft() if columns else (0, 0)
        total = x + y + carry
        found = f"{total % 10}{found}"
        steps.append(f"{x}+{y}+{carry}={total} c{total // 10} {found}")
        carry = total // 10
    return steps, found


def _draw_subtract(rng: Random, difficulty: int) -> str:
    small, large = sorted(_digits(rng, count) for count in (between(rng, difficulty, difficulty + 1), difficulty + 1))
    return f"{large} - {small}"


def _subtract(a: int, b: int) -> Work:
    steps, found, borrow = [], "", 0
    for x, y in _columns(a, b):
        lent = x < y + borrow
        digit = x + 10 * lent - y - borrow
        found = f"{digit}{found}"
        steps.append(f"{x + 10 * lent}-{y}-{borrow}={digit} b{int(lent)} {found}")
        borrow = int(lent)
    return steps, found.lstrip("0") or "0"


def _draw_multiply(rng: Random, difficulty: int) -> str:
    wide, narrow = ((3, 1), (4, 1), (2, 2), (3, 2), (4, 2))[difficulty - 1]
    first = _digits(rng, wide)
    return f"{first} * " + "".join(str(between(rng, 2, 9)) for _ in range(narrow))


def _times(a: int, digit: int, found: str) -> Work:
    """Multiply by one digit; `found` starts as the zeros that the digit's place appends."""
    steps: list[str] = []
    carry = 0
    digits = deque(int(x) for x in reversed(str(a)))
    while digits or carry:
        x = digits.popleft() if digits else 0
        total = x * digit + carry
        found = f"{total % 10}{found}"
        steps.append(f"{x}*{digit}+{carry}={total} c{total // 10} {found}")
        carry = total // 10
    return steps, found


def _multiply(a: int, b: int) -> Work:
    steps, partial = _times(a, b % 10, "")
    if b < 10:
        return steps, partial
    more, second = _times(a, b // 10, "0")
    last, found = _add(int(partial), int(second))
    return [*steps, *more, f"{partial}+{second}", *last], found


def _draw_remainder(rng: Random, difficulty: int) -> str:
    first = _digits(rng, difficulty + 2)
    return f"{first} % {between(rng, 2, 9)}"


def _remainder(a: int, b: int) -> Work:
    steps, rest = [], 0
    for digit in str(a):
        value = rest * 10 + int(digit)
        rest = value % b
        steps.append(f"{value}={b}*{value // b}+{rest}")
    return steps, str(rest)


def _draw_compare(rng: Random, difficulty: int) -> str:
    first = _digits(rng, between(rng, difficulty + 1, difficulty + 2))
    kind = rng.random()
    if kind < 0.2:
        return f"{first} {first}"
    if kind < 0.7:  # near ones: the same number of digits, and the same first ones
        kept = between(rng, 0, difficulty)
        tail = len(str(first)) - kept
        rest = str(between(rng, 10 ** (tail - 1), 10**tail - 1)) if tail else ""
        return f"{first} {str(first)[:kept]}{rest}"
    return f"{first} {_digits(rng, between(rng, difficulty + 1, difficulty + 2))}"


def _sign(a: int, b: int) -> str:
    return "<" if a < b else ">" if a > b else "="


def _compare(a: int, b: int) -> Work:
    """Compare the lengths, then digit after digit from the left, until something differs."""
    steps = []
    pairs = zip(str(a), str(b), strict=False)
    for x, y in ((len(str(a)), len(str(b))), *((int(x), int(y)) for x, y in pairs)):
        steps.append(f"{x}{_sign(x, y)}{y}")
        if x != y:
            break
    return steps, _sign(x, y)


def _draw_evaluate(rng: Random, difficulty: int) -> str:
    top = _SMALL[difficulty - 1]
    total = between(rng, 1, top)
    body = str(total)
    for _ in range(difficulty + 1):
        number = between(rng, 1, top)
        minus = rng.random() < 0.5 and number <= total
        total += -number if minus else number
        body += f" {'-' if minus else '+'} {number}"
    return body


def _left_to_right(words: list[str]) -> Work:
    """Add and subtract in order: ["9", "-", "2", "+", "5"]."""
    steps, total = [], int(words[0])
    for sign, number in zip(words[1::2], words[2::2], strict=True):
        value = total + int(number) if sign == "+" else total - int(number)
        steps.append(f"{total}{sign}{number}={value}")
        total = value
    return steps, str(total)


def _draw_precedence(rng: Random, difficulty: int) -> str:
    terms = difficulty + 1
    product, plain = between(rng, 0, terms - 1), between(rng, 0, terms - 2)
    plain += plain >= product
    total, body = 0, ""
    for index in range(terms):
        value = between(rng, 1, max(50, _SMALL[difficulty - 1]))
        text = str(value)
        if index == product or (index != plain and rng.random() < 0.4):
            a, b = between(rng, 2, 9), between(rng, 2, 9)
            value, text = a * b, f"{a} * {b}"
        minus = index > 0 and value <= total and rng.random() < 0.5
        total += -value if minus else value
        body += (" - " if minus else " + ") * (index > 0) + text
    return body


def _precedence(body: str) -> Work:
    steps, words = [], body.split()
    while "*" in words:
        at = words.index("*")
        value = str(int(words[at - 1]) * int(words[at + 1]))
        steps.append(f"{words[at - 1]}*{words[at + 1]}={value}")
        words[at - 1 : at + 2] = [value]
    steps.append("".join(words))
    more, answer = _left_to_right(words)
    return [*steps, *more], answer


def _signed_sum(body: str) -> str:
    terms = re.findall(r"[+-]?[\d*]+", body.replace(" ", ""))
    return str(sum(math.prod(int(factor) for factor in term.split("*")) for term in terms))


def _digit_sum(body: str) -> Work:
    return _left_to_right(" + ".join(body).split())


def _draw_compose(rng: Random, difficulty: int) -> str:
    depth = (2, 2, 3, 4, 5)[difficulty - 1]
    top = 99 if difficulty <= 2 else 999
    while True:
        f, g = (_draw_function(rng, difficulty) for _ in range(2))
        nest = [pick(rng, "fg") for _ in range(depth)]
        start = between(rng, 1, _SMALL[difficulty - 1])
        body = f"f=x{f} g=x{g} : {''.join(f'{name}(' for name in nest)}{start}{')' * depth}"
        values = [int(step.rpartition("=")[2]) for step in _compose(body)[0]]
        if f != g and len(set(nest)) == 2 and all(0 <= value <= top for value in values):
            return body


def _draw_function(rng: Random, difficulty: int) -> str:
    sign = pick(rng, "+-*")
    number = between(rng, 2, 3 if difficulty <= 2 else 5) if sign == "*" else between(rng, 1, 9)
    return f"{sign}{number}"


def _compose(body: str) -> Work:
    definitions, _, call = body.partition(" : ")
    functions = dict(definition.split("=x") for definition in definitions.split())
    names, value, steps = re.findall("[fg]", call), _integers(call)[0], []
    for name in reversed(names):
        sign, number = functions[name][0], int(functions[name][1:])
        result = {"+": value + number, "-": value - number, "*": value * number}[sign]
        steps.append(f"{name}({value})={value}{sign}{number}={result}")
        value = result
    return steps, str(value)


def _compose_truth(body: str) -> str:
    f, g = re.findall(r"=x([+*-])(\d+)", body)
    *names, value = re.findall(r"[fg](?=\()|\d+(?=\)*$)", body)

    def apply(depth: int) -> int:
        if depth == len(names):
            return int(value)
        sign, number = f if names[depth] == "f" else g
        inner = apply(depth + 1)
        return inner * int(number) if sign == "*" else inner + int(sign + number)

    return str(apply(0))


def _draw_story(rng: Random, difficulty: int) -> str:
    top, who = _SMALL[difficulty - 1], pick(rng, _NAMES)
    total = between(rng, 1, top)
    body = f"{who} has {total} {pick(rng, _THINGS)}."
    for _ in range(difficulty):
        number = between(rng, 1, top)
        if number <= total and rng.random() < 0.5:
            verb = pick(rng, _LOSSES)
            body += f" {who} {verb} {number}{' away' if verb == 'gives' else ''}."
            total -= number
        elif difficulty >= 3 and rng.random() < 0.4:
            bags, each = between(rng, 2, 9), between(rng, 2, 9)
            body += f" {who} {pick(rng, _GAINS)} {bags} bags of {each}."
            total += bags * each
        else:
            body += f" {who} {pick(rng, _GAINS)} {number}."
            total += number
    return f"{body} How many now?"


def _story(body: str) -> Work:
    first, *events = body.removesuffix(" How many now?").removesuffix(".").split(". ")
    total, steps = _integers(first)[0], []
    for event in events:
        numbers = _integers(event)
        number = math.prod(numbers)
        if len(numbers) == 2:
            steps.append(f"{numbers[0]}*{numbers[1]}={number}")
        more, answer = _left_to_right([str(total), "-" if event.split()[1] in _LOSSES else "+", str(number)])
        steps += more
        total = int(answer)
    return steps, str(total)


def _story_truth(body: str) -> str:
    events = re.findall(r"(\w+) (\d+)(?: bags of (\d+))?", body)
    return str(sum((-1 if verb in _LOSSES else 1) * int(n) * int(each or 1) for verb, n, each in events))


ARITHMETIC = (
    Skill("add", "arithmetic", True, _draw_add, lambda b: _add(*_integers(b)), lambda b: str(sum(_integers(b)))),
    Skill("subtract", "arithmetic", True, _draw_subtract, lambda b: _subtract(*_integers(b)), _signed_sum),
    Skill("multiply", "arithmetic", False, _draw_multiply, lambda b: _multiply(*_integers(b)), _signed_sum),
    Skill(
        "remainder", "arithmetic", False, _draw_remainder, lambda b: _remainder(*_integers(b)),
        lambda b: str(operator.mod(*_integers(b))),
    ),
    Skill(
        "compare", "arithmetic", True, _draw_compare, lambda b: _compare(*_integers(b)), lambda b: _sign(*_integers(b)),
    ),
    Skill("evaluate", "arithmetic", True, _draw_evaluate, lambda b: _left_to_right(b.split()), _signed_sum),
    Skill("precedence", "arithmetic", False, _draw_precedence, _precedence, _signed_sum),
    Skill(
        "digitsum", "arithmetic", True, lambda rng, difficulty: str(_digits(rng, difficulty + 3)), _digit_sum,
        lambda b: str(sum(map(int, b))),
    ),
    Skill("compose", "arithmetic", False, _draw_compose, _compose, _compose_truth),
    Skill("story", "arithmetic", False, _draw_story, _story, _story_truth),
)  # fmt: skip
