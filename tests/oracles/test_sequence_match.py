"""SequenceMatch: closed forms of the divergence, walks through states with deletions, and generation that deletes."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hone.errors import HoneError, ModelError
from hone.objectives.language import SFT
from hone.objectives.sequence_match import SequenceMatch, match_terms, state_values
from hone.objectives.walks import Episode, episodes_of, noised, pack_walks, state_tree
from hone.text.backspace import generate_deleting, left_of, remaining
from hone.text.model import LanguageModel
from hone.text.pack import Tree, pack
from hone.text.tokenizer import train_tokenizer

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
DELETE = 2  # <|pad|>


def make_model(config: dict[str, Any] = CONFIG) -> LanguageModel:
    torch.manual_seed(0)
    made = LanguageModel.fresh(config, train_tokenizer(["nothing much"], 300)).to(dtype=torch.float64)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return make_model()


def tree(tokens: list[int], prompt: int, number: int = 0) -> Tree:
    weights = np.ones(len(tokens), np.float32)
    weights[:prompt] = 0
    return Tree((np.array(tokens, np.int32),), (weights,), (-1,), where=f"toy:{number}")


TREES = [tree([0, 9, 8, 50, 51, 52, 1], 3), tree([0, 7, 60, 61, 1], 2, 1), tree([0, 70, 71, 72], 1, 2)]


def episode(prompt: list[int], actions: list[int], effects: list[int] | None = None, ended: bool = True) -> Episode:
    done = np.array(actions if effects is None else effects)
    return Episode(np.array(prompt), np.array(actions), done, np.ones(len(actions), np.float32), ended)


def logits_of(model: LanguageModel, tokens: list[int]) -> Tensor:
    return model.hf(torch.tensor([tokens])).logits[0, -1]


def objective_by_hand(model: LanguageModel, made: Episode, alpha: float, gamma: float, data: bool) -> Tensor:
    """Return minus the paper's objective over one episode: rewards, squares and V(s) - gamma V(s') of every step."""
    text, states = made.prompt.tolist(), []
    least = len(text)
    for effect in made.effects.tolist():
        states.append(logits_of(model, text))
        text = text[:-1] if effect == DELETE and len(text) > least else [*text, effect]
    states.append(logits_of(model, text))
    values = [state.logsumexp(-1) for state in states]
    total = torch.zeros((), dtype=torch.float64)
    for i, action in enumerate(made.actions.tolist()):
        reward = states[i][action] - gamma * values[i + 1]
        gain = (reward if data else 0.0) - alpha / 4 * reward.square()
        total = total + gamma**i * (gain - (values[i] - gamma * values[i + 1] if data else 0.0))
    if made.ended:  # it stays there for ever: a geometric series, summed far enough
        for i in range(len(states) - 1, len(states) - 1 + 4000):
            reward = (1 - gamma) * values[-1]
            gain = (reward if data else 0.0) - alpha / 4 * reward.square()
            total = total + gamma**i * (gain - (reward if data else 0.0))
    return -total


@pytest.mark.parametrize(("alpha", "gamma"), [(0.5, 0.9), (0.01, 0.99)])
def test_the_loss_is_the_divergence_of_the_paper(model: LanguageModel, alpha: float, gamma: float) -> None:
    episodes = [
        episode([0, 9], [50, DELETE, 50, 51, 1], [60, DELETE, 50, 51, 1]),
        episode([0, 7, 8], [61, 62, DELETE, 63, DELETE, DELETE, 61, 1]),
        episode([0, 7], [40, 41], ended=False),
    ]
    walks = pack_walks(episodes, DELETE, gamma)
    q, v = state_values(model, walks)
    for number, made in enumerate(episodes):
        rows = walks.episodes == number
        terms = match_terms(
            q[rows], v[walks.states[rows]], v[walks.following[rows]], walks.weights[rows], walks.final[rows], gamma
        )
        for data in (True, False):
            mine = alpha / 4 * terms.squares + (terms.likelihood if data else 0.0)
            expected = objective_by_hand(model, made, alpha, gamma, data)
            torch.testing.assert_close(mine, expected, **CLOSE)
            own, theirs = (
                torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in (mine, expected)
            )
            for ours, other in zip(own, theirs, strict=True):
                torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)  # weights are float32


def test_gradients_equal_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    q, v, after = (torch.randn(5, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3))
    weights, final = 0.9 ** torch.arange(5.0, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 0.5]).double()

    def loss(q: Tensor, v: Tensor, after: Tensor) -> Tensor:
        terms = match_terms(q, v, after, weights, final, 0.9)
        return terms.likelihood + 0.25 * terms.squares

    assert torch.autograd.gradcheck(loss, (q, v, after))
    huge = [torch.full((5,), x, requires_grad=True) for x in (1e4, -1e4, 1e4)]
    parts = match_terms(*huge, weights.float(), final.float(), 0.9)
    (parts.likelihood + parts.squares).backward()
    assert torch.isfinite(parts.squares) and all(torch.isfinite(x.grad).all() for x in huge)


def test_without_squares_and_discount_it_is_maximum_likelihood(model: LanguageModel) -> None:
    objective = SequenceMatch(alpha=0.0, gamma=1.0, noise=0.0)
    objective.equip(model)
    batch = pack(TREES)
    ours, theirs = objective.loss(model, batch)[0], SFT().loss(model, batch)[0]
    torch.testing.assert_close(ours, theirs, **CLOSE)
    for mine, other in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)


def test_on_a_table_the_best_values_match_the_data() -> None:
    """One step, two tokens: rewards come to 2/alpha (p - pi) / (p + pi), as the divergence's dual has it."""
    data, alpha = torch.tensor([0.8, 0.2]).double(), 0.5
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    nothing = torch.zeros(2, dtype=torch.float64)  # the value of the text that has ended
    for _ in range(3000):
        v, own = logits.logsumexp(0).expand(2), logits.softmax(0).detach()
        parts = [match_terms(logits, v, nothing, weights, nothing, 1.0) for weights in (data, own)]
        loss = parts[0].likelihood + alpha / 4 * (parts[0].squares + parts[1].squares)
        (slope,) = torch.autograd.grad(loss, logits)
        logits.data -= 0.5 * slope
    gradient = logits.softmax(0) - data + alpha / 2 * (data + logits.softmax(0)) * logits
    assert gradient.abs().max() < 1e-7
    best = 2 / alpha * (data - logits.softmax(0)) / (data + logits.softmax(0))
    torch.testing.assert_close(logits, best, **CLOSE)
    assert logits[0] > 0 > logits[1] and logits.softmax(0)[0] > 0.6


def test_states_of_an_episode_are_the_nodes_of_a_tree() -> None:
    made = episode([0, 9], [50, 51, DELETE, 52, DELETE, DELETE, DELETE, 50, 51, 1])
    found, places = state_tree(made, DELETE)
    texts = []
    for place in places:
        bounds = np.cumsum([0, *(len(segment) for segment in found.tokens)])
        segment = int(np.searchsorted(bounds, place, side="right")) - 1
        text = found.tokens[segment][: place - bounds[segment] + 1].tolist()
        while (segment := found.parents[segment]) >= 0:
            text = found.tokens[segment].tolist() + text
        texts.append(text[2:])
    assert texts == [[], [50], [50, 51], [50], [50, 52], [50], [], [], [50], [50, 51], [50, 51, 1]]
    assert len(found) == 2 + 4  # 50, 51, 52 and 1: each state once
    assert remaining(made.effects, DELETE) == [7, 8, 9]


def test_noise_is_deleted_at_once_and_leaves_the_text_as_it_was() -> None:
    clean = replace(episode([0, 9], list(range(100, 140))), weights=np.linspace(0.5, 1, 40).astype(np.float32))
    made = noised(clean, DELETE, 0.4, np.arange(20, 30), np.random.default_rng(0))
    assert [made.effects[n] for n in remaining(made.effects, DELETE)] == clean.actions.tolist()
    hits = np.flatnonzero(made.actions != made.effects)
    assert 8 <= len(hits) <= 24 and len(made.actions) == 40 + 2 * len(hits)
    assert (made.actions[hits + 1] == DELETE).all() and (made.actions[hits + 2] == made.actions[hits]).all()
    assert np.isin(made.effects[hits], np.arange(20, 30)).all() and (made.weights[hits] == made.weights[hits + 2]).all()


def test_episodes_are_runs_of_trained_tokens() -> None:
    weights = np.array([0, 0, 1, 1, 0, 0, 0.5], np.float32)
    chat = Tree((np.array([0, 5, 6, 1, 7, 8, 9], np.int32),), (weights,), (-1,))
    fork = Tree(
        tuple(np.array(x, np.int32) for x in ([0, 3], [4, 1], [5])),
        tuple(np.array(x, np.float32) for x in ([0, 0], [1, 1], [1])), (-1, 0, 0),
    )  # fmt: skip
    found = episodes_of(pack([chat, fork]), {1})
    assert [(e.prompt.tolist(), e.actions.tolist(), e.ended) for e in found] == [
        ([0, 5], [6, 1], True), ([0, 5, 6, 1, 7, 8], [9], False), ([0, 3], [4, 1], True), ([0, 3], [5], False),
    ]  # fmt: skip
    assert found[1].weights.tolist() == [0.5]


class Scripted:
    """Draws given tokens, row by row."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows, self.step, self.seen = rows, 0, list[Tensor]()

    def __call__(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        self.seen.append(logits)
        ids = torch.tensor([row[self.step] if self.step < len(row) else 1 for row in self.rows])
        self.step += 1
        return ids


def test_generation_goes_on_as_if_what_was_deleted_had_never_been_there(model: LanguageModel) -> None:
    scripts = [
        [50, 51, DELETE, 52, 53, DELETE, DELETE, 54, 55],
        [60, DELETE, 61, DELETE, 62, 63, 64, DELETE, 65],
        [70, 71, 72, DELETE, DELETE, DELETE, 73, 74, 75],
    ]
    prompts = [np.array(p, np.int32) for p in ([0, 9, 8, 7], [0, 6], [0, 5, 4])]
    order = [1, 2, 0]  # waves are sorted by length
    sampler = Scripted([scripts[n] for n in order])
    made = generate_deleting(model, prompts, DELETE, sampler=sampler, max_new_tokens=9)
    for n, (prompt, script) in enumerate(zip(prompts, scripts, strict=True)):
        drawn, row = made[n][0], order.index(n)
        assert drawn.tokens.tolist() == script
        text: list[int] = []
        for step, token in enumerate(script):
            expected = logits_of(model, [*prompt.tolist(), *text]).detach()
            offered = sampler.seen[step][row]
            assert math.isinf(offered[DELETE]) == (not text)
            keep = torch.arange(len(expected)) != DELETE
            torch.testing.assert_close(offered[keep], expected[keep], rtol=1e-9, atol=1e-9)
            if text:
                assert drawn.logprobs[step] == pytest.approx(float(expected.log_softmax(-1)[token]), rel=1e-8)
            text = text[:-1] if token == DELETE else [*text, token]
        assert left_of(drawn, DELETE).tokens.tolist() == text


def test_samples_of_one_prompt_end_apart(model: LanguageModel) -> None:
    scripts = [[50, 1], [51, DELETE, 52, 53, DELETE, 54, 1], [55, 56, DELETE, 1], [57, 58, 59, DELETE, 60, 61, 62]]

    class Rows(Scripted):
        looks_back = True

        def __call__(self, logits: Tensor, uniforms: Tensor, history: Any = None) -> Tensor:
            drawn = [tokens.tolist() for tokens in history.tokens]
            if not drawn[0]:
                return torch.tensor([script[0] for script in scripts])
            going = [[s for s in scripts if len(s) > len(d) and s[: len(d)] == d] for d in drawn]
            return torch.tensor([found[0][len(d)] if found else 1 for found, d in zip(going, drawn, strict=True)])

    prompt = np.array([0, 9, 8], np.int32)
    (made,) = generate_deleting(model, [prompt], DELETE, sampler=Rows([]), samples=4, stop=[1], max_new_tokens=7)
    assert [left_of(g, DELETE).tokens.tolist() for g in made] == [[50], [52, 54], [55], [57, 58, 60, 61, 62]]
    assert [g.stopped for g in made] == [True, True, True, False]
    last = logits_of(model, [0, 9, 8, 57, 58, 60, 61]).detach().log_softmax(-1)[62]
    assert made[3].logprobs[-1] == pytest.approx(float(last), rel=1e-8)


def run_of(model: LanguageModel, step: int = 0) -> Any:
    cluster = SimpleNamespace(autocast=nullcontext)
    return SimpleNamespace(model=model, step=step, recipe=SimpleNamespace(seed=3), cluster=cluster)


def test_the_models_own_answers_are_a_function_of_seed_and_step_and_survive_a_checkpoint(model: LanguageModel) -> None:
    def made() -> SequenceMatch:
        objective = SequenceMatch(alpha=0.5, samples=2, rollout=5, sample_every=2, replay=3, noise=0.3)
        objective.equip(model)
        return objective

    first, second = made(), made()
    model.train()
    for objective in (first, second):
        for step in range(3):
            objective.before_step(run_of(model, step), TREES)
    assert len(first._kept) == 3
    batch = pack(TREES)
    loss, metrics = first.loss(model, batch)
    assert torch.equal(loss, second.loss(model, batch)[0]) and metrics["squares_model"] > 0
    halves = [first.loss(model, pack(group))[0] for group in (TREES[:1], TREES[1:])]
    torch.testing.assert_close(loss, sum(halves), **CLOSE)
    resumed = made()
    resumed.load_state_dict(first.state_dict())
    for old, new in zip(first._kept, resumed._kept, strict=True):
        assert old.prompt.tolist() == new.prompt.tolist() and old.actions.tolist() == new.actions.tolist()
        assert old.ended == new.ended
    for objective in (first, resumed):
        objective.before_step(run_of(model, 3), TREES)
    assert torch.equal(first.loss(model, batch)[0], resumed.loss(model, batch)[0])
    nothing = made()
    nothing.load_state_dict(nothing.state_dict())
    assert nothing._kept == []
    model.eval()
    clean, metrics = first.loss(model, batch)
    plain = SequenceMatch(alpha=0.5, noise=0.0)
    plain.equip(model)
    assert torch.equal(clean, plain.loss(model, batch)[0]) and metrics["squares_model"] == 0
    model.train()


def test_a_token_that_deletes_must_be_free(model: LanguageModel) -> None:
    SequenceMatch(backspace="none").equip(model)
    chosen = SequenceMatch(backspace="<|system|>")
    chosen.equip(model)
    assert chosen._token == 3
    for name in ("<|end|>", "<|begin|>", "no such token"):
        with pytest.raises(HoneError, match=r"got '.*'; set backspace to a special token .* e.g. <\|pad\|>"):
            SequenceMatch(backspace=name).equip(model)
    bare = make_model()
    bare.tokenizer.pad_token = None
    with pytest.raises(HoneError, match="found no token that is called so and no padding token"):
        SequenceMatch().equip(bare)


def test_models_that_would_notice_a_deletion_are_refused(model: LanguageModel) -> None:
    windowed = make_model({**CONFIG, "model_type": "mistral", "sliding_window": 4, "num_key_value_heads": 2})
    with pytest.raises(ModelError, match="MistralForCausalLM has sliding windows"):
        generate_deleting(windowed, [np.array([0, 1])], DELETE)
    unpacked = make_model()
    unpacked.packs = False
    with pytest.raises(ModelError, match="LlamaForCausalLM does not pack"):
        generate_deleting(unpacked, [np.array([0, 1])], DELETE)
