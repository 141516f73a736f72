"""Random arithmetic expressions that no training text can hold: a clean measure of what rewards teach."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Annotated, Literal

from pydantic import Field

from hone.data.sample import Sample
from hone.data.source import Source, Split
from hone.parts import part

Chosen = Annotated[list[Literal["+", "-", "*", "/"]], Field(min_length=1)]


def apply(left: Fraction, sign: str, right: Fraction) -> Fraction:
    """Return the value of left sign right; dividing by 0 gives 0, which no expression asks for.

    Args:
        left: a number.
        sign: one of + - * /.
        right: a number.
    """
    match sign:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case _:
            return left / right if right else Fraction(0)


@part(
    "data",
    "random-calculation",
    papers=[
        (
            "Reasoning or Memorization? Unreliable Results of Reinforcement Learning Due to Data Contamination",
            "arXiv:2507.10532",
        )
    ],
    claim="On problems that cannot have leaked into pretraining, only right rewards teach: random and inverted ones do "
    "not.",
    deviations="Expressions are folded from the left, with brackets; the paper's generator builds them from shorter "
    "ones. Its probe of leaked benchmarks, which asks for the rest of a cut question, is source `openings` over the "
    "questions.",
)
@dataclass(kw_only=True)
class RandomCalculation(Source):
    """Ask for the value of random expressions such as "((7 + 3) * 2) - 5 =".

    The answer shows each step on a line of its own and ends with "answer: 15". Problem i depends on the options and i
    alone, and evaluation problems never train.

    Args:
        steps: operations in an expression; one is drawn from a list.
        operations: which signs may stand in it.
        largest: numbers are drawn from 0 to this.
        count: training problems.
        seed: they are drawn from it.
    """

    steps: list[Annotated[int, Field(ge=1)]] | Annotated[int, Field(ge=1)] = 2
    operations: Chosen = field(default_factory=lambda: ["+", "-"])
    largest: Annotated[int, Field(ge=1)] = 9
    count: Annotated[int, Field(gt=0)] = 10_000
    seed: Annotated[int, Field(ge=0)] = 0

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the problems of a split.

        Args:
            split: "train" or "eval".
        """
        number = min(self.count, self.limit or self.count) if split == "train" else self.holdout
        taken, index = 0, 0
        seen: set[str] = set()
        while taken < number and index < 50 * number + 1000:
            sample = self._problem(split, index)
            index += 1
            key = int(hashlib.blake2b(str(sample.prompt).encode(), digest_size=4).hexdigest(), 16)
            if (key % 8 == 0) != (split == "eval") or (split == "eval" and sample.prompt in seen):
                continue
            seen.add(str(sample.prompt))
            taken += 1
            yield sample

    def _problem(self, split: Split, index: int) -> Sample:
        rng = Random(f"{self.seed if split == 'train' else 'eval'}:{index}")
        count = self.steps if isinstance(self.steps, int) else rng.choice(self.steps)
        value = Fraction(rng.randint(0, self.largest))
        text, lines = str(value), list[str]()
        for step in range(count):
            sign, other = rng.choice(self.operations), rng.randint(0, self.largest)
            if sign == "/":
                other = max(1, other)
            text = f"({text}) {sign} {other}" if step else f"{text} {sign} {other}"
            found = apply(value, sign, Fraction(other))
            lines.append(f"{value} {sign} {other} = {found}")
            value = found
        answer = str(value)
        return Sample(
            kind="completion", prompt=f"{text} =\n", answers=("\n".join([*lines, f"answer: {answer}"]),),
            extra={"answer": answer, "steps": count}, where=f"random-calculation:{split}:{index}",
        )  # fmt: skip

    def fingerprint(self) -> str:
        """Return a hash of the options and of the code that makes the problems."""
        options = [self.steps, self.operations, self.largest, self.count, self.limit, self.seed, self.holdout]
        code = Path(inspect.getfile(type(self))).read_bytes()
        return hashlib.sha256(json.dumps(options).encode() + code).hexdigest()
