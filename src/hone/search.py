"""`hone find`: what in the catalogue serves a need that is put in words, ranked by BM25."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hone.catalogue import Entry, entries

# How often the words of a field count: what a part is called and claims says more of it than its options do.
WEIGHTS = {"name": 6, "summary": 4, "papers": 3, "claims": 3, "options": 1, "body": 1}


@dataclass(frozen=True)
class Match:
    """An entry that answers a need.

    Args:
        entry: the part or the recipe.
        score: how well it matches; comparable within one search.
        sentence: its sentence that matches best.
    """

    entry: Entry
    score: float
    sentence: str

    def plain(self) -> dict[str, Any]:
        """Return the match as `hone find --json` prints it."""
        e = self.entry
        about = {"kind": e.kind, "name": e.name, "summary": e.summary, "verdict": e.verdict}
        return {**about, "score": round(self.score, 3), "match": self.sentence}


def find(need: str, limit: int = 10) -> list[Match]:
    """Return what serves a need best, ranked by BM25 over all that the catalogue says, the best first.

    Args:
        need: words, e.g. "use less memory in the optimizer".
        limit: most entries to return.
    """
    everything = entries()
    fields, stems, known, ranking = _index(tuple(everything))
    asked = list(dict.fromkeys(_Stems([need]).of(need)))
    if not any(known[stem] for stem in asked):
        return []
    scores = ranking.get_scores([stem for stem in asked if known[stem]])
    best = sorted(range(len(scores)), key=lambda i: -scores[i])[:limit]
    rarity = {stem: 1 / known[stem] for stem in asked if known[stem]}
    return [Match(everything[i], float(scores[i]), _sentence(fields[i], stems, rarity)) for i in best if scores[i] > 0]


@lru_cache(maxsize=1)
def _index(everything: tuple[Entry, ...]) -> tuple[list[dict[str, list[str]]], _Stems, Counter[str], Any]:
    """Return the sentences of all entries, their stems, in how many entries each stands, and what ranks them."""
    import bm25s  # type: ignore[import-untyped]  # takes a third of a second, as scipy comes with it

    fields = [_fields(entry) for entry in everything]
    stems = _Stems(text for entry in fields for texts in entry.values() for text in texts)
    documents = [
        [stem for field, texts in entry.items() for text in texts for stem in stems.of(text) * WEIGHTS[field]]
        for entry in fields
    ]
    ranking = bm25s.BM25()
    ranking.index(documents, show_progress=False)
    return fields, stems, Counter(stem for document in documents for stem in set(document)), ranking


def suggestions(need: str) -> list[str]:
    """Return the names that words of a search that found nothing resemble, the nearest first."""
    names = sorted({entry.name for entry in entries()})
    words = [word for word in re.split(r"[^\w:]+", need.lower()) if len(word) > 3]  # "the" is near "fthss"
    return list(dict.fromkeys(n for word in words for n in difflib.get_close_matches(word, names, n=2, cutoff=0.5)))


def _fields(e: Entry) -> dict[str, list[str]]:
    """Return the sentences of an entry by field."""
    recipe = e.kind == "recipe"
    return {
        "summary": [e.summary],
        "claims": _sentences(e.claim) + [s for v in e.evidence for s in (v.says, *_sentences(v.finding))],
        "name": [f"{e.kind} {e.name}"],
        "papers": [title for title, _ in e.papers],
        "body": _sentences(" ".join(re.findall(r"#(.*)", e.body))) if recipe else _sentences(e.prose),
        "options": [f"{o.name}: {o.doc}" for o in e.options],
    }


def _sentences(text: str) -> list[str]:
    """Return the sentences of a text on one line each; paragraphs end sentences too."""
    return [" ".join(s.split()) for s in re.split(r"(?<=[.;:!?])\s+(?=[A-Z])|\n\s*\n", text) if s.strip()]


class _Stems:
    """The stems of the words in some texts, stop words left out."""

    def __init__(self, texts: Iterable[str]) -> None:
        import snowballstemmer  # type: ignore[import-untyped]
        from bm25s.stopwords import STOPWORDS_EN_PLUS  # type: ignore[import-untyped]

        self._words = {text: re.findall(r"[a-z0-9]{2,}", text.lower()) for text in texts}
        words = sorted({word for found in self._words.values() for word in found} - set(STOPWORDS_EN_PLUS))
        self._stems = dict(zip(words, snowballstemmer.stemmer("english").stemWords(words), strict=True))

    def of(self, text: str) -> list[str]:
        """Return the stems of one of the texts, in order."""
        return [self._stems[word] for word in self._words[text] if word in self._stems]


def _sentence(fields: dict[str, list[str]], stems: _Stems, rarity: dict[str, float]) -> str:
    """Return the sentence that holds most of what was asked, rare words before common ones; the first of equals."""

    def worth(text: str) -> float:
        return sum(rarity.get(stem, 0.0) for stem in set(stems.of(text)))

    return max((text for field, texts in fields.items() if field != "name" for text in texts), key=worth)
