"""Claims about tuning denoisers for rewards, on eight narrow Gaussians on a ring of radius 1.

All begin with a denoiser, or a consistency model, of the whole ring. "reward" is its mean over 1,000 arrays that the
tuned model draws: here -|x - p|^2 / 2, or the share within a distance of p, with p = (0, 1), one of the Gaussians.
precision@n is the share of drawn points that lie among the data, energy@n their energy distance from it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hone.evidence.claims.base import Check, Side, Trial, claim

MODEL: dict[str, Any] = {"name": "denoiser", "network": {"name": "mlp", "width": 64, "depth": 3}}
POINTS: dict[str, Any] = {
    "name": "rewards", "model": MODEL, "data": "points", "objective": "denoise",
    "optimizer": {"name": "adamw", "lr": 1e-3}, "schedule": {"name": "constant", "warmup": 0.02}, "steps": 2000,
    "batch_tokens": 256, "eval_samples": 1000, "solvers": [{"name": "ddim", "steps": 10, "eta": 1.0}],
    "distances": ["energy", "precision"],
}  # fmt: skip
AVERAGED: dict[str, Any] = {"callbacks": [{"name": "average", "decay": 0.998}]}
PRETRAINED: dict[str, Any] = {"name": "pretrained", **AVERAGED}
CONSISTENT: dict[str, Any] = {
    "name": "pretrained", "objective": {"name": "ict", "end": 160},
    "model": {**MODEL, "parameterisation": "consistency"}, **AVERAGED,
}  # fmt: skip
TOP: list[float] = [0.0, 1.0]
NEAR: dict[str, Any] = {"name": "near", "place": TOP}
WITHIN: dict[str, Any] = {"name": "within", "place": TOP, "width": 0.8}
GENTLY: dict[str, Any] = {"optimizer": {"name": "adamw", "lr": 3e-4}}
HIGHER = Check(metric="reward", direction="higher")


def tuned(label: str, objective: dict[str, Any], steps: int, first: dict[str, Any] = PRETRAINED, **more: Any) -> Side:
    """Return a side that pretrains, and then tunes for a reward.

    Args:
        label: what tables call it.
        objective: of the tuning.
        steps: of the tuning.
        first: the stage before it.
        more: further fields of the tuning's stage.
    """
    stage = {"name": "tuned", "objective": objective, "steps": steps, **GENTLY, **more}
    return Side(label=label, settings={"stages": [first, stage]})


@claim("objective", "alignprop", "fewer-steps-than-policy-gradients")
def alignprop_is_fast(scratch: Path) -> Trial:
    """In as many steps on as many drawn arrays, the reward's gradient raises it further than a policy gradient does.

    Task: 30 steps of 256 chains of 10 evaluations each, for closeness to one Gaussian of the ring.
    """
    return Trial(
        recipe=POINTS, baseline=tuned("DDPO", {"name": "ddpo", "reward": NEAR}, 30), metric="reward",
        method=tuned("AlignProp", {"name": "alignprop", "reward": NEAR}, 30), checks=(HIGHER,),
        paper=("Aligning Text-to-Image Diffusion Models with Reward Backpropagation", "arXiv:2310.03739"),
    )  # fmt: skip


@claim("objective", "ddpo", "raises-rewards-without-gradients")
def ddpo_learns(scratch: Path) -> Trial:
    """A reward without a gradient rises by 0.2 over that of a model that took one such step.

    Task: the share of points within 0.8 of one Gaussian of the ring, 200 steps of 256 chains of 10 evaluations.
    """
    paper = ("Training Diffusion Models with Reinforcement Learning", "arXiv:2305.13301")
    objective = {"name": "ddpo", "reward": WITHIN}
    return Trial(
        recipe=POINTS, baseline=tuned("one step", objective, 1), method=tuned("DDPO", objective, 200), paper=paper,
        checks=(Check(metric="reward", direction="higher", effect=0.2),), metric="reward",
    )  # fmt: skip


@claim("objective", "rlcm", "fewer-evaluations-than-ddpo")
def rlcm_is_fast(scratch: Path) -> Trial:
    """With as many evaluations of the network, two steps of a consistency model reach more reward than ten of DDPO.

    Task: the share of points within 0.8 of one Gaussian of the ring: 200 steps of 256 chains of 2 evaluations against
    40 steps of 256 chains of 10.
    """
    return Trial(
        recipe=POINTS, baseline=tuned("DDPO", {"name": "ddpo", "reward": WITHIN}, 40), checks=(HIGHER,),
        method=tuned(
            "RLCM", {"name": "rlcm", "reward": WITHIN}, 200, CONSISTENT, solvers=[{"name": "multistep", "steps": 2}]
        ), metric="reward",
        paper=("RL for Consistency Models: Faster Reward Guided Text-to-Image Generation", "arXiv:2404.03673"),
    )  # fmt: skip


_PRDP = (
    "PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion Models",
    "arXiv:2402.08714",
)


@claim("objective", "prdp", "as-high-as-ddpo")
def prdp_matches(scratch: Path) -> Trial:
    """With as many chains and moves of the weights, the reward comes within 0.1 of what a policy gradient reaches.

    Task: the share of points within 0.8 of one Gaussian of the ring, 100 steps of 256 chains of 10 evaluations with
    four moves each; PRDP has four chains for each of 64 points.

    Finding: the reward is lower by 0.044 (0.014 to 0.073), within the margin of 0.1; DDPO reaches 1.0 in every seed.
    PRDP's points stay nearer to the data (energy 0.89 against 1.09).
    """
    prdp = {"name": "prdp", "beta": 0.1, "reward": WITHIN}
    return Trial(
        recipe=POINTS, baseline=tuned("DDPO", {"name": "ddpo", "updates": 4, "reward": WITHIN}, 100), paper=_PRDP,
        method=tuned("PRDP", prdp, 100, batch_tokens=64), metric="reward",
        checks=(Check(metric="reward", direction="not lower", effect=0.1),),
    )  # fmt: skip


@claim("objective", "prdp", "clipping-steadies")
def prdp_clips(scratch: Path) -> Trial:
    """At a high learning rate, more of the points stay among the data with proximal updates than without.

    Task: as before with a learning rate of 0.001 and a weight of 0.2 of the divergence.

    Finding: without clipping two of five runs end with a gradient that is not finite (three on another machine), with
    it none does, which is what the paper says; of the three that remain two have 0 and 0.10 of their points among the
    data and one 0.65, with clipping it is 0.59 to 0.70 in all five: too few pairs to tell.
    """
    fast: dict[str, Any] = {"optimizer": {"name": "adamw", "lr": 1e-3}, "batch_tokens": 64}
    free, kept = ({"name": "prdp", "beta": 0.2, "clip": clip, "reward": WITHIN} for clip in (None, 0.1))
    return Trial(
        recipe=POINTS, baseline=tuned("unclipped", free, 100, **fast), method=tuned("PRDP", kept, 100, **fast),
        paper=_PRDP, metric="precision@10", checks=(Check(metric="precision@10", direction="higher"),),
    )  # fmt: skip


_RG = ("Reward Guided Latent Consistency Distillation", "arXiv:2403.11027")
TEACHER: dict[str, Any] = {**PRETRAINED, "name": "teacher", "model": CONSISTENT["model"]}
STUDENT: dict[str, Any] = {"solvers": [{"name": "multistep", "steps": 1}], **AVERAGED}


def guided(label: str, **options: Any) -> Side:
    """Return a side that distils a teacher with a reward.

    Args:
        label: what tables call it.
        options: of rg-lcd.
    """
    objective = {"name": "rg-lcd", "teacher": "stage:1", "reward": NEAR, **options}
    more = {**STUDENT, "optimizer": {"name": "adamw", "lr": 1e-3}}
    return tuned(label, objective, 1000, TEACHER, **more)


@claim("objective", "rg-lcd", "drawn-to-the-reward")
def rg_lcd_is_drawn(scratch: Path) -> Trial:
    """Distillation with a reward draws points of higher reward in one step than distillation without.

    Task: 1,000 steps of distillation, for closeness to one Gaussian of the ring, through the learned proxy with a
    weight of 0.5.
    """
    return Trial(
        recipe=POINTS, baseline=guided("LCD", beta=0.0, proxy=False), method=guided("RG-LCD", beta=0.5), paper=_RG,
        checks=(HIGHER,), metric="reward",
    )  # fmt: skip


@claim("objective", "rg-lcd", "proxy-keeps-to-the-data")
def rg_lcd_proxy(scratch: Path) -> Trial:
    """Under a strong reward, more one-step points stay among the data with the proxy than with the reward itself.

    Task: as before.

    Finding: 0.032 against 0.035 (-0.013 to 0.010): at this weight nearly all points of both have left the data for the
    reward (-0.24 against -0.21), and there is nothing to keep. A weaker reward was not tried.
    """
    return Trial(
        recipe=POINTS, baseline=guided("direct", beta=0.5, proxy=False), method=guided("proxy", beta=0.5), paper=_RG,
        checks=(Check(metric="precision@1", direction="higher"),), metric="precision@1",
    )  # fmt: skip
