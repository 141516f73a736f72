"""Claims about merging, and about training that is meant to be merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hone.evidence.claims.base import Check, Side, Trial, claim
from hone.evidence.claims.tasks import SORT

RATE = {"name": "adamw", "lr": 1e-2}
SORTING = {"name": "chains", "skills": ["sort"], "difficulty": 1, "holdout": 60}
ROTATING = {"name": "chains", "skills": ["rotate"], "difficulty": 1, "holdout": 60}
BOTH = {"name": "mix", "mark": True, "sources": [SORTING, ROTATING]}
# Two short trainings with LoRA and an evaluation of what is made of them: 60,000 tokens, about 30 s on one core.
BRANCHES: dict[str, Any] = {
    **{name: value for name, value in SORT.items() if name != "general_data"}, "name": "branches", "data": SORTING,
    "adapter": {"name": "lora", "rank": 8}, "optimizer": RATE, "steps": 30,
}  # fmt: skip
LOSS = Check(metric="loss", direction="lower")


def _stages(model: Any, second: dict[str, Any], final: Any = BOTH) -> list[dict[str, Any]]:
    """Return two trainings from one start, and the evaluation of a model made of them."""
    last = {"name": "made", "model": model, "data": final, "adapter": "full", "objective": "sft", "steps": 0}
    return [{"name": "first"}, {"name": "second", "model": "stage:0", **second}, last]


def _merged(label: str, second: dict[str, Any], final: Any = BOTH, **merger: Any) -> Side:
    model = {"name": "merged", "base": "stage:0", "models": ["stage:1", "stage:2"], "merger": merger}
    return Side(label=label, settings={"stages": _stages(model, second, final)})


AGAIN = {"data": {**SORTING, "seed": 1}, "optimizer": {"name": "adamw", "lr": 5e-3}}
OTHER = {"data": ROTATING}
ADDED = _merged("added up", OTHER, name="task-arithmetic")


@claim("merger", "linear", "soup")
def linear_soup(scratch: Path) -> Trial:
    """The mean of two models fine-tuned on a task with different settings does better on it than the first of them.

    Task: the shipped model learns to sort short lists in 30 steps with LoRA, once at a learning rate of 1e-2 and once
    on other problems at 5e-3.

    Finding: 0.213 against 0.187: the second model, at half the rate, is the worse one, and with two ingredients the
    mean lies between. The paper's soups have dozens, and its greedy ones leave out what does not help.
    """
    return Trial(
        recipe=BRANCHES, checks=(LOSS,), seeds=3,
        baseline=Side(label="the first model", settings={"stages": _stages("stage:1", AGAIN, SORTING)}),
        method=_merged("the mean of both", AGAIN, SORTING, name="linear"),
        paper=(
            "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing "
            "inference time",
            "arXiv:2203.05482",
        ),
    )  # fmt: skip


@claim("merger", "task-arithmetic", "two-tasks")
def task_arithmetic_two_tasks(scratch: Path) -> Trial:
    """Adding what two models have learned does better on both tasks together than one of the models.

    Task: the shipped model learns to sort short lists, and apart from that to rotate them, in 30 steps each with LoRA;
    the mean loss over held-out problems of both.

    Finding: 0.98 against 1.59 in the mean over five seeds, which differ by more than that (the interval of the
    difference is -1.05 to 0.28).
    """
    return Trial(
        recipe=BRANCHES, checks=(LOSS,), method=ADDED,
        baseline=Side(label="the model that sorts", settings={"stages": _stages("stage:1", OTHER)}),
        paper=("Editing Models with Task Arithmetic", "arXiv:2212.04089"),
    )  # fmt: skip


@claim("merger", "task-arithmetic", "dropping")
def task_arithmetic_dropping(scratch: Path) -> Trial:
    """Half of what each model has changed can be dropped at random without harm, when the rest is made larger (DARE).

    Task: as for adding up; the loss may be higher by 0.05 at most.

    Finding: 1.131 against 1.045: the changes of rank 8 after 30 large steps are not small, which the paper names as the
    condition of dropping without harm.
    """
    return Trial(
        recipe=BRANCHES, baseline=ADDED, method=_merged("half dropped", OTHER, name="task-arithmetic", drop=0.5),
        checks=(Check(metric="loss", direction="not higher", effect=0.05),), seeds=3,
        paper=(
            "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
            "arXiv:2311.03099",
        ),
    )  # fmt: skip


@claim("merger", "ties", "interference")
def ties_interference(scratch: Path) -> Trial:
    """Trimming small changes and electing signs merges two models better than adding up.

    Task: as for task arithmetic.
    """
    return Trial(
        recipe=BRANCHES, baseline=ADDED, method=_merged("TIES", OTHER, name="ties", density=0.5), checks=(LOSS,),
        paper=("TIES-Merging: Resolving Interference When Merging Models", "arXiv:2306.01708"),
    )  # fmt: skip


_PAFT = ("PAFT: A Parallel Training Paradigm for Effective LLM Fine-Tuning", "arXiv:2406.17923")


@claim("penalty", "l1", "sparser")
def l1_sparser(scratch: Path) -> Trial:
    """An L1 penalty leaves a third more entries of the weights as they were, at a like loss.

    Task: the shipped model learns to sort short lists in 30 steps, all weights train; the share of weights that have
    changed by at most 1e-4 at the end; the loss may be higher by 0.05 at most.

    Finding: 66% of the weights stay as they were, against 2%; the loss is 0.204 against 0.173, with an interval that
    reaches 0.057, a hair beyond the margin.
    """
    full = {**BRANCHES, "adapter": "full", "optimizer": {"name": "adamw", "lr": 1e-3}}
    sides = [Side(label=label, settings={"penalties": [{"name": "l1", "strength": strength, "threshold": 1e-4}]})
             for label, strength in (("without", 0.0), ("with L1", 3e-4))]  # fmt: skip
    return Trial(
        recipe=full, baseline=sides[0], method=sides[1], figures=_sparsity, paper=_PAFT,
        checks=(
            Check(metric="sparsity", direction="higher", effect=0.33, relative=True),
            Check(metric="loss", direction="not higher", effect=0.05),
        ),
    )  # fmt: skip


def _sparsity(run: Path) -> dict[str, float]:
    """Return the sparsity that the last step of a run reports."""
    last = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    return {"sparsity": float(json.loads(last)["sparsity"])}
