"""LoRA, rsLoRA and DoRA equal PEFT's, layer kind by layer kind: outputs, gradients, merges and files both ways."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from hone.adapters.lora import LoRA
from hone.errors import HoneError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fan_in_fan_out:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Could not identify embedding layer:UserWarning"),
]
LAYERS = ["embed", "linear", "bare", "transposed", "conv1", "conv2", "conv3"]
VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora with dropout": {"use_dora": True, "lora_dropout": 0.3},
    "lora with dropout": {"lora_dropout": 0.3},
}
IDS = torch.arange(24).view(2, 12) % 20


class Everything(nn.Module):
    """Every kind of layer that LoRA goes around, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 6, padding_idx=0)
        self.linear = nn.Linear(6, 8)
        self.bare = nn.Linear(8, 8, bias=False)
        self.transposed = Conv1D(6, 8)
        self.conv1 = nn.Conv1d(6, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 5, 3, stride=2, padding=1)
        self.conv3 = nn.Conv3d(1, 4, (1, 3, 3), padding=1, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transposed(torch.tanh(self.bare(torch.tanh(self.linear(self.embed(ids))))))
        x = self.conv2(torch.tanh(self.conv1(x.mT))[:, None])
        return self.conv3(torch.tanh(x)[:, None])


def everything(dtype: torch.dtype = torch.float64) -> Everything:
    torch.manual_seed(0)
    return Everything().to(dtype)


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, attention_bias=True, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def moved(model: nn.Module) -> Any:
    """Take every trained tensor away from its start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def theirs_of(model: nn.Module, **options: Any) -> Any:
    torch.manual_seed(2)
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": LAYERS, **options})
    return moved(peft.get_peft_model(model, config))


def descend(output: Tensor) -> None:
    """Backpropagate a fixed weighted sum of an output."""
    weights = torch.arange(1.0, output.numel() + 1, dtype=output.dtype).view_as(output).sin()
    (output * weights).sum().backward()


def their_gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradient of every trained tensor under the key that it has in a file."""
    found = {}
    for name, parameter in model.named_parameters():
        key = name.removeprefix("base_model.model.").replace(".modules_to_save", "").replace(".default", "")
        if parameter.grad is not None:
            found[key.replace("magnitude_vector.weight", "magnitude_vector")] = parameter.grad
    return found


def assert_equal_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    expected = their_gradients(theirs)
    found = {key: tensor.grad for key, tensor in LoRA().tensors(ours).items()}
    assert found.keys() == expected.keys() and found
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-10, msg=key)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer", LAYERS)
def test_outputs_and_gradients_equal(layer: str, variant: str, tmp_path: Path) -> None:
    options: dict[str, Any] = VARIANTS[variant]
    theirs = theirs_of(everything(), target_modules=[layer], **options)
    theirs.save_pretrained(tmp_path)
    ours = everything()
    LoRA().load(ours, tmp_path)
    outputs = []
    for model in (theirs, ours):
        torch.manual_seed(3)  # the same dropout
        outputs.append(model.train()(IDS))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-12)
    for output in outputs:
        descend(output)
    assert_equal_gradients(ours, theirs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_files_go_both_ways(variant: str, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    theirs = theirs_of(everything(dtype), **VARIANTS[variant]).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = everything(dtype).eval()
    adapter = LoRA()
    adapter.load(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(IDS), theirs(IDS), rtol=0, atol=tolerance)
    moved(ours)
    adapter.save(ours, tmp_path / "ours", base="")
    back = peft.PeftModel.from_pretrained(everything(dtype), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(back(IDS), ours(IDS), rtol=0, atol=tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_equal(variant: str, tmp_path: Path) -> None:
    theirs = theirs_of(everything(), **VARIANTS[variant])
    theirs.save_pretrained(tmp_path)
    ours = everything()
    adapter = LoRA()
    adapter.load(ours, tmp_path)
    adapter.strip(ours)
    expected = theirs.merge_and_unload().state_dict()
    assert expected.keys() == ours.state_dict().keys()
    for key, value in ours.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-12, msg=key)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_a_language_model_with_every_setting(variant: str, tmp_path: Path) -> None:
    theirs = theirs_of(
        llama(), target_modules=["embed_tokens", "q_proj", "v_proj", "down_proj"], rank_pattern={"down_proj": 3},
        alpha_pattern={"layers.0.self_attn.q_proj": 7, "v_proj": 5}, modules_to_save=["lm_head", "norm"],
        bias="lora_only", use_rslora=True, task_type="CAUSAL_LM", **VARIANTS[variant],
    )  # fmt: skip
    theirs.save_pretrained(tmp_path / "theirs")
    ours = llama()
    LoRA().load(ours, tmp_path / "theirs")
    outputs = [model(input_ids=IDS).logits for model in (theirs, ours)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-12)
    for output in outputs:
        descend(output)
    assert_equal_gradients(ours, theirs)
    LoRA().save(ours, tmp_path / "ours", base="")
    back = peft.PeftModel.from_pretrained(llama(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(back(input_ids=IDS).logits, outputs[1], rtol=0, atol=1e-12)


def test_layers_to_transform_and_regular_expressions(tmp_path: Path) -> None:
    for folder, options in {
        "some": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        "regex": {"target_modules": r".*\.[01]\.mlp\.(up|gate)_proj"},
        "all": {"target_modules": "all-linear", "exclude_modules": ["k_proj"], "bias": "all"},
        "inside": {"target_modules": "all-linear", "modules_to_save": ["layers.0.mlp"]},
    }.items():
        theirs = theirs_of(llama(), task_type="CAUSAL_LM", **options)
        theirs.save_pretrained(tmp_path / folder)
        ours = llama()
        LoRA().load(ours, tmp_path / folder)
        torch.testing.assert_close(
            ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, rtol=0, atol=1e-12, msg=folder
        )


def test_all_linear_chooses_the_same_layers() -> None:
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=2, n_head=4, n_positions=32))
    for model in (llama(), gpt2):
        theirs = theirs_of(copy.deepcopy(model), target_modules="all-linear").base_model
        assert sorted(LoRA().chosen(model)) == sorted(theirs.targeted_module_names)


def test_adapters_that_a_file_does_not_hold_whole_are_refused(tmp_path: Path) -> None:
    theirs_of(everything(), target_modules=["linear"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    saved = json.loads(file.read_text())
    for change, words in (
        ({"init_lora_weights": "pissa"}, "pissa.*path_initial_model_for_weight_conversion"),
        ({"lora_bias": True}, "lora_bias.*peft:lora"),
        ({"peft_type": "LOHA"}, "'loha', not 'lora'"),
        ({"target_modules": ["linear", "bare"]}, "no tensors for its target modules bare"),
    ):
        file.write_text(json.dumps(saved | change))
        with pytest.raises(HoneError, match=words):
            LoRA().load(everything(), tmp_path)
