"""One training example as data, before any tokenizer sees it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["text", "completion", "messages", "pieces", "pair", "list", "steps", "tagged", "prompt"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: "system", "user", "assistant" or "tool".
        content: the text of the turn.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Sample:
    """One example in canonical form; `data/formats.py` makes it from a row of any known format.

    Args:
        kind: "text" (all of answers[0] is trained), "completion" (answers[0] is trained after prompt), "messages"
            (prompt is a whole conversation; its assistant turns are trained), "pieces" (answers follow each other after
            a plain prompt, each tokenised on its own; scores are the weights of their tokens, 1 where there are none),
            "pair" (answers are chosen, rejected), "list" (answers with scores), "steps" (answers are those of one
            answer after a plain prompt; scores say what the answer is worth after each), "tagged" (answers are words
            with labels), "prompt" (nothing to train on; for generation and on-policy learning).
        prompt: plain text, or the messages of a conversation.
        answers: plain texts, or lists of messages where the prompt is messages.
        scores: how good each answer of a list is, the higher the better; the weight of each of several pieces.
        labels: the class of a text, or of each of the words that are tagged.
        fields: per-sample numbers for objectives, e.g. a weight or a margin.
        extra: other columns of the row, for metrics and rewards, e.g. the exact answer.
        where: "file:line" or "chains:17", for messages.
    """

    kind: Kind
    prompt: str | tuple[Message, ...] = ""
    answers: tuple[str | tuple[Message, ...], ...] = ()
    scores: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()
    fields: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = ""


def opened(sample: Sample) -> Sample:
    """Return a conversation as a prompt and its last answer, so that another answer can take its place.

    Args:
        sample: a sample of any kind; only conversations with an assistant's turn are changed.
    """
    if sample.kind != "messages" or isinstance(sample.prompt, str):
        return sample
    last = max((number for number, turn in enumerate(sample.prompt) if turn.role == "assistant"), default=None)
    if last is None:
        return sample
    return replace(sample, kind="completion", prompt=sample.prompt[:last], answers=(sample.prompt[last].content,))
