"""What runs an answer's code inside the sandbox: its tests one by one, its input and output, the count of its lines.

`jail.py` loads this file before it shuts itself in; like that, it imports nothing but the standard library. The forms
in which values go out are here too, for both sides.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import io
import itertools
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hone.rewards.jail import Channel

ANSWER = "<answer>"  # the file name of the code that is run


class Printed(io.BytesIO):
    """What a program prints, up to a limit; it outlives being closed."""

    def __init__(self, most: int) -> None:
        """Begin empty.

        Args:
            most: bytes that fit.
        """
        super().__init__()
        self.most = most

    def write(self, data: Any) -> int:
        """Add bytes.

        Args:
            data: what is printed.

        Raises:
            OSError: it is too much.
        """
        if self.tell() + len(data) > self.most:
            raise OSError("printed too much")
        return super().write(data)

    def fileno(self) -> int:
        """Return the descriptor that `descriptors` catches."""
        return 1

    def close(self) -> None:
        """Stay open."""


class Given(io.BytesIO):
    """The input of a program."""

    def fileno(self) -> int:
        """Return the descriptor that `descriptors` fills."""
        return 0


def stream(raw: io.BytesIO) -> io.TextIOWrapper:
    """Return a text stream over bytes, as sys.stdin and sys.stdout are, with their `buffer`.

    Args:
        raw: the bytes.
    """
    return io.TextIOWrapper(raw, encoding="utf-8", newline="\n", write_through=True)


@contextlib.contextmanager
def descriptors(data: bytes) -> Iterator[list[bytes]]:
    """Put an input behind descriptor 0, and catch what is written to descriptor 1, for programs that go past sys.

    Both are pipes, which hold 64 KiB: of a longer input nothing is there, and a longer output raises an error.

    Args:
        data: the input.

    Yields:
        A list that gets what was written when the block ends.
    """
    kept, caught = [os.dup(0), os.dup(1)], list[bytes]()
    (give, put), (take, out) = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    if len(data) <= 65536:
        os.write(put, data)
    for place, number in ((0, give), (1, out)):
        os.dup2(number, place)
    for number in (give, put, out):
        os.close(number)
    try:
        yield caught
    finally:
        for place, number in enumerate(kept):
            os.dup2(number, place)
            os.close(number)
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(take, 65536):
                caught.append(piece)
        os.close(take)


class Counter:
    """Counts the lines of the answer that are executed.

    It can be led astray by code that sets out to, which an audit hook makes hard, not impossible; see `sandbox.py`.
    """

    def __init__(self) -> None:
        """Begin with none."""
        self.lines = itertools.count()

    def start(self) -> None:
        """Count from now on."""
        sys.settrace(self._enter)

        def refuse(event: str, details: tuple[Any, ...]) -> None:
            if event in ("sys.settrace", "sys.setprofile") or event.startswith(("ctypes.", "sys.monitoring")):
                raise RuntimeError(f"{event} is not allowed while lines are counted")

        sys.addaudithook(refuse)

    def total(self) -> int:
        """Return how many there were."""
        return next(self.lines)

    def _enter(self, frame: types.FrameType, event: str, value: object) -> Callable[..., Any] | None:
        if frame.f_code.co_filename != ANSWER:
            return None

        def step(frame: types.FrameType, event: str, value: object) -> Callable[..., Any]:
            if event == "line":
                next(self.lines)
            return step

        return step


def in_order(members: Iterable[Any]) -> list[Any]:
    """Return the members of a set by their value, or by how they are written where values cannot be compared.

    Args:
        members: may be sets themselves, which become lists too.
    """
    listed = [in_order(one) if isinstance(one, frozenset) else one for one in members]
    try:
        return sorted(listed)
    except TypeError:
        return sorted(listed, key=repr)


def plain(value: object) -> object:
    """Return a set as a sorted list, and anything that is no value of JSON as an error.

    Args:
        value: what JSON cannot hold.

    Raises:
        TypeError: it is no set.
    """
    if isinstance(value, set | frozenset):
        return in_order(value)
    raise TypeError(f"gave a {type(value).__name__}; expected numbers, texts, lists, tuples, sets or dicts")


def packed(value: object) -> object:
    """Return a value as JSON that tells tuples, sets, dicts, bytes and complex numbers from lists and texts.

    Args:
        value: what a literal of Python can be, or is equal to one.

    Raises:
        TypeError: it is something else.
    """
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list():
            return [packed(one) for one in value]
        case tuple():
            return {"tuple": [packed(one) for one in value]}
        case Set():
            return {"set": [packed(one) for one in value]}
        case Mapping():
            return {"dict": [[packed(key), packed(one)] for key, one in value.items()]}
        case bytes() | bytearray():
            return {"bytes": value.decode("latin-1")}
        case complex():
            return {"complex": [value.real, value.imag]}
    return plain(value)


def unpacked(value: Any) -> Any:
    """Invert `packed`; nothing is trusted to be well formed.

    Args:
        value: what JSON gave.

    Raises:
        TypeError, ValueError: it is nothing that `packed` returns.
    """
    match value:
        case None | bool() | int() | float() | str():
            return value
        case list():
            return [unpacked(one) for one in value]
        case {"tuple": list(members)}:
            return tuple(unpacked(members))
        case {"set": list(members)}:
            return set(unpacked(members))
        case {"dict": list(pairs)}:
            return {unpacked(key): unpacked(one) for key, one in pairs}
        case {"bytes": str(text)}:
            return text.encode("latin-1")
        case {"complex": [float(real), float(imaginary)]}:
            return complex(real, imaginary)
    raise ValueError(value)


def run_code(code: types.CodeType, name: str) -> dict[str, Any]:
    """Run the answer as a module and return its names.

    Args:
        code: the compiled answer.
        name: of the module.
    """
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(code, module.__dict__)
    return module.__dict__


def answer_test(test: dict[str, Any], names: dict[str, Any], code: types.CodeType, most: int) -> dict[str, Any]:
    """Return what the answer gives for one test.

    Args:
        test: "call" with "args" and "kwargs", or with "literals" as Python writes them both; or "input" of a program.
        names: of the answer as a module, for calls.
        code: of the answer, for programs.
        most: bytes that may be printed.
    """
    if "literals" in test:
        args, kwargs = ast.literal_eval(test["literals"])
        return {"value": packed(names[test["call"]](*args, **kwargs))}
    if "call" in test:
        return {"value": names[test["call"]](*test.get("args", []), **test.get("kwargs", {}))}
    given, printed = test["input"].encode("utf-8", "replace"), Printed(most)
    sys.stdin, sys.stdout = stream(Given(given)), stream(printed)
    with descriptors(given) as written, contextlib.suppress(SystemExit):
        run_code(code, "__main__")
    return {"output": b"".join([printed.getvalue(), *written]).decode("utf-8", "replace")}


def work(job: dict[str, Any], channel: Channel, most: int) -> None:
    """Run an answer on its tests.

    Args:
        job: "code", "tests", and "count" whether lines are counted.
        channel: where results go.
        most: bytes that may be printed by a program.
    """
    try:
        code = compile(job["code"], ANSWER, "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        channel.say(compiled=False, error=f"{type(error).__name__}: {error}"[:200])
        return
    channel.say(compiled=True)
    counter = Counter()
    if job["count"]:
        counter.start()
    names: dict[str, Any] = {}
    sys.stdout = sys.stderr = stream(Printed(most))
    vars(builtins).update(exit=sys.exit, quit=sys.exit)  # which the interpreter's `site` would have put there
    try:
        if any("call" in test for test in job["tests"]):
            names = run_code(code, "answer")
        failed = ""
    except BaseException as error:  # whatever foreign code raises
        failed = f"{type(error).__name__}: {error}"[:200]
    for number, test in enumerate(job["tests"]):
        try:
            if failed and "call" in test:
                raise RuntimeError(failed)
            channel.say(test=number, **answer_test(test, names, code, most))
        except BaseException as error:
            channel.say(test=number, error=f"{type(error).__name__}: {error}"[:200])
    channel.say(done=True, lines=counter.total() if job["count"] else None)
