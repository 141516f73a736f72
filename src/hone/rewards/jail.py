"""The program that runs inside the sandbox: it shuts itself in, then runs an answer's code. Started by `sandbox.py`.

It is started as a file, by an interpreter with an empty environment and without site-packages, imports nothing but the
standard library, and gets its job as JSON from the standard input. Each layer is put on by the process itself before
any foreign code runs, and none can be taken off again:

- namespaces: its own users, processes, network (with no device) and files: nothing is there but the standard library,
  read-only, and an empty folder.
- landlock: files can be read below the standard library alone, and none written; no signals to others.
- seccomp: a list of system calls that computing needs, all others fail: no socket, process, thread, signal, mount,
  trace, and no opening of a file for writing.
- limits: time, memory, open files, no core dump.
"""

from __future__ import annotations

import contextlib
import ctypes
import decimal
import fcntl
import hashlib
import importlib.util
import json
import os
import random
import resource
import struct
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

with contextlib.suppress(ImportError):  # libraries that lie outside of the standard library's folder
    import bz2
    import lzma

    PRELOADED = (bz2, lzma)
PRELOADED_TOO = (decimal, hashlib, random, zlib)

ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # its number for seccomp, its column below
CALLS = {  # system calls that are allowed: their numbers on x86-64 and on ARM64, -1 where there is none
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, -1), "fstat": (5, 80), "lstat": (6, -1),
    "poll": (7, -1), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67),
    "readv": (19, 65), "writev": (20, 66), "access": (21, -1), "select": (23, -1), "sched_yield": (24, 124),
    "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "dup2": (33, -1), "nanosleep": (35, 101),
    "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "getcwd": (79, 17), "readlink": (89, -1),
    "gettimeofday": (96, 169), "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179),
    "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177),
    "getppid": (110, 173), "sigaltstack": (131, 132), "gettid": (186, 178), "time": (201, -1), "futex": (202, 98),
    "sched_getaffinity": (204, 123), "getdents64": (217, 61), "restart_syscall": (219, 128),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94),
    "newfstatat": (262, 79), "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72),
    "ppoll": (271, 73), "dup3": (292, 24), "pipe2": (293, 59), "getrandom": (318, 278), "statx": (332, 291),
    "faccessat2": (439, 439),
}  # fmt: skip
OPENAT, IOCTL, FCNTL, PRLIMIT = (257, 56), (16, 29), (72, 25), (302, 261)  # allowed for some arguments
CAPSET, PIVOT_ROOT = (126, 91), (155, 41)
WRITES = 0x1 | 0x2 | 0x40 | 0x200 | 0x2000 | 0x400000  # WRONLY, RDWR, CREAT, TRUNC, ASYNC, TMPFILE
TERMINAL = (0x5401, 0x5413, 0x541B, 0x5450, 0x5451)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONCLEX, FIOCLEX
DESCRIPTOR = (0, 1, 2, 3, 1030)  # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC
EPERM, EACCES = 1, 13
START = 0.5  # seconds of the processor that the start may have taken
NEW = 0x10000000 | 0x20000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x04000000  # user, mount, net, pid, ipc, uts
PRIVATE, BIND, REC, REMOUNT, DETACH = 1 << 18, 4096, 16384, 32, 2
READONLY, NOSUID, NODEV, NOEXEC, RELATIME = 1, 2, 4, 8, 1 << 21
OUTSIDE = ("site-packages", "dist-packages", "test")  # in the standard library's folder, but no part of it

libc = ctypes.CDLL(None, use_errno=True)


def call(result: int, what: str) -> int:
    """Return what a system call returned, or raise its error.

    Args:
        result: negative where it failed.
        what: its name.

    Raises:
        OSError: it failed.
    """
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def column() -> int:
    """Return the machine's column in the tables of system calls.

    Raises:
        OSError: the machine is another one.
    """
    if os.uname().machine not in ARCHITECTURES or sys.maxsize < 2**32:
        raise OSError(f"no table of system calls for {os.uname().machine}")
    return ARCHITECTURES[os.uname().machine][1]


def enter_namespaces(library: str, before: float) -> float:
    """Go on in a process of its own namespaces, whose files are the standard library alone; the old one waits for it.

    Args:
        library: folder of the standard library.
        before: processor time spent so far, in seconds.

    Returns:
        The processor time that the waiting process had spent.
    """
    user, group = os.getuid(), os.getgid()
    call(libc.unshare(NEW), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)
    if child := os.fork():
        for number in range(3):
            os.close(number)
        os.closerange(3, 64)  # the channel too: its end shows that the inner process has ended
        status = os.waitpid(child, 0)[1]
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    die_with_parent()
    _change_root(library)
    return before


def _change_root(library: str) -> None:
    """Make a root of nothing but the standard library and an empty folder, both read-only."""

    def mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
        given = [None if text is None else os.fsencode(text) for text in (source, target, kind)]
        data = None if options is None else options.encode()
        call(libc.mount(*given, ctypes.c_ulong(flags), data), f"mount {target}")

    mount("none", "/", None, REC | PRIVATE)
    source = os.open(library, os.O_PATH)
    root = "/dev"  # any folder that is there everywhere, and that the library does not lie in
    mount("none", root, "tmpfs", NOSUID | NODEV, "size=256k,mode=755")
    inside = root + library
    os.makedirs(inside)
    os.mkdir(f"{root}/work")
    mount(f"/proc/self/fd/{source}", inside, None, BIND | REC)
    for name in OUTSIDE:
        if os.path.isdir(f"{inside}/{name}"):
            mount("none", f"{inside}/{name}", "tmpfs", READONLY | NOSUID | NODEV | NOEXEC, "size=4k")
    kept = os.statvfs(inside).f_flag & (NOSUID | NODEV | NOEXEC)  # flags of the outer mount that may not be lost
    mount("none", inside, None, BIND | REMOUNT | READONLY | NOSUID | NODEV | RELATIME | kept)
    os.close(source)
    mount("none", root, None, BIND | REMOUNT | READONLY | NOSUID | NODEV | NOEXEC)
    os.chdir(root)
    call(libc.syscall(PIVOT_ROOT[column()], b".", b"."), "pivot_root")
    call(libc.umount2(b".", DETACH), "umount")
    os.chdir("/work")


def used_memory() -> int:
    """Return the size of this process in bytes."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def set_limits(seconds: float, memory: int) -> None:
    """Limit time, memory, files and descriptors of this process.

    Args:
        seconds: of the processor; this process has begun to use some, and the kernel counts whole ones.
        memory: size in bytes.
    """
    whole = int(-(-(seconds + START) // 1))
    for name, most in (
        (resource.RLIMIT_CPU, whole), (resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 32), (resource.RLIMIT_NPROC, 0), (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
    ):  # fmt: skip
        resource.setrlimit(name, (most, most))


def restrict_files(library: str) -> None:
    """Put on Landlock: files below the standard library can be read, nothing else can be done with any file.

    Args:
        library: folder of the standard library.
    """
    create, add, restrict = 444, 445, 446
    version = call(libc.syscall(create, None, ctypes.c_size_t(0), 1), "landlock")
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    rules = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = call(libc.syscall(create, rules, ctypes.c_size_t(size), 0), "landlock_create_ruleset")
    read_file, read_dir = 1 << 2, 1 << 3
    for path, allowed in _readable(library, read_file, read_dir):
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("<Qi", allowed, place)
        call(libc.syscall(add, ruleset, 1, rule, 0), "landlock_add_rule")
        os.close(place)
    forbid_gains()
    call(libc.syscall(restrict, ruleset, 0), "landlock_restrict_self")
    os.close(ruleset)


def _readable(library: str, read_file: int, read_dir: int) -> Iterator[tuple[str, int]]:
    yield library, read_dir  # importing looks for names; this shows those of other packages, but not what is in them
    for entry in os.scandir(library):
        if entry.name not in OUTSIDE and not entry.is_symlink():
            yield entry.path, read_file | read_dir if entry.is_dir() else read_file


def forbid_gains() -> None:
    """Make sure that nothing this process runs has more rights than it."""
    call(libc.prctl(38, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")


def drop_capabilities() -> None:
    """Give up all capabilities, which root has, and which the first process of a namespace has."""
    header = struct.pack("Ii", 0x20080522, 0)
    call(libc.syscall(CAPSET[column()], header, struct.pack("6I", *[0] * 6)), "capset")


def die_with_parent() -> None:
    """End this process when the one that started it ends."""
    call(libc.prctl(1, 9, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def filter_calls() -> None:
    """Put on seccomp: system calls that are not in the list fail with "operation not permitted"."""
    program = _program()
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    head = struct.pack("HP", len(program), ctypes.addressof(code))
    forbid_gains()
    call(libc.prctl(22, 2, head, 0, 0), "prctl(PR_SET_SECCOMP)")


def _program() -> list[tuple[int, int, int, int]]:
    """Return the filter in the kernel's byte code: (operation, jump if so, jump if not, operand)."""
    load, equal, any_of, give = 0x20, 0x15, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    number, architecture = 0, 4

    def fail(error: int) -> tuple[int, int, int, int]:
        return give, 0, 0, 0x50000 | error

    def argument(place: int) -> tuple[int, int, int, int]:
        return load, 0, 0, 16 + 8 * place  # its lower half, which is all that the kernel looks at in these calls

    at = column()
    special: list[tuple[int, list[tuple[int, int, int, int]]]] = [
        (OPENAT[at], [argument(2), (any_of, 0, 1, WRITES), fail(EACCES), (give, 0, 0, allow)]),
        (PRLIMIT[at], [argument(0), (equal, 1, 0, 0), fail(EPERM), (give, 0, 0, allow)]),
    ]
    for here, choices in ((IOCTL[at], TERMINAL), (FCNTL[at], DESCRIPTOR)):
        tests = [(equal, len(choices) - i, 0, choice) for i, choice in enumerate(choices)]
        special.append((here, [argument(1), *tests, fail(EPERM), (give, 0, 0, allow)]))
    lines = [(load, 0, 0, architecture), (equal, 1, 0, ARCHITECTURES[os.uname().machine][0]), (give, 0, 0, kill)]
    lines.append((load, 0, 0, number))
    for here, block in special:
        lines += [(equal, 0, len(block), here), *block]
    allowed = [numbers[at] for numbers in CALLS.values() if numbers[at] >= 0]
    lines += [(equal, len(allowed) - i, 0, here) for i, here in enumerate(allowed)]
    return [*lines, fail(EPERM), (give, 0, 0, allow)]


class Channel:
    """The way out: lines of JSON."""

    def __init__(self, number: int, plain: Callable[[object], object]) -> None:
        """Take a descriptor.

        Args:
            number: of the descriptor.
            plain: makes values of JSON of others.
        """
        self.number, self.plain = number, plain

    def say(self, **record: Any) -> None:
        """Write one record.

        Args:
            record: what is said.
        """
        data = json.dumps(record, default=self.plain).encode() + b"\n"
        while data:
            data = data[os.write(self.number, data) :]


def sibling(name: str) -> Any:
    """Return a module that lies beside this file: nothing of the package can be imported by its name here.

    Args:
        name: of the file.
    """
    spec = importlib.util.spec_from_file_location(name, f"{os.path.dirname(os.path.abspath(__file__))}/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    """Take a job, shut this process in, and work."""
    settings, running = json.loads(sys.argv[1]), sibling("answers_run")
    del sys.argv[1:]
    job = json.loads(sys.stdin.buffer.read())
    channel = Channel(fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 10), running.plain)
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.close(null)
    os.environ.clear()
    layer, spent, used = "", 0.0, used_memory()
    try:
        layer = "start"
        die_with_parent()
        if (layer := "namespaces") in settings["layers"]:
            spent = enter_namespaces(settings["library"], time.process_time())
        layer = "capabilities"
        drop_capabilities()
        if (layer := "limits") in settings["layers"]:
            set_limits(settings["seconds"], used + settings["memory"])
        if (layer := "landlock") in settings["layers"]:
            restrict_files(settings["library"])
        if (layer := "seccomp") in settings["layers"]:
            filter_calls()
    except (OSError, ValueError) as error:
        channel.say(refused=f"{layer}: {error}")
        os._exit(3)
    channel.say(started=spent + time.process_time())
    running.work(job, channel, settings["output"])
    os._exit(0)


if __name__ == "__main__":
    main()
