"""Answers whose thinking is not trained: the loss sees what comes of it alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from hone.data.derived import Derived
from hone.data.sample import Sample
from hone.data.source import Split
from hone.errors import DataError
from hone.parts import part
from hone.text.render import SILENT

Spans = list[tuple[int, int]]


def thinking_spans(text: str, opens: str, closes: str, markers: bool) -> Spans:
    """Return where the thinking of a text stands, as (begin, end) in characters.

    Args:
        text: an answer.
        opens: what begins thinking.
        closes: what ends it; a closing one goes with the last opening one before it.
        markers: whether they are left out of the spans.
    """
    spans: Spans = []
    at = 0
    while (end := text.find(closes, at)) >= 0:
        begin = text.rfind(opens, at, end)
        at = end + len(closes)
        if begin >= 0:
            spans.append((begin + len(opens), end) if markers else (begin, at))
    return [(begin, end) for begin, end in spans if begin < end]


def before_spans(text: str, closes: str, markers: bool) -> Spans:
    """Return all that stands before the final answer, as one span or none.

    Args:
        text: an answer.
        closes: what ends the thinking; its last occurrence counts.
        markers: whether it is left out of the span.
    """
    at = text.rfind(closes)
    end = at if markers else at + len(closes)
    return [(0, end)] if at >= 0 and end > 0 else []


@part(
    "data",
    "masked-thinking",
    papers=[
        (
            "PRefLexOR: Preference-based Recursive Language Modeling for Exploratory Optimization of Reasoning and "
            "Agentic Thinking",
            "arXiv:2410.12375",
        )
    ],
    claim="Preferences that are learned from what follows the thinking alone leave a model free in how it thinks.",
    deviations="Checked against a copy of the authors' code, which finds markers by their token and can mask a random "
    "share of the thinking; here they are found in the text and all of it is masked. Where thinking begins and ends, "
    "the text is cut before it is tokenised.",
)
@dataclass(kw_only=True)
class MaskedThinking(Derived):
    """Keep the thinking in the answers of another source and leave it out of the loss, whatever the loss is.

    The answer behind it is predicted from prompt and thinking as ever; the tokens of the thinking weigh 0. Works for
    answers, pairs and lists in plain text.

    Args:
        mask: "thinking" (between `opens` and `closes`, as often as they occur) or "before" (all before the last
            `closes`, where an answer is the work with its result).
        opens: what begins thinking.
        closes: what ends it.
        markers: train what opens and closes it.
    """

    mask: Literal["thinking", "before"] = "thinking"
    opens: str = "<think>"
    closes: str = "</think>"
    markers: bool = False

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield which markers are empty."""
        if not self.closes:
            yield "closes", "expected what ends the thinking, got nothing"
        if not self.opens and self.mask == "thinking":
            yield "opens", "expected what begins the thinking, got nothing; or use mask: before"

    def changed(self, samples: Iterator[Sample], split: Split) -> Iterator[Sample]:
        """Yield the samples with the spans of their thinking marked.

        Args:
            samples: those of the source.
            split: "train" or "eval".

        Raises:
            DataError: a sample is no plain text, or nothing would be trained.
        """
        for sample in samples:
            if not isinstance(sample.prompt, str) or sample.kind not in ("completion", "pair", "list"):
                raise DataError(f"{sample.where}: masked-thinking needs answers in plain text, found {sample.kind}")
            spans = tuple(self.spans(str(answer)) for answer in sample.answers)
            yield replace(sample, extra={**sample.extra, SILENT: spans})

    def spans(self, text: str) -> Spans:
        """Return the spans of an answer that are not trained.

        Args:
            text: the answer.
        """
        if self.mask == "before":
            return before_spans(text, self.closes, self.markers)
        return thinking_spans(text, self.opens, self.closes, self.markers)

    def describe(self) -> str:
        """Return whose thinking is masked."""
        return f"{self.of.describe()}, without training their thinking"
