"""The problems of `chains` with labels: texts with classes, tagged words, and pairs of a right and a wrong solution."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Annotated, Literal

from pydantic import Field

from hone.data.chains import Chains
from hone.data.sample import Sample
from hone.data.skills.base import pick
from hone.data.source import Split
from hone.parts import part

Make = Literal["skill", "verdict", "tags", "pairs"]
MOST = 3  # digits of a solution that are changed to make a wrong one
RIGHT, WRONG = "right", "wrong"
RISES, FALLS, SAME = "rises", "falls", "O"


@part("data", "chains-labelled", papers="original")
@dataclass(kw_only=True)
class ChainsLabelled(Chains):
    """Label what `chains` generates: texts with classes, tagged numbers, and pairs, for models with a head.

    skill: a worked solution without its prompt, whose class is the skill; verdict: a problem with a solution, whose
    class is "right" or "wrong"; tags: the numbers of a problem, each tagged by whether the next one "rises" or "falls",
    "O" where neither, which only what stands to the right of a word tells; pairs: a right solution against a wrong one.

    A wrong solution has one to three digits changed; their number is the margin of a pair. The options of `chains` are
    there too.

    Args:
        make: what is made of the problems: skill, verdict, tags or pairs.
        flips: share of the training labels that are replaced by another of the labels, in [0, 1]; of pairs, the share
            that is turned round.
    """

    make: Make = "skill"
    flips: Annotated[float, Field(ge=0, le=1)] = 0.0

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the samples of a split.

        Args:
            split: "train" (`count` samples) or "eval" (`holdout` different problems, none of whose labels is flipped).
        """
        for sample in super().samples(split):
            rng = Random(f"{self.make}:{self.seed}:{sample.where}")
            made = _MAKERS[self.make](sample, rng)
            yield self._flipped(made, rng) if split == "train" and self.flips else made

    def _flipped(self, sample: Sample, rng: Random) -> Sample:
        """Return a sample some of whose labels are others."""
        if self.make == "pairs":
            return replace(sample, answers=sample.answers[::-1]) if rng.random() < self.flips else sample
        names = {"skill": [skill.name for skill in self._chosen], "verdict": [RIGHT, WRONG]}.get(
            self.make, [RISES, FALLS, SAME]
        )
        labels = [
            pick(rng, [name for name in names if name != label] or [label]) if rng.random() < self.flips else label
            for label in sample.labels
        ]
        return replace(sample, labels=tuple(labels))

    def grade(self, sample: Sample, text: str) -> float:
        """Return 1 when a generated answer to the problem is right; texts and words ask nothing.

        Args:
            sample: a sample of this source.
            text: the generated answer.
        """
        return super().grade(sample, text)

    def fingerprint(self) -> str:
        """Return a hash of the options and of the code that makes the samples."""
        whole = ["chains-labelled", super().fingerprint(), self.make, self.flips, _code()]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    def describe(self) -> str:
        """Return what is made of which problems."""
        return f"{self.make} of {super().describe()}"


def _solution(sample: Sample) -> str:
    return str(sample.answers[0])


def _skill(sample: Sample, rng: Random) -> Sample:
    return replace(sample, kind="text", prompt="", labels=(str(sample.extra["skill"]),))


def _verdict(sample: Sample, rng: Random) -> Sample:
    right = rng.random() < 0.5
    solution = _solution(sample) if right else damaged(_solution(sample), pick(rng, range(1, MOST + 1)), rng)
    text = f"{sample.prompt}{solution}"
    return replace(sample, kind="text", prompt="", answers=(text,), labels=(RIGHT if right else WRONG,))


def _tags(sample: Sample, rng: Random) -> Sample:
    words = re.findall(r"\d+", str(sample.prompt))
    tags = [RISES if int(b) > int(a) else FALLS if int(b) < int(a) else SAME for a, b in pairwise(words)]
    return replace(sample, kind="tagged", prompt="", answers=tuple(words), labels=(*tags, SAME))


def _pairs(sample: Sample, rng: Random) -> Sample:
    number = pick(rng, range(1, MOST + 1))
    wrong = damaged(_solution(sample), number, rng)
    return replace(sample, kind="pair", answers=(_solution(sample), wrong), fields={"margin": float(number)})


_MAKERS: dict[Make, Callable[[Sample, Random], Sample]] = {
    "skill": _skill, "verdict": _verdict, "tags": _tags, "pairs": _pairs,
}  # fmt: skip


def damaged(text: str, number: int, rng: Random) -> str:
    """Return a text with some of its digits changed, at different places.

    Args:
        text: has at least one digit.
        number: how many; all where there are fewer.
        rng: source of randomness.
    """
    letters = list(text)
    places = [at for at, letter in enumerate(letters) if letter.isdigit()]
    for _ in range(min(number, len(places))):
        at = pick(rng, places)
        places.remove(at)
        letters[at] = pick(rng, [digit for digit in "0123456789" if digit != letters[at]])
    return "".join(letters)


@cache
def _code() -> str:
    """Return a hash of this file, so that changing it changes every fingerprint."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
