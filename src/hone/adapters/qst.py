"""Quantised side tuning: a narrow network that reads a frozen few-bit model and is all that trains."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hone.adapters.host import Host
from hone.adapters.layers import Layout, Wrapped
from hone.adapters.tree import decoder_blocks, decoder_of
from hone.errors import HoneError
from hone.parts import part
from hone.precision import wide_dtype

_SIDE = "hone_side"  # name under which a model holds its side network
# What architectures call the heads of keys and values, and the width of the feed-forward network.
_SHARED_HEADS = ("num_key_value_heads", "num_kv_heads")
_INNER = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")


class Downsample(nn.Module):
    """Narrow a hidden state: norm(B silu(A h)) with A (rank, width), or a pooling without parameters."""

    def __init__(self, width: int, narrow: int, rank: int, kind: str) -> None:
        """Make the module.

        Args:
            width: D of the input.
            narrow: D of the output.
            rank: of the product; not used when pooling.
            kind: "low-rank", "average" or "max".
        """
        super().__init__()
        self.narrow, self.kind = narrow, kind
        if kind == "low-rank":
            self.down = nn.Linear(width, rank, bias=False)
            self.up = nn.Linear(rank, narrow, bias=False)
            self.norm = nn.LayerNorm(narrow)

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., narrow)."""
        if self.kind == "low-rank":
            return self.norm(self.up(F.silu(self.down(x))))
        pool = F.adaptive_avg_pool1d if self.kind == "average" else F.adaptive_max_pool1d
        return pool(x.flatten(0, -2), self.narrow).view(*x.shape[:-1], self.narrow)


class SideNetwork(nn.Module):
    """The narrow network, which runs after the backbone on what its hooks have kept.

    It is no part of the backbone's graph: hooks hand it the hidden states of every layer, narrowed at once.
    """

    def __init__(self, model: nn.Module, reduction: int, rank: int, kind: str) -> None:
        """Make the network and put hooks on the model.

        Args:
            model: the frozen causal model.
            reduction: how many times narrower.
            rank: of the downsamplers.
            kind: of the downsamplers.
        """
        super().__init__()
        backbone = decoder_of(model)
        self.network = _narrow_network(backbone, reduction)
        width, narrow = backbone.config.hidden_size, self.network.config.hidden_size
        for module in self.network.modules():
            if isinstance(module, nn.Embedding):  # tokens and positions are in the backbone's states already
                nn.init.zeros_(module.weight)
        blocks = decoder_blocks(backbone)
        self.layers = len(blocks)
        self.downsample = nn.ModuleList([Downsample(width, narrow, rank, kind) for _ in range(self.layers + 1)])
        self.mix = nn.ParameterList([nn.Parameter(torch.full((narrow,), 0.5)) for _ in blocks])
        self.upsample = nn.Linear(narrow, width)
        self.gate = nn.Parameter(torch.ones(width))
        first = next(model.parameters())
        self.to(dtype=wide_dtype(first), device=first.device)
        self.enabled = True
        self.kept: dict[int, Tensor] = {}  # the narrowed states of the pass in progress, 0 the embeddings
        read = [backbone.get_input_embeddings(), *(layer for _, layer in blocks)]
        self._handles = [module.register_forward_hook(partial(self._keep, index)) for index, module in enumerate(read)]
        self._handles += [
            layer.register_forward_pre_hook(self._mixed(index), with_kwargs=True)
            for index, (_, layer) in enumerate(decoder_blocks(self.network))
        ]
        self._handles.append(backbone.register_forward_hook(self._after, with_kwargs=True))

    def _keep(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Narrow the output of the embeddings or of a layer.

        A layer that runs again inside the backward pass, to save memory, narrows again, for the gradients of its
        downsampler; what it gives then belongs to no pass.
        """
        if self.enabled:
            state = output[0] if isinstance(output, tuple) else output
            narrowed = self.downsample[index](state.detach().to(self.gate.dtype))
            if torch._C._current_graph_task_id() == -1:
                self.kept[index] = narrowed

    def _mixed(self, index: int) -> Any:
        """Return the hook that mixes a layer's input: z q + (1 - z) down(h), z the sigmoid of what is learned."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            state = args[0] if args else kwargs.pop("hidden_states")
            share = torch.sigmoid(self.mix[index])
            return (share * state + (1 - share) * self.kept[index + 1], *args[1:]), kwargs

        return hook

    def _after(self, backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Run the side network and mix its output into the backbone's last hidden states."""
        if not self.enabled:
            return output
        if kwargs.get("past_key_values") is not None:
            raise HoneError("adapter 'qst' has no key-value cache of transformers; generate with hone's own generation")
        passed = {k: v for k, v in kwargs.items() if k not in ("input_ids", "inputs_embeds", "use_cache")}
        self.network.config._attn_implementation = backbone.config._attn_implementation
        try:
            side = self.network(inputs_embeds=self.kept[0], use_cache=False, **passed).last_hidden_state
        finally:
            self.kept = {}
        hidden = output.last_hidden_state
        output.last_hidden_state = (self.gate * hidden + (1 - self.gate) * self.upsample(side)).to(hidden.dtype)
        return output


def _narrow_network(backbone: Any, reduction: int) -> Any:
    """Return the network of a backbone, narrower and fresh, after a trial that it computes.

    Raises:
        HoneError: the architecture cannot be had narrower this way, or the backbone's states have several widths.
    """
    config = _narrow_config(backbone.config, reduction)
    embedded, width = backbone.get_input_embeddings().embedding_dim, backbone.config.hidden_size
    kind = type(backbone).__name__
    if embedded != width:
        raise HoneError(f"adapter 'qst' needs embeddings as wide as the layers; those of this {kind} have {embedded} "
                        f"features, its layers {width}")  # fmt: skip
    try:
        network = type(backbone)(config).eval()
        network.config._attn_implementation = "eager"  # hone's own needs a plan
        with torch.no_grad():
            states = torch.zeros(1, 2, config.hidden_size, dtype=network.dtype, device=network.device)
            network(inputs_embeds=states, use_cache=False)
    except Exception as error:
        raise HoneError(f"adapter 'qst' cannot make a {kind} {reduction} times narrower: {error}; try another "
                        "adapter.reduction or another adapter") from error  # fmt: skip
    network.config._attn_implementation = backbone.config._attn_implementation
    return network


def _narrow_config(config: Any, reduction: int) -> Any:
    """Return the configuration of the same architecture, `reduction` times narrower."""
    small = copy.deepcopy(config)
    width, heads = config.hidden_size // reduction, config.num_attention_heads
    if width < 2 or config.hidden_size % reduction:
        raise HoneError(f"adapter.reduction: {reduction} does not divide the model's width, {config.hidden_size}")
    # Rotary embeddings need an even width of the heads.
    heads = next((h for h in range(heads, 0, -1) if width % h == 0 and (width // h) % 2 == 0), 1)
    small.hidden_size, small.num_attention_heads = width, heads
    own = vars(config)  # what is no field, as Falcon's head_dim, follows from the others
    for name in _SHARED_HEADS:
        if name in own:
            setattr(small, name, next(h for h in range(min(own[name] or heads, heads), 0, -1) if heads % h == 0))
    for name in _INNER:
        if own.get(name) is not None:
            setattr(small, name, max(1, own[name] // reduction))
    if own.get("head_dim") is not None:
        small.head_dim = width // heads
    if own.get("rotary_dim") is not None:  # GPT-J turns so many features of a head
        small.rotary_dim = min(own["rotary_dim"], width // heads)
    if "word_embed_proj_dim" in own:  # OPT's embeddings
        small.word_embed_proj_dim = width
    small.vocab_size, small.pad_token_id = 1, None  # it never sees a token
    return small


@part(
    "adapter",
    "qst",
    papers=[
        (
            "Quantized Side Tuning: Fast and Memory-Efficient Tuning of Quantized Large Language Models",
            "arXiv:2401.07159",
        )
    ],
    claim="A side network beside a frozen 4-bit model needs no backward pass through it: less memory and time than "
    "training LoRA inside, at a like loss.",
    deviations="The gate of the output is a plain number per channel that starts at 1, as the paper says, where its "
    "code takes a sigmoid; its learning rate has a factor, since the side network learns nothing while it is 1. The "
    "side network's first state has a downsampler of its own. Positions are told by the backbone's states and by "
    "rotary embeddings alone.",
)
@dataclass(kw_only=True)
class QST(Host):
    """Train a network `reduction` times narrower beside the frozen model, of the same architecture.

    q_0 = down_0(embeddings);  q_l = layer_l(z_l q_(l-1) + (1 - z_l) down_l(h_l));  h' = a h_L + (1 - a) up(q_L)

    with down(h) = norm(B silu(A h)), h_l the frozen layers' outputs, z_l = sigmoid of a learned vector that starts at
    0.5, and a a learned vector that starts at 1, so that the model is the base at first. No gradient passes through the
    frozen layers.

    Args:
        reduction: how many times narrower than the model the side network is.
        rank: rank of the downsamplers.
        downsample: "low-rank" ones that train, or poolings without parameters.
        gate_rate: factor on the learning rate of a.
        quantize: format of the frozen linear layers; "none" leaves them.
        targets: not used: the side network reads every layer.
        exclude: not used.
    """

    unmergeable: ClassVar[str] = "a network runs beside the base"
    reduction: Annotated[int, Field(ge=1)] = 4
    rank: Annotated[int, Field(ge=1)] = 16
    downsample: Literal["low-rank", "average", "max"] = "low-rank"
    gate_rate: Annotated[float, Field(gt=0)] = 10.0
    quantize: Literal["none", "nf4", "int2", "int3", "int4", "int5", "int6", "int7", "int8"] = "nf4"

    def chosen(self, model: nn.Module) -> list[str]:
        """Return no layers: none is wrapped."""
        return []

    def wrap(self, name: str, base: nn.Module, layout: Layout) -> Wrapped:
        """Refuse.

        Args:
            name: dotted name of the layer.
            base: the layer.
            layout: how it stores its weight.

        Raises:
            HoneError: always.
        """
        raise HoneError("adapter 'qst' wraps no layer")

    def install(self, model: nn.Module, names: list[str]) -> None:
        """Freeze and quantise the model and put the side network beside it.

        Args:
            model: a plain causal model.
            names: none.
        """
        side = SideNetwork(model, self.reduction, self.rank, self.downsample)
        super().install(model, names)
        side.requires_grad_(True)
        for module in side.network.modules():
            if isinstance(module, nn.Embedding):
                module.requires_grad_(False)
        setattr(model, _SIDE, side.train(model.training))

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the side network's tensors.

        Args:
            model: the network this adapter is attached to.
        """
        own = cast(nn.Module, getattr(model, _SIDE)).state_dict(keep_vars=True)
        return {**super().tensors(model), **{f"{_SIDE}.{name}": tensor for name, tensor in own.items()}}

    def rates(self, model: nn.Module) -> dict[str, float]:
        """Return the factor on the rate of the output's gate.

        Args:
            model: the network this adapter is attached to.
        """
        return {f"{_SIDE}.gate": self.gate_rate}

    def disabled(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which the backbone is alone.

        Args:
            model: the network this adapter is attached to.
        """
        return _alone(model)


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    side: Any = getattr(model, _SIDE)
    side.enabled = False
    try:
        yield
    finally:
        side.enabled = True
