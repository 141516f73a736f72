"""From a recipe to a finished run folder: assembling the parts, training, evaluating, saving."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hone.data.open import Opened, open_data
from hone.data.sample import Sample
from hone.data.source import Source, Split
from hone.engine import evaluate, sharding
from hone.engine.checkpoint import Checkpoints, read_state, staged
from hone.engine.devices import Cluster, seed_all
from hone.engine.folder import RunFolder
from hone.engine.loop import Player, Run, Trainer, load_tensors
from hone.engine.manifest import folder_hash, manifest
from hone.engine.progress import Display, listen
from hone.engine.tracking import Trackers
from hone.errors import HoneError, NumericError
from hone.recipe import Recipe, dump
from hone.text.model import shipped_base


@dataclass
class Bench:
    """The assembled parts of a run, ready to train.

    Args:
        run: what trains.
        adapter: how weights are parameterised.
        source: the training data.
        data: its rendered form.
        eval_source: the evaluation data.
        eval_data: its rendered form and its samples.
        metrics: judges of generated answers.
        sampler: picks tokens in evaluation.
        base: path of the starting model, for saved adapters.
    """

    run: Run
    adapter: Any
    source: Any
    data: Opened
    eval_source: Any
    eval_data: Opened
    metrics: list[Any]
    sampler: Any
    base: str

    def evaluate(self, display: Display) -> evaluate.Evaluation:
        """Return the loss on held-out data and the scores of generated answers."""
        run, recipe = self.run, self.run.recipe
        limit = recipe.micro_tokens or recipe.batch_tokens
        loss = evaluate.mean_loss(run.model, run.objective, self.eval_data.trees, limit, run.cluster)
        samples: list[Sample] = self.eval_data.samples[: recipe.eval_samples] if recipe.metrics else []
        if samples:
            display.update(run.step, f"answering {len(samples)} held-out problems")
        with run.cluster.autocast():
            found = evaluate.answer(
                run.model, self.eval_source, samples, self.metrics, sampler=self.sampler,
                max_new_tokens=recipe.max_new_tokens, seed=recipe.seed,
            )  # fmt: skip
        found.loss = loss
        return found

    def save(self, folder: Path) -> None:
        """Save the trained model where transformers or PEFT can load it."""
        with staged(folder) as staging:
            self.adapter.save(self.run.model.hf, staging, base=self.base)
            self.run.model.save_tokenizer(staging)


def assemble(recipe: Recipe, cluster: Cluster, display: Display) -> Bench:
    """Build every part of a single-stage recipe, in the order the data meets them.

    Args:
        recipe: a checked recipe without stages.
        cluster: device and processes.
        display: says what was found.
    """
    seed_all(recipe.seed, 0)
    source = recipe.build("data")
    eval_source, eval_split = evaluation_data(recipe, source)
    start, objective = recipe.build("model"), recipe.build("objective")
    model = start.load(device=cluster.device, dtype=cluster.dtype, data=source)
    model.checkpoint_layers(recipe.recompute)

    def opened(label: str, which: Source, split: Split) -> Opened:
        display.start(label, None)
        made = open_data(which, model.renderer, consumes=objective.consumes, split=split, progress=display.update)
        display.stop()
        return made

    data = opened("reading data", source, "train")
    eval_data = opened("reading held-out data", eval_source, eval_split)
    display.say(data.describe())
    adapter = recipe.build("adapter")
    adapter.attach(model.hf, data.calibration(recipe.batch_tokens, recipe.seed))
    model.to(device=cluster.device)
    if cluster.precision == "bf16":  # autocast would cast a frozen weight anew in every forward pass
        for parameter in model.parameters():
            if not parameter.requires_grad and parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)
    if cluster.sharded:
        sharding.shard(model, cluster)
    loader = data.loader(recipe.batch_tokens, recipe.seed, recipe.epochs)
    total = recipe.steps if recipe.steps is not None else loader.total_steps(recipe.epochs or 1.0)
    run = Run(recipe, cluster, model, objective, loader, total, callbacks=recipe.build("callbacks"))
    params = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    run.players["model"] = Player(params, recipe.build("optimizer").build(params), recipe.build("schedule").factor)
    objective.setup(run)
    base = getattr(start, "path", "")
    base = str(shipped_base()) if base == "base" else base
    metrics, sampler = recipe.build("metrics"), recipe.build("sampler")
    return Bench(run, adapter, source, data, eval_source, eval_data, metrics, sampler, base)


def evaluation_data(recipe: Recipe, source: Source | None = None) -> tuple[Source, Split]:
    """Return what a recipe evaluates on: the held-out split of its data, or all of `eval_data`.

    Args:
        recipe: a checked recipe.
        source: its training data, when it is built already.
    """
    if recipe.eval_data is None:
        return recipe.build("data") if source is None else source, "eval"
    other = recipe.build("eval_data")
    return other, other.evaluation_split()


def describe_model(bench: Bench) -> dict[str, Any]:
    """Return the path, content hash and sizes of the model that a run starts from."""
    model = bench.run.model
    everything = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for _, p in bench.run.trainable)
    return {"base": bench.base, "sha256": folder_hash(Path(bench.base)) if bench.base else None,
            "parameters": everything, "trained": trained, "packed": bool(model.packs)}  # fmt: skip


@contextlib.contextmanager
def stopping_on_signals(run: Run) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into an orderly stop after the current step; a second SIGINT interrupts at once."""

    def handle(number: int, _frame: object) -> None:
        if run.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        run.stop = f"interrupted by {signal.Signals(number).name}"

    try:
        before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller looks after signals
        yield
        return
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class Stage:
    """One stage of a run, in a folder of its own."""

    def __init__(self, bench: Bench, folder: RunFolder, display: Display) -> None:
        """Prepare to train.

        Args:
            bench: the assembled parts.
            folder: the stage's folder.
            display: says how it goes.
        """
        self.bench, self.run, self.folder, self.display = bench, bench.run, folder, display
        self.run.folder = folder
        self.checkpoints = Checkpoints(folder.path / "checkpoints", self.run.recipe.keep)
        self.trainer = Trainer(self.run)
        self.evaluations: list[dict[str, Any]] = []
        self.trackers = Trackers(self.run.recipe.trackers, folder.path, self.run.cluster.main)
        self.seconds = 0.0
        self.saved = -1

    def train(self) -> dict[str, Any]:
        """Train to the end, or to a stop; return the result."""
        run = self.run
        began = time.perf_counter()
        if run.step == 0:
            self._evaluate()
        else:
            self.evaluations = list(self.folder.rows("evaluations.jsonl"))
        for callback in run.callbacks:
            callback.on_start(run)
        self.display.start("training", run.total, run.step)
        with stopping_on_signals(run):
            while run.step < run.total and not run.stop:
                self._step()
        self.display.stop()
        interrupted = run.stop.startswith("interrupted")
        self._checkpoint()
        if not interrupted:
            self._finish()
        run.cluster.barrier()
        run.loader.close()
        self.trackers.close()
        self.seconds += time.perf_counter() - began
        return self._result(interrupted)

    def _finish(self) -> None:
        """Choose the final weights, evaluate them and save the model."""
        run = self.run
        if run.recipe.final == "best" and run.best is not None and run.best[1] != run.step:
            self._take_best()
        for callback in run.callbacks:
            callback.on_end(run)
        self._evaluate()
        if run.cluster.sharded:
            sharding.gather(run.model)
        if run.cluster.main:
            self.bench.save(self.folder.path / "model")

    def _step(self) -> None:
        run, recipe = self.run, self.run.recipe
        position = run.loader.state_dict()
        trees = next(run.loader, None)
        if trees is None:
            run.stop = run.stop or "the data ended"
            return
        try:
            row = self.trainer.train_step(trees)
        except NumericError:
            run.loader.load_state_dict(position)  # the state before the step: the optimizer has not moved
            self._checkpoint()
            raise
        for callback in run.callbacks:
            callback.on_step(run, row)
        if run.cluster.main:
            self.folder.append("metrics.jsonl", row)
            self.trackers.log(row, run.step)
        speed = row["tokens"] / row["seconds"] if row["seconds"] else 0.0
        self.display.update(run.step, f"loss {row.get('loss', float('nan')):.3f}  {speed:,.0f} tokens/s")
        if recipe.eval_every and run.step % recipe.eval_every == 0 and run.step < run.total:
            self._evaluate()
        if recipe.checkpoint_every and run.step % recipe.checkpoint_every == 0:
            self._checkpoint()

    def _evaluate(self) -> None:
        run = self.run
        found = self.bench.evaluate(self.display)
        row = {"step": run.step, **found.row()}
        if run.cluster.main and len(row) > 1:
            self.folder.append("evaluations.jsonl", row)
            for answer in found.answers:
                self.folder.append("samples.jsonl", {"step": run.step, **answer})
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in row.items() if name != "step")
            self.display.say(f"step {run.step}: held-out {numbers}")
            self.trackers.log({f"eval/{k}": v for k, v in row.items() if k != "step"}, run.step)
        self.evaluations.append(row)
        for callback in run.callbacks:
            callback.on_eval(run, row)
        value = -found.scores["accuracy"] if "accuracy" in found.scores else found.loss
        if value is not None and run.step > 0 and (run.best is None or value < run.best[0]):
            run.best = (float(value), run.step)
            if run.recipe.final == "best":
                self._checkpoint()

    def _checkpoint(self) -> None:
        """Save the state of this step, unless it is saved already; all processes call it together."""
        run = self.run
        if self.saved == run.step:
            return
        self.saved = run.step
        state = run.state()
        if run.cluster.main:
            self.checkpoints.save(run.step, state, run.best[1] if run.best else None)

    def _take_best(self) -> None:
        """Go back to the weights of the best evaluation, for the model that is saved."""
        run = self.run
        if run.best is None:
            return
        run.cluster.barrier()
        state = read_state(self.checkpoints.path(run.best[1]))
        for name, player in run.players.items():
            load_tensors(dict(player.params), state["players"][name]["weights"], f"player '{name}'")
        self.display.say(f"taking the weights of step {run.best[1]}, the best evaluation")

    def _result(self, interrupted: bool) -> dict[str, Any]:
        run, path = self.run, self.folder.path
        clean = [{k: v for k, v in row.items() if k != "step"} for row in self.evaluations]
        seconds = sum(row["seconds"] for row in self.folder.rows("metrics.jsonl"))
        result = {
            "run": str(path), "status": "interrupted" if interrupted else "finished", "reason": run.stop,
            "steps": run.step, "tokens": run.tokens, "seconds": round(self.seconds, 2),
            "training_seconds": round(seconds, 2), "peak_memory": run.cluster.peak_memory(),
            "before": clean[0] if clean else {}, "after": clean[-1] if clean else {},
            "best_step": run.best[1] if run.best else None,
            "model": None if interrupted else str(path / "model"), "report": str(path / "report.html"),
        }  # fmt: skip
        if run.cluster.main:
            self.folder.write("result.json", result)
        return result


def run(recipe: Recipe, display: Display | None = None) -> dict[str, Any]:
    """Train as a recipe says; everything lands in one new run folder.

    Args:
        recipe: a checked recipe.
        display: what to say meanwhile; None says nothing.

    Returns:
        The result: where everything lies, steps, tokens, seconds, and the evaluations before and after.

    Raises:
        HoneError: data, model or arithmetic went wrong; the message says where and what to do.
    """
    cluster = Cluster(recipe.device, recipe.precision, recipe.sharding)
    folder = RunFolder.create(recipe.out, recipe.name) if cluster.main else RunFolder(Path(recipe.out or "."))
    if cluster.main:
        folder.write("recipe.yaml", dump(recipe))
    cluster.barrier()
    return _go(recipe, folder, cluster, display or Display(False))


def resume(path: str | Path, display: Display | None = None) -> dict[str, Any]:
    """Go on with a run from its last good checkpoint, to the same bytes as if it had never stopped.

    Args:
        path: the run folder.
        display: what to say meanwhile; None says nothing.

    Raises:
        HoneError: there is no such run, or it has no whole checkpoint.
    """
    folder = RunFolder.open(path)
    display = display or Display(False)
    if (result := folder.json("result.json")) and result.get("status") == "finished":
        display.say(f"{folder.path} is finished already")
        return result
    recipe = Recipe.load(folder.path / "recipe.yaml")
    return _go(recipe, folder, Cluster(recipe.device, recipe.precision, recipe.sharding), display)


def _go(recipe: Recipe, folder: RunFolder, cluster: Cluster, display: Display) -> dict[str, Any]:
    from hone.evidence.report import write_report

    listen()
    stages = recipe.staged()
    results: list[dict[str, Any]] = []
    for index, stage in enumerate(stages):
        own = folder if len(stages) == 1 else RunFolder(folder.path / f"stage-{index + 1}")
        own.path.mkdir(exist_ok=True)
        if (result := own.json("result.json")) and result["status"] == "finished":
            results.append(result)
            continue
        if results:
            stage.model = results[-1]["model"]
        if len(stages) > 1:
            display.say(f"stage {index + 1} of {len(stages)}: {stage.name}", style="bold")
            own.write("recipe.yaml", dump(stage))
        results.append(_stage(stage, own, cluster, display))
        if cluster.main:
            write_report(own.path)
        if results[-1]["status"] != "finished":
            break
    if len(stages) == 1:
        return results[0]
    return _combine(results, folder, len(stages), cluster)


def _stage(recipe: Recipe, folder: RunFolder, cluster: Cluster, display: Display) -> dict[str, Any]:
    bench = assemble(recipe, cluster, display)
    model = describe_model(bench)
    display.say(
        f"{model['parameters']:,} parameters, {model['trained']:,} trained "
        f"({100 * model['trained'] / model['parameters']:.1f}%), on {cluster.describe()}"
    )
    stage = Stage(bench, folder, display)
    if stage.checkpoints.steps():
        step, state, skipped = stage.checkpoints.last_good()
        for trouble in skipped:
            display.say(f"note: {trouble}; using step {step}", style="yellow")
        bench.run.restore(state)
        stage.saved = step
        if cluster.main:
            folder.rewind(step)
        display.say(f"going on from step {step} of {bench.run.total}")
    elif cluster.main:
        folder.rewind(-1)
        opened = {"train": bench.data, "eval": bench.eval_data}
        data = {split: {"text": data.describe(), **data.record()} for split, data in opened.items()}
        folder.write("manifest.json", manifest(recipe, cluster.describe(), data, model))
    return stage.train()


def _combine(results: list[dict[str, Any]], folder: RunFolder, count: int, cluster: Cluster) -> dict[str, Any]:
    """Return the result of a staged run; its `model` is that of the last stage."""
    last = results[-1]
    finished = len(results) == count and last["status"] == "finished"
    combined = {
        **last, "run": str(folder.path), "status": "finished" if finished else "interrupted",
        "before": results[0]["before"], "steps": sum(r["steps"] for r in results),
        "tokens": sum(r["tokens"] for r in results), "seconds": round(sum(r["seconds"] for r in results), 2),
        "stages": results,
    }  # fmt: skip
    if finished and cluster.main:
        if not (folder.path / "model").exists():
            with staged(folder.path / "model") as staging:
                shutil.copytree(last["model"], staging, dirs_exist_ok=True)
        combined["model"] = str(folder.path / "model")
    if cluster.main:
        folder.write("result.json", combined)
    return combined


def require_finished(folder: RunFolder) -> dict[str, Any]:
    """Return the result of a finished run.

    Raises:
        HoneError: the run has no saved model yet.
    """
    result = folder.json("result.json")
    if result.get("status") != "finished":
        raise HoneError(f"{folder.path} has no finished model yet; go on with: hone resume {folder.path}")
    return result
