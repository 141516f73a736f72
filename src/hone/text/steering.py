"""What an adapter changes around the layers: what stands in front of a sequence, and which tokens attend to which.

A `Steering` hangs on the network as an attribute and serves it in both forms in which it runs:

- packed (a forward pass with a `plan`): `LanguageModel` asks it to `arrange` a batch. Virtual tokens become a segment
  in front of all trees, which share it, so that they are computed once per batch;
- rows (a forward pass without a plan, as in `hf(input_ids)`, `hf.generate` and padding): hooks on the decoder put
  virtual tokens in front of every row and take their outputs away again.

The positions of a text shift by `front`, the number of virtual tokens. A steering rests while its layer is disabled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from hone.errors import ModelError
from hone.text.attention import Plan, TreePlan
from hone.text.cache import DecodeCache
from hone.text.pack import Packed

_NAME = "_hone_steering"  # attribute of a network
Wrap = Callable[[Plan], Plan]  # goes around the plan that computes, and sees the virtual tokens too


@dataclass(frozen=True)
class Arranged:
    """A packed batch as the decoder runs it.

    Args:
        tokens: (N,) token ids, virtual ones included.
        positions: (N,) their positions.
        plan: the attention between them.
        kept: (T,) row in which each token of the batch is found; None where rows and tokens are the same.
    """

    tokens: Tensor
    positions: Tensor
    plan: Plan
    kept: Tensor | None = None

    def own(self, states: Tensor) -> Tensor:
        """Return the states (T, D) of the batch's own tokens among those of all rows (N, D)."""
        return states if self.kept is None else states[self.kept]


class Watcher:
    """Follows the samples of a generation whose virtual tokens change on the way."""

    def keep(self, rows: np.ndarray) -> None:
        """Drop every sample but `rows`, given as ascending indices."""
        raise NotImplementedError

    def unseen(self, ids: np.ndarray, cache: DecodeCache) -> Tensor:
        """Return which columns of its prompt each sample does not see, (N, columns).

        Args:
            ids: (N,) the tokens that the samples feed next.
            cache: holds the prompts.
        """
        raise NotImplementedError


class Steering:
    """The base of them all; it changes nothing.

    Args:
        layer: module whose `enabled` says whether the adapter is in effect.
    """

    front: int = 0  # virtual tokens before position 0 of a text
    own_plan: ClassVar[bool] = False  # whether it lays out the attention itself, which then is causal throughout

    def __init__(self, layer: nn.Module) -> None:
        """Hold the layer."""
        self.layer: Any = layer
        self._added = 0  # virtual tokens that the last forward pass over rows has put in front

    @property
    def active(self) -> bool:
        """Whether the adapter is in effect."""
        return bool(self.layer.enabled)

    def arrange(self, batch: Packed, training: bool, wrap: Wrap) -> Arranged:
        """Return a batch as the decoder shall run it.

        Args:
            batch: the packed forest.
            training: whether the network is in training mode.
            wrap: goes around the innermost plan.
        """
        return Arranged(batch.tokens, batch.positions, wrap(TreePlan(batch)))

    def obstacle_in_rows(self, training: bool) -> str:
        """Return why rows cannot be run, "" when they can.

        Args:
            training: whether the network is in training mode.
        """
        return ""

    def watch(self, prompts: Sequence[np.ndarray], samples: int) -> Watcher | None:
        """Return what follows the samples of a generation, None where nothing changes on the way.

        Args:
            prompts: ids of each prompt.
            samples: samples per prompt.
        """
        return None

    def change_rows(self, decoder: Any, kwargs: dict[str, Any], begun: bool) -> int:
        """Change in place what the decoder is called with, without a plan.

        Args:
            decoder: the network without its head.
            kwargs: arguments of its forward; positions and a mask are shifted and lengthened already.
            begun: whether the cache holds the beginning of these rows.

        Returns:
            How many outputs in front are not the caller's.
        """
        return 0

    def enter(self, decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Hook before the decoder's forward: shift what it is given, and let `change_rows` do the rest.

        Args:
            decoder: the network without its head.
            args: its positional arguments.
            kwargs: its named arguments.

        Raises:
            ModelError: the mask is none of rows with padding.
        """
        self._added = 0
        if not self.active or kwargs.get("plan") is not None:
            return None
        kwargs = {"input_ids": args[0], **kwargs} if args else dict(kwargs)
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                raise ModelError("virtual tokens need an attention mask of shape (B, T), or none")
            kwargs["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.front), mask], dim=1)
        if positions is not None:
            kwargs["position_ids"] = positions + self.front
        self._added = self.change_rows(decoder, kwargs, _begun(kwargs))
        return (), kwargs

    def leave(self, decoder: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Hook after the decoder's forward: take the virtual tokens' outputs away.

        Args:
            decoder: the network without its head.
            args: its positional arguments.
            output: what it returned.
        """
        if self._added:
            output.last_hidden_state = output.last_hidden_state[:, self._added :]
            if output.get("hidden_states") is not None:
                output.hidden_states = tuple(state[:, self._added :] for state in output.hidden_states)
        return output


class SoftPrompt(Steering):
    """Virtual tokens with learned embeddings in front of every sequence; ids from the vocabulary's size on."""

    def __init__(self, layer: nn.Module, first: int, front: int) -> None:
        """Hold the layer.

        Args:
            layer: the input embedding, which knows the virtual ids.
            first: the first virtual id.
            front: number of virtual tokens.
        """
        super().__init__(layer)
        self.first, self.front = first, front

    def ids(self, device: torch.device) -> Tensor:
        """Return the virtual ids, (front,)."""
        return torch.arange(self.first, self.first + self.front, device=device)

    def arrange(self, batch: Packed, training: bool, wrap: Wrap) -> Arranged:
        """Return the batch behind one segment of virtual tokens.

        Args:
            batch: the packed forest.
            training: whether the network is in training mode.
            wrap: goes around the innermost plan.
        """
        whole = behind(batch, self.ids(batch.tokens.device))
        kept = torch.arange(self.front, len(whole), device=batch.tokens.device)
        return Arranged(whole.tokens, whole.positions, wrap(TreePlan(whole)), kept)

    def change_rows(self, decoder: Any, kwargs: dict[str, Any], begun: bool) -> int:
        """Put the virtual tokens in front of rows that begin.

        Args:
            decoder: the network without its head.
            kwargs: arguments of its forward.
            begun: whether the cache holds the beginning of these rows.
        """
        if begun:
            return 0
        name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
        given: Tensor = kwargs[name]
        virtual = self.ids(given.device)[None].expand(len(given), -1)
        kwargs[name] = torch.cat([virtual if name == "input_ids" else self.layer(virtual), given], dim=1)
        if (positions := kwargs.get("position_ids")) is not None:
            before = torch.arange(self.front, device=given.device).expand(*positions.shape[:-1], -1)
            kwargs["position_ids"] = torch.cat([before, positions], dim=-1)
        return self.front


class ChainPlan(TreePlan):
    """Attention in which each segment sees itself causally and a list of others in full."""

    def __init__(self, starts: Sequence[int], chains: list[list[int]]) -> None:
        """Lay out the segments.

        Args:
            starts: S + 1 offsets of the segments, and the number of tokens.
            chains: per segment the segments that it sees in the order of the row, itself last.
        """
        self._lay_out(list(starts), chains)


def behind(batch: Packed, ids: Tensor) -> Packed:
    """Return a forest as one tree: behind a root with the given ids, without weights and fields.

    Args:
        batch: the packed forest.
        ids: (P,) ids of the root.
    """
    front = len(ids)
    place = torch.arange(front, device=ids.device)
    return Packed(
        tokens=torch.cat([ids, batch.tokens]),
        positions=torch.cat([place, batch.positions + front]),
        starts=torch.cat([batch.starts.new_zeros(1), batch.starts + front]),
        parents=torch.cat([batch.parents.new_tensor([-1]), batch.parents + 1]),
        weights=torch.cat([batch.weights.new_zeros(front), batch.weights]),
        two_way=None if batch.two_way is None else torch.cat([batch.two_way.new_zeros(1), batch.two_way]),
        two_way_layers=batch.two_way_layers,
    )


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the precision in which a layer with this weight computes: its own, or autocast's."""
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def refuse_windows(network: Any, adapter: str) -> None:
    """Refuse a model with sliding windows, in which tokens are near by their places in a row.

    Args:
        network: a causal model of transformers.
        adapter: name of the adapter, for the message.

    Raises:
        ModelError: it has such layers.
    """
    if has_windows(network):
        raise ModelError(f"adapter '{adapter}' needs full attention; {type(network).__name__} has sliding windows")


def has_windows(network: Any) -> bool:
    """Return whether layers of a model see near tokens only.

    Args:
        network: a causal model of transformers.
    """
    config = network.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    return "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None


def steer(network: nn.Module, decoder: nn.Module, steering: Steering) -> None:
    """Hang a steering on a network.

    Args:
        network: a causal model of transformers.
        decoder: the same without its head.
        steering: what changes.
    """
    setattr(network, _NAME, steering)
    if type(steering).change_rows is Steering.change_rows:
        return
    decoder.register_forward_pre_hook(steering.enter, with_kwargs=True)
    decoder.register_forward_hook(steering.leave)


def release(network: nn.Module) -> None:
    """Take the steering off a network that it serves in packed form alone."""
    if hasattr(network, _NAME):
        delattr(network, _NAME)


def steering_of(network: nn.Module) -> Steering | None:
    """Return the steering in effect on a network, None where there is none or it rests."""
    found = getattr(network, _NAME, None)
    return found if isinstance(found, Steering) and found.active else None


@contextmanager
def unsteered(network: nn.Module) -> Iterator[None]:
    """Let a network's steering rest meanwhile.

    Args:
        network: a causal model of transformers.
    """
    found = steering_of(network)
    if found is None:
        yield
        return
    found.layer.enabled = False
    try:
        yield
    finally:
        found.layer.enabled = True


def _begun(kwargs: dict[str, Any]) -> bool:
    """Return whether a forward pass goes on where a cache ends."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        cache = kwargs.get("cache_params")
    if cache is None:
        return False
    try:
        return bool(cache.get_seq_length() > 0)
    except ValueError:  # a recurrent network's cache counts no tokens
        return bool(cache.has_previous_state())
