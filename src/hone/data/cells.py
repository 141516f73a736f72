"""Reading the cells of one row: texts, numbers and conversations, with errors that name the cell and the fix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hone.data.sample import Message
from hone.errors import DataError, nearest

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
UNSUPPORTED_KEYS = {  # of a turn: the value that loses nothing
    "tool_calls": None, "function_call": None, "reasoning_content": None, "reasoning": None, "thinking": None,
    "weight": 1,
}  # fmt: skip


class Cells:
    """One row seen through the roles of its columns; every reading names the cell when it is not what it should be."""

    def __init__(self, row: Mapping[str, Any], columns: Mapping[str, str], where: str, chat: bool) -> None:
        """Look at a row.

        Args:
            row: column to value.
            columns: role to column; roles that the row lacks are absent.
            where: "file:line" of the row.
            chat: plain prompts and answers become turns of a conversation.
        """
        self.row, self.columns, self.where, self.chat = row, columns, where, chat

    def get(self, role: str) -> Any:
        """Return the value in a role's cell, None when the row has no such cell."""
        return self.row.get(self.columns[role]) if role in self.columns else None

    def fault(self, role: str, expected: str, found: str, fix: str) -> DataError:
        """Return the error about a role's cell.

        Args:
            role: whose cell it is.
            expected: what should be there.
            found: what is there.
            fix: what to do about it.
        """
        return DataError(f"{self.where}: field '{self.columns[role]}': expected {expected}, found {found}. {fix}")

    def text(self, role: str, empty: bool = True) -> str:
        """Return the text in a role's cell.

        Args:
            role: whose cell it is.
            empty: whether a text without any character but white space will do.

        Raises:
            DataError: the cell holds no text, or an empty one where there must be some.
        """
        value = self.get(role)
        if not isinstance(value, str):
            fix = "Write it as a quoted string" if isinstance(value, (int, float)) else "Fill in or remove the row"
            raise self.fault(role, "a string", shown(value), f"{fix}.")
        if not empty and not value.strip():
            raise self.fault(role, "some text to train on", "an empty string", "Fill in or remove the row.")
        return value

    def turns(self, role: str) -> tuple[Message, ...]:
        """Return the conversation in a role's cell.

        Raises:
            DataError: the cell holds no list of turns, or a turn that cannot be used.
        """
        value = self.get(role)
        if not isinstance(value, list) or not value:
            fix = 'Write turns such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}].'
            raise self.fault(role, "a list of turns", "an empty list" if value == [] else shown(value), fix)
        if self.row.get("tools") not in (None, "", "[]", [], {}):
            fix = "They would be lost; put them into the system turn's text and remove the column."
            raise DataError(f"{self.where}: field 'tools': expected none, found {shown(self.row['tools'])}. {fix}")
        return tuple(self._turn(role, number, turn) for number, turn in enumerate(value, start=1))

    def _turn(self, role: str, number: int, turn: Any) -> Message:
        if not isinstance(turn, dict):
            fix = 'Write {"role": ..., "content": ...}.'
            raise self.fault(role, f"turn {number} to be an object", shown(turn), fix)
        speaker, said = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
        for key in (speaker, said):
            if key not in turn:
                fix = nearest(key, turn) or "Turns are {role, content} or {from, value}"
                raise self.fault(role, f"turn {number} to have '{key}'", f"only {quoted(turn)}", f"{fix}.")
        for key, harmless in UNSUPPORTED_KEYS.items():
            if turn.get(key) not in (harmless, None, "", [], {}):
                fix = "It would be lost; remove it or put it into the text."
                raise self.fault(role, f"turn {number} without '{key}', which is not supported", shown(turn[key]), fix)
        known = ROLES.get(turn[speaker]) if isinstance(turn[speaker], str) else None
        if known is None:
            hint = nearest(turn[speaker], ROLES) or f"known roles: {', '.join(ROLES)}"
            raise self.fault(role, f"a known role in turn {number}", shown(turn[speaker]), f"{hint.capitalize()}.")
        content = _plain_content(turn[said])
        if content is None:
            fix = "Only text can be trained on: write the turn's text as one string."
            raise self.fault(role, f"turn {number} to hold a string in '{said}'", shown(turn[said]), fix)
        if known == "assistant" and not content.strip():
            fix = "Fill in the turn or remove the row."
            raise self.fault(role, f"turn {number}, an assistant's, to say something", "an empty string", fix)
        return Message(known, content)


def _plain_content(value: Any) -> str | None:
    """Return the text of a turn: a string, or a list of text parts as OpenAI writes them; None for anything else."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in value]
        return None if any(not isinstance(text, str) for text in texts) else "".join(map(str, texts))
    return None


_IN_WORDS: dict[type, str] = {
    bool: "a truth value", int: "a number", float: "a number", str: "the string", list: "a list", dict: "an object",
}  # fmt: skip


def shown(value: Any) -> str:
    """Return the type of a value in plain words with a glimpse of it, e.g. "a number (0.5)"."""
    if value is None:
        return "nothing (null)"
    glimpse = repr(value)
    glimpse = glimpse if len(glimpse) <= 40 else glimpse[:37] + "..."
    return f"{_IN_WORDS.get(type(value), type(value).__name__)} ({glimpse})"


def quoted(names: Iterable[Any]) -> str:
    """Return names in quotes, e.g. "'a', 'b'", or "none"."""
    return ", ".join(f"'{name}'" for name in names) or "none"
