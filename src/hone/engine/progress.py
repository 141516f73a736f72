"""Progress with time left: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True, highlight=False, soft_wrap=True)
log = logging.getLogger("hone")


class _ConsoleHandler(logging.Handler):
    """Print the library's warnings above the progress line rather than through it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        console.print(f"{'note' if record.levelno < logging.ERROR else 'error'}: {record.getMessage()}", style="yellow")


def listen() -> None:
    """Send the `hone` logger to the console, once, and silence the bars that transformers draws over it."""
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    if not any(isinstance(handler, _ConsoleHandler) for handler in log.handlers):
        log.addHandler(_ConsoleHandler())
        log.propagate = False


class Display:
    """What a run says while it works. Silent on all processes but the main one."""

    def __init__(self, active: bool = True) -> None:
        """Make a display.

        Args:
            active: whether to say anything.
        """
        self.active = active
        self.live = active and sys.stderr.isatty()
        self._progress: Progress | None = None
        self._task: Any = None
        self._label, self._first = "", 0
        self._total: int | None = None
        self._began = self._last = 0.0

    def say(self, text: str, style: str | None = None) -> None:
        """Print one line."""
        if self.active:
            console.print(text, style=style, markup=False)

    def start(self, label: str, total: int | None, done: int = 0) -> None:
        """Begin a piece of work.

        Args:
            label: what it is.
            total: its units, None when unknown.
            done: units that are finished already.
        """
        self.stop()
        self._label, self._total, self._began, self._first = label, total, time.monotonic(), done
        self._last = self._began
        if self.live:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console,
                transient=True,
            )  # fmt: skip
            self._task = self._progress.add_task(label, total=total, completed=done, note="")
            self._progress.start()

    def update(self, done: int, note: str = "") -> None:
        """Report that `done` units are finished; off a terminal, print a line every 15 seconds."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done, note=note)
        elif self.active and self._label and time.monotonic() - self._last >= 15:
            self._last = time.monotonic()
            self.say(f"{self._label} {done}/{self._total or '?'}{self._left(done)}  {note}")

    def _left(self, done: int) -> str:
        if self._total is None or done <= self._first:
            return ""
        seconds = (time.monotonic() - self._began) / (done - self._first) * (self._total - done)
        return f", {clock(seconds)} left"

    def stop(self) -> None:
        """End the piece of work."""
        self._label = ""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def clock(seconds: float) -> str:
    """Return seconds as "41 s", "3 min 20 s" or "2 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
