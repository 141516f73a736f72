"""The language model: what it proves at load, packing and padding agree, heads, saving, and errors for users."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertModel

from hone.engine.manifest import folder_hash
from hone.errors import ModelError
from hone.text import loading
from hone.text.model import LanguageModel, shipped_base
from hone.text.pack import Packed, Tree, pack
from hone.text.tokenizer import train_tokenizer

LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
SIZES = {key: value for key, value in LLAMA.items() if key != "model_type"} | {
    "vocab_size": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["two and two make four", "one and one make two"], 300)


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    LanguageModel.fresh(LLAMA, tokenizer).save(tmp_path / "good-model")
    return tmp_path / "good-model"


def build(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> LanguageModel:
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes})).to(dtype)
    with torch.no_grad():
        for parameter in hf.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return LanguageModel(hf, None)


def batch() -> Packed:
    random = np.random.default_rng(0)

    def tree(*shape: tuple[int, int]) -> Tree:
        tokens = tuple(random.integers(3, 48, length) for length, _ in shape)
        return Tree(tokens, tuple(np.ones(len(t), np.float32) for t in tokens), tuple(parent for _, parent in shape))

    return pack([tree((5, -1), (3, 0), (4, 0)), tree((6, -1)), tree((2, -1), (3, 0), (2, 1), (4, 0), (1, 1))])


def value_and_gradients(model: LanguageModel) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    values = model.logprobs(batch())
    (values * torch.linspace(-1, 1, len(values), dtype=values.dtype)).sum().backward()
    return values.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("gemma2", {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 1.5}),
        ("cohere", {"logit_scale": 0.3}),
        ("granite", {"logits_scaling": 3.0, "residual_multiplier": 0.5}),
        ("hyperclovax", {"logits_scaling": 3.0}),
        ("phi", {"num_key_value_heads": 4}),
        ("opt", {"word_embed_proj_dim": 8, "ffn_dim": 24}),
    ],
)
def test_packing_padding_and_transformers_agree(kind: str, changes: dict[str, Any]) -> None:
    model = build(kind, **changes).eval()
    assert model.packs
    packed, packed_gradients = value_and_gradients(model)
    model.packs = False
    assert not model.packs
    padded, padded_gradients = value_and_gradients(model)
    # What is left is rounding to float32 inside transformers: of norms, and of its eager softmax.
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)
    assert packed_gradients.keys() == padded_gradients.keys()
    for name, gradient in packed_gradients.items():
        torch.testing.assert_close(gradient, padded_gradients[name], rtol=1e-3, atol=1e-5, msg=name)
    sequence = batch().tokens[:8]
    expected = model.hf(input_ids=sequence[None]).logits[0].log_softmax(-1)[:-1].gather(-1, sequence[1:, None])[:, 0]
    torch.testing.assert_close(packed[1:8], expected.detach(), rtol=0, atol=1e-5)


def test_the_padded_gradient_is_that_of_the_tree() -> None:
    """GPT-2 rounds nothing, so packed and padded agree to the last bits of float64."""
    model = build("gpt2", n_embd=16, n_layer=2, n_head=4).eval()
    packed, packed_gradients = value_and_gradients(model)
    model.packs = False
    padded, padded_gradients = value_and_gradients(model)
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-12)
    for name, gradient in packed_gradients.items():
        torch.testing.assert_close(gradient, padded_gradients[name], rtol=0, atol=1e-11, msg=name)
    model.packs = True
    assert torch.equal(value_and_gradients(model)[0], packed)


def test_logprobs_are_of_each_token_given_its_chain() -> None:
    model, trees = build("llama").eval(), batch()
    values = model.logprobs(trees, temperature=0.7)
    assert (values[trees.previous < 0] == 0).all()
    logits = model.head(model.hidden(trees)) / 0.7
    for token in torch.nonzero(trees.previous >= 0)[:, 0].tolist():
        expected = logits[trees.previous[token]].log_softmax(-1)[trees.tokens[token]]
        torch.testing.assert_close(values[token], expected)


NO_REGISTRY = "does not use transformers' attention registry"


@pytest.mark.parametrize(
    ("kind", "changes", "why"),
    [
        ("mamba", {"state_size": 4}, NO_REGISTRY),
        ("rwkv", {"attention_hidden_size": 16}, NO_REGISTRY),
        ("recurrent_gemma", {"attention_window_size": 4}, "layers of type linear_attention"),
        ("llama4_text", {"attention_chunk_size": 8}, "layers of type chunked_attention"),
        ("doge", {}, "brings an attention mask of its own"),
        # Both would be exact on twelve tokens, and wrong on longer sequences.
        (
            "qwen2_moe",
            {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1},
            "sliding windows that",
        ),
    ],
)
def test_what_cannot_pack_pads_and_says_so_once(kind: str, changes: dict[str, Any], why: str, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING, logger="hone"):
        model = build(kind, torch.float32, **changes).eval()
        values = model.logprobs(batch())
        model.logprobs(batch())
    said = [record.getMessage() for record in caplog.records if record.name == "hone"]
    assert not model.packs
    assert len(said) == 1
    assert "padded instead of packed" in said[0]
    assert why in said[0]
    trees = batch()
    for segment in range(trees.segments):
        chain = torch.cat([torch.arange(trees.starts[i], trees.starts[i + 1]) for i in trees.chain(segment)])
        tokens = trees.tokens[chain]
        log_p = model.hf(input_ids=tokens[None], use_cache=False).logits[0].log_softmax(-1)
        expected = log_p[:-1].gather(-1, tokens[1:, None])[:, 0]
        torch.testing.assert_close(values[chain[1:]], expected, rtol=0, atol=2e-5)


class Leaky(nn.Module):
    """A layer norm that also lets each token see the one to its left in the row."""

    def __init__(self, inner: nn.Module, amount: float) -> None:
        super().__init__()
        self.inner, self.amount = inner, amount

    def forward(self, states: Tensor) -> Tensor:
        return self.inner(states) + self.amount * nn.functional.pad(states, (0, 0, 1, 0))[:, :-1]


def test_a_leak_too_small_for_the_logits_is_found() -> None:
    hf = build("llama", torch.bfloat16).hf
    hf.model.layers[0].input_layernorm = Leaky(hf.model.layers[0].input_layernorm, 1e-3)
    assert not LanguageModel(hf, None).packs
    hf.model.layers[0].input_layernorm = hf.model.layers[0].input_layernorm.inner
    assert LanguageModel(hf, None).packs


def test_a_head_that_is_not_understood_is_an_error() -> None:
    hf = build("granite", logits_scaling=3.0).hf
    hf.forward = lambda **inputs: _doubled(hf, **inputs)
    with pytest.raises(ModelError, match="GraniteForCausalLM: its logits are not"):
        LanguageModel(hf, None)


def _doubled(hf: Any, **inputs: Any) -> Any:
    output = hf.model(**inputs)
    output.logits = 2 * hf.lm_head(output.last_hidden_state)
    return output


def test_a_model_that_looks_ahead_is_an_error() -> None:
    hf = build("llama").hf
    hf.config.is_causal = False
    with pytest.raises(ModelError, match="not a causal language model"):
        LanguageModel(hf, None)


@pytest.mark.parametrize("kind", ["mistral", "gemma2"])
def test_the_wrapped_model_works_as_ever(kind: str) -> None:
    model = build(kind, torch.float32, sliding_window=3, head_dim=8).eval()
    plain = copy.deepcopy(model.hf)
    plain.set_attn_implementation("eager")
    tokens = torch.randint(3, 48, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    for inputs in ({"input_ids": tokens}, {"input_ids": tokens, "attention_mask": mask}):
        found, expected = (m(**inputs, use_cache=False).logits for m in (model.hf, plain))
        seen = inputs.get("attention_mask", torch.ones_like(tokens)).bool()
        torch.testing.assert_close(found[seen], expected[seen], rtol=0, atol=1e-5)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.hf.generate(tokens, **options), plain.generate(tokens, **options))


def test_recomputation_changes_nothing() -> None:
    model = build("llama").train()
    values, gradients = value_and_gradients(model)
    calls: list[int] = []
    model.hf.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    model.checkpoint_layers(True)
    again, gradients_again = value_and_gradients(model)
    assert len(calls) == 2
    assert torch.equal(values, again)
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)
    model.checkpoint_layers(False)
    value_and_gradients(model)
    assert len(calls) == 3
    model.hf.supports_gradient_checkpointing = False
    with pytest.raises(ModelError, match="recompute: LlamaForCausalLM"):
        model.checkpoint_layers(True)


def test_autocast_computes_in_low_precision() -> None:
    model = build("llama", torch.float32).eval()
    exact = model.logprobs(batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.hf.model.layers[0].self_attn.v_proj(torch.randn(1, 16))
        rounded = model.logprobs(batch())
    assert hidden.dtype == torch.bfloat16
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1)


def test_save_and_load(folder: Path, tokenizer: Any) -> None:
    first = LanguageModel.load(folder)
    assert first.packs
    assert first.hf.config.eos_token_id == tokenizer.eos_token_id
    assert "hone" not in (folder / "config.json").read_text(encoding="utf-8").replace("hone_", "")
    assert sorted(path.name for path in folder.glob("*.safetensors")) == ["model.safetensors"]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert plain.config._attn_implementation == "sdpa"
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter, first.hf.get_parameter(name))
    second = LanguageModel.load(str(folder), dtype=torch.float64)
    assert second.hf.dtype == torch.float64
    assert second.tokenizer.encode("two and two") == tokenizer.encode("two and two")
    assert second.renderer is second.renderer


def test_the_template_that_was_trained_on_is_saved(folder: Path, tmp_path: Path) -> None:
    model = LanguageModel.load(folder, template="chatml")
    model.save_tokenizer(tmp_path / "out")
    again = LanguageModel.load(folder).tokenizer.from_pretrained(tmp_path / "out")
    assert again.chat_template == model.renderer.template


def test_an_adapter_is_merged_into_its_base(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubling:
        unmergeable = ""

        def strip(self, model: nn.Module) -> None:
            model.requires_grad_(False)
            model.lm_head.weight.mul_(2)

    def load(model: nn.Module, where: Path) -> Doubling:
        assert where == tmp_path / "adapter"
        return Doubling()

    monkeypatch.setattr(loading, "load_adapter", load)
    (tmp_path / "adapter").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(folder)}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    base, merged = LanguageModel.load(folder), LanguageModel.load(tmp_path / "adapter")
    assert torch.equal(merged.hf.lm_head.weight, 2 * base.hf.lm_head.weight)
    assert all(parameter.requires_grad for parameter in merged.parameters())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="is an adapter, and its base is missing"):
        LanguageModel.load(tmp_path / "adapter")


def test_missing_models_are_explained(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"no model folder '.*god-model'.*did you mean 'good-model'"):
        LanguageModel.load(tmp_path / "god-model")
    with pytest.raises(ModelError, match=r"expected 'base', a folder .* or a Hub name"):
        LanguageModel.load("nonsense")
    with pytest.raises(ModelError, match=r"holds no model.*it has models in: good-model"):
        LanguageModel.load(tmp_path)
    assert loading.find_model("owner/name") == "owner/name"
    monkeypatch.chdir(tmp_path)
    assert loading.find_model("good-model") == "good-model"
    assert shipped_base().parent.name == "hone"


def test_models_of_another_kind_are_refused(folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"not those of a LlamaForCausalLM; missing: .* and 5 more"):
        LanguageModel.load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}), encoding="utf-8")
    with pytest.raises(ModelError, match="is a t5 model; expected a causal language model"):
        LanguageModel.load(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="cannot be loaded as a causal language model from safetensors"):
        LanguageModel.load(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="from safetensors"):
        LanguageModel.load(folder)
    bert = BertModel(BertConfig(vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    bert.save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError):
        LanguageModel.load(tmp_path / "bert")


def test_a_missing_tokenizer_is_explained(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ModelError, match="expected a folder with a tokenizer"):
        LanguageModel.load(folder)


def test_fresh_models_follow_their_tokenizer(tokenizer: Any) -> None:
    model = LanguageModel.fresh(LLAMA, tokenizer)
    assert model.hf.config.vocab_size == len(tokenizer)
    assert model.hf.generation_config.eos_token_id == tokenizer.eos_token_id
    assert LanguageModel.fresh({**LLAMA, "vocab_size": 320}, tokenizer).hf.lm_head.out_features == 320


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": "t5"}, "'t5' is not one"),
        ({"hiden_size": 3}, "no configuration key 'hiden_size'.*did you mean 'hidden_size'"),
        ({"vocab_size": 10}, "vocab_size: 10 is less than"),
        ({"num_attention_heads": 5}, "no model can be built"),
        ({"hidden_size": "wide"}, "no model can be built"),
    ],
)
def test_wrong_configurations_are_explained(change: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(ModelError, match=message):
        LanguageModel.fresh({**LLAMA, **change}, tokenizer)


def test_the_context_ends_where_rotary_embeddings_would_change_for_the_whole_row() -> None:
    """Phi-3's longrope takes other factors for every position of a row that reaches beyond its first context."""
    factors = {"rope_type": "longrope", "short_factor": [1.0] * 2, "long_factor": [8.0] * 2, "rope_theta": 1e4}
    model = build("phi3", original_max_position_embeddings=16, rope_parameters=factors, max_position_embeddings=64)
    model = LanguageModel(model.hf.eval(), None)
    random = np.random.default_rng(0)
    trees = [Tree((random.integers(3, 48, n),), (np.ones(n, np.float32),), (-1,)) for n in (10, 16, 30)]
    with torch.no_grad():
        alone = model.logprobs(pack(trees[:1]))
        fits, beyond = (model.logprobs(pack([trees[0], other]))[:10] for other in trees[1:])
    assert model.context == 16
    torch.testing.assert_close(fits, alone, rtol=0, atol=1e-5)
    assert (beyond - alone).abs().max() > 1e-3  # what the limit is for
    assert build("phi3", max_position_embeddings=64).context == 64


def test_weights_are_hashed_once_and_again_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    whole = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda file, name: read.append(file.name) or whole(file, name))
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = folder_hash(tmp_path)
    assert folder_hash(tmp_path) == first and len(read) == 1
    (tmp_path / "model.safetensors").write_bytes(b"others")
    assert folder_hash(tmp_path) != first and len(read) == 2
