"""Claims about one-step generators by distribution matching, score distillation and adversarial training.

The task is a ring of eight narrow Gaussians, or a grid of 25, whose score is known and teaches, so that no difference
is the teacher's. A student is a small perceptron that has learned to denoise for 1,000 steps; what counts is the energy
distance of points that it draws in one evaluation. A run takes about a minute on one core that has nothing else to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hone.evidence.claims.base import Check, Side, Trial, claim

GRID: dict[str, Any] = {"name": "points", "density": "grid"}
SMALL: dict[str, Any] = {"name": "denoiser", "network": {"name": "mlp", "width": 64, "depth": 3}}
NEARER = (Check(metric="energy@1", direction="lower"),)
BASE: dict[str, Any] = {
    "model": SMALL, "data": "points", "objective": "denoise", "optimizer": {"name": "adamw", "lr": 5e-4},
    "schedule": {"name": "cosine", "warmup": 0.05}, "batch_tokens": 128, "eval_samples": 1000,
    "solvers": [{"name": "multistep", "steps": 1}], "distances": ["energy"],
    "callbacks": [{"name": "average", "decay": 0.98}],
}  # fmt: skip


def warm(steps: int = 1000) -> dict[str, Any]:
    """Return the stage that makes a denoiser.

    Args:
        steps: its length.
    """
    return {"name": "denoiser", "optimizer": {"name": "adamw", "lr": 2e-3}, "steps": steps, "eval_samples": 0}


def side(label: str, objective: dict[str, Any], steps: int = 300, warmed: int = 1000, **more: Any) -> Side:
    """Return a student that begins as a denoiser and becomes a generator.

    Args:
        label: what tables call it.
        objective: of the generator.
        steps: of it.
        warmed: steps of denoising before.
        more: fields of its stage.
    """
    return Side(
        label=label,
        settings={"stages": [warm(warmed), {"name": "generator", "objective": objective, "steps": steps, **more}]},
    )


def versus(
    baseline: Side, method: Side, paper: tuple[str, str], checks: tuple[Check, ...] = NEARER, **fields: Any
) -> Trial:
    """Return the trial of two students.

    Args:
        baseline: what the paper compares with.
        method: what the claim is about.
        paper: (title, identifier).
        checks: what must come out.
        fields: of the recipe, other than the usual.
    """
    return Trial(
        recipe={"name": "generators", **BASE, **fields}, baseline=baseline, method=method, checks=checks,
        metric="energy@1", paper=paper,
    )  # fmt: skip


DMD2: dict[str, Any] = {"name": "dmd2", "teacher": "truth"}


@claim("objective", "dmd2", "critic-updates-and-real-data")
def dmd2_beats_plain(scratch: Path) -> Trial:
    """Five steps of the fake score for each of the generator's, and a discriminator, beat plain matching.

    Task: the ring. The baseline takes one step of the fake score for each of the generator's and has no discriminator;
    it runs for three times as many steps, which takes as long.
    """
    plain = {**DMD2, "critic_updates": 1, "gan_weight": 0.0}
    paper = ("Improved Distribution Matching Distillation for Fast Image Synthesis", "arXiv:2405.14867")
    return versus(side("matching alone", plain, 900), side("DMD2", DMD2), paper)


@claim("objective", "f-distill", "beats-reverse-kl")
def f_distill_beats_reverse_kl(scratch: Path) -> Trial:
    """The Jensen-Shannon divergence draws nearer points than the reverse Kullback-Leibler divergence.

    Task: the grid, whose modes a student can lose.

    Finding: no difference shown (-0.016, -0.116 to +0.058): neither lost a mode, and the seeds of the reverse
    divergence alone lie between 0.08 and 0.21.
    """
    common = {"name": "f-distill", "teacher": "truth"}
    return versus(
        side("reverse KL", {**common, "divergence": "reverse-kl"}),
        side("Jensen-Shannon", {**common, "divergence": "jensen-shannon"}),
        ("One-step Diffusion Models with $f$-Divergence Distribution Matching", "arXiv:2502.15681"), data=GRID,
    )  # fmt: skip


@claim("objective", "uni-instruct", "beats-divergences-at-each-level")
def uni_instruct_beats_f_distill(scratch: Path) -> Trial:
    """The expanded forward Kullback-Leibler divergence draws nearer points than that divergence at each noise level.

    Task: the grid, five steps of the fake score for each of the generator's on both sides. With one, as in the authors'
    code, 300 steps took Uni-Instruct to 0.73 (0.46 to 1.04 in five seeds; it began at 0.64 with seed 0), and 900 steps,
    which take as long as 300 of these, to 0.17 with seed 0: the fake score lagged behind.

    Finding: no difference shown (-0.011, -0.038 to +0.028): 0.123 against 0.133, nearer in three seeds of five.
    """
    common = {"teacher": "truth", "divergence": "forward-kl", "critic_updates": 5}
    return versus(
        side("f-distill", {"name": "f-distill", **common}),
        side("Uni-Instruct", {"name": "uni-instruct", **common}),
        (
            "Uni-Instruct: One-step Diffusion Model through Unified Diffusion Divergence Instruction",
            "arXiv:2505.20755",
        ),
        data=GRID,
    )  # fmt: skip


SMT = (
    "Score-of-Mixture Training: Training One-Step Generative Models Made Simple via Score Estimation of Mixture "
    "Distributions",
    "arXiv:2502.09609",
)


@claim("objective", "smt", "beats-consistency-training")
def smt_beats_consistency(scratch: Path) -> Trial:
    """From data alone, scores of mixtures give a generator that is nearer than improved consistency training's.

    Task: the ring. Consistency training takes five times as many steps, which takes as long.
    """
    ict = side("iCT", {"name": "ict", "end": 160}, 1500)
    ict = Side(label="iCT", settings={**ict.settings, "model": {**SMALL, "parameterisation": "consistency"}})
    smt = side("SMT", {"name": "smt", "critic_rate": 5.0}, optimizer={"name": "adamw", "lr": 2e-4})
    return versus(ict, smt, SMT)


@claim("objective", "smd", "as-good-as-dmd2")
def smd_as_good(scratch: Path) -> Trial:
    """With a teacher, the score of mixtures gives samples that are as near as those of DMD2.

    Task: the ring.
    """
    checks = (Check(metric="energy@1", direction="not higher", effect=0.02),)
    return versus(side("DMD2", DMD2), side("SMD", {"name": "smd", "teacher": "truth"}), SMT, checks)


MSD = ("Multi-student Diffusion Distillation for Better One-step Generators", "arXiv:2410.23274")
CLASSES = {**GRID, "conditional": True}
TINY: dict[str, Any] = {"name": "mlp", "width": 16, "depth": 2}


def _small(label: str, network: dict[str, Any], learned: bool = True) -> Side:
    """Return small students that first learn the known score, or begin at once."""
    score = {"name": "score", "objective": {"name": "tsm", "teacher": "truth"}, "steps": 600}
    matching = {"name": "generator", "objective": {**DMD2, "critic_updates": 3}}
    stages = [
        {**score, "optimizer": {"name": "adamw", "lr": 2e-3}, "eval_samples": 0}, {**matching, "steps": 300},
    ] if learned else [{**matching, "steps": 400}]  # fmt: skip
    return Side(label=label, settings={"stages": stages, "model": {"name": "denoiser", "network": network}})


@claim("network", "students", "several-beat-one")
def students_beat_one(scratch: Path) -> Trial:
    """Four tiny students, each for a fourth of the classes, draw nearer points than one of the same shape.

    Task: the grid with 25 classes; students learn the score, and then match the distribution.
    """
    return versus(_small("one", TINY), _small("four", {"name": "students", "groups": 4, "of": TINY}), MSD, data=CLASSES)


@claim("objective", "tsm", "scores-first")
def tsm_scores_first(scratch: Path) -> Trial:
    """A small student that learns its teacher's score first draws nearer points than one that matches from the start.

    Task: as for several students; the baseline matches for a third more steps, which takes as long.
    """
    return versus(_small("matching alone", TINY, learned=False), _small("score first", TINY), MSD, data=CLASSES)


@claim("objective", "nitrofusion", "beats-fixed-heads")
def nitrofusion_beats_fixed(scratch: Path) -> Trial:
    """A pool of which some heads judge and some begin anew at each step beats heads that are always the same.

    Task: the ring; the baseline has as many heads as judge in a step of the method, and none begins anew.

    Finding: no difference shown (0.076, -0.099 to 0.397): in two seeds of five the pool was nearer by about 0.02, in
    one further by 0.32 (0.53 against 0.21). On points, whose features are simple, heads that never change were no
    worse.
    """
    common = {"name": "nitrofusion", "teacher": "truth", "critic_updates": 2, "critic_rate": 2.0}
    slow: dict[str, Any] = {"optimizer": {"name": "adamw", "lr": 1e-4, "beta1": 0.5}}
    return versus(
        side("fixed heads", {**common, "copies": 2, "drawn": 1.0, "refresh": 0.0}, **slow),
        side("NitroFusion", {**common, "copies": 8, "drawn": 0.25}, **slow),
        ("NitroFusion: High-Fidelity Single-Step Diffusion through Dynamic Adversarial Training", "arXiv:2412.02030"),
    )  # fmt: skip


def particles(label: str, objective: dict[str, Any], count: int = 256, steps: int = 400) -> Side:
    """Return free points that a score moves.

    Args:
        label: what tables call it.
        objective: how it does.
        count: points, of each class.
        steps: of them.
    """
    model = {"name": "denoiser", "network": {"name": "particles", "count": count}, "parameterisation": "x0"}
    return Side(label=label, settings={"model": model, "objective": objective, "steps": steps})


FREE: dict[str, Any] = {"optimizer": {"name": "adamw", "lr": 0.03}, "callbacks": []}
SDS: dict[str, Any] = {"name": "sds", "teacher": "truth"}
PROLIFIC = (
    "ProlificDreamer: High-Fidelity and Diverse Text-to-3D Generation with Variational Score Distillation",
    "arXiv:2305.16213",
)


@claim("objective", "vsd", "more-diverse-than-sds")
def vsd_beats_sds(scratch: Path) -> Trial:
    """Points whose own score is learned beside them spread like the data; score distillation draws them together.

    Task: 256 free points and the known score of the ring. Score distillation takes three times as many steps.
    """
    own = {"name": "mlp", "width": 64, "depth": 3}
    vsd = {"name": "vsd", "teacher": "truth", "critic": own, "critic_updates": 2, "critic_rate": 0.1}
    return versus(particles("SDS", SDS, steps=1200), particles("VSD", vsd), PROLIFIC, **FREE)


@claim("objective", "nfsd", "usual-guidance")
def nfsd_beats_sds(scratch: Path) -> Trial:
    """Noise-free distillation at a guidance of 7.5 ends nearer to the data than score distillation at its usual 100.

    Task: 32 free points for each of eight classes, and the known score of the ring.
    """
    return versus(
        particles("SDS, 100", SDS, 32), particles("NFSD, 7.5", {"name": "nfsd", "teacher": "truth"}, 32),
        ("Noise-Free Score Distillation", "arXiv:2310.17590"), data={"name": "points", "conditional": True}, **FREE,
    )  # fmt: skip


@claim("objective", "sds", "finds-likely-arrays")
def sds_finds_likely(scratch: Path) -> Trial:
    """Without any training of a network, the score leads free points into their class.

    Task: 32 points for each of eight classes, guidance 1; the baseline took one step from normal noise.
    """
    mild = {**SDS, "guidance": 1.0}
    return versus(
        particles("one step", mild, 32, 1), particles("SDS", mild, 32),
        ("DreamFusion: Text-to-3D using 2D Diffusion", "arXiv:2209.14988"),
        data={"name": "points", "conditional": True}, **FREE,
    )  # fmt: skip
