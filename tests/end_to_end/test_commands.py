"""The commands, as a user or a program calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from end_to_end.support import Outcome, fields, files, hone, rows, write_recipe
from hone import Recipe, catalogue
from hone.recipe import shipped

COMMANDS = (
    "run", "resume", "check", "compare", "verify", "report", "list", "show", "find", "sample", "eval", "export",
)  # fmt: skip


def parsed(outcome: Outcome) -> Any:
    """Return what a command printed for programs, which must be one JSON value and nothing else."""
    assert outcome.status == 0, outcome.err
    return json.loads(outcome.out)


@pytest.fixture
def recipe_file(tiny_model: Path, qa_file: Path, tmp_path: Path) -> Path:
    """A short recipe that puts its run beside itself."""
    return write_recipe(tmp_path / "mine.yaml", fields(tiny_model, qa_file, tmp_path / "run"))


def test_run_prints_a_result_for_programs_and_a_summary_for_people(recipe_file: Path, tmp_path: Path) -> None:
    quick = ["--set", "steps=2", "--set", "optimizer.lr=1e-3"]
    result = parsed(hone("run", recipe_file, *quick, "--json"))
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["status"] == "finished" and result["steps"] == 2
    assert result["model"] == str(tmp_path / "run" / "model")
    resolved = Recipe.load(tmp_path / "run" / "recipe.yaml")
    assert resolved.steps == 2 and resolved.build("optimizer").lr == 1e-3 and resolved.name == "mine"
    said = hone("run", recipe_file, *quick, "--set", f"out={tmp_path / 'other'}")
    assert said.status == 0 and "held-out loss:" in said.out and f"hone eval {tmp_path / 'other'}" in said.out
    assert "parameters" in said.err and "200 samples" not in said.out


def test_a_run_without_a_folder_gets_the_next_free_one(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in (1, 2):
        result = parsed(hone("run", recipe_file, "--set", "out=null", "--set", "steps=1", "--json"))
        assert result["run"] == f"runs/mine-{number}" and (tmp_path / "runs" / f"mine-{number}" / "model").is_dir()


def test_resume_prints_a_result_for_programs(lora_run: Path) -> None:
    before = files(lora_run)
    assert parsed(hone("resume", lora_run, "--json"))["status"] == "finished"
    assert files(lora_run) == before


def test_check_measures_and_keeps_nothing(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = parsed(hone("check", recipe_file, "--json"))
    assert found["steps"] == 12 and 200 < found["longest_tokens"] <= 256 and found["checkpoint_bytes"] > 10_000
    assert found["trained"] < found["parameters"] and found["peak_memory"] > 0 and found["eta_seconds"] > 0
    assert len(found["samples"]) == 3
    for pieces in found["samples"]:
        assert [trained for _, trained in pieces] == [False, True]
        assert pieces[0][0].endswith("Answer:") and pieces[1][0].startswith(" I am a")
    said = hone("check", recipe_file)
    assert "peak memory:" in said.out and "sample 3" in said.err and "⟦ I am a" in said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml"]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [(["steps=null", "epochs=1", "batch_tokens=99999"], 1), (["data.streaming=true"], 12)],
)  # fmt: skip
def test_check_rehearses_runs_of_one_step_and_streams(recipe_file: Path, settings: list[str], steps: int) -> None:
    found = parsed(hone("check", recipe_file, *(f"--set={setting}" for setting in settings), "--json"))
    assert found["steps"] == steps


def test_sample_answers_prompts(lora_run: Path, tiny_model: Path) -> None:
    prompts = ["Question: What does animal 7 of the owls say?\nAnswer:", "cat"]
    asked = ["sample", lora_run, "--prompt", prompts[0], "-p", prompts[1], "--samples=2", "--temperature=1.0",
             "--max-new-tokens=5", "--json"]  # fmt: skip
    found = parsed(hone(*asked))
    assert [row["prompt"] for row in found] == prompts
    assert all(len(row["answers"]) == 2 and all(isinstance(text, str) for text in row["answers"]) for row in found)
    assert parsed(hone(*asked)) == found != parsed(hone(*asked, "--seed=1"))
    held_out = parsed(hone("sample", lora_run, "--max-new-tokens", "5", "--json"))
    assert len(held_out) == 3 and all(row["prompt"].startswith("Question:") for row in held_out)
    assert parsed(hone("sample", tiny_model, "-p", "a", "--max-new-tokens", "3", "--json"))[0]["prompt"] == "a"
    nothing = hone("sample", tiny_model)
    assert nothing.status == 2 and "give a prompt" in nothing.err


def test_eval_repeats_the_last_evaluation(lora_run: Path, tmp_path: Path) -> None:
    row = parsed(hone("eval", lora_run, "--json"))
    last = rows(lora_run / "evaluations.jsonl")[-1]
    assert row["loss"] == pytest.approx(last["loss"], abs=1e-6) and row["accuracy"] == last["accuracy"]
    assert "loss: " in hone("eval", lora_run).out
    other = tmp_path / "fresh.jsonl"
    other.write_text('{"question": "What does animal 999 of the cats say?", "answer": "zebras quack, 7 z"}\n')
    elsewhere = parsed(hone("eval", lora_run, "--set", f"eval_data={other}", "--json"))
    assert elsewhere["loss"] > row["loss"] + 0.1


def test_list_and_show_print_the_catalogue() -> None:
    everything = parsed(hone("list", "--json"))
    assert {"sft", "lora", "adamw", "chains", "quickstart"} <= {entry["name"] for entry in everything}
    for entry in everything:
        assert entry.keys() >= {"kind", "name", "papers", "claim", "verdict", "options"}
        assert all(option.keys() == {"name", "type", "default", "doc"} for option in entry["options"])
    assert {entry["kind"] for entry in parsed(hone("list", "adapter", "--json"))} == {"adapter"}
    assert "adapter    lora" in hone("list").out
    (lora,) = parsed(hone("show", "lora", "--json"))
    assert "rank" in {option["name"] for option in lora["options"]} and lora["papers"]
    assert "adapter: lora" in hone("show", "lora").out and "peft:" in hone("show", "peft:vera").out


def test_a_name_of_two_kinds_shows_the_recipe_and_mentions_the_part() -> None:
    both = hone("show", "sft")
    assert both.out.startswith("#") and "note: there is also: hone show sft --kind objective" in both.err
    assert hone("show", "sft", "--kind", "objective").out.startswith("objective sft")
    assert "there is no adapter called 'sft'" in hone("show", "sft", "--kind", "adapter").err


@pytest.mark.parametrize("name", shipped())
def test_a_shown_recipe_is_a_recipe(name: str, tmp_path: Path) -> None:
    (entry,) = catalogue.named(name, "recipe")
    (tmp_path / "mine.yaml").write_text(entry.text())  # what `hone show` prints
    mine = Recipe.load(tmp_path / "mine.yaml")
    assert mine.name == "mine" and mine.plain() == {**Recipe.load(name).plain(), "name": "mine"}


def test_help_names_every_command() -> None:
    shown = hone("--help")
    assert shown.status == 0 and all(f" {name} " in shown.out for name in COMMANDS)
    for name in COMMANDS:
        assert hone(name, "--help").status == 0


LOOKED_UP = [["--help"], ["list"], ["list", "--json"], ["show", "lora"], ["show", "sft"], ["find", "forget less"]]


def test_looking_things_up_imports_no_torch() -> None:
    """All in one process, `find` last: its library computes with numpy."""
    script = (
        "import contextlib, io, json, sys\nfrom hone import cli\n"
        "for words in json.loads(sys.argv[1]):\n"
        "    sys.argv, out = ['hone', *words], io.StringIO()\n"
        "    try:\n        with contextlib.redirect_stdout(out):\n            cli.main()\n"
        "    except SystemExit as stop:\n        assert not stop.code, (words, stop.code)\n"
        "    heavy = {'torch', 'transformers', 'datasets', 'numpy'} - ({'numpy'} if words[0] == 'find' else set())\n"
        "    assert out.getvalue() and not heavy & set(sys.modules), (words, heavy & set(sys.modules))\n"
    )
    command = [sys.executable, "-c", script, json.dumps(LOOKED_UP)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_wrong_arguments_are_refused() -> None:
    for arguments in (["run"], ["sample"], ["export", "x", "--too", "hf"], ["nothing"], ["list", "--set", "a=1"]):
        refused = hone(*arguments)
        assert refused.status == 2 and "Traceback" not in refused.err, arguments
    assert "did you mean 'adapter'?" in hone("list", "adaptor").err
    assert "did you mean 'lora'?" in hone("show", "lorra").err


def test_the_module_and_the_script_are_the_same_door() -> None:
    script = Path(sys.executable).with_name("hone")
    shown = [
        subprocess.run([*command, "list", "nothing"], capture_output=True, text=True, check=False)
        for command in ([sys.executable, "-m", "hone.cli"], [str(script)])
    ]
    assert [done.returncode for done in shown] == [2, 2]
    assert shown[0].stderr == shown[1].stderr and "'nothing'" in shown[0].stderr


def test_the_device_is_the_cpu_where_there_is_no_other(recipe_file: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    refused = hone("run", recipe_file, "--set", "device=cuda")
    assert refused.status == 2 and "this machine has no cuda device" in refused.err
