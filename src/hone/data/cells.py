"""Reading the cells of one row: texts, numbers and conversations, with errors that name the cell and the fix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hone.data.sample import Message
from hone.data.turns import read_turn, shown
from hone.errors import DataError


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
        return tuple(
            read_turn(turn, number, lambda expected, found, fix: self.fault(role, expected, found, fix))
            for number, turn in enumerate(value, start=1)
        )
