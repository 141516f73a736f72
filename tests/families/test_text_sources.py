"""Sources that show another one's samples differently, answers in pieces, and metrics of running text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hone.data.derived import Derived
from hone.data.files import Files
from hone.data.openings import Openings, opening
from hone.data.responses import Responses
from hone.data.sample import Message, Sample
from hone.errors import DataError
from hone.metrics.diversity import Copied, Repetition, TypeTokenRatio, words_of
from hone.options import build_part
from hone.text.model import LanguageModel

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "No."}]  # fmt: skip


def written(path: Path, *rows: dict[str, Any], copies: int = 20) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows * copies))
    return path


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return LanguageModel.load("base")


def test_responses_lose_their_instructions_in_training_only(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", {"prompt": "Why?\n", "completion": "So."})
    data = build_part("data", {"name": "responses", "of": str(file), "frame": "A: "})
    assert {(s.prompt, s.answers) for s in data.samples("train")} == {("A: ", ("So.",))}
    assert {s.prompt for s in data.samples("eval")} == {"Why?\n"} == {s.prompt for s in data.questions("eval")}
    question = next(data.questions("eval"))
    assert data.grade(question, "So.") == 1.0 and data.grade(question, "No.") == 0.0


def test_responses_train_the_likelihood_of_the_answer_alone(model: LanguageModel) -> None:
    (tree,) = model.renderer.render(
        Responses(of=Files(path="x")).without_instruction(Sample("completion", prompt="Why?", answers=("So.",)))
    )
    assert model.renderer.show(tree) == [("<|begin|>", False), ("So.<|end|>", True)]


def test_a_chat_keeps_its_template_and_its_empty_turns(tmp_path: Path, model: LanguageModel) -> None:
    data = Responses(of=Files(path=str(written(tmp_path / "a.jsonl", {"messages": CHAT}))))
    sample = next(data.samples("train"))
    assert [turn.content for turn in sample.prompt if isinstance(turn, Message)] == ["Be brief.", "", "So.", "", "No."]
    (tree,) = model.renderer.render(sample)
    trained = [text for text, weighs in model.renderer.show(tree) if weighs]
    assert len(trained) == 2 and trained[0].startswith("So.") and trained[1].startswith("No.")


def test_texts_have_no_response() -> None:
    with pytest.raises(DataError, match="here: responses needs prompts with answers or conversations, found text"):
        Responses(of=Files(path="x")).without_instruction(Sample("text", answers=("a",), where="here"))


def test_limits_and_fingerprints_of_derived_sources(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", {"prompt": "Why?\n", "completion": "So."})

    def made(**options: Any) -> Any:
        return build_part("data", {"name": "responses", "of": {"name": "files", "path": str(file)}, **options})

    assert len(list(made(limit=3).samples("train"))) == 3 and len(list(made(limit=1).samples("eval"))) == 2
    prints = {made(**o).fingerprint() for o in ({}, {"frame": "A"}, {"limit": 3})}
    assert len(prints) == 3 and made(shuffle=False, workers=1).fingerprint() in prints
    other = Derived(of=Files(path=str(file)))
    assert [s.prompt for s in other.samples("train")] == ["Why?\n"] * 18 and other.fingerprint() not in prints
    assert made().evaluation_split() == "train"


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("one two  three\nfour", 2, ("one two", "  three\nfour")),
        ("  one two", 1, ("  one", " two")),
        ("one two", 2, None),
        ("one two \n", 2, None),
        ("", 1, None),
    ],
)
def test_an_opening_and_the_rest_give_the_text(text: str, words: int, expected: tuple[str, str] | None) -> None:
    assert opening(text, words) == expected


def test_openings_train_the_whole_text_and_ask_for_the_rest(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", {"text": "one two three four"}, copies=30)
    data = Openings(of=Files(path=str(file)), words=3)
    assert (
        {s.answers for s in data.samples("train")}
        == {("one two three four",)}
        == {s.answers for s in data.samples("eval")}
    )
    (asked, *_) = data.questions("eval")
    assert (asked.kind, asked.prompt, asked.answers) == ("completion", "one two three", (" four",))
    assert data.grade(asked, " four") is None
    assert not list(Openings(of=Files(path=str(file)), words=4).questions("eval"))


def test_openings_leave_questions_of_another_kind_as_they_are(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", {"prompt": "Why?", "completion": "So."})
    data = Openings(of=Files(path=str(file)))
    (asked, *_) = data.questions("eval")
    assert asked.prompt == "Why?" and data.grade(asked, "So.") == 1.0


def test_pieces_are_tokenised_alone_and_weighed_each(model: LanguageModel) -> None:
    renderer = model.renderer
    sample = Sample("pieces", prompt="Go\n", answers=("ab", "c.", "."), scores=(1.0, 0.0, 0.5))
    (tree,) = renderer.render(sample)
    head = renderer.prompt_ids(Sample("prompt", prompt="Go\n")).tolist()
    pieces = [renderer.piece_ids(text) for text in ("ab", "c.", ".")]
    assert tree.tokens[0].tolist() == [*head, *pieces[0], *pieces[1], *pieces[2], renderer.eos]
    weights = [0.0] * len(head) + [1.0] * len(pieces[0]) + [0.0] * len(pieces[1]) + [0.5] * (len(pieces[2]) + 1)
    assert tree.weights[0].tolist() == weights
    (bare,) = renderer.render(Sample("pieces", answers=("ab", "c")))
    assert np.count_nonzero(bare.weights[0]) == len(bare.tokens[0]) - 1


def test_metrics_of_variety_by_hand() -> None:
    source: Any = None
    text = "a b a b, a b"
    assert words_of(text) == ["a", "b", "a", "b", ",", "a", "b"]
    assert TypeTokenRatio()(source, Sample("text"), text) == pytest.approx(3 / 7)
    assert TypeTokenRatio(window=2)(source, Sample("text"), text) == 1.0
    assert Repetition(n=2)(source, Sample("text"), text) == pytest.approx(1 - 4 / 6)
    assert Repetition(n=1)(source, Sample("text"), text) == pytest.approx(1 - 3 / 7)
    for metric in (TypeTokenRatio(), Repetition(), Copied()):
        assert metric(Derived(of=Files(path="x")) if metric.name != "copied" else _known(), Sample("text"), "") is None


def _known() -> Derived:
    class Known(Derived):
        def fingerprint(self) -> str:
            return "known"

        def samples(self, split: Any) -> Any:
            return iter([Sample("text", answers=("a b c d",)), Sample("text", prompt=(Message("user", "x y z"),))])

    return Known(of=None)


def test_copied_is_the_share_of_ngrams_that_were_trained_on() -> None:
    copied = Copied(n=2)
    assert copied(_known(), Sample("text"), "b c q x y") == pytest.approx(2 / 4)
    assert copied(_known(), Sample("text"), "y x") == 0.0
