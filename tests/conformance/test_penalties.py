"""Every registered penalty: its gradient, zero strength, micro-batches, what it leaves behind, and evaluation."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from conformance.test_objectives import make_model, sequences
from hone.adapters.full import Full
from hone.adapters.lora import LoRA
from hone.engine.devices import Cluster
from hone.engine.evaluate import mean_loss
from hone.engine.loop import Player, Run, Trainer
from hone.errors import HoneError
from hone.objectives.language import SFT
from hone.parts import catalogue, load
from hone.text.pack import Tree, pack

RECORDS = {record.name: record for record in catalogue() if record.kind == "penalty"}
# Options to test beside the defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "consistency": [{"form": "classification"}],
    "diversity": [{"form": "classification"}, {"top": None}],
    "svd": [{"norm": "nuclear", "k": 2, "tokens": 6}],
    "activation-density": [{"eps": 1e-2, "modules": ["act_fn"]}],
}
# What looks at all tokens of a micro-batch together, so that it depends on how a step is split; its record says so.
TOGETHER = [("diversity", {"form": "classification"}), ("svd", {}), ("svd", VARIANTS["svd"][0])]
CASES = [(name, options) for name in RECORDS for options in ({}, *VARIANTS.get(name, []))]
every_penalty = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=[f"{n} {' '.join(f'{k}={v}' for k, v in o.items())}".strip() for n, o in CASES]
)


class Silent(SFT):
    """Runs the model and asks for nothing, so that penalties are all that trains."""

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return 0."""
        loss, _ = super().loss(model, batch)
        return 0.0 * loss, {}


def new_run(name: str = "", options: dict[str, Any] | None = None, *, micro: int | None = None, **changes: Any) -> Run:
    """Return a run whose adapter is off its start, with a penalty; a step of plain SGD at rate 1 shows the gradient."""
    model = make_model()
    adapter = LoRA(rank=4)
    torch.manual_seed(1)
    adapter.attach(model.hf)
    with torch.no_grad():
        for _, p in adapter.trainable(model.hf):
            p.add_(torch.randn_like(p), alpha=0.1)
    penalties = [load("penalty", name)(**(options or {}))] if name else []
    recipe: Any = SimpleNamespace(micro_tokens=micro, batch_tokens=4096, seed=0, clip=None)
    run = Run(recipe, Cluster("cpu", "float64"), model, SFT(), None, 10, penalties=penalties, adapter=adapter)
    for key, value in changes.items():
        setattr(run, key, value)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    run.players["model"] = Player(trained, torch.optim.SGD([p for _, p in trained], lr=1.0), lambda step, total: 1.0)
    for penalty in penalties:
        penalty.setup(run)
    return run


def gradients(run: Run, trees: Sequence[Tree] | None = None) -> dict[str, Tensor]:
    """Return the gradient of a step by name, as the weights show it."""
    before = {name: p.detach().clone() for name, p in run.trainable}
    run.last = Trainer(run).train_step(sequences() if trees is None else trees)  # type: ignore[attr-defined]
    return {name: before[name] - p.detach() for name, p in run.trainable}


@every_penalty
def test_the_gradient_is_finite_and_reaches_what_trains(name: str, options: dict[str, Any]) -> None:
    run = new_run(name, options, objective=Silent())
    found = gradients(run)
    assert all(torch.isfinite(g).all() for g in found.values())
    reached = [key for key, g in found.items() if g.any()]
    assert {"gate_proj"} <= {key.split(".lora")[0].rpartition(".")[2] for key in reached}
    row = run.last  # type: ignore[attr-defined]
    assert f"penalty/{name}" in row and row["loss"] == 0.0


@every_penalty
def test_strength_zero_changes_nothing(name: str, options: dict[str, Any]) -> None:
    plain, with_zero = new_run(), new_run(name, {**options, "strength": 0.0})
    wanted, found = gradients(plain), gradients(with_zero)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    row = with_zero.last  # type: ignore[attr-defined]
    assert f"penalty/{name}" not in row
    assert set(row) > set(plain.last)  # it reports nevertheless  # type: ignore[attr-defined]


@every_penalty
def test_it_adds_its_gradient_to_the_objective_s(name: str, options: dict[str, Any]) -> None:
    both = gradients(new_run(name, options))
    alone, without = gradients(new_run(name, options, objective=Silent())), gradients(new_run())
    for key, gradient in both.items():
        torch.testing.assert_close(gradient, alone[key] + without[key], rtol=1e-5, atol=1e-7)  # norms are in float32


@every_penalty
def test_training_on_it_makes_it_smaller(name: str, options: dict[str, Any]) -> None:
    first = new_run(name, options, objective=Silent())
    steepness = sum(float(g.square().sum()) for g in gradients(first).values())
    rate = 1e-6 * abs(first.last[f"penalty/{name}"]) / steepness  # a millionth a step  # type: ignore[attr-defined]
    run = new_run(name, options, objective=Silent())
    run.players["model"].rates[0] = rate
    trainer = Trainer(run)
    values = [trainer.train_step(sequences())[f"penalty/{name}"] for _ in range(10)]
    assert values[-1] < values[0] - 5e-6 * abs(values[0])


@every_penalty
@pytest.mark.parametrize("micro", [12, 1])
def test_any_split_into_micro_batches_gives_the_same_gradient(name: str, options: dict[str, Any], micro: int) -> None:
    if (name, options) in TOGETHER:
        assert "how a step is split" in " ".join(RECORDS[name].deviations.split())
        pytest.skip("it looks at all tokens of a micro-batch together")
    whole, split = new_run(name, options), new_run(name, options, micro=micro)
    wanted, found = gradients(whole), gradients(split)
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-12)
    first, second = whole.last, split.last  # type: ignore[attr-defined]
    for key in first:
        if key not in ("seconds", "memory"):
            assert second[key] == pytest.approx(first[key], rel=1e-9, abs=1e-12)


@every_penalty
@pytest.mark.parametrize("recompute", [False, True])
def test_it_leaves_no_graph_behind_and_no_hook(name: str, options: dict[str, Any], recompute: bool) -> None:
    plain = new_run(name, options)
    wanted = gradients(plain)
    gc.freeze()  # what was there before is not looked through: that takes half a second
    try:
        run = new_run(name, options)
        run.model.checkpoint_layers(recompute)
        found = gradients(run)
        gc.collect()
        assert not [o for o in gc.get_objects() if type(o) is Tensor and o.grad_fn is not None]
    finally:
        gc.unfreeze()
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-12)
    for penalty in run.penalties:
        penalty.close()
        penalty.close()
    bare = new_run()
    bare.model.checkpoint_layers(recompute)  # puts a hook of transformers on the embedding
    assert hooks(run.model) == hooks(bare.model) and not run.model.watchers


def hooks(model: torch.nn.Module) -> list[int]:
    """Return the number of hooks on each module."""
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]


@every_penalty
def test_evaluation_is_unaffected(name: str, options: dict[str, Any]) -> None:
    plain, run = new_run(), new_run(name, options)
    wanted, found = (mean_loss(r.model, r.objective, sequences(), 4096, r.cluster) for r in (plain, run))
    assert found == wanted
    gradients(run)
    once = gradients(run)
    other = new_run(name, options)
    gradients(other)
    mean_loss(other.model, other.objective, sequences()[:2], 4096, other.cluster)  # leaves nothing for the next step
    assert all(torch.equal(value, once[key]) for key, value in gradients(other).items())


@every_penalty
def test_padded_rows_give_what_packed_ones_give(name: str, options: dict[str, Any]) -> None:
    trees = [tree for tree in sequences() if len(tree.tokens) == 1 and len(tree) == 8] * 2  # no padding to be counted
    packed, padded = new_run(name, options), new_run(name, options)
    padded.model.packs = False
    wanted, found = gradients(packed, trees), gradients(padded, trees)
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-6, atol=1e-9)


@every_penalty
def test_a_batch_without_trained_tokens_is_no_trouble(name: str, options: dict[str, Any]) -> None:
    run = new_run(name, options)
    batch = pack(sequences()[:1])
    batch.weights.zero_()
    run.model.train()
    run.model.hidden(batch)
    (penalty,) = run.penalties
    term = penalty.of_batch(run.model, batch)
    if term is None:  # a penalty on weights
        term = penalty.of_weights(run.model)
    assert torch.isfinite(term)
    term.backward()


@every_penalty
def test_arithmetic_of_few_bits_gives_about_the_same(name: str, options: dict[str, Any]) -> None:
    run = new_run(name, {**options, "strength": 1.0}, objective=Silent())
    run.model.float()
    wanted = gradients(run)
    run = new_run(name, {**options, "strength": 1.0}, objective=Silent())
    run.model.float()
    run.cluster.precision = "bf16"
    found = gradients(run)
    whole, halved = (torch.cat([g.flatten() for g in one.values()]) for one in (wanted, found))
    assert halved.dtype == torch.float32 and torch.isfinite(halved).all()
    if (name, options) != ("activation-density", {}):  # whose gradient lies where |a| is 3e-4, in the rounding of bf16
        assert torch.nn.functional.cosine_similarity(whole, halved, dim=0) > 0.9


def test_two_penalties_of_one_name_add_up() -> None:
    run = new_run("diversity", {"strength": 0.5}, objective=Silent())
    second = load("penalty", "diversity")(strength=0.25)
    second.setup(run)
    run.penalties.append(second)
    found = gradients(run)
    single = gradients(new_run("diversity", {"strength": 0.75}, objective=Silent()))
    for key, gradient in single.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-12)


def test_a_penalty_that_needs_the_base_refuses_full_training() -> None:
    model, adapter = make_model(), Full()
    adapter.attach(model.hf)
    run: Any = SimpleNamespace(model=model, adapter=adapter, step=0, total=1)
    with pytest.raises(HoneError, match=r"'consistency' compares with the pretrained model.*use an adapter that keeps"):
        load("penalty", "consistency")().setup(run)
    assert not model.watchers


def test_density_needs_activation_functions() -> None:
    run = new_run()
    with pytest.raises(HoneError, match=r"activation-density\.modules: 'act_fm' matches nothing.*act_fn"):
        load("penalty", "activation-density")(modules=["act_fm"]).setup(run)
    for layer in run.model.hf.model.layers:
        layer.mlp.act_fn = torch.nn.Identity()
    with pytest.raises(HoneError, match=r"finds no activation function.*modules: "):
        load("penalty", "activation-density")().setup(run)
    idle = load("penalty", "activation-density")(modules=["lm_head"])
    with pytest.raises(HoneError, match=r"matches nothing"):
        idle.setup(run)


def test_modules_that_do_not_run_are_found_out() -> None:
    run = new_run()
    run.model.decoder.idle = torch.nn.ReLU()
    penalty = load("penalty", "activation-density")(modules=["idle"])
    penalty.setup(run)
    run.penalties.append(penalty)
    with pytest.raises(HoneError, match=r"none of the modules of 'activation-density' runs"):
        gradients(run)


def test_variants_name_what_exists() -> None:
    assert set(VARIANTS) <= set(RECORDS)
    assert all((name, options) in CASES for name, options in TOGETHER)
