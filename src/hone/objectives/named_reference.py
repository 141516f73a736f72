"""Any model as a reference, not only the one that a run starts from."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from hone.engine.manifest import folder_hash
from hone.errors import HoneError
from hone.objectives.reference import Copy, Reference, circumstances, make_reference, stored_values
from hone.text.loading import shipped_base
from hone.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from hone.engine.loop import Run
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed


class Named(Reference):
    """A model that is not the run's own, loaded when it is first asked.

    Args:
        run: the run in progress.
        name: "base", a folder or a Hub name.
    """

    def __init__(self, run: Run, name: str) -> None:
        """Refuse a model whose tokens are not those of the model that trains.

        Raises:
            HoneError: it has another tokenizer, or none.
        """
        if load_tokenizer(name).get_vocab() != run.model.tokenizer.get_vocab():
            raise HoneError(
                f"references: '{name}' has another tokenizer than the model that trains, so it cannot score the same "
                "tokens; name a model of the same family"
            )
        self.run, self.name = run, name
        self.copy: Copy | None = None

    def identity(self) -> str:
        """Return a hash of the model, of the data and of the arithmetic."""
        local = shipped_base() if self.name == "base" else Path(self.name).expanduser()
        digest = hashlib.sha256((folder_hash(local) or self.name).encode() + circumstances(self.run))
        return digest.hexdigest()[:32]

    def token_values(self, model: LanguageModel, batch: Packed) -> Tensor:
        """Return the other model's values (N,).

        Args:
            model: the model that trains.
            batch: packed forest of T tokens.
        """
        if self.copy is None:
            loaded = type(model).load(self.name, dtype=self.run.cluster.dtype, device=self.run.cluster.device)
            loaded.packs = loaded.packs and model.packs
            self.copy = Copy(loaded)
        return self.copy.token_values(model, batch)


def named_reference(run: Run, name: str) -> Reference:
    """Return any model as a reference; its values are stored where the data has a known length.

    Args:
        run: the run in progress, whose model has not moved yet.
        name: "start" for the model that the run starts from, "base", a folder or a Hub name.

    Raises:
        HoneError: there is no such model, or it has another tokenizer.
    """
    if name == "start":
        return make_reference(run, "auto")
    other = Named(run, name)
    return other if getattr(run.loader, "trees", None) is None else stored_values(run, other, other.identity)
