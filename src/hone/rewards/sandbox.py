"""Running Python that a model has written, shut in, and proving first that it is.

An answer's code runs in a process of its own (`jail.py`), which gets the answer and the inputs of its tests, and gives
back what the answer made of them. **The expected values never enter that process**: they are compared here. So whatever
foreign code does to its own process (replace builtins, trace, print success, exit with 0, write results itself), it can
only give answers, and right answers are what is asked for.

Four things are kept from it, each by at least one layer that was seen to hold on this machine: the network (seccomp,
a network namespace), files (Landlock, a mount namespace), other processes and starting any (seccomp), and memory
(limits). `prove` tries escapes against each layer alone, after it has seen the same ones succeed without the layer,
and then against all together; where one of the four is not kept, nothing runs. Beyond that: no environment, no
descriptor but the channel for results, no writing of files at all, not even of empty ones; limits on processor time,
wall time, output and open files; the whole process group is killed at the end of each run.

Not guaranteed: that the kernel has no holes; a virtual machine around it all is the next layer. Where namespaces are
not to be had (in most containers), names and sizes of files outside can be asked for, though nothing in them. Counts of
executed lines are made inside the process, so that code that sets out to can report fewer; processor time is measured
from outside. Answers near a limit of time may pass once and fail another time.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hone.errors import HoneError

LAYERS = ("namespaces", "landlock", "seccomp", "limits")
CODE = Path(__file__).parent / "jail.py"
MIB, KIB = 2**20, 2**10
ADVICE = (
    "Needed are Linux on x86-64 or ARM64 with seccomp, and either Landlock (kernel 5.13 or later, with 'landlock' in "
    "the list in /sys/kernel/security/lsm) or user namespaces for ordinary users (sysctl user.max_user_namespaces "
    "above 0; on Ubuntu also kernel.apparmor_restrict_unprivileged_userns=0). In a container, its seccomp profile must "
    "let through the calls of one of them"
)


@dataclass(frozen=True)
class Limits:
    """What a run may use.

    Args:
        seconds: processor time for all tests together, in seconds; the kernel ends the process at the next whole one.
        wall: time on the clock, in seconds.
        memory: beside what the interpreter needs, in MiB.
        output: of all results together, and printed by a program, in KiB.
    """

    seconds: float = 2.0
    wall: float = 10.0
    memory: int = 256
    output: int = 256


@dataclass(frozen=True)
class Ran:
    """What came of a run.

    Args:
        compiled: whether the code is Python at all.
        results: per test what it gave: "value" of a call or "output" of a program, else "error".
        seconds: processor time of the answer, without what the sandbox itself took.
        lines: lines of the answer that were executed, None where they were not counted.
        ended: why it ended early, "" where it came to its end.
    """

    compiled: bool
    results: tuple[dict[str, Any], ...]
    seconds: float
    lines: int | None = None
    ended: str = ""


@dataclass(frozen=True)
class Proof:
    """What was seen to hold on this machine.

    Args:
        layers: those that can be put on.
        holds: the layers that keep each thing: "network", "files", "processes", "memory".
        refused: why others cannot be put on.
    """

    layers: tuple[str, ...]
    holds: dict[str, list[str]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


class Refused(HoneError):
    """A layer of the sandbox cannot be put on here."""


def run(code: str, tests: Sequence[dict[str, Any]], limits: Limits, *, count: bool = False) -> Ran:
    """Run an answer on the inputs of its tests, shut in by every layer of this machine.

    Args:
        code: the answer.
        tests: {"call": name, "args": [...], "kwargs": {...}}, {"call": name, "literals": "([...], {...})"}, whose value
            comes back `packed`, or {"input": text}; without what is expected.
        limits: what it may use.
        count: count the lines that are executed, which takes several times as long.

    Raises:
        HoneError: the sandbox does not hold here.
    """
    return run_in(prove().layers, code, tests, limits, count=count)


def run_in(
    layers: Sequence[str], code: str, tests: Sequence[dict[str, Any]], limits: Limits, *, count: bool = False
) -> Ran:
    """Run code in some layers alone; only `prove` does so with code of its own.

    Args:
        layers: names out of `LAYERS`.
        code: the answer.
        tests: as for `run`.
        limits: what it may use.
        count: count the lines that are executed.

    Raises:
        Refused: a layer cannot be put on, or the interpreter does not start.
    """
    settings = {
        "layers": list(layers), "library": sysconfig.get_path("stdlib"), "seconds": limits.seconds,
        "memory": limits.memory * MIB, "output": limits.output * KIB,
    }  # fmt: skip
    with tempfile.TemporaryFile() as job:
        job.write(json.dumps({"code": code, "tests": list(tests), "count": count}).encode("utf-8", "replace"))
        job.seek(0)
        process = subprocess.Popen(
            [os.path.realpath(sys.executable), "-sSPB", "-X", "utf8", str(CODE), json.dumps(settings)], stdin=job,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={"PYTHONHASHSEED": "0"}, cwd="/",
            start_new_session=True,
        )  # fmt: skip
    said, ended = _listen(process, limits)
    used = _finish(process)
    return _outcome(said, ended, used, len(tests), limits, process.returncode)


def _listen(process: subprocess.Popen[bytes], limits: Limits) -> tuple[bytes, str]:
    """Return what a process says until it ends, is late or says too much, and which of those it was."""
    end, said, stream = time.monotonic() + limits.wall, b"", process.stdout
    assert stream is not None
    most = (limits.output + 64) * KIB
    with selectors.DefaultSelector() as selector, stream:
        selector.register(stream, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0:
            if not selector.select(left):
                continue
            if not (piece := os.read(stream.fileno(), 65536)):
                break
            if len(said := said + piece) > most:
                return said[:most], "output"
        else:
            return said, "time"
    while os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
        if time.monotonic() > end:  # it closed the channel and goes on
            return said, "time"
        time.sleep(0.002)
    return said, ""


def _finish(process: subprocess.Popen[bytes]) -> float:
    """Kill whatever is left of a process's group, and return the processor time it took, in seconds."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return used.ru_utime + used.ru_stime


def _outcome(said: bytes, ended: str, used: float, tests: int, limits: Limits, code: int) -> Ran:
    """Return what was said, of each kind the first; nothing in it is trusted to be well formed."""
    heard: dict[str, dict[str, Any]] = {}
    results: dict[int, dict[str, Any]] = {}
    for record in _records(said):
        if isinstance(number := record.get("test"), int) and not isinstance(number, bool):
            results.setdefault(number, record)
        for name in ("refused", "started", "compiled", "done"):
            if name == "refused" and "started" in heard:
                continue  # once it has started, only the program under test says so
            if name in record:
                heard.setdefault(name, record)
    if "refused" in heard:
        raise Refused(str(heard["refused"]["refused"]))
    if "started" not in heard:
        return _unheard(ended, tests, code)
    spent = max(0.0, used - float(heard["started"]["started"]))
    if not ended and spent > limits.seconds:
        ended = "time"
    lines = heard.get("done", {}).get("lines")
    if not ended and "done" not in heard and heard.get("compiled", {}).get("compiled") is not False:
        ended = f"exit code {code}"
    missing = {"error": f"ended early: {ended or 'no result'}"}
    return Ran(
        compiled=heard.get("compiled", {}).get("compiled") is True,
        results=tuple(results.get(i, missing) for i in range(tests)), seconds=spent,
        lines=lines if isinstance(lines, int) and not isinstance(lines, bool) and lines >= 0 else None, ended=ended,
    )  # fmt: skip


def _unheard(ended: str, tests: int, code: int) -> Ran:
    """Return what came of a run that never began: on a busy machine its time may be up before."""
    if ended != "time":
        raise Refused(f"{sys.executable}: the interpreter did not start inside the sandbox (exit code {code})")
    missing = {"error": f"ended early: {ended}"}
    return Ran(compiled=True, results=(missing,) * tests, seconds=0.0, ended=ended)  # nothing says it is no Python


def _records(said: bytes) -> Iterator[dict[str, Any]]:
    for line in said.split(b"\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            yield record


PROBES = """
import os

def read(path):
    with open(path) as file:
        return file.read()

def write(path):
    with open(path, "w") as file:
        file.write("escaped")

def connect(port):
    import socket
    socket.create_connection(("127.0.0.1", port), 1).close()

def send(port):
    import socket
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
        end.sendto(b"escaped", ("127.0.0.1", port))

def signal(process):
    os.kill(process, 0)

def fork():
    if not os.fork():
        os._exit(0)
    os.wait()

def allocate(size):
    return len(bytearray(size))
"""
KEEPS = {  # what is kept -> the escapes that must fail, all of them by one layer
    "network": ("connect", "send"), "files": ("read", "write"), "processes": ("signal", "fork"),
    "memory": ("allocate",),
}  # fmt: skip
_proofs: list[Proof] = []
_lock = threading.Lock()


def prove() -> Proof:
    """Return what holds on this machine, tried out once per process.

    Raises:
        HoneError: something is not kept by any layer; the message says what, and what would keep it.
    """
    with _lock:
        if not _proofs:
            _proofs.append(_prove())
    return _proofs[0]


def _prove() -> Proof:
    if sys.platform != "linux":
        raise HoneError(f"model-written programs are shut in with means of Linux, not of {sys.platform}. {ADVICE}")
    with _bait() as tests:
        free = _fails((), tests)
        if free:
            raise HoneError(f"the sandbox cannot be proved here: without it, {', '.join(sorted(free))} fails already")
        refused: dict[str, str] = {}
        kept: dict[str, set[str]] = {}
        for layer in LAYERS:
            try:
                kept[layer] = _fails((layer,), tests)
            except Refused as error:
                refused[layer] = str(error)
        holds = {what: [layer for layer in kept if kept[layer] >= set(KEEPS[what])] for what in KEEPS}
        problems = [what for what, layers in holds.items() if not layers]
        together = set() if problems else _fails(tuple(kept), tests)
        problems = problems or [what for what, escapes in KEEPS.items() if not together >= set(escapes)]
    if problems:
        reasons = "".join(f"\n  {layer}: {why}" for layer, why in refused.items())
        raise HoneError(
            "programs that a model has written run only where they are shut in, and nothing on this machine keeps them "
            f"from: {', '.join(problems)}.{reasons}\n{ADVICE}"
        )
    return Proof(tuple(kept), holds, refused)


@contextmanager
def _bait() -> Iterator[list[dict[str, Any]]]:
    """Lay out what the escapes go for: a file, a place to write, a server, this process, more memory than allowed."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0), backlog=16) as server:
        secret = Path(folder) / "secret"
        secret.write_text("secret")
        given: dict[str, Any] = {
            "read": str(secret), "write": str(Path(folder) / "written"), "connect": server.getsockname()[1],
            "send": server.getsockname()[1], "signal": os.getpid(), "fork": None, "allocate": 400 * MIB,
        }  # fmt: skip
        yield [{"call": name, "args": [] if value is None else [value]} for name, value in given.items()]


def _fails(layers: Sequence[str], tests: list[dict[str, Any]]) -> set[str]:
    """Return the escapes that fail in some layers; those that were not tried have not failed."""
    made = run_in(layers, PROBES, tests, Limits(seconds=20, wall=60, memory=128))
    if made.ended == "time":
        raise Refused("the escapes did not come to their end within 60 s; try again when the machine is less busy")
    return {test["call"] for test, result in zip(tests, made.results, strict=True) if "error" in result}
