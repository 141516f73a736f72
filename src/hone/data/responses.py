"""Responses without their instructions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hone.data.derived import Derived
from hone.data.sample import Sample
from hone.data.source import Split
from hone.errors import DataError
from hone.parts import part


@part(
    "data",
    "responses",
    papers=[("Instruction Following without Instruction Tuning", "arXiv:2409.14254")],
    claim="Training on responses alone, without any instructions, makes a pretrained model follow instructions.",
    deviations="Held-out samples keep their instructions, so that the loss of evaluations says how well the model "
    "follows them.",
)
@dataclass(kw_only=True)
class Responses(Derived):
    """Leave the instructions of another source empty in training, so that log p(response) alone is trained.

    The turns of users become empty and a chat template stays around them. A plain prompt becomes `frame`: nothing, or
    what stands before an answer whatever the instruction is, e.g. "### Response:" and a line break.

    Args:
        frame: plain text that takes the place of a plain prompt.
        holdout: not used; `of` holds out its own.
    """

    frame: str = ""

    def changed(self, samples: Iterator[Sample], split: Split) -> Iterator[Sample]:
        """Yield the samples without their instructions, the held-out ones as they are.

        Args:
            samples: those of the source.
            split: "train" or "eval".
        """
        return samples if split == "eval" else map(self.without_instruction, samples)

    def without_instruction(self, sample: Sample) -> Sample:
        """Return a sample with empty instructions.

        Args:
            sample: a prompt with an answer, or a conversation.

        Raises:
            DataError: it has no response.
        """
        if sample.kind not in ("completion", "messages"):
            raise DataError(
                f"{sample.where}: responses needs prompts with answers or conversations, found {sample.kind}"
            )
        if isinstance(sample.prompt, str):
            return replace(sample, prompt=self.frame)
        turns = (replace(turn, content="") if turn.role == "user" else turn for turn in sample.prompt)
        return replace(sample, prompt=tuple(turns))

    def describe(self) -> str:
        """Return whose responses these are."""
        return f"responses of {self.of.describe()}"
