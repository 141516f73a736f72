"""Virtual tokens in front of every sequence: learned embeddings, or learned keys and values in every layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from transformers import DynamicCache

from hone.adapters.calibration import Calibration
from hone.adapters.host import adapted_layers
from hone.adapters.layers import Layout, Wrapped
from hone.adapters.virtual import Front, Shape, SoftTokens, Virtual, keys_and_values, shape_of
from hone.errors import HoneError, ModelError
from hone.parts import part
from hone.text.attention import Plan, Scoring, TreePlan
from hone.text.pack import Packed
from hone.text.steering import Arranged, SoftPrompt, Steering, Wrap, behind, compute_dtype

_KEY = "prompt_embeddings"  # what PEFT calls the learned tensor in a file


class Prefix(Front):
    """The input embedding, holding keys and values of P virtual tokens for every layer.

    Args:
        base: the input embedding.
        layout: how it stores its weight.
        shape: of the model's keys and values.
        tokens: P.
        hidden: width of the reparametrising network, None without one.
    """

    def __init__(self, base: nn.Module, layout: Layout, shape: Shape, tokens: int, hidden: int | None) -> None:
        """Make room; the reparametrising network draws its start on the CPU."""
        super().__init__(base, layout)
        self.shape, self.tokens = shape, tokens
        width, whole = shape.heads * shape.size, 2 * shape.layers * shape.heads * shape.size
        place: dict[str, Any] = {"dtype": self.wide, "device": self.weight.device}
        self.prompt_embeddings: nn.Parameter | None = None
        self.encoder: nn.Sequential | None = None
        if hidden is None:
            self.prompt_embeddings = nn.Parameter(torch.zeros(tokens, whole, **place))
        else:
            self.embedding = nn.Parameter(torch.randn(tokens, width).to(**place))
            self.encoder = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, whole)).to(**place)

    def rows(self, first: int = 0, last: int | None = None) -> Tensor:
        """Return columns of (P, 2 L H' d): layer by layer its keys, then its values.

        Args:
            first: first column.
            last: one past the last; None for all.
        """
        if self.encoder is None:
            return cast(Tensor, self.prompt_embeddings)[:, first:last]
        inner, up = self.encoder[:2](self.embedding), cast(nn.Linear, self.encoder[2])
        return F.linear(inner, up.weight[first:last], up.bias[first:last])

    def pair(self, layer: int) -> Tensor:
        """Return the keys and the values of a layer, (2, H', P, d).

        Args:
            layer: its number.
        """
        width = 2 * self.shape.heads * self.shape.size
        rows = self.rows(layer * width, (layer + 1) * width)
        return rows.view(self.tokens, 2, self.shape.heads, self.shape.size).permute(1, 2, 0, 3)


class PrefixPlan:
    """Attention to learned keys and values in front of every tree."""

    def __init__(self, plan: Plan, layer: Prefix) -> None:
        """Hold the plan over the row with its virtual tokens in front, and what stands there.

        Args:
            plan: who computes.
            layer: what is learned.
        """
        self.plan, self.layer = plan, layer

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring) -> Tensor:
        """Attend with the layer's own keys and values in front; the virtual tokens' queries are nobody's.

        Args:
            module: the attention layer, which knows its number.
            query: (1, H, T, d).
            key: (1, H', T, d).
            value: (1, H', T, d).
            scoring: how the layer makes weights of scores.

        Returns:
            (1, T, H, d).
        """
        before = self.layer.pair(cast(int, module.layer_idx)).unsqueeze(1).to(value.dtype)
        blank = query.new_zeros(1, query.shape[1], self.layer.tokens, query.shape[3])
        pairs = (blank, query), (before[0], key), (before[1], value)
        queries, keys, values = (torch.cat(pair, dim=2) for pair in pairs)
        return self.plan.attend(module, queries, keys, values, scoring)[:, self.layer.tokens :]


class PrefixSteering(Steering):
    """Learned keys and values in every layer, in front of every sequence."""

    def __init__(self, layer: Prefix) -> None:
        """Hold the layer that has them.

        Args:
            layer: what is learned.
        """
        super().__init__(layer)
        self.front = layer.tokens

    def arrange(self, batch: Packed, training: bool, wrap: Wrap) -> Arranged:
        """Return the batch with shifted positions, and attention to what is learned.

        Args:
            batch: the packed forest.
            training: whether the network is in training mode.
            wrap: goes around the innermost plan.
        """
        whole = behind(batch, batch.tokens.new_zeros(self.front))
        plan = PrefixPlan(wrap(TreePlan(whole)), self.layer)
        return Arranged(batch.tokens, batch.positions + self.front, plan)

    def change_rows(self, decoder: Any, kwargs: dict[str, Any], begun: bool) -> int:
        """Put what is learned into the cache of rows that begin.

        Args:
            decoder: the network without its head.
            kwargs: arguments of its forward.
            begun: whether the cache holds the beginning of these rows.

        Raises:
            ModelError: layers run again in the backward pass, for which transformers takes their cache away.
        """
        if begun:
            return 0
        if decoder.training and getattr(decoder, "gradient_checkpointing", False):
            raise ModelError(
                "adapter 'prefix-tuning' cannot train on padded rows with recompute: switch one of them off"
            )
        given = kwargs.get("input_ids")
        given = kwargs["inputs_embeds"] if given is None else given
        cache = kwargs.get("past_key_values")
        cache = DynamicCache(config=decoder.config) if cache is None else cache
        dtype = compute_dtype(self.layer.weight)
        for index in range(self.layer.shape.layers):
            pair = self.layer.pair(index).to(dtype)[:, None].expand(-1, len(given), -1, -1, -1)
            cache.update(pair[0], pair[1], index)
        kwargs["past_key_values"] = cache
        return 0


@part(
    "adapter",
    "prompt-tuning",
    papers=[("The Power of Scale for Parameter-Efficient Prompt Tuning", "arXiv:2104.08691")],
    claim="Learned embeddings in front of the input, a ten-thousandth of the parameters, come near full training once "
    "the model is large.",
    deviations="Starting words are drawn from the whole vocabulary, not from its 5,000 most common ones. The model is "
    "a decoder; the paper tunes T5. The first token of a text is not trained, though the last virtual token predicts "
    "it.",
)
@dataclass(kw_only=True)
class PromptTuning(Virtual):
    """Train a soft prompt: the embeddings of virtual tokens in front of every sequence; the model is frozen.

    h = decoder([p_1 .. p_P, e(x_1) .. e(x_T)]), of which the last T states are used

    In packed batches the virtual tokens are one segment that all sequences share, computed once.

    Args:
        tokens: P, number of virtual tokens.
        init: embeddings of words drawn from the vocabulary, of a text, or uniform in [-0.5, 0.5].
        text: words to start from with init "text", repeated or cut to P tokens.
    """

    unmergeable: ClassVar[str] = "virtual tokens stand in front of the text, which no weights can say"
    peft_type: ClassVar[str] = "PROMPT_TUNING"
    init: Literal["vocabulary", "text", "random"] = "vocabulary"
    text: str = ""
    _start: Tensor | None = field(init=False, default=None, repr=False)

    def prepare(self, model: nn.Module, names: list[str], calibration: Calibration | None) -> None:
        """Choose the starting embeddings.

        Args:
            model: a plain network.
            names: the input embedding's.
            calibration: not looked at.
        """
        self._start = self.start_rows(model, self.init, self.text)

    def wrap(self, name: str, base: nn.Module, layout: Layout) -> Wrapped:
        """Return the input embedding with the virtual tokens.

        Args:
            name: dotted name of the embedding.
            base: the embedding.
            layout: how it stores its weight.
        """
        rows = torch.zeros(self.tokens, cast(Tensor, base.weight).shape[1]) if self._start is None else self._start
        self._start = None
        return SoftTokens(base, layout, {_KEY: rows})

    def steering(self, layer: SoftTokens) -> Steering:
        """Return what puts the virtual tokens in front.

        Args:
            layer: the embedding.
        """
        return SoftPrompt(layer, len(layer.weight), self.tokens)

    def config(self, layers: dict[str, Any]) -> dict[str, Any]:
        """Return PEFT's entry: a saved prompt starts from nothing."""
        return {"prompt_tuning_init": "RANDOM"}

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the embeddings under PEFT's name."""
        (layer,) = adapted_layers(model).values()
        return {_KEY: layer.prompt_embeddings}


@part(
    "adapter",
    "prefix-tuning",
    papers=[("Prefix-Tuning: Optimizing Continuous Prompts for Generation", "arXiv:2101.00190")],
    claim="Learned keys and values in front of every layer, a thousandth of the parameters, come near full training.",
    deviations="Keys enter as learned, without the rotation by position that the model gives its own, as in PEFT. The "
    "reparametrising network is off unless asked for, and is kept in the saved file.",
)
@dataclass(kw_only=True)
class PrefixTuning(Virtual):
    """Train the keys and values of virtual tokens in every layer; the model is frozen.

    attention_l(Q, [K'_l; K], [V'_l; V]), with K'_l, V'_l (P, H' d) learned, or with `hidden`
    [K'_1, V'_1, ..., V'_L] = W2 tanh(W1 E + b1) + b2, of which E, W1, b1, W2 and b2 are learned

    Args:
        tokens: P, number of virtual tokens.
        init: what the model computes of words drawn from the vocabulary or of a text, normal numbers, or zero; None is
            "vocabulary", and "random" with `hidden`.
        text: words to start from with init "text", repeated or cut to P tokens.
        hidden: width of the reparametrising network's hidden layer; None trains keys and values themselves.
    """

    unmergeable: ClassVar[str] = "learned keys and values stand in front of the text, which no weights can say"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    init: Literal["vocabulary", "text", "random", "zero"] | None = None
    text: str = ""
    hidden: Annotated[int, Field(ge=1)] | None = None
    _start: Tensor | None = field(init=False, default=None, repr=False)
    _shape: Shape | None = field(init=False, default=None, repr=False)

    def prepare(self, model: nn.Module, names: list[str], calibration: Calibration | None) -> None:
        """Choose the start.

        Args:
            model: a plain network.
            names: the input embedding's.
            calibration: not looked at.

        Raises:
            HoneError: a reparametrising network cannot start from words.
        """
        init = self.init or ("vocabulary" if self.hidden is None else "random")
        if init in ("text", "vocabulary"):
            if self.hidden is not None:
                raise HoneError(f"adapter.init: '{init}' cannot be had with hidden; use random or zero")
            layers = keys_and_values(model, self.start_ids(model, init, self.text, "text"), self.name)
            # (L, 2, H', P, d) to (P, L 2 H' d)
            self._start = torch.stack(layers).permute(3, 0, 1, 2, 4).flatten(1)
        elif init == "random" and self.hidden is None:
            shape = shape_of(model, self.name)
            self._start = torch.randn(self.tokens, 2 * shape.layers * shape.heads * shape.size)
        elif init == "zero":
            self._start = torch.zeros(())

    def begin(self, model: nn.Module, names: list[str]) -> None:
        """Look at the shape of the model's keys.

        Args:
            model: a plain network.
            names: the input embedding's.
        """
        self._shape = shape_of(model, self.name)

    @torch.no_grad()
    def wrap(self, name: str, base: nn.Module, layout: Layout) -> Wrapped:
        """Return the input embedding, holding the keys and values.

        Args:
            name: dotted name of the embedding.
            base: the embedding.
            layout: how it stores its weight.
        """
        layer = Prefix(base, layout, cast(Shape, self._shape), self.tokens, self.hidden)
        if self._start is not None and layer.encoder is None:
            cast(Tensor, layer.prompt_embeddings).copy_(self._start)
        elif self._start is not None and layer.encoder is not None:
            for tensor in layer.encoder[2].parameters():
                tensor.zero_()
        self._start = None
        return layer

    def steering(self, layer: Prefix) -> Steering:
        """Return what puts the keys and values in front.

        Args:
            layer: holds them.
        """
        return PrefixSteering(layer)

    def config(self, layers: dict[str, Any]) -> dict[str, Any]:
        """Return PEFT's entries; it reads the keys and values, whatever they were made of."""
        (layer,) = layers.values()
        width = layer.shape.heads * layer.shape.size
        return {
            "token_dim": width, "num_attention_heads": layer.shape.heads, "num_layers": layer.shape.layers,
            "encoder_hidden_size": self.hidden or width, "prefix_projection": False,
        }  # fmt: skip

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the keys and values under PEFT's name, and the reparametrising network where there is one."""
        (layer,) = adapted_layers(model).values()
        own = {k: v for k, v in layer.state_dict(keep_vars=True).items() if not k.startswith("base_layer.")}
        return {_KEY: layer.rows(), **own}
