"""Claims about recipes that follow fine-tuning with preferences, or set them against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hone.evidence.claims.base import Check, Side, Trial, claim
from hone.evidence.claims.preference_tasks import PAIRS, sampled

WORKED: dict[str, Any] = {"name": "chains", "skills": ["sort"], "difficulty": 1}
FOREIGN: dict[str, Any] = {**WORKED, "seed": 1}
# Fine-tuning on 40 batches of worked answers; what the second stage is differs.
TUNED: dict[str, Any] = {
    "name": "tuned", "model": "base", "data": {**WORKED, "limit": 1000}, "adapter": "full",
    "schedule": {"name": "cosine", "warmup": 0.1}, "batch_tokens": 1024, "eval_samples": 60, "max_new_tokens": 60,
}  # fmt: skip
FIRST: dict[str, Any] = {
    "objective": "sft", "optimizer": {"name": "adamw", "lr": 2e-3}, "steps": 40, "eval_samples": 0,
}  # fmt: skip
SMALL = {"name": "adamw", "lr": 1e-4}
DPO = {"name": "dpo", "beta": 0.1}


@claim("recipe", "step-dpo", "beats-whole-answers")
def step_dpo_beats_whole_answers(scratch: Path) -> Trial:
    """Pairs of single steps teach more than pairs of whole answers.

    Task: that of the preference claims; both sides see the same samples of the model.

    Finding: 0.49 against 0.46, with an interval of 9 points either way, from pairs of far fewer tokens: as good as
    whole answers, not shown to be better.
    """
    return Trial(
        recipe=PAIRS, baseline=Side(label="whole answers", settings={"data": PAIRS["data"]}),
        method=Side(label="single steps", settings={"data": sampled("steps", pairs=4)}), metric="accuracy",
        paper=(
            "Step-DPO: Step-wise Preference Optimization for Long-chain Reasoning of LLMs", "arXiv:2406.18629",
        ),
        checks=(Check(metric="accuracy", direction="higher"),),
    )  # fmt: skip


@claim("recipe", "thinkpo", "beats-more-sft")
def thinkpo_beats_more_sft(scratch: Path) -> Trial:
    """After fine-tuning on worked answers, preferring them to short ones helps more than further fine-tuning.

    Task: the shipped model, which works sums out line by line, is tuned in 20 steps on sums of which every other one
    shows no work; then it prefers worked answers to bare ones, or goes on with the same data, for 15 steps.
    """
    sums: dict[str, Any] = {"name": "chains", "skills": ["add", "subtract", "evaluate", "sum"], "difficulty": 1}
    bare = {**sums, "steps": False}
    mixed = {"name": "mix", "sources": [sums, {**bare, "seed": 1}]}
    more = {"objective": "sft", "optimizer": SMALL, "steps": 15}
    preferring = {**more, "data": {"name": "paired", "of": sums, "rejected": bare}, "objective": DPO}
    first = {**FIRST, "optimizer": {"name": "adamw", "lr": 1e-3}, "steps": 20}
    return Trial(
        recipe={**TUNED, "data": mixed, "max_new_tokens": 48}, metric="accuracy",
        baseline=Side(label="more fine-tuning", settings={"stages": [first, more]}),
        method=Side(label="ThinkPO", settings={"stages": [first, preferring]}),
        paper=("Thinking Preference Optimization", "arXiv:2502.13173"),
        checks=(Check(metric="accuracy", direction="higher", effect=0.05),),
    )  # fmt: skip


@claim("recipe", "annotation-budget", "cold-start")
def annotation_budget_cold_start(scratch: Path) -> Trial:
    """A quarter of the budget spent on demonstrations mends the cold start of preference tuning from the base model.

    Task: the shipped model learns to sort, which it cannot do, for the price of 1000 worked answers: 500 preference
    pairs alone, or 250 worked answers and 375 pairs, whose rejected answer is the solution of another problem.
    """
    data = {
        "name": "annotated", "budget": 1000, "price": 2.0, "demonstrations": WORKED,
        "preferences": {"name": "paired", "of": FOREIGN, "rejected": {**FOREIGN, "noise": 1.0}},
    }  # fmt: skip
    pairs = {"objective": DPO, "optimizer": SMALL, "epochs": 1}
    stages = [{**FIRST, "steps": None, "epochs": 4}, pairs]
    return Trial(
        recipe=TUNED, metric="accuracy", seeds=5,
        baseline=Side(label="pairs alone", settings={"data": {**data, "share": 0.0}, "stages": [pairs]}),
        method=Side(label="a quarter for demonstrations", settings={"data": {**data, "share": 0.25}, "stages": stages}),
        paper=(
            "Balancing the Budget: Understanding Trade-offs Between Supervised and Preference-Based Finetuning",
            "arXiv:2502.11284",
        ),
        checks=(Check(metric="accuracy", direction="higher", effect=0.05),),
    )  # fmt: skip
