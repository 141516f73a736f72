"""Quantised side tuning against its equations, and no gradient through the backbone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, CodeGenConfig, FalconConfig, GPTJConfig, OPTConfig

from conformance.adapters import IDS, llama, move
from hone.adapters.lora import LoRA
from hone.adapters.qst import QST, Downsample
from hone.adapters.tree import decoder_blocks
from hone.errors import HoneError


def side_of(model: Any) -> Any:
    return model.hone_side


def test_the_output_is_that_of_the_equations() -> None:
    model: Any = llama()
    adapter = QST(reduction=2, rank=3, quantize="none")
    adapter.attach(model)
    move(adapter, model)
    side = side_of(model)
    states: list[Tensor] = []
    with torch.no_grad(), adapter.disabled(model):
        handles = [layer.register_forward_hook(lambda m, a, out: states.append(out)) for layer in model.model.layers]
        last = model.model(input_ids=IDS).last_hidden_state
        for handle in handles:
            handle.remove()
        q = side.downsample[0](model.model.embed_tokens(IDS))
        positions = torch.arange(IDS.shape[1])[None]
        turned = side.network.rotary_emb(q, positions)
        mask = torch.full((12, 12), float("-inf"), dtype=q.dtype).triu(1)[None, None]
        for index, layer in enumerate(side.network.layers):
            z = torch.sigmoid(side.mix[index])
            # The pre-hook mixes with what was kept; here the mixture is written out, and the hook left nothing to do.
            layer._forward_pre_hooks.clear()
            layer._forward_pre_hooks_with_kwargs.clear()
            mixed = z * q + (1 - z) * side.downsample[index + 1](states[index])
            q = layer(mixed, attention_mask=mask, position_embeddings=turned)
        wanted = side.gate * last + (1 - side.gate) * side.upsample(side.network.norm(q))
    again: Any = llama()
    other = QST(reduction=2, rank=3, quantize="none")
    torch.manual_seed(1)
    other.attach(again)
    side_of(again).load_state_dict(side.state_dict())
    with torch.no_grad():
        found = again.model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def saved_bytes(model: Any) -> int:
    """Return the bytes that autograd keeps of a forward pass, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(input_ids=IDS.repeat(4, 2)[:, :24]).last_hidden_state
    assert output.requires_grad
    return sum(kept.values())


def test_less_is_kept_for_the_backward_pass_than_by_lora() -> None:
    ours, theirs = llama(), llama()
    QST(reduction=8, rank=2, quantize="none").attach(ours)
    LoRA(rank=2).attach(theirs)
    assert saved_bytes(ours) < 0.7 * saved_bytes(theirs)


def test_no_gradient_reaches_the_backbone() -> None:
    model: Any = llama()
    QST(reduction=2, quantize="none").attach(model)
    outputs: list[Tensor] = []
    for _, layer in decoder_blocks(model.model):
        layer.register_forward_hook(lambda module, args, output: outputs.append(output))
    model(input_ids=IDS)
    assert len(outputs) == 2 and not any(output.requires_grad for output in outputs)


def test_a_state_is_narrowed_through_a_nonlinearity() -> None:
    torch.manual_seed(0)
    made, h = Downsample(8, 4, 3, "low-rank").double(), torch.randn(5, 8, dtype=torch.float64)
    inner = h @ made.down.weight.T
    inner = (inner / (1 + torch.exp(-inner))) @ made.up.weight.T
    centred = inner - inner.mean(1, keepdim=True)
    wanted = centred / (centred.square().mean(1, keepdim=True) + made.norm.eps).sqrt()
    torch.testing.assert_close(made(h), wanted, rtol=0, atol=1e-12)


def run_again(layer: Any, *args: Any, **options: Any) -> Any:
    """Call a layer, hooks and all, inside what runs again in the backward pass, as transformers does."""
    return checkpoint(partial(nn.Module.__call__, layer), *args, use_reentrant=False, **options)


def test_layers_that_run_again_in_the_backward_pass_give_the_same_gradients() -> None:
    found = []
    for again in (False, True):
        model: Any = llama()
        adapter = QST(reduction=2, rank=3, quantize="none")
        torch.manual_seed(1)
        adapter.attach(model)
        move(adapter, model)
        kind = type(model.model.layers[0])
        if again:
            made = type("Again", (kind,), {"__call__": run_again})
            for layer in model.model.layers:
                layer.__class__ = made
        for _ in range(2):  # the second pass finds nothing of the first one's backward pass
            model.zero_grad()
            model(input_ids=IDS, labels=IDS).loss.backward()
            assert not side_of(model).kept
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-14)


SMALL: dict[str, Any] = {"vocab_size": 31, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS: dict[str, Callable[[], Any]] = {
    "opt": lambda: OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=32),
    "falcon": lambda: FalconConfig(**SMALL),
    "falcon grouped": lambda: FalconConfig(**SMALL, new_decoder_architecture=True, num_kv_heads=2, ffn_hidden_size=48),
    "gpt-j": lambda: GPTJConfig(**SMALL, n_positions=32, rotary_dim=8, n_inner=48),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_architectures_with_sizes_of_other_names(kind: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(OTHERS[kind]()).eval()
    before = model(input_ids=IDS).logits
    adapter = QST(reduction=4, rank=3, quantize="none")
    adapter.attach(model)
    side = side_of(model)
    assert max(p.shape[-1] for p in side.network.parameters()) <= 32 and side.network.config.hidden_size == 8
    torch.testing.assert_close(model(input_ids=IDS).logits, before)  # the gate is 1
    move(adapter, model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in side.downsample.parameters())


def test_an_architecture_that_cannot_be_had_narrower_is_refused() -> None:
    projected = AutoModelForCausalLM.from_config(OPTConfig(**SMALL, word_embed_proj_dim=16, ffn_dim=48))
    with pytest.raises(HoneError, match=r"as wide as the layers; those of this OPT.* have 16 features, .* 32"):
        QST(reduction=4).attach(projected)
    coded = CodeGenConfig(**{**SMALL, "hidden_size": 16}, rotary_dim=4)  # 4 groups of heads, whatever the width
    model = AutoModelForCausalLM.from_config(coded)
    with pytest.raises(HoneError, match=r"'qst' cannot make a CodeGenModel 8 times narrower: .*another adapter"):
        QST(reduction=8).attach(model)
    assert not hasattr(model, "hone_side")


def test_a_width_that_does_not_divide_is_refused() -> None:
    with pytest.raises(HoneError, match=r"adapter\.reduction: 3 does not divide the model's width, 16"):
        QST(reduction=3).attach(llama())
