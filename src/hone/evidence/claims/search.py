"""Claims about search over steps: value heads that guide a beam, and what trees and rollouts are made into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hone.evidence.claims.base import Check, Side, Trial, claim
from hone.evidence.claims.preference_tasks import PAIRS, sampled

HARDER: dict[str, Any] = {"name": "chains", "skills": ["easy"], "difficulty": 2, "count": 320, "holdout": 100}
REVERSE: dict[str, Any] = {"name": "chains", "skills": ["reverse"], "difficulty": 1, "count": 320, "holdout": 100}
GREEDY = "greedy"


def searched(make: str, **options: Any) -> dict[str, Any]:
    """Return the data part that searches the problems that these claims share.

    Args:
        make: what is made of the trees or rollouts, see `hone show searched`.
        options: more options of it; those that change the trees grow them anew.
    """
    return {
        "name": "searched", "of": REVERSE, "make": make, "simulations": 6, "samples_each": 4,
        "max_new_tokens": 64, **options,
    }  # fmt: skip


# Eight samples of a step, or of an answer, at the temperature at which the shipped model is right on half of the easy
# problems. The verifier learns in 60 steps of 2048 tokens from the answers that all preference claims share.
VERIFIED: dict[str, Any] = {
    **PAIRS, "name": "verified", "data": sampled("list"), "optimizer": {"name": "adamw", "lr": 1e-3}, "steps": 60,
    "objective": {"name": "ovm", "generate_with": "base"}, "batch_tokens": 2048,
}  # fmt: skip
_OVM = ("Outcome-supervised Verifiers for Planning in Mathematical Reasoning", "arXiv:2311.09724")


def _verified(width: int, expansions: int, **options: Any) -> dict[str, Any]:
    return {"objective": {**VERIFIED["objective"], "width": width, "expansions": expansions, **options}}


@claim("objective", "ovm", "beats-sampling")
def ovm_beats_sampling(scratch: Path) -> Trial:
    """Choosing steps by a value model that has learnt from outcomes alone beats sampling from the same generator.

    Task: the shipped model, which stays as it is, answers 120 easy problems at temperature 1.5; a value model learns
    from four of its answers to each of 480 other problems; a beam of two states samples four steps each.

    Finding: 0.57 against 0.42.
    """
    return Trial(
        recipe=VERIFIED, baseline=Side(label="sampling", settings=_verified(1, 1)), metric="accuracy", paper=_OVM,
        method=Side(label="guided beam", settings=_verified(2, 4)),
        checks=(Check(metric="accuracy", direction="higher"),),
    )  # fmt: skip


@claim("objective", "ovm", "planning")
def ovm_planning(scratch: Path) -> Trial:
    """The same value model does better when it chooses step by step than when it chooses among whole answers.

    Task: as for beats-sampling; eight samples a problem on both sides, as steps of a beam or as whole answers, which is
    a beam whose only step is the answer.

    Finding: 0.51 step by step against 0.59 for whole answers: steps are chosen greedily, one beginning at a time,
    by a head that has learnt from four answers to each of 480 problems, and a whole answer that the same head
    prefers is right more often. Both beat sampling (0.42).
    """
    return Trial(
        recipe=VERIFIED, baseline=Side(label="whole answers", settings=_verified(1, 8, separator="<|end|>")),
        method=Side(label="step by step", settings=_verified(1, 8)), metric="accuracy", paper=_OVM,
        checks=(Check(metric="accuracy", direction="higher"),),
    )  # fmt: skip


GROWN: dict[str, Any] = {
    **PAIRS, "name": "grown", "optimizer": {"name": "adamw", "lr": 5e-4}, "steps": 40, "batch_tokens": 2048,
    "sampler": {"name": "sample", "temperature": 1.0}, "eval_samples": 100, "max_new_tokens": 64,
    "data": {
        "name": "searched", "make": "paths", "of": {**HARDER, "count": 128}, "values": "zero", "simulations": 12,
        "samples_each": 4, "max_new_tokens": 64,
    },
    "objective": {"name": "alphamath", "beta": 0.1},
}  # fmt: skip


@claim("objective", "alphamath", "beam")
def alphamath_beam(scratch: Path) -> Trial:
    """A beam over steps by the value head answers better than greedy decoding of the same trained model.

    Task: the shipped model and a value head learn in 40 steps from one search tree for each of 128 problems of two to
    five lines; 100 other problems are answered greedily, or by the best of five sampled steps each time.

    Finding: 0.50 against 0.58: the beam chooses among steps drawn at temperature 1, where greedy decoding takes the
    most probable ones. On lists to reverse, which the model learns better, one seed gave the same order (0.64
    against 0.77). The paper's head has learnt from 40 simulations for each of ten trees a problem, in three rounds;
    this one from 12 of one tree.
    """
    plain = {"objective": {"name": "alphamath", "beta": 0.1, "width": 1, "expansions": 1}, "sampler": GREEDY}
    guided = {"objective": {"name": "alphamath", "beta": 0.1, "width": 1, "expansions": 5}}
    return Trial(
        recipe=GROWN, baseline=Side(label="greedy", settings=plain), metric="accuracy",
        method=Side(label="beam by value", settings=guided), checks=(Check(metric="accuracy", direction="higher"),),
        paper=("AlphaMath Almost Zero: process Supervision without process", "arXiv:2405.03553"),
    )  # fmt: skip


# The shipped model reverses 45% of these lists when it answers greedily, a line for each number. Its errors on sums are
# facts that it has not learned, and on those preferences of any kind made it worse (0.64 before; pairs of steps 0.58,
# whole answers 0.47 after 60 steps), while its own right answers alone left it as it was.
STEPWISE: dict[str, Any] = {
    **PAIRS, "name": "stepwise", "data": searched("pairs"), "optimizer": {"name": "adamw", "lr": 1e-4}, "steps": 40,
    "sampler": GREEDY, "eval_samples": 100, "max_new_tokens": 64,
}  # fmt: skip


def whole_answers(make: str) -> dict[str, Any]:
    """Return the data part that makes something of whole answers to the same problems.

    Args:
        make: what is made of them, see `hone show sampled`.
    """
    return sampled(make, pairs=4, of=REVERSE, temperature=1.0, max_new_tokens=64)


RATES = {"optimizer.lr": [3e-5, 1e-4]}
_MCTS = ("Monte Carlo Tree Search Boosts Reasoning via Iterative Preference Learning", "arXiv:2405.00451")


@claim("objective", "mcts-dpo", "beats-whole-answers")
def mcts_dpo_beats_whole_answers(scratch: Path) -> Trial:
    """Pairs of steps from tree search, smoothed by visits, teach more than pairs of whole answers.

    Task: the shipped model learns from its own answers to 320 lists that it reverses line by line; 40 steps on pairs of
    whole answers with DPO, or on pairs of steps, each at its best of two learning rates; 100 other lists are reversed
    greedily.

    Finding: 0.60 against 0.49, from 0.45.
    """
    whole = {"data": whole_answers("pairs"), "objective": {"name": "dpo", "beta": 1.0}}
    return Trial(
        recipe=STEPWISE, baseline=Side(label="whole answers", settings=whole), metric="accuracy", paper=_MCTS,
        method=Side(label="steps", settings={"objective": {"name": "mcts-dpo", "beta": 1.0}}), tune=RATES,
        checks=(Check(metric="accuracy", direction="higher"),),
    )  # fmt: skip


@claim("recipe", "mcts-dpo", "renewed")
def mcts_dpo_renewed(scratch: Path) -> Trial:
    """Searching again with the improved model beats as many steps on the trees of the first one.

    Task: as for objective mcts-dpo, with twice the pairs in a step; 80 steps on one set of trees, or 40 and 40 with
    trees of the model in between.

    Finding: 0.71 against 0.72: the first trees have not been used up after 80 steps; both rise from 0.45.
    """
    objective = {"objective": {"name": "mcts-dpo", "beta": 1.0}}
    rounds = [{"name": "round-1", "eval_samples": 0}, {"name": "round-2"}]
    return Trial(
        recipe={**STEPWISE, **objective, "data": searched("pairs"), "batch_tokens": 2048}, seeds=3, metric="accuracy",
        baseline=Side(label="one search", settings={"steps": 80}), paper=_MCTS,
        method=Side(label="renewed", settings={"steps": 40, "stages": rounds}),
        checks=(Check(metric="accuracy", direction="higher"),),
    )  # fmt: skip


@claim("objective", "step-apo", "margin")
def step_apo_margin(scratch: Path) -> Trial:
    """A margin that is the difference of two steps' advantages teaches more than plain DPO on the same pairs.

    Task: as for mcts-dpo, with all pairs of a step of positive and one of negative value; each side at its best of two
    learning rates.

    Finding: 0.41 against 0.43, from 0.45 before: neither form of the loss learns from these 400 pairs, at the lower
    of both rates. Of pairs from the same trees that MCTS-DPO takes, whose labels are smoothed by visits, the model
    does learn (0.60).
    """
    recipe = {**STEPWISE, "data": searched("advantages")}
    return Trial(
        recipe=recipe, baseline=Side(label="DPO", settings={"objective": {"name": "dpo", "beta": 0.3}}),
        method=Side(label="Step-APO", settings={"objective": {"name": "step-apo", "beta": 0.3}}), metric="accuracy",
        tune=RATES, checks=(Check(metric="accuracy", direction="higher"),),
        paper=("CPL: Critical Plan Step Learning Boosts LLM Generalization in Reasoning Tasks", "arXiv:2409.08642"),
    )  # fmt: skip


@claim("data", "searched", "pivots")
def searched_pivots(scratch: Path) -> Trial:
    """Wrong answers that are credited step by step teach more than the model's own right answers alone.

    Task: that of mcts-dpo; 40 steps of fine-tuning on the model's right answers, or of DPO on the step that costs a
    wrong answer most against what right rollouts do there, each at its best of two learning rates.

    Finding: 0.42 against 0.77, from 0.45: at the rate of 1e-4 that both take, 181 pairs of single steps teach
    little in steps of 1,024 tokens, where whole right answers show every step. In steps of twice as many the recipe
    per-step-dpo rose to 0.58.
    """
    right = {"data": whole_answers("chosen"), "objective": "sft"}
    return Trial(
        recipe={**STEPWISE, "data": searched("pivots", most=2)}, metric="accuracy",
        baseline=Side(label="own right answers", settings=right),
        method=Side(label="per-step DPO", settings={"objective": {"name": "dpo", "beta": 1.0}}), seeds=3, tune=RATES,
        checks=(Check(metric="accuracy", direction="higher"),),
        paper=(
            "RL on Incorrect Synthetic Data Scales the Efficiency of LLM Math Reasoning by Eight-Fold",
            "arXiv:2406.14532",
        ),
    )  # fmt: skip


@claim("recipe", "itool", "beats-more-tuning")
def itool_beats_more_tuning(scratch: Path) -> Trial:
    """Step preferences from searches where the model is least sure beat as many more steps of fine-tuning.

    Task: the shipped model learns easy problems and short lists in 30 steps from easy to hard; then 15 steps more of
    fine-tuning on all of them, or of DPO on pairs of steps from the hardest 0.3 of 320 problems; answers are greedy.

    Finding: 0.51 against 0.60: 30 steps do not teach all that worked answers have to teach, and 15 more of them go
    on; pairs of the model's own steps did not add to that.
    """
    mixed: dict[str, Any] = {"name": "chains", "skills": ["easy", "sort"], "difficulty": [1, 2], "holdout": 100}
    recipe = {
        **PAIRS, "name": "tool", "data": mixed, "objective": "sft", "optimizer": {"name": "adamw", "lr": 1e-3},
        "sampler": GREEDY, "steps": 15, "batch_tokens": 2048, "eval_samples": 100, "max_new_tokens": 64,
    }  # fmt: skip
    warm_up = [
        {"name": "easy", "data": {**mixed, "difficulty": 1}, "eval_samples": 0},
        {"name": "hard", "data": {**mixed, "difficulty": 2}, "eval_samples": 0},
    ]
    hard = searched("pairs", of={**mixed, "count": 320, "seed": 1}, hardest=0.3, samples_each=3, max_new_tokens=64)
    search = {"name": "search", "data": hard, "objective": {"name": "dpo", "beta": 0.3},
              "optimizer": {"name": "adamw", "lr": 1e-4}}  # fmt: skip
    return Trial(
        recipe=recipe, baseline=Side(label="more tuning", settings={"stages": [*warm_up, {"name": "more"}]}), seeds=3,
        method=Side(label="search and preferences", settings={"stages": [*warm_up, search]}), metric="accuracy",
        checks=(Check(metric="accuracy", direction="higher"),),
        paper=(
            "Boosting Tool Use of Large Language Models via Iterative Reinforced Fine-Tuning", "arXiv:2501.09766",
        ),
    )  # fmt: skip
