"""Hashes of the code that a result rests on, so that a changed source shows.

The code is followed by name, from definition to definition, with comments, docstrings and layout left out: editing one
method of a file does not touch the hash of its neighbour.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hone import options, parts
from hone.recipe import LIST_FIELDS, PART_FIELDS, SHIPPED, read_yaml

ROOT = Path(__file__).parent.parent
_DOES = "()"  # stands for the calls at the top of a module, such as the registration of an attention function
_LAYOUT = ("INDENT", "DEDENT", "NEWLINE", "NL", "COMMENT", "ENDMARKER")
# What shows or steers a run without having a part in its numbers.
SHOWS = (
    "hone.cli", "hone.evidence", "hone.catalogue",
    "hone.engine.progress", "hone.engine.summary", "hone.engine.tracking",
)  # fmt: skip


@dataclass(frozen=True)
class _Module:
    """The top level of a module.

    Args:
        definitions: code by name: a function, a class, or the statements that assign the name.
        uses: names that the code of a name mentions.
        imports: (module, name) by local name.
    """

    definitions: dict[str, str]
    uses: dict[str, frozenset[str]]
    imports: dict[str, tuple[str, str]]


def code_hash(roots: Iterable[tuple[str, str]], follows: Callable[[str], bool]) -> str:
    """Return the SHA-256 of definitions and of everything in hone that they name, directly or not.

    Args:
        roots: (module, name) pairs to begin with.
        follows: whether a module is looked into.
    """
    seen: dict[tuple[str, str], str] = {}
    waiting = list(roots)
    while waiting:
        module, name = waiting.pop()
        if (module, name) in seen or not follows(module):
            continue
        found = _read(module)
        if found is None:
            continue
        seen[module, name] = found.definitions.get(name, "")
        if _DOES in found.definitions:
            waiting.append((module, _DOES))
        if name and name not in found.definitions:  # re-exported, or a module's own submodule
            waiting += [found.imports[name]] if name in found.imports else [(f"{module}.{name}", "")]
            continue
        names = found.uses.get(name, frozenset()) if name else frozenset(found.definitions)
        for used in names:
            if used in found.definitions:
                waiting.append((module, used))
            elif used in found.imports:
                waiting.append(found.imports[used])
    text = "\n".join(f"{module}:{name}:{code}" for (module, name), code in sorted(seen.items()) if code)
    return hashlib.sha256(text.encode()).hexdigest()


def part_roots(kind: str, name: str) -> list[tuple[str, str]]:
    """Return where the code of a part begins, nothing when there is no such part."""
    record = parts.find(kind, name)
    return [] if record is None else [(record.module, record.attribute)]


def run_hash(named: Iterable[tuple[str, str]]) -> str:
    """Return the hash of all code that a run of the named parts rests on.

    Args:
        named: (kind, name) of the parts.
    """
    roots = [root for kind, name in named for root in part_roots(kind, name)]
    return code_hash(
        [*roots, ("hone.engine.run", "run"), ("hone.engine.preflight", "measure")],
        lambda module: module.startswith("hone") and not module.startswith(SHOWS),
    )


def current(kind: str, name: str, claim: str) -> str | None:
    """Return the hash that a claim would be stored with now: the part's code in its own package, and the claim's.

    A recipe's is that of the parts that it names.

    Args:
        kind: kind of the part.
        name: its name.
        claim: name of the claim.

    Returns:
        None when the part or the claim is no longer there.
    """
    where = claims().get((kind, name, claim))
    roots = _recipe_roots(name) if kind == "recipe" else part_roots(kind, name)
    if where is None or not (roots or kind == "recipe"):
        return None
    rooms = (*(root[0].rsplit(".", 1)[0] for root in roots), "hone.evidence.claims")
    return code_hash([*roots, where], lambda module: module.startswith(rooms) and module != f"{rooms[-1]}.base")


def _recipe_roots(name: str) -> list[tuple[str, str]]:
    """Return where the code of the parts begins that a shipped recipe and its stages name."""
    path = SHIPPED / f"{name}.yaml"
    fields = read_yaml(path)[0] if path.is_file() else {}
    found: list[tuple[str, str]] = []
    for stage in (fields, *(fields.get("stages") or ())):
        for field, kind in {**PART_FIELDS, **LIST_FIELDS}.items():
            given = stage.get(field)
            for spec in given if isinstance(given, list) else [given]:
                found += [] if spec is None else part_roots(kind, options.split_spec(kind, spec)[0])
    return list(dict.fromkeys(found))


@cache
def claims() -> dict[tuple[str, str, str], tuple[str, str]]:
    """Return (module, function) of every claim by (kind, name of the part, name of the claim), from the sources."""
    found = {}
    for path in sorted((ROOT / "evidence" / "claims").glob("*.py")):
        module = "hone.evidence.claims" + ("" if path.stem == "__init__" else f".{path.stem}")
        functions = [n for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)]
        for node in functions:
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "claim":
                    kind, name, claim = (ast.literal_eval(argument) for argument in call.args)
                    found[kind, name, claim] = (module, node.name)
    return found


@cache
def _read(module: str) -> _Module | None:
    path = ROOT.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if module.split(".")[0] != "hone" or not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    tokens = _code_tokens(text, tree)
    definitions: dict[str, str] = {}
    uses: dict[str, frozenset[str]] = {}
    for node in tree.body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        code = " ".join(token for line, token in tokens if first <= line <= (node.end_lineno or first))
        for name in _names(node):
            definitions[name] = definitions.get(name, "") + code
            uses[name] = uses.get(name, frozenset()) | _used(node)
    return _Module(definitions, uses, _imports(tree))


def _code_tokens(text: str, tree: ast.AST) -> list[tuple[int, str]]:
    """Return (line, token) of a module's code, without comments, docstrings and records of parts.

    Each statement begins with its depth, since what belongs to a loop is code, not layout. f-strings are taken whole,
    since Python releases cut them up differently. What `ast.unparse` writes depends on the release as well.
    """
    dropped = {line for node in ast.walk(tree) for line in _uncounted(node)}
    lines = text.splitlines(keepends=True)
    found: list[tuple[int, str]] = []
    depth, fresh = 0, True
    opened: list[tuple[int, int]] = []  # where the f-strings begin that have not ended
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind in ("INDENT", "DEDENT"):
            depth += 1 if kind == "INDENT" else -1
        fresh = fresh or kind == "NEWLINE"
        if kind.endswith("STRING_START"):
            opened.append(token.start)
        start = opened.pop() if kind.endswith("STRING_END") else token.start
        if opened or kind in _LAYOUT or start[0] in dropped:
            continue
        if fresh:
            found.append((start[0], f"{depth}:"))
        found.append((start[0], _between(lines, start, token.end)))
        fresh = False
    return found


def _between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """Return the text from one (line, column) to another."""
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]]
    return "".join([lines[start[0] - 1][start[1] :], *lines[start[0] : end[0] - 1], lines[end[0] - 1][: end[1]]])


def _uncounted(node: ast.AST) -> Iterator[int]:
    """Yield the lines of a definition's docstring and record, and of methods of a class that do nothing.

    Those are hooks: a contract may get another one without any result resting on it.
    """
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return
    if isinstance(node, ast.ClassDef):
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and _does_nothing(method):
                yield from range(method.lineno, (method.end_lineno or method.lineno) + 1)
    dropped: list[ast.expr | ast.stmt] = [decorator for decorator in node.decorator_list if _is_record(decorator)]
    if ast.get_docstring(node) is not None:
        dropped.append(node.body[0])
    for inner in dropped:
        yield from range(inner.lineno, (inner.end_lineno or inner.lineno) + 1)


def _does_nothing(method: ast.FunctionDef) -> bool:
    """Return whether a method has a docstring alone, or hands back None or an argument as it is."""
    if method.decorator_list or ast.get_docstring(method) is None:
        return False
    allowed = {f"return {argument.arg}" for argument in method.args.args} | {"return None"}
    return [ast.unparse(statement) for statement in method.body[1:] if ast.unparse(statement) not in allowed] == []


def _names(node: ast.stmt) -> list[str]:
    """Return the names that a statement of a module defines."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return [_DOES]
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Assign, ast.AugAssign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return [inner.id for target in targets for inner in ast.walk(target) if isinstance(inner, ast.Name)]
    return []


def _used(node: ast.AST) -> frozenset[str]:
    """Return every name that code mentions, those in annotations that are strings left out."""
    return frozenset(inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name))


def _imports(tree: ast.AST) -> dict[str, tuple[str, str]]:
    """Return what every import of hone brings, those inside functions too."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hone":
            found.update({alias.asname or alias.name: (str(node.module), alias.name) for alias in node.names})
    return found


def _is_record(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else None
    return isinstance(called, ast.Name) and called.id == "part"
