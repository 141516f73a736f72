"""What a comparison varies: `--vary` and `--tune` settings, expanded into checked recipes."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hone import options as opt
from hone.errors import HoneError, Problem, RecipeError, nearest
from hone.recipe import PART_FIELDS, Recipe, assign, check, locate, parse_value, read_yaml

Settings = dict[str, Any]
NOT_VARIED = ("out", "name", "about", "trackers", "seed", "stages")


@dataclass(frozen=True)
class Variant:
    """One of the recipes that are compared.

    Args:
        label: how tables and pages call it.
        fields: the fields of its recipe, checked.
        settings: what it sets, by dotted path.
        notes: what a reader should know, e.g. settings that do not apply to it.
    """

    label: str
    fields: dict[str, Any]
    settings: Settings
    notes: tuple[str, ...] = field(default=())

    def recipe(self, **changes: Any) -> Recipe:
        """Return the checked recipe, with other fields replaced by dotted path.

        Args:
            changes: fields and values, e.g. {"optimizer.lr": 1e-3, "seed": 2}.

        Raises:
            RecipeError: a value does not fit.
        """
        return Recipe(**changed(self.fields, changes))


def changed(fields: Mapping[str, Any], changes: Settings) -> dict[str, Any]:
    """Return a recipe's fields with some replaced by dotted path, checked; what is given stays as it is.

    Args:
        fields: of the recipe.
        changes: values by dotted path.

    Raises:
        RecipeError: a value does not fit.
    """
    made = copy.deepcopy(dict(fields))
    found = [assign(made, path, copy.deepcopy(value)) for path, value in changes.items()]
    if problems := [p for p in found if p] or check(made, opt.Places()):
        raise RecipeError(problems)
    return made


def read_settings(text: str, flag: str) -> tuple[str, list[Any]]:
    """Read "adapter=lora,full" or "adapter.rank=2,8" as a path and its values.

    Args:
        text: what the user gave; values are YAML, so that "[{name: lora, rank: 4}, full]" works too.
        flag: name of the option on the command line, for the message.

    Raises:
        HoneError: it is not of that form, or a field that cannot be varied.
    """
    path, equals, values = text.partition("=")
    if not equals or not path or not values:
        raise HoneError(f"{flag}: expected FIELD=value,value such as adapter=lora,full, got '{text}'")
    root = path.split(".")[0]
    known = [f.name for f in dataclasses.fields(Recipe) if f.name not in NOT_VARIED]
    if root not in known:
        why = "; give --seeds" if root == "seed" else ""
        hint = nearest(root, known) or f"fields: {', '.join(known)}"
        raise HoneError(f"{flag}: '{root}' is no field that can vary{why} ({hint})")
    try:
        found = parse_value(values if values.startswith("[") else f"[{values}]")
    except RecipeError as error:
        raise HoneError(f"{flag}: {path}: {error.problems[0].message}") from error
    if any(value == other for value, other in itertools.combinations(found, 2)):
        raise HoneError(f"{flag}: {path} has a value twice: {values}")
    return path, found


def grid(axes: Mapping[str, Sequence[Any]]) -> list[Settings]:
    """Return every combination of the values of all axes; one empty combination when there are none."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def expand(
    recipes: Sequence[str],
    overrides: Sequence[str],
    vary: Mapping[str, Sequence[Any]],
    common: Settings,
    tuned: Collection[str] = (),
) -> list[Variant]:
    """Return the variants: every combination of the varied settings on every recipe.

    An option that a variant's part does not have (the rank of full training) is left out of that variant as long as
    another one has it; variants that come to the same recipe are one.

    Args:
        recipes: names or files; the first is the one that `--vary` was meant for.
        overrides: "a.b=value" settings for all of them.
        vary: values by dotted path.
        common: further fields for all of them.
        tuned: paths whose best value will be looked for.

    Raises:
        RecipeError: a recipe is wrong, or no variant has one of the varied options.
    """
    made: dict[str, Variant] = {}
    refused: dict[str, Problem] = {}
    accepted: set[str] = set()
    for source in recipes:
        path = locate(source)
        base = Recipe.load(source, overrides)
        raw = {**_given(base, read_yaml(path)[0], overrides), **common}
        prefix = f"{base.name}" if len(recipes) > 1 else ""
        for settings in grid(vary):
            variant, problems = _variant(raw, settings, prefix, tuned)
            refused = {**problems, **refused}  # the first one's hint is about a part that the user named first
            accepted.update(variant.settings)
            same = json.dumps(variant.recipe().plain(), sort_keys=True, default=str)
            made.setdefault(same, variant)
    if wrong := [problem for name, problem in refused.items() if name not in accepted]:
        raise RecipeError([dataclasses.replace(problem, place="--vary") for problem in wrong])
    return distinct(list(made.values()))


def _given(base: Recipe, raw: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return the fields that a recipe file or an override gives; the others keep following their defaults."""
    given = {*raw, *(text.partition("=")[0].split(".")[0] for text in overrides), "name"}
    return {name: value for name, value in base.plain().items() if name in given}


def _variant(
    raw: dict[str, Any], settings: Settings, prefix: str, tuned: Collection[str]
) -> tuple[Variant, dict[str, Problem]]:
    """Return a variant without the settings that its parts do not have, and those with their problems."""
    fields, kept, dropped = copy.deepcopy(raw), dict[str, Any](), dict[str, Problem]()
    # Parts before their options, so that `adapter.rank` is that of the adapter which the variant names.
    for path in sorted(settings, key=lambda path: path.count(".")):
        trial = copy.deepcopy(fields)
        value = _keep_options(trial, path, settings[path])
        problem = assign(trial, path, copy.deepcopy(value))
        problem = problem or next((p for p in check(trial, opt.Places()) if p.field == path), None)
        if problem is None:
            fields, kept[path] = trial, settings[path]
        elif "." in path and problem.message == "unknown option":
            dropped[path] = problem
        else:
            raise RecipeError([dataclasses.replace(problem, place="--vary")])
    if problems := check(fields, opt.Places()):
        raise RecipeError(problems)
    kept = {path: kept[path] for path in settings if path in kept}
    label = " ".join([*([prefix] if prefix else []), *(f"{path}={show(value)}" for path, value in kept.items())])
    notes = [f"has no {path}" for path in dropped]
    notes += [note for path in kept if (note := _own_defaults(raw.get(path), fields.get(path), path, tuned))]
    return Variant(label or fields.get("name", "recipe"), fields, kept, tuple(notes)), dropped


def _own_defaults(before: Any, now: Any, path: str, tuned: Collection[str]) -> str:
    """Return which options a recipe gives to its own part that another part has too and takes from its own defaults.

    Args:
        before: the recipe's part.
        now: the variant's part.
        path: the field.
        tuned: paths that are tuned, so that no default is taken.
    """
    kind = PART_FIELDS.get(path)
    if kind is None or not isinstance(before, dict) or now is None or isinstance(now, list):
        return ""
    (old, given), (new, own) = opt.split_spec(kind, before), opt.split_spec(kind, now)
    record = opt.record_of(kind, now)
    if old == new or record is None:
        return ""
    found = [
        f"{option.name} {option.default}, not {old}'s {show(given[option.name])}"
        for option in record.options
        if option.name in given
        and option.name not in own
        and f"{path}.{option.name}" not in tuned
        and option.default != repr(given[option.name])
    ]
    return f"takes its own default {'; '.join(found)}" if found else ""


def _keep_options(fields: dict[str, Any], path: str, value: Any) -> Any:
    """Return the recipe's own mapping of a part when the value names that very part, so that its options stay."""
    kind = PART_FIELDS.get(path)
    now = fields.get(path)
    if kind and isinstance(value, str) and isinstance(now, dict) and opt.split_spec(kind, now)[0] == value:
        return now
    return value


def show(value: Any) -> str:
    """Return a value as a label shows it: lora, 8, or lora(rank=8)."""
    if isinstance(value, Mapping):
        options = ",".join(f"{key}={show(inner)}" for key, inner in value.items() if key != "name")
        return f"{value.get('name', '')}({options})" if options else str(value.get("name", ""))
    if isinstance(value, list):
        return "[" + ",".join(map(show, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def distinct(variants: Iterable[Variant]) -> list[Variant]:
    """Number labels that are equal, so that each variant can be named."""
    seen: dict[str, int] = {}
    out = []
    for variant in variants:
        seen[variant.label] = seen.get(variant.label, 0) + 1
        number = seen[variant.label]
        out.append(variant if number == 1 else dataclasses.replace(variant, label=f"{variant.label} ({number})"))
    return out
