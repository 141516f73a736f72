"""The project's own Python files, for the guards."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


def sources(*folders: str) -> dict[str, str]:
    """Return the text of every Python file below some folders, by its path from the project's root.

    Args:
        folders: names of folders at the project's root.
    """
    found = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in found}


def scoped(tree: ast.AST, scope: str = "") -> Iterator[tuple[ast.AST, str]]:
    """Yield every node below `tree` with the dotted name of the classes and functions around it.

    Args:
        tree: where to begin.
        scope: dotted name of `tree` itself.
    """
    for node in ast.iter_child_nodes(tree):
        yield node, scope
        inner = node.name if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) else ""
        yield from scoped(node, f"{scope}.{inner}".strip(".") if inner else scope)
