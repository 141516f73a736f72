"""Data that teaches a model to correct itself: its own answer stands in the prompt, the reference is what it learns."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from hone.data.sample import Sample
from hone.data.sampled import ModelMade, reference
from hone.data.source import Split
from hone.parts import part


@part(
    "data",
    "correction",
    papers=[
        (
            "Bridging the Training-Inference Gap in LLMs by Leveraging Self-Generated Tokens",
            "arXiv:2410.14655",
        )
    ],
    claim="A model that learns to give the reference answer behind its own imperfect one corrects itself, without a "
    "judge or a stronger model (reference-answer-based correction).",
    deviations="Verified from the abstract and summaries only: no official code is public, and the words between the "
    "two answers are ours.",
)
@dataclass(kw_only=True)
class Correction(ModelMade):
    """The reference answer to a prompt that ends with the model's own answer, beside the plain samples of the source.

    prompt, own answer, `ask` -> reference; and prompt -> reference where `plain` is set

    Evaluation asks the source's own prompts, or, with `asked: again`, those that end with a wrong first answer, so
    that its accuracy tells how many mistakes are mended.

    Args:
        wrong: take the answers alone that the source grades as wrong; otherwise all, as the paper needs no grade.
        plain: train on each sample of the source as it is, too.
        ask: what stands between the two answers.
        asked: whether evaluation asks the source's prompts ("once"), or for a correction ("again"); training is the
            same either way.
    """

    wrong: bool = False
    plain: bool = True
    ask: str = "\ncorrected:\n"
    asked: Literal["once", "again"] = "once"

    def _choices(self) -> list[Any]:
        return [self.wrong, self.plain, self.ask, self.asked]

    def describe(self) -> str:
        """Return what is corrected."""
        return f"corrections of {self.samples_each} answers to each prompt of {self.of.describe()}"

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the samples of the source, each followed by its corrections.

        Args:
            split: "train" or "eval".

        Raises:
            DataError: a sample has no answer in plain text, or no model answers.
        """
        again = split == "eval" and self.asked == "again"
        made = self._made(split, plain=self.plain and not again, wrong=self.wrong or again)
        return itertools.islice(made, self.limit if split == "train" else None)

    def questions(self, split: Split) -> Iterator[Sample]:
        """Yield what evaluation asks: the source's prompts, or those that end with a wrong answer.

        Args:
            split: "train" or "eval".
        """
        return self.of.questions(split) if self.asked == "once" else self._made(split, plain=False, wrong=True)

    def grade(self, sample: Sample, text: str) -> float | None:
        """Return the grade by the source, of the answer to its own prompt.

        Args:
            sample: a sample of the source, or a correction.
            text: the generated answer.
        """
        prompt = sample.extra.get("first_prompt", sample.prompt)
        grade: float | None = self.of.grade(replace(sample, prompt=prompt), text)
        return grade

    def _made(self, split: Split, *, plain: bool, wrong: bool) -> Iterator[Sample]:
        asked = self._plain(split)
        for sample, texts in zip(asked, self.answers(asked, split), strict=True):
            answer = reference(sample)
            if plain:
                yield sample
            for text in dict.fromkeys(texts):
                if text.strip() and not (wrong and self.of.grade(sample, text) == 1):
                    extra = {**sample.extra, "first_prompt": sample.prompt}
                    yield replace(
                        sample,
                        kind="completion",
                        prompt=f"{sample.prompt}{text}{self.ask}",
                        answers=(answer,),
                        extra=extra,
                    )
