"""Fine-tuning data in the model's own words, wherever these are right."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import Field

from hone.data.sample import Sample, opened
from hone.data.sampled import ModelMade, prompt_text, reference
from hone.data.source import Split
from hone.parts import part

OWN = "own"  # in `extra`: "answer" where the target is the model's answer, "paraphrase", or "" where it is the source's


@part(
    "data",
    "s3ft",
    papers=[
        (
            "Selective Self-to-Supervised Fine-Tuning for Generalization in Large Language Models",
            "arXiv:2502.08130",
        )
    ],
    claim="Training on the model's own answers where they are right, and on the source's answer or a paraphrase of it "
    "elsewhere, learns the task better and halves what fine-tuning loses on other benchmarks.",
    deviations="Verified from the abstract and summaries. The judge is the source's own grade. Held-out samples keep "
    "the source's answers, so that losses compare with those of plain fine-tuning.",
)
@dataclass(kw_only=True)
class S3FT(ModelMade):
    """Replace answers by what the model itself says, as far as that is right.

    The model answers every prompt; a right answer becomes the target. Otherwise the model is asked to paraphrase the
    source's answer, where `paraphrase` says how; a paraphrase that is right becomes the target, else the source's
    answer as it is.

    Args:
        paraphrase: prompt that asks for a paraphrase, in which {prompt} and {answer} stand for the sample's; None asks
            for none.
        samples_each: answers to each prompt, of which the first right one is taken.
        temperature: of the sampling; 0 picks the most probable token.
    """

    samples_each: Annotated[int, Field(ge=1)] = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0
    paraphrase: str | None = None

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the prompt for paraphrases."""
        if self.paraphrase is not None and "{answer}" not in self.paraphrase:
            yield "paraphrase", "expected a prompt with {answer} in it, and {prompt} where the question shall stand"

    def _choices(self) -> list[Any]:
        return [self.paraphrase]

    def describe(self) -> str:
        """Return whose answers are replaced."""
        return f"own right answers to {self.of.describe()}"

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the samples with their new answers; held-out ones as they are.

        Args:
            split: "train" or "eval".

        Raises:
            DataError: the source cannot tell right answers, or no model answers.
        """
        samples: Iterator[Sample] = self.of.samples(split)
        if split == "eval":
            return samples
        return self._replaced([opened(sample) for sample in itertools.islice(samples, self.limit)])

    def _replaced(self, samples: list[Sample]) -> Iterator[Sample]:
        own = [
            next((text for text in texts if self.is_right(sample, text)), None)
            for sample, texts in zip(samples, self.answers(samples, "train"), strict=True)
        ]
        others = [sample for sample, text in zip(samples, own, strict=True) if text is None]
        paraphrases = iter(self._paraphrases(others))
        for sample, text in zip(samples, own, strict=True):
            kind = "answer"
            if text is None:
                text = next(paraphrases)
                kind = "" if text is None else "paraphrase"
            answers = sample.answers if text is None else (text,)
            yield replace(sample, kind="completion", answers=answers, extra={**sample.extra, OWN: kind})

    def _paraphrases(self, samples: list[Sample]) -> list[str | None]:
        """Return a right paraphrase of each sample's answer, None where there is none."""
        if self.paraphrase is None:
            return [None] * len(samples)
        asked = [
            replace(sample, prompt=_filled(self.paraphrase, prompt_text(sample), reference(sample)))
            for sample in samples
        ]
        found = zip(samples, self.answers(asked, "paraphrase"), strict=True)
        return [next((text for text in texts if self.is_right(sample, text)), None) for sample, texts in found]


def _filled(template: str, prompt: str, answer: str) -> str:
    """Return the template with both put in; what stands in braces elsewhere, or in them, stays."""
    head, _, tail = template.partition("{answer}")
    return f"{head.replace('{prompt}', prompt)}{answer}{tail.replace('{prompt}', prompt)}"
