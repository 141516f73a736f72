"""What single adapters do beyond the contract: patterns, messages, ties, precision, and what a new method supplies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from hone import parts
from hone.adapters.base import load_adapter, matches
from hone.adapters.bottleneck import BottleneckAdapters
from hone.adapters.full import Full
from hone.adapters.layers import Wrapped, layout_of
from hone.adapters.lora import Decomposed, LoRA, LowRank
from hone.adapters.peft_bridge import PeftBridge
from hone.adapters.scaling import BitFit
from hone.engine import assemble
from hone.errors import HoneError

IDS = torch.arange(24).view(2, 12) % 20


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def gpt2() -> GPT2LMHeadModel:
    """A model whose input and output embeddings are one tensor."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=4, n_positions=32)).double().eval()


def moved(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def trained(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("q_proj", "layers.0.attn.q_proj", True),
        ("attn.q_proj", "layers.0.attn.q_proj", True),
        ("q_proj", "layers.0.attn.xq_proj", False),
        ("layers.0.*", "model.layers.0.attn.q_proj", True),
        ("layers.1.*", "model.layers.11.attn.q_proj", False),
        ("[qk]_proj", "layers.0.attn.k_proj", True),
        ("layers.0", "layers.0.attn", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (LoRA(targets=["q_prj"]), "adapter.targets: 'q_prj' matches nothing.*did you mean 'q_proj'"),
        (LoRA(exclude=["layer.0"]), "adapter.exclude: 'layer.0'.*did you mean 'layers.0'"),
        (LoRA(train_also=["nrm"]), "adapter.train_also: 'nrm'.*did you mean 'norm'"),
        (LoRA(targets=["q_proj"], rank_pattern={"k_proj": 4}), "adapter.rank_pattern: 'k_proj' matches nothing"),
        (LoRA(targets=["self_attn"]), "'model.layers.0.self_attn', which cannot be adapted: it is a LlamaAttention"),
        (LoRA(targets=["*norm"]), "cannot be adapted: it is a LlamaRMSNorm"),
        (LoRA(targets=["q_proj"], exclude=["layers.*"]), "no layer is left"),
        (LoRA(rank=9), r"adapter.rank: 9 .*'model.layers.0.self_attn.k_proj'.* 8 x 16.*rank_pattern"),
        (Full(train=["q_prj"]), "adapter.train: 'q_prj' matches nothing.*did you mean 'q_proj'"),
        (Full(freeze=["*"]), "nothing is left to train"),
    ],
)
def test_messages_name_what_is_wrong_and_leave_the_model_alone(adapter: Any, words: str) -> None:
    model = llama()
    with pytest.raises(HoneError, match=words):
        adapter.attach(model)
    assert trained(model) == [name for name, _ in llama().named_parameters()]


def test_layers_that_cannot_be_adapted() -> None:
    model = nn.ModuleDict({
        "grouped": nn.Conv1d(4, 4, 3, groups=2), "bounded": nn.Embedding(8, 8, max_norm=1.0),
        "quantised": nn.Linear(8, 8), "twice": nn.Linear(8, 8),
    })  # fmt: skip
    model["quantised"].weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    model["again"] = model["twice"]
    for target, words in {
        "grouped": "groups=2", "bounded": "max_norm", "quantised": "quantised to torch.int8", "twice": "twice, again",
    }.items():  # fmt: skip
        with pytest.raises(HoneError, match=words):
            LoRA(rank=2, targets=[target]).attach(model)


def test_ranks_alphas_and_scales() -> None:
    def scales(**options: Any) -> list[tuple[int, float]]:
        model = llama()
        LoRA(targets=["layers.0.self_attn.?_proj"], exclude=["o_proj"], **options).attach(model)
        return [(m.rank, m.scale) for m in model.modules() if isinstance(m, LowRank)]

    assert scales(rank=4) == [(4, 2.0)] * 3
    assert scales(rank=4, alpha=2.0) == [(4, 0.5)] * 3
    assert scales(rank=4, rank_stabilized=True) == [(4, 8.0)] * 3
    assert scales(rank=4, rank_pattern={"k_proj": 2}) == [(4, 2.0), (2, 2.0), (4, 2.0)]
    named = {"model.layers.0.self_attn.q_proj": 8.0, "*_proj": 4.0}
    assert scales(rank=4, alpha_pattern=named) == [(4, 2.0), (4, 1.0), (4, 1.0)]


def test_what_trains() -> None:
    model = llama(attention_bias=True)
    LoRA(targets=["q_proj"], train_also=["model.norm"], bias="all").attach(model)
    kinds = {name.rpartition(".")[2] if "norm" not in name else name for name in trained(model)}
    assert kinds == {"lora_A", "lora_B", "bias", "model.norm.trained.weight"}
    model = llama(attention_bias=True)
    LoRA(targets=["q_proj"], bias="adapted", exclude=["layers.0"]).attach(model)
    place = "model.layers.1.self_attn.q_proj."
    assert sorted(trained(model)) == [place + leaf for leaf in ("base_layer.bias", "lora_A", "lora_B")]
    model = llama()
    LoRA(train_also=["layers.0", "layers.0.mlp"]).attach(model)
    assert not any(isinstance(m, LowRank) for m in model.model.layers[0].modules())


def test_full_trains_what_patterns_name() -> None:
    model = llama()
    Full(train=["layers.0", "norm"], freeze=["mlp"]).attach(model)
    assert {name.split(".")[1] for name in trained(model)} == {"layers", "norm"}
    assert not any("mlp" in name or "layers.1." in name for name in trained(model))
    tied = gpt2()
    Full(train=["lm_head"]).attach(tied)
    assert trained(tied) == ["transformer.wte.weight"]
    Full(train=["wte", "ln_f"], freeze=["lm_head"]).attach(tied)
    assert trained(tied) == ["transformer.ln_f.weight", "transformer.ln_f.bias"]


def test_full_saves_a_network_that_is_no_language_model(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[1].weight = network[0].weight
    Full().save(network, tmp_path, base="")
    fresh = copy.deepcopy(network)
    moved(fresh)
    Full().load(fresh, tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), network.parameters(), strict=True))
    with pytest.raises(HoneError, match="bias"):
        Full().load(nn.Sequential(nn.Linear(3, 3, bias=False)), tmp_path)


@pytest.mark.parametrize("options", [{"targets": ["wte"]}, {"targets": ["lm_head"]}, {"targets": ["wte", "lm_head"]},
                                     {"targets": ["c_attn"], "train_also": ["lm_head"]}])  # fmt: skip
def test_tied_weights_are_merged_once_each_and_untied_aloud(options: dict[str, Any], tmp_path: Path) -> None:
    model, adapter = gpt2(), LoRA(rank=2, **options)
    adapter.attach(model)
    moved(model)
    expected = model(input_ids=IDS).logits
    adapter.merge(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-12)
    adapter.unmerge(model)
    with adapter.disabled(model):
        assert torch.equal(model(input_ids=IDS).logits, gpt2()(input_ids=IDS).logits)
    with pytest.warns(UserWarning, match="transformer.wte.weight and lm_head.weight"):
        adapter.strip(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=0, atol=1e-12)
    model.save_pretrained(tmp_path)
    again = GPT2LMHeadModel.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(again(input_ids=IDS).logits, expected, rtol=0, atol=1e-12)


def test_a_tie_that_no_adapter_touches_stays() -> None:
    model, adapter = gpt2(), LoRA()
    adapter.attach(model)
    adapter.merge(model)
    adapter.strip(model)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.config.tie_word_embeddings


def test_disabled_inside_merged_inside_disabled() -> None:
    model, adapter = llama(attention_bias=True), LoRA(bias="adapted", train_also=["norm"])
    base = model(input_ids=IDS).logits
    adapter.attach(model)
    moved(model)
    adapter.merge(model)
    merged = model(input_ids=IDS).logits
    with adapter.disabled(model):
        assert torch.equal(model(input_ids=IDS).logits, base)
        with adapter.disabled(model):
            assert torch.equal(model(input_ids=IDS).logits, base)
        assert torch.equal(model(input_ids=IDS).logits, base)
    assert torch.equal(model(input_ids=IDS).logits, merged)


def kinds() -> dict[str, tuple[nn.Module, Tensor]]:
    """One layer of every kind in float64, with an input."""
    torch.manual_seed(0)
    layers: dict[str, tuple[nn.Module, Tensor]] = {
        "linear": (nn.Linear(5, 4), torch.randn(2, 3, 5)), "one row": (nn.Linear(5, 4), torch.randn(5)),
        "nothing": (nn.Linear(5, 4), torch.randn(0, 5)), "transposed": (Conv1D(4, 5), torch.randn(2, 3, 5)),
        "embedding": (nn.Embedding(7, 4), torch.tensor([[1, 2, 2], [0, 6, 5]])),
        "conv1": (nn.Conv1d(3, 4, 3, padding=2, dilation=2), torch.randn(2, 3, 7)),
        "conv2": (nn.Conv2d(3, 4, 3, stride=2, padding=1, padding_mode="circular"), torch.randn(2, 3, 6, 6)),
        "conv3": (nn.Conv3d(3, 4, (1, 2, 3)), torch.randn(2, 3, 2, 4, 5)),
    }  # fmt: skip
    return {kind: (layer.double(), x.double() if x.is_floating_point() else x) for kind, (layer, x) in layers.items()}


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("kind", kinds())
def test_the_short_way_equals_the_whole_matrix(kind: str, decomposed: bool) -> None:
    base, x = kinds()[kind]
    model = nn.Sequential(base)
    LoRA(rank=2, targets=["0"], weight_decomposed=decomposed).attach(model)
    moved(model)
    layer = model[0]
    torch.testing.assert_close(layer(x), Wrapped.adapted(layer, x), rtol=0, atol=1e-12)
    assert layer(x).shape == base(x).shape


class Shift(Wrapped):
    """The least that a new method supplies: a delta."""

    def __init__(self, base: nn.Module) -> None:
        layout = layout_of(base)
        assert layout is not None
        super().__init__(base, layout)
        self.amount = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

    def delta(self) -> Tensor:
        return self.amount.expand(self.matrix().shape)


@pytest.mark.parametrize("kind", ["linear", "transposed", "embedding", "conv2"])
def test_a_delta_alone_makes_a_method(kind: str) -> None:
    base, x = kinds()[kind]
    base.requires_grad_(False)
    before, layer = base.weight.clone(), Shift(base)
    expected = copy.deepcopy(base)
    with torch.no_grad():
        expected.weight.add_(0.5)
    torch.testing.assert_close(layer(x), expected(x), rtol=0, atol=1e-12)
    layer(x).sum().backward()
    assert layer.amount.grad is not None and base.weight.grad is None
    layer.merge()
    torch.testing.assert_close(layer(x), expected(x), rtol=0, atol=0)
    layer.unmerge()
    assert torch.equal(base.weight, before)


def test_code_that_reads_the_weight_sees_the_adapter() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    base = attention(x, x, x)[0]
    adapter = LoRA(rank=2, targets=["out_proj"])
    adapter.attach(attention)
    moved(attention)
    adapted = attention(x, x, x)[0]
    assert (adapted - base).abs().max() > 1e-3
    adapter.strip(attention)
    torch.testing.assert_close(attention(x, x, x)[0], adapted)


def test_half_precision_bases_have_full_precision_factors() -> None:
    model = llama().bfloat16()
    adapter = LoRA()
    adapter.attach(model)
    assert {p.dtype for _, p in adapter.trainable(model)} == {torch.float32}
    moved(model)
    output = model(input_ids=IDS, labels=IDS)
    assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    adapter.strip(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(model(input_ids=IDS).logits, output.logits, rtol=0, atol=0.05)


@pytest.mark.parametrize("decomposed", [False, True])
def test_autocast(decomposed: bool) -> None:
    model = llama(attention_bias=True).float()
    adapter = LoRA(targets=["embed_tokens", "*_proj"], weight_decomposed=decomposed)
    adapter.attach(model)
    moved(model)
    plain = model(input_ids=IDS).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in adapter.trainable(model))
    torch.testing.assert_close(output.logits.float(), plain, rtol=0, atol=0.1)


def test_what_stands_beside_a_trained_bias_of_a_norm_keeps_its_precision() -> None:
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=4, n_positions=32)).train()
    BitFit().attach(model)
    assemble.narrow(model)
    block = model.transformer.h[0]
    assert block.ln_1.weight.dtype == block.ln_1.bias.dtype == torch.float32
    assert block.mlp.c_fc.weight.dtype == model.lm_head.weight.dtype == torch.bfloat16  # autocast casts both operands
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters() if p.requires_grad)


def test_dropout_is_for_training_only() -> None:
    for decomposed in (False, True):
        model = llama()
        LoRA(dropout=0.5, weight_decomposed=decomposed).attach(model)
        moved(model)
        calm = model(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, calm)
        assert not torch.equal(model.train()(input_ids=IDS).logits, calm)


def test_dora_trains_norms_apart_from_directions() -> None:
    model = llama()
    LoRA(weight_decomposed=True).attach(model)
    moved(model)
    for layer in model.modules():
        if isinstance(layer, Decomposed):
            norms = layer.weight.norm(dim=1)
            torch.testing.assert_close(norms, layer.lora_magnitude_vector.abs(), rtol=0, atol=1e-12)


def test_one_seed_gives_one_start_in_every_precision() -> None:
    starts = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        model = llama().to(dtype)
        torch.manual_seed(3)
        LoRA(targets=["embed_tokens", "q_proj"]).attach(model)
        starts.append([p.float() for _, p in LoRA().trainable(model)])
    for start in starts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(start, starts[0], strict=True))


def test_another_scale_is_not_loaded_silently(tmp_path: Path) -> None:
    model, adapter = llama(), LoRA(alpha=4.0)
    adapter.attach(model)
    adapter.save(model, tmp_path, base="")
    other = llama()
    LoRA(alpha=8.0).attach(other)
    with pytest.raises(HoneError, match=r"scale 0.5 in .* has 1"):
        LoRA().load(other, tmp_path)


def test_files_that_hold_no_adapter(tmp_path: Path) -> None:
    for adapter in (LoRA(), Full()):
        adapter.attach(model := llama())
        adapter.save(model, tmp_path / adapter.name, base="")
        (file,) = (tmp_path / adapter.name).glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-8])
        with pytest.raises(HoneError, match=adapter.name):
            adapter.load(model, tmp_path / adapter.name)
    with pytest.raises(HoneError, match=r"no adapter_config.json"):
        load_adapter(llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(HoneError, match="peft_type"):
        load_adapter(llama(), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_text("")
    with pytest.raises(HoneError, match="pickle"):
        load_adapter(llama(), tmp_path)


@pytest.mark.parametrize(
    ("method", "options", "where", "words"),
    [
        ("vrea", {}, "", "did you mean 'vera'"),
        ("prefix_tuning", {}, "", "virtual tokens"),
        ("adalora", {}, "", "after every step"),
        ("vera", {"rank": 3}, "rank", "unknown option of 'peft:vera'"),
        ("loha", {"target_module": ["q_proj"]}, "target_module", "did you mean 'target_modules'"),
        ("lora", {"init_lora_weights": "pissa", "use_dora": True, "layers_pattern": "h"}, "", "layers_pattern"),
    ],
)
def test_the_bridge_says_what_is_wrong(method: str, options: dict[str, Any], where: str, words: str) -> None:
    ((option, message),) = PeftBridge.problems(method, options)
    assert option == where and words in message


def test_the_bridge_passes_on_what_peft_refuses() -> None:
    assert PeftBridge.problems("loha", {"target_modules": ["wte"]}) == []
    with pytest.raises(HoneError, match=r"peft:loha.*PEFT refuses this model"):
        PeftBridge(method="loha", options={"target_modules": ["wte"]}).attach(gpt2())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:fan_in_fan_out:UserWarning")
def test_the_bridge_merges_only_what_it_can_take_back() -> None:
    model, adapter = llama(), PeftBridge(method="lily", options={"target_modules": ["q_proj"]})
    adapter.attach(model)
    moved(model)
    before = model(input_ids=IDS).logits
    with pytest.raises(HoneError, match="'peft:lily' cannot be merged"):
        adapter.merge(model)
    assert torch.equal(model(input_ids=IDS).logits, before)
    with pytest.raises(HoneError, match="already"):
        LoRA().attach(model)
    tied, adapter = gpt2(), PeftBridge(method="lora", options={"target_modules": ["c_attn"]})
    adapter.attach(tied)
    adapter.merge(tied)
    assert tied.lm_head.weight is tied.transformer.wte.weight


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore:.*tied:UserWarning")
def test_the_bridge_never_merges_into_a_tied_weight() -> None:
    model, adapter = gpt2(), PeftBridge(method="lora", options={"target_modules": ["wte"]})
    adapter.attach(model)
    for fold in (adapter.merge, adapter.strip):
        with pytest.raises(HoneError, match=r"'transformer.wte' shares its weight with other layers"):
            fold(model)


def test_two_adapters_that_cannot_be_combined_are_refused_by_name(tmp_path: Path) -> None:
    model = llama()
    BottleneckAdapters(width=2).attach(model)
    with pytest.raises(HoneError, match=r"adapter 'bottleneck' already, with which 'lora' .* cannot be merged first"):
        LoRA(rank=2).attach(model)
    with pytest.raises(HoneError, match="adapter 'bottleneck' already, with which 'full' cannot be combined"):
        Full().attach(model)
    other = llama()
    LoRA(rank=2).attach(other)
    LoRA(rank=2).save(other, tmp_path, base="")
    with pytest.raises(HoneError, match="with which 'lora' cannot be combined"):
        LoRA(rank=2).load(model, tmp_path)
    with pytest.raises(HoneError, match=r"with which 'peft:lora' cannot be combined; merge it first with strip\(\)"):
        parts.load("adapter", "peft:lora")(method="lora", options={"target_modules": "all-linear"}).attach(other)
