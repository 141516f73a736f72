"""Reading one turn of a conversation: who speaks, what is said, and what stands beside it (calls of tools, reasoning).

Turns are OpenAI's (`role`, `content`, `tool_calls`, `tool_call_id`) or ShareGPT's (`from`, `value`). Calls may be in
OpenAI's older form (`function_call`) and ShareGPT's (a turn from "function_call" whose value is their JSON), their
arguments an object or its JSON. A turn with `weight: 0` or `train: false` is read by the model, but not trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from hone.data.sample import Message
from hone.errors import DataError, nearest

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
REASONING = ("reasoning_content", "reasoning", "thinking")  # as templates call it: DeepSeek and Qwen, vLLM, gpt-oss
_NAMED = ("tool_call_id", "name")  # of a tool's turn
Fault = Callable[[str, str, str], DataError]  # of (expected, found, fix)


def read_turn(turn: Any, number: int, fault: Fault) -> Message:
    """Return a turn as a message.

    Args:
        turn: what stands in the list of turns.
        number: its place there, from 1.
        fault: makes the error about the cell, from what was expected, what was found and what to do.

    Raises:
        DataError: it cannot be used.
    """
    if not isinstance(turn, dict):
        raise fault(f"turn {number} to be an object", shown(turn), 'Write {"role": ..., "content": ...}.')
    speaker, said = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    calls = _calls(turn, speaker, said, number, fault)
    for key in (speaker, said):
        if key not in turn and not (key == said and calls):
            fix = nearest(key, turn) or "Turns are {role, content} or {from, value}"
            raise fault(f"turn {number} to have '{key}'", f"only {quoted(turn)}", f"{fix}.")
    known = ROLES.get(turn[speaker]) if isinstance(turn[speaker], str) else None
    if known is None:
        hint = nearest(turn[speaker], ROLES) or f"known roles: {', '.join(ROLES)}"
        raise fault(f"a known role in turn {number}", shown(turn[speaker]), f"{hint.capitalize()}.")
    if calls and known != "assistant":
        raise fault(f"turn {number} to be an assistant's, since it calls tools", shown(turn[speaker]), "Set its role.")
    content = "" if calls and (turn[speaker] == "function_call" or not turn.get(said)) else _plain(turn[said])
    if content is None:
        fix = "Only text can be trained on: write the turn's text as one string."
        raise fault(f"turn {number} to hold a string in '{said}'", shown(turn[said]), fix)
    if known == "assistant" and not content.strip() and not calls:
        fix = "Fill in the turn or remove the row."
        raise fault(f"turn {number}, an assistant's, to say something", "an empty string", fix)
    return Message(known, content, _beside(turn, known, calls, number, fault), _weight(turn, number, fault))


def read_tools(value: Any, fault: Fault) -> str:
    """Return the tools that a conversation may call as JSON, "" for none; one by its bare schema gets OpenAI's frame.

    Args:
        value: a list of tools, or its JSON.
        fault: makes the error about the cell.

    Raises:
        DataError: it is no list of tools with names.
    """
    listed = _parsed(value)
    if listed in (None, "", [], {}):
        return ""
    fix = 'Write [{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}].'
    if not isinstance(listed, list):
        raise fault("a list of tools", shown(value), fix)
    framed = [{"type": "function", "function": one} if _named(one) else one for one in listed]
    if not all(isinstance(one, dict) and _named(one.get("function")) for one in framed):
        raise fault("tools with a name", shown(value), fix)
    return json.dumps(framed, ensure_ascii=False)


def _calls(turn: Mapping[str, Any], speaker: str, said: str, number: int, fault: Fault) -> list[dict[str, Any]]:
    """Return the calls of tools in a turn, each as {"type": "function", "function": {"name", "arguments"}}."""
    given, key = turn.get("tool_calls"), "tool_calls"
    if given in (None, "", [], {}) and turn.get("function_call") not in (None, "", [], {}):
        given, key = [turn["function_call"]], "function_call"
    elif turn.get(speaker) == "function_call":
        given, key = _parsed(turn.get(said)), said
        given = given if isinstance(given, list) else [given]
    if given in (None, "", [], {}):
        return []
    fix = 'Write [{"type": "function", "function": {"name": ..., "arguments": {...}}}].'
    made = []
    for one in given if isinstance(given, list) else [given]:
        inner = one.get("function", one) if isinstance(one, dict) else None
        inner = inner if isinstance(inner, dict) else {}
        arguments = _parsed(inner.get("arguments", {}))
        if not _named(inner) or not isinstance(arguments, dict):
            raise fault(
                f"turn {number} to call tools by name, with an object of arguments, in '{key}'", shown(one), fix
            )
        others = {name: value for name, value in one.items() if name == "id" and value is not None}
        made.append({**others, "type": "function", "function": {"name": inner["name"], "arguments": arguments}})
    return made


def _beside(turn: Mapping[str, Any], role: str, calls: list[Any], number: int, fault: Fault) -> str:
    """Return what a template may write of a turn besides its content, as JSON; "" for nothing."""
    found: dict[str, Any] = {"tool_calls": calls} if calls else {}
    for key in REASONING:
        value = turn.get(key)
        if value in (None, ""):
            continue
        if not isinstance(value, str) or role != "assistant":
            raise fault(f"'{key}' to be an assistant's text in turn {number}", shown(value), "Remove it.")
        found[key] = value
    if role == "tool":
        found.update({key: turn[key] for key in _NAMED if isinstance(turn.get(key), str)})
    return json.dumps(found, ensure_ascii=False) if found else ""


def _weight(turn: Mapping[str, Any], number: int, fault: Fault) -> float:
    """Return what an assistant's turn weighs in training."""
    value = turn.get("weight", turn.get("train"))
    if value is None:
        return 1.0
    if not isinstance(value, (bool, int, float)) or not 0 <= value < float("inf"):
        raise fault(f"the weight of turn {number} to be a number that is not negative", shown(value), "Remove it.")
    return float(value)


def _named(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("name"), str) and bool(value["name"])


def _parsed(value: Any) -> Any:
    """Return what a string of JSON holds, anything else as it is."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _plain(value: Any) -> str | None:
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


def quoted(names: Any) -> str:
    """Return names in quotes, e.g. "'a', 'b'", or "none"."""
    return ", ".join(f"'{name}'" for name in names) or "none"
