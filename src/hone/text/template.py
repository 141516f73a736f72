"""Chat templates: a conversation written in pieces, so that a prompt is the same text in training and in generation."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2

from hone.data.sample import Message
from hone.data.turns import REASONING
from hone.errors import DataError, ModelError, nearest

log = logging.getLogger(__name__)

FIX = "Set model.template to 'chatml' or to the path of a .jinja file."
CHATML = (
    "{% for message in messages %}"
    "{{ BOS'<|im_start|>' + message['role'] + '\\n' + message['content'] + END + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# A template that prints today's date would write the same sample differently tomorrow. A macro of that name hides the
# function that transformers offers; the date is the one that Llama 3.1's own template falls back to.
FIXED_DATE = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro +%}"
TRIAL = (Message("user", "hone asks"), Message("assistant", "hone answers"))
TRIAL_PLACE = "a trial conversation"


@dataclass(frozen=True)
class Piece:
    """A stretch of text that is tokenised on its own.

    Args:
        text: the text.
        after: text that stands before it, in whose company it is tokenised; "" at the start.
        closed: whether the end-of-text token follows.
    """

    text: str
    after: str = ""
    closed: bool = False


@dataclass(frozen=True)
class Turn:
    """An assistant's turn.

    Args:
        index: its place in the conversation.
        prompt: what generation would be given, in pieces.
        answer: what it would have to generate, up to and including the token that ends the turn.
    """

    index: int
    prompt: list[Piece]
    answer: Piece


@dataclass(frozen=True)
class Manner:
    """How a template writes an assistant's turn.

    Args:
        surplus: characters of white space at the end of the generation prompt that assistant turns lack.
        end: what ends the turn, up to and including its first special token; "" when no token does.
        tail: all that follows the content.
        stop: id of the token that ends the turn, None when no token does.
    """

    surplus: int
    end: str
    tail: str
    stop: int | None


def plain_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text, without what the tokenizer likes to put around it."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def find_template(tokenizer: Any, template: str | None, adds_bos: bool) -> str | None:
    """Return the text of a chat template, None when there is none.

    Args:
        tokenizer: its own template is taken where none is named.
        template: "chatml", the path of a .jinja file, Jinja text, or None.
        adds_bos: whether the tokenizer puts its BOS before a text; the built-in template then does so too.

    Raises:
        ModelError: there is no such file, or the tokenizer has several templates and no default.
    """
    if template is None:
        own = tokenizer.chat_template
        if isinstance(own, dict) and "default" not in own:
            names = ", ".join(sorted(own))
            raise ModelError(f"the tokenizer has several chat templates ({names}) and none is the default. {FIX}")
        return own["default"] if isinstance(own, dict) else own
    if template == "chatml":
        if "<|im_end|>" not in tokenizer.get_vocab() and tokenizer.eos_token is None:
            raise ModelError("model.template: chatml needs a token that ends a turn: <|im_end|> or an eos_token")
        end = "'<|im_end|>'" if "<|im_end|>" in tokenizer.get_vocab() else "eos_token"
        bos = "(bos_token if loop.first else '') + " if adds_bos else ""
        return CHATML.replace("BOS", bos).replace("END", end)
    if "{%" in template or "{{" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob("*.jinja")] if path.parent.is_dir() else []
        hint = nearest(path.name, ["chatml", *siblings]) or "expected 'chatml' or the path of a .jinja file"
        raise ModelError(f"model.template: there is no template file '{template}'; {hint}")
    return path.read_text(encoding="utf-8")


class ChatTemplate:
    """A chat template that writes conversations in pieces.

    A prompt is cut where the turns before it were cut, and that depends on these turns alone: so the prompt of the last
    turn has the same pieces whether its answer is known (training) or not (generation). A template may write earlier
    turns differently later on (Qwen3 drops their thinking); then the prompt is one piece.
    """

    def __init__(self, text: str, tokenizer: Any, company: Callable[[str], str]) -> None:
        """Hold the template; it is tried out when the first conversation comes.

        Args:
            text: Jinja text.
            tokenizer: gives the special tokens.
            company: what text to tokenise a piece after (see `Piece`), given all that stands before it.
        """
        self.text, self.tokenizer, self.company = text, tokenizer, company

    def turns(self, messages: Sequence[Message], where: str, tools: str = "") -> Iterator[Turn]:
        """Yield the assistant's turns of a conversation.

        Args:
            messages: the conversation.
            where: "file:line", for messages.
            tools: JSON of the tools that it may call, "" for none.

        Raises:
            DataError: the template refuses the conversation.
            ModelError: the template is broken, leaves tools or reasoning out, or its generation prompt is not how its
                assistant turns begin.
        """
        done: list[Piece] = []
        for index, message in enumerate(messages):
            if message.role == "assistant":
                prompt = self._generation_prompt(messages[:index], where, tools)
                turn = Turn(index, self._cut(prompt, done), self._answer(messages[: index + 1], prompt, where, tools))
                yield turn
                done = [*turn.prompt, replace(turn.answer, closed=False)]

    def prompt(self, messages: Sequence[Message], where: str, tools: str = "") -> list[Piece]:
        """Return the generation prompt after a conversation, in pieces; errors are those of `turns`.

        Args:
            messages: the conversation.
            where: "file:line", for messages.
            tools: JSON of the tools that it may call, "" for none.
        """
        done: list[Piece] = []
        for turn in self.turns(messages, where, tools):
            done = [*turn.prompt, replace(turn.answer, closed=False)]
        return self._cut(self._generation_prompt(messages, where, tools), done)

    def _cut(self, prompt: str, done: list[Piece]) -> list[Piece]:
        """Cut a prompt where earlier turns were cut, or leave it whole where the template wrote those differently."""
        text = "".join(piece.text for piece in done)
        if done and prompt.startswith(text):
            return [*done, Piece(prompt[len(text) :], after=self.manner.end or self.company(text))]
        return [Piece(prompt)]

    def _generation_prompt(self, messages: Sequence[Message], where: str, tools: str) -> str:
        surplus = self.manner.surplus  # first of all, so that a template that cannot do anything is not a row's fault
        prompt = self._write(messages, where, generate=True, tools=tools)
        for tool in json.loads(tools) if tools else ():
            if tool["function"]["name"] not in prompt:
                raise _leaves_out(f"the tool '{tool['function']['name']}'", where)
        return prompt[: len(prompt) - surplus]

    def _answer(self, messages: Sequence[Message], prompt: str, where: str, tools: str) -> Piece:
        """Return what the last turn adds to its generation prompt, up to the token that ends it."""
        whole, manner = self._write(messages, where, tools=tools), self.manner
        if not whole.startswith(prompt):
            raise _not_a_prefix(prompt, whole, where)
        text = whole[len(prompt) :]
        _check_beside(messages[-1], text, where)
        if not manner.end:
            return Piece(text.removesuffix(manner.tail), self.company(prompt), closed=True)
        before, end, _ = text.rpartition(manner.end)
        if not end:
            raise ModelError(f"{where}: the chat template does not end this assistant turn with {manner.end!r}. {FIX}")
        return Piece(before + end, self.company(prompt))

    def _write(self, messages: Sequence[Message], where: str, generate: bool = False, tools: str = "") -> str:
        """Return the text of a conversation, with the beginning of an assistant's turn when it is to be generated."""
        if not messages:
            raise DataError(f"{where}: the conversation begins with an assistant turn; expected a user's turn first")
        plain = [message.plain() for message in messages]
        template = FIXED_DATE + self.text if "strftime_now" in self.text else self.text
        try:
            text = self.tokenizer.apply_chat_template(
                plain, chat_template=template, add_generation_prompt=generate, tokenize=False,
                tools=json.loads(tools) if tools else None,
            )  # fmt: skip
        except jinja2.TemplateSyntaxError as error:
            place = f"line {error.lineno}: {error.message}"
            raise ModelError(f"the chat template is not valid Jinja: {place}. {FIX}") from error
        except jinja2.TemplateError as error:
            what = f"this conversation ({', '.join(message.role for message in messages)})"
            fix = f"Change the row, or: {FIX}"
            raise DataError(f"{where}: the chat template refuses {what}: {error}. {fix}") from error
        return str(text)

    @cached_property
    def manner(self) -> Manner:
        """How the template writes an assistant's turn, seen from a conversation of two turns.

        Raises:
            ModelError: it cannot write that conversation, or its generation prompt is not how its turn begins.
        """
        try:
            prompt = self._write(TRIAL[:1], TRIAL_PLACE, generate=True)
            bare = self._write(TRIAL[:1], TRIAL_PLACE)
            whole = self._write(TRIAL, TRIAL_PLACE)
        except DataError as error:
            raise ModelError(str(error)) from error
        header, found, tail = whole.rpartition(TRIAL[1].content)
        same = _shared(prompt, whole)
        if not found:
            raise ModelError(f"the chat template leaves out what an assistant says; it wrote {whole!r}. {FIX}")
        if prompt[same:].strip():
            raise _not_a_prefix(prompt, whole, TRIAL_PLACE)
        if prompt[same:]:
            log.warning("the generation prompt ends with %r, which no assistant's turn has: left out", prompt[same:])
        if prompt == bare and header[same:].strip():
            raise ModelError(
                f"the chat template begins an assistant's turn with {header[same:]!r}, but does not write that when "
                "add_generation_prompt is set, so that generation would have to invent it. Add "
                f"{{% if add_generation_prompt %}}{header[same:]}{{% endif %}} at its end, or: {FIX}"
            )
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        stop = next((token for token in plain_ids(self.tokenizer, tail) if token in special), None)
        if stop is None:
            return Manner(len(prompt) - same, "", tail, None)
        before, mark, _ = tail.partition(str(self.tokenizer.convert_ids_to_tokens(stop)))
        return Manner(len(prompt) - same, before + mark, tail, stop)


def _check_beside(message: Message, text: str, where: str) -> None:
    """Refuse a template that leaves out a turn's calls or its reasoning: they would be lost without a word."""
    for call in message.calls:
        if call["name"] not in text:
            raise _leaves_out(f"the call of '{call['name']}'", where)
    for key in REASONING:
        if str(message.plain().get(key, "")).strip() not in text:
            raise _leaves_out(f"'{key}'", where)


def _leaves_out(what: str, where: str) -> ModelError:
    fix = "Set model.template to the path of a .jinja file that writes it, or remove it from the row."
    return ModelError(f"{where}: the chat template leaves out {what}. {fix}")


def _shared(first: str, second: str) -> int:
    """Return how many leading characters two texts share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


def _not_a_prefix(prompt: str, whole: str, where: str) -> ModelError:
    same = _shared(prompt, whole)
    return ModelError(
        f"{where}: the chat template's generation prompt is not how it begins an assistant's turn, so that a model "
        "would be trained on one text and asked with another: the prompt goes on with "
        f"{prompt[same : same + 40]!r} where the turn has {whole[same : same + 40]!r}, after "
        f"{whole[max(0, same - 30) : same]!r}. Make both the same in the template, or: {FIX}"
    )
