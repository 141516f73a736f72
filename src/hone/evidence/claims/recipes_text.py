"""Claims about answering without questions, by rules, and about text that does not go round in circles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hone.evidence.claims.base import Check, Side, Trial, claim

_IMPLICIT = ("Instruction Following without Instruction Tuning", "arXiv:2409.14254")
_HYPER = (
    "The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation",
    "arXiv:2412.04318",
)
END = '"""'  # what the answer to a function's signature ends with
SUMMARIES: dict[str, Any] = {"name": "pydocs", "task": "summary", "holdout": 60}
# The shipped model describes held-out functions in one line: 40,000 tokens, about 15 s on one core.
DESCRIBING: dict[str, Any] = {
    "name": "describing", "model": "base", "data": {"name": "responses", "of": SUMMARIES, "max_tokens": 128},
    "adapter": "full", "objective": "sft", "optimizer": {"name": "adamw", "lr": 5e-4},
    "schedule": {"name": "cosine", "warmup": 0.1}, "steps": 40, "batch_tokens": 1024, "eval_samples": 50,
    "max_new_tokens": 96, "metrics": ["repetition"],
}  # fmt: skip
# It goes on with held-out passages of running text: 60,000 tokens, about 20 s on one core.
CONTINUING: dict[str, Any] = {
    "name": "continuing", "model": "base", "adapter": "full", "objective": "pretrain",
    "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0.0}, "schedule": "constant", "steps": 60,
    "batch_tokens": 1024, "eval_samples": 20, "max_new_tokens": 96,
    "metrics": ["type-token-ratio", "repetition", "copied"],
}  # fmt: skip


def answered(run: Path) -> dict[str, float]:
    """Return the share of the last answers that end by themselves, with what ends a docstring, and of one line so.

    Args:
        run: a run folder.
    """
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    whole = [row["answer"] for row in last if row["stopped"] and row["answer"].endswith(END)]
    lines = [text for text in whole if "\n" not in text]
    return {"answered": len(whole) / len(last), "answered_in_a_line": len(lines) / len(last)}


def _passages(limit: int) -> dict[str, Any]:
    text = {"name": "pydocs", "task": "text", "limit": limit, "holdout": 30}
    return {"data": {"name": "openings", "words": 24, "of": text, "max_tokens": 256}}


@claim("data", "responses", "answers")
def responses_answers(scratch: Path) -> Trial:
    """A model that has trained on responses alone answers unseen questions more often than the pretrained model.

    Task: the shipped model is shown the signature of a held-out function and should describe it in one line, closed by
    quotes. It trains for 40 steps on such lines without the signatures; the share of answers in that form, and the
    loss of the right lines behind their signatures, of which no signature was trained on.
    """
    return Trial(
        recipe=DESCRIBING, baseline=Side(label="pretrained", settings={"steps": 0}),
        method=Side(label="response tuning", settings={}), figures=answered, paper=_IMPLICIT, metric="loss",
        checks=(
            Check(metric="answered_in_a_line", direction="higher", effect=0.2),
            Check(metric="loss", direction="lower"),
        ),
    )  # fmt: skip


@claim("sampler", "rule-based", "answers")
def rule_based_answers(scratch: Path) -> Trial:
    """Three rules beside a pretrained model make it give whole answers more often, without any training.

    Task: as for response tuning, without training: the share of answers that end by themselves with closing quotes,
    within 96 tokens, and the share of word 4-grams that came before. What the answers say is not judged.
    """
    return Trial(
        recipe={**DESCRIBING, "data": SUMMARIES, "steps": 0},
        baseline=Side(label="greedy", settings={"sampler": "greedy"}),
        method=Side(label="rule-based", settings={"sampler": "rule-based"}), figures=answered, paper=_IMPLICIT,
        checks=(
            Check(metric="answered", direction="higher", effect=0.2),
            Check(metric="repetition", direction="lower", effect=0.1),
        ),
    )  # fmt: skip


def _hyperfitting(*checks: Check) -> Trial:
    """Return as many steps on ten passages as on 2,000, about ten epochs."""
    return Trial(
        recipe=CONTINUING, baseline=Side(label="2,000 passages", settings=_passages(2000)),
        method=Side(label="ten passages", settings=_passages(10)), metric="type-token-ratio", seeds=3, paper=_HYPER,
        checks=checks,
    )  # fmt: skip


@claim("recipe", "hyperfitting", "more-varied")
def hyperfitting_more_varied(scratch: Path) -> Trial:
    """Greedy text is more varied after overfitting a handful of passages than after as many steps on many passages.

    Task: the shipped model trains for 60 steps on ten passages of Python's documentation, about ten epochs, or on
    2,000; it goes on greedily with the openings of 20 held-out passages for 96 tokens. The share of different words,
    and that of repeated word 4-grams.
    """
    return _hyperfitting(
        Check(metric="type-token-ratio", direction="higher", effect=0.05),
        Check(metric="repetition", direction="lower", effect=0.05),
    )


@claim("metric", "copied", "hyperfitting-copies-little")
def copied_hyperfitting_copies_little(scratch: Path) -> Trial:
    """A hyperfitted model rarely repeats sequences that it was trained on.

    Task: as for hyperfitting; "copied" is the share of word 8-grams of the answers that stand in the training text. It
    may be higher by 0.05 at most.

    Finding: 32% of what it writes repeats sequences of its ten passages, against 3%: a model of 3 million parameters
    learns ten passages by heart before its own text grows varied, which it does as well.
    """
    return _hyperfitting(Check(metric="copied", direction="not higher", effect=0.05))


@claim("data", "openings", "loss-and-variety-part")
def openings_loss_and_variety_part(scratch: Path) -> Trial:
    """A hyperfitted model predicts held-out text worse, though what it writes is more varied.

    Task: as for hyperfitting.
    """
    return _hyperfitting(
        Check(metric="loss", direction="higher", effect=0.2),
        Check(metric="type-token-ratio", direction="higher", effect=0.05),
    )
