"""Feed-forward blocks in chunks: the same outputs and gradients, and none of the wide activations kept."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from hone.errors import ModelError
from hone.text.chunks import chunk_feed_forward, in_chunks
from hone.text.model import LanguageModel
from hone.text.pack import Packed, Tree, pack
from hone.text.starts import Fresh
from hone.text.tokenizer import train_tokenizer

SMALL = {
    "vocab_size": 300, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def batch(tokens: int) -> Packed:
    ids = (np.arange(tokens) % 200).astype(np.int32)
    return pack([Tree((ids,), (np.ones(tokens, np.float32),), (-1,))])


def model(kind: str) -> LanguageModel:
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL)).double().eval()
    return LanguageModel(hf, train_tokenizer(["some text"], 300))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2", "phi", "gpt2"])
def test_outputs_and_gradients_are_the_same(kind: str) -> None:
    plain = model(kind)
    chunked = copy.deepcopy(plain)
    chunk_feed_forward(chunked.hf, 5)
    found = []
    for one in (plain, chunked):
        loss = -one.logprobs(batch(23)).sum()
        found.append([loss, *torch.autograd.grad(loss, list(one.parameters()))])
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def kept(one: LanguageModel, tokens: int) -> int:
    """Return the bytes that the forward pass keeps for its backward pass, each storage once, without the weights."""
    storages: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in one.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if (at := tensor.untyped_storage().data_ptr()) not in own:
            storages[at] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        states = one.hidden(batch(tokens))
    assert states.requires_grad
    return sum(storages.values())


def test_the_inside_of_the_blocks_is_not_kept() -> None:
    wide = model("llama")
    before = kept(wide, 128)
    chunk_feed_forward(wide.hf, 16)
    after = kept(wide, 128)
    inside = 128 * 64 * 8 * 2 * 3  # gate, up and their product, in two layers, float64
    assert before - after > 0.9 * inside


def test_the_option_leaves_names_and_weights_alone(tmp_path: Any) -> None:
    shape = {key: value for key, value in SMALL.items() if "token" not in key and key != "vocab_size"}
    start = Fresh(config={"model_type": "llama", **shape}, tokenizer="base", mlp_chunk=4)
    made = start.load(device="cpu", dtype=torch.float32, data=None)
    names = set(made.hf.state_dict())
    made.save(tmp_path)
    again = LanguageModel.load(tmp_path)
    assert set(again.hf.state_dict()) == names
    torch.testing.assert_close(made.logprobs(batch(9)), again.logprobs(batch(9)), rtol=1e-5, atol=1e-6)


def test_blocks_that_are_not_understood_are_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2))])

    with pytest.raises(ModelError, match="mlp_chunk: the blocks of Odd have none of mlp"):
        chunk_feed_forward(Odd(), 4)
    with pytest.raises(ModelError, match="gives more than its output"):
        in_chunks(lambda hidden: (hidden, None), 2, torch.zeros(1, 4, 2))
