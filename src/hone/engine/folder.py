"""The run folder: everything that a run leaves, in one place that is never overwritten."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hone.engine.checkpoint import disk_error
from hone.engine.progress import log
from hone.errors import HoneError, nearest
from hone.files import NO_LOCKS, hold, let_go, write_whole

JUDGED = ("evaluations.jsonl", "samples.jsonl")  # the logs of evaluations
ROLLOUTS = "rollouts.jsonl"  # the log of phases that the model answers in
LOGS = ("metrics.jsonl", *JUDGED, ROLLOUTS)
LOCK = "lock"


class RunFolder:
    """Paths and append-only logs of one run.

    recipe.yaml (resolved), manifest.json, metrics.jsonl (a row a step), evaluations.jsonl, samples.jsonl,
    rollouts.jsonl, model/, checkpoints/, report.html, result.json (written last, by a finished run), lock (names the
    process that trains in it, empty when none does).
    """

    def __init__(self, path: Path) -> None:
        """Open the folder at `path`, which exists."""
        self.path = path
        self._lock: int | None = None

    @classmethod
    def create(cls, out: str | None, name: str) -> RunFolder:
        """Make a new run folder, and hold it.

        Args:
            out: where; None makes runs/NAME-1, -2, ... in the current folder.
            name: name of the recipe.

        Raises:
            HoneError: `out` exists already and is not empty, or another process has just made it.
        """
        path = _next_free(Path("runs"), name) if out is None else Path(out).expanduser()
        _refuse_taken(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, path) from error
        folder = cls(path)
        folder.hold()
        try:
            _refuse_taken(path)  # another run may have begun, and even ended, since it was looked at
        except HoneError:
            folder.release()
            raise
        return folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Open an existing run folder.

        Raises:
            HoneError: it is missing or has no recipe.yaml.
        """
        folder = Path(path).expanduser()
        if not (folder / "recipe.yaml").is_file():
            near = [p.parent.name for p in folder.parent.glob("*/recipe.yaml")] if folder.parent.is_dir() else []
            hint = nearest(folder.name, near) or (f"runs there: {', '.join(sorted(near))}" if near else "")
            raise HoneError(f"'{folder}' is not a run folder: it has no recipe.yaml" + (f" ({hint})" if hint else ""))
        return cls(folder)

    def hold(self) -> None:
        """Keep other processes from training in this folder, until `release` or the end of this process.

        A stage's folder is held together with the whole run's.

        Raises:
            HoneError: another process trains in it; the message names that process.
        """
        path = (self.path.parent if _is_stage(self.path) else self.path) / LOCK
        try:
            self._lock = hold(path)
            holder = "" if self._lock is not None else path.read_text(encoding="utf-8")
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise disk_error(error, path) from error
            log.warning("%s: this file system knows no locks; see that no second process trains in this folder", path)
            return
        if self._lock is None:
            raise HoneError(
                f"process {holder or 'of an unknown number'} trains in the run folder '{path.parent}', and two would "
                "spoil each other's files. Wait until it has ended, or stop it; a new run can have another folder with "
                "--set out=FOLDER"
            )

    def release(self) -> None:
        """Let other processes train in this folder again."""
        if self._lock is not None:
            let_go(self._lock)
            self._lock = None

    def write(self, name: str, content: str | bytes | dict[str, Any]) -> Path:
        """Write a small file atomically: to a temporary name, fsynced, renamed; a folder in the name is made."""
        path = self.path / name
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n" if isinstance(content, dict) else content
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, text.encode() if isinstance(text, str) else text)
        except OSError as error:
            raise disk_error(error, path) from error
        return path

    def append(self, name: str, row: dict[str, Any]) -> None:
        """Append one JSON line and flush it to the operating system."""
        try:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise disk_error(error, self.path / name) from error

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield the JSON lines of a log; a last line that a kill cut short is passed over."""
        path = self.path / name
        if not path.exists():
            return
        with path.open("rb") as file:  # bytes: a line may be cut inside a character
            for line in file:
                if line.endswith(b"\n"):
                    yield json.loads(line)

    def rewind(self, step: int) -> None:
        """Drop the log rows after `step`, which a resumed run will write again."""
        for name in ("metrics.jsonl", *JUDGED):
            self._keep(name, lambda row: row["step"] <= step)
        self._keep(ROLLOUTS, lambda row: row["step"] < step)  # a phase has the number of the step before its first

    def set_aside(self) -> list[str]:
        """Rename the logs, for a run that starts again; return their new names, which nothing had before."""
        full = [name for name in LOGS if (self.path / name).exists() and (self.path / name).stat().st_size]
        number = 1
        while any((self.path / _numbered(name, number)).exists() for name in LOGS):
            number += 1
        for name in full:
            (self.path / name).rename(self.path / _numbered(name, number))
        return [_numbered(name, number) for name in full]

    def forget(self, step: int) -> None:
        """Drop the evaluation of `step`, which is about to be evaluated again."""
        for name in JUDGED:
            self._keep(name, lambda row: row["step"] != step)

    def _keep(self, name: str, wanted: Callable[[dict[str, Any]], bool]) -> None:
        if (self.path / name).exists():
            kept = [row for row in self.rows(name) if wanted(row)]
            self.write(name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the folder, empty when it is not there."""
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _numbered(name: str, number: int) -> str:
    """Return the name of a log that was set aside, e.g. metrics-1.jsonl."""
    return f"{Path(name).stem}-{number}{Path(name).suffix}"


def stage_folders(path: Path) -> list[Path]:
    """Return the folders of a run's stages in their order; none where it has a single one.

    Args:
        path: the run folder.
    """
    return sorted(path.glob("stage-*"), key=lambda folder: (len(folder.name), folder.name))


def _is_stage(path: Path) -> bool:
    """Return whether a folder is that of one stage of a run."""
    return bool(re.fullmatch(r"stage-\d+", path.name)) and (path.parent / "recipe.yaml").is_file()


def _refuse_taken(path: Path) -> None:
    """Refuse a place for a new run that holds anything, but for the lock of a run that was killed at its very start."""
    if path.exists() and (not path.is_dir() or any(inside.name != LOCK for inside in path.iterdir())):
        raise HoneError(
            f"the run folder '{path}' exists already, and nothing is ever overwritten. Give another one with "
            f"--set out=FOLDER, or go on with that run: hone resume {path}"
        )


def _next_free(root: Path, name: str) -> Path:
    """Make and return the first of ROOT/NAME-1, -2, ... that is not there; runs that start together get one each."""
    number = 1
    while True:
        path = root / f"{name}-{number}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            number += 1
        except OSError as error:
            raise disk_error(error, path) from error
