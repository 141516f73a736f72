"""Claims about adapters whose rank moves or is allocated."""

from __future__ import annotations

import json
from pathlib import Path

from hone.evidence.claims.adapters import LORA, TUNED
from hone.evidence.claims.base import Check, Side, Trial, claim
from hone.evidence.claims.tasks import SORT

_LAMDA = ("LaMDA: Large Model Fine-Tuning via Spectrally Decomposed Low-Dimensional Adaptation", "arXiv:2406.12832")
LAMDA = Side(label="LaMDA rank 16", settings={"adapter": {"name": "lamda", "rank": 16}})


def updates(run: Path) -> dict[str, float]:
    """Return how many numbers a run's optimizer has moved, in millions, counted once for every step.

    Args:
        run: a run folder; steps that do not say how many tensors' numbers train have those of the manifest.
    """
    trained = json.loads((run / "manifest.json").read_text(encoding="utf-8"))["model"]["trained"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {"updates": sum(row.get("trained", trained) for row in rows) / 1e6}


@claim("adapter", "adalora", "not-worse-at-equal-rank")
def adalora_not_worse(scratch: Path) -> Trial:
    """AdaLoRA ends no worse than LoRA when both end with the same rank in all.

    Task: the shipped model learns to sort in 40 steps, each side at its best of four learning rates. LoRA has rank 8 in
    every layer; AdaLoRA begins with 12 and ends with a mean of 8. The held-out loss may be higher by 0.02 at most.

    Finding: AdaLoRA ends 0.066 higher (0.033 to 0.106). Its values of E start at zero, so that it begins slower than
    LoRA (2.89 against 0.68 at a rate of 1e-3) and does best at the largest rate tried; 40 steps are short for a
    schedule of ranks. It forgets 0.02 nats against LoRA's 0.28.
    """
    return Trial(
        recipe=SORT, baseline=LORA, tune=TUNED,
        method=Side(label="AdaLoRA rank 12 to 8", settings={"adapter": {"name": "adalora", "rank": 8}}),
        paper=("AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", "arXiv:2303.10512"),
        checks=(Check(metric="loss", direction="not higher", effect=0.02),),
    )  # fmt: skip


@claim("adapter", "triadaptlora", "better-than-uniform")
def triadaptlora_better_than_uniform(scratch: Path) -> Trial:
    """Rank that grows where layers learn most is better than the same rank everywhere, at the same rank in all.

    Task: the shipped model learns to sort in 40 steps, each side at its best of four learning rates. LoRA has rank 8 in
    every layer; TriAdaptLoRA begins with 4, looks at every step from the third on, and has a mean of 8 in the end, with
    rank^2 numbers more in each layer for the triangles, a few in a hundred of the factors'. The held-out loss.
    """
    grown = {"name": "triadaptlora", "rank": 8, "start_rank": 4, "interval": 1, "warmup": 0.05}
    return Trial(
        recipe=SORT, baseline=LORA, tune=TUNED,
        method=Side(label="TriAdaptLoRA rank 4 to 8", settings={"adapter": grown}),
        paper=(
            "TriAdaptLoRA: Brain-Inspired Triangular Adaptive Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
            "arXiv:2501.08008",
        ),
        checks=(Check(metric="loss", direction="lower", effect=0.005),),
    )  # fmt: skip


@claim("adapter", "diffora", "selected-modules-suffice")
def diffora_selected_suffice(scratch: Path) -> Trial:
    """Updates of the half of the modules that the search selects come as far as updates of all of them.

    Task: the shipped model learns to sort in 40 steps, each side at its best of four learning rates, rank 8. LoRA
    trains a pair for each of the seven linear layers of a block, DiffoRA for four and one more pair for all others of
    a shape, after 20 steps of search. Its held-out loss may be higher by 0.03 at most, with a third fewer parameters.

    Finding: 0.013 higher in the mean with 40% fewer parameters; the interval (-0.027 to 0.044) reaches beyond the
    margin of 0.03.
    """
    return Trial(
        recipe=SORT, baseline=LORA, tune=TUNED,
        method=Side(label="DiffoRA, half of the modules", settings={"adapter": {"name": "diffora", "rank": 8}}),
        paper=(
            "DiffoRA: Enabling Parameter-Efficient LLM Fine-Tuning via Differential Low-Rank Matrix Adaptation",
            "arXiv:2502.08905",
        ),
        checks=(
            Check(metric="loss", direction="not higher", effect=0.03),
            Check(metric="trained", direction="lower", effect=0.33, relative=True),
        ),
    )  # fmt: skip


@claim("adapter", "lamda", "fewer-updates-than-lora")
def lamda_fewer_updates(scratch: Path) -> Trial:
    """LaMDA comes near LoRA with several times fewer updated parameters.

    Task: the shipped model learns to sort in 40 steps, each side at its best of four learning rates. LoRA has rank 8,
    LaMDA 16, and freezes the projection out of its square matrix, column by column, in the first 12 steps. Updates are
    the sum over steps of the numbers that train: three quarters fewer. The held-out loss, 3.0 before training, may be
    higher by 0.15 at most.

    Finding: 0.13 higher with 5.3 million fewer updates, as claimed; the interval (0.07 to 0.23) reaches beyond the
    margin of 0.15.
    """
    return Trial(
        recipe=SORT, baseline=LORA, method=LAMDA, tune=TUNED, figures=updates, paper=_LAMDA,
        checks=(
            Check(metric="loss", direction="not higher", effect=0.15),
            Check(metric="updates", direction="lower", effect=0.75, relative=True),
        ),
    )  # fmt: skip


@claim("adapter", "lamda-plus", "not-worse-than-uniform")
def lamda_plus_not_worse(scratch: Path) -> Trial:
    """Ranks that follow the spectra of the weights are no worse than the same rank everywhere, at the same sum.

    Task: the shipped model learns to sort in 40 steps with LaMDA of mean rank 16, each side at its best of four
    learning rates; the held-out loss may be higher by 0.02 at most.

    Finding: no difference in the mean (0.003); the interval (-0.021 to 0.021) ends a hair beyond the margin.
    """
    return Trial(
        recipe=SORT, baseline=LAMDA, tune=TUNED, paper=_LAMDA,
        method=Side(label="LaMDA++ mean rank 16", settings={"adapter": {"name": "lamda-plus", "rank": 16}}),
        checks=(Check(metric="loss", direction="not higher", effect=0.02),),
    )  # fmt: skip
