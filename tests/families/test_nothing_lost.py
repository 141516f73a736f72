"""Rows whose parts could be lost in silence, texts and files that are nearly as expected, columns of any name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from hone.data.files import Files, read_text
from hone.data.formats import sniff
from hone.data.hub import Hub
from hone.data.mix import Mix
from hone.data.open import open_data
from hone.data.sample import Message
from hone.engine.assemble import _identity
from hone.errors import DataError
from hone.text.loading import shipped_base
from hone.text.model import LanguageModel
from hone.text.starts import Pretrained

ALPACA = "Below is an instruction that describes a task"
PAIR = {"chosen": "Bonne nuit", "rejected": "Guten Tag"}
LIST = {"answers": ["a", "b"], "scores": [1, 0]}


def convert(row: dict[str, Any], **options: Any) -> Any:
    return sniff(row, "d.jsonl:1", **options).convert(row, "d.jsonl:1")


def turn(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


HI, HELLO, BRIEF = turn("user", "hi"), turn("assistant", "hello"), turn("system", "Be brief.")


@pytest.mark.parametrize("answers", [PAIR, LIST])
def test_the_input_of_an_instruction_is_kept_beside_answers_to_choose_from(answers):
    row = {"instruction": "Translate.", "input": "Good night", **answers}
    sample = convert(row)
    assert sample.prompt.startswith(f"{ALPACA}, paired with an input") and "### Input:\nGood night\n" in sample.prompt
    assert convert(row, chat=True).prompt == (Message("user", "Translate.\n\nGood night"),)
    assert convert({**row, "input": ""}).prompt.startswith(f"{ALPACA}. Write")
    other = convert({"prompt": "Translate.", "input": "a column of its own", **answers})
    assert other.prompt == "Translate." and other.extra == {"input": "a column of its own"}


def test_lists_of_answers_may_answer_conversations():
    assert convert({"prompt": "Q", **LIST}, chat=True).prompt == (Message("user", "Q"),)
    told = convert({"prompt": [HI], "system": "Be brief.", **LIST})
    assert told.prompt == (Message("system", "Be brief."), Message("user", "hi")) and told.answers == ("a", "b")
    assert convert({"prompt": "Q", "system": "Be brief.", **LIST}).prompt == "Be brief.\n\nQ"


def test_a_prompt_that_answers_repeat_in_part_is_written_once():
    row = {"prompt": [BRIEF, HI], "chosen": [HI, HELLO], "rejected": [HI, turn("assistant", "no")]}
    assert [message.role for message in convert(row).prompt] == ["system", "user"]


@pytest.mark.parametrize("row", [{"messages": [BRIEF, HI, HELLO]}, {"prompt": [BRIEF, HI]}])
def test_a_conversation_has_one_system_turn(row):
    assert [message.role for message in convert({**row, "system": "Other."}).prompt].count("system") == 1


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "a", "output": "b", "history": [["c", "d"]]}, "field 'history'"),
        ({"text": "half \ud83d"}, r"half of one (\ud83d)"),
        ({"messages": [turn("user", "\udc00"), HELLO]}, "half of one"),
        ({**LIST, "answers": ["a", "\ud83d"]}, "half of one"),
        ({"words": ["a", "\ud83d"], "tags": [0, 1]}, "half of one"),
    ],
)
def test_what_would_be_lost_is_refused(row, said):
    with pytest.raises(DataError, match=r"d\.jsonl:1: ") as caught:
        convert(row)
    assert said in str(caught.value)


def test_empty_marks_of_what_is_not_supported_are_harmless():
    row = {"messages": [HI, turn("assistant", "x", reasoning_content="", tool_calls=[])], "tools": "[]"}
    assert convert(row).kind == "messages"


def test_columns_may_have_any_name(tmp_path):
    rows = [{"prompt": f"{i}", "completion": "yes", "silent": True, "continues": "yes", "mix": 3} for i in range(30)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    renderer = LanguageModel.load("base").renderer
    mixed = Mix(sources=[Files(path=str(tmp_path / "d.jsonl"), cache=False)])
    (tree,) = renderer.render(next(iter(mixed.samples("train"))))
    assert tree.tokens[0][-1] == renderer.tokenizer.eos_token_id and tree.weights[0][-1] == 1  # the end is trained
    assert mixed.grade(next(iter(mixed.samples("train"))), "yes") == 1


def test_a_mixture_named_for_evaluation_is_evaluated_on_as_a_whole(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name}{i}"}) + "\n" for i in range(50)))
    sources = [Files(path=str(tmp_path / f"{name}.jsonl")) for name in ("a", "b")]
    mixed = Mix(sources=sources)
    assert len(list(mixed.samples("eval"))) == 10
    assert len(list(mixed.samples(mixed.evaluation_split()))) == 100


def test_a_stream_inside_a_mixture_is_not_served_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HONE_CACHE", str(tmp_path / "cache"))
    renderer = LanguageModel.load("base").renderer
    for word in ("old", "new"):
        folder = tmp_path / "set"
        folder.mkdir(exist_ok=True)
        (folder / "d.jsonl").write_text("".join(json.dumps({"text": f"{word} row {i}"}) + "\n" for i in range(20)))
        opened = open_data(Mix(sources=[Hub(path=str(folder), streaming=True)]), renderer, consumes="any")
        assert opened.trees is not None
        assert word in renderer.decode(opened.trees[0].tokens[0])


@pytest.mark.parametrize("many", [False, True])
def test_what_save_to_disk_wrote_is_read(tmp_path, many):
    rows = Dataset.from_list([{"prompt": f"{i}", "completion": "b"} for i in range(20)])
    (DatasetDict({"train": rows}) if many else rows).save_to_disk(tmp_path / "set")
    assert len(list(Hub(path=str(tmp_path / "set")).samples("train"))) == 18
    if many:
        with pytest.raises(DataError, match=r"there is no split 'tran'; did you mean 'train'"):
            Hub(path=str(tmp_path / "set"), split="tran").layout()


def test_files_that_describe_a_set_are_no_rows(tmp_path):
    (tmp_path / "dataset_info.json").write_text('{"features": {}}')
    (tmp_path / "one.json").write_text('{"text": "a single row"}\n')
    assert [sample.answers for sample in Files(path=str(tmp_path)).samples("train")] == [("a single row",)]


def test_a_line_break_of_two_characters_is_not_cut(tmp_path):
    (tmp_path / "d.txt").write_bytes(b"x" * 63 + b"\r\n" + b"y" * 10 + b"\r\n")
    assert "".join(row["text"] for row, _ in read_text(tmp_path / "d.txt", 64)) == "x" * 63 + "\n" + "y" * 10 + "\n"


def test_another_template_is_another_start(tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    starts = [Pretrained(path="base"), Pretrained(path="base", template="chatml"),
              Pretrained(path="base", template=str(tmp_path / "own.jinja"))]  # fmt: skip
    found = [_identity(start) for start in starts]
    (tmp_path / "own.jinja").write_text("{{ messages[0] }}")
    assert len({*found, _identity(starts[2])}) == 4
    assert found[0] == _identity(Pretrained(path=str(shipped_base())))
