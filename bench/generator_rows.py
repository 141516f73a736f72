"""The rows of bench/generators.py: methods of few steps, their options, and what draws from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RATES = (3e-3, 1e-3, 2e-4)
ONE_RATE = (1e-3,)  # for the long runs of those without a teacher
ONE_AND_TWO: tuple[dict[str, Any], ...] = ({"name": "multistep", "steps": 1}, {"name": "multistep", "steps": 2})
# Objectives that have their teacher draw pairs of noise and array first.
NEED_PAIRS = {"reflow", "annealed-reflow", "flow-guided", "hipa"}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Args:
        label: what it is called.
        objective: its fields, without the teacher.
        taught: whether it is told the teacher.
        scratch: whether it starts from fresh weights, with 9/8 of the teacher's operations.
        solvers: draw the points.
        adam: further options of the optimizer.
        rates: learning rates of which the better one is taken.
        adapter: that is trained in place of the weights.
    """

    label: str
    objective: dict[str, Any]
    taught: bool = True
    scratch: bool = False
    solvers: tuple[dict[str, Any], ...] = ONE_AND_TWO
    adam: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = RATES
    adapter: dict[str, Any] | None = None


def ddim(*steps: int, schedule: str) -> tuple[dict[str, Any], ...]:
    """Return the deterministic solver with some numbers of steps."""
    return tuple({"name": "ddim", "steps": count, "schedule": schedule} for count in steps)


def average(decay: float) -> dict[str, Any]:
    """Return the fields of a running mean of the weights."""
    return {"callbacks": [{"name": "average", "decay": decay}]}


def methods(images: bool) -> list[Method]:
    """Return the rows.

    Those that change what is drawn have none, since nearness to the data is not what they are for: RG-LCD, NCT, RLCM,
    PRDP, AlignProp. Nor have those that need classes (MSD, whose students share them, and SoundCTM, which distils
    guidance) and those that move free points (VSD, SDS, NFSD). Their claims measure them.

    Args:
        images: whether what is drawn are images.
    """
    matching = [
        Method("DMD2", {"name": "dmd2"}), Method("DMD2, one critic update", {"name": "dmd2", "critic_updates": 1}),
        Method("DMD2, two steps", {"name": "dmd2", "student_steps": 2}),
        Method("f-distill, Jensen-Shannon", {"name": "f-distill", "divergence": "jensen-shannon"}),
        Method("f-distill, forward KL", {"name": "f-distill", "divergence": "forward-kl"}),
        Method("Uni-Instruct, forward KL", {"name": "uni-instruct", "divergence": "forward-kl", "critic_updates": 5}),
        Method("SMD", {"name": "smd"}),
        Method("NitroFusion", {"name": "nitrofusion", "critic_updates": 2, "critic_rate": 2.0},
               adam={"beta1": 0.5}, rates=(2e-4, 5e-5)),
        Method("MMD tuning, one step", {"name": "mmd-ddm", "steps": 1}, False, solvers=ddim(1, schedule="karras")),
        Method("MMD tuning, two steps", {"name": "mmd-ddm", "steps": 2}, False, solvers=ddim(2, schedule="karras")),
    ]  # fmt: skip
    paths = [
        Method("ECT", {"name": "ect"}, False), Method("iCT, tuned", {"name": "ict", "end": 160}, False),
        Method("CD", {"name": "cd"}), Method("CD, Euler (CoMoSpeech)", {"name": "cd", "step": "euler"}),
        # What is learned at low levels has fewer neighbours to pass; 10, 12 and 18 tried with the other seed.
        Method("CD, 12 levels", {"name": "cd", "levels": 12}),
        Method("CD in two segments", {"name": "multistep-cd", "levels": 15}, solvers=ddim(2, schedule="trig")),
        Method("sLCT, tuned", {"name": "slct", "end": 160}, False),
        Method("SCott", {"name": "scott"}), Method("sCM", {"name": "scm"}),
        Method("SANA-Sprint", {"name": "sana-sprint"}),
        Method("CTM", {"name": "ctm", "levels": 10, "decay": 0.99},
               solvers=({"name": "gamma", "steps": 1}, {"name": "gamma", "steps": 2})),
        Method("SFD to one evaluation", {"name": "sfd", "steps": 2}, solvers=({"name": "sfd", "steps": 2},)),
        Method("SFD to two evaluations", {"name": "sfd", "steps": 3}, solvers=({"name": "sfd", "steps": 3},)),
        Method("SFD-v", {"name": "sfd-v", "steps": 2, "most": 4},
               solvers=({"name": "sfd", "steps": 2}, {"name": "sfd", "steps": 3})),
        Method("Progressive", {"name": "progressive", "plan": [16, 8, 4, 2, 1]}, solvers=ddim(1, schedule="trig")),
        Method("ProDiff to two steps, absolute difference",
               {"name": "prodiff", "plan": [16, 8, 4, 2], "mae": 1.0, "ssim": 0.0}, solvers=ddim(2, schedule="trig")),
        Method("Lightning", {"name": "lightning", "plan": [32, 8, 4, 2, 1], "matched": 4},
               solvers=ddim(1, schedule="trig")),
        Method("Rectified flow", {"name": "reflow"}, solvers=ddim(1, 2, schedule="flow")),
        Method("One step of a flow", {"name": "reflow", "times": "start"},
               solvers=ddim(1, schedule="flow")),
        Method("SlimFlow's annealed reflow", {"name": "annealed-reflow"}, solvers=ddim(1, 2, schedule="flow")),
        Method("SlimFlow's flow-guided", {"name": "flow-guided"}, solvers=ddim(1, schedule="flow")),
    ]  # fmt: skip
    alone = [
        Method("CT", {"name": "ct", "end": 20}, False, scratch=True, rates=ONE_RATE),
        Method("iCT", {"name": "ict", "end": 160}, False, scratch=True, rates=ONE_RATE),
        Method("SMT", {"name": "smt", "critic_rate": 5.0}, False, scratch=True, rates=ONE_RATE),
    ]
    seen = [
        Method("HiPA, adapters of rank 8", {"name": "hipa"}, solvers=ONE_AND_TWO[:1],
               adapter={"name": "lora", "rank": 8, "targets": "all"}),
        Method("ProDiff to two steps", {"name": "prodiff", "plan": [16, 8, 4, 2]}, solvers=ddim(2, schedule="trig")),
    ]  # fmt: skip
    return [*matching, *paths, *alone, *(seen if images else [])]
