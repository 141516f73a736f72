"""Hashes of code: they follow what code does from definition to definition, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hone.evidence import source

LOW = '''"""Low-rank things."""

import math

from hone.adapters.base import helper
from hone.parts import part
from hone.text.model import forward

FACTOR = 2


@part("adapter", "low", claim="Less is more.")
class Low:
    """What it does."""

    rank: int = 4

    def attach(self, model):
        """Attach it."""
        for layer in model:  # one by one
            wrap(layer)
            count(layer, "a  b")
        return helper(model) * FACTOR


class High:
    """Another part."""

    def attach(self, model):
        return math.pi


def wrap(layer):
    return forward(layer)


def count(layer, text):
    return f"{layer} counts {text!r}"
'''
HOOK = '\n    def start(self, run):\n        """Do nothing."""\n'  # a method that nobody has filled yet
BASE = """from hone.adapters.deeper import LIMIT

def helper(model):
    return inner(model)

def inner(model):
    return model + LIMIT

def unused(model):
    return model
"""
CLAIM = '''from hone.evidence.claims.base import claim

STEPS = 10

@claim("adapter", "low", "learns")
def learns(folder):
    """It learns."""
    return STEPS

@claim("adapter", "low", "forgets")
def forgets(folder):
    return 1
'''
MODEL = """def forward(layer):
    return layer

def hook():
    return 0

print(hook)
"""
FILES = {
    "adapters/low.py": LOW, "adapters/base.py": BASE, "adapters/deeper.py": "LIMIT = 3\n",
    "text/model.py": MODEL, "evidence/claims/mine.py": CLAIM,
    "evidence/claims/base.py": "def claim(*names):\n    return lambda function: function\n",
    "engine/run.py": """from hone.engine.progress import show
def run():
    from hone.data.files import read
    show(read())
""",
    "engine/__init__.py": "",
    "engine/preflight.py": "from hone.engine import loop\ndef measure():\n    return loop.step()\n",
    "engine/loop.py": "def step():\n    return 1\n", "data/files.py": "def read():\n    return 'rows'\n",
    "engine/progress.py": "def show(text):\n    print(text)\n", "cli.py": "def main():\n    return 0\n",
}  # fmt: skip
Edit = Callable[[str, str, str], None]


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Edit]:
    """Return what edits a file of a small package that hashes are taken of."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(source, "ROOT", tmp_path)
    monkeypatch.setattr(
        source, "part_roots", lambda kind, name: [("hone.adapters.low", "Low")] if name == "low" else []
    )

    def forget() -> None:
        source._read.cache_clear()
        source.claims.cache_clear()

    def change(name: str, old: str, new: str) -> None:
        text = (tmp_path / name).read_text()
        assert text.count(old) == 1, old
        (tmp_path / name).write_text(text.replace(old, new))
        forget()

    forget()
    yield change
    forget()


def hashes() -> dict[str, str | None]:
    return {"claim": source.current("adapter", "low", "learns"), "run": source.run_hash([("adapter", "low")])}


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("adapters/low.py", "# one by one", "# each"),
        ("adapters/low.py", "  # one by one", ""),
        ("adapters/low.py", '"""What it does."""', '"""What it does.\n\n    At length.\n    """'),
        ("adapters/low.py", '        """Attach it."""\n', ""),
        ("adapters/low.py", '"""Low-rank things."""', '"""Others."""'),
        ("adapters/low.py", '"low", claim="Less is more.")', '"low",\n    claim="More.",\n)'),
        ("adapters/low.py", "wrap(layer)\n", "wrap(\n                layer\n            )\n\n"),
        ("adapters/low.py", "helper(model) * FACTOR", "helper( model )*FACTOR"),
        ("adapters/low.py", "return math.pi", "return math.e"),
        ("adapters/low.py", "    rank: int = 4\n", f"    rank: int = 4\n{HOOK}"),
        ("adapters/low.py", "    rank: int = 4\n", f"    rank: int = 4\n{HOOK}        return run\n"),
        ("adapters/base.py", "def unused(model):\n    return model", "def unused(model):\n    return 0"),
        ("evidence/claims/mine.py", '"""It learns."""', '"""It learns a lot."""'),
        ("evidence/claims/mine.py", "    return 1", "    return 2"),
        ("evidence/claims/base.py", "lambda function: function", "lambda made: made"),
        ("cli.py", "return 0", "return 1"),
        ("engine/progress.py", "print(text)", "print(text, end='')"),
    ],
)  # fmt: skip
def test_what_changes_no_figure_changes_no_hash(edit: Edit, name: str, old: str, new: str) -> None:
    before = hashes()
    edit(name, old, new)
    assert hashes() == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("adapters/low.py", "helper(model) * FACTOR", "helper(model) + FACTOR"),
        ("adapters/low.py", "rank: int = 4", "rank: int = 8"),
        ("adapters/low.py", "    rank: int = 4\n", f"    rank: int = 4\n{HOOK}        return run + 1\n"),
        ("adapters/low.py", "FACTOR = 2", "FACTOR = 3"),
        ("adapters/low.py", "            count(layer", "        count(layer"),  # out of the loop
        ("adapters/low.py", '"a  b"', '"a b"'),
        ("adapters/low.py", "{layer} counts {text!r}", "{layer} counts  {text!r}"),
        ("adapters/base.py", "return inner(model)", "return -inner(model)"),
        ("adapters/base.py", "model + LIMIT", "model - LIMIT"),
        ("adapters/deeper.py", "LIMIT = 3", "LIMIT = 4"),
    ],
)
def test_the_code_of_a_part_and_what_it_uses_in_its_own_package_count(
    edit: Edit, name: str, old: str, new: str
) -> None:
    before = hashes()
    edit(name, old, new)
    assert all(before[what] != found for what, found in hashes().items())


@pytest.mark.parametrize(
    ("name", "old", "new", "changed"),
    [
        ("text/model.py", "return layer", "return -layer", "run"),
        ("text/model.py", "return 0", "return 1", "run"),  # what importing the module puts to use
        ("engine/loop.py", "return 1", "return 2", "run"),
        ("data/files.py", "'rows'", "'lines'", "run"),
        ("evidence/claims/mine.py", "STEPS = 10", "STEPS = 20", "claim"),
    ],
)
def test_other_packages_count_for_runs_and_the_trial_for_its_claim(
    edit: Edit, name: str, old: str, new: str, changed: str
) -> None:
    before = hashes()
    edit(name, old, new)
    assert [what for what, found in hashes().items() if found != before[what]] == [changed]


def test_a_claim_or_a_part_that_is_gone_has_no_hash(edit: Edit) -> None:
    assert source.current("adapter", "low", "learns") != source.current("adapter", "low", "forgets")
    assert source.current("adapter", "low", "sings") is None
    edit("evidence/claims/mine.py", '"low", "forgets"', '"gone", "forgets"')
    assert source.current("adapter", "gone", "forgets") is None


def test_the_code_of_this_package_can_be_followed() -> None:
    kinds = [("adapter", "lora"), ("adapter", "full"), ("optimizer", "adamw")]
    assert len({source.run_hash([part]) for part in kinds}) == len(kinds)
    assert source.run_hash(kinds) == source.run_hash(reversed(kinds))
    module = source._read("hone.adapters.lora")
    assert module is not None and "class LoRA ( Host )" in module.definitions["LoRA"]
