"""Guided decoding against enumeration, the loss of its reward model against Bradley-Terry written out, and voting."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hone.errors import ModelError
from hone.objectives.preference import Side
from hone.objectives.reference_free import ARM
from hone.options import Places, check_part
from hone.samplers.guided import GenARM, guided_scores
from hone.samplers.text import Sample
from hone.text.generate import generate
from hone.text.model import LanguageModel
from hone.text.pack import Tree, pack
from oracles.test_generation import build

VOCABULARY, STOP, LONGEST = 5, 2, 3


def small(seed: int) -> LanguageModel:
    """Return a random model of five tokens in float64."""
    model = LanguageModel(build("llama", vocab_size=VOCABULARY), None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def guided(models: list[LanguageModel], weights: list[float], **options: Any) -> GenARM:
    """Return the sampler with guides that are loaded already."""
    sampler = GenARM(guides=["guide"] * len(models), weights=weights, **options)
    sampler._loaded = models
    return sampler


def enumerated(models: list[LanguageModel], weights: list[float], prompt: np.ndarray) -> dict[tuple[int, ...], float]:
    """Return the probability of every continuation, by running each model on every prefix without any cache."""

    def following(drawn: tuple[int, ...]) -> torch.Tensor:
        ids = torch.tensor([[*prompt.tolist(), *drawn]])
        product = torch.ones(VOCABULARY, dtype=torch.float64)
        for model, weight in zip(models, weights, strict=True):
            with torch.no_grad():
                product *= model.hf(ids).logits[0, -1].softmax(-1) ** weight
        return product / product.sum()

    found = {}
    for length in range(1, LONGEST + 1):
        for drawn in itertools.product(range(VOCABULARY), repeat=length):
            ended = [place for place, token in enumerate(drawn) if token == STOP]
            if ended[:1] == [length - 1] or (length == LONGEST and not ended):
                steps = [following(drawn[:place])[token] for place, token in enumerate(drawn)]
                found[drawn] = float(torch.stack(steps).prod())
    assert sum(found.values()) == pytest.approx(1.0, abs=1e-12)
    return found


@pytest.mark.parametrize("weights", [[1.0], [0.5, 1.5], [2.0, -0.7]])
def test_what_is_drawn_follows_the_product_over_all_continuations(weights: list[float]) -> None:
    base, *guides = [small(seed) for seed in range(1 + len(weights))]
    prompts = [np.array(ids, np.int32) for ids in ([3, 1], [4, 0, 3, 1])]  # of different lengths: padding in the caches
    count = 4000
    made = generate(
        base, prompts, samples=count, max_new_tokens=LONGEST, stop=[STOP], seed=3, batch=2 * count,
        sampler=guided(guides, weights, then=Sample()),
    )  # fmt: skip
    for prompt, group in zip(prompts, made, strict=True):
        expected = enumerated([base, *guides], [1.0, *weights], prompt)
        drawn = [tuple(generation.trajectory()[0].tolist()) for generation in group]
        seen = np.array([drawn.count(answer) for answer in expected]) / count
        assert np.abs(seen - np.array(list(expected.values()))).max() < 4 * np.sqrt(0.25 / count)
        assert set(drawn) <= set(expected)


def test_the_scores_at_every_step_equal_those_without_caches() -> None:
    base, *guides = [small(seed) for seed in range(3)]
    weights, seen = [0.5, 1.5], dict[tuple[int, ...], torch.Tensor]()
    prompts = [np.array(ids, np.int32) for ids in ([3, 1], [4, 0, 3, 1], [1])]

    class Watching(Sample):
        looks_back = True

        def __call__(self, logits: torch.Tensor, uniforms: torch.Tensor, history: Any = None) -> torch.Tensor:
            for row, (which, drawn) in enumerate(zip(history.which, history.tokens, strict=True)):
                seen[(int(which), *drawn.tolist())] = logits[row].softmax(-1)
            return super().__call__(logits, uniforms)

    sampler = guided(guides, weights, then=Watching())
    generate(base, prompts, samples=6, max_new_tokens=6, stop=[STOP], sampler=sampler, batch=18)
    assert (
        len(seen) > 20 and max(map(len, seen)) == 6
    )  # rows end at different steps, so that the caches are thinned out
    for (which, *drawn), probs in seen.items():
        if STOP in drawn:  # carried along after its end
            continue
        ids = torch.tensor([[*prompts[which].tolist(), *drawn]])
        with torch.no_grad():
            logits = [model.hf(ids).logits[0, -1].softmax(-1) for model in (base, *guides)]
        product = logits[0] * logits[1] ** weights[0] * logits[2] ** weights[1]
        torch.testing.assert_close(probs, product / product.sum(), rtol=1e-9, atol=1e-12)


def test_weights_of_zero_leave_the_model_as_it_is() -> None:
    base, guide = small(0), small(1)
    prompts = [np.array([3, 1], np.int32)]
    plain = generate(base, prompts, samples=20, max_new_tokens=5, sampler=Sample(), seed=1)
    same = generate(base, prompts, samples=20, max_new_tokens=5, sampler=guided([guide], [0.0], then=Sample()), seed=1)
    assert [g.tokens.tolist() for g in same[0]] == [g.tokens.tolist() for g in plain[0]]
    torch.testing.assert_close(same[0][0].logprobs, plain[0][0].logprobs)  # the model's own, not the product's


def test_a_dpo_model_as_its_own_guide_gives_the_sharper_power() -> None:
    logits = torch.randn(3, 7, dtype=torch.float64)
    power = guided_scores(logits, [logits, logits], [0.5, 1.0]).softmax(-1)
    torch.testing.assert_close(power, (2.5 * logits).softmax(-1))


def test_guides_are_loaded_and_must_fit(tiny_model: Path, tmp_path: Path) -> None:
    model = LanguageModel.load(tiny_model)
    sampler = GenARM(guides=[str(tiny_model)])
    (guide,) = sampler.beside(model)
    assert sampler.beside(model)[0] is guide and not any(p.requires_grad for p in guide.parameters())
    made = generate(model, [model.renderer.prompt_ids(SimpleNamespace(prompt="What", where="", kind="prompt"))],
                    max_new_tokens=4, sampler=sampler)  # fmt: skip
    assert len(made[0][0].tokens) == 4
    with pytest.raises(ModelError, match="another tokenizer"):
        GenARM(guides=["base"]).beside(model)
    model.packs = False
    with pytest.raises(ModelError, match="does not run packed"):
        GenARM(guides=[str(tiny_model)]).beside(model)
    problems = check_part("sampler", {"name": "genarm", "guides": ["base"], "weights": [1.0, 2.0]}, "sampler", Places())
    assert [problem.field for problem in problems] == ["sampler.weights"]
    assert check_part("sampler", "genarm", "sampler", Places()) == []


def test_the_loss_of_an_autoregressive_reward_model_is_bradley_terry_of_its_log_probabilities() -> None:
    model = small(4)
    prompt, good, bad = [3, 1], [4, 4, 0, 2], [1, 2]
    fields = {"chosen": (float("nan"), 1.0, 0.0)}
    parts = tuple(np.array(ids, np.int32) for ids in (prompt, good, bad))
    tree = Tree(
        parts, tuple(np.full(len(p), float(i > 0), np.float32) for i, p in enumerate(parts)), (-1, 0, 0), fields
    )
    rewards = []
    for answer in (good, bad):
        with torch.no_grad():
            logits = model.hf(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        rewards.append(sum(logits[len(prompt) + t - 1, token] for t, token in enumerate(answer)))
    expected = -F.logsigmoid(0.3 * (rewards[0] - rewards[1]))
    loss, metrics = ARM(beta=0.3).loss(model, pack([tree]))
    torch.testing.assert_close(loss, expected)
    assert float(metrics["margin"]) == pytest.approx(float(0.3 * (rewards[0] - rewards[1])))
    side = Side(torch.tensor([-3.0]), torch.zeros(1), torch.ones(1))
    assert ARM().sft == 0 and ARM().beta == 0.05 and float(ARM(beta=2.0).reward(side)) == -6.0
