"""Worked answers that show thinking: wrong lines that are taken back, and tokens that say what a line is for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Annotated, Literal

from pydantic import Field

from hone.data.derived import Derived
from hone.data.sample import Sample
from hone.data.sampled import reference
from hone.data.source import Split
from hone.parts import part

BACK = "no:"  # a line that takes back the one before it
TAGS = ("<analyze>", "<step>", "<verify>", "<refine>")
_NUMBER = re.compile(r"\d+")


@part(
    "data",
    "traces",
    papers=[
        (
            "How Much Backtracking is Enough? Exploring the Interplay of SFT and RL in Enhancing LLM Reasoning",
            "arXiv:2505.24273",
        ),
        ("Reasoning with Reinforced Functional Token Tuning", "arXiv:2502.13389"),
    ],
    claim="Traces with more backtracks are a better start for reinforcement learning on harder tasks, and whether "
    "their answers are right hardly matters; tokens that name the function of a step let learning branch over them.",
    deviations="Traces are made by rule of the source's worked lines: a wrong copy of a line, a line that takes it "
    "back, the right one. Functional tokens are marks at the beginning of a line, spelt with tokens that the model "
    "has; the paper adds learnable ones and finds annotated paths by a tree search.",
)
@dataclass(kw_only=True)
class Traces(Derived):
    """Show the worked answers of another source with backtracks, functional marks, or wrong ends.

    A backtrack is a copy of a worked line with a wrong number, the line "no:", and the right line. Evaluation asks the
    source's own prompts; the last line of an answer stays as it is.

    Args:
        backtracks: wrong lines in a trace, as far as there are lines with numbers.
        tags: begin each line with what it is for: <analyze> the first, <step> others, <verify> the line that takes
            back, <refine> the line behind it, <output> the last.
        answers: "right", or "shuffled": the last line is that of another sample, to part form from content.
        seed: of the places and of the wrong numbers.
    """

    backtracks: Annotated[int, Field(ge=0)] = 1
    tags: bool = False
    answers: Literal["right", "shuffled"] = "right"
    seed: Annotated[int, Field(ge=0)] = 0

    def changed(self, samples: Iterator[Sample], split: Split) -> Iterator[Sample]:
        """Yield the samples with their traces.

        Args:
            samples: those of the source.
            split: "train" or "eval".

        Raises:
            DataError: a sample has no answer in plain text.
        """
        last = "answer: 0"
        for number, sample in enumerate(samples):
            rng = Random(f"{self.seed}:{split}:{number}")
            lines = reference(sample).splitlines()
            own = lines[-1] if lines else ""
            made = self._traced(lines, rng)
            if self.answers == "shuffled" and made:
                made[-1] = made[-1].replace(own, last) if own else last
            last = own or last
            yield replace(sample, answers=("\n".join(made),))

    def _traced(self, lines: list[str], rng: Random) -> list[str]:
        """Return the lines with backtracks before some of them, each with its mark."""
        places = [place for place, line in enumerate(lines[:-1]) if _NUMBER.search(line)]
        chosen = set(rng.sample(places, min(self.backtracks, len(places))))
        found: list[tuple[str, str]] = []
        for place, line in enumerate(lines):
            mark = "" if place == len(lines) - 1 else TAGS[0] if place == 0 else TAGS[1]
            if place in chosen:
                found += [(mark, wrong_copy(line, rng)), (TAGS[2], BACK)]
                mark = TAGS[3]
            found.append((mark, line))
        return [f"{mark}{line}" if self.tags else line for mark, line in found]


def wrong_copy(line: str, rng: Random) -> str:
    """Return a line with another number in place of its last one.

    Args:
        line: it, with a number.
        rng: draws the number.
    """
    last = list(_NUMBER.finditer(line))[-1]
    right = int(last[0])
    return (
        line[: last.start()]
        + str(rng.choice([n for n in range(max(0, right - 9), right + 10) if n != right]))
        + (line[last.end() :])
    )
