"""Rewards for the steps of an answer: what each is worth, refined so that more steps are not worth more for ever."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from hone.options import Nested
from hone.parts import part
from hone.rewards.base import Attempt, Reward, Score, complete

if TYPE_CHECKING:
    from hone.data.source import Source

Refine = Literal["none", "clip", "delta", "clip-delta"]
SENTENCE = re.compile(r".*?(?:[.!?]+(?=\s|$)\s*|\n+|$)", re.DOTALL)
NUMBER = r"\d+(?:\.\d+)?"
TERM = rf"[-(]{{0,9}}{NUMBER}\){{0,9}}"
SIDE = rf"{TERM}(?: *(?://|[-+*/%]) *{TERM}){{0,40}}"  # bounded: "1+1+1+..." would take quadratic time
EQUATION = re.compile(rf"(?<![\w.(])({SIDE}) *=(?= *({SIDE}))")
SIGNS = str.maketrans({"\u00d7": "*", "\u00f7": "/", "\u2212": "-"})
LONGEST = 200  # characters of one side of an equation


def divided(a: float, b: float) -> float:
    """Return a / b, which stays a whole number where whole numbers give one."""
    whole = isinstance(a, int) and isinstance(b, int) and a % b == 0
    return a // b if whole else a / b


OPERATIONS = {
    ast.Add: lambda a, b: a + b, ast.Sub: lambda a, b: a - b, ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b, ast.Div: divided, ast.Mod: lambda a, b: a % b,
}  # fmt: skip


def ends_of(text: str, segments: str) -> list[int]:
    """Return where the steps of a text end, with the white space that follows them; empty ones do not count.

    Args:
        text: an answer.
        segments: "lines" or "sentences".
    """
    if segments == "lines":
        pieces = text.splitlines(keepends=True)
    else:
        pieces = [piece for piece in SENTENCE.findall(text) if piece]
    ends, place = list[int](), 0
    for piece in pieces:
        place += len(piece)
        if piece.strip():
            ends.append(place)
    return ends


def refined(values: Sequence[float], refine: str, threshold: float) -> list[float]:
    """Return the worths of the steps of one answer so that their sum is bounded, however many there are.

    clip: min(v_k - threshold, 0); delta: v_k - v_(k+1), the last but one keeps v and the last is worth nothing, since
    the answer's own reward speaks for it; clip-delta: the one after the other.

    Args:
        values: v_k of the K steps.
        refine: "none", "clip", "delta" or "clip-delta".
        threshold: of clip: good steps reach it and are worth nothing.
    """
    found = list(values)
    if refine in ("clip", "clip-delta"):
        found = [min(value - threshold, 0.0) for value in found]
    if refine in ("delta", "clip-delta"):
        following = [*found[1:-1], 0.0, 0.0]
        found = [value - after for value, after in zip(found[:-1], following, strict=False)] + [0.0] * bool(found)
    return found


@part(
    "reward",
    "process",
    papers=[("On Designing Effective RL Reward at Training Time for LLM Reasoning", "arXiv:2410.15115")],
    claim="Rewards for steps are hacked by repeating good steps; clipping them and taking differences bounds their "
    "sum, so that they help beside the reward for a right answer.",
    deviations="The values may come from any reward, by rule or by model, and alpha is the weight; a model judges "
    "prefixes one by one (`on: prefixes`).",
)
@dataclass(kw_only=True)
class Process(Reward):
    """Reward each step of an answer by another reward, or several, and refine what they are worth.

    v_k = sum_j weight_j reward_j(step k);  worth of step k = v_k refined (see `refined`), credited at its end

    Args:
        of: the reward of a step, or a list of them, e.g. {name: true-equations, right: 1.0}.
        on: what they are shown: the "steps" one by one, or the "prefixes" of the answer that end with them.
        segments: what a step is: "lines" or "sentences".
        refine: "none", "clip", "delta" or "clip-delta".
        threshold: of clip: a step worth as much is good, and costs nothing.
    """

    of: Annotated[Any, Nested("reward", several=True)]
    on: Literal["steps", "prefixes"] = "steps"
    segments: Literal["lines", "sentences"] = "lines"
    refine: Refine = "none"
    threshold: float = 0.0

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the inner rewards."""
        if not self.inner():
            yield "of", "expected a reward of steps, or a list of them; the list is empty"
        for reward in self.inner():
            if reward.scale != "none":
                yield "of", f"reward '{reward.name}': scale: {reward.scale} is for whole answers; set it on 'process'"

    def inner(self) -> list[Reward]:
        """Return the rewards of steps."""
        return list(self.of) if isinstance(self.of, list) else [self.of]

    def setup(self, run: Any) -> None:
        """Let the inner rewards prepare.

        Args:
            run: the run in progress.
        """
        for reward in self.inner():
            reward.setup(run)

    def texts(self, attempts: Sequence[Attempt]) -> int:
        """Return how many steps the inner rewards are shown.

        Args:
            attempts: all answers of a phase.
        """
        return sum(len(ends_of(attempt.text, self.segments)) for attempt in attempts)

    def longest(self, answers: int) -> float:
        """Return how many seconds the inner rewards take at most, one after the other.

        Args:
            answers: how many steps they judge.
        """
        return sum(reward.longest(answers) for reward in self.inner())

    def score(self, attempts: Sequence[Attempt], source: Source) -> list[Score]:
        """Return the worths of the steps of each attempt.

        Args:
            attempts: all answers of a phase.
            source: the data that was asked.

        Raises:
            HoneError: an inner reward does not give one number for each step.
        """
        places = [ends_of(attempt.text, self.segments) for attempt in attempts]
        steps = [step for one, ends in zip(attempts, places, strict=True) for step in self._steps(one, ends)]
        worths = np.zeros(len(steps))
        for reward in self.inner():
            given = complete(reward, steps, source) if steps else []
            worths += reward.weight * np.array([one.total if isinstance(one, Score) else float(one) for one in given])
        scores, taken = [], 0
        for ends in places:
            values = worths[taken : taken + len(ends)].tolist()
            taken += len(ends)
            found = refined(values, self.refine, self.threshold)
            scores.append(Score(0.0, tuple(zip(ends, found, strict=True))))
        return scores

    def _steps(self, attempt: Attempt, ends: list[int]) -> list[Attempt]:
        """Return what the inner rewards are shown."""
        none = np.zeros(0, np.int32)
        last = len(ends) - 1
        if self.on == "prefixes":
            return [
                replace(attempt, text=attempt.text[:end], tokens=none, stopped=attempt.stopped and i == last)
                for i, end in enumerate(ends)
            ]
        begins = [0, *ends][: len(ends)]
        return [
            replace(attempt, text=attempt.text[begin:end].strip(), tokens=none, before="", stopped=True)
            for begin, end in zip(begins, ends, strict=True)
        ]


@part(
    "reward",
    "fine-grained",
    papers=[
        ("Fine-Grained Human Feedback Gives Better Rewards for Language Model Training", "arXiv:2306.01693"),
        ("FGAIF: Aligning Large Vision-Language Models with Fine-grained AI Feedback", "arXiv:2404.05046"),
    ],
    claim="Several rewards of different kinds, each given at the segment that earns it, teach faster than one at the "
    "end.",
    deviations="Text alone. The rewards are any of hone's, with their weights; both papers train three models.",
)
@dataclass(kw_only=True)
class FineGrained(Process):
    """Reward each segment of an answer by several rewards: r_j = sum_k weight_k reward_k(segment j), at its end.

    Args:
        of: the rewards, each with its weight, e.g. [{name: repetition, weight: 0.5}, true-equations].
        segments: "sentences" or "lines".
    """

    segments: Literal["lines", "sentences"] = "sentences"


def value_of(text: str) -> float | None:
    """Return the value of a text of numbers and + - * / // %, None where it is no such thing; whole ones are exact.

    Args:
        text: one side of an equation.
    """
    if len(text) > LONGEST:
        return None
    try:
        return _value(ast.parse(re.sub(r"(?<![\d.])0+(?=\d)", "", text.strip()), mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, OverflowError, RecursionError, MemoryError):
        return None


def equations(text: str) -> list[tuple[str, str]]:
    """Return the two sides of each equation of numbers that computes something: "x + 3 = 7" and "x = 7" are none.

    Args:
        text: it may write 1,000 for 1000, and the signs of times, divided by and minus in type.
    """
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text.translate(SIGNS))
    found = []
    for match in EQUATION.finditer(text):
        line = text[max(0, match.start() - LONGEST) : match.start()].rpartition("\n")[2]
        before = line.strip()  # what a sign in front of it belongs to; alone in its line it is the mark of a list
        part_of_more = before[-1:] in tuple("+-*/%^") and before not in tuple("+-*")
        sides = match.group(1), match.group(2)
        if not part_of_more and not line.endswith(",") and any(re.search(r"[\d)] *[-+*/%]", side) for side in sides):
            found.append(sides)
    return found


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int(number) | float(number)):
            return number
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_value(inner)
        case ast.BinOp(left=left, op=operation, right=right) if type(operation) in OPERATIONS:
            return OPERATIONS[type(operation)](_value(left), _value(right))
    raise ValueError(ast.dump(node))


def equal(left: float | None, right: float | None) -> bool:
    """Return whether two values are the same: whole numbers exactly, others to nine digits.

    Args:
        left: value of one side, None where it has none.
        right: that of the other.
    """
    if left is None or right is None or (isinstance(left, int) and isinstance(right, int)):
        return left is not None and left == right
    return math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-12)


@part("reward", "true-equations", papers="original")
@dataclass(kw_only=True)
class TrueEquations(Reward):
    """Reward a text whose equations of numbers are all true, if it has any: "3+4=7" is, "3+4=8" and "yes" are not.

    Args:
        right: worth of a text with equations that are all true.
        wrong: worth of any other.
    """

    right: float = 1.0
    wrong: float = 0.0

    def score(self, attempts: Sequence[Attempt], source: Source) -> list[float]:
        """Return the worth of each attempt.

        Args:
            attempts: all answers of a phase.
            source: not looked at.
        """
        return [self.right if self._true(attempt.whole) else self.wrong for attempt in attempts]

    def _true(self, text: str) -> bool:
        return bool(sides := equations(text)) and all(equal(value_of(left), value_of(right)) for left, right in sides)


@part("reward", "hackable-process", papers="original")
@dataclass(kw_only=True)
class Hackable(Process):
    """Pay for every line with a true equation: a process reward that can be hacked, for demonstrations.

    It does not ask whether a line belongs to the problem, or stood there before, so that repeating true lines is paid
    without end. `refine: clip-delta` with `threshold: 1` cures it; 'process' with 'true-equations' is the same.

    Args:
        of: not an option; lines with true equations are worth 1.
    """

    of: Any = field(init=False, default_factory=TrueEquations)
