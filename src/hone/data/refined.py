"""Data from language feedback: the model refines its own answers by what is said of them, and learns from that."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from hone.data.sample import Sample
from hone.data.sampled import ModelMade, first_slip, reference
from hone.data.source import Split
from hone.parts import part


def feedback(right: str, text: str) -> str | None:
    """Return what is said of an answer in words: where its first mistake is, and what should stand there, if anything.

    Args:
        right: the right answer with its worked lines.
        text: the answer.

    Returns:
        None where nothing is wrong with its lines.
    """
    slip = first_slip(right, text)
    if slip is not None:
        before, _, line = slip
        return f"line {before.count(chr(10)) + 1} should be {line.rstrip()}"
    wanted, ours = right.rstrip().splitlines(), text.rstrip().splitlines()
    if len(ours) > len(wanted):
        return f"end after line {len(wanted)}"
    return f"then comes {wanted[len(ours)]}" if len(ours) < len(wanted) else None


def closeness(right: str, text: str) -> float:
    """Return the share of the right answer's lines that an answer has at their places.

    Args:
        right: the right answer.
        text: the answer.
    """
    ours, theirs = text.splitlines(), right.splitlines()
    return sum(a == b for a, b in zip(ours, theirs, strict=False)) / max(1, len(theirs), len(ours))


@part(
    "data",
    "refined",
    papers=[("Training Language Models with Language Feedback at Scale", "arXiv:2303.16755")],
    claim="Refinements that the model writes after feedback in words, the best of several each, teach it more than "
    "unselected ones and than comparisons do.",
    deviations="Feedback is scripted: it names the first wrong line and the right one, or the line to end after. "
    "Refinements are selected by the source's grade and by how many lines are right, in place of an ensemble of "
    "instructed models that say whether the feedback was followed. Answers whose lines are all right are kept as they "
    "are, unless the source calls them wrong.",
)
@dataclass(kw_only=True)
class Refined(ModelMade):
    """Imitation learning from language feedback: refine with feedback, select, and imitate without it.

    refine: prompt, own answer, feedback -> the source's answer, which teaches a model to follow feedback;
    imitate: prompt -> the best of `samples_each` refinements drawn from prompt, own answer, feedback.

    Args:
        make: what is made: refine or imitate.
        select: take the refinement that followed the feedback best ("best"), or the one that was drawn first.
        ask: what stands between answer and feedback, and behind it; {feedback} stands for it.
    """

    make: Literal["refine", "imitate"] = "imitate"
    select: Literal["best", "first"] = "best"
    ask: str = "\nfeedback: {feedback}\nrefined:\n"

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the words around the feedback."""
        if "{feedback}" not in self.ask:
            yield "ask", "expected words with {feedback} in them"

    def _choices(self) -> list[Any]:
        return [self.make, self.select, self.ask]

    def describe(self) -> str:
        """Return what is refined."""
        return f"refinements ({self.make}) of answers to the prompts of {self.of.describe()}"

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the refinements, in the order of the source's prompts.

        Args:
            split: "train" or "eval"; of held-out samples those of the source itself, so that losses compare.

        Raises:
            DataError: a sample has no answer in plain text, or no model answers.
        """
        if split == "eval":
            held_out: Iterator[Sample] = self.of.samples(split)
            return held_out
        return itertools.islice(self._made(split), self.limit)

    def _made(self, split: Split) -> Iterator[Sample]:
        asked = self._plain(split)
        own = [next((text for text in texts if text.strip()), "") for texts in self.answers(asked, split)]
        said = [feedback(reference(sample), text) for sample, text in zip(asked, own, strict=True)]
        prompts = [
            replace(sample, kind="completion", prompt=f"{sample.prompt}{text}{self.ask.replace('{feedback}', what)}")
            for sample, text, what in zip(asked, own, said, strict=True)
            if what is not None
        ]
        if self.make == "refine":
            yield from prompts
            return
        refinements = iter(self.answers(prompts, f"{split}:refine"))
        for sample, text, what in zip(asked, own, said, strict=True):
            if what is not None:
                found = [one for one in next(refinements) if one.strip()]
            else:  # these are the source's own lines, which may be wrong; where it cannot tell, they count as right
                found = [text] if self.grade(sample, text) in (None, 1) else []
            if found and (chosen := self._selected(sample, found)):
                yield replace(sample, kind="completion", answers=(chosen,))

    def _selected(self, sample: Sample, found: list[str]) -> str:
        if self.select == "first":
            return found[0]
        right = reference(sample)
        return max(found, key=lambda text: (self.grade(sample, text) or 0.0, closeness(right, text)))
