"""One training example as data, before any tokenizer sees it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Kind = Literal["text", "completion", "messages", "pieces", "pair", "list", "steps", "tagged", "prompt"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Args:
        role: "system", "user", "assistant" or "tool".
        content: the text of the turn.
        beside: JSON of what a template may write besides: tool_calls, reasoning_content, tool_call_id; "" for nothing.
        weight: of an assistant's turn in training; 0 leaves it untrained.
    """

    role: str
    content: str
    beside: str = ""
    weight: float = 1.0

    def plain(self) -> dict[str, Any]:
        """Return the turn as chat templates take it."""
        return {"role": self.role, "content": self.content, **(json.loads(self.beside) if self.beside else {})}

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The tools that the turn calls, each with "name" and "arguments"."""
        return [call["function"] for call in self.plain().get("tool_calls", ())]

    @property
    def text(self) -> str:
        """What the turn says, for people and for graders: its content, then each call of a tool as a line of JSON."""
        lines = [json.dumps(call, ensure_ascii=False) for call in self.calls]
        return "\n".join([*([self.content] if self.content or not lines else []), *lines])


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
        tools: JSON of the tools that a conversation may call, which the chat template writes before it; "" for none.
    """

    kind: Kind
    prompt: str | tuple[Message, ...] = ""
    answers: tuple[str | tuple[Message, ...], ...] = ()
    scores: tuple[float, ...] = ()
    labels: tuple[str, ...] = ()
    fields: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    where: str = ""
    tools: str = ""


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
    turn = sample.prompt[last]
    answer = (turn,) if turn.beside else turn.content
    return replace(sample, kind="completion", prompt=sample.prompt[:last], answers=(answer,))
