"""The resumable order: each `next()` is the list of trees of one optimizer step.

Trees come in the order of an epoch's permutation and are cut greedily into steps of at most `batch_tokens` tokens.
Every process sees the same steps and takes its share of each, so the position is the first tree not yet handed out: it
knows nothing of processes, workers or micro-batches, and a run may be resumed with other numbers of them.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from hone.data.overlong import Counts
from hone.data.sample import Sample
from hone.errors import DataError, HoneError
from hone.text.pack import Tree

State = dict[str, Any]
T = TypeVar("T")


class Feed(Protocol):
    """What a streaming loader reads: samples in the same order each time, and what turns one into trees."""

    def samples(self) -> Iterator[Sample]:
        """Yield one pass over the samples."""

    def render(self, sample: Sample) -> tuple[list[Tree], Counts]:
        """Return the trees of a sample and what became of it."""


class Steps(Iterator[list[Tree]]):
    """An iterator of steps whose position is the state after the last step handed out, whatever was prefetched."""

    def __init__(self, start: State) -> None:
        """Begin at `start`."""
        self._position = self._before = start
        self._running: Generator[tuple[list[Tree], State], None, None] | None = None

    def _steps(self, start: State) -> Generator[tuple[list[Tree], State], None, None]:
        """Yield each step with the position after it."""
        raise NotImplementedError

    def _check(self, state: State) -> None:
        """Raise a `DataError` if `state` is not a position in this data."""
        raise NotImplementedError

    def __next__(self) -> list[Tree]:
        """Return the trees of the next step."""
        self._before = self._position
        if self._running is None:
            self._running = self._steps(self._position)
        trees, self._position = next(self._running)
        return trees

    def state_dict(self) -> State:
        """Return the position of the first tree not yet handed out."""
        return dict(self._position)

    def load_state_dict(self, state: State) -> None:
        """Go on from a position that `state_dict` returned, with this or another number of workers.

        Args:
            state: the position.

        Raises:
            DataError: the data is not what it was.
        """
        self._check(state)
        self.close()
        self._position = dict(state)

    def rewind(self) -> None:
        """Take back the latest `next()`, also one that failed: the same step comes again."""
        self.load_state_dict(self._before)

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps of one pass over the data, None where nobody knows."""
        return None

    def total_steps(self, epochs: float) -> int:
        """Return the number of steps of some passes over the data.

        Args:
            epochs: passes, may be fractional.

        Raises:
            DataError: nobody knows.
        """
        raise DataError(f"epochs: a stream has no length, so {epochs} epochs have no known number of steps; give steps")

    def join(self, run: Any) -> None:
        """Meet the run before its first step, for steps that depend on the model; here nothing.

        Args:
            run: the run in progress (`engine/loop.py: Run`).
        """

    def figures(self) -> dict[str, float]:
        """Return what the steps themselves have to report beside the latest one, by name."""
        return {}

    def close(self) -> None:
        """End the worker processes; the next `next()` starts new ones."""
        if self._running is not None:
            self._running.close()
            self._running = None


class Loader(Steps):
    """Steps over trees that can be indexed. The state's `samples` counts the trees handed out since the beginning."""

    def __init__(
        self,
        trees: Sequence[Tree],
        *,
        batch_tokens: int,
        seed: int,
        shuffle: bool = True,
        workers: int = 0,
        epochs: float | None = None,
    ) -> None:
        """Iterate over `trees`.

        Args:
            trees: the data; its attribute `lengths` (N,), if it has one, spares reading every tree, and its method
                `__getitems__` reads the trees of a step at once.
            batch_tokens: most tokens in one step; a longer tree gets a step of its own.
            seed: with the epoch, seeds the order of each epoch.
            shuffle: whether to permute; False keeps the order of the data.
            workers: processes that read trees ahead; 0 reads in this one.
            epochs: passes over the data, may be fractional; None goes on for ever. Steps cross the border between
                epochs.

        Raises:
            DataError: there are no trees.
        """
        if not len(trees):
            raise DataError("there is nothing to train on: the data has no samples")
        super().__init__({"epoch": 0, "index": 0, "samples": 0})
        self.trees, self.batch_tokens, self.seed = trees, batch_tokens, seed
        self.shuffle, self.workers, self.epochs = shuffle, workers, epochs
        known = getattr(trees, "lengths", None)
        self._lengths = np.array([len(tree) for tree in trees]) if known is None else known
        self._order_of: tuple[int, np.ndarray, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of the first epoch, were it the only one."""
        return self.total_steps(1)

    def total_steps(self, epochs: float) -> int:
        """Return the exact number of steps of a run.

        Args:
            epochs: passes over the data, may be fractional.
        """
        return sum(1 for _ in self._plan(0, self._end(epochs)))

    def visited(self, steps: int) -> list[int]:
        """Return the indices of the trees that the first steps hand out, each once, in ascending order.

        Args:
            steps: optimizer steps from the beginning.
        """
        found: set[int] = set()
        for picked, _ in itertools.islice(self._plan(0, self._end(self.epochs)), steps):
            found.update(picked)
            if len(found) == len(self.trees):
                break
        return sorted(found)

    def _end(self, epochs: float | None) -> float:
        return math.inf if epochs is None else math.ceil(epochs * len(self.trees))

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of an epoch (N,) and the tokens before each place in it (N+1,)."""
        if self._order_of is None or self._order_of[0] != epoch:
            count = len(self.trees)
            order = np.random.default_rng([self.seed, epoch]).permutation(count) if self.shuffle else np.arange(count)
            self._order_of = epoch, order, np.concatenate([[0], np.cumsum(self._lengths[order], dtype=np.int64)])
        return self._order_of[1:]

    def _plan(self, position: int, end: float) -> Iterator[tuple[list[int], int]]:
        """Yield the trees of each step by index, and the number of trees handed out after it, from lengths alone."""
        while position < end:
            picked: list[int] = []
            room = self.batch_tokens
            while position < end:
                epoch, index = divmod(position, len(self.trees))
                order, before = self._epoch(epoch)
                last = int(min(len(self.trees), end - epoch * len(self.trees)))
                fitting = int(np.searchsorted(before, before[index] + room, side="right")) - 1
                stop = min(max(fitting, index if picked else index + 1), last)
                picked.extend(order[index:stop].tolist())
                room -= int(before[stop] - before[index])
                position += stop - index
                if stop < last:
                    break
            yield picked, position

    def _state(self, position: int) -> State:
        epoch, index = divmod(position, len(self.trees))
        return {"epoch": epoch, "index": index, "samples": position}

    def _steps(self, start: State) -> Generator[tuple[list[Tree], State], None, None]:
        """Yield each step with the position after it."""
        plan = self._plan(start["samples"], self._end(self.epochs))
        picker = _Picker(self.trees)
        if not self.workers:
            for picked, position in plan:
                yield picker[picked], self._state(position)
            return
        ahead: deque[int] = deque()  # positions of the steps that workers are reading

        def announced() -> Iterator[list[int]]:
            for picked, position in plan:
                ahead.append(position)
                yield picked

        for trees in _ahead(picker, self.workers, 2, announced()):
            yield trees, self._state(ahead.popleft())

    def _check(self, state: State) -> None:
        """Raise a `DataError` if `state` is not a position in this data."""
        if self._state(state["samples"]) != state:
            raise DataError(
                f"the checkpoint stands at sample {state['index']:,} of epoch {state['epoch']:,}, {state['samples']:,} "
                f"samples in all, which is no position in the present data of {len(self.trees):,} samples: the data is "
                "not what it was; restore it, or start a new run"
            )


class StreamingLoader(Steps):
    """Steps over samples that can only be read in order: rendered, fitted and shuffled in a buffer on the fly.

    A position is replayed: samples up to it are read again but not rendered. The state's `samples` counts the samples
    used up since the beginning, `index` those in this epoch, `offset` the trees handed out of the one after them.
    """

    def __init__(
        self,
        feed: Feed,
        *,
        batch_tokens: int,
        seed: int,
        shuffle: bool = True,
        workers: int = 0,
        epochs: float | None = None,
        buffer: int = 1024,
        max_tokens: int = 0,
    ) -> None:
        """Iterate over `feed`.

        Args:
            feed: gives and renders the samples.
            batch_tokens: most tokens in one step; a longer tree gets a step of its own.
            seed: with the epoch, seeds the shuffle of each epoch.
            shuffle: whether to shuffle in a buffer; False keeps the order of the stream.
            workers: processes that render ahead; each reads the whole stream and renders its share. 0 renders here.
            epochs: whole passes over the stream; None goes on for ever. Steps cross the border between epochs.
            buffer: samples among which the next one is drawn.
            max_tokens: the window in tokens, for messages.

        Raises:
            DataError: `epochs` is fractional.
        """
        if epochs is not None and epochs != int(epochs):
            raise DataError(f"epochs: a stream has no length, so it cannot be read {epochs} times; give steps")
        super().__init__({"epoch": 0, "index": 0, "samples": 0, "offset": 0})
        self.feed, self.batch_tokens, self.seed, self.max_tokens = feed, batch_tokens, seed, max_tokens
        self.buffer, self.workers, self.epochs = buffer if shuffle else 1, workers, epochs
        self.counts = Counts()  # of the samples used since this loader was made

    def _steps(self, start: State) -> Generator[tuple[list[Tree], State], None, None]:
        """Yield each step with the position after it."""
        step: list[Tree] = []
        size, position = 0, start
        for tree, after in self._trees(start):
            if step and size + len(tree) > self.batch_tokens:
                yield step, position
                step, size = [], 0
            step.append(tree)
            size, position = size + len(tree), after
        if step:
            yield step, position

    def _trees(self, start: State) -> Iterator[tuple[Tree, State]]:
        """Yield each tree with the position after it."""
        total, offset, epoch = start["samples"], start["offset"], start["epoch"]
        whole, own = start["index"] == 0, Counts()  # whether this pass began at its start, and its counts
        renderings = _Renderings(self.feed, self.seed, self.buffer, self.epochs, epoch, start["index"])
        for item in _ahead(renderings, self.workers, 32) if self.workers else renderings:
            if isinstance(item, HoneError):
                raise item
            now, index, trees, counts = item
            if now != epoch:
                if whole:
                    own.require_kept(self.max_tokens)  # else an endless stream of nothing would hang
                whole, own, epoch = True, Counts(), now
            self.counts, own = self.counts + counts, own + counts
            for number, tree in enumerate(trees[offset:], offset + 1):
                done = number == len(trees)
                at, used, rest = (index + 1, total + 1, 0) if done else (index, total, number)
                yield tree, {"epoch": now, "index": at, "samples": used, "offset": rest}
            total, offset = total + 1, 0
        if whole:
            own.require_kept(self.max_tokens)

    def _check(self, state: State) -> None:
        """Raise a `DataError` if `state` cannot be a position in a stream."""
        if set(state) != set(self._position):
            raise DataError("the checkpoint was made with data that can be indexed, but this data is streamed")


class _Picker(Dataset[list[Tree]]):
    """Reads the trees of a step by their indices."""

    def __init__(self, trees: Sequence[Tree]) -> None:
        self.trees = trees

    def __getitem__(self, indices: list[int]) -> list[Tree]:
        at_once = getattr(self.trees, "__getitems__", None)
        return [self.trees[i] for i in indices] if at_once is None else at_once(indices)


_Item = tuple[int, int, list[Tree], Counts]  # epoch, index in it, trees, counts


class _Renderings(IterableDataset[_Item | HoneError]):
    """Every sample of a stream from a position on, in shuffled order, rendered; of several workers each does its share.

    Worker w of W renders samples w, w + W, ... and the data loader takes one from each in turn, so the order is that of
    one process. An error is handed over as an item, so that it is raised after all that came before it.
    """

    def __init__(self, feed: Feed, seed: int, buffer: int, epochs: float | None, epoch: int, index: int) -> None:
        self.feed, self.seed, self.buffer = feed, seed, buffer
        self.epochs, self.epoch, self.index = epochs, epoch, index

    def __iter__(self) -> Iterator[_Item | HoneError]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        try:
            for number, (epoch, index, sample) in enumerate(self._samples()):
                if number % workers == worker:
                    yield epoch, index, *self.feed.render(sample)
        except HoneError as error:
            if info is None:
                raise
            yield DataError(str(error))  # not every error class can be rebuilt in another process

    def _samples(self) -> Iterator[tuple[int, int, Sample]]:
        skip = self.index
        for epoch in itertools.count(self.epoch):
            if self.epochs is not None and epoch >= self.epochs:
                return
            count = 0
            for sample in _shuffled(self.feed.samples(), self.buffer, np.random.default_rng([self.seed, epoch])):
                if count >= skip:
                    yield epoch, count, sample
                count += 1
            if count < max(skip, 1):
                if not skip:
                    raise DataError("there is nothing to train on: the stream has no samples")
                raise DataError(
                    f"the stream ended after {count:,} samples, but the checkpoint had used {skip:,} of it: the data "
                    "is not what it was; restore it, or start a new run"
                )
            skip = 0


def _shuffled(samples: Iterable[Sample], size: int, generator: np.random.Generator) -> Iterator[Sample]:
    """Yield the samples, each drawn from a buffer of the next `size`; a size of 1 keeps their order."""
    held: list[Sample] = []
    for sample in samples:
        if len(held) < size:
            held.append(sample)
            continue
        drawn = int(generator.integers(size))
        yield held[drawn]
        held[drawn] = sample
    for drawn in generator.permutation(len(held)):
        yield held[drawn]


def _same(item: T) -> T:
    return item


def _ahead(dataset: Dataset[Any], workers: int, prefetch: int, sampler: Iterable[Any] | None = None) -> Iterator[Any]:
    """Read a data set in worker processes, in order; one pass lasts for all epochs, so the workers are never restarted.

    Args:
        dataset: read by the items of `sampler`, or iterated.
        workers: processes.
        prefetch: items that each reads ahead.
        sampler: what to read.
    """
    generator = torch.Generator()  # one of its own: the loader draws a seed, which must not move the global generator
    return iter(
        DataLoader(
            dataset, batch_size=None, sampler=sampler, num_workers=workers, prefetch_factor=prefetch, collate_fn=_same,
            generator=generator,
        )
    )  # fmt: skip
