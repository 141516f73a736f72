"""Checkpoints: state trees as safetensors and JSON, written so that a kill at any instant leaves the last good one.

A checkpoint is staged in a hidden folder, every file is fsynced, their SHA-256 sums are written last, and the folder is
renamed into place. Reading verifies the sums first. Nothing is pickled or unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hone.errors import CheckpointError, HoneError
from hone.files import FULL, beside, reason, sync

SUMS = "checksums.json"


def encode(state: Any, tensors: dict[str, Tensor], at: str = "state") -> Any:
    """Split a state into JSON and tensors.

    Args:
        state: nested dicts, lists, tuples, tensors, numpy arrays, numbers, strings, booleans and None.
        tensors: receives every tensor under its path.
        at: path of `state`.

    Returns:
        What `decode` turns back into an equal state; dictionary keys keep their types.

    Raises:
        TypeError: a value is of another type.
    """
    if isinstance(state, (Tensor, np.ndarray)):
        kind = "tensor" if isinstance(state, Tensor) else "array"
        tensor = state.detach() if isinstance(state, Tensor) else torch.from_numpy(state)
        tensors[at] = tensor.cpu().clone().contiguous()
        return {"$": kind, "at": at}
    if isinstance(state, dict):
        items = [[key, encode(value, tensors, f"{at}.{key}")] for key, value in state.items()]
        if all(isinstance(key, str) and key != "$" for key in state):
            return dict(items)
        return {"$": "dict", "items": items}
    if isinstance(state, (list, tuple)):
        items = [encode(value, tensors, f"{at}.{i}") for i, value in enumerate(state)]
        return {"$": "tuple", "items": items} if isinstance(state, tuple) else items
    if isinstance(state, (np.integer, np.floating)):
        return state.item()
    if state is None or isinstance(state, (bool, int, float, str)):
        return state
    raise TypeError(f"{at}: a state cannot hold {type(state).__name__}")


def decode(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """Invert `encode`."""
    if isinstance(plain, list):
        return [decode(item, tensors) for item in plain]
    if not isinstance(plain, dict):
        return plain
    match plain.get("$"):
        case None:
            return {key: decode(value, tensors) for key, value in plain.items()}
        case "tensor":
            return tensors[plain["at"]]
        case "array":
            return tensors[plain["at"]].numpy()
        case "tuple":
            return tuple(decode(item, tensors) for item in plain["items"])
        case _:
            return {key: decode(value, tensors) for key, value in plain["items"]}


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Yield a staging folder beside `target`; on success it is fsynced, summed and renamed to `target`.

    Raises:
        HoneError: the disk is full or read-only; what was there before is untouched.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with beside(target, "staging") as staging:
            staging.mkdir()
            yield staging
            sums = {p.relative_to(staging).as_posix(): _sum(p) for p in sorted(staging.rglob("*")) if p.is_file()}
            (staging / SUMS).write_text(json.dumps(sums, indent=1))
            for path in [*(p for p in staging.rglob("*")), staging]:
                sync(path)
            _put(staging, target)
            sync(target.parent)
    except (OSError, SafetensorError) as error:  # a full disk under safetensors raises its own class
        if isinstance(error, OSError) or "os error" in str(error):
            raise disk_error(error, target) from error
        raise


def _put(staging: Path, target: Path) -> None:
    """Rename a staged folder to its target; what stands there goes, and comes back when the disk refuses."""
    try:
        staging.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        with beside(target, "old") as old:  # rename cannot replace a full folder: move the old one aside first
            with suppress(FileNotFoundError):  # another process that replaces it has just moved it
                target.rename(old)
            try:
                _put(staging, target)
            except OSError:
                if old.exists() and not target.exists():
                    old.rename(target)
                raise


def disk_error(error: Exception, target: Path) -> HoneError:
    """Return the message for a failed write: why, where, and that what was saved before is intact."""
    said = reason(error, target)
    way_out = " Free some space, then go on with: hone resume RUN" if said.startswith(FULL) else ""
    return CheckpointError(f"{target}: could not be written: {said}. What was saved before is untouched.{way_out}")


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write a state tree into an existing folder as `state.json` and `state.safetensors`."""
    tensors: dict[str, Tensor] = {}
    plain = encode(state, tensors)
    save_file(tensors, folder / "state.safetensors")
    (folder / "state.json").write_text(json.dumps(plain))


def read_state(folder: Path) -> dict[str, Any]:
    """Verify a checkpoint's sums and return its state.

    Raises:
        CheckpointError: a file is missing, was added, or does not match its sum.
    """
    if trouble := damage(folder):
        raise CheckpointError(f"{folder}: {trouble}")
    tensors = load_file(folder / "state.safetensors")
    return decode(json.loads((folder / "state.json").read_text()), tensors)


def damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint folder, or "" when its files match their sums."""
    if not (folder / SUMS).is_file():
        return f"is incomplete: it has no {SUMS}"
    try:
        sums: dict[str, str] = json.loads((folder / SUMS).read_text(encoding="utf-8"))
    except ValueError as error:
        return f"is damaged: {SUMS} cannot be read: {error}"
    for name, expected in sums.items():
        if not (folder / name).is_file():
            return f"is incomplete: {name} is missing"
        if _sum(folder / name) != expected:
            return f"is damaged: {name} does not match its checksum"
    return ""


class Checkpoints:
    """The checkpoints of one run: `step-00000120` folders, pruned to the newest few and the best."""

    def __init__(self, folder: Path, keep: int) -> None:
        """Look after `folder`.

        Args:
            folder: the run's `checkpoints` folder.
            keep: how many recent ones stay; the best one stays as well.
        """
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, oldest first."""
        found = (p.name.removeprefix("step-") for p in self.folder.glob("step-*") if p.is_dir())
        return sorted(int(name) for name in found if name.isdigit())

    def path(self, step: int) -> Path:
        """Return the folder of one step's checkpoint."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: dict[str, Any], best: int | None = None) -> Path:
        """Write the state of a step, then prune.

        Args:
            step: finished optimizer steps.
            state: the state tree.
            best: step whose checkpoint must stay besides the newest ones.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with staged(self.path(step)) as staging:
            write_state(staging, state)
        for old in self.steps()[: -self.keep]:
            if old not in (best, step):
                shutil.rmtree(self.path(old))
        return self.path(step)

    def last_good(self) -> tuple[int, dict[str, Any], list[str]]:
        """Return the newest step whose checkpoint is whole, its state, and what was wrong with newer ones.

        Raises:
            CheckpointError: no checkpoint is whole.
        """
        skipped = []
        for step in reversed(self.steps()):
            if trouble := damage(self.path(step)):
                skipped.append(f"{self.path(step).name} {trouble}")
                continue
            return step, read_state(self.path(step)), skipped
        detail = "; ".join(skipped) or "there is none"
        raise CheckpointError(f"{self.folder}: no checkpoint can be resumed from ({detail})")
