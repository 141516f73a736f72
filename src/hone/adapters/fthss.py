"""Several prompt-tuned roles on one frozen base, of which each goes on from the states that earlier ones have left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from hone.adapters import base as files
from hone.adapters.calibration import Calibration
from hone.adapters.host import PREFIX, Host, adapted_layers
from hone.adapters.layers import Layout, Wrapped
from hone.adapters.virtual import SoftTokens, Virtual, keys_and_values
from hone.errors import HoneError, ModelError
from hone.parts import part
from hone.text.cache import DecodeCache
from hone.text.pack import Packed
from hone.text.steering import Arranged, ChainPlan, SoftPrompt, Steering, Watcher, Wrap, compute_dtype, refuse_windows

SHARED = -1  # the role of what comes before the first marker


class Roles(SoftPrompt):
    """Who speaks in a text, and what each role sees: its own virtual tokens and all of the text before.

    Args:
        layer: the input embedding.
        first: the first virtual id.
        tokens: virtual tokens per role.
        markers: per role the id with which its turns begin.
        recomputed: whether in training each role reads the whole text anew, behind its own virtual tokens.
    """

    own_plan: ClassVar[bool] = True

    def __init__(self, layer: nn.Module, first: int, tokens: int, markers: Sequence[int], recomputed: bool) -> None:
        """Hold the layer and the markers."""
        super().__init__(layer, first, tokens * len(markers))
        self.tokens, self.markers, self.recomputed = tokens, np.array(markers), recomputed

    def follow(self, ids: np.ndarray, role: int = SHARED) -> np.ndarray:
        """Return the role of each token of a text, (T,); a marker belongs to the turn that it begins.

        Args:
            ids: (T,) token ids.
            role: who speaks before.
        """
        named = self.turned(ids, np.full(len(ids), SHARED))
        last = np.maximum.accumulate(np.where(named == SHARED, -1, np.arange(len(ids))))
        return np.where(last < 0, role, named[last])

    def turned(self, ids: np.ndarray, roles: np.ndarray) -> np.ndarray:
        """Return roles after one token each: a marker's own, else what it was.

        Args:
            ids: (N,) token ids.
            roles: (N,) roles before.
        """
        match = ids[:, None] == self.markers
        return np.where(match.any(1), match.argmax(1), roles)

    def arrange(self, batch: Packed, training: bool, wrap: Wrap) -> Arranged:
        """Return the batch behind the virtual tokens of all roles, each seen by its own role alone.

        Args:
            batch: the packed forest.
            training: whether the network is in training mode.
            wrap: goes around the innermost plan.
        """
        if training and self.recomputed:
            return self._recompute(batch, wrap)
        ids = batch.tokens.cpu().numpy()
        starts, chains = self._roots()
        above: list[list[int]] = []  # per segment the pieces of its chain
        speaks: list[int] = []  # per segment who speaks at its end
        for segment, parent in enumerate(batch.parents.tolist()):
            begin, end = int(batch.starts[segment]), int(batch.starts[segment + 1])
            roles = self.follow(ids[begin:end], speaks[parent] if parent >= 0 else SHARED)
            seen = list(above[parent]) if parent >= 0 else []
            for cut in (0, *(np.flatnonzero(np.diff(roles)) + 1).tolist()):
                seen.append(len(chains))
                chains.append([*([int(roles[cut])] if roles[cut] != SHARED else []), *seen])
                starts.append(self.front + begin + cut)
            above.append(seen)
            speaks.append(int(roles[-1]))
        plan = ChainPlan([*starts, self.front + len(batch)], chains)
        return self._behind_roots(batch, 1, wrap(plan), torch.arange(len(batch)))

    def _recompute(self, batch: Packed, wrap: Wrap) -> Arranged:
        """Return a copy of the batch per role, behind that role's virtual tokens; a token is read in its own."""
        (starts, chains), size = self._roots(), len(batch)
        roles = np.full(size, SHARED)
        ids, parents = batch.tokens.cpu().numpy(), batch.parents.tolist()
        for segment, parent in enumerate(parents):
            begin, end = int(batch.starts[segment]), int(batch.starts[segment + 1])
            before = roles[int(batch.starts[parent + 1]) - 1] if parent >= 0 else SHARED
            roles[begin:end] = self.follow(ids[begin:end], before)
        for role in range(len(self.markers)):
            first = len(chains)
            for segment, parent in enumerate(parents):
                starts.append(self.front + role * size + int(batch.starts[segment]))
                chains.append([*(chains[first + parent] if parent >= 0 else [role]), first + segment])
        plan = ChainPlan([*starts, self.front + len(self.markers) * size], chains)
        copy = torch.from_numpy(np.maximum(roles, 0))
        return self._behind_roots(batch, len(self.markers), wrap(plan), copy * size + torch.arange(size))

    def _roots(self) -> tuple[list[int], list[list[int]]]:
        """Return where the roles' virtual tokens begin, and that each sees itself alone."""
        count = len(self.markers)
        return [role * self.tokens for role in range(count)], [[role] for role in range(count)]

    def _behind_roots(self, batch: Packed, copies: int, plan: Any, kept: Tensor) -> Arranged:
        """Return copies of a batch behind the virtual tokens; positions shift by all of them, whoever speaks."""
        device = batch.tokens.device
        tokens = torch.cat([self.ids(device), batch.tokens.repeat(copies)])
        place = torch.arange(self.front, device=device)
        positions = torch.cat([place, (batch.positions + self.front).repeat(copies)])
        return Arranged(tokens, positions, plan, kept.to(device) + self.front)

    def obstacle_in_rows(self, training: bool) -> str:
        """Return that roles cannot read a text anew on padded rows.

        Args:
            training: whether the network is in training mode.
        """
        return "adapter 'fthss' can train 'recomputed' on packed sequences only" if training and self.recomputed else ""

    def change_rows(self, decoder: Any, kwargs: dict[str, Any], begun: bool) -> int:
        """Put all virtual tokens in front of rows, with a mask that says who sees which.

        Args:
            decoder: the network without its head.
            kwargs: arguments of its forward.
            begun: whether the cache holds the beginning of these rows.

        Raises:
            ModelError: the beginning, and with it who speaks, is not among the arguments.
        """
        ids = kwargs.get("input_ids")
        if begun or ids is None:
            raise ModelError(
                "adapter 'fthss' must see a text's ids from their beginning to know who speaks; generate with hone's "
                "own generation, or give use_cache=False"
            )
        given = kwargs.get("attention_mask")
        sees = self._visible(ids)
        if given is not None:
            sees &= given[:, None, :].bool() | torch.eye(sees.shape[1], dtype=torch.bool, device=ids.device)
        dtype = compute_dtype(self.layer.weight)
        super().change_rows(decoder, kwargs, begun)
        kwargs["attention_mask"] = torch.zeros(sees.shape, dtype=dtype, device=ids.device).masked_fill_(
            ~sees, torch.finfo(dtype).min
        )[:, None]
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = torch.arange(sees.shape[1], device=ids.device)[None]
        return self.front

    def _visible(self, ids: Tensor) -> Tensor:
        """Return which token of rows (B, T) sees which, virtual ones first: (B, front + T, front + T)."""
        roles = np.stack([self.follow(row) for row in ids.cpu().numpy()])
        owner = torch.arange(self.front) // self.tokens  # of each virtual token
        role = torch.cat([owner.expand(len(ids), -1), torch.from_numpy(roles)], dim=1)
        virtual = torch.arange(role.shape[1]) < self.front
        of_text = ~virtual & ~virtual[:, None]
        sees = (virtual & (role[:, :, None] == role[:, None, :])) | of_text
        return (sees & torch.ones(role.shape[1], role.shape[1], dtype=torch.bool).tril()).to(ids.device)

    def watch(self, prompts: Sequence[np.ndarray], samples: int) -> Watcher:
        """Return what lets each sample see the virtual tokens of the role that speaks in it.

        Args:
            prompts: ids of each prompt.
            samples: samples per prompt.
        """
        return _Speakers(self, np.repeat([self.follow(np.asarray(prompt))[-1] for prompt in prompts], samples))


class _Speakers(Watcher):
    """Who speaks in each sample of a generation."""

    def __init__(self, steering: Roles, roles: np.ndarray) -> None:
        """Hold the roles at the ends of the prompts."""
        self.steering, self.roles = steering, roles

    def keep(self, rows: np.ndarray) -> None:
        """Drop every sample but `rows`."""
        self.roles = self.roles[rows]

    def unseen(self, ids: np.ndarray, cache: DecodeCache) -> Tensor:
        """Return the columns of other roles' virtual tokens, (N, columns).

        Args:
            ids: (N,) the tokens that the samples feed next.
            cache: holds the prompts.
        """
        self.roles = self.steering.turned(ids, self.roles)
        device = cache.lengths.device
        begin = cache.width - cache.lengths[cache.owner]  # column of each sample's first virtual token
        place = torch.arange(cache.width, device=device) - begin[:, None]
        owner = place.div(self.steering.tokens, rounding_mode="floor")
        roles = torch.from_numpy(self.roles).to(device)[:, None]
        return (place < self.steering.front) & (owner != roles)


@part(
    "adapter",
    "fthss",
    papers=[
        (
            "Streamlining the Collaborative Chain of Models into A Single Forward Pass in Generation-Based Tasks",
            "arXiv:2502.11083",
        )
    ],
    claim="Roles that are trained on the keys and values which earlier roles have left match a chain of separate "
    "models without reading any text twice.",
    deviations="Turns are told by marker tokens. Each role sees all text before its turn, the turns of others "
    "included; input for one role alone is not told apart. All roles' virtual tokens take up positions from the start, "
    "also while only one of them trains.",
)
@dataclass(kw_only=True)
class FTHSS(Virtual):
    """Train virtual tokens for each of several roles that take turns in one text over a frozen base.

    A turn begins at its role's marker and lasts until another's. A token of role r sees P_r and all of the text before
    it; the input before the first marker sees no virtual tokens, so that all roles share its keys and values:

    input: [input],  turn 1: [P_1, input, turn 1],  turn 2: [P_2, input, turn 1, turn 2], ...

    where turn 1 keeps the states that it got under P_1. Nothing is read twice: a whole chain of roles is generated in
    one go. A role's loss reaches its own virtual tokens and, through the states, those of earlier roles; frozen ones
    are left as they are, which is how roles are trained one after the other.

    Args:
        markers: per role the token with which its turns begin: an id, or text that is one token.
        tokens: P, virtual tokens of each role.
        init: embeddings of words drawn from the vocabulary, of a text, or uniform in [-0.5, 0.5].
        texts: per role, words to start from with init "text", repeated or cut to P tokens.
        frozen: roles, counted from 0, whose virtual tokens do not train.
        prompts: folder of a saved adapter of this kind whose virtual tokens the roles start from; "" for none.
        states: what roles are trained on: the states that earlier roles left, or "recomputed" for ordinary prompt
            tuning, in which each reads the whole text behind its own virtual tokens. Evaluation always shares.
    """

    unmergeable: ClassVar[str] = "virtual tokens stand in front of the text, which no weights can say"
    markers: list[int | str] = field(default_factory=list)
    init: Literal["vocabulary", "text", "random"] = "vocabulary"
    texts: list[str] = field(default_factory=list)
    frozen: list[int] = field(default_factory=list)
    prompts: str = ""
    states: Literal["shared", "recomputed"] = "shared"
    _start: list[Tensor] = field(init=False, default_factory=list, repr=False)

    @property
    def front(self) -> int:
        """All virtual tokens."""
        return self.tokens * len(self.markers)

    def prepare(self, model: nn.Module, names: list[str], calibration: Calibration | None) -> None:
        """Find the markers' ids and choose the starting embeddings.

        Args:
            model: a plain network.
            names: the input embedding's.
            calibration: not looked at.

        Raises:
            HoneError: an option does not fit the number of roles, or a marker is not one token.
        """
        refuse_windows(model, self.name)
        keys_and_values(model, torch.zeros(1, dtype=torch.int64), self.name)  # a recurrent layer would take no mask
        self.markers = [self._marker(model, marker) for marker in self.markers]
        count = len(self.markers)
        if count == 0 or len(set(self.markers)) < count:
            raise HoneError("adapter.markers: expected one token per role, all different, e.g. [' =', 'answer']")
        if self.init == "text" and len(self.texts) != count:
            raise HoneError(f"adapter.texts: expected a text for each of the {count} roles, got {len(self.texts)}")
        if wrong := [role for role in self.frozen if not 0 <= role < count]:
            raise HoneError(f"adapter.frozen: there is no role {wrong[0]}; they are counted from 0 to {count - 1}")
        if self.prompts:
            self._start = self._read(model, count)
            return
        texts = self.texts or [""] * count
        self._start = [self.start_rows(model, self.init, text, "texts") for text in texts]

    def _read(self, model: nn.Module, count: int) -> list[Tensor]:
        """Return the virtual tokens of a saved adapter."""
        network: Any = model
        shape = self.tokens, network.get_input_embeddings().embedding_dim
        saved = files.read_weights(Path(self.prompts))
        found = [saved.get(f"{PREFIX}role{role}") for role in range(count)]
        if any(rows is None or rows.shape != shape for rows in found):
            raise HoneError(f"adapter.prompts: '{self.prompts}' does not hold {count} roles of {shape[0]} x {shape[1]}")
        return [rows for rows in found if rows is not None]

    def _marker(self, model: nn.Module, marker: int | str) -> int:
        if isinstance(marker, int):
            return marker
        from hone.text.template import plain_ids
        from hone.text.tokenizer import load_tokenizer

        path = self.tokenizer or getattr(model, "name_or_path", "")
        if not path:
            raise HoneError("adapter.tokenizer: the model does not say where its tokenizer is; name its folder")
        ids = plain_ids(load_tokenizer(path), marker)
        if len(ids) != 1:
            raise HoneError(f"adapter.markers: {marker!r} is {len(ids)} tokens; expected text that is one")
        return int(ids[0])

    def wrap(self, name: str, base: nn.Module, layout: Layout) -> Wrapped:
        """Return the input embedding with every role's virtual tokens.

        Args:
            name: dotted name of the embedding.
            base: the embedding.
            layout: how it stores its weight.
        """
        blank = torch.zeros(self.tokens, layout.matrix(base.weight).shape[0])  # type: ignore[arg-type]
        rows = self._start or [blank] * len(self.markers)
        self._start = []
        named = {f"role{role}": found.clone() for role, found in enumerate(rows)}
        return SoftTokens(base, layout, named, {f"role{role}" for role in self.frozen})

    def steering(self, layer: SoftTokens) -> Steering:
        """Return what lets roles see their own virtual tokens.

        Args:
            layer: the embedding.
        """
        markers = [int(marker) for marker in self.markers]
        return Roles(layer, len(layer.weight), self.tokens, markers, self.states == "recomputed")

    def verify(self, layers: dict[str, Any], config: dict[str, Any], note: dict[str, Any]) -> None:
        """Check that the turns of a saved adapter begin with the same tokens.

        Args:
            layers: the adapted layers by name.
            config: what adapter_config.json says.
            note: what hone.json says.

        Raises:
            HoneError: they do not.
        """
        if (theirs := note["options"]["markers"]) != self.markers:
            raise HoneError(f"the adapter was trained with markers {theirs}, this one has {self.markers}")

    def save(self, model: nn.Module, folder: Path, *, base: str) -> None:
        """Write the virtual tokens of all roles in hone's format.

        Args:
            model: the network this adapter is attached to.
            folder: where; made when it is missing.
            base: path or Hub name of the base model.
        """
        Host.save(self, model, folder, base=base)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the virtual tokens by role."""
        (layer,) = adapted_layers(model).values()
        return {name: getattr(layer, name) for name in layer.names}
