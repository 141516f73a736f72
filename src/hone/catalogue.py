"""The catalogue for people and programs: every part and every shipped recipe, read without importing torch."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hone import parts
from hone.errors import HoneError, RecipeError, nearest
from hone.evidence.store import Evidence, overall, stored
from hone.recipe import LIST_FIELDS, PART_FIELDS, SHIPPED, Recipe, parse_value, read_yaml, shipped

KINDS = (*parts.KINDS, "recipe")
ENOUGH = {  # what a recipe of each medium cannot do without; a snippet adds it
    "text": {"data": "chains", "steps": 100},
    "arrays": {"model": {"name": "denoiser"}, "data": "points", "objective": "denoise", "steps": 100},
}  # fmt: skip
# Callbacks may wait for evaluations, and penalties compare with the base, which full training does not keep.
ALSO: dict[str, dict[str, Any]] = {"callback": {"eval_every": 50}, "penalty": {"adapter": "lora"}}
WORDS = {"int": "integer", "float": "number", "bool": "true or false", "str": "text", "Any": "anything"}
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "length at least"}


@dataclass(frozen=True)
class Entry:
    """One line of the catalogue: a part or a recipe.

    Args:
        kind: kind of the part, or "recipe".
        name: its name.
        summary: one line.
        papers: (title, identifier) pairs.
        claim: what its paper says, in a sentence.
        deviations: how it differs from the paper.
        options: of a part; a recipe has none.
        body: the docstring of a part, the file of a recipe.
        evidence: stored results of its claims.
        medium: what a part is for, "text" or "arrays".
        draws: of an objective for arrays: what its models are drawn from with, where a recipe names no solvers.
    """

    kind: str
    name: str
    summary: str
    papers: tuple[tuple[str, str], ...]
    claim: str
    deviations: str
    options: tuple[parts.Option, ...]
    body: str
    evidence: tuple[Evidence, ...]
    medium: str = "text"
    draws: tuple[dict[str, Any], ...] = field(default=(), hash=False)

    @property
    def verdict(self) -> str | None:
        """The verdict that the results of all its claims share, "mixed", or None when none has been run."""
        return overall(self.evidence)

    @property
    def stale(self) -> bool:
        """Whether code has changed since one of its results was stored."""
        return any(evidence.stale for evidence in self.evidence)

    @property
    def mark(self) -> str:
        """The verdict as a table shows it."""
        return (self.verdict or "-") + (" (stale)" if self.stale else "")

    @property
    def usual_solvers(self) -> str:
        """How a recipe that names no solvers draws from what the objective trains; "" where nothing is special."""
        return f"{_flow(list(self.draws))}, unless the recipe names solvers" if self.draws else ""

    @property
    def prose(self) -> str:
        """The docstring of a part without its options: what it does, with the equation."""
        return re.sub(r"\n*^(Args|Options):\n(?: .*\n?|\n)*", "\n\n", self.body, flags=re.MULTILINE).strip()

    def plain(self) -> dict[str, Any]:
        """Return the entry as `hone list --json` prints it."""
        return {
            "kind": self.kind, "name": self.name, "summary": self.summary,
            "papers": [{"title": title, "id": paper} for title, paper in self.papers],
            "claim": self.claim, "verdict": self.verdict, "stale": self.stale,
            "evidence": [evidence.plain() for evidence in self.evidence], "deviations": self.deviations,
            "options": [{"name": o.name, "type": o.type, "default": o.default, "doc": o.doc} for o in self.options],
        }  # fmt: skip

    def text(self, called: str = "") -> str:
        """Return the entry as `hone show` prints it: a recipe's file, or a part's page.

        Args:
            called: the name that was asked for, e.g. "peft:vera" of the bridge "peft:".
        """
        if self.kind == "recipe":
            return self.body.rstrip("\n")
        lines = [f"{self.kind} {self.name}", "", self.prose, ""]
        lines += [f"paper: {title} ({paper})" for title, paper in self.papers]
        about = (("claim", self.claim), ("deviations", self.deviations), ("solvers", self.usual_solvers))
        lines += [f"{label}: {text}" for label, text in about if text]
        lines += ["options:"] if self.options else []
        for o in self.options:
            given = f"default {written(o.default)}" if o.default else "required"
            lines.append(f"  {o.name}: {spoken(o.type)}, {given}")
            lines += textwrap.wrap(o.doc, 112, initial_indent=" " * 6, subsequent_indent=" " * 6)
        if snippet := self.snippet(called):
            lines += ["in a recipe:", textwrap.indent(snippet, "  ").rstrip()]
        lines += ["evidence:"] if self.evidence else []
        lines += [f"  {line}" for evidence in self.evidence for line in evidence.text()]
        return "\n".join(lines)

    def snippet(self, called: str = "") -> str:
        """Return a short recipe that uses the part, complete as it is; "" for a kind that no recipe names yet.

        Args:
            called: what the recipe calls the part; "" takes its name, and an example behind a bridge's colon.
        """
        single = next((name for name, kind in PART_FIELDS.items() if kind == self.kind), None)
        listed = next((name for name, kind in LIST_FIELDS.items() if kind == self.kind), None)
        field = single or listed
        if field is None and self.kind not in ("merger", "reward", "network"):
            return ""
        spec, enough = self._spec(called), ENOUGH[self.medium]
        if self.kind == "network":  # an option of the model; most take no points
            field = single = "model"
            spec, enough = {"name": "denoiser", "network": spec}, {**enough, "data": "digits"}
        elif self.kind == "reward" and self.medium == "arrays":  # an option of an objective
            field, single, spec = "objective", "objective", {"name": "rlcm", "reward": spec}
        elif self.kind == "reward":  # rewards are an option of what is trained on
            field = single = "data"
            spec = {"name": "rollouts", "of": "chains", "rewards": spec}
        elif field is None:  # a merger is named by the model that it makes
            field = single = "model"
            spec = {"name": "merged", "base": "base", "models": ["base", "base"], "merger": spec}
        fields: dict[str, Any] = {field: [spec] if single is None else spec, **ALSO.get(self.kind, {})}
        fields.update((name, value) for name, value in enough.items() if name not in fields)
        return "".join(f"{name}: {_flow(value)}\n" for name, value in fields.items())

    def _spec(self, called: str) -> Any:
        """Return the part as a recipe writes it, with what it must be given."""
        name, needed = called or self.name, [option for option in self.options if not option.default]
        if self.name.endswith(":"):
            needed = [option for option in needed if option.name != "method"]
            name = name if not name.endswith(":") else self._bridged()
        options = {option.name: _placeholder(self.kind, option) for option in needed}
        return {"name": name, **options} if options else name

    def _bridged(self) -> str:
        """Return a bridge's name with a method that its docstring names."""
        if found := re.search(rf"\b{re.escape(self.name)}\w+", self.body):
            return found[0]
        method = next(option for option in self.options if option.name == "method")
        return f"{self.name}{_placeholder(self.kind, method)}"


def entries(kind: str | None = None) -> list[Entry]:
    """Return the catalogue, or the entries of one kind.

    Args:
        kind: a kind of part, or "recipe"; None returns all.

    Raises:
        HoneError: there is no such kind.
    """
    if kind is not None and kind not in KINDS:
        raise HoneError(f"there is no kind '{kind}' ({nearest(kind, KINDS) or 'kinds: ' + ', '.join(KINDS)})")
    results: dict[tuple[str, str], list[Evidence]] = {}
    for evidence in stored(kind):
        results.setdefault((evidence.kind, evidence.name), []).append(evidence)
    records = [record for record in parts.catalogue() if kind in (None, record.kind)]
    found = [_of_part(record, tuple(results.get((record.kind, record.name), ()))) for record in records]
    names = shipped() if kind in (None, "recipe") else []
    return found + [_of_recipe(name, tuple(results.get(("recipe", name), ()))) for name in names]


def named(name: str, kind: str | None = None) -> list[Entry]:
    """Return the entries of a name: several where kinds share it.

    Args:
        name: name of a part or a recipe; "peft:vera" finds the bridge "peft:".
        kind: a kind of part, or "recipe"; None looks among all.

    Raises:
        HoneError: there is none; the message gives the nearest.
    """
    everything = entries(kind)
    prefix = name.split(":", 1)[0] + ":"
    found = [e for e in everything if e.name == name or (":" in name and e.name == prefix)]
    if not found:
        kinds = parts.KINDS if kind is None else [kind]
        hint = next(filter(None, (parts.as_option(each, name) for each in kinds)), "")
        hint = hint or nearest(name, (e.name for e in everything)) or f"try: hone find '{name}'"
        raise HoneError(f"there is no {kind or 'part or recipe'} called '{name}' ({hint})")
    return found


def _of_part(r: parts.Record, evidence: tuple[Evidence, ...]) -> Entry:
    return Entry(
        r.kind, r.name, r.summary, r.papers, r.claim, r.deviations, r.options, r.doc, evidence, r.medium, r.draws
    )


def _of_recipe(name: str, evidence: tuple[Evidence, ...]) -> Entry:
    path = SHIPPED / f"{name}.yaml"
    text_of_file, about = _recipe_file(path, path.stat().st_mtime_ns)
    papers = about.get("papers") or []
    pairs = tuple((title, paper) for title, paper in papers) if isinstance(papers, list) else ()
    text, claim, deviations = (about.get(key, "") for key in ("text", "claim", "deviations"))
    return Entry("recipe", name, text, pairs, claim, deviations, (), text_of_file, evidence)


@cache
def _recipe_file(path: Path, changed: int) -> tuple[str, dict[str, Any]]:
    """Return a recipe's text and what it says about itself; a hundred of them take half a second to read.

    Args:
        path: the file.
        changed: when; a file that has changed is read again.
    """
    return path.read_text(encoding="utf-8"), read_yaml(path)[0].get("about") or {}


def written(source: str) -> str:
    """Return a default, as the source has it, the way that a recipe writes it: "None" as "null"."""
    try:
        value = ast.literal_eval(source)
    except ValueError:
        return source
    return repr(value) if isinstance(value, float) else _flow(value)


def _flow(value: Any) -> str:
    """Return a value as YAML on one line."""
    dumped = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return dumped.removesuffix("...\n").strip()


def spoken(annotation: str) -> str:
    """Return a type in words: "Annotated[int, Field(ge=1)] | None" as "integer (at least 1) or null"."""
    return _spoken(ast.parse(annotation, mode="eval").body)


def _spoken(node: ast.expr) -> str:
    match node:
        case ast.Constant(value=None):
            return "null"
        case ast.Name(id=name):
            return WORDS.get(name, name)
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            first = _spoken(left)
            return f"{first}{',' * first.startswith('one of')} or {_spoken(right)}"
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            choices = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return "one of " + ", ".join(written(ast.unparse(choice)) for choice in choices)
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[inner, *marks])):
            if kind := _nested(marks):
                return f"list of {kind} parts" if _is_list(inner) else f"{kind} part"
            limits = [f"{BOUNDS[name]} {value:g}" for name, value in _limits(marks).items() if name in BOUNDS]
            return _spoken(inner) + (f" ({' and '.join(limits)})" if limits else "")
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return f"list of {_spoken(inner)}"
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, value])):
            return f"mapping of {_spoken(key)} to {_spoken(value)}"
    return ast.unparse(node)


def _is_list(node: ast.expr) -> bool:
    return isinstance(node, ast.Subscript) and ast.unparse(node.value) == "list"


def _nested(marks: Iterable[ast.expr]) -> str | None:
    """Return the kind of the parts that an option holds, None for a plain option."""
    found = (m.args[0] for m in marks if isinstance(m, ast.Call) and ast.unparse(m.func) == "Nested" and m.args)
    return next((str(ast.literal_eval(kind)) for kind in found), None)


def _limits(marks: Iterable[ast.expr]) -> dict[str, float]:
    """Return the range that pydantic's Field gives, e.g. {"ge": 0.0}."""
    given = [k for m in marks if isinstance(m, ast.Call) and ast.unparse(m.func) == "Field" for k in m.keywords]
    return {str(k.arg): ast.literal_eval(k.value) for k in given if isinstance(k.value, (ast.Constant, ast.UnaryOp))}


def _placeholder(kind: str, option: parts.Option) -> Any:
    """Return a value for an option that must be given.

    It is the example of its description, else what the kind's usual part, or another one, has by default, else what its
    type allows.
    """
    node = ast.parse(option.type, mode="eval").body
    for text in re.findall(r'\{[^{}]*\}|\[[^\[\]]*\]|"[^"]+"', option.doc):
        try:
            value = parse_value(re.sub(r",? *\.\.\.(?=[\]}])", "", text))
        except RecipeError:  # prose in brackets
            continue
        if _fits(value, node):
            return value
    usual = getattr(Recipe(), next((field for field, of in PART_FIELDS.items() if of == kind), ""), None)
    for record in sorted(parts.catalogue(), key=lambda record: record.name != usual):
        for other in record.options if record.kind == kind else ():
            if other.name == option.name and other.default and other.type == option.type:
                return ast.literal_eval(other.default)
    return _allowed(node)


def _fits(value: Any, node: ast.expr) -> bool:
    """Return whether a value is of a type, as far as its outermost part says."""
    match node:
        case ast.Name(id=name):
            kinds: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}
            right = name == "Any" or isinstance(value, kinds.get(name, ()))
            return right and isinstance(value, bool) <= (name in ("bool", "Any"))
        case ast.BinOp(left=left, op=ast.BitOr(), right=right_):
            return _fits(value, left) or _fits(value, right_)
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[inner, *marks])):
            return _nested(marks) is None and not _limits(marks) and _fits(value, inner)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            choices = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return value in [ast.literal_eval(choice) for choice in choices]
        case ast.Subscript(value=ast.Name(id=("list" | "dict") as name)):
            return isinstance(value, {"list": list, "dict": dict}[name])
    return False


def _allowed(node: ast.expr, limits: dict[str, float] | None = None) -> Any:
    """Return a value that a type allows."""
    match node:
        case ast.Name(id=("int" | "float") as name):
            return _within(limits or {}, whole=name == "int")
        case ast.Name(id="bool"):
            return False
        case ast.BinOp(left=left, op=ast.BitOr()):
            return _allowed(left)
        case ast.Subscript(value=ast.Name(id="Literal"), slice=inner):
            return ast.literal_eval(inner.elts[0] if isinstance(inner, ast.Tuple) else inner)
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[inner, *marks])):
            if kind := _nested(marks):
                return [_usual(kind)] if _is_list(inner) else _usual(kind)
            return _allowed(inner, _limits(marks))
        case ast.Subscript(value=ast.Name(id="list"), slice=inner):
            return [_allowed(inner)]
        case ast.Subscript(value=ast.Name(id="dict")):
            return {}
    return "TEXT"


def _within(limits: dict[str, float], *, whole: bool) -> float:
    """Return a number in a range: its lower end where that belongs to it, else one inside."""
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    if "ge" in limits:
        return int(limits["ge"]) if whole else limits["ge"]
    if low is None:
        found = 1 if high is None else high - ("lt" in limits)
    elif high is None or whole:
        found = low + 1
    else:
        found = (low + high) / 2
    return int(found) if whole else float(found)


def _usual(kind: str) -> Any:
    """Return a part of a kind as a recipe writes it: the one that recipes take by default, else the first."""
    field = next((field for field, of in PART_FIELDS.items() if of == kind), "")
    if usual := ENOUGH["text"].get(field) or getattr(Recipe(), field, None):
        return usual
    several = [record for record in parts.catalogue() if record.kind == kind]
    first = next((record for record in several if record.medium == "text"), several[0])
    return _of_part(first, ())._spec("")
