"""Public code says what it takes: docstrings exist, `Args:` match the signatures, the parts' records are complete."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field

import pytest
from guards.sources import sources

from hone import parts

MANY = 3  # a function of this many arguments or more documents them
IDENTIFIER = re.compile(r"arXiv:\d{4}\.\d{4,5}|https://\S+|doi:10\.\S+")
Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Class:
    """What the checks know of a class: its bases by name, its fields, its methods."""

    bases: list[str]
    fields: list[str] = field(default_factory=list)
    methods: set[str] = field(default_factory=set)


def named(node: ast.expr) -> str:
    """Return the last name of a call, an attribute, a subscript or a name."""
    match node:
        case ast.Call(func=inner) | ast.Subscript(value=inner):
            return named(inner)
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
    return ""


def is_state(value: ast.expr | None) -> bool:
    """A field(init=False) is no argument."""
    return isinstance(value, ast.Call) and any(k.arg == "init" and ast.unparse(k.value) == "False" for k in value.keywords)


def own_fields(node: ast.ClassDef) -> list[str]:
    """Return the arguments that a dataclass takes by its own fields; none for another class."""
    if "dataclass" not in [named(decorator) for decorator in node.decorator_list]:
        return []
    found = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
    return [n.target.id for n in found if not (named(n.annotation) == "ClassVar" or is_state(n.value))]  # type: ignore[union-attr]


def classes(trees: dict[str, ast.Module]) -> dict[str, Class]:
    """Return every class of some files by name."""
    return {
        node.name: Class(
            [named(base) for base in node.bases], own_fields(node), {n.name for n in node.body if isinstance(n, Function)}
        )
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


def ancestors(name: str, known: dict[str, Class]) -> list[Class]:
    """Return what is known of the bases of a class, and of theirs."""
    bases = known[name].bases if name in known else []
    return [c for base in bases if base in known for c in (known[base], *ancestors(base, known))]


def documented(doc: str) -> list[str] | None:
    """Return the names in the `Args:` of a docstring; None when there is no such section."""
    lines = doc.splitlines()
    if "Args:" not in lines:
        return None
    names = []
    for line in lines[lines.index("Args:") + 1 :]:
        if line.strip() and not line.startswith(" "):
            break
        if found := re.match(r" {4}\*{0,2}(\w+)(?: \([^)]*\))?:", line):
            names.append(found.group(1))
    return names


def compare(place: str, doc: str, required: list[str], allowed: list[str], many: int) -> list[str]:
    """Return what is wrong between an `Args:` section and the arguments."""
    names = documented(doc)
    if names is None:
        return [f"{place}: no Args for {', '.join(required)}"] if len(required) >= many else []
    missing = [name for name in required if name not in names]
    extra = [name for name in names if name not in allowed]
    twice = sorted({name for name in names if names.count(name) > 1})
    return [f"{place}: Args {what}: {', '.join(some)}"
            for what, some in (("lack", missing), ("name what is no argument", extra), ("repeat", twice)) if some]  # fmt: skip


def arguments(node: Function) -> list[str]:
    """Return the names of a function's arguments without self and cls."""
    given = node.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *(a for a in (given.vararg, given.kwarg) if a)]
    return [a.arg for a in every if a.arg not in ("self", "cls") and not a.arg.startswith("_")]


def in_class(node: ast.ClassDef, file: str, known: dict[str, Class]) -> list[str]:
    """Return what is wrong with the docstrings of a class and of its methods."""
    place, doc, above = f"{file}:{node.lineno} {node.name}", ast.get_docstring(node) or "", ancestors(node.name, known)
    found = [] if doc else [f"{place}: no docstring"]
    fields = [name for name in own_fields(node) if not name.startswith("_")]
    inherited = [name for base in above for name in base.fields]
    own = {method.name: method for method in node.body if isinstance(method, Function)}
    if fields or inherited or "__init__" not in own:
        found += compare(place, doc, fields, fields + inherited, 1)
    promised = {name for base in above for name in base.methods}
    for name, method in own.items():
        if name == "__init__" or not name.startswith("_"):
            found += in_function(method, file, node.name, 99 if name in promised else MANY)
    return found


def in_function(node: Function, file: str, owner: str, many: int) -> list[str]:
    """Return what is wrong with the docstring of a function or method."""
    place, doc = f"{file}:{node.lineno} {owner}.{node.name}".replace(" .", " "), ast.get_docstring(node) or ""
    takes = arguments(node)
    return [] + ([] if doc else [f"{place}: no docstring"]) + (compare(place, doc, takes, takes, many) if doc else [])


def faults(files: dict[str, str]) -> list[str]:
    """Return everything wrong with the docstrings of some files."""
    trees = {file: ast.parse(text) for file, text in files.items()}
    known = classes(trees)
    found = []
    for file, tree in trees.items():
        found += [] if ast.get_docstring(tree) else [f"{file}: no docstring"]
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found += in_class(node, file, known)
            elif isinstance(node, Function) and not node.name.startswith("_"):
                found += in_function(node, file, "", MANY)
    return found


def test_docstrings_say_what_public_code_takes() -> None:
    found = faults(sources("src"))
    assert not found, "\n".join([f"{len(found)} faults", *found])
