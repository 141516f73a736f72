"""Every registered sampler: valid ids, a function of logits and uniforms row by row, greedy at temperature 0."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hone import options, parts
from hone.errors import HoneError
from hone.samplers.stop import stopping_logits
from hone.samplers.text import Sample, draw, keep_min_p, keep_top_k, keep_top_p
from hone.text.generate import History

SAMPLERS = [record for record in parts.catalogue() if record.kind == "sampler"]
ROWS, VOCABULARY = 64, 50
# The options that a sampler may take, tried one at a time; a sampler that lacks one is tried without.
TRIED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.3},
    {"temperature": 4.0},
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10 * VOCABULARY},
    {"top_p": 0.4},
    {"min_p": 0.2},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
]
CASES = [
    pytest.param(record.name, chosen, id=f"{record.name}-{chosen}")
    for record in SAMPLERS
    for chosen in TRIED
    if set(chosen) <= {option.name for option in record.options}
]


def made(name: str, chosen: dict[str, Any]) -> Any:
    return parts.load("sampler", name)(**chosen)


def some_logits(dtype: torch.dtype = torch.float32) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return (3 * torch.randn(ROWS, VOCABULARY, generator=random, dtype=torch.float64)).to(dtype)


def some_history(sampler: Any, rows: list[int], drawn: int = 7) -> list[History]:
    """Return what a sampler that looks back is shown for some of the rows, [] for one that does not."""
    if not getattr(sampler, "looks_back", False):
        return []
    tokens = np.random.default_rng(3).integers(0, VOCABULARY, (ROWS, 7)).astype(np.int32)
    prompts = [np.arange(number % 5, dtype=np.int32) for number in range(ROWS)]
    return [History(tokens[rows, :drawn], np.array([2, 3]), np.array(rows), prompts)]


def call(sampler: Any, logits: Tensor, uniforms: Tensor, rows: list[int] | None = None) -> Tensor:
    """Return what a sampler picks for some of the rows, whose histories are their own."""
    return sampler(logits, uniforms, *some_history(sampler, list(range(ROWS)) if rows is None else rows))


def some_uniforms(seed: int = 1) -> Tensor:
    return torch.rand(ROWS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_there_are_samplers() -> None:
    assert {record.name for record in SAMPLERS} >= {"greedy", "sample", "rule-based"}


@pytest.mark.parametrize(("name", "chosen"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ids_are_valid(name: str, chosen: dict[str, Any], dtype: torch.dtype) -> None:
    for uniforms in (some_uniforms(), torch.zeros(ROWS).double(), torch.full((ROWS,), 1 - 2.0**-53).double()):
        ids = call(made(name, chosen), some_logits(dtype), uniforms)
        assert ids.shape == (ROWS,) and ids.dtype == torch.int64
        assert int(ids.min()) >= 0 and int(ids.max()) < VOCABULARY


@pytest.mark.parametrize(("name", "chosen"), CASES)
def test_excluded_tokens_are_never_drawn(name: str, chosen: dict[str, Any]) -> None:
    logits = some_logits()
    logits[:, ::2] = -torch.inf
    for uniforms in (some_uniforms(), torch.zeros(ROWS).double(), torch.full((ROWS,), 1 - 2.0**-53).double()):
        assert bool((call(made(name, chosen), logits, uniforms) % 2 == 1).all())


@pytest.mark.parametrize(("name", "chosen"), CASES)
def test_a_row_draws_the_same_whatever_stands_beside_it(name: str, chosen: dict[str, Any]) -> None:
    sampler, logits, uniforms = made(name, chosen), some_logits(), some_uniforms()
    before = logits.clone()
    together = call(sampler, logits, uniforms)
    assert torch.equal(logits, before), "the sampler changed its input"
    assert torch.equal(together, call(sampler, logits, uniforms))
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(2))
    assert torch.equal(together[order], call(sampler, logits[order], uniforms[order], order.tolist()))
    alone = [int(call(sampler, logits[i : i + 1], uniforms[i : i + 1], [i])) for i in range(ROWS)]
    assert together.tolist() == alone


@pytest.mark.parametrize(("name", "chosen"), CASES)
@pytest.mark.parametrize("temperature", [0.0, 1e-310, 1e-6])
def test_temperature_towards_zero_is_greedy(name: str, chosen: dict[str, Any], temperature: float) -> None:
    known = {option.name for record in SAMPLERS if record.name == name for option in record.options}
    cold = {**chosen, "temperature": temperature} if "temperature" in known else chosen
    logits = some_logits(torch.float64)
    sampler = made(name, cold)
    nothing = [replace(history, prompts=()) for history in some_history(sampler, list(range(ROWS)), drawn=0)]
    assert torch.equal(sampler(logits, some_uniforms(), *nothing), logits.argmax(-1))


@pytest.mark.parametrize("record", SAMPLERS, ids=lambda record: record.name)
def test_every_option_is_documented(record: parts.Record) -> None:
    assert record.summary and all(option.doc for option in record.options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("temperature", -0.1), ("top_k", 0), ("top_k", 1.5)),
        *(("top_p", 0.0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.1)),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: float) -> None:
    problems = options.check_part("sampler", {"name": "sample", option: value}, "sampler", options.Places())
    assert [problem.field for problem in problems] == [f"sampler.{option}"]


@pytest.mark.parametrize("k", [1, 3, 17, VOCABULARY, 2 * VOCABULARY])
def test_top_k_equals_transformers(k: int) -> None:
    logits = some_logits().round()  # many equals
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_top_p_equals_transformers(p: float) -> None:
    logits = some_logits(torch.float64)
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("p", [0.0, 0.01, 0.2, 0.9, 1.0])
def test_min_p_equals_transformers(p: float) -> None:
    logits = some_logits(torch.float64)
    assert torch.equal(keep_min_p(logits, p), MinPLogitsWarper(p)(None, logits))


def test_the_whole_chain_equals_transformers() -> None:
    expected = some_logits(torch.float64)
    for warper in (TemperatureLogitsWarper(1.7), TopKLogitsWarper(20), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)):
        expected = warper(None, expected)
    probs = Sample(temperature=1.7, top_k=20, top_p=0.8, min_p=0.05).probabilities(some_logits(torch.float64))
    assert torch.equal(probs > 0, expected > -torch.inf)
    torch.testing.assert_close(probs, expected.softmax(-1), rtol=1e-12, atol=1e-15)


def test_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0, 1.0, -torch.inf, 0.5]])
    sampler = Sample(temperature=1.3)
    count = 20_000
    uniforms = torch.rand(count, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    seen = np.bincount(sampler(logits.expand(count, -1), uniforms).numpy(), minlength=6)
    expected = count * sampler.probabilities(logits)[0].numpy()
    assert seen[4] == 0
    kept = expected > 0
    assert chisquare(seen[kept], expected[kept]).pvalue > 1e-3


def test_draw_inverts_the_cumulative_distribution() -> None:
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]], dtype=torch.float64).expand(7, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(probs, uniforms).tolist() == [1, 1, 3, 3, 3, 4, 4]
    assert draw(7 * probs, uniforms).tolist() == [1, 1, 3, 3, 3, 4, 4]  # weights need not be normalised


@pytest.mark.parametrize("stop", [0.5, 2.0])
def test_the_temperature_of_stopping_moves_that_decision_alone(stop: float) -> None:
    logits, history = some_logits(torch.float64), some_history(made("stop-temperature", {}), list(range(ROWS)))[0]
    ends = torch.from_numpy(history.stop)
    plain = logits.softmax(-1)
    changed = stopping_logits(logits.clone(), ends, stop).softmax(-1)
    weights = plain.clone()
    weights[:, ends] = weights[:, ends] ** (1 / stop)
    torch.testing.assert_close(changed, weights / weights.sum(-1, keepdim=True), rtol=1e-10, atol=1e-12)
    assert ((changed[:, ends].sum(-1) > plain[:, ends].sum(-1)) == (stop > 1)).all()
    others = [token for token in range(VOCABULARY) if token not in history.stop]
    ratio = changed[:, others] / plain[:, others]
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-10, atol=1e-12)


def test_a_token_that_ends_thinking_is_left_alone_once_it_was_drawn() -> None:
    words = SimpleNamespace(get_vocab=lambda: {"</think>": 7}, encode=None)
    sampler = made("stop-temperature", {"token": "</think>", "stop": 1e9})
    sampler._id = 7
    logits = torch.zeros(2, VOCABULARY)
    logits[:, 5] = 0.1
    history = History(np.array([[1, 2], [7, 2]], np.int32), np.array([3]), np.arange(2), [], words)
    assert sampler(logits, torch.zeros(2), history).tolist() == [7, 5]
    with pytest.raises(HoneError, match="'</thin>' is no single token of the model"):
        made("stop-temperature", {"token": "</thin>"})(logits, torch.zeros(2), replace(history, tokenizer=None))
