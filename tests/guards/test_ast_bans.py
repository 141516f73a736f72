"""No shipped code unpickles, evaluates text, runs a shell, or imports what input names."""

from __future__ import annotations

import ast
import builtins
from dataclasses import dataclass

import pytest

from guards.sources import scoped, sources

MODULES = {"pickle", "_pickle", "cPickle", "shelve", "marshal", "dill", "cloudpickle", "runpy", "imp"}
NAMES = {
    "builtins.eval", "builtins.exec", "builtins.compile", "torch.load", "torch.serialization.load", "joblib.load",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all",
    "yaml.Loader", "yaml.CLoader", "yaml.FullLoader", "yaml.CFullLoader", "yaml.UnsafeLoader", "yaml.CUnsafeLoader",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput",
    "importlib.util.spec_from_file_location", "importlib.machinery.SourceFileLoader",
}  # fmt: skip
METHODS = {"read_pickle", "to_pickle"}  # of whatever object
IMPORTERS = {"importlib.import_module", "builtins.__import__"}  # allowed with a literal
FLAGS = {"shell": False, "allow_pickle": False, "trust_remote_code": False, "weights_only": True}  # the safe values

EXCEPTIONS = {  # (file, function, what): why it is safe
    ("src/hone/parts.py", "load", "importlib.import_module"): (
        "imports the module of a catalogue record, which the walk over the package's own files found; a name from a "
        "recipe is only compared with those records"
    ),
    ("src/hone/evidence/verify.py", "every_claim", "importlib.import_module"): (
        "imports the package's own modules of claims, which the walk over its folder found"
    ),
    ("src/hone/rewards/answers_run.py", "work", "builtins.compile"): "see the next one",
    ("src/hone/rewards/answers_run.py", "run_code", "builtins.exec"): (
        "runs an answer's code in a process of its own that has shut itself in before; hone never calls it in its own"
    ),
    ("src/hone/rewards/jail.py", "sibling", "importlib.util.spec_from_file_location"): (
        "loads the one file of the package that stands beside it, in a process that cannot import the package by name"
    ),
}


@dataclass(frozen=True)
class Finding:
    file: str
    line: int
    function: str
    what: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.function, self.what


def imported(tree: ast.AST) -> dict[str, str]:
    """Return what each imported name stands for: {"np": "numpy", "load": "torch.load"}."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
    return found


def dotted(node: ast.AST, names: dict[str, str]) -> str:
    """Return the full name that an expression refers to, "" when it is no plain name."""
    if isinstance(node, ast.Name):
        return names.get(node.id, f"builtins.{node.id}" if hasattr(builtins, node.id) else "")
    if isinstance(node, ast.Attribute) and (inside := dotted(node.value, names)):
        return f"{inside}.{node.attr}"
    return ""


def unsafe(flag: object, value: ast.AST) -> bool:
    return flag in FLAGS and not (isinstance(value, ast.Constant) and value.value is FLAGS[str(flag)])


def offences(node: ast.AST, names: dict[str, str]) -> list[str]:
    """Return what is banned about one node."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        case ast.ImportFrom() if node.module and not node.level:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            return [name for name in whole if name.split(".")[0] in MODULES or name in NAMES]
        case ast.Name() | ast.Attribute():
            name = dotted(node, names)
            found = [name] if name in NAMES else []
            return found + ([node.attr] if isinstance(node, ast.Attribute) and node.attr in METHODS else [])
        case ast.Call():
            return in_call(node, names)
        case ast.Dict():
            keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
            return [f"{key}=" for key, value in zip(keys, node.values, strict=True) if unsafe(key, value)]
    return []


def in_call(node: ast.Call, names: dict[str, str]) -> list[str]:
    name = dotted(node.func, names)
    found = [f"{keyword.arg}=" for keyword in node.keywords if unsafe(keyword.arg, keyword.value)]
    given = [*node.args, *(k.value for k in node.keywords if k.arg == "name")]
    if name in IMPORTERS and not (given and isinstance(given[0], ast.Constant)):
        found.append(name)
    if name == "builtins.getattr" and len(node.args) > 1 and isinstance(node.args[1], ast.Constant):
        reached = f"{dotted(node.args[0], names)}.{node.args[1].value}"
        found += [reached] if reached in NAMES else []
    return found


def findings(file: str, text: str) -> list[Finding]:
    tree = ast.parse(text)
    names = imported(tree)
    return [
        Finding(file, getattr(node, "lineno", 0), scope, what)
        for node, scope in scoped(tree)
        for what in offences(node, names)
    ]


def test_shipped_code_keeps_the_bans() -> None:
    found = [finding for file, text in sources("src").items() for finding in findings(file, text)]
    broken = [f"{f.file}:{f.line} {f.function}: {f.what}" for f in found if f.key not in EXCEPTIONS]
    assert not broken, "\n".join(["banned in shipped code:", *broken])
    stale = set(EXCEPTIONS) - {finding.key for finding in found}
    assert not stale, f"exceptions that nothing needs any more: {stale}"


BAD = {
    "import pickle": "pickle",
    "from pickle import loads": "pickle.loads",
    "import shelve as s": "shelve",
    "def f():\n    import dill": "dill",
    "from cloudpickle import load": "cloudpickle.load",
    "import marshal": "marshal",
    "import joblib\njoblib.load(p)": "joblib.load",
    "import torch\ntorch.load(p)": "torch.load",
    "import torch as t\nread = t.load": "torch.load",
    "from torch import load as read": "torch.load",
    "import torch\ngetattr(torch, 'load')(p)": "torch.load",
    "f(weights_only=False)": "weights_only=",
    "eval(text)": "builtins.eval",
    "run = exec": "builtins.exec",
    "compile(text, 'f', 'exec')": "builtins.compile",
    "import yaml\nyaml.load(t, Loader=L)": "yaml.load",
    "from yaml import unsafe_load": "yaml.unsafe_load",
    "import yaml\nclass L(yaml.FullLoader): pass": "yaml.FullLoader",
    "import subprocess\nsubprocess.run(c, shell=True)": "shell=",
    "run(c, shell=flag)": "shell=",
    "import os\nos.system(c)": "os.system",
    "import importlib\nimportlib.import_module(name)": "importlib.import_module",
    "from importlib import import_module\nimport_module(name=n)": "importlib.import_module",
    "__import__(name)": "builtins.__import__",
    "import numpy as np\nnp.load(p, allow_pickle=True)": "allow_pickle=",
    "AutoModel.from_pretrained(p, trust_remote_code=True)": "trust_remote_code=",
    "options = {'trust_remote_code': True}": "trust_remote_code=",
    "frame.to_pickle(p)": "to_pickle",
}
GOOD = [
    "model.eval()",
    "import re\nre.compile(p)",
    "import torch\ntorch.compile(model)",
    "import json\njson.load(f)",
    "import numpy as np\nnp.load(p)\nnp.load(p, allow_pickle=False)",
    "import yaml\nclass L(yaml.SafeLoader): pass\nyaml.compose(t, Loader=L)\nyaml.safe_load(t)",
    "import importlib\nimportlib.import_module('hone.parts')",
    "import subprocess\nsubprocess.run([c], shell=False)",
    "from safetensors.torch import load_file\nload_file(p)",
    "loader.load(p)",
    "f(trust_remote_code=False)",
]


@pytest.mark.parametrize("text", BAD, ids=lambda text: text.splitlines()[-1])
def test_each_banned_thing_is_found(text: str) -> None:
    assert BAD[text] in [finding.what for finding in findings("x.py", text)]


@pytest.mark.parametrize("text", GOOD, ids=lambda text: text.splitlines()[-1])
def test_what_only_looks_alike_is_not(text: str) -> None:
    assert findings("x.py", text) == []


def test_an_exception_holds_for_its_function_alone() -> None:
    text = (
        "import importlib\ndef load(n):\n    importlib.import_module(n)\ndef other(n):\n    importlib.import_module(n)"
    )
    assert [f.key in EXCEPTIONS for f in findings("src/hone/parts.py", text)] == [True, False]
