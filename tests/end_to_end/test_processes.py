"""Two processes train the weights that one trains: data-parallel, fully sharded, resumed, stopped and failing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from end_to_end.support import Outcome, fields, files, hone, rows, weights, write_recipe
from hone.engine.devices import Cluster
from hone.text.model import LanguageModel
from sharded import one_process

MODES = {"parallel": "none", "sharded": "full"}
SAME, ELASTIC, SINGLE = 1e-12, 1e-10, 1e-3  # largest difference of a weight or a metric; SINGLE in float32
# Runs commands through the door of the `hone` script, one after the other, so that libraries are imported once.
DRIVER = """
import dataclasses, json, os, sys
from pathlib import Path
from end_to_end.support import hone

plan = Path(sys.argv[1])
for name, command in json.loads(plan.read_text()).items():
    said = json.dumps(dataclasses.asdict(hone(*command)))
    plan.with_name(f"{name}.{os.environ['RANK']}.json").write_text(said)
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return str(probe.getsockname()[1])


def launched(folder: Path, commands: Mapping[str, list[str]]) -> dict[str, list[Outcome]]:
    """Run commands in two processes that torchrun starts; return what each process said, by name of the command."""
    folder.mkdir()
    (folder / "driver.py").write_text(DRIVER)
    (folder / "plan.json").write_text(json.dumps(commands))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    done = subprocess.run(
        [*torchrun, str(folder / "driver.py"), str(folder / "plan.json")], cwd=folder, capture_output=True, text=True,
        timeout=240, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    saids = ((name, [folder / f"{name}.{rank}.json" for rank in (0, 1)]) for name in commands)
    return {name: [Outcome(**json.loads(path.read_text())) for path in paths] for name, paths in saids}


def settings(model: Path, data: Path, **changes: Any) -> dict[str, Any]:
    """Return the fields of a run of four steps of several micro-batches, in which only rounding can differ."""
    made = fields(
        model, data, Path(), adapter="full", precision="float64", device="cpu", steps=4, batch_tokens=200,
        micro_tokens=60, eval_samples=2, max_new_tokens=4, checkpoint_every=2, callbacks=["average"],
        optimizer={"name": "adamw", "lr": 1e-2, "eps": 1e-6},
    )  # fmt: skip
    del made["out"]
    return {**made, **changes}


def variants(model: Path, tied: Path, data: Path) -> dict[str, dict[str, Any]]:
    """Return the recipes that both one process and two run."""
    lora = {"name": "lora", "rank": 4}
    return {
        "untied-full": settings(model, data),
        "untied-lora": settings(model, data, adapter=lora),
        "penalised": settings(model, data, adapter={"name": "adalora", "rank": 3, "start_rank": 3}),
        "tied-full": settings(tied, data),
        "tied-lora": settings(tied, data, adapter=lora),
        # A sample a step: one of the two processes has nothing to do.
        "few": settings(tied, data, objective="pretrain", batch_tokens=30, micro_tokens=30),
        "single": settings(tied, data, precision="float32"),
        "best": settings(model, data, callbacks=[], final="best", eval_every=1, recompute=True),
        "stages": settings(model, data, steps=None, stages=[{"steps": 2}, {"steps": 1, "adapter": lora}]),
    }


VARIANTS = ["untied-full", "untied-lora", "penalised", "tied-full", "tied-lora", "few", "single", "best", "stages"]
ALIKE = {"untied-lora", "penalised", "tied-full", "single"}
RESUMED = ["untied-full", "tied-lora"]
# Without sharding every process holds a whole model, whichever it is: five variants tell all that differs.
PAIRS = [(name, mode) for mode in MODES for name in VARIANTS if mode == "sharded" or name not in ALIKE]


def tie(model: Path, folder: Path) -> Path:
    """Save a model again with its head tied to its embeddings."""
    loaded = LanguageModel.load(model)
    loaded.hf.config.tie_word_embeddings = True
    loaded.hf.tie_weights()
    loaded.save(folder)
    return folder


def poison(model: Path, folder: Path) -> dict[str, Any]:
    """Return a recipe that fails on its second longest sample, which is the first one of the second process."""
    loaded = LanguageModel.load(model)
    (character,) = loaded.tokenizer("~", add_special_tokens=False).input_ids
    with torch.no_grad():
        loaded.hf.get_input_embeddings().weight[character] = float("nan")
    loaded.save(folder)
    samples = [{"question": "Why?", "answer": answer} for answer in ("x" * 30, "~" * 15, "x", "x")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return settings(folder, folder / "rows.jsonl")


def rewind(run: Path, out: Path) -> Path:
    """Copy a run as it was after its second step."""
    shutil.copytree(run, out)
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    (out / "result.json").unlink()
    return out


@pytest.fixture(scope="module")
def top(tiny_model: Path, qa_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this file's runs, with those in one process."""
    top = tmp_path_factory.mktemp("processes")
    for name, recipe in variants(tiny_model, tie(tiny_model, top / "tied"), qa_file).items():
        done = hone("run", write_recipe(top / f"{name}.yaml", {**recipe, "out": str(top / name)}))
        assert done.status == 0, done.err
    return top


@pytest.fixture(scope="module")
def said(top: Path, tiny_model: Path) -> dict[str, list[Outcome]]:
    """What the two processes said in each of their runs, all done in one launch."""
    commands: dict[str, list[str]] = {}
    bad = write_recipe(top / "bad.yaml", poison(tiny_model, top / "bad"))
    for mode, sharding in MODES.items():
        for name in (name for name, own in PAIRS if own == mode):
            out = top / f"{name}-{mode}"
            changes = ["--set", f"out={out}", "--set", f"sharding={sharding}"]
            commands[out.name] = ["run", str(top / f"{name}.yaml"), *changes]
        for name in RESUMED:
            out = rewind(top / name, top / f"resumed-{name}-{mode}")
            text = (out / "recipe.yaml").read_text()
            (out / "recipe.yaml").write_text(text.replace("sharding: auto", f"sharding: {sharding}"))
            commands[out.name] = ["resume", str(out)]
        out = top / f"bad-{mode}"
        commands[out.name] = ["run", str(bad), "--set", f"out={out}", "--set", f"sharding={sharding}"]
    commands["again"] = ["run", str(top / "few.yaml")]
    commands["unnamed"] = ["run", str(top / "few.yaml"), "--set", "out=null"]
    return launched(top / "launch", commands)


def assert_equal(run: Path, reference: Path, tolerance: float) -> None:
    """Compare all that a run leaves, but for what tells time, memory and the machine."""
    assert files(run).keys() == files(reference).keys()
    for mine, other in zip(stages(run), stages(reference), strict=True):
        found, wanted = weights(mine / "model"), weights(other / "model")
        assert found.keys() == wanted.keys()
        for name, tensor in found.items():
            assert tensor.dtype == wanted[name].dtype
            assert (tensor - wanted[name]).abs().max() <= tolerance, name
        for log in ("metrics.jsonl", "evaluations.jsonl"):
            for row, expected in zip(rows(mine / log), rows(other / log), strict=True):
                for told in ("seconds", "memory"):
                    assert (row.pop(told, None) is None) == (expected.pop(told, None) is None)
                assert row == pytest.approx(expected, rel=tolerance, abs=tolerance)
        assert rows(mine / "samples.jsonl") == rows(other / "samples.jsonl")


def stages(run: Path) -> list[Path]:
    """Return the folders that hold the logs of a run."""
    return sorted(run.glob("stage-*")) or [run]


@pytest.mark.parametrize(("name", "mode"), PAIRS)
def test_two_processes_train_the_weights_of_one(
    top: Path, said: dict[str, list[Outcome]], name: str, mode: str
) -> None:
    main, other = said[f"{name}-{mode}"]
    assert (main.status, other.status, other.err) == (0, 0, "")
    assert "2 processes" in main.err and ("a share of the weights" in main.err) == (mode == "sharded")
    assert_equal(top / f"{name}-{mode}", top / name, SINGLE if name == "single" else SAME)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", RESUMED)
def test_a_run_goes_on_with_another_number_of_processes(
    top: Path, said: dict[str, list[Outcome]], name: str, mode: str
) -> None:
    main, other = said[f"resumed-{name}-{mode}"]  # one process, then two
    assert (main.status, other.status, other.err) == (0, 0, "")
    assert "going on from step 2 of 4" in main.err
    assert_equal(top / f"resumed-{name}-{mode}", top / name, ELASTIC)
    out = rewind(top / f"{name}-{mode}", top / f"alone-{name}-{mode}")  # two processes, then one
    alone = hone("resume", out)
    assert alone.status == 0 and "going on from step 2 of 4" in alone.err
    assert_equal(out, top / name, ELASTIC)


@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_is_not_finite_in_one_process_stops_both(
    top: Path, said: dict[str, list[Outcome]], mode: str
) -> None:
    for outcome in said[f"bad-{mode}"]:
        assert outcome.status == 2
        assert "step 1: the loss is nan" in outcome.err and "rows.jsonl:2" in outcome.err, outcome.err
    assert (top / f"bad-{mode}" / "checkpoints" / "step-00000000").is_dir()


def test_a_run_folder_that_is_taken_stops_both(said: dict[str, list[Outcome]]) -> None:
    for outcome in said["again"]:
        assert outcome.status == 2 and "nothing is ever overwritten" in outcome.err


def test_both_use_the_run_folder_that_the_first_one_makes(top: Path, said: dict[str, list[Outcome]]) -> None:
    assert [outcome.status for outcome in said["unnamed"]] == [0, 0]
    assert [path.name for path in (top / "launch" / "runs").iterdir()] == ["few-1"]
    assert_equal(top / "launch" / "runs" / "few-1", top / "few", SAME)


def test_a_signal_to_one_process_stops_both_and_one_goes_on(top: Path, tiny_model: Path, qa_file: Path) -> None:
    recipe = settings(tiny_model, qa_file, steps=40, eval_every=10, eval_samples=1, checkpoint_every=20)
    whole = hone("run", write_recipe(top / "whole.yaml", {**recipe, "out": str(top / "whole")}))
    assert whole.status == 0, whole.err
    out = top / "stopped"
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port(),
        "-m", "hone.cli", "run", str(top / "whole.yaml"), "--set", f"out={out}",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        assert launcher.stderr is not None
        heard = ""
        while "step 10: held-out" not in heard:
            line = launcher.stderr.readline()
            assert line, heard  # it ended
            heard += line
        (second,) = (p for p in psutil.Process(launcher.pid).children(recursive=True) if p.environ().get("RANK") == "1")
        second.send_signal(signal.SIGTERM)
        printed, _ = launcher.communicate(timeout=60)
    assert f"everything is saved. Go on with:  hone resume {out}" in printed
    result = json.loads((out / "result.json").read_text())
    assert result["status"] == "interrupted" and result["reason"] == "interrupted by SIGTERM"
    assert 10 <= result["steps"] < 40
    assert "a share of the weights" in heard
    resumed = hone("resume", out)
    assert resumed.status == 0 and f"going on from step {result['steps']} of 40" in resumed.err
    assert_equal(out, top / "whole", ELASTIC)


def test_frozen_factors_that_are_buffers_are_those_of_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Linear(2, 3)
    module.register_buffer("factor", torch.ones(3, 2).T)  # not contiguous, as slices of a decomposition are not
    module.register_buffer("entries", torch.ones(3, dtype=torch.int64))
    module.register_buffer("own", torch.ones(3), persistent=False)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: tensor.view(-1).fill_(7 + source))
    cluster = Cluster("cpu")
    cluster.align(module)
    assert not (module.factor == 7).any()
    cluster.world = 2  # as far as it knows
    cluster.align(module)
    for tensor in (module.weight, module.bias, module.factor, module.entries):
        assert (tensor == 7).all()
    assert (module.own == 1).all()


def test_a_gradient_that_no_process_has_stays_absent() -> None:
    used, unused = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(3))
    used.grad = torch.full((2, 2), 3.0)
    cluster = Cluster("cpu")
    cluster.world = 2  # as far as it knows
    with one_process():
        cluster.reduce_gradients([unused, used])
    assert unused.grad is None and torch.equal(used.grad, torch.full((2, 2), 3.0))
