"""A model that is merged from others when a run starts from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from hone.errors import HoneError
from hone.options import Nested
from hone.parts import part
from hone.text.model import LanguageModel
from hone.text.starts import Pretrained


@part("model", "merged", papers="original")
@dataclass(kw_only=True)
class Merged:
    """Start from the merger of several models that were trained from one.

    It is made through files, tensor by tensor, and kept beside the token cache. With `steps: 0` the merged model is
    evaluated and saved as it is; `hone merge` does so without a run.

    Args:
        models: folders in Hugging Face or PEFT format, Hub names, or in a later stage "stage:1" and so on, e.g.
            ["base", "base"].
        merger: how they are merged.
        base: what they were trained from; needed where the merger adds up changes.
        template: chat template, as in `pretrained`.
    """

    from_nothing: ClassVar[bool] = False
    models: list[str]
    merger: Annotated[Any, Nested("merger")]
    base: str | None = None
    template: str | None = None

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the models and the merger, without loading anything."""
        for index, path in enumerate(self.models):
            for _, message in Pretrained(path=path).check():
                yield f"models.{index}", message
        for _, message in [] if self.base is None else Pretrained(path=self.base).check():
            yield "base", message
        if self.base is None and self.merger.needs_base:
            yield "base", f"is needed: merger '{self.merger.name}' adds up changes of a base"
        try:
            self.merger.check_count(len(self.models))
        except HoneError as error:
            yield "merger", str(error)

    @property
    def path(self) -> str:
        """The folder where the merged model lies once it has been loaded."""
        from hone.engine.merging import merged_folder

        return str(merged_folder(self.models, self.base, self.merger))

    def load(self, *, device: torch.device | str, dtype: torch.dtype, data: Any) -> LanguageModel:
        """Merge the models, unless that has been done, and load the result.

        Args:
            device: where it computes.
            dtype: of its weights.
            data: unused.
        """
        from hone.engine.merging import merge_cached

        folder = merge_cached(self.models, self.base, self.merger)
        return LanguageModel.load(folder, device=device, dtype=dtype, template=self.template)
