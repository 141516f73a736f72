"""Claims about learning from the model's own answers: policy objectives, best-of sampling, hints and demonstrations.

The task is to reverse short lists, which the shipped model does rightly in a quarter of its samples. A step asks 16
prompts for 8 answers each; 60 steps take about two minutes on one core.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hone.evidence.claims.base import Check, Side, Trial, claim

REVERSE: dict[str, Any] = {"name": "chains", "skills": ["reverse"], "difficulty": 1, "count": 2000, "holdout": 100}
HARDER = {**REVERSE, "difficulty": 2}
AS_WELL = Check(metric="accuracy", direction="not lower", effect=0.05)
BETTER = Check(metric="accuracy", direction="higher")


def rolled(of: dict[str, Any] = REVERSE, **options: Any) -> dict[str, Any]:
    """Return the data part that answers 16 prompts 8 times in each step.

    Args:
        of: what is asked.
        options: more options of it, or others.
    """
    return {
        "name": "rollouts", "of": of, "rewards": "exact", "prompts": 16, "samples_each": 8, "max_new_tokens": 48,
        **options,
    }  # fmt: skip


TASK: dict[str, Any] = {
    "name": "reversing", "model": "base", "data": rolled(), "adapter": "full", "objective": "grpo",
    "optimizer": {"name": "adamw", "lr": 1e-4}, "schedule": {"name": "cosine", "warmup": 0.1}, "steps": 60,
    "batch_tokens": 16384, "eval_samples": 100, "max_new_tokens": 48,
}  # fmt: skip
GRPO = Side(label="GRPO", settings={"objective": "grpo"})
START = Side(label="one step", settings={"objective": "grpo", "steps": 1})
RISES = (Check(metric="accuracy", direction="higher", effect=0.25),)


def _rises(label: str, paper: tuple[str, str], **settings: Any) -> Trial:
    """Return the trial of a method that shall raise accuracy by 25 points over a model that took one step."""
    return Trial(
        recipe=TASK, baseline=START, method=Side(label=label, settings=settings), paper=paper, checks=RISES, seeds=3,
        metric="accuracy",
    )  # fmt: skip


@claim("objective", "grpo", "learns-from-rewards")
def grpo_learns(scratch: Path) -> Trial:
    """From right and wrong alone, without a critic, accuracy rises by 25 points.

    Task: the shipped model learns to reverse short lists from rewards of its own answers, 60 steps of 16 x 8; the
    baseline took one such step.
    """
    paper = ("DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models", "arXiv:2402.03300")
    return _rises("GRPO", paper, objective="grpo")


@claim("data", "rollouts", "raft")
def raft_learns(scratch: Path) -> Trial:
    """Fine-tuning on the best of the model's own answers, made anew as it learns, raises accuracy by 25 points.

    Task: as for GRPO; prompts without a right answer are left out.
    """
    paper = ("RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment", "arXiv:2304.06767")
    return _rises("RAFT", paper, objective="sft", data=rolled(drop="unsolved"))


@claim("objective", "rloo", "learns-from-rewards")
def rloo_learns(scratch: Path) -> Trial:
    """REINFORCE with the other answers as the baseline raises accuracy by 25 points, without critic or clipping.

    Task: as for GRPO, with a pull of 0.01 to the start.
    """
    paper = (
        "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs",
        "arXiv:2402.14740",
    )
    return _rises("RLOO", paper, objective={"name": "rloo", "kl": 0.01})


@claim("objective", "ppo", "learns-from-rewards")
def ppo_learns(scratch: Path) -> Trial:
    """Clipped steps with a learned critic raise accuracy by 25 points.

    Task: as for GRPO, with a pull of 0.01 to the start.
    """
    paper = ("Proximal Policy Optimization Algorithms", "arXiv:1707.06347")
    return _rises("PPO", paper, objective={"name": "ppo", "kl": 0.01})


@claim("objective", "reinforce", "learns-from-rewards")
def reinforce_learns(scratch: Path) -> Trial:
    """The plain policy gradient raises accuracy by 25 points.

    Task: as for GRPO, with a pull of 0.01 to the start.
    """
    paper = ("MusicRL: Aligning Music Generation to Human Preferences", "arXiv:2402.04229")
    return _rises("REINFORCE", paper, objective={"name": "reinforce", "kl": 0.01})


@claim("recipe", "reft", "beats-more-fine-tuning")
def reft_beats_sft(scratch: Path) -> Trial:
    """PPO on the questions of a warm-up beats as many more steps of fine-tuning on them.

    Task: as for GRPO, with 200 problems: ten supervised steps, then 60 of PPO or 60 of supervised fine-tuning.

    Finding: fine-tuning on the worked answers of the 200 problems answers 92, 93 and 90 in a hundred, ReFT 84, 88 and
    82. A worked answer here shows the one way there is to the result, so that nothing is left for sampling to find; the
    paper's problems have many ways.
    """
    few = {**REVERSE, "count": 200}
    warm = {"name": "warm-up", "data": few, "objective": "sft", "steps": 10, "batch_tokens": 2048}
    more = {"name": "more", "data": few, "objective": "sft", "batch_tokens": 2048}
    exact = {"name": "exact", "right": 1.0, "partial": 0.1}
    ppo = {
        "name": "reinforced", "data": rolled(few, rewards=exact),
        "objective": {"name": "ppo", "kl": 0.05, "discount": 0.98},
    }  # fmt: skip
    return Trial(
        recipe=TASK, baseline=Side(label="fine-tuning", settings={"stages": [warm, more]}),
        method=Side(label="ReFT", settings={"stages": [warm, ppo]}), seeds=3, metric="accuracy",
        paper=("ReFT: Reasoning with Reinforced Fine-Tuning", "arXiv:2401.08967"), checks=(BETTER,),
    )  # fmt: skip


@claim("recipe", "reft", "learns-from-rewards")
def reft_learns(scratch: Path) -> Trial:
    """A few supervised steps and then PPO on the same 200 questions raise accuracy by 25 points.

    Task: as for GRPO, with ten supervised steps before the 60 of PPO; the baseline took one step.
    """
    paper = ("ReFT: Reasoning with Reinforced Fine-Tuning", "arXiv:2401.08967")
    return _rises("ReFT", paper, stages=_reft_stages())


def _reft_stages() -> list[dict[str, Any]]:
    """Return the warm-up and the PPO of ReFT on 200 problems."""
    few = {**REVERSE, "count": 200}
    warm = {"name": "warm-up", "data": few, "objective": "sft", "steps": 10, "batch_tokens": 2048}
    data = rolled(few, rewards={"name": "exact", "right": 1.0, "partial": 0.1})
    return [warm, {"name": "reinforced", "data": data, "objective": {"name": "ppo", "kl": 0.05, "discount": 0.98}}]


@claim("objective", "uft", "learns-from-rewards")
def uft_learns(scratch: Path) -> Trial:
    """Rewards behind hints that grow shorter raise accuracy by 25 points.

    Task: as for GRPO, in 120 steps; hints are drawn over the first 0.3 of the run.
    """
    paper = ("UFT: Unifying Supervised and Reinforcement Fine-Tuning", "arXiv:2505.16984")
    return _rises(
        "UFT", paper, objective={"name": "uft", "hint_weight": 0.1}, data=rolled(hints="binomial", hint_until=0.3),
        steps=120,
    )  # fmt: skip


@claim("objective", "uft", "rare-rewards")
def uft_rare_rewards(scratch: Path) -> Trial:
    """Where rewards are rare, hints that grow shorter reach a higher accuracy than rewards alone.

    Task: as for GRPO, on lists of four, which one sample in sixty reverses rightly.

    Finding: after 60 steps GRPO answers 12, 10 and 9 in a hundred of the harder lists and UFT 6, 8 and 12: lists of
    four are hardly learned by either in this budget. On short lists UFT does learn (see the other claim).
    """
    return Trial(
        recipe=TASK, baseline=Side(label="GRPO", settings={"data": rolled(HARDER, max_new_tokens=64)}), seeds=3,
        method=Side(label="UFT", settings={
            "data": rolled(HARDER, max_new_tokens=64, hints="binomial", hint_until=0.6),
            "objective": {"name": "uft", "hint_weight": 0.1},
        }), metric="accuracy", checks=(BETTER,),
        paper=("UFT: Unifying Supervised and Reinforcement Fine-Tuning", "arXiv:2505.16984"),
    )  # fmt: skip


@claim("objective", "srft", "beats-rewards-alone")
def srft_beats_grpo(scratch: Path) -> Trial:
    """Demonstrations beside the model's own answers, weighed by entropy, beat rewards alone.

    Task: as for UFT; a demonstration joins each group.
    """
    data = rolled(HARDER, max_new_tokens=64)
    return Trial(
        recipe=TASK, baseline=Side(label="GRPO", settings={"data": data}), seeds=3, metric="accuracy",
        method=Side(label="SRFT", settings={
            "data": {**data, "samples_each": 7, "demonstrations": 1}, "objective": "srft",
        }), checks=(BETTER,),
        paper=(
            "SRFT: A Single-Stage Method with Supervised and Reinforcement Fine-Tuning for Reasoning",
            "arXiv:2506.19767",
        ),
    )  # fmt: skip


@claim("objective", "sasr", "beats-rewards-alone")
def sasr_beats_grpo(scratch: Path) -> Trial:
    """Supervised and policy steps in turns that follow the gradient beat rewards alone.

    Task: as for UFT.

    Finding: 0.17 against 0.10. With three seeds, which ran first, the same difference was not told from chance.
    """
    data = rolled(HARDER, max_new_tokens=64)
    return Trial(
        recipe=TASK, baseline=Side(label="GRPO", settings={"data": data}), seeds=5, metric="accuracy",
        method=Side(label="SASR", settings={
            "data": {**data, "samples_each": 7, "demonstrations": 1}, "objective": "sasr",
        }), checks=(BETTER,),
        paper=(
            "Step-wise Adaptive Integration of Supervised Fine-tuning and Reinforcement Learning for Task-Specific "
            "LLMs",
            "arXiv:2505.13026",
        ),
    )  # fmt: skip


@claim("objective", "dr-grpo", "as-well-as-grpo")
def dr_grpo_as_well(scratch: Path) -> Trial:
    """Without the divisions by the deviation and by each answer's length, accuracy is no lower than with GRPO.

    Task: as for GRPO. Answers have one form here, so that wrong ones have no room to grow.

    Finding: 0.74 against 0.77; three seeds that differ by 0.1 do not show a margin of 0.05.
    """
    return Trial(
        recipe=TASK, baseline=GRPO, method=Side(label="Dr. GRPO", settings={"objective": "dr-grpo"}), seeds=3,
        paper=("Understanding R1-Zero-Like Training: A Critical Perspective", "arXiv:2503.20783"), checks=(AS_WELL,),
        metric="accuracy",
    )  # fmt: skip


@claim("objective", "dapo", "beats-grpo")
def dapo_beats_grpo(scratch: Path) -> Trial:
    """A higher upper clip, a mean over tokens and groups with a signal alone beat GRPO.

    Task: as for GRPO, with two optimizer steps a phase, so that ratios leave 1.

    Finding: 0.66 against 0.57, higher for each of the three seeds (+0.13, +0.04, +0.12), which are too few for an
    interval without 0.
    """
    two = {"steps": 60, "data": rolled(updates=2)}
    return Trial(
        recipe=TASK, baseline=Side(label="GRPO", settings={**two, "objective": "grpo"}), seeds=3, metric="accuracy",
        method=Side(label="DAPO", settings={
            **two, "objective": "dapo", "data": rolled(updates=2, drop="even", refill=2),
        }),
        paper=("DAPO: An Open-Source LLM Reinforcement Learning System at Scale", "arXiv:2503.14476"),
        checks=(BETTER,),
    )  # fmt: skip


@claim("objective", "gspo", "as-well-as-grpo")
def gspo_as_well(scratch: Path) -> Trial:
    """One ratio for an answer, clipped as one, is as good as ratios of tokens where steps leave the policy.

    Task: as for DAPO.

    Finding: 0.64 against 0.57 of GRPO, whose seeds differ by 0.2 where steps leave the policy; GSPO's by 0.03.
    Three seeds do not show a margin of 0.05.
    """
    two = {"steps": 60, "data": rolled(updates=2)}
    return Trial(
        recipe=TASK, baseline=Side(label="GRPO", settings={**two, "objective": "grpo"}), seeds=3, metric="accuracy",
        method=Side(label="GSPO", settings={**two, "objective": "gspo"}), checks=(AS_WELL,),
        paper=("Group Sequence Policy Optimization", "arXiv:2507.18071"),
    )  # fmt: skip


@claim("reward", "closeness", "only-right-rewards-teach")
def only_right_rewards_teach(scratch: Path) -> Trial:
    """On expressions that no text holds, random rewards teach less than right ones.

    Task: 15 supervised steps teach the form of the answer to random sums; then 60 steps of GRPO.
    """
    sums = {"name": "random-calculation", "steps": [1, 2], "operations": ["+", "-"], "count": 400, "holdout": 100}
    warm = {
        "name": "warm-up", "data": sums, "objective": "sft", "optimizer": {"name": "adamw", "lr": 1e-3}, "steps": 15,
        "batch_tokens": 2048,
    }  # fmt: skip

    def side(label: str, signal: str) -> Side:
        data = rolled({**sums, "count": 2000}, rewards={"name": "closeness", "signal": signal})
        return Side(label=label, settings={"stages": [warm, {"name": "reinforced", "data": data}]})

    return Trial(
        recipe=TASK, baseline=side("random rewards", "random"), method=side("right rewards", "right"), seeds=3,
        metric="accuracy", checks=(Check(metric="accuracy", direction="higher", effect=0.05),),
        paper=(
            "Reasoning or Memorization? Unreliable Results of Reinforcement Learning Due to Data Contamination",
            "arXiv:2507.10532",
        ),
    )  # fmt: skip


@claim("reward", "process", "clip-delta")
def clip_delta_cures_hacking(scratch: Path) -> Trial:
    """Clipped and differenced process rewards keep answers from growing, where raw ones are hacked by repetition.

    Task: sums of up to two digits; 30 supervised steps on worked answers, half of which take back two lines, so that
    the model sometimes writes more lines than it needs; then 20 steps of PPO on 8 x 8 answers. Beside the right answer
    a process reward pays every line with a true equation.
    """
    sums = {**REVERSE, "skills": ["add"]}
    taken_back = {"name": "traces", "of": {**sums, "seed": 1}, "backtracks": 2}
    warm = {
        "name": "warm-up", "data": {"name": "mix", "sources": [sums, taken_back]}, "objective": "sft", "steps": 30,
        "optimizer": {"name": "adamw", "lr": 5e-4}, "batch_tokens": 2048, "eval_samples": 0,
    }  # fmt: skip

    def side(label: str, refine: str) -> Side:
        hackable = {"name": "hackable-process", "refine": refine, "threshold": 1.0}
        data = rolled(sums, rewards=["exact", hackable], prompts=8, max_new_tokens=96)
        return Side(label=label, settings={"stages": [warm, {"name": "rewarded", "data": data}]})

    return Trial(
        recipe={
            **TASK, "objective": {"name": "ppo", "kl": 0.01}, "optimizer": {"name": "adamw", "lr": 3e-4}, "steps": 20,
            "max_new_tokens": 96,
        },
        baseline=side("raw process rewards", "none"), method=side("clipped and differenced", "clip-delta"), seeds=3,
        metric="accuracy", figures=_lengths, checks=(Check(metric="length", direction="lower", effect=5.0), BETTER),
        paper=("On Designing Effective RL Reward at Training Time for LLM Reasoning", "arXiv:2410.15115"),
    )  # fmt: skip


def _lengths(run: Path) -> dict[str, float]:
    """Return the mean length in tokens of the answers of the last ten phases."""
    import json

    last = sorted(run.rglob("metrics.jsonl"))[-1]  # of the last stage
    rows = [json.loads(line) for line in last.read_text(encoding="utf-8").splitlines()]
    lengths = [row["rollout/length"] for row in rows if "rollout/length" in row][-10:]
    return {"length": sum(lengths) / len(lengths)}


@claim("recipe", "rif-rft", "forgets-less")
def rif_rft_forgets_less(scratch: Path) -> Trial:
    """Learning from rewards of solvable prompts forgets less than fine-tuning on worked answers, at a like accuracy.

    Task: as for GRPO; fine-tuning takes as many steps on the data's own answers.

    Finding: Neither side forgets: the loss on other text changes by less than 0.002 nats on both, since reversing
    is of a kind with what the model knows. Accuracy is higher with rewards (0.75 against 0.64), which is not what
    the check asks.
    """
    sft = {"data": REVERSE, "objective": "sft", "batch_tokens": 2048, "steps": 20}
    return Trial(
        recipe={**TASK, "general_data": {"name": "pydocs", "task": "text", "limit": 400}},
        baseline=Side(label="fine-tuning", settings=sft), seeds=3, metric="accuracy",
        method=Side(label="rewards", settings={"data": rolled(drop="unsolved", least=0.1, refill=1)}),
        checks=(Check(metric="forgetting", direction="lower"), Check(metric="accuracy", direction="not lower",
                                                                     effect=0.1)),
        paper=(
            "Reinforcement Fine-Tuning Naturally Mitigates Forgetting in Continual Post-Training", "arXiv:2507.05386",
        ),
    )  # fmt: skip
