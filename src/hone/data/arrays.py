"""Sources of arrays: points with a known density, digits, tones, folders of images."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from hone.data.files import digest
from hone.data.hub import Hub
from hone.data.source import Split
from hone.diffusion.items import Collection
from hone.diffusion.mixture import Mixture
from hone.errors import DataError
from hone.parts import part

Count = Annotated[int, Field(ge=1)]
log = logging.getLogger("hone")


@dataclass(kw_only=True)
class ArraySource:
    """A source of arrays of one shape.

    Args:
        limit: most training arrays to use; None uses all.
        holdout: arrays held out, with which generated ones are compared.
        shuffle: train in an order drawn from the run's seed, anew each epoch.
    """

    medium: ClassVar[str] = "arrays"
    streaming: ClassVar[bool] = False
    limit: Count | None = None
    holdout: Count = 1000
    shuffle: bool = True

    @abstractmethod
    def arrays(self) -> tuple[Tensor, Tensor | None]:
        """Return all (N, *shape) float32 arrays and their (N,) classes; the last `holdout` of them are held out."""

    @cached_property
    def _all(self) -> tuple[Tensor, Tensor | None]:
        return self.arrays()

    def truth(self) -> Mixture | None:
        """Return the distribution that the arrays come from, where it is known."""
        return None

    @property
    def classes(self) -> int:
        """Number of classes, 0 for data without."""
        labels = self._all[1]
        return 0 if labels is None else int(labels.max()) + 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one array."""
        return tuple(self._all[0].shape[1:])

    def deviation(self) -> float:
        """Return the standard deviation of the training arrays, 0 where all their numbers are the same."""
        arrays = self.collection("train").arrays
        return 0.0 if bool((arrays == arrays.flatten()[0]).all()) else float(arrays.std())

    def collection(self, split: Split) -> Collection:
        """Return the arrays of a split.

        Args:
            split: "train" or "eval".

        Raises:
            DataError: there are too few arrays to train on some and to hold others out.
        """
        arrays, labels = self._all
        held = min(self.holdout, len(arrays) // 4)
        if held < 1:
            raise DataError(f"{self.describe()}: expected at least 4 arrays, of which at most a quarter is held out")
        chosen = slice(len(arrays) - held, None) if split == "eval" else slice(0, len(arrays) - held)
        arrays, labels = arrays[chosen], None if labels is None else labels[chosen]
        if split == "train" and self.limit is not None:
            arrays, labels = arrays[: self.limit], None if labels is None else labels[: self.limit]
        return Collection(arrays, labels, getattr(self, "name", "arrays"))

    def evaluation_split(self) -> Split:
        """Return the split to evaluate on where a recipe names this source as `eval_data`."""
        return "eval"

    def describe(self) -> str:
        """Return one line for the log."""
        kinds = f" of {self.classes} classes" if self.classes else ""
        return f"{getattr(self, 'name', 'arrays')}: {len(self._all[0]):,} arrays {self.shape}{kinds}"

    def content(self) -> str:
        """Return what identifies the arrays beside the options, e.g. a hash of files."""
        return ""

    def fingerprint(self) -> str:
        """Return a hash that changes whenever the arrays would."""
        options = {key: value for key, value in asdict(self).items() if key != "shuffle"}
        text = json.dumps([type(self).__name__, options, self.content()], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def meet(self, load: Callable[[], Any], identity: str) -> None:
        """Take the model that the run starts from; nothing here depends on it.

        Args:
            load: returns it.
            identity: what tells its content.
        """

    def suit(self, consumes: str) -> None:
        """Learn what the objective consumes; arrays are the same for all.

        Args:
            consumes: "arrays".
        """

    def is_on_policy(self) -> bool | None:
        """Return whether the model makes the samples while it trains: never."""
        return None

    def inner(self) -> Iterator[Any]:
        """Yield the sources that this one is made of: none."""
        return iter(())


def _ring(modes: int, radius: float, scale: float) -> Mixture:
    angles = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    means = radius * torch.stack([angles.cos(), angles.sin()], dim=-1)
    return Mixture(means, torch.full((modes,), scale, dtype=torch.float64), torch.full((modes,), 1 / modes).double(),
                   torch.arange(modes))  # fmt: skip


def _grid(side: int, step: float, scale: float) -> Mixture:
    places = (torch.arange(side, dtype=torch.float64) - (side - 1) / 2) * step
    means = torch.cartesian_prod(places, places)
    count = side * side
    return Mixture(means, torch.full((count,), scale).double(), torch.full((count,), 1 / count).double(),
                   torch.arange(count))  # fmt: skip


def _random(modes: int, size: int) -> Mixture:
    generator = torch.Generator().manual_seed(7)
    means = torch.randn(modes, size, generator=generator, dtype=torch.float64)
    scales = 0.1 + 0.2 * torch.rand(modes, generator=generator, dtype=torch.float64)
    weights = 0.5 + torch.rand(modes, generator=generator, dtype=torch.float64)
    return Mixture(means, scales, weights / weights.sum(), torch.arange(modes))


def _moons(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    which = torch.randint(2, (count,), generator=generator)
    angle = math.pi * torch.rand(count, generator=generator, dtype=torch.float64)
    upper = torch.stack([angle.cos(), angle.sin()], dim=-1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=-1)
    points = torch.where(which[:, None] == 0, upper, lower) - torch.tensor([0.5, 0.25], dtype=torch.float64)
    noise = torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return points + 0.05 * noise, which


@part("data", "points", papers="original")
@dataclass(kw_only=True)
class Points(ArraySource):
    """Points of a density whose truth is known: mixtures of Gaussians, and two moons.

    ring: 8 narrow Gaussians on a circle of radius 1; grid: 25 on a square of side 2; mixture: `modes` Gaussians of
    random places, widths and weights in `size` dimensions; moons: two half circles, without a known score.

    Args:
        density: which.
        count: points that are drawn, those held out included.
        modes: Gaussians of `mixture`.
        size: dimensions of `mixture`.
        conditional: whether each point is labelled with its Gaussian, or moon.
        outliers: share of the training points that are replaced by a wide Student's t of 1 degree of freedom.
        seed: draws the points; the same for every run unless it is set.
    """

    density: Literal["ring", "grid", "mixture", "moons"] = "ring"
    count: Count = 20_000
    modes: Count = 8
    size: Count = 2
    conditional: bool = False
    outliers: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0

    def truth(self) -> Mixture | None:
        """Return the mixture, None for moons."""
        made = {
            "ring": lambda: _ring(8, 1.0, 0.08), "grid": lambda: _grid(5, 0.5, 0.04),
            "mixture": lambda: _random(self.modes, self.size), "moons": lambda: None,
        }  # fmt: skip
        return made[self.density]()

    def arrays(self) -> tuple[Tensor, Tensor | None]:
        """Return the points and, where asked for, their classes."""
        generator = torch.Generator().manual_seed(self.seed)
        truth = self.truth()
        points, labels = _moons(self.count, generator) if truth is None else truth.sample(self.count, generator)
        if self.outliers:
            kept = self.count - min(self.holdout, self.count // 4)  # the held-out points stay clean
            hit = torch.rand(self.count, generator=generator) < self.outliers
            hit[kept:] = False
            wild = torch.randn(self.count, points.shape[1], generator=generator, dtype=points.dtype)
            wild = wild / torch.randn(self.count, 1, generator=generator, dtype=points.dtype).abs().clamp(min=0.05)
            points = torch.where(hit[:, None], wild, points)
        return points.float(), labels if self.conditional else None


@part("data", "digits", papers="original")
@dataclass(kw_only=True)
class Digits(ArraySource):
    """The 1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn, in [-1, 1], in a fixed random order.

    Args:
        conditional: whether each is labelled with what it shows.
        holdout: images held out.
    """

    conditional: bool = False
    holdout: Count = 400

    def arrays(self) -> tuple[Tensor, Tensor | None]:
        """Return (1797, 1, 8, 8) images and, where asked for, their classes."""
        from sklearn.datasets import load_digits

        found = load_digits()
        order = np.random.default_rng(0).permutation(len(found.images))
        images = torch.from_numpy(found.images[order]).float()[:, None] / 8 - 1
        return images, torch.from_numpy(found.target[order]).long() if self.conditional else None


@part("data", "tones", papers="original")
@dataclass(kw_only=True)
class Tones(ArraySource):
    """Synthetic sounds as spectrograms: `bands` log energies over `frames`, of one of `notes` pitches each.

    A sound is a pitch with two overtones, a slow vibrato and a decay, drawn anew for each; its class is its pitch.

    Args:
        count: sounds, those held out included.
        bands: frequency bands, the channels of a series.
        frames: length.
        notes: pitches.
        conditional: whether each sound is labelled with its pitch.
        seed: draws them.
    """

    count: Count = 4000
    bands: Count = 16
    frames: Count = 16
    notes: Count = 6
    conditional: bool = True
    seed: Annotated[int, Field(ge=0)] = 0

    def arrays(self) -> tuple[Tensor, Tensor | None]:
        """Return (count, bands, frames) log energies in about [-1, 1], and their pitches."""
        rng = np.random.default_rng(self.seed)
        note = rng.integers(self.notes, size=self.count)
        time, band = np.linspace(0, 1, self.frames), np.arange(self.bands)
        base = 1.0 + (self.bands * 0.35) * note / max(1, self.notes - 1)
        sway = 0.5 * np.sin(2 * np.pi * (rng.uniform(0.5, 2, (self.count, 1)) * time + rng.random((self.count, 1))))
        level = np.exp(-rng.uniform(0.2, 2.0, (self.count, 1)) * time)
        energy = np.zeros((self.count, self.bands, self.frames))
        for overtone, share in ((1.0, 1.0), (1.6, 0.6), (2.2, 0.35)):
            centre = base[:, None] * overtone + sway
            energy += share * np.exp(-0.5 * ((band[None, :, None] - centre[:, None]) / 0.7) ** 2)
        energy = energy * level[:, None] * rng.uniform(0.7, 1.0, (self.count, 1, 1))
        made = torch.from_numpy(2 * np.log1p(4 * energy) / np.log(5) - 1).float()
        return made, torch.from_numpy(note).long() if self.conditional else None


IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
LEAST_SPAN = 64  # of 255: the difference of the lightest and the darkest pixel of a set that raises no doubts


@part("data", "images", papers="original")
@dataclass(kw_only=True)
class Images(ArraySource):
    """A folder of images, or an image set of the Hub; a subfolder, or the column of labels, is a class.

    Pixels become [-1, 1]. Images must be of one size and mode unless `side` is given.

    Args:
        path: folder, or Hub name "owner/name".
        side: sides in pixels that every image is cropped and scaled to; None takes them as they are.
        grey: true makes colours grey, false gives grey images three channels; None takes them as they are.
        conditional: whether images are labelled with their class.
        column: column of the images of a Hub set.
        label: column of their classes.
    """

    path: str
    side: Count | None = None
    grey: bool | None = None
    conditional: bool = False
    column: str = "image"
    label: str = "label"
    _rows: list[str] = field(init=False, default_factory=list, repr=False)

    def content(self) -> str:
        """Return the names and hashes of the files, or what the set of the Hub is known by, with its version."""
        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            return self._set().content()
        return json.dumps([(str(p.relative_to(folder)), digest(p)) for p in self._files(folder)])

    def _files(self, folder: Path) -> list[Path]:
        found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES)
        if not found:
            raise DataError(f"{folder}: there are no images ({', '.join(IMAGES)}) in it or its subfolders")
        return found

    @cached_property
    def _hub(self) -> Hub:
        return Hub(path=self.path)

    def _set(self) -> Hub:
        """Return the set of the Hub, which is there."""
        try:
            self._hub.data()
        except DataError as error:
            raise DataError(
                "data.path: expected a folder of images, or a set of the Hub with one subset and a split 'train', got "
                f"'{self.path}'. {error}"
            ) from error
        return self._hub

    def arrays(self) -> tuple[Tensor, Tensor | None]:
        """Return the images and, where asked for, their classes.

        Raises:
            DataError: an image cannot be read, or differs from the first in size or channels, or there are none.
        """
        arrays: list[Tensor] = []
        names: list[Any] = []
        for where, picture, name in self._read():
            array = self._array(picture, where)
            if arrays and array.shape != arrays[0].shape:
                raise DataError(
                    f"{where}: this image is {tuple(array.shape)} (channels, height, width), but the first is "
                    f"{tuple(arrays[0].shape)}; give {self._way_out(array, arrays[0])}"
                )
            arrays.append(array)
            names.append(name)
        if not arrays:
            raise DataError(f"data.path: there are no images in '{self.path}'")
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(arrays)))
        found = torch.stack(arrays)[order]
        self._mind_range(found)
        return found, self._classes(names)[order] if self.conditional else None

    def _read(self) -> Iterator[tuple[str, Any, Any]]:
        """Yield (where, image, class) of every image."""
        from PIL import Image, UnidentifiedImageError

        folder = Path(self.path).expanduser()
        if not folder.is_dir():
            yield from self._read_set()
            return
        for path in self._files(folder):
            try:
                with Image.open(path) as picture:
                    picture.load()
                    yield str(path), picture.copy(), str(path.parent.relative_to(folder))
            except (UnidentifiedImageError, OSError) as error:
                raise DataError(f"{path}: this is no image that can be read: {error}") from error

    def _read_set(self) -> Iterator[tuple[str, Any, Any]]:
        """Yield (where, image, class) of every image of a set of the Hub."""
        from PIL import Image

        rows = self._set().data()
        wanted = {"column": self.column, **({"label": self.label} if self.conditional else {})}
        for number in range(len(rows)):
            where = f"{self.path}:{number}"
            try:
                row = rows[number]
            except OSError as error:
                raise DataError(f"{where}: this is no image that can be read: {error}") from error
            for option, column in wanted.items():
                if column not in row:
                    raise DataError(f"data.{option}: {where} has no column '{column}'; it has {', '.join(row)}")
            picture, name = row[self.column], row.get(self.label)
            if not isinstance(picture, Image.Image):
                raise DataError(f"data.column: {where}: expected an image in '{self.column}', got {_kind(picture)}")
            if self.conditional and not isinstance(name, int | float | str):
                raise DataError(f"data.label: {where}: expected a class in '{self.label}', got {_kind(name)}")
            yield where, picture, name

    def _classes(self, names: list[Any]) -> Tensor:
        """Return the number of each class, in the order of its own number or name."""
        names = names if all(isinstance(name, int) for name in names) else [str(name) for name in names]
        places = {name: number for number, name in enumerate(sorted(set(names)))}
        if len(places) < 2:
            raise DataError(
                f"data.conditional: expected at least 2 classes in '{self.path}', found 1; put the images of each into "
                "a subfolder of its own, name the column of the classes as data.label, or set conditional: false"
            )
        return torch.tensor([places[name] for name in names])

    def _way_out(self, array: Tensor, first: Tensor) -> str:
        sizes = [] if array.shape[1:] == first.shape[1:] else ["side: 64 or so"]
        colours = [] if len(array) == len(first) else ["grey: true, or grey: false to take all as colours"]
        return ", and ".join([*sizes, *colours])

    def _array(self, picture: Any, where: str) -> Tensor:
        """Return a picture as (C, H, W) in [-1, 1]."""
        from PIL import Image

        deep = picture.mode.startswith("I;16")  # 16 bits of grey, which `convert` would cut off at 255
        grey = (deep or picture.mode in ("1", "L")) if self.grey is None else self.grey
        if picture.mode in ("I", "F"):
            raise DataError(
                f"{where}: expected an image of 8 or 16 bits, got one of mode {picture.mode}, whose numbers have no "
                "known range; save it with 8 bits, 0 to 255"
            )
        if deep:
            picture = Image.fromarray(np.array(picture, dtype=np.float32) / 257)
        else:
            picture = picture.convert("L" if grey else "RGB")
        if self.side is not None:
            short = min(picture.size)
            left, top = (picture.width - short) // 2, (picture.height - short) // 2
            picture = picture.crop((left, top, left + short, top + short)).resize((self.side, self.side))
        found = (torch.from_numpy(np.array(picture)).float() / 127.5 - 1).clamp(-1, 1)
        if found.dim() == 2:
            return found[None] if grey else found.repeat(3, 1, 1)
        return found.permute(2, 0, 1).contiguous()

    def _mind_range(self, arrays: Tensor) -> None:
        """Say so where a whole set uses a small part of the range of pixels, which is most likely of another range."""
        low, high = ((float(value) + 1) * 127.5 for value in (arrays.min(), arrays.max()))
        if high - low < LEAST_SPAN:
            log.warning(
                "%s: all pixels lie between %.4g and %.4g of 0 to 255, which becomes -1 to 1; expected most of that "
                "range: save the images with their largest value as 255", self.path, low, high,
            )  # fmt: skip


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
