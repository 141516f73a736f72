"""How late and how well a simultaneous translation was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hone.data.east import SOURCE, East
from hone.data.sample import Sample
from hone.parts import part

if TYPE_CHECKING:
    from hone.data.source import Source


@part(
    "metric",
    "average-lagging",
    papers=[
        (
            "STACL: Simultaneous Translation with Implicit Anticipation and Controllable Latency using "
            "Prefix-to-Prefix Framework",
            "arXiv:1810.08398",
        )
    ],
    claim="The lag of wait-k behind an ideal interpreter is k words where source and target are equally long.",
    deviations="|Y| is the length of the reference, as in SimulEval.",
)
@dataclass(kw_only=True)
class AverageLagging:
    """Source words by which a translation lags behind an ideal interpreter, who writes in step with what is said."""

    def __call__(self, source: Source, sample: Sample, text: str) -> float | None:
        """Return the average lagging of a stream in source words.

        Args:
            source: the source that the sample came from.
            sample: the sample that was asked.
            text: the stream that the model left.

        Returns:
            None where nothing was written, or the data is not interleaved.
        """
        from hone.text.simultaneous import average_lagging

        if not isinstance(source, East) or SOURCE not in sample.extra:
            return None
        delays: list[int] = []
        read = 0
        for heard, written in source.read_and_written(text):
            read += len(heard)
            delays += [read] * len(written)
        words = len(str(sample.extra[SOURCE]).split())
        return average_lagging(delays, words, len(str(sample.answers[0]).split())) if delays else None


@part("metric", "word-accuracy", papers="original")
@dataclass(kw_only=True)
class WordAccuracy:
    """Share of the words that stand in a translation where the reference has them; the longer of both is the whole."""

    def __call__(self, source: Source, sample: Sample, text: str) -> float | None:
        """Return the share of a translation's words that are right.

        Args:
            source: the source that the sample came from.
            sample: the sample that was asked.
            text: the generated answer; of an interleaved stream the target counts alone.

        Returns:
            None where there is no reference in plain text.
        """
        if not sample.answers or not isinstance(sample.answers[0], str):
            return None
        right = sample.answers[0].split()
        words = source.translation(text) if isinstance(source, East) else text.split()
        same = sum(a == b for a, b in zip(words, right, strict=False))
        return same / max(len(words), len(right), 1)
