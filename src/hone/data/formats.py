"""The known formats of rows, told from their column names, and the conversion of a row to a sample.

    format      columns (aliases) [optional]                         sample
    pairs       chosen, rejected [prompt (question, instruction)]    pair, of texts or turns; a shared start is prompt
    list        answers (responses), scores [prompt (question...)]   list, of texts: better ones against worse
    tagged      words (tokens), tags (ner_tags, labels)              tagged, a class for each word
    messages    messages (conversations, conversation) [system]      messages, of role/content or from/value turns
    alpaca      instruction, output (response) [input (context)]     completion, with the template of Stanford Alpaca
    completion  prompt, completion (response); or input, output      completion, joined exactly as they are
    qa          question, answer                                     completion, "Question: Q", then "Answer: A"
    text        text                                                 text
    prompt      prompt                                               prompt, for generation and on-policy learning

The first format whose columns are all there is taken and all rows are held to it. A `system` column goes before the
prompt. Turns may call tools, which a column `tools` describes, may reason, and may be left untrained (see `turns.py`).
Where the prompt of pairs and lists is an `instruction`, it is written as alpaca's is, with its `input`. Other columns
go to `Sample.extra`, except numbers in columns named `weight`, `margin`, `label` or `reward`, which go to
`Sample.fields`. A `label` is the class of a text too, whether it is a number or a name.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hone.data.cells import Cells
from hone.data.sample import Message, Sample
from hone.data.turns import quoted, read_tools, shown
from hone.errors import DataError, nearest

FIELDS = ("weight", "margin", "label", "reward")
TOOLS = "tools"  # the column of what a conversation may call
# True in a row of running text that is not the last of its document: no end-of-text token then. No column is called so.
CONTINUES = "hone:continues"
ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n{}### Response:\n"
)
_TRUTHS = {"true": 1.0, "false": 0.0}
HH_ANSWER = "\n\nAssistant:"  # in sets such as Anthropic's hh-rlhf a pair of texts shares everything up to here


def _text(cells: Cells) -> Sample:
    return Sample("text", answers=(cells.text("text", empty=False),))


def _prompt(cells: Cells) -> Sample:
    if not isinstance(cells.get("prompt"), list):
        text = cells.text("prompt")
        chat = (*_system(cells), Message("user", text))
        return Sample("prompt", prompt=chat if cells.chat else _plain_system(cells) + text)
    turns = _after_system(cells, cells.turns("prompt"))
    if turns[-1].role == "assistant":
        fix = "Remove that turn."
        raise cells.fault("prompt", "a prompt to end before the answer", "an assistant turn at its end", fix)
    return Sample("prompt", prompt=turns)


def _messages(cells: Cells) -> Sample:
    turns = _after_system(cells, cells.turns("messages"))
    if turns[0].role == "assistant":
        fix = "Remove that turn or put the user's turn before it."
        raise cells.fault("messages", "a conversation to begin with a user", "an assistant turn at its start", fix)
    if all(turn.role != "assistant" for turn in turns):
        recipe = f"format: prompt, columns: {{prompt: {cells.columns['messages']}}}"
        fix = f"Nothing could be trained; for prompts alone set {recipe}."
        roles = quoted(sorted({turn.role for turn in turns}))
        raise cells.fault("messages", "at least one assistant turn", f"only {roles}", fix)
    if not any(turn.weight for turn in turns if turn.role == "assistant"):
        fix = "Nothing would be trained; remove the row."
        raise cells.fault("messages", "an assistant turn that is trained", "only weights of 0", fix)
    return Sample("messages", prompt=turns)


def _system(cells: Cells) -> tuple[Message, ...]:
    """Return the system turn that a `system` column holds, if any."""
    text = cells.text("system") if cells.get("system") is not None else ""
    return (Message("system", text),) if text.strip() else ()


def _plain_system(cells: Cells) -> str:
    return "".join(f"{turn.content}\n\n" for turn in _system(cells))


def _after_system(cells: Cells, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return turns behind what a `system` column holds, unless they begin with a system turn of their own."""
    return turns if turns and turns[0].role == "system" else (*_system(cells), *turns)


def _asked(cells: Cells) -> str | tuple[Message, ...]:
    """Return the prompt that a row holds: a text or, with `chat` or where it is given so, turns; "" without one."""
    if isinstance(cells.get("prompt"), list):
        return _after_system(cells, cells.turns("prompt"))
    if cells.get("prompt") is None:
        return _plain_system(cells)
    plain, user = _wanted(cells)
    return (*_system(cells), Message("user", user)) if cells.chat else _plain_system(cells) + plain


def _wanted(cells: Cells) -> tuple[str, str]:
    """Return the text of a prompt column as plain text and as a user would write it; only an instruction differs."""
    return _task(cells, "prompt") if cells.columns["prompt"] == INSTRUCTION else (cells.text("prompt"),) * 2


def _task(cells: Cells, role: str) -> tuple[str, str]:
    """Return an instruction with its input, in the template of Stanford Alpaca and as a user would write it."""
    task, given = cells.text(role, empty=False), cells.text("input") if cells.get("input") is not None else ""
    if not given.strip():
        return ALPACA.format("", task, ""), task
    beside = ", paired with an input that provides further context"
    return ALPACA.format(beside, task, f"### Input:\n{given}\n\n"), f"{task}\n\n{given}"


def _exchange(cells: Cells, user: str, answer: str, plain_prompt: str, plain_answer: str) -> Sample:
    """Return a completion of plain texts or, with `chat`, a conversation of two turns; a system text comes first."""
    if cells.chat:
        return Sample("messages", prompt=(*_system(cells), Message("user", user), Message("assistant", answer)))
    return Sample("completion", prompt=_plain_system(cells) + plain_prompt, answers=(plain_answer,))


def _alpaca(cells: Cells) -> Sample:
    plain, user = _task(cells, "instruction")
    answer = cells.text("output", empty=False)
    if cells.row.get("history"):
        fix = "They would be lost; write such rows as conversations, in a column 'messages'."
        raise DataError(f"{cells.where}: field 'history': expected no earlier turns, found some. {fix}")
    return _exchange(cells, user, answer, plain, answer)


def _qa(cells: Cells) -> Sample:
    question, answer = cells.text("question", empty=False), cells.text("answer", empty=False)
    return _exchange(cells, question, answer, f"Question: {question}\nAnswer:", f" {answer}")


def _completion(cells: Cells) -> Sample:
    if isinstance(cells.get("prompt"), list):
        turns = _after_system(cells, cells.turns("prompt"))
        return Sample("completion", prompt=turns, answers=(_answer_turns(cells, "completion"),))
    prompt, answer_text = cells.text("prompt"), cells.text("completion", empty=False)
    return _exchange(cells, prompt, answer_text, prompt, answer_text)


def _answer_turns(cells: Cells, role: str) -> tuple[Message, ...]:
    """Return an answer to a conversation: turns, or a text as one assistant turn."""
    if isinstance(cells.get(role), str):
        return (Message("assistant", cells.text(role, empty=False)),)
    turns = cells.turns(role)
    if all(turn.role != "assistant" for turn in turns):
        raise cells.fault(role, "at least one assistant turn", "none", "Nothing could be trained; remove the row.")
    return turns


def _list(cells: Cells) -> Sample:
    answers, scores = cells.get("answers"), cells.get("scores")
    texts = isinstance(answers, list) and all(isinstance(one, str) and one.strip() for one in answers)
    if not texts or len(set(answers)) < 2:
        raise cells.fault("answers", "a list of at least two different texts", shown(answers), "Remove the row.")
    numbers = isinstance(scores, list) and all(type(one) in (int, float) for one in scores)
    if not numbers or len(scores) != len(answers):
        raise cells.fault("scores", f"a list of {len(answers)} numbers", shown(scores), "Remove the row.")
    if len(set(scores)) < 2:
        fix = "Remove the row: it says of no answer that it is better."
        raise cells.fault("scores", "scores that differ", shown(scores), fix)
    return Sample("list", prompt=_asked(cells), answers=tuple(answers), scores=tuple(map(float, scores)))


def _tagged(cells: Cells) -> Sample:
    words, tags = cells.get("words"), cells.get("tags")
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        raise cells.fault("words", "a list of words", shown(words), "Fill in or remove the row.")
    if not isinstance(tags, list) or len(tags) != len(words) or any(type(tag) not in (int, str) for tag in tags):
        raise cells.fault("tags", f"a list of {len(words)} names or numbers", shown(tags), "Give each word a tag.")
    return Sample("tagged", answers=tuple(words), labels=tuple(map(str, tags)))


def _pair(cells: Cells) -> Sample:
    if cells.get("chosen") == cells.get("rejected") and cells.get("chosen") is not None:
        raise cells.fault("rejected", "an answer other than the chosen one", "the same answer twice", "Remove the row.")
    given, values = cells.get("prompt"), [cells.get("chosen"), cells.get("rejected")]
    if isinstance(given, list) or cells.chat or any(isinstance(value, list) for value in values):
        return _pair_of_turns(cells)
    chosen, rejected = cells.text("chosen", empty=False), cells.text("rejected", empty=False)
    if given is not None:
        return Sample("pair", prompt=_asked(cells), answers=(chosen, rejected))
    before, mark, _ = chosen[: _shared(chosen, rejected)].rpartition(HH_ANSWER)
    cut = len(before) + len(mark)
    return Sample("pair", prompt=_plain_system(cells) + chosen[:cut], answers=(chosen[cut:], rejected[cut:]))


def _pair_of_turns(cells: Cells) -> Sample:
    prompt = _pair_prompt(cells)
    chosen, rejected = _answer_turns(cells, "chosen"), _answer_turns(cells, "rejected")
    same = _shared(chosen, rejected)
    common, answers = chosen[:same], (chosen[same:], rejected[same:])
    for role, rest in zip(("chosen", "rejected"), answers, strict=True):
        if all(turn.role != "assistant" for turn in rest):
            fix = "Remove the row."
            raise cells.fault(role, "an assistant turn that the other answer lacks", "none after the shared turns", fix)
    # Many sets repeat the prompt inside both answers, often after a system turn that the prompt column lacks.
    repeated = {turn.content for turn in prompt} <= {turn.content for turn in common}
    prompt = common if repeated else prompt if prompt[-same:] == common else (*prompt, *common)
    prompt = _after_system(cells, prompt) if prompt else prompt
    if (prompt or answers[0])[0].role == "assistant" or (not prompt and answers[1][0].role == "assistant"):
        raise cells.fault("chosen", "a prompt before the answers", "an assistant turn first", "Add a 'prompt' column.")
    return Sample("pair", prompt=prompt, answers=answers)


def _pair_prompt(cells: Cells) -> tuple[Message, ...]:
    """Return the turns that a pair's prompt column holds, a text as a user's."""
    given = cells.get("prompt")
    if given is None or isinstance(given, list):
        return () if given is None else cells.turns("prompt")
    return (Message("user", _wanted(cells)[1]),)


def _shared(first: Any, second: Any) -> int:
    """Return how many leading items two sequences share."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(first), len(second)))


@dataclass(frozen=True)
class _Shape:
    """A known format.

    Args:
        name: what `format:` calls it.
        needs: role to the column names it is known by.
        may: the same for roles that rows need not have.
        build: makes the sample, without its extra columns.
    """

    name: str
    needs: dict[str, tuple[str, ...]]
    build: Callable[[Cells], Sample]
    may: dict[str, tuple[str, ...]] = field(default_factory=dict)


INSTRUCTION = "instruction"  # the prompt column of rows in Alpaca's form, beside which an input may stand
_SYSTEM: dict[str, tuple[str, ...]] = {"system": ("system",)}
_PROMPT: dict[str, tuple[str, ...]] = {
    "prompt": ("prompt", "question", INSTRUCTION), "input": ("input", "context"), **_SYSTEM,
}  # fmt: skip
SHAPES = (
    _Shape(
        "pairs",
        {"chosen": ("chosen",), "rejected": ("rejected",)},
        _pair,
        _PROMPT,
    ),
    _Shape(
        "list",
        {"answers": ("answers", "responses"), "scores": ("scores",)},
        _list,
        _PROMPT,
    ),
    _Shape("tagged", {"words": ("words", "tokens"), "tags": ("tags", "ner_tags", "labels")}, _tagged),
    _Shape("messages", {"messages": ("messages", "conversations", "conversation")}, _messages, _SYSTEM),
    _Shape(
        "alpaca",
        {"instruction": (INSTRUCTION,), "output": ("output", "response")},
        _alpaca,
        {"input": ("input", "context"), **_SYSTEM},
    ),
    _Shape("completion", {"prompt": ("prompt",), "completion": ("completion", "response")}, _completion, _SYSTEM),
    _Shape("completion", {"prompt": ("input",), "completion": ("output",)}, _completion, _SYSTEM),
    _Shape("qa", {"question": ("question",), "answer": ("answer",)}, _qa, _SYSTEM),
    _Shape("text", {"text": ("text",)}, _text),
    _Shape("prompt", {"prompt": ("prompt",)}, _prompt, _SYSTEM),
)
COLUMN_KEYS = tuple(dict.fromkeys([role for shape in SHAPES for role in (*shape.needs, *shape.may)] + list(FIELDS)))


@dataclass(frozen=True)
class Format:
    """The format that a source's rows are held to.

    Args:
        shape: the known format.
        columns: role to column, as `columns:` gives it or the first row tells it.
        chat: plain prompts and answers become turns of a conversation.
        others: columns of the first row that play no role.
    """

    shape: _Shape
    columns: dict[str, str]
    chat: bool = False
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the format, e.g. "alpaca"."""
        return self.shape.name

    def describe(self) -> str:
        """Return what was understood, for the log, e.g. "format completion (prompt, completion = 'reply')"."""
        roles = [role if role == column else f"{role} = '{column}'" for role, column in self.columns.items()]
        rest = f"; other columns: {', '.join(self.others)}" if self.others else ""
        return f"format {self.name} ({', '.join(roles)}{rest})" + (" as chat" if self.chat else "")

    def convert(self, row: Mapping[str, Any], where: str) -> Sample:
        """Return the sample that a row holds.

        Args:
            row: column to value.
            where: "file:line" of the row.

        Raises:
            DataError: the row lacks a column, or a cell cannot be used.
        """
        for role in self.shape.needs:
            if self.columns[role] not in row:
                column = self.columns[role]
                hint = nearest(column, row) or "all rows of a source need the columns of its first row"
                raise DataError(f"{where}: missing column '{column}' (found {quoted(row)}); {hint}")
        columns = dict(self.columns)
        for role, names in self.shape.may.items():  # rows may have an optional column that the first one lacked
            if role not in columns and _fits(role, columns) and (found := _first(names, row, columns.values())):
                columns[role] = found
        cells = Cells(row, columns, where, self.chat)
        sample, numbers = _encodable(self.shape.build(cells), where), _numbers(cells)
        used = {column for role, column in columns.items() if role not in FIELDS} | {columns.get(n, n) for n in numbers}
        tools = _tools(sample, row, where)
        used |= {TOOLS} if tools else set()
        extra = {column: value for column, value in row.items() if column not in used}
        labels = sample.labels or _label(cells)
        return replace(sample, fields=numbers, labels=labels, extra=extra, where=where, tools=tools)


def _tools(sample: Sample, row: Mapping[str, Any], where: str) -> str:
    """Return the tools that a row offers to its conversation; plain prompts have none."""
    if isinstance(sample.prompt, str):
        return ""
    return read_tools(
        row.get(TOOLS),
        lambda expected, found, fix: DataError(f"{where}: field '{TOOLS}': expected {expected}, found {found}. {fix}"),
    )


def _encodable(sample: Sample, where: str) -> Sample:
    """Return a sample whose texts are whole characters: JSON can hold half of one, which no tokenizer takes."""
    parts = [[part] if isinstance(part, str) else [turn.content for turn in part]
             for part in (sample.prompt, *sample.answers)]  # fmt: skip
    for text in itertools.chain.from_iterable(parts):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            fix = "Write the whole character or remove the row."
            raise DataError(
                f"{where}: expected whole characters, found the half of one ({half}) in a text. {fix}"
            ) from error
    return sample


def _numbers(cells: Cells) -> dict[str, float]:
    """Return the numbers for objectives that a row carries, e.g. its weight."""
    found = {}
    for name in FIELDS:
        value = cells.row.get(cells.columns.get(name, name))
        try:
            if name == "label" and isinstance(value, str) and value.strip().lower() in _TRUTHS:
                found[name] = _TRUTHS[value.strip().lower()]  # as tables write it
            elif isinstance(value, (int, float, str)):
                found[name] = float(value)
        except ValueError:
            value = (
                value if name == "label" else None
            )  # a text: a class, or some other column of that name, unless `columns` says that it is this one
        if name in cells.columns and name not in found and not (name == "label" and isinstance(value, str)):
            raise cells.fault(name, "a number", shown(cells.get(name)), "Fill in or remove the row.")
    return found


def _label(cells: Cells) -> tuple[str, ...]:
    """Return the class that a row names, by number or by name; none where it names none."""
    value = cells.row.get(cells.columns.get("label", "label"))
    return (str(value),) if isinstance(value, (int, str)) and str(value).strip() else ()


def _fits(role: str, found: Mapping[str, str]) -> bool:
    """Return whether a role may be told from a column's name: an input stands beside an instruction alone."""
    return role != "input" or found.get("prompt", INSTRUCTION) == INSTRUCTION


def _first(names: tuple[str, ...], row: Mapping[str, Any], taken: Any) -> str | None:
    return next((name for name in names if name in row and name not in taken), None)


def sniff(
    row: Mapping[str, Any],
    where: str,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
) -> Format:
    """Tell the format of a source from its first row.

    Args:
        row: column to value.
        where: "file:line" of the row, for messages.
        format: name of the format, or "auto".
        columns: role to column where the names say too little; all its roles must belong to the format.
        chat: plain prompts and answers become turns of a conversation.

    Raises:
        DataError: the columns fit no known format, or `columns` names one that the row lacks.
    """
    given = dict(columns or {})
    for role, column in given.items():
        if column not in row:
            hint = nearest(column, row) or "write role: column"
            raise DataError(f"{where}: columns: {role}: there is no column '{column}' (found {quoted(row)}); {hint}")
    for shape in SHAPES:
        found = _match(shape, row, given) if format in ("auto", shape.name) else None
        if found is not None:
            used = {*found.values(), *FIELDS, CONTINUES, *([TOOLS] if shape.name == "messages" else ())}
            return Format(shape, found, chat, tuple(str(name) for name in row if name not in used))
    raise DataError(_unknown(row, where, format, given))


def _match(shape: _Shape, row: Mapping[str, Any], given: dict[str, str]) -> dict[str, str] | None:
    """Return role to column when a row has all columns of a format and the format has all given roles."""
    roles = {**shape.needs, **shape.may}
    if any(role not in roles and role not in FIELDS for role in given):
        return None
    found: dict[str, str] = {}
    for role, names in roles.items():
        column = given.get(role) or (_first(names, row, given.values()) if _fits(role, found) else None)
        if column is not None:
            found[role] = column
        elif role in shape.needs:
            return None
    return found | {role: column for role, column in given.items() if role in FIELDS}


def _unknown(row: Mapping[str, Any], where: str, format: str, given: dict[str, str]) -> str:
    """Return the message about columns that fit no known format, or not the one asked for."""
    wanted = [shape for shape in SHAPES if format in ("auto", shape.name)]
    what = "the format cannot be told from" if format == "auto" else f"format '{format}' does not fit"
    known = "\n".join(dict.fromkeys(f"    {shape.name}: {', '.join(shape.needs)}" for shape in wanted))
    shape = wanted[0] if format != "auto" else next(s for s in SHAPES if s.name == "completion")
    rest = [str(name) for name in row if name not in given.values()]
    guess = {role: given.get(role) or (rest.pop(0) if rest else "COLUMN") for role in shape.needs}
    mapping = ", ".join(f"{role}: {column}" for role, column in guess.items())
    labelled = dict(zip(("text", "label"), guess.values(), strict=False))
    classes = ", ".join(f"{role}: {column}" for role, column in labelled.items())
    also = f"\n    columns: {{{classes}}}  (texts and their classes)" if format == "auto" and len(labelled) == 2 else ""
    return (
        f"{where}: {what} the columns {quoted(row)}\n  formats and the columns they need:\n{known}\n"
        f"  Rename the columns, or say in the recipe which one is what, for instance:\n    columns: {{{mapping}}}{also}"
    )
