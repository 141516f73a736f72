"""How varied generated text is, and how much of it was copied."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from hone.data.sample import Sample
from hone.parts import part

if TYPE_CHECKING:
    from hone.data.source import Source

_WORD = re.compile(r"\w+|[^\w\s]")


def words_of(text: str) -> list[str]:
    """Return the words and the marks of punctuation of a text."""
    return _WORD.findall(text)


def type_token_ratio(words: Sequence[str]) -> float:
    """Return the share of different words: |set| / |words|.

    Args:
        words: at least one.
    """
    return len(set(words)) / len(words)


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return the n-grams of a text in order.

    Args:
        words: its words.
        n: words of an n-gram.
    """
    return [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]


def repeated(words: Sequence[str], n: int) -> float:
    """Return the share of n-grams that came before in the same text: 1 - |set| / |n-grams|.

    Args:
        words: at least `n` of them.
        n: words of an n-gram.
    """
    grams = ngrams(words, n)
    return 1 - len(set(grams)) / len(grams)


@part(
    "metric",
    "type-token-ratio",
    papers=[
        (
            "The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation",
            "arXiv:2412.04318",
        )
    ],
    claim="The type-token ratio of long generated text goes with what people prefer.",
    deviations="Types are words and marks of punctuation instead of the model's tokens, so that models with different "
    "tokenizers compare.",
)
@dataclass(kw_only=True)
class TypeTokenRatio:
    """Share of different words in the last words of a generated answer, in (0, 1].

    Args:
        window: words at the end that are looked at, marks of punctuation included.
    """

    window: Annotated[int, Field(ge=1)] = 96

    def __call__(self, source: Source, sample: Sample, text: str) -> float | None:
        """Return the type-token ratio of a generated answer.

        Args:
            source: the source that the sample came from.
            sample: the sample that was asked.
            text: the generated answer.

        Returns:
            None where there is no word.
        """
        words = words_of(text)[-self.window :]
        return type_token_ratio(words) if words else None


@part(
    "metric",
    "repetition",
    papers=[("Neural Text Generation with Unlikelihood Training", "arXiv:1908.04319")],
    claim="Greedy text of models that were trained by likelihood repeats n-grams far more often than people do.",
    deviations="Words and marks of punctuation stand for tokens.",
)
@dataclass(kw_only=True)
class Repetition:
    """Share of n-grams of a generated answer that came before in it (rep-n, seq-rep-n), in [0, 1).

    Args:
        n: words of an n-gram, marks of punctuation included.
    """

    n: Annotated[int, Field(ge=1)] = 4

    def __call__(self, source: Source, sample: Sample, text: str) -> float | None:
        """Return the share of repeated n-grams of a generated answer.

        Args:
            source: the source that the sample came from.
            sample: the sample that was asked.
            text: the generated answer.

        Returns:
            None where it is shorter than an n-gram.
        """
        words = words_of(text)
        return repeated(words, self.n) if len(words) >= self.n else None


@part("metric", "copied", papers="original")
@dataclass(kw_only=True)
class Copied:
    """Share of n-grams of a generated answer that stand in the training samples of the data, in [0, 1].

    Args:
        n: words of an n-gram, marks of punctuation included.
    """

    n: Annotated[int, Field(ge=1)] = 8
    _known: tuple[str, set[tuple[str, ...]]] | None = field(default=None, init=False, repr=False)

    def __call__(self, source: Source, sample: Sample, text: str) -> float | None:
        """Return the share of a generated answer's n-grams that were trained on.

        Args:
            source: the source that the sample came from; its training samples are read once.
            sample: the sample that was asked.
            text: the generated answer.

        Returns:
            None where it is shorter than an n-gram.
        """
        grams = ngrams(words_of(text), self.n)
        known = self._trained(source)
        return sum(gram in known for gram in grams) / len(grams) if grams else None

    def _trained(self, source: Source) -> set[tuple[str, ...]]:
        key = source.fingerprint()
        if self._known is None or self._known[0] != key:
            texts = (_text(sample) for sample in source.samples("train"))
            self._known = key, {gram for text in texts for gram in ngrams(words_of(text), self.n)}
        return self._known[1]


def _text(sample: Sample) -> str:
    """Return all that a sample says, its prompt included."""
    parts = [sample.prompt, *sample.answers]
    return " ".join(part if isinstance(part, str) else " ".join(turn.text for turn in part) for part in parts)
