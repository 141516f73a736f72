"""Pairs, ranked lists, classes and tagged words: from rows to trees, and what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hone.data.files import Files
from hone.data.formats import sniff
from hone.data.open import open_data
from hone.data.overlong import fit
from hone.data.sample import Sample
from hone.errors import DataError
from hone.text.pack import Tree
from hone.text.render import Renderer
from hone.text.tokenizer import load_tokenizer

NAN = float("nan")


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(load_tokenizer("base"))


def converted(**row: Any) -> Sample:
    return sniff(row, "rows:1").convert(row, "rows:1")


def file(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def source(path: str, **options: Any) -> Files:
    return Files(path=path, holdout=0, cache=False, **options)


def test_a_list_is_one_prompt_with_scored_children(renderer: Renderer) -> None:
    sample = converted(prompt="add 1 + 2 =\n", answers=["3", "4", "5"], scores=[2, 1, 0.5])
    assert sample.kind == "list" and sample.scores == (2.0, 1.0, 0.5)
    (tree,) = renderer.render(sample)
    assert tree.parents == (-1, 0, 0, 0)
    np.testing.assert_equal(tree.fields["score"], (NAN, 2.0, 1.0, 0.5))
    assert not tree.weights[0].any() and all(weight.all() for weight in tree.weights[1:])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": ["a", "a"], "scores": [1, 0]}, "at least two different texts"),
        ({"answers": ["a", "b"], "scores": [1]}, "a list of 2 numbers"),
        ({"answers": ["a", "b"], "scores": [1, 1]}, "scores that differ"),
        ({"answers": ["a", "b"], "scores": ["good", "bad"]}, "a list of 2 numbers"),
        ({"words": [], "tags": []}, "a list of words"),
        ({"words": ["a", "b"], "tags": ["X"]}, "a list of 2 names or numbers"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "an answer other than the chosen one"),
    ],
)
def test_what_is_wrong_with_a_row_is_said(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"rows:1.*{message}"):
        converted(**row)


def test_labels_are_classes_by_name_or_number() -> None:
    assert converted(text="fine", label="good").labels == ("good",)
    numbered = converted(text="fine", label=1)
    assert numbered.labels == ("1",) and numbered.fields == {"label": 1.0}
    row = {"text": "fine", "mood": "good"}
    named = sniff(row, "rows:1", columns={"label": "mood"}).convert(row, "rows:1")
    assert named.labels == ("good",)
    assert converted(words=["the", "cat"], ner_tags=[0, 4]).labels == ("0", "4")


def test_a_text_is_rendered_with_its_class_and_words_as_a_chain(renderer: Renderer) -> None:
    tree = renderer.classified(converted(text="a fine day", label="good"), ["bad", "good"])
    assert tree.fields == {"class": (1.0,)} and not tree.weights[0].any()
    tagged = renderer.classified(converted(words=["position", "of", "x"], tags=["A", "B", "A"]), ["A", "B"])
    assert tagged.parents == (-1, 0, 1) and tagged.fields == {"class": (0.0, 1.0, 0.0)}
    assert all(weight[-1] == 1 and weight.sum() == 1 for weight in tagged.weights)
    assert renderer.decode(np.concatenate(tagged.tokens)).strip() == "position of x"


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("text", answers=("x",), labels=("goood",), where="rows:3"), "rows:3.*none of the classes .*good"),
        (Sample("text", answers=("x",), where="rows:3"), "rows:3.*expected a class in a column called 'label'"),
    ],
)
def test_a_class_that_is_none_is_said(renderer: Renderer, sample: Sample, message: str) -> None:
    with pytest.raises(DataError, match=message):
        renderer.classified(sample, ["bad", "good"])


def pair(prompt: int, chosen: int, rejected: int) -> Tree:
    sizes = (prompt, chosen, rejected)
    weights = (np.zeros(prompt, np.float32), *(np.ones(n, np.float32) for n in sizes[1:]))
    tokens = tuple(np.arange(n, dtype=np.int32) + 10 * place for place, n in enumerate(sizes))
    return Tree(tokens, weights, (-1, 0, 0), {"chosen": (NAN, 1.0, 0.0)}, "pair")


def test_an_answer_that_is_cut_to_nothing_leaves_no_pair() -> None:
    assert [len(t) for t in fit(pair(4, 6, 3), 8, "truncate")[0].tokens] == [4, 4, 3]
    assert fit(pair(8, 6, 3), 8, "truncate") == []  # the prompt fills the window
    chained = Tree(
        (np.arange(3, dtype=np.int32), np.arange(6, dtype=np.int32), np.arange(2, dtype=np.int32)),
        (np.zeros(3, np.float32), np.r_[np.zeros(5), 1].astype(np.float32), np.ones(2, np.float32)),
        (-1, 0, 0), {"chosen": (NAN, 1.0, 0.0)}, "pair",
    )  # fmt: skip
    assert fit(chained, 8, "truncate") == []  # what is left of the chosen answer is not trained


def test_a_prompt_that_fills_the_window_is_counted_and_said(renderer: Renderer, tmp_path: Path) -> None:
    long = {"prompt": "word " * 60, "chosen": "yes", "rejected": "no"}
    short = {"prompt": "word", "chosen": "yes", "rejected": "no"}
    opened = open_data(source(file(tmp_path, long, short), max_tokens=30), renderer, consumes="pairs")
    assert opened.trees is not None and opened.trees.counts.kept == 1 and opened.trees.counts.nothing_trained == 1
    with pytest.raises(DataError, match=r"whose prompt fills the window of 30 tokens.*raise max_tokens"):
        open_data(source(file(tmp_path, long), max_tokens=30), renderer, consumes="pairs")


@pytest.mark.parametrize(
    ("row", "consumes", "message"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "b"}, "sequences", "preference data.*such as dpo"),
        ({"prompt": "p", "answers": ["a", "b"], "scores": [1, 0]}, "sequences", "ranked answers.*such as dpo"),
        ({"prompt": "p", "completion": "a"}, "pairs", "prompts with answers.*such as sft"),
        ({"text": "p"}, "tagged", "plain text"),
    ],
)
def test_data_of_another_kind_names_the_objectives_that_fit(
    renderer: Renderer, tmp_path: Path, row: dict[str, Any], consumes: str, message: str
) -> None:
    with pytest.raises(DataError, match=f"rows.jsonl:1.*{message}"):
        open_data(source(file(tmp_path, row)), renderer, consumes=consumes)
