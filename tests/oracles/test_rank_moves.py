"""Adapters whose rank moves or is allocated: AdaLoRA equals PEFT's, step by step and file by file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from conformance.adapters import IDS, calibration, gpt2, llama, logits, move
from hone.adapters.adalora import AdaLoRA, Allocation, Orthogonality, budget_at, triplet_layers
from hone.adapters.base import load_adapter
from hone.engine.loop import load_tensors, persistent_buffers
from hone.errors import HoneError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),  # of PEFT's own files
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer:UserWarning"),
]
TOTAL, WARMUP, SETTLE, INTERVAL = 12, 2, 3, 2
TARGETS = ["q_proj", "v_proj", "down_proj"]


def their_adalora(model: nn.Module, **options: Any) -> Any:
    """Put PEFT's AdaLoRA on a model, away from its start."""
    config = peft.AdaLoraConfig(
        **{
            "init_r": 4, "target_r": 2, "tinit": WARMUP, "tfinal": SETTLE, "deltaT": INTERVAL, "beta1": 0.8,
            "beta2": 0.7, "orth_reg_weight": 0.3, "total_step": TOTAL, "lora_alpha": 6, "target_modules": TARGETS,
            "task_type": "CAUSAL_LM", **options,
        }
    )  # fmt: skip
    torch.manual_seed(3)
    theirs = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return theirs.double()


def pair(folder: Path) -> tuple[Any, nn.Module, AdaLoRA]:
    """Return PEFT's model, and ours with the same tensors."""
    theirs = their_adalora(llama())
    theirs.save_pretrained(folder)
    ours, adapter = llama(), AdaLoRA()
    adapter.load(ours, folder)
    options = {"warmup": WARMUP / TOTAL, "settle": SETTLE / TOTAL, "interval": INTERVAL, "mean_decay": 0.8}
    return theirs, ours, AdaLoRA(rank=2, start_rank=4, alpha=6.0, spread_decay=0.7, orthogonality=0.3, **options)


def theirs_by_key(theirs: Any) -> dict[str, Tensor]:
    found = {n.replace(".default", ""): p for n, p in theirs.base_model.model.named_parameters() if "lora_" in n}
    return {name: p for name, p in found.items() if p.requires_grad}


def ours_by_key(ours: nn.Module) -> dict[str, Tensor]:
    return {f"{name}.{key}": t for name, layer in triplet_layers(ours).items() for key, t in layer.tensors().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 1e-10) -> None:
    assert found.keys() == expected.keys() and found
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key].detach(), tensor.detach().view_as(found[key]), rtol=0, atol=atol, msg=key)


def test_adalora_trains_scores_and_allocates_as_peft_does(tmp_path: Path) -> None:
    theirs, ours, adapter = pair(tmp_path)
    (moves,), (penalty,) = adapter.callbacks(), adapter.penalties()
    run: Any = SimpleNamespace(model=ours, step=0, total=TOTAL)
    moves.on_start(run)
    params = [list(theirs_by_key(theirs).values()), list(ours_by_key(ours).values())]
    optimizers = [torch.optim.Adam(p, lr=1e-2) for p in params]
    seen = set()
    for step in range(1, TOTAL + 1):
        ids = (IDS + step) % 31
        theirs(input_ids=ids, labels=ids).loss.backward()  # PEFT adds its penalty to the loss itself
        (ours(input_ids=ids, labels=ids).loss + penalty.of_weights(ours)).backward()  # type: ignore[operator]
        assert_same({k: t.grad for k, t in ours_by_key(ours).items()},
                    {k: t.grad for k, t in theirs_by_key(theirs).items()})  # fmt: skip
        moves.on_gradients(run)
        theirs.base_model.update_and_allocate(step)
        run.step = step
        row: dict[str, Any] = {}
        moves.on_step(run, row)
        allocator = theirs.base_model.rankallocator
        if step < TOTAL - SETTLE:
            assert_same(moves.mean, {k.replace(".default", ""): t for k, t in allocator.exp_avg_ipt.items()})
            assert_same(moves.spread, {k.replace(".default", ""): t for k, t in allocator.exp_avg_unc.items()})
        assert_same(ours_by_key(ours), theirs_by_key(theirs))
        pattern = theirs.peft_config["default"].rank_pattern
        if pattern is not None:
            ranks = {k.replace(".lora_E.default", ""): torch.tensor(kept) for k, kept in pattern.items()}
            layers = triplet_layers(ours)
            assert layers.keys() == ranks.keys()
            assert all(torch.equal(layers[k].kept, kept) for k, kept in ranks.items())
            seen.add(row["rank"])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert min(seen) == 2 and len(seen) >= 2  # the mean rank went down in steps, to the target
    moves.on_end(run)
    moves.on_end(run)  # once more on the same state
    theirs.base_model.update_and_allocate(TOTAL)
    kept_rows = [layer.rank for layer in triplet_layers(ours).values()]
    assert sum(kept_rows) == 2 * len(kept_rows) and len(set(kept_rows)) > 1
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-10)


def test_adalora_budget_falls_as_peft_s_does() -> None:
    config = peft.AdaLoraConfig(init_r=12, target_r=3, tinit=7, tfinal=20, total_step=100, target_modules=TARGETS)
    allocator = peft.tuners.adalora.layer.RankAllocator(nn.Module(), config, "default")
    allocator.init_bgt, allocator.target_bgt = 120, 30
    expected = [allocator.budget_schedule(step)[0] for step in range(1, 101)]
    assert [budget_at(step, 100, 120, 30, 7, 20) for step in range(1, 101)] == expected
    assert expected[0] == 120 and expected[-1] == 30


@pytest.mark.filterwarnings("ignore:Adapter 'default'")  # PEFT takes rank 0 for a file that was not gathered
@pytest.mark.parametrize("kind", [llama, gpt2])
def test_adalora_files_go_both_ways_when_ranks_have_fallen(kind: Any, tmp_path: Path) -> None:
    ours, adapter = kind(), AdaLoRA(rank=2, start_rank=4, alpha=6.0)
    adapter.attach(ours)
    move(adapter, ours)
    layers = triplet_layers(ours)
    moves = Allocation(adapter)
    for i, layer in enumerate(layers.values()):
        layer.kept.copy_(torch.arange(4) < i % 5)  # 0 to 4 triplets, the first layer none
    moves.on_end(SimpleNamespace(model=ours))  # type: ignore[arg-type]
    assert [layer.rank for layer in layers.values()] == [i % 5 for i in range(len(layers))]
    wanted = logits(ours)
    adapter.save(ours, tmp_path / "ours", base="the/base")
    theirs = peft.PeftModel.from_pretrained(kind(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(logits(theirs), wanted, rtol=0, atol=1e-12)
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    again = kind()
    load_adapter(again, tmp_path / "theirs")
    torch.testing.assert_close(logits(again), wanted, rtol=0, atol=1e-12)
    fresh = kind()
    loaded = AdaLoRA()
    loaded.load(fresh, tmp_path / "ours")
    assert torch.equal(logits(fresh), wanted)
    loaded.save(fresh, tmp_path / "again", base="the/base")
    first, second = (json.loads((tmp_path / f / "adapter_config.json").read_text()) for f in ("ours", "again"))
    assert first["rank_pattern"] == second["rank_pattern"] and first["init_r"] == second["init_r"] == 4


def test_weights_of_an_earlier_step_come_back_with_the_triplets_that_were_left_then() -> None:
    model, adapter = llama(), AdaLoRA(rank=2, start_rank=4, interval=1)
    adapter.attach(model)
    move(adapter, model)
    (moves,) = adapter.callbacks()
    held = {**dict(model.named_parameters()), **dict(persistent_buffers(model))}
    layers, run, states = list(triplet_layers(model).values()), SimpleNamespace(model=model, total=100), []
    moves.on_start(run)  # type: ignore[arg-type]
    for step in (40, 60):  # other sensitivities, a smaller budget
        torch.manual_seed(step)
        for running in (*moves.mean.values(), *moves.spread.values()):
            running.uniform_()
        run.step = step
        moves.on_step(run, {})  # type: ignore[arg-type]
        states.append(({name: t.detach().clone() for name, t in held.items()}, [int(la.kept.sum()) for la in layers]))
    assert sum(states[0][1]) > sum(states[1][1])
    load_tensors(held, states[0][0], "weights")  # as a run does that ends with its best weights
    wanted = logits(model)
    moves.on_end(run)  # type: ignore[arg-type]
    assert [layer.rank for layer in layers] == states[0][1]
    torch.testing.assert_close(logits(model), wanted, rtol=0, atol=1e-12)


def test_adalora_convolutions_equal_peft_s(tmp_path: Path) -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 2)).double()

    theirs = their_adalora(network(), target_modules=["0", "2"], task_type=None)
    theirs.save_pretrained(tmp_path)
    ours = network()
    AdaLoRA().load(ours, tmp_path)
    image = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-12)
    AdaLoRA().merge(ours)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-12)


def test_the_penalty_is_zero_for_orthonormal_factors() -> None:
    model = llama()
    AdaLoRA(rank=2, start_rank=4).attach(model)
    penalty = Orthogonality(strength=0.5)
    before = penalty.of_weights(model)
    assert before is not None and before > 0.5  # |0 - I| is 2 for rank 4
    with torch.no_grad():
        for layer in triplet_layers(model).values():
            layer.lora_A.copy_(torch.linalg.qr(layer.lora_A.T)[0].T)
            layer.lora_B.copy_(torch.linalg.qr(layer.lora_B)[0])
    after = penalty.of_weights(model)
    assert after is not None and after < 1e-12


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rank": 9}, "more than the matrix"),
        ({"rank": 4, "start_rank": 9}, "adapter.start_rank: 9 is more than the matrix of 'model.layers.0"),
        ({"rank": 4, "start_rank": 3}, "below adapter.rank"),
        ({"rank": 2, "warmup": 0.5, "settle": 0.5}, "leave no steps"),
        ({"rank": 2, "targets": ["embed_tokens"]}, "is a Embedding; adalora goes around"),
    ],
)
def test_adalora_refuses_what_does_not_fit(options: dict[str, Any], word: str) -> None:
    model = llama()
    with pytest.raises(HoneError, match=word):
        AdaLoRA(**options).attach(model, calibration(model))
