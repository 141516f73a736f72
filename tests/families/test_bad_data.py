"""Bad data: every error says where, which field, what was expected, what was found and how to fix it."""

from __future__ import annotations

import gzip
import json
import re

import pytest

from hone.data.files import Files
from hone.data.formats import sniff
from hone.data.hub import Hub
from hone.errors import DataError


def turn(role, content):
    return {"role": role, "content": content}


USER, ASSISTANT = turn("user", "hi"), turn("assistant", "hello")
GOOD = {
    "text": {"text": "x"},
    "completion": {"prompt": "a", "completion": "b"},
    "messages": {"messages": [USER, ASSISTANT]},
    "alpaca": {"instruction": "a", "output": "b"},
    "qa": {"question": "a", "answer": "b"},
    "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
    "prompt": {"prompt": "a"},
}


def complaint(first: dict, row: dict) -> str:
    """The message about `row` in a source whose first row is `first`."""
    with pytest.raises(DataError) as caught:
        sniff(first, "d.jsonl:1").convert(row, "d.jsonl:7")
    return str(caught.value)


def says(message: str, *parts: str) -> None:
    assert message.startswith("d.jsonl:7: ")
    for part in parts:
        assert part in message, f"{part!r} not in {message!r}"


@pytest.mark.parametrize("name", GOOD)
def test_missing_column_names_the_nearest(name):
    for column in GOOD[name]:
        if (name, column) == ("pairs", "prompt"):
            continue
        row = {f"{key}s" if key == column else key: value for key, value in GOOD[name].items()}
        says(complaint(GOOD[name], row), f"missing column '{column}'", f"did you mean '{column}s'?")
    says(complaint(GOOD[name], {}), "(found none)", "all rows of a source need the columns of its first row")


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize(
    ("value", "found"), [(None, "nothing (null)"), (5, "a number (5)"), (True, "a truth value (True)")]
)
def test_wrong_type_in_a_cell(name, value, found):
    for column in GOOD[name]:
        if (name, column, value) == ("pairs", "prompt", None):  # a pair may lack a prompt
            continue
        expected = "a list of turns" if name == "messages" else "a string"
        message = complaint(GOOD[name], {**GOOD[name], column: value})
        says(message, f"field '{column}': expected {expected}, found {found}. ")
        assert message.endswith(".") and re.search(r"Write|Fill in", message)


@pytest.mark.parametrize(
    ("name", "column"),
    [("text", "text"), ("completion", "completion"), ("alpaca", "output"), ("alpaca", "instruction"), ("qa", "answer"),
     ("qa", "question"), ("pairs", "chosen"), ("pairs", "rejected")],
)  # fmt: skip
@pytest.mark.parametrize("nothing", ["", " \n\t"])
def test_empty_text(name, column, nothing):
    message = complaint(GOOD[name], {**GOOD[name], column: nothing})
    says(
        message, f"field '{column}': expected some text to train on, found an empty string", "Fill in or remove the row"
    )


@pytest.mark.parametrize("answer", ["This", [{"role": "assistant", "content": "This"}]])
def test_a_pair_of_equal_answers(answer):
    message = complaint(GOOD["pairs"], {**GOOD["pairs"], "chosen": answer, "rejected": answer})
    says(message, "field 'rejected': expected an answer other than the chosen one, found the same answer twice")
    says(message, "Remove the row")


@pytest.mark.parametrize(
    ("turns", "parts"),
    [
        ([], ["expected a list of turns, found an empty list", '[{"role": "user"']),
        ("hi", ["expected a list of turns, found the string ('hi')"]),
        (["hi"], ["expected turn 1 to be an object, found the string ('hi')"]),
        (
            [{"rol": "user", "content": "x"}],
            ["expected turn 1 to have 'role', found only 'rol', 'content'", "did you mean 'rol'?"],
        ),
        ([{"role": "user"}], ["expected turn 1 to have 'content'", "Turns are {role, content} or {from, value}"]),
        ([USER, {"from": "gpt", "text": "x"}], ["expected turn 2 to have 'value'"]),
        (
            [turn("usr", "x"), ASSISTANT],
            ["expected a known role in turn 1, found the string ('usr')", "Did you mean 'user'?"],
        ),
        ([turn("zzz", "x")], ["Known roles: system"]),
        ([turn(3, "x")], ["expected a known role in turn 1, found a number (3)"]),
        ([turn("user", None)], ["expected turn 1 to hold a string in 'content', found nothing (null)"]),
        ([turn("user", [{"type": "image_url", "image_url": "x"}])], ["to hold a string in 'content', found a list ("]),
        ([USER, turn("assistant", " ")], ["expected turn 2, an assistant's, to say something, found an empty string"]),
        (
            [USER],
            ["expected at least one assistant turn, found only 'user'", "format: prompt, columns: {prompt: messages}"],
        ),
        ([ASSISTANT, USER], ["expected a conversation to begin with a user, found an assistant turn at its start"]),
    ],
)
def test_bad_conversation(turns, parts):
    says(complaint(GOOD["messages"], {"messages": turns}), "field 'messages': ", *parts)


def test_prompt_that_ends_with_its_answer():
    message = complaint({"prompt": [USER]}, {"prompt": [USER, ASSISTANT]})
    says(message, "field 'prompt': expected a prompt to end before the answer", "Remove that turn.")


@pytest.mark.parametrize(
    ("row", "parts"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, ["'rejected'", "the same answer twice", "Remove the row."]),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, ["'rejected'", "the same answer twice"]),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER]}, ["'rejected': expected at least one assistant turn"]),
        ({"chosen": [USER, ASSISTANT, USER], "rejected": [USER, ASSISTANT]},
         ["'chosen': expected an assistant turn that the other answer lacks, found none after the shared turns"]),
        ({"chosen": [ASSISTANT], "rejected": [turn("assistant", "bye")]}, ["expected a prompt before the answers"]),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": ""}, ["field 'rejected': expected some text"]),
    ],
)  # fmt: skip
def test_bad_pair(row, parts):
    says(complaint({"chosen": "b", "rejected": "c"}, row), *parts)


def test_weight_that_is_no_number():
    columns = {"text": "text", "weight": "quality"}
    layout = sniff({"text": "x", "quality": 1}, "d.jsonl:1", columns=columns)
    with pytest.raises(
        DataError, match=re.escape("d.jsonl:7: field 'quality': expected a number, found the string ('high')")
    ):
        layout.convert({"text": "x", "quality": "high"}, "d.jsonl:7")


def test_unknown_format_lists_the_columns_the_formats_and_a_mapping_to_write():
    with pytest.raises(DataError) as caught:
        sniff({"ask": "a", "reply": "b"}, "d.jsonl:1")
    message = str(caught.value)
    assert message.startswith("d.jsonl:1: the format cannot be told from the columns 'ask', 'reply'")
    assert "alpaca: instruction, output" in message and "messages: messages" in message
    assert "columns: {prompt: ask, completion: reply}\n" in message
    assert message.endswith("columns: {text: ask, label: reply}  (texts and their classes)")


def test_named_format_that_does_not_fit():
    with pytest.raises(DataError) as caught:
        sniff({"ask": "a"}, "d.jsonl:1", format="qa")
    message = str(caught.value)
    assert "d.jsonl:1: format 'qa' does not fit the columns 'ask'" in message and "alpaca" not in message
    assert message.endswith("columns: {question: ask, answer: COLUMN}")


def test_mapping_to_a_column_that_is_not_there():
    with pytest.raises(DataError, match=r"d.jsonl:1: columns: prompt: there is no column 'aks' .*did you mean 'ask'\?"):
        sniff({"ask": "a", "reply": "b"}, "d.jsonl:1", columns={"prompt": "aks", "completion": "reply"})


def test_mapping_whose_roles_belong_to_no_one_format():
    with pytest.raises(DataError, match="the format cannot be told"):
        sniff({"a": "x", "b": "y"}, "d.jsonl:1", columns={"prompt": "a", "rejected": "b"})


# Files ---------------------------------------------------------------------------------------------------------------


def trouble(path, content: str | bytes, **options) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        list(Files(path=str(path), **options).samples("train"))
    return str(caught.value)


ROW = json.dumps({"text": "x"})


@pytest.mark.parametrize(
    ("name", "content", "line", "parts"),
    [
        ("a.jsonl", f'{ROW}\n\n{{"text": "y"\n', 3, ["not valid JSON: Expecting ',' delimiter", "near"]),
        ("a.jsonl", f"{ROW}\n{{'text': 'y'}}\n", 2, ["not valid JSON", "Every row must be one JSON object"]),
        ("a.jsonl", f"{ROW}\n[1]\n", 2, ['expected a JSON object such as {"text": "..."}, found list']),
        ("a.jsonl", f'{ROW}\n{{"text": "é"}}\n'.encode("latin-1"), 2, ["UTF-8 text, found byte 0xe9 at byte 11"]),
        ("a.json", '[\n{"text": "x"},\n{"text": }\n]', 3, ["not valid JSON: Expecting value at column 10"]),
        ("a.json", '{\n"text": "x"}', 1, ['expected an array of objects or {"data": [...]}, found dict']),
        ("a.json", '[{"text": "x"}, 5]', 2, ["expected a JSON object", "found int"]),
        ("a.csv", "text,id\nx,1\ny\n", 3, ["expected 2 cells, found 1", "Quote cells"]),
        ("a.csv", "text,id\nx,1\ny,2,3\n", 3, ["expected 2 cells, found 3"]),
        ("a.csv", "text,text\nx,1\n", 1, ["column 'text' is named twice"]),
        ("a.csv", 'text,id\n"x,1\n', 2, ["not a valid table: unexpected end of data. Check the quotes."]),
        ("a.csv", b"text\nx\n\xff\n", 3, ["expected UTF-8 text, found byte 0xff"]),
        ("a.txt", b"hello\n\xff\n", 2, ["expected UTF-8 text, found byte 0xff at byte 1 of the line"]),
        ("a.parquet", "text", 1, ["not a readable Parquet file"]),
        ("a.jsonl.gz", f"{ROW}\n", 1, ["the compressed file is broken", "Copy or download it again"]),
        ("a.jsonl.gz", gzip.compress(f"{ROW}\n".encode() * 9999)[:-20], None, ["the compressed file is broken"]),
        ("a.jsonl", f'{ROW}\n{{"text": ""}}\n', 2, ["field 'text': expected some text to train on"]),
    ],
)  # fmt: skip
def test_broken_file_says_its_line(tmp_path, name, content, line, parts):
    message = trouble(tmp_path / name, content)
    assert message.startswith(f"{tmp_path / name}:{line}: " if line else f"{tmp_path / name}:")
    for part in parts:
        assert part in message, f"{part!r} not in {message!r}"


def test_file_without_rows(tmp_path):
    assert "there are no rows; expected at least one" in trouble(tmp_path / "a.jsonl", "\n\n")
    assert "there are no rows" in trouble(tmp_path / "a.txt", " \n")


def test_paths_that_lead_nowhere(tmp_path):
    (tmp_path / "train.jsonl").write_text(ROW)
    (tmp_path / "notes.docx").write_text("x")
    (tmp_path / "empty").mkdir()
    for path, parts in {
        "trian.jsonl": ["there is no such file or folder", "did you mean 'train.jsonl'?"],
        "no/such/file.jsonl": ["there is no such file or folder"],
        "notes.docx": ["files ending in '.docx' cannot be read", "expected .jsonl, .json, .csv"],
        "empty": ["no data file is there"],
        "*.csv": ["no data file is there"],
    }.items():
        with pytest.raises(DataError) as caught:
            Files(path=str(tmp_path / path)).files()
        assert str(caught.value).startswith(str(tmp_path / path)) and all(part in str(caught.value) for part in parts)


def test_skipping_bad_rows_does_not_hide_a_broken_file(tmp_path):
    assert "not valid JSON" in trouble(tmp_path / "a.jsonl", f"{ROW}\nnonsense\n", bad_rows="skip")


# The Hub -------------------------------------------------------------------------------------------------------------


def test_dataset_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    with pytest.raises(DataError, match=r"set\[train\]: the dataset was not found or cannot be read"):
        list(Hub(path=str(tmp_path / "set")).samples("train"))


def test_split_and_subset_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "train.jsonl").write_text(ROW)
    with pytest.raises(DataError, match=r"\[tset\]: .*tset.*Set 'subset' and 'split'"):
        Hub(path=str(tmp_path), split="tset").data()
    with pytest.raises(DataError, match=r"\[main:train\]: .*main.*Set 'subset' and 'split'"):
        Hub(path=str(tmp_path), subset="main").data()


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_that_cannot_be_reached(monkeypatch, tmp_path, streaming):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(
        DataError, match=r"owner/name\[train\]: the Hub cannot be reached: .*give their folder as the path"
    ):
        Hub(path="owner/name", streaming=streaming).data()
