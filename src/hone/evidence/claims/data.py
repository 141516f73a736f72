"""Claims about what is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hone.evidence.claims.base import Check, Side, Trial, claim
from hone.evidence.claims.tasks import ANSWERS, GENERAL, SORT, TINY

SORTING = SORT["data"]
SHARED = {**SORT, "eval_data": SORTING}


def _rows() -> list[dict[str, str]]:
    """Return the sorting problems as rows of a file."""
    from hone.data.chains import Chains

    source = Chains(skills=["sort"], difficulty=[1, 2], count=3000)
    return [{"prompt": str(sample.prompt), "completion": str(sample.answers[0])} for sample in source.samples("train")]


def _same(path: Path, kind: str) -> Trial:
    other: dict[str, Any] = {"name": kind, "path": str(path), "holdout": 0}
    return Trial(
        recipe=SHARED, baseline=Side(label="generated", settings={"data": {**SORTING, "count": 3000}}),
        method=Side(label=kind, settings={"data": other}), seeds=3,
        checks=(Check(metric="loss", direction="same", effect=1e-6),),
    )  # fmt: skip


@claim("data", "files", "same-as-generated")
def files_same_as_generated(scratch: Path) -> Trial:
    """Rows read from a file train exactly what the source that wrote them trains.

    Task: 3,000 sorting problems, generated or read from JSON lines, in 40 steps of the shipped model; the held-out
    loss.
    """
    path = scratch / "sort.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in _rows()), encoding="utf-8")
    return _same(path, "files")


@claim("data", "hub", "same-as-generated")
def hub_same_as_generated(scratch: Path) -> Trial:
    """A folder of the datasets library trains exactly what the source that wrote it trains.

    Task: 3,000 sorting problems, generated or read from a Parquet folder, in 40 steps of the shipped model; the
    held-out loss. A folder stands in for the Hub, which the same code reads.
    """
    from datasets import Dataset

    path = scratch / "sort"
    if not path.exists():
        path.mkdir()
        Dataset.from_list(_rows()).to_parquet(str(path / "train.parquet"))
    return _same(path, "hub")


@claim("data", "mix", "replay")
def mix_replay(scratch: Path) -> Trial:
    """Mixing general text into the training data keeps the model from forgetting it.

    Task: 40 steps of sorting, alone or with one page of Python's documentation to every four problems; forgetting on
    held-out pages, and the loss on sorting, which may be higher by 0.2 at most since there is less of it.

    Finding: the model forgets 0.076 less, as claimed. Pages make up more than half of the tokens then, and the loss
    on sorting is higher by 0.19, with an interval that reaches beyond the margin. At one page to twenty problems
    there was no effect on forgetting (-0.003, -0.072 to 0.041).
    """
    pages = {"name": "pydocs", "task": "text", "max_tokens": 256}
    mixed = {"name": "mix", "sources": [SORTING, pages], "weights": [4.0, 1.0], "max_tokens": 256}
    return Trial(
        recipe=SHARED, baseline=Side(label="sorting alone", settings={"data": SORTING}),
        method=Side(label="with replay", settings={"data": mixed}),
        paper=("Experience Replay for Continual Learning", "arXiv:1811.11682"),
        checks=(
            Check(metric="forgetting", direction="lower", effect=0.02),
            Check(metric="loss", direction="not higher", effect=0.2),
        ),
    )  # fmt: skip


@claim("data", "chains", "worked-steps")
def chains_worked_steps(scratch: Path) -> Trial:
    """Answers that show their work teach a skill better than answers alone.

    Task: the shipped model learns to sort short lists in 60 steps, with or without the worked steps, at the same tokens
    (so that it sees more problems without them); the accuracy of generated answers.

    Finding: at the same tokens answers alone are right more often, by 13 points. A short list is sorted at a glance,
    and without the work twice as many lists fit into the 60,000 tokens; the claim is about problems that cannot be
    answered at once.
    """
    bare = {**ANSWERS["data"], "steps": False}
    return Trial(
        recipe=ANSWERS, baseline=Side(label="answers alone", settings={"data": bare}),
        method=Side(label="worked steps", settings={"data": ANSWERS["data"]}), metric="accuracy",
        paper=("Show Your Work: Scratchpads for Intermediate Computation with Language Models", "arXiv:2112.00114"),
        checks=(Check(metric="accuracy", direction="higher", effect=0.05),),
    )  # fmt: skip


@claim("data", "pydocs", "teaches-prose")
def pydocs_teaches_prose(scratch: Path) -> Trial:
    """Training on the documentation lowers the loss on held-out documentation more than training on problems does.

    Task: a model of 0.26M parameters from nothing, 100 steps on either; the loss on held-out pages.
    """
    pages = {"name": "pydocs", "task": "text", "max_tokens": 256}
    return Trial(
        recipe={**TINY, "general_data": GENERAL}, baseline=Side(label="problems", settings={"data": TINY["data"]}),
        method=Side(label="documentation", settings={"data": pages}), seeds=3,
        checks=(Check(metric="general_loss", direction="lower", effect=0.5),),
    )  # fmt: skip
