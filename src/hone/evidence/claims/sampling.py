"""Claims about how tokens are picked, and about the metric that judges what comes out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hone.evidence.claims.base import Check, Side, Trial, claim
from hone.evidence.claims.tasks import ANSWERS

GREEDY = Side(label="greedy", settings={"sampler": "greedy"})
# The shipped model as it is (one step at a rate of nothing) writes docstrings to held-out functions.
WRITING: dict[str, Any] = {
    "name": "writing", "model": "base", "data": {"name": "pydocs", "task": "docstring"}, "adapter": "full",
    "objective": "sft", "optimizer": {"name": "sgd", "lr": 1e-9, "momentum": 0.0}, "schedule": "constant", "steps": 1,
    "batch_tokens": 1024, "eval_samples": 30, "max_new_tokens": 96,
}  # fmt: skip


def repetition(run: Path) -> dict[str, float]:
    """Return the share of 4-grams of characters' words in the last answers that came before in the same answer.

    Args:
        run: a run folder.
    """
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    repeated = total = 0
    for row in (row for row in rows if row["step"] == rows[-1]["step"]):
        words = row["answer"].split()
        grams = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
        repeated, total = repeated + len(grams) - len(set(grams)), total + len(grams)
    return {"repetition": repeated / total if total else 0.0}


@claim("sampler", "greedy", "more-accurate")
def greedy_more_accurate(scratch: Path) -> Trial:
    """Where one answer is right, the most probable token is right more often than a drawn one.

    Task: the shipped model after 60 steps of sorting short lists; the accuracy of answers, drawn at temperature 1 or
    not.
    """
    return Trial(
        recipe=ANSWERS, baseline=Side(label="drawn", settings={"sampler": {"name": "sample", "temperature": 1.0}}),
        method=GREEDY, metric="accuracy", checks=(Check(metric="accuracy", direction="higher", effect=0.02),),
    )  # fmt: skip


@claim("sampler", "sample", "nucleus-repeats-less")
def sample_nucleus_repeats_less(scratch: Path) -> Trial:
    """Text drawn from the nucleus (top_p 0.95) repeats itself less than greedy text.

    Task: the shipped model writes docstrings to 30 held-out functions; the share of word 4-grams that came before.

    Finding: almost half of the 4-grams of greedy text came before, none of the drawn text's. The model does not train
    here, so that the greedy side is one text for all seeds.
    """
    nucleus = {"name": "sample", "temperature": 1.0, "top_p": 0.95}
    return Trial(
        recipe=WRITING, baseline=GREEDY, method=Side(label="nucleus 0.95", settings={"sampler": nucleus}),
        figures=repetition, paper=("The Curious Case of Neural Text Degeneration", "arXiv:1904.09751"),
        checks=(Check(metric="repetition", direction="lower", effect=0.05),),
    )  # fmt: skip


@claim("metric", "accuracy", "rises-as-loss-falls")
def accuracy_rises_as_loss_falls(scratch: Path) -> Trial:
    """The accuracy of generated answers rises where the held-out loss falls.

    Task: the shipped model after 30 and after 60 steps of sorting short lists.
    """
    return Trial(
        recipe=ANSWERS, baseline=Side(label="30 steps", settings={"steps": 30}),
        method=Side(label="60 steps", settings={"steps": 60}), metric="accuracy",
        checks=(
            Check(metric="loss", direction="lower", effect=0.01),
            Check(metric="accuracy", direction="higher", effect=0.05),
        ),
    )  # fmt: skip
