"""Running recipes and commands, and reading what they leave."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from hone import Recipe, cli, run


def fields(model: Path, data: Path, out: Path, /, **changes: Any) -> dict[str, Any]:
    """Return the fields of a short recipe that learns the questions of the fixtures."""
    return {
        "model": str(model), "data": {"name": "files", "path": str(data), "holdout": 20}, "objective": "sft",
        "adapter": {"name": "lora", "rank": 4, "dropout": 0.1}, "optimizer": {"name": "adamw", "lr": 2e-2},
        "steps": 12, "batch_tokens": 256, "eval_samples": 2, "max_new_tokens": 6, "precision": "float32",
        "out": str(out), **changes,
    }  # fmt: skip


def train(model: Path, data: Path, out: Path, /, **changes: Any) -> dict[str, Any]:
    """Run that recipe in this process."""
    return run(Recipe.of(**fields(model, data, out, **changes)))


def write_recipe(path: Path, content: Mapping[str, Any]) -> Path:
    """Write fields as a recipe file."""
    path.write_text(yaml.safe_dump(dict(content)))
    return path


@dataclass(frozen=True)
class Outcome:
    """What a command did: its exit status and what it printed."""

    status: int
    out: str
    err: str


def hone(*arguments: str | Path) -> Outcome:
    """Run a command line in this process, through the same door as the `hone` script."""
    before, out, err = sys.argv, io.StringIO(), io.StringIO()
    sys.argv = ["hone", *map(str, arguments)]
    status = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        status = int(stop.code or 0)
    finally:
        sys.argv = before
    return Outcome(status, out.getvalue(), err.getvalue())


def rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def repeatable(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two runs of one recipe must agree on."""
    return {name: value for name, value in row.items() if name not in ("seconds", "memory")}


def files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file of a folder by relative path."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def back_to(run: Path, step: int) -> None:
    """Make a finished run look as if it had been killed soon after the checkpoint of a step."""
    assert (run / "checkpoints" / f"step-{step:08d}").is_dir()
    shutil.rmtree(run / "model")
    (run / "result.json").unlink()
    for path in (run / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors in the safetensors files of a folder."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> Tensor:
    """Return the logits (T, V) of a model of transformers or PEFT."""
    model.eval()
    return model(input_ids=torch.tensor([ids])).logits[0]


@contextlib.contextmanager
def heard(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Let `caplog` hear the notes of the package, which its own handler would keep from it."""
    log = logging.getLogger("hone")
    log.addHandler(caplog.handler)
    try:
        yield
    finally:
        log.removeHandler(caplog.handler)
