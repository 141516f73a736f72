"""The parts' records can be read without running them, and say all that the catalogue shows."""

from __future__ import annotations

import ast
import dataclasses
import re

import pytest

from guards.sources import sources
from hone import parts

IDENTIFIER = re.compile(r"arXiv:\d{4}\.\d{4,5}|https://\S+|doi:10\.\S+")


def incomplete(record: parts.Record) -> list[str]:
    """Return what the record of a part lacks."""
    found = [f"option '{o.name}' is not described" for o in record.options if not o.doc]
    found += [f"'{paper}' identifies no paper" for _, paper in record.papers if not IDENTIFIER.fullmatch(paper)]
    found += [
        f"the title '{title}' is not trimmed" for title, _ in record.papers if not title or title != title.strip()
    ]
    if record.papers and not record.claim:
        found.append("it has a paper and no claim")
    if not re.fullmatch(r"[a-z][a-z0-9_.-]*:?", record.name):
        found.append("its name is not lower-case")
    return [f"{record.path}:{record.line} {record.kind} '{record.name}': {what}" for what in found]


def unregistered(file: str, text: str) -> list[str]:
    """Return the uses of @part that the catalogue cannot read: not on a class at the top, or not of literals."""
    tree = ast.parse(text)
    uses = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in ("part", "parts.part")]
    read = [d for n in tree.body if isinstance(n, ast.ClassDef) for d in n.decorator_list if d in uses]
    found = [
        f"{file}:{use.lineno}: @part on something else than a class of the module" for use in uses if use not in read
    ]
    for use in read:
        if not all(is_literal(v) for v in (*use.args, *(k.value for k in use.keywords))) or len(use.args) != 2:
            found.append(f"{file}:{use.lineno}: @part takes literals: kind, name, papers=, claim=, deviations=")
    return found


def is_literal(value: ast.expr) -> bool:
    """Tell whether an expression can be read without running it."""
    try:
        ast.literal_eval(value)
    except ValueError:
        return False
    return True


def test_records_are_literal_and_complete() -> None:
    texts = {file: text for file, text in sources("src").items() if "@part(" in text}
    unread = [line for file, text in texts.items() for line in unregistered(file, text)]
    assert not unread, "\n".join(unread)
    assert sum(text.count("\n@part(") for text in texts.values()) == len(parts.catalogue())
    found = [line for record in parts.catalogue() for line in incomplete(record)]
    assert not found, "\n".join(found)


def test_an_incomplete_record_is_found() -> None:
    option = parts.Option("rank", "int", "8", "")
    good = parts.Record(
        "adapter", "lora", (("LoRA", "arXiv:2106.09685"),), "Fewer weights.", "", "One line.", (), "", "", "", 1
    )
    assert incomplete(good) == []
    for change in ({"options": (option,)}, {"claim": ""}, {"papers": (("LoRA", "2106.09685"),)}, {"name": "LoRA"},
                   {"papers": ((" LoRA", "arXiv:2106.09685"),)}):  # fmt: skip
        assert len(incomplete(dataclasses.replace(good, **change))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "@part('metric', NAME, papers='original')\nclass A: pass",
        "@part('metric', 'a', papers=[(title(), 'x')])\nclass A: pass",
        "@part('metric', name='a', papers='original')\nclass A: pass",
        "def f():\n    @part('metric', 'a', papers='original')\n    class A: pass",
        "B = part('metric', 'a', papers='original')(A)",
    ],
)
def test_a_record_that_cannot_be_read_is_found(text: str) -> None:
    assert unregistered("x.py", "@part('metric', 'b', papers='original')\nclass C: pass") == []
    assert len(unregistered("x.py", text)) == 1
