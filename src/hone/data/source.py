"""Where samples come from: the options common to all sources, the held-out split and the default grade."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from hone.data.answers import same_answer
from hone.data.formats import COLUMN_KEYS, Format, sniff
from hone.data.sample import Kind, Sample
from hone.errors import DataError, nearest

if TYPE_CHECKING:
    from hone.data.loader import Steps
    from hone.data.open import Rendering
    from hone.text.model import LanguageModel

Split = Literal["train", "eval"]
Overlong = Literal["truncate", "drop", "split"]
SHARE = 10  # at least this many rows stand behind each held-out one
REFERENCES = ("answer", "reference", "ground_truth", "solution")  # columns that hold the right answer, in this order
_SAME_SAMPLES = ("shuffle", "workers", "cache")  # options that change how samples are served, not what they are


@dataclass(kw_only=True)
class Source(ABC):
    """A source of canonical samples.

    Args:
        format: format of the rows; "auto" tells it from the column names of the first row.
        columns: which column plays which role where the names say too little, e.g. {prompt: ask, completion: reply}.
        limit: most training samples to use, in samples; None uses all. The held-out samples do not depend on it.
        max_tokens: longest sample after rendering, in tokens.
        overlong: what is done with a longer one; None splits running text and truncates everything else.
        holdout: samples held out for evaluation where the recipe names no eval_data, at most one row in ten.
        shuffle: train in an order drawn from the run's seed, anew each epoch.
        workers: processes that read ahead (cached tokens) or render (streams); 0 does so in the training process.
        streaming: read while training and keep nothing, for data too large for a token cache.
        cache: keep the rendered tokens on disk, where the next run with the same data finds them.
    """

    medium: ClassVar[str] = "text"
    format: Literal["auto", "text", "completion", "messages", "alpaca", "qa", "pairs", "list", "tagged", "prompt"] = (
        "auto"
    )
    columns: dict[str, str] = field(default_factory=dict)
    limit: Annotated[int, Field(gt=0)] | None = None
    max_tokens: Annotated[int, Field(gt=1)] = 1024
    overlong: Overlong | None = None
    holdout: Annotated[int, Field(ge=0)] = 200
    shuffle: bool = True
    workers: Annotated[int, Field(ge=0)] = 0
    streaming: bool = False
    cache: bool = True

    @abstractmethod
    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the samples of a split, in the same order every time.

        Args:
            split: "train" or "eval"; the two never share a row.
        """

    @abstractmethod
    def fingerprint(self) -> str:
        """Return a hash that changes whenever the samples would; it keys the token cache."""

    def evaluation_split(self) -> Split:
        """Return the split to evaluate on where a recipe names this source as `eval_data`."""
        return "eval"

    def describe(self) -> str:
        """Return one line for the log that says what the samples are."""
        return type(self).__name__

    def meet(self, load: Callable[[], LanguageModel], identity: str) -> None:
        """Take the model that the run starts from, for sources whose samples depend on it; called before the first.

        Args:
            load: returns it.
            identity: what tells its content.
        """
        for inner in self.inner():
            inner.meet(load, identity)

    def suit(self, consumes: str) -> None:
        """Learn what the objective consumes, for sources that hold samples for several; called before the first.

        Args:
            consumes: a key of `hone.data.open.ACCEPTED`.
        """
        for inner in self.inner():
            inner.suit(consumes)

    def inner(self) -> Iterator[Source]:
        """Yield the sources that this one is made of."""
        for f in fields(self):
            value = getattr(self, f.name)
            yield from (inner for inner in (value if isinstance(value, list) else [value]) if isinstance(inner, Source))

    def questions(self, split: Split) -> Iterator[Sample]:
        """Yield the samples whose prompts evaluation asks and `grade` judges; here those of the split.

        Args:
            split: "train" or "eval".
        """
        return self.samples(split)

    def own_loader(self, rendering: Rendering, seed: int) -> Steps | None:
        """Return what hands out the steps of a run, for sources that make samples while it goes on; here None.

        Args:
            rendering: of the training split.
            seed: of the run.
        """
        return None

    def is_on_policy(self) -> bool | None:
        """Return whether the model makes the samples while it trains; here not."""
        return None

    def overlong_for(self, kind: Kind) -> Overlong:
        """Return what is done with a sample of this kind that is longer than `max_tokens`.

        Args:
            kind: kind of the sample.
        """
        return self.overlong or ("split" if kind == "text" else "truncate")

    def grade(self, sample: Sample, text: str) -> float | None:
        """Return 1 when a generated answer's final answer is that of the reference, else 0.

        See `hone.data.answers` for what the final answer in a text is, and when two are the same.

        Args:
            sample: the sample that was asked.
            text: the generated answer.

        Returns:
            None when the sample has nothing to compare with.
        """
        expected = reference(sample)
        return None if expected is None else float(same_answer(text, expected))


def reference(sample: Sample) -> str | None:
    """Return the right answer to a sample: a column such as "answer", else what is trained; None without either."""
    for column in REFERENCES:
        value = sample.extra.get(column)
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    if sample.kind == "completion":
        answer = sample.answers[0]
        return answer if isinstance(answer, str) else answer[-1].text
    if sample.kind == "messages" and not isinstance(sample.prompt, str):
        return next((turn.text for turn in reversed(sample.prompt) if turn.role == "assistant"), None)
    return None


@dataclass(kw_only=True)
class RowSource(Source):
    """A source made of rows, each a mapping from column to value.

    Held-out rows: the rows are cut into `k = min(holdout, n / 10)` runs of equal length and one row of each run is held
    out, picked by a hash of the run's number. So the held-out rows spread over all files, are the same for every seed
    and every `limit`, and never train. A streaming source does not know its length n: its runs are the first `holdout`
    runs of ten rows.

    Args:
        chat: put plain prompts and answers into the model's chat template, as a user's and an assistant's turn.
        bad_rows: what is done with a row that cannot be used: stop with its place, or skip and count it.
    """

    chat: bool = False
    bad_rows: Literal["raise", "skip"] = "raise"
    skipped: int = field(default=0, init=False)  # rows that the latest pass over the samples left out
    _layout: Format | None = field(default=None, init=False, repr=False)

    @abstractmethod
    def rows(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield every row with its "file:line", from the start and in the same order every time."""

    @abstractmethod
    def content(self) -> str:
        """Return what identifies the rows themselves, e.g. a hash of the files."""

    @abstractmethod
    def title(self) -> str:
        """Return the source's name for messages."""

    def count(self) -> int:
        """Return the number of rows of a source that is not streaming."""
        return sum(1 for _ in self.rows())

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the options, as (option, message), without reading any row."""
        for role in self.columns:
            if role not in COLUMN_KEYS:
                hint = nearest(role, COLUMN_KEYS) or f"roles: {', '.join(COLUMN_KEYS)}"
                yield f"columns.{role}", f"no format has such a role ({hint}); write role: column"

    def layout(self) -> Format:
        """Return the format of the rows, told from the first one.

        Raises:
            DataError: there are no rows, or their format is unknown.
        """
        if self._layout is None:
            row, where = next(self.rows(), ({}, ""))
            if not where:
                raise DataError(f"{self.title()}: there are no rows; expected at least one")
            self._layout = sniff(row, where, format=self.format, columns=self.columns, chat=self.chat)
        return self._layout

    def evaluation_split(self) -> Split:
        """Hold nothing out, so that a source named by `eval_data` is evaluated on as a whole, and return that split.

        It is read once and not streamed: its loss needs all of it at every evaluation.
        """
        self.holdout, self.streaming = 0, False
        return "train"

    def describe(self) -> str:
        """Return the source's name and the format of its rows."""
        return f"{self.title()}: {self.layout().describe()}"

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the samples of a split, in the order of the rows.

        Args:
            split: "train" or "eval"; the two never share a row.

        Raises:
            DataError: a row cannot be used and `bad_rows` is "raise".
        """
        layout, runs, length = self.layout(), *self._runs()
        self.skipped = taken = 0
        for index, (row, where) in enumerate(self.rows()):
            if split == "eval" and index >= runs * length:
                return
            if held_out(index, runs, length) != (split == "eval"):
                continue
            if split == "train" and taken == self.limit:
                return
            try:
                sample = layout.convert(row, where)
            except DataError:
                if self.bad_rows == "raise":
                    raise
                self.skipped += 1
                continue
            taken += 1
            yield sample

    def _runs(self) -> tuple[int, int]:
        """Return how many runs hold out a row, and the length of a run in rows."""
        if self.streaming or not self.holdout:
            return self.holdout, SHARE
        rows = self.count()
        length = max(SHARE, rows // self.holdout)
        return min(self.holdout, rows // length), length

    def fingerprint(self) -> str:
        """Return a hash of the rows' content and of every option that changes the samples."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in _SAME_SAMPLES}
        text = json.dumps([type(self).__name__, options, self.content()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def held_out(index: int, runs: int, length: int) -> bool:
    """Return whether a row is held out: one row of each of the first `runs` runs of `length` rows is.

    Args:
        index: place of the row in the source, from 0.
        runs: number of runs.
        length: rows in a run.
    """
    run, place = divmod(index, length)
    if run >= runs:
        return False
    digest = hashlib.blake2b(str(run).encode(), digest_size=8).digest()
    return place == int.from_bytes(digest, "big") % length
