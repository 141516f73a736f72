"""The tasks of claims about preferences: answers of the shipped model itself, verified to be right or wrong.

At temperature 1.5 the shipped model is right on less than half of these problems, though it is on nine tenths when it
answers greedily: it knows more than it says. Pairs of its own right and wrong answers can teach it to keep to what it
knows, and held-out problems are answered at the same temperature. Sampling takes about half a minute, once; the
answers are then kept and every cell reads them. The rate, the temperature and beta were chosen for DPO on seeds 0 to 3,
so claims run on seeds 10 to 14.
"""

from __future__ import annotations

from typing import Any

PROBLEMS: dict[str, Any] = {"name": "chains", "skills": ["easy"], "difficulty": 1, "count": 480, "holdout": 120}


def sampled(make: str, **options: Any) -> dict[str, Any]:
    """Return the data part that makes something of the answers that all these tasks share.

    Args:
        make: what is made of them, see `hone show sampled`.
        options: more options of it, such as pairs; those that change the answers make them anew.
    """
    return {
        "name": "sampled", "of": PROBLEMS, "make": make, "samples_each": 4, "temperature": 1.5, "max_new_tokens": 48,
        **options,
    }  # fmt: skip


# Preference learning on pairs, up to four a prompt: 25,000 tokens, about 12 s on one core.
PAIRS: dict[str, Any] = {
    "name": "pairs", "model": "base", "data": sampled("pairs", pairs=4), "adapter": "full",
    "objective": {"name": "dpo", "beta": 1.0}, "optimizer": {"name": "adamw", "lr": 3e-4},
    "schedule": {"name": "cosine", "warmup": 0.1}, "sampler": {"name": "sample", "temperature": 1.5}, "steps": 25,
    "batch_tokens": 1024, "eval_samples": 120, "max_new_tokens": 48, "seed": 10,
}  # fmt: skip

# Fine-tuning on the preferred answers of the same pairs, as many steps.
CHOSEN: dict[str, Any] = {**PAIRS, "name": "chosen", "data": sampled("chosen", pairs=4), "objective": "sft"}
