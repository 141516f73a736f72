"""Preference pairs of two sources: the answers of one preferred to those of another."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

from hone.data.derived import Derived, plain_pair
from hone.data.sample import Sample
from hone.data.source import Split
from hone.errors import DataError
from hone.options import Nested
from hone.parts import part


@part(
    "data",
    "paired",
    papers=[("Thinking Preference Optimization", "arXiv:2502.13173")],
    claim="After fine-tuning on long worked answers, preferring them to short ones makes a model reason longer and be "
    "right more often, without new long answers.",
    deviations="The paper has the short answers from a smaller instruct model, both kinds being checked; any source "
    "that answers the same prompts serves here, e.g. the same problems without their worked steps.",
)
@dataclass(kw_only=True)
class Paired(Derived):
    """Pair the answers of two sources to the same prompts: those of the one preferred, those of the other rejected.

    Samples are matched by their prompt. Prompts that only one of them has, or that both answer alike, are left out.

    Args:
        of: the source of the preferred answers, which evaluation asks and grades.
        rejected: the source of the others.
        holdout: not used; the sources hold out their own.
    """

    rejected: Annotated[Any, Nested("data")]

    def changed(self, samples: Iterator[Sample], split: Split) -> Iterator[Sample]:
        """Yield the pairs.

        Args:
            samples: those with the preferred answers.
            split: "train" or "eval".

        Raises:
            DataError: the sources have no prompt in common.
        """
        worse = dict(plain_pair(sample, "paired") for sample in self.rejected.samples(split))
        found = False
        for sample in samples:
            prompt, answer = plain_pair(sample, "paired")
            other = worse.get(prompt)
            found = found or other is not None
            if other is not None and other != answer:
                yield replace(sample, kind="pair", answers=(answer, other))
        if not found and worse:
            raise DataError(
                f"{self.describe()}: no prompt of the one is a prompt of the other; both must answer the same prompts, "
                "word for word"
            )

    def fingerprint(self) -> str:
        """Return a hash of both sources and of the code."""
        made = [type(self).__name__, self.of.fingerprint(), self.rejected.fingerprint(), self.limit, self.code()]
        return hashlib.sha256(json.dumps(made).encode()).hexdigest()

    def describe(self) -> str:
        """Return what is preferred to what."""
        return f"answers of {self.of.describe()} preferred to those of {self.rejected.describe()}"
