"""One stage of a run: training to the end or to a stop, evaluating, saving, in a folder of its own."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from typing import Any

from hone.engine import sharding
from hone.engine.assemble import Bench
from hone.engine.checkpoint import Checkpoints, read_state
from hone.engine.folder import RunFolder
from hone.engine.loop import INTERRUPTED, Run, Trainer
from hone.engine.progress import Display
from hone.engine.tracking import Trackers
from hone.errors import HoneError, NumericError

log = logging.getLogger("hone")
SAVE_AFTER = 600.0  # seconds between checkpoints of a run that names no number of steps: what a kill may cost
STILL = 5  # steps in a row without a gradient after which the run says so


@contextlib.contextmanager
def stopping_on_signals(run: Run) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into an orderly stop after the current step; a second SIGINT interrupts at once.

    Of several processes it does not: launchers pass on the SIGINT that the terminal has sent to all of them already.
    """

    def handle(number: int, _frame: object) -> None:
        if run.stop and number == signal.SIGINT and run.cluster.world == 1:
            raise KeyboardInterrupt
        run.stop = run.stop or f"{INTERRUPTED} by {signal.Signals(number).name}"  # a run that ends anyway does so

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
        self.start: list[float] | None = None  # rank of the evaluation before the first step
        self.saved = -1
        self.saved_at = time.monotonic()
        self.still = 0  # latest steps in a row whose gradient was exactly 0
        self.told_still = False

    def train(self) -> dict[str, Any]:
        """Train to the end, or to a stop; return the result."""
        try:
            return self._train()
        finally:
            self.run.loader.close()
            self.trackers.close()
            for penalty in self.run.penalties:
                penalty.close()

    def _train(self) -> dict[str, Any]:
        run = self.run
        began = time.perf_counter()
        if self.saved < 0:
            self.display.start("evaluating before training", None)
            self._evaluate()
        else:  # resumed
            self.seconds = sum(row["seconds"] for row in self.folder.rows("metrics.jsonl"))
            self.evaluations = list(self.folder.rows("evaluations.jsonl"))
        for callback in run.callbacks:
            callback.on_start(run)
        self.display.start("training", run.total, run.step)
        with stopping_on_signals(run):
            while run.step < run.total and not run.cluster.agree(run.stop):
                self._step()
            run.stop = run.cluster.agree(run.stop)  # a signal may have reached one process only
            self.display.stop()
            self._checkpoint()  # in here, so that a second SIGTERM, as launchers pass on, does not cut it off
        if not run.interrupted:
            self._finish()
        run.cluster.barrier()
        self.seconds += time.perf_counter() - began
        return self._result()

    def _finish(self) -> None:
        """Choose the final weights, evaluate them and save the model."""
        run = self.run
        if run.recipe.final == "best" and run.best is not None:
            if self.start is not None and self.start <= run.best[0]:
                self.display.say("no evaluation was better than the one before the first step: lr may be too high")
            if run.best[1] != run.step:
                self._take_best()
        for callback in run.callbacks:
            callback.on_end(run)
        self._evaluate()
        sharding.gather(run.model, keep=run.cluster.main)
        run.cluster.on_main(lambda: self.bench.save(self.folder.path / "model"))

    def _step(self) -> None:
        run, recipe = self.run, self.run.recipe
        began = time.perf_counter()
        try:
            trees = next(run.loader, None)
        except HoneError:  # e.g. a reward that failed: what has been learned is kept, and the run can go on
            run.loader.rewind()
            self._checkpoint()
            raise
        waited = time.perf_counter() - began
        if trees is None:
            run.stop = run.stop or "the data ended"
            return
        try:
            row = self.trainer.train_step(trees)
        except HoneError as error:
            if not self.trainer.moved:
                run.loader.rewind()  # to the state before the step: no optimizer has moved
                self._checkpoint()
            if not isinstance(error, NumericError):
                raise
            kept = "The weights were not touched and the last good state is saved."
            raise NumericError(f"{error} {self._half_done() if self.trainer.moved else kept}") from error
        row = {**row, **run.loader.figures(), "seconds": round(row["seconds"] + waited, 4)}
        for callback in run.callbacks:
            callback.on_step(run, row)
        if run.cluster.main:
            self.folder.append("metrics.jsonl", row)
            self.trackers.log(row, run.step)
        self._look_for_a_gradient(row)
        speed = row["tokens"] / row["seconds"] if row["seconds"] else 0.0
        self.display.update(run.step, f"loss {row.get('loss', float('nan')):.3f}  {speed:,.0f} {run.unit}/s")
        last = run.step == run.total  # evaluated in the end anyway, but here as one of those to choose from
        choosing = recipe.final == "best" or any(callback.chooses for callback in run.callbacks)
        if recipe.eval_every and (choosing if last else run.step % recipe.eval_every == 0):
            self._evaluate()
        if self._due():
            self._checkpoint()

    def _look_for_a_gradient(self, row: dict[str, Any]) -> None:
        """Say once when several steps in a row taught nothing: their loss may look like success."""
        self.still = self.still + 1 if row.get("grad_norm") == 0 else 0
        if self.still == STILL and not self.told_still:
            self.told_still = True
            log.warning(
                "step %d: the gradient was exactly 0 in the last %d steps, so nothing was learned from them; where "
                "answers are rewarded, all answers to a prompt earned the same: ask easier prompts, draw more answers, "
                "or take a reward that tells them apart", self.run.step, STILL,
            )  # fmt: skip

    def _due(self) -> bool:
        """Return whether the state is to be saved now; the main process's clock counts."""
        every = self.run.recipe.checkpoint_every
        if every is not None:
            return self.run.step % every == 0
        return self.run.cluster.from_main(time.monotonic() - self.saved_at > SAVE_AFTER)

    def _half_done(self) -> str:
        """Return what to say of a step that broke off when some weights had taken it: no state is before or after."""
        where = f"from step {self.saved}, the last one saved" if self.saved >= 0 else "from the start, as none is saved"
        return f"Some weights had taken this step, which is lost: hone resume begins {where}."

    def _evaluate(self) -> None:
        run = self.run
        try:
            found = self.bench.evaluate(self.display)
        except NumericError as error:
            told = "a smaller optimizer.lr, more schedule.warmup or a smaller clip may help" if run.step else ""
            raise NumericError(f"evaluating after step {run.step}: {error}{told and '; '}{told}") from error
        row = {"step": run.step, **found.row()}
        if self.evaluations and self.evaluations[-1]["step"] == run.step:  # now for the weights that are kept
            self.evaluations.pop()
            if run.cluster.main:
                self.folder.forget(run.step)
        for callback in run.callbacks:
            callback.on_eval(run, row)
        if run.cluster.main and len(row) > 1:
            self.folder.append("evaluations.jsonl", row)
            for answer in found.answers:
                self.folder.append("samples.jsonl", {"step": run.step, **answer})
            self._keep(found.drawn)
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in row.items() if name != "step")
            self.display.say(f"step {run.step}: held-out {numbers}")
            self.trackers.log({f"eval/{k}": v for k, v in row.items() if k != "step"}, run.step)
        self.evaluations.append(row)
        rank = found.rank()
        if run.step == 0:
            self.start = rank
        if rank is not None and run.step > 0 and (run.best is None or rank < run.best[0]):
            run.best = (rank, run.step)
            if run.recipe.final == "best":
                self._checkpoint()

    def _keep(self, drawn: dict[str, Any]) -> None:
        """Write drawn arrays of this step as pictures."""
        if not drawn:
            return
        from hone.diffusion.pictures import picture

        held_out: Any = self.bench.eval_data.trees
        for name, arrays in drawn.items():
            self.folder.write(f"samples/{name}-step-{self.run.step:06d}.png", picture(arrays, held_out.arrays))

    def _checkpoint(self) -> None:
        """Save the state of this step, unless it is saved already; all processes call it together."""
        run = self.run
        if self.saved == run.step:
            return
        self.saved, self.saved_at = run.step, time.monotonic()
        state = run.state(keep=run.cluster.main)
        run.cluster.on_main(lambda: self.checkpoints.save(run.step, state, run.best[1] if run.best else None))

    def _take_best(self) -> None:
        """Go back to the weights of the best evaluation, for the model that is saved."""
        run = self.run
        if run.best is None:
            return
        run.cluster.barrier()
        state = read_state(self.checkpoints.path(run.best[1]))
        run.take_weights(state)
        self.display.say(f"taking the weights of step {run.best[1]}, the best evaluation")

    def _result(self) -> dict[str, Any]:
        run, path = self.run, self.folder.path
        clean = [{k: v for k, v in row.items() if k != "step"} for row in self.evaluations]
        rows = list(self.folder.rows("metrics.jsonl"))
        seconds = sum(row["seconds"] for row in rows)
        result = {
            "run": str(path), "status": "interrupted" if run.interrupted else "finished", "reason": run.stop,
            "steps": run.step, "tokens": run.tokens, "seconds": round(self.seconds, 2),
            "training_seconds": round(seconds, 2), "setup_seconds": round(self.bench.setup_seconds, 3),
            "peak_memory": run.cluster.peak_memory(), "still_steps": sum(row.get("grad_norm") == 0 for row in rows),
            "before": clean[0] if clean else {}, "after": clean[-1] if clean else {},
            "best_step": run.best[1] if run.best else None,
            "model": None if run.interrupted else str(path / "model"), "report": str(path / "report.html"),
        }  # fmt: skip
        if run.cluster.main:
            self.folder.write("result.json", result)
        return result
