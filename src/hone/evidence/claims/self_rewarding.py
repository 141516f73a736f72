"""Claims about models that make or label their own preference data, that mean what they say, and that are steered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hone.evidence.claims.base import Check, Side, Trial, claim
from hone.evidence.claims.preference_tasks import PAIRS, PROBLEMS, sampled

AS_WELL = Check(metric="accuracy", direction="not lower", effect=0.05)
FEW = {**PROBLEMS, "count": 96}
ROUND: dict[str, Any] = {"steps": 8, "optimizer": {"name": "adamw", "lr": 2e-4}}
DRAWN = {"samples_each": 4, "temperature": 1.5, "max_new_tokens": 48}


def _labelled(round_: int, rewards: list[str], previous: str | None) -> dict[str, Any]:
    """Return a round of preference learning on the model's own labels."""
    data = {
        "name": "self-rewarded", "of": {**FEW, "seed": round_}, "rewards": rewards, "against": "stage:0", "pairs": 2,
        "previous": previous, **DRAWN,
    }  # fmt: skip
    weighed = {"objective": {**PAIRS["objective"], "name": "cream"}} if previous else {}
    return {"name": f"round-{round_}", "data": data, **ROUND, **weighed}


@claim("data", "self-rewarded", "consistency")
def self_rewarded_consistency(scratch: Path) -> Trial:
    """Labels of the model itself, weighed by how consistent two rounds rank, teach more than labels that are trusted.

    Task: the shipped model learns from pairs of its own right and wrong answers to 96 problems, then twice from pairs
    that it labels itself by its log-ratio to its start; held-out problems are answered at the temperature that made
    the pairs.

    Finding: 0.40 against 0.33 over five seeds, each of them higher. Labels by the implicit reward make the model
    worse than it was (0.42 at this temperature), and weights undo most of that.
    """
    first = {"name": "seed", "data": {**sampled("pairs", pairs=2), "of": FEW}, **ROUND}
    plain = [first, _labelled(1, ["implicit"], None), _labelled(2, ["implicit"], None)]
    weighed = [first, _labelled(1, ["implicit"], "stage:0"), _labelled(2, ["implicit"], "stage:1")]
    return Trial(
        recipe={**PAIRS, "name": "self-rewarding"}, seeds=5,
        baseline=Side(label="labels trusted", settings={"stages": plain}),
        method=Side(label="labels weighed (CREAM)", settings={"stages": weighed}),
        paper=("CREAM: Consistency Regularized Self-Rewarding Language Models", "arXiv:2410.12735"),
        checks=(Check(metric="accuracy", direction="higher"),),
    )  # fmt: skip


@claim("data", "self-rewarded", "agreement")
def self_rewarded_agreement(scratch: Path) -> Trial:
    """Pairs on which judge and implicit reward agree teach more than all pairs that the judge labels.

    Task: the shipped model learns to judge its own solutions to 96 problems, beside the problems, in 30 steps; then it
    learns from pairs that it labels itself.

    Finding: 0.22 against 0.25, both below the shipped model (0.42 at this temperature): its own labels teach it
    nothing after 30 steps of judging, and choosing among them does not help.
    """
    judging = {
        "name": "judging", "objective": "sft", "steps": 30, "optimizer": {"name": "adamw", "lr": 5e-4},
        "data": {"name": "verdicts", "of": FEW, "plain": True, **DRAWN}, "eval_samples": 0,
    }  # fmt: skip
    alone, agreed = (_labelled(1, rewards, None) for rewards in (["judge"], ["judge", "implicit"]))
    return Trial(
        recipe={**PAIRS, "name": "judging"}, seeds=5,
        baseline=Side(label="judge alone", settings={"stages": [judging, alone]}),
        method=Side(label="agreed pairs (SCIR)", settings={"stages": [judging, agreed]}),
        paper=(
            "Self-Consistency of the Internal Reward Models Improves Self-Rewarding Language Models",
            "arXiv:2502.08922",
        ),
        checks=(Check(metric="accuracy", direction="higher"),),
    )  # fmt: skip


@claim("data", "lacie", "calibrates-tone")
def lacie_calibrates_tone(scratch: Path) -> Trial:
    """Pairs that a listener judges make wrong answers less accepted, and right ones no less, than truth alone does.

    Task: the shipped model learns to end its answers with one of four tones, drawn blindly, in 40 steps; then 20 steps
    of DPO on pairs of its own answers. A wrong answer counts by how likely a listener accepts its tone.

    Finding: wrong answers were accepted more (0.62 against 0.46 with truth alone), and right ones as much more
    (0.61 against 0.44): the pairs moved the tone of all answers and told the model nothing of which are wrong. So
    did problems of difficulty 1 to 3 (one seed each: 0.56 wrong and 0.72 right after 40 steps, 0.57 and 0.54 after
    60 at a third of the rate on twice the problems). The paper's model of 7 billion parameters knows more of what
    it knows.
    """
    toned = {
        "name": "tones", "objective": "sft", "data": {"name": "toned", "of": PROBLEMS}, "steps": 40, "eval_samples": 0,
        "optimizer": {"name": "adamw", "lr": 1e-3},
    }  # fmt: skip
    heard = {"name": "lacie", "of": PROBLEMS, "samples_each": 6, "temperature": 1.0, "max_new_tokens": 64}

    def stages(**options: Any) -> list[dict[str, Any]]:
        return [toned, {"name": "heard", "data": {**heard, **options}, "steps": 20}]

    return Trial(
        recipe={
            **PAIRS, "name": "listener", "metrics": ["accuracy", "accepted-wrong", "accepted-right"],
            "max_new_tokens": 64, "sampler": {"name": "sample"},
        },
        baseline=Side(label="right and wrong alone", settings={"stages": stages(listener=False)}),
        method=Side(label="a listener", settings={"stages": stages()}),
        paper=(
            "LACIE: Listener-Aware Finetuning for Confidence Calibration in Large Language Models",
            "arXiv:2405.21028",
        ),
        checks=(
            Check(metric="accepted-wrong", direction="lower", effect=0.1),
            Check(metric="accepted-right", direction="not lower", effect=0.1),
        ),
    )  # fmt: skip


@claim("data", "refined", "selected-refinements")
def refined_selected(scratch: Path) -> Trial:
    """The best of several refinements after feedback teach more than refinements as they come.

    Task: the shipped model learns to refine its own answers to 1,600 problems by feedback in 180 steps, beside plain
    problems, after which a quarter of its refinements of wrong answers are right; then 25 steps of fine-tuning on
    refinements of its answers, at temperature 1.5, to 320 others. Held-out problems are answered at temperature 1.

    Finding: 0.472 against 0.443 over five seeds: four of the five are higher, but the interval of the difference,
    -0.04 to 0.09, is too wide for a gain of this size.
    """
    problems = {"name": "chains", "skills": ["easy"], "difficulty": 1, "holdout": 120}
    drawn = {"temperature": 1.5, "max_new_tokens": 48}
    refining = {"name": "refined", "of": {**problems, "count": 1600}, "make": "refine", "samples_each": 1, **drawn}
    first = {
        "name": "refining", "data": {"name": "mix", "sources": [refining, {**problems, "count": 600}]}, "steps": 180,
        "optimizer": {"name": "adamw", "lr": 1e-3}, "batch_tokens": 2048, "eval_samples": 0,
    }  # fmt: skip

    def stages(select: str) -> list[dict[str, Any]]:
        of = {**problems, "count": 320, "seed": 1}
        return [first, {"name": "imitating", "data": {"name": "refined", "of": of, "select": select, "samples_each": 4,
                                                      **drawn}}]  # fmt: skip

    return Trial(
        recipe={**PAIRS, "name": "feedback", "objective": "sft", "sampler": {"name": "sample", "temperature": 1.0}},
        baseline=Side(label="first refinement", settings={"stages": stages("first")}),
        method=Side(label="best refinement", settings={"stages": stages("best")}),
        paper=("Training Language Models with Language Feedback at Scale", "arXiv:2303.16755"),
        checks=(Check(metric="accuracy", direction="higher"),),
    )  # fmt: skip


@claim("data", "directed", "steers-length")
def directed_steers_length(scratch: Path) -> Trial:
    """A model that learned directions of preference answers in fewer lines where short answers are asked for.

    Task: the shipped model learns worked and bare answers behind directions drawn blindly in 40 steps, then the best
    of eight sampled answers in the direction of each prompt in 30; the lines of answers to held-out problems.

    Finding: 0.43 lines fewer (0.35 to 0.52): answers go where they are asked to go, by less than the 0.5 lines
    expected here.
    """
    skills = {"skills": ["add", "subtract", "evaluate"], "difficulty": 1, "count": 160, "holdout": 60}
    worked = {"name": "chains", **skills}
    mixed = {"name": "mix", "sources": [worked, {**worked, "steps": False, "seed": 1}]}

    def settings(asked: float) -> dict[str, Any]:
        directed = {"name": "directed", "degrees": [-60.0, 60.0], "asked": asked, "samples_each": 8}
        return {"stages": [
            {"name": "forms", "data": {**directed, "of": mixed, "make": "own"}, "steps": 40, "eval_samples": 0},
            {"name": "directions", "data": {**directed, "of": worked, "max_new_tokens": 56}, "steps": 30},
        ]}  # fmt: skip

    return Trial(
        recipe={
            **PAIRS, "name": "directions", "objective": "sft", "optimizer": {"name": "adamw", "lr": 5e-4},
            "sampler": {"name": "sample"}, "metrics": ["accuracy", "lines"], "eval_samples": 60,
        },
        baseline=Side(label="asked for long answers", settings=settings(50.0)),
        method=Side(label="asked for short answers", settings=settings(-50.0)),
        paper=(
            "Arithmetic Control of LLMs for Diverse User Preferences: Directional Preference Alignment with "
            "Multi-Objective Rewards",
            "arXiv:2402.18571",
        ),
        checks=(Check(metric="lines", direction="lower", effect=0.5),),
    )  # fmt: skip


@claim("data", "masked-thinking", "as-well")
def masked_thinking_as_well(scratch: Path) -> Trial:
    """Preferences learned without the loss of the thinking give as many right answers.

    Task: the shipped model learns from pairs of its own right and wrong answers in 25 steps of EXO; with the mask, the
    worked lines are read and the last line alone is trained. The accuracy may be lower by 0.05 at most.
    """
    pairs = PAIRS["data"]
    masked = {"name": "masked-thinking", "of": pairs, "mask": "before", "closes": "answer:", "markers": True}
    return Trial(
        recipe={**PAIRS, "name": "thinking", "objective": {"name": "exo", "beta": 1.0}},
        baseline=Side(label="all tokens", settings={"data": pairs}),
        method=Side(label="thinking masked", settings={"data": masked}),
        paper=(
            "PRefLexOR: Preference-based Recursive Language Modeling for Exploratory Optimization of Reasoning and "
            "Agentic Thinking",
            "arXiv:2410.12375",
        ),
        checks=(AS_WELL,),
    )  # fmt: skip
