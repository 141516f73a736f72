"""Where a run's language model comes from: a pretrained one, or fresh weights of a given shape."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field

from hone.data.sample import Sample
from hone.errors import nearest
from hone.parts import part
from hone.text.chunks import chunk_feed_forward
from hone.text.model import LanguageModel

Chunk = Annotated[int, Field(ge=1)] | None


@part(
    "model",
    "pretrained",
    papers=[
        ("Enhancing Training Efficiency Using Packing with Flash Attention", "arXiv:2407.09105"),
        (
            "MINI-SEQUENCE TRANSFORMER: Optimizing Intermediate Memory for Long Sequences Training",
            "arXiv:2407.15892",
        ),
    ],
    claim="Packed rows in which each sample sees itself alone, and blocks that run over a few tokens at a time, train "
    "to the same loss with more tokens a second and with less memory.",
    deviations="The papers are the sources of what is done with a model, not of loading one. Packing (the recipe's "
    "`packing`) needs no flash kernels: attention goes segment by segment. Of mini-sequences, the output layer is "
    "always chunked; `mlp_chunk` does it to the feed-forward blocks.",
)
@dataclass(kw_only=True)
class Pretrained:
    """Start from a model folder, a Hub name, or a finished run's `model` folder.

    A folder with a low-rank adapter is loaded with its base and merged, so that training goes on from the whole model.

    Args:
        path: "base" (the shipped model), a folder in Hugging Face or PEFT format, or a Hub name "owner/name".
        template: chat template: "chatml", a path of a .jinja file, or None for the tokenizer's own.
        mlp_chunk: most tokens that a feed-forward block takes at once, in training recomputed in the backward pass
            (mini-sequences); None runs it over all.
    """

    from_nothing: ClassVar[bool] = False
    path: str
    template: str | None = None
    mlp_chunk: Chunk = None

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the path, without loading anything."""
        path = Path(self.path).expanduser()
        if self.path == "base" or path.is_dir():
            return
        local = self.path.startswith((".", "/", "~")) or self.path.count("/") != 1
        if local or path.parent.is_dir():
            beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
            near = nearest(path.name, beside)
            hint = f"; {near}" if near else ""
            yield "path", f"there is no model folder '{self.path}'; expected 'base', a folder, or a Hub name{hint}"

    def load(self, *, device: torch.device | str, dtype: torch.dtype, data: Any) -> LanguageModel:
        """Load the model with its tokenizer.

        Args:
            device: where it computes.
            dtype: of its weights.
            data: unused; a pretrained model brings its own tokenizer.
        """
        return _chunked(
            LanguageModel.load(self.path, device=device, dtype=dtype, template=self.template), self.mlp_chunk
        )


@part("model", "fresh", papers="original")
@dataclass(kw_only=True)
class Fresh:
    """Start from random weights: pretraining.

    Args:
        config: configuration in the words of transformers, e.g. {model_type: llama, hidden_size: 192, ...}; the
            vocabulary size and the special tokens follow from the tokenizer.
        tokenizer: folder or Hub name of a tokenizer, "base" for the shipped one; None trains one on the run's data.
        vocabulary: size of a tokenizer that is trained, in tokens.
        tokenizer_samples: samples that a tokenizer is trained on.
        template: chat template, as in `pretrained`.
        mlp_chunk: as in `pretrained`.
    """

    from_nothing: ClassVar[bool] = True  # no base that a saved adapter could name
    config: dict[str, Any]
    tokenizer: str | None = None
    vocabulary: Annotated[int, Field(ge=300)] = 2048
    tokenizer_samples: Annotated[int, Field(gt=0)] = 20_000
    template: str | None = None
    mlp_chunk: Chunk = None

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the configuration."""
        from transformers import CONFIG_MAPPING

        kind = self.config.get("model_type")
        if kind not in CONFIG_MAPPING:
            yield (
                "config.model_type",
                f"expected a model type of transformers such as llama, got {kind!r}"
                + (f"; {near}" if (near := nearest(str(kind), CONFIG_MAPPING.keys())) else ""),
            )

    def load(self, *, device: torch.device | str, dtype: torch.dtype, data: Any) -> LanguageModel:
        """Build the model, after training a tokenizer on the data where none is named.

        Args:
            device: where it computes.
            dtype: of its weights.
            data: the run's data source.
        """
        from hone.text.tokenizer import load_tokenizer, train_tokenizer

        if self.tokenizer is not None:
            tokenizer = load_tokenizer(self.tokenizer)
        else:
            samples = itertools.islice(data.samples("train"), self.tokenizer_samples)
            tokenizer = train_tokenizer(_texts(samples), self.vocabulary)
        model = LanguageModel.fresh(self.config, tokenizer, template=self.template)
        return _chunked(model.to(device=device, dtype=dtype), self.mlp_chunk)


def _chunked(model: LanguageModel, tokens: int | None) -> LanguageModel:
    if tokens is not None:
        chunk_feed_forward(model.hf, tokens)
    return model


def _texts(samples: Iterable[Sample]) -> Iterator[str]:
    """Yield every text of the samples."""
    for sample in samples:
        for piece in (sample.prompt, *sample.answers):
            if isinstance(piece, str):
                yield piece
            else:
                yield from (message.content for message in piece)
