"""What one does with a finished run of a denoiser: draw arrays, and evaluate again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from hone.diffusion.denoiser import Denoiser
from hone.diffusion.drawing import draw, same_noise
from hone.diffusion.judge import ArrayJudges, judge
from hone.diffusion.opened import open_arrays
from hone.diffusion.pictures import picture
from hone.engine.assemble import evaluation_data
from hone.engine.devices import Cluster
from hone.engine.loop import Run
from hone.files import write_whole
from hone.modes import evaluating
from hone.options import build_part
from hone.recipe import Recipe


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
    """
    cluster = Cluster()
    model = Denoiser.load(folder, device=cluster.device)
    objective = None if recipe is None else ready(recipe, model, folder)
    drawing = model if objective is None else objective.drawn_by(model)
    solvers = [build_part("solver", "heun")] if recipe is None else recipe.build("solvers")
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
    objective.setup(Run(recipe, cluster, model, objective, loader=None, total=0))
    judges = ArrayJudges(opened, recipe.build("solvers"), recipe.build("distances"))
    return judge(model, objective, recipe, cluster, judges).row()
