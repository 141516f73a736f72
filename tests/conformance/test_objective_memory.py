"""No objective ever holds the (N, V) logits: every storage that a training step makes is counted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conformance import test_objectives as suite
from hone.data.open import ACCEPTED
from hone.engine.devices import Cluster
from hone.parts import load
from hone.text import vocabulary
from hone.text.model import LanguageModel
from hone.text.pack import pack

CHUNK = 8 * 2**20  # bytes; a quarter of the usual one, for a quarter of the arithmetic
VOCABULARY = 8_192
COPIES = 12  # of the toy trees, so that the logits of all trained tokens would take many times a chunk


class Largest(TorchDispatchMode):
    """Remembers the largest storage that any operation has returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return output


def wide_model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel.fresh({**suite.CONFIG, "vocab_size": VOCABULARY}, suite.tokenizer()).double()


@pytest.mark.parametrize("name", suite.NAMES)
def test_no_storage_is_larger_than_a_chunk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "CPU_CHUNK", CHUNK)
    cls: Any = load("objective", name)
    objective, model = cls(), wide_model()
    seen = SimpleNamespace(kind=ACCEPTED[cls.consumes][0], labels=("0", "1", "2"))
    objective.look(SimpleNamespace(streaming=False, samples=lambda split: [seen], describe=lambda: "toys"))
    objective.equip(model)
    start = SimpleNamespace(from_nothing=False, load=lambda **options: wide_model())
    trees = suite.TOYS[cls.consumes]() * COPIES
    player = SimpleNamespace(optimizer=SimpleNamespace(state={}))
    run: Any = SimpleNamespace(
        model=model, objective=objective, players={"model": player}, step=8, total=10, loader=suite.LOADER,
        adapter=None, rehearsal=False,
        recipe=SimpleNamespace(build=lambda field: start, seed=0, micro_tokens=None, batch_tokens=4096),
        cluster=Cluster("cpu", "float64"), display=None,
    )  # fmt: skip
    objective.setup(run)
    with Largest() as largest:
        objective.before_step(run, trees)
        batch = pack(trees)
        for turn in objective.turns(model, batch):
            (turn.loss / objective.count(batch)).backward()
    trained = int((batch.weights != 0).sum())
    if cls.consumes not in ("labelled", "tagged"):
        assert trained * VOCABULARY * 8 > 1.5 * CHUNK, "the toys are too small to show anything"
    assert largest.bytes <= CHUNK
