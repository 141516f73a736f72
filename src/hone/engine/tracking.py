"""Trackers beside metrics.jsonl: whatever Accelerate can log to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hone.errors import MissingPackage


class Trackers:
    """A thin line to Accelerate's trackers; with no names it does nothing and imports nothing."""

    def __init__(self, names: Sequence[str], folder: Path, main: bool) -> None:
        """Start the trackers.

        Args:
            names: names of Accelerate's trackers, e.g. ["tensorboard"].
            folder: the run folder; logs lie in its `logs`.
            main: only the main process logs.

        Raises:
            MissingPackage: the package of a tracker is not installed.
        """
        self._trackers: list[Any] = []
        if not names or not main:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        known = {str(name): cls for name, cls in LOGGER_TYPE_TO_CLASS.items()}
        for name in names:  # the recipe's check has refused unknown ones
            cls = known[name]
            needs_folder = {"logging_dir": str(folder / "logs")} if cls.requires_logging_directory else {}
            try:
                tracker = cls(folder.name, **needs_folder)
                if hasattr(tracker, "start"):  # newer releases of Accelerate open the log only now
                    tracker.start()
                self._trackers.append(tracker)
            except (ImportError, NameError) as error:  # Accelerate leaves the name undefined when it is not installed
                raise MissingPackage(name, f"tracker '{name}'", "trackers") from error

    def log(self, row: dict[str, Any], step: int) -> None:
        """Log the numbers of a row."""
        for tracker in self._trackers:
            tracker.log({k: v for k, v in row.items() if isinstance(v, (int, float))}, step=step)

    def close(self) -> None:
        """Flush and close."""
        for tracker in self._trackers:
            tracker.finish()
