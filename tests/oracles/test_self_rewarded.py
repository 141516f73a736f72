"""Self-made preference data against what is worked out by hand, and CREAM's loss against conservative DPO."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conformance.test_objectives import make_model, pairs
from hone.data.directed import Directed, direction
from hone.data.listener import Lacie, Toned, acceptance
from hone.data.masked_thinking import MaskedThinking, before_spans, thinking_spans
from hone.data.refined import Refined, closeness, feedback
from hone.data.sample import Sample
from hone.data.sampled import ModelMade
from hone.data.scoring import confidences, likelihoods, question
from hone.data.self_rewarded import SelfRewarded, agreed_pairs, agreement, log_odds
from hone.data.source import Source, Split
from hone.data.verdicts import Verdicts
from hone.metrics.heard import AcceptedRight, AcceptedWrong, Lines
from hone.objectives.dpo import DPO
from hone.objectives.self_rewarding import CREAM
from hone.options import Places, check_part
from hone.samplers.rerank import Rerank, elect
from hone.text.generate import generate
from hone.text.model import LanguageModel
from hone.text.pack import pack

GOLD = "1+1=2\n2+2=4\nanswer: 4"


class Sums(Source):
    """Problems whose right answers hold "answer: 4"."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.count = count

    def samples(self, split: Split) -> Iterator[Sample]:
        for number in range(self.count):
            yield Sample("completion", f"{split} {number} =\n", (GOLD,), where=f"sums:{number}")

    def fingerprint(self) -> str:
        return f"sums {self.count}"

    def grade(self, sample: Sample, text: str) -> float | None:
        assert "*" not in str(sample.prompt), "the source is asked about its own prompts"
        return float("answer: 4" in text)


def saying(source: ModelMade, says: Callable[[str], list[str]]) -> list[str]:
    asked: list[str] = []

    def answer(wave: Sequence[Sample], purpose: str) -> list[list[str]]:
        asked.extend(str(sample.prompt) for sample in wave)
        return [says(str(sample.prompt)) for sample in wave]

    source._answer = answer  # type: ignore[method-assign]
    source.cache = False
    return asked


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 0.9])
def test_consistency_gives_creams_loss_and_conservative_dpo(rate: float) -> None:
    odds = log_odds(1 - rate)
    flipped = [tree.__class__(**{**vars(tree), "fields": {**tree.fields, "margin": (odds,) * 3}}) for tree in pairs()]
    model, objective = make_model(), CREAM(beta=0.7)
    loss, _ = objective.loss(model, pack(flipped))
    with torch.no_grad():  # the reference is the model itself before it moved: move it
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float64))
    reference = make_model()
    objective.reference_values = lambda m, b: _values(reference, b)  # type: ignore[method-assign]
    loss, _ = objective.loss(model, pack(flipped))
    expected = torch.zeros((), dtype=torch.float64)
    for tree in pairs():
        ratios = []
        for answer in (1, 2):
            own, theirs = (_logprob(m, tree.tokens[0], tree.tokens[answer]) for m in (model, reference))
            ratios.append(own - theirs)
        margin = 0.7 * (ratios[0] - ratios[1])
        consistency = 1 - rate
        expected = expected - consistency * F.logsigmoid(margin) - (1 - consistency) * F.logsigmoid(-margin)
    torch.testing.assert_close(loss, expected.detach(), check_dtype=False, rtol=1e-6, atol=1e-6)
    if rate < 0.5:
        soft = DPO(beta=0.7, flips=rate)
        soft.reference_values = objective.reference_values  # type: ignore[method-assign]
        torch.testing.assert_close(loss, soft.loss(model, pack(pairs()))[0], rtol=1e-6, atol=1e-6)


def _logprob(model: Any, prompt: np.ndarray, answer: np.ndarray) -> torch.Tensor:
    ids = torch.tensor([[*prompt.tolist(), *answer.tolist()]])
    with torch.no_grad():
        logits = model.hf(ids).logits[0].log_softmax(-1)
    return torch.stack([logits[len(prompt) - 1 + t, token] for t, token in enumerate(answer.tolist())]).sum()


def _values(model: Any, batch: Any) -> torch.Tensor:
    from hone.objectives.answers import token_values

    with torch.no_grad():
        return token_values(model, batch)


@pytest.mark.parametrize("measure", ["kendall", "spearman", "top"])
def test_agreement_of_all_rankings_of_four_answers(measure: Any) -> None:
    ours = [3.0, 1.0, 2.0, 0.0]
    for theirs in itertools.permutations([0.5, 1.5, 2.5, 3.5]):
        found = agreement(ours, list(theirs), measure)
        if measure == "kendall":
            places = list(itertools.combinations(range(4), 2))
            same = sum((ours[a] > ours[b]) == (theirs[a] > theirs[b]) for a, b in places)
            assert found == pytest.approx(same / len(places))
        elif measure == "top":
            assert found == float(np.argmax(ours) == np.argmax(theirs) and np.argmin(ours) == np.argmin(theirs))
        else:
            gaps = sum(
                (a - b) ** 2 for a, b in zip(np.argsort(np.argsort(ours)), np.argsort(np.argsort(theirs)), strict=True)
            )
            assert found == pytest.approx((1 + 1 - 6 * gaps / (4 * 15)) / 2)
    assert agreement([1.0, 1.0], [0.0, 1.0], measure) is None


def test_pairs_are_those_on_which_all_rewards_agree() -> None:
    one = np.array([[3.0, 1.0, 2.0]])
    assert agreed_pairs(one, 1) == [(0, 1)] and agreed_pairs(one, 9) == [(0, 1), (0, 2), (2, 1)]
    two = np.array([[3.0, 1.0, 2.0], [0.1, 0.2, 0.5]])
    assert agreed_pairs(two, 9) == [(2, 1)]
    assert agreed_pairs(np.array([[1.0, 2.0], [2.0, 1.0]]), 9) == []


def test_likelihoods_are_those_of_whole_texts(tiny_model: Path) -> None:
    model = LanguageModel.load(tiny_model)
    asked = [("What does it say?\n", ["I am a cat", "I am"]), ("And now?\n", ["a horse of many words"] * 1)]
    for (prompt, answers), (sums, tokens) in zip(asked, likelihoods(model, asked), strict=True):
        for answer, logprob, count in zip(answers, sums, tokens, strict=True):
            (tree,) = model.renderer.render(Sample("completion", prompt, (answer,)))
            ids, trained = torch.tensor(tree.tokens[0].astype(np.int64)), tree.weights[0] > 0
            with torch.no_grad():
                logits = model.hf(ids[None]).logits[0].log_softmax(-1)
            expected = sum(float(logits[at - 1, ids[at]]) for at in np.flatnonzero(trained))
            assert logprob == pytest.approx(expected, rel=1e-4) and count == trained.sum()
    sure = confidences(model, [("1+1=\n", "2"), ("1+1=\n", "3")])
    (sums, _), *_ = likelihoods(model, [(question("1+1=\n", "2"), ("right", "wrong"))])
    assert sure[0] == pytest.approx(np.exp(sums[0]) / np.exp(sums).sum()) and sure[0] != sure[1]


def test_a_self_rewarded_source_labels_by_the_log_ratio_and_says_how_consistent_it_is(tiny_model: Path) -> None:
    answers = ["I am a cat", "I am a dog", "I am a horse", "an owl"]
    source = SelfRewarded(of=Sums(3), model=str(tiny_model), against="base", previous="base", pairs=2)
    saying(source, lambda prompt: answers)
    base, now, before = [3.0, 1.0, 2.0, 0.0], [4.0, 4.0, 1.0, 2.0], [0.2, 0.1, 0.4, 0.3]  # log pi_0, log pi, mean
    seen: list[tuple[str, str]] = []

    def scores(kind: str, model: Any, texts: Any, against: Any) -> list[np.ndarray]:
        seen.append((kind, str(against)))
        own = np.array(now) - np.array(base) if kind == "implicit" else np.array(before)
        return [own for _ in texts]

    source.scores = scores  # type: ignore[assignment, method-assign]
    source._named = lambda name: None  # type: ignore[assignment, method-assign, return-value]
    found = list(source.samples("train"))
    assert seen == [("implicit", "base"), ("likelihood", "base")]  # a model says nothing against itself
    assert [sample.answers for sample in found[:2]] == [(answers[1], answers[2]), (answers[3], answers[2])]
    ranks = np.array(now) - np.array(base)  # 1, 3, -1, 2
    agree = np.mean([(ranks[a] > ranks[b]) == (before[a] > before[b]) for a, b in itertools.combinations(range(4), 2)])
    assert all(sample.fields["margin"] == pytest.approx(log_odds(agree)) for sample in found) and len(found) == 6
    assert {sample.kind for sample in found} == {"pair"}
    problem = check_part("data", {"name": "self-rewarded", "of": "chains", "rewards": []}, "data", Places())
    assert [one.field for one in problem] == ["data.rewards"]


def test_the_implicit_reward_of_a_real_model_is_its_log_ratio(tiny_model: Path) -> None:
    source = SelfRewarded(of=Sums(1), model=str(tiny_model), against=str(tiny_model))
    model, texts = LanguageModel.load(tiny_model), [("What?\n", ["I am a cat", "I am a dog"])]
    (same,) = source.scores("implicit", model, texts, str(tiny_model))
    assert np.abs(same).max() < 1e-6
    (means,) = source.scores("likelihood", model, texts, "base")
    ((sums, tokens),) = likelihoods(model, texts)
    np.testing.assert_allclose(means, sums / tokens)
    (judged,) = source.scores("judge", model, texts, "base")
    assert judged.shape == (2,) and ((judged > 0) & (judged < 1)).all()


def test_verdicts_are_asked_for_and_balanced() -> None:
    says = ["answer: 4", "sure: answer: 4", "answer: 5", "answer: 4"]
    source = Verdicts(of=Sums(1))
    saying(source, lambda prompt: says)
    found = list(source.samples("train"))
    assert [(sample.prompt, sample.answers) for sample in found] == [
        ("train 0 =\nanswer: 4\nverdict: ", ("right",)), ("train 0 =\nanswer: 5\nverdict: ", ("wrong",)),
    ]  # fmt: skip
    assert source.grade(found[1], "wrong") == 1 and source.grade(found[1], "right") == 0
    source.balance, source.plain, source.make = False, True, "pairs"
    plain, *judged = source.samples("train")
    assert plain.answers == (GOLD,) and [sample.answers for sample in judged] == [("right", "wrong")] * 2 + [
        ("wrong", "right")
    ]
    assert source.grade(plain, "answer: 4") == 1
    saying(source, lambda prompt: ["answer: 5"])
    source.balance = True
    assert [sample.answers[0] for sample in source.samples("train")][1:] == [
        "right",
        "wrong",
    ]  # the source's own is right


def test_elections() -> None:
    answers, sure = ["5", "4", "5", "4", "5", "6"], [0.2, 0.9, 0.1, 0.8, 0.3, 0.95]
    assert elect(answers, sure, "majority") == 4 and elect(answers, sure, "best") == 5
    assert elect(answers, sure, "weighted") == 1
    assert elect(answers, sure, "best", clusters=2) == 1 and elect(answers, sure, "weighted", clusters=1) == 4
    assert elect(["a", "b"], [1.0, 1.0], "majority") == 0
    rng = np.random.default_rng(0)
    for _ in range(50):  # against another way to count
        answers = rng.choice(list("abc"), 9).tolist()
        sure = rng.random(9).tolist()
        sums = {a: sum(s for b, s in zip(answers, sure, strict=True) if b == a) for a in set(answers)}
        assert answers[elect(answers, sure, "weighted")] == max(sums, key=sums.__getitem__)


def test_reranking_gives_one_of_several_answers(tiny_model: Path) -> None:
    model = LanguageModel.load(tiny_model)
    prompts = [
        model.renderer.prompt_ids(Sample("prompt", text)) for text in ("What does it say?", "And the owl?", "Say")
    ]
    options: dict[str, Any] = {"max_new_tokens": 6, "seed": 3, "stop": model.renderer.stop_ids}
    drawn = generate(model, prompts, samples=8, sampler=Rerank().each(), **options)
    for by in ("majority", "best", "weighted"):
        sampler = Rerank(count=4, by=by, evaluator=str(tiny_model) if by == "best" else None)
        chosen = generate(model, prompts, samples=2, sampler=sampler, **options)
        assert [len(group) for group in chosen] == [2, 2, 2]
        for own, group in zip(drawn, chosen, strict=True):
            for number, one in enumerate(group):
                part = [g.tokens.tolist() for g in own[4 * number : 4 * number + 4]]
                assert one.tokens.tolist() in part
    assert (
        generate(model, prompts, sampler=Rerank(count=1), **options)[0][0].tokens.tolist()
        == drawn[0][0].tokens.tolist()
    )


def test_a_listener_ranks_answers_as_the_authors_do() -> None:
    yes, no = "answer: 4\ncertainly", "answer: 4\nperhaps"
    wrong, meek = "answer: 5\ncertainly", "answer: 5\nperhaps"
    assert acceptance(yes, {"certainly": 0.9}) == 0.9 and acceptance("certainly", {"certainly": 0.9}) is None
    source = Lacie(of=Sums(1), pairs=9, threshold=0.5)
    saying(source, lambda prompt: [yes, no, wrong, meek, "answer: 4"])
    found = {sample.answers for sample in source.samples("train")}
    # Equally likely to be accepted: (yes, wrong) and (no, meek) are not compared, as in the authors' code.
    assert found == {(yes, no), (no, wrong), (meek, wrong)}
    source.apart = 0.0
    found = {sample.answers for sample in source.samples("train")}
    assert found == {(yes, no), (yes, wrong), (no, wrong), (meek, no), (meek, wrong)}
    source.listener = False
    assert {sample.answers for sample in source.samples("train")} == {(a, b) for a in (yes, no) for b in (wrong, meek)}
    toned = [sample.answers[0] for sample in Toned(of=Sums(200)).samples("train")]
    tones = [text.split("\n")[-1] for text in toned]
    assert {text.rsplit("\n", 1)[0] for text in toned} == {GOLD} and all(30 < tones.count(t) < 70 for t in set(tones))
    sample = next(Sums(1).samples("eval"))
    assert AcceptedWrong()(Sums(1), sample, wrong) == 0.95 and AcceptedWrong()(Sums(1), sample, yes) is None
    assert AcceptedRight()(Sums(1), sample, no) == 0.3 and AcceptedRight()(Sums(1), sample, "answer: 4") == 1
    assert Lines()(Sums(1), sample, "a\n\nb\n") == 2


class Bare(Sums):
    """Problems whose answers carry no mark, so that a whole text is the answer."""

    def samples(self, split: Split) -> Iterator[Sample]:
        for sample in super().samples(split):
            yield Sample("completion", sample.prompt, ("4",), where=sample.where)

    def grade(self, sample: Sample, text: str) -> float | None:
        return Source.grade(self, sample, text)


def test_a_tone_is_no_part_of_what_is_right() -> None:
    sure, meek, wrong, unsure = "4\ncertainly", "4\nperhaps\n", "5\ncertainly", "5\nperhaps"
    heard, toned = Lacie(of=Bare(1), pairs=9, threshold=0.5), Toned(of=Bare(1))
    saying(heard, lambda prompt: [sure, meek, wrong, unsure])
    assert {sample.answers for sample in heard.samples("train")} == {(sure, meek), (meek, wrong), (unsure, wrong)}
    for source in (heard, toned):
        (question_,) = source.questions("eval")
        assert [source.grade(question_, text) for text in (sure, meek, wrong, unsure, "4", "5")] == [1, 1, 0, 0, 1, 0]
        assert AcceptedRight()(source, question_, sure) == AcceptedWrong()(source, question_, wrong) == 0.95
    (own,) = toned.samples("train")
    assert own.answers[0] != "4" and toned.grade(own, sure) == toned.grade(own, meek) == 1  # whatever its own tone is


def test_the_threshold_is_the_median_of_all_that_was_drawn() -> None:
    tones = {"a": 0.2, "b": 0.5, "c": 0.9}
    right, other, wrong = "answer: 4\nc", "answer: 4\nb", "answer: 5\nb"
    source = Lacie(of=Sums(1), tones=tones, pairs=9)
    saying(source, lambda prompt: [right] * 3 + [other, wrong])
    # 0.9, so that none is accepted and the wrong answer is judged rightly; that of distinct texts would be 0.5
    assert [sample.answers for sample in source.samples("train")] == [(wrong, right)]


def test_what_goes_on_behind_the_right_lines_is_told_to_end_and_never_learned_as_it_is() -> None:
    astray = GOLD + "\nanswer: 5"
    assert feedback(GOLD, astray) == "end after line 3" and feedback(GOLD, GOLD + "\n\n") is None
    source = Refined(of=Sums(1))
    asked = saying(source, lambda prompt: [astray if prompt == "train 0 =\n" else GOLD])
    assert [sample.answers for sample in source.samples("train")] == [(GOLD,)]
    assert asked[1].endswith("\nfeedback: end after line 3\nrefined:\n")
    saying(source, lambda prompt: [GOLD])
    for grade, learned in ((0.0, 0), (1.0, 1), (None, 1)):  # the source's own lines may be noise
        source.grade = lambda sample, text, grade=grade: grade  # type: ignore[method-assign, misc]
        assert len(list(source.samples("train"))) == learned


def test_feedback_names_the_first_mistake_and_the_best_refinement_is_learned() -> None:
    assert feedback(GOLD, "1+1=2\n2+2=5\nanswer: 5") == "line 2 should be 2+2=4"
    assert feedback(GOLD, "1+1=2\n2+2=4") == "then comes answer: 4" and feedback(GOLD, GOLD) is None
    assert closeness(GOLD, "1+1=2\n2+2=5\nanswer: 4") == pytest.approx(2 / 3) and closeness(GOLD, GOLD) == 1
    bad, better = "1+1=3\nanswer: 6", "1+1=2\n2+2=5\nanswer: 5"
    asks = "train 0 =\n" + bad + "\nfeedback: line 1 should be 1+1=2\nrefined:\n"
    says = {"train 0 =\n": [bad], "train 1 =\n": [GOLD], asks: [bad, better, "answer: 4", GOLD]}
    source = Refined(of=Sums(2))
    asked = saying(source, lambda prompt: says[prompt])
    assert [sample.answers for sample in source.samples("train")] == [(GOLD,), (GOLD,)] and len(asked) == 3
    assert {sample.prompt for sample in source.samples("train")} == {"train 0 =\n", "train 1 =\n"}
    says[asks] = [bad, better]
    assert [sample.answers[0] for sample in source.samples("train")] == [better, GOLD]
    source.select = "first"
    assert [sample.answers[0] for sample in source.samples("train")] == [bad, GOLD]
    source.make = "refine"
    assert [(sample.prompt, sample.answers) for sample in source.samples("train")] == [(asks, (GOLD,))]
    assert [sample.answers for sample in source.samples("eval")] == [(GOLD,)] * 2


def test_directions_choose_the_answer_with_the_largest_weighted_reward() -> None:
    right, long = "answer: 4", "a\nb\nc\nd\nanswer: 5"
    source = Directed(of=Sums(40), degrees=[-90.0, 90.0], frame="* {right} {length} {prompt}", lines=4)
    asked = saying(source, lambda prompt: [right, long])
    found = list(source.samples("train"))
    assert len(found) == len(asked) == 40
    for sample in found:
        cosine, sine = direction(sample.extra["degrees"])
        assert sample.prompt.startswith(f"* {round(100 * cosine)} {round(100 * sine)} train ")
        worth = {right: cosine + sine * 0.25, long: sine}
        assert sample.answers == (max(worth, key=worth.__getitem__),)
    assert {sample.answers[0] for sample in found} == {right, long}
    own = Directed(of=Sums(2), make="own", frame="* {right} {length} {prompt}")
    assert [sample.answers for sample in own.samples("train")] == [(GOLD,)] * 2
    (question_, _) = Directed(of=Sums(2), asked=-30.0, frame="* {right} {length} {prompt}").questions("eval")
    assert str(question_.prompt).startswith("* 87 -50 eval 0") and own.grade(question_, "answer: 4") == 1


def test_spans_of_thinking() -> None:
    text = "<think>a b</think>c<think>d</think>e</think>f"
    shown = [text[begin:end] for begin, end in thinking_spans(text, "<think>", "</think>", True)]
    assert shown == ["a b", "d"]
    shown = [text[begin:end] for begin, end in thinking_spans(text, "<think>", "</think>", False)]
    assert shown == ["<think>a b</think>", "<think>d</think>"]
    assert before_spans("x=1\nanswer: 1", "answer:", True) == [(0, 4)] and before_spans("x", "answer:", True) == []
    assert before_spans("answer: 1", "answer:", True) == [] and before_spans("answer: 1", "answer:", False) == [(0, 7)]


def test_masked_thinking_is_read_but_not_trained(tiny_model: Path) -> None:
    model = LanguageModel.load(tiny_model)
    pair = Sample("pair", "What?\n", ("<think>I am</think>a cat", "a dog"), where="here")
    source = MaskedThinking(of=Sums(1))
    (masked,) = source.changed(iter([pair]), "train")
    (tree,) = model.renderer.render(masked)
    (plain,) = model.renderer.render(pair)
    trained = [model.renderer.decode(ids[weights > 0]) for ids, weights in zip(tree.tokens, tree.weights, strict=True)]
    whole = [model.renderer.decode(ids) for ids in tree.tokens]
    assert trained == ["", "a cat", "a dog"] and whole[1] == "<think>I am</think>a cat"
    assert tree.weights[1][-1] == 1 and tree.tokens[1][-1] == model.renderer.eos  # the end of the answer is trained
    np.testing.assert_array_equal(tree.tokens[2], plain.tokens[2])
    (alone,) = source.changed(iter([Sample("completion", "Q\n", ("<think>I am</think>",))]), "train")
    (tree,) = model.renderer.render(alone)
    assert tree.weights[0].sum() == 1 and tree.tokens[0][-1] == model.renderer.eos
