"""Comparisons run for real on the tiny model: going on, failing, tuning, budgets, and what variants share."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from end_to_end.comparisons import found, prepare, row, say, small, times
from end_to_end.support import rows
from hone.engine.progress import Display
from hone.evidence.cells import Job, Store
from hone.evidence.command import Request
from hone.evidence.compare import compare
from hone.evidence.contest import TUNING_SEED
from hone.evidence.pool import Interrupted, LocalPool
from hone.recipe import Recipe
from hone.text.model import LanguageModel

GRID = ("--vary", "adapter=lora,full", "--vary", "adapter.rank=2,4", "--seeds", "2", "--metric", "loss")
PAIR = ("--vary", "adapter=lora,full", "--seeds", "1", "--metric", "loss")


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all comparisons here, which share their cells."""
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def mine(top: Path, tiny_model: Path, qa_file: Path) -> Path:
    """A recipe of three steps, which measures what is forgotten of some other text."""
    other = top / "other.txt"
    other.write_text("".join(f"There are {number} whales in the sea.\n" for number in range(8)))
    return prepare(top, "mine", small(tiny_model, qa_file, general_data=str(other)))


@pytest.fixture(scope="module")
def grid(top: Path, mine: Path) -> dict[str, Any]:
    """The result of a comparison of three variants."""
    said = say(mine, top / "grid", *GRID)
    assert said.status == 0, said.err
    assert "loss (lower is better), steps=3 each, seeds [0, 1]" in said.out
    assert "note: adapter=full: has no adapter.rank" in said.out and "the baseline" in said.out
    assert f"report: {top / 'grid' / 'report.html'}" in said.out and "hone report " in said.out
    assert (top / "grid" / "report.html").stat().st_size > 10_000
    return json.loads((top / "grid" / "result.json").read_text())


@pytest.fixture
def no_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be computed."""

    def refuse(self: LocalPool, jobs: Sequence[Job], *others: Any) -> None:
        raise AssertionError([job.label for job in jobs])

    monkeypatch.setattr(LocalPool, "run", refuse)


# --- one comparison, and what is asked of it again


def test_every_variant_runs_on_every_seed(top: Path, grid: dict[str, Any]) -> None:
    assert sorted(row["label"] for row in grid["variants"]) == [
        "adapter=full", "adapter=lora adapter.rank=2", "adapter=lora adapter.rank=4",
    ]  # fmt: skip
    for entry in grid["variants"]:
        assert entry["status"] == "finished" and entry["steps"] == 3 and set(entry["cells"]) == {"0", "1"}
        values = entry["values"]
        assert values["steps"] == [3, 3] and all(flops > 1e6 for flops in values["flops"])
        for seed, cell in entry["cells"].items():
            result = json.loads((Path(cell) / "result.json").read_text())
            assert values["loss"][int(seed)] == result["after"]["loss"]
            forgotten = result["after"]["general_loss"] - result["before"]["general_loss"]
            assert values["forgetting"][int(seed)] == pytest.approx(forgotten)
            assert (Path(cell) / "model").is_dir() and not list(Path(cell).rglob("checkpoints"))
    assert grid["baseline"] == "adapter=lora adapter.rank=2" and row(grid, grid["baseline"])["difference"] is None
    assert row(grid, "adapter=full")["difference"]["verdict"] in ("better", "worse", "no difference shown")
    assert row(grid, "adapter=full")["values"]["trained"] > row(grid, grid["baseline"])["values"]["trained"]


def test_variants_meet_the_same_data_and_questions_in_each_seed(grid: dict[str, Any]) -> None:
    for seed in ("0", "1"):
        cells = [Path(entry["cells"][seed]) for entry in grid["variants"]]
        tokens = [[step["tokens"] for step in rows(cell / "metrics.jsonl")] for cell in cells]
        asked = [[answer["where"] for answer in rows(cell / "samples.jsonl")] for cell in cells]
        assert tokens[0] == tokens[1] == tokens[2] and asked[0] == asked[1] == asked[2]
    orders = [
        [step["tokens"] for step in rows(Path(cell) / "metrics.jsonl")]
        for cell in grid["variants"][0]["cells"].values()
    ]
    assert orders[0] != orders[1]


@pytest.mark.usefixtures("no_cells")
def test_again_it_computes_nothing_and_says_the_same(top: Path, mine: Path, grid: dict[str, Any]) -> None:
    before = times(top / "cells")
    again = found(mine, top / "grid", *GRID)
    assert again["variants"] == grid["variants"] and times(top / "cells") == before
    assert again["seconds"] >= grid["seconds"]


@pytest.mark.usefixtures("no_cells")
def test_another_baseline_or_metric_is_another_view_of_the_same_runs(
    top: Path, mine: Path, grid: dict[str, Any]
) -> None:
    other = found(mine, top / "grid", *GRID, "--baseline", "adapter=full")
    one, two = row(grid, "adapter=full"), row(other, "adapter=lora adapter.rank=2")
    assert (
        two["difference"]["mean"] == pytest.approx(-one["difference"]["mean"]) and other["baseline"] == "adapter=full"
    )
    forgets = found(mine, top / "grid", *GRID[:-1], "forgetting")
    means = [entry["summary"]["forgetting"]["mean"] for entry in forgets["variants"]]
    assert forgets["better"] == "lower" and means == sorted(means)
    assert found(mine, top / "grid", *GRID[:-2])["metric"] == "loss"  # the tiny model answers nothing right
    wrong = say(mine, top / "grid", *GRID, "--baseline", "adapter=lora adapter.rank=22")
    assert wrong.status == 2 and "did you mean 'adapter=lora adapter.rank=2'?" in wrong.err


def test_another_comparison_takes_over_the_cells_that_it_shares(top: Path, mine: Path, grid: dict[str, Any]) -> None:
    before = times(top / "cells")
    fast = ("--set", "adapter=full", "--vary", "optimizer.lr=2e-2,1e-2", "--seeds", "2", "--metric", "loss")
    other = found(mine, top / "rates", *fast)
    assert row(other, "optimizer.lr=0.02")["cells"] == row(grid, "adapter=full")["cells"]
    after = times(top / "cells")
    assert {name: after[name] for name in before} == before
    assert len({name.split("/")[0] for name in after.keys() - before.keys()}) == 3  # one measured, two run


# --- failing


class KillingPool(LocalPool):
    """A pool whose cells of one name are killed, once each, as the system does when memory runs out."""

    def __init__(self, name: str) -> None:
        super().__init__(2)
        self.name = name

    def _start(self, job: Job, width: int, slot: int) -> BaseProcess:
        process = super()._start(job, width, slot)
        if job.label.startswith(f"{self.name} seed"):
            os.kill(process.pid or 0, signal.SIGKILL)
        return process


class Heard(Display):
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(False)
        self.told: list[str] = []

    def update(self, done: int, note: str = "") -> None:
        self.told.append(f"{self._label} {done}/{self._total}  {note}")


def poison(model: Path, folder: Path) -> Path:
    """Save a model that gives NaN for one character."""
    loaded = LanguageModel.load(model)
    (character,) = loaded.tokenizer("~", add_special_tokens=False).input_ids
    with torch.no_grad():
        loaded.hf.get_input_embeddings().weight[character] = float("nan")
    loaded.save(folder)
    return folder


def broken(folder: Path, model: Path, data: Path) -> dict[str, Path]:
    """Write recipes that fail in different ways and at different times."""
    lines = data.read_text().splitlines(keepends=True)
    (folder / "late.jsonl").write_text("".join([*lines[:-3], json.dumps({"question": "~", "answer": "~"}), "\n"]))
    (folder / "torn.jsonl").write_text("".join([*lines, '{"question": "Why?", "ans\n']))
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 10**13, "num_hidden_layers": 1,
              "num_attention_heads": 4}  # fmt: skip
    late = {"data": {"name": "files", "path": str(folder / "late.jsonl"), "holdout": 20}, "steps": None, "epochs": 1}
    contents: dict[str, dict[str, Any]] = {
        "good": {},
        "steep": {"optimizer": {"name": "sgd", "lr": 1e30}, "clip": None},
        "late": {**late, "model": str(poison(model, folder / "poisoned"))},
        "large": {"model": {"name": "fresh", "config": config, "tokenizer": str(model)}, "adapter": "full"},
        "torn": {"data": {"name": "files", "path": str(folder / "torn.jsonl")}},
        "killed": {"optimizer": {"name": "adamw", "lr": 1e-3}},
    }
    made = {name: small(model, data, general_data=None, **changes) for name, changes in contents.items()}
    return {name: prepare(folder, name, content) for name, content in made.items()}


def test_variants_that_fail_are_rows_with_a_reason_and_the_others_finish(
    tmp_path: Path, tiny_model: Path, qa_file: Path
) -> None:
    good, *others = broken(tmp_path, tiny_model, qa_file).values()
    asked = Request(recipes=[str(good), *map(str, others)], seeds=1, metric="loss", general="none")
    heard = Heard()
    result = compare(asked.comparison(), tmp_path / "out", KillingPool("killed"), heard)
    assert heard.told[0] == "measuring 0/1  now: good measured"
    assert any(text.startswith("running ") and "/3  now: " in text and "killed seed 0" in text for text in heard.told)
    reasons = {entry["label"]: entry["reason"] for entry in result["variants"]}
    assert [entry["status"] for entry in result["variants"]] == ["finished", *["failed"] * 5]
    assert result["variants"][0]["label"] == "good" and result["variants"][0]["values"]["loss"][0] > 0
    assert reasons["steep"].startswith("step ") and "nan" in reasons["steep"]
    assert reasons["late"].startswith("step ") and "the loss is nan" in reasons["late"]
    assert [entry["label"] for entry in result["variants"] if entry["failures"]] == ["late", "killed"]  # while running
    assert reasons["large"].startswith("out of memory: ")
    assert "torn.jsonl:201" in reasons["torn"]
    assert reasons["killed"] == "its process was ended by SIGKILL: probably out of memory"

    withs = [argument for path in others for argument in ("--with", path)]
    asked_again = (*withs, "--seeds", "1", "--metric", "loss", "--general", "none")
    before = times(tmp_path / "cells")
    again = found(good, tmp_path / "out", *asked_again)
    assert row(again, "killed")["status"] == "failed" and times(tmp_path / "cells") == before
    again = found(good, tmp_path / "out", *asked_again, "--retry")
    assert [entry["status"] for entry in again["variants"]] == ["finished", "finished", *["failed"] * 4]
    assert row(again, "killed")["values"]["loss"][0] > 0
    kept = [name for name in before if name.startswith("good-")]
    assert kept and all(times(tmp_path / "cells")[name] == before[name] for name in kept)


# --- tuning


def test_each_variant_is_tuned_by_the_same_trials_on_a_seed_of_its_own(top: Path, mine: Path, grid: Any) -> None:
    result = found(mine, top / "tuned", *PAIR, "--tune", "optimizer.lr=1e-3,2e-2,1e30")
    for entry in result["variants"]:
        values = [trial["value"] for trial in entry["trials"]]
        assert [trial["settings"] for trial in entry["trials"]] == [{"optimizer.lr": lr} for lr in (1e-3, 2e-2, 1e30)]
        assert values[2] is None and "nan" in entry["trials"][2]["reason"] and entry["trials"][2]["reason"]
        assert values[1] < values[0] and entry["tuned"] == {"optimizer.lr": 0.02} and entry["status"] == "finished"
    assert row(result, "adapter=full")["cells"]["0"] == row(grid, "adapter=full")["cells"]["0"]
    tried = [path for path in (top / "cells").glob("*/cell.json") if f'"seed": {TUNING_SEED}' in path.read_text()]
    assert len(tried) == 6 and not [path for cell in tried for path in cell.parent.rglob("model.safetensors")]


def test_a_variant_is_out_when_every_trial_diverges(top: Path, mine: Path) -> None:
    out = ("--set", "adapter=full", "--seeds", "1", "--metric", "loss", "--tune", "optimizer.lr=1e29,1e30")
    said = say(mine, top / "hopeless", *out, "--json")
    (entry,) = json.loads(said.out)["variants"]
    assert said.status == 1  # nothing came of it
    assert entry["status"] == "failed" and entry["reason"].startswith("every trial failed; the first: step ")
    assert [trial["value"] for trial in entry["trials"]] == [None, None] and entry["cells"] == {}


# --- budgets


@pytest.mark.parametrize("budget", ["steps=2", "tokens=900"])
def test_runs_spend_their_budget(top: Path, mine: Path, budget: str) -> None:
    kind, _, amount = budget.partition("=")
    only = ("--set", "adapter=full", "--seeds", "1", "--metric", "loss", "--budget", budget)
    (entry,) = found(mine, top / kind, *only)["variants"]
    spent, step = entry["values"][kind][0], entry["values"]["tokens"][0] / entry["steps"]
    assert abs(spent - float(amount)) <= (step if kind == "tokens" else 0)
    assert len(rows(Path(entry["cells"]["0"]) / "metrics.jsonl")) == entry["steps"] == entry["values"]["steps"][0]


def test_a_budget_of_seconds_buys_the_steps_that_were_measured(top: Path, mine: Path) -> None:
    only = ("--set", "adapter=full", "--seeds", "1", "--metric", "loss", "--budget", "seconds=0.3")
    before = set((top / "cells").glob("*/measure.json"))
    (entry,) = found(mine, top / "seconds", *only)["variants"]
    (record,) = set((top / "cells").glob("*/measure.json")) - before  # timings are taken with nothing beside them
    took = json.loads(record.read_text())
    assert entry["steps"] == max(1, round((0.3 - took["setup_seconds"]) / took["step_seconds"]))


def test_models_of_different_width_spend_the_same_operations(top: Path, tiny_model: Path, qa_file: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    start = {"name": "fresh", "config": config, "tokenizer": str(tiny_model)}
    recipe = prepare(top, "fresh", small(tiny_model, qa_file, model=start, adapter="full", eval_samples=0))
    vary = ("--vary", "model.config.hidden_size=32,64", "--seeds", "1", "--budget", "flops=1.5e9", "--general", "none")
    narrow, wide = (row(found(recipe, top / "flops", *vary), f"model.config.hidden_size={size}") for size in (32, 64))
    assert narrow["steps"] > 1.8 * wide["steps"]
    for entry in (narrow, wide):
        assert abs(entry["values"]["flops"][0] - 1.5e9) <= 0.5 * entry["values"]["flops"][0] / entry["steps"] + 1
    assert narrow["values"]["flops"][0] == pytest.approx(wide["values"]["flops"][0], rel=0.05)


def test_stages_keep_their_own_lengths(top: Path, tiny_model: Path, qa_file: Path) -> None:
    staged = small(tiny_model, qa_file, adapter="full", steps=None, stages=[{"steps": 2}, {"steps": 3}])
    result = found(prepare(top, "staged", staged), top / "staged", "--seeds", "1", "--general", "none")
    (entry,) = result["variants"]
    assert entry["steps"] == 5 and result["budget"] == {"kind": "steps", "amount": 5}
    assert entry["values"]["steps"] == [5] and "flops" not in entry["values"]


# --- stopping and going on


def start(recipe: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start `hone compare` in a session of its own, as a terminal would."""
    command = [sys.executable, "-m", "hone.cli", "compare", recipe, "--out", out, "--jobs", "1", *arguments]
    return subprocess.Popen(
        list(map(str, command)), start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(what: Callable[[], object], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def test_what_was_killed_or_stopped_goes_on_where_it_was(tmp_path: Path, tiny_model: Path, qa_file: Path) -> None:
    recipe = prepare(tmp_path, "long", small(tiny_model, qa_file, general_data=None, eval_samples=0, steps=60))
    asked = ("--seeds", "1", "--general", "none")

    def trains(since: float) -> bool:
        paths = list(tmp_path.glob("cells/*-seed*/run/metrics.jsonl"))
        return any(path.stat().st_mtime > since and len(path.read_text().splitlines()) > 5 for path in paths)

    began = time.time()
    process = start(recipe, tmp_path / "out", *asked)
    wait_for(lambda: trains(began), process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert len(children) >= 2 and psutil.wait_procs(children, timeout=20)[1] == []  # nothing goes on alone
    finished = [path for pattern in ("measure.json", "run/result.json") for path in tmp_path.glob(f"cells/*/{pattern}")]
    assert len(finished) == 1 and not list(tmp_path.glob("cells/*/failure.json"))
    before = times(tmp_path / "cells")

    began = time.time()
    process = start(recipe, tmp_path / "out", *asked)
    wait_for(lambda: trains(began), process)
    os.killpg(process.pid, signal.SIGINT)
    said, warned = process.communicate(timeout=90)
    assert process.returncode == 130, warned
    assert "stopped; finished runs are kept. Go on with:  hone compare " in said and "--seeds 1" in said
    assert "long: running" in said and "Traceback" not in warned
    assert len(list(tmp_path.glob("cells/*-seed*/run/checkpoints/step-*"))) == 1
    assert not list(tmp_path.glob("cells/*/failure.json"))

    result = found(recipe, tmp_path / "out", *asked)
    assert {entry["status"] for entry in result["variants"]} == {"finished"}
    (log,) = tmp_path.glob("cells/*-seed*/log.txt")
    assert "going on from step" in log.read_text()
    assert [step["step"] for step in rows(log.parent / "run" / "metrics.jsonl")] == list(range(1, 61))
    after = times(tmp_path / "cells")
    kept = [name for name in before if "-seed" not in name]
    assert kept and {name: after[name] for name in kept} == {name: before[name] for name in kept}


def test_two_comparisons_that_want_a_cell_at_the_same_time_compute_it_once(
    tmp_path: Path, tiny_model: Path, qa_file: Path
) -> None:
    recipe = Recipe.of(**small(tiny_model, qa_file, general_data=None, eval_samples=0))
    job = Store(tmp_path).job("run", recipe, "shared")
    job.prepare()
    others = [threading.Thread(target=LocalPool(1).run, args=([job], 1, lambda *now: None)) for _ in range(2)]
    for thread in others:
        thread.start()
    for thread in others:
        thread.join()
    assert job.result() is not None and job.failure() == ""
    assert (job.folder / "log.txt").read_text().count("held-out loss") == 2  # before and after training
    assert len(rows(job.run / "metrics.jsonl")) == 3
    assert sys.modules["__main__"].__dict__.get("__name__") == "__main__" and multiprocessing.active_children() == []


def test_a_pool_that_is_stopped_lets_its_cells_save_their_state(
    tmp_path: Path, tiny_model: Path, qa_file: Path
) -> None:
    recipe = Recipe.of(**small(tiny_model, qa_file, general_data=None, eval_samples=0, steps=100_000))
    job = Store(tmp_path).job("run", recipe, "endless")
    job.prepare()

    def stop(running: Sequence[Job], finished: int) -> None:
        if (job.run / "metrics.jsonl").exists():
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        LocalPool(1).run([job], 1, stop)
    assert not job.done and len(list(job.run.glob("checkpoints/step-*"))) == 1
    assert json.loads((job.run / "result.json").read_text())["status"] == "interrupted"
