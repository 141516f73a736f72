"""The registry of parts: every technique is a dataclass with one literal record, found by walking the package.

The catalogue (`catalogue()`) is read from the source text with `ast`, so listing methods never imports torch, which
alone takes 3 s. `load(kind, name)` imports the one module that defines the part.
"""

from __future__ import annotations

import ast
import gc
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from hone.errors import HoneError, nearest

KINDS = (
    "model", "data", "adapter", "objective", "penalty", "optimizer", "schedule", "callback", "sampler", "metric",
    "reward", "merger", "network", "solver", "distance",
)  # fmt: skip
ARRAYS_ONLY = ("network", "solver", "distance")  # kinds that language models have no use for
ROOT = Path(__file__).parent
T = TypeVar("T", bound=type)
_added: dict[tuple[str, str], tuple[Record, type]] = {}  # parts of the user's own, of this process alone


@dataclass(frozen=True)
class Option:
    """One option of a part: a field of its dataclass, as written in the source.

    Args:
        name: field name.
        type: annotation as text, e.g. "float", with the names that the project gives to types written out.
        default: default as text, "" when the option must be given.
        doc: its line in the `Args:` of the class docstring, with the unit.
    """

    name: str
    type: str
    default: str
    doc: str


@dataclass(frozen=True)
class Record:
    """The catalogue entry of a part, all of it literal in the source.

    Args:
        kind: one of `KINDS`.
        name: what a recipe calls it; a name that ends in ":" is a bridge and takes any name after the colon.
        papers: (exact title, identifier) pairs; empty for a method with no paper (`papers="original"`).
        claim: what its paper says it achieves, in a sentence; "" when there is nothing to test.
        deviations: how the code differs from the paper, "" when it does not.
        doc: the class docstring.
        options: the dataclass fields, those of base classes first.
        module: dotted module path.
        attribute: class name in that module.
        path: source file.
        line: line of the class.
        medium: what it is for, "text" or "arrays".
        draws: of an objective for arrays: the solvers of a recipe that names none, see `part`.
    """

    kind: str
    name: str
    papers: tuple[tuple[str, str], ...]
    claim: str
    deviations: str
    doc: str
    options: tuple[Option, ...]
    module: str
    attribute: str
    path: str
    line: int
    medium: str = "text"
    draws: tuple[dict[str, Any], ...] = field(default=(), hash=False)

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return self.doc.strip().split("\n", 1)[0]


def part(
    kind: str,
    name: str,
    *,
    papers: list[tuple[str, str]] | str,
    claim: str = "",
    deviations: str = "",
    draws: Sequence[dict[str, Any]] = (),
) -> Callable[[T], T]:
    """Register the decorated dataclass as the part `name` of `kind`. All arguments must be literals.

    Args:
        kind: one of `KINDS`.
        name: what a recipe calls it; one that ends in ":" is a bridge to another library's names.
        papers: (exact title, identifier) pairs, or "original" for a method with no paper.
        claim: the paper's claim in one sentence, as the claim experiment tests it.
        deviations: how the code differs from the paper.
        draws: of an objective whose models are to be drawn from in another way than a denoiser's: the solvers of a
            recipe that names none. A value "objective.NAME" is the objective's option, "objective.NAME.-1" the last
            item of it.

    Raises:
        TypeError: the class is not a keyword-only dataclass, or `kind` is unknown.
    """
    if kind not in KINDS:
        raise TypeError(f"unknown kind of part '{kind}', expected one of {', '.join(KINDS)}")
    if isinstance(papers, str) and papers != "original":
        raise TypeError(f"part '{name}': papers is a list of (title, identifier) pairs or 'original'")

    def register(cls: T) -> T:
        if not is_dataclass(cls) or any(not f.kw_only for f in cls.__dataclass_fields__.values()):
            raise TypeError(f"part '{name}': {cls.__name__} must be a dataclass(kw_only=True)")
        cls.kind, cls.name = kind, name  # type: ignore[attr-defined]
        return cls

    return register


def as_option(kind: str, name: str) -> str:
    """Return how to switch on a method that is an option of a part, as DoRA is of LoRA; "" when there is none.

    Args:
        kind: kind of the part.
        name: what the method is called; options say in brackets whose they are.
    """
    wanted = re.compile(rf"\((?:[^()]*[ ,;])?{re.escape(name)}(?:[ ,;'][^()]*)?\)", re.IGNORECASE)
    found = [
        (record, option) for record in catalogue() if record.kind == kind
        for option in record.options if wanted.search(option.doc)
    ]  # fmt: skip
    if not found:
        return ""
    record, option = min(found, key=lambda pair: len(pair[0].options))  # those that inherit the option have more
    return f"it is an option of {kind} '{record.name}': {option.name}, {option.doc}"


def load(kind: str, name: str) -> type:
    """Import and return the class of the part `name` of `kind`.

    A bridged name such as "peft:vera" returns the class of the bridge "peft:".

    Raises:
        HoneError: there is no such part; the message gives the nearest right name.
    """
    if (kind, name) in _added:
        return _added[kind, name][1]
    record = find(kind, name)
    if record is None:
        known = [r.name for r in (*catalogue(), *(own for own, _ in _added.values())) if r.kind == kind]
        hint = nearest(name, known) or f"known: {', '.join(known)}"
        raise HoneError(f"there is no {kind} called '{name}' ({hint})")
    return getattr(importlib.import_module(record.module), record.attribute)


def find(kind: str, name: str) -> Record | None:
    """Return the record of the part `name` of `kind`, or None; "peft:vera" finds the bridge "peft:"."""
    if (kind, name) in _added:
        return _added[kind, name][0]
    prefix = name.split(":", 1)[0] + ":" if ":" in name else name
    return next((r for r in catalogue() if r.kind == kind and r.name in (name, prefix)), None)


def add(kind: str, name: str, cls: T) -> T:
    """Let recipes of this process name a class of the user's own; the catalogue does not list it.

    Args:
        kind: one of `KINDS`.
        name: what a recipe calls it.
        cls: a keyword-only dataclass that does what parts of this kind do.

    Raises:
        HoneError: hone has a part of this kind and name, or the name is empty or holds a colon.
    """
    if not name or ":" in name or any(record.kind == kind and record.name == name for record in catalogue()):
        raise HoneError(f"'{name}' cannot be the name of a {kind} of your own: it is empty, has a colon, or is taken")
    doc, place = cls.__doc__ or "", (cls.__module__, cls.__qualname__)
    medium = getattr(cls, "medium", "text")
    try:
        path = inspect.getsourcefile(cls) or ""
    except (OSError, TypeError):  # typed into an interpreter
        path = ""
    _added[kind, name] = Record(kind, name, (), "", "", doc, (), *place, path=path, line=0, medium=medium), cls
    cls.kind, cls.name = kind, name  # type: ignore[attr-defined]
    return cls


@cache
def catalogue() -> tuple[Record, ...]:
    """Return the records of every part in the package, by kind and name.

    Raises:
        HoneError: two parts of one kind share a name.
    """
    collects = gc.isenabled()
    gc.disable()  # it would walk the growing trees again and again: 1.8 s with it, 1.1 s without
    try:
        return _catalogue()
    finally:
        if collects:
            gc.enable()


def _catalogue() -> tuple[Record, ...]:
    records: dict[tuple[str, str], Record] = {}
    for path in sorted(ROOT.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "\n@part(" not in text:
            continue
        for record in _records(path):
            key = (record.kind, record.name)
            if key in records:
                raise HoneError(f"two parts are {record.kind} '{record.name}': {records[key].path} and {record.path}")
            records[key] = record
    for held in (
        _names,
        _options,
        _medium,
    ):  # trees of a hundred files take as many megabytes, and are not needed again
        held.cache_clear()
    return tuple(records[key] for key in sorted(records, key=lambda key: (KINDS.index(key[0]), key[1])))


@cache
def _names(path: Path) -> dict[str, ast.stmt]:
    """Return what gives each name at the top of a file: a class, an assignment or an import from hone; parsed once."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.ClassDef(name=name) | ast.Assign(targets=[ast.Name(id=name)]):
                found[name] = node
            case ast.ImportFrom(module=str(module)) if module.startswith("hone."):
                found.update((alias.asname or alias.name, node) for alias in node.names)
    return found


def _defined(name: str, path: Path) -> tuple[ast.stmt, Path] | None:
    """Return the class or the assignment that a name in a file stands for, and its file; None outside hone."""
    node = _names(path).get(name)
    if not isinstance(node, ast.ImportFrom):
        return None if node is None else (node, path)
    source = ROOT.joinpath(*str(node.module).split(".")[1:])
    source = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
    return _defined(next(a.name for a in node.names if (a.asname or a.name) == name), source)


class _WrittenOut(ast.NodeTransformer):
    """Replaces the names that hone gives to types by what they stand for, so that every range can be seen."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def visit_Name(self, node: ast.Name) -> ast.AST:
        found = _defined(node.id, self.path)
        if found is None or not isinstance(found[0], ast.Assign):
            return node
        return _WrittenOut(found[1]).visit(found[0].value)


def _records(path: Path) -> Iterator[Record]:
    for node in _names(path).values():
        if not isinstance(node, ast.ClassDef):
            continue
        call = next((d for d in node.decorator_list if isinstance(d, ast.Call) and _called(d) == "part"), None)
        if call is None:
            continue
        kind, name = (ast.literal_eval(argument) for argument in call.args)
        given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        papers = given["papers"]
        module = ".".join(("hone", *path.relative_to(ROOT).with_suffix("").parts))
        yield Record(
            kind=kind,
            name=name,
            papers=() if isinstance(papers, str) else tuple((title, paper) for title, paper in papers),
            claim=given.get("claim", ""),
            deviations=given.get("deviations", ""),
            doc=ast.get_docstring(node) or "",
            options=_options(node, path),
            module=module,
            attribute=node.name,
            path=str(path),
            line=node.lineno,
            medium="arrays" if kind in ARRAYS_ONLY else _medium(node, path) or "text",
            draws=tuple(given.get("draws", ())),
        )


@cache
def _medium(node: ast.ClassDef, path: Path) -> str:
    """Return the `medium` that a class, or the first of its bases that says so, declares; "" where none does."""
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id == "medium":
            return str(ast.literal_eval(item.value)) if item.value is not None else ""
    for base in node.bases:
        found = _defined(base.id, path) if isinstance(base, ast.Name) else None
        if found is not None and isinstance(found[0], ast.ClassDef) and (medium := _medium(found[0], found[1])):
            return medium
    return ""


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


@cache
def _options(node: ast.ClassDef, path: Path) -> tuple[Option, ...]:
    """Return the dataclass fields of a class and its bases, bases first, as `dataclasses.fields` orders them."""
    options: dict[str, Option] = {}
    for base in reversed(node.bases):
        found = _defined(base.id, path) if isinstance(base, ast.Name) else None
        if found is not None and isinstance(found[0], ast.ClassDef):
            options.update({option.name: option for option in _options(found[0], found[1])})
    about = _argument_docs(ast.get_docstring(node) or "")
    for name, doc in about.items():  # a subclass may document an option that it inherits
        if name in options:
            options[name] = Option(name, options[name].type, options[name].default, doc)
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            name, kind = item.target.id, ast.unparse(_WrittenOut(path).visit(item.annotation))
            if name.startswith("_") or kind.startswith(("ClassVar", "InitVar")):
                continue
            if _hidden(item.value):  # also an option of a base that a subclass does without
                options.pop(name, None)
                continue
            options[name] = Option(name, kind, _default(item.value), about.get(name, ""))
    return tuple(options.values())


def _hidden(value: ast.expr | None) -> bool:
    """A field(init=False) is state, not an option."""
    return isinstance(value, ast.Call) and any(
        k.arg == "init" and isinstance(k.value, ast.Constant) and k.value.value is False for k in value.keywords
    )


def _default(value: ast.expr | None) -> str:
    if value is None:
        return ""
    if isinstance(value, ast.Call) and _called(value) == "field":
        for keyword in value.keywords:
            if keyword.arg == "default":
                return ast.unparse(keyword.value)
            if keyword.arg == "default_factory":
                made = keyword.value.body if isinstance(keyword.value, ast.Lambda) else keyword.value
                return {"list": "[]", "dict": "{}"}.get(text := ast.unparse(made), text)
        return ""
    return ast.unparse(value)


def _argument_docs(doc: str) -> dict[str, str]:
    """Read the `Args:` block of a docstring: {argument: its text on one line}."""
    found: dict[str, str] = {}
    name, inside = "", False
    for line in doc.splitlines():
        if line.strip() in ("Args:", "Options:"):
            inside = True
        elif inside and line.strip() and not line.startswith("    "):
            break
        elif inside and line.startswith("    ") and not line.startswith("     ") and ":" in line:
            name, _, text = line.strip().partition(":")
            found[name] = text.strip()
        elif inside and name and line.strip():
            found[name] += " " + line.strip()
    return found
