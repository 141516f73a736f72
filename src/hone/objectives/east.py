"""Learning to interpret: when to read the source and when to write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from hone.data.east import East as Interleaved
from hone.data.sample import Sample
from hone.objectives.language import SFT
from hone.parts import part

if TYPE_CHECKING:
    import numpy as np

    from hone.data.source import Source
    from hone.text.generate import Generation
    from hone.text.model import LanguageModel


@part(
    "objective",
    "east",
    papers=[
        (
            "LLMs Can Achieve High-quality Simultaneous Machine Translation as Efficiently as Offline",
            "arXiv:2504.09570",
        )
    ],
    claim="A language model that learns from interleaved chunks when to read and when to write translates "
    "simultaneously better than fixed policies at the same latency, as fast as offline.",
    deviations="See the data part east.",
)
@dataclass(kw_only=True)
class East(SFT):
    """Next-token prediction over interleaved streams of the data "east", and simultaneous translation in evaluation.

    The loss is that of "sft". An answer is the stream: the source is read word by word as the model asks for it (or as
    wait-k has it), and what the model writes stands between.

    Args:
        label_smoothing: probability mass spread evenly over the vocabulary, in [0, 1).
    """

    consumes: ClassVar[str] = "streams"
    data: Interleaved | None = field(default=None, init=False, repr=False)

    def look(self, source: Source) -> None:
        """Take over how the data interleaves.

        Args:
            source: the training data; none but "east" has source and target in turns.
        """
        self.data = source if isinstance(source, Interleaved) else None

    def equip(self, model: LanguageModel) -> None:
        """Check that the markers are tokens of the model.

        Args:
            model: the language model.
        """
        from hone.text.simultaneous import marker_id

        if self.data is not None:
            for mark in (self.data.end_read, self.data.end_write):
                marker_id(model, mark)

    def generate(self, model: LanguageModel, prompts: Sequence[np.ndarray], **options: Any) -> list[list[Generation]]:
        """Translate simultaneously what stands in each prompt behind the instruction.

        Args:
            model: the language model.
            prompts: token ids of each prompt.
            options: those of `hone.text.generate.generate`; `max_new_tokens` counts what is read as well.
        """
        from hone.text.simultaneous import interpret

        if self.data is None:
            return super().generate(model, prompts, **options)
        asked = [self.data.parted(model.renderer.decode(ids)) for ids in prompts]
        headers = [model.renderer.prompt_ids(Sample("prompt", prompt=header, where="east")) for header, _ in asked]
        return interpret(
            model, headers, [source for _, source in asked], end_read=self.data.end_read,
            end_write=self.data.end_write, wait=self.data.wait, **options,
        )  # fmt: skip
