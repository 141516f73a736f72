"""What is wrong with the input is said in one message, with status 2, no traceback, and nothing left half done."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from end_to_end.support import Outcome, back_to, fields, files, hone, rows, write_recipe
from hone.adapters import host
from hone.engine import checkpoint
from hone.engine.folder import RunFolder
from hone.objectives.base import Turn
from hone.objectives.language import SFT

Run = Callable[..., Outcome]
QUESTION, ANSWER = "What does animal 1 of the dogs say?", "I am a dog"
GOOD = [{"question": QUESTION, "answer": ANSWER}] * 30


@pytest.fixture
def run(tiny_model: Path, qa_file: Path, tmp_path: Path) -> Run:
    """Run a recipe with some changes, in the folder `run`."""

    def start(*arguments: str, **changes: Any) -> Outcome:
        content = fields(tiny_model, qa_file, tmp_path / "run", **changes)
        return hone("run", write_recipe(tmp_path / "mine.yaml", content), *arguments)

    return start


@pytest.fixture
def bad_file(tmp_path: Path) -> Callable[[str], str]:
    """Put a line into the middle of good ones: line 16."""

    def write(line: str) -> str:
        lines = [json.dumps(row) for row in GOOD]
        path = tmp_path / "train.jsonl"
        path.write_text("\n".join([*lines[:15], line, *lines[15:]]) + "\n")
        return str(path)

    return write


def assert_refused(outcome: Outcome, *texts: str) -> None:
    """Check that a command ended with one message for the user."""
    assert outcome.status == 2, outcome
    assert outcome.err.count("hone: ") == 1 and "Traceback" not in outcome.err
    for text in texts:
        assert text in outcome.err


@pytest.mark.parametrize(
    ("line", "texts"),
    [
        ('{"question": "What?", "answer": "This"', ("train.jsonl:16: not valid JSON", "column")),
        ("just text", ("train.jsonl:16: not valid JSON",)),
        ('["a", "b"]', ("train.jsonl:16: expected a JSON object",)),
        ('{"question": "What?"}', ("train.jsonl:16: missing column 'answer'",)),
        ('{"question": "What?", "anwser": "This"}', ("missing column 'answer'", "did you mean 'anwser'")),
        ('{"question": "What?", "answer": 7}', ("16: field 'answer': expected a string, found a number (7)",)),
        ('{"question": "What?", "answer": null}', ("train.jsonl:16: field 'answer': expected a string", "null")),
        ('{"question": "What?", "answer": ""}', ("train.jsonl:16: field 'answer': expected some text to train on",)),
        ('{"question": "What?", "answer": " "}', ("train.jsonl:16: field 'answer': expected some text to train on",)),
    ],
)  # fmt: skip
def test_a_bad_row_is_named(
    run: Run, bad_file: Callable[[str], str], tmp_path: Path, line: str, texts: tuple[str, ...]
) -> None:
    assert_refused(run(data=bad_file(line)), *texts)
    assert not (tmp_path / "run").exists()


def test_bad_rows_can_be_skipped(run: Run, bad_file: Callable[[str], str], tmp_path: Path) -> None:
    path = bad_file('{"question": "What?", "answer": ""}')
    assert run(data={"name": "files", "path": path, "bad_rows": "skip"}, steps=1).status == 0


def test_unknown_columns_are_listed_with_a_mapping_to_try(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"ask": "What?", "reply": "This"}\n' * 20)
    texts = ("odd.jsonl:1: the format cannot be told from the columns 'ask', 'reply'", "columns: {prompt: ask,")
    assert_refused(run(data=str(path)), *texts)
    mapped = {"name": "files", "path": str(path), "columns": {"prompt": "ask", "completion": "reply"}}
    assert run(data=mapped, steps=1).status == 0


def test_a_missing_file_is_found_before_anything_is_loaded(run: Run, qa_file: Path, tmp_path: Path) -> None:
    near = str(qa_file).replace("animals", "animal")
    assert_refused(run(data=near), "mine.yaml:", "there is no such file or folder", "did you mean 'animals.jsonl'?")
    assert_refused(run("--set", f"data={near}"), "--set: data.path:")
    assert not (tmp_path / "run").exists()


def test_an_empty_file_is_nothing_to_train_on(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert_refused(run(data=str(tmp_path / "empty.jsonl")), "empty.jsonl: there are no rows")


def test_a_sample_whose_answer_is_cut_away_is_counted_and_said(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    row = {"question": QUESTION * 8, "answer": ANSWER}
    path.write_text("".join(json.dumps(row) + "\n" for row in [*GOOD, row]))
    done = run(data={"name": "files", "path": str(path), "max_tokens": 40}, steps=1)
    said = f"1 dropped because nothing in them is trained (such as {path}:31)"
    assert done.status == 0 and said in done.err.replace("\n", " "), done.err
    counts = json.loads((tmp_path / "run" / "manifest.json").read_text())["data"]["train"]["counts"]
    assert counts["nothing_trained"] == 1 and counts["kept"] == counts["samples"] - 1


def test_data_of_which_nothing_is_left_is_refused(run: Run, qa_file: Path) -> None:
    refused = run(data={"name": "files", "path": str(qa_file), "max_tokens": 8})
    assert_refused(refused, "animals.jsonl:", "not one sample of 180 can be trained on", "raise max_tokens")


def test_preference_data_is_not_for_sft(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "What?", "chosen": "This", "rejected": "That"}\n' * 20)
    texts = ("pairs.jsonl:", "this is preference data (pair)", "the objective consumes sequences")
    assert_refused(run(data=str(path)), *texts)


def test_conversations_need_a_template(run: Run, tiny_model: Path, tmp_path: Path) -> None:
    path, bare = tmp_path / "chat.jsonl", tmp_path / "bare"
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "This"}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 20)
    shutil.copytree(tiny_model, bare)
    (bare / "chat_template.jinja").unlink()
    assert_refused(run(data=str(path), model=str(bare)), "chat.jsonl:", "chat template", "chatml")
    assert not (tmp_path / "run").exists()
    given = {"name": "pretrained", "path": str(bare), "template": "chatml"}
    assert run(data=str(path), model=given, steps=1).status == 0
    assert (tmp_path / "run" / "model" / "chat_template.jinja").is_file()


def test_a_missing_model_folder_is_named(run: Run, tiny_model: Path) -> None:
    near = f"{tiny_model.parent}/tinny"
    assert_refused(run(model=near), f"there is no model folder '{near}'", "did you mean 'tiny'?")
    assert_refused(hone("sample", near, "-p", "a"), f"there is no model folder '{near}'")


def test_a_folder_without_a_model_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "hollow").mkdir()
    assert_refused(run(model=str(tmp_path / "hollow")), "holds no model", "config.json")
    assert not (tmp_path / "run").exists()


def test_unknown_parts_and_options_are_named_with_the_nearest(run: Run) -> None:
    refused = run(adapter={"name": "lora", "rnak": 4}, optimizer="adamv", schedule={"name": "cosine", "warmup": "long"})
    assert_refused(
        refused, "3 problems in the recipe", "adapter.rnak: unknown option (did you mean 'rank'?)",
        "there is no optimizer called 'adamv' (did you mean 'adamw'?)", "schedule.warmup: expected",
    )  # fmt: skip
    assert_refused(run("--set", "adapter.rnak=4"), "--set: adapter.rnak: unknown option")
    assert_refused(run("--set", "nonsense"), "--set: nonsense: expected key=value")
    assert_refused(run("--set", "callbacks.3=average", callbacks=["average"]), "--set: callbacks.3: 'callbacks' has 1")
    assert_refused(run(trackers=["tensorbord"]), "no tracker called 'tensorbord' (did you mean 'tensorboard'?)")
    assert_refused(run(adapter={"name": "peft:vra"}), "PEFT has no method 'vra' (did you mean 'vera'?)")
    assert_refused(run(optimizer={"name": "torch:adamv", "lr": 1.0}), "there is no optimizer 'adamv' in torch")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"model: [", "mine.yaml:1: not valid YAML"),
        (b"- a\n- b\n", "mine.yaml:1: expected a mapping of fields"),
        (b"1: 2\n", "mine.yaml:1: 1: unknown option"),
        (b"model: null\ndata: chains\nsteps: 1\n", "mine.yaml:1: model: expected the name of a model"),
        (b"metrics: accuracy\ndata: chains\nsteps: 1\n", "mine.yaml:1: metrics: expected a list, got 'accuracy'"),
        (b"name: \xff\xfe\n", "mine.yaml: expected UTF-8 text"),
        (b"name: !!python/object:os.system x\n", "mine.yaml:1: not valid YAML"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_recipe_is_said(tmp_path: Path, content: bytes, text: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    assert_refused(hone("run", tmp_path / "mine.yaml"), text)


def test_a_run_folder_is_never_overwritten(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    assert_refused(run(), "exists already, and nothing is ever overwritten", f"hone resume {tmp_path / 'run'}")
    assert files(tmp_path / "run") == {"mine.txt": b"precious"}


def test_what_is_no_run_folder_is_said(lora_run: Path, tmp_path: Path) -> None:
    for command in ("resume", "eval", "export"):
        assert_refused(hone(command, lora_run.parent / "loras"), "is not a run folder", "did you mean 'lora'?")


def test_a_diverging_run_stops_and_keeps_the_last_finite_state(run: Run, tmp_path: Path) -> None:
    stopped = run(optimizer={"name": "adamw", "lr": 1e30}, adapter="full", clip=None, schedule="constant")
    assert_refused(stopped, "hone: step 2: the ", " is nan", "animals.jsonl:", "Try a smaller optimizer.lr")
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 1
    assert not (tmp_path / "run" / "model").exists()
    state = checkpoint.read_state(tmp_path / "run" / "checkpoints" / "step-00000001")
    assert state["step"] == 1
    assert all(bool(torch.isfinite(value).all()) for value in state["players"]["model"]["weights"].values())
    assert_refused(hone("resume", tmp_path / "run"), "hone: step 2: the ", " is nan")
    assert [row["step"] for row in rows(tmp_path / "run" / "evaluations.jsonl")] == [0]


def poison(model: Path, copy: Path) -> Path:
    """Copy a model and make the embedding of the last byte of a y with diaeresis not a number."""
    shutil.copytree(model, copy)
    token = AutoTokenizer.from_pretrained(copy)("\u00ff", add_special_tokens=False).input_ids[-1]
    tensors = load_file(copy / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = float("nan")
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_a_poisoned_model_is_stopped_at_the_sample_that_shows_it(
    run: Run, tiny_model: Path, qa_file: Path, tmp_path: Path
) -> None:
    """The embedding of one byte is not a number, and one sample has that byte."""
    data, poisoned = tmp_path / "train.jsonl", poison(tiny_model, tmp_path / "poisoned")
    lines = qa_file.read_text().splitlines()
    lines[50] = json.dumps({"question": QUESTION + " \u00ff", "answer": ANSWER})
    data.write_text("\n".join(lines) + "\n")
    source = {"name": "files", "path": str(data), "holdout": 0}
    stopped = run(data=source, model=str(poisoned))
    step = len(rows(tmp_path / "run" / "metrics.jsonl")) + 1
    assert 1 < step <= 12 and (tmp_path / "run" / "checkpoints" / f"step-{step - 1:08d}").is_dir()
    assert_refused(stopped, f"hone: step {step}: the loss is nan", f"{data}:51", "the last good state is saved")
    assert_refused(hone("resume", tmp_path / "run"), f"hone: step {step}: the loss is nan", f"{data}:51")
    shutil.copy(tiny_model / "model.safetensors", poisoned)
    assert_refused(hone("resume", tmp_path / "run"), "the starting model has changed since this run began")


@pytest.mark.parametrize("bad", [1, 7])
def test_a_run_stopped_by_a_passing_fault_resumes_to_the_same_bytes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int
) -> None:
    assert run().status == 0
    whole = shutil.move(tmp_path / "run", tmp_path / "whole")
    honest, calls = SFT.loss, []

    def faulty(self: SFT, model: Any, batch: Any) -> Any:
        value, metrics = honest(self, model, batch)
        calls.append(model.training)
        return (value * float("nan") if model.training and sum(calls) == bad else value), metrics

    with monkeypatch.context() as patch:
        patch.setattr(SFT, "loss", faulty)
        assert_refused(run(), f"hone: step {bad}: the loss is nan", "animals.jsonl:")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{bad - 1:08d}"]
    assert hone("resume", tmp_path / "run").status == 0
    assert files(tmp_path / "run" / "model") == files(Path(whole) / "model")
    assert rows(tmp_path / "run" / "evaluations.jsonl") == rows(Path(whole) / "evaluations.jsonl")


def test_a_run_does_not_go_on_with_other_data(run: Run, qa_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    shutil.copy(qa_file, data)
    assert run(data=str(data), checkpoint_every=5).status == 0
    back_to(tmp_path / "run", 10)
    data.write_text(data.read_text() + json.dumps({"question": QUESTION, "answer": ANSWER}) + "\n")
    assert_refused(hone("resume", tmp_path / "run"), "the train data has changed since this run began")
    shutil.copy(qa_file, data)
    assert hone("resume", tmp_path / "run").status == 0


def test_a_run_without_a_checkpoint_does_not_start_again_with_other_data(
    run: Run, qa_file: Path, tmp_path: Path
) -> None:
    data, out = tmp_path / "train.jsonl", tmp_path / "run"
    shutil.copy(qa_file, data)
    assert run(data=str(data)).status == 0
    for path in (out / "model", out / "checkpoints"):
        shutil.rmtree(path)
    (out / "result.json").unlink()
    data.write_text(data.read_text() + json.dumps({"question": QUESTION, "answer": ANSWER}) + "\n")
    before = files(out)
    assert_refused(hone("resume", out), "the train data has changed since this run began")
    assert files(out) == before


@pytest.mark.parametrize(("every", "begins"), [(2, "from step 4, the last one saved"), (None, "from the start")])
def test_a_fault_of_a_later_player_leaves_no_checkpoint_of_half_a_step(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int | None, begins: str
) -> None:
    assert run(checkpoint_every=every).status == 0
    whole = shutil.move(tmp_path / "run", tmp_path / "whole")
    calls = []

    def faulty(self: SFT, model: Any, batch: Any) -> Iterator[Turn]:
        yield Turn("model", *self.loss(model, batch))
        calls.append(batch)
        if len(calls) == 6:
            yield Turn("model", self.loss(model, batch)[0] * float("nan"), {})

    with monkeypatch.context() as patch:
        patch.setattr(SFT, "turns", faulty)
        stopped = run(checkpoint_every=every)
    assert_refused(stopped, "hone: step 6: the loss is nan", "Some weights had taken this step", f"begins {begins}")
    assert "not touched" not in stopped.err and "last good state" not in stopped.err
    kept = sorted(path.name for path in (tmp_path / "run").glob("checkpoints/*"))
    assert kept == ([] if every is None else ["step-00000002", "step-00000004"])
    assert hone("resume", tmp_path / "run").status == 0
    assert files(tmp_path / "run" / "model") == files(Path(whole) / "model")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1.3 MB; only root can make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1300k", "tmpfs", folder]
    made = subprocess.run(mount, capture_output=True, check=False)
    if made.returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_really_is_full_keeps_the_last_good_checkpoint(run: Run, tmp_path: Path, small_disk: Path) -> None:
    assert run(adapter="full", checkpoint_every=2).status == 0
    changes = {"adapter": "full", "checkpoint_every": 2, "keep": 9, "out": str(small_disk / "run")}
    stopped = run(**changes)
    assert_refused(stopped, "could not be written: the disk is full", "What was saved before is untouched")
    kept = sorted((small_disk / "run" / "checkpoints").iterdir())
    assert kept and all(not path.name.startswith(".") and not checkpoint.damage(path) for path in kept)
    subprocess.run(["mount", "-o", "remount,size=30m", small_disk], check=True)
    assert hone("resume", small_disk / "run").status == 0
    assert files(small_disk / "run" / "model") == files(tmp_path / "run" / "model")


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_last_good_checkpoint(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run().status == 0
    whole = shutil.move(tmp_path / "run", tmp_path / "whole")
    write, saves = checkpoint.write_state, []

    def third_fails(folder: Path, state: dict[str, Any]) -> None:
        saves.append(folder)
        write(folder, state)
        if len(saves) == 3:
            full_disk()

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_state", third_fails)
        stopped = run(checkpoint_every=2)
    assert_refused(stopped, "step-00000006: could not be written: the disk is full", "then go on with: hone resume")
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000004"]
    assert hone("resume", tmp_path / "run").status == 0
    assert files(tmp_path / "run" / "model") == files(Path(whole) / "model")


def test_a_disk_that_is_full_when_the_model_is_saved_loses_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(host, "save_file", full_disk)
        assert_refused(run(), "model: could not be written: the disk is full")
    assert not (tmp_path / "run" / "model").exists() and not list((tmp_path / "run").glob(".*"))
    assert hone("resume", tmp_path / "run").status == 0
    assert [row["step"] for row in rows(tmp_path / "run" / "evaluations.jsonl")] == [0, 12]


def test_a_disk_that_is_full_for_a_log_stops_the_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append = RunFolder.append

    def fifth_fails(self: RunFolder, name: str, row: dict[str, Any]) -> None:
        if name == "metrics.jsonl" and row["step"] == 5:
            with (self.path / name).open("a") as file:
                file.write('{"step": 5, "lo')  # what fitted
            raise checkpoint.disk_error(OSError(errno.ENOSPC, "No space left on device"), self.path / name)
        append(self, name, row)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append", fifth_fails)
        assert_refused(run(checkpoint_every=2), "metrics.jsonl: could not be written: the disk is full")
    assert hone("resume", tmp_path / "run").status == 0
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == list(range(1, 13))
