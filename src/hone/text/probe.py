"""Proof, on the loaded model itself, that its packed forward pass is exact, and that its head is understood.

Twelve tokens go through the model three times. Right-padded rows, through the model as transformers runs it, give the
reference logits. The hidden states of those rows must give the same logits through hone's head, and so must the packed
tree. A packed token must also owe nothing to tokens off its chain, which shows as gradients that are exactly zero, in
any precision.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hone.errors import ModelError
from hone.text.attention import NAME, PackingError, Scoring, TreePlan
from hone.text.fallback import Rows, padded_hidden
from hone.text.pack import Packed

if TYPE_CHECKING:
    from hone.text.model import LanguageModel

# Largest root-mean-square difference of logits relative to their size: what rounding explains, with room to spare.
# float64 is compared with a reference that rounds its softmax to float32.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}

OFF_CHAIN = [0, 1, 2, 6, 7]  # the probe's tokens that its last segment must not see: another root, and a sibling above
LAST = slice(10, 12)


def find_obstacle(model: LanguageModel) -> str:
    """Return why a model cannot run a packed tree, "" when it can and the proof holds.

    Args:
        model: the wrapped model, with an attention implementation of transformers; left with that, or with "hone" when
            the proof holds.

    Raises:
        ModelError: its logits are not its head applied to its hidden states, or a token sees later ones; then no
            forward pass of hone's would be right.
    """
    hf, training = model.hf, model.hf.training
    stock = hf.config._attn_implementation
    batch = _probe(hf.config.get_text_config().vocab_size).to(next(hf.parameters()).device)
    rows = Rows.unroll(batch)
    hf.eval()
    try:
        with torch.no_grad():
            reference = hf(input_ids=rows.tokens, use_cache=False).logits
            _check_head(model, rows, reference)
        reason = _obstacle_in_class(hf)
        if not reason:
            hf.set_attn_implementation(NAME)
            reason = _obstacle_in_forward(model, batch, rows.packed(reference))
            if reason:
                hf.set_attn_implementation(stock)
    finally:
        hf.train(training)
    return reason


def _probe(vocabulary: int) -> Packed:
    """Return a tree of every shape that matters: another root first, siblings, and a grandchild, 12 tokens in all."""
    lengths, parents, positions = [3, 3, 2, 2, 2], [-1, -1, 1, 1, 3], [0, 1, 2, 0, 1, 2, 3, 4, 3, 4, 5, 6]
    generator = torch.Generator().manual_seed(0)
    return Packed(
        tokens=torch.randint(vocabulary, (12,), generator=generator),
        positions=torch.tensor(positions),
        starts=torch.tensor([0, *lengths]).cumsum(0),
        parents=torch.tensor(parents),
        weights=torch.zeros(12),
    )


def _check_head(model: LanguageModel, rows: Rows, reference: Tensor) -> None:
    """Compare the head on the padded rows' hidden states with the model's own logits; and that the model is causal."""
    name, expected = type(model.hf).__name__, rows.packed(reference)
    if model.hf.get_output_embeddings() is None:
        raise ModelError(f"{name} has no output layer; expected a causal language model")
    logits = model.head(padded_hidden(model.decoder, rows))
    if logits.shape != expected.shape or not _equal(logits, expected):
        raise ModelError(
            f"{name}: its logits are not its output layer, scale and soft cap applied to its last hidden states, so "
            "hone would train another function than the model computes. Use an architecture whose head is a linear "
            "layer with an optional scale and soft cap"
        )
    if not _equal(reference[1, :3], reference[2, :3]):  # two chains with the same first three tokens
        raise ModelError(f"{name} is not a causal language model: what follows a token changes its logits")


def _obstacle_in_class(hf: Any) -> str:
    name = type(hf).__name__
    if not getattr(hf, "_supports_attention_backend", False):
        return f"{name} does not use transformers' attention registry"
    types = getattr(hf.config.get_text_config(), "layer_types", None) or []
    other = sorted(set(types) - {"full_attention", "sliding_attention"})
    return f"{name} has layers of type {', '.join(other)}" if other else ""


def _obstacle_in_forward(model: LanguageModel, batch: Packed, expected: Tensor) -> str:
    """Run the packed tree; compare logits, reach of the attention, and what the last segment depends on."""
    name, plan = type(model.hf).__name__, _Recorder(TreePlan(batch))
    embedded: list[Tensor] = []

    def tap(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[0].clone()  # a model may scale it in place, which a leaf does not allow

    hook = model.hf.get_input_embeddings().register_forward_hook(tap)
    try:
        with torch.enable_grad():
            hidden = model.states(batch.tokens, batch.positions, plan)
            # Random weights, since a plain sum of normalised states would be constant.
            weights = torch.randn(hidden[LAST].shape, generator=torch.Generator().manual_seed(0)).to(hidden)
            (gradient,) = torch.autograd.grad((hidden[LAST] * weights).sum(), embedded)
    except PackingError as error:
        return str(error)
    finally:
        hook.remove()
    if gradient.flatten(0, -2)[OFF_CHAIN].count_nonzero():
        return f"in {name} tokens reach each other by other ways than attention"
    with torch.no_grad():
        logits = model.head(hidden.detach())
    if not _equal(logits, expected):
        return f"{name} computes other logits packed, by a relative {_difference(logits, expected):.0e}"
    return _obstacle_in_windows(model.hf, plan.windows)


def _obstacle_in_windows(hf: Any, given: list[int | None]) -> str:
    """Check that layers hand their sliding window to the attention function: twelve tokens are too few to see it."""
    config = hf.config.get_text_config()
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    expected = [window] * len(given)
    if types:
        expected = [window if kind == "sliding_attention" else None for kind in types[: config.num_hidden_layers]]
    if sorted(map(str, given)) == sorted(map(str, expected)):
        return ""
    return f"{type(hf).__name__} has sliding windows that its attention layers do not pass on"


class _Recorder:
    """A plan that notes the sliding windows it is asked for."""

    def __init__(self, plan: TreePlan) -> None:
        """Wrap the plan that does the work."""
        self.plan = plan
        self.windows: list[int | None] = []

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Attend like the wrapped plan; see `Plan.attend`."""
        self.windows.append(scoring.sliding_window)
        return self.plan.attend(module, query, key, value, scoring)


def _equal(logits: Tensor, expected: Tensor) -> bool:
    return _difference(logits, expected) <= TOLERANCE.get(expected.dtype, 3e-2)


def _difference(logits: Tensor, expected: Tensor) -> float:
    """Return the root-mean-square difference relative to the expected values; NaN counts as a difference."""
    wide = expected.double() if expected.device.type != "mps" else expected.float()
    return float((logits.to(wide) - wide).norm() / wide.norm())
