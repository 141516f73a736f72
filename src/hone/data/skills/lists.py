"""List skills: each worked line rewrites what is left to do, or compares two things that stand in sight."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from hone.data.skills.base import Skill, between, distinct, pick

_TOPS = (50, 100, 100, 1000, 1000)  # numbers are below this at difficulty 1 to 5

Work = tuple[list[str], str]


def _join(values: list[int]) -> str:
    return " ".join(map(str, values))


def _list(body: str) -> list[int]:
    """Return the numbers of a body, without the argument before a colon."""
    return [int(word) for word in body.rpartition(": ")[2].split()]


def _argument(body: str) -> int:
    return int(body.partition(" : ")[0])


def _draw(rng: Random, difficulty: int) -> str:
    return _join(distinct(rng, difficulty + 2, _TOPS[difficulty - 1]))


def _draw_long(rng: Random, difficulty: int) -> str:
    length = between(rng, difficulty + 2, 2 * difficulty + 2)
    return _join(distinct(rng, length, _TOPS[difficulty - 1]))


def _draw_sum(rng: Random, difficulty: int) -> str:
    return _join([between(rng, 1, (20, 50, 99, 99, 199)[difficulty - 1]) for _ in range(difficulty + 2)])


def _draw_repeating(rng: Random, difficulty: int) -> str:
    pool = distinct(rng, difficulty + 1, _TOPS[difficulty - 1])
    return _join([pick(rng, pool) for _ in range(difficulty + 3)])


def _draw_pair(rng: Random, difficulty: int) -> str:
    first = between(rng, 1 + difficulty // 2, 2 + difficulty // 2)
    values = distinct(rng, difficulty + 3, _TOPS[difficulty - 1])
    return f"{_join(sorted(values[:first]))} | {_join(sorted(values[first:]))}"


def _draw_place(rng: Random, difficulty: int) -> str:
    values = distinct(rng, difficulty + 2, _TOPS[difficulty - 1])
    return f"{between(rng, 1, len(values))} : {_join(values)}"


def _draw_member(rng: Random, difficulty: int) -> str:
    values = distinct(rng, difficulty + 2, _TOPS[difficulty - 1])
    return f"{pick(rng, values)} : {_join(values)}"


def _draw_rotate(rng: Random, difficulty: int) -> str:
    values = distinct(rng, difficulty + 2, _TOPS[difficulty - 1])
    return f"{between(rng, 1, min(3, difficulty + 1))} : {_join(values)}"


def _best(better: Callable[[int, int], int]) -> Callable[[str], Work]:
    """Return the work of a running extreme: the best so far, the next number, the better of the two."""

    def work(body: str) -> Work:
        best, *rest = _list(body)
        steps = []
        for value in rest:
            winner = better(best, value)
            steps.append(f"{best} {value} : {winner}")
            best = winner
        return steps, str(best)

    return work


def _count(body: str) -> Work:
    values = _list(body)
    return [f"{place} {value}" for place, value in enumerate(values, 1)], str(len(values))


def _take(order: Callable[[list[int]], int]) -> Callable[[str], Work]:
    """Return the work of taking numbers out one by one: the number taken, then what is left."""

    def work(body: str) -> Work:
        left, taken, steps = _list(body), [], []
        while left:
            taken.append(left.pop(order(left)))
            steps.append(f"{taken[-1]} : {_join(left)}".rstrip())
        return steps, _join(taken)

    return work


def _sum(body: str) -> Work:
    total, *rest = _list(body)
    steps = []
    for value in rest:
        steps.append(f"{total}+{value}={total + value}")
        total += value
    return steps, str(total)


def _evens(body: str) -> Work:
    marks = [(value, "yes" if value % 2 == 0 else "no") for value in _list(body)]
    kept = [value for value, mark in marks if mark == "yes"]
    return [f"{value} {mark}" for value, mark in marks], _join(kept) or "none"


def _unique(body: str) -> Work:
    kept: list[int] = []
    steps = []
    for value in _list(body):
        if value not in kept:
            kept.append(value)
        steps.append(f"{value} : {_join(kept)}")
    return steps, _join(kept)


def _pick(body: str) -> Work:
    values = _list(body)[: _argument(body)]
    return _count(_join(values))[0], str(values[-1])


def _position(body: str) -> Work:
    values = _list(body)
    return _count(_join(values[: values.index(_argument(body)) + 1]))


def _merge(body: str) -> Work:
    left, right = (_list(half) for half in body.split("|"))
    taken, steps = [], []
    while left or right:
        head = right if not left or (right and right[0] < left[0]) else left
        taken.append(head.pop(0))
        steps.append(" ".join(f"{taken[-1]} : {_join(left)} | {_join(right)}".split()))
    return steps, _join(taken)


def _rotate(body: str) -> Work:
    values, steps = _list(body), []
    for _ in range(_argument(body)):
        values.append(values.pop(0))
        steps.append(_join(values))
    return steps, _join(values)


def _rotated(body: str) -> str:
    values, by = _list(body), _argument(body)
    return _join(values[by:] + values[:by])


LISTS = (
    Skill("maximum", "list", True, _draw, _best(max), lambda b: str(max(_list(b)))),
    Skill("minimum", "list", True, _draw, _best(min), lambda b: str(min(_list(b)))),
    Skill("first", "list", True, _draw_long, lambda b: ([], str(_list(b)[0])), lambda b: b.split()[0]),
    Skill("last", "list", True, _draw_long, lambda b: ([], str(_list(b)[-1])), lambda b: b.split()[-1]),
    Skill("length", "list", True, _draw_long, _count, lambda b: str(b.count(" ") + 1)),
    Skill("reverse", "list", True, _draw, _take(lambda left: len(left) - 1), lambda b: _join(_list(b)[::-1])),
    Skill("sort", "list", False, _draw, _take(lambda left: left.index(min(left))), lambda b: _join(sorted(_list(b)))),
    Skill("sum", "list", True, _draw_sum, _sum, lambda b: str(sum(_list(b)))),
    Skill(
        "evens", "list", True, _draw, _evens, lambda b: " ".join(w for w in b.split() if w[-1] in "02468") or "none",
    ),
    Skill("unique", "list", False, _draw_repeating, _unique, lambda b: " ".join(dict.fromkeys(b.split()))),
    Skill("pick", "list", True, _draw_place, _pick, lambda b: str(_list(b)[_argument(b) - 1])),
    Skill("position", "list", True, _draw_member, _position, lambda b: str(_list(b).index(_argument(b)) + 1)),
    Skill("merge", "list", False, _draw_pair, _merge, lambda b: _join(sorted(_list(b.replace("| ", ""))))),
    Skill("rotate", "list", False, _draw_rotate, _rotate, _rotated),
)  # fmt: skip
