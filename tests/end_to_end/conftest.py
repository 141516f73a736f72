"""Finished runs that several tests look at, each made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from end_to_end.support import train


@pytest.fixture(scope="session")
def full_run(tiny_model: Path, qa_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that trained all weights."""
    out = tmp_path_factory.mktemp("runs") / "full"
    train(tiny_model, qa_file, out, adapter="full", steps=30, eval_every=15, checkpoint_every=10, trackers=[])
    return out


@pytest.fixture(scope="session")
def lora_run(tiny_model: Path, qa_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that trained a low-rank adapter."""
    out = tmp_path_factory.mktemp("runs") / "lora"
    train(tiny_model, qa_file, out, steps=30, checkpoint_every=15)
    return out
