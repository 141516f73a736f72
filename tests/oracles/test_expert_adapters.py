"""Experts: routing equals plain loops over tokens and trees, only what is routed is computed, loads are balanced."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conformance.adapters import IDS, MODELS
from end_to_end.support import rows, train
from hone import parts
from hone.adapters.experts import Balance, Balanced, LLaVAMoLE, Loads, MoR, Routes, by_expert, routers_of, through, top
from hone.adapters.host import adapted_layers
from hone.adapters.lora import LoRA
from hone.adapters.smore import Gate, SMoRE, Tree
from hone.errors import HoneError


@torch.no_grad()
def shaken(adapter: Any, kind: str = "llama") -> tuple[nn.Module, dict[str, Any]]:
    """Return a model with an adapter whose tensors are large enough to choose differently for different tokens."""
    model = MODELS[kind]()
    torch.manual_seed(1)
    adapter.attach(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return model, adapted_layers(model)


def loss_of(model: Any) -> Tensor:
    return model(input_ids=IDS, labels=IDS).loss


def steps(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()


# ---- LLaVA-MoLE


@pytest.mark.parametrize("gated", [True, False])
@torch.no_grad()
def test_each_token_gets_its_best_expert_and_a_block_follows_one_choice(gated: bool) -> None:
    _, layers = shaken(LLaVAMoLE(experts=4, rank=2, alpha=3.0, gated=gated))
    gate, up, down = (layers[f"model.layers.0.mlp.{name}_proj"] for name in ("gate", "up", "down"))
    assert gate.router is up.router is down.router is not layers["model.layers.1.mlp.up_proj"].router
    x, inner = torch.randn(7, 16, dtype=torch.float64), torch.randn(7, 24, dtype=torch.float64)
    probabilities = (x @ gate.router.linear.weight.T + gate.router.linear.bias).softmax(-1)
    chosen = probabilities.argmax(-1).tolist()
    assert len(set(chosen)) > 2
    found = [gate(x), up(x), down(inner)]
    for layer, given, output in zip((gate, up, down), (x, x, inner), found, strict=True):
        for t, e in enumerate(chosen):
            change = layer.expert_B[e] @ (layer.expert_A[e] @ given[t])
            factor = 1.5 * (probabilities[t, e] if gated else 1.0)
            expected = layer.base_layer(given[t]) + factor * change
            torch.testing.assert_close(output[t], expected, rtol=0, atol=1e-12)
    with pytest.raises(HoneError, match="which has not run on these tokens"):
        down(inner)  # the choice was dropped with its graph when the last layer had asked


@torch.no_grad()
def test_layers_of_an_attention_block_choose_by_what_they_see() -> None:
    model, layers = shaken(LLaVAMoLE(experts=3, rank=2, targets=["self_attn.*"]))
    loss_of(model)
    q, o = (layers[f"model.layers.0.self_attn.{name}_proj"] for name in "qo")
    x, other = torch.randn(5, 16, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    first = q.router.route(x, x, False)
    assert q.router.route(x, x, False) is first  # k and v see the same tensor
    assert not torch.equal(o.router.route(other, other, True).gates, first.gates)
    assert o.router._routes is None


@pytest.mark.parametrize("kind", MODELS)
def test_one_expert_is_lora(kind: str) -> None:
    ours, theirs = MODELS[kind](), MODELS[kind]()
    LLaVAMoLE(experts=1, rank=3).attach(ours)
    LoRA(rank=3, targets=["mlp.*"]).attach(theirs)
    plain = adapted_layers(theirs)
    with torch.no_grad():
        for name, layer in adapted_layers(ours).items():
            plain[name].lora_A.copy_(layer.expert_A[0])
    steps(ours)
    steps(theirs)
    for name, layer in adapted_layers(ours).items():
        delta = layer.scale * layer.expert_B[0] @ layer.expert_A[0]
        assert delta.abs().max() > 1e-3
        torch.testing.assert_close(delta, plain[name].delta(), rtol=0, atol=1e-12)


def test_only_what_is_routed_is_read() -> None:
    torch.manual_seed(0)
    x, chosen = torch.randn(5, 3), torch.tensor([[2, 0], [0, 2], [2, 0], [0, 2], [0, 2]])
    down, up = torch.randn(4, 2, 3), torch.randn(4, 6, 2)
    down[1], up[3] = math.nan, math.nan
    pairs = by_expert(chosen, 4)
    assert pairs.sizes == [5, 0, 5, 0]
    found = through(x, pairs, down, up)
    assert found.shape == (10, 6) and bool(found.isfinite().all())
    assert through(x[:0], by_expert(chosen[:0], 4), down, up).shape == (0, 6)


# ---- MoR


@pytest.mark.parametrize(("routers", "active"), [(3, 2), (1, 2), (2, 1)])
@torch.no_grad()
def test_sub_routers_are_mixed_and_the_best_experts_of_the_mix_are_added(routers: int, active: int) -> None:
    _, layers = shaken(MoR(routers=routers, experts=5, active=active, rank=2, alpha=3.0))
    layer = layers["model.layers.1.self_attn.q_proj"]
    x, router = torch.randn(7, 16, dtype=torch.float64), layer.router
    output = layer(x)
    for t in range(7):
        mix = torch.zeros(5, dtype=torch.float64)
        weights = [1.0] if router.main is None else (router.main.weight @ x[t] + router.main.bias).softmax(-1).tolist()
        for j in range(routers):
            own = slice(5 * j, 5 * j + 5)
            mix += weights[j] * (router.linear.weight[own] @ x[t] + router.linear.bias[own]).softmax(-1)
        best = sorted(range(5), key=lambda e: -float(mix[e]))[:active]
        total = sum(mix[best]) if active > 1 else 1.0
        expected = layer.base_layer(x[t])
        for e in best:
            expected = expected + 1.5 * mix[e] / total * (layer.expert_B[e] @ (layer.expert_A[e] @ x[t]))
        torch.testing.assert_close(output[t], expected, rtol=0, atol=1e-12)
    assert (router.main is None) == (routers == 1)


# ---- S'MoRE


def subtree(layer: Tree, x: Tensor, level: int, above: list[int], seen: Tensor) -> tuple[Tensor, list[int]]:
    """Return the state of a node and how often each expert of its level was met, by recursion over its children."""
    gate: Any = layer.gates[level]
    keys = [layer.gates[level + 1 + i].keys[e] for i, e in reversed(list(enumerate(above)))]  # type: ignore[union-attr, index]
    query = gate.query(torch.cat([seen, *keys]))
    probabilities = (gate.keys @ query).softmax(-1)
    best = sorted(range(len(probabilities)), key=lambda e: -float(probabilities[e]))[: gate.active]
    total = sum(probabilities[best]) if gate.active > 1 else 1.0
    state: Any = 0
    for e in best:
        inner = layer.up[level][e] @ (layer.down[level][e] @ x)
        if level:
            inner = inner + layer.mix[level - 1] @ subtree(layer, x, level - 1, [e, *above], seen)[0]
        state = state + probabilities[e] / total * layer.activation(inner)
    return state, best


@pytest.mark.parametrize(
    ("experts", "active", "ranks"),
    [([4], [2], [3]), ([3, 4], [2, 2], [2, 3]), ([4, 3, 3], [2, 1, 2], [1, 2, 2]), ([3, 3], [3, 3], [2, 2])],
)
@torch.no_grad()
def test_a_tree_is_what_recursion_gives(experts: list[int], active: list[int], ranks: list[int]) -> None:
    _, layers = shaken(SMoRE(experts=experts, active=active, ranks=ranks, narrow=6, width=5))
    layer = layers["model.layers.0.mlp.down_proj"]
    x = torch.randn(9, 24, dtype=torch.float64)
    output, roots = layer(x), set()
    for t in range(9):
        state, best = subtree(layer, x[t], len(experts) - 1, [], layer.narrow(x[t]))
        roots.add(tuple(best))
        expected = layer.base_layer(x[t]) + layer.final @ state
        torch.testing.assert_close(output[t], expected, rtol=0, atol=1e-12)
    assert len(roots) > 1 or active[-1] == experts[-1]
    width = sum(s * r for s, r in zip(experts, ranks, strict=True))
    assert layer.final.shape == (16, width)


def test_a_tree_costs_what_a_lora_of_its_width_costs_and_little_more() -> None:
    model = nn.Sequential(nn.Linear(512, 512))
    SMoRE(targets=["0"], experts=[4, 4], active=[2, 2], ranks=[4, 4], narrow=8, width=8).attach(model)
    layer: Any = model[0]
    count = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    gates = sum(p.numel() for p in [*layer.narrow.parameters(), *layer.gates.parameters()])
    assert count - gates == 2 * 512 * 32 + 32 * 16 + 4 * 4 * (16 + 32)


# ---- load balancing


def balanced(experts: int, load: list[float], probabilities: Tensor, chosen: Tensor) -> Tensor:
    router = Balanced(experts, probabilities).train()
    router.load.copy_(torch.tensor(load))
    router.watch(probabilities, chosen)
    found = Balance(strength=0.5).of_batch(router, None)
    assert found is not None
    return found


def test_the_balance_term_is_its_equation_and_least_where_loads_are_equal() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    probabilities = logits.softmax(-1)
    term = balanced(3, [0.5, 0.3, 0.2], probabilities, probabilities.topk(1).indices)
    expected = 0.5 * 3 * sum(f * probabilities[:, e].sum() for e, f in enumerate([0.5, 0.3, 0.2]))
    torch.testing.assert_close(term, expected)
    term.backward()
    assert logits.grad is not None and bool((logits.grad[:, 0] > 0).all())  # the busiest becomes less probable
    for load in ([1 / 3, 1 / 3, 1 / 3], [0.4, 0.3, 0.3], [1.0, 0.0, 0.0]):
        mean = torch.tensor(load, dtype=torch.float64).expand(6, 3)
        value = float(balanced(3, load, mean, mean.topk(1).indices)) / 6
        assert value == pytest.approx(0.5) if load[0] < 0.34 else value > 0.5


@pytest.mark.parametrize("active", [1, 2, 3])
def test_the_balance_term_of_a_tree_is_the_official_code_s(active: int) -> None:
    torch.manual_seed(0)
    states = torch.randn(6, 4, 3, dtype=torch.float64)  # tokens, paths
    gate = Gate(3, 5, active, 4, states).train()
    routes = gate(states)
    loads = F.one_hot(routes.experts, 5).double().flatten(0, -2).sum(0) / 24
    gate.settle(gate.counts)
    gate(states)
    mean = (gate.query(states) @ gate.keys.T).softmax(-1).flatten(0, 1).mean(0)
    torch.testing.assert_close(gate.taken() / 6, 5 * (loads * mean).sum(), rtol=0, atol=1e-12)


def test_paths_of_one_token_count_as_one_token() -> None:
    each = torch.tensor([[0.7, 0.3], [0.2, 0.8], [0.6, 0.4]], dtype=torch.float64)
    paths = each[:, None].expand(3, 4, 2)
    plain = balanced(2, [0.6, 0.4], each, each.topk(1).indices)
    torch.testing.assert_close(balanced(2, [0.6, 0.4], paths, paths.topk(1).indices), plain)


@pytest.mark.parametrize("make", [lambda: LLaVAMoLE(rank=2), lambda: MoR(rank=2), lambda: SMoRE(ranks=[2, 2])])
def test_no_split_of_a_step_changes_the_term_or_the_loads(make: Callable[[], Any]) -> None:
    adapter = make()
    model, layers = shaken(adapter)
    model.train()
    name, layer = next((n, la) for n, la in layers.items() if n.endswith("up_proj"))
    (penalty,), x = adapter.penalties(), torch.randn(12, 16, dtype=torch.float64)
    only = nn.ModuleDict({"layer": layer})
    for router in routers_of(only):
        router.load.copy_(torch.rand(len(router.load)).softmax(-1))
    gradients, loads = [], []
    for sizes in ([12], [5, 4, 3]):
        only.zero_grad()
        for part in x.split(sizes):
            layer(part)
            penalty.of_batch(only, None).backward()
        gradients.append([p.grad.clone() for p in only.parameters() if p.grad is not None])
        loads.append([router.counts for router in routers_of(only)])
        for router in routers_of(only):
            router.counts = torch.zeros_like(router.counts)
    assert gradients[0] and all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*gradients, strict=True)), name
    assert all(torch.equal(a, b) for a, b in zip(*loads, strict=True)) and all(int(c.sum()) >= 12 for c in loads[0])


def test_loads_are_those_of_the_step_before() -> None:
    model, layers = shaken(MoR(rank=2, experts=4, targets=["layers.0.mlp.up_proj"]))
    run: Any = type("Run", (), {"model": model})
    run.cluster = type("Cluster", (), {"world": 1, "device": torch.device("cpu")})
    (layer,), row = layers.values(), dict[str, Any]()
    Loads().on_step(run, row)
    assert layer.router.load.tolist() == [0.25] * 4 and row["busiest_expert"] == 1.0  # nothing ran
    x = torch.randn(10, 16, dtype=torch.float64)
    layer.train()(x)
    Loads().on_step(run, row)
    chosen = layer.eval().router(x).experts
    expected = torch.bincount(chosen.flatten(), minlength=4).double() / 20
    assert torch.equal(layer.router.load, expected) and row["busiest_expert"] == 4 * float(expected.max())
    assert "load" in dict(layer.router.named_buffers()) and not any("load" in key for key in layer.tensors())
    layer.train()(x)
    Loads().on_start(run)  # what rehearsals counted
    assert int(layer.router.counts.sum()) == 0


def test_only_passes_that_are_trained_on_are_watched_and_nothing_is_held_afterwards() -> None:
    adapter = LLaVAMoLE(rank=2)
    model, _ = shaken(adapter)
    (penalty,) = adapter.penalties()

    def held() -> list[Any]:
        return [kept for r in routers_of(model) for kept in (r.mass, r._routes, r._source) if kept is not None]  # type: ignore[attr-defined]

    model.eval()
    loss_of(model)
    with torch.no_grad():
        loss_of(model.train())
    assert not held() and penalty.of_batch(model, None) is None
    loss = loss_of(model)
    assert len(held()) == 2
    (loss + penalty.of_batch(model, None)).backward()
    assert not held()


def test_what_runs_again_in_the_backward_pass_is_not_watched_again() -> None:
    adapter = SMoRE(ranks=[2, 2])
    _, layers = shaken(adapter)
    layer = layers["model.layers.0.mlp.up_proj"].train()
    only, (penalty,) = nn.ModuleDict({"layer": layer}), adapter.penalties()
    x = torch.randn(6, 16, dtype=torch.float64, requires_grad=True)
    gradients = []
    for again in (False, True):
        only.zero_grad()
        out = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
        (out.square().sum() + penalty.of_batch(only, None)).backward()
        gradients.append([p.grad.clone() for p in only.parameters() if p.grad is not None])
        assert all(router.mass is None for router in routers_of(only))
    assert [int(router.counts.sum()) for router in routers_of(only)] == [2 * 6 * 4, 2 * 6 * 2]
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["llava-mole", "mor", "smore"])
def test_a_run_is_the_same_in_micro_batches_and_with_recomputation(
    name: str, tiny_model: Path, qa_file: Path, tmp_path: Path
) -> None:
    found = []
    options = {"smore": {"ranks": [2, 2]}}.get(name, {"rank": 2})
    adapter = {"name": name, "balance": 0.5, **options}
    for i, changes in enumerate(({}, {"micro_tokens": 90}, {"recompute": True})):
        train(tiny_model, qa_file, tmp_path / str(i), adapter=adapter, steps=3, precision="float64", **changes)
        found.append(rows(tmp_path / str(i) / "metrics.jsonl"))
    for others in found[1:]:
        for row, other in zip(found[0], others, strict=True):
            for figure in ("loss", "penalty/balance", "busiest_expert", "grad_norm"):
                assert other[figure] == pytest.approx(row[figure], rel=1e-9), figure
    start = 0.5 * (2 if name == "smore" else 1)  # each of its gates chooses two children
    assert found[0][0]["penalty/balance"] == pytest.approx(start)
    assert found[0][2]["penalty/balance"] != pytest.approx(start, abs=1e-4)


# ---- precision and refusals


@pytest.mark.parametrize("make", [lambda: LLaVAMoLE(rank=2), lambda: MoR(rank=2), lambda: SMoRE(ranks=[2, 2])])
def test_half_precision_layers_stay_in_half_precision_and_choose_in_more(make: Callable[[], Any]) -> None:
    model = MODELS["llama"]().to(torch.bfloat16)
    make().attach(model)
    layer = adapted_layers(model)["model.layers.0.mlp.up_proj"]
    assert all(p.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)
    x = torch.randn(5, 16, dtype=torch.bfloat16, requires_grad=True)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    wide = MODELS["llama"]().float()
    make().attach(wide)
    layer = adapted_layers(wide)["model.layers.0.mlp.up_proj"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x.detach().float())
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained)


def test_several_gates_add_up_to_one_and_a_single_one_keeps_its_probability() -> None:
    probabilities = torch.tensor([[0.5, 0.3, 0.2]])
    assert torch.equal(top(probabilities, 1).gates, torch.tensor([[0.5]]))
    several: Routes = top(probabilities, 2)
    assert several.experts.tolist() == [[0, 1]]
    torch.testing.assert_close(several.gates, torch.tensor([[0.625, 0.375]]))
    torch.testing.assert_close(F.normalize(top(probabilities, 3).gates, p=1.0), probabilities)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llava-mole", {"targets": ["embed_tokens"]}, "is an embedding; adapter 'llava-mole' goes around linear"),
        ("llava-mole", {"rank": 17}, "adapter.rank: 17 is more than the matrix of '.*gate_proj' can have"),
        ("mor", {"active": 3, "experts": 2}, "adapter.active: 3 of 2 experts cannot be chosen"),
        ("smore", {"active": [2]}, "adapter.active: expected a number for each of the 2 levels"),
        ("smore", {"ranks": [2, 2, 2]}, "adapter.ranks: expected a number for each of the 2 levels"),
        ("smore", {"active": [5, 2]}, "adapter.active: 5 of 4 experts cannot be chosen"),
        ("smore", {"ranks": [2, 17]}, "adapter.rank: 17 is more than the matrix"),
    ],
)
def test_what_does_not_fit_is_said(name: str, options: dict[str, Any], message: str) -> None:
    model = MODELS["llama"]()
    with pytest.raises(HoneError, match=message):
        parts.load("adapter", name)(**options).attach(model)
    assert not adapted_layers(model)


def test_a_merge_is_refused_with_the_reason() -> None:
    adapter = MoR(rank=2)
    model, _ = shaken(adapter)
    with pytest.raises(HoneError, match="'mor' cannot be merged into its base: which experts change a layer depends"):
        adapter.merge(model)


def test_layouts_other_than_linear_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3))
    with pytest.raises(HoneError, match="'0' is a convolution; adapter 'smore' goes around linear layers alone"):
        SMoRE(targets=["0"], ranks=[1, 1]).attach(model)
