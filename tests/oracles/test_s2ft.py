"""S2FT equals training the contiguous slice of a literally permuted model, and dense training under a mask."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from conformance.adapters import gpt2
from hone.adapters.calibration import Calibration
from hone.adapters.host import adapted_layers
from hone.adapters.s2ft import S2FT, role_of
from hone.errors import HoneError
from oracles.masked import IDS, assert_same_weights, llama, train_masked, trained


def to_front(model: LlamaForCausalLM, heads: list[int], channels: list[int]) -> tuple[LlamaForCausalLM, Tensor, Tensor]:
    """Permute the coupled matrices so that the given heads and channels come first, as the paper does."""
    made, width = copy.deepcopy(model), model.config.head_dim
    order = torch.tensor(heads + [h for h in range(4) if h not in heads])
    features = (order[:, None] * width + torch.arange(width)).flatten()
    inner = torch.tensor(channels + [c for c in range(24) if c not in channels])
    for block in made.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj):
            layer.weight.data, layer.bias.data = layer.weight.data[features], layer.bias.data[features]
        attention.o_proj.weight.data = attention.o_proj.weight.data[:, features]
        for layer in (mlp.up_proj, mlp.gate_proj):
            layer.weight.data = layer.weight.data[inner]
        mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, inner]
    return made, features, inner


def test_s2ft_equals_training_the_contiguous_slice_of_a_permuted_model(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, channels = [2], [3, 7, 20]
    drawn = iter([torch.tensor(heads), torch.tensor(channels)] * 2)
    monkeypatch.setattr(torch, "randperm", lambda size: next(drawn))
    plain = llama()
    model, adapter = llama(), S2FT(o=0.25, down=0.125)
    adapter.attach(model)
    mine = trained(adapter, model)

    permuted, features, inner = to_front(plain, heads, channels)
    before = plain(input_ids=IDS).logits
    torch.testing.assert_close(permuted(input_ids=IDS).logits, before, rtol=0, atol=1e-12)
    masks = {}
    for i in range(2):
        masks[f"model.layers.{i}.self_attn.o_proj.weight"] = (torch.arange(16) < 4).double()
        masks[f"model.layers.{i}.mlp.down_proj.weight"] = (torch.arange(24) < 3).double()
    train_masked(permuted, masks)
    torch.testing.assert_close(mine(input_ids=IDS).logits, permuted(input_ids=IDS).logits, rtol=0, atol=1e-10)
    for ours, theirs in zip(mine.model.layers, permuted.model.layers, strict=True):
        for layer, order in ((("self_attn", "o_proj"), features), (("mlp", "down_proj"), inner)):
            a, b = (getattr(getattr(block, layer[0]), layer[1]).weight for block in (ours, theirs))
            torch.testing.assert_close(a[:, order], b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kv", [4, 2])
def test_s2ft_rows_and_columns_equal_dense_training_under_a_mask(kv: int) -> None:
    adapter = S2FT(q=0.25, k=0.5, v=0.5, o=0.5, up=0.1, gate=0.1, down=0.1)
    torch.manual_seed(3)
    model = llama(kv=kv)
    adapter.attach(model)
    masks = {}
    for name, layer in adapted_layers(model).items():
        mask = torch.zeros(layer.outputs, layer.inputs, dtype=torch.float64)
        if layer.columns:
            mask[:, layer.selected] = 1
        else:
            mask[layer.selected] = 1
        masks[f"{name}.weight"] = mask
    assert len(masks) == 14
    assert masks["model.layers.0.self_attn.k_proj.weight"].any(1).sum() == 4 * kv / 2  # whole heads
    dense = llama(kv=kv)
    train_masked(dense, masks)
    assert_same_weights(trained(adapter, model), dense)


def calibration(model: Any) -> Calibration:
    def loss(ids: Tensor) -> Tensor:
        return model(input_ids=ids, labels=ids).loss * 22

    return Calibration(batches=[IDS], forward=lambda ids: model(input_ids=ids), loss=loss, count=lambda ids: 22.0)


@pytest.mark.parametrize("prefer", ["largest", "smallest"])
@pytest.mark.parametrize("score", ["weight", "activation", "product", "gradient"])
def test_s2ft_selects_by_scores_that_are_computed_plainly(score: str, prefer: Any) -> None:
    model = llama()
    seen: dict[str, Tensor] = {}
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[1].mlp
    attention.o_proj.register_forward_pre_hook(lambda _, args: seen.update(o=args[0].detach().flatten(0, 1)))
    mlp.up_proj.register_forward_hook(lambda _, args, out: seen.update(up=out.detach().flatten(0, 1)))
    model(input_ids=IDS, labels=IDS).loss.backward()
    o, up = attention.o_proj.weight, mlp.up_proj.weight
    parts_ = {  # per input of o_proj, per output of up_proj
        "weight": (o.norm(dim=0), up.norm(dim=1)),
        "activation": (seen["o"].norm(dim=0), seen["up"].norm(dim=0)),
        "product": (o.norm(dim=0) * seen["o"].norm(dim=0), up.norm(dim=1) * seen["up"].norm(dim=0)),
        "gradient": (o.grad.norm(dim=0), up.grad.norm(dim=1)),
    }[score]
    heads, channels = parts_[0].view(4, 4).norm(dim=1), parts_[1]
    largest = prefer == "largest"
    model.zero_grad()
    fresh = llama()
    S2FT(o=0.5, up=0.25, down=0.0, select=score, prefer=prefer).attach(fresh, calibration(fresh))  # type: ignore[arg-type]
    found = adapted_layers(fresh)
    wanted = (heads.topk(2, largest=largest).indices.sort().values[:, None] * 4 + torch.arange(4)).flatten()
    assert found["model.layers.1.self_attn.o_proj"].selected.tolist() == wanted.tolist()
    picked = channels.topk(6, largest=largest).indices.sort().values
    assert found["model.layers.1.mlp.up_proj"].selected.tolist() == picked.tolist()


def test_s2ft_is_saved_as_a_lora_with_a_one_hot_factor(tmp_path: Path) -> None:
    model, adapter = llama(), S2FT(o=0.25, down=0.125)
    adapter.attach(model)
    adapter.save(model, tmp_path, base="the/base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    layer = adapted_layers(model)["model.layers.0.mlp.down_proj"]
    factors = layer.factors()
    assert torch.equal(factors.down, F.one_hot(layer.selected, 24).double())


def test_s2ft_says_what_does_not_fit() -> None:
    with pytest.raises(HoneError, match="every share is 0"):
        S2FT(o=0.0, down=0.0).attach(llama())
    with pytest.raises(HoneError, match=r"needs? .*calibration|looks at data"):
        S2FT(select="activation").attach(llama())
    with pytest.raises(HoneError, match="finds no layer for o"):
        S2FT(down=0.0, targets=["up_proj"]).attach(llama())
    with pytest.raises(HoneError, match=r"finds no layer for v, gate .* v_proj, .*gate_proj; set the share"):
        S2FT(v=0.5, gate=0.1).attach(gpt2())  # one matrix makes queries, keys and values, and there is no gate
    model = llama()
    model.config.num_attention_heads = 5
    with pytest.raises(HoneError, match=r"cannot tell the attention heads in 'model.layers.0.self_attn.o_proj'"):
        S2FT().attach(model)
    assert not adapted_layers(model)


def test_roles_are_known_across_architectures() -> None:
    known = {
        "transformer.h.0.attn.c_proj": "o", "transformer.h.0.mlp.c_proj": "down", "transformer.h.0.attn.c_attn": "qkv",
        "model.layers.3.self_attn.o_proj": "o", "gpt_neox.layers.1.attention.dense": "o",
        "transformer.h.2.self_attention.dense": "o",
        "gpt_neox.layers.1.mlp.dense_4h_to_h": "down", "model.decoder.layers.0.fc2": "down",
        "bert.encoder.layer.0.attention.output.dense": "o", "lm_head": None,
    }  # fmt: skip
    assert {name: role_of(name) for name in known} == known
