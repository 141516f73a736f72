"""Less than 2% of the code lines stand in a window of 8 lines that another file has too."""

from __future__ import annotations

import ast
import io
import tokenize
from collections import defaultdict

from guards.sources import sources

WINDOW, SHARE = 8, 0.02
Line = tuple[int, str]


def code_lines(text: str) -> list[Line]:
    """Return (line number, tokens one blank apart) of every line of code; imports, docstrings and comments are none."""
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        docstring = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if docstring or isinstance(node, (ast.Import, ast.ImportFrom)):
            skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines: dict[int, list[str]] = defaultdict(list)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type != tokenize.COMMENT and token.string.strip() and token.start[0] not in skipped:
            lines[token.start[0]].append(" ".join(token.string.split()))
    return [(number, " ".join(tokens)) for number, tokens in sorted(lines.items())]


def duplicates(files: dict[str, str]) -> tuple[float, list[str]]:
    """Return the share of duplicate lines and where they stand, in runs.

    Args:
        files: text by name.
    """
    lines = {name: code_lines(text) for name, text in files.items()}
    holders: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name, own in lines.items():
        for at in range(len(own) - WINDOW + 1):
            holders[tuple(text for _, text in own[at : at + WINDOW])].add(name)
    doubled: dict[str, dict[int, str]] = defaultdict(dict)
    for name, own in lines.items():
        for at in range(len(own) - WINDOW + 1):
            others = holders[tuple(text for _, text in own[at : at + WINDOW])] - {name}
            if others:
                doubled[name].update(dict.fromkeys(range(at, at + WINDOW), min(others)))
    total = sum(len(own) for own in lines.values())
    report = [
        f"{name}:{lines[name][at][0]} as in {other}"
        for name, found in sorted(doubled.items())
        for at, other in sorted(found.items())
        if at - 1 not in found
    ]
    return sum(len(found) for found in doubled.values()) / max(1, total), report


def test_little_is_written_twice() -> None:
    share, report = duplicates(sources("src", "tests"))
    assert share < SHARE, "\n".join([f"{share:.1%} of the code lines stand in another file too:", *report])


BODY = "".join(f"value_{i} = compute({i}, scale=2)\n" for i in range(WINDOW))


def test_a_copied_window_is_found_whatever_its_layout_and_comments() -> None:
    layout = BODY.replace("\n", "  # why\n\n").replace(", ", ",  ")
    other = "import os\n\nother = 1\n" + "def f():\n" + "".join(f"    {line}\n" for line in layout.splitlines() if line)
    share, report = duplicates({"a.py": BODY, "b.py": other})
    assert report == ["a.py:1 as in b.py", "b.py:5 as in a.py"]
    assert share == 2 * WINDOW / (2 * WINDOW + 2)


def test_shorter_copies_repeats_within_a_file_imports_and_docstrings_do_not_count() -> None:
    short = "\n".join(BODY.splitlines()[:-1])
    imports, doc = "import os\n" * WINDOW, '"""\n' + BODY + '"""\n'
    assert duplicates({"a.py": short, "b.py": short}) == (0.0, [])
    assert duplicates({"a.py": BODY + BODY, "b.py": "x = 1\n"}) == (0.0, [])
    assert duplicates({"a.py": imports + "x = 1\n", "b.py": imports + "y = 1\n"}) == (0.0, [])
    assert duplicates({"a.py": doc + "x = 1\n", "b.py": doc + "y = 1\n"}) == (0.0, [])
