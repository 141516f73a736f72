"""What every cell of a comparison needs, imported once by the process that cells are forked from.

A fresh process reads 199 files to find the parts, which takes 1.8 s, and imports the usual ones.
"""

from __future__ import annotations

from hone import parts
from hone.engine import preflight, run
from hone.evidence import cells

USUAL = (
    ("model", "pretrained"), ("data", "files"), ("objective", "sft"), ("adapter", "lora"), ("optimizer", "adamw"),
    ("schedule", "cosine"), ("sampler", "greedy"), ("metric", "accuracy"),
)  # fmt: skip
LOADED = (cells, preflight, run, *(parts.load(kind, name) for kind, name in USUAL))
