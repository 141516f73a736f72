"""Files of at most 500 lines, functions of at most 60."""

from __future__ import annotations

import ast

from guards.sources import scoped, sources

FILE, FUNCTION = 500, 60


def too_long(file: str, text: str) -> list[str]:
    """Return what of a file is longer than the limits."""
    lines = len(text.splitlines())
    found = [f"{file}: {lines} lines, at most {FILE}"] if lines > FILE else []
    for node, _ in scoped(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            found += [f"{file}:{node.lineno} {node.name}: {size} lines, at most {FUNCTION}"] if size > FUNCTION else []
    return found


def test_no_file_and_no_function_is_too_long() -> None:
    found = [line for file, text in sources("src", "tests", "bench").items() for line in too_long(file, text)]
    assert not found, "\n".join(found)


def test_the_limits_are_the_last_sizes_allowed() -> None:
    assert too_long("x.py", "x = 1\n" * FILE) == []
    assert too_long("x.py", "x = 1\n" * (FILE + 1)) == ["x.py: 501 lines, at most 500"]
    head = "class A:\n    def f(self):\n"
    assert too_long("x.py", head + "        x = 1\n" * (FUNCTION - 1)) == []
    assert too_long("x.py", head + "        x = 1\n" * FUNCTION) == ["x.py:2 f: 61 lines, at most 60"]
