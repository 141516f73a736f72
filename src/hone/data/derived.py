"""Sources that show the samples of another source in another way."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from hone.data.sample import Sample
from hone.data.source import Source, Split
from hone.errors import DataError
from hone.options import Nested

SERVED = (  # options that change no sample
    "of", "max_tokens", "overlong", "holdout", "shuffle", "workers", "streaming", "cache", "batch",
)  # fmt: skip


@dataclass(kw_only=True)
class Derived(Source):
    """The base of sources that change what another source gives; here nothing is changed.

    Args:
        of: the source.
        holdout: not used; `of` holds out its own.
    """

    of: Annotated[Any, Nested("data")]

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the samples of a split, changed.

        Args:
            split: "train" (at most `limit`) or "eval".
        """
        made = self.changed(self.of.samples(split), split)
        return itertools.islice(made, self.limit if split == "train" else None)

    def changed(self, samples: Iterator[Sample], split: Split) -> Iterator[Sample]:
        """Yield the samples that are made of those of the source.

        Args:
            samples: those of the source.
            split: "train" or "eval".
        """
        return samples

    def questions(self, split: Split) -> Iterator[Sample]:
        """Yield the samples that evaluation asks; here those of the source.

        Args:
            split: "train" or "eval".
        """
        asked: Iterator[Sample] = self.of.questions(split)
        return asked

    def evaluation_split(self) -> Split:
        """Return the split that the source evaluates on."""
        split: Split = self.of.evaluation_split()
        return split

    def grade(self, sample: Sample, text: str) -> float | None:
        """Return the grade by the source.

        Args:
            sample: a sample that was asked.
            text: the generated answer.
        """
        grade: float | None = self.of.grade(sample, text)
        return grade

    def fingerprint(self) -> str:
        """Return a hash of the source, the options and the code that changes its samples."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in SERVED}
        made = [type(self).__name__, self.of.fingerprint(), options, self.code()]
        return hashlib.sha256(json.dumps(made, sort_keys=True, default=repr).encode()).hexdigest()

    def code(self) -> str:
        """Return a hash of the code that changes samples."""
        return code_of(type(self))


def code_of(kind: type) -> str:
    """Return a hash of the file that defines a class, so that changing it changes every fingerprint.

    Args:
        kind: the class.
    """
    return hashlib.sha256(Path(inspect.getfile(kind)).read_bytes()).hexdigest()


def plain_pair(sample: Sample, needs: str) -> tuple[str, str]:
    """Return the prompt and the answer of a sample in plain text.

    Args:
        sample: a sample.
        needs: who needs them, for the message.

    Raises:
        DataError: it is no prompt with an answer, or a conversation.
    """
    if sample.kind != "completion" or not isinstance(sample.prompt, str) or not isinstance(sample.answers[0], str):
        raise DataError(
            f"{sample.where}: {needs} needs prompts with answers in plain text (completion), found {sample.kind}; give "
            "it rows with the columns prompt and completion, without chat: true"
        )
    return sample.prompt, sample.answers[0]
