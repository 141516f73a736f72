"""Checkpoints: states survive a round trip bit by bit; a kill or damage at any point leaves the last good one."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hone.engine import checkpoint
from hone.engine.checkpoint import Checkpoints, decode, encode, read_state, staged
from hone.errors import CheckpointError
from hone.files import beside, write_whole

PLAIN = st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False) | st.text(max_size=8)
KEYS = st.text(max_size=6) | st.integers(-5, 5)
TREES = st.recursive(
    PLAIN, lambda t: st.lists(t, max_size=4) | st.tuples(t, t) | st.dictionaries(KEYS, t, max_size=4), max_leaves=12
)


@given(TREES)
def test_any_plain_tree_survives(tree: object) -> None:
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(encode(tree, tensors))
    assert decode(json.loads(text), tensors) == tree
    assert not tensors


def test_tensors_survive_bit_by_bit(tmp_path: Path) -> None:
    state = {
        "a": torch.randn(3, 4).t(), 7: {"b": torch.tensor(2.5, dtype=torch.bfloat16)}, "n": np.arange(5),
        "t": (torch.zeros(0), [torch.tensor([True, False])]), "i": torch.randint(0, 9, (2,)),
    }  # fmt: skip
    back = read_state(Checkpoints(tmp_path, keep=1).save(3, state))
    assert torch.equal(back["a"], state["a"]) and back[7]["b"].dtype == torch.bfloat16
    assert np.array_equal(back["n"], state["n"]) and isinstance(back["t"], tuple)
    assert back["t"][0].shape == (0,) and torch.equal(back["t"][1][0], state["t"][1][0])


def test_a_value_that_cannot_be_saved_is_named() -> None:
    with pytest.raises(TypeError, match=r"state\.x\.0: a state cannot hold object"):
        encode({"x": [object()]}, {})


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30, 40, 50):
        kept.save(step, {"step": step}, best=20)
    assert kept.steps() == [20, 40, 50]


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
def test_damage_falls_back_to_the_one_before(tmp_path: Path, name: str) -> None:
    kept = Checkpoints(tmp_path, keep=3)
    kept.save(1, {"w": torch.ones(4)})
    bad = kept.save(2, {"w": torch.ones(4) * 2})
    content = bytearray((bad / name).read_bytes())
    content[-1] ^= 1
    (bad / name).write_bytes(content)
    step, state, skipped = kept.last_good()
    assert step == 1 and torch.equal(state["w"], torch.ones(4))
    assert skipped == [f"step-00000002 is damaged: {name} does not match its checksum"]


def test_nothing_whole_is_an_error(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path, keep=3)
    (kept.save(1, {"w": torch.ones(4)}) / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint can be resumed from .*state\.json is missing"):
        kept.last_good()


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Checkpoints(tmp_path, keep=2)
    kept.save(1, {"w": torch.ones(4)})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(CheckpointError, match=r"step-00000002.*the disk is full: .*untouched"):
        kept.save(2, {"w": torch.ones(4)})
    assert kept.steps() == [1] and not list(tmp_path.glob(".*"))
    assert kept.last_good()[0] == 1


def test_a_kill_while_writing_leaves_the_last_good_one(tmp_path: Path) -> None:
    """A process is killed at every point of a save in turn: before, between and after each system call that matters."""

    def save(folder: Path, fatal: int) -> None:
        calls = itertools.count(1)

        def deadly(function: Any) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                if next(calls) == fatal:
                    os._exit(9)
                return function(*args, **kwargs)

            return wrapped

        for owner, name in ((checkpoint, "save_file"), (checkpoint, "sync"), (checkpoint, "_sum"), (Path, "rename")):
            setattr(owner, name, deadly(getattr(owner, name)))
        checkpoint.Checkpoints(folder, keep=2).save(2, {"w": torch.full((4,), 2.0)})
        os._exit(0)

    for fatal in (1, 2, 4, 7, 8, 9, 99):
        folder = tmp_path / str(fatal)
        Checkpoints(folder, keep=2).save(1, {"w": torch.ones(4)})
        child = multiprocessing.get_context("fork").Process(target=save, args=(folder, fatal))
        child.start()
        child.join()
        step, state, skipped = Checkpoints(folder, keep=2).last_good()
        assert torch.equal(state["w"], torch.full((4,), float(step))) and not skipped
        assert (child.exitcode, step) in {(9, 1), (9, 2), (0, 2)}
        assert child.exitcode == 9 or fatal == 99


def test_two_that_write_one_path_do_not_take_each_other_s_temporaries(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with staged(target) as first:
        (first / "first").write_text("1")
        with staged(target) as second:
            (second / "second").write_text("2")
        assert (target / "second").is_file()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["checksums.json", "first", "model"]
    script = "import sys; from pathlib import Path; from hone.files import write_whole\n"
    script += "for n in range(300): write_whole(Path(sys.argv[1]), sys.argv[2].encode())"
    writers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "file"), word]) for word in ("a", "b")]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model"]


def test_what_dead_processes_have_left_is_swept(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with beside(tmp_path / "model", "staging") as own:
        mark, _, rest = own.name.removeprefix(".model.").partition("-")
        of = {pid: f"{mark}-{pid}-{rest.partition('-')[2]}" for pid in (dead.pid, os.getppid(), os.getpid())}
        gone = [tmp_path / f".model.{of[dead.pid]}", tmp_path / f".file.{of[dead.pid]}".replace("staging", "tmp")]
        gone += [tmp_path / f".other.{of[os.getpid()]}"]  # of one that had the same number
        kept = [tmp_path / f".model.{of[os.getppid()]}", tmp_path / f".model.{of[dead.pid].replace(mark, '0' * 8)}"]
        kept += [tmp_path / ".model.staging", own]
        for path in (*gone, *kept):
            path.mkdir()
        with staged(tmp_path / "model"):
            pass
        write_whole(tmp_path / "file", b"whole")
        assert not any(path.exists() for path in gone) and all(path.exists() for path in kept)


def test_a_folder_comes_back_when_its_successor_cannot_be_put_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with staged(tmp_path / "model") as staging:
        (staging / "first").write_text("1")
    rename = Path.rename

    def refused(self: Path, target: Path) -> Path:
        if target.name == "model" and "staging" in self.name and not target.exists():
            raise OSError(errno.EIO, "the disk has a fault")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(CheckpointError, match="the disk has a fault"), staged(tmp_path / "model"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and (tmp_path / "model" / "first").is_file()


@settings(max_examples=10)
@given(st.integers(1, 3))
def test_staging_replaces_a_folder_whole(number: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "model"
        for i in range(number):
            with staged(target) as staging:
                (staging / f"file-{i}").write_text(str(i))
        names = sorted(path.name for path in target.iterdir())
        assert names == ["checksums.json", f"file-{number - 1}"]
