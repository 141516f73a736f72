"""Claims about how parameters move."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from hone.evidence.claims.base import Check, Side, Trial, claim
from hone.evidence.claims.tasks import SMALL_BATCHES, TINY

ADAMW = Side(label="AdamW", settings={"optimizer": {"name": "adamw", "lr": 1e-3}})
# 60 problems read 12 times over: what is learnt by heart does not help on held-out ones.
FEW: dict[str, Any] = {**SMALL_BATCHES, "data": {**SMALL_BATCHES["data"], "count": 60}}


def wide() -> dict[str, Any]:
    """Return the tiny task on a model of 14M parameters, whose optimizer state weighs more than its activations."""
    recipe = copy.deepcopy(TINY)
    recipe["model"]["config"].update(
        hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_key_value_heads=12
    )
    return {**recipe, "steps": 6, "batch_tokens": 512}


@claim("optimizer", "adamw", "decoupled")
def adamw_decoupled(scratch: Path) -> Trial:
    """Decoupled weight decay generalises better than Adam with an L2 penalty, each at its best strength.

    Task: the shipped model reads 60 sorting problems some 12 times over in 100 small steps; each side tries two
    learning rates with three strengths of decay.

    Finding: no difference. Adam does best with next to no penalty, AdamW with the strongest decay that was tried:
    over 100 steps from a pretrained start, decay hardly moves the weights, which a comparison over many epochs would
    need.
    """
    return Trial(
        recipe=FEW, baseline=Side(label="Adam with L2", settings={"optimizer": {"name": "torch:adam", "lr": 1e-3}}),
        method=Side(label="AdamW", settings={"optimizer": {"name": "adamw", "lr": 1e-3}}),
        tune={"optimizer.lr": [5e-4, 2e-3], "optimizer.weight_decay": [1e-4, 1e-2, 1.0]},
        paper=("Decoupled Weight Decay Regularization", "arXiv:1711.05101"),
        checks=(Check(metric="loss", direction="lower", effect=0.005),),
    )  # fmt: skip


@claim("optimizer", "adafactor", "memory")
def adafactor_memory(scratch: Path) -> Trial:
    """Factored second moments need less memory than Adam's state.

    Task: six steps of a model of 14M parameters, whose weights take 57 MB and Adam's state twice that.
    """
    return Trial(
        recipe=wide(), baseline=ADAMW, seeds=3, alone=True,
        method=Side(label="Adafactor", settings={"optimizer": {"name": "adafactor", "lr": 1e-2}}),
        paper=("Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", "arXiv:1804.04235"),
        checks=(Check(metric="peak_memory", direction="lower", effect=50e6),),
    )  # fmt: skip


@claim("optimizer", "adafactor", "matches-adam")
def adafactor_matches_adam(scratch: Path) -> Trial:
    """Adafactor comes as far as Adam.

    Task: the shipped model learns to sort short lists in 100 small steps, each side at its best of four learning
    rates; Adafactor's loss may be higher by 0.02 at most.
    """
    return Trial(
        recipe=SMALL_BATCHES, baseline=ADAMW, tune={"optimizer.lr": [1e-3, 4e-3, 1e-2, 3e-2]},
        method=Side(label="Adafactor", settings={"optimizer": {"name": "adafactor", "lr": 1e-2}}),
        paper=("Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", "arXiv:1804.04235"),
        checks=(Check(metric="loss", direction="not higher", effect=0.02),),
    )  # fmt: skip


@claim("optimizer", "sgd", "momentum")
def sgd_momentum(scratch: Path) -> Trial:
    """Momentum of 0.9 learns more than plain stochastic gradient descent, each at its best learning rate.

    Task: the shipped model learns to sort short lists in 100 small steps, with four rates to choose from.

    Finding: each is as good as the other at its own best rate (0.3 without momentum, 0.1 with): in small noisy
    batches momentum amounts to a larger rate. The paper's deep networks train for thousands of steps.
    """
    return Trial(
        recipe=SMALL_BATCHES, tune={"optimizer.lr": [0.03, 0.1, 0.3, 1.0]},
        baseline=Side(label="momentum 0", settings={"optimizer": {"name": "sgd", "lr": 1.0, "momentum": 0.0}}),
        method=Side(label="momentum 0.9", settings={"optimizer": {"name": "sgd", "lr": 1.0, "momentum": 0.9}}),
        paper=(
            "On the importance of initialization and momentum in deep learning",
            "https://proceedings.mlr.press/v28/sutskever13.html",
        ),
        checks=(Check(metric="loss", direction="lower", effect=0.02),),
    )  # fmt: skip


@claim("optimizer", "torch:", "same-as-ours")
def torch_same_as_ours(scratch: Path) -> Trial:
    """An optimizer of torch.optim through the bridge takes the same steps as hone's own.

    Task: the shipped model learns to sort short lists in 100 small steps with AdamW by either name.
    """
    other = {"name": "torch:adamw", "lr": 1e-3, "weight_decay": 0.01}
    return Trial(
        recipe=SMALL_BATCHES, baseline=ADAMW, method=Side(label="torch:adamw", settings={"optimizer": other}), seeds=3,
        checks=(Check(metric="loss", direction="same", effect=5e-3),),
    )  # fmt: skip


@claim("optimizer", "pytorch_optimizer:", "lion")
def pytorch_optimizer_lion(scratch: Path) -> Trial:
    """Lion, through the bridge, comes as far as AdamW.

    Task: the shipped model learns to sort short lists in 100 small steps, each side at its best of four
    learning rates; Lion's loss may be higher by 0.02 at most.
    """
    return Trial(
        recipe=SMALL_BATCHES, baseline=ADAMW, tune={"optimizer.lr": [1e-4, 3e-4, 1e-3, 2e-3]},
        method=Side(label="Lion", settings={"optimizer": {"name": "pytorch_optimizer:lion", "lr": 1e-3}}),
        paper=("Symbolic Discovery of Optimization Algorithms", "arXiv:2302.06675"),
        checks=(Check(metric="loss", direction="not higher", effect=0.02),),
    )  # fmt: skip
