"""Datasets of the Hugging Face Hub as a source."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hone.data.source import RowSource
from hone.data.turns import quoted
from hone.errors import DataError, nearest
from hone.parts import part


@part("data", "hub", papers="original")
@dataclass(kw_only=True)
class Hub(RowSource):
    """A dataset of the Hugging Face Hub, or a folder that the `datasets` library can load.

    Args:
        path: name on the Hub, "owner/name", or a local folder, of data files or as `save_to_disk` writes it.
        subset: configuration of the dataset, e.g. "main"; None takes the only one.
        split: split of the dataset to read; `holdout` is taken from it.
        revision: commit, tag or branch; give a commit to read the same rows for ever.
    """

    path: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    _data: Any = field(default=None, init=False, repr=False)

    def title(self) -> str:
        """Return the name with subset and split, e.g. "openai/gsm8k[main:train]"."""
        return f"{self.path}[{self.subset + ':' if self.subset else ''}{self.split}]"

    def data(self) -> Any:
        """Return the dataset, downloaded at the first call.

        Raises:
            DataError: there is no such dataset, subset or split, or the Hub cannot be reached.
        """
        if self._data is None:
            self._data = self._load()
        return self._data

    def _load(self) -> Any:
        from datasets import DatasetDict, load_dataset, load_from_disk
        from datasets.exceptions import DatasetsError
        from huggingface_hub.errors import HfHubHTTPError

        folder = Path(self.path).expanduser()
        try:
            if any((folder / name).is_file() for name in ("state.json", "dataset_dict.json")):  # of save_to_disk
                found = load_from_disk(str(folder))
                return self._split(found) if isinstance(found, DatasetDict) else found
            return load_dataset(
                self.path, name=self.subset, split=self.split, revision=self.revision, streaming=self.streaming
            )
        except (FileNotFoundError, DatasetsError, HfHubHTTPError) as error:
            what = f"the dataset was not found or cannot be read: {_brief(error)}"
            fix = "Check the name on huggingface.co/datasets; a private one needs 'hf auth login'."
            raise DataError(f"{self.title()}: {what}. {fix}") from error
        except OSError as error:  # ConnectionError among them
            fix = "It is no folder here. Check the network, or download the files and give their folder as the path."
            raise DataError(f"{self.title()}: the Hub cannot be reached: {_brief(error)}. {fix}") from error
        except ValueError as error:  # how `datasets` reports an unknown subset or split
            raise DataError(f"{self.title()}: {_brief(error)}. Set 'subset' and 'split' to one of these.") from error

    def _split(self, found: Any) -> Any:
        if self.split not in found:
            hint = nearest(self.split, found) or f"it has {quoted(found)}"
            raise DataError(f"{self.title()}: there is no split '{self.split}'; {hint}")
        return found[self.split]

    def rows(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield every row with its place, e.g. "openai/gsm8k[main:train]:17"."""
        title = self.title()
        for number, row in enumerate(self.data(), start=1):
            yield row, f"{title}:{number}"

    def count(self) -> int:
        """Return the number of rows."""
        return len(self.data())

    def content(self) -> str:
        """Return the fingerprint that `datasets` keeps; a streamed dataset is known by its name and revision only."""
        return self.title() if self.streaming else str(self.data()._fingerprint)


def _brief(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0].rstrip(".")
