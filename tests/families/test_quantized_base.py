"""Adapters over few-bit bases: memory, what is kept, starts, files, and the objective that corrects errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from end_to_end.support import hone, train
from hone.adapters import sparse
from hone.adapters.adalora import AdaLoRA
from hone.adapters.calibration import Calibration
from hone.adapters.host import Host, adapted_layers
from hone.adapters.lamda import LaMDA
from hone.adapters.layers import Layout, Wrapped
from hone.adapters.lora import LoRA
from hone.adapters.lq_lora import LQLoRA, decompose
from hone.adapters.qlora import LoftQ, QLoRA
from hone.adapters.quantize import Blocks, Quantized
from hone.adapters.sara import SaRA
from hone.adapters.sparse import SpIEL
from hone.adapters.triadapt import TriAdaptLoRA
from hone.errors import HoneError
from hone.objectives.base import trained
from hone.objectives.lrec import LREC
from hone.text.model import LanguageModel
from hone.text.pack import Tree, pack

IDS = torch.arange(24).view(2, 12) % 31


def llama(width: int = 32, dtype: torch.dtype = torch.float64) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=31, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def attached(adapter: Host, model: LlamaForCausalLM | None = None) -> LlamaForCausalLM:
    model = llama() if model is None else model
    torch.manual_seed(1)
    adapter.attach(model, calibration(model))
    return model


def calibration(model: Any) -> Calibration:
    return Calibration(
        batches=[IDS, IDS.flip(1)], forward=lambda ids: model(input_ids=ids),
        loss=lambda ids: model(input_ids=ids, labels=ids).loss * 22, count=lambda ids: 22.0,
    )  # fmt: skip


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=IDS).logits
    return found


@torch.no_grad()
def moved(model: nn.Module) -> None:
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)


def away(model: nn.Module) -> float:
    """How far a model's logits are from those of the model before it was quantised."""
    return float((logits(model) - logits(llama())).square().mean())


def test_qlora_trains_as_lora_does_over_the_dequantised_weights() -> None:
    ours, theirs = attached(QLoRA(rank=4)), llama()
    for name, layer in adapted_layers(ours).items():
        theirs.get_submodule(name).weight.data.copy_(layer.base_layer.weight)
    attached(LoRA(rank=4), theirs)
    for model in (ours, theirs):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-10)
    wanted = {name: p for name, p in theirs.named_parameters() if p.requires_grad}
    found = {name: p for name, p in ours.named_parameters() if p.requires_grad}
    assert len(found) == 2 * 2 * 7 and found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], rtol=0, atol=1e-10) for name in found)


FEW_PASSES: dict[str, Callable[[], Host]] = {
    "spiel": lambda: SpIEL(density=0.1, quantize="nf4"),
    "sara": lambda: SaRA(share=0.1, quantize="nf4"),
    "adalora": lambda: AdaLoRA(rank=2, quantize="nf4"),
    "lamda": lambda: LaMDA(rank=2, quantize="nf4"),
    "triadaptlora": lambda: TriAdaptLoRA(rank=2, quantize="nf4"),
}


@pytest.mark.parametrize("name", FEW_PASSES)
def test_a_step_dequantises_a_weight_once_forwards_and_once_backwards(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    FEW_PASSES[name]().attach(model)
    monkeypatch.setattr(sparse, "PIECE", 64)  # pieces of 4 rows
    counts, matrix = [0], Blocks.matrix

    def counted(self: Blocks, *args: Any) -> Tensor:
        counts[0] += 1
        return matrix(self, *args)

    monkeypatch.setattr(Blocks, "matrix", counted)
    out = model(torch.randn(3, 16, requires_grad=True))
    assert counts == [2]
    out.square().sum().backward()
    assert counts == [4]


def test_a_resident_base_takes_at_most_0_30_of_its_bf16_bytes() -> None:
    model = attached(QLoRA(rank=4), llama(256, torch.bfloat16))
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear] == [31]  # the head alone is left as it was
    layers = [m for m in model.modules() if isinstance(m, Quantized)]
    assert len(layers) == 14 and not any(p.dim() == 2 for m in layers for p in m.parameters())
    bf16 = 2 * sum(m.in_features * m.out_features for m in layers)
    held = sum(b.numel() * b.element_size() for m in layers for b in m.buffers())
    assert held == sum(m.blocks.bytes() for m in layers) <= 0.30 * bf16
    assert held / bf16 < 0.26


def test_checkpoints_hold_a_base_that_cannot_be_made_again_from_the_weights_and_no_other() -> None:
    assert not any("blocks" in key for key in attached(QLoRA(rank=4)).state_dict())
    for adapter in (LoftQ(rank=4), LQLoRA(rank=4)):
        assert sum(key.endswith("blocks.codes") for key in attached(adapter).state_dict()) == 14


def test_loftq_starts_nearer_to_the_base_than_plain_quantisation() -> None:
    plain = away(attached(QLoRA(rank=8, quantize="int2")))
    one = away(attached(LoftQ(rank=8, quantize="int2", iterations=1)))
    assert away(attached(LoftQ(rank=8, quantize="int2"))) < 0.9 * plain and one < 0.9 * plain


@pytest.mark.parametrize("options", [{"alpha": 1.0}, {"rank_stabilized": True}, {"rank_pattern": {"q_proj": 2}}])
def test_the_start_does_not_depend_on_the_scale(options: dict[str, Any]) -> None:
    model = attached(LoftQ(rank=4, iterations=2, **options))
    weights = {name: m.weight for name, m in llama().named_modules() if isinstance(m, nn.Linear)}
    for name, layer in adapted_layers(model).items():
        residual = weights[name] - layer.base_layer.weight
        assert layer.rank == (2 if "q_proj" in name and "rank_pattern" in options else 4)
        best = torch.linalg.svdvals(residual)[layer.rank :].square().sum()
        torch.testing.assert_close((residual - layer.delta()).square().sum(), best)


@pytest.mark.parametrize("adapter", [LoftQ(rank=4, quantize="int3"), LQLoRA(rank=4, budget=3.5)])
def test_disabled_is_the_start_and_not_the_few_bits_alone(adapter: Host) -> None:
    model = attached(adapter)
    start = logits(model)
    moved(model)
    assert not torch.allclose(logits(model), start)
    adapter.merge(model)
    with adapter.disabled(model):
        torch.testing.assert_close(logits(model), start, rtol=0, atol=1e-12)
        layer = next(iter(adapted_layers(model).values()))
        nowhere = F.linear(torch.eye(32).double(), layer.weight)
        torch.testing.assert_close(layer(torch.eye(32).double()), nowhere, rtol=0, atol=1e-12)
        assert not torch.allclose(layer.weight, layer.base_layer.weight)


def test_lq_lora_stays_within_its_budget_and_loses_less_than_one_configuration_for_all() -> None:
    def uneven() -> LlamaForCausalLM:
        model = llama(64)
        for index, module in enumerate(m for m in model.modules() if isinstance(m, nn.Linear)):
            module.weight.data.mul_(1 + index % 3 * 3)  # some matrices matter more than others
        return model

    @torch.no_grad()
    def lost(model: LlamaForCausalLM) -> float:
        plain = uneven()
        return sum(float((plain.get_submodule(name).weight - layer.effective()).square().sum())
                   for name, layer in adapted_layers(model).items())  # fmt: skip

    def size(model: LlamaForCausalLM) -> float:
        blocks = [layer.base_layer.blocks for layer in adapted_layers(model).values()]
        return sum(8 * b.bytes() for b in blocks) / sum(b.shape[0] * b.shape[1] for b in blocks)

    same = attached(LQLoRA(rank=4, budget=9.0, formats=["int3"], blocks=[32], fisher_batches=0), uneven())
    mixed = attached(LQLoRA(rank=4, budget=size(same), fisher_batches=0), uneven())
    assert size(mixed) <= size(same)
    assert lost(mixed) < 0.8 * lost(same)
    chosen = {(m.base_layer.blocks.code, m.base_layer.blocks.block) for m in adapted_layers(mixed).values()}
    assert len({code for code, _ in chosen}) > 1


def test_fisher_information_spends_bits_where_the_loss_feels_them() -> None:
    def bits_of(batches: int) -> dict[str, int]:
        model = llama()
        model.model.layers[1].mlp.down_proj.weight.data.mul_(1e-9)  # what comes before it hardly reaches the loss
        attached(LQLoRA(rank=4, budget=3.5, fisher_batches=batches), model)
        return {n: int(m.base_layer.blocks.code[-1]) for n, m in adapted_layers(model).items()}

    unfelt = [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up")]
    blind, weighed = bits_of(0), bits_of(2)
    assert all(weighed[name] == 2 for name in unfelt) and any(blind[name] > 2 for name in unfelt)


def test_a_saved_adapter_brings_its_few_bits_and_their_formats(tmp_path: Path) -> None:
    adapter = LQLoRA(rank=4, budget=3.6)
    model = attached(adapter)
    moved(model)
    adapter.save(model, tmp_path, base="the/base")
    again = llama()
    LQLoRA().load(again, tmp_path)  # its own options do not matter
    assert torch.equal(logits(again), logits(model))
    kinds = [(m.base_layer.blocks.code, m.base_layer.blocks.block) for m in adapted_layers(model).values()]
    assert len(set(kinds)) > 1
    assert kinds == [(m.base_layer.blocks.code, m.base_layer.blocks.block) for m in adapted_layers(again).values()]
    assert again.state_dict().keys() == model.state_dict().keys()
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "HONE"
    file = tmp_path / "adapter_model.safetensors"
    saved = load_file(file)
    broken = next(key for key in saved if key.endswith("quantized.format"))
    save_file({**saved, broken: torch.tensor([99, 16], dtype=torch.int32)}, file, metadata={"format": "pt"})
    with pytest.raises(HoneError, match=r"unknown format \(99\) or block size \(16\)"):
        LQLoRA().load(llama(), tmp_path)


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (LoftQ(rank=4, targets=["embed_tokens"]), "'model.embed_tokens' is a Embedding.*linear layers only"),
        (LoftQ(rank=40), r"adapter.rank: 40 .* 32 x 32"),
        (LQLoRA(rank=4, budget=2.0), r"adapter.budget: 2 bits per weight are less than the 2\.\d+ .* raise it"),
    ],
)
def test_messages_name_what_is_wrong_and_leave_the_model_alone(adapter: Host, words: str) -> None:
    model = llama()
    with pytest.raises(HoneError, match=words):
        adapter.attach(model, calibration(model))
    assert [n for n, _ in model.named_modules()] == [n for n, _ in llama().named_modules()]


def test_fisher_information_needs_data() -> None:
    with pytest.raises(HoneError, match="'lq-lora' looks at data"):
        LQLoRA(rank=4).attach(llama())
    LQLoRA(rank=4, fisher_batches=0).attach(llama())


class Shift(Wrapped):
    """A method that says no more than its delta."""

    def __init__(self, base: nn.Module, layout: Layout) -> None:
        super().__init__(base, layout)
        self.shift = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def delta(self) -> Tensor:
        return self.shift.expand(self.matrix().shape)


class Shifted(Host):
    name = "shifted"

    def wrap(self, name: str, base: nn.Module, layout: Layout) -> Wrapped:
        return Shift(base, layout)


def test_a_method_that_gives_a_delta_alone_works_over_a_quantised_base() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).double()
    bias = model[0].bias
    Shifted(targets=["0"], quantize="nf4", quantize_block=16).attach(model)
    x = torch.randn(3, 16).double()
    wanted = F.linear(x, model[0].base_layer.weight + 1, bias)
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-12)
    model(x).sum().backward()
    torch.testing.assert_close(model[0].shift.grad, 8 * x.sum().view(1))


def toy() -> list[Tree]:
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(3, 300, (n,), generator=generator).int().numpy() for n in (5, 9)]
    return [
        Tree((t,), ((t > 0).astype("float32") * [0, *[0.5] * (len(t) - 1)],), (-1,), {}, where="toy") for t in tokens
    ]


def beside(student: LanguageModel, load: Callable[..., LanguageModel], **options: Any) -> LREC:
    """Return the objective with a starting model that `load` gives."""
    objective = LREC(**options)
    start = SimpleNamespace(from_nothing=False, load=load)
    cluster = SimpleNamespace(device="cpu", dtype=torch.float64, precision="float64")
    recipe = SimpleNamespace(build=lambda field: start)
    objective.setup(SimpleNamespace(model=student, recipe=recipe, cluster=cluster))
    return objective


@pytest.mark.parametrize("match", ["kl", "mse"])
def test_lrec_is_its_equation_on_whole_logits(match: Any, tiny_model: Path) -> None:
    teacher, student = (LanguageModel.load(tiny_model, dtype=torch.float64) for _ in range(2))
    LoRA(rank=4, quantize="int2").attach(student.hf)
    moved(student.hf)
    objective = beside(student, lambda **options: teacher, match=match, cross_entropy=0.3)
    batch = pack(toy())
    loss, metrics = objective.loss(student, batch)
    predictors, targets, weights = trained(batch)
    z, y = (model.head(model.hidden(batch)[predictors]) for model in (student, teacher))
    p, q = z.softmax(-1), y.softmax(-1)
    gap = F.kl_div(p.log(), q, reduction="none").sum(-1) if match == "kl" else ((z - y) ** 2).mean(-1)
    wanted = (weights * (gap + 0.3 * F.cross_entropy(z, targets, reduction="none"))).sum()
    torch.testing.assert_close(loss, wanted, rtol=1e-10, atol=1e-10)
    assert float(metrics["token_accuracy"]) == pytest.approx(float((weights * (z.argmax(-1) == targets)).sum()))
    factors = [p for p in student.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, factors)
    for a, b in zip(found, torch.autograd.grad(wanted, factors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_before_training_the_model_is_its_own_teacher(tiny_model: Path) -> None:
    model = LanguageModel.load(tiny_model, dtype=torch.float64)
    batch = pack(toy())
    alone, _ = LREC().loss(model, batch)
    objective = beside(model, lambda **options: LanguageModel.load(tiny_model, dtype=torch.float64))
    torch.testing.assert_close(objective.loss(model, batch)[0], alone, rtol=0, atol=1e-10)


def test_lrec_brings_a_two_bit_model_back_to_its_start(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    recipe = {
        "objective": {"name": "lrec", "cross_entropy": 0.0}, "eval_samples": 0, "steps": 30,
        "optimizer": {"name": "adamw", "lr": 1e-2},
        "adapter": {"name": "lora", "rank": 8, "quantize": "int2", "quantize_block": 16},
    }  # fmt: skip
    result = train(tiny_model, qa_file, tmp_path / "run", **recipe)
    assert result["after"]["loss"] < 0.75 * result["before"]["loss"]
    outcome = hone("eval", tmp_path / "run", "--json")
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["loss"] == pytest.approx(result["after"]["loss"], rel=1e-4)
    staged = {**recipe, "stages": [{"steps": 4}, {"steps": 2}]}
    result = train(tiny_model, qa_file, tmp_path / "staged", **staged)
    outcome = hone("eval", tmp_path / "staged", "--json")
    assert json.loads(outcome.out)["loss"] == pytest.approx(result["after"]["loss"], rel=1e-4)


def test_lrec_needs_a_model_to_start_from() -> None:
    start = SimpleNamespace(from_nothing=True)
    with pytest.raises(HoneError, match="starts from random weights"):
        LREC().setup(SimpleNamespace(recipe=SimpleNamespace(build=lambda field: start)))


def test_a_decomposition_of_half_precision_weights_is_made_in_single() -> None:
    weight = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, _ = decompose(weight, 4, "int3", 16, 3)
    assert found.up.dtype == found.down.dtype == torch.float32
