"""Rewards that look at an answer's text alone: its form, its length, its repetitions, its steps."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from hone.errors import DataError, nearest
from hone.parts import part
from hone.rewards.base import Attempt, Positive, Reward

if TYPE_CHECKING:
    from hone.data.source import Source

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
FINAL = re.compile(r"\s*(?:####|answer\s*:|\\boxed)", re.IGNORECASE)  # what a line with the final answer begins with
FORMATS: dict[str, str] = {
    "final": r"(?s:.*?)(?m:^)(?:####|(?i:answer\s*:)) *\S[^\n]*\s*",
    "worked": r"(?:(?!####|(?i:answer\s*:))[^\S\n]*\S[^\n]*\n)+(?:####|(?i:answer\s*:)) *\S[^\n]*\s*",
    "think": r"\s*<think>(?:(?!</?think>|</?answer>)(?s:.))+</think>\s*"
    r"<answer>(?:(?!</?think>|</?answer>)(?s:.))+</answer>\s*",
    "boxed": r"(?s:.*)\\boxed\{(?s:.+)\}(?s:.*)",
}
FENCED = re.compile(
    r"(?P<indent>(?:^[ \t]+)?)(?<!`)(?P<fence>`{3,})[\w+#.-]*[ \t]*\n"  # it ends a line, with a language
    r"(?P<lines>(?:.*\n)*?)"
    r"(?:(?:(?P=indent))?[ ]{0,3}(?P=fence)"  # it closes where it begins a line; further in it belongs to the code
    r"|(?P<last>[^`\n]*[^`\s])(?P=fence)[ \t]*$"  # or where it ends one that has no other
    r"|(?P<open>.*)\Z)",
    re.MULTILINE,
)


def fenced(text: str) -> list[tuple[str, bool]]:
    """Return the fenced blocks of a text, each as (what is in it, whether it is closed); only the last may be open.

    Args:
        text: an answer.
    """
    found = []
    for block in FENCED.finditer(text.replace("\r\n", "\n")):
        inside = (block["lines"] + (block["last"] or block["open"] or "")).removesuffix("\n")
        found.append((textwrap.dedent(inside) if block["indent"] else inside, block["open"] is None))
    return found


@part("reward", "regex", papers="original")
@dataclass(kw_only=True)
class Regex(Reward):
    """Reward answers that a regular expression matches.

    r = right where the answer matches, else wrong; count: wrong + (right - wrong) min(matches, most) / most

    Args:
        pattern: a regular expression in Python's syntax, e.g. "[0-9]+"; flags stand in it, as (?i).
        match: "search" (somewhere), "full" (the whole answer) or "count" (how often).
        most: of count: so many matches are worth as much as `right`.
        right: worth of a match.
        wrong: worth of an answer without one.
    """

    pattern: str
    match: Literal["search", "full", "count"] = "search"
    most: Count = 1
    right: float = 1.0
    wrong: float = 0.0

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the pattern."""
        try:
            re.compile(self.pattern)
        except re.error as error:
            yield "pattern", f"no regular expression: {error}"

    def score(self, attempts: Sequence[Attempt], source: Source) -> list[float]:
        """Return the worth of each attempt.

        Args:
            attempts: all answers of a phase.
            source: not looked at.
        """
        pattern = re.compile(self.pattern)
        return [self.wrong + (self.right - self.wrong) * self._share(pattern, attempt.whole) for attempt in attempts]

    def _share(self, pattern: re.Pattern[str], text: str) -> float:
        if self.match == "count":
            return min(sum(1 for _ in pattern.finditer(text)), self.most) / self.most
        return float((pattern.fullmatch(text) if self.match == "full" else pattern.search(text)) is not None)


@part("reward", "format", papers="original")
@dataclass(kw_only=True)
class Form(Reward):
    """Reward answers of a certain form.

    final: the last line is "#### X" or "answer: X"; worked: the same, behind lines of work; think: reasoning inside
    <think> tags and then an <answer>; boxed: it has a LaTeX box; code: it has a fenced block with something in it.
    Other forms: `regex`.

    Args:
        layout: name of the form.
        right: worth of an answer of this form.
        wrong: worth of any other.
    """

    layout: Literal["final", "worked", "think", "boxed", "code"] = "worked"
    right: float = 1.0
    wrong: float = 0.0

    def score(self, attempts: Sequence[Attempt], source: Source) -> list[float]:
        """Return the worth of each attempt.

        Args:
            attempts: all answers of a phase.
            source: not looked at.
        """
        if self.layout == "code":
            return [self.right if self._coded(attempt.whole) else self.wrong for attempt in attempts]
        inner = Regex(pattern=FORMATS[self.layout], match="full", right=self.right, wrong=self.wrong)
        return inner.score(attempts, source)

    def _coded(self, text: str) -> bool:
        return any(closed and inside.strip() for inside, closed in fenced(text))


def within(length: float, least: float, most: float, limit: float) -> float:
    """Return 1 from `least` to `most`, falling in straight lines to 0 at no length and at `limit`.

    Args:
        length: of the answer.
        least: where it begins to be long enough.
        most: where it begins to be too long.
        limit: where it is worth nothing.
    """
    if length < least:
        return length / least
    if length <= most:
        return 1.0
    return max(0.0, (limit - length) / (limit - most)) if limit > most else 0.0


@part(
    "reward",
    "length",
    papers=[
        ("LongWriter-Zero: Mastering Ultra-Long Text Generation via Reinforcement Learning", "arXiv:2506.18841"),
    ],
    claim="A reward for a target range of lengths, normalised on its own beside others, teaches a model to write as "
    "long as is asked for.",
    deviations="Length is counted in tokens, and the range is an option or two columns; the paper counts words and "
    "has a large model predict each prompt's range. Worths stop at 0 above the limit. Use it with scale: group, which "
    "gives z-scores where the paper normalises each reward to [-1, 1] within a group.",
)
@dataclass(kw_only=True)
class Length(Reward):
    """Reward answers of a length within a range.

    r = 1 for least <= n <= most, n / least below, (limit - n) / (limit - most) above up to the limit, then 0

    with n the number of tokens. Columns "min_tokens" and "max_tokens" of a sample go before the options.

    Args:
        least: shortest length that is worth 1, in tokens.
        most: longest length that is worth 1, in tokens.
        limit: length from which an answer is worth nothing, in tokens; None takes twice `most`.
    """

    least: Annotated[int, Field(ge=0)] = 0
    most: Count = 64
    limit: Count | None = None

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the range."""
        if self.least > self.most:
            yield "least", f"is above most ({self.most}); expected a range"
        if self.limit is not None and self.limit < self.most:
            yield "limit", f"is below most ({self.most}); an answer of that length would be worth 1 and nothing"

    def score(self, attempts: Sequence[Attempt], source: Source) -> list[float]:
        """Return the worth of each attempt.

        Args:
            attempts: all answers of a phase.
            source: not looked at.
        """
        return [self._one(attempt) for attempt in attempts]

    def _one(self, attempt: Attempt) -> float:
        least = _column(attempt, "min_tokens", self.least)
        most = _column(attempt, "max_tokens", self.most)
        limit = float(self.limit) if self.limit is not None and self.limit >= most else 2 * most
        return within(size(attempt), least, max(least, most), max(limit, least))


@part(
    "reward",
    "length-penalty",
    papers=[
        (
            "Making Small Language Models Efficient Reasoners: Intervention, Supervision, Reinforcement",
            "arXiv:2505.07961",
        ),
    ],
    claim="Correctness less a penalty on length for a requested level halves the tokens at little loss of accuracy.",
    deviations="The paper's exact penalty could not be verified: here it is the length over the budget of the level, "
    "at most `cap`. The level stands in a column; the paper asks for it in the prompt, which the data can do too.",
)
@dataclass(kw_only=True)
class LengthPenalty(Reward):
    """Charge for every token, the more the shorter an answer was asked for (TLDR).

    r = -min(n / budget(level), cap), with n the number of tokens; to be added to a reward for right answers

    Args:
        budget: length at which the penalty is 1, in tokens, for samples without a level.
        budgets: the same for each level, in tokens, e.g. {short: 32, medium: 64, long: 128}.
        level: column that holds a sample's level.
        cap: largest penalty.
    """

    budget: Count = 64
    budgets: dict[str, Count] = field(default_factory=dict)
    level: str = "level"
    cap: Positive = 1.0

    def score(self, attempts: Sequence[Attempt], source: Source) -> list[float]:
        """Return the worth of each attempt, at most 0.

        Args:
            attempts: all answers of a phase.
            source: not looked at.

        Raises:
            DataError: a sample asks for a level without a budget.
        """
        return [-min(size(attempt) / self._budget(attempt), self.cap) for attempt in attempts]

    def _budget(self, attempt: Attempt) -> int:
        asked = attempt.sample.extra.get(self.level) if self.budgets else None
        if asked is None:
            return self.budget
        if str(asked) not in self.budgets:
            hint = nearest(str(asked), self.budgets) or f"levels: {', '.join(self.budgets)}"
            raise DataError(
                f"{attempt.sample.where}: column '{self.level}' asks for level {asked!r}, which has no budget ({hint})"
            )
        return self.budgets[str(asked)]


@part("reward", "repetition", papers="original")
@dataclass(kw_only=True)
class Repetition(Reward):
    """Charge for saying the same again: the share of n-grams of tokens that came before.

    r = -(1 - different n-grams / all n-grams), 0 where an answer is shorter than n

    Args:
        n: length of what is compared, in tokens (in words where there are no tokens).
        free: share of repetitions that costs nothing.
    """

    n: Count = 4
    free: Share = 0.0

    def score(self, attempts: Sequence[Attempt], source: Source) -> list[float]:
        """Return the worth of each attempt, from -1 to 0.

        Args:
            attempts: all answers of a phase.
            source: not looked at.
        """
        return [-max(0.0, self._share(attempt) - self.free) for attempt in attempts]

    def _share(self, attempt: Attempt) -> float:
        units = attempt.tokens.tolist() if len(attempt.tokens) else attempt.text.split()
        grams = [tuple(units[i : i + self.n]) for i in range(len(units) - self.n + 1)]
        return 1 - len(set(grams)) / len(grams) if grams else 0.0


@part(
    "reward",
    "steps",
    papers=[("On the Emergence of Thinking in LLMs I: Searching for the Right Intuition", "arXiv:2502.06773")],
    claim="Correctness with a decoupled bonus for more intermediate steps makes a model think longer, and better, than "
    "correctness alone.",
    deviations="The exploration bonus alone: alpha [right] + (1 - alpha) bonus is made by the weights of 'exact' and "
    "of this. `curve: inverse` of tokens is the authors' code; their other bonus, a model that judges effort, is "
    "'reward-model'.",
)
@dataclass(kw_only=True)
class Steps(Reward):
    """Reward intermediate steps, ever less for each (the simplest exploration bonus of RLSP).

    capped: r = min(n, most) / most; inverse: r = -most / n

    with n the lines before the final answer that are not empty, at least 1 for the inverse, or all tokens.

    It pays for repetitions too: whoever wants to see them cured adds 'repetition', or sets `different`.

    Args:
        most: so many are worth 1, or cost 1.
        of: what is counted: "lines" or "tokens".
        curve: "capped" or "inverse".
        different: count equal lines once.
    """

    most: Count = 8
    of: Literal["lines", "tokens"] = "lines"
    curve: Literal["capped", "inverse"] = "capped"
    different: bool = False

    def score(self, attempts: Sequence[Attempt], source: Source) -> list[float]:
        """Return the worth of each attempt, at most 1.

        Args:
            attempts: all answers of a phase.
            source: not looked at.
        """
        counts = [self._count(attempt) for attempt in attempts]
        if self.curve == "inverse":
            return [-self.most / max(1, count) for count in counts]
        return [min(count, self.most) / self.most for count in counts]

    def _count(self, attempt: Attempt) -> int:
        if self.of == "tokens":
            return size(attempt)
        lines = [line.strip() for line in attempt.whole.splitlines() if line.strip() and not FINAL.match(line)]
        return len(set(lines) if self.different else lines)


def size(attempt: Attempt) -> int:
    """Return the number of an answer's tokens, or of its words where nobody knows them."""
    return len(attempt.tokens) or len(attempt.text.split())


def _column(attempt: Attempt, name: str, otherwise: float) -> float:
    """Return the number in a column of the sample, or what holds without one."""
    found = attempt.sample.extra.get(name)
    if found is None:
        return otherwise
    if isinstance(found, bool) or not isinstance(found, int | float) or not found >= 0:
        raise DataError(f"{attempt.sample.where}: column '{name}': expected a number of tokens, got {found!r}")
    return float(found)
