"""Folders and sets of images: ranges of pixels, classes, and what is wrong with the input in words."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from hone.data.arrays import Images
from hone.data.hub import Hub
from hone.errors import DataError

RNG = np.random.default_rng(0)


def grey(count: int = 8, most: int = 256, side: int = 4) -> list[Image.Image]:
    return [Image.fromarray(RNG.integers(0, most, (side, side), dtype=np.uint8)) for _ in range(count)]


def saved(folder: Path, pictures: list[Image.Image]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    return str(folder)


def hub(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]]) -> Images:
    """Return a source whose set of the Hub has these rows."""
    monkeypatch.setattr(Hub, "data", lambda self: rows)
    return Images(path="owner/name", conditional=True)


@pytest.mark.parametrize("options", [{}, {"grey": True}, {"grey": False}, {"side": 4}], ids=str)
def test_images_of_16_bits_keep_their_range(tmp_path: Path, options: dict[str, Any]) -> None:
    deep = [RNG.integers(0, 65536, (4, 4), dtype=np.uint16) for _ in range(8)]
    source = Images(path=saved(tmp_path, [Image.fromarray(pixels) for pixels in deep]), **options)
    with Image.open(tmp_path / "0.png") as picture:
        assert picture.mode == "I;16"
    order = np.random.default_rng(0).permutation(8)
    wanted = torch.from_numpy(np.stack(deep)[order] / 32767.5 - 1).float()[:, None]
    wanted = wanted.expand(-1, 3, -1, -1) if options.get("grey") is False else wanted
    torch.testing.assert_close(source.arrays()[0], wanted, rtol=0, atol=1e-6)


def test_images_without_a_known_range_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = hub(monkeypatch, [{"image": Image.new("F", (4, 4)), "label": number} for number in range(8)])
    with pytest.raises(DataError, match=r"owner/name:0: expected an image of 8 or 16 bits, got one of mode F"):
        source.arrays()


def test_a_set_that_uses_little_of_its_range_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "hone"):
        Images(path=saved(tmp_path / "usual", grey())).arrays()
        assert not caplog.records
        Images(path=saved(tmp_path / "masks", grey(most=2))).arrays()
    assert "all pixels lie between 0 and 1 of 0 to 255" in caplog.text


def test_numbers_of_classes_are_in_the_order_of_the_sets_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": picture, "label": number % 12} for number, picture in enumerate(grey(24))]
    _, labels = hub(monkeypatch, rows).arrays()
    order = np.random.default_rng(0).permutation(24)
    assert labels is not None and labels.tolist() == [rows[place]["label"] for place in order]


def test_classes_that_are_not_there_are_no_single_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"data\.conditional: expected at least 2 classes in .*, found 1"):
        Images(path=saved(tmp_path, grey()), conditional=True).arrays()
    with pytest.raises(DataError, match=r"data\.label: owner/name:0 has no column 'label'; it has image, kind"):
        hub(monkeypatch, [{"image": picture, "kind": 1} for picture in grey()]).arrays()
    with pytest.raises(DataError, match=r"data\.label: owner/name:0: expected a class in 'label', got nothing"):
        hub(monkeypatch, [{"image": picture, "label": None} for picture in grey()]).arrays()


@pytest.mark.parametrize(("rows", "said"), [
    ([{"image": None, "label": 1}], r"data\.column: owner/name:0: expected an image in 'image', got nothing"),
    ([{"image": [[0.1]], "label": 1}], r"data\.column: owner/name:0: expected an image in 'image', got a list"),
    ([{"picture": 1, "label": 1}], r"data\.column: owner/name:0 has no column 'image'; it has picture, label"),
    ([], r"data\.path: there are no images in 'owner/name'"),
])  # fmt: skip
def test_a_set_without_images_is_told(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(DataError, match=said):
        hub(monkeypatch, rows).arrays()


def test_a_path_that_is_nowhere_and_a_hub_out_of_reach_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(error: Exception) -> Any:
        def load(*_: Any, **__: Any) -> Any:
            raise error

        return load

    for error, said in ((FileNotFoundError(), "was not found"), (ConnectionError(), "cannot be reached")):
        monkeypatch.setattr(datasets, "load_dataset", fails(error))
        for ask in (Images.arrays, Images.fingerprint):
            with pytest.raises(DataError, match=rf"data\.path: expected a folder of images.*'photos/mine'.*{said}"):
                ask(Images(path="photos/mine"))


def test_another_version_of_a_set_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def source(versions: Dataset) -> Images:
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: versions)
        return Images(path="owner/name")

    first, second = (Dataset.from_dict({"number": [number]}) for number in (1, 2))
    assert source(first).fingerprint() == source(first).fingerprint() != source(second).fingerprint()


@pytest.mark.parametrize("count", [1, 3])
def test_some_images_must_be_left_to_hold_out(tmp_path: Path, count: int) -> None:
    source = Images(path=saved(tmp_path, grey(count)))
    with pytest.raises(DataError, match="expected at least 4 arrays"):
        source.collection("train")
    assert len(Images(path=saved(tmp_path, grey(4))).collection("eval")) == 1
