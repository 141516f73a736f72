"""Preference training against TRL: pairs per second and peak memory, and what sharing prompts gains.

    python bench/dpo.py [--rounds 3] [--steps 8] [--out FILE]

Model: a 6-layer Llama, width 384, vocabulary 8192, 16.9M parameters, float32. Data: the same random pairs for all
sides, 4 a step, prompts of 256 tokens and answers of 64. Every side trains all weights and computes the reference in
each step with a frozen copy of the model. Sides: `trl` (DPOTrainer), `hone` (one prompt with two answers is one tree),
and `unshared` (hone on the same pairs with the prompt written out for each answer: what sharing gains).
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from sft import VOCABULARY, WARM, model_config, tokenizer

PAIRS, PROMPT, ANSWER = 4, 256, 64


def pairs(steps: int) -> list[tuple[list[int], list[int], list[int]]]:
    """Return prompts with a preferred and another answer, as ids."""
    import numpy as np

    rng = np.random.default_rng(0)
    sizes = (PROMPT, ANSWER, ANSWER)
    return [tuple(rng.integers(4, VOCABULARY, n).tolist() for n in sizes) for _ in range(PAIRS * steps)]  # type: ignore[misc]


def trl_side(steps: int) -> dict[str, float]:
    """Train with TRL's DPOTrainer and return its speed and memory."""
    import warnings

    from datasets import Dataset
    from transformers import LlamaForCausalLM, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            times.append(-time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times[-1] += time.perf_counter()

    def text(ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids)

    rows = [{"prompt": text(p), "chosen": " " + text(c), "rejected": " " + text(r)} for p, c, r in pairs(steps)]
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder, per_device_train_batch_size=PAIRS, max_steps=steps, learning_rate=1e-4, report_to=[],
            save_strategy="no", logging_strategy="no", use_cpu=True, seed=0, gradient_checkpointing=False, bf16=False,
            disable_tqdm=True, max_length=PROMPT + ANSWER + 8,
        )  # fmt: skip
        trainer = DPOTrainer(
            model=LlamaForCausalLM(model_config()), ref_model=LlamaForCausalLM(model_config()), args=arguments,
            processing_class=tokenizer(), train_dataset=Dataset.from_list(rows), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return _figures(times[WARM:])


def hone_side(steps: int, shared: bool = True) -> dict[str, float]:
    """Train with hone's own loop on the same pairs.

    Args:
        steps: optimizer steps, the first few of which are not timed.
        shared: whether the two answers of a pair share its prompt.
    """
    import copy

    import numpy as np
    import torch
    from transformers import LlamaForCausalLM

    from hone import options
    from hone.engine.devices import Cluster
    from hone.engine.flops import count_flops
    from hone.engine.loop import Player, Run, Trainer
    from hone.objectives.reference import Copy
    from hone.recipe import Recipe
    from hone.text.model import LanguageModel
    from hone.text.pack import Tree

    torch.manual_seed(0)

    def tree(prompt: list[int], chosen: list[int], rejected: list[int]) -> Tree:
        p, a, b = (np.array(ids, np.int32) for ids in (prompt, chosen, rejected))
        none, own = np.zeros(PROMPT, np.float32), np.ones(ANSWER, np.float32)
        if shared:
            return Tree((p, a, b), (none, own, own), (-1, 0, 0), {"chosen": (float("nan"), 1.0, 0.0)})
        rows = np.concatenate([p, a]), np.concatenate([p, b])
        return Tree(rows, (np.concatenate([none, own]),) * 2, (-1, -1), {"chosen": (1.0, 0.0)})

    made = [tree(*one) for one in pairs(steps + 1)]
    model = LanguageModel(LlamaForCausalLM(model_config()), tokenizer())
    objective = options.build_part("objective", "dpo")
    objective._reference = Copy(copy.deepcopy(model))
    recipe = Recipe.of(data="chains", steps=steps, batch_tokens=PAIRS * 2 * (PROMPT + ANSWER))
    run = Run(recipe, Cluster("cpu", "float32"), model, objective, None, steps)
    params = list(model.named_parameters())
    optimizer = options.build_part("optimizer", {"name": "adamw", "lr": 1e-4}).build(params, {})
    run.players["model"] = Player(params, optimizer, lambda step, total: 1.0)
    trainer = Trainer(run)
    seconds = []
    for step in range(steps):
        began = time.perf_counter()
        trainer.train_step(made[PAIRS * step : PAIRS * (step + 1)])
        seconds.append(time.perf_counter() - began)
    found = _figures(seconds[WARM:])
    return {**found, "flops": float(count_flops(trainer, made[PAIRS * steps :]))}


def unshared_side(steps: int) -> dict[str, float]:
    """Train on the same pairs with the prompt written out twice."""
    return hone_side(steps, shared=False)


def _figures(seconds: list[float]) -> dict[str, float]:
    from side_by_side import whole_peak

    step = statistics.median(seconds)
    return {"seconds_per_step": step, "pairs_per_second": PAIRS / step, "peak_mib": whole_peak() / 2**20}


SIDES = {"trl": trl_side, "hone": hone_side, "unshared": unshared_side}


def ratios(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return what the sides' figures come to."""
    trl, hone, unshared = (found[side] for side in SIDES)
    gain, possible = hone["pairs_per_second"] / unshared["pairs_per_second"], unshared["flops"] / hone["flops"]
    return {
        "speed_ratio": hone["pairs_per_second"] / trl["pairs_per_second"],
        "memory_ratio": hone["peak_mib"] / trl["peak_mib"],
        "sharing_gain": gain, "flop_ratio": possible, "share_of_flop_ratio": gain / possible,
    }  # fmt: skip


if __name__ == "__main__":
    from side_by_side import compare

    compare(Path(__file__), __doc__, SIDES, 8, ratios)
