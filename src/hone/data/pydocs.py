"""The documentation of the running Python's standard library: text that every machine has, without a download."""

from __future__ import annotations

import ast
import hashlib
import inspect
import itertools
import json
import os
import platform
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from hone.data.sample import Sample
from hone.data.source import Source, Split
from hone.errors import DataError
from hone.parts import part

EVAL_SHARE = 16  # one module in so many is kept for evaluation
_PASSAGE = 1500  # most characters of one sample of running text, where paragraphs allow
_CODE = 1200  # longest source, in characters, that is shown whole
_SHORTEST = 30  # a docstring or paragraph with fewer characters says nothing
# Tests, vendored packages and generated tables, whose strings are not prose.
_SKIPPED = re.compile(
    "tests?|idlelib|lib2to3|(site|dist)-packages|ensurepip|turtledemo|encodings|msilib|pydoc_data|"
    "_sysconfigdata.*|config-.*|__phello__|this|antigravity"
)

Task = Literal["text", "docstring", "summary"]


@dataclass(frozen=True)
class Definition:
    """A documented module, class or function.

    Args:
        module: dotted name of the module it stands in.
        line: line of the definition, from 1.
        signature: its `def` or `class` line; "" for a module.
        code: its source without the docstring; "" for a module or a class.
        doc: its docstring, without indentation.
    """

    module: str
    line: int
    signature: str
    code: str
    doc: str


@part("data", "pydocs", papers="original")
@dataclass(kw_only=True)
class PyDocs(Source):
    """Read the docstrings and the language reference of the running Python's standard library.

    Files are parsed, never imported. Modules are kept for evaluation by a hash of their names, and a docstring that
    stands in several places is used once, so training and evaluation share none; nor do they share a paragraph of
    running text.

    Args:
        task: "text" is running text, cut at paragraphs; "docstring" completes a function's source, or the signature of
            a class or a long function, with its docstring; "summary" completes a signature with the docstring's first
            paragraph.
    """

    task: Task = "text"

    def samples(self, split: Split) -> Iterator[Sample]:
        """Yield the samples of a split: module by module for training, the held-out ones by a hash of their place.

        Args:
            split: "train" (at most `limit`) or "eval" (at most `holdout`).

        Raises:
            DataError: this Python has no sources of its standard library.
        """
        made = _BUILDERS[self.task](_definitions(library()))
        mine = (sample for module, sample in made if is_eval(module) == (split == "eval"))
        if split == "train":
            return itertools.islice(mine, self.limit)
        return iter(sorted(mine, key=lambda sample: _hash(sample.where))[: self.holdout])

    def grade(self, sample: Sample, text: str) -> None:
        """Return None: there is no one right docstring.

        Args:
            sample: a sample of this source.
            text: the generated answer.
        """

    def fingerprint(self) -> str:
        """Return a hash of the Python release, the options and the code that reads the sources."""
        version = [platform.python_implementation(), platform.python_version()]
        sizes = [(module, path.stat().st_size) for module, path in _modules(library())]  # distributions patch releases
        code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        options = [self.task, self.limit, self.holdout]
        return hashlib.sha256(json.dumps(["pydocs", version, sizes, options, code]).encode()).hexdigest()

    def describe(self) -> str:
        """Return which Python's documentation is read, and how."""
        return f"pydocs: {self.task} of the standard library of Python {platform.python_version()}"


def is_eval(module: str) -> bool:
    """Return whether a module is kept for evaluation: one in 16, by a hash of its name."""
    return _hash(module)[0] % EVAL_SHARE == 0


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def library() -> Path:
    """Return the folder of the standard library's sources.

    Raises:
        DataError: it holds no sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (root / "argparse.py").is_file():
        raise DataError(
            f"{root}: expected the sources of Python's standard library, found none; "
            "use a Python that was installed with its .py files"
        )
    return root


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name and the file of every module worth reading, folder by folder, in a fixed order."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not _SKIPPED.fullmatch(name))
        for name in sorted(files):
            path = Path(folder, name)
            if path.suffix == ".py" and not _SKIPPED.fullmatch(path.stem):
                names = path.relative_to(root).with_suffix("").parts
                yield ".".join(name for name in names if name != "__init__"), path


@cache
def _definitions(root: Path) -> tuple[Definition, ...]:
    """Read every documented definition, and each topic of the language reference as a module "topics.NAME"."""
    found: dict[str, Definition] = {}
    for module, path in _modules(root):
        with tokenize.open(path) as file:
            text = file.read()
        for definition in _documented(module, text):
            found.setdefault(definition.doc, definition)
    for definition in _topics(root / "pydoc_data" / "topics.py"):
        found.setdefault(definition.doc, definition)
    return tuple(found.values())


def _documented(module: str, text: str) -> Iterator[Definition]:
    """Yield the documented definitions of a module in the order of their lines."""
    lines = text.split("\n")  # as the parser counts them: a form feed ends no line
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
    for node in sorted(nodes, key=lambda node: getattr(node, "lineno", 0)):
        doc = ast.get_docstring(node)
        if doc is None or len(doc) < _SHORTEST:
            continue
        line = getattr(node, "lineno", 1)
        signature = "" if isinstance(node, ast.Module) else _signature(node)
        code = _code(node, lines) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else ""
        yield Definition(module, line, signature, code, doc.strip())


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Return the `class` or `def` line of a definition, on one line."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in (*node.bases, *node.keywords))
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    start = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    return f"{start} {node.name}({ast.unparse(node.args)}){returns}:"


def _code(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str:
    """Return the source of a function without its docstring and decorators, from the file's own lines.

    It is "" where nothing but the docstring is there, or where the docstring shares a line with something else.
    """
    doc, *rest = node.body
    end = doc.end_lineno or doc.lineno
    if not rest or rest[0].lineno == end or lines[doc.lineno - 1][: doc.col_offset].strip():
        return ""
    kept = [*lines[node.lineno - 1 : doc.lineno - 1], *lines[end : node.end_lineno]]
    return "\n".join(line.removeprefix(" " * node.col_offset) for line in kept)


def _topics(path: Path) -> Iterator[Definition]:
    """Yield the topics of the language reference, which come with Python as a table of strings."""
    if not path.is_file():
        return
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for name, text in ast.literal_eval(node.value).items():
                yield Definition(f"topics.{name}", 1, "", "", inspect.cleandoc(text).strip())


def _texts(definitions: tuple[Definition, ...]) -> Iterator[tuple[str, Sample]]:
    """Yield the running text of each module in passages of whole paragraphs, without what was said before."""
    said: set[str] = set()
    for module, group in itertools.groupby(definitions, key=lambda definition: definition.module):
        paragraphs = []
        for definition in group:
            for paragraph in re.split(r"\n\s*\n", definition.doc):
                if paragraph not in said:
                    paragraphs.append((definition.line, paragraph))
                    if len(paragraph) >= _SHORTEST:
                        said.add(paragraph)
        for line, passage in _passages(paragraphs):
            yield module, Sample(kind="text", answers=(passage,), where=f"{module}:{line}")


def _passages(paragraphs: list[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Join paragraphs into passages of at most `_PASSAGE` characters, each with the line where it starts."""
    held: list[str] = []
    start = size = 0
    for line, paragraph in paragraphs:
        if held and size + len(paragraph) > _PASSAGE:
            yield start, "\n\n".join(held)
            held, size = [], 0
        if not held:
            start = line
        held.append(paragraph)
        size += len(paragraph) + 2
    if held:
        yield start, "\n\n".join(held)


def _docstrings(definitions: tuple[Definition, ...]) -> Iterator[tuple[str, Sample]]:
    """Yield functions with their docstrings; the signature stands for a source that is long or missing."""
    for definition in definitions:
        if definition.signature:
            shown = definition.code if 0 < len(definition.code) <= _CODE else definition.signature
            yield definition.module, _completion(definition, shown, definition.doc)


def _summaries(definitions: tuple[Definition, ...]) -> Iterator[tuple[str, Sample]]:
    """Yield signatures with the first paragraph of their docstrings on one line."""
    for definition in definitions:
        if definition.signature:
            first = " ".join(re.split(r"\n\s*\n", definition.doc, maxsplit=1)[0].split())
            yield definition.module, _completion(definition, definition.signature, first)


def _completion(definition: Definition, prompt: str, answer: str) -> Sample:
    place = f"{definition.module}:{definition.line}"
    return Sample(kind="completion", prompt=f'{prompt}\n    """', answers=(f'{answer}"""',), where=place)


_BUILDERS: dict[str, Callable[[tuple[Definition, ...]], Iterator[tuple[str, Sample]]]] = {
    "text": _texts,
    "docstring": _docstrings,
    "summary": _summaries,
}
