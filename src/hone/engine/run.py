"""From a recipe to a finished run folder: its stages one after the other, from the start or from where they stopped."""

from __future__ import annotations

import contextlib
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from hone import parts
from hone.engine.assemble import assemble, describe_model
from hone.engine.checkpoint import SUMS, staged
from hone.engine.devices import Cluster
from hone.engine.folder import RunFolder
from hone.engine.manifest import manifest
from hone.engine.progress import Display, listen, log
from hone.engine.stage import Stage
from hone.errors import CheckpointError, HoneError
from hone.evidence.report import write_report
from hone.recipe import Recipe, dump

# Settings that a run may go on with when they have changed: how long it is, what is looked at and kept, where it runs.
CHANGEABLE = (
    "steps", "epochs", "eval_every", "eval_samples", "max_new_tokens", "sampler", "metrics", "solvers", "distances",
    "checkpoint_every", "keep", "final", "trackers", "device", "sharding", "recompute", "micro_tokens", "packing",
)  # fmt: skip


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
    with contextlib.ExitStack() as held:

        def create() -> str:
            folder = RunFolder.create(recipe.out, recipe.name)
            held.callback(folder.release)
            folder.write("recipe.yaml", dump(recipe if recipe.stages else recipe.staged()[0]))
            return str(folder.path)

        folder = RunFolder(Path(cluster.from_main(cluster.on_main(create) or "")))
        try:
            return _go(recipe, folder, cluster, display or Display(False))
        except (HoneError, KeyboardInterrupt):
            if cluster.main and not list(folder.path.rglob("manifest.json")):  # there is nothing to keep yet
                shutil.rmtree(folder.path, ignore_errors=True)
            raise


def resume(path: str | Path, display: Display | None = None) -> dict[str, Any]:
    """Go on with a run from its last good checkpoint, to the same bytes as if it had never stopped.

    Args:
        path: the run folder.
        display: what to say meanwhile; None says nothing.

    Raises:
        HoneError: there is no such run, it has no whole checkpoint, or another process trains in it.
    """
    folder = RunFolder.open(path)
    recipe = Recipe.load(folder.path / "recipe.yaml")
    cluster = Cluster(recipe.device, recipe.precision, recipe.sharding)
    display = display or Display(False)
    if (result := folder.json("result.json")) and result.get("status") == "finished":
        if cluster.main:
            display.say(f"{folder.path} is finished already")
        return result
    try:
        cluster.on_main(folder.hold)
        return _go(recipe, folder, cluster, display)
    finally:
        folder.release()


def _go(recipe: Recipe, folder: RunFolder, cluster: Cluster, display: Display) -> dict[str, Any]:
    listen()
    if not cluster.main:
        display = Display(False)
        log.setLevel(logging.ERROR)
    stages = stages_of(recipe, folder)
    results: list[dict[str, Any]] = []
    for index, stage in enumerate(stages):
        own = folder if len(stages) == 1 else RunFolder(folder.path / f"stage-{index + 1}")
        if cluster.main:
            own.path.mkdir(exist_ok=True)
        if (result := own.json("result.json")) and result["status"] == "finished":
            results.append(result)
            continue
        if len(stages) > 1:
            display.say(f"stage {index + 1} of {len(stages)}: {stage.name}", style="bold")
            if cluster.main:
                own.write("recipe.yaml", dump(stage))
        results.append(_stage(stage, own, cluster, display))
        if cluster.main:
            write_report(own.path)
        if results[-1]["status"] != "finished":
            break
    result = results[0] if len(stages) == 1 else _combine(results, stages, folder, cluster)
    cluster.barrier()  # a launcher ends all processes when one exits with a failure, which a stopped run counts as
    return result


def stages_of(recipe: Recipe, folder: RunFolder) -> list[Recipe]:
    """Return the stages of a run as they are run: each knows the model that it starts from.

    Args:
        recipe: the whole run's.
        folder: the run folder, in which stages find each other's results.
    """
    made = recipe.staged()
    for index, given in enumerate(recipe.stages):
        stage = made[index]
        if "model" not in given and index:
            stage.model = f"stage:{index}"
        if stage.model == "stage:0":
            stage.model = recipe.model
        made[index] = stage.referring(partial(_model_of, recipe, folder))
    return made


def _model_of(recipe: Recipe, folder: RunFolder, number: int) -> str:
    """Return the model that a stage has made, for stage 0 the one that the run starts from."""
    return str(folder.path / f"stage-{number}" / "model" if number else getattr(recipe.build("model"), "path", ""))


def _stage(recipe: Recipe, folder: RunFolder, cluster: Cluster, display: Display) -> dict[str, Any]:
    bench = assemble(recipe, cluster, display)
    model = describe_model(bench)
    display.say(
        f"{model['parameters']:,} parameters, {model['trained']:,} trained "
        f"({100 * model['trained'] / model['parameters']:.1f}%), on {cluster.describe()}"
    )
    opened = {"train": bench.data, "eval": bench.eval_data}
    if bench.general_data is not None:
        opened["general"] = bench.general_data
    data = {split: {"text": data.describe(), **data.record()} for split, data in opened.items()}
    record = manifest(recipe, cluster.describe(), data, model)
    stage = Stage(bench, folder, display)
    found = _last_checkpoint(stage)
    _check_unchanged(folder, record)
    if found is not None:
        step, state, skipped = found
        changed = _changed_settings(folder, record, step)
        for line in changed:
            display.say(f"note: since this run began, {line}", style="yellow")
        if changed and cluster.main:
            begun = folder.json("manifest.json")
            more = [{"step": step, "changed": line} for line in changed]
            folder.write(
                "manifest.json", {**begun, "recipe": record["recipe"], "changes": begun.get("changes", []) + more}
            )
        for trouble in skipped:
            display.say(f"note: {trouble}; using step {step}", style="yellow")
        bench.run.restore(state)
        stage.saved = step
        if cluster.main:
            folder.rewind(step)
        display.say(f"going on from step {step} of {bench.run.total}")
    elif cluster.main:
        if (folder.path / "manifest.json").exists():
            _start_again(folder, display)
        folder.write("manifest.json", record)
    return stage.train()


def _start_again(folder: RunFolder, display: Display) -> None:
    """Keep the logs of a run that left no checkpoint, and say that it begins anew."""
    aside = folder.set_aside()
    kept = f"; its logs so far are kept as {', '.join(aside)}" if aside else ""
    display.say(f"note: {folder.path} has no checkpoint yet, so it starts again from step 0{kept}", style="yellow")


def _check_unchanged(folder: RunFolder, record: dict[str, Any]) -> None:
    """Refuse to go on with other data or another starting model than a run began with; a new run began with any.

    Raises:
        CheckpointError: names what has changed.
    """
    begun = folder.json("manifest.json")
    pairs = [(f"the {split} data", ("data", split, "fingerprint")) for split in ("train", "eval", "general")]
    for what, path in [*pairs, ("the starting model", ("model", "sha256"))]:
        old: Any = begun
        new: Any = record
        for key in path:
            old, new = (old or {}).get(key), (new or {}).get(key)
        if old is not None and old != new:
            raise CheckpointError(
                f"{folder.path}: {what} has changed since this run began, so it cannot go on to the same result. Put "
                "it back as it was, or start a new run"
            )


def _changed_settings(folder: RunFolder, record: dict[str, Any], step: int) -> list[str]:
    """Return in words which settings have changed since a run began, of those that it can go on with.

    Raises:
        CheckpointError: names one that the state of the run rests on, or a length that lies behind it.
    """
    begun, now = folder.json("manifest.json").get("recipe") or {}, record["recipe"]
    changed = [name for name in begun if name in now and begun[name] != now[name]]
    for name in changed:
        said = f"'{name}' was {begun[name]!r} when it began and is {now[name]!r} now"
        if name not in CHANGEABLE:
            raise CheckpointError(
                f"{folder.path / 'recipe.yaml'}: this run cannot go on to the same result: {said}. Put it back, or "
                "start a new run"
            )
        if name == "steps" and (now[name] or step) < step:
            raise CheckpointError(f"{folder.path / 'recipe.yaml'}: {said}, and this run has taken {step} steps already")
    return [f"'{name}' became {now[name]!r} in place of {begun[name]!r}" for name in changed]


def _last_checkpoint(stage: Stage) -> tuple[int, dict[str, Any], list[str]] | None:
    """Return what `Checkpoints.last_good` does, or None when the stage begins.

    Raises:
        HoneError: no checkpoint is whole, or the processes do not find the same one.
    """
    cluster = stage.run.cluster
    found = stage.checkpoints.last_good() if stage.checkpoints.steps() else None
    step = found[0] if found else 0
    main_step = cluster.from_main(step)
    trouble = (
        f"{stage.folder.path}: process {cluster.rank} finds the checkpoint of step {step} there, the first process "
        f"that of step {main_step}; the run folder must lie where all machines see it"
    )
    if said := cluster.agree(trouble if step != main_step else ""):
        raise HoneError(said)
    return found


def _before(results: list[dict[str, Any]], stages: list[Recipe]) -> dict[str, Any]:
    """Return the figures before a staged run, of the last stage where those of the first are not of the same thing."""
    first, last = results[0]["before"], results[-1]["before"]
    data = [stage.eval_data or stage.data for stage in stages[: len(results)]]
    if any(one != data[0] for one in data):
        same = "general_loss" in first and "general_loss" in last
        same = same and stages[0].general_data == stages[len(results) - 1].general_data
        return {**last, **({"general_loss": first["general_loss"]} if same else {})}  # forgetting is that of all stages
    alike = all(stage.objective == stages[0].objective for stage in stages[: len(results)])
    return {
        name: first.get(name, value) if alike or name == "general_loss" or parts.find("metric", name) else value
        for name, value in last.items()
    }


def _combine(
    results: list[dict[str, Any]], stages: list[Recipe], folder: RunFolder, cluster: Cluster
) -> dict[str, Any]:
    """Return the result of a staged run; its `model` is that of the last stage."""
    last, count = results[-1], len(stages)
    finished = len(results) == count and last["status"] == "finished"
    combined = {
        **last, "run": str(folder.path), "report": str(folder.path / "report.html"),
        "status": "finished" if finished else "interrupted",
        "before": _before(results, stages), "steps": sum(r["steps"] for r in results),
        "tokens": sum(r["tokens"] for r in results), "seconds": round(sum(r["seconds"] for r in results), 2),
        "stages": results,
    }  # fmt: skip
    if finished and cluster.main:
        if not (folder.path / "model").exists():
            with staged(folder.path / "model") as staging:
                shutil.copytree(folder.path / f"stage-{count}" / "model", staging, dirs_exist_ok=True,
                                ignore=shutil.ignore_patterns(SUMS))  # fmt: skip  # the copy's are written anew
        combined["model"] = str(folder.path / "model")
    for key in ("training_seconds", "setup_seconds"):
        combined[key] = round(sum(r[key] for r in results), 3)
    combined["still_steps"] = sum(r.get("still_steps", 0) for r in results)  # older stages lack it
    combined["peak_memory"] = max(r["peak_memory"] for r in results)
    if cluster.main:
        folder.write("result.json", combined)
        write_report(folder.path)
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


def last_stage(path: Path) -> Recipe:
    """Return the recipe of the last stage of a finished run; what it names may be gone since.

    Args:
        path: the run folder.

    Raises:
        HoneError: it is no run folder, or the run has no saved model yet.
    """
    folder = RunFolder.open(path)
    require_finished(folder)
    return stages_of(Recipe.kept(folder.path / "recipe.yaml"), folder)[-1]
