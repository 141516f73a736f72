"""From a source to what a run trains and evaluates on, with every check that needs no model."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hone.data.cache import Progress, TokenCache, cache_key
from hone.data.loader import Loader, Steps, StreamingLoader
from hone.data.overlong import Counts, fit_sample
from hone.data.sample import Sample
from hone.data.source import Overlong, Source, Split
from hone.errors import DataError
from hone.parts import find
from hone.text.pack import Tree, pack

if TYPE_CHECKING:
    from hone.text.render import Renderer

log = logging.getLogger("hone")
ACCEPTED = {  # what an objective consumes -> the kinds of samples that serve as that
    "sequences": ("text", "completion", "messages", "pieces"),
    "tokens": ("text", "completion", "messages", "pieces"),  # every token trains, those of prompts too
    "streams": ("pieces",),  # source and target in turns
    "pairs": ("pair", "list"),
    "judged": ("pair", "list", "completion", "messages"),  # answers of which each is said to be good or bad
    "steps": ("steps",),  # answers cut into steps, each with what is reached by it
    "labelled": ("text",),
    "tagged": ("tagged",),
    "rollouts": ("prompt", "completion", "messages"),  # answered by the model while it trains
    "any": ("text", "completion", "messages", "pieces", "pair", "list", "steps", "tagged", "prompt"),
}
_IN_WORDS = {
    "text": "plain text",
    "completion": "prompts with answers",
    "messages": "conversations",
    "pieces": "answers in pieces",
    "pair": "preference data",
    "list": "ranked answers",
    "steps": "answers in steps with values",
    "tagged": "tagged words",
    "prompt": "prompts without answers",
}
_FOR_EXAMPLE = {
    "sequences": "sft", "tokens": "pretrain", "pairs": "dpo", "judged": "kto", "labelled": "classify", "tagged": "tag",
    "rollouts": "grpo", "streams": "east", "steps": "alphamath",
}  # fmt: skip


@dataclass(frozen=True)
class Rendering:
    """One split of a source as the trees that an objective consumes.

    Args:
        source: gives the samples.
        renderer: turns a sample into trees.
        split: "train" or "eval".
        consumes: what the objective consumes, a key of `ACCEPTED`.
        classes: names of the classes of labelled and tagged data, in the order of their numbers.
    """

    source: Source
    renderer: Renderer
    split: Split
    consumes: str
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what no data can be."""
        if self.consumes not in ACCEPTED:
            raise ValueError(f"an objective consumes one of {', '.join(ACCEPTED)}, not '{self.consumes}'")

    def samples(self) -> Iterator[Sample]:
        """Yield one pass over the samples.

        Raises:
            DataError: a sample is of a kind that the objective cannot use; the message says which objectives can.
        """
        for sample in self.source.samples(self.split):
            if sample.kind not in ACCEPTED[self.consumes]:
                raise mismatch(sample, self.consumes)
            yield sample

    def render(self, sample: Sample) -> tuple[list[Tree], Counts]:
        """Return the trees of a sample that fit the window, and what became of it.

        Args:
            sample: a sample of the source.
        """
        if self.consumes in ("labelled", "tagged"):
            trees = [self.renderer.classified(sample, self.classes)]
        else:
            trees = self.renderer.render(sample)
        if self.consumes == "tokens":
            trees = [replace(tree, weights=tuple(np.ones_like(weight) for weight in tree.weights)) for tree in trees]
        return fit_sample(
            trees, self.source.max_tokens, self.overlong_for(sample),
            where=sample.where, trains=self.consumes not in ("labelled", "rollouts", "any"),
        )  # fmt: skip

    def overlong_for(self, sample: Sample) -> Overlong:
        """Return what is done with a longer sample; a text whose class is told is cut, since it has one class.

        Args:
            sample: a sample of the source.
        """
        labelled = self.consumes == "labelled"
        return self.source.overlong or ("truncate" if labelled else self.source.overlong_for(sample.kind))

    @property
    def key(self) -> str:
        """Name of the token cache: a hash of everything that determines the trees."""
        return cache_key(
            source=self.source.fingerprint(), renderer=self.renderer.fingerprint, split=self.split,
            consumes="/".join((self.consumes, *self.classes)), max_tokens=self.source.max_tokens,
            overlong=self.source.overlong, code=_code(),
        )  # fmt: skip


@cache
def _code() -> str:
    """Return a hash of the code that makes trees of rows, so that what an older one made is not served again."""
    here = Path(__file__).parent
    names = ("cells", "formats", "files", "overlong", "../text/render", "../text/template")
    return hashlib.sha256(b"".join((here / f"{name}.py").read_bytes() for name in names)).hexdigest()


def _streams(source: Source) -> bool:
    """Return whether a source, or one inside it, streams, so that its content is not known before it is read."""
    return source.streaming or any(_streams(inner) for inner in source.inner())


def mismatch(sample: Sample, consumes: str) -> DataError:
    """Return the error that says which objectives can use a sample.

    Args:
        sample: of a kind that the objective cannot use.
        consumes: what it consumes, a key of `ACCEPTED`.
    """
    fitting = []
    for name, kinds in ACCEPTED.items():
        if name != "any" and sample.kind in kinds:
            example = _FOR_EXAMPLE[name]
            fitting.append(name + (f", such as {example}" if find("objective", example) else ""))
    wanted = " or ".join(f"{_IN_WORDS[kind]} ({kind})" for kind in ACCEPTED[consumes])
    return DataError(
        f"{sample.where or 'data'}: this is {_IN_WORDS[sample.kind]} ({sample.kind}), but the objective consumes "
        f"{consumes}, that is {wanted}. Use an objective that consumes {', or '.join(fitting)}; or other data"
    )


@dataclass
class Opened:
    """Data that is ready to train or evaluate on.

    Args:
        rendering: where it comes from.
        trees: the rendered samples; None for a stream, which is rendered while it trains, and for what the model will
            have answered.
    """

    rendering: Rendering
    trees: TokenCache | None
    _first: list[Sample] = field(default_factory=list, init=False, repr=False)

    def first(self, count: int) -> list[Sample]:
        """Return the first samples of the split themselves, for generated answers.

        Args:
            count: at most so many.
        """
        if len(self._first) < count:
            asked = self.rendering.source.questions(self.rendering.split)
            self._first = list(itertools.islice(asked, count))
        return self._first[:count]

    def describe(self) -> str:
        """Return one sentence for people."""
        if self.rendering.source.is_on_policy():
            return self.rendering.source.describe()
        what = "read as a stream, rendered while training" if self.trees is None else self.trees.counts.describe()
        return f"{self.rendering.source.describe()}: {what}"

    def record(self) -> dict[str, Any]:
        """Return what identifies the data, for the manifest of a run."""
        source = self.rendering.source
        return {
            "source": source.describe(),
            "split": self.rendering.split,
            "fingerprint": source.fingerprint(),
            "max_tokens": source.max_tokens,
            "counts": None if self.trees is None else asdict(self.trees.counts),
            "cache": None if self.trees is None or self.trees.folder is None else str(self.trees.folder),
        }

    def loader(self, batch_tokens: int, seed: int, epochs: float | None = None, *, workers: int | None = None) -> Steps:
        """Return the resumable loader, with the source's shuffling and workers.

        Args:
            batch_tokens: most tokens in one step.
            seed: seeds the order.
            epochs: passes over the data; None goes on for ever.
            workers: processes that read ahead; None takes the source's option.
        """
        source = self.rendering.source
        if (made := source.own_loader(self.rendering, seed)) is not None:
            return made
        workers = source.workers if workers is None else workers
        if self.trees is None:
            return StreamingLoader(
                self.rendering, batch_tokens=batch_tokens, seed=seed, shuffle=source.shuffle, workers=workers,
                epochs=epochs, max_tokens=source.max_tokens,
            )  # fmt: skip
        return Loader(
            self.trees, batch_tokens=batch_tokens, seed=seed, shuffle=source.shuffle, workers=workers, epochs=epochs
        )

    def calibration(self, batch_tokens: int, seed: int, device: torch.device | str = "cpu") -> Batches:
        """Return batches for methods that look at data before they train; nothing is read until they do.

        Args:
            batch_tokens: most tokens in one batch.
            seed: seeds the order.
            device: where the batches are wanted.
        """
        return Batches(self, batch_tokens, seed, device)


@dataclass(frozen=True)
class Batches:
    """One pass over the data in batches, the same each time it is iterated.

    Args:
        opened: the data.
        batch_tokens: most tokens in one batch.
        seed: seeds the order.
        device: where the batches are wanted.
        collate: makes a batch of the units of a step.
    """

    opened: Any
    batch_tokens: int
    seed: int
    device: torch.device | str
    collate: Callable[..., Any] = pack

    def __iter__(self) -> Iterator[Any]:
        """Yield the batches."""
        for trees in self.opened.loader(self.batch_tokens, self.seed, 1, workers=0):
            yield self.collate(trees).to(self.device)


def open_data(
    source: Source,
    renderer: Renderer,
    *,
    consumes: str,
    classes: Sequence[str] = (),
    split: Split = "train",
    context: int | None = None,
    progress: Progress | None = None,
) -> Opened:
    """Render a split of a source, or find it in the token cache.

    A streaming source is not rendered here, except for its evaluation split, which is small and is kept in memory.

    Args:
        source: gives the samples.
        renderer: turns a sample into trees.
        consumes: what the objective consumes, a key of `ACCEPTED`; "any" takes every kind of sample.
        classes: names of the classes of labelled and tagged data, in the order of their numbers.
        split: "train" or "eval".
        context: most tokens that the model takes; longer samples are fitted to it, whatever `max_tokens` says.
        progress: called with the number of samples read so far.

    Returns:
        The data; an evaluation split may be empty.

    Raises:
        DataError: there are no samples to train on, they are of a kind that the objective cannot use, or none of them
            has a trained token in the window.
        HoneError: the token cache could not be written.
    """
    if context is not None and source.max_tokens > context:
        log.warning("max_tokens is %d, but the model's context is %d tokens, which is used", source.max_tokens, context)
        source.max_tokens = context
    rendering = Rendering(source, renderer, split, consumes, tuple(classes))
    if consumes == "rollouts" and not source.is_on_policy():
        raise not_on_policy(source)
    if source.is_on_policy() and (split == "train" or consumes not in ("sequences", "tokens")):
        if next(source.samples(split), None) is None and split == "train":
            raise _empty(source)
        return Opened(rendering, None)
    if source.streaming and split == "train":
        if next(rendering.samples(), None) is None:
            raise _empty(source)
        return Opened(rendering, None)
    if source.cache and not _streams(source):
        trees = TokenCache.open(rendering.key, rendering.samples, rendering.render, progress=progress)
    else:
        trees = TokenCache.in_memory(rendering.samples, rendering.render, progress=progress)
    if split == "train" and not trees.counts.samples:
        raise _empty(source)
    trees.counts.require_kept(source.max_tokens)
    return Opened(rendering, trees)


def not_on_policy(source: Source) -> DataError:
    """Return the error for an objective that learns from the model's own answers, with data that has others.

    Args:
        source: the data.
    """
    return DataError(
        f"{source.describe()}: the objective learns from what the model itself answers; write data: {{name: rollouts, "
        "of: YOUR DATA, rewards: [exact]}"
    )


def on_policy_error(consumes: str, make: str, fitting: Sequence[str], known: Mapping[str, Sequence[str]]) -> DataError:
    """Return the error for rollouts of which an objective can make nothing.

    Args:
        consumes: what the objective consumes.
        make: what the recipe wants to be made of them.
        fitting: what the objective could use.
        known: what can be made, by what objectives consume.
    """
    if fitting:
        return DataError(
            f"data.make: '{make}' is not what an objective that consumes {consumes} can use; expected "
            f"{' or '.join(fitting)}, or auto"
        )
    others = ", ".join(f"{name}, such as {_FOR_EXAMPLE[name]}" for name in known)
    return DataError(f"data: rollouts make nothing for an objective that consumes {consumes}; use one for {others}")


def _empty(source: Source) -> DataError:
    """Return the error for a source that has nothing, or for the source inside it that has nothing to begin with."""
    inside = list(source.inner())
    for inner in inside:
        if next(inner.samples("train"), None) is None:
            return _empty(inner)
    what = f"{source.describe()}: there is nothing to train on: expected at least one sample, found none."
    if not inside:
        return DataError(f"{what} Check the path, and that holdout={source.holdout} leaves some for training")
    common = {f.name for f in fields(Source)}
    given = {f.name: getattr(source, f.name) for f in fields(source) if f.init and f.name not in common}
    options = [
        f"{name}={value!r}" if isinstance(value, str) and value.split() != [value] else f"{name}={value}"
        for name, value in given.items() if isinstance(value, (bool, int, float, str))
    ]  # fmt: skip  # a separator that is a line end would end this line
    cut = "; an answer that does not end within max_new_tokens is left out" if "max_new_tokens" in given else ""
    return DataError(
        f"{what} There are samples to begin with, but nothing could be made of them. What is made depends on "
        f"{', '.join(options)}{cut}"
    )
