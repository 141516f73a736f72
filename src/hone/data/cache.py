"""The token cache: rendered trees in memory-mapped shards, keyed by content.

    HONE_CACHE/KEY/shard-00000.safetensors ...   columns of many trees, opened as memory maps
    HONE_CACHE/KEY/meta.json                     the finished shards with their SHA-256 sums, and the counts

A shard is written to a temporary name, fsynced and renamed, and only then listed in meta.json. So a kill at any
instant loses at most one shard, and building goes on behind the finished ones: samples come in the same order each
time. The key changes whenever the trees would, so nothing in the cache ever goes stale. Processes that want the same
key take turns by a lock that the operating system releases when its holder dies.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import logging
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
from safetensors.numpy import save

from hone.data.overlong import Counts
from hone.data.sample import Sample
from hone.errors import HoneError
from hone.files import reason, write_whole
from hone.text.pack import Tree

FORMAT = 1
SHARD_TOKENS = 1 << 23  # about 40 MB on disk
_OPEN_SHARDS = 256  # each holds a file descriptor
_DTYPES = {"U8": np.uint8, "I32": np.int32, "I64": np.int64, "F32": np.float32, "F64": np.float64}

Columns = dict[str, np.ndarray]
Samples = Callable[[], Iterable[Sample]]
Render = Callable[[Sample], tuple[list[Tree], Counts]]
Progress = Callable[[int], object]

log = logging.getLogger(__name__)


def cache_root() -> Path:
    """Return where caches lie: $HONE_CACHE, or hone/tokens in the user's cache folder."""
    if given := os.environ.get("HONE_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "hone" / "tokens"


def cache_key(**parts: object) -> str:
    """Return the name of the cache of what `parts` (JSON values) determine, in this version of the format."""
    return _sum({**parts, "format": FORMAT})


def _sum(plain: object) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@dataclass
class _Shard:
    """A finished shard, as meta.json lists it.

    Args:
        file: its name.
        bytes: its size.
        sha256: of its content.
        counts: counts from the first sample up to its end.
    """

    file: str
    bytes: int
    sha256: str
    counts: Counts


@dataclass
class _Meta:
    """What meta.json says.

    Args:
        shards: the finished shards in order.
        counts: the final counts, None while the cache is being built.
    """

    shards: list[_Shard] = field(default_factory=list)
    counts: Counts | None = None

    def write(self, folder: Path) -> None:
        """Write meta.json in one piece, with its own checksum."""
        content = asdict(self)
        _write(folder / "meta.json", json.dumps({"sha256": _sum(content), **content}).encode())

    @classmethod
    def read(cls, folder: Path) -> _Meta:
        """Read meta.json.

        Raises:
            FileNotFoundError: nothing was finished yet.
            ValueError: it is damaged.
        """
        content = json.loads((folder / "meta.json").read_bytes())
        if not isinstance(content, dict) or content.pop("sha256", None) != _sum(content):
            raise ValueError("it does not match its checksum")
        shards = [_Shard(**{**shard, "counts": Counts(**shard["counts"])}) for shard in content["shards"]]
        return cls(shards, None if content["counts"] is None else Counts(**content["counts"]))


class TokenCache(Sequence[Tree]):
    """Trees in order, each read from its shard when it is asked for."""

    def __init__(self, shards: Sequence[Path | Columns], counts: Counts, folder: Path | None = None) -> None:
        """Present shards as one sequence.

        Args:
            shards: files, or columns in memory.
            counts: what became of the samples.
            folder: where the files lie, None in memory.
        """
        self.counts, self.folder = counts, folder
        self._shards = list(shards)
        self._opened: dict[int, Columns] = {}
        lengths = [np.array(self._columns(k)["lengths"]) for k in range(len(self._shards))]
        self.lengths: np.ndarray = np.concatenate([np.zeros(0, np.int32), *lengths])
        self._ends = np.cumsum([len(own) for own in lengths], dtype=np.int64)

    @classmethod
    def open(
        cls,
        key: str,
        samples: Samples,
        render: Render,
        *,
        progress: Progress | None = None,
        shard_tokens: int = SHARD_TOKENS,
    ) -> TokenCache:
        """Open the cache `key`; build what is missing or damaged first.

        Args:
            key: names the content, see `cache_key`.
            samples: returns the samples from the first on, in the same order each time.
            render: turns a sample into trees and counts.
            progress: called with the number of samples read so far.
            shard_tokens: a shard is closed when it has this many tokens.

        Raises:
            HoneError: the disk is full or refuses; no half shard is left.
        """
        folder = cache_root() / key
        meta, _ = _survey(folder)
        if meta.counts is None:
            with _locked(folder):
                meta, damage = _survey(folder)  # another process may have built it meanwhile
                if damage:
                    log.warning("%s: %s; rendering it again from there", folder, damage)
                if meta.counts is None:
                    _build(folder, meta, samples, render, progress, shard_tokens)
        return cls([folder / shard.file for shard in meta.shards], meta.counts or Counts(), folder)

    @classmethod
    def in_memory(cls, samples: Samples, render: Render, *, progress: Progress | None = None) -> TokenCache:
        """Render everything into memory and write nothing.

        Args:
            samples: returns the samples.
            render: turns a sample into trees and counts.
            progress: called with the number of samples read so far.
        """
        parts = _rendered(samples(), render, Counts(), progress, SHARD_TOKENS)
        made = [(_columns(trees) if trees else {}, counts) for trees, counts in parts]
        return cls([columns for columns, _ in made if columns], made[-1][1])

    def __len__(self) -> int:
        """Return the number of trees."""
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Tree: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tree]: ...
    def __getitem__(self, index: int | slice) -> Tree | list[Tree]:
        """Return a tree, or a list of them for a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = operator.index(index)
        if not -len(self) <= at < len(self):
            raise IndexError(f"tree {at} of {len(self)}")
        at %= len(self)
        shard = int(np.searchsorted(self._ends, at, side="right"))
        return _tree(self._columns(shard), at - (int(self._ends[shard - 1]) if shard else 0))

    def _columns(self, shard: int) -> Columns:
        source = self._shards[shard]
        if isinstance(source, dict):
            return source
        if shard not in self._opened:
            if len(self._opened) >= _OPEN_SHARDS:
                del self._opened[next(iter(self._opened))]
            self._opened[shard] = _map(source)
        return self._opened[shard]

    def __getstate__(self) -> dict[str, Any]:
        """Leave the memory maps behind when a worker process gets a copy; it opens its own."""
        return {**self.__dict__, "_opened": {}}


def _rendered(
    samples: Iterable[Sample], render: Render, counts: Counts, progress: Progress | None, shard_tokens: int
) -> Iterator[tuple[list[Tree], Counts]]:
    """Yield the trees of a shard and the counts up to its end, shard by shard; the last may have no trees."""
    pending: list[Tree] = []
    size = 0
    for sample in samples:
        trees, found = render(sample)
        counts = counts + found
        pending.extend(trees)
        size += sum(len(tree) for tree in trees)
        if progress is not None:
            progress(counts.samples)
        if size >= shard_tokens:
            yield pending, counts
            pending, size = [], 0
    yield pending, counts


def _build(
    folder: Path, meta: _Meta, samples: Samples, render: Render, progress: Progress | None, shard_tokens: int
) -> None:
    """Write the shards that `meta` lacks, then complete it."""
    wanted = {shard.file for shard in meta.shards} | {"lock"}
    for path in folder.iterdir():  # damaged shards, and what a killed process left
        if path.name not in wanted:
            path.unlink()
    finished = meta.shards[-1].counts if meta.shards else Counts()
    remaining = itertools.islice(samples(), finished.samples, None)
    counts = finished
    for trees, counts in _rendered(remaining, render, finished, progress, shard_tokens):
        if trees:
            file, data = f"shard-{len(meta.shards):05d}.safetensors", save(_columns(trees))
            _write(folder / file, data)
            meta.shards.append(_Shard(file, len(data), hashlib.sha256(data).hexdigest(), counts))
            meta.write(folder)
    meta.counts = counts
    meta.write(folder)


def _survey(folder: Path) -> tuple[_Meta, str]:
    """Return the finished shards up to the first damaged one, and what is wrong with that one or with meta.json."""
    try:
        meta = _Meta.read(folder)
    except (FileNotFoundError, NotADirectoryError, PermissionError):  # what is wrong, taking the lock will say
        return _Meta(), ""
    except ValueError as error:
        return _Meta(), f"meta.json is damaged: {error}"
    for index, shard in enumerate(meta.shards):
        if trouble := _damage(folder / shard.file, shard):
            return _Meta(meta.shards[:index]), f"{shard.file} {trouble}"
    return meta, ""


def _damage(path: Path, shard: _Shard) -> str:
    if not path.is_file():
        return "is missing"
    if path.stat().st_size != shard.bytes:
        return f"has {path.stat().st_size:,} bytes instead of {shard.bytes:,}"
    try:
        with path.open("rb") as file:
            good = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    except OSError as error:
        return f"cannot be read: {error}"
    return "" if good else "does not match its checksum"


def _columns(trees: Sequence[Tree]) -> Columns:
    """Lay trees out as flat columns: tokens, weights, segments, trees, per-segment fields and places."""
    segments = [segment for tree in trees for segment in tree.tokens]
    weights = np.concatenate([weight for tree in trees for weight in tree.weights]).astype(np.float32)
    places = [tree.where.encode() for tree in trees]
    columns: Columns = {
        "tokens": np.concatenate(segments).astype(np.int32),
        "weights": weights.astype(np.uint8) if np.isin(weights, (0, 1)).all() else weights,
        "segment_ends": np.cumsum([len(segment) for segment in segments], dtype=np.int64),
        "parents": np.array([parent for tree in trees for parent in tree.parents], np.int32),
        "tree_ends": np.cumsum([len(tree.tokens) for tree in trees], dtype=np.int64),
        "lengths": np.array([len(tree) for tree in trees], np.int32),
        "where": np.frombuffer(b"".join(places), np.uint8),
        "where_ends": np.cumsum([len(place) for place in places], dtype=np.int64),
    }
    for name in sorted({name for tree in trees for name in tree.fields}):
        absent = float("nan")
        values = [tree.fields.get(name, (absent,) * len(tree.tokens)) for tree in trees]
        columns[f"field.{name}"] = np.array(list(itertools.chain(*values)), np.float64)
    return columns


def _tree(columns: Columns, index: int) -> Tree:
    """Invert `_columns` for one tree; a field that is NaN in all its segments counts as absent, as in `pack`."""

    def span(ends: str, which: int) -> tuple[int, int]:
        return (int(columns[ends][which - 1]) if which else 0), int(columns[ends][which])

    first, last = span("tree_ends", index)
    tokens = [span("segment_ends", segment) for segment in range(first, last)]
    begin, end = span("where_ends", index)
    fields = {
        name.removeprefix("field."): tuple(column[first:last].tolist())
        for name, column in columns.items()
        if name.startswith("field.") and not np.isnan(column[first:last]).all()
    }
    return Tree(
        tokens=tuple(columns["tokens"][a:b] for a, b in tokens),
        weights=tuple(columns["weights"][a:b].astype(np.float32) for a, b in tokens),
        parents=tuple(columns["parents"][first:last].tolist()),
        fields=fields,
        where=columns["where"][begin:end].tobytes().decode(),
    )


def _map(path: Path) -> Columns:
    """Open a safetensors file as read-only views into one memory map."""
    data = np.asarray(np.memmap(path, np.uint8, mode="r"))
    start = 8 + int(data[:8].view("<u8")[0])
    header = json.loads(data[8:start].tobytes())
    return {
        name: data[start + item["data_offsets"][0] : start + item["data_offsets"][1]].view(_DTYPES[item["dtype"]])
        for name, item in header.items()
    }


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the operating system releases it when this process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise _disk_error(error, folder) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s: waiting for another process that is building this token cache", folder)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise _disk_error(error, folder) from error
        yield


def _write(path: Path, data: bytes) -> None:
    try:
        write_whole(path, data)
    except OSError as error:
        raise _disk_error(error, path.parent) from error


def _disk_error(error: OSError, folder: Path) -> HoneError:
    return HoneError(
        f"{folder}: the token cache could not be written: {reason(error, folder)}. What was finished is kept and used "
        "next time. Free some space, put the cache elsewhere with the environment variable HONE_CACHE=FOLDER, or "
        "render in memory with cache: false under data"
    )
