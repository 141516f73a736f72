"""Rows that took long to make, kept as JSON with a checksum, so that they are made once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from hone.errors import HoneError
from hone.files import reason, write_whole


def read_rows(file: Path) -> list[Any] | None:
    """Return kept rows, None when there are none or they are damaged.

    Args:
        file: written by `keep_rows`.
    """
    try:
        found = json.loads(file.read_bytes())
        rows: list[Any] = found["rows"]
        return rows if found["sha256"] == _sum(rows) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_rows(file: Path, rows: list[Any]) -> None:
    """Write rows in one piece; the folder is made.

    Args:
        file: where.
        rows: JSON values.

    Raises:
        HoneError: the disk refused.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps({"sha256": _sum(rows), "rows": rows}).encode())
    except OSError as error:
        raise HoneError(
            f"{file}: what was made could not be kept: {reason(error, file)}; or set cache: false"
        ) from error


def _sum(rows: list[Any]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
