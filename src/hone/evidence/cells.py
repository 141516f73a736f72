"""Cells of a comparison: each is a run of its own in a process of its own, found again by what it would compute."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hone import options as opt
from hone.engine.folder import RunFolder, stage_folders
from hone.errors import HoneError
from hone.evidence import source
from hone.files import NO_LOCKS, write_whole
from hone.recipe import DATA_FIELDS, Recipe

Task = Literal["run", "measure"]
_NO_MATTER = ("out", "name", "about", "trackers", "keep", "checkpoint_every")  # what changes no figure of a run
OUT_OF_MEMORY = "out of memory"
TO_READ = "model to read"  # what a cell keeps until its claim has read it


@dataclass(frozen=True)
class Job:
    """A cell that may have to be computed.

    Args:
        task: "run" trains; "measure" measures a few steps.
        label: what it is, for people.
        recipe: what it runs.
        folder: where it lies: cell.json, log.txt, then run/ or measure.json, or failure.json.
        keeps: what stays of a finished run besides its figures: "model", `TO_READ` or nothing.
        begins: folder of the cell whose run is the first stage of this one; None trains it anew.
    """

    task: Task
    label: str
    recipe: Recipe
    folder: Path
    keeps: str = "model"
    begins: Path | None = None

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    def result(self) -> dict[str, Any] | None:
        """Return what the cell found, or None when it has not finished."""
        path = self.run / "result.json" if self.task == "run" else self.folder / "measure.json"
        if not path.exists():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        return None if found.get("status", "finished") != "finished" else found

    def failure(self) -> str:
        """Return why the cell failed, "" when it has not."""
        path = self.folder / "failure.json"
        return json.loads(path.read_text(encoding="utf-8"))["reason"] if path.exists() else ""

    @property
    def begun(self) -> bool:
        """Whether there is a run folder to look into."""
        return (self.run / "recipe.yaml").exists()

    @property
    def done(self) -> bool:
        """Whether there is nothing left to compute."""
        read = self.task == "run" and self.keeps == TO_READ and not any(self.run.glob("**/model"))
        return bool(self.failure()) or (self.result() is not None and not read)

    def prepare(self) -> None:
        """Write down what is to be computed, for the process that does it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        spec = {"task": self.task, "label": self.label, "keeps": self.keeps, "recipe": self.recipe.plain(),
                "begins": None if self.begins is None else str(self.begins)}  # fmt: skip
        write_whole(self.folder / "cell.json", (json.dumps(spec, indent=1) + "\n").encode())

    def fail(self, reason: str) -> None:
        """Write down that the cell failed.

        Args:
            reason: why, in a sentence.
        """
        write_whole(self.folder / "failure.json", (json.dumps({"reason": reason}) + "\n").encode())

    def forget_failure(self) -> None:
        """Let a failed cell be computed again."""
        (self.folder / "failure.json").unlink(missing_ok=True)

    def drop_models(self) -> None:
        """Delete the models of a finished run, which would fill the disk; its figures stay."""
        for model in self.run.glob("**/model"):
            shutil.rmtree(model)


class Store:
    """Where cells lie, shared by all comparisons that compute the same ones."""

    def __init__(self, root: Path) -> None:
        """Open the store.

        Args:
            root: its folder; made when it is missing.
        """
        self.root = root

    def job(self, task: Task, recipe: Recipe, label: str, *, keeps: str = "model", also: str = "") -> Job:
        """Return the cell of a recipe, finished or not.

        Args:
            task: "run" or "measure".
            recipe: what it runs.
            label: what it is, for people; only the first one to compute a cell names its folder.
            keeps: "model", `TO_READ`, or "" to keep the figures alone.
            also: anything else that the figures depend on, such as the number of threads of a timing.
        """
        key = content_key(recipe, f"{task}:{keeps}:{also}")
        slug = re.sub(r"[^A-Za-z0-9.=+]+", "-", f"{recipe.name} {label}").strip("-")[:60]
        job = Job(task, label, recipe, self._find(key) or self.root / f"{slug}-{key}", keeps)
        if job.folder.exists() or keeps == "model":
            return job
        for more in ("model", *([] if keeps else [TO_READ])):  # a finished run that kept more serves as well
            fuller = self._find(content_key(recipe, f"{task}:{more}:{also}"))
            other = None if fuller is None else Job(task, label, recipe, fuller, more if more == "model" else "")
            if other is not None and other.result() is not None and (not keeps or any(other.run.glob("**/model"))):
                return other
        return job

    def _find(self, key: str) -> Path | None:
        return next(self.root.glob(f"*-{key}"), None)


def content_key(recipe: Recipe, also: str = "") -> str:
    """Return a short hash of everything that a run's figures depend on: recipe, data, starting model and code.

    Args:
        recipe: a checked recipe.
        also: anything else.
    """
    plain = {name: value for name, value in recipe.plain().items() if name not in _NO_MATTER}
    parts: set[tuple[str, str]] = set()
    data: list[str] = []
    models: list[list[Any]] = []
    for stage in recipe.staged():
        parts.update((kind, opt.split_spec(kind, spec)[0]) for kind, spec in stage.named())
        data += [stage.build(name).fingerprint() for name in DATA_FIELDS if getattr(stage, name) is not None]
        models += [_model_state(stage), _others(stage)]
    torch = importlib.metadata.version("torch")
    content = [plain, sorted(parts), data, models, source.run_hash(sorted(parts)), torch, also]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _model_state(recipe: Recipe) -> list[Any]:
    """Return names, sizes and times of the files of the starting model: hashing many gigabytes takes too long."""
    from hone.text.loading import shipped_base

    if "stage:" in json.dumps(recipe.model):  # what an earlier stage will have made, and perhaps merged with others
        return [recipe.model, *_files(recipe.model)]
    if opt.split_spec("model", recipe.model)[0] == "merged":  # its name is a hash of what is merged
        return [recipe.build("model").path]
    path = getattr(recipe.build("model"), "path", "")
    folder = shipped_base() if path == "base" else Path(path).expanduser() if path else None
    if folder is None or not folder.is_dir():
        return [path]
    if path == "base":  # an installation gives its files new times
        return [hashlib.sha256((folder / "record.json").read_bytes()).hexdigest()]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(folder.iterdir())]


def _others(recipe: Recipe) -> list[Any]:
    """Return names, sizes and times of the files of other models that a recipe names: rewards, teachers, evaluators."""
    return _files({n: value for n, value in recipe.plain().items() if n not in (*DATA_FIELDS, "model", "out")})


def _files(named: Any) -> list[Any]:
    """Return names, sizes and times of the files of every model that a nested value names."""
    found: list[Any] = []
    for text in sorted(set(_texts(named))):
        path = Path(text).expanduser()
        if os.sep not in text and not (path / "config.json").is_file() and not (path / "recipe.yaml").is_file():
            continue  # a word that happens to be a folder's name here
        path = path / "model" if (path / "recipe.yaml").is_file() else path
        files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
        found += [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return found


def _texts(value: Any) -> Iterator[str]:
    """Yield every string in a nested value that could be a path."""
    if isinstance(value, str) and 0 < len(value) < 4096 and "\n" not in value and "\0" not in value:
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
        yield from _texts(inner)


def values(job: Job, flops: float | None) -> dict[str, float]:
    """Return the figures of a finished run by name.

    Args:
        job: a finished run.
        flops: operations of a step, None when nobody measured them.

    Raises:
        HoneError: a held-out figure is not finite.
    """
    result = job.result() or {}
    after, before = result["after"], result["before"]
    found = {name: float(value) for name, value in after.items()}
    if wrong := [name for name, value in found.items() if not math.isfinite(value)]:
        raise HoneError(f"held-out {wrong[0]} is {found[wrong[0]]} after training")
    if "general_loss" in after and "general_loss" in before:
        found["forgetting"] = after["general_loss"] - before["general_loss"]
    seconds = result["training_seconds"] + result["setup_seconds"]
    found.update(
        training_seconds=seconds, peak_memory=float(result["peak_memory"]), tokens=float(result["tokens"]),
        steps=float(result["steps"]),
    )  # fmt: skip
    if seconds > 0:
        found["tokens_per_second"] = result["tokens"] / seconds
    manifest = next(iter(sorted(job.run.rglob("manifest.json"))), None)
    if manifest is not None:
        found["trained"] = float(json.loads(manifest.read_text(encoding="utf-8"))["model"]["trained"])
    if flops is not None:
        found["flops"] = flops * result["steps"]
    return found


def judged(job: Job, metric: str) -> int:
    """Return how many held-out samples a share is a mean over: answers that the metric judged, else what was held out.

    Args:
        job: a finished run.
        metric: its name.
    """
    folder = RunFolder((stage_folders(job.run) or [job.run])[-1])
    rows = list(folder.rows("samples.jsonl"))
    answered = [row for row in rows if row["step"] == rows[-1]["step"] and row.get(metric) is not None]
    counts = folder.json("manifest.json").get("data", {}).get("eval", {}).get("counts") or {}
    return len(answered) or int(counts.get("kept") or 0)


def work(folder: Path, threads: int) -> None:
    """Compute a prepared cell in this process; a failure is written down, not raised.

    Args:
        folder: of the cell.
        threads: of torch.
    """
    import torch

    torch.set_num_threads(threads)
    with (folder / "lock").open("w") as lock:  # two comparisons may want the same cell: the second finds it done
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        _work(folder)


def _work(folder: Path) -> None:
    import torch

    spec = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
    recipe = Recipe.of(**{**spec["recipe"], "out": None})
    begins = None if spec["begins"] is None else Path(spec["begins"])
    job = Job(spec["task"], spec["label"], recipe, folder, spec["keeps"], begins)
    if job.done:
        return
    try:
        (_train if job.task == "run" else _measure)(job)
    except HoneError as error:
        job.fail(str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        job.fail(f"{OUT_OF_MEMORY}: {str(error).strip().splitlines()[0] if str(error) else type(error).__name__}")
    except Exception as error:
        traceback.print_exc()
        text = str(error).strip().splitlines()
        short = f"{type(error).__name__}: {text[0] if text else ''}"
        memory = "alloc" in short and "memory" in short  # torch on the CPU raises a plain RuntimeError
        job.fail(f"{OUT_OF_MEMORY}: {short}" if memory else f"{short} (the traceback is in {folder / 'log.txt'})")
    if job.failure() and not job.keeps:
        shutil.rmtree(job.run, ignore_errors=True)  # the log says why; a state to go on from is of no use


def _train(job: Job) -> None:
    from hone.engine.progress import Display
    from hone.engine.run import resume, run
    from hone.evidence.beginnings import begin

    recipe = Recipe.of(**{**job.recipe.plain(), "out": str(job.run)})
    under_way = any(job.run.glob("**/checkpoints/step-*"))
    if not under_way:
        if job.run.exists():  # it was stopped before its first checkpoint
            shutil.rmtree(job.run)
        under_way = job.begins is not None and begin(recipe, job.begins / "run")
    result = resume(job.run, Display()) if under_way else run(recipe, Display())
    if result["status"] != "finished":
        raise SystemExit(130)
    for checkpoints in job.run.glob("**/checkpoints"):  # they serve to go on, and nothing is left to do
        shutil.rmtree(checkpoints)
    if not job.keeps:
        job.drop_models()


def _measure(job: Job) -> None:
    from hone.engine.preflight import measure
    from hone.engine.progress import Display

    found = measure(job.recipe, Display()).record()
    write_whole(job.folder / "measure.json", (json.dumps(found, indent=1) + "\n").encode())
