"""Data that a model makes: what becomes of right and wrong answers, what is kept, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hone.data.annotated import AnnotatedData
from hone.data.chains import Chains
from hone.data.formats import CONTINUES
from hone.data.open import open_data
from hone.data.paired import Paired
from hone.data.s3ft import S3FT
from hone.data.sample import Message, Sample
from hone.data.sampled import WAVE, ModelMade, Sampled, first_slip
from hone.data.searched import Searched
from hone.data.self_rewarded import SelfRewarded
from hone.data.source import Source, Split
from hone.errors import DataError, ModelError
from hone.options import Places, check_part
from hone.parts import load
from hone.text.model import LanguageModel

GOLD = "1+1=2\n2+2=4\nanswer: 4"
Says = Callable[[str], list[str]]


class Sums(Source):
    """Problems whose right answers end in "answer: 4", said to be so by a grade."""

    def __init__(self, count: int = 3, grades: bool = True, **extra: Any) -> None:
        super().__init__()
        self.count, self.grades, self.extra = count, grades, extra

    def samples(self, split: Split) -> Iterator[Sample]:
        for number in range(self.count if split == "train" else 1):
            prompt = f"{split} {number} =\n"
            yield Sample("completion", prompt, (GOLD,), extra=dict(self.extra), where=f"sums:{number}")

    def fingerprint(self) -> str:
        return f"sums {self.count}"

    def grade(self, sample: Sample, text: str) -> float | None:
        return float(text.endswith("answer: 4")) if self.grades else None

    def describe(self) -> str:
        return "sums"


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Answers are kept in a folder of this test."""
    monkeypatch.setenv("HONE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sampled"


def saying(source: ModelMade, says: Says) -> list[str]:
    """Let a source be answered by a function of the prompt instead of a model; return what it is asked."""
    asked: list[str] = []

    def answer(wave: Sequence[Sample], purpose: str) -> list[list[str]]:
        asked.extend(str(sample.prompt) for sample in wave)
        return [says(str(sample.prompt)) for sample in wave]

    source._answer = answer  # type: ignore[method-assign]
    return asked


def made(says: list[str], split: Split = "train", **options: Any) -> list[Sample]:
    source = Sampled(of=Sums(1), cache=False, **options)
    saying(source, lambda prompt: says)
    return list(source.samples(split))


RIGHT, ALSO, WRONG, OFF = "answer: 4", "sure. answer: 4", "answer: 5", "answer: 6"


def test_pairs_set_each_wrong_answer_against_a_right_one_up_to_a_number() -> None:
    says = [WRONG, RIGHT, OFF, RIGHT, ALSO, WRONG, "answer: 7", " \n"]
    pairs = [sample.answers for sample in made(says, pairs=9)]
    assert pairs == [(RIGHT, WRONG), (ALSO, OFF), (RIGHT, "answer: 7")]  # each answer once, right ones in turn
    assert [sample.answers for sample in made(says)] == [(RIGHT, WRONG)]
    assert {sample.kind for sample in made(says, pairs=2)} == {"pair"}
    chosen = made(says, make="chosen", pairs=9)
    assert [sample.answers for sample in chosen] == [(RIGHT,), (ALSO,), (RIGHT,)]
    assert {sample.kind for sample in chosen} == {"completion"}


def test_gold_stands_in_where_no_answer_is_right() -> None:
    assert [sample.answers for sample in made([WRONG])] == [(GOLD, WRONG)]
    assert made([WRONG], gold=False) == []
    assert made([RIGHT, ALSO]) == []  # nothing is wrong
    assert [sample.answers for sample in made([WRONG], make="right")] == [(GOLD,)]
    assert [sample.answers for sample in made([WRONG, ALSO, RIGHT], make="right")] == [(ALSO,)]


class Chat(Sums):
    """The same problems as conversations of two exchanges."""

    def samples(self, split: Split) -> Iterator[Sample]:
        before = (Message("user", "hello"), Message("assistant", "hi"))
        for sample in super().samples(split):
            turns = (*before, Message("user", str(sample.prompt)), Message("assistant", GOLD))
            yield replace(sample, kind="messages", prompt=turns, answers=())


@pytest.mark.parametrize("make", ["pairs", "right", "list", "rivals"])
def test_an_answer_to_a_conversation_takes_the_place_of_its_last_turn(make: str) -> None:
    source = Sampled(of=Chat(1), make=make, cache=False)  # type: ignore[arg-type]
    saying(source, lambda prompt: [WRONG])
    (asked,) = Chat(1).samples("train")
    (sample,) = source.samples("train")
    assert sample.prompt == asked.prompt[:-1] and sample.answers[0] == GOLD
    own = S3FT(of=Chat(1), cache=False)
    saying(own, lambda prompt: [ALSO])
    assert [(sample.prompt, sample.answers) for sample in own.samples("train")] == [(asked.prompt[:-1], (ALSO,))]


def test_the_prompt_of_an_answer_to_a_conversation_is_what_was_asked(tiny_model: Path) -> None:
    renderer = LanguageModel.load(str(tiny_model), template="chatml").renderer
    source = Sampled(of=Chat(1), cache=False)
    saying(source, lambda prompt: [WRONG])
    (asked,), (sample,) = Chat(1).samples("train"), source.samples("train")
    (tree,) = renderer.render(sample)
    assert tree.tokens[0].tolist() == renderer.prompt_ids(asked).tolist()


@pytest.mark.parametrize("name", ["searched", "directed", "verdicts", "refined", "correction", "self-rewarded"])
def test_what_goes_on_behind_a_prompt_refuses_conversations(name: str) -> None:
    source = load("data", name)(of=Chat(1), cache=False)
    saying(source, lambda prompt: [WRONG, OFF])
    with pytest.raises(DataError, match="sums:0: expected a prompt in plain text"):
        list(source.samples("train"))


def test_lists_score_every_answer_and_rivals_need_no_grade() -> None:
    (listed,) = made([WRONG, RIGHT, OFF], make="list")
    assert listed.kind == "list" and listed.answers == (RIGHT, WRONG, OFF) and listed.scores == (1.0, 0.0, 0.0)
    assert made([RIGHT], make="list") == []
    source = Sampled(of=Sums(1, grades=False), make="rivals", cache=False)
    saying(source, lambda prompt: [WRONG, GOLD, RIGHT, WRONG])
    (rivals,) = source.samples("train")
    assert rivals.kind == "list" and rivals.answers == (GOLD, WRONG, RIGHT, WRONG)  # as often as they were drawn
    assert rivals.scores == (1.0, 0.0, 0.0, 0.0)


def test_steps_pair_the_first_wrong_line_and_ask_for_the_right_one_again() -> None:
    says = {"train 0 =\n": ["1+1=2\n2+2=5\nanswer: 5", "1+1=3\nanswer: 4"], "train 0 =\n1+1=2\n": ["2+2=4\nanswer: 4"]}
    source = Sampled(of=Sums(1), make="steps", pairs=5, cache=False)
    asked = saying(source, lambda prompt: says[prompt])
    (step,) = source.samples("train")  # the second answer is right, whatever its lines
    assert asked == ["train 0 =\n", "train 0 =\n1+1=2\n"]
    assert step.prompt == "train 0 =\n1+1=2\n" and step.answers == ("2+2=4\n", "2+2=5\n")
    assert step.extra["own"] and step.extra[CONTINUES]
    stubborn = Sampled(of=Sums(1), make="steps", gold=False, cache=False)
    saying(stubborn, lambda prompt: ["1+1=2\n2+2=5\nanswer: 5"])
    assert list(stubborn.samples("train")) == []  # the model never gives the right line itself
    stubborn.gold = True
    (step,) = stubborn.samples("train")
    assert not step.extra["own"]


@pytest.mark.parametrize(
    ("text", "slip"),
    [
        ("1+1=2\n2+2=4\nanswer: 5", ("1+1=2\n2+2=4\n", "answer: 5", "answer: 4")),
        ("2+2=4\nanswer: 4", ("", "2+2=4\n", "1+1=2\n")),
        ("1+1=2\n2+2=4", None),
        (GOLD + "\nmore", None),
        (GOLD, None),
    ],
)
def test_the_first_slip_is_the_first_line_that_differs(text: str, slip: tuple[str, str, str] | None) -> None:
    assert first_slip(GOLD, text) == slip


def test_limit_holds_for_training_alone() -> None:
    source = Sampled(of=Sums(5), limit=2, cache=False)
    saying(source, lambda prompt: [WRONG])
    assert len(list(source.samples("train"))) == 2 and len(list(source.samples("eval"))) == 1
    assert len(list(source.questions("eval"))) == 1 and source.grade(next(source.questions("eval")), RIGHT) == 1


def test_answers_are_kept_by_wave_and_made_again_when_they_are_damaged(cached: Path) -> None:
    def fresh(**options: Any) -> tuple[Sampled, list[str]]:
        source = Sampled(of=Sums(WAVE + 1), **options)
        return source, saying(source, lambda prompt: [WRONG])

    source, asked = fresh()
    first = list(source.samples("train"))
    assert len(asked) == WAVE + 1 and len(list(cached.iterdir())) == 2
    source, asked = fresh(make="right", pairs=3)  # another use of the same answers
    assert len(list(source.samples("train"))) == WAVE + 1 and asked == []
    damaged = max(cached.iterdir(), key=lambda file: file.stat().st_size)
    damaged.write_text(damaged.read_text().replace("5", "4", 1))
    source, asked = fresh()
    assert list(source.samples("train")) == first and len(asked) == WAVE
    for options in ({"seed": 1}, {"temperature": 0.5}, {"samples_each": 2}, {"max_new_tokens": 9}, {"model": "a/b"}):
        source, asked = fresh(**options)
        list(source.samples("train"))
        assert len(asked) == WAVE + 1, options
    source, asked = fresh(cache=False)
    list(source.samples("train"))
    assert len(asked) == WAVE + 1


def test_the_fingerprint_changes_with_all_that_changes_a_sample() -> None:
    base = Sampled(of=Sums(3))
    changes = [
        {"of": Sums(4)}, {"make": "right"}, {"pairs": 2}, {"gold": False}, {"samples_each": 3}, {"temperature": 0.3},
        {"max_new_tokens": 3}, {"seed": 1}, {"limit": 1}, {"model": "some/other"},
        {"model": "stage:1"},
    ]  # fmt: skip
    prints = [replace(base, **change).fingerprint() for change in changes]
    met = Sampled(of=Sums(3))
    met.meet(lambda: None, "a model")  # type: ignore[arg-type, return-value]
    prints += [base.fingerprint(), met.fingerprint(), S3FT(of=Sums(3)).fingerprint()]
    prints += [S3FT(of=Sums(3), paraphrase="again: {answer}").fingerprint()]
    assert len(set(prints)) == len(prints)
    assert Sampled(of=Sums(3), cache=False).fingerprint() == base.fingerprint()


def test_a_named_model_is_known_by_its_content(tiny_model: Path, cached: Path, tmp_path: Path) -> None:
    def asked(folder: Path) -> list[str]:
        source = Sampled(of=Sums(1), model=str(folder))
        shown = saying(source, lambda prompt: [WRONG])
        list(source.samples("train"))
        return shown

    def prints(folder: Path) -> list[str]:
        named = str(folder)
        made = [
            Sampled(of=Sums(1), model=named), Searched(of=Sums(1), values="head", value_model=named),
            SelfRewarded(of=Sums(1), against=named), SelfRewarded(of=Sums(1), previous=named),
        ]  # fmt: skip
        return [source.fingerprint() for source in made]

    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(tiny_model, here)
    shutil.copytree(tiny_model, there)
    before = prints(here)
    assert len(asked(here)) == 1 and asked(there) == [] and prints(there) == before  # by content, not by place
    (here / "model.safetensors").write_bytes(b"trained again")
    assert len(asked(here)) == 1
    assert not set(prints(here)) & set(before)
    with pytest.raises(ModelError, match=r"there is no model folder '.*her'"):
        prints(tmp_path / "her")


def test_trees_are_searched_again_when_the_grader_changes(cached: Path) -> None:
    class Graded(Sums):
        def fingerprint(self) -> str:
            return f"sums that are graded {'' if self.grades else 'not '}"

    def asked(of: Source, **options: Any) -> list[str]:
        source = Searched(of=of, model="a/b", **options)
        shown = saying(source, lambda prompt: [])
        list(source.answers(list(of.samples("train")), "search:train"))
        return shown

    assert len(asked(Graded(1))) == 1 and asked(Graded(1)) == []
    assert len(asked(Graded(1, grades=False))) == 1


def test_what_makes_nothing_names_the_options_that_matter() -> None:
    renderer = LanguageModel.load("base").renderer
    source = Sampled(of=Sums(1), make="rivals", samples_each=2, cache=False)
    saying(source, lambda prompt: [])
    with pytest.raises(DataError, match=r"nothing could be made of them.* make=rivals.* does not end within") as caught:
        open_data(source, renderer, consumes="pairs")
    assert "samples_each=2" in str(caught.value) and "holdout" not in str(caught.value)
    source.of = Sums(0)  # there is nothing to begin with: its own options matter
    with pytest.raises(DataError, match=r"^sums: there is nothing to train on.*holdout=200 leaves some"):
        open_data(source, renderer, consumes="pairs")


def test_without_a_model_or_a_grade_it_says_what_is_missing(cached: Path) -> None:
    with pytest.raises(DataError, match=r"sampled pairs: 8 answers.*no model is named that answers.*set model: FOLDER"):
        list(Sampled(of=Sums(1)).samples("train"))
    for source in (Sampled(of=Sums(1, grades=False), cache=False), S3FT(of=Sums(1, grades=False), cache=False)):
        saying(source, lambda prompt: [RIGHT])
        with pytest.raises(DataError, match=r"sums:0: the source cannot tell whether an answer is right, which 's"):
            list(source.samples("train"))


def test_a_model_answers_the_same_whoever_asks(tiny_model: Path, cached: Path) -> None:
    problems = Chains(skills=["first"], count=3, holdout=2)
    options = {"of": problems, "make": "rivals", "samples_each": 3, "max_new_tokens": 12, "temperature": 2.0}
    named = Sampled(model=str(tiny_model), **options)
    begun = Sampled(**options, cache=False)
    begun.meet(lambda: LanguageModel.load(tiny_model), "its weights")
    first, second = list(named.samples("train")), list(begun.samples("train"))
    assert first == second and first  # a random model now and then ends an answer
    assert list(Sampled(model=str(tiny_model), **options).samples("train")) == first
    other = Sampled(model=str(tiny_model), **options, seed=1, cache=False)
    assert list(other.samples("train")) != first


def test_s3ft_takes_own_answers_then_paraphrases_then_the_gold_one() -> None:
    says = {
        "train 0 =\n": [WRONG, ALSO, RIGHT], "train 1 =\n": [WRONG], "train 2 =\n": [],
        f"train 1 =\n say again: {GOLD}!": ["so: answer: 4"], f"train 2 =\n say again: {GOLD}!": [OFF],
    }  # fmt: skip
    source = S3FT(of=Sums(3), paraphrase="{prompt} say again: {answer}!", cache=False)
    asked = saying(source, lambda prompt: says[prompt])
    found = list(source.samples("train"))
    assert [sample.answers[0] for sample in found] == [ALSO, "so: answer: 4", GOLD]
    assert [sample.extra["own"] for sample in found] == ["answer", "paraphrase", ""]
    assert [sample.prompt for sample in found] == [f"train {n} =\n" for n in range(3)]
    assert len(asked) == 5  # who is right already is not asked again
    plain = S3FT(of=Sums(3), limit=2, cache=False)
    asked = saying(plain, lambda prompt: [WRONG])
    assert [sample.answers[0] for sample in plain.samples("train")] == [GOLD, GOLD]
    assert [sample.answers[0] for sample in plain.samples("eval")] == [GOLD] and len(
        asked
    ) == 2  # no more than the limit
    problem = check_part("data", {"name": "s3ft", "of": "chains", "paraphrase": "again"}, "data", Places())
    assert any("{answer}" in found.message for found in problem)


def test_paired_prefers_the_answers_of_one_source_to_those_of_another() -> None:
    worked, short = (Chains(skills=["add", "last"], count=6, holdout=4, steps=steps) for steps in (True, False))
    source = Paired(of=worked, rejected=short)
    for split in ("train", "eval"):
        pairs = list(source.samples(split))
        shown = {str(sample.prompt): sample.answers[0] for sample in short.samples(split)}
        assert [pair.prompt for pair in pairs] == [s.prompt for s in worked.samples(split) if "add" in str(s.prompt)]
        assert all(pair.kind == "pair" and pair.answers[1] == shown[str(pair.prompt)] for pair in pairs)
        assert all(str(pair.answers[0]).endswith(str(pair.answers[1])) for pair in pairs)
    assert source.fingerprint() != Paired(of=worked, rejected=replace(short, seed=1)).fingerprint()
    assert source.fingerprint() != Paired(of=worked, rejected=short, limit=3).fingerprint()
    assert len(list(Paired(of=worked, rejected=short, limit=2).samples("train"))) == 2
    with pytest.raises(DataError, match="no prompt of the one is a prompt of the other"):
        list(Paired(of=worked, rejected=Chains(skills=["sort"], count=3)).samples("train"))


def test_one_number_shares_a_budget_out_between_two_kinds_of_annotation() -> None:
    problems = Chains(skills=["add"], count=50, holdout=4)
    pairs = Paired(of=replace(problems, seed=1), rejected=replace(problems, seed=1, noise=1.0))
    prints = set()
    for share, demonstrations, preferences in ((0.25, 5, 30), (0.0, 1, 40), (1.0, 20, 1)):
        source = AnnotatedData(demonstrations=problems, preferences=pairs, budget=20, share=share, price=0.5)
        prints.add(source.fingerprint())
        assert [sample.kind for sample in source.samples("train")] == ["completion"] * demonstrations
        source.suit("pairs")
        prints.add(source.fingerprint())
        assert [sample.kind for sample in source.samples("train")] == ["pair"] * preferences
        assert list(source.questions("eval")) == list(problems.samples("eval"))
        assert source.grade(next(source.questions("eval")), "answer: x") == 0
        source.suit("sequences")
        assert source.bought == demonstrations and f"{demonstrations} demonstrations for 20" in source.describe()
    assert len(prints) == 6
    wrong = {"name": "annotated", "demonstrations": "chains", "preferences": "chains", "budget": 9, "share": 1.5}
    assert [problem.field for problem in check_part("data", wrong, "data", Places())] == ["data.share"]
