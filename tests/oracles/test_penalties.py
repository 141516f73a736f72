"""Penalties equal their papers' equations, written plainly over whole logits, in value and in gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hone.adapters.ba_lora import BALoRA
from hone.adapters.bottleneck import BottleneckAdapters
from hone.adapters.lora import LoRA
from hone.engine.devices import Cluster
from hone.engine.loop import Player, Run, Trainer
from hone.objectives.language import SFT
from hone.penalties.activations import ActivationDensity, activation_modules
from hone.penalties.outputs import SVD, Consistency, Diversity, covariance_off_diagonal, leading_share
from hone.text.model import LanguageModel
from hone.text.pack import Packed, Tree, pack
from hone.text.tokenizer import train_tokenizer

CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "initializer_range": 0.3,
}  # fmt: skip
LENGTHS = (7, 4, 9)


def new_model(**options: Any) -> tuple[LanguageModel, LoRA]:
    """Return a random Llama in float64 with an adapter that is off its start."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a tokenizer is needed, but no text is rendered here"], 300)
    model = LanguageModel.fresh(CONFIG, tokenizer).to(dtype=torch.float64)
    adapter = LoRA(rank=3, **options)
    adapter.attach(model.hf)
    with torch.no_grad():
        for _, p in adapter.trainable(model.hf):
            p.add_(torch.randn_like(p), alpha=0.2)
    return model.train(), adapter


def trees() -> list[Tree]:
    """Return three sequences of which the first two tokens are not trained."""
    made = torch.Generator().manual_seed(3)
    found = []
    for length in LENGTHS:
        tokens = torch.randint(280, (length,), generator=made).numpy().astype("int32")
        weights = (torch.arange(length) >= 2).float().numpy()
        found.append(Tree((tokens,), (weights,), (-1,)))
    return found


def whole_logits(model: LanguageModel) -> Tensor:
    """Return the logits (N, V) that predict the trained tokens, each sequence run by itself."""
    rows = []
    for tree in trees():
        ids = torch.from_numpy(tree.tokens[0]).long()
        rows.append(model.hf(input_ids=ids[None]).logits[0, 1:-1])
    return torch.cat(rows)


def base_logits(model: LanguageModel, adapter: LoRA) -> Tensor:
    """Return those of the model without its adapter."""
    with torch.no_grad(), adapter.disabled(model.hf):
        return whole_logits(model)


def softmax(z: Tensor) -> Tensor:
    """Return exp(z) / sum exp(z)."""
    return z.exp() / z.exp().sum(-1, keepdim=True)


def kl(z: Tensor, z0: Tensor, temperature: float = 2.0) -> Tensor:
    """Return the mean of T^2 sum_v p0 log(p0 / p)."""
    p, p0 = softmax(z / temperature), softmax(z0 / temperature)
    return temperature**2 * (p0 * (p0 / p).log()).sum(-1).mean()


def normalised_mse(z: Tensor, z0: Tensor) -> Tensor:
    """Return the mean squared error of logits divided by their lengths."""
    return (z / z.norm(dim=1, keepdim=True) - z0 / z0.norm(dim=1, keepdim=True)).pow(2).mean()


def top_entropy(z: Tensor, k: int) -> Tensor:
    """Return minus the mean entropy of the k likeliest tokens, renormalised."""
    best = softmax(z).sort(-1, descending=True).values[:, :k]
    p = best / best.sum(-1, keepdim=True)
    return (p * p.log()).sum(-1).mean()


def off_diagonal(z: Tensor) -> Tensor:
    """Return the summed squares of the covariances of different columns over the number of columns."""
    c = torch.cov(z.T)
    return (c**2).sum() / len(c) - (c.diagonal() ** 2).sum() / len(c)


def share(z: Tensor, k: int, norm: str) -> Tensor:
    """Return minus the k largest singular values over the norm, from the eigenvalues of the Gram matrix."""
    s = torch.linalg.eigvalsh(z @ z.T).clamp_min(0).sqrt().flip(0)
    return -s[:k].sum() / (s.sum() if norm == "nuclear" else z.pow(2).sum().sqrt())


PLAIN: dict[str, tuple[Callable[[], Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "kl": (lambda: Consistency(strength=1.0), kl),
    "kl at 1": (lambda: Consistency(strength=1.0, temperature=1.0), lambda z, z0: kl(z, z0, 1.0)),
    "mse": (lambda: Consistency(strength=1.0, form="classification"), normalised_mse),
    "entropy": (lambda: Diversity(strength=1.0, top=None), lambda z, _: top_entropy(z, z.shape[1])),
    "entropy of 20": (lambda: Diversity(strength=1.0), lambda z, _: top_entropy(z, 20)),
    "covariance": (lambda: Diversity(strength=1.0, form="classification"), lambda z, _: off_diagonal(z)),
    "svd": (lambda: SVD(strength=1.0, k=4), lambda z, _: share(z, 4, "frobenius")),
    "svd share": (lambda: SVD(strength=1.0, k=2, norm="nuclear"), lambda z, _: share(z, 2, "nuclear")),
}


def penalised(penalty: Any, model: LanguageModel, adapter: LoRA) -> tuple[Tensor, Packed]:
    """Return the term per trained token of a batch that the model has just run."""
    run: Any = SimpleNamespace(model=model, adapter=adapter, step=0, total=10)
    penalty.setup(run)
    batch = pack(trees())
    SFT().loss(model, batch)
    term = penalty.of_batch(model, batch)
    penalty.close()
    return term / penalty.count(batch), batch


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("options", [{}, {"targets": ["lm_head", "q_proj"]}], ids=["body", "head"])
def test_a_term_of_the_outputs_is_the_paper_s(name: str, options: dict[str, Any]) -> None:
    make, plain = PLAIN[name]
    model, adapter = new_model(**options)
    parameters = [p for _, p in adapter.trainable(model.hf)]
    wanted = plain(whole_logits(model), base_logits(model, adapter))
    found, _ = penalised(make(), model, adapter)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6, abs=1e-12)  # the norms of a Llama are in float32
    gradients = torch.autograd.grad(wanted, parameters, allow_unused=True)
    found.backward()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        expected = torch.zeros_like(parameter) if gradient is None else gradient
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-7)


def test_the_distance_to_the_base_is_least_at_the_base() -> None:
    model, adapter = new_model()
    with torch.no_grad():
        for name, p in adapter.trainable(model.hf):
            if "lora_B" in name:
                p.zero_()
    for form in ("generation", "classification"):
        found, _ = penalised(Consistency(strength=1.0, form=form), model, adapter)
        found.backward()
        assert found.item() == pytest.approx(0, abs=1e-15)
        assert all(float(p.grad.abs().max()) < 1e-9 for _, p in adapter.trainable(model.hf))
        model.zero_grad()


def test_the_covariance_without_its_matrix_is_the_covariance() -> None:
    z = torch.randn(9, 30, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(covariance_off_diagonal(z), off_diagonal(z), rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(covariance_off_diagonal, (z,))
    assert covariance_off_diagonal(z[:1]).item() == 0


@pytest.mark.parametrize("norm", ["nuclear", "frobenius"])
def test_the_gradient_of_the_share_is_that_of_finite_differences(norm: Any) -> None:
    torch.manual_seed(0)
    z = torch.randn(6, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: leading_share(x, 3, norm), (z,))
    assert leading_share(z, 6, "nuclear").item() == pytest.approx(1)
    one = torch.outer(z.detach()[:, 0], z.detach()[0])
    assert float(leading_share(one, 1, norm)) == pytest.approx(1)  # a matrix of rank 1


def test_no_more_rows_are_made_than_asked_for_and_they_are_spread_evenly() -> None:
    model, _ = new_model()
    seen = []
    handle = model.head.linear.register_forward_hook(lambda m, args, out: seen.append(args[0]))  # type: ignore[attr-defined]
    states = torch.arange(11, dtype=torch.float64)[:, None].expand(11, 16)
    assert SVD(tokens=3).matrix(model, states).shape == (3, model.hf.config.vocab_size)
    assert SVD(tokens=30).matrix(model, states).shape[0] == 11
    handle.remove()
    assert seen[0][:, 0].tolist() == [0, 5, 10] and seen[1][:, 0].tolist() == list(range(11))


def test_strengths_move_as_in_the_paper() -> None:
    run: Any = SimpleNamespace(step=0, total=200)
    fade, late = Consistency(strength=2.0, course="fade"), Diversity(strength=2.0, course="late")
    fade.run = late.run = run
    for step in range(201):
        run.step = step
        cosine = 0.2 + (2.0 - 0.2) * 0.5 * (1 + math.cos(math.pi * step / 200))
        assert fade.factor() == pytest.approx(cosine)
        two_phases = 0.0 if step < 40 else 2.0 * (step - 40) / 10 if step < 50 else 2.0
        assert late.factor() == pytest.approx(two_phases)


def test_a_step_of_ba_lora_has_the_gradient_of_its_whole_loss() -> None:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a tokenizer is needed, but no text is rendered here"], 300)
    model = LanguageModel.fresh(CONFIG, tokenizer).to(dtype=torch.float64)
    adapter = BALoRA(rank=3, consistency=0.3, diversity=0.2, svd=0.1, singular_values=2, staged=False)
    adapter.attach(model.hf)
    with torch.no_grad():
        for _, p in adapter.trainable(model.hf):
            p.mul_(1.1)
    model.train()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    parameters = [p for _, p in named]
    z, z0 = whole_logits(model), base_logits(model, adapter)
    targets = torch.cat([torch.from_numpy(t.tokens[0][2:]).long() for t in trees()])
    loss = torch.nn.functional.cross_entropy(z, targets)
    wanted = loss + 0.3 * kl(z, z0) + 0.2 * top_entropy(z, 20) + 0.1 * share(z, 2, "frobenius")
    gradients = torch.autograd.grad(wanted, parameters)
    recipe: Any = SimpleNamespace(micro_tokens=None, batch_tokens=4096, seed=0, clip=None)
    run = Run(recipe, Cluster("cpu", "float64"), model, SFT(), None, 10, penalties=adapter.penalties(), adapter=adapter)
    run.players["model"] = Player(named, torch.optim.SGD(parameters, lr=1.0), lambda step, total: 1.0)
    for penalty in run.penalties:
        penalty.setup(run)
    before = [p.detach().clone() for p in parameters]
    row = Trainer(run).train_step(trees())
    for old, new, gradient in zip(before, parameters, gradients, strict=True):
        torch.testing.assert_close(old - new.detach(), gradient, rtol=1e-5, atol=1e-7)
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert row["penalty/consistency"] == pytest.approx(0.3 * kl(z, z0).item(), rel=1e-5)
    assert row["svd"] == pytest.approx(share(z, 2, "frobenius").item(), rel=1e-5)


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("eps", [1e-7, 1e-2])
def test_the_density_is_the_paper_s(eps: float, packs: bool) -> None:
    model, adapter = new_model()
    parameters = [p for _, p in adapter.trainable(model.hf)]
    inputs: list[Tensor] = []
    blocks = [layer.mlp for layer in model.hf.model.layers]
    handles = [mlp.register_forward_pre_hook(lambda m, args: inputs.append(args[0])) for mlp in blocks]
    wanted, active = torch.zeros((), dtype=torch.float64), 0.0
    for tree in trees():  # each by itself, weighted by its tokens
        inputs.clear()
        model.hf(input_ids=torch.from_numpy(tree.tokens[0]).long()[None])
        for mlp, x in zip(blocks, inputs, strict=True):
            gate = mlp.gate_proj(x)
            a = gate * torch.sigmoid(gate)
            wanted = wanted + (a**2 / (a**2 + eps)).mean() * len(tree) / (sum(LENGTHS) * len(blocks))
            active += float((a.abs() > eps**0.5).double().mean()) * len(tree) / (sum(LENGTHS) * len(blocks))
    for handle in handles:
        handle.remove()
    penalty = ActivationDensity(strength=1.0, eps=eps)
    model.packs = packs  # padded rows must not count their padding
    found, batch = penalised(penalty, model, adapter)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    assert penalty.figures(batch)["activation_density"] / len(batch) == pytest.approx(active, rel=1e-9)
    gradients = torch.autograd.grad(wanted, parameters, allow_unused=True)
    found.backward()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        expected = None if gradient is None else gradient
        if expected is None:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_the_activations_of_an_adapter_are_not_those_of_the_model() -> None:
    model, _ = new_model()
    BottleneckAdapters().attach(bare := LanguageModel.fresh(CONFIG, model.tokenizer).hf)
    found = activation_modules(bare.model, None)
    assert len(found) == 2 and all(a is layer.mlp.act_fn for a, layer in zip(found, bare.model.layers, strict=True))


def test_a_relu_has_the_density_of_what_is_above_zero() -> None:
    model, adapter = new_model()
    for layer in model.hf.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    penalty = ActivationDensity(threshold=0.0)
    outputs: list[Tensor] = []
    for layer in model.hf.model.layers:
        layer.mlp.act_fn.register_forward_hook(lambda m, args, out: outputs.append(out.detach()))
    _, batch = penalised(penalty, model, adapter)
    counted = sum(int(o.count_nonzero()) for o in outputs) / sum(o.numel() for o in outputs)
    assert 0 < counted < 1
    assert penalty.figures(batch)["activation_density"] / len(batch) == pytest.approx(counted)
