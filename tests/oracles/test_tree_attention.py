"""Packed-tree attention equals separate sequences run by transformers itself: logits, loss and every gradient."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from hone.text import attention as tree
from hone.text.attention import NAME, Scoring, TreePlan
from hone.text.blocks import can_use_blocks
from hone.text.flex import flex_tree_attention
from hone.text.pack import Packed, Tree, pack

SMALL = {
    "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 4},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "phi": {"num_key_value_heads": 4},
    "olmo2": {},
    "gpt2": {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "mixtral": EXPERTS,
    "gpt_oss": {**EXPERTS, "head_dim": 8, "sliding_window": 4},
}


class StayDouble(TorchFunctionMode):
    """Lets float64 stay float64 where transformers rounds to float32: in norms, routers and the eager softmax."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            if func is Tensor.to:
                args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        return func(*args, **kwargs)


def tiny(kind: str, **changes: Any) -> nn.Module:
    """Return a random float64 model, its weights large enough for attention to matter."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **FAMILIES.get(kind, {}), **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def forest(shapes: list[list[tuple[int, int]]], vocabulary: int = 48, seed: int = 0) -> Packed:
    """Pack trees given as lists of (length, parent)."""
    random = np.random.default_rng(seed)
    trees = []
    for shape in shapes:
        tokens = tuple(random.integers(3, vocabulary, length) for length, _ in shape)
        weights = tuple(random.random(length).astype(np.float32) for length, _ in shape)
        trees.append(Tree(tokens, weights, tuple(parent for _, parent in shape)))
    return pack(trees)


# A pair, a plain sequence, a deep tree out of pre-order with a chain of only children, and three rollouts.
EVERYTHING = [
    [(6, -1), (5, 0), (3, 0)],
    [(7, -1)],
    [(3, -1), (2, 0), (4, 0), (1, 1), (2, 3), (3, 1), (2, 2)],
    [(5, -1), (1, 0), (4, 0), (4, 0)],
]


def chain_indices(batch: Packed, segment: int) -> Tensor:
    """Return the indices of the tokens on the chain that ends with a segment."""
    return torch.cat([torch.arange(batch.starts[i], batch.starts[i + 1]) for i in batch.chain(segment)])


def separate_logits(model: nn.Module, batch: Packed) -> Tensor:
    """Run every segment's chain as a sequence of its own; return its last logits in packed order."""
    logits = []
    for segment in range(batch.segments):
        own = int(batch.starts[segment + 1] - batch.starts[segment])
        sequence = batch.tokens[chain_indices(batch, segment)]
        logits.append(model(input_ids=sequence[None], use_cache=False).logits[0, -own:])
    return torch.cat(logits)


def packed_logits(model: nn.Module, batch: Packed, plan: Any = None) -> Tensor:
    """Run the batch packed, on a model whose attention is hone's."""
    plan = TreePlan(batch) if plan is None else plan
    arguments = {"position_ids": batch.positions[None], "use_cache": False, "plan": plan}
    hidden = model.get_decoder()(input_ids=batch.tokens[None], **arguments).last_hidden_state[0]
    logits = model.get_output_embeddings()(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def loss_of(logits: Tensor, batch: Packed) -> Tensor:
    """Return the weighted cross-entropy, each token predicted from what precedes it on its chain."""
    predicted = batch.previous >= 0
    log_p = logits[batch.previous[predicted]].log_softmax(-1)
    picked = log_p.gather(-1, batch.tokens[predicted][:, None])[:, 0]
    return -(batch.weights[predicted].double() * picked).sum()


def assert_same(packed: nn.Module, separate: nn.Module, batch: Packed, plan: Any = None) -> None:
    """Compare logits, loss and all gradients of a model run packed with those of its copy run on separate sequences.

    A child's chain is run for its own tokens only, so the reference sums the loss over separate sequences too.
    """
    with StayDouble():
        found, expected = packed_logits(packed, batch, plan), separate_logits(separate, batch)
        found_loss, expected_loss = loss_of(found, batch), loss_of(expected, batch)
        found_loss.backward()
        expected_loss.backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(found_loss, expected_loss, rtol=1e-12, atol=0)
    gradients = {name: p.grad for name, p in packed.named_parameters()}
    assert any(g is not None and g.abs().max() > 0.01 for g in gradients.values())
    for name, parameter in separate.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
        )


def both(kind: str, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """Return a model with hone's attention and its copy with transformers' eager attention."""
    separate = tiny(kind, **changes)
    packed = copy.deepcopy(separate)
    packed.set_attn_implementation(NAME)
    return packed, separate


@pytest.mark.parametrize("kind", FAMILIES)
def test_families(kind: str) -> None:
    assert_same(*both(kind), forest(EVERYTHING))


@pytest.mark.parametrize("kind", ["gpt2", "phi"])  # no layer of theirs rounds: recomputation runs outside the mode
def test_gradients_with_recomputation(kind: str) -> None:
    packed, separate = both(kind)
    packed.train()
    packed.activation_checkpointing_enable({"use_reentrant": False})
    assert_same(packed, separate, forest(EVERYTHING))


class Dense(TreePlan):
    """Attention by one dense mask over the whole row, in which a cell can be flipped."""

    def __init__(self, batch: Packed) -> None:
        super().__init__(batch)
        self.mask = dense_mask(batch, None)

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        assert scoring.scaling is not None
        return dense_attention(query, key, value, self.mask, scoring.scaling)


def test_one_flipped_cell_is_noticed() -> None:
    batch = forest(EVERYTHING)
    packed, separate = both("llama")
    assert_same(packed, separate, batch, Dense(batch))
    for query, key in [(20, 2), (11, 8), (30, 30), (5, 4), (len(batch) - 1, 0)]:
        plan = Dense(batch)
        plan.mask[query, key] = ~plan.mask[query, key]
        with pytest.raises(AssertionError):
            assert_same(packed, separate, batch, plan)


def dense_mask(batch: Packed, window: int | None) -> Tensor:
    """Return the (T, T) mask cell by cell, from the definition."""
    mask = torch.zeros(len(batch), len(batch), dtype=torch.bool)
    for segment in range(batch.segments):
        chain = chain_indices(batch, segment).tolist()
        for place, query in enumerate(chain):
            for key in chain[: place + 1][-window if window else 0 :]:
                mask[query, key] = True
    return mask


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float,
    softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return attention written out head by head."""
    outputs = []
    for head in range(query.shape[1]):
        shared = head * key.shape[1] // query.shape[1]
        scores = query[0, head] @ key[0, shared].T * scaling
        scores = scores if softcap is None else softcap * (scores / softcap).tanh()
        weights = scores.exp() * mask
        total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks[head].exp())
        outputs.append(weights / total @ value[0, shared])
    return torch.stack(outputs, 1)[None]


@st.composite
def forests(draw: st.DrawFn) -> list[list[tuple[int, int]]]:
    """Draw up to three trees of up to seven segments, at most three below one another, parents in any earlier place."""
    trees = []
    for _ in range(draw(st.integers(1, 3))):
        shape: list[tuple[int, int]] = []
        depth: list[int] = []
        for index in range(draw(st.integers(1, 7))):
            above = [i for i in range(index) if depth[i] < 3]
            parent = draw(st.sampled_from(above)) if above and index else -1
            depth.append(depth[parent] + 1 if parent >= 0 else 0)
            shape.append((draw(st.integers(1, 5)), parent))
        trees.append(shape)
    return trees


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    shapes=forests(),
    window=st.sampled_from([None, 1, 3, 8]),
    softcap=st.sampled_from([None, 1.5]),
    with_sinks=st.booleans(),
    key_heads=st.sampled_from([1, 2, 4]),
    value_size=st.sampled_from([8, 5]),
)
def test_random_forests(
    shapes: list, window: int | None, softcap: float | None, with_sinks: bool, key_heads: int, value_size: int
) -> None:
    batch = forest(shapes)
    inputs = heads(len(batch), key_heads, value_size)
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True) if with_sinks else None
    everything = [*inputs, *([sinks] if sinks is not None else [])]
    scoring = Scoring(scaling=0.4, sliding_window=window, softcap=softcap, sinks=sinks)
    found = TreePlan(batch).attend(nn.Identity(), *inputs, scoring)
    expected = dense_attention(*inputs, dense_mask(batch, window), 0.4, softcap, sinks)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad(x, everything, upstream) for x in (found, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(shapes=forests())
def test_random_forests_through_a_model(shapes: list) -> None:
    if len(forest(shapes)) > 1:
        assert_same(*both("llama"), forest([[(2, -1)], *shapes]))


def heads(tokens: int, key_heads: int = 2, value_size: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Return random queries, keys and values laid out as linear layers give them."""
    sizes = [(4, 8), (key_heads, 8), (key_heads, value_size)]
    torch.manual_seed(tokens)
    return [torch.randn(1, tokens, *size, dtype=dtype).transpose(1, 2).requires_grad_() for size in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_close(dtype: torch.dtype) -> None:
    batch = forest(EVERYTHING)
    exact = heads(len(batch))
    rounded = [x.detach().to(dtype).requires_grad_() for x in exact]
    found = TreePlan(batch).attend(nn.Identity(), *rounded)
    expected = dense_attention(*exact, dense_mask(batch, None), 8**-0.5)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance)
    upstream = torch.randn_like(expected)
    found_gradients = torch.autograd.grad(found, rounded, upstream.to(dtype))
    for one, other in zip(found_gradients, torch.autograd.grad(expected, exact, upstream), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=0, atol=4 * tolerance)


def test_blocks_are_as_few_as_can_be() -> None:
    plan = TreePlan(forest([[(256, -1), *[(64, 0)] * 8]]))
    assert len(plan.blocks) == 10, "a prompt, eight answers, and all answers on the prompt"
    assert sum((b.end - b.start) * (b.last - b.first) for b in plan.blocks) == 256**2 + 8 * 64**2 + 512 * 256
    chain = TreePlan(forest([[(5, -1), (4, 0), (3, 1), (2, 2)], [(6, -1)]]))
    assert len(chain.blocks) == 2, "a conversation in many segments is one sequence"


def test_switching_fused_kernels_off_gives_second_derivatives() -> None:
    batch = forest([[(2, -1), (2, 0), (1, 0)]])
    inputs = heads(len(batch), 2, 8)
    with sdpa_kernel(SDPBackend.MATH):
        assert not can_use_blocks(*inputs)
        assert torch.autograd.gradgradcheck(lambda *x: TreePlan(batch).attend(nn.Identity(), *x), inputs)
    assert can_use_blocks(*inputs)


@pytest.mark.parametrize(
    ("size", "refusal"), [(2, "not implemented"), (32, "once_differentiable")], ids=["one mask", "blocks"]
)
def test_fused_kernels_refuse_second_derivatives(size: int, refusal: str) -> None:
    batch = forest([[(size, -1), (size, 0), (size, 0)]])
    inputs = heads(len(batch), 2, 8)
    output = TreePlan(batch).attend(nn.Identity(), *inputs)
    (first,) = torch.autograd.grad(output.square().sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match=refusal):
        first.sum().backward()


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_dropout_drops_weights_and_scales_the_rest(softcap: float | None) -> None:
    batch = forest(EVERYTHING)
    query, key, _ = heads(len(batch), 4)
    value = torch.eye(len(batch), dtype=torch.float64).expand(1, 4, -1, -1)  # so that the output is the weights
    plan = TreePlan(batch)
    whole = plan.attend(nn.Identity(), query, key, value, Scoring(softcap=softcap))
    torch.manual_seed(0)
    dropped = plan.attend(nn.Identity(), query, key, value, Scoring(dropout=0.25, softcap=softcap))
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)
    assert 0.70 < kept.sum() / (whole != 0).sum() < 0.80


@pytest.mark.parametrize("window", [None, 1, 3])
def test_mask_of_flex_attention(window: int | None) -> None:
    batch = forest(EVERYTHING)
    index = torch.arange(len(batch))
    found = TreePlan(batch).intervals.mask_mod(window)(None, None, index[:, None], index[None, :])
    assert torch.equal(found, dense_mask(batch, window))


@pytest.mark.parametrize(("window", "softcap", "key_heads"), [(None, None, 4), (3, None, 2), (None, 2.0, 1)])
def test_flex_attention_without_its_kernel(window: int | None, softcap: float | None, key_heads: int) -> None:
    batch = forest(EVERYTHING)
    inputs = [x.detach() for x in heads(len(batch), key_heads, 8, torch.float32)]  # no gradients without the kernel
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        found = flex_tree_attention(*inputs, TreePlan(batch).intervals, 0.4, window, softcap)
    expected = dense_attention(*inputs, dense_mask(batch, window), 0.4, softcap)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_what_packing_cannot_give_is_refused() -> None:
    batch = forest([[(3, -1)]])
    inputs = heads(3)
    bias, sideways = torch.zeros(1, 4, 3, 3), nn.Identity()
    sideways.is_causal = False
    with pytest.raises(tree.PackingError, match="position bias"):
        tree.attention(nn.Identity(), *inputs, plan=TreePlan(batch), position_bias=bias)
    with pytest.raises(tree.PackingError, match="both directions"):
        tree.attention(sideways, *inputs, plan=TreePlan(batch))
    with pytest.raises(tree.PackingError, match="mask of its own"):
        tree.attention(nn.Identity(), *inputs, bias, plan=TreePlan(batch))
    with pytest.raises(tree.PackingError, match="row of 3 tokens"):
        tree.attention(nn.Identity(), *heads(4), plan=TreePlan(batch))
