"""The tasks that claims share, so that their baselines are run once."""

from __future__ import annotations

from typing import Any

# Held-out text apart from the task: 24 pieces of up to 256 tokens, a second of one core.
GENERAL = {"name": "pydocs", "task": "text", "holdout": 24, "max_tokens": 256}

# The shipped model learns to sort, which it cannot do: 41,000 tokens, about 15 s on one core.
SORT: dict[str, Any] = {
    "name": "sort", "model": "base", "data": {"name": "chains", "skills": ["sort"], "difficulty": [1, 2]},
    "general_data": GENERAL, "adapter": "full", "objective": "sft", "optimizer": {"name": "adamw", "lr": 2e-3},
    "schedule": {"name": "cosine", "warmup": 0.1}, "steps": 40, "batch_tokens": 1024, "eval_samples": 0,
}  # fmt: skip

# A Llama of 0.26M parameters learns the easy skills from nothing: 200,000 tokens, about 10 s on one core.
TINY: dict[str, Any] = {
    "name": "tiny",
    "model": {
        "name": "fresh", "tokenizer": "base",
        "config": {
            "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 4, "intermediate_size": 160, "max_position_embeddings": 512,
            "tie_word_embeddings": True,
        },
    },
    "data": {"name": "chains", "skills": ["easy"], "difficulty": 1, "count": 20_000},
    "adapter": "full", "objective": "pretrain", "optimizer": {"name": "adamw", "lr": 5e-3},
    "schedule": {"name": "cosine", "warmup": 0.1}, "steps": 100, "batch_tokens": 2048, "eval_samples": 0,
}  # fmt: skip

# Sorting lists of three to five numbers, with generated answers: 60,000 tokens, about 20 s on one core.
ANSWERS: dict[str, Any] = {
    **SORT, "data": {"name": "chains", "skills": ["sort"], "difficulty": 1}, "steps": 60, "eval_samples": 100,
    "max_new_tokens": 60,
}  # fmt: skip

# The shipped model learns to sort short lists from small batches, whose noise is what schedules and optimizers cope
# with: 36,000 tokens, about 12 s on one core. From random weights, runs this short end while the loss still falls
# steeply, where whatever takes the larger steps wins.
SMALL_BATCHES: dict[str, Any] = {
    **{name: value for name, value in SORT.items() if name != "general_data"},
    "data": {"name": "chains", "skills": ["sort"], "difficulty": 1}, "optimizer": {"name": "adamw", "lr": 1e-3},
    "steps": 100, "batch_tokens": 384,
}  # fmt: skip

RATES = [1e-3, 3e-3, 1e-2, 3e-2]  # learning rates that the sides of a claim try: low-rank factors want the larger ones
SMALL_RATES = [5e-4, 1e-3, 2e-3, 4e-3]  # the same for small batches
