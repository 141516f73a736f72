"""Data that a model makes itself: answers to the prompts of another source, sorted into right and wrong ones."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from hone.data.cache import cache_root
from hone.data.derived import code_of
from hone.data.formats import CONTINUES
from hone.data.kept import keep_rows, read_rows
from hone.data.sample import Sample, opened
from hone.data.source import Source, Split
from hone.errors import DataError
from hone.options import Nested
from hone.parts import part

if TYPE_CHECKING:
    from hone.text.model import LanguageModel

WAVE = 64  # prompts that are answered, and kept, at once
Texts = list[str]


@dataclass(kw_only=True)
class ModelMade(Source):
    """The base of data that a model makes of another source's samples.

    The model is the one that the run starts from, which `meet` hands over, or one that is named. What it makes is a
    function of the options, the source and the model, and is kept beside the token cache, `WAVE` prompts a file.

    Args:
        of: the source whose prompts are answered, which also knows which answers are right.
        model: folder or Hub name of the model that answers; None takes the one that the run starts from.
        samples_each: answers to each prompt.
        temperature: of the sampling; 0 picks the most probable token.
        max_new_tokens: longest answer in tokens; one that does not end is left out.
        seed: the answers are drawn from it.
        holdout: not used; `of` holds out its own.
    """

    of: Annotated[Any, Nested("data")]
    model: str | None = None
    samples_each: Annotated[int, Field(ge=1)] = 8
    temperature: Annotated[float, Field(ge=0)] = 1.0
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    seed: Annotated[int, Field(ge=0)] = 0
    _load: Callable[[], Any] | None = field(default=None, init=False, repr=False)
    _start: str = field(default="the starting model", init=False, repr=False)

    def meet(self, load: Callable[[], LanguageModel], identity: str) -> None:
        """Take the model that the run starts from, unless another one is named.

        Args:
            load: returns it.
            identity: what tells its content.
        """
        super().meet(load, identity)
        if self.model is None:
            self._load, self._start = load, identity

    def answers(self, prompts: Sequence[Sample], purpose: str) -> Iterator[Texts]:
        """Yield the finished answers to each prompt, those of a wave from the cache where they are.

        Args:
            prompts: samples whose prompts are answered.
            purpose: what for; it keeps waves of different use apart.
        """
        identity = self._identity()
        for begin in range(0, len(prompts), WAVE):
            wave = prompts[begin : begin + WAVE]
            asked = [str(sample.prompt) for sample in wave]
            key = hashlib.sha256(json.dumps([identity, purpose, begin, asked]).encode()).hexdigest()
            file = cache_root() / "sampled" / f"{key}.json"
            rows = read_rows(file) if self.cache else None
            if rows is None:
                rows = self._answer(wave, f"{purpose}:{begin}")
                if self.cache:
                    keep_rows(file, rows)
            yield from rows

    def _open(self, split: Split) -> list[Sample]:
        """Return the source's samples of a split, conversations as a prompt and its last answer."""
        return [opened(sample) for sample in self.of.samples(split)]

    def _plain(self, split: Split) -> list[Sample]:
        """Return the source's samples of a split, whose prompts must be plain text: what is made goes on behind them.

        Raises:
            DataError: one is a conversation.
        """
        samples = list(self.of.samples(split))
        for sample in samples:
            prompt_text(sample)
        return samples

    def _identity(self) -> list[Any]:
        model = self._start if self.model is None else model_content(self.model)
        return [_code(), model, self.samples_each, self.temperature, self.max_new_tokens, self.seed]

    def _answer(self, wave: Sequence[Sample], purpose: str) -> list[Texts]:
        from hone.samplers.text import Greedy
        from hone.samplers.text import Sample as Sampler
        from hone.text.generate import generate

        model = self._answering()
        renderer = model.renderer
        made = generate(
            model, [renderer.prompt_ids(sample) for sample in wave], samples=self.samples_each,
            max_new_tokens=self.max_new_tokens, stop=renderer.stop_ids,
            sampler=Sampler(temperature=self.temperature) if self.temperature > 0 else Greedy(),
            seed=int.from_bytes(hashlib.blake2b(f"{self.seed}:{purpose}".encode(), digest_size=7).digest(), "big"),
            batch=max(WAVE, self.samples_each),
        )  # fmt: skip
        return [[renderer.decode(one.tokens) for one in group if one.stopped] for group in made]

    def _answering(self) -> LanguageModel:
        """Return the model that answers, loaded once."""
        if self._load is None:
            if self.model is None:
                raise DataError(
                    f"{self.describe()}: no model is named that answers, and no run has begun that could lend its own; "
                    "set model: FOLDER"
                )
            from hone.engine.devices import Cluster
            from hone.text.model import LanguageModel

            loaded = LanguageModel.load(self.model, device=Cluster().device)
            self._load = lambda: loaded
        answering: LanguageModel = self._load()
        return answering

    def questions(self, split: Split) -> Iterator[Sample]:
        """Yield the samples that evaluation asks: those of the source, whatever the model answered to them.

        Args:
            split: "train" or "eval".
        """
        found: Iterator[Sample] = self.of.questions(split)
        return found

    def grade(self, sample: Sample, text: str) -> float | None:
        """Return the grade by the source.

        Args:
            sample: a sample of the source.
            text: the generated answer.
        """
        grade: float | None = self.of.grade(sample, text)
        return grade

    def is_right(self, sample: Sample, text: str) -> bool:
        """Return whether an answer is right.

        Args:
            sample: a sample of the source.
            text: the answer.

        Raises:
            DataError: the source cannot tell.
        """
        if (grade := self.grade(sample, text)) is None:
            name = type(self).__name__.lower()
            raise DataError(f"{sample.where}: the source cannot tell whether an answer is right, which '{name}' needs")
        return grade == 1

    def fingerprint(self) -> str:
        """Return a hash of the source, the options, the model where it is known, and the code."""
        own = code_of(type(self))
        made = [type(self).__name__, own, self.of.fingerprint(), self.limit, *self._identity(), *self._choices()]
        return hashlib.sha256(json.dumps(made).encode()).hexdigest()

    def _choices(self) -> list[Any]:
        """Return the options that decide what is made of the answers."""
        return []


@part(
    "data",
    "sampled",
    papers=[
        (
            "Step-DPO: Step-wise Preference Optimization for Long-chain Reasoning of LLMs",
            "arXiv:2406.18629",
        )
    ],
    claim="Pairs of single steps, the first wrong one against a right one from the model itself, teach long reasoning "
    "better than pairs of whole answers.",
    deviations="The paper is the source of `make: steps` only. A step is wrong when it differs from the source's own "
    "line at its place (the paper asks GPT-4), which holds where worked steps have one form.",
)
@dataclass(kw_only=True)
class Sampled(ModelMade):
    """Sample answers from a model and make training data of the right and the wrong ones.

    pairs: right answers against wrong ones, for preference objectives; "chosen": the same right answers alone, for SFT;
    "right": one right answer to every prompt that has one (rejection sampling); "list": all answers with score 1 or 0;
    "steps": the first wrong line of a wrong answer against the right line there, behind the lines before it; "rivals":
    the source's own answer with score 1 against whatever else was sampled, right or wrong, which nothing need grade.

    "hard": the source's own answer to prompts that the model seldom gets right, for a curriculum.

    Where no sample is right, the source's own answer is taken (`gold`).

    Args:
        make: what is made of the answers: pairs, chosen, right, list, steps, rivals or hard.
        pairs: most pairs to a prompt.
        gold: take the source's own answer where the model gave no right one; otherwise such prompts are left out.
        solved_at_most: of make: hard, the largest share of right answers that a prompt may have.
    """

    make: Literal["pairs", "chosen", "right", "list", "steps", "rivals", "hard"] = "pairs"
    pairs: Annotated[int, Field(ge=1)] = 1
    gold: bool = True
    solved_at_most: Annotated[float, Field(ge=0, le=1)] = 0.5

    def _choices(self) -> list[Any]:
        return [self.make, self.pairs, self.gold, self.solved_at_most]

    def describe(self) -> str:
        """Return what is made of what."""
        return f"sampled {self.make}: {self.samples_each} answers to each prompt of {self.of.describe()}"

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield what is made of the answers, in the order of the source's samples.

        Args:
            split: "train" or "eval".

        Raises:
            DataError: the source cannot tell right answers, or no model answers.
        """
        others = {"steps": self._steps, "rivals": self._rivals, "hard": self._hard}
        made = others.get(self.make, self._whole)(split)
        return itertools.islice(made, self.limit if split == "train" else None)

    def _whole(self, split: Split) -> Iterator[Sample]:
        asked = self._open(split)
        for sample, texts in zip(asked, self.answers(asked, split), strict=True):
            right, wrong = self._sorted(sample, texts)
            yield from self._made(sample, right, wrong)

    def _sorted(self, sample: Sample, texts: Texts) -> tuple[Texts, Texts]:
        """Return the right and the wrong answers, each once, in the order they were drawn."""
        grades = {text: self.is_right(sample, text) for text in dict.fromkeys(texts)}
        right = [text for text, good in grades.items() if good]
        if not right and self.gold:
            right = [own_answer(sample)]
        return right, [text for text, good in grades.items() if not good and text.strip()]

    def _made(self, sample: Sample, right: Texts, wrong: Texts) -> Iterator[Sample]:
        if self.make == "right":
            yield from (replace(sample, kind="completion", answers=(text,)) for text in right[:1])
        elif self.make == "list":
            if right and wrong:
                scores = (1.0,) * len(right) + (0.0,) * len(wrong)
                yield replace(sample, kind="list", answers=(*right, *wrong), scores=scores)
        else:
            for first, second in itertools.islice(zip(itertools.cycle(right), wrong), self.pairs if right else 0):
                answers = (first, second) if self.make == "pairs" else (first,)
                yield replace(sample, kind="pair" if self.make == "pairs" else "completion", answers=answers)

    def _rivals(self, split: Split) -> Iterator[Sample]:
        """Yield the source's own answers with all other ones, as often as they were drawn."""
        asked = self._open(split)
        for sample, texts in zip(asked, self.answers(asked, split), strict=True):
            own = own_answer(sample)
            others = [text for text in texts if text != own and text.strip()]
            if others:
                yield replace(sample, kind="list", answers=(own, *others), scores=(1.0,) + (0.0,) * len(others))

    def _hard(self, split: Split) -> Iterator[Sample]:
        """Yield the source's samples whose share of right answers, of all that were asked for, is small."""
        asked = list(self.of.samples(split))
        for sample, texts in zip(asked, self.answers(asked, split), strict=True):
            right = sum(self.is_right(sample, text) for text in texts)
            if right <= self.solved_at_most * self.samples_each:
                yield sample

    def _steps(self, split: Split) -> Iterator[Sample]:
        """Yield pairs of single lines: the first wrong one of an answer, and the right one there, asked for again."""
        asked = self._open(split)
        found: list[tuple[Sample, str, str]] = []
        for sample, texts in zip(asked, self.answers(asked, split), strict=True):
            _, wrong = self._sorted(sample, texts)
            slips = dict.fromkeys(slip for text in wrong if (slip := first_slip(reference(sample), text)))
            for before, line, right in itertools.islice(slips, self.pairs):
                prompt = f"{prompt_text(sample)}{before}"
                found.append((replace(sample, prompt=prompt), line, right))
        again = self.answers([sample for sample, _, _ in found], f"{split}:steps")
        for (sample, wrong_line, right), texts in zip(found, again, strict=True):
            own = any(text.split("\n")[0] == right.rstrip("\n") for text in texts)
            if own or self.gold:
                extra = {**sample.extra, CONTINUES: right.endswith("\n"), "own": own}
                yield replace(sample, kind="pair", answers=(right, wrong_line), extra=extra)


def model_content(name: str) -> str:
    """Return what tells the content of a named model: a hash of its folder's files, or its name on the Hub.

    Args:
        name: folder, Hub name or "base"; of a stage that has not run yet, "stage:1" and so on, the name itself.

    Raises:
        ModelError: there is no such model.
    """
    from hone.engine.manifest import folder_hash
    from hone.text.loading import find_model

    return name if name.startswith("stage:") else folder_hash(Path(find_model(name))) or name


def prompt_text(sample: Sample) -> str:
    """Return a prompt that text can be put behind or around.

    Raises:
        DataError: it is a conversation.
    """
    if not isinstance(sample.prompt, str):
        raise DataError(
            f"{sample.where}: expected a prompt in plain text, which text is put behind or around, found a "
            "conversation; give rows with the columns prompt and completion, without chat: true"
        )
    return sample.prompt


def own_answer(sample: Sample) -> str:
    """Return the source's own answer to a prompt, be that plain text or a conversation.

    Raises:
        DataError: it has no answer, or one that calls tools, whose text the chat template alone knows.
    """
    if not sample.answers:
        raise DataError(f"{sample.where}: expected a prompt with an answer")
    answer = sample.answers[0]
    if not isinstance(answer, str) and answer[-1].calls:
        fix = "take `make: right` without `gold`, or rewards on rollouts"
        raise DataError(f"{sample.where}: an answer that calls tools cannot stand beside texts of the model; {fix}")
    return answer if isinstance(answer, str) else answer[-1].content


def reference(sample: Sample) -> str:
    """Return the source's own answer to a prompt in plain text.

    Raises:
        DataError: it is a conversation, or has no answer.
    """
    if not isinstance(sample.prompt, str) or not sample.answers or not isinstance(sample.answers[0], str):
        raise DataError(f"{sample.where}: expected a prompt with an answer in plain text")
    return sample.answers[0]


def first_slip(reference: str, text: str) -> tuple[str, str, str] | None:
    """Return what precedes the first line of a text that differs from the reference, that line, and the right one.

    Args:
        reference: the right answer, with its worked lines.
        text: a wrong answer.

    Returns:
        None where the text is the reference's beginning or goes on behind its end.
    """
    right, ours = reference.splitlines(keepends=True), text.splitlines(keepends=True)
    for number, (a, b) in enumerate(zip(right, ours, strict=False)):
        if a.rstrip("\n") != b.rstrip("\n"):
            return "".join(right[:number]), b, a
    return None


@cache
def _code() -> str:
    """Return a hash of this file, so that changing it makes everything anew."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
