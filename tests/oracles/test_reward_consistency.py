"""Consistency of reward models: crossed pairs, corners of a hull, fused rewards and joined experts, each by hand."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial import ConvexHull

from hone.data.contrast import Contrast, ConvexAugmented, character_vectors, extremes, hull
from hone.data.sample import Sample
from hone.data.source import Source, Split
from hone.errors import DataError, HoneError
from hone.objectives.answers import answers_of
from hone.objectives.classify import Classify
from hone.objectives.dmoerm import DMoERM
from hone.objectives.reward_fusion import RewardFusion, fused, nearest, token_vector
from hone.objectives.reward_model import RewardModel
from hone.recipe import Recipe, dump
from hone.text.heads import HEAD, new_head
from hone.text.model import LanguageModel
from hone.text.pack import Tree, pack

TEXTS = [  # the answers of `pairs` in order
    ("What does animal 3 say?", "I am a cat"), ("What does animal 3 say?", "I am a dog"),
    ("What does animal 4 say?", "I am an owl"), ("What does animal 4 say?", "I say a whale"),
]  # fmt: skip


class Rows(Source):
    """Samples as they are given."""

    def __init__(self, *rows: Sample) -> None:
        super().__init__()
        self.rows = rows

    def samples(self, split: Split) -> Iterator[Sample]:
        return iter(self.rows)

    def fingerprint(self) -> str:
        return "rows"


def cosine(one: str, other: str) -> float:
    """Return the cosine of two texts' counts of one to three characters in a row, counted plainly."""

    def counts(text: str) -> dict[str, int]:
        found: dict[str, int] = {}
        for size in (1, 2, 3):
            for at in range(len(text) - size + 1):
                found[text[at : at + size]] = found.get(text[at : at + size], 0) + 1
        return found

    a, b = counts(one), counts(other)
    dot = sum(value * b.get(key, 0) for key, value in a.items())
    return dot / (sum(v * v for v in a.values()) * sum(v * v for v in b.values())) ** 0.5


def test_character_vectors_have_the_cosines_of_plain_counts() -> None:
    texts = ["add 47 + 38 =\n", "add 47 + 39 =\n", "sort 3 1 2 =\n", "a", ""]
    vectors = character_vectors(texts, width=1 << 18)
    for (i, one), (j, other) in itertools.combinations(enumerate(texts[:4]), 2):
        assert float(vectors[i] @ vectors[j]) == pytest.approx(cosine(one, other), abs=1e-5)
    assert not vectors[4].any()


def test_contrasts_cross_the_answers_of_prompts_that_are_nearly_alike() -> None:
    rows = [
        Sample("completion", prompt, (answer,))
        for prompt, answer in [("add 47 + 38 =\n", "85"), ("add 47 + 39 =\n", "86"), ("sort 9 1 =\n", "1 9"),
                               ("add 47 + 38 = \n", "85")]
    ]  # fmt: skip
    found = list(Contrast(of=Rows(*rows), low=0.5, high=0.999).samples("train"))
    # The last prompt has the answer of the first, so neither is set against the other.
    assert [(s.prompt, s.answers) for s in found[:2]] == [
        ("add 47 + 38 =\n", ("85", "86")), ("add 47 + 39 =\n", ("86", "85")),
    ]  # fmt: skip
    assert [s.prompt for s in found] == [rows[0].prompt, rows[1].prompt, rows[3].prompt]
    (first, *_) = Contrast(of=Rows(*rows), low=0.5, high=0.999, make="instructions").samples("eval")
    assert first.prompt == "" and first.answers == ("add 47 + 38 =\n85", "add 47 + 39 =\n85")
    with pytest.raises(DataError, match="widen the band"):
        list(Contrast(of=Rows(*rows), low=0.01, high=0.02).samples("train"))


def test_the_hull_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for size in (3, 4, 10, 40):
        points = rng.normal(size=(size, 2))
        assert hull(points) == sorted(ConvexHull(points).vertices.tolist())
    assert hull(np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])) == [0, 2]  # a line has two ends
    assert hull(np.zeros((1, 2))) == [0] and hull(np.array([[0.0, 0.0], [1.0, 0.0]])) == [0, 1]


def test_rewordings_at_the_corners_are_added() -> None:
    pair = Sample("pair", "add 1 + 2 =\n", ("1+2=3\nanswer: 3", "answer: 4"))
    source = ConvexAugmented(of=Rows(pair), rewordings=12, synonyms={"answer:": ["so:", "result:"], "=": [" is "]})
    first, *others = source.samples("train")
    assert first is pair and others and list(source.samples("eval")) == [pair]
    possible = {f"1+2{a}3\n{b} 3" for a in ("=", " is ") for b in ("answer:", "so:", "result:")}
    assert {sample.answers[0] for sample in others} <= possible - {pair.answers[0]}
    assert all(sample.answers[1] == "answer: 4" and sample.prompt == pair.prompt for sample in others)
    texts = list(dict.fromkeys(source.reworded("1+2=3\nanswer: 3", rng) for rng in map(Random, range(40))))
    assert set(texts) == possible and len(extremes(texts)) < len(texts) and extremes(["one"]) == [0]
    with pytest.raises(DataError, match="needs pairs"):
        list(ConvexAugmented(of=Rows(Sample("completion", "a", ("b",)))).samples("train"))


def pairs(model: LanguageModel) -> Any:
    rows = [
        Sample("pair", "What does animal 3 say?", ("I am a cat", "I am a dog")),
        Sample("pair", "What does animal 4 say?", ("I am an owl", "I say a whale")),
    ]
    return pack([tree for row in rows for tree in model.renderer.render(row)])


def test_rewards_are_fused_with_those_of_similar_preferred_answers(tiny_model: Path) -> None:
    model = LanguageModel.load(tiny_model, dtype=torch.float64)
    known = [
        Sample("pair", "What does animal 3 say?", ("I am a cat", "x")),
        Sample("list", "What does animal 3 say?", ("y", "I am a horse"), scores=(0.0, 1.0)),
        Sample("pair", "Nothing like it at all", ("whale whale", "x")),
    ]
    objective = RewardFusion(alike=0.6, neighbours=2)
    objective.look(Rows(*known))
    objective.equip(model)
    batch = pairs(model)
    answers = answers_of(batch)
    plain = RewardModel.rewards(objective, model, batch, answers)
    model.train()
    assert torch.equal(objective.rewards(model, batch, answers), plain)  # the tiny model has no dropout
    model.eval()
    found = objective.rewards(model, batch, answers)

    def reward(prompt: str, answer: str) -> tuple[torch.Tensor, np.ndarray]:
        (tree,) = model.renderer.render(Sample("completion", prompt, (answer,)))
        states = model.hidden(pack([tree]))
        return model.extras[HEAD](states[-1])[0], token_vector(tree.tokens[0])

    bank = [reward("What does animal 3 say?", "I am a cat"), reward("What does animal 3 say?", "I am a horse"),
            reward("Nothing like it at all", "whale whale")]  # fmt: skip
    fused_any = 0
    for text, value, own in zip(TEXTS, found, plain, strict=True):
        _, vector = reward(*text)
        near = sorted(((float(vector @ v), r) for r, v in bank), key=lambda pair: -pair[0])[:2]
        near = [(s, r) for s, r in near if s >= 0.6]
        fused_any += bool(near)
        expected = (own + sum(s * r for s, r in near)) / (1 + sum(s for s, _ in near))
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
    assert fused_any >= 2
    torch.testing.assert_close(
        fused(torch.tensor([1.0, 2.0]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([3.0, 9.0])),
        torch.tensor([2.0, 2.0]),
    )


def test_there_are_no_more_neighbours_than_asked_for_and_none_twice() -> None:
    alike = np.array([[1.0] * 8 + [0.95], [0.1] * 7 + [0.9, 0.95]])
    found = nearest(alike, 5, 0.9)
    assert (found > 0).sum(1).tolist() == [5, 2] and found[0, :5].tolist() == [1.0] * 5
    assert found[1, 7:].tolist() == [0.9, 0.95] and (nearest(alike, 20, 0.9) > 0).sum(1).tolist() == [9, 2]
    objective = RewardFusion()
    known = [Sample("pair", "What?", (better, worse)) for better, worse in (("a", "b"), ("a", "c"), ("b", "c"))]
    objective.look(Rows(*known))
    assert [sample.answers for sample in objective._known] == [("a",), ("b",)]


def write_expert(tiny_model: Path, folder: Path, seed: int) -> str:
    model = LanguageModel.load(tiny_model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save(folder)
    return str(folder)


def test_experts_are_frozen_and_their_states_are_joined(tiny_model: Path, tmp_path: Path) -> None:
    paths = [write_expert(tiny_model, tmp_path / f"expert-{seed}", seed) for seed in (1, 2)]
    model = LanguageModel.load(tiny_model)
    objective = DMoERM(experts={"all": paths})
    objective.equip(model)
    batch = pairs(model)
    loss, metrics = objective.loss(model, batch)
    made: Any = model.extras["aggregation_0"]
    states = []
    for path in paths:
        expert = LanguageModel.load(path)
        ends = []
        for prompt, answer in TEXTS:
            (tree,) = expert.renderer.render(Sample("completion", prompt, (answer,)))
            with torch.no_grad():
                ends.append(
                    expert.hf.model(torch.from_numpy(tree.tokens[0].astype(np.int64))[None]).last_hidden_state[0, -1]
                )
        states.append(torch.stack(ends))
    joined = torch.cat(states, 1) @ made.joined.weight.T + made.joined.bias
    bent = torch.where(joined > 0, joined, made.bend.weight * joined)
    rewards = (bent @ made.reward.weight.T + made.reward.bias)[:, 0]
    expected = -F.logsigmoid(rewards[[0, 2]] - rewards[[1, 3]]).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(p.grad is None for p in model.hf.parameters()) and made.joined.weight.grad.abs().sum() > 0
    assert float(objective.count(batch)) == 2 and set(metrics) == {"pair_accuracy", "margin", "reward"}
    (text,) = objective.verdicts(model, ["What does animal 3 say?I am a cat"])
    assert text.startswith("reward ")


def test_a_router_sends_each_prompt_to_the_experts_of_its_category(tiny_model: Path, tmp_path: Path) -> None:
    paths = {name: [write_expert(tiny_model, tmp_path / name, seed)] for seed, name in enumerate(("odd", "even"), 1)}
    router = LanguageModel.load(tiny_model)
    router.extras[HEAD] = new_head(router, ["even", "odd"], bias=False)
    router.save(tmp_path / "router")
    router.save_extras(tmp_path / "router")
    model = LanguageModel.load(tiny_model)
    objective = DMoERM(experts=paths, router=str(tmp_path / "router"))
    objective.equip(model)
    batch = pairs(model)
    prompts = [batch.tokens[int(batch.starts[at]) : int(batch.starts[at + 1])] for at in (0, 3)]
    with torch.no_grad():
        numbers = [
            int(router.extras[HEAD](router.hf.model(ids[None]).last_hidden_state[0, -1]).argmax()) for ids in prompts
        ]
        assert objective.routed(batch).tolist() == numbers  # classes and categories are both in alphabetical order
        router_head: Any = objective._router.extras[HEAD]
        router_head.weight.copy_(torch.stack([router_head.weight[0], -router_head.weight[0]]))
        objective.routed = lambda batch: torch.tensor([1, 0])  # type: ignore[method-assign]
        found = objective.rewards(model, batch, answers_of(batch))
        for tree, name in ((0, "odd"), (1, "even")):
            alone = DMoERM(experts={name: paths[name]})
            other = LanguageModel.load(tiny_model)
            alone.equip(other)
            number = ["even", "odd"].index(name)
            other.extras["aggregation_0"].load_state_dict(model.extras[f"aggregation_{number}"].state_dict())
            whole = alone.rewards(other, batch, answers_of(batch))
            torch.testing.assert_close(found[2 * tree : 2 * tree + 2], whole[2 * tree : 2 * tree + 2])
    with pytest.raises(HoneError, match="classes are even, odd, found no such model"):
        DMoERM(experts=paths).equip(LanguageModel.load(tiny_model))


def test_a_router_reads_prompts_as_it_was_trained_to(tiny_model: Path, tmp_path: Path) -> None:
    model = LanguageModel.load(tiny_model)
    batch, run = pairs(model), tmp_path / "run"
    trained = Classify(classes=["even", "odd"], unmask="all", pooling="mean")
    trained.equip(model)
    head: Any = model.extras[HEAD]
    ids = batch.tokens[: int(batch.starts[1])].numpy().astype(np.int32)
    asked = pack([Tree((ids,), (np.zeros(len(ids), np.float32),), (-1,))])
    with torch.no_grad():  # what is even to the mean of states that see both ways is odd to a causal last one
        states = torch.stack([trained.hidden(model, asked).mean(0), model.hidden(asked)[-1]])
        even = torch.linalg.lstsq(states, torch.tensor([[1.0], [-1.0]])).solution[:, 0]
        head.weight.copy_(torch.stack([even, -even]))
    model.save(run / "model")
    model.save_extras(run / "model")
    (run / "result.json").write_text('{"status": "finished"}')

    def routed(**options: Any) -> int:
        recipe = Recipe.of(steps=1, data="chains", objective=options)
        (run / "recipe.yaml").write_text(dump(recipe))
        objective = DMoERM(experts={"odd": [str(tiny_model)], "even": [str(tiny_model)]}, router=str(run / "model"))
        objective.equip(LanguageModel.load(tiny_model))
        return int(objective.routed(batch)[0])

    assert routed(name="classify", unmask="all", pooling="mean") == 0 and routed(name="classify") == 1
    with pytest.raises(HoneError, match="was trained by Tag; expected classify"):
        routed(name="tag")


def test_without_experts_the_model_itself_is_the_only_one(tiny_model: Path) -> None:
    model = LanguageModel.load(tiny_model)
    objective = DMoERM()
    objective.equip(model)
    assert objective.categories == ["all"] and objective.routed(pairs(model)).tolist() == [0, 0]
    assert objective.readout(model).obstacle and objective.class_names() == ("reward",)
    objective.setup(SimpleNamespace())
