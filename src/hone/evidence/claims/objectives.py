"""Claims about what is minimised."""

from __future__ import annotations

from pathlib import Path

from hone.evidence.claims.base import Check, Side, Trial, claim
from hone.evidence.claims.tasks import ANSWERS, TINY

SFT = Side(label="answers only", settings={"objective": "sft"})


@claim("objective", "sft", "label-smoothing")
def sft_label_smoothing(scratch: Path) -> Trial:
    """Label smoothing of 0.1 lowers the error on held-out data.

    Task: the shipped model learns to sort short lists in 60 steps; the error is judged by generated answers.

    Finding: no difference. Smoothing is meant against overconfidence over many epochs; here no problem comes twice.
    """
    return Trial(
        recipe=ANSWERS, baseline=SFT, metric="accuracy",
        method=Side(label="label smoothing 0.1", settings={"objective": {"name": "sft", "label_smoothing": 0.1}}),
        paper=("Rethinking the Inception Architecture for Computer Vision", "arXiv:1512.00567"),
        checks=(Check(metric="accuracy", direction="higher"),),
    )  # fmt: skip


@claim("objective", "sft", "answers-only")
def sft_answers_only(scratch: Path) -> Trial:
    """Training on the answers alone gives more right answers than training on the prompts as well.

    Task: the shipped model learns to sort short lists in 60 steps; the baseline trains on every token.

    Finding: answers alone are right more often by 5 points in the mean, but seeds differ by up to 17 points, so that
    five of them do not show it.
    """
    return Trial(
        recipe=ANSWERS, baseline=Side(label="prompts too", settings={"objective": "pretrain"}), method=SFT,
        metric="accuracy", checks=(Check(metric="accuracy", direction="higher", effect=0.02),),
    )  # fmt: skip


@claim("objective", "pretrain", "z-loss")
def pretrain_z_loss(scratch: Path) -> Trial:
    """A z-loss of 1e-4 makes training at a high learning rate more stable, so that its loss is lower.

    Task: a model of 0.26M parameters learns the easy skills from nothing in 100 steps at a learning rate of 3e-2, six
    times its best. The loss is that of next tokens alone, on the same held-out problems.

    Finding: nothing diverges even at six times the best rate, since gradients are clipped at 1, arithmetic is float32
    and 100 steps leave the logits little time to drift; so there is nothing to stabilise.
    """
    recipe = {**TINY, "optimizer": {"name": "adamw", "lr": 3e-2}, "general_data": TINY["data"]}
    return Trial(
        recipe=recipe, baseline=Side(label="no z-loss", settings={"objective": "pretrain"}),
        method=Side(label="z-loss 1e-4", settings={"objective": {"name": "pretrain", "z_loss": 1e-4}}),
        paper=("PaLM: Scaling Language Modeling with Pathways", "arXiv:2204.02311"),
        checks=(Check(metric="general_loss", direction="lower"),),
    )  # fmt: skip
