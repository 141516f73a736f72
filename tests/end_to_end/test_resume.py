"""A run that was killed, stopped or damaged ends with the same bytes as one that never was."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from end_to_end.support import fields, files, hone, repeatable, rows, train, write_recipe
from hone.engine.folder import RunFolder
from hone.errors import HoneError

STEPS = 60
LOGS = ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl")
# The data loader counts two processes too many on a machine with one core, and says so.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def changes(data: Path, workers: int = 0) -> dict[str, Any]:
    """Return what makes a run hard to resume: dropout, a schedule, evaluations and a callback that has a state."""
    return {
        "data": {"name": "files", "path": str(data), "holdout": 20, "workers": workers}, "steps": STEPS,
        "callbacks": ["average"], "eval_every": 25, "checkpoint_every": 6, "keep": 3,
    }  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tiny_model: Path, qa_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others must equal."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_model, qa_file, out, **changes(qa_file))
    return out


def wait_for_rows(process: subprocess.Popen[str], log: Path, count: int) -> None:
    """Wait until a run has written some rows of metrics; fail when it ends before."""
    while not log.exists() or log.read_bytes().count(b"\n") < count:
        if process.poll() is not None:
            pytest.fail(f"the run ended before it could be stopped: {process.communicate()}")
        time.sleep(0.005)


def start(recipe: Path) -> subprocess.Popen[str]:
    """Start `hone run` in a process of its own."""
    command = [sys.executable, "-m", "hone.cli", "run", str(recipe)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def assert_same(run: Path, whole: Path) -> None:
    """Compare everything that does not tell time."""
    assert files(run / "model") == files(whole / "model")
    for log in LOGS:
        assert [repeatable(row) for row in rows(run / log)] == [repeatable(row) for row in rows(whole / log)]
    found, wanted = (json.loads((path / "result.json").read_text()) for path in (run, whole))
    for name in ("status", "reason", "steps", "tokens", "before", "after", "best_step"):
        assert found[name] == wanted[name]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_resumes_to_the_same_bytes(
    tiny_model: Path, qa_file: Path, tmp_path: Path, uninterrupted: Path, workers: int
) -> None:
    out = tmp_path / "run"
    recipe = write_recipe(tmp_path / "mine.yaml", fields(tiny_model, qa_file, out, **changes(qa_file, workers)))
    process = start(recipe)
    wait_for_rows(process, out / "metrics.jsonl", 10)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (out / "result.json").exists()
    assert 10 <= len(rows(out / "metrics.jsonl")) < STEPS
    resumed = hone("resume", out)
    assert resumed.status == 0 and "going on from step" in resumed.err, resumed.err
    assert_same(out, uninterrupted)


@pytest.fixture(scope="module")
def terminated(tiny_model: Path, qa_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that a SIGTERM stopped, to copy."""
    folder = tmp_path_factory.mktemp("terminated")
    out = folder / "run"
    recipe = write_recipe(folder / "mine.yaml", fields(tiny_model, qa_file, out, **changes(qa_file)))
    process = start(recipe)
    wait_for_rows(process, out / "metrics.jsonl", 10)
    process.terminate()
    printed, said = process.communicate()
    assert process.returncode == 130, said
    assert f"everything is saved. Go on with:  hone resume {out}" in printed
    yield out


def copy(run: Path, out: Path) -> Path:
    """Copy a run folder."""
    for name, content in files(run).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    return out


def test_a_terminated_run_stops_in_order_and_resumes(terminated: Path, tmp_path: Path, uninterrupted: Path) -> None:
    out = copy(terminated, tmp_path / "run")
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "interrupted" and result["reason"] == "interrupted by SIGTERM"
    last = rows(out / "metrics.jsonl")[-1]["step"]
    assert result["steps"] == last and (out / "checkpoints" / f"step-{last:08d}").is_dir()
    assert not (out / "model").exists() and (out / "report.html").exists()
    early = hone("sample", out)
    assert early.status == 2 and f"go on with: hone resume {out}" in early.err
    assert hone("resume", out).status == 0
    assert_same(out, uninterrupted)
    again = hone("resume", out)
    assert again.status == 0 and "is finished already" in again.err


@pytest.mark.parametrize("name", ["state.safetensors", "state.json", "checksums.json"])
def test_a_damaged_checkpoint_is_passed_over(terminated: Path, tmp_path: Path, uninterrupted: Path, name: str) -> None:
    out = copy(terminated, tmp_path / "run")
    newest = max((out / "checkpoints").iterdir())
    content = bytearray((newest / name).read_bytes())
    content[len(content) // 2] ^= 0x80
    (newest / name).write_bytes(content)
    resumed = hone("resume", out)
    assert resumed.status == 0 and f"note: {newest.name} is damaged" in resumed.err, resumed.err
    assert_same(out, uninterrupted)


def test_without_a_whole_checkpoint_nothing_is_resumed(terminated: Path, tmp_path: Path) -> None:
    out = copy(terminated, tmp_path / "run")
    for checkpoint in (out / "checkpoints").iterdir():
        (checkpoint / "state.json").write_text("{}")
    before = files(out)
    resumed = hone("resume", out)
    assert resumed.status == 2 and "no checkpoint can be resumed from" in resumed.err
    assert files(out) == before


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    tiny_model: Path, qa_file: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    out = tmp_path / "run"
    write_recipe(tmp_path / "mine.yaml", fields(tiny_model, qa_file, out, **changes(qa_file)))
    assert hone("run", tmp_path / "mine.yaml").status == 0
    for number in (1, 2):  # killed again, it keeps the logs of both
        old = files(out)
        for path in ("model", "checkpoints", "result.json"):
            os.rename(out / path, tmp_path / f"{path}-{number}")
        resumed = hone("resume", out)
        aside = {log: log.replace(".", f"-{number}.") for log in LOGS}
        assert resumed.status == 0 and "has no checkpoint yet, so it starts again from step 0" in resumed.err
        assert f"its logs so far are kept as {', '.join(aside.values())}" in resumed.err
        assert all((out / new).read_bytes() == old[log] for log, new in aside.items())
        assert_same(out, uninterrupted)


def test_a_run_is_not_resumed_beside_itself(terminated: Path, tmp_path: Path) -> None:
    out = copy(terminated, tmp_path / "run")
    running = RunFolder(out)
    running.hold()
    before = files(out)
    refused = hone("resume", out)
    assert refused.status == 2 and f"process {os.getpid()} on " in refused.err and "trains in the run" in refused.err
    assert files(out) == before
    running.release()
    assert (out / "lock").read_bytes() == b""


def test_a_stage_is_not_resumed_beside_its_run(terminated: Path, tmp_path: Path) -> None:
    run = copy(terminated, tmp_path / "run")
    copy(terminated, run / "stage-2")
    running = RunFolder(run)
    running.hold()
    refused = hone("resume", run / "stage-2")
    running.release()
    assert refused.status == 2 and f"trains in the run folder '{run}'" in refused.err


def test_two_runs_that_want_one_folder(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    first = RunFolder.create(str(out), "mine")  # which has made nothing but its lock yet
    with pytest.raises(HoneError, match=f"process {os.getpid()} on .* trains in the run folder"):
        train(tiny_model, qa_file, out)
    assert out.is_dir()
    first.release()
    train(tiny_model, qa_file, out, steps=1)  # the first was killed at its start


def test_a_killed_run_is_not_held_by_the_workers_that_it_has_forked(terminated: Path, tmp_path: Path) -> None:
    out = copy(terminated, tmp_path / "run")
    script = """
import os, sys, time
from pathlib import Path
from hone.engine.folder import RunFolder
RunFolder(Path(sys.argv[1])).hold()
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script, str(out)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        worker = int(process.stdout.readline())
        with pytest.raises(HoneError, match=f"process {process.pid} on"):
            RunFolder(out).hold()
        process.kill()
        process.wait()
        again = RunFolder(out)
        again.hold()
        again.release()
        os.kill(worker, signal.SIGKILL)  # it was there all the time
