"""Interleaved streams, interpreting word by word, and the lag, against what can be worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hone.data.clauses import Clauses
from hone.data.east import East, aligned, chunked, needs, parse_alignment
from hone.data.open import open_data
from hone.data.pydocs import PyDocs
from hone.data.sample import Message, Sample
from hone.data.source import Source
from hone.errors import DataError, ModelError
from hone.metrics.interpreting import AverageLagging, WordAccuracy
from hone.objectives.east import East as EastObjective
from hone.options import Places, check_part
from hone.text.generate import History, generate
from hone.text.model import LanguageModel
from hone.text.simultaneous import Interpreter, average_lagging, interpret

PAIR = Sample(
    "completion", prompt="a b c d", answers=("w x y z",), extra={"alignment": "1-0 0-1 2-2 3-3"}, where="here"
)


class Pairs(Source):
    """A source of given samples."""

    def __init__(self, *rows: Sample) -> None:
        super().__init__()
        self.rows = rows

    def samples(self, split: str) -> Any:
        return iter(self.rows)

    def fingerprint(self) -> str:
        return repr(self.rows)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.load("base", dtype=torch.float64)


def stream(sample: Sample = PAIR, latency: str = "low", **options: Any) -> Sample:
    return East(of=Pairs(sample), **options).stream(sample, latency)


@pytest.mark.parametrize(
    ("links", "count", "expected"),
    [
        ([(0, 0), (1, 1), (2, 2)], 3, [1, 2, 3]),
        ([(1, 0), (0, 1), (2, 2)], 3, [2, 2, 3]),
        ([(0, 0), (0, 2)], 3, [1, 1, 1]),  # a word without a link needs what the one before it did
        ([], 2, [0, 0]),
    ],
)
def test_a_word_needs_all_that_it_and_those_before_it_are_aligned_to(links, count, expected):
    assert needs(links, count) == expected


@pytest.mark.parametrize(
    ("needed", "length", "least", "expected"),
    [
        ([1, 2, 3], 3, 1, [(1, 1), (2, 2), (3, 3)]),
        ([2, 2, 3], 3, 1, [(2, 2), (3, 3)]),
        ([1, 2, 3, 4, 5], 5, 2, [(2, 2), (4, 4), (5, 5)]),
        ([1, 4, 4, 5], 5, 2, [(4, 3), (5, 4)]),  # never in the middle of what belongs together
        ([1, 1], 3, 1, [(1, 2), (3, 2)]),  # the rest of the source is read, and nothing written
        ([0, 0], 2, 1, [(2, 2)]),  # nothing is written before a word was read
        ([1, 2], 2, 9, [(2, 2)]),
    ],
)
def test_chunks_are_the_smallest_that_the_latency_allows(needed, length, least, expected):
    assert chunked(needed, length, least) == expected


def test_wait_k_reads_k_words_and_then_one_for_each_that_it_writes():
    text = "".join(str(piece) for piece in stream(wait=2).answers)
    assert text == "a b|w~ c| x~ d| y z~"


def test_a_stream_is_source_and_target_with_every_token_trained(model):
    made = stream()
    assert "".join(map(str, made.answers)) == "a b|w x~ c| y~ d| z~"
    (tree,) = model.renderer.render(made)
    shown = model.renderer.show(tree)
    assert shown[1] == ("a b|w x~ c| y~ d| z~<|end|>", True)
    assert shown[0] == ("<|begin|>Translate with low latency:\n", False)
    assert tree.weights[0].sum() == model.renderer.render(made)[0].tokens[0].size - len(
        model.renderer.prompt_ids(Sample("prompt", prompt="Translate with low latency:\n"))
    )


def test_wait_k_may_train_the_target_alone(model):
    (tree,) = model.renderer.render(stream(wait=2, train_source=False))
    trained = "".join(text for text, weighs in model.renderer.show(tree) if weighs)
    assert trained == "w~ x~ y z~<|end|>"


def test_latencies_take_turns_and_evaluation_asks_for_one():
    data = East(of=Clauses(count=4, holdout=2), latencies={"low": 1, "high": 9}, ask="high")
    prompts = [sample.prompt for sample in data.samples("train")]
    assert prompts == ["Translate with low latency:\n", "Translate with high latency:\n"] * 2
    question = next(data.questions("eval"))
    header, source = data.parted(str(question.prompt))
    assert header == "Translate with high latency:\n" and source == question.extra["source"]
    assert data.parted("a b") == (header, "a b")


def test_the_simple_alignment_finds_equal_words_and_falls_back_on_places():
    assert aligned(["Ba", "x", "ce"], ["ce", "ba", "?"]) == [(2, 0), (0, 1), (2, 2)]
    assert aligned(["x", "x"], ["x", "x"]) == [(0, 0), (1, 1)]


def test_clauses_are_translated_by_their_last_word_and_splits_share_none():
    data = Clauses(holdout=50, count=50)
    for sample in data.samples("train"):
        words, target = str(sample.prompt).split(), str(sample.answers[0]).split()
        for place, word in enumerate(words):
            assert target[place] == next(later for later in words[place:] if later.isupper()), word
        needed = needs(parse_alignment(sample.extra["alignment"], words, target, ""), len(target))
        assert all(words[need - 1].isupper() for need in needed)
    held_out = {sample.prompt for sample in data.samples("eval")}
    assert len(held_out) > 40 and not held_out & {sample.prompt for sample in data.samples("train")}


def follow(source: list[list[int]], policy: list[int], **options: Any) -> list[int]:
    """Return what an interpreter draws whose model always picks the next of `policy` where it is free."""
    interpreter = Interpreter(sources=[source], end_read=90, end_write=91, **options)
    drawn: list[int] = []
    picks = list(policy)
    while 99 not in drawn:
        place = interpreter.place(np.array(drawn, dtype=np.int64), source)
        logits = torch.zeros(1, 100)
        logits[0, picks[0] if picks else 0] = 1.0
        history = History(np.array([drawn], dtype=np.int64).reshape(1, -1), np.array([99]), np.array([0]))
        drawn.append(int(interpreter(logits, torch.zeros(1).double(), history)))
        free = place.writing or (place.words and not place.inside and place.read < len(source))
        picks = picks[1:] if free and picks else picks
    return drawn


def test_the_model_decides_when_to_write():
    source = [[1], [2, 3], [4]]
    drawn = follow(source, policy=[0, 90, 50, 51, 91, 52, 91])  # read on, write two tokens, then the last chunk
    assert drawn == [1, 2, 3, 90, 50, 51, 91, 4, 90, 52, 91, 99]


def test_wait_k_writes_by_count_whatever_the_model_wants():
    wishes = [90, 0, 50, 91, 51, 91]  # to write after one word, and not to after two
    assert follow([[1], [2], [3]], wishes, wait=2) == [1, 2, 90, 50, 91, 3, 90, 51, 91, 99]


def test_an_ending_token_and_length_end_a_chunk():
    assert follow([[1]], [99]) == [1, 90, 91, 99]
    assert follow([[1]], [5] * 9, longest=3) == [1, 90, 5, 5, 5, 91, 99]


def test_what_may_not_come_is_never_picked():
    interpreter = Interpreter(sources=[[[1], [2]]], end_read=90, end_write=91)
    for drawn, banned in (([1], 91), ([1], 99), ([1, 90], 90)):
        logits = torch.zeros(1, 100)
        logits[0, banned] = 9.0
        history = History(np.array([drawn]), np.array([99]), np.array([0]))
        assert int(interpreter(logits, torch.zeros(1).double(), history)) != banned


def test_a_generation_reads_the_source_whole_and_scores_it_as_the_model_does(model):
    sources = ["a c B d", "D", "a b c d e f A"]
    prompts = [model.renderer.prompt_ids(Sample("prompt", prompt="Translate with low latency:\n"))] * 3
    options = dict(stop=model.renderer.stop_ids, max_new_tokens=400, longest=8)
    made = interpret(model, prompts, sources, end_read="|", end_write="~", **options)
    data = East(of=Pairs(PAIR))
    for source, (one,) in zip(sources, made, strict=True):
        chunks = data.read_and_written(model.renderer.decode(one.tokens))
        assert [word for read, _ in chunks for word in read] == source.split() and one.stopped
    (alone,) = interpret(model, prompts[2:], sources[2:], end_read="|", end_write="~", **options)
    assert alone[0].tokens.tolist() == made[2][0].tokens.tolist()
    np.testing.assert_allclose(alone[0].logprobs, made[2][0].logprobs, rtol=1e-9)


def test_training_and_interpreting_see_the_same_ids(model):
    sample = next(Clauses(count=1).samples("train"))
    data = East(of=Pairs(sample))
    (tree,) = model.renderer.render(data.stream(sample, "low"))
    header = model.renderer.prompt_ids(Sample("prompt", prompt=data.header("low")))
    wanted = tree.tokens[0][len(header) :]
    teacher = iter(wanted.tolist())

    def taught(logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        return torch.full((len(logits),), next(teacher))

    options = dict(stop=model.renderer.stop_ids, max_new_tokens=200, sampler=taught)
    ((one,),) = interpret(model, [header], [str(sample.prompt)], end_read="|", end_write="~", **options)
    assert one.trajectory()[0].tolist() == wanted.tolist()


def test_lagging_is_k_for_wait_k_of_equal_lengths():
    for k in (1, 2, 4):
        delays = [min(k + place, 8) for place in range(8)]
        assert average_lagging(delays, 8, 8) == pytest.approx(k)


@pytest.mark.parametrize(
    ("delays", "source", "target", "expected"),
    [
        ([4, 4, 4, 4], 4, 4, 4.0),  # offline: all of the source first
        ([2, 2, 4, 4], 4, 4, (2 + 1 + 2) / 3),  # the sum ends at the first word that has seen all
        ([1, 3], 3, 2, (1 + 3 - 1.5) / 2),
        ([1, 2], 3, 3, (1 + 1) / 2),  # it never saw the end
        ([5], 4, 4, 5.0),
    ],
)
def test_lagging_by_hand(delays, source, target, expected):
    assert average_lagging(delays, source, target) == pytest.approx(expected)


def test_metrics_read_a_stream():
    data = East(of=Pairs(PAIR))
    (question,) = data.questions("eval")
    text = "a b|w x~ c| y~ d| q~"
    assert AverageLagging()(data, question, text) == pytest.approx(average_lagging([2, 2, 3, 4], 4, 4))
    assert WordAccuracy()(data, question, text) == pytest.approx(3 / 4)
    assert data.grade(question, text) == 0.0 and data.grade(question, text.replace("q", "z")) == 1.0
    assert AverageLagging()(data, question, "a b c d|~") is None
    assert AverageLagging()(PyDocs(), question, text) is None
    assert WordAccuracy()(PyDocs(), question, "w x") == pytest.approx(1 / 2)
    assert WordAccuracy()(data, Sample("text"), text) is None


def test_the_objective_interprets_what_stands_behind_the_instruction(model):
    objective = EastObjective()
    objective.look(East(of=Pairs(PAIR)))
    objective.equip(model)
    (question,) = East(of=Pairs(PAIR)).questions("eval")
    options = dict(stop=model.renderer.stop_ids, max_new_tokens=60)
    prompts = [model.renderer.prompt_ids(question)]
    ((one,),) = objective.generate(model, prompts, **options)
    assert model.renderer.decode(one.tokens).startswith("a")
    ((plain,),) = EastObjective().generate(model, prompts, **options)  # without data it answers like any other
    assert plain.tokens.tolist() == generate(model, prompts, **options)[0][0].tokens.tolist()


def problems(**options: Any) -> list[str]:
    found = check_part("data", {"name": "east", "of": "clauses", **options}, "data", Places())
    return [f"{problem.field}: {problem.message}" for problem in found]


def test_options_that_do_not_go_together_are_refused():
    assert problems() == [] and problems(wait=2, train_source=False) == []
    assert "no latency called 'lo'" in problems(ask="lo")[0]
    assert problems(latencies={})[0].startswith("data.latencies: expected at least one")
    assert problems(end_write="|")[0].startswith("data.end_write: is the same as end_read")
    assert problems(train_source=False)[0].startswith("data.train_source: is false")
    assert problems(latencies={"low": 0})[0].startswith("data.latencies")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": "a|b"}, r"here: the text contains '\|', which marks the end of a chunk"),
        ({"answers": ("  ",)}, "here: expected a text and its translation, found an empty one"),
        ({"extra": {"alignment": "0:1"}}, "here: alignment: expected pairs such as '0-1 1-0'"),
        ({"extra": {"alignment": "0-4"}}, "here: alignment: '0-4' names a word that is not there"),
        ({"prompt": (Message("user", "a"),)}, "here: east needs prompts with answers in plain text"),
    ],
)
def test_bad_pairs_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        stream(replace(PAIR, **changes))


def test_other_data_and_bad_markers_are_refused(model):
    with pytest.raises(DataError, match=r"objective consumes streams, that is answers in pieces \(pieces\)"):
        open_data(Pairs(PAIR), model.renderer, consumes=EastObjective.consumes)
    for mark in ("no one token", "<|end|>"):
        objective = EastObjective()
        objective.look(East(of=Pairs(PAIR), end_read=mark))
        with pytest.raises(ModelError, match="is not one ordinary token"):
            objective.equip(model)
    prompts = [model.renderer.prompt_ids(PAIR)]
    for text in ("", "a|b"):
        with pytest.raises(ModelError, match="cannot be interpreted: expected words"):
            interpret(model, prompts, [text], end_read="|", end_write="~", stop=[1])
    with pytest.raises(ModelError, match="no token ends an answer"):
        interpret(model, prompts, ["a"], end_read="|", end_write="~")
    with pytest.raises(DataError, match="an answer in pieces needs a plain prompt"):
        model.renderer.render(Sample("pieces", prompt=(Message("user", "a"),), answers=("b",), where="here"))
