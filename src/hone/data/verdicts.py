"""Data that trains a model to judge solutions: a problem with a solution and the question whether it is right."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from hone.data.sample import Sample
from hone.data.sampled import ModelMade, reference
from hone.data.scoring import RIGHT, WRONG, question
from hone.data.source import Split
from hone.parts import part

ANSWER = "verdict"  # column of a sample that asks for one: the right verdict


@part(
    "data",
    "verdicts",
    papers=[("Improving Large Language Model Fine-tuning for Solving Math Problems", "arXiv:2310.10047")],
    claim="Training on solutions, then on verdicts over the model's own solutions, and on solutions again, gives a "
    "model that solves better and tells which of its solutions to trust.",
    deviations="Verified from the abstract and summaries. The paper's pairwise margin compares a right and a wrong "
    "solution; make: pairs sets the two verdicts on one solution against each other, for a margin loss such as slic.",
)
@dataclass(kw_only=True)
class Verdicts(ModelMade):
    """Verdicts on the model's own solutions, graded by the source.

    problem, solution, "verdict:" -> right or wrong

    Where the model gave no right solution, the source's own is taken for one, so that both verdicts are met. Evaluation
    asks for verdicts, whose grade is 1 when they are right.

    Args:
        make: "likelihood" (the right verdict as an answer, for sft), or "pairs" (it against the other one).
        balance: take as many right as wrong solutions of each problem.
        plain: train on each sample of the source as it is, too.
    """

    make: Literal["likelihood", "pairs"] = "likelihood"
    balance: bool = True
    plain: bool = False

    def _choices(self) -> list[Any]:
        return [self.make, self.balance, self.plain]

    def describe(self) -> str:
        """Return what is judged."""
        return f"verdicts on {self.samples_each} answers to each prompt of {self.of.describe()}"

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the verdicts, and the samples of the source where they are asked for.

        Args:
            split: "train" or "eval".

        Raises:
            DataError: the source cannot tell right answers, or no model answers.
        """
        return itertools.islice(self._made(split, self.plain), self.limit if split == "train" else None)

    def questions(self, split: Split) -> Iterator[Sample]:
        """Yield what evaluation asks: the problems with solutions.

        Args:
            split: "train" or "eval".
        """
        return self._made(split, False)

    def grade(self, sample: Sample, text: str) -> float | None:
        """Return 1 for the right verdict, or the source's grade of a solution.

        Args:
            sample: a sample of this source.
            text: the generated answer.
        """
        if ANSWER in sample.extra:
            return float(text.strip() == sample.extra[ANSWER])
        return super().grade(sample, text)

    def _made(self, split: Split, plain: bool) -> Iterator[Sample]:
        asked = self._plain(split)
        for sample, texts in zip(asked, self.answers(asked, split), strict=True):
            if plain:
                yield sample
            grades = {text: self.is_right(sample, text) for text in dict.fromkeys(texts) if text.strip()}
            right = [text for text, good in grades.items() if good] or [reference(sample)]
            wrong = [text for text, good in grades.items() if not good]
            if self.balance:
                count = min(len(right), len(wrong))
                right, wrong = right[:count], wrong[:count]
            for text, verdict in [*((text, RIGHT) for text in right), *((text, WRONG) for text in wrong)]:
                other = WRONG if verdict == RIGHT else RIGHT
                yield replace(
                    sample, kind="pair" if self.make == "pairs" else "completion",
                    prompt=question(str(sample.prompt), text),
                    answers=(verdict, other) if self.make == "pairs" else (verdict,),
                    extra={**sample.extra, ANSWER: verdict},
                )  # fmt: skip
