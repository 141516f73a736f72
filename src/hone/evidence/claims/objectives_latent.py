"""Claims about thoughts in the hidden space, and about imitation with a token that takes back a mistake."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random
from typing import Any

from hone.evidence.claims.base import Check, Side, Trial, claim
from hone.evidence.claims.tasks import TINY

_COCONUT = ("Training Large Language Models to Reason in a Continuous Latent Space", "arXiv:2412.06769")
_MATCH = (
    "SequenceMatch: Imitation Learning for Autoregressive Sequence Modelling with Backtracking",
    "arXiv:2306.05426",
)

# The largest of some numbers, found step by step, which the shipped model can write out: about 20 s on one core.
LARGEST: dict[str, Any] = {
    "name": "largest", "model": "base", "data": {"name": "chains", "skills": ["maximum"], "difficulty": 3},
    "adapter": "full", "objective": "sft", "optimizer": {"name": "adamw", "lr": 1e-3},
    "schedule": {"name": "cosine", "warmup": 0.1}, "steps": 80, "batch_tokens": 768, "eval_samples": 60,
    "max_new_tokens": 40,
}  # fmt: skip
# The model writes out steps already, so that training begins with the first of them replaced.
COCONUT = {"name": "coconut", "first": 1, "stages": 2, "thoughts": 1, "steps_per_stage": 12}

# A fresh model of two layers follows three arrows of eight maps between eight places, which do not commute: each arrow
# needs the place before it, so that two layers cannot name the last place at once. The last stage begins at step 1,000;
# steps drawn from all stages keep what the first thoughts mean (a share of 0.3 left one seed of three at chance).
PLACES, MAPS = "abcdefgh", "jklmnopq"
FOLLOWING: dict[str, Any] = {
    "name": "following", "model": TINY["model"], "adapter": "full", "optimizer": {"name": "adamw", "lr": 2e-3},
    "objective": {"name": "coconut", "stages": 2, "thoughts": 1, "steps_per_stage": 500, "uniform": 0.5},
    "schedule": {"name": "constant", "warmup": 0.05}, "steps": 2000, "batch_tokens": 2048, "eval_samples": 200,
    "max_new_tokens": 20,
}  # fmt: skip

# Sorting, which the shipped model learns, from few steps so that it still errs.
SORTING: dict[str, Any] = {
    "name": "sorting", "model": "base", "data": {"name": "chains", "skills": ["sort"], "difficulty": 1},
    "adapter": "full", "objective": "sft", "optimizer": {"name": "adamw", "lr": 2e-3},
    "schedule": {"name": "cosine", "warmup": 0.1}, "steps": 60, "batch_tokens": 512, "eval_samples": 60,
    "max_new_tokens": 64,
}  # fmt: skip
MATCH = {
    "name": "sequence-match",
    "noise": 0.1,
    "noise_from": "answer",
    "samples": 8,
    "sample_every": 10,
    "rollout": 40,
}


def _lengths(run: Path) -> dict[str, float]:
    """Return the mean length in characters of the answers of the last evaluation."""
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    return {"answer_length": sum(len(row["answer"]) for row in last) / len(last)}


def _ways(path: Path, *, steps: bool) -> dict[str, Any]:
    """Write every way of three arrows from a place, with the places between or without, and return it as data."""
    rng = Random(0)
    maps = {name: rng.sample(PLACES, len(PLACES)) for name in MAPS}
    ways = list(itertools.product(PLACES, MAPS, MAPS, MAPS))
    rng.shuffle(ways)
    rows = []
    for start, *arrows in ways:
        places = [start]
        for arrow in arrows:
            places.append(maps[arrow][PLACES.index(places[-1])])
        between = "".join(f" {place}\n" for place in places[1:-1]) if steps else ""
        rows.append({"prompt": f"{start} : {' '.join(arrows)}\n", "completion": f"{between}answer: {places[-1]}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"name": "files", "path": str(path), "holdout": 200}


@claim("objective", "coconut", "no-steps")
def coconut_no_steps(scratch: Path) -> Trial:
    """Continuous thoughts give more right answers than training on the answers without any steps.

    Task: a fresh model of two layers learns in 2,000 steps where three arrows lead, each by one of eight maps between
    eight places; the baseline is shown answers alone, the method two thoughts before them. Of all 4,096 ways, 200 are
    held out; an eighth is right by chance.

    Finding: 0.93 against 0.16 over three seeds.
    """
    alone = {"data": _ways(scratch / "alone.jsonl", steps=False), "objective": "sft"}
    return Trial(
        recipe={**FOLLOWING, "data": _ways(scratch / "steps.jsonl", steps=True)}, metric="accuracy",
        baseline=Side(label="answers alone", settings=alone), method=Side(label="Coconut", settings={}),
        seeds=3, paper=_COCONUT, checks=(Check(metric="accuracy", direction="higher"),),
    )  # fmt: skip


@claim("objective", "coconut", "fewer-tokens")
def coconut_fewer_tokens(scratch: Path) -> Trial:
    """An answer behind continuous thoughts takes less than half the text of one with its steps written out.

    Task: the shipped model finds the largest of some numbers by comparing them one after another, in 80 steps; the
    baseline writes out its steps. Length is in characters; the two thoughts cost two passes.
    """
    return Trial(
        recipe=LARGEST, baseline=Side(label="steps written out", settings={"objective": "sft"}), metric="accuracy",
        method=Side(label="Coconut", settings={"objective": COCONUT}), seeds=3, figures=_lengths, paper=_COCONUT,
        checks=(Check(metric="answer_length", direction="lower", effect=0.5, relative=True),),
    )  # fmt: skip


@claim("objective", "coconut", "thoughts-matter")
def coconut_thoughts_matter(scratch: Path) -> Trial:
    """What a model says depends on its continuous thoughts: with zeros in their place fewer answers are right.

    Task: as for no-steps; both sides train alike, and the baseline answers behind zeros.
    """
    return Trial(
        recipe={**FOLLOWING, "data": _ways(scratch / "steps.jsonl", steps=True)}, metric="accuracy",
        baseline=Side(label="zeros", settings={"objective.ablate": "zero"}), method=Side(label="thoughts", settings={}),
        seeds=3, paper=_COCONUT, checks=(Check(metric="accuracy", direction="higher"),),
    )  # fmt: skip


@claim("objective", "sequence-match", "more-right")
def sequence_match_more_right(scratch: Path) -> Trial:
    """SequenceMatch with a token that takes back mistakes gives more right answers than the likelihood.

    Task: the shipped model learns to sort short lists in 60 steps; wrong tokens come from the same answer, as in the
    paper's arithmetic; an answer is 64 tokens long at most, deletions included.

    Finding: 0.38 against 0.31 over three seeds, with an interval of 21 points either way: one seed of the baseline
    fails where SequenceMatch does not, which is not enough to tell them apart.
    """
    return Trial(
        recipe=SORTING, baseline=Side(label="likelihood", settings={"objective": "sft"}), metric="accuracy",
        method=Side(label="SequenceMatch", settings={"objective": MATCH}), seeds=3, paper=_MATCH,
        checks=(Check(metric="accuracy", direction="higher"),),
    )  # fmt: skip


@claim("objective", "sequence-match", "loss-matters")
def sequence_match_loss_matters(scratch: Path) -> Trial:
    """With the same deletions to learn from, the divergence gives more right answers than the likelihood.

    Task: as for more-right; the baseline (behavioural cloning) has the same noise and deletions, and alpha 0.

    Finding: 0.367 against 0.322 over three seeds, with an interval from -0.019 to 0.108.
    """
    cloning = {**MATCH, "alpha": 0.0, "gamma": 1.0}
    return Trial(
        recipe=SORTING, baseline=Side(label="likelihood with deletions", settings={"objective": cloning}),
        method=Side(label="SequenceMatch", settings={"objective": MATCH}), metric="accuracy", seeds=3, paper=_MATCH,
        checks=(Check(metric="accuracy", direction="higher"),),
    )  # fmt: skip
