"""Claims about where models start and how their batches run."""

from __future__ import annotations

import copy
from pathlib import Path

from hone.evidence.claims.base import Check, Side, Trial, claim
from hone.evidence.claims.tasks import SORT, TINY

# The shape of the shipped model, from random weights.
SAME_SHAPE = {
    "name": "fresh", "tokenizer": "base",
    "config": {
        "model_type": "llama", "hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 6, "intermediate_size": 512, "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


@claim("model", "pretrained", "starts-ahead")
def pretrained_starts_ahead(scratch: Path) -> Trial:
    """A pretrained model learns a new skill further in the same steps than the same model from random weights.

    Task: 40 steps of sorting, which neither can do before; the held-out loss.
    """
    return Trial(
        recipe=SORT, baseline=Side(label="random weights", settings={"model": SAME_SHAPE}),
        method=Side(label="pretrained", settings={"model": "base"}),
        checks=(Check(metric="loss", direction="lower", effect=0.2),),
    )  # fmt: skip


@claim("model", "pretrained", "packing")
def pretrained_packing(scratch: Path) -> Trial:
    """Packing gives the loss of padding with more tokens a second.

    Task: 12 steps of the easy skills at difficulties 1 to 5, whose lengths differ by a factor of ten; both sides see
    the same samples in the same order.

    Finding: the same loss at 1.9 times the tokens a second.
    """
    data = {"name": "chains", "skills": ["easy"], "difficulty": [1, 2, 3, 4, 5]}
    return Trial(
        recipe={**SORT, "data": data, "steps": 12}, baseline=Side(label="padding", settings={"packing": False}),
        method=Side(label="packing", settings={"packing": True}), alone=True,
        paper=("Enhancing Training Efficiency Using Packing with Flash Attention", "arXiv:2407.09105"),
        checks=(
            Check(metric="loss", direction="same", effect=1e-3),
            Check(metric="tokens_per_second", direction="higher", effect=0.2, relative=True),
        ),
    )  # fmt: skip


@claim("model", "pretrained", "mini-sequences")
def pretrained_mini_sequences(scratch: Path) -> Trial:
    """Feed-forward blocks over chunks of tokens train to the same loss at a lower peak of memory.

    Task: 8 steps of 8,192 tokens of the easy skills in one forward pass each; chunks of 256 tokens.

    Finding: the losses agree to five digits, and the peak is 1,259 MB against 1,646 (-23%).
    """
    data = {"name": "chains", "skills": ["easy"], "difficulty": [4, 5], "holdout": 20}
    recipe = {**SORT, "data": data, "steps": 8, "batch_tokens": 8192}
    recipe.pop("general_data")
    whole = {"name": "pretrained", "path": "base"}
    return Trial(
        recipe=recipe, baseline=Side(label="whole rows", settings={"model": whole}),
        method=Side(label="chunks of 256", settings={"model": {**whole, "mlp_chunk": 256}}), seeds=3, alone=True,
        paper=(
            "MINI-SEQUENCE TRANSFORMER: Optimizing Intermediate Memory for Long Sequences Training",
            "arXiv:2407.15892",
        ),
        checks=(
            Check(metric="loss", direction="same", effect=1e-3),
            Check(metric="peak_memory", direction="lower", effect=0.1, relative=True),
        ),
    )  # fmt: skip


@claim("model", "fresh", "wider-is-better")
def fresh_wider_is_better(scratch: Path) -> Trial:
    """From random weights, a wider model reaches a lower loss in the same steps.

    Task: the easy skills in 100 steps at widths 64 and 128, each at its best of two learning rates.
    """
    wide = copy.deepcopy(TINY["model"])
    wide["config"].update(hidden_size=128, intermediate_size=320)
    return Trial(
        recipe=TINY, baseline=Side(label="width 64", settings={"model": TINY["model"]}),
        method=Side(label="width 128", settings={"model": wide}), tune={"optimizer.lr": [3e-3, 1e-2]},
        paper=("Scaling Laws for Neural Language Models", "arXiv:2001.08361"),
        checks=(Check(metric="loss", direction="lower", effect=0.02),),
    )  # fmt: skip
