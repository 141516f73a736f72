"""IA3 equals PEFT's: outputs, updates, merges and files both ways. BitFit trains biases, and only those."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hone.adapters.base import load_adapter
from hone.adapters.host import adapted_layers
from hone.adapters.scaling import IA3, BitFit
from hone.errors import HoneError
from hone.optimizers.standard import AdamW

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]
IDS = torch.arange(24).view(2, 12) % 20
SMALL: dict[str, Any] = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "attention_bias": True, **options})).double().eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=4, n_positions=32)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config).double().eval()
    for name, parameter in model.named_parameters():  # GPT-2's biases start at zero, where scaling shows nothing
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


MODELS = {"llama": llama, "gpt2": gpt2}


def theirs_of(model: nn.Module) -> Any:
    return peft.get_peft_model(model, peft.IA3Config(task_type="CAUSAL_LM")).double()  # type: ignore[arg-type]


def vectors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The learned vectors by the name of their layer."""
    return {
        name.removeprefix("base_model.model.").partition(".ia3_l")[0]: p
        for name, p in model.named_parameters()
        if "ia3_l" in name
    }


def learn(model: nn.Module, steps: int = 4) -> Any:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_ia3_trains_as_pefts_does(kind: str) -> None:
    ours, theirs = MODELS[kind](), theirs_of(MODELS[kind]())
    adapter = IA3()
    adapter.attach(ours)
    assert vectors(ours).keys() == vectors(theirs).keys()
    assert all(torch.equal(p, torch.ones_like(p)) for p in vectors(ours).values())
    learn(ours)
    learn(theirs)
    for name, vector in vectors(ours).items():
        torch.testing.assert_close(vector, vectors(theirs)[name], rtol=0, atol=1e-10)
        assert not torch.equal(vector, torch.ones_like(vector))
    found = ours(input_ids=IDS).logits
    torch.testing.assert_close(found, theirs(input_ids=IDS).logits, rtol=0, atol=1e-10)
    adapter.merge(ours)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(ours(input_ids=IDS).logits, merged(input_ids=IDS).logits, rtol=0, atol=1e-10)
    torch.testing.assert_close(ours(input_ids=IDS).logits, found, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", MODELS)
def test_ia3_reads_what_peft_writes_and_the_other_way_round(kind: str, tmp_path: Path) -> None:
    theirs = learn(theirs_of(MODELS[kind]()))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = MODELS[kind]()
    adapter = load_adapter(ours, tmp_path / "theirs")
    assert isinstance(adapter, IA3)
    torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=0, atol=1e-10)
    adapter.save(ours, tmp_path / "ours", base="the/base")
    again = peft.PeftModel.from_pretrained(MODELS[kind](), str(tmp_path / "ours"))
    torch.testing.assert_close(again(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=0, atol=1e-10)
    configs = [json.loads((tmp_path / side / "adapter_config.json").read_text()) for side in ("ours", "theirs")]
    assert configs[0]["peft_type"] == configs[1]["peft_type"] == "IA3"
    assert configs[0].keys() <= configs[1].keys()


def test_ia3_with_modules_that_train_whole_goes_both_ways(tmp_path: Path) -> None:
    config = peft.IA3Config(task_type="CAUSAL_LM", modules_to_save=["lm_head"])
    theirs = learn(peft.get_peft_model(llama(), config).double())  # type: ignore[arg-type]
    theirs.save_pretrained(tmp_path)
    ours = llama()
    load_adapter(ours, tmp_path)
    torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=0, atol=1e-10)


def test_a_file_without_a_listed_target_is_refused(tmp_path: Path) -> None:
    theirs_of(llama()).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    kept = {key: t for key, t in load_file(file).items() if "down_proj" not in key}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(HoneError, match="no tensors for its target modules down_proj"):
        load_adapter(llama(), tmp_path)


def test_ia3_trains_a_small_share_of_loras_parameters() -> None:
    model = llama()
    IA3().attach(model)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 2 * (8 + 8 + 24)  # keys and values of two heads of width 4, channels


def test_scales_do_not_decay_by_default() -> None:
    model = llama()
    IA3().attach(model)
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    (group,) = AdamW(lr=1e-3).groups(params)
    assert group["weight_decay"] == 0 and len(group["params"]) == len(vectors(model)) > 0
    shapes = [(3, 1), (1, 3), (1, 5, 1, 1), (), (2, 2), (1, 2, 1, 2)]  # the third is DoRA's of a convolution
    others = AdamW(lr=1e-3).groups([("", nn.Parameter(torch.zeros(shape))) for shape in shapes])
    assert [[tuple(p.shape) for p in g["params"]] for g in others] == [shapes[4:], shapes[:4]]


class Unnamed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.embed = nn.Linear(4, 4), nn.Embedding(4, 4)


def test_ia3_says_what_does_not_fit() -> None:
    with pytest.raises(HoneError, match=r"finds no keys, values and down projections; .* names k_proj"):
        IA3().attach(Unnamed())
    with pytest.raises(HoneError, match="'embed' is an embedding; adapter 'ia3' goes around linear"):
        IA3(targets=["embed"]).attach(Unnamed())
    with pytest.raises(HoneError, match="'up_proj' matches nothing"):
        IA3(feedforward=["up_proj"]).attach(llama())
    model = Unnamed()
    IA3(targets=["one"], feedforward=["one"]).attach(model)
    assert adapted_layers(model)["one"].inputs


# BitFit


def test_bitfit_equals_training_the_biases_of_a_model_that_has_them() -> None:
    plain = llama(mlp_bias=True)
    for name, parameter in plain.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    bare = llama(attention_bias=False)
    bare.load_state_dict(plain.state_dict(), strict=False)
    plain.requires_grad_(False)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    adapter = BitFit()
    adapter.attach(bare)
    torch.testing.assert_close(bare(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=0, atol=1e-14)
    learn(plain)
    learn(bare)
    adapter.strip(bare)
    assert bare.config.attention_bias
    assert bare.config.mlp_bias
    wanted = dict(plain.named_parameters())
    found = dict(bare.named_parameters())
    assert found.keys() == wanted.keys()
    for name, parameter in found.items():
        torch.testing.assert_close(parameter, wanted[name], rtol=0, atol=1e-10, check_device=False)


def test_bitfit_trains_biases_of_norms_too_and_can_keep_to_some_layers() -> None:
    model = gpt2()
    BitFit().attach(model)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 6 + 1
    assert all(n.endswith("bias") for n in names)
    some = gpt2()
    BitFit(targets=["mlp.c_fc"], bias="adapted").attach(some)
    names = [n for n, p in some.named_parameters() if p.requires_grad]
    assert names == [f"transformer.h.{i}.mlp.c_fc.base_layer.bias" for i in range(2)]


def test_bitfit_says_when_no_bias_is_left() -> None:
    with pytest.raises(HoneError, match=r"nothing to train: with bias: all and add: false.*set add: true"):
        BitFit(add=False).attach(llama(attention_bias=False))
    with pytest.raises(HoneError, match="with bias: none and add: true"):
        BitFit(targets=["c_fc"], bias="none").attach(gpt2())


def test_a_merge_that_the_architecture_has_no_place_for_warns() -> None:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SMALL)).eval()  # biases of q, k and v, and no flag for others
    adapter = BitFit()
    adapter.attach(model)
    before = copy.deepcopy(learn(model))(input_ids=IDS).logits
    with pytest.warns(UserWarning, match="no place for the biases"):
        adapter.strip(model)
    torch.testing.assert_close(model(input_ids=IDS).logits, before)
