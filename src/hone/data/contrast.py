"""Data that tests and trains the consistency of reward models: prompts nearly alike, and answers reworded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from hone.data.derived import Derived, plain_pair
from hone.data.sample import Sample
from hone.data.source import Split
from hone.errors import DataError
from hone.parts import part

BLOCK = 256  # prompts that are compared with all others at once
SYNONYMS = {
    "answer:": ["result:", "so:", "the answer is"], "=": [" = ", " is "], "+": [" + ", " plus "],
    "-": [" - ", " minus "],
}  # fmt: skip
Share = Annotated[float, Field(ge=0, le=1)]


def character_vectors(texts: Sequence[str], size: int = 3, width: int = 2048) -> np.ndarray:
    """Return unit vectors (n, width) of texts: how often each run of characters occurs, hashed.

    Args:
        texts: what is compared.
        size: longest run of characters; shorter ones count too.
        width: numbers of a vector.
    """
    vectors = np.zeros((len(texts), width), np.float32)
    for row, text in enumerate(texts):
        codes = np.array([ord(letter) for letter in text], np.int64)
        keys = np.zeros(len(codes), np.int64)
        for length in range(min(size, len(codes))):
            keys = keys[: len(codes) - length] * 8191 + codes[length:] + 1
            np.add.at(vectors[row], keys % 2147483647 % width, 1.0)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def hull(points: np.ndarray) -> list[int]:
    """Return the indices of the corners of the convex hull of points (n, 2), both ends where they lie on a line.

    Args:
        points: (n, 2), at least one.
    """
    order = sorted(range(len(points)), key=lambda at: (points[at, 0], points[at, 1]))

    def half(places: Sequence[int]) -> list[int]:
        corners: list[int] = []
        for at in places:
            while len(corners) > 1:
                first, second = points[corners[-1]] - points[corners[-2]], points[at] - points[corners[-2]]
                if first[0] * second[1] - first[1] * second[0] > 1e-12:
                    break
                corners.pop()
            corners.append(at)
        return corners[:-1]

    return sorted({*half(order), *half(order[::-1])}) or [0]


def extremes(texts: Sequence[str]) -> list[int]:
    """Return which texts are corners of the convex hull of all, in the plane of their two principal components.

    Args:
        texts: at least one.
    """
    vectors = character_vectors(texts)
    centred = vectors - vectors.mean(0)
    _, _, axes = np.linalg.svd(centred, full_matrices=False)
    return hull((centred @ axes[:2].T).astype(np.float64)) if len(axes) > 1 else list(range(len(texts)))


@part(
    "data",
    "contrast",
    papers=[("The Trickle-down Impact of Reward (In-)consistency on RLHF", "arXiv:2309.16155")],
    claim="Reward models that rank well fail badly on instructions that are nearly alike and have different answers, "
    "where people do not.",
    deviations="Prompts are compared by the runs of characters they share, in place of SimCSE; the band of "
    "similarities is the paper's.",
)
@dataclass(kw_only=True)
class Contrast(Derived):
    """Contrast instructions: pair nearly equal prompts whose answers differ, and cross their answers.

    responses: x_i: y_i preferred to y_j;  instructions: y_i behind x_i preferred to y_i behind x_j

    x_j is the prompt most similar to x_i within the band. Used as `eval_data` of a reward model, the figure
    "pair_accuracy" is its consistency; used as `data`, it trains it.

    Args:
        make: what is crossed: responses or instructions.
        low: least cosine of two prompts' character counts.
        high: largest.
    """

    make: Literal["responses", "instructions"] = "responses"
    low: Share = 0.75
    high: Share = 0.9

    def changed(self, samples: Iterator[Sample], split: Split) -> Iterator[Sample]:
        """Yield the crossed pairs.

        Args:
            samples: prompts with answers.
            split: "train" or "eval".

        Raises:
            DataError: there are none within the band.
        """
        whole = list(samples)
        pairs = [plain_pair(sample, "contrast") for sample in whole]
        partners = self.partners(pairs)
        if whole and all(partner is None for partner in partners):
            raise DataError(
                f"{self.describe()}: no two prompts are between {self.low} and {self.high} alike and have different "
                "answers; widen the band with low and high"
            )
        for sample, (prompt, answer), partner in zip(whole, pairs, partners, strict=True):
            if partner is None:
                continue
            other, rival = pairs[partner]
            if self.make == "responses":
                yield replace(sample, kind="pair", answers=(answer, rival))
            else:
                yield replace(sample, kind="pair", prompt="", answers=(f"{prompt}{answer}", f"{other}{answer}"))

    def partners(self, pairs: Sequence[tuple[str, str]]) -> list[int | None]:
        """Return for each (prompt, answer) the number of the most similar one in the band, None without any.

        Args:
            pairs: prompts with their answers.
        """
        vectors = character_vectors([prompt for prompt, _ in pairs])
        answers = np.unique([answer for _, answer in pairs], return_inverse=True)[1]
        found: list[int | None] = []
        for begin in range(0, len(pairs), BLOCK):
            alike = vectors[begin : begin + BLOCK] @ vectors.T
            same = answers[begin : begin + BLOCK, None] == answers[None]
            alike[(alike < self.low) | (alike > self.high) | same] = -1.0
            best = alike.argmax(1)
            found += [int(at) if row[at] >= 0 else None for at, row in zip(best, alike, strict=True)]
        return found

    def describe(self) -> str:
        """Return whose prompts are set against each other."""
        return f"contrasts ({self.make}) of {self.of.describe()}"


@part(
    "data",
    "convex-augmented",
    papers=[("The Trickle-down Impact of Reward (In-)consistency on RLHF", "arXiv:2309.16155")],
    claim="Training a reward model on the most different rewordings of preferred answers makes it more consistent.",
    deviations="Checked against the authors' code: rewordings, two principal components of their embeddings, the "
    "corners of the convex hull. Words are replaced from a table in place of WordNet, and counts of characters stand "
    "for SimCSE's embeddings. The original pair is kept beside them.",
)
@dataclass(kw_only=True)
class ConvexAugmented(Derived):
    """ConvexDA: add rewordings of the preferred answers of pairs, those at the corners of the convex hull of all.

    Args:
        synonyms: what may stand in place of a text.
        rewordings: how many are drawn for each answer.
        rate: probability with which a text that has synonyms is replaced, at each of its places.
        seed: the rewordings are drawn from it.
    """

    synonyms: dict[str, list[str]] = field(default_factory=lambda: {key: list(word) for key, word in SYNONYMS.items()})
    rewordings: Annotated[int, Field(ge=1)] = 5
    rate: Share = 0.5
    seed: int = 0

    def changed(self, samples: Iterator[Sample], split: Split) -> Iterator[Sample]:
        """Yield the pairs, each followed by those with its reworded answers; held-out ones as they are.

        Args:
            samples: pairs in plain text.
            split: "train" or "eval".

        Raises:
            DataError: a sample is no pair in plain text.
        """
        for number, sample in enumerate(samples):
            if sample.kind != "pair" or not isinstance(sample.answers[0], str):
                raise DataError(f"{sample.where}: convex-augmented needs pairs in plain text, found {sample.kind}")
            yield sample
            if split == "train":
                rng = Random(f"{self.seed}:{number}")
                chosen, rejected = sample.answers
                texts = list(dict.fromkeys(self.reworded(str(chosen), rng) for _ in range(self.rewordings)))
                kept = [texts[at] for at in extremes(texts)]
                yield from (replace(sample, answers=(text, rejected)) for text in kept if text != chosen)

    def reworded(self, text: str, rng: Random) -> str:
        """Return a text with some of its words replaced.

        Args:
            text: the answer.
            rng: source of randomness.
        """
        for word, others in self.synonyms.items():
            first, *rest = text.split(word)
            for part_of in rest:
                drawn = others[int(rng.random() * len(others))] if others and rng.random() < self.rate else word
                first += drawn + part_of
            text = first
        return text

    def describe(self) -> str:
        """Return whose answers are reworded."""
        return f"{self.of.describe()}, with rewordings"
