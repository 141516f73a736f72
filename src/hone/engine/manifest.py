"""The manifest: what a run was made of, so that it can be made again."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

import hone
from hone import options, parts
from hone.recipe import Recipe

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "accelerate", "datasets", "numpy", "peft")


def versions() -> dict[str, str]:
    """Return the versions of hone, Python and the packages that a run depends on."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    """Return them, looked up once: that takes 16 ms, and every run and page asks."""
    found = {"hone": hone.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> str:
    """Return the machine in words: processor, cores, GPUs."""
    import torch

    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    counted = [f"{gpus.count(gpu)} x {gpu}" for gpu in dict.fromkeys(gpus)]
    return ", ".join([f"{name}, {os.cpu_count()} cores", *counted])


def source_hashes(recipe: Recipe) -> dict[str, str]:
    """Return the SHA-256 of the source file of every part that a recipe names."""
    found = {}
    for kind, spec in recipe.named():
        record = parts.find(kind, options.split_spec(kind, spec)[0])
        if record is not None and Path(record.path).is_file():  # a class typed into an interpreter has no file
            found[f"{kind}:{record.name}"] = hashlib.sha256(Path(record.path).read_bytes()).hexdigest()
    return found


def folder_hash(folder: Path) -> str | None:
    """Return one SHA-256 over the weights and configuration of a model folder, None when it is not a local folder."""
    if not folder.is_dir():
        return None
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".json", ".jinja"):
            seen = path.stat()
            total.update(path.name.encode())
            total.update(_digest(path.resolve(), seen.st_size, seen.st_mtime_ns))
    return total.hexdigest()


@cache  # a run asks for each of its sources and its manifest, and a large base takes many seconds
def _digest(path: Path, size: int, changed: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


# Fields of a recipe that a manifest knows by content, or that say nothing about one stage.
_OTHERWISE = ("data", "eval_data", "general_data", "model", "stages", "about", "name", "out")


def manifest(recipe: Recipe, device: str, data: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of a run.

    Args:
        recipe: the resolved recipe.
        device: the device in words.
        data: fingerprints and counts of the data.
        model: path and content hash of the starting model, and its sizes.
    """
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "device": device,
        "seed": recipe.seed,
        "recipe": {name: value for name, value in recipe.plain().items() if name not in _OTHERWISE},
        "data": data,
        "model": model,
        "sources": source_hashes(recipe),
    }
