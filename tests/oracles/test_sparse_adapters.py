"""SpIEL and SaRA equal dense training under a gradient mask; regrowth follows its equations and finds what shifted."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from end_to_end.support import rows, train
from hone import Recipe, parts
from hone.adapters import sparse
from hone.adapters.host import adapted_layers
from hone.adapters.layers import layout_of
from hone.adapters.regrow import Candidates, Momenta, kept_share, reset_state
from hone.adapters.sara import LowRankEntries, SaRA, Settling, threshold_of
from hone.adapters.sparse import Sparse, SpIEL, draw, share_out
from hone.engine.devices import Cluster
from hone.engine.loop import Run
from hone.errors import HoneError, RecipeError
from oracles.masked import IDS, adam, assert_same_weights, llama, train_masked, trained

# The sparse layer


class Everything(nn.Module):
    """Every kind of layer that a sparse update goes around, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6, padding_idx=0)
        self.linear = nn.Linear(6, 8)
        self.transposed = Conv1D(6, 8)
        self.conv = nn.Conv2d(1, 5, 3, stride=2, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transposed(torch.tanh(self.linear(self.embed(ids))))
        return torch.tanh(self.conv(x[:, None]))


@pytest.mark.parametrize("piece", [1 << 21, 12])
def test_the_sparse_layer_equals_dense_gradients(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "PIECE", piece)  # 12: pieces of one or two rows
    torch.manual_seed(0)
    dense = Everything().double()
    names = ["embed", "linear", "transposed", "conv"]
    model = copy.deepcopy(dense)
    SpIEL(density=0.3, targets=names, bias="all").attach(model)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.values.normal_()
        for name in names:
            layer = adapted_layers(model)[name]
            dense.get_submodule(name).weight.copy_(layer.folded())  # type: ignore[operator]
    model(IDS).square().sum().backward()
    dense(IDS).square().sum().backward()
    torch.testing.assert_close(model(IDS), dense(IDS), rtol=0, atol=1e-12)
    for name in names:
        layer, plain = adapted_layers(model)[name], dense.get_submodule(name)
        gradient = layout_of(plain).matrix(plain.weight.grad).flatten()  # type: ignore[union-attr, arg-type]
        torch.testing.assert_close(layer.values.grad, gradient[layer.index.long()], rtol=0, atol=1e-12)
        if name != "embed":
            torch.testing.assert_close(layer.base_layer.bias.grad, plain.bias.grad, rtol=0, atol=1e-12)


def test_the_gradient_of_the_input_is_right_by_finite_differences() -> None:
    torch.manual_seed(0)
    layer = Sparse(nn.Linear(5, 4).double(), layout_of(nn.Linear(5, 4)), draw(7, 20))  # type: ignore[arg-type]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    values = torch.randn(7, dtype=torch.float64, requires_grad=True)
    bias = layer.base_layer.bias
    assert torch.autograd.gradcheck(lambda x, v: sparse._Product.apply(x, v, bias, layer), (x, values))
    (once,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|twice"):
        once.sum().backward()


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_spiel_with_fixed_entries_equals_dense_training_under_a_mask(quantize: Any) -> None:
    torch.manual_seed(5)
    model, adapter = llama(), SpIEL(density=0.2, regrow="none", quantize=quantize)
    adapter.attach(model)
    dense, masks = llama(), {}
    with torch.no_grad():
        for name, layer in adapted_layers(model).items():
            dense.get_submodule(name).weight.copy_(layer.base_layer.weight)  # type: ignore[operator]
            mask = torch.zeros(layer.outputs * layer.inputs, dtype=torch.float64)
            mask[layer.index.long()] = 1
            masks[f"{name}.weight"] = mask.view(layer.outputs, layer.inputs)
    train_masked(dense, masks)
    assert_same_weights(trained(adapter, model), dense)


def test_entries_are_distinct_and_shared_out_by_size() -> None:
    torch.manual_seed(0)
    for count, size in ((3, 1000), (400, 1000), (1000, 1000)):
        found = draw(count, size)
        assert len(found.unique()) == count
        assert int(found.min()) >= 0 and int(found.max()) < size
    assert share_out(10, {"a": 100, "b": 300, "c": 600}) == {"a": 1, "b": 3, "c": 6}
    assert sum(share_out(11, {"a": 333, "b": 333, "c": 334}).values()) == 11
    assert share_out(3, {"a": 1, "b": 1, "c": 1000}) == {"a": 1, "b": 1, "c": 2}


# SpIEL's regrowth


class Solo:
    """One process, as far as candidates need one."""

    world, main = 1, True


def test_candidates_are_the_largest_gradients_of_the_first_micro_batch_and_add_up() -> None:
    torch.manual_seed(0)
    gradients = torch.randn(4, 6, 10)  # two steps of two micro-batches
    found = Candidates(7)
    for number, gradient in enumerate(gradients):
        for start in range(0, 6, 4):  # in two pieces
            found.see(start * 10, gradient[start : start + 4], last=start == 4)
        if number % 2:
            found.end_step(Solo(), False)  # type: ignore[arg-type]
    wanted = gradients[0].abs().flatten().topk(7).indices.sort().values
    assert found.entries is not None
    assert found.entries.tolist() == wanted.tolist()
    sums = torch.stack([gradients[:2].sum(0), gradients[2:].sum(0)]).flatten(1)[:, wanted]
    torch.testing.assert_close(found.sums, sums.sum(0))
    torch.testing.assert_close(found.squares, sums.square().sum(0))
    taken = wanted[:2]
    entries, moments = found.best(taken, 3, seen=2)
    free = [i for i in sums.sum(0).abs().argsort(descending=True).tolist() if i > 1][:3]
    assert entries.tolist() == wanted[free].tolist()
    torch.testing.assert_close(moments["exp_avg"], sums.mean(0)[free])
    torch.testing.assert_close(moments["exp_avg_sq"], sums.square().mean(0)[free])


def test_sm3_accumulators_follow_their_equation() -> None:
    torch.manual_seed(0)
    momenta = Momenta(5, 8, torch.device("cpu"))
    rows_, columns = [0.0] * 5, [0.0] * 8
    index = torch.randperm(40)[:12].sort().values
    for _ in range(3):
        gradient = torch.randn(12)
        momenta.update(index, gradient)
        made = [
            (int(i) // 8, int(i) % 8, min(rows_[int(i) // 8], columns[int(i) % 8]) + float(g) ** 2)
            for i, g in zip(index, gradient, strict=True)
        ]
        for r, c, v in made:
            rows_[r], columns[c] = max(rows_[r], v), max(columns[c], v)
    torch.testing.assert_close(momenta.rows, torch.tensor(rows_))
    torch.testing.assert_close(momenta.columns, torch.tensor(columns))
    estimate = torch.outer(momenta.rows, momenta.columns).flatten()
    estimate[index] = 0
    assert momenta.best(index, 6, piece=16).tolist() == estimate.topk(6).indices.tolist()


def test_the_replaced_share_falls_as_the_paper_says() -> None:
    assert kept_share(0.2, "linear", 5, 100, True) == 1.0
    assert kept_share(0.2, "linear", 25, 100, False) == pytest.approx(0.15)
    assert kept_share(0.2, "cosine", 50, 100, True) == pytest.approx(0.1)


def test_replaced_entries_get_new_adam_moments_and_the_others_keep_theirs() -> None:
    torch.manual_seed(0)
    values = nn.Parameter(torch.randn(6))
    optimizer = torch.optim.AdamW([values], betas=(0.9, 0.99), weight_decay=0.0)
    for _ in range(3):
        values.grad = torch.randn(6)
        optimizer.step()
    old = {k: v.clone() for k, v in optimizer.state[values].items()}
    slots, order = torch.tensor([4, 1]), torch.tensor([1, 0, 4, 2, 3, 5])
    moments = {"exp_avg": torch.tensor([0.5, -0.5]), "exp_avg_sq": torch.tensor([0.25, 0.5])}
    reset_state(optimizer, values, slots, moments, order)
    new = optimizer.state[values]
    assert float(new["step"]) == 3
    for key, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.99)):
        expected = old[key]
        expected[slots] = moments[key] * (1 - beta**3)
        assert torch.equal(new[key], expected[order])
    reset_state(optimizer, values, slots, {}, torch.arange(6))
    assert not new["exp_avg"][slots].any()


class Shift(nn.Module):
    """A linear layer whose true weight differs from the given one in a few entries."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Bench:
    """As much of a run as the callback needs."""

    def __init__(self, adapter: Any, model: nn.Module, optimizer: torch.optim.Optimizer, total: int) -> None:
        self.adapter, self.model, self.total, self.step = adapter, SimpleNamespace(hf=model), total, 0
        self.cluster, self.callbacks = Cluster("cpu", "float32"), adapter.callbacks()
        self.players = {"model": SimpleNamespace(optimizer=optimizer)}


def recovered(regrow: Any, seed: int, steps: int = 150) -> tuple[float, float]:
    """Return the share of the true support that was found, and the last loss."""
    torch.manual_seed(seed)
    model = Shift()
    support = torch.randperm(24 * 16)[:20]
    shift = torch.zeros(24 * 16).index_fill(0, support, 1.0) * (1 + torch.rand(24 * 16))
    target = model.layer.weight.detach() + shift.view(16, 24)
    adapter = SpIEL(entries=40, regrow=regrow, every=10, observe=3, targets=["layer"])
    adapter.attach(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    run: Any = Bench(adapter, model, optimizer, steps)
    for callback in run.callbacks:
        callback.on_start(run)
    for _ in range(steps):
        x = torch.randn(32, 24)
        loss = (model(x) - x @ target.t()).square().mean()
        loss.backward()
        for callback in run.callbacks:
            callback.on_gradients(run)
        optimizer.step()
        optimizer.zero_grad()
        run.step += 1
        for callback in run.callbacks:
            callback.on_step(run, {})
    layer = adapted_layers(model)["layer"]
    assert len(layer.index.unique()) == len(layer.values) == 40
    assert torch.equal(layer.index, layer.index.sort().values)
    return float(torch.isin(support, layer.index.long()).double().mean()), float(loss.detach())


def test_regrowth_finds_the_true_support_of_a_sparse_shift() -> None:
    fixed, gradient, momentum = (
        torch.tensor([recovered(how, seed) for seed in range(3)]).mean(0).tolist()
        for how in ("none", "gradient", "momentum")
    )
    assert gradient[0] > 0.95 > 0.25 > fixed[0]  # 40 of 384 entries at random hold 10% of the support
    assert gradient[1] < 1e-3 * fixed[1]
    assert momentum[0] > fixed[0] + 0.15
    assert momentum[1] < fixed[1]


def test_momenta_survive_a_checkpoint() -> None:
    model, adapter = llama(), SpIEL(density=0.1, regrow="momentum", every=4, observe=2)
    adapter.attach(model)
    run: Any = Bench(adapter, model, adam(model), 20)
    (first,) = run.callbacks
    first.on_start(run)
    model(input_ids=IDS, labels=IDS).loss.backward()
    first.on_gradients(run)
    (second,) = adapter.callbacks()
    second.load_state_dict(first.state_dict())
    second.on_start(run)
    name = "model.layers.0.self_attn.q_proj"
    assert first.momenta[name].rows.any()
    assert torch.equal(first.momenta[name].rows, second.momenta[name].rows)
    assert torch.equal(first.momenta[name].columns, second.momenta[name].columns)


def test_a_run_regrows_on_schedule_and_says_so(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    spec = {"name": "spiel", "density": 0.1, "every": 3, "observe": 2, "rate": 0.5}
    train(tiny_model, qa_file, tmp_path / "run", adapter=spec, steps=8, optimizer={"name": "adamw", "lr": 1e-2})
    counts = {row["step"]: row.get("regrown") for row in rows(tmp_path / "run" / "metrics.jsonl")}
    assert [s for s, count in counts.items() if count is not None] == [2, 5]  # after step 8 nothing would be trained
    assert counts[2] > counts[5] > 0


def test_weights_of_an_earlier_step_come_back_with_their_entries() -> None:
    model, adapter = llama(), SpIEL(density=0.2)
    adapter.attach(model)
    params = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    run: Any = SimpleNamespace(model=model, players={"model": SimpleNamespace(params=params)})
    with torch.no_grad():
        for _, parameter in params:
            parameter.normal_(std=0.1)
    kept = model.state_dict().keys()
    state = {
        "players": {"model": {"weights": {n: p.detach().clone() for n, p in params}}},
        "buffers": {n: b.clone() for n, b in model.named_buffers() if n in kept},
    }
    before = model(input_ids=IDS).logits
    for layer in adapted_layers(model).values():
        layer.index.copy_(draw(len(layer.index), layer.outputs * layer.inputs).sort().values)
    assert not torch.allclose(model(input_ids=IDS).logits, before)
    Run.take_weights(run, state)
    assert torch.equal(model(input_ids=IDS).logits, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"observe": 5, "every": 4}, "do not fit between two regrowths"),
        ({"entries": 3}, "at least one per layer"),
        ({"entries": 10**6}, "at most one per weight"),
    ],
)
def test_spiel_says_what_does_not_fit(options: dict[str, Any], message: str) -> None:
    model = llama()
    with pytest.raises(HoneError, match=message):
        SpIEL(**options).attach(model)
    assert not adapted_layers(model)


@pytest.mark.parametrize(("name", "still"), [("spiel", {"regrow": "none"}), ("sara", {"reselect": None})])
@pytest.mark.parametrize("callback", ["average", "posthoc_ema", "lcsc"])
def test_averaging_exchanged_entries_is_refused(name: str, still: dict[str, Any], callback: str) -> None:
    common: dict[str, Any] = {"data": "chains", "steps": 2, "callbacks": ["early_stop", callback], "eval_every": 1}
    with pytest.raises(RecipeError, match=rf"callbacks\.1: '{callback}' would mix .* adapter '{name}'"):
        Recipe.of(**common, adapter=name)
    assert Recipe.of(**common, adapter={"name": name, **still}).callbacks[1] == callback
    with pytest.raises(RecipeError, match="expected the name of a callback") as wrong:
        Recipe.of(**{**common, "callbacks": [callback, {}]}, adapter={"name": name, **still, "rank": 4})
    assert "would mix" not in str(wrong.value)


# SaRA


def test_sara_equals_dense_training_under_a_mask() -> None:
    model, dense = llama(), llama()
    adapter = SaRA(threshold=0.01, reselect=None, low_rank=0.0)
    adapter.attach(model)
    masks = {f"{n}.weight": (dense.get_submodule(n).weight.abs() < 0.01).double() for n in adapted_layers(model)}  # type: ignore[operator]
    train_masked(dense, masks)
    assert_same_weights(trained(adapter, model), dense)


def test_the_threshold_is_that_of_all_layers_together() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(30, 40), 10 * torch.randn(500)]
    limit = threshold_of(weights, 0.2)
    below = sum(int((w.abs() < limit).sum()) for w in weights)
    assert below == round(0.2 * 1700)
    model = llama()
    SaRA(share=0.25).attach(model)
    layers = adapted_layers(model).values()
    assert sum(len(layer.index) for layer in layers) == round(0.25 * sum(x.outputs * x.inputs for x in layers))


def test_reselection_keeps_what_is_still_small_and_changes_no_output() -> None:
    torch.manual_seed(0)
    base = nn.Linear(6, 5, bias=False).double()
    entries = torch.arange(12)
    layer = Settling(base, layout_of(base), entries)  # type: ignore[arg-type]
    with torch.no_grad():
        layer.values.copy_(torch.linspace(-1, 1, 12))
    x = torch.randn(3, 6, dtype=torch.float64)
    before, now = layer(x), base.weight.detach().flatten()[:12] + layer.values.detach()
    layer.reselect(0.4)
    assert layer.live.tolist() == (now.abs() < 0.4).tolist()
    assert 0 < int(layer.live.sum()) < 12
    torch.testing.assert_close(layer(x), before, rtol=0, atol=1e-14)
    layer(x).square().sum().backward()
    assert ((layer.values.grad != 0) == layer.live).all()
    assert not layer.values[~layer.live].any()
    layer.reselect(1e9)
    assert int(layer.live.sum()) < 12  # what has settled does not come back


def test_the_penalty_is_the_nuclear_norm_of_the_trained_weights() -> None:
    model, adapter = llama(), SaRA(threshold=0.01, low_rank=0.5)
    adapter.attach(model)
    (penalty,) = adapter.penalties()
    assert isinstance(penalty, LowRankEntries)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.values.normal_(std=0.01)
    terms = {
        name: 0.5 * torch.linalg.svdvals(layer.effective() * (layer.matrix().abs() < 0.01)).sum()
        for name, layer in adapted_layers(model).items()
    }
    drawn = set()
    for number in range(60):
        penalty.run = SimpleNamespace(step=number)  # type: ignore[assignment]
        found = penalty.of_weights(model)
        drawn |= {name for name, term in terms.items() if torch.isclose(term, found, rtol=1e-10, atol=0)}
    assert drawn == set(terms)
    name = "model.layers.0.self_attn.q_proj"
    layer = adapted_layers(model)[name]
    loss = penalty.of_weights(model)
    numeric = []
    where = next(n for n, term in terms.items() if torch.isclose(term, loss, rtol=1e-10, atol=0))
    layer = adapted_layers(model)[where]
    loss.backward()
    for place in range(3):
        ends = []
        for sign in (1e-6, -1e-6):
            with torch.no_grad():
                layer.values[place] += sign
                ends.append(float(penalty.of_weights(model)))
                layer.values[place] -= sign
        numeric.append((ends[0] - ends[1]) / 2e-6)
    torch.testing.assert_close(layer.values.grad[:3], torch.tensor(numeric, dtype=torch.float64), rtol=1e-5, atol=1e-7)


def test_sara_reselects_once_in_a_run(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny_model, qa_file, out, adapter={"name": "sara", "reselect": 0.5}, steps=6)
    log = rows(out / "metrics.jsonl")
    assert [row["step"] for row in log if "reselected" in row] == [3]
    assert all(row["penalty/nuclear_norm"] > 0 for row in log)
    live = torch.cat([t for key, t in load_file(out / "model" / "adapter_model.safetensors").items() if "live" in key])
    assert int(live.sum()) == next(row["reselected"] for row in log if "reselected" in row)
    assert 0 < int(live.sum()) < len(live)


def test_sara_says_when_nothing_is_below_the_threshold() -> None:
    with pytest.raises(HoneError, match="no weight is below 1e-12; the smallest is"):
        SaRA(threshold=1e-12).attach(llama())


def test_every_record_names_its_paper() -> None:
    found = {r.name: r.papers for r in parts.catalogue() if r.name in ("s2ft", "spiel", "sara", "ia3", "bitfit")}
    assert len(found) == 5
    assert all(papers for papers in found.values())
