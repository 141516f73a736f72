"""Group rollouts against TRL: steps per second, peak memory, generation alone, and what sharing prompts gains.

    python bench/grpo.py [--rounds 3] [--steps 6] [--out FILE]

Model: a 6-layer Llama, width 384, vocabulary 8192, 16.9M parameters, float32. A step samples 8 answers of 64 tokens to
each of 2 random prompts of 256, scores them, computes the reference's log-probabilities (a frozen copy, kl 0.04), and
trains all weights once. Sides: `trl` (GRPOTrainer), `hone`, `unshared` (hone with the prompt written out for each
answer in training), `generate` (hone's generation alone), `transformers` (its `generate` on the same prompts) and
`products` (the bare products with the model's weights that the whole takes, each in the faster of its two forms:
prefill and decode steps; then reference, forward and backward pass of training). What `products` leaves of TRL's and of
transformers' time is the most that any program of the same products reaches: attention, norms, sampling, the optimizer
and Python would all have to be free.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from sft import VOCABULARY, WARM, model_config, tokenizer

PROMPTS, SAMPLES, PROMPT, ANSWER, KL = 2, 8, 256, 64, 0.04


def texts(steps: int) -> list[str]:
    """Return random prompts as text, one word a token."""
    import numpy as np

    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(4, VOCABULARY, PROMPT)) for _ in range(PROMPTS * steps)]


def worth(text: str) -> float:
    """Return what an answer is worth: the share of even words."""
    words = [word for word in text.split() if word[1:].isdigit()]
    return sum(int(word[1:]) % 2 == 0 for word in words) / max(1, len(words))


def trl_side(steps: int) -> dict[str, float]:
    """Train with TRL's GRPOTrainer and return its speed and memory."""
    import warnings

    import torch
    from datasets import Dataset
    from transformers import LlamaForCausalLM, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append(time.perf_counter())

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [worth(text) for text in completions]

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start"
        LlamaForCausalLM(model_config()).save_pretrained(start)
        tokenizer().save_pretrained(start)
        arguments = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=PROMPTS * SAMPLES, num_generations=SAMPLES, max_steps=steps,
            learning_rate=1e-4, report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, seed=0, beta=KL,
            gradient_checkpointing=False, bf16=False, disable_tqdm=True, max_completion_length=ANSWER,
            shuffle_dataset=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=str(start), reward_funcs=reward, args=arguments, processing_class=tokenizer(),
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts(steps)]), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return _figures([after - before for before, after in zip(marks[WARM - 1 :], marks[WARM:], strict=False)])


def hone_run(steps: int) -> Any:
    """Return a run of hone's on the same prompts, ready to step."""
    import copy

    import torch
    from transformers import LlamaForCausalLM

    from hone import options
    from hone.data.phases import Phases
    from hone.data.rollouts import Rollouts
    from hone.data.sample import Sample
    from hone.engine.devices import Cluster
    from hone.engine.loop import Player, Run
    from hone.objectives.reference import Copy
    from hone.recipe import Recipe
    from hone.rewards.base import Reward
    from hone.text.model import LanguageModel

    class Worth(Reward):
        name = "worth"

        def score(self, attempts: Any, source: Any) -> list[float]:
            return [worth(attempt.text) for attempt in attempts]

    torch.manual_seed(0)
    model = LanguageModel(LlamaForCausalLM(model_config()), tokenizer())
    source = Rollouts(
        of=None, rewards=Worth(), prompts=PROMPTS, samples_each=SAMPLES, max_new_tokens=ANSWER, shuffle=False
    )
    source.suit = lambda consumes: None  # type: ignore[method-assign]
    source._made = "groups"
    samples = [Sample(kind="prompt", prompt=text, where=f"row:{n}") for n, text in enumerate(texts(steps))]
    loader = Phases(source, samples, model.renderer, 0)
    objective = options.build_part("objective", {"name": "grpo", "kl": KL})
    objective._reference, objective._longest = Copy(copy.deepcopy(model)), ANSWER
    recipe = Recipe.of(data="chains", steps=steps, batch_tokens=PROMPTS * SAMPLES * (PROMPT + ANSWER))
    run = Run(recipe, Cluster("cpu", "float32"), model, objective, loader, steps)
    params = list(model.named_parameters())
    optimizer = options.build_part("optimizer", {"name": "adamw", "lr": 1e-4}).build(params, {})
    run.players["model"] = Player(params, optimizer, lambda step, total: 1.0)
    loader.join(run)
    return run


def hone_side(steps: int, change: Callable[[list[Any]], list[Any]] | None = None) -> dict[str, float]:
    """Train with hone's own loop and return its speed, memory and operations.

    Args:
        steps: optimizer steps, the first few of which are not timed.
        change: what becomes of the trees of a step before it is trained on.
    """
    from hone.engine.flops import count_flops
    from hone.engine.loop import Trainer

    run = hone_run(steps + 1)
    trainer = Trainer(run)
    whole, training = [], []
    for _ in range(steps):
        began = time.perf_counter()
        trees = next(run.loader)
        trees = trees if change is None else change(trees)
        sampled = time.perf_counter()
        trainer.train_step(trees)
        whole.append(time.perf_counter() - began)
        training.append(time.perf_counter() - sampled)
    found = _figures(whole[WARM:])
    trees = next(run.loader)
    flops = float(count_flops(trainer, trees if change is None else change(trees)))
    return {**found, "training_seconds": statistics.median(training[WARM:]), "flops": flops}


def unshared_side(steps: int) -> dict[str, float]:
    """Train with the prompt written out for each answer."""
    return hone_side(steps, _written_out)


def _written_out(trees: list[Any]) -> list[Any]:
    """Return trees in which each answer has a root of its own, behind the whole prompt."""
    import numpy as np

    from hone.text.pack import Tree

    made = []
    for tree in trees:
        prompt = tree.tokens[0]
        for segment in range(1, len(tree.tokens)):
            rows = {name: (np.concatenate([np.zeros(len(prompt)), row[segment]]),) for name, row in tree.values.items()}
            fields = {name: (row[segment],) for name, row in tree.fields.items()}
            tokens = np.concatenate([prompt, tree.tokens[segment]])
            weights = np.concatenate([np.zeros(len(prompt), np.float32), tree.weights[segment]])
            made.append(Tree((tokens,), (weights,), (-1,), fields, tree.where, rows))
    return made


def generate_side(steps: int) -> dict[str, float]:
    """Generate with hone alone."""
    from hone.samplers.text import Sample
    from hone.text.generate import generate

    run = hone_run(steps)
    prompts = [run.loader.renderer.prompt_ids(sample) for sample in run.loader.samples]
    seconds = []
    for step in range(steps):
        began = time.perf_counter()
        generate(run.model, prompts[PROMPTS * step : PROMPTS * (step + 1)], samples=SAMPLES, max_new_tokens=ANSWER,
                 sampler=Sample(), seed=step)  # fmt: skip
        seconds.append(time.perf_counter() - began)
    return _figures(seconds[WARM:])


def transformers_side(steps: int) -> dict[str, float]:
    """Generate with transformers' own `generate`."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model, words = LlamaForCausalLM(model_config()).eval(), tokenizer()
    rows = texts(steps)
    seconds = []
    for step in range(steps):
        ids = torch.tensor([words(text).input_ids for text in rows[PROMPTS * step : PROMPTS * (step + 1)]])
        began = time.perf_counter()
        with torch.no_grad():
            model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, num_return_sequences=SAMPLES,
                max_new_tokens=ANSWER, min_new_tokens=ANSWER,
            )  # fmt: skip
        seconds.append(time.perf_counter() - began)
    return _figures(seconds[WARM:])


def products_side(steps: int) -> dict[str, float]:
    """Multiply as generation and training do with every weight matrix of the model, and do nothing else."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    layers = [m.weight.detach() for m in LlamaForCausalLM(model_config()).modules() if isinstance(m, torch.nn.Linear)]
    few, prompts, all_ = PROMPTS * SAMPLES, PROMPTS * PROMPT, PROMPTS * (PROMPT + SAMPLES * ANSWER)
    rows = {n: {w.shape[1]: torch.randn(n, w.shape[1]) for w in layers} for n in (few, prompts, all_)}
    gradients = {w.shape[0]: torch.randn(all_, w.shape[0]) for w in layers}
    products = {w.shape: _faster(w, rows[few][w.shape[1]]) for w in layers}
    generating, training = [], []
    for _ in range(steps):
        began = time.perf_counter()
        for w in layers[:-1]:  # the head sees the last token of a prompt alone
            torch.mm(rows[prompts][w.shape[1]], w.t())
        for _ in range(ANSWER - 1):
            for w in layers:
                products[w.shape](w)
        generated = time.perf_counter()
        for w in layers:
            x, g = rows[all_][w.shape[1]], gradients[w.shape[0]]
            torch.mm(x, w.t())  # of the reference
            torch.mm(x, w.t())
            torch.mm(g, w)
            torch.mm(g.t(), x)
        generating.append(generated - began)
        training.append(time.perf_counter() - generated)
    return {
        "seconds_per_step": statistics.median(generating[WARM:]) + statistics.median(training[WARM:]),
        "generation_seconds": statistics.median(generating[WARM:]),
    }  # fmt: skip


def _faster(weight: Any, x: Any) -> Callable[[Any], Any]:
    """Return what multiplies rows with a weight of this shape: x W^T, or W x^T where that takes less time."""
    turned, took = x.t().contiguous(), []
    forms: list[Callable[[Any], Any]] = [lambda w: x @ w.t(), lambda w: w @ turned]
    for product in forms:
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            product(weight)
            seconds.append(time.perf_counter() - began)
        took.append(statistics.median(seconds))
    return forms[took.index(min(took))]


def _figures(seconds: list[float]) -> dict[str, float]:
    from side_by_side import whole_peak

    step = statistics.median(seconds)
    return {"seconds_per_step": step, "tokens_per_second": PROMPTS * SAMPLES * ANSWER / step,
            "peak_mib": whole_peak() / 2**20}  # fmt: skip


SIDES = {
    "trl": trl_side, "hone": hone_side, "unshared": unshared_side, "generate": generate_side,
    "transformers": transformers_side, "products": products_side,
}  # fmt: skip


def ratios(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return what the sides' figures come to."""
    trl, hone, unshared, own, other, products = (found[side] for side in SIDES)
    gain, possible = unshared["training_seconds"] / hone["training_seconds"], unshared["flops"] / hone["flops"]
    return {
        "speed_ratio": trl["seconds_per_step"] / hone["seconds_per_step"],
        "memory_ratio": hone["peak_mib"] / trl["peak_mib"],
        "generation_ratio": other["seconds_per_step"] / own["seconds_per_step"],
        "sharing_gain": gain, "flop_ratio": possible, "share_of_flop_ratio": gain / possible,
        "most_speed_ratio": trl["seconds_per_step"] / products["seconds_per_step"],
        "most_generation_ratio": other["seconds_per_step"] / products["generation_seconds"],
    }  # fmt: skip


if __name__ == "__main__":
    from side_by_side import compare

    compare(Path(__file__), __doc__, SIDES, 6, ratios)
