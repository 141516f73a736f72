"""Local files as a source: JSON lines, JSON, CSV, Parquet and plain text, alone, in folders or by glob."""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

from hone.data.formats import CONTINUES
from hone.data.source import RowSource
from hone.errors import DataError, nearest
from hone.parts import part

Rows = Iterator[tuple[dict[str, Any], str]]
CHARACTERS_PER_TOKEN = 4  # roughly, for English and common vocabularies
PASSAGE = 4  # a text file is read in passages of about this many samples


@part("data", "files", papers="original")
@dataclass(kw_only=True)
class Files(RowSource):
    """Local files: .jsonl, .json, .csv, .tsv, .parquet and .txt, all but Parquet also with .gz.

    JSON lines, CSV, Parquet and text are read in constant memory. A .json file is an array of objects, an object whose
    "data" is one, or JSON lines after all. A row is one sample. A .txt file is one running text: it is read in passages
    of about four times `max_tokens`, cut at blank lines where possible, and only the last of them ends with the
    end-of-text token.

    Args:
        path: a file, a folder (read with its subfolders), a glob such as "data/**/*.jsonl", or a list of these.
    """

    path: str | list[str]

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the options, as (option, message), without reading any row."""
        yield from super().check()
        try:
            self.files()
        except DataError as error:
            yield "path", str(error)

    def files(self) -> list[Path]:
        """Return the files to read, in order.

        Raises:
            DataError: a path leads to no file that can be read.
        """
        return [file for path in self._paths() for file in expand(path)]

    def _paths(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else self.path

    def title(self) -> str:
        """Return the paths as the recipe gives them."""
        return ", ".join(self._paths())

    def rows(self) -> Rows:
        """Yield every row of every file with its "file:line".

        Raises:
            DataError: a file cannot be read; the message starts with its "file:line".
        """
        for file in self.files():
            yield from self._reader(file)(file)

    def _reader(self, file: Path) -> Callable[[Path], Rows]:
        if suffix(file) == ".txt":
            return partial(read_text, size=PASSAGE * CHARACTERS_PER_TOKEN * self.max_tokens)
        return READERS[suffix(file)]

    def count(self) -> int:
        """Return the number of rows; JSON lines are counted without being parsed."""
        return sum(_count(file, self._reader(file)) for file in self.files())

    def content(self) -> str:
        """Return a hash of the files' names and content, or of names, sizes and times where they are streamed."""
        found = []
        for file in self.files():
            found.append([str(file), _signature(file) if self.streaming else digest(file)])
        return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def expand(path: str) -> list[Path]:
    """Return the data files that a path stands for: itself, what a glob matches, or a folder's content, sorted.

    Args:
        path: a file, a folder or a glob; "~" is the home folder.

    Raises:
        DataError: there is no such file, or none that can be read.
    """
    place = Path(path).expanduser()
    known = f"expected {', '.join(READERS)} or .txt"
    if place.is_file():
        if suffix(place) not in READERS and suffix(place) != ".txt":
            raise DataError(f"{place}: files ending in '{place.suffix}' cannot be read; {known}")
        return [place]
    if place.is_dir():
        found = [file for file in sorted(place.rglob("*")) if not _hidden(file.relative_to(place))]
    elif glob.has_magic(str(place)):
        found = [Path(name) for name in sorted(glob.glob(str(place), recursive=True))]
    else:
        near = nearest(place.name, (p.name for p in place.parent.iterdir())) if place.parent.is_dir() else ""
        raise DataError(f"{path}: there is no such file or folder" + (f"; {near}" if near else ""))
    readable = [
        file for file in found
        if file.is_file() and (suffix(file) in READERS or suffix(file) == ".txt") and file.name not in BESIDE
    ]  # fmt: skip
    if not readable:
        raise DataError(f"{path}: no data file is there; {known}")
    return readable


def suffix(file: Path) -> str:
    """Return the suffix that tells how a file is read: ".jsonl" for both data.jsonl and data.jsonl.gz."""
    name = file.name.lower().removesuffix(".gz")
    return "." + name.rpartition(".")[2] if "." in name else ""


def _hidden(relative: Path) -> bool:
    return any(step.startswith(".") for step in relative.parts)


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.name.lower().endswith(".gz") else file.open("rb")  # type: ignore[return-value]


def _lines(file: Path, size: int = -1) -> Iterator[tuple[str, int]]:
    """Yield the decoded lines of a file with their numbers, in constant memory; a longer line comes in parts of `size`.

    Raises:
        DataError: the file is not UTF-8, or its compression is broken.
    """
    number, rest = 1, b""
    try:
        with _open(file) as stream:
            for raw in iter(lambda: stream.readline(size), b""):
                raw = rest + raw
                if number == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                # A part may end inside a character, or inside a line break: the bytes wait for the next part.
                whole = raw if raw.endswith(b"\n") or size < 0 else raw[: _whole(raw)].removesuffix(b"\r")
                rest = raw[len(whole) :]
                yield whole.decode("utf-8"), number
                number += whole.endswith(b"\n")
            if rest:
                yield rest.decode("utf-8"), number
    except UnicodeDecodeError as error:
        bad = f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1} of the line"
        raise DataError(f"{file}:{number}: expected UTF-8 text, found {bad}. Save the file as UTF-8.") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        broken = f"the compressed file is broken ({error})"
        raise DataError(f"{file}:{number}: {broken}. Copy or download it again.") from error


def _whole(raw: bytes) -> int:
    """Return how many leading bytes end with a whole UTF-8 character (all of them when they are not UTF-8)."""
    for back in range(1, min(4, len(raw)) + 1):
        byte = raw[-back]
        if byte >= 0xC0:  # the first byte of a character of 2, 3 or 4 bytes
            length = 2 + (byte >= 0xE0) + (byte >= 0xF0)
            return len(raw) - back if length > back else len(raw)
        if byte < 0x80:
            break
    return len(raw)


def read_jsonl(file: Path) -> Rows:
    """Yield the objects of a file of JSON lines; blank lines are passed over.

    Args:
        file: the file.

    Raises:
        DataError: a line is not a JSON object.
    """
    for line, number in _lines(file):
        if line.strip():
            yield _object(_parse(line.rstrip(), file, number), f"{file}:{number}"), f"{file}:{number}"


def _parse(text: str, file: Path, number: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{file}:{number + error.lineno - 1}"
        near = text[max(0, error.pos - 20) : error.pos + 20].strip()
        raise DataError(
            f"{where}: not valid JSON: {error.msg} at column {error.colno}, near {near!r}. "
            'Every row must be one JSON object with double-quoted names, such as {"text": "..."}.'
        ) from error


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where}: expected a JSON object such as {{"text": "..."}}, found {type(value).__name__}')
    return value


def read_json(file: Path) -> Rows:
    """Yield the objects of a JSON array, of the array under "data", or of JSON lines under another name.

    A row of an array is placed by its number, from 1.

    Args:
        file: the file; an array is read as a whole.

    Raises:
        DataError: the file is not JSON or holds no array of objects.
    """
    text = "".join(line for line, _ in _lines(file))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            yield from read_jsonl(file)
            return
        _parse(text, file, 1)  # says where
    if isinstance(value, dict) and not isinstance(value.get("data"), list) and len(text.strip().splitlines()) == 1:
        value = [value]  # JSON lines of a single row
    rows = value.get("data") if isinstance(value, dict) else value
    if not isinstance(rows, list):
        raise DataError(f'{file}:1: expected an array of objects or {{"data": [...]}}, found {type(value).__name__}')
    for number, row in enumerate(rows, start=1):
        yield _object(row, f"{file}:{number}"), f"{file}:{number}"


def read_csv(file: Path, delimiter: str = ",") -> Rows:
    """Yield the rows of a table whose first row names the columns; every cell is a text.

    Args:
        file: the file.
        delimiter: what stands between cells.

    Raises:
        DataError: a row has more or fewer cells than there are columns, or the table cannot be read.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses a document of more than 128 KiB
    table, begin = csv.reader((line for line, _ in _lines(file)), delimiter=delimiter, strict=True), 1
    try:
        names = next(table, [])
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise DataError(f"{file}:1: column '{twice[0]}' is named twice. Rename one of them.")
        begin = table.line_num + 1
        for cells in table:
            if cells and len(cells) != len(names):
                fix = "Quote cells that hold the delimiter or a line break."
                raise DataError(f"{file}:{begin}: expected {len(names)} cells, found {len(cells)}. {fix}")
            if cells:
                yield dict(zip(names, cells, strict=True)), f"{file}:{begin}"
            begin = table.line_num + 1
    except csv.Error as error:
        raise DataError(f"{file}:{begin}: not a valid table: {error}. Check the quotes.") from error


def read_parquet(file: Path) -> Rows:
    """Yield the rows of a Parquet file, batch by batch; a row is placed by its number, from 1.

    Args:
        file: the file.

    Raises:
        DataError: the file is not Parquet or is broken.
    """
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{file}:{number}"
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file}:{number + 1}: not a readable Parquet file: {error}") from error


def read_text(file: Path, size: int) -> Rows:
    """Yield a text in passages that together are the whole text; all but the last say that the text continues.

    Args:
        file: the file.
        size: length of a passage in characters. It ends at the first blank line after that, or at the end of a line
            when there is none before twice the length; a longer line is cut.
    """
    ready = ""
    ready_at = begin = 1
    parts: list[str] = []
    length = 0
    for line, number in _lines(file, size):
        line = line[:-2] + "\n" if line.endswith("\r\n") else line
        parts.append(line)
        length += len(line)
        if length < size or (length < 2 * size and line.strip()) or not any(part.strip() for part in parts):
            continue
        if ready:
            yield {"text": ready, CONTINUES: True}, f"{file}:{ready_at}"
        ready, ready_at, begin = "".join(parts), begin, number + 1
        parts, length = [], 0
    last = "".join(parts)
    if ready and last.strip():
        yield {"text": ready, CONTINUES: True}, f"{file}:{ready_at}"
        yield {"text": last, CONTINUES: False}, f"{file}:{begin}"
    elif (ready + last).strip():
        yield {"text": ready + last, CONTINUES: False}, f"{file}:{ready_at}"


BESIDE = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")  # what describes data, not data
READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": read_jsonl,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": partial(read_csv, delimiter="\t"),
    ".parquet": read_parquet,
}


def _count(file: Path, reader: Callable[[Path], Rows]) -> int:
    if suffix(file) == ".jsonl":
        return sum(1 for line, _ in _lines(file) if line.strip())
    if suffix(file) == ".parquet":
        from pyarrow import ArrowInvalid, parquet

        try:
            return int(parquet.read_metadata(file).num_rows)
        except (ArrowInvalid, OSError) as error:
            raise DataError(f"{file}: not a readable Parquet file: {error}") from error
    return sum(1 for _ in reader(file))


def digest(file: Path) -> str:
    """Return the SHA-256 of a file's content, read again only when its size or time has changed.

    Args:
        file: the file.
    """
    return _digest(file, *_signature(file))


def _signature(file: Path) -> tuple[int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns


@lru_cache(maxsize=4096)
def _digest(file: Path, size: int, modified: int) -> str:
    """Return the SHA-256 of a file's content; size in bytes and time in ns only key the memory of earlier answers."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
