"""What one does with a finished run of a denoiser: draw arrays, and evaluate again."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from hone.diffusion.denoiser import Denoiser
from hone.diffusion.drawing import draw, same_noise
from hone.diffusion.items import Item
from hone.diffusion.judge import ArrayJudges, judge
from hone.diffusion.opened import open_arrays
from hone.diffusion.pictures import picture
from hone.engine.assemble import evaluation_data
from hone.engine.checkpoint import Checkpoints
from hone.engine.devices import Cluster
from hone.engine.folder import RunFolder, stage_folders
from hone.engine.loop import Player, Run
from hone.errors import ModelError
from hone.files import write_whole
from hone.modes import evaluating
from hone.options import build_part
from hone.recipe import Recipe

log = logging.getLogger("hone")


def ready(recipe: Recipe, model: Denoiser, folder: Path) -> Any:
    """Return a run's objective, with what it has put beside the network read from the run.

    Args:
        recipe: of the run's last stage.
        model: the run's denoiser.
        folder: where it was saved.
    """
    objective = recipe.build("objective")
    objective.equip(model)
    model.load_extras(folder)
    return objective


def bare_solver(model: Denoiser, folder: Path) -> Any:
    """Return what draws from a model folder, which does not say what its run draws with; a note says what was taken.

    Args:
        model: the denoiser in it.
        folder: where it lies.

    Raises:
        ModelError: only its run knows how to draw from it.
    """
    if model.widened:
        raise ModelError(
            f"the denoiser in '{folder}' is shown more numbers beside the noise level, which only the objective of its "
            "run knows; draw from the run: hone sample RUN"
        )
    name = "multistep" if model.parameterisation.kind == "consistency" else "heun"
    log.warning(
        "a model folder does not say what its run draws with: %s is taken, as for %s. For a model of few steps name "
        "its run: hone sample RUN", name, "a consistency model" if name == "multistep" else "any denoiser",
    )  # fmt: skip
    return build_part("solver", name)


def sample_arrays(path: Path, folder: Path, recipe: Recipe | None, count: int, seed: int) -> list[dict[str, Any]]:
    """Draw arrays with a trained denoiser, and write them beside the run as pictures and tensors.

    Args:
        path: a run folder or a model folder.
        folder: the model folder.
        recipe: of the run's last stage, None for a model folder.
        count: how many arrays.
        seed: of the noise.

    Returns:
        For each solver of the recipe, what was written.

    Raises:
        ModelError: a model folder alone does not say how to draw from this model.
    """
    cluster = Cluster()
    model = Denoiser.load(folder, device=cluster.device)
    objective = None if recipe is None else ready(recipe, model, folder)
    drawing = model if objective is None else objective.drawn_by(model)
    solvers = [bare_solver(model, folder)] if recipe is None else recipe.build("solvers")
    source = labels = real = None
    if recipe is not None:
        source, split = evaluation_data(recipe)
        held_out = open_arrays(source, split).trees  # type: ignore[arg-type]
        labels, real = held_out.labels, held_out.arrays
    number = 1
    while (target := path / f"drawn-{number}").exists():
        number += 1
    target.mkdir(parents=True)
    rows = []
    for solver in solvers:
        with evaluating(model), same_noise(seed):
            if source is not None:
                solver.prepare(drawing, source)
            arrays, calls = draw(drawing, solver, count, labels, seed)
        name = f"{getattr(solver, 'name', 'solver')}-{calls}"
        write_whole(target / f"{name}.png", picture(arrays, real))
        save_file({"arrays": arrays.cpu().contiguous()}, target / f"{name}.safetensors")
        rows.append({
            "prompt": f"{count} arrays by {getattr(solver, 'name', 'solver')}, {calls} evaluations of the network each",
            "answers": [f"{target / name}.png", f"{target / name}.safetensors"],
        })  # fmt: skip
    return rows


def evaluate_arrays(folder: Path, recipe: Recipe) -> dict[str, float]:
    """Evaluate a finished run's denoiser.

    Args:
        folder: its model folder.
        recipe: of the run's last stage, with what shall be different.
    """
    cluster = Cluster(recipe.device, recipe.precision)
    model = Denoiser.load(folder, device=cluster.device, dtype=cluster.dtype)
    objective = ready(recipe, model, folder)
    source, split = evaluation_data(recipe)
    opened = open_arrays(source, split)  # type: ignore[arg-type]
    run = Run(recipe, cluster, model, objective, loader=None, total=0)
    objective.setup(run)
    if objective.measured:
        bring_to_the_end(run, folder, opened.first(2))
    judges = ArrayJudges(opened, recipe.build("solvers"), recipe.build("distances"))
    return judge(model, objective, recipe, cluster, judges).row()


def bring_to_the_end(run: Run, folder: Path, trees: Sequence[Item]) -> None:
    """Let an objective that is set up for evaluation be what it was in the last step of its run.

    Its curriculum stands where it stood then. What it had learned beside the model, such as a running mean or the
    teacher of a later student, is that of the last checkpoint; a note says so where that cannot be had.

    Args:
        run: what evaluates; its step and total become those of the last step.
        folder: the model folder of the finished run.
        trees: some arrays, as those of the last step.
    """
    recipe, objective = run.recipe, run.objective
    stages = stage_folders(folder.parent)
    own = RunFolder(stages[-1] if stages else folder.parent)
    if recipe.steps is None:
        data: Any = recipe.build("data")
        loader = open_arrays(data).loader(recipe.batch_tokens, recipe.seed, recipe.epochs)
        run.total = loader.total_steps(recipe.epochs or 1.0)
    else:
        run.total = recipe.steps
    last = own.json("result.json").get("steps", run.total)  # a run may have stopped before its end
    if objective.state_dict():
        checkpoints = Checkpoints(own.path / "checkpoints", keep=1)
        if not recipe.build("adapter").saves_base:
            trouble = "it belongs to a model with an adapter, which is merged now"
        elif not checkpoints.steps():
            trouble = f"{checkpoints.folder} is gone"
        else:
            trouble, (_, state, _) = "", checkpoints.last_good()
            objective.load_state_dict(state["objective"])
        if trouble:
            log.warning(
                "the loss may differ from the run's own: what the objective keeps begins anew, since %s", trouble
            )
    optimizer = recipe.build("optimizer").build(list(run.model.named_parameters()), {})
    run.players["model"] = Player([], optimizer, recipe.build("schedule").factor)  # an objective may reset it
    run.step, run.total = max(0, last - 1), max(run.total, last)
    objective.before_step(run, trees)
