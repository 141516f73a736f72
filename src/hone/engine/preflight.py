"""`hone check`: rehearse a run before it is paid for. Peers estimate; this measures."""

from __future__ import annotations

import itertools
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from hone.engine.assemble import Bench, assemble, describe_model
from hone.engine.checkpoint import Checkpoints, read_state
from hone.engine.devices import Cluster
from hone.engine.flops import count_flops
from hone.engine.loop import Trainer
from hone.engine.progress import Display, clock, console, listen
from hone.errors import HoneError
from hone.recipe import Recipe
from hone.text.pack import Tree


@dataclass
class Rehearsal:
    """What a rehearsal measured.

    Args:
        device: the device in words.
        data: what the data is, in a sentence.
        parameters: of the model.
        trained: parameters that train.
        samples: three rendered samples, each a list of (text, trained).
        unit: what is counted below: "tokens", or "arrays".
        longest_tokens: tokens, or arrays, in the longest batch that was run.
        setup_seconds: seconds that the adapter took to attach.
        step_seconds: seconds of a typical step.
        step_tokens: tokens of a typical step.
        step_flops: floating-point operations of a typical step: those of matrix products, convolutions and attention.
        checkpoint_seconds: seconds to save and reload a checkpoint, 0 when that was left out.
        checkpoint_bytes: its size.
        evaluation_seconds: seconds of one evaluation, 0 when that was left out.
        peak_memory: most bytes held, the longest batch and the save included.
        steps: steps of the run.
        eta_seconds: seconds that the whole run will take.
    """

    device: str
    data: str
    parameters: int
    trained: int
    samples: list[list[tuple[str, bool]]]
    unit: str
    longest_tokens: int
    setup_seconds: float
    step_seconds: float
    step_tokens: float
    step_flops: float
    checkpoint_seconds: float
    checkpoint_bytes: int
    evaluation_seconds: float
    peak_memory: int
    steps: int
    eta_seconds: float

    def record(self) -> dict[str, Any]:
        """Return the figures for `--json`."""
        return asdict(self)

    def text(self, command: str) -> str:
        """Return the figures for people.

        Args:
            command: what starts the run.
        """
        return "\n".join([
            f"longest batch: {self.longest_tokens:,} {self.unit}, forward, backward, optimizer step: done",
            f"checkpoint:    {self.checkpoint_bytes / 2**20:,.1f} MiB, saved and reloaded "
            f"in {self.checkpoint_seconds:.1f} s",
            f"peak memory:   {self.peak_memory / 2**20:,.0f} MiB",
            f"time:          {self.steps} steps of {self.step_seconds:.2f} s, "
            f"evaluations of {self.evaluation_seconds:.1f} s: about {clock(self.eta_seconds)}",
            f"work:          {self.step_flops / 1e9:,.1f} GFLOP a step of {self.step_tokens:,.0f} {self.unit}, "
            f"{self.step_flops / self.step_seconds / 1e9:,.1f} GFLOP/s",
            f"nothing was kept; start it with: {command}",
        ])  # fmt: skip


TYPICAL = 3  # steps that are timed


def preflight(recipe: Recipe, display: Display) -> Rehearsal:
    """Render, train the longest batch, save, reload and evaluate in a scratch folder.

    Args:
        recipe: a checked recipe; of a staged one, the first stage is rehearsed.
        display: shows three samples, what is trained in colour.

    Raises:
        HoneError: a launcher started several processes.
    """
    if recipe.stages:
        display.say(
            f"note: only the first of {len(recipe.stages)} stages is rehearsed; time and memory are its own",
            style="yellow",
        )
    recipe, bench = _assembled(recipe, display)
    text = bench.run.model.medium == "text"
    shown = [bench.run.model.renderer.show(tree) for tree in _first(bench, 3)] if text else []
    for number, pieces in enumerate(shown, 1):
        _print_sample(number, pieces, display)
    return replace(_measure(bench, recipe, display, whole=True), samples=shown)


def measure(recipe: Recipe, display: Display) -> Rehearsal:
    """Measure the steps of a recipe alone: their time, memory, tokens and operations.

    Args:
        recipe: a checked recipe; of a staged one, the first stage is measured.
        display: says what was found.

    Raises:
        HoneError: a launcher started several processes.
    """
    recipe, bench = _assembled(recipe, display)
    return _measure(bench, recipe, display, whole=False)


def _assembled(recipe: Recipe, display: Display) -> tuple[Recipe, Bench]:
    listen()
    recipe = recipe.staged()[0]
    cluster = Cluster(recipe.device, recipe.precision, recipe.sharding)
    if cluster.world > 1:
        raise HoneError("a rehearsal runs in one process: run it without a launcher")
    return recipe, assemble(recipe, cluster, display, rehearsal=True)


def _measure(bench: Bench, recipe: Recipe, display: Display, *, whole: bool) -> Rehearsal:
    trainer, run = Trainer(bench.run), bench.run
    longest = _longest(bench, recipe.batch_tokens)
    for callback in run.callbacks:  # some choose what trains
        callback.on_start(run)
    trainer.train_step(longest)
    began = time.perf_counter()  # with what the data take: on-policy steps sample most of their time
    rows = [trainer.train_step(trees) for trees in itertools.islice(run.loader, TYPICAL)]
    step_seconds = (time.perf_counter() - began) / len(rows)
    checkpoint_seconds, size = _rehearse_save(bench) if whole else (0.0, 0)
    evaluation_seconds = _rehearse_evaluation(bench, display) if whole else 0.0
    peak, model = run.cluster.peak_memory(), describe_model(bench)
    step_tokens = _step_tokens(bench) or float(np.mean([row["tokens"] for row in rows]))
    trees = next(run.loader, longest)
    flops = step_tokens * count_flops(trainer, trees) / sum(len(tree) for tree in trees)
    evaluations = 2 + (run.total // recipe.eval_every if recipe.eval_every else 0)
    saves = 1 + (run.total // recipe.checkpoint_every if recipe.checkpoint_every else 0)
    eta = run.total * step_seconds + evaluations * evaluation_seconds + saves * checkpoint_seconds + bench.setup_seconds
    return Rehearsal(
        device=run.cluster.describe(), data=bench.data.describe(), parameters=model["parameters"],
        trained=model["trained"], samples=[], unit=run.unit, longest_tokens=sum(len(tree) for tree in longest),
        setup_seconds=bench.setup_seconds, step_seconds=step_seconds, step_tokens=step_tokens, step_flops=flops,
        checkpoint_seconds=checkpoint_seconds, checkpoint_bytes=size, evaluation_seconds=evaluation_seconds,
        peak_memory=peak, steps=run.total, eta_seconds=eta,
    )  # fmt: skip


def _step_tokens(bench: Bench) -> float | None:
    """Return the mean tokens of a step over the whole data, None for data without a known length."""
    if bench.data.trees is None or not bench.run.loader.steps_per_epoch:
        return None
    return float(np.sum(bench.data.trees.lengths)) / bench.run.loader.steps_per_epoch


def _rehearse_save(bench: Bench) -> tuple[float, int]:
    """Save and reload a checkpoint and save the model; return the seconds and bytes of the checkpoint."""
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        saved = Checkpoints(Path(scratch), keep=1).save(bench.run.step, bench.run.state())
        bench.run.restore(read_state(saved))
        seconds = time.perf_counter() - began
        size = sum(path.stat().st_size for path in saved.iterdir())
        bench.save(Path(scratch) / "model")
    return seconds, size


def _rehearse_evaluation(bench: Bench, display: Display) -> float:
    """Evaluate once; return the seconds that it took."""
    began = time.perf_counter()
    bench.evaluate(display)
    return time.perf_counter() - began


def _first(bench: Bench, count: int) -> list[Tree]:
    if bench.data.trees is None:  # a stream
        trees = next(bench.run.loader)[:count]
        bench.run.loader.rewind()
        return trees
    return [bench.data.trees[i] for i in range(min(count, len(bench.data.trees)))]


def _longest(bench: Bench, batch_tokens: int) -> list[Tree]:
    """Return the batch that asks for most memory: the longest samples together, up to `batch_tokens`."""
    if bench.data.trees is None:
        return _first(bench, batch_tokens)
    chosen: list[Tree] = []
    room = batch_tokens
    for index in np.argsort(bench.data.trees.lengths)[::-1]:
        tree = bench.data.trees[int(index)]
        if chosen and len(tree) > room:
            break
        chosen.append(tree)
        room -= len(tree)
    return chosen


def _print_sample(number: int, pieces: list[tuple[str, bool]], display: Display) -> None:
    if not display.active:
        return
    text = Text(f"sample {number} (")
    text.append("trained", style="bold green").append(", ").append("read only", style="dim").append(")\n")
    for piece, trained in pieces:
        marked = f"\u27e6{piece}\u27e7" if trained and not console.is_terminal else piece  # no colours: brackets
        text.append(marked, style="bold green" if trained else "dim")
    console.print(text)
