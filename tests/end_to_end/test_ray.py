"""Comparisons on Ray: the same figures as without it, failing cells as rows, stopping, and what is given back."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from end_to_end.comparisons import prepare, row, small
from hone.errors import HoneError, MissingPackage
from hone.evidence import ray_pool
from hone.evidence.cells import Job, Store
from hone.evidence.command import Request, open_pool
from hone.evidence.compare import compare
from hone.evidence.contest import Comparison
from hone.evidence.pool import Interrupted, LocalPool
from hone.evidence.ray_pool import RayPool, compute
from hone.recipe import Recipe


@pytest.fixture(scope="module")
def pool() -> Iterator[RayPool]:
    """A Ray of two workers that the pool starts, and ends."""
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_TOKEN", "0" * 64)  # otherwise Ray writes one into the user's home
        with patch.context() as meanwhile:
            meanwhile.setenv("RAY_ADDRESS", "local")
            meanwhile.setattr(ray_pool, "cores", lambda: 2)
            made = RayPool()
        # Ray waits a second for each of its processes; one that takes longer would be missed when it is collected.
        daemons = [thing for thing in gc.get_objects() if issubclass(type(thing), subprocess.Popen)]
        assert any("raylet" in str(process.args) for process in daemons)
        yield made
        made.close()
    assert not made.ray.is_initialized() and signal.getsignal(signal.SIGTERM) is before
    assert all(process.wait(20) is not None for process in daemons)
    made.close()  # once is enough


def endless(model: Path, data: Path, store: Path) -> Job:
    """Return a prepared run that does not end by itself."""
    recipe = Recipe.of(**small(model, data, general_data=None, eval_samples=0, steps=100_000))
    job = Store(store).job("run", recipe, "endless")
    job.prepare()
    return job


def test_ray_gives_the_figures_of_this_machine_and_failures_are_rows(
    pool: RayPool, tmp_path: Path, tiny_model: Path, qa_file: Path
) -> None:
    recipe = prepare(tmp_path, "mine", small(tiny_model, qa_file, general_data=None))

    def asked(rates: str) -> Comparison:
        vary = [f"optimizer.lr={rates}"]
        return Request(recipes=[str(recipe)], vary=vary, seeds=1, general="none", metric="loss").comparison()

    ours = compare(asked("2e-2"), tmp_path / "local" / "out", LocalPool(2))
    theirs = compare(asked("2e-2,1e30"), tmp_path / "ray" / "out", pool)
    assert [entry["status"] for entry in theirs["variants"]] == ["finished", "failed"]
    assert "nan" in row(theirs, "optimizer.lr=1e+30")["reason"]
    values = [row(result, "optimizer.lr=0.02")["values"] for result in (ours, theirs)]
    for name in ("loss", "accuracy", "tokens", "trained", "flops", "steps"):
        assert values[0][name] == values[1][name]
    assert "held-out loss" in next((tmp_path / "ray" / "cells").glob("*seed-0*/log.txt")).read_text()


def test_a_ray_of_its_own_is_open_to_this_machine_alone(pool: RayPool) -> None:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    open_ports = [c.laddr.ip for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    assert len(open_ports) >= 3 and {address.removeprefix("::ffff:") for address in open_ports} == {"127.0.0.1"}


def test_the_cluster_says_how_many_cells_run_with_how_many_threads(
    pool: RayPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pool.width(0, 10) == 2 and pool.width(0, 1) == 1 and pool.width(2**50, 10) == 1
    assert pool.threads(1) == 2 and pool.threads(2) == pool.threads(3) == 1
    nodes = [{"CPU": 6.0, "memory": 40.0}, {"CPU": 4.0, "memory": 10.0}, {"memory": 5.0}]
    monkeypatch.setattr(pool, "_nodes", lambda: nodes)
    assert pool.width(0, 99) == 10 and pool.width(8, 99) == 4 + 1 and pool.width(0, 7) == 7
    assert [pool.threads(width) for width in (1, 2, 3, 5, 10)] == [6, 4, 3, 2, 1]  # of which so many find a machine
    monkeypatch.setattr(pool, "_all", lambda: {"CPU": 10.0, "GPU": 3.0})
    assert pool.width(0, 99) == 3


def test_a_stopped_cell_saves_its_state_and_goes_on_elsewhere(
    pool: RayPool, tmp_path: Path, tiny_model: Path, qa_file: Path
) -> None:
    job = endless(tiny_model, qa_file, tmp_path)

    def stop(running: Sequence[Job], finished: int) -> None:
        if (job.run / "metrics.jsonl").exists():
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        pool.run([job], 1, stop)
    assert not job.done and len(list(job.run.glob("checkpoints/step-*"))) == 1
    assert json.loads((job.run / "result.json").read_text())["status"] == "interrupted"


def test_a_lost_worker_is_the_cells_failure(pool: RayPool, tmp_path: Path, tiny_model: Path, qa_file: Path) -> None:
    job = endless(tiny_model, qa_file, tmp_path)

    def lose(running: Sequence[Job], finished: int) -> None:
        if (job.run / "metrics.jsonl").exists():
            for process in psutil.Process().children(recursive=True):
                if process.name().startswith("ray::compute"):
                    process.kill()

    pool.run([job], 1, lose)
    assert job.failure().startswith("its task was lost: WorkerCrashedError")


def test_folders_that_the_machines_do_not_share_are_named(
    pool: RayPool, tmp_path: Path, tiny_model: Path, qa_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = endless(tiny_model, qa_file, tmp_path)
    (job.folder / "cell.json").unlink()
    monkeypatch.setattr(ray_pool, "REACH", 0.0)
    said = compute(job, os.getcwd(), 1, {})
    assert said == f"machine {socket.gethostname()} does not see {job.folder / 'cell.json'}: {ray_pool.SHARED}"
    assert "does not see /nowhere" in str(compute(job, "/nowhere", 1, {}))
    monkeypatch.setattr(pool.ray, "get", lambda reference: "")  # it ended well, on a disk of its own
    pool._close("reference", job)
    assert job.failure() == f"it ended, but what it left is not to be seen in {job.folder}: {ray_pool.SHARED}"


def test_where_no_cluster_answers_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound, but nothing listens
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        monkeypatch.setattr("ray.is_initialized", lambda: False)
        with pytest.raises(
            HoneError, match=f"^no Ray cluster answers at '{address}'. Start one with: ray start --head"
        ):
            open_pool(f"ray:{address}", None)
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(HoneError, match=f"^no Ray cluster answers at '{address}'"):
            open_pool("ray", None)
    with pytest.raises(HoneError, match=r"--on: expected ray:HOST:PORT .* got the address 'nonsense'"):
        open_pool("ray:nonsense", None)
    with pytest.raises(HoneError, match=r"--on: expected local, ray or ray:ADDRESS, got 'rya'"):
        open_pool("rya", None)


def test_a_record_of_a_cluster_that_is_gone_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert ray_pool._nearby() is None
    (tmp_path / "ray").mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        (tmp_path / "ray" / "ray_current_cluster").write_text(address + "\n")
        assert ray_pool._nearby() == address
    assert ray_pool._nearby() is None
    monkeypatch.setenv("RAY_ADDRESS", "local")
    assert ray_pool._nearby() is None


def test_without_ray_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingPackage, match=r"--on ray needs the package 'ray'.*pip install 'hone-ml\[ray\]'"):
        RayPool()


def test_a_ray_that_the_caller_has_started_is_used_and_left_alone(pool: RayPool) -> None:
    other = RayPool()
    other.close()
    assert pool.ray.is_initialized()
