"""Public code says what it takes: docstrings exist, and their `Args:` match the signatures."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field

import pytest

from guards.sources import sources

MANY = 3  # a function of this many arguments or more documents them
NEVER = 99  # in its place: an override keeps its base's words
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
    return isinstance(value, ast.Call) and any(
        k.arg == "init" and ast.unparse(k.value) == "False" for k in value.keywords
    )


def own_fields(node: ast.ClassDef) -> list[str]:
    """Return the arguments that a dataclass or a named tuple takes by its own fields; none for another class."""
    if not {"dataclass", "NamedTuple"} & {named(expression) for expression in (*node.decorator_list, *node.bases)}:
        return []
    return [
        n.target.id
        for n in node.body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
        if named(n.annotation) != "ClassVar" and not is_state(n.value)
    ]


def classes(trees: dict[str, ast.Module]) -> dict[str, Class]:
    """Return every class of some files by name."""
    return {
        node.name: Class(
            [named(base) for base in node.bases],
            own_fields(node),
            {n.name for n in node.body if isinstance(n, Function)},
        )
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


def ancestors(bases: list[str], known: dict[str, Class]) -> list[Class]:
    """Return what is known of the bases of a class, and of theirs."""
    return [c for base in bases if base in known for c in (known[base], *ancestors(known[base].bases, known))]


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
    wrong = {"lack": missing, "name what is no argument": extra, "repeat": twice}
    return [f"{place}: Args {what}: {', '.join(some)}" for what, some in wrong.items() if some]


def arguments(node: Function, method: bool) -> list[str]:
    """Return the names of a function's public arguments; of a method without self or cls."""
    given = node.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *(a for a in (given.vararg, given.kwarg) if a)]
    bound = method and "staticmethod" not in [named(decorator) for decorator in node.decorator_list]
    return [a.arg for a in every[bound:] if not a.arg.startswith("_")]


def in_class(node: ast.ClassDef, file: str, known: dict[str, Class]) -> list[str]:
    """Return what is wrong with the docstrings of a class and of its methods."""
    place, doc = f"{file}:{node.lineno} {node.name}", ast.get_docstring(node) or ""
    above = ancestors([named(base) for base in node.bases], known)
    found = [] if doc else [f"{place}: no docstring"]
    fields = [name for name in own_fields(node) if not name.startswith("_")]
    inherited = [name for base in above for name in base.fields]
    own = {method.name: method for method in node.body if isinstance(method, Function)}
    if fields or inherited or "__init__" not in own:
        found += compare(place, doc, fields, fields + inherited, 1)
    promised = {name for base in above for name in base.methods}
    for name, method in own.items():
        if name == "__init__" or not name.startswith("_"):
            found += in_function(method, file, node.name, NEVER if name in promised else MANY)
    return found


def in_function(node: Function, file: str, owner: str, many: int) -> list[str]:
    """Return what is wrong with the docstring of a function or method."""
    place, doc = f"{file}:{node.lineno} {owner}.{node.name}".replace(" .", " "), ast.get_docstring(node) or ""
    takes = arguments(node, bool(owner))
    if "command" in [named(decorator) for decorator in node.decorator_list]:
        many = NEVER  # a command's docstring is its help text, where typer lists the arguments with their own help
    return compare(place, doc, takes, takes, many) if doc else [f"{place}: no docstring"]


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


GOOD = '''
"""Module."""
class Shape:
    """A shape."""
    def __init__(self, size):
        """Make one.

        Args:
            size: edge in metres,
                or so: roughly.
        """
    def scale(self, by, *names, how=1, **rest):
        """Scale.

        Args:
            by: factor.
            *names: which.
            how (int): way.
            rest: more.

        Returns:
            it: scaled.
        """
@dataclass(kw_only=True)
class Ball(Shape):
    """A ball.

    Args:
        radius: in metres.
    """
    radius: float
    kind: ClassVar[str] = "ball"
    seen: int = field(init=False, default=0)
    def scale(self, by, *names, how=1, **rest):
        """Scale as any shape."""
@dataclass
class Disc(Ball):
    """A disc.

    Args:
        radius: in metres, of the rim.
    """
def near(a, b):
    """Return whether a is near b."""
def _private(a, b, c):
    pass
'''
BAD = {  # what is wrong: (text of the good module, what stands there instead)
    "x.py: no docstring": ('"""Module."""', ""),
    "Shape: no docstring": ('"""A shape."""', "pass"),
    "Shape.__init__: Args name what is no argument: colour": ("size: edge", "colour: of it.\n            size: edge"),
    "Shape.scale: Args lack: rest": ("            rest: more.\n", ""),
    "Shape.scale: Args repeat: by": ("rest: more.", "rest: more.\n            by: again."),
    "Ball: Args lack: radius": ("        radius: in metres.\n", "        height: in metres.\n"),
    "Ball: no Args for radius": ("    Args:\n        radius: in metres.\n", ""),
    "Ball: Args name what is no argument: seen": (
        "radius: in metres.\n",
        "radius: in metres.\n        seen: how often.\n",
    ),
    "Disc: Args name what is no argument: depth": ("of the rim.", "of the rim.\n        depth: in metres."),
    "near: no docstring": ('"""Return whether a is near b."""', "pass"),
    "near: no Args for a, b, c": ("near(a, b)", "near(a, b, c)"),
}


def test_a_good_module_has_no_fault() -> None:
    assert faults({"x.py": GOOD}) == []


@pytest.mark.parametrize("fault", BAD)
def test_each_fault_is_found(fault: str) -> None:
    right, wrong = BAD[fault]
    assert right in GOOD
    found = [
        re.sub(r":\d+ ", ": ", line).removeprefix("x.py: ") for line in faults({"x.py": GOOD.replace(right, wrong)})
    ]
    assert fault.removeprefix("x.py: ") in found
