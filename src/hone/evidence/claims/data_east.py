"""Claims about learning when to read and when to write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hone.evidence.claims.base import Check, Side, Trial, claim

_EAST = (
    "LLMs Can Achieve High-quality Simultaneous Machine Translation as Efficiently as Offline",
    "arXiv:2504.09570",
)
_STACL = (
    "STACL: Simultaneous Translation with Implicit Anticipation and Controllable Latency using "
    "Prefix-to-Prefix Framework",
    "arXiv:1810.08398",
)
# The shipped model interprets sentences of three clauses of one to four words: 60,000 tokens, about 15 s on one core.
STREAM: dict[str, Any] = {"name": "east", "of": {"name": "clauses", "holdout": 60}, "latencies": {"low": 1}}
INTERPRETING: dict[str, Any] = {
    "name": "interpreting", "model": "base", "data": STREAM, "adapter": "full", "objective": "east",
    "optimizer": {"name": "adamw", "lr": 2e-3}, "schedule": {"name": "cosine", "warmup": 0.1}, "steps": 60,
    "batch_tokens": 1024, "eval_samples": 50, "max_new_tokens": 120,
    "metrics": ["accuracy", "word-accuracy", "average-lagging"],
}  # fmt: skip
LEARNED = Side(label="learned", settings={"data": STREAM})


def _waiting(words: int) -> Side:
    return Side(label=f"wait-{words}", settings={"data": {**STREAM, "wait": words}})


def _against(baseline: Side) -> Trial:
    return Trial(
        recipe=INTERPRETING, baseline=baseline, method=LEARNED, metric="word-accuracy", seeds=3, paper=_EAST,
        checks=(
            Check(metric="word-accuracy", direction="higher", effect=0.05),
            Check(metric="average-lagging", direction="not higher", effect=0.25),
        ),
    )  # fmt: skip


@claim("objective", "east", "better-at-equal-lag")
def east_better_at_equal_lag(scratch: Path) -> Trial:
    """A policy that was learned with the translation gets more words right than wait-k does at the same lag.

    Task: the shipped model interprets sentences of three clauses, whose last words say how all their words are
    translated, after 60 steps of either kind of stream. The baseline is wait-2, whose lag is the same: two words.
    """
    return _against(_waiting(2))


@claim("data", "east", "better-than-waiting-longer")
def east_better_than_waiting_longer(scratch: Path) -> Trial:
    """Chunks from an alignment teach a translation that wait-k does not reach by waiting a word longer.

    Task: as for the objective; the baseline is wait-3.
    """
    return _against(_waiting(3))


@claim("metric", "average-lagging", "is-k")
def average_lagging_is_k(scratch: Path) -> Trial:
    """The lag of wait-k grows with k, by about a word for each.

    Task: as for the objective; wait-3 against wait-2, whose sources and targets are equally long.
    """
    return Trial(
        recipe=INTERPRETING, baseline=_waiting(2), method=_waiting(3), seeds=3, paper=_STACL,
        checks=(Check(metric="average-lagging", direction="higher", effect=0.5),),
    )  # fmt: skip
