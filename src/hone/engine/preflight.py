"""`hone check`: rehearse a run before it is paid for. Peers estimate; this measures."""

from __future__ import annotations

import itertools
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from hone.engine.assemble import Bench, assemble, describe_model
from hone.engine.checkpoint import Checkpoints, read_state
from hone.engine.devices import Cluster
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
        longest_tokens: tokens in the longest batch that was run.
        step_seconds: seconds of a typical step.
        checkpoint_seconds: seconds to save and reload a checkpoint.
        checkpoint_bytes: its size.
        evaluation_seconds: seconds of one evaluation.
        peak_memory: most bytes held, the longest batch and the save included.
        steps: steps of the run.
        eta_seconds: seconds that the whole run will take.
    """

    device: str
    data: str
    parameters: int
    trained: int
    samples: list[list[tuple[str, bool]]]
    longest_tokens: int
    step_seconds: float
    checkpoint_seconds: float
    checkpoint_bytes: int
    evaluation_seconds: float
    peak_memory: int
    steps: int
    eta_seconds: float

    def record(self) -> dict[str, Any]:
        """Return the figures for `--json`."""
        return asdict(self)

    def text(self) -> str:
        """Return the figures for people."""
        return "\n".join([
            f"longest batch: {self.longest_tokens:,} tokens, forward, backward, optimizer step: done",
            f"checkpoint:    {self.checkpoint_bytes / 2**20:,.1f} MiB, saved and reloaded "
            f"in {self.checkpoint_seconds:.1f} s",
            f"peak memory:   {self.peak_memory / 2**20:,.0f} MiB",
            f"time:          {self.steps} steps of {self.step_seconds:.2f} s, "
            f"evaluations of {self.evaluation_seconds:.1f} s: about {clock(self.eta_seconds)}",
            "nothing was kept; start it with: hone run RECIPE",
        ])  # fmt: skip


def preflight(recipe: Recipe, display: Display) -> Rehearsal:
    """Render, train the longest batch, save, reload and evaluate in a scratch folder.

    Args:
        recipe: a checked recipe; of a staged one, the first stage is rehearsed.
        display: shows three samples, what is trained in colour.

    Raises:
        HoneError: a launcher started several processes.
    """
    listen()
    recipe = recipe.staged()[0]
    cluster = Cluster(recipe.device, recipe.precision, recipe.sharding)
    if cluster.world > 1:
        raise HoneError("hone check rehearses in one process: run it without a launcher")
    bench = assemble(recipe, cluster, display)
    shown = [bench.run.model.renderer.show(tree) for tree in _first(bench, 3)]
    for number, pieces in enumerate(shown, 1):
        _print_sample(number, pieces, display)
    trainer = Trainer(bench.run)
    longest = _longest(bench, recipe.batch_tokens)
    trainer.train_step(longest)
    typical = [trainer.train_step(trees)["seconds"] for trees in itertools.islice(bench.run.loader, 2)]
    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        saved = Checkpoints(Path(scratch), keep=1).save(bench.run.step, bench.run.state())
        bench.run.restore(read_state(saved))
        checkpoint_seconds = time.perf_counter() - began
        size = sum(path.stat().st_size for path in saved.iterdir())
        bench.save(Path(scratch) / "model")
    began = time.perf_counter()
    bench.evaluate(display)
    evaluation_seconds = time.perf_counter() - began
    steps, model = bench.run.total, describe_model(bench)
    evaluations = 2 + (steps // recipe.eval_every if recipe.eval_every else 0)
    saves = 1 + (steps // recipe.checkpoint_every if recipe.checkpoint_every else 0)
    step_seconds = float(np.mean(typical))
    eta = steps * step_seconds + evaluations * evaluation_seconds + saves * checkpoint_seconds
    return Rehearsal(
        device=cluster.describe(), data=bench.data.describe(), parameters=model["parameters"], trained=model["trained"],
        samples=shown, longest_tokens=sum(len(tree) for tree in longest), step_seconds=step_seconds,
        checkpoint_seconds=checkpoint_seconds, checkpoint_bytes=size, evaluation_seconds=evaluation_seconds,
        peak_memory=cluster.peak_memory(), steps=steps, eta_seconds=eta,
    )  # fmt: skip


def _first(bench: Bench, count: int) -> list[Tree]:
    if bench.data.trees is None:  # a stream
        begin = bench.run.loader.state_dict()
        trees = next(bench.run.loader)[:count]
        bench.run.loader.load_state_dict(begin)
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
