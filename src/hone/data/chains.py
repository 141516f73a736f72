"""Generated problems with worked steps and exact answers: demonstration, verifiable reward and testbed in one."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Annotated

from pydantic import Field

from hone.data.sample import Sample
from hone.data.skills import Problem, Skill, choose, final_answer, solve
from hone.data.skills.base import pick
from hone.data.source import Source, Split
from hone.errors import DataError, HoneError
from hone.parts import part

EVAL_SHARE = 16  # one prompt in so many is an evaluation prompt, whatever the seed
_ATTEMPTS = 500  # draws in search of an evaluation problem that did not come before

Difficulty = Annotated[int, Field(ge=1, le=5)]


@part("data", "chains", papers="original")
@dataclass(kw_only=True)
class Chains(Source):
    r"""Generate arithmetic and list problems with worked steps and an exact answer.

    A prompt such as "add 47 + 38 =\n" is answered by worked lines and a last line "answer: 85". A hash of a prompt's
    text decides whether it belongs to training or to evaluation, so the two never meet. The evaluation problems are
    the same for every seed, and those of a skill are the same whatever other skills are asked for. Training sample i
    depends on the options and i alone: skills take turns, the rest is drawn from "seed:i".

    Args:
        skills: names of skills, of families ("arithmetic", "list"), "easy" or "hard"; None uses all.
        difficulty: 1 (a line or two of work) to 5 (about ten lines); one is drawn uniformly from a list.
        noise: share of training samples that show the solution of another problem of the same skill, in [0, 1].
        count: number of training samples.
        steps: show the worked steps; without them the answer is its last line alone.
        seed: training problems are drawn from it.
    """

    skills: list[str] | None = None
    difficulty: Difficulty | Annotated[list[Difficulty], Field(min_length=1)] = 1
    noise: Annotated[float, Field(ge=0, le=1)] = 0.0
    count: Annotated[int, Field(gt=0)] = 10_000
    steps: bool = True
    seed: int = 0

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the names of the skills."""
        try:
            choose(self.skills)
        except HoneError as error:
            yield "skills", str(error)

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the samples of a split.

        Args:
            split: "train" (`count` samples) or "eval" (`holdout` different problems, spread evenly over the skills).

        Raises:
            DataError: there are fewer different evaluation problems than `holdout`.
        """
        if split == "train":
            return map(self.train_sample, range(min(self.count, self.limit or self.count)))
        return self._eval_samples()

    @property
    def _chosen(self) -> tuple[Skill, ...]:
        return _choose(None if self.skills is None else tuple(self.skills))

    @property
    def _difficulties(self) -> list[int]:
        return self.difficulty if isinstance(self.difficulty, list) else [self.difficulty]

    def train_sample(self, index: int) -> Sample:
        """Return training sample `index`, which depends on nothing but the options and the index."""
        rng = Random(f"{self.seed}:{index}")
        skill = self._chosen[index % len(self._chosen)]
        difficulty = pick(rng, self._difficulties)
        problem = _draw(skill, rng, difficulty, for_eval=False)
        shown = problem
        noisy = rng.random() < self.noise
        while noisy and shown.answer == problem.answer:
            shown = skill.generate(rng, difficulty)
        return self._sample(skill, difficulty, problem, shown, f"chains:{index}")

    def _eval_samples(self) -> Iterator[Sample]:
        """Take skills in turn, difficulties in turn within a skill, and pass over problems that came before."""
        seen: set[str] = set()
        turns = list(itertools.product(self._difficulties, self._chosen))
        for index in range(self.holdout):
            number, turn = divmod(index, len(turns))
            difficulty, skill = turns[turn]
            rng = Random(f"eval:{skill.name}:{difficulty}:{number}")
            fresh = (_draw(skill, rng, difficulty, for_eval=True) for _ in range(_ATTEMPTS))
            problem = next((problem for problem in fresh if problem.prompt not in seen), None)
            if problem is None:
                raise DataError(
                    f"chains: there are not {self.holdout} different evaluation problems of '{skill.name}' at "
                    f"difficulty {difficulty}; lower `holdout` or raise `difficulty`"
                )
            seen.add(problem.prompt)
            yield self._sample(skill, difficulty, problem, problem, f"chains:eval:{index}")

    def _sample(self, skill: Skill, difficulty: int, problem: Problem, shown: Problem, where: str) -> Sample:
        """Make the sample of `problem` that shows the solution of `shown`."""
        return Sample(
            kind="completion",
            prompt=problem.prompt,
            answers=(shown.solution(self.steps),),
            extra={
                "skill": skill.name,
                "difficulty": difficulty,
                "answer": problem.answer,
                "noisy": shown is not problem,
            },
            where=where,
        )

    def grade(self, sample: Sample, text: str) -> float:
        """Return 1 when the last "answer:" line of a text is right, else 0; it is recomputed from the prompt.

        Args:
            sample: a sample of this source.
            text: the generated answer.
        """
        return float(final_answer(text) == solve(str(sample.prompt)))

    def fingerprint(self) -> str:
        """Return a hash of the options and of the code that makes the problems."""
        names = [skill.name for skill in self._chosen]
        options = [names, self._difficulties, self.noise, self.count, self.limit, self.steps, self.seed, self.holdout]
        return hashlib.sha256(json.dumps(["chains", *options, _code()]).encode()).hexdigest()

    def describe(self) -> str:
        """Return how many problems of which skills there are."""
        return f"chains: {len(self._chosen)} skills ({', '.join(skill.name for skill in self._chosen)})"


@cache
def _choose(names: tuple[str, ...] | None) -> tuple[Skill, ...]:
    return choose(names)


def is_eval(prompt: str) -> bool:
    """Return whether a prompt is kept for evaluation: one in 16, by a hash of its text."""
    return hashlib.blake2b(prompt.encode(), digest_size=1).digest()[0] % EVAL_SHARE == 0


def _draw(skill: Skill, rng: Random, difficulty: int, *, for_eval: bool) -> Problem:
    """Draw problems until one belongs to the split."""
    while is_eval((problem := skill.generate(rng, difficulty)).prompt) != for_eval:
        pass
    return problem


@cache
def _code() -> str:
    """Return a hash of the code that makes the problems, so that changing it changes every fingerprint."""
    here = Path(__file__)
    files = [here, *sorted((here.parent / "skills").glob("*.py"))]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
