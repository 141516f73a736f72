"""The recipe: one YAML file that names the parts of a run.

`Recipe.load("quickstart", ["adapter.rank=16"])` reads a shipped recipe by name or a file by path, applies the
overrides, checks every field and every option of every part, and raises one `RecipeError` with all problems at once.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from hone import options as opt
from hone.combinations import ELSEWHERE, combinations
from hone.errors import Problem, RecipeError, nearest

SHIPPED = Path(__file__).parent / "recipes"
PART_FIELDS = {
    "model": "model", "data": "data", "eval_data": "data", "general_data": "data", "adapter": "adapter",
    "objective": "objective", "optimizer": "optimizer", "schedule": "schedule", "sampler": "sampler",
}  # fmt: skip
DATA_FIELDS = ("data", "eval_data", "general_data")
OPEN_FIELDS = (*DATA_FIELDS, "solvers")  # those that may be left open
LIST_FIELDS = {
    "penalties": "penalty", "callbacks": "callback", "metrics": "metric", "solvers": "solver", "distances": "distance",
}  # fmt: skip
WHOLE_RUN = ("about", "device", "precision", "sharding", "out", "stages")  # what no stage may override
_STAGE = re.compile(r"stage:(\d+)")  # the model that a stage has made, 0 for the one that the run starts from
Positive = Annotated[int, Field(gt=0)]


@dataclass(kw_only=True)
class Recipe:
    """A checked recipe. Part fields hold what the recipe says: a name, or a mapping with `name` and options.

    Args:
        about: free record of a published recipe: text, papers, claim, deviations.
        model: "base" (the shipped model), a folder or Hub name, or a model part.
        data: a built-in, a path, a glob, a Hub name, or a data part.
        eval_data: what to evaluate on; None holds out a part of `data`.
        general_data: text apart from the task; its loss at each evaluation, "general_loss", shows what is forgotten.
        adapter: how weights are parameterised and which of them train.
        objective: what is minimised.
        penalties: terms added to the loss in training, whatever the objective is.
        optimizer: how parameters move.
        schedule: how the learning rate changes over the run.
        callbacks: what happens beside the steps.
        sampler: how evaluation picks tokens.
        metrics: how evaluation judges generated answers.
        solvers: how evaluation draws arrays from a denoiser, each in turn; None takes what the objective trains for.
        distances: how evaluation compares the drawn arrays with held-out ones.
        steps: optimizer steps; exclusive with `epochs`. 0 trains nothing: the model is evaluated and saved as it is.
        epochs: passes over the data, may be fractional; exclusive with `steps`.
        batch_tokens: most tokens in one optimizer step, over all micro-batches and processes; an array counts as one.
        micro_tokens: most tokens in one forward pass; None means `batch_tokens`. Never changes a gradient.
        packing: run samples as one packed row; False pads each to the longest. Never changes a gradient.
        clip: largest gradient norm; None switches clipping off.
        eval_every: steps between evaluations; None evaluates before and after only.
        eval_samples: held-out samples that are answered by generation at each evaluation, or arrays that are drawn; 0
            for none.
        max_new_tokens: longest generated answer in tokens.
        checkpoint_every: steps between checkpoints; None saves every ten minutes. The end and an interruption are
            saved in any case.
        keep: how many recent checkpoints stay on disk; the best one stays as well.
        final: whether the run's `model/` is the last or the best evaluated state.
        precision: arithmetic; "auto" is bf16 autocast where the GPU has it, float32 elsewhere.
        device: where to train; "auto" takes CUDA, then MPS, then the CPU.
        sharding: "full" shares weights, gradients and optimizer state among processes (FSDP); "auto" does so under
            `accelerate launch --use_fsdp`.
        recompute: recompute each layer's activations in the backward pass to save memory.
        trackers: trackers of Accelerate to log to beside metrics.jsonl, e.g. tensorboard.
        seed: seeds initialisation, data order and sampling.
        out: the run folder; None makes runs/NAME-1, -2, ...
        stages: overrides of the above, run one after the other, each from the previous stage's result unless it names
            a `model`. "stage:N" anywhere in a stage is the model that stage N has made, "stage:0" the run's own start.
        name: name of the recipe, for the run folder and messages.
    """

    about: dict[str, Any] = field(default_factory=dict)
    model: Any = "base"
    data: Any = None
    eval_data: Any = None
    general_data: Any = None
    adapter: Any = "full"
    objective: Any = "sft"
    penalties: list[Any] = field(default_factory=list)
    optimizer: Any = "adamw"
    schedule: Any = "cosine"
    callbacks: list[Any] = field(default_factory=list)
    sampler: Any = "greedy"
    metrics: list[Any] = field(default_factory=lambda: ["accuracy"])
    solvers: list[Any] | None = None
    distances: list[Any] = field(default_factory=lambda: ["energy"])
    steps: Annotated[int, Field(ge=0)] | None = None
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    batch_tokens: Positive = 4096
    micro_tokens: Positive | None = None
    packing: bool = True
    clip: Annotated[float, Field(gt=0)] | None = 1.0
    eval_every: Positive | None = None
    eval_samples: Annotated[int, Field(ge=0)] = 100
    max_new_tokens: Positive = 128
    checkpoint_every: Positive | None = None
    keep: Positive = 2
    final: Literal["last", "best"] = "last"
    precision: Literal["auto", "float32", "bf16", "float64"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    sharding: Literal["auto", "none", "full"] = "auto"
    recompute: bool = False
    trackers: list[str] = field(default_factory=list)
    seed: Annotated[int, Field(ge=0)] = 0
    out: str | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    name: str = "run"

    @classmethod
    def load(cls, source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read, override and check a recipe.

        Args:
            source: name of a shipped recipe, or path of a YAML file.
            overrides: "a.b=value" settings; the value is read as YAML.

        Raises:
            RecipeError: with every problem found, each with file, line, field, what was expected and the nearest name.
        """
        path = locate(source)
        raw, lines = read_yaml(path)
        problems = []
        for text in overrides:
            problem = _override(raw, lines, text)
            if problem is not None:
                problems.append(problem)
        raw.setdefault("name", path.stem)
        places = opt.Places(lines, str(path))
        problems += check(raw, places)
        if problems:
            raise RecipeError(problems)
        return cls(**raw)

    @classmethod
    def kept(cls, path: Path) -> Recipe:
        """Read the recipe of a run that has begun: it was checked then, and what it names may be gone since.

        Args:
            path: of its YAML file.

        Raises:
            RecipeError: it has a field that no recipe has.
        """
        raw, lines = read_yaml(path)
        known = {f.name for f in dataclasses.fields(cls)}
        if wrong := [name for name in raw if name not in known]:
            raise RecipeError([Problem(wrong[0], "unknown option", opt.Places(lines, str(path)).find(wrong[0]))])
        return cls(**raw)

    @classmethod
    def of(cls, **fields: Any) -> Recipe:
        """Make a recipe in Python, checked like a file.

        Args:
            fields: the recipe's fields.

        Raises:
            RecipeError: with every problem found.
        """
        if problems := check(fields, opt.Places()):
            raise RecipeError(problems)
        return cls(**fields)

    def overridden(self, overrides: Sequence[str]) -> Recipe:
        """Return the recipe with some settings changed.

        Args:
            overrides: "a.b=value" settings; the value is read as YAML.

        Raises:
            RecipeError: with every problem found.
        """
        raw, lines = copy.deepcopy(self.plain()), dict[str, int]()
        problems = [problem for text in overrides if (problem := _override(raw, lines, text)) is not None]
        if problems := problems + check(raw, opt.Places(lines)):
            raise RecipeError(problems)
        return Recipe(**raw)

    def build(self, part_field: str) -> Any:
        """Build the part, or the list of parts, that a field names."""
        value = getattr(self.with_solvers() if part_field == "solvers" else self, part_field)
        if part_field in LIST_FIELDS:
            return [opt.build_part(LIST_FIELDS[part_field], spec) for spec in value]
        return None if value is None else opt.build_part(PART_FIELDS[part_field], value)

    def named(self) -> list[tuple[str, Any]]:
        """Return (kind, what the recipe says) of every part that it names; those of its stages are not among them."""
        single = [(kind, getattr(self, name)) for name, kind in PART_FIELDS.items()]
        listed = [(kind, spec) for name, kind in LIST_FIELDS.items() for spec in getattr(self, name) or ()]
        return [(kind, spec) for kind, spec in (*single, *listed) if spec is not None]

    def plain(self) -> dict[str, Any]:
        """Return the recipe as a plain mapping, defaults included; `Recipe.of(**plain)` gives it back."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def referring(self, answer: Callable[[int], str]) -> Recipe:
        """Return the recipe with every "stage:N" in it replaced.

        Args:
            answer: returns the folder of the model that stage N has made.
        """
        return Recipe(**_replaced(self.plain(), answer))

    def staged(self) -> list[Recipe]:
        """Return one recipe per stage, each with its overrides applied; without stages the recipe. All name solvers."""
        top, made = self.plain(), [] if self.stages else [self]
        for index, stage in enumerate(self.stages):
            merged = _merged(top, stage)
            made.append(Recipe(**{"name": f"stage-{index + 1}", **merged, "stages": []}))
        return [stage.with_solvers() for stage in made]

    def with_solvers(self) -> Recipe:
        """Return the recipe with what draws from its objective's models, where it names no solvers."""
        if self.solvers is not None:
            return self
        return dataclasses.replace(self, solvers=opt.usual_solvers(self.objective))


def _replaced(value: Any, answer: Callable[[int], str]) -> Any:
    """Return a plain value with every "stage:N" in it replaced."""
    if isinstance(value, dict):
        return {key: _replaced(inner, answer) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, answer) for inner in value]
    found = _STAGE.fullmatch(value) if isinstance(value, str) else None
    return answer(int(found[1])) if found else value


def _wrong_stages(value: Any, index: int, at: str, places: opt.Places) -> list[Problem]:
    """Return the problems of every "stage:N" in a stage that names one which has not run by then."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [problem for key, inner in items for problem in _wrong_stages(inner, index, f"{at}.{key}", places)]
    found = _STAGE.fullmatch(value) if isinstance(value, str) else None
    if found is None or int(found[1]) <= index:
        return []
    return [Problem(at, f"expected stage:0 to stage:{index}, which have run by then, got {value}", places.find(at))]


def _merged(top: dict[str, Any], stage: dict[str, Any]) -> dict[str, Any]:
    merged = {**top, **stage}
    if "steps" in stage or "epochs" in stage:  # a stage's length replaces the top level's, whichever way it is given
        merged["steps"], merged["epochs"] = stage.get("steps"), stage.get("epochs")
    if "name" not in stage:
        merged.pop("name", None)
    return merged


def shipped() -> list[str]:
    """Return the names of the recipes that come with hone."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def locate(source: str | Path) -> Path:
    """Return the file of a recipe given by name or path.

    Raises:
        RecipeError: there is neither a shipped recipe nor a file of that name.
    """
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        if path.is_file():
            return path
        near = nearest(path.name, (p.name for p in path.parent.glob("*.y*ml"))) if path.parent.is_dir() else ""
        raise RecipeError([Problem("", f"there is no recipe file '{path}'", hint=near)])
    if str(source) in shipped():
        return SHIPPED / f"{source}.yaml"
    here = [f"{source}{end}" for end in (".yaml", ".yml") if Path(f"{source}{end}").is_file()]
    hint = f"did you mean '{here[0]}'?" if here else nearest(str(source), shipped()) or "see: hone list recipe"
    raise RecipeError([Problem("", f"there is no recipe called '{source}'", hint=hint)])


class _Loader(yaml.SafeLoader):
    """SafeLoader whose plain scalars follow YAML 1.2: 1e-4 is a float; yes, no, on, off, dates and 1:30 are strings."""


_OLDER = ("bool", "float", "int", "timestamp", "value")  # what YAML 1.1 reads otherwise, or 1.2 not at all
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in found if tag.rpartition(":")[2] not in _OLDER]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$|^0x[0-9a-fA-F]+$"), list("-+0123456789")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$", re.I), list("tTfF"))


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 16) if text.startswith("0x") else int(text)


_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string which `_Loader` would take for something else, such as "1e-4"."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Read a YAML mapping and the line of every field.

    Returns:
        The mapping, and line numbers by dotted path (list items by index).

    Raises:
        RecipeError: the file is not valid YAML, is not a mapping, or gives a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError([Problem("", "expected UTF-8 text", str(path))]) from error
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        lines: dict[str, int] = {}
        problems: list[Problem] = []
        _walk(node, "", lines, problems, str(path))
        if problems:
            raise RecipeError(problems)
        value = loader.construct_document(node) if node is not None else {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        detail = getattr(error, "problem", None) or str(error)
        raise RecipeError([Problem("", f"not valid YAML: {detail}", place)]) from error
    if not isinstance(value, dict):
        raise RecipeError([Problem("", "expected a mapping of fields such as 'model:' and 'data:'", f"{path}:1")])
    return value, lines


def _walk(node: yaml.Node | None, at: str, lines: dict[str, int], problems: list[Problem], file: str) -> None:
    if node is None:
        return
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = f"{at}.{key.value}" if at else str(key.value)
            if path in lines:
                problems.append(Problem(path, "is given twice", f"{file}:{key.start_mark.line + 1}"))
            lines[path] = key.start_mark.line + 1
            _walk(value, path, lines, problems, file)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _walk(value, f"{at}.{index}" if at else str(index), lines, problems, file)


def parse_value(text: str, path: str = "") -> Any:
    """Read the value of a setting as YAML, the way recipe files are read.

    Args:
        text: the value.
        path: dotted path of the setting, for the message; "" names the value itself.

    Raises:
        RecipeError: it is not valid YAML.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        raise RecipeError([Problem(path or text, f"the value is not valid YAML: {error}", "--set")]) from error


def _override(raw: dict[str, Any], lines: dict[str, int], text: str) -> Problem | None:
    """Apply one "a.b=value" to the raw mapping."""
    path, equals, value_text = text.partition("=")
    if not equals or not path:
        return Problem(text, "expected key=value", "--set")
    try:
        value = parse_value(value_text, path)
    except RecipeError as error:
        return error.problems[0]
    if problem := assign(raw, path, value):
        return problem
    for known in [p for p in lines if p == path or p.startswith(path + ".")]:
        del lines[known]
    lines[path] = 0
    return None


def assign(raw: dict[str, Any], path: str, value: Any) -> Problem | None:
    """Set one field of a raw recipe; a part named by a string becomes a mapping when an option of it is set.

    Args:
        raw: the recipe's fields; its mappings are changed in place.
        path: dotted path, list items by index.
        value: the new value.
    """
    keys, target = path.split("."), raw
    for depth, key in enumerate(keys[:-1]):
        slot: Any = int(key) if isinstance(target, list) and key.isdigit() else key
        if isinstance(target, list) and (not isinstance(slot, int) or slot >= len(target)):
            return _no_item(path, keys[:depth], len(target))
        if not isinstance(target, list) and (slot not in target or target[slot] is None):
            of_stage = depth == 2 and keys[0] == "stages"  # which inherits what it does not say
            inherited = copy.deepcopy(raw.get(key)) if of_stage else None
            target[slot] = inherited if inherited is not None else _start(key) if depth == 0 or of_stage else {}
        if isinstance(target[slot], str):
            target[slot] = _as_mapping(key, target[slot])
        target = target[slot]
        if not isinstance(target, (dict, list)):
            return Problem(path, f"'{'.'.join(keys[: depth + 1])}' holds {target!r}, which has no fields", "--set")
    slot = int(keys[-1]) if isinstance(target, list) and keys[-1].isdigit() else keys[-1]
    if isinstance(target, list) and (not isinstance(slot, int) or slot >= len(target)):
        return _no_item(path, keys[:-1], len(target))
    target[slot] = value
    return None


def _no_item(path: str, keys: list[str], count: int) -> Problem:
    said = f"'{'.'.join(keys)}' has {count} items; '{path.split('.')[len(keys)]}' is none of them"
    return Problem(path, said, "--set")


def _start(key: str) -> dict[str, Any]:
    """Begin the mapping of a part that the recipe leaves at its default, so that its options can be set."""
    default = next((f.default for f in dataclasses.fields(Recipe) if f.name == key), None)
    return _as_mapping(key, default) if isinstance(default, str) else {}


def _as_mapping(key: str, text: str) -> dict[str, Any]:
    name, extra = opt.split_spec(PART_FIELDS.get(key, "part"), text)
    return {"name": name, **extra}


def check(raw: dict[str, Any], places: opt.Places) -> list[Problem]:
    """Return every problem of a raw recipe, those of its stages included."""
    problems = _check_level(raw, "", places)
    stages = raw.get("stages") or []
    if not isinstance(stages, list):
        return problems
    top = {key: value for key, value in raw.items() if key != "stages"}
    for index, stage in enumerate(stages):
        if isinstance(stage, dict):
            for key in (key for key in stage if key in WHOLE_RUN):
                path = f"stages.{index}.{key}"
                problems.append(Problem(path, "cannot differ between stages", places.find(path)))
            problems += _wrong_stages(stage, index, f"stages.{index}", places)
            plain = _replaced(_merged(top, stage), lambda number: "base")
            own = _check_level(plain, f"stages.{index}", places, only=set(stage))
            problems += own
    return list({(problem.field, problem.message): problem for problem in problems}.values())


def _check_level(raw: dict[str, Any], at: str, places: opt.Places, only: set[str] | None = None) -> list[Problem]:
    problems = []
    plain = {k: v for k, v in raw.items() if k not in PART_FIELDS and k not in LIST_FIELDS}
    if only is not None:
        plain = {k: v for k, v in plain.items() if k in only}
    problems += opt.check_fields(Recipe, plain, at, places, ELSEWHERE)
    for name, value in raw.items():
        path = f"{at}.{name}".lstrip(".")
        if only is not None and name not in only:
            continue
        if value is None and name in OPEN_FIELDS:
            continue
        if name in PART_FIELDS:
            problems += opt.check_part(PART_FIELDS[name], value, path, places)
        if name in LIST_FIELDS and isinstance(value, list):
            problems += opt.check_nested(LIST_FIELDS[name], value, path, places)
        elif name in LIST_FIELDS:
            problems.append(Problem(path, f"expected a list, got {value!r}", places.find(path)))
    return problems + combinations(raw, at, places)


def dump(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, in the order of its fields."""
    defaults = Recipe().plain()  # an empty default says nothing; an empty value elsewhere switches something off
    plain = {k: v for k, v in recipe.plain().items() if v not in (None, {}, []) or v != defaults[k]}
    return yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
