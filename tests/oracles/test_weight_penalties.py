"""The L1 penalty is the sum of what training has changed, whatever the weights are made of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.test_objectives import make_model
from hone.adapters.base import Adapter
from hone.adapters.full import Full
from hone.adapters.lora import LoRA
from hone.parts import load
from hone.penalties.weights import L1
from hone.text.pack import pack


def adapters() -> dict[str, Adapter]:
    return {
        "full": Full(), "lora": LoRA(rank=2), "lora with biases and a head": LoRA(rank=2, train_also=["norm"]),
        "dora": LoRA(rank=2, weight_decomposed=True), "pissa": load("adapter", "pissa")(rank=2),
    }  # fmt: skip


def matrices(model: Any, adapter: Adapter) -> dict[str, Tensor]:
    """Return the whole network's weights as they are in effect."""
    adapter.merge(model.hf)
    found = {
        n.replace(".base_layer", ""): p.detach().clone() for n, p in model.hf.named_parameters() if "lora" not in n
    }
    adapter.unmerge(model.hf)
    return found


@pytest.mark.parametrize("kind", adapters())
def test_the_penalty_is_the_sum_over_all_that_has_changed(kind: str) -> None:
    model, adapter = make_model(), adapters()[kind]
    torch.manual_seed(0)
    adapter.attach(model.hf)
    penalty = L1(strength=0.5, threshold=0.02)
    penalty.setup(SimpleNamespace(model=model, adapter=adapter))
    before = matrices(model, adapter)
    batch: Any = range(7)  # of seven tokens
    if kind != "pissa":
        assert penalty.figures(batch) == {"sparsity": 7.0}  # nothing has changed yet
    trained = [p for _, p in adapter.trainable(model.hf)]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    after = matrices(model, adapter)
    moved = torch.cat([(after[name] - before[name]).abs().flatten() for name in after if name in before])
    term = penalty.of_weights(model)
    assert float(term.detach()) == pytest.approx(0.5 * float(moved.sum()), rel=1e-5)
    everything = 7 * float((moved[moved > 0] <= 0.02).double().mean())
    assert penalty.figures(batch)["sparsity"] == pytest.approx(everything, rel=1e-6)

    term.backward()
    step = 1e-6
    for parameter in trained[:3] if kind != "dora" else []:  # which holds its norms constant in the backward pass
        direction = torch.randn_like(parameter)  # of finite differences
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            up = float(penalty.of_weights(model).detach())
            parameter.add_(direction, alpha=-2 * step)
            down = float(penalty.of_weights(model).detach())
            parameter.add_(direction, alpha=step)
        slope = float((parameter.grad * direction).sum())
        assert slope == pytest.approx((up - down) / (2 * step), rel=1e-3, abs=1e-4)


def test_without_strength_it_only_reports_and_it_lets_go_of_the_start() -> None:
    model, adapter = make_model(), Full(train=["*norm*"])
    adapter.attach(model.hf)
    penalty = L1(strength=0.0)
    penalty.setup(SimpleNamespace(model=model, adapter=adapter))
    assert penalty.of_weights(model) is None and penalty.of_batch(model, pack) is None
    assert len(penalty._changes) == 3  # the norms alone
    penalty.close()
    assert not penalty._changes and L1().of_weights(model) is None
