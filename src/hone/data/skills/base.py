"""What a skill of the `chains` data is, and the draws it is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Problem:
    """One problem with its worked solution.

    Args:
        prompt: what is asked: the skill's name, the body, " =" and a new line.
        steps: the worked steps, a line each; empty where the answer is seen at once.
        answer: the exact answer.
    """

    prompt: str
    steps: list[str]
    answer: str

    def solution(self, steps: bool = True) -> str:
        """Return the text that is trained after the prompt; its last line is "answer: " and the answer.

        Args:
            steps: with the worked steps.
        """
        return "\n".join([*(self.steps if steps else []), f"answer: {self.answer}"])


@dataclass(frozen=True)
class Skill:
    """One kind of problem. The body of a prompt says all of it, so work and check start from the body alone.

    Args:
        name: the word that every prompt of the skill begins with.
        family: "arithmetic" or "list".
        easy: belongs to the group "easy", where a model starts; the others make up "hard".
        draw: (rng, difficulty 1 to 5) to the body of a prompt, e.g. "47 + 38".
        work: body to (worked steps, answer), where the answer is what the steps lead to.
        truth: body to the exact answer, computed without the steps.
    """

    name: str
    family: str
    easy: bool
    draw: Callable[[Random, int], str]
    work: Callable[[str], tuple[list[str], str]]
    truth: Callable[[str], str]

    def generate(self, rng: Random, difficulty: int) -> Problem:
        """Draw a problem.

        Args:
            rng: source of randomness; only its `random()` is used, which every Python release computes alike.
            difficulty: 1 (a line or two of work) to 5 (about ten).
        """
        body = self.draw(rng, difficulty)
        steps, answer = self.work(body)
        return Problem(f"{self.name} {body} =\n", steps, answer)

    def solve(self, prompt: str) -> str:
        """Return the exact answer to a prompt of this skill."""
        return self.truth(prompt.strip().removeprefix(self.name).removesuffix("=").strip())

    def check(self, prompt: str, answer: str) -> bool:
        """Return whether an answer is right, recomputed from the prompt; white space does not count."""
        return answer.split() == self.solve(prompt).split()


def between(rng: Random, low: int, high: int) -> int:
    """Draw an integer from `low` to `high`, both included.

    Args:
        rng: the generator.
        low: smallest integer.
        high: largest integer.
    """
    return low + int(rng.random() * (high - low + 1))


def pick(rng: Random, items: Sequence[Item]) -> Item:
    """Draw one item."""
    return items[int(rng.random() * len(items))]


def distinct(rng: Random, count: int, top: int) -> list[int]:
    """Draw `count` different integers below `top`, in random order.

    Args:
        rng: the generator.
        count: how many, at most `top`.
        top: one more than the largest.
    """
    found: dict[int, None] = {}
    while len(found) < count:
        found[between(rng, 0, top - 1)] = None
    return list(found)
