"""Programs in the sandbox read and print in all the ways that answers to contests do."""

from __future__ import annotations

from typing import Any

import pytest

from hone.data.sample import Message, Sample
from hone.errors import DataError
from hone.rewards import sandbox
from hone.rewards.base import Attempt
from hone.rewards.code import Code, Efficiency

SUM = {"input": "3 4\n", "expected": "7"}
WAYS = {
    "input": "a, b = map(int, input().split())\nprint(a + b)",
    "exit": "a, b = map(int, input().split())\nprint(a + b)\nexit()",
    "quit": "print(sum(map(int, input().split())))\nquit(0)\nprint('more')",
    "stdin": "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
    "lines": "import sys\nfor line in sys.stdin:\n    print(sum(map(int, line.split())))",
    "buffer": "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
    "readline": "import sys\ninput = sys.stdin.buffer.readline\nprint(sum(map(int, input().split())))",
    "open": "print(sum(map(int, open(0).read().split())))",
    "write": "import sys\nsys.stdout.write(str(sum(map(int, sys.stdin.readline().split()))))",
    "bytes": "import sys\nsys.stdout.buffer.write(b'%d' % sum(map(int, sys.stdin.buffer.read().split())))",
    "closed": "import sys\nprint(sum(map(int, input().split())))\nsys.stdout.close()",
    "descriptor": "import os\nos.write(1, b'%d' % sum(map(int, os.read(0, 100).split())))",
    "fileno": "import os, sys\n"
    "data = os.read(sys.stdin.fileno(), 100)\nos.write(sys.stdout.fileno(), b'%d' % sum(map(int, data.split())))",
}


def worth(code: str, *tests: dict[str, Any]) -> float:
    sample = Sample(kind="prompt", prompt="p", extra={"tests": list(tests)}, where="here:1")
    return Code(seconds=2, wall=10).score([Attempt(sample, code)], None)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("way", WAYS)
def test_a_program_is_judged_by_what_it_prints_however_it_does(way: str) -> None:
    assert worth(WAYS[way], SUM) == 1
    assert worth(WAYS[way], {**SUM, "expected": "8"}) == 0


def test_each_test_has_input_and_output_of_its_own() -> None:
    code = "import os\nprint(open(0).read().strip())\nos.write(1, b'!')"
    assert worth(code, *({"input": f"{n}\n", "expected": f"{n}\n!"} for n in range(20))) == 1


def test_long_inputs_are_read_from_sys() -> None:
    numbers = " ".join(["7"] * 100_000)
    assert worth(WAYS["buffer"], {"input": numbers, "expected": "700000"}) == 1


@pytest.mark.parametrize("body", ["print('x' * 10**7)", "import os\nfor _ in range(99): os.write(1, b'x' * 10**4)"])
def test_only_so_much_is_printed(body: str) -> None:
    ran = sandbox.run(body, [{"input": ""}], sandbox.Limits(seconds=2, wall=10))
    assert "Error" in ran.results[0]["error"] and not ran.ended


HEAD = 'def double(x):\n    """Return twice x."""\n'


@pytest.mark.parametrize(("answer", "right"), [("    return 2 * x\n", 1), ("    return x\n", 0)])
def test_an_answer_goes_on_with_the_head_of_a_function(answer: str, right: float) -> None:
    sample = Sample(kind="prompt", prompt=HEAD, extra={"tests": ["assert double(4) == 8"]}, where="here:1")
    assert Code(prompted=True).score([Attempt(sample, answer)], None) == [right]  # type: ignore[arg-type]
    assert Code().score([Attempt(sample, answer)], None) == [0]  # type: ignore[arg-type]
    assert Code().score([Attempt(sample, HEAD + answer)], None) == [right]  # type: ignore[arg-type]


def test_a_reference_goes_on_with_the_head_of_a_function_as_answers_do() -> None:
    extra = {"tests": ["assert double(4) == 8"], "reference": "    return 2 * x\n"}
    sample = Sample(kind="prompt", prompt=HEAD, extra=extra, where="here:1")
    judge = Efficiency(prompted=True)
    assert judge.score([Attempt(sample, "    return x + x\n")], None) == [1]  # type: ignore[arg-type]


def test_a_conversation_is_no_head_of_a_function() -> None:
    asked = (Message("user", "double x"),)
    sample = Sample(kind="prompt", prompt=asked, extra={"tests": ["assert double(4) == 8"]}, where="here:1")
    with pytest.raises(DataError, match=r"here:1.*conversation"):
        Code(prompted=True).score([Attempt(sample, "    return 2 * x")], None)  # type: ignore[arg-type]
