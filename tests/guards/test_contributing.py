"""The example that CONTRIBUTING.md gives is code that works."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import torch

from hone import parts
from hone.evidence import source

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_its_names_are_not_taken_and_its_loss_is_right(tmp_path: Path) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL) if "@part(" in block)
    kind, name = re.findall(r'@part\("(\w+)", "([\w-]+)"', code)[0]
    claim = re.findall(r'@claim\("(\w+)", "([\w-]+)", "([\w-]+)"\)', TEXT)[0]
    assert parts.find(kind, name) is None and claim[:2] == (kind, name) and claim not in source.claims()
    file = tmp_path / "example.py"
    file.write_text(code)
    spec = importlib.util.spec_from_file_location("contributed", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["contributed"] = module
    spec.loader.exec_module(module)
    sys.modules.pop("contributed")
    logprobs, weights = torch.tensor([0.5, 0.25]).double().log(), torch.tensor([1.0, 2.0]).double()
    torch.testing.assert_close(module.poly_loss(logprobs, weights, 0.0), -(weights * logprobs).sum())
    torch.testing.assert_close(module.poly_loss(logprobs, weights, 2.0), -(weights * logprobs).sum() + 2 * (0.5 + 1.5))
    assert module.Poly(epsilon=2.0).epsilon == 2.0
