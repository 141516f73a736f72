"""Python's own documentation, mixtures of sources, and the tokenizer that is trained on them."""

from __future__ import annotations

import ast
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.data import pydocs
from hone.data.chains import Chains
from hone.data.mix import Mix
from hone.data.pydocs import PyDocs
from hone.data.sample import Sample
from hone.data.source import Source
from hone.errors import DataError, ModelError
from hone.options import Places, build_part, check_part
from hone.text.tokenizer import load_tokenizer, train_tokenizer

TASKS = ("text", "docstring", "summary")


# --- pydocs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_training_and_evaluation_share_no_module_and_no_text(task):
    source = PyDocs(task=task)
    train, held = list(source.samples("train")), list(source.samples("eval"))
    assert len(train) > 500 and 30 < len(held) <= 200
    assert not modules(train) & modules(held)
    if task == "text":
        assert not paragraphs(train) & paragraphs(held)
    elif task == "docstring":
        assert not {sample.answers for sample in train} & {sample.answers for sample in held}
    assert len({(sample.where, sample.answers) for sample in train}) == len(train)
    assert list(source.samples("train")) == train and list(source.samples("eval")) == held
    assert list(replace(source, limit=7).samples("train")) == train[:7]
    assert list(replace(source, holdout=3).samples("eval")) == held[:3]
    assert source.grade(held[0], "anything") is None


def modules(samples: list[Sample]) -> set[str]:
    return {sample.where.rpartition(":")[0] for sample in samples}


def paragraphs(samples: list[Sample]) -> set[str]:
    """The paragraphs of at least 30 characters, the only ones that say something."""
    found = {paragraph for sample in samples for paragraph in re.split(r"\n\s*\n", str(sample.answers[0]))}
    return {paragraph for paragraph in found if len(paragraph) >= 30}


def test_text_is_prose_of_the_standard_library():
    samples = list(PyDocs().samples("train"))
    assert all(sample.kind == "text" and sample.answers[0].strip() for sample in samples)
    read = modules(samples)
    assert {"argparse", "json.decoder", "topics.assignment"} <= read
    assert not {name for name in read if {"test", "tests", "idlelib", "site-packages"} & set(name.split("."))}
    text = " ".join(sample.answers[0] for sample in samples)
    assert len(text) > 1_000_000
    assert sum(character.isalpha() or character.isspace() for character in text) > 0.8 * len(text)


def test_docstring_samples_complete_source_that_parses():
    samples = list(PyDocs(task="docstring").samples("train"))
    found = next(sample for sample in samples if sample.prompt.startswith("def dedent("))
    assert found.kind == "completion" and found.prompt.endswith('\n    """') and found.where.startswith("textwrap:")
    assert found.answers[0].startswith("Remove any common leading whitespace") and found.answers[0].endswith('"""')
    whole = [sample.prompt.removesuffix('\n    """') for sample in samples if sample.prompt.count("\n") > 1]
    assert len(whole) > 1000
    for code in whole:
        (node,) = ast.parse(code).body
        assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))


def test_summaries_are_one_line():
    for sample in itertools.islice(PyDocs(task="summary").samples("train"), 2000):
        assert "\n" not in sample.answers[0]
        assert sample.prompt.split()[0] in ("def", "class", "async") and sample.prompt.endswith(':\n    """')


def test_definitions_of_a_module():
    text = '''"""What this module is for, at length."""

class Box(Base, metaclass=Meta):
    """A box that holds things of any kind."""

    @property
    def size(self) -> int:
        """Return how many things are in the box.

            Indented.
        Not indented.
        """
        # counted afresh
        return len(self.things)

    def one(self): "Return the one thing that is in here."

def undocumented(): pass

def short():
    """Too short."""
'''
    found = list(pydocs._documented("m", text))
    assert [(d.line, d.signature) for d in found] == [
        (1, ""),
        (3, "class Box(Base, metaclass=Meta):"),
        (7, "def size(self) -> int:"),
        (16, "def one(self):"),
    ]
    assert found[2].code == "def size(self) -> int:\n    # counted afresh\n    return len(self.things)"
    assert found[2].doc == "Return how many things are in the box.\n\n    Indented.\nNot indented."
    assert found[3].code == ""


def test_passages_keep_paragraphs_whole():
    paragraphs = [(1, "a" * 800), (2, "b" * 800), (3, "c"), (9, "d" * 4000), (10, "e")]
    found = list(pydocs._passages(paragraphs))
    assert [line for line, _ in found] == [1, 2, 9, 10]
    assert found[1][1] == "b" * 800 + "\n\nc" and found[2][1] == "d" * 4000


def test_a_python_without_sources_is_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(pydocs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataError, match="expected the sources of Python's standard library"):
        list(PyDocs().samples("train"))


def test_fingerprint_covers_the_options_and_the_python(monkeypatch):
    prints = {PyDocs(task=task, limit=limit).fingerprint() for task in TASKS for limit in (None, 5)}
    assert len(prints) == 6 and PyDocs().fingerprint() == PyDocs(shuffle=False).fingerprint()
    before = PyDocs().fingerprint()
    monkeypatch.setattr(pydocs.platform, "python_version", lambda: "3.99.0")
    assert PyDocs().fingerprint() != before


# --- mix ------------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Letters(Source):
    """`length` samples that say `letter`; graded right when the text is the letter."""

    letter: str
    length: int = 1000

    def samples(self, split: str) -> Iterator[Sample]:
        length = self.length if split == "train" else self.holdout
        yield from (Sample(kind="text", answers=(self.letter,), where=f"{self.letter}:{i}") for i in range(length))

    def fingerprint(self) -> str:
        return f"{self.letter} {self.length} {self.holdout}"

    def grade(self, sample: Sample, text: str) -> float:
        assert sample.answers == (self.letter,) and not sample.extra.get("mix")
        return float(text == self.letter)


def mixed(weights: list[float] | None, **options: object) -> Mix:
    return Mix(sources=[Letters(letter=letter, holdout=3) for letter in "abc"], weights=weights, **options)


def spelled(samples: Iterator[Sample]) -> str:
    return "".join(str(sample.answers[0]) for sample in samples)


@given(st.lists(st.floats(0.05, 10), min_size=3, max_size=3))
@settings(max_examples=50, deadline=None)
def test_every_stretch_of_a_mixture_is_in_proportion(weights):
    text = spelled(mixed(weights, limit=300).samples("train"))
    assert len(text) == 300
    for letter, weight in zip("abc", weights, strict=True):
        share = weight / sum(weights)
        for start, end in ((0, 10), (0, 300), (100, 150)):
            assert abs(text[start:end].count(letter) - share * (end - start)) < 3


def test_mixture_order():
    assert spelled(mixed([2, 1, 1], limit=8).samples("train")) == "abcaabca"
    assert spelled(mixed(None, limit=6).samples("train")) == "abcabc"
    assert spelled(mixed([2, 1, 1]).samples("train")).startswith("abcaabca")


def test_a_mixture_ends_with_the_first_source_that_ends():
    sources = [Letters(letter="a", length=100), Letters(letter="b", length=10)]
    text = spelled(Mix(sources=sources, weights=[2, 1]).samples("train"))
    assert text.count("b") == 10 and 19 <= text.count("a") <= 22


def test_a_mixture_holds_out_what_its_sources_hold_out():
    sources = [Letters(letter="a", holdout=2), Letters(letter="b", holdout=4)]
    assert spelled(Mix(sources=sources).samples("eval")) == "ababbb"


def test_a_mixture_grades_by_the_source_of_the_sample():
    inner = Mix(sources=[Letters(letter="b", holdout=1), Letters(letter="c", holdout=1)])
    outer = Mix(sources=[Letters(letter="a", holdout=1), inner, Chains(holdout=4)], weights=[1, 1, 1])
    samples = list(outer.samples("eval"))
    assert len(samples) == 7
    for sample in samples:
        assert outer.grade(sample, str(sample.answers[0])) == 1.0
        assert outer.grade(sample, "answer: wrong") == 0.0


def test_a_mixture_in_a_recipe():
    def problems(**options: object) -> list[str]:
        return [str(problem) for problem in check_part("data", {"name": "mix", **options}, "data", Places())]

    assert problems(sources=["chains", {"name": "pydocs"}], weights=[0.6, 0.4]) == []
    assert "weight for each of 2 sources" in problems(sources=["chains", "pydocs"], weights=[1.0])[0]
    assert "at least one source" in problems(sources=[])[0]
    assert "data.sources.0.count" in problems(sources=[{"name": "chains", "count": "many"}])[0]
    assert problems(sources=["chains"], weights=[0.0])
    built = build_part("data", {"name": "mix", "sources": [{"name": "chains", "skills": ["sort"]}, "pydocs"]})
    kinds = [sample.kind for sample in itertools.islice(built.samples("train"), 4)]
    assert kinds == ["completion", "text", "completion", "text"]
    assert "1 skills (sort)" in built.describe() and "pydocs" in built.describe()


def test_the_fingerprint_of_a_mixture_covers_its_sources():
    prints = [mixed(None), mixed([1.0, 2.0, 1.0]), mixed(None, limit=9), Mix(sources=[Letters(letter="a")])]
    assert len({mix.fingerprint() for mix in prints}) == 4
    assert mixed(None).fingerprint() == mixed(None).fingerprint()


# --- tokenizer ------------------------------------------------------------------------------------------------------


def corpus() -> list[str]:
    mix = Mix(sources=[Chains(), PyDocs()], weights=[5, 1], limit=600)
    return [text for sample in mix.samples("train") for text in (sample.prompt, *sample.answers)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(corpus(), 1024)


@given(st.text())
@settings(max_examples=300, deadline=None)
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["", " a , b !", "\n\n  x\t", "née 名前 🙂", "12 + 345", "<|user|>hi<|end|>", "\x00\r\n"]
)
def test_these_texts_round_trip(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_every_digit_is_a_token_of_its_own(tokenizer):
    assert [token for token in tokenizer.tokenize("a 47+2025") if token.isdigit()] == list("472025")
    merged = [token for token in tokenizer.get_vocab() if any(c.isdigit() for c in token) and len(token) > 1]
    assert [token for token in merged if token.isascii()] == []


def test_special_tokens(tokenizer):
    assert len(tokenizer) == 1024
    assert tokenizer.convert_ids_to_tokens(range(3)) == ["<|begin|>", "<|end|>", "<|pad|>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|begin|>", "<|end|>", "<|pad|>")
    ids = tokenizer("add 1 + 2 =\n")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(tokenizer("<|user|>hi")["input_ids"], skip_special_tokens=True) == "hi"


def test_chat_template(tokenizer):
    turns = [{"role": "system", "content": " a"}, {"role": "user", "content": "b"}]
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert asked == "<|begin|><|system|> a<|end|><|user|>b<|end|><|assistant|>"
    answered = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "c"}], tokenize=False)
    assert answered == asked + "c<|end|>"
    with pytest.raises(Exception, match="got 'tool'"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "b"}], tokenize=False)


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    text = "sort 31 7 =\n7 : 31 , x"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
    assert loaded.chat_template == tokenizer.chat_template and loaded.get_vocab() == tokenizer.get_vocab()


def test_same_texts_same_tokenizer_in_another_process(tmp_path):
    texts = corpus()[:300]
    (tmp_path / "texts.json").write_text(json.dumps(texts), encoding="utf-8")
    code = (
        "import json, pathlib, sys\n"
        "from hone.text.tokenizer import train_tokenizer\n"
        "texts = json.loads(pathlib.Path(sys.argv[1]).read_text(encoding='utf-8'))\n"
        "sys.stdout.write(train_tokenizer(iter(texts), 600).backend_tokenizer.to_str())"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "texts.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
    assert done.stdout == train_tokenizer(texts, 600).backend_tokenizer.to_str()


def test_a_vocabulary_that_cannot_hold_every_byte_is_an_error():
    with pytest.raises(ModelError, match="expected at least 262"):
        train_tokenizer(["a"], 261)
    assert len(train_tokenizer(["a b"], 262)) == 262


def test_nobody_is_asked_to_run_the_code_of_a_tokenizer(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *said: asked.append(said) or "y")
    record = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(record))
    (tmp_path / "own.py").write_text("raise SystemExit('code of a repository has run')")
    with pytest.raises(ModelError, match="expected a folder with a tokenizer"):
        load_tokenizer(str(tmp_path))
    assert not asked


def test_a_missing_tokenizer_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="expected a folder with a tokenizer"):
        load_tokenizer(str(tmp_path))
