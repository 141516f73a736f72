"""The run folder: everything that a run leaves, in one place that is never overwritten."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hone.engine.checkpoint import disk_error
from hone.errors import HoneError, nearest
from hone.files import write_whole

JUDGED = ("evaluations.jsonl", "samples.jsonl")  # the logs of evaluations


class RunFolder:
    """Paths and append-only logs of one run.

    recipe.yaml (resolved), manifest.json, metrics.jsonl (a row a step), evaluations.jsonl, samples.jsonl, model/,
    checkpoints/, report.html, result.json (written last, by a finished run).
    """

    def __init__(self, path: Path) -> None:
        """Open the folder at `path`, which exists."""
        self.path = path

    @classmethod
    def create(cls, out: str | None, name: str) -> RunFolder:
        """Make a new run folder.

        Args:
            out: where; None makes runs/NAME-1, -2, ... in the current folder.
            name: name of the recipe.

        Raises:
            HoneError: `out` exists already and is not empty.
        """
        path = _next_free(Path("runs"), name) if out is None else Path(out).expanduser()
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise HoneError(
                f"the run folder '{path}' exists already, and nothing is ever overwritten. Give another one with "
                f"--set out=FOLDER, or go on with that run: hone resume {path}"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(error, path) from error
        return cls(path)

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

    def write(self, name: str, content: str | dict[str, Any]) -> Path:
        """Write a small file atomically: to a temporary name, fsynced, renamed."""
        path = self.path / name
        text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        try:
            write_whole(path, text.encode())
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
