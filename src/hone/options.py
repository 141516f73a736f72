"""Checking and building parts from what a recipe says.

One declaration, the typed field of the part's dataclass, drives the check and its message. Types are
checked strictly: "8" is not 8, and 1 is not True. All problems are collected; nothing is raised until all are known.
"""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from hone import parts
from hone.diffusion.saved import denoiser_folder
from hone.errors import HoneError, Problem, nearest

_STRICT = ConfigDict(strict=True, arbitrary_types_allowed=True)


@dataclass(frozen=True)
class Nested:
    """Mark an option that holds parts itself: `sources: Annotated[list[Any], Nested("data")]`.

    Args:
        kind: kind of the parts that the option names; at build time the names are replaced by built parts.
        several: whether an option that is no list may be one part or a list of them.
    """

    kind: str
    several: bool = False


class Places:
    """Where each field of a recipe was written, for messages."""

    def __init__(self, lines: dict[str, int] | None = None, file: str = "") -> None:
        """Remember the line of each dotted path.

        Args:
            lines: line number by dotted path; 0 marks a path that `--set` gave.
            file: path of the recipe file.
        """
        self.lines, self.file = lines or {}, file

    def find(self, path: str) -> str:
        """Return "file:line" of the path or of the nearest enclosing one, "--set", or "" when nothing is known."""
        while path:
            if path in self.lines:
                return f"{self.file}:{self.lines[path]}" if self.lines[path] else "--set"
            inner = [line for other, line in self.lines.items() if other.startswith(f"{path}.")]
            if inner:  # only something inside it was written, as by --set optimizer.lr=1
                return f"{self.file}:{inner[0]}" if inner[0] else "--set"
            path = path.rpartition(".")[0]
        return self.file


def hints(cls: type) -> dict[str, Any]:
    """Return the resolved annotation of every option of a dataclass, `Annotated` kept."""
    found = _resolved(cls)
    return {f.name: found[f.name] for f in dataclasses.fields(cls) if f.init}


@cache
def _resolved(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=_STRICT)


def _check_value(hint: Any, value: Any) -> str:
    """Return what is wrong with a value for a type, or "" when nothing is."""
    try:
        adapter = _adapter(hint)
    except TypeError:  # an unhashable Literal or metadata: build it afresh
        adapter = TypeAdapter(hint, config=_STRICT)
    try:
        adapter.validate_python(value)
        return ""
    except ValidationError as error:
        found: dict[str, list[str]] = {}
        for item in error.errors():
            inner = ".".join(str(step) for step in item["loc"] if isinstance(step, int))
            text = item["msg"].replace("Input should be a valid ", "a ").replace("Input should be ", "")
            text = text.replace("a integer", "an integer")
            found.setdefault(inner, []).append(text)
        inner, texts = next(iter(found.items()))
        where = f"item {inner}: " if inner else ""
        return f"{where}expected {' or '.join(dict.fromkeys(texts))}, got {value!r}"


def check_fields(
    cls: type, given: dict[str, Any], at: str, places: Places, elsewhere: Mapping[str, str] | None = None
) -> list[Problem]:
    """Check a mapping of options against the fields of a dataclass.

    Args:
        cls: the dataclass.
        given: option name to value.
        at: dotted path of the mapping inside the recipe, "" at the top.
        places: where each path was written.
        elsewhere: what to say of names that are no options here, but that people know from elsewhere.

    Returns:
        One problem per unknown option, wrong type, value out of range or missing option.
    """
    known, problems = hints(cls), []
    for name, value in given.items():
        path = f"{at}.{name}" if at else str(name)  # YAML allows keys that are no strings
        if name not in known:
            hint = (elsewhere or {}).get(name) or nearest(name, known) or f"options: {', '.join(known) or 'none'}"
            problems.append(Problem(path, "unknown option", places.find(path), hint))
        elif (nested := nested_kind(known[name])) is not None:
            default = next(field.default for field in dataclasses.fields(cls) if field.name == name)
            if value is None and default is None:
                continue
            if message := _misshapen(known[name], nested, value):
                problems.append(Problem(path, message, places.find(path)))
                continue
            problems.extend(check_nested(nested, value, path, places))
        elif message := _check_value(known[name], value):
            choices = [c for c in get_args(_bare(known[name])) if isinstance(c, str)]
            hint = nearest(value, choices) if isinstance(value, str) else ""
            problems.append(Problem(path, message, places.find(path), hint))
    for field in dataclasses.fields(cls):
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.init and required and field.name not in given:
            path = f"{at}.{field.name}" if at else field.name
            problems.append(Problem(path, "is required and was not given", places.find(path)))
    return problems


def _bare(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def nested_kind(hint: Any) -> str | None:
    """Return the kind of parts that an option holds, or None for a plain option."""
    if get_origin(hint) is Annotated:
        return next((m.kind for m in get_args(hint)[1:] if isinstance(m, Nested)), None)
    return None


def _misshapen(hint: Any, kind: str, value: Any) -> str:
    """Return what is wrong with one part where a list of them is expected, or the reverse, or none at all."""
    listed = get_origin(_bare(hint)) is list
    several = any(isinstance(mark, Nested) and mark.several for mark in get_args(hint)[1:])
    if several and value == []:
        return f"expected at least one {kind}; the list is empty"
    if listed and not isinstance(value, list):
        return f"expected a list, each item the name of a {kind} or a mapping with 'name' and options, got {value!r}"
    if isinstance(value, list) and not listed and not several:
        return f"expected one {kind}, not a list: its name, or a mapping with 'name' and options"
    return ""


def check_nested(kind: str, value: Any, at: str, places: Places) -> list[Problem]:
    """Check an option that holds one part or a list of parts.

    Args:
        kind: kind of the parts.
        value: what the recipe says.
        at: dotted path of the option.
        places: where each path was written.
    """
    items = value if isinstance(value, list) else [value]
    spread = [f"{at}.{i}" for i in range(len(items))] if isinstance(value, list) else [at]
    return [p for item, path in zip(items, spread, strict=True) for p in check_part(kind, item, path, places)]


def split_spec(kind: str, spec: Any) -> tuple[str, dict[str, Any]]:
    """Return the name and the options of a part as a recipe writes it.

    A string is a name. A string for `data` or `model` that is no part's name is a path or a Hub name.

    Raises:
        HoneError: the specification is neither a name nor a mapping with `name`.
    """
    if isinstance(spec, str):
        return _shorthand(kind, spec)
    if isinstance(spec, dict) and kind in ("data", "model") and "name" not in spec and "path" in spec:
        name, extra = _shorthand(kind, spec["path"] if isinstance(spec["path"], str) else "./")
        return name, {**spec, **({"path": extra["path"]} if isinstance(spec["path"], str) and extra else {})}
    if isinstance(spec, dict) and isinstance(spec.get("name"), str):
        return spec["name"], {key: value for key, value in spec.items() if key != "name"}
    raise HoneError(f"expected the name of a {kind} or a mapping with 'name' and options, got {spec!r}")


def _shorthand(kind: str, text: str) -> tuple[str, dict[str, Any]]:
    if kind not in ("data", "model") or parts.find(kind, text):
        return text, {}
    if kind == "model":
        return "denoiser" if denoiser_folder(text) else "pretrained", {"path": text}
    glob = any(mark in text for mark in "*?\\")
    if glob or text.startswith((".", "/", "~")) or "." in text.rsplit("/")[-1] or _exists(text):
        return "files", {"path": text}
    return ("hub", {"path": text}) if text.count("/") == 1 else (text, {})


def _exists(text: str) -> bool:
    from pathlib import Path

    return Path(text).expanduser().exists()


def check_part(kind: str, spec: Any, at: str, places: Places) -> list[Problem]:
    """Check one part as a recipe writes it: its name, its options and what the part itself can tell without loading.

    Args:
        kind: kind of the part.
        spec: what the recipe says: a name, or a mapping with `name` and options.
        at: dotted path of the part.
        places: where each path was written.
    """
    try:
        name, options = split_spec(kind, spec)
    except HoneError as error:
        return [Problem(at, str(error), places.find(at))]
    if parts.find(kind, name) is None:
        known = [record.name for record in parts.catalogue() if record.kind == kind]
        elsewhere = f"see: hone list {kind}; one of your own is known in the process that has added it"
        hint = parts.as_option(kind, name) or nearest(name, known) or elsewhere
        return [Problem(at, f"there is no {kind} called '{name}'", places.find(at), hint)]
    cls: Any = parts.load(kind, name)
    if ":" in name:
        own = {key: value for key, value in options.items() if key in hints(cls) and key not in ("method", "options")}
        rest = {key: value for key, value in options.items() if key not in own}
        problems = check_fields(cls, {"method": name.split(":", 1)[1], **own}, at, places)
        found = cls.problems(name.split(":", 1)[1], rest)
        problems += [Problem(f"{at}.{key}".rstrip("."), text, places.find(f"{at}.{key}")) for key, text in found]
        return problems
    path_is = {"path": "this is no source of files; for one write data: FILE"} if kind == "data" else None
    problems = check_fields(cls, options, at, places, path_is)
    if not problems and hasattr(cls, "check"):
        found = build_part(kind, spec).check()
        problems = [Problem(f"{at}.{key}", text, places.find(f"{at}.{key}")) for key, text in found]
    return problems


def part_class(kind: str, spec: Any) -> Any:
    """Return the class of a part that a checked specification names."""
    return parts.load(kind, split_spec(kind, spec)[0])


def record_of(kind: str, spec: Any) -> parts.Record | None:
    """Return the catalogue's record of the part that a recipe names; None where the name is wrong or missing.

    Args:
        kind: kind of the part.
        spec: what the recipe says.
    """
    try:
        return parts.find(kind, split_spec(kind, spec)[0])
    except HoneError:
        return None


def usual_solvers(objective: Any) -> list[Any]:
    """Return the solvers that draw from what an objective trains; none for text, heun where it does not say.

    Args:
        objective: a checked specification.
    """
    record = record_of("objective", objective)
    if record is None or record.medium != "arrays":
        return []
    given = split_spec("objective", objective)[1]
    defaults = {option.name: option.default for option in record.options}

    def value(text: Any) -> Any:
        if not isinstance(text, str) or not text.startswith("objective."):
            return text
        _, name, *item = text.split(".")
        found = given[name] if name in given else ast.literal_eval(defaults[name])
        return found[int(item[0])] if item else found

    made = [{key: value(text) for key, text in spec.items()} for spec in record.draws]
    return [spec for index, spec in enumerate(made) if spec not in made[:index]] or ["heun"]


def build_part(kind: str, spec: Any) -> Any:
    """Build a part from a checked specification; nested parts are built first."""
    name, options = split_spec(kind, spec)
    cls = parts.load(kind, name)
    known = hints(cls)
    built = {}
    for key, value in options.items():
        nested = nested_kind(known[key]) if key in known else None
        if nested is None:
            built[key] = value
        else:
            several = isinstance(value, list)
            built[key] = [build_part(nested, v) for v in value] if several else value and build_part(nested, value)
    if ":" in name:
        own = {key: value for key, value in built.items() if key in known}
        rest = {key: value for key, value in built.items() if key not in known}
        return cls(method=name.split(":", 1)[1], options=rest, **own)
    return cls(**built)
