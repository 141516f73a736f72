"""Several sources mixed into one by weight."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pydantic import Field

from hone.data.sample import Sample
from hone.data.source import Source, Split
from hone.options import Nested
from hone.parts import part

SOURCE = "source"  # field of a sample, and of every segment of its tree, that says which source it is from
_KEY = "hone:mix"  # where a sample carries the way back to its source


@part("data", "mix", papers="original")
@dataclass(kw_only=True)
class Mix(Source):
    """Mix sources in given proportions of samples.

    After n samples, the next one comes from the source i that is furthest behind its share w_i, i.e. has the largest
    w_i (n + 1) - taken_i; so any stretch holds every source in proportion, to within a few samples. The mixture ends
    when a source that is due has no more. The held-out samples are all those of the sources, taken in turn.

    Args:
        sources: the sources, each with its own `limit` and `holdout`; the window is the mixture's.
        weights: share of the samples from each source, relative to each other; None takes equal shares.
        mark: tell adapters and evaluation where a sample comes from: its field "source" is the number of its source,
            from 0, and evaluations report the loss of each ("loss/0", "loss/1", ...).
        holdout: not used; each source holds out its own.
    """

    sources: Annotated[list[Any], Nested("data")]
    weights: list[Annotated[float, Field(gt=0)]] | None = None
    mark: bool = False
    _held_out: list[Split] | None = field(default=None, init=False, repr=False)  # of each source, once it is asked

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the sources and their weights."""
        if not self.sources:
            yield "sources", "expected at least one source, got none"
        elif self.weights is not None and len(self.weights) != len(self.sources):
            yield "weights", f"expected a weight for each of {len(self.sources)} sources, got {len(self.weights)}"

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the samples of a split.

        Args:
            split: "train" (in proportion to the weights, at most `limit`) or "eval" (all, the sources in turn).
        """
        if split == "train":
            streams = [source.samples("train") for source in self.sources]
            return map(self._marked, itertools.islice(self._interleave(streams), self.limit))
        splits = self._held_out or ["eval"] * len(self.sources)
        streams = [source.samples(own) for source, own in zip(self.sources, splits, strict=True)]
        return map(self._marked, _in_turn(streams))

    def evaluation_split(self) -> Split:
        """Let every source say what it is evaluated on, so that files in a mixture are, like alone, as a whole."""
        self._held_out = [source.evaluation_split() for source in self.sources]
        return "eval"

    def _marked(self, sample: Sample) -> Sample:
        if not self.mark:
            return sample
        return replace(sample, fields={**sample.fields, SOURCE: float(sample.extra[_KEY][0])})

    def _interleave(self, streams: list[Iterator[Sample]]) -> Iterator[Sample]:
        weights = self.weights or [1.0] * len(streams)
        shares = [weight / sum(weights) for weight in weights]
        taken = [0] * len(streams)
        for number in itertools.count(1):
            behind = [share * number - count for share, count in zip(shares, taken, strict=True)]
            index = behind.index(max(behind))
            sample = next(streams[index], None)
            if sample is None:
                return
            taken[index] += 1
            yield _tag(sample, index)

    def grade(self, sample: Sample, text: str) -> float | None:
        """Return the grade by the source that made the sample.

        Args:
            sample: a sample of this mixture.
            text: the generated answer.
        """
        index, *rest = sample.extra[_KEY]
        inner = replace(sample, extra={**sample.extra, _KEY: rest})
        return self.sources[index].grade(inner, text)

    def fingerprint(self) -> str:
        """Return a hash of the sources' fingerprints and the weights."""
        parts = [source.fingerprint() for source in self.sources]
        marked = ["marked"] if self.mark else []
        return hashlib.sha256(json.dumps(["mix", parts, self.weights, self.limit, *marked]).encode()).hexdigest()

    def describe(self) -> str:
        """Return what each source is."""
        return "mix of " + "; ".join(source.describe() for source in self.sources)


def _tag(sample: Sample, index: int) -> Sample:
    """Write down which source a sample came from, outermost mixture first."""
    return replace(sample, extra={**sample.extra, _KEY: [index, *sample.extra.get(_KEY, [])]})


def _in_turn(streams: list[Iterator[Sample]]) -> Iterator[Sample]:
    """Yield one sample of each stream in turn until all have ended."""
    going = dict(enumerate(streams))
    while going:
        for index, stream in list(going.items()):
            sample = next(stream, None)
            if sample is None:
                del going[index]
            else:
                yield _tag(sample, index)
