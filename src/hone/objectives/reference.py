"""The reference model of an objective: the same model with its adapter switched off, a frozen copy, or stored values.

    adapter   one more forward pass per step, no memory; needs an adapter that leaves its base as it is
    cached    every answer is scored once, before the first step, and the values are kept on disk under a hash of
              the starting model; later epochs and other runs on the same data read them: costs least in the long run
    copy      a second model in memory; works everywhere

All three give w_t log p_ref(t) for each trained token (N,). They agree to rounding; the sums over answers, what is done
with them, and which tokens count belong to the objective.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from hone.data.cache import cache_root
from hone.errors import HoneError
from hone.files import write_whole
from hone.objectives.answers import token_values
from hone.objectives.base import Objective
from hone.text.pack import Tree, divide, pack

if TYPE_CHECKING:
    from hone.engine.loop import Run
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed

Where = Literal["auto", "adapter", "cached", "copy"]
log = logging.getLogger("hone")


class Reference(ABC):
    """Log-probabilities of a model that does not train."""

    @abstractmethod
    def token_values(self, model: LanguageModel, batch: Packed) -> Tensor:
        """Return w_t log p_ref(t) of each trained token (N,), without gradient.

        Args:
            model: the model that trains.
            batch: packed forest of T tokens.
        """


class Disabled(Reference):
    """The model that trains, with its adapter switched off.

    Args:
        adapter: leaves its base as it is.
    """

    def __init__(self, adapter: Any) -> None:
        """Hold the adapter."""
        self.adapter = adapter

    @torch.no_grad()
    def token_values(self, model: LanguageModel, batch: Packed) -> Tensor:
        """Return the base's values (N,).

        Args:
            model: the model that trains.
            batch: packed forest of T tokens.
        """
        with self.adapter.disabled(model.hf), at_rest(model):
            return token_values(model, batch)


class Copy(Reference):
    """A frozen model beside the one that trains.

    Args:
        model: it.
    """

    def __init__(self, model: LanguageModel) -> None:
        """Freeze the model."""
        self.model = model.requires_grad_(False).eval()

    @torch.no_grad()
    def token_values(self, model: LanguageModel, batch: Packed) -> Tensor:
        """Return the frozen model's values (N,).

        Args:
            model: the model that trains.
            batch: packed forest of T tokens.
        """
        return token_values(self.model, batch)


class Cached(Reference):
    """Stored values of trees, found by a hash of their tokens, so that neither order nor micro-batches matter."""

    def __init__(self) -> None:
        """Begin empty."""
        self.values: dict[bytes, np.ndarray] = {}
        self.fallback: Reference | None = None  # asked for trees that were not foreseen

    def token_values(self, model: LanguageModel, batch: Packed) -> Tensor:
        """Return the stored values (N,).

        Args:
            model: the model that trains.
            batch: packed forest of T tokens.

        Raises:
            HoneError: a tree was not foreseen.
        """
        parts = [self.values.get(key) for key in tree_keys(batch)]
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            if self.fallback is not None:
                return self.fallback.token_values(model, batch)
            raise HoneError(
                f"{batch.where[parts.index(None)]}: the reference has no stored value for this sample; "
                "use reference: copy"
            )
        return torch.from_numpy(np.concatenate(found)).to(batch.tokens.device)

    def read(self, path: Path) -> None:
        """Take the values of a file, if it is there and whole.

        Args:
            path: written by `write`.
        """
        try:
            columns = load(path.read_bytes())
        except (FileNotFoundError, SafetensorError):
            return
        keys, ends = columns["keys"].view("V16").reshape(-1), columns["ends"]
        for key, value in zip(keys.tolist(), np.split(columns["values"], ends[:-1]), strict=True):
            self.values[key] = value

    def write(self, path: Path) -> None:
        """Write all values in one piece.

        Args:
            path: the file; its folder is made.
        """
        keys = np.frombuffer(b"".join(self.values), np.uint8).reshape(-1, 16)
        parts = list(self.values.values())
        path.parent.mkdir(parents=True, exist_ok=True)
        ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        write_whole(path, save({"keys": keys, "ends": ends, "values": np.concatenate(parts)}))

    def fill(self, run: Run, model: LanguageModel, trees: Sequence[Tree], source: Reference) -> None:
        """Compute the values of trees that have none yet; each process computes all of them.

        Args:
            run: the run in progress.
            model: the model that trains, not moved yet.
            trees: the trees.
            source: gives the values.
        """
        lacking = {key: tree for tree in trees if (key := tree_key(tree)) not in self.values}
        limit = run.recipe.micro_tokens or run.recipe.batch_tokens
        groups = divide(list(lacking.values()), limit) if lacking else []
        if run.display is not None and groups:
            run.display.start("scoring answers with the reference model", len(groups))
        for number, group in enumerate(groups, 1):
            batch = pack(group).to(run.cluster.device)
            with run.cluster.autocast():
                values = source.token_values(model, batch).cpu().numpy()
            sizes = [tree_trained(tree) for tree in group]
            for tree, part in zip(group, np.split(values, np.cumsum(sizes)[:-1]), strict=True):
                self.values[tree_key(tree)] = part
            if run.display is not None:
                run.display.update(number)
        if run.display is not None and groups:
            run.display.stop()


@contextmanager
def at_rest(model: LanguageModel) -> Iterator[None]:
    """Put a model into evaluation mode meanwhile, so that nothing is dropped at random.

    Args:
        model: the model that trains.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class _Itself(Reference):
    """The model that trains, before its first step."""

    @torch.no_grad()
    def token_values(self, model: LanguageModel, batch: Packed) -> Tensor:
        with at_rest(model):
            return token_values(model, batch)


def make_reference(run: Run, where: Where, foreseen: bool = True) -> Reference:
    """Return the reference model of a run.

    Args:
        run: the run in progress, whose model has not moved yet.
        where: which form it takes; "auto" takes the adapter's base where the run passes over the data once at most,
            stored values where the data has a known length, else a copy.
        foreseen: whether it will be asked for the data's own trees alone, whose values can be stored.

    Raises:
        HoneError: the run has no such reference.
    """
    base = _base(run)
    if where == "cached" and not foreseen:
        raise HoneError(
            "reference: cached holds the values of the data's own answers, and this objective scores other ones too; "
            "use reference: adapter or copy"
        )
    if where == "auto":
        where = _cheapest(run, base) if foreseen else ("copy" if base is None else "adapter")
    if where == "adapter":
        if base is None:
            raise HoneError(
                f"reference: adapter needs an adapter that leaves its base as it is, such as lora; '{_name(run)}' does "
                "not. Use reference: cached or copy"
            )
        return base
    if where == "copy":
        return Copy(starting_model(run))
    return _cached(run, base)


@dataclass(kw_only=True)
class Referring(Objective):
    """The base of objectives that compare the model with a reference model: the one that the run starts from.

    Args:
        reference: where its values come from: "adapter" (the base of the adapter that trains), "cached" (computed once
            before the first step and kept on disk), "copy" (a second model in memory); "auto" takes what costs least.
    """

    reference: Where = "auto"
    _reference: Reference | None = field(init=False, default=None, repr=False)

    def setup(self, run: Any) -> None:
        """Prepare the reference.

        Args:
            run: the run in progress.

        Raises:
            HoneError: the run has no such reference.
        """
        self._reference = make_reference(run, self.reference)

    def reference_values(self, model: LanguageModel, batch: Packed) -> Tensor:
        """Return w_t log p_ref of each trained token (N,).

        Args:
            model: the language model that trains; before `setup` it is itself the reference.
            batch: packed forest of T tokens.
        """
        if self._reference is None:
            with torch.no_grad():
                return token_values(model, batch)
        return self._reference.token_values(model, batch)


def _base(run: Run) -> Disabled | None:
    """Return the base of the run's adapter, None where the adapter trains the weights themselves."""
    if run.adapter is None or run.adapter.saves_base:
        return None
    try:
        with run.adapter.disabled(run.model.hf):
            return Disabled(run.adapter)
    except HoneError:
        return None


def _cheapest(run: Run, base: Disabled | None) -> Where:
    trees = getattr(run.loader, "trees", None)
    if base is not None and (trees is None or run.total <= run.loader.steps_per_epoch):
        return "adapter"
    return "copy" if trees is None else "cached"


def _name(run: Run) -> str:
    return str(getattr(run.adapter, "name", "full"))


def starting_model(run: Run, option: str = "reference: copy", instead: str = "reference: cached") -> LanguageModel:
    """Load the model that a run starts from once more.

    Args:
        run: the run in progress.
        option: what asks for it, for the message.
        instead: what to use where there is none.

    Raises:
        HoneError: the run starts from random weights, which are nowhere to be read.
    """
    start = run.recipe.build("model")
    if start.from_nothing:
        raise HoneError(
            f"{option} loads the model that the run starts from once more, and this one starts from random "
            f"weights; use {instead}"
        )
    made = start.load(device=run.cluster.device, dtype=run.cluster.dtype, data=None)
    if run.cluster.precision == "bf16":  # as the frozen weights of the model that trains
        for parameter in made.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    if not run.model.packs:
        made.packs = False
    return made


def _cached(run: Run, base: Disabled | None) -> Cached:
    """Return the stored values of all that the run will see, computing those that are missing."""
    if getattr(run.loader, "trees", None) is None:
        raise HoneError("reference: cached needs data of a known length, and this is a stream; use reference: copy")
    return stored_values(run, base or _Itself(), lambda: _identity(run))


def stored_values(run: Run, source: Reference, identity: Callable[[], str]) -> Cached:
    """Return the stored values of all that a run will see, computing those that are missing.

    Args:
        run: the run in progress, whose data has a known length.
        source: gives the values.
        identity: returns a hash of the source, of the data and of the arithmetic, which names the file.
    """
    made = Cached()
    if run.rehearsal:  # the values do not matter, their cost does not recur
        made.fallback = source
        return made
    path = cache_root() / "references" / f"{identity()}.safetensors"
    made.read(path)
    trees = [run.loader.trees[i] for i in run.loader.visited(run.total)]
    held_out = [] if run.held_out is None else [run.held_out[i] for i in range(len(run.held_out))]
    wanted = trees + held_out
    if made.values and not _agrees(run, made, wanted, source):
        log.warning("%s: the stored reference values are not those of this model; computing them again", path)
        made.values.clear()
    before = len(made.values)
    made.fill(run, run.model, wanted, source)
    if len(made.values) > before:
        run.cluster.on_main(lambda: made.write(path))
    return made


def _agrees(run: Run, stored: Cached, trees: Sequence[Tree], source: Reference) -> bool:
    """Return whether stored values are what the model gives, looked at on one tree."""
    for tree in trees:
        if (values := stored.values.get(tree_key(tree))) is not None:
            with run.cluster.autocast():
                fresh = source.token_values(run.model, pack([tree]).to(run.cluster.device)).cpu().numpy()
            return bool(np.allclose(values, fresh, rtol=1e-2, atol=1e-2))
    return True


def _identity(run: Run) -> str:
    """Return a hash of the model that the run starts from, its data and the arithmetic."""
    digest = hashlib.sha256()
    weights = run.model.state_dict()
    for name in sorted(weights):
        if isinstance(weights[name], Tensor) and (run.adapter is None or not _added(run, name)):
            digest.update(name.encode())
            digest.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digest.update(circumstances(run))
    return digest.hexdigest()[:32]


def circumstances(run: Run) -> bytes:
    """Return what tells the data and the arithmetic of a run apart, as far as stored values go."""
    folder = getattr(run.loader.trees, "folder", None)
    return json.dumps([folder.name if folder else "", run.cluster.precision]).encode()


def _added(run: Run, name: str) -> bool:
    """Return whether a tensor is the adapter's own: drawn anew by each seed and no part of the reference."""
    return not run.adapter.saves_base and name in {n for n, p in run.model.named_parameters() if p.requires_grad}


def tree_trained(tree: Tree) -> int:
    """Return how many tokens of a tree are trained, as `pack` leaves them."""
    roots = (w for w, parent in zip(tree.weights, tree.parents, strict=True) if parent < 0)
    return tree.trained - sum(int(np.count_nonzero(w[:1])) for w in roots)


def tree_key(tree: Tree) -> bytes:
    """Return 16 bytes that stand for a tree's tokens, weights and shape."""
    weights = [
        np.concatenate([np.zeros(1), w[1:]]) if parent < 0 else w
        for w, parent in zip(tree.weights, tree.parents, strict=True)
    ]
    return _key(np.concatenate(tree.tokens), np.concatenate(weights), np.array(tree.parents))


def tree_keys(batch: Packed) -> list[bytes]:
    """Return `tree_key` of each tree of a batch.

    Args:
        batch: packed forest of T tokens.
    """
    tokens, weights = batch.tokens.cpu().numpy(), batch.weights.cpu().numpy()
    starts, parents, trees = batch.starts.numpy(), batch.parents.numpy(), batch.trees.numpy()
    keys = []
    for number in range(len(batch.where)):
        first, last = np.searchsorted(trees, number), np.searchsorted(trees, number, side="right")
        span, own = slice(starts[first], starts[last]), parents[first:last]
        keys.append(_key(tokens[span], weights[span], np.where(own >= 0, own - first, -1)))
    return keys


def _key(tokens: np.ndarray, weights: np.ndarray, parents: np.ndarray) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for array, dtype in ((tokens, np.int32), (weights, np.float32), (parents, np.int32)):
        digest.update(len(array).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(array, dtype).tobytes())
    return digest.digest()
