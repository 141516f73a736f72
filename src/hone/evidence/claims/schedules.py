"""Claims about how the learning rate changes over a run."""

from __future__ import annotations

from pathlib import Path

from hone.evidence.claims.base import Check, Side, Trial, claim
from hone.evidence.claims.tasks import SMALL_BATCHES, SMALL_RATES

COSINE = Side(label="cosine", settings={"schedule": {"name": "cosine", "warmup": 0.1}})
CONSTANT = Side(label="constant", settings={"schedule": {"name": "constant", "warmup": 0.1}})
LINEAR = Side(label="linear to zero", settings={"schedule": {"name": "linear", "warmup": 0.1}})
TUNED = {"optimizer.lr": SMALL_RATES}


@claim("schedule", "cosine", "beats-constant")
def cosine_beats_constant(scratch: Path) -> Trial:
    """Annealing the learning rate along a cosine ends lower than keeping it.

    Task: the shipped model learns to sort short lists in 100 small steps, each side at its best of four learning rates.

    Finding: the cosine ended lower by 0.011, with an interval that includes 0. What it does show is forgiveness: at
    4e-3, four times the cosine's best rate, it still reached 0.11 where the constant rate was left with 0.32.
    """
    return Trial(
        recipe=SMALL_BATCHES, baseline=CONSTANT, method=COSINE, tune=TUNED,
        paper=("SGDR: Stochastic Gradient Descent with Warm Restarts", "arXiv:1608.03983"),
        checks=(Check(metric="loss", direction="lower", effect=0.01),),
    )  # fmt: skip


@claim("schedule", "cosine", "warm-restarts")
def cosine_warm_restarts(scratch: Path) -> Trial:
    """Restarting the cosine learns faster than one cosine over the whole run.

    Task: the shipped model learns to sort short lists in 100 small steps, each side at its best of four learning
    rates; the steps are in cycles of 14, 29 and 57 of a hundred, or in one. The paper restarts to be good early,
    against decay in steps; this asks for the end of the run.

    Finding: three cycles end higher, since steps go into getting back from each restart. The paper counts how early a
    result is reached over hundreds of epochs, against decay in steps, which 100 steps do not show.
    """
    restarts = {"name": "cosine", "warmup": 0.1, "cycles": 3, "growth": 2.0}
    return Trial(
        recipe=SMALL_BATCHES, baseline=COSINE, tune=TUNED,
        method=Side(label="three cycles", settings={"schedule": restarts}),
        paper=("SGDR: Stochastic Gradient Descent with Warm Restarts", "arXiv:1608.03983"),
        checks=(Check(metric="loss", direction="lower"),),
    )  # fmt: skip


@claim("schedule", "linear", "to-zero")
def linear_to_zero(scratch: Path) -> Trial:
    """Decaying linearly to zero ends lower than decaying to a tenth of the rate.

    Task: the shipped model learns to sort short lists in 100 small steps, each side at its best of four learning rates.

    Finding: a floor of a tenth ends 0.011 lower, on every seed. The paper's gain grows with the tokens per parameter;
    here there is one token to 80 parameters, and the last steps still learn more than their noise costs.
    """
    tenth = {"name": "linear", "warmup": 0.1, "floor": 0.1}
    return Trial(
        recipe=SMALL_BATCHES, method=LINEAR, tune=TUNED,
        baseline=Side(label="linear to a tenth", settings={"schedule": tenth}),
        paper=(
            "Straight to Zero: Why Linearly Decaying the Learning Rate to Zero Works Best for LLMs",
            "arXiv:2502.15938",
        ),
        checks=(Check(metric="loss", direction="lower"),),
    )  # fmt: skip


@claim("schedule", "wsd", "matches-cosine")
def wsd_matches_cosine(scratch: Path) -> Trial:
    """A constant rate with a short decay at the end comes as far as a cosine of the same length.

    Task: the shipped model learns to sort short lists in 100 small steps, each side at its best of four learning
    rates; the loss may be higher by 0.02 at most.
    """
    return Trial(
        recipe=SMALL_BATCHES, baseline=COSINE, tune=TUNED,
        method=Side(label="warmup, stable, decay", settings={"schedule": {"name": "wsd", "warmup": 0.1}}),
        paper=("Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations", "arXiv:2405.18392"),
        checks=(Check(metric="loss", direction="not higher", effect=0.02),),
    )  # fmt: skip


@claim("schedule", "constant", "warmup")
def constant_warmup(scratch: Path) -> Trial:
    """A warmup lets a constant rate end lower than no warmup.

    Task: the shipped model learns to sort short lists in 100 small steps, each side at its best of four learning
    rates, with a warmup over a tenth of the run or none.

    Finding: a pretrained model at its best constant rate, 5e-4 and the smallest tried, needs no warmup over 100
    steps: what the first tenth loses at lower rates is about what it saves.
    """
    return Trial(
        recipe=SMALL_BATCHES,
        baseline=Side(label="no warmup", settings={"schedule": {"name": "constant", "warmup": 0.0}}),
        method=CONSTANT, tune=TUNED, checks=(Check(metric="loss", direction="lower"),),
    )  # fmt: skip
