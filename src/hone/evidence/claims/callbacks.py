"""Claims about what happens beside the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hone.evidence.claims.base import Check, Side, Trial, claim
from hone.evidence.claims.tasks import SMALL_BATCHES, SMALL_RATES

CONSTANT = {**SMALL_BATCHES, "schedule": {"name": "constant", "warmup": 0.1}}
# 60 problems, read some 12 times over: the held-out loss turns up long before the end.
OVERFIT: dict[str, Any] = {**CONSTANT, "data": {**SMALL_BATCHES["data"], "count": 60}, "eval_every": 10}


@claim("callback", "average", "better-than-last")
def average_better_than_last(scratch: Path) -> Trial:
    """A running mean of the weights is better than the last weights.

    Task: the shipped model learns to sort short lists in 100 small steps at a constant rate, each side at its best of
    four learning rates; the mean is over the last ten steps or so.

    Finding: lower at every rate that was tried, by more where the rate is larger; both sides do best at 5e-4, the
    smallest.
    """
    return Trial(
        recipe=CONSTANT, baseline=Side(label="last weights", settings={}), tune={"optimizer.lr": SMALL_RATES},
        method=Side(label="mean of weights", settings={"callbacks": [{"name": "average", "decay": 0.9}]}),
        paper=(
            "Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep "
            "learning results",
            "arXiv:1703.01780",
        ),
        checks=(Check(metric="loss", direction="lower", effect=0.01),),
    )  # fmt: skip


@claim("callback", "early_stop", "saves-steps")
def early_stop_saves_steps(scratch: Path) -> Trial:
    """Stopping when the held-out loss no longer falls takes fewer steps and ends lower.

    Task: the shipped model reads 60 sorting problems some 12 times over, evaluated every ten of 100 steps.

    Finding: it stops after 60 to 80 of the 100 steps, and ends neither lower nor higher: at this rate the held-out
    loss of the model that learns its 60 problems by heart levels out rather than turns up.
    """
    return Trial(
        recipe=OVERFIT, baseline=Side(label="all steps", settings={}),
        method=Side(label="early stop", settings={"callbacks": [{"name": "early_stop", "patience": 2}]}),
        checks=(
            Check(metric="steps", direction="lower", effect=10),
            Check(metric="loss", direction="lower", effect=0.05),
        ),
    )  # fmt: skip
