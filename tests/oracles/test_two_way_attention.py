"""Attention without the causal mask, in segments and layers, equals transformers' own with the mask written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hone.errors import ModelError
from hone.text.attention import TreePlan
from hone.text.generate import generate
from hone.text.model import LanguageModel
from hone.text.pack import Packed, Tree, as_prefixes, pack, seen_both_ways
from hone.text.tokenizer import train_tokenizer

CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel.fresh(CONFIG, train_tokenizer(["some text"], 300)).to(dtype=torch.float64)


def tree(lengths: list[int], parents: list[int], trained: list[int], seed: int) -> Tree:
    """Return a tree of random tokens; `trained` says how many at the end of each segment weigh 1."""
    rng = np.random.default_rng(seed)
    weights = [np.r_[np.zeros(n - k), np.ones(k)].astype(np.float32) for n, k in zip(lengths, trained, strict=True)]
    tokens = tuple(rng.integers(250, size=n).astype(np.int32) for n in lengths)
    return Tree(tokens, tuple(weights), tuple(parents), where=f"tree:{seed}")


def visible(batch: Packed) -> Tensor:
    """Return which key (T) each query (T) sees, cell by cell from the definition."""
    owner = torch.arange(batch.segments).repeat_interleave(batch.starts.diff()).tolist()
    marks = [False] * batch.segments if batch.two_way is None else batch.two_way.tolist()
    sees = torch.zeros(len(batch), len(batch), dtype=torch.bool)
    for query, own in enumerate(owner):
        for key, other in enumerate(owner):
            sees[query, key] = other in batch.chain(own) and (key <= query or (other == own and marks[own]))
    return sees


def reference(model: LanguageModel, batch: Packed, layers: frozenset[int] | None = None) -> Tensor:
    """Return the last hidden states (T, D) by transformers' eager attention under masks that are written out."""
    open_mask = visible(batch)
    closed = open_mask & torch.ones(len(batch), len(batch), dtype=torch.bool).tril()
    masks = [
        torch.zeros(len(batch), len(batch), dtype=torch.float64).masked_fill(
            ~(open_mask if layers is None or n in layers else closed), float("-inf")
        )[None, None]
        for n in range(2)
    ]
    decoder: Any = model.decoder
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, n=n: (args, {**kwargs, "attention_mask": masks[n]}), with_kwargs=True
        )
        for n, layer in enumerate(decoder.layers)
    ]
    model.packs = False
    model.hf.set_attn_implementation("sdpa")
    try:
        output = decoder(input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False)
    finally:
        model.packs = True
        for hook in hooks:
            hook.remove()
    return output.last_hidden_state[0]


TREES = [tree([5], [-1], [2], 1), tree([4, 3, 2], [-1, 0, 0], [0, 3, 2], 2), tree([3, 2, 2], [-1, 0, 1], [1, 2, 2], 3)]


@pytest.mark.parametrize("form", ["prefixes", "everywhere", "in the second layer"])
@pytest.mark.parametrize("blocks", [True, False])
def test_hidden_states_and_gradients_equal_a_written_out_mask(model: LanguageModel, form: str, blocks: bool) -> None:
    if form == "prefixes":
        batch = as_prefixes(pack(TREES))
    else:
        batch = seen_both_ways(pack(TREES[:2]), None if form == "everywhere" else {1})
    made: list[tuple[Tensor, ...]] = []
    for which in (0, 1):
        with sdpa_kernel(SDPBackend.MATH if not blocks else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
            states = model.hidden(batch) if which else reference(model, batch, batch.two_way_layers)
            loss = (states * torch.arange(states.numel()).view_as(states).sin()).sum()
            made.append((states, *torch.autograd.grad(loss, list(model.decoder.parameters()))))
    for ours, theirs in zip(made[1], made[0], strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_marked_segments_in_a_row_form_one_block(model: LanguageModel) -> None:
    chained = seen_both_ways(pack([tree([2, 1, 3], [-1, 0, 1], [0, 0, 0], 5)]))
    whole = seen_both_ways(pack([Tree((np.concatenate(tree([2, 1, 3], [-1, 0, 1], [0, 0, 0], 5).tokens),),
                                      (np.zeros(6, np.float32),), (-1,))]))  # fmt: skip
    torch.testing.assert_close(model.hidden(chained), model.hidden(whole), **EXACT)


def test_prefixes_are_cut_before_the_first_trained_token() -> None:
    batch = as_prefixes(pack(TREES))
    assert batch.starts.tolist() == [0, 3, 5, 9, 12, 14, 16, 17, 19, 21]
    assert batch.parents.tolist() == [-1, 0, -1, 2, 2, -1, 5, 6, 7]
    assert batch.two_way is not None
    assert batch.two_way.tolist() == [True, False, True, False, False, True, False, False, False]
    assert batch.trees.tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert torch.equal(batch.previous, pack(TREES).previous)


@pytest.mark.parametrize("two_way", [True, False])
def test_the_mask_of_flex_attention_has_the_same_cells(two_way: bool) -> None:
    batch = as_prefixes(pack(TREES)) if two_way else pack(TREES)
    plan = TreePlan(batch)
    plan = plan.open or plan
    assert plan.intervals is not None
    places = torch.arange(len(batch))
    cells = plan.intervals.mask_mod(None)(0, 0, places[:, None], places[None])
    assert torch.equal(cells, visible(batch))


def test_generation_behind_a_prefix_gives_the_log_probabilities_of_training(model: LanguageModel) -> None:
    prompts = [np.array([5, 6, 7, 8], np.int32), np.array([9, 10], np.int32)]
    made = generate(model, prompts, max_new_tokens=5, prefix=True)
    causal = generate(model, prompts, max_new_tokens=5)
    for prompt, (one,), (other,) in zip(prompts, made, causal, strict=True):
        ones = np.ones(len(one.tokens), np.float32)
        batch = as_prefixes(pack([Tree((prompt, one.tokens), (np.zeros(len(prompt), np.float32), ones), (-1, 0))]))
        found = model.logprobs(batch)[len(prompt) :].detach().numpy()
        np.testing.assert_allclose(found, one.logprobs, rtol=1e-9, atol=1e-9)
        assert not np.allclose(one.logprobs[:1], other.logprobs[:1])


def test_padding_and_adapters_with_a_plan_of_their_own_refuse(model: LanguageModel) -> None:
    model.packs = False
    try:
        with pytest.raises(ModelError, match="runs padded instead of packed"):
            model.hidden(seen_both_ways(pack(TREES)))
        with pytest.raises(ModelError, match="cannot be prefixes"):
            generate(model, [np.array([1, 2], np.int32)], prefix=True)
    finally:
        model.packs = True
