"""Merging models into one, tensor by tensor through their files: no two models are ever in memory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hone import options
from hone.adapters.record import attached
from hone.data.cache import cache_root
from hone.engine.checkpoint import damage, staged
from hone.engine.manifest import folder_hash
from hone.errors import HoneError, ModelError, Problem, RecipeError
from hone.files import reason
from hone.mergers.base import Merger
from hone.recipe import parse_value
from hone.text.loading import find_model, read_pretrained
from hone.text.model import EXTRAS_FILE
from hone.text.tokenizer import load_tokenizer

SHARD = 2**30  # bytes of one file, and of the tensors that are held until it is written
RECORD_FILE = "merge.json"
GENERATION = "generation_config.json"


class Weights:
    """The tensors of a model on disk, read one at a time."""

    def __init__(self, folder: Path, label: str, open_files: ExitStack) -> None:
        """Open the files and read which tensors there are.

        Args:
            folder: a whole model in Hugging Face format.
            label: what the user calls it.
            open_files: closes the files in the end.

        Raises:
            ModelError: a file is damaged, or there is none.
        """
        self.folder, self.label = folder, label
        self.files: dict[str, Any] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in weight_files(folder):
            try:
                file = open_files.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise ModelError(f"{path}: damaged, or no safetensors file: {error}") from error
            for name in file.keys():  # noqa: SIM118 - a safetensors file, no dictionary
                self.files[name] = file
                self.shapes[name] = tuple(file.get_slice(name).get_shape())
        if not self.files:
            raise ModelError(f"'{label}' has no weights in safetensors")

    def extras(self) -> dict[str, Tensor]:
        """Return what an objective has put beside the model, such as a head; nothing where there is none."""
        path = self.folder / EXTRAS_FILE
        return load_file(path) if path.is_file() else {}

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self.files[name].get_tensor(name)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a model's weights: what its index lists, else model.safetensors, else all but a head's.

    A folder may hold the same weights twice, as in Mistral's `consolidated.safetensors`.

    Args:
        folder: a model in Hugging Face format.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(listed))]
    single = folder / "model.safetensors"
    return [single] if single.is_file() else sorted(p for p in folder.glob("*.safetensors") if p.name != EXTRAS_FILE)


@contextmanager
def opened(models: Sequence[str], room: Path) -> Iterator[list[Weights]]:
    """Open models to be read tensor by tensor; what is not a whole model on disk is loaded and written to one first.

    Args:
        models: "base", folders in Hugging Face or PEFT format, or Hub names.
        room: a folder for what is written meanwhile, which is made.

    Raises:
        ModelError: a model is missing or damaged, or an adapter is no change of weights.
    """
    with ExitStack() as stack:
        found: dict[str, Weights] = {}
        for label in models:
            if label in found:
                continue
            folder = Path(find_model(label))
            if not (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
                room.mkdir(parents=True, exist_ok=True)
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".merge-", dir=room)))
                _write_whole(label, folder)
            found[label] = Weights(folder, label, stack)
        yield [found[label] for label in models]


def _write_whole(label: str, folder: Path) -> None:
    """Write a model, an adapter merged into its base, as a whole one."""
    model, tokenizer, _ = read_pretrained(label, torch.float32)
    if attached(model):
        raise ModelError(
            f"'{label}' is an adapter that is no change of weights, so that it cannot be merged with others"
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_alike(models: Sequence[Weights]) -> None:
    """Refuse models that are no variants of one: other tensors, shapes or tokens.

    Args:
        models: the first one is what the others are compared with.

    Raises:
        ModelError: says what differs.
    """
    first = models[0]
    tokens = load_tokenizer(str(first.folder)).get_vocab()
    for other in models[1:]:
        if lacking := sorted(first.shapes.keys() ^ other.shapes.keys()):
            owner = first if lacking[0] in first.shapes else other
            raise ModelError(
                f"'{other.label}' and '{first.label}' have other tensors, e.g. only '{owner.label}' has "
                f"'{lacking[0]}'; models are merged that were trained from one start"
            )
        unlike = next((name for name, shape in first.shapes.items() if other.shapes[name] != shape), None)
        if unlike is not None:
            raise ModelError(
                f"'{unlike}' has the shape {other.shapes[unlike]} in '{other.label}' and {first.shapes[unlike]} in "
                f"'{first.label}'; models are merged that were trained from one start"
            )
        if load_tokenizer(str(other.folder)).get_vocab() != tokens:
            raise ModelError(
                f"the tokenizers of '{other.label}' and '{first.label}' differ, so that the rows of their embeddings "
                "stand for other tokens"
            )


def merge_models(models: Sequence[str], base: str | None, merger: Merger, out: Path) -> dict[str, Any]:
    """Merge models and write the result in Hugging Face format.

    Args:
        models: what is merged: "base", folders in Hugging Face or PEFT format, or Hub names.
        base: what they were trained from; None where the merger needs none.
        merger: how.
        out: the new model's folder.

    Returns:
        The record that lies beside the weights: the models, the merger and its options, and the size of the result.

    Raises:
        HoneError: the folder exists, or the merger lacks a base.
        ModelError: a model is missing, or they do not go together.
    """
    if out.exists():
        raise HoneError(f"'{out}' exists already, and nothing is ever overwritten; give another one with --out")
    if merger.needs_base and base is None:
        raise HoneError(f"merger '{merger.name}' adds up changes and needs to know of what: give the base")
    merger.check_count(len(models))
    names = list(models) if base is None else [base, *models]
    with opened(names, out.parent) as weights, staged(out) as staging:
        check_alike(weights)
        start, others = (None, weights) if base is None else (weights[0], weights[1:])
        merged = ((name, _merged(name, merger, start, others)) for name in weights[0].shapes)
        count, dtype = _write(merged, staging)
        _write_settings(others[0].folder, staging, dtype)
        if heads := _merged_extras(merger, start, others):
            save_file(heads, staging / EXTRAS_FILE, metadata={"format": "pt"})
        record = {
            "merger": {"name": merger.name, **asdict(merger)}, "base": base, "models": list(models),
            "parameters": count,
        }  # fmt: skip
        (staging / RECORD_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return {"path": str(out), **record}


def _merged(name: str, merger: Merger, base: Weights | None, models: Sequence[Weights]) -> Tensor:
    """Return one tensor of the result; whole numbers must be the same in every model."""
    start = None if base is None else base.read(name)
    tensors = [model.read(name) for model in models]
    if tensors[0].is_floating_point():
        return merger.merge(name, start, tensors)
    unlike = next((m for m, tensor in zip(models, tensors, strict=True) if not torch.equal(tensor, tensors[0])), None)
    if unlike is not None:
        raise ModelError(f"'{name}' holds whole numbers, which differ between '{models[0].label}' and '{unlike.label}'")
    return tensors[0]


def _merged_extras(merger: Merger, base: Weights | None, models: Sequence[Weights]) -> dict[str, Tensor]:
    """Return the merged heads of models that all have the same; nothing where none has one.

    Raises:
        ModelError: some have a head and others none, or another one: it cannot be left out in silence.
    """
    found = [model.extras() for model in models]
    shapes = [{name: tensor.shape for name, tensor in extras.items()} for extras in found]
    start = {} if base is None else base.extras()
    unlike = next((model for model, own in zip(models, shapes, strict=True) if own != shapes[0]), None)
    if unlike is None and found[0] and base is not None and start.keys() != found[0].keys():
        unlike = base
    if unlike is not None:
        raise ModelError(
            f"'{models[0].label}' and '{unlike.label}' have different heads beside the model ({EXTRAS_FILE}), such as "
            "a classifier's, which cannot be merged; take that file away to merge the models alone"
        )
    return {
        name: merger.merge(name, start.get(name), [extras[name] for extras in found]).contiguous() for name in found[0]
    }


def _write(tensors: Iterator[tuple[str, Tensor]], folder: Path) -> tuple[int, torch.dtype]:
    """Write tensors as they come, in files of at most `SHARD` bytes; return their elements and their widest type."""
    held: dict[str, Tensor] = {}
    places: dict[str, str] = {}
    size = total = written = 0
    dtype = torch.float16

    def flush(name: str) -> None:
        save_file(held, folder / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(held, name))
        held.clear()

    for name, tensor in tensors:
        own = tensor.numel() * tensor.element_size()
        if held and size + own > SHARD:
            flush(f"model-{len(set(places.values())) + 1:05d}.safetensors")
            size = 0
        held[name] = tensor.contiguous()
        size, total, written = size + own, total + tensor.numel(), written + own
        if tensor.is_floating_point():
            dtype = tensor.dtype if dtype == torch.float16 else torch.promote_types(dtype, tensor.dtype)
    if not places:
        flush("model.safetensors")
        return total, dtype
    flush(f"model-{len(set(places.values())) + 1:05d}.safetensors")
    index = {"metadata": {"total_size": written}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return total, dtype


def _write_settings(model: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write a model's configuration, which names the type of the weights, and its tokenizer beside merged weights."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    config.update({key: str(dtype).removeprefix("torch.") for key in ("dtype", "torch_dtype") if key in config})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if (model / GENERATION).is_file():
        shutil.copyfile(model / GENERATION, folder / GENERATION)
    load_tokenizer(str(model)).save_pretrained(folder)


def merged_folder(models: Sequence[str], base: str | None, merger: Merger) -> Path:
    """Return where a merged model lies among the caches, whether it is there yet or not: a place found by its content.

    Args:
        models: what is merged.
        base: what they were trained from, None for no base.
        merger: how.
    """
    parts: list[Any] = [merger.name, asdict(merger)]
    for label in (base, *models):
        found = None if label is None else find_model(label)
        parts.append(None if found is None else folder_hash(Path(found)) or found)
    return cache_root() / "merged" / hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def merge_cached(models: Sequence[str], base: str | None, merger: Merger) -> Path:
    """Return the folder of a merged model, made now unless it lies there whole.

    Args:
        models: what is merged.
        base: what they were trained from, None for no base.
        merger: how.
    """
    folder = merged_folder(models, base, merger)
    if damage(folder):
        shutil.rmtree(folder, ignore_errors=True)
        own = folder.with_name(f"{folder.name}.{os.getpid()}")  # processes of one run come here together
        merge_models(models, base, merger, own)
        try:
            own.rename(folder)
        except OSError as error:
            shutil.rmtree(own, ignore_errors=True)
            if damage(folder):
                raise HoneError(f"{folder}: the merged model could not be kept: {reason(error, folder)}") from error
    return folder


def merge_command(
    models: Sequence[str], base: str | None, method: str, settings: Sequence[str], out: Path
) -> dict[str, Any]:
    """Merge models as the command line says.

    Args:
        models: what is merged.
        base: what they were trained from, None for no base.
        method: name of the merger.
        settings: its options, "KEY=VALUE" each.
        out: the new model's folder.

    Raises:
        RecipeError: there is no such merger, or an option does not fit it.
    """
    pairs = [text.partition("=") for text in settings]
    problems = [Problem(key, "expected key=value", "--set") for key, equals, _ in pairs if not equals]
    spec = {"name": method, **{key: parse_value(value, key) for key, equals, value in pairs if equals}}
    if problems := problems or options.check_part("merger", spec, "--method", options.Places()):
        raise RecipeError(problems)
    folders = [
        Path(model) / "model" if (Path(model) / "recipe.yaml").is_file() else model for model in models
    ]  # of runs
    return merge_models([str(folder) for folder in folders], base, options.build_part("merger", spec), out)
