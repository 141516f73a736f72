"""Generated sentences that cannot be translated word by word: the end of a clause says what its words mean."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Annotated

from pydantic import Field

from hone.data.sample import Sample
from hone.data.source import Source, Split
from hone.parts import part

WORDS = "abcdefgh"  # what the words of a clause are before its last one
ENDS = "ABCDEFGH"  # the last words
EVAL_SHARE = 16  # one sentence in so many is kept for evaluation, whatever the seed


@part("data", "clauses", papers="original")
@dataclass(kw_only=True)
class Clauses(Source):
    """Generate sentences in clauses whose last word says how all words are translated: "a c B h D" is "B B B D D".

    It is like a verb at the end: an interpreter must wait for the end of a clause, and for no more. Each sample says in
    the column "alignment" which words belong together ("0-0 2-0 ...", source and target from 0): each word and the last
    one of its clause. A hash of a sentence decides whether it belongs to training or to evaluation.

    Args:
        clauses: clauses of a sentence.
        longest: most words of a clause; their number is drawn uniformly from 1.
        count: number of training samples.
        seed: training samples are drawn from it.
    """

    clauses: Annotated[int, Field(ge=1)] = 3
    longest: Annotated[int, Field(ge=1)] = 4
    count: Annotated[int, Field(gt=0)] = 10_000
    seed: int = 0

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the samples of a split.

        Args:
            split: "train" (`count` samples) or "eval" (`holdout` samples).
        """
        number = min(self.count, self.limit or self.count) if split == "train" else self.holdout
        start = self.seed if split == "train" else "eval"
        for index in range(number):
            yield self._sample(Random(f"{start}:{index}"), split, f"clauses:{split}:{index}")

    def _sample(self, rng: Random, split: Split, where: str) -> Sample:
        while True:
            lengths = [rng.randint(1, self.longest) for _ in range(self.clauses)]
            groups = [[*rng.choices(WORDS, k=length - 1), rng.choice(ENDS)] for length in lengths]
            source = " ".join(word for group in groups for word in group)
            if is_eval(source) == (split == "eval"):
                break
        target = " ".join(group[-1] for group in groups for _ in group)
        ends = [sum(lengths[: number + 1]) - 1 for number, length in enumerate(lengths) for _ in range(length)]
        links = " ".join(f"{place}-{place} {end}-{place}" for place, end in enumerate(ends))
        return Sample(
            kind="completion", prompt=source, answers=(target,), extra={"alignment": links, "answer": target},
            where=where,
        )  # fmt: skip

    def fingerprint(self) -> str:
        """Return a hash of the options and of this file."""
        options = [self.clauses, self.longest, self.count, self.limit, self.seed, self.holdout]
        return hashlib.sha256(json.dumps(["clauses", *options, _code()]).encode()).hexdigest()

    def describe(self) -> str:
        """Return what is generated."""
        return f"clauses: sentences of {self.clauses} clauses of up to {self.longest} words"


def is_eval(sentence: str) -> bool:
    """Return whether a sentence is kept for evaluation: one in 16, by a hash of its text.

    Args:
        sentence: the source sentence.
    """
    return hashlib.blake2b(sentence.encode(), digest_size=1).digest()[0] % EVAL_SHARE == 0


@cache
def _code() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
