"""The sandbox for model-written programs: everything that a program could try to get out fails, and is seen to fail."""

from __future__ import annotations

import json
import os
import platform
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hone.data.sample import Sample
from hone.errors import HoneError
from hone.rewards import sandbox
from hone.rewards.base import Attempt
from hone.rewards.code import Code

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is made of means of Linux")
ALL = ("namespaces", "landlock", "seccomp", "limits")
WAYS = {"all": ALL, "container": ALL[1:], "old-kernel": ("namespaces", "seccomp", "limits")}
FREE = {  # harmless escapes that succeed without the sandbox, which shows that they are escapes
    "passwd": "return open('/etc/passwd').read()",
    "secret": "return open(secret).read()",
    "secret_descriptor": "return os.read(os.open(secret, os.O_RDONLY), 9).hex()",
    "list_folder": "return os.listdir(folder)",
    "list_root": "return 1 / ('etc' in os.listdir('/'))",
    "list_temporary": "return os.listdir('/tmp')",
    "parent_environment": "return open(f'/proc/{parent}/environ', 'rb').read().hex()",
    "parent_command": "return open(f'/proc/{parent}/cmdline').read()",
    "parent_root": "return os.listdir(f'/proc/{parent}/root/')",
    "parent_descriptors": "return os.listdir(f'/proc/{parent}/fd')",
    "own_environment": "return open('/proc/self/environ').read()",
    "own_memory": "return open('/proc/self/mem', 'r+b').fileno()",
    "own_maps": "return open('/proc/self/maps').read()",
    "device": "return open('/dev/zero', 'rb').read(1).hex()",
    "random_device": "return open('/dev/urandom', 'rb').read(1).hex()",
    "write": "return open(folder + '/written', 'w').write('x')",
    "append": "return open(secret, 'a').write('')",
    "make_folder": "os.makedirs(folder + '/made', exist_ok=True)\n    return 1",
    "unnamed_file": "return os.open(folder, os.O_TMPFILE | os.O_RDWR)",
    "temporary_file": "import tempfile\n    return tempfile.mkstemp(dir=folder)[1]",
    "link": "os.symlink(secret, folder + f'/link{os.getpid()}')\n    return 1",
    "hard_link": "os.link(secret, folder + f'/hard{os.getpid()}')\n    return 1",
    "queue": "os.mkfifo(folder + f'/fifo{os.getpid()}')\n    return 1",
    "change_mode": "os.chmod(secret, 0o644)\n    return 1",
    "change_time": "os.utime(secret)\n    return 1",
    "inet": "socket.create_connection(('127.0.0.1', port), 2).close()\n    return 1",
    "datagram": "return socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', port))",
    "server": "socket.create_server(('127.0.0.1', 0)).close()\n    return 1",
    "unix": "socket.socket(socket.AF_UNIX).connect(folder + '/server')\n    return 1",
    "abstract_unix": "socket.socket(socket.AF_UNIX).bind(b'\\0' + os.urandom(8))\n    return 1",
    "pair": "return len(socket.socketpair())",
    "netlink": "return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).fileno()",
    "fork": "if not os.fork():\n        os._exit(0)\n    return os.wait()[1]",
    "shell": "import subprocess\n    return subprocess.run(['/bin/sh', '-c', 'true'], check=True).returncode",
    "system": "return 1 / (os.system('true') == 0)",
    "popen": "return 1 / (os.popen('echo yes').read() == 'yes\\n')",
    "spawn": "return os.waitpid(os.posix_spawn('/bin/true', ['true'], {}), 0)[1]",
    "daemon": "if not os.fork():\n        os.setsid()\n        os._exit(0)\n    return os.wait()[1]",
    "thread": "import threading\n    threading.Thread(target=int).start()\n    return 1",
    "pool": "from multiprocessing import Pool\n    return Pool(1).map(abs, [1])",
    "signal_parent": "os.kill(parent, 0)\n    return 1",
    "signal_by_descriptor": "import fcntl\n    return fcntl.fcntl(os.pipe()[0], 8, parent)",
    "limits_of_parent": "import resource\n    return resource.prlimit(parent, resource.RLIMIT_NOFILE)",
    "priority_of_parent": "return os.setpriority(0, parent, os.getpriority(0, parent)) is None",
    "handle_of_parent": "return os.pidfd_open(parent)",
    "unshare": "return call(272, 0)",
    "memory_file": "return call(319, b'x', 0)",
    "event_file": "return call(290, 0, 0)",
    "watch": "return call(294, 0)",
    "shared_memory": "return call(29, 0, 4096, 0o1600)",
}
BOUND = {  # escapes that are tried inside the sandbox alone
    "home": "return os.listdir('/root') + os.listdir('/home')",
    "parent_memory": "return open(f'/proc/{parent}/mem', 'rb').fileno()",
    "shared_memory_folder": "return open('/dev/shm/escaped', 'w').write('x')",
    "working_folder": "return open('escaped', 'w').write('x')",
    "truncate": "os.truncate(secret, 0)\n    return 1",
    "truncate_by_reading": "return os.open(secret, os.O_RDONLY | os.O_TRUNC)",
    "delete": "os.remove(secret)\n    return 1",
    "rename": "os.rename(secret, secret + '2')\n    return 1",
    "owner": "os.chown(secret, 1000, 1000)\n    return 1",
    "library": "return open(os.__file__, 'a').write('')",
    "bytecode": "import py_compile\n    return py_compile.compile(os.__file__, '/tmp/escaped.pyc', doraise=True)",
    "packages_written": "return open(packages + '/escaped.pth', 'w').write('import os')",
    "packages_read": "return open(packages + '/pydantic/__init__.py').read()",
    "import_hone": "import hone\n    return 1",
    "import_torch": "import torch\n    return 1",
    "import_by_path": "import sys\n    sys.path.insert(0, packages)\n    import numpy\n    return 1",
    "change_root": "os.chroot('/')\n    return 1",
    "raw_socket": "return socket.socket(socket.AF_INET, socket.SOCK_RAW, 1).fileno()",
    "packet_socket": "return socket.socket(socket.AF_PACKET, socket.SOCK_RAW).fileno()",
    "inet6": "return socket.socket(socket.AF_INET6).fileno()",
    "virtual_socket": "return socket.socket(40, socket.SOCK_STREAM).fileno()",
    "names": "return socket.getaddrinfo('example.com', 80)",
    "web": "import urllib.request\n    return urllib.request.urlopen(f'http://127.0.0.1:{port}', timeout=1).read()",
    "execute": "os.execv('/bin/true', ['true'])",
    "execute_python": "import sys\n    os.execv(sys.executable, [sys.executable, '-c', ''])",
    "terminal": "import pty\n    return pty.fork()",
    "own_group": "os.setsid()\n    return 1",
    "signal_all": "os.kill(-1, 0)\n    return 1",
    "user": "os.setuid(0)\n    return 1",
    "more_memory": "import resource\n    return resource.setrlimit(resource.RLIMIT_AS, (-1, -1)) is None",
    "more_time": "import resource\n    return resource.setrlimit(resource.RLIMIT_CPU, (99, 99)) is None",
    "more_files": "import resource\n    return resource.setrlimit(resource.RLIMIT_FSIZE, (99, 99)) is None",
    "many_descriptors": "return len([os.dup(0) for _ in range(40)])",
    "standard_input": "return 1 / len(os.read(0, 10))",
    "processors": "os.sched_setaffinity(parent, {0})\n    return 1",
}
NUMBERS = {  # system calls by their numbers on x86-64; none may even be tried by root without a sandbox
    "socket": 41, "clone": 56, "vfork": 58, "execve": 59, "kill": 62, "ptrace": 101, "syslog": 103, "personality": 135,
    "pivot_root": 155, "acct": 163, "settimeofday": 164, "mount": 165, "umount": 166, "swapon": 167, "reboot": 169,
    "sethostname": 170, "iopl": 172, "init_module": 175, "delete_module": 176, "quotactl": 179, "tkill": 200,
    "tgkill": 234, "mq_open": 240, "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250,
    "splice": 275, "vmsplice": 278, "move_pages": 279, "perf_event_open": 298, "fanotify_init": 300,
    "name_to_handle_at": 303, "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311,
    "kcmp": 312, "finit_module": 313, "seccomp": 317, "kexec_file_load": 320, "bpf": 321, "execveat": 322,
    "userfaultfd": 323, "io_uring_setup": 425, "io_uring_enter": 426, "open_tree": 428, "move_mount": 429,
    "fsopen": 430, "clone3": 435, "openat2": 437, "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442,
    "landlock_create_ruleset": 444, "memfd_secret": 447, "x32 write": 0x40000001, "x32 execve": 0x40000208,
}  # fmt: skip
HEAD = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *arguments):
    made = libc.syscall(ctypes.c_long(number), *arguments)
    if made < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return made
"""


def program(escapes: dict[str, str]) -> str:
    """Return code with a function for each escape; one that comes back without raising has got out."""
    return HEAD + "".join(
        f"def {name}(secret, folder, packages, port, parent):\n    {body}\n" for name, body in escapes.items()
    )


@pytest.fixture(scope="module")
def bait(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Any]]:
    """A file with a secret, its folder with a socket in it, the installed packages, a server's port, this process."""
    folder = tmp_path_factory.mktemp("bait")
    (folder / "secret").write_text("the secret")
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(os.path.relpath(folder / "server"))
        unix.listen(64)
        os.environ["HONE_SECRET"] = "in the environment"
        packages = sysconfig.get_path("purelib")
        yield [str(folder / "secret"), str(folder), packages, server.getsockname()[1], os.getpid()]
        del os.environ["HONE_SECRET"]


def attempt(layers: tuple[str, ...], escapes: dict[str, str], bait: list[Any]) -> dict[str, dict[str, Any]]:
    tests = [{"call": name, "args": bait} for name in escapes]
    limits = sandbox.Limits(seconds=20, wall=60, memory=128)
    ran = sandbox.run_in(layers, program(escapes), tests, limits)
    assert ran.compiled and not ran.ended, ran
    return dict(zip(escapes, ran.results, strict=True))


@pytest.fixture(scope="module", params=WAYS)
def tried(request: pytest.FixtureRequest, bait: list[Any]) -> dict[str, dict[str, Any]]:
    """What came of all escapes in one process, for one way to be shut in."""
    refused = sandbox.prove().refused
    if missing := [layer for layer in WAYS[request.param] if layer in refused]:
        pytest.skip(f"this machine has no {missing[0]}")
    return attempt(WAYS[request.param], FREE | BOUND, bait)


@pytest.mark.parametrize("name", FREE | BOUND)
def test_an_escape_fails(tried: dict[str, dict[str, Any]], name: str) -> None:
    assert "error" in tried[name] and "value" not in tried[name], tried[name]


def test_the_bait_is_as_it_was(tried: dict[str, dict[str, Any]], bait: list[Any]) -> None:
    assert Path(bait[0]).read_text() == "the secret"
    made = {"written", "made", "link", "hard", "fifo"}
    assert not [path for path in os.listdir(bait[1]) if path.rstrip("0123456789") in made]
    assert not Path(bait[2], "escaped.pth").exists() and not Path("/dev/shm/escaped").exists()


def test_the_same_escapes_succeed_without_the_sandbox(tmp_path: Path, bait: list[Any]) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("the numbers of some calls are those of x86-64")
    (tmp_path / "secret").write_text("another secret")
    (tmp_path / "server").symlink_to(Path(bait[1]) / "server")
    got = attempt((), FREE, [str(tmp_path / "secret"), str(tmp_path), *bait[2:]])
    held = {name: result["error"] for name, result in got.items() if "error" in result}
    assert len(held) <= 8, held  # a container may hold some of them back itself
    assert not held.keys() & {"secret", "write", "inet", "datagram", "fork", "signal_parent"}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86-64")
@pytest.mark.parametrize("way", WAYS)
def test_system_calls_outside_of_the_list_fail(way: str, bait: list[Any]) -> None:
    if set(WAYS[way]) & set(sandbox.prove().refused):
        pytest.skip("this machine has not all of these layers")
    escapes = {f"n{i}": f"return call({number}, 0, 0, 0, 0, 0, 0)" for i, number in enumerate(NUMBERS.values())}
    got = attempt(WAYS[way], escapes, bait)
    for name, result in zip(NUMBERS, got.values(), strict=True):
        assert "[Errno 1]" in result.get("error", ""), (name, result)


def run(code: str, tests: list[dict[str, Any]] | None = None, **limits: Any) -> sandbox.Ran:
    given = {"seconds": 1.0, "wall": 3.0, **limits}
    return sandbox.run(code, tests or [{"call": "f"}], sandbox.Limits(**given))


def took(code: str, **limits: Any) -> tuple[sandbox.Ran, float]:
    begun = time.monotonic()
    return run(code, **limits), time.monotonic() - begun


def test_calls_of_32_bits_kill() -> None:
    if platform.machine() != "x86_64":
        pytest.skip("machine code of x86-64")
    code = (
        "import ctypes, mmap\n"
        "def f():\n"
        "    page = mmap.mmap(-1, 4096, prot=7)\n"
        "    page.write(bytes.fromhex('b814000000cd80c3'))\n"  # mov eax, getpid; int 0x80; ret
        "    return ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()\n"
    )
    assert "value" not in run(code).results[0]


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "import signal\n    signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n    while True: pass",
        "sum(range(10**12))",
        "pow(7, 10**8)",
        "while True:\n        try:\n            while True: pass\n        except BaseException: pass",
    ],
)
def test_endless_work_is_ended(body: str) -> None:
    ran, seconds = took(f"def f():\n    {body}", seconds=0.4, wall=20)
    assert ran.ended and "error" in ran.results[0] and seconds < 15


@pytest.mark.parametrize(
    "body",
    ["import time\n    time.sleep(60)", "import os, time\n    os.closerange(0, 64)\n    time.sleep(60)",
     "import signal, time\n    for n in range(1, 20):\n        try: signal.signal(n, signal.SIG_IGN)\n"
     "        except OSError: pass\n    time.sleep(60)"],
)  # fmt: skip
def test_waiting_is_ended(body: str) -> None:
    ran, seconds = took(f"def f():\n    {body}", wall=2)
    assert ran.ended == "time" and "error" in ran.results[0] and 1.5 < seconds < 6


@pytest.mark.parametrize(
    "body",
    ["return len(bytearray(10**10))", "x = []\n    while True: x.append(bytearray(10**6))",
     "x = 'a'\n    while True: x += x", "import mmap\n    return len(mmap.mmap(-1, 10**10))",
     "return len([0] * 10**10)"],
)  # fmt: skip
def test_memory_is_limited(body: str) -> None:
    assert "value" not in run(f"def f():\n    {body}", seconds=5, wall=10, memory=64).results[0]


def test_processes_cannot_multiply() -> None:
    ran = run("import os\nmade = 0\nfor _ in range(200):\n    try:\n        os.fork()\n        made += 1\n"
              "    except OSError: pass\ndef f():\n    return made")  # fmt: skip
    assert ran.results[0]["value"] == 0


def test_the_disk_cannot_be_filled() -> None:
    code = ("import os\ndef f():\n    made = 0\n    for folder in ('.', '/tmp', '/work', '/dev/shm', '/var/tmp'):\n"
            "        for n in range(3):\n            try:\n"
            "                with open(f'{folder}/f{n}', 'wb') as file: made += file.write(bytes(10**6))\n"
            "            except OSError: pass\n    return made")  # fmt: skip
    assert run(code).results[0]["value"] == 0


@pytest.mark.parametrize(
    "body",
    ["return 'a' * 10**8", "import os\n    while True:\n        for n in range(32):\n"
     "            try: os.write(n, b'x' * 65536)\n            except OSError: pass"],
)  # fmt: skip
def test_output_is_limited(body: str) -> None:
    ran = run(f"def f():\n    {body}", output=64, memory=512, seconds=3, wall=10)
    assert "value" not in ran.results[0] and ran.ended in ("output", "time")


def test_a_program_may_print_only_so_much() -> None:
    ran = run("while True: print('x' * 1000)", [{"input": ""}], output=64)
    assert "printed too much" in ran.results[0]["error"]


def test_nothing_of_the_caller_is_inside() -> None:
    os.environ["HONE_SECRET_TOO"] = "in the environment"
    try:
        ran = run(
            "import os, sys\n"
            "def f():\n    return dict(os.environ), sys.argv, os.getcwd()\n"
            "def g():\n    import gc\n"
            "    return any('HONE_SECRET_TOO' in one for one in gc.get_objects() if isinstance(one, dict))\n"
            "def h():\n    found = []\n    for n in range(64):\n        try: found.append(os.fstat(n).st_mode)\n"
            "        except OSError: pass\n    return len(found)\n",
            [{"call": "f"}, {"call": "g"}, {"call": "h"}],
        )
    finally:
        del os.environ["HONE_SECRET_TOO"]
    environment, arguments, _ = ran.results[0]["value"]
    assert environment == {} and len(arguments) == 1 and ran.results[1]["value"] is False
    assert ran.results[2]["value"] == 4  # three times nothing, and the channel for results


def test_no_process_stays_behind() -> None:
    before = {int(name) for name in os.listdir("/proc") if name.isdigit()}
    took("import time\ndef f():\n    time.sleep(60)", wall=1, seconds=1.37)  # tells it from those of other tests
    left = {int(name) for name in os.listdir("/proc") if name.isdigit()} - before
    mine = [name for name in left if b"1.37" in read(f"/proc/{name}/cmdline")]
    assert not mine


def read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


# What a program says of itself counts for nothing: the expected values are compared outside.


def worth(code: str, tests: list[Any]) -> float:
    sample = Sample(kind="prompt", prompt="p", extra={"tests": tests}, where="here:1")
    return Code(seconds=1, wall=3).score([Attempt(sample, code)], None)[0]  # type: ignore[arg-type]


NEEDLE = "needle-6f1d"
TEST = [{"call": "f", "args": [7], "expected": NEEDLE}]
ASSERTED = [f"assert f(7) == {NEEDLE!r}"]
FORGED = json.dumps({"test": 0, "value": "passed", "output": "passed", "passed": True, "ok": True, "done": True}) + "\n"
CHEATS = {
    "exit code": "import os\nos._exit(0)",
    "leaving": "import sys\nsys.exit(0)",
    "leaving inside": "def f(x):\n    raise SystemExit(0)",
    "success printed": f"print({FORGED!r})\ndef f(x):\n    print('PASSED', {FORGED!r})",
    "success on every descriptor": f"""
import os
for n in range(64):
    try: os.write(n, {FORGED.encode()!r})
    except OSError: pass
os._exit(0)
""",
    "refusal on every descriptor": """
import os
for n in range(64):
    try: os.write(n, b'\\n{"refused": "seccomp: not here"}\\n')
    except OSError: pass
def f(x): return 1
""",
    "equal to everything": """
class E(str):
    def __eq__(self, other): return True
    __hash__ = str.__hash__
def f(x): return E('x')
""",
    "builtins replaced": """
import builtins, json
builtins.all = builtins.isinstance = lambda *a: True
json.dumps = lambda *a, **k: '{"test": 0, "passed": true}'
def f(x): return 1
""",
    "modules replaced": """
import sys
for name in list(sys.modules): sys.modules[name] = None
def f(x): return 1
""",
    "at the end": f"""
import atexit, os
atexit.register(lambda: os.write(10, {FORGED.encode()!r}))
def f(x): return 1
""",
    "traced": f"""
import os, sys
sys.settrace(lambda *a: os.write(10, {FORGED.encode()!r}) and None)
def f(x): return 1
""",
    "driver's frame": """
import sys
def f(x):
    frame = sys._getframe()
    while frame:
        frame.f_globals['work'] = frame.f_globals['plain'] = lambda *a: None
        frame = frame.f_back
    return 1
""",
    "tests looked for in memory": """
import gc, sys
def f(x):
    seen, todo, frame = set(), [sys.modules, gc.get_objects()], sys._getframe()
    while frame:
        todo += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    while todo and len(seen) < 300000:
        one = todo.pop()
        if id(one) in seen: continue
        seen.add(id(one))
        if type(one) is str and one.startswith('nee' + 'dle-'): return one
        if type(one) is dict: todo += [*one.keys(), *one.values()]
        elif type(one) in (list, tuple, set): todo += list(one)
    return 1
""",
}


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_is_worth_nothing(name: str) -> None:
    assert worth(CHEATS[name], TEST) == 0 == worth(CHEATS[name], ASSERTED)


def test_the_first_answer_counts() -> None:
    many = "\n".join(f'    os.write(n, b\'{{"test": 0, "value": {guess}}}\\n\')' for guess in range(9))
    code = f"import os\nfor n in range(3, 32):\n  try:\n{many}\n  except OSError: pass\ndef f(x): return 5"
    assert worth(code, [{"call": "f", "args": [1], "expected": 5}]) == 0


def test_right_answers_pass_in_every_way() -> None:
    code = "def f(x):\n    return x + 1"
    for layers in (ALL[:0], *WAYS.values()):
        if not set(layers) & set(sandbox.prove().refused):
            ran = sandbox.run_in(layers, code, [{"call": "f", "args": [1]}], sandbox.Limits())
            assert ran.results[0]["value"] == 2 and not ran.ended


def test_the_standard_library_is_there() -> None:
    names = "bisect collections csv dataclasses datetime decimal fractions functools hashlib heapq itertools json math"
    names += " operator queue random re statistics string textwrap typing unicodedata zlib bz2 lzma"
    ran = run(f"import {', '.join(names.split())}\ndef f(): return statistics.mean([1, 2, 3])", seconds=5)
    assert ran.results[0].get("value") == 2, ran


def test_many_run_at_once() -> None:
    made: list[Any] = []
    threads = [
        threading.Thread(target=lambda n=n: made.append((n, run(f"def f(): return {n}").results[0]["value"])))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(made) == [(n, n) for n in range(8)]


def test_what_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_proofs", [])
    monkeypatch.setattr(sandbox, "LAYERS", ("limits",))
    with pytest.raises(HoneError, match=r"keeps them from: network, files, processes\.(.|\n)*Landlock"):
        Code().setup(None)
    monkeypatch.setattr(sandbox, "LAYERS", ("landlock", "limits"))
    with pytest.raises(HoneError, match="network, processes"):
        worth("def f(x): return 1", TEST)
    monkeypatch.setattr(sandbox, "LAYERS", ("seccomp",))
    with pytest.raises(HoneError, match="files, memory"):
        sandbox.prove()
    monkeypatch.setattr(sandbox.sys, "platform", "darwin")
    with pytest.raises(HoneError, match="not of darwin"):
        sandbox.prove()


def test_time_that_is_up_before_the_start_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    late = run("def f(): return 1", wall=1e-3)
    assert late.ended == "time" and late.results == ({"error": "ended early: time"},) and late.compiled
    monkeypatch.setattr(sandbox, "_proofs", [])
    monkeypatch.setattr(sandbox, "run_in", lambda *given, **options: late)
    with pytest.raises(sandbox.Refused, match="escapes did not come to their end"):  # none of them has failed
        sandbox.prove()


def test_a_layer_that_cannot_be_put_on_is_named() -> None:
    with pytest.raises(sandbox.Refused, match="the interpreter did not start"):
        original = sandbox.CODE
        try:
            sandbox.CODE = Path("/nowhere/jail.py")
            sandbox.run_in((), "", [], sandbox.Limits())
        finally:
            sandbox.CODE = original
