"""Search over steps: values worked out by hand, a plain PUCT beside it, and beams against enumeration."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from hone.errors import ModelError
from hone.samplers.text import Sample
from hone.text.generate import generate
from hone.text.heads import HEAD
from hone.text.model import LanguageModel
from hone.text.pack import Tree, pack
from hone.text.search import Move, Node, beam_search, tree_search
from hone.text.steps import Prefix, Steps, cut_steps, step_ends
from hone.text.tokenizer import train_tokenizer
from hone.text.values import add_value_head, continuation_values, value_head

Word = str


class Words:
    """Words over a few letters that are finished at some length, with priors and values of every state."""

    def __init__(self, letters: str, length: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.letters, self.length, self.expanded = letters, length, list[Word]()
        every = ["".join(w) for n in range(length + 1) for w in itertools.product(letters, repeat=n)]
        self.values = dict(zip(every, rng.uniform(-1, 1, len(every)).tolist(), strict=True))
        self.priors = dict(zip(every, rng.uniform(0, 1, len(every)).tolist(), strict=True))

    def expand(self, states: Sequence[Word]) -> list[list[Move[Word]]]:
        self.expanded += states
        grown = [[state + letter for letter in self.letters] for state in states]
        return [[Move(w, self.priors[w], len(w) == self.length) for w in words] for words in grown]

    def value(self, states: Sequence[Word]) -> list[float]:
        return [self.values[state] for state in states]


class Plain:
    """PUCT with lists of all values that were backed up through each state, and nothing else."""

    def __init__(self, words: Words, c: float) -> None:
        self.words, self.c = words, c
        self.backed: dict[Word, list[float]] = {"": []}
        self.below: dict[Word, set[Word]] = {}  # of continued states: continuations that there is something left in

    def bound(self, state: Word) -> float:
        backed, above = self.backed[state], max(1, len(self.backed[state[:-1]]))
        mean = sum(backed) / len(backed) if backed else 0.0
        return mean + self.c * self.words.priors[state] * math.sqrt(above) / (1 + len(backed))

    def choose(self, state: Word) -> Word:
        return max(
            (state + letter for letter in self.words.letters if state + letter in self.below[state]), key=self.bound
        )

    def note(self, state: Word) -> None:
        for end in range(len(state) + 1):
            self.backed[state[:end]].append(self.words.values[state])

    def grow(self, state: Word) -> None:
        self.below[state] = {state + letter for letter in self.words.letters}
        self.backed.update({child: [] for child in self.below[state]})

    def play_out(self) -> None:
        state = ""
        while len(state) < self.words.length:
            if state not in self.below:
                self.grow(state)
            state = self.choose(state)
        self.note(state)

    def look(self) -> None:
        state = ""
        while self.below.get(state):
            state = self.choose(state)
        if state in self.below:  # nothing is left anywhere
            return
        self.grow(state)
        for child in sorted(self.below[state]):
            if len(child) == self.words.length:
                self.note(child)
                self.below[state].discard(child)
        self.note(state)
        while state and not self.below[state]:
            self.below[state[:-1]].discard(state)
            state = state[:-1]


@pytest.mark.parametrize("descend", [False, True], ids=["values", "descend"])
@pytest.mark.parametrize("c", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("simulations", [1, 2, 7, 40])
def test_a_tree_is_that_of_a_plain_search(simulations: int, c: float, descend: bool) -> None:
    problems = [Words("abc", 3, seed) for seed in range(3)]
    for words in problems:
        (tree,) = tree_search(words, [""], simulations, c_puct=c, descend=descend)
        plain = Plain(words, c)
        for _ in range(simulations):
            plain.play_out() if descend else plain.look()
        expected = plain.backed
        found = {node.state: node for node in tree.walk()}
        assert set(found) == set(expected)
        for state, backed in expected.items():
            assert found[state].visits == len(backed)
            assert found[state].total == pytest.approx(sum(backed), abs=1e-12)
            assert [node.state for node in found[state].path()] == [state[: n + 1] for n in range(len(state))]


def test_values_are_backed_up_as_means_by_hand() -> None:
    words = Words("ab", 2)
    words.values = {"": 0.1, "a": 0.5, "b": -0.5, "aa": 1.0, "ab": -1.0, "ba": -1.0, "bb": -1.0}
    words.priors = dict.fromkeys(words.values, 0.5)
    (tree,) = tree_search(words, [""], 1, c_puct=1.0)
    a, b = tree.children
    assert (tree.visits, tree.q, a.visits, b.visits) == (1, 0.1, 0, 0)
    assert a.puct(1.0) == b.puct(1.0) == 0.5  # 0 + 1 * 0.5 * sqrt(1) / 1
    (tree,) = tree_search(words, [""], 2, c_puct=1.0)
    a, b = tree.children  # equal bounds go to a: its children end at once, worth 1 and -1, then a itself is worth 0.5
    assert a.visits == 3 and a.q == pytest.approx((1 - 1 + 0.5) / 3) and a.closed and not tree.closed
    assert tree.visits == 4 and tree.q == pytest.approx((0.1 + 0.5) / 4)
    assert a.puct(1.0) == pytest.approx(0.5 / 3 + 0.5 * 2 / 4) and b.puct(1.0) == pytest.approx(0.5 * 2)
    (tree,) = tree_search(words, [""], 9, c_puct=1.0)  # three simulations look at everything, six find nothing to do
    assert tree.closed and tree.visits == 1 + 3 + 3 and tree.children[1].q == pytest.approx(-2.5 / 3)
    assert sorted(words.expanded[-3:]) == ["", "a", "b"]


def test_visits_gather_where_the_outcome_is_best() -> None:
    words = Words("abc", 4, seed=5)
    words.values = {word: 1.0 if word.startswith("ba") else -1.0 for word in words.values}
    words.priors = dict.fromkeys(words.values, 1 / 3)
    (tree,) = tree_search(words, [""], 200, c_puct=1.0, descend=True)
    visits = {node.state: node.visits for node in tree.walk()}
    assert tree.visits == 200 == sum(node.visits for node in tree.children)
    assert visits["b"] > 150 and visits["ba"] > 130 and tree.children[1].q > 0.5 > tree.children[0].q == -1.0


def test_trees_do_not_depend_on_each_other() -> None:
    words = Words("abc", 3, seed=1)
    roots = ["", "a", "cb"]
    together = tree_search(words, roots, 12)
    for root, tree in zip(roots, together, strict=True):
        (alone,) = tree_search(words, [root], 12)
        assert [(n.state, n.visits, n.total) for n in tree.walk()] == [
            (n.state, n.visits, n.total) for n in alone.walk()
        ]


def test_a_state_that_cannot_go_on_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a continuation"):
        Node("").add([])


@pytest.mark.parametrize("width", [1, 2, 3, 5, 30])
def test_a_beam_keeps_the_most_valuable_of_each_length(width: int) -> None:
    for seed in range(4):
        words = Words("abc", 3, seed)
        kept = [""]
        for _ in range(words.length):
            grown = [state + letter for state in kept for letter in words.letters]
            kept = sorted(grown, key=lambda state: -words.values[state])[:width]
        (beam,) = beam_search(words, [""], width)
        assert [one.state for one in beam] == kept and [one.value for one in beam] == words.value(kept)
        if width >= 9:  # wide enough for all states: the best of all words, by enumeration
            every = ("".join(w) for w in itertools.product(words.letters, repeat=3))
            assert beam[0].state == max(every, key=lambda word: words.values[word])


def test_what_ends_early_stays_in_the_beam() -> None:
    class Early(Words):
        def expand(self, states: Sequence[Word]) -> list[list[Move[Word]]]:
            assert not any(state.startswith("a") for state in states)  # words that begin so end with their first letter
            return [
                [Move(m.state, m.prior, m.finished or m.state == "a") for m in part] for part in super().expand(states)
            ]

    words = Early("ab", 3)
    words.values.update({"a": 0.4, "b": 0.9, "ba": 0.3, "bb": 0.5, "bba": 0.2, "bbb": 0.1})
    (beam,) = beam_search(words, [""], 2)
    assert [(one.state, one.value) for one in beam] == [("a", 0.4), ("bba", 0.2)]
    (narrow,) = beam_search(words, [""], 1)
    assert narrow[0].state == "bba"  # b was better than a


CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "initializer_range": 0.4,
}  # fmt: skip


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(1)
    texts = ["1+1=2\n2+2=4\nanswer: 4\n", "3\n4\n"]
    return LanguageModel.fresh(CONFIG, train_tokenizer(texts, 280)).to(dtype=torch.float64).eval()


def problem(model: LanguageModel, **options: Any) -> Steps:
    prompts = [np.array(ids, np.int32) for ids in ([3, 4, 5], [6, 7])]
    ends = step_ends(model, "\n")
    settings = {"samples": 6, "max_new_tokens": 12, "sampler": Sample(temperature=1.5), **options}
    return Steps(model, prompts, [*ends, *range(20, 120)], list(range(120, 160)), **settings)


def test_steps_end_with_the_separator_and_join_to_the_answer(model: LanguageModel) -> None:
    ends = step_ends(model, "\n")
    assert ends and all("\n" in model.tokenizer.decode([end]) for end in ends)
    with pytest.raises(ModelError, match="set separator"):
        step_ends(model, "no such text")
    ids = model.tokenizer.encode("1+1=2\n2+2=4\nanswer: 4", add_special_tokens=False)
    steps = cut_steps(ids, ends)
    assert [model.tokenizer.decode(step) for step in steps] == ["1+1=2\n", "2+2=4\n", "answer: 4"]
    assert list(itertools.chain(*steps)) == list(ids) and cut_steps([], ends) == []


def test_a_token_that_ends_an_answer_ends_it_where_it_ends_steps_too(model: LanguageModel) -> None:
    steps = problem(model)
    steps.ends = [*steps.ends, *steps.stop]  # as with the separator "<|end|>", for which an answer is one step
    moves = [move for group in steps.expand(steps.roots()) for move in group]
    ended = [move for move in moves if move.state.stop in steps.stop]
    assert ended and all(move.finished and not set(move.state.step) & set(steps.stop) for move in ended)
    assert not any(set(move.state.step) & set(steps.stop) for move in moves)


def test_continuations_are_steps_whose_prior_is_the_mean_probability_of_a_token(model: LanguageModel) -> None:
    steps = problem(model)
    roots = steps.roots()
    first = steps.expand(roots)
    again = steps.expand([move.state for move in first[0] if not move.finished])
    for before, moves in [
        *zip(roots, first, strict=True),
        *zip((m.state for m in first[0] if not m.finished), again, strict=True),
    ]:
        for move in moves:
            state, chain = move.state, [*steps.prompts[before.question].tolist(), *before.tokens]
            assert state.before == before.tokens and move.finished == (state.stop >= 0 or state.cut)
            tokens = (np.array(chain, np.int32), np.array(state.shown, np.int32))
            nothing = tuple(np.zeros(len(part), np.float32) for part in tokens)
            logprobs = model.logprobs(pack([Tree(tokens, nothing, (-1, 0))]))[len(chain) :]
            assert move.prior == pytest.approx(math.exp(float(logprobs.detach().mean())), rel=1e-6)
            assert state.step[-1] in steps.ends if not move.finished else state.cut or state.stop in steps.stop
            assert len(state.logprobs) == len(state.tokens) + (state.stop >= 0)


def test_outcomes_are_of_whole_answers_and_what_runs_out_of_room_is_wrong(model: LanguageModel) -> None:
    asked = []

    def outcome(question: int, text: str) -> bool:
        asked.append((question, text))
        return question == 1

    steps = problem(model, outcome=outcome)
    states = [
        Prefix(0, (5,), (6,), 130),
        Prefix(1, (5,), (6,), 130),
        Prefix(1, (5,), (6,), cut=True),
        Prefix(1, (), (20,)),
    ]
    assert steps.value(states) == [-1.0, 1.0, -1.0, 0.0]
    text = model.renderer.decode([5, 6])
    assert asked == [(0, text), (1, text)]
    tree, other = tree_search(steps, steps.roots(), 6, descend=True)
    assert tree.visits == other.visits == 6 and tree.q == -1.0 and -1.0 <= other.q <= 1.0
    assert all(len(node.state.tokens) <= 12 or node.state.cut for node in (*tree.walk(), *other.walk()))


def test_values_of_continuations_are_those_of_whole_texts(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_value_head(model, squashed=False)
    head = value_head(model)
    assert head is not None
    torch.nn.init.normal_(head.bias)
    groups = [((3, 4, 5), [(6,), (7, 8, 9)]), ((6, 7), [(1, 2)]), ((9,), [(2,), (3,), (4, 4)])]

    def value(ids: tuple[int, ...]) -> float:
        batch = pack([Tree((np.array(ids, np.int32),), (np.zeros(len(ids), np.float32),), (-1,))])
        plain = model.hidden(batch)[-1] @ head.weight[0] + head.bias[0]
        return 2 * plain.item() - 1

    expected = [[value((*text, *one)) for one in continuations] for text, continuations in groups]
    for limit in (16384, 1):
        monkeypatch.setattr("hone.text.values.BATCH_TOKENS", limit)
        found = continuation_values(model, head, groups)
        assert [len(part) for part in found] == [2, 1, 3]
        np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), rtol=1e-9)
    add_value_head(model, squashed=True)
    assert model.extras[HEAD].signed(torch.zeros(1, 16).double()).item() == 0.0


def test_a_beam_over_steps_answers_as_the_best_of_what_it_has_seen(model: LanguageModel) -> None:
    add_value_head(model, squashed=True)
    head = value_head(model)
    assert head is not None
    torch.nn.init.normal_(head.weight)
    steps = problem(model, judge=(model, head))
    for beam in beam_search(steps, steps.roots(), 3):
        assert (
            all(one.finished for one in beam) and [one.value for one in beam] == sorted(one.value for one in beam)[::-1]
        )
        assert len({one.state for one in beam}) == len(beam)
        made = beam[0].state.generation()
        assert made.stopped == (beam[0].state.stop >= 0) and len(made.tokens) == len(made.logprobs)
        assert beam[0].value == pytest.approx(steps.value([beam[0].state])[0])


def test_one_state_and_one_continuation_are_plain_generation(model: LanguageModel) -> None:
    steps = problem(model, samples=1, sampler=lambda logits, uniforms: logits.argmax(-1))
    beams = beam_search(steps, steps.roots(), 1)
    plain = generate(model, steps.prompts, max_new_tokens=12, stop=steps.stop)
    for beam, (expected,) in zip(beams, plain, strict=True):
        found = beam[0].state.generation()
        assert found.tokens.tolist()[: len(expected.tokens)] == expected.tokens.tolist()
        np.testing.assert_allclose(found.logprobs[: len(expected.logprobs)], expected.logprobs, atol=1e-6)
        assert found.stopped == expected.stopped and found.stop_token == expected.stop_token
