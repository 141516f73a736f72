"""Simultaneous generation: the source comes word by word as the model asks for it, between what the model writes.

A stream is chunk of source, marker, chunk of target, marker, and so on. Reading is forced, writing is picked: both are
tokens of one generation, so that the model computes every token once and keeps its keys, as in any other generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hone.errors import ModelError
from hone.samplers.text import greedy, pick
from hone.text.generate import Generation, History, generate

if TYPE_CHECKING:
    from hone.text.model import LanguageModel


class Place(NamedTuple):
    """Where a stream stands.

    Args:
        writing: whether a chunk of target is being written, else of source read.
        read: whole source words read.
        inside: tokens of the next word that were read already.
        words: whole source words of this chunk.
        tokens: tokens written in this chunk.
        chunks: finished chunks.
    """

    writing: bool = False
    read: int = 0
    inside: int = 0
    words: int = 0
    tokens: int = 0
    chunks: int = 0


@dataclass(frozen=True, kw_only=True)
class Interpreter:
    """A sampler that reads and writes in turns; which it does follows from what a row has drawn and nothing else.

    A chunk of source has a word at least. Behind each word the model picks: the marker `end_read`, which ends the
    chunk, or anything else, for which the next word is read. With `wait`, chunk i is written when `wait` + i words have
    been read. At the end of the source the last chunk is written, and then the answer ends. A token that ends an answer
    ends a chunk of target, as does one of `longest` tokens.

    Args:
        sources: per prompt the token ids of each word of its source.
        end_read: id of the marker behind a chunk of source.
        end_write: id of the marker behind a chunk of target.
        wait: source words read before the first word is written; None lets the model decide.
        longest: most tokens of a chunk of target.
        then: sampler that picks tokens.
    """

    looks_back: ClassVar[bool] = True
    sources: Sequence[Sequence[Sequence[int]]]
    end_read: int
    end_write: int
    wait: int | None = None
    longest: int = 64
    then: Any = greedy

    def __call__(self, logits: Tensor, uniforms: Tensor, history: History) -> Tensor:
        """Return (N,) token ids for (N, V) `logits`: what is read by force, or picked from what may come.

        Args:
            logits: (N, V) scores of the next token.
            uniforms: (N,) numbers in [0, 1).
            history: what each row has drawn, and which prompt it answers.
        """
        sources = [self.sources[which] for which in history.which]
        places = [self.place(row, source) for row, source in zip(history.tokens, sources, strict=True)]
        scores = logits.clone()
        writing = torch.tensor([place.writing for place in places], device=logits.device)
        ends = torch.from_numpy(history.stop).to(logits.device)
        scores[writing, self.end_read] = float("-inf")
        scores[~writing, self.end_write] = float("-inf")
        scores[~writing] = scores[~writing].index_fill(1, ends, float("-inf"))
        picked = pick(self.then, scores, uniforms, history)
        ids = [
            self._next(place, source, int(token), history.stop)
            for place, source, token in zip(places, sources, picked.tolist(), strict=True)
        ]
        return torch.tensor(ids, device=logits.device)

    def _next(self, place: Place, source: Sequence[Sequence[int]], picked: int, stop: np.ndarray) -> int:
        if place.writing:
            over = place.tokens >= self.longest or picked in stop
            return self.end_write if over else picked
        if place.inside:
            return source[place.read][place.inside]
        if place.read == len(source):
            return self.end_read if place.words else int(stop[0])
        ready = picked == self.end_read if self.wait is None else place.read >= self.wait + place.chunks
        return self.end_read if place.words and ready else source[place.read][0]

    def place(self, drawn: np.ndarray, source: Sequence[Sequence[int]]) -> Place:
        """Return where a stream stands.

        Args:
            drawn: (n,) ids of the stream so far.
            source: token ids of each word of its source.
        """
        writing, read, inside, words, tokens, chunks = Place()
        for token in drawn.tolist():
            if writing:
                done = token == self.end_write
                writing, tokens, chunks = not done, 0 if done else tokens + 1, chunks + done
                words = 0 if done else words
            elif token == self.end_read and not inside:
                writing = True
            elif read == len(source):  # it has ended, and is carried along until the others have
                break
            else:
                whole = inside + 1 == len(source[read])
                read, inside, words = read + whole, 0 if whole else inside + 1, words + whole
        return Place(writing, read, inside, words, tokens, chunks)


def interpret(
    model: LanguageModel,
    prompts: Sequence[np.ndarray],
    sources: Sequence[str],
    *,
    end_read: str,
    end_write: str,
    wait: int | None = None,
    longest: int = 64,
    **options: Any,
) -> list[list[Generation]]:
    """Translate sources simultaneously; each generation is a stream of source and target with the markers between.

    Args:
        model: the language model.
        prompts: token ids of what stands before each stream.
        sources: text to read for each prompt, word by word.
        end_read: marker behind a chunk of source.
        end_write: marker behind a chunk of target.
        wait: source words read before the first word is written, as in wait-k; None lets the model decide.
        longest: most tokens of a chunk of target.
        options: those of `hone.text.generate.generate`; `max_new_tokens` counts what is read as well.

    Raises:
        ModelError: a marker is no single token, a source has no words or contains a marker, or no token ends an answer.
    """
    read_id, write_id = (marker_id(model, mark) for mark in (end_read, end_write))
    words = []
    for text in sources:
        found = [model.renderer.piece_ids(f" {word}" if place else word) for place, word in enumerate(text.split())]
        if not found or any(mark in ids for ids in found for mark in (read_id, write_id)):
            raise ModelError(
                f"{text[:60]!r} cannot be interpreted: expected words, none of them with the markers {end_read!r} and "
                f"{end_write!r}"
            )
        words.append(found)
    if not len(options.get("stop", ())):
        raise ModelError("no token ends an answer, so that an interpreter would never come to an end; give `stop`")
    interpreter = Interpreter(
        sources=words, end_read=read_id, end_write=write_id, wait=wait, longest=longest,
        then=options.pop("sampler", greedy),
    )  # fmt: skip
    return generate(model, prompts, sampler=interpreter, **options)


def marker_id(model: LanguageModel, mark: str) -> int:
    """Return the id of a marker.

    Args:
        model: the language model.
        mark: its text.

    Raises:
        ModelError: it is not one token, or one that answers are shown without.
    """
    ids = model.renderer.piece_ids(mark)
    if len(ids) != 1 or model.renderer.decode(ids) != mark:
        raise ModelError(
            f"the marker {mark!r} is not one ordinary token of this model's tokenizer but {len(ids)}, or a special "
            "one; choose another text as end_read or end_write, one that the data lacks"
        )
    return ids[0]


def average_lagging(delays: Sequence[int], source: int, target: int) -> float:
    """Return by how many source words a translation lags behind an ideal interpreter (AL of STACL, as in SimulEval).

    AL = 1/tau sum_{i=1..tau} [d_i - (i - 1) |X| / |Y|], with tau the first i whose delay d_i is |X|, else the last one.

    Args:
        delays: for each written word, the source words read by then; not empty.
        source: |X|, words of the source.
        target: |Y|, words of the reference.
    """
    if delays[0] > source:
        return float(delays[0])
    tau = next((place + 1 for place, delay in enumerate(delays) if delay >= source), len(delays))
    return sum(delays[place] - place * source / target for place in range(tau)) / tau
