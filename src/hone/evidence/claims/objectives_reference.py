"""Claims about fine-tuning that looks at other models' likelihoods, or at what the model itself would say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hone.evidence.claims.base import Check, Side, Trial, claim
from hone.evidence.claims.preference_tasks import CHOSEN, PAIRS, PROBLEMS, sampled
from hone.evidence.claims.tasks import GENERAL, SORT, TINY

# Fine-tuning whose unit is the answer, as that of the methods below: minor-sft whose coefficient stays 1.
PER_ANSWER = {"name": "minor-sft", "beta": 0.0}
NOISY: dict[str, Any] = {**TINY, "data": {**TINY["data"], "count": 4000, "noise": 0.3}, "objective": PER_ANSWER}


@claim("objective", "minor-sft", "moves-less")
def minor_sft_moves_less(scratch: Path) -> Trial:
    """Weighing answers by how little they have been learnt moves the model less than plain fine-tuning.

    Task: the shipped model learns to sort in 40 steps; forgetting is the rise of the loss on held-out pages of Python's
    documentation; "nll" is the loss of held-out answers, which may be higher by 0.05 at most.

    Finding: the model forgets more (0.33 against 0.28 nats) and learns the answers less well. Weights that fall as
    a sample is learnt shrink every gradient, and Adam makes steps of the same size out of smaller gradients, so
    that what is left of the weighing is its noise. The paper's effect needs a smaller learning rate with it, which
    the equal rates here do not give.
    """
    return Trial(
        recipe=SORT, baseline=Side(label="fine-tuning", settings={"objective": PER_ANSWER}),
        method=Side(label="MinorSFT", settings={"objective": {"name": "minor-sft", "beta": 0.05}}), metric="nll",
        paper=(
            "Minor SFT loss for LLM fine-tune to increase performance and reduce model deviation",
            "arXiv:2408.10642",
        ),
        checks=(
            Check(metric="forgetting", direction="lower"),
            Check(metric="nll", direction="not higher", effect=0.05),
        ),
    )  # fmt: skip


@claim("objective", "poft", "noisy-answers")
def poft_noisy_answers(scratch: Path) -> Trial:
    """Preferring the trained model to a better one makes fine-tuning robust to wrong answers in the data.

    Task: a model of 0.26M parameters learns the easy skills from nothing in 100 steps; three in ten training problems
    show the solution of another problem; the reference is the shipped model, which knows these skills; "nll" is the
    loss of held-out answers, which are all right.

    Finding: 1.37 against 1.35 nats on clean held-out answers over five seeds, with an interval of 0.1 either way:
    no difference, though the reference knows the skills.
    """
    return Trial(
        recipe=NOISY, baseline=Side(label="cross-entropy", settings={"objective": PER_ANSWER}),
        method=Side(label="PoFT", settings={"objective": {"name": "poft", "references": ["base"]}}), metric="nll",
        paper=(
            "Preference-Oriented Supervised Fine-Tuning: Favoring Target Model Over Aligned Large Language Models",
            "arXiv:2412.12865",
        ),
        checks=(Check(metric="nll", direction="lower"),),
    )  # fmt: skip


_DFT = (
    "Discriminative Finetuning of Generative Large Language Models without Reward Models and Preference Data",
    "arXiv:2502.18679",
)
RIVALS: dict[str, Any] = {**PAIRS, "data": sampled("rivals"), "objective": "dft"}


@claim("objective", "dft", "beats-sft")
def dft_beats_sft(scratch: Path) -> Trial:
    """Raising the right answer against the model's own other ones beats fine-tuning on the right answer alone.

    Task: that of the preference claims; the right answers are those of the problems themselves, and all that the model
    answered otherwise is held against them.
    """
    return Trial(
        recipe=RIVALS, baseline=Side(label="fine-tuning", settings={"data": PROBLEMS, "objective": "sft"}),
        method=Side(label="DFT", settings={"objective": "dft"}), metric="accuracy", paper=_DFT,
        checks=(Check(metric="accuracy", direction="higher"),),
    )  # fmt: skip


@claim("objective", "dft", "moving-average")
def dft_moving_average(scratch: Path) -> Trial:
    """A moving average of each prompt's normaliser beats the estimate from the samples at hand.

    Task: as above with 64 prompts, of which each comes up several times; the average takes 0.3 of a new estimate.
    """
    few = {**RIVALS, "data": sampled("rivals", limit=64)}
    return Trial(
        recipe=few, baseline=Side(label="estimate at hand", settings={"objective": {"name": "dft", "gamma": 1.0}}),
        method=Side(label="moving average", settings={"objective": {"name": "dft", "gamma": 0.3}}),
        metric="accuracy", paper=_DFT, checks=(Check(metric="accuracy", direction="higher"),),
    )  # fmt: skip


@claim("objective", "dpo", "beats-the-chosen")
def dpo_beats_the_chosen(scratch: Path) -> Trial:
    """Pairs teach more than fine-tuning on their preferred answers alone.

    Task: the shipped model learns from its own right and wrong answers to easy problems; held-out problems are answered
    at the temperature that made the pairs.
    """
    return Trial(
        recipe=PAIRS, baseline=Side(label="preferred answers", settings=_differing(CHOSEN)),
        method=Side(label="DPO", settings={"objective": PAIRS["objective"]}), metric="accuracy",
        paper=(
            "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", "arXiv:2305.18290",
        ),
        checks=(Check(metric="accuracy", direction="higher"),),
    )  # fmt: skip


def _differing(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return the fields in which a recipe differs from `PAIRS`."""
    return {name: value for name, value in recipe.items() if PAIRS[name] != value and name != "name"}


TERSE: dict[str, Any] = {
    **SORT, "data": {**PROBLEMS, "steps": False}, "general_data": GENERAL, "optimizer": {"name": "adamw", "lr": 1e-3},
    "steps": 30, "eval_samples": 120, "max_new_tokens": 48,
}  # fmt: skip


@claim("data", "s3ft", "forgets-less")
def s3ft_forgets_less(scratch: Path) -> Trial:
    """Training on the model's own right answers forgets less than training on the data's, at a like accuracy.

    Task: the shipped model, which works problems out line by line, is tuned in 30 steps on problems whose answers are
    given without a line of work; its own answers are taken where they come to the same. Forgetting is the rise of the
    loss on held-out pages of Python's documentation; the accuracy may be lower by 0.05 at most.

    Finding: accuracy is far higher, 0.69 against 0.29, since the model's own right answers are near what it says
    already; the loss on general text rises by 0.045 against 0.053 nats, an interval that just includes no
    difference (-0.019 to 0.001).
    """
    own = {"name": "s3ft", "of": TERSE["data"], "max_new_tokens": 48}
    return Trial(
        recipe=TERSE, baseline=Side(label="answers of the data", settings={"data": TERSE["data"]}),
        method=Side(label="own right answers", settings={"data": own}), metric="accuracy",
        paper=(
            "Selective Self-to-Supervised Fine-Tuning for Generalization in Large Language Models", "arXiv:2502.08130",
        ),
        checks=(
            Check(metric="forgetting", direction="lower"),
            Check(metric="accuracy", direction="not lower", effect=0.05),
        ),
    )  # fmt: skip
