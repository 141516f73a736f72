"""The steps of a language model's answers as a problem to search: who continues them, and who says what they are worth.

A step ends with a token that contains the separator, such as a line break, or with the answer. Its prior is the
geometric mean of its tokens' probabilities, the closing one's included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hone.errors import ModelError
from hone.samplers.text import greedy
from hone.text.generate import Generation, Sampler, generate
from hone.text.model import LanguageModel
from hone.text.search import Move
from hone.text.values import Ids, ValueHead, continuation_values

BATCH = 256  # continuations that are sampled at once; steps are short
WRONG = -1.0  # what an answer is worth that is wrong or does not end; a right one is worth 1


@dataclass(frozen=True)
class Prefix:
    """The beginning of an answer.

    Args:
        question: number of the prompt that it answers.
        before: token ids of all steps but the last.
        step: those of the last step with what closes it; the token that ends an answer is left out.
        stop: the token that has ended the answer, -1 where it goes on or was cut off.
        cut: whether the answer ran out of room.
        logprobs: log-probabilities of all tokens, the stop token's included.
    """

    question: int
    before: Ids = ()
    step: Ids = ()
    stop: int = -1
    cut: bool = False
    logprobs: tuple[float, ...] = field(default=(), compare=False, repr=False)

    @property
    def tokens(self) -> Ids:
        """The answer so far, without a stop token."""
        return self.before + self.step

    @property
    def shown(self) -> Ids:
        """The last step as a model reads it, with a stop token."""
        return self.step if self.stop < 0 else (*self.step, self.stop)

    def generation(self) -> Generation:
        """Return a finished answer as `generate` would."""
        count = len(self.tokens)
        ended = self.stop >= 0
        return Generation(
            np.array(self.tokens, np.int32), np.array(self.logprobs[:count]), ended, self.stop,
            self.logprobs[count] if ended else float("nan"),
        )  # fmt: skip


def step_ends(model: LanguageModel, separator: str) -> list[int]:
    """Return the ids of the tokens that end a step: those whose text contains a separator.

    Args:
        model: has the tokenizer.
        separator: what ends a step, e.g. a line break.

    Raises:
        ModelError: no token contains it.
    """
    texts = model.tokenizer.batch_decode([[i] for i in range(len(model.tokenizer))], clean_up_tokenization_spaces=False)
    found = [index for index, text in enumerate(texts) if separator in text]
    if not found:
        raise ModelError(f"no token of the tokenizer contains {separator!r}, at which steps shall end; set separator")
    return found


def cut_steps(tokens: Sequence[int], ends: Sequence[int]) -> list[Ids]:
    """Return an answer cut into its steps; joined, they are the answer again.

    Args:
        tokens: ids of the answer.
        ends: ids that end a step.
    """
    steps, begin, closing = list[Ids](), 0, set(ends)
    for place, token in enumerate(tokens, 1):
        if token in closing or place == len(tokens):
            steps.append(tuple(int(one) for one in tokens[begin:place]))
            begin = place
    return steps


@dataclass
class Steps:
    """Answers of a language model as a `hone.text.search.Problem`.

    Finished answers are worth what `outcome` says of their text, where it is given; everything else is worth what the
    value head says, 0 without one, as is the empty answer. An answer that runs out of room is wrong in any case.

    Args:
        model: continues answers.
        prompts: token ids of each question's prompt.
        ends: ids that end a step.
        stop: ids that end an answer.
        samples: continuations of each state.
        max_new_tokens: longest answer in tokens.
        sampler: picks tokens.
        seed: the continuations are drawn from it.
        outcome: called with the number of a question and the text of an answer, returns whether it is right.
        judge: the model that values, and its head; it may be the one that continues.
    """

    model: LanguageModel
    prompts: Sequence[np.ndarray]
    ends: Sequence[int]
    stop: Sequence[int]
    samples: int = 4
    max_new_tokens: int = 128
    sampler: Sampler = greedy
    seed: int = 0
    outcome: Callable[[int, str], bool] | None = None
    judge: tuple[LanguageModel, ValueHead] | None = None
    _calls: int = field(default=0, init=False, repr=False)

    def roots(self) -> list[Prefix]:
        """Return the empty answer to each question."""
        return [Prefix(question) for question in range(len(self.prompts))]

    def expand(self, states: Sequence[Prefix]) -> list[list[Move[Prefix]]]:
        """Return `samples` continuations of each answer by one step; equal ones are not merged.

        Args:
            states: unfinished answers.
        """
        self._calls += 1
        made = generate(
            self.model, [self._text(state.question, state.tokens) for state in states], samples=self.samples,
            max_new_tokens=self.max_new_tokens - min(len(state.tokens) for state in states), sampler=self.sampler,
            stop=[*self.stop, *self.ends], seed=(self.seed * 1_000_003 + self._calls) % 2**63,
            batch=max(BATCH, self.samples),
        )  # fmt: skip
        return [[self._move(state, one) for one in group] for state, group in zip(states, made, strict=True)]

    def _text(self, question: int, tokens: Ids) -> np.ndarray:
        return np.concatenate([np.asarray(self.prompts[question], np.int32), np.array(tokens, np.int32)])

    def _move(self, state: Prefix, one: Generation) -> Move[Prefix]:
        """Return an answer continued by what was drawn."""
        ids, logprobs = one.trajectory()
        ended = one.stopped and one.stop_token in self.stop  # it may end a step as well
        fits = len(state.tokens) + len(ids) <= self.max_new_tokens  # states of one call have different room
        step = tuple(ids.tolist()[:-1] if ended else ids.tolist())
        grown = Prefix(state.question, state.tokens, step, logprobs=(*state.logprobs, *logprobs.tolist()))
        if ended and fits:
            grown = replace(grown, stop=one.stop_token)
        elif ended or self._full(grown) or not one.stopped:
            grown = replace(grown, cut=True)
        return Move(grown, math.exp(float(logprobs.mean())), finished=ended or grown.cut)

    def _full(self, state: Prefix) -> bool:
        """Return whether an answer has no room for another token."""
        size, context = len(state.tokens), self.model.context
        longest = context is not None and len(self.prompts[state.question]) + size >= context
        return longest or size >= self.max_new_tokens

    def value(self, states: Sequence[Prefix]) -> list[float]:
        """Return what each answer is worth, between -1 and 1.

        Args:
            states: answers, finished or not.
        """
        found = [0.0] * len(states)
        asked: dict[tuple[int, Ids], list[int]] = {}  # those that the head values, by what precedes their last step
        for at, state in enumerate(states):
            if state.cut:
                found[at] = WRONG if self.outcome is not None else float("-inf")  # a beam takes anything else first
            elif self.outcome is not None and state.stop >= 0:
                found[at] = 1.0 if self.outcome(state.question, self.text(state)) else WRONG
            elif self.judge is not None and state.shown:
                asked.setdefault((state.question, state.before), []).append(at)
        if self.judge is not None and asked:
            groups = [
                (tuple(self._text(*key).tolist()), [states[at].shown for at in places]) for key, places in asked.items()
            ]
            values = continuation_values(*self.judge, groups)
            for places, part in zip(asked.values(), values, strict=True):
                for at, value in zip(places, part, strict=True):
                    found[at] = value
        return found

    def text(self, state: Prefix) -> str:
        """Return an answer as text.

        Args:
            state: the answer.
        """
        return self.model.renderer.decode(state.tokens)

    def step_text(self, state: Prefix) -> str:
        """Return the last step of an answer as text.

        Args:
            state: the answer.
        """
        decode: Any = self.model.renderer.decode
        return str(decode(state.tokens)[len(decode(state.before)) :])
