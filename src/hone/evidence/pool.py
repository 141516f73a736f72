"""Where cells are computed: processes of this machine, as many as its cores, GPUs and memory allow."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Protocol

from hone.evidence.cells import OUT_OF_MEMORY, Job

HEADROOM = 0.8  # share of the free memory that cells may take
_STARTING = threading.Lock()  # a start changes what belongs to the whole process: its environment and main module
Tick = Callable[[Sequence[Job], int], None]


class Interrupted(Exception):
    """The user stopped the comparison; what has begun can go on."""


class Pool(Protocol):
    """What computes cells."""

    def width(self, peak: int, jobs: int) -> int:
        """Return how many cells run at a time.

        Args:
            peak: most bytes that one of them holds.
            jobs: how many there are.
        """

    def threads(self, width: int) -> int:
        """Return the threads of each of so many cells."""

    def run(self, jobs: Sequence[Job], width: int, tick: Tick) -> None:
        """Compute cells; each is done when this returns.

        Args:
            jobs: prepared cells.
            width: how many run at a time.
            tick: called now and then with the running cells and the number of finished ones.

        Raises:
            Interrupted: the user stopped it.
        """


class LocalPool:
    """Processes of this machine, forked from one that has imported torch already (an import takes 3 to 5 s)."""

    def __init__(self, most: int | None = None) -> None:
        """Make a pool.

        Args:
            most: cells at a time; None takes what cores, GPUs and memory allow.
        """
        self.most = most
        self.gpus = _visible_gpus()

    def width(self, peak: int, jobs: int) -> int:
        """Return how many cells run at a time: one per GPU, or as many as cores and memory allow.

        Args:
            peak: most bytes that one of them holds.
            jobs: how many there are.
        """
        if self.gpus:
            limit = len(self.gpus)
        else:
            fitting = int(HEADROOM * free_memory() / peak) if peak else cores()
            limit = min(cores(), max(1, fitting))
        return max(1, min(jobs, self.most or limit))

    def threads(self, width: int) -> int:
        """Return the threads of each of so many cells: an equal share of the cores, no more than OMP_NUM_THREADS.

        Whoever sets that variable shares the machine with others: two threads of a small network beside one other busy
        process wait for each other, and took 25 times as long as one thread.

        Args:
            width: how many cells run at a time.
        """
        share = max(1, cores() // width)
        asked = os.environ.get("OMP_NUM_THREADS", "")
        return min(share, int(asked)) if asked.isdigit() and int(asked) > 0 else share

    def run(self, jobs: Sequence[Job], width: int, tick: Tick) -> None:
        """Compute cells, `width` at a time.

        Args:
            jobs: prepared cells.
            width: how many run at a time.
            tick: called now and then with the running cells and the number of finished ones.

        Raises:
            Interrupted: the user stopped it; cells that were running have saved their state.
        """
        running: dict[BaseProcess, tuple[Job, int]] = {}
        with orderly(lambda: _stop(list(running))):
            self._run(list(jobs), running, width, tick)

    def _run(self, waiting: list[Job], running: dict[BaseProcess, tuple[Job, int]], width: int, tick: Tick) -> None:
        finished = 0
        while waiting or running:
            while waiting and len(running) < width:
                slot = min(set(range(width)) - {place for _, place in running.values()})
                job = waiting.pop(0)
                running[self._start(job, width, slot)] = job, slot
            tick([job for job, _ in running.values()], finished)
            wait([process.sentinel for process in running], timeout=1.0)
            for process in [process for process in running if not process.is_alive()]:
                process.join()
                job, _ = running.pop(process)
                finished += 1
                _close(job, process.exitcode or 0)

    def _start(self, job: Job, width: int, slot: int) -> BaseProcess:
        gpu = self.gpus[slot % len(self.gpus)] if self.gpus else None
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["hone.evidence.warm"])
        # The variables are read by the server: `work` sets torch's own number of threads.
        with _STARTING, _environment(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"), _empty_main():
            place = (str(job.folder.absolute()), os.getcwd())
            process = context.Process(target=_child, args=(place, self.threads(width), gpu, dict(os.environ)))
            process.start()
        return process


@contextlib.contextmanager
def orderly(stop: Callable[[], None]) -> Iterator[None]:
    """Leave nothing running behind, and say so with `Interrupted` where the user stopped it.

    Args:
        stop: lets what runs save its state, and waits for its end.

    Raises:
        Interrupted: the user stopped it.
    """
    try:
        with _terminable():
            yield
    except KeyboardInterrupt:
        stop()
        raise Interrupted from None
    finally:
        stop()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM, which schedulers and service managers send, stop in as orderly a way as Ctrl-C does."""
    try:
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread: the caller looks after signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _child(place: tuple[str, str], threads: int, gpu: str | None, environment: dict[str, str]) -> None:
    """Compute the cell of a folder, from the user's own folder, in a process that ends with its parent."""
    folder, here = place
    os.chdir(here)  # the server may have been started elsewhere
    os.environ.update({name: value for name, value in environment.items() if name.startswith("HONE_")})
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # CUDA is started later than this
    log = os.open(Path(folder) / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()
    from hone.evidence.cells import work

    work(Path(folder), threads)


def _end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _close(job: Job, status: int) -> None:
    """Note how a process ended that has left neither a result nor a reason."""
    if job.done or status == 130:
        return
    if status < 0:
        name = signal.Signals(-status).name
        hint = f": probably {OUT_OF_MEMORY}" if -status == signal.SIGKILL else ""
        job.fail(f"its process was ended by {name}{hint}")
    else:
        job.fail(f"its process ended with status {status} (see {job.folder / 'log.txt'})")


def _stop(processes: Sequence[BaseProcess], patience: float = 60.0) -> None:
    """Ask processes to save their state and end, and wait for them."""
    for process in processes:
        if process.is_alive():
            process.terminate()
    end = time.monotonic() + patience
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


@contextlib.contextmanager
def _environment(**settings: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _empty_main() -> Iterator[None]:
    """Keep children from running the user's script once more, of which they need nothing."""
    before = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = before


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Return the bytes of memory that are free, or all there are where the system does not say."""
    path = Path("/proc/meminfo")
    if path.exists():
        line = next((line for line in path.read_text().splitlines() if line.startswith("MemAvailable:")), "")
        if line:
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _visible_gpus() -> list[str]:
    """Return the GPUs that a child may be given, by the names that CUDA_VISIBLE_DEVICES takes."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None and torch.cuda.device_count():
        return [name for name in named.split(",") if name]
    return [str(index) for index in range(torch.cuda.device_count())]
