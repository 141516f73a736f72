"""Formats and sources: what rows become, which are held out, how files are read and answers graded."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import os
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.data.answers import final_answer, same_answer
from hone.data.files import Files, read_text
from hone.data.formats import COLUMN_KEYS, CONTINUES, SHAPES, sniff
from hone.data.hub import Hub
from hone.data.sample import Message, Sample
from hone.data.source import Source, held_out
from hone.options import Places, check_part, hints
from hone.parts import catalogue


def convert(row, where="data.jsonl:1", **options) -> Sample:
    return sniff(row, where, **options).convert(row, where)


def turn(role, content):
    return {"role": role, "content": content}


USER, ASSISTANT = turn("user", "hi"), turn("assistant", "hello")
TALK = (Message("user", "hi"), Message("assistant", "hello"))


# Formats -------------------------------------------------------------------------------------------------------------


def test_text():
    assert convert({"text": "once", "id": 3}) == Sample(
        "text", answers=("once",), extra={"id": 3}, where="data.jsonl:1"
    )


@pytest.mark.parametrize("names", [("prompt", "completion"), ("prompt", "response"), ("input", "output")])
def test_completion_is_joined_as_it_is(names):
    sample = convert(dict(zip(names, ("ask ", "reply"), strict=True)))
    assert (sample.kind, sample.prompt, sample.answers, sample.extra) == ("completion", "ask ", ("reply",), {})


def test_question_and_answer_template():
    sample = convert({"question": "1 + 1?", "answer": "2"})
    assert (sample.kind, sample.prompt, sample.answers) == ("completion", "Question: 1 + 1?\nAnswer:", (" 2",))


@pytest.mark.parametrize("names", [("instruction", "input", "output"), ("instruction", "context", "response")])
def test_alpaca_template_with_and_without_input(names):
    head = "Below is an instruction that describes a task"
    tail = " Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n"
    sample = convert(dict(zip(names, ("Add.", "1, 1", "2"), strict=True)))
    given = f"{head}, paired with an input that provides further context.{tail}### Input:\n1, 1\n\n### Response:\n"
    assert sample.prompt == given and sample.answers == ("2",)
    for without in ({names[0]: "Add.", names[2]: "2"}, dict(zip(names, ("Add.", "", "2"), strict=True))):
        assert convert(without).prompt == f"{head}.{tail}### Response:\n"
    assert convert({**dict(zip(names, ("Add.", None, "2"), strict=True))}).prompt.endswith("### Response:\n")


@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
@pytest.mark.parametrize(
    "turns",
    [
        [USER, ASSISTANT],
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}],
        [
            turn("user", [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]),
            {**ASSISTANT, "tool_calls": None},
        ],
    ],
)
def test_conversations_of_openai_and_sharegpt(column, turns):
    assert convert({column: turns}) == Sample("messages", prompt=TALK, where="data.jsonl:1")


def test_roles_are_translated_and_a_system_column_comes_first():
    turns = [{"from": "human", "value": "hi"}, {"from": "observation", "value": "42"}, {"from": "gpt", "value": "ok"}]
    sample = convert({"conversations": turns, "system": "be brief"})
    assert [message.role for message in sample.prompt] == ["system", "user", "tool", "assistant"]
    assert convert({"messages": [turn("developer", "x"), USER, ASSISTANT]}).prompt[0] == Message("system", "x")
    assert convert({"system": "be brief", "prompt": "a", "completion": "b"}).prompt == "be brief\n\na"
    assert convert({"system": "", "prompt": "a", "completion": "b"}).prompt == "a"


def test_prompt_alone_keeps_its_reference_for_grading():
    sample = convert({"prompt": "1 + 1 =", "answer": 2})
    assert sample == Sample("prompt", prompt="1 + 1 =", extra={"answer": 2}, where="data.jsonl:1")
    assert convert({"prompt": [USER]}).prompt == TALK[:1]


def test_pair_of_texts():
    row = {"prompt": "ask", "chosen": "good", "rejected": "bad", "margin": 1.5}
    sample = convert(row)
    assert (sample.kind, sample.prompt, sample.answers) == ("pair", "ask", ("good", "bad"))
    assert sample.fields == {"margin": 1.5} and sample.extra == {}
    assert convert({"question": "ask", "chosen": "good", "rejected": "bad"}).prompt == "ask"
    assert convert({"chosen": "the same start", "rejected": "the same end"}).prompt == ""


def test_pair_of_dialogues_in_the_manner_of_hh():
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: well?\n\nAssistant:"
    sample = convert({"chosen": start + " Fine.", "rejected": start + " Fish."})
    assert sample.prompt == start and sample.answers == (" Fine.", " Fish.")


ANSWERS = (Message("assistant", "good"),), (Message("assistant", "bad"),)
GOOD, BAD = turn("assistant", "good"), turn("assistant", "bad")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": "good", "rejected": "bad"},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
    ],
)
def test_pair_of_conversations_shares_the_prompt(row):
    sample = convert(row)
    assert (sample.kind, sample.prompt, sample.answers) == ("pair", TALK[:1], ANSWERS)


def test_pair_whose_prompt_column_comes_before_the_shared_turns():
    row = {"prompt": [turn("system", "be brief")], "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert convert(row).prompt == (Message("system", "be brief"), *TALK[:1])


def test_completion_of_a_conversation():
    sample = convert({"prompt": [USER], "completion": [ASSISTANT]})
    assert (sample.kind, sample.prompt, sample.answers) == ("completion", TALK[:1], (TALK[1:],))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "completion": "hello"},
        {"question": "hi", "answer": "hello"},
        {"instruction": "hi", "output": "hello"},
    ],
)
def test_chat_puts_plain_rows_into_turns(row):
    assert convert(row, chat=True) == Sample("messages", prompt=TALK, where="data.jsonl:1")
    system = convert({**row, "system": "be brief"}, chat=True).prompt
    assert system == (Message("system", "be brief"), *TALK)


def test_chat_for_prompts_pairs_and_inputs():
    assert convert({"prompt": "hi"}, chat=True).prompt == TALK[:1]
    pair = convert({"prompt": "hi", "chosen": "good", "rejected": "bad"}, chat=True)
    assert (pair.prompt, pair.answers) == (TALK[:1], ANSWERS)
    alpaca = convert({"instruction": "Add.", "input": "1, 1", "output": "2"}, chat=True)
    assert alpaca.prompt == (Message("user", "Add.\n\n1, 1"), Message("assistant", "2"))


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ("chosen rejected messages prompt", "pairs"),
        ("messages prompt text", "messages"),
        ("instruction input output text", "alpaca"),
        ("prompt completion text", "completion"),
        ("question answer text", "qa"),
        ("text prompt", "text"),
        ("prompt answer", "prompt"),
    ],
)
def test_the_richest_format_is_told_first(columns, name):
    assert sniff(dict.fromkeys(columns.split()), "x:1").name == name


def test_columns_say_which_is_which_and_the_log_is_told():
    row = {"ask": "hi", "reply": "hello", "id": 1, "quality": 0.5}
    layout = sniff(row, "x:1", columns={"prompt": "ask", "completion": "reply", "weight": "quality"})
    said = "format completion (prompt = 'ask', completion = 'reply', weight = 'quality'; other columns: id)"
    assert layout.describe() == said
    sample = layout.convert(row, "x:1")
    assert (sample.prompt, sample.answers, sample.fields, sample.extra) == (
        "hi",
        ("hello",),
        {"weight": 0.5},
        {"id": 1},
    )


def test_a_named_format_is_taken_though_another_fits_too():
    row = {"text": "once", "prompt": "a", "completion": "b"}
    assert sniff(row, "x:1", format="text").name == "text" and sniff(row, "x:1").name == "completion"
    assert sniff({"body": "x"}, "x:1", columns={"text": "body"}).describe() == "format text (text = 'body')"
    assert sniff({"text": "x"}, "x:1", chat=True).describe() == "format text (text) as chat"


def test_numbers_become_fields_and_texts_of_that_name_do_not():
    sample = convert({"text": "x", "label": True, "weight": "0.25", "reward": "good"})
    assert sample.fields == {"label": 1.0, "weight": 0.25} and sample.extra == {"reward": "good"}


def test_an_optional_column_may_first_appear_later():
    layout = sniff({"instruction": "a", "output": "b"}, "x:1")
    assert "### Input:\nc\n" in layout.convert({"instruction": "a", "input": "c", "output": "b"}, "x:2").prompt


def test_the_options_offer_exactly_the_known_formats():
    assert set(typing.get_args(hints(Files)["format"])) == {"auto", *(shape.name for shape in SHAPES)}
    assert {"prompt", "messages", "weight"} <= set(COLUMN_KEYS)


# Files ---------------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": f"ask {i}", "completion": f"réply {i}"} for i in range(5)]


def write(folder, name, rows):
    path = folder / name
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    match name.removesuffix(".gz").rpartition(".")[2]:
        case "json":
            text = json.dumps(rows)
        case "csv" | "tsv" as kind:
            with path.open("w", newline="", encoding="utf-8") as stream:
                table = csv.DictWriter(stream, rows[0], delimiter="\t" if kind == "tsv" else ",")
                table.writeheader()
                table.writerows(rows)
            return path
        case "parquet":
            import pyarrow as pa
            from pyarrow import parquet

            parquet.write_table(pa.Table.from_pylist(rows), path)
            return path
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.json.gz", "A.JSONL"]
)
def test_every_kind_of_file_gives_the_same_samples(tmp_path, name):
    source = Files(path=str(write(tmp_path, name, ROWS)))
    samples = list(source.samples("train"))
    assert [(s.prompt, s.answers) for s in samples] == [(r["prompt"], (r["completion"],)) for r in ROWS]
    first = 2 if name.endswith(("csv", "tsv")) else 1
    assert [s.where for s in samples] == [f"{tmp_path / name}:{first + i}" for i in range(5)]
    assert source.count() == 5 and list(source.samples("eval")) == []


def test_json_may_hold_data_or_lines_and_csv_cells_may_hold_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": ROWS}))
    (tmp_path / "b.json").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "c.csv").write_text('\ufefftext,id\n"one\ntwo",1\n\nthree,2\n', encoding="utf-8")
    assert Files(path=str(tmp_path / "a.json")).count() == Files(path=str(tmp_path / "b.json")).count() == 5
    found = list(Files(path=str(tmp_path / "c.csv")).samples("train"))
    assert [(s.answers, s.where.rpartition(":")[2]) for s in found] == [(("one\ntwo",), "2"), (("three",), "5")]


def test_blank_lines_are_passed_over_and_lines_still_counted(tmp_path):
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "a"}\r\n\r\n{"text": "b"}\n\n', encoding="utf-8")
    source = Files(path=str(tmp_path / "a.jsonl"))
    assert [s.where.rpartition(":")[2] for s in source.samples("train")] == ["1", "3"] and source.count() == 2


def test_folders_globs_and_lists_mix(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b.jsonl", "deep/a.csv", ".hidden/c.jsonl"):
        write(tmp_path, name, ROWS)
    (tmp_path / "README.md").write_text("not data")

    def files(*paths):
        return [str(file.relative_to(tmp_path)) for file in Files(path=[str(tmp_path / p) for p in paths]).files()]

    assert files("") == ["b.jsonl", "deep/a.csv"]
    assert files("**/*.csv", "b.jsonl") == ["deep/a.csv", "b.jsonl"]
    assert files("*") == ["b.jsonl"]


def test_text_files_are_read_in_passages_of_which_only_the_last_ends(tmp_path):
    paragraphs = [f"paragraph {i}\nof two lines\n\n" for i in range(60)]
    (tmp_path / "a.txt").write_text("".join(paragraphs))
    source = Files(path=str(tmp_path / "a.txt"), max_tokens=16)
    found = list(source.samples("train")) + list(source.samples("eval"))
    assert len(found) > 5 and all(s.kind == "text" for s in found)
    assert [s.where for s in found if not s.extra[CONTINUES]] == [max(found, key=lambda s: place(s)).where]
    assert all(s.answers[0].endswith("\n\n") and len(s.answers[0]) < 2 * 256 for s in found)
    assert "".join(s.answers[0] for s in sorted(found, key=place)) == "".join(paragraphs)


def place(sample: Sample) -> int:
    return int(sample.where.rpartition(":")[2])


@settings(max_examples=200, deadline=None)
@given(
    text=st.lists(st.sampled_from(["a", "b c", "\n", "\n" * 9, "é", "日", "😀"])).map("".join), size=st.integers(4, 20)
)
def test_passages_are_the_whole_text(tmp_path_factory, text, size):
    path = tmp_path_factory.getbasetemp() / "passages.txt"
    path.write_text(text, encoding="utf-8", newline="")
    rows = [row for row, _ in read_text(path, size)]
    assert "".join(row["text"] for row in rows) == (text if text.strip() else "")
    assert [row[CONTINUES] for row in rows] == [True] * (len(rows) - 1) + [False] * bool(rows)
    assert all(row["text"].strip() for row in rows)


def test_overlong_text_is_split_and_everything_else_truncated_unless_told():
    source = Files(path="x.txt")
    assert [source.overlong_for(kind) for kind in ("text", "completion", "messages", "pair")] == ["split"] + [
        "truncate"
    ] * 3
    assert Files(path="x.txt", overlong="drop").overlong_for("text") == "drop"


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path):
    path = write(tmp_path, "a.jsonl", [{"text": "a"}, {"text": ""}, {"text": "b"}, {"text": None}])
    source = Files(path=str(path), bad_rows="skip", holdout=0)
    assert [s.answers for s in source.samples("train")] == [("a",), ("b",)] and source.skipped == 2


# The split -----------------------------------------------------------------------------------------------------------


def numbered(tmp_path, count, **options):
    path = write(tmp_path, f"{count}.jsonl", [{"text": str(i)} for i in range(count)])
    source = Files(path=str(path), **options)
    return [[int(s.answers[0]) for s in source.samples(split)] for split in ("train", "eval")]


@pytest.mark.parametrize(
    ("rows", "holdout", "expected"), [(9, 200, 0), (10, 200, 1), (95, 200, 9), (1000, 20, 20), (50, 0, 0)]
)
def test_held_out_rows_are_few_spread_and_never_trained(tmp_path, rows, holdout, expected):
    train, held = numbered(tmp_path, rows, holdout=holdout)
    assert len(held) == expected and sorted(train + held) == list(range(rows))
    assert train == sorted(train) and held == sorted(held)
    if expected == 20:
        assert [row // 50 for row in held] == list(range(20))  # one of every run of 50
        assert len({row % 50 for row in held}) > 5  # and not always the same one of it


def test_limit_cuts_training_and_leaves_the_held_out_rows_alone(tmp_path):
    train, held = numbered(tmp_path, 200)
    few, same = numbered(tmp_path, 200, limit=7)
    assert few == train[:7] and same == held and len(held) == 20


def test_a_stream_holds_out_of_its_beginning_without_counting(tmp_path):
    train, held = numbered(tmp_path, 200, streaming=True, holdout=5)
    assert len(held) == 5 and max(held) < 50 and sorted(train + held) == list(range(200))


class Endless(Files):
    """A stream that is never read to its end."""

    def rows(self):
        yield from (({"text": str(i)}, f"endless:{i}") for i in range(1000))
        raise AssertionError("read on and on")


def test_the_held_out_rows_of_an_endless_stream_are_found():
    source = Endless(path="x.jsonl", streaming=True, holdout=3)
    assert [s.answers[0] for s in source.samples("eval")] == ["9", "10", "20"]
    assert [s.answers[0] for s in itertools.islice(source.samples("train"), 12)][8:] == ["8", "11", "12", "13"]


def test_the_held_out_places_are_settled_for_good():
    assert [i for i in range(60) if held_out(i, 5, 10)] == [i for i in range(60) if held_out(i, 6, 10)][:5]
    assert [i for i in range(30) if held_out(i, 3, 10)] == [9, 10, 20]


def test_fingerprint_follows_what_changes_the_samples(tmp_path):
    path = write(tmp_path, "a.jsonl", ROWS)
    first = Files(path=str(path)).fingerprint()
    for same in ({"shuffle": False}, {"workers": 3}, {"cache": False}):
        assert Files(path=str(path), **same).fingerprint() == first
    for other in ({"limit": 3}, {"holdout": 0}, {"chat": True}, {"columns": {"weight": "prompt"}}, {"streaming": True}):
        assert Files(path=str(path), **other).fingerprint() != first
    write(tmp_path, "a.jsonl", [*ROWS[:-1], {"prompt": "ask 4", "completion": "répl! 4"}])  # the same size
    os.utime(path, (0, 0))
    assert Files(path=str(path)).fingerprint() != first


# Grades --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "final"),
    [
        ("so 1 + 1 = 2\n#### 1,002", "1002"),
        ("#### 3\n#### 4\nand more", "4"),
        ("The answer: 5.", "5"),
        ("ANSWER:\n  new   york", "new york"),
        ("  just this\n", "just this"),
        ("1,2,3", "1,2,3"),
        ("12,345,678.5", "12345678.5"),
        (r"so it is \boxed{42}.", "42"),
        (r"\boxed{\frac{1}{2}} at last", "1/2"),
        (r"answer: 1, or \boxed{2", "2"),
        ("<think>1</think><answer>\n42 </answer>", "42"),
        ("**Answer:** 42", "42"),
        ("Answer: $1,000", "1000"),
        ("\u22125", "-5"),
    ],
)
def test_final_answer(text, final):
    assert final_answer(text) == final


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [("42.0", "42", True), ("1/2", "0.5", True), ("1/0", "1/0", True), ("42", "43", False), ("new", "york", False)],
)
def test_answers_are_the_same_by_value(one, other, same):
    assert same_answer(one, f"#### {other}") is same and same_answer(f"answer: {other}", one) is same


def test_grade_compares_final_answers():
    source = Files(path="x.jsonl")
    asked = Sample("completion", "q", (" 48 + 24\n#### 72",))
    assert source.grade(asked, "it is\n#### 72") == 1.0 and source.grade(asked, "72") == 1.0
    assert source.grade(asked, "#### 27") == 0.0 and source.grade(asked, "") == 0.0
    assert source.grade(Sample("prompt", "q", extra={"answer": 72}), "#### 72") == 1.0
    assert source.grade(Sample("messages", TALK), "hello") == 1.0
    assert source.grade(Sample("completion", TALK[:1], (TALK[1:],)), "hello") == 1.0
    for nothing in (Sample("prompt", "q"), Sample("text", answers=("x",)), Sample("pair", "q", ("a", "b"))):
        assert source.grade(nothing, "x") is None


# The parts -----------------------------------------------------------------------------------------------------------


def test_every_option_of_the_sources_is_documented():
    for name in ("files", "hub"):
        (record,) = [r for r in catalogue() if (r.kind, r.name) == ("data", name)]
        assert {"path", "format", "holdout", "chat", "bad_rows"} <= {option.name for option in record.options}
        assert all(option.doc for option in record.options) and record.summary
        assert "skipped" not in {option.name for option in record.options}


def test_a_recipe_is_told_about_wrong_options_before_anything_is_read(tmp_path):
    write(tmp_path, "train.jsonl", ROWS)
    found = check_part(
        "data", {"name": "files", "path": str(tmp_path / "trian.jsonl"), "columns": {"promt": "x"}}, "data", Places()
    )
    assert [problem.field for problem in found] == ["data.columns.promt", "data.path"]
    assert "did you mean 'prompt'?" in str(found[0]) and "did you mean 'train.jsonl'?" in str(found[1])
    assert check_part("data", str(tmp_path / "train.jsonl"), "data", Places()) == []
    (problem,) = check_part("data", {"name": "files", "path": "x", "format": "alpacca"}, "data", Places())
    assert "did you mean 'alpaca'?" in str(problem)


@pytest.fixture
def local_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        write(folder, f"{split}.jsonl", [{"question": f"{split} {i}?", "answer": f"#### {i}"} for i in range(20)])
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dataset_that_the_datasets_library_loads(local_hub, streaming):
    source = Hub(path=local_hub, split="test", streaming=streaming)
    train, held = list(source.samples("train")), list(source.samples("eval"))
    assert (len(train), len(held)) == (18, 2)
    assert train[0].prompt == "Question: test 0?\nAnswer:" and train[0].where == f"{local_hub}[test]:1"
    assert source.describe() == f"{local_hub}[test]: format qa (question, answer)"
    assert source.fingerprint() == Hub(path=local_hub, split="test", streaming=streaming).fingerprint()
    assert source.fingerprint() != Hub(path=local_hub, split="train", streaming=streaming).fingerprint()


def test_source_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Source()
