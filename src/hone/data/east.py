"""Translation as one stream in which source and target take turns."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated

from pydantic import Field

from hone.data.derived import Derived, plain_pair
from hone.data.sample import Sample
from hone.data.source import Split
from hone.errors import DataError, nearest
from hone.parts import part

Links = Sequence[tuple[int, int]]
Chunks = list[tuple[int, int]]
SOURCE = "source"  # in `extra` of a question: the text to translate


@part(
    "data",
    "east",
    papers=[
        (
            "LLMs Can Achieve High-quality Simultaneous Machine Translation as Efficiently as Offline",
            "arXiv:2504.09570",
        ),
        (
            "STACL: Simultaneous Translation with Implicit Anticipation and Controllable Latency using "
            "Prefix-to-Prefix Framework",
            "arXiv:1810.08398",
        ),
    ],
    claim="A language model that learns from interleaved chunks when to read and when to write translates "
    "simultaneously better than fixed policies at the same latency, as fast as offline.",
    deviations="Chunks come from a word alignment (the paper has GPT-4 segment the sentences). The markers are tokens "
    "that the tokenizer has already, where the paper adds two to the vocabulary. Plain text only, no chat template. "
    "The second paper is the source of the option wait only. Verified with the paper's repository and abstract.",
)
@dataclass(kw_only=True)
class East(Derived):
    """Interleave source and target: a latency in words, then chunks of source, marker, chunk of target, marker, ...

    The source needs prompts (the text to translate) with answers (its translation). Target word j is written when the
    source words that it and the target words before it are aligned to have been read; chunks are joined until each has
    at least the source words that the latency asks for. Samples take the latencies in turn. Every token of the stream
    is trained, the source too: that a word follows and no marker is what teaches the model to read on. Train it with
    the objective "east", whose evaluation reads word by word as the model asks for them.

    The alignment is a column with pairs "source-target" of places from 0, e.g. "0-1 1-0 2-2". Without it, a target word
    is aligned to the nearest equal word of the source, or by its place where there is none.

    Args:
        latencies: least words of a chunk of source, by the name of the latency.
        ask: latency that evaluation asks for, a name of `latencies`.
        wait: wait-k instead: read so many words, then write one and read one in turns; None takes the alignment. It
            replaces `latencies`.
        train_source: train on the words of the source as well; may be false where `wait` decides when to write.
        alignment: column of the alignment.
        instruction: what a stream begins with; {latency} stands for the name of the latency.
        end_read: marker after a chunk of source, one token that is not special.
        end_write: marker after a chunk of target, one token that is not special.
        holdout: not used; `of` holds out its own.
    """

    latencies: dict[str, Annotated[int, Field(ge=1)]] = field(
        default_factory=lambda: {"low": 1, "medium": 3, "high": 6}
    )
    ask: str = "low"
    wait: Annotated[int, Field(ge=1)] | None = None
    train_source: bool = True
    alignment: str = "alignment"
    instruction: str = "Translate with {latency} latency:\n"
    end_read: str = "|"
    end_write: str = "~"

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with how the options go together."""
        if not self.latencies:
            yield "latencies", "expected at least one name with its least words, e.g. {low: 1}"
        elif self.ask not in self.latencies:
            hint = nearest(self.ask, self.latencies) or f"latencies: {', '.join(self.latencies)}"
            yield "ask", f"there is no latency called '{self.ask}' ({hint})"
        if self.end_read == self.end_write:
            yield "end_write", "is the same as end_read, so that the model could not tell reading from writing"
        if not self.train_source and self.wait is None:
            yield "train_source", "is false, so that nothing would teach the model to read on; set wait"

    def changed(self, samples: Iterator[Sample], split: Split) -> Iterator[Sample]:
        """Yield the interleaved streams, latency after latency in turn.

        Args:
            samples: prompts with answers.
            split: "train" or "eval".
        """
        names = list(self.latencies)
        for index, sample in enumerate(samples):
            yield self.stream(sample, names[index % len(names)])

    def stream(self, sample: Sample, latency: str) -> Sample:
        """Return a pair as one stream in pieces, every word of the source a piece of its own.

        Args:
            sample: a prompt with its answer.
            latency: a name of `latencies`.

        Raises:
            DataError: a text contains a marker or is empty, or the alignment is malformed.
        """
        source, target = self._words(sample)
        pieces: list[str] = []
        weights: list[float] = []
        read = written = 0
        for to_read, to_write in self._chunks(sample, source, target, latency):
            for place in range(read, to_read):
                pieces.append(spaced(source[place], place))
                weights.append(float(self.train_source))
            chunk = " ".join(target[written:to_write])
            pieces += [self.end_read, spaced(chunk, written) if chunk else "", self.end_write]
            weights += [float(self.wait is None or self.train_source), 1.0, 1.0]
            read, written = to_read, to_write
        header = self.header(latency)
        return Sample(
            kind="pieces", prompt=header, answers=tuple(pieces), scores=tuple(weights), extra=sample.extra,
            where=sample.where,
        )  # fmt: skip

    def header(self, latency: str) -> str:
        """Return what a stream begins with.

        Args:
            latency: a name of `latencies`.
        """
        return self.instruction.replace("{latency}", latency if self.wait is None else f"wait-{self.wait}")

    def _words(self, sample: Sample) -> tuple[list[str], list[str]]:
        texts = plain_pair(sample, "east")
        for text in texts:
            if mark := next((mark for mark in (self.end_read, self.end_write) if mark in text), None):
                raise DataError(
                    f"{sample.where}: the text contains {mark!r}, which marks the end of a chunk; set end_read or "
                    "end_write to a token that the texts lack"
                )
            if not text.split():
                raise DataError(f"{sample.where}: expected a text and its translation, found an empty one")
        return texts[0].split(), texts[1].split()

    def _chunks(self, sample: Sample, source: list[str], target: list[str], latency: str) -> Chunks:
        if self.wait is not None:
            needed = [min(self.wait + place, len(source)) for place in range(len(target))]
            return chunked(needed, len(source), 1)
        given = sample.extra.get(self.alignment)
        links = aligned(source, target) if given is None else parse_alignment(given, source, target, sample.where)
        return chunked(needs(links, len(target)), len(source), self.latencies[latency])

    def questions(self, split: Split) -> Iterator[Sample]:
        """Yield what evaluation asks: the instruction with the whole source behind it, which is then read word by word.

        Args:
            split: "train" or "eval".
        """
        for sample in self.of.questions(split):
            source, target = self._words(sample)
            text = " ".join(source)
            yield Sample(
                kind="completion", prompt=self.header(self.ask) + text, answers=(" ".join(target),),
                extra={**sample.extra, SOURCE: text}, where=sample.where,
            )  # fmt: skip

    def parted(self, question: str) -> tuple[str, str]:
        """Return the instruction and the source of a question; a text without an instruction gets that of `ask`.

        Args:
            question: text of a prompt.
        """
        headers = [self.header(name) for name in self.latencies]
        found = next((header for header in headers if question.startswith(header)), None)
        return (self.header(self.ask), question) if found is None else (found, question[len(found) :])

    def read_and_written(self, stream: str) -> list[tuple[list[str], list[str]]]:
        """Return the words of each chunk of a stream: those read, and those written then.

        Args:
            stream: what an interpreting model left, without the instruction.
        """
        chunks = [chunk.partition(self.end_read) for chunk in stream.split(self.end_write)]
        return [(source.split(), target.split()) for source, _, target in chunks if source.strip() or target.strip()]

    def translation(self, stream: str) -> list[str]:
        """Return the words that were written.

        Args:
            stream: what an interpreting model left, without the instruction.
        """
        return [word for _, target in self.read_and_written(stream) for word in target]

    def grade(self, sample: Sample, text: str) -> float:
        """Return 1 when the translation is the reference word for word, else 0.

        Args:
            sample: a question of this source.
            text: the stream that the model left.
        """
        return float(self.translation(text) == str(sample.answers[0]).split())

    def describe(self) -> str:
        """Return what is interleaved, and how."""
        how = f"latencies {', '.join(self.latencies)}" if self.wait is None else f"wait-{self.wait}"
        return f"east ({how}): {self.of.describe()}"


def spaced(text: str, place: int) -> str:
    """Return a text with a space before it, unless it is the first."""
    return f" {text}" if place else text


def needs(links: Links, count: int) -> list[int]:
    """Return how many source words must have been read before each target word is written.

    g(j) = max(g(j - 1), 1 + max of the source places that word j is aligned to), with g(-1) = 0; a word without a link
    needs what the one before it did.

    Args:
        links: aligned places (source, target), from 0.
        count: target words.
    """
    found = [0] * count
    for source, target in links:
        found[target] = max(found[target], source + 1)
    return [max(found[: place + 1]) for place in range(count)]


def chunked(needed: Sequence[int], length: int, least: int) -> Chunks:
    """Return the ends of the chunks: source words read and target words written by the end of each.

    Args:
        needed: source words that each target word needs, never fewer than the one before.
        length: source words.
        least: least source words of a chunk, as far as there are so many.
    """
    ends = sorted({*needed, length} - {0})
    chunks: Chunks = []
    read = 0
    for place, need in enumerate(needed):
        if need > read or not chunks:
            read = next((end for end in ends if end >= max(need, read + least)), length)
            chunks.append((read, place))
        chunks[-1] = (read, place + 1)
    return chunks if read == length else [*chunks, (length, len(needed))]


def aligned(source: Sequence[str], target: Sequence[str]) -> Links:
    """Return a simple alignment: to the nearest equal word that is still free, else by relative place.

    Args:
        source: words of the source.
        target: words of the target.
    """
    free = set(range(len(source)))
    links = []
    for place, word in enumerate(target):
        diagonal = math.ceil((place + 1) * len(source) / len(target)) - 1
        equal = [other for other in free if source[other].casefold() == word.casefold()]
        best = min(equal, key=lambda other: (abs(other - diagonal), other)) if equal else diagonal
        free.discard(best)
        links.append((best, place))
    return links


def parse_alignment(text: object, source: Sequence[str], target: Sequence[str], where: str) -> Links:
    """Return the links of an alignment that is written out.

    Args:
        text: pairs "source-target" of places from 0, separated by white space.
        source: words of the source.
        target: words of the target.
        where: place of the sample, for messages.

    Raises:
        DataError: it is malformed, or names a word that is not there.
    """
    pairs = str(text).split()
    if wrong := next((pair for pair in pairs if not re.fullmatch(r"\d+-\d+", pair)), None):
        raise DataError(f"{where}: alignment: expected pairs such as '0-1 1-0', source and target, found '{wrong}'")
    links = [(int(first), int(second)) for first, second in (pair.split("-") for pair in pairs)]
    for link in links:
        if link[0] >= len(source) or link[1] >= len(target):
            raise DataError(
                f"{where}: alignment: '{link[0]}-{link[1]}' names a word that is not there: the source has "
                f"{len(source)} words and the target {len(target)}, counted from 0"
            )
    return links
