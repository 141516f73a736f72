"""Rewards for programs: an answer's code runs in the sandbox on the tests that its sample brings."""

from __future__ import annotations

import ast
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from hone.data.sample import Sample
from hone.data.sampled import prompt_text
from hone.errors import DataError
from hone.parts import part
from hone.rewards import sandbox
from hone.rewards.answers_run import plain, unpacked
from hone.rewards.base import Attempt, NotNegative, Positive, Reward
from hone.rewards.text import fenced

if TYPE_CHECKING:
    from hone.data.source import Source

_STARTING = 2.0  # seconds between two programs of a worker, on a busy machine
TINY = 1e-3  # of the tolerance: 0.1 + 0.2 - 0.3 is 6e-17, and a right 0 must equal it
FORM = (
    '{"call": "name", "args": [...], "expected": value}, {"input": "text", "expected": "text"}, or '
    '"assert name(1, [2]) == 3" with nothing but literals'
)


@dataclass(frozen=True)
class Test:
    """One test.

    Args:
        asked: what the sandbox is told: "call" with "args" and "kwargs", or with the "literals" of an assertion; or
            "input".
        expected: what is compared outside of it: a value of JSON, that of an assertion's literal, or the text that a
            program shall print.
    """

    asked: dict[str, Any]
    expected: Any

    def passed(self, result: dict[str, Any], tolerance: float) -> bool:
        """Return whether a result is the expected one.

        Args:
            result: what the sandbox gave.
            tolerance: relative difference between numbers that are not whole, but in assertions.
        """
        if "input" in self.asked:
            return "output" in result and _lines(result["output"]) == _lines(self.expected)
        if "literals" in self.asked:
            return "value" in result and _equal(result["value"], self.expected)
        return "value" in result and same(result["value"], self.expected, tolerance)


def _equal(given: Any, expected: Any) -> bool:
    """Return whether a value that came back packed is equal to one, as an assertion says it."""
    try:
        return bool(unpacked(given) == expected)
    except (TypeError, ValueError, RecursionError):  # forged
        return False


def _lines(text: Any) -> list[str]:
    """Return lines without the white space at their ends, and without empty ones at the end."""
    return [line.rstrip() for line in str(text).rstrip().splitlines()]


def same(given: Any, expected: Any, tolerance: float) -> bool:
    """Return whether two values of JSON are equal.

    Args:
        given: what an answer gave.
        expected: what was to come.
        tolerance: relative difference between numbers of which one is not whole; what is nearer to 0 than a thousandth
            of it is 0.
    """
    if isinstance(given, float) or isinstance(expected, float):
        numbers = isinstance(given, int | float) and isinstance(expected, int | float)
        try:
            return numbers and math.isclose(given, expected, rel_tol=tolerance, abs_tol=tolerance * TINY)
        except OverflowError:  # a whole number that no float holds
            return False
    if isinstance(given, list) and isinstance(expected, list):
        return len(given) == len(expected) and all(same(*pair, tolerance) for pair in zip(given, expected, strict=True))
    if isinstance(given, dict) and isinstance(expected, dict):
        return given.keys() == expected.keys() and all(same(given[k], expected[k], tolerance) for k in expected)
    return bool(given == expected)


def tests_of(sample: Sample, column: str) -> list[Test]:
    """Return a sample's tests.

    Args:
        sample: has them in a column, as a list or as its JSON.
        column: its name.

    Raises:
        DataError: there are none, or one is written in another form.
    """
    found = sample.extra.get(column)
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except ValueError as error:
            raise DataError(
                f"{sample.where}: column '{column}': no list of tests, and no JSON of one: {error}"
            ) from None
    if not isinstance(found, list) or not found:
        raise DataError(f"{sample.where}: expected a list of tests in column '{column}', each {FORM}")
    return [_test(one, f"{sample.where}: column '{column}', test {i + 1}") for i, one in enumerate(found)]


def _test(given: Any, place: str) -> Test:
    try:
        if isinstance(given, str):
            return _assertion(given)
        made = dict(given)
        expected = made.pop("expected")
        if "call" in made:
            good = str(made["call"]).isidentifier() and made.keys() <= {"call", "args", "kwargs"}
            good = good and isinstance(made.get("args", []), list) and isinstance(made.get("kwargs", {}), dict)
        else:
            good = made.keys() == {"input"} and isinstance(made["input"], str) and isinstance(expected, str)
        if not good:
            raise ValueError(given)
        return Test(_as_json(made), _as_json(expected))
    except (TypeError, ValueError, KeyError, SyntaxError, RecursionError):
        raise DataError(f"{place}: expected {FORM}; got {given!r}") from None


def _as_json(value: Any) -> Any:
    """Return a value as it is after a journey through JSON: tuples are lists, sets sorted lists, keys texts."""
    return json.loads(json.dumps(value, default=plain))


def _assertion(text: str) -> Test:
    """Return the test that an assertion of literals means, which is read and never run."""
    match ast.parse(text.strip()).body:
        case [ast.Assert(test=ast.Compare(left=ast.Call(func=ast.Name(id=name)) as call, ops=[ast.Eq()]) as compare)]:
            names = [keyword.arg for keyword in call.keywords]
            if None in names or len(set(names)) < len(names):  # **{...}
                raise ValueError(text)
            kwargs = ast.Dict([ast.Constant(name) for name in names], [keyword.value for keyword in call.keywords])
            given = ast.Tuple([ast.List(call.args, ast.Load()), kwargs], ast.Load())
            ast.literal_eval(given)
            return Test({"call": name, "literals": ast.unparse(given)}, ast.literal_eval(compare.comparators[0]))
    raise ValueError(text)


def code_in(text: str) -> str:
    """Return the code in an answer: its last fenced block, or all of it where there is none.

    Args:
        text: the answer.
    """
    blocks = [inside for inside, closed in fenced(text) if closed or inside.strip()]
    return blocks[-1] if blocks else text


@dataclass(frozen=True)
class Verdict:
    """What came of an answer's tests.

    Args:
        ran: what the sandbox says.
        passed: per test whether it gave what was expected.
    """

    ran: sandbox.Ran
    passed: tuple[bool, ...]

    @property
    def share(self) -> float:
        """The share of tests passed."""
        return sum(self.passed) / len(self.passed)

    @property
    def crashed(self) -> bool:
        """Whether something failed otherwise than by a wrong result."""
        return bool(self.ran.ended) or any("error" in result for result in self.ran.results)


@dataclass(kw_only=True)
class Executed(Reward):
    """The base of rewards that run an answer's code.

    Args:
        tests: column with a sample's tests; a list of {"call": name, "args": [...], "expected": value} or of {"input":
            text, "expected": text}, or of assertions of literals, as text, which are compared as Python does.
        seconds: processor time for all tests of an answer together, in seconds; code that takes more passes none.
        wall: time on the clock for them, in seconds.
        memory: what a program may use beside the interpreter, in MiB.
        tolerance: relative difference that counts as equal between numbers that are not whole, but in assertions.
        workers: answers that run at once; 0 takes as many as there are processors.
        prompted: whether an answer goes on with its prompt, such as a function's head and docstring, so that what runs
            is the prompt with the answer behind it.
    """

    tests: str = "tests"
    seconds: Positive = 2.0
    wall: Positive = 10.0
    memory: Annotated[int, Field(ge=16)] = 256
    tolerance: NotNegative = 1e-6
    workers: Annotated[int, Field(ge=0)] = 0
    prompted: bool = False

    def setup(self, run: Any) -> None:
        """Prove that programs are shut in here, before any is run.

        Args:
            run: the run in progress.

        Raises:
            HoneError: they are not.
        """
        sandbox.prove()

    def program(self, text: str, sample: Sample) -> str:
        """Return the program that an answer comes to.

        Args:
            text: the answer.
            sample: what was asked.

        Raises:
            DataError: it goes on with a prompt that is a conversation.
        """
        code = code_in(text)
        return prompt_text(sample) + code if self.prompted else code

    def longest(self, answers: int) -> float:
        """Return how many seconds programs take that all wait until they are ended.

        Args:
            answers: how many are judged.
        """
        return math.ceil(answers / (self.workers or os.cpu_count() or 1)) * (self.wall + _STARTING)

    def verdicts(self, texts: Sequence[str], samples: Sequence[Sample], *, count: bool = False) -> list[Verdict]:
        """Return what comes of code on the tests of samples; equal pairs run once.

        Args:
            texts: the code.
            samples: that of each text.
            count: count the lines that are executed.
        """
        limits = sandbox.Limits(seconds=self.seconds, wall=self.wall, memory=self.memory)
        jobs: dict[str, tuple[str, list[Test]]] = {}
        keys = []
        for text, sample in zip(texts, samples, strict=True):
            tests = tests_of(sample, self.tests)
            keys.append(repr((text, tests)))
            jobs.setdefault(keys[-1], (text, tests))

        def decide(job: tuple[str, list[Test]]) -> Verdict:
            text, tests = job
            ran = sandbox.run(text, [test.asked for test in tests], limits, count=count)
            late = ran.ended == "time" and ran.seconds > self.seconds  # the kernel ends it at a whole second, later
            pairs = zip(tests, ran.results, strict=True)
            return Verdict(ran, tuple(not late and test.passed(result, self.tolerance) for test, result in pairs))

        sandbox.prove()
        pool = ThreadPoolExecutor(self.workers or os.cpu_count() or 1)
        try:
            found = dict(zip(jobs, pool.map(decide, jobs.values()), strict=True))
        finally:
            pool.shutdown(cancel_futures=True)
        return [found[key] for key in keys]


@part("reward", "code", papers="original")
@dataclass(kw_only=True)
class Code(Executed):
    """Reward code that passes its sample's tests, run in a sandbox.

    r = share of tests passed; all: 1 where every test is passed, else 0

    The code is the last fenced block of an answer, or all of it, behind its prompt where `prompted`. See
    `hone.rewards.sandbox` for what is kept from it.

    Args:
        worth: "share" or "all".
    """

    worth: Literal["share", "all"] = "share"

    def score(self, attempts: Sequence[Attempt], source: Source) -> list[float]:
        """Return the worth of each attempt.

        Args:
            attempts: all answers of a phase.
            source: not looked at.

        Raises:
            DataError: a sample has no tests.
            HoneError: the sandbox does not hold here.
        """
        found = self.verdicts(
            [self.program(one.whole, one.sample) for one in attempts], [one.sample for one in attempts]
        )
        return [float(verdict.share if self.worth == "share" else verdict.share == 1) for verdict in found]


@part(
    "reward",
    "code-efficiency",
    papers=[
        (
            "ACECode: A Reinforcement Learning Framework for Aligning Code Efficiency and Correctness in Code Language "
            "Models",
            "arXiv:2412.17264",
        ),
        (
            "Leveraging Reinforcement Learning and Large Language Models for Code Optimization",
            "arXiv:2312.05657",
        ),
    ],
    claim="A stepped reward for correctness, and for speed only where all tests are passed, makes code faster without "
    "making it wrong.",
    deviations="The penalties are those of CodeRL's code, since the paper's own could not be verified; all are "
    "options. Cost is by default the number of executed lines, which is the same every time, rather than the clock. "
    "The second paper ranks candidates by correctness and by how much faster they are, which this reward gives.",
)
@dataclass(kw_only=True)
class Efficiency(Executed):
    """Reward code for passing its tests, and then for costing less than a reference (ACECode).

    r = uncompiled, crashed or failed as far as it goes; 0.5 + 0.5 min(cost of the reference / own cost, cap) where all
    tests are passed

    Lines are counted inside the sandbox, so that code that sets out to can report fewer, though not by ordinary means;
    processor time is measured from outside, and differs by some milliseconds from run to run.

    Args:
        reference: column with a reference's code, or with its cost as a number.
        cost: "lines" executed, or processor "time" in seconds, the least of `repeats` runs.
        cap: the ratio of costs counts up to it.
        repeats: runs of which the fastest counts, where cost is time.
        uncompiled: worth of what is no Python.
        crashed: worth of code that raises or runs out of its limits in some test.
        failed: worth of code that only gives wrong results.
    """

    reference: str = "reference"
    cost: Literal["lines", "time"] = "lines"
    cap: Positive = 1.0
    repeats: Annotated[int, Field(ge=1)] = 3
    uncompiled: float = -1.0
    crashed: float = -0.6
    failed: float = -0.3
    _costs: dict[str, float] = field(init=False, default_factory=dict, repr=False)

    def score(self, attempts: Sequence[Attempt], source: Source) -> list[float]:
        """Return the worth of each attempt.

        Args:
            attempts: all answers of a phase.
            source: not looked at.

        Raises:
            DataError: a sample has no tests or no reference, or its reference fails.
            HoneError: the sandbox does not hold here.
        """
        samples = [attempt.sample for attempt in attempts]
        references = [self._reference(sample) for sample in samples]
        texts = [self.program(attempt.whole, attempt.sample) for attempt in attempts]
        found = self.verdicts(texts, samples, count=self.cost == "lines")
        right = [i for i, verdict in enumerate(found) if verdict.share == 1 and not verdict.crashed]
        costs = self._costs_of([found[i] for i in right], [texts[i] for i in right], [samples[i] for i in right])
        ratios = {i: references[i] / cost for i, cost in zip(right, costs, strict=True)}
        return [self._one(verdict, ratios.get(i, 0.0)) for i, verdict in enumerate(found)]

    def longest(self, answers: int) -> float:
        """Return how many seconds programs and their references take that all wait until they are ended.

        Args:
            answers: how many are judged.
        """
        each = self.wall + _STARTING  # a reference runs alone
        return (super().longest(answers) + answers * each) * (1 if self.cost == "lines" else self.repeats)

    def _one(self, verdict: Verdict, ratio: float) -> float:
        if not verdict.ran.compiled:
            return self.uncompiled
        if verdict.crashed:
            return self.crashed
        return 0.5 + 0.5 * min(ratio, self.cap) if verdict.share == 1 else self.failed

    def _reference(self, sample: Sample) -> float:
        """Return the cost of a sample's reference, found once."""
        given = sample.extra.get(self.reference)
        if isinstance(given, int | float) and not isinstance(given, bool) and given > 0:
            return float(given)
        if not isinstance(given, str) or not given.strip():
            raise DataError(
                f"{sample.where}: reward 'code-efficiency' needs a reference to compare with: its code, or its cost as "
                f"a number, in column '{self.reference}'"
            )
        program = self.program(given, sample)  # a reference is an answer
        key = json.dumps([program, sample.extra.get(self.tests)], default=str)
        if key not in self._costs:
            verdict = self.verdicts([program], [sample], count=self.cost == "lines")[0]
            if verdict.share < 1 or verdict.crashed:
                wrong = next((r for r, good in zip(verdict.ran.results, verdict.passed, strict=True) if not good), {})
                raise DataError(
                    f"{sample.where}: the reference in column '{self.reference}' does not pass the sample's own tests: "
                    f"{wrong.get('error') or verdict.ran.ended or wrong}"
                )
            self._costs[key] = self._costs_of([verdict], [program], [sample])[0]
        return self._costs[key]

    def _costs_of(self, first: Sequence[Verdict], texts: Sequence[str], samples: Sequence[Sample]) -> list[float]:
        """Return what code costs that has passed its tests once, never 0; time is measured again."""
        if self.cost == "lines":
            return [float(verdict.ran.lines or 1) for verdict in first]
        runs = [first, *(self.verdicts(texts, samples) for _ in range(self.repeats - 1))]
        return [max(1e-3, min(run[i].ran.seconds for run in runs)) for i in range(len(texts))]
