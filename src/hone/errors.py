"""The errors that users see: each names the place, what was expected and the nearest right name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


class HoneError(Exception):
    """An error whose message is written for the user; the command line prints it without a traceback."""


class DataError(HoneError):
    """A data file, row or cell is not what its format says; the message starts with `file:line`."""


class ModelError(HoneError):
    """A model folder, tokenizer or template is missing or cannot do what the recipe asks."""


class NumericError(HoneError):
    """A loss or a gradient is not finite; the message names the step and the samples of the batch."""


class CheckpointError(HoneError):
    """A checkpoint is missing, incomplete or does not match its checksums."""


class MissingPackage(HoneError):
    """An optional package is needed; the message says the command that installs it."""

    def __init__(self, package: str, purpose: str, extra: str | None = None) -> None:
        """Name the missing package, what needs it and how to install it.

        Args:
            package: import name or distribution name of the package.
            purpose: what asked for it, e.g. "adapter 'peft:vera'".
            extra: the extra of hone-ml that brings it, if one does.
        """
        command = f"pip install 'hone-ml[{extra}]'" if extra else f"pip install {package}"
        super().__init__(f"{purpose} needs the package '{package}', which is not installed. Run: {command}")


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe.

    Args:
        field: dotted path of the field, e.g. "optimizer.lr".
        message: what is wrong and what was expected.
        place: "file:line", "--set" or "" when unknown.
        hint: the nearest right name or the next step, "" when there is none.
    """

    field: str
    message: str
    place: str = ""
    hint: str = ""

    def __str__(self) -> str:
        """Return `place: field: message (hint)`."""
        head = ": ".join(part for part in (self.place, self.field) if part)
        return (f"{head}: " if head else "") + self.message + (f" ({self.hint})" if self.hint else "")


class RecipeError(HoneError):
    """A recipe is wrong; all its problems are listed at once, before any model is loaded."""

    def __init__(self, problems: list[Problem]) -> None:
        """Collect `problems` into one message, a line each."""
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in the recipe\n" + "\n".join(f"  {problem}" for problem in problems))


def nearest(word: str, names: Iterable[str]) -> str:
    """Return "did you mean 'x'?" for the name closest to `word`, or "" when none is close."""
    known = list(names)
    swapped = [
        name for name in known if sorted(str(name)) == sorted(str(word))
    ]  # "stf" is nearer to "sft" than to "smt"
    found = swapped or difflib.get_close_matches(str(word), known, n=1, cutoff=0.6)
    return f"did you mean '{found[0]}'?" if found else ""
