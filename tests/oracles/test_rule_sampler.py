"""The rule-based adapter against the product of two distributions that is written out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hone.options import Places, build_part, check_part
from hone.samplers.rules import SHIFTS, RuleBased, rule_scores, token_shifts
from hone.samplers.text import Sample
from hone.text.generate import History, generate
from hone.text.model import LanguageModel

V = 12
STOP = np.array([2])


class Words:
    """A vocabulary of single tokens."""

    def __init__(self, *tokens: str) -> None:
        self.tokens = tokens

    def get_vocab(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}


def history(drawn: list[list[int]], prompts: list[list[int]] | None = None, tokenizer: Any = None) -> History:
    asked = [np.array(ids, np.int32) for ids in prompts or [[]] * len(drawn)]
    return History(np.array(drawn, np.int32), STOP, np.arange(len(drawn)), asked, tokenizer)


def by_hand(logits: torch.Tensor, drawn: list[int], asked: list[int], shifts: dict[int, float]) -> torch.Tensor:
    """Return the product of the model's distribution and that of the rules, as probabilities that sum to 1."""
    rules = torch.zeros(V, dtype=torch.float64)
    for token in range(V):
        if token in drawn or token in asked:
            rules[token] -= 1.5
        if token == 2:
            rules[token] += 15 * min(len(drawn) / 250, 1)
        rules[token] += shifts.get(token, 0.0)
    product = logits.double().softmax(-1) * rules.softmax(-1)
    return product / product.sum()


@pytest.mark.parametrize("count", [0, 1, 100, 249, 250, 400])
def test_what_is_drawn_from_is_the_product_of_two_distributions(count):
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    drawn, asked = [5, 6, 7][:count] + [5] * max(0, count - 3), [9, 5]
    seen: dict[str, torch.Tensor] = {}

    def then(scores: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        seen["probs"] = scores.softmax(-1)
        return scores.argmax(-1)

    words = Words(*"abcdef", "\u0120I", "<", "\u010a", *"xyz")
    sampler = RuleBased(then=then)
    sampler(logits, torch.zeros(1), history([drawn], [asked], words))
    expected = by_hand(logits[0], drawn, asked, {6: -5.0, 7: -4.0, 8: 1.0})
    torch.testing.assert_close(seen["probs"][0], expected, rtol=1e-12, atol=1e-15)


def test_each_rule_can_be_switched_off():
    logits = torch.randn(3, V, dtype=torch.float64)
    plain = history([[4], [5], [6]], [[1], [1], [1]], Words(*SHIFTS))
    off = RuleBased(end=0.0, repetition=0.0, shifts={})
    assert torch.equal(off(logits, torch.zeros(3), plain), logits.argmax(-1))
    own = rule_scores(V, plain.tokens, [np.zeros(0, np.int64)] * 3, STOP, {}, end=0.0, length=1, repetition=1.0)
    assert own.nonzero().tolist() == [[0, 4], [1, 5], [2, 6]] and own.unique().tolist() == [-1.0, 0.0]


def test_the_prompt_counts_as_seen_unless_told_otherwise():
    logits = torch.zeros(1, V)
    logits[0, 7], logits[0, 8] = 1.0, 0.5
    asked = history([[4]], [[7]])
    assert RuleBased()(logits, torch.zeros(1), asked).tolist() == [8]
    assert RuleBased(prompt=False)(logits, torch.zeros(1), asked).tolist() == [7]


def test_ending_wins_in_the_end():
    logits = torch.zeros(1, V)
    logits[0, 3] = 6.1
    picked = [int(RuleBased(repetition=0.0)(logits, torch.zeros(1), history([[3] * n]))) for n in range(0, 251, 10)]
    assert picked == sorted(picked, reverse=True) and picked[0] == 3 and picked[-1] == 2
    assert picked.index(2) == 11  # 15 n / 250 is above 6.1 from 102 tokens on


def test_tokens_are_known_by_their_text_in_every_kind_of_vocabulary():
    assert token_shifts(Words("I", "\u2581I", "<0x0A>", "a"), SHIFTS) == {0: -5.0, 1: -5.0, 2: 1.0}
    assert token_shifts(Words("\u0120\u0120\u0120", "\u010a", "\u0120should"), SHIFTS) == {0: 1.0, 1: 1.0, 2: -6.0}
    assert len(SHIFTS) == 15


def test_it_goes_before_any_other_sampler():
    sampler = build_part("sampler", {"name": "rule-based", "then": {"name": "sample", "temperature": 0.5}})
    assert sampler.then == Sample(temperature=0.5)
    nested = RuleBased(end=0.0, shifts={}, then=RuleBased(end=0.0, shifts={}))  # each takes its own 1.5 off
    logits = torch.zeros(1, V)
    logits[0, 4] = 2.0
    logits[0, 5] = 0.1
    assert nested(logits, torch.zeros(1), history([[4]])).tolist() == [5]
    assert RuleBased(end=0.0, shifts={})(logits, torch.zeros(1), history([[4]])).tolist() == [4]


def test_a_generation_shows_the_sampler_what_it_drew_and_after_what():
    model = LanguageModel.load("base")
    prompts = [np.array(ids, np.int32) for ids in ([0, 30, 31], [0, 40], [0, 50, 51, 52, 53])]
    rows: list[tuple[list[int], list[int]]] = []

    class Watch(RuleBased):
        def __call__(self, logits: torch.Tensor, uniforms: torch.Tensor, history: History) -> torch.Tensor:
            asked = [history.prompts[which].tolist() for which in history.which]
            rows.extend(zip(asked, history.tokens.tolist(), strict=True))
            return super().__call__(logits, uniforms, history)

    made = generate(model, prompts, sampler=Watch(), max_new_tokens=5, samples=2, stop=model.renderer.stop_ids)
    for prompt, group in zip(prompts, made, strict=True):
        for one in group:
            drawn = one.trajectory()[0].tolist()
            assert all((prompt.tolist(), drawn[:n]) in rows for n in range(len(drawn)))


def test_bad_options_are_refused():
    for option, value in (("length", 0), ("repetition", -1.0), ("shifts", {"a": "much"}), ("then", "no such")):
        found = check_part("sampler", {"name": "rule-based", option: value}, "sampler", Places())
        assert [problem.field for problem in found] == [f"sampler.{option}"]
