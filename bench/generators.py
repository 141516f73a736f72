"""Few-step generators side by side: one teacher, one budget of operations, five seeds; writes a table and pictures.

    python bench/generators.py [--task points] [--seeds 5] [--jobs 2] [--only "METHOD;METHOD"] [--out FOLDER]

Tasks. "points": eight narrow Gaussians on a ring, whose density is known; the teacher is an MLP of width 64 and depth 3
that is trained for 10,000 steps of 256 points. "digits": scikit-learn's 8 x 8 digits; the teacher is an MLP of
width 256 and depth 3 that is trained for 10,000 steps of 128 images. (A UNet of 16 channels needs 4,000 steps, 6 min of
a core, for a Fréchet distance of 1.7, of which an eighth leaves 134 steps of CD.)

There is a teacher for each seed. Methods that tune or distil start from it and may spend 1/8 of the operations that its
training took, their own teacher's and critics' passes and what they prepare included; methods without a teacher may
spend 9/8, as much as the others in all. Operations are counted by torch at two lengths of run, which tells what a step
costs from what preparing costs. The learning rate of each method is the best of three (two for NitroFusion), chosen
with another seed and its own teacher by the geometric mean of the distances below.

D@n is the distance of what n evaluations of the network draw. For points it is the sliced 2-Wasserstein distance of
20,000 from 60,000 of the density itself, and "floor" is what 20,000 of the density come to. For digits it is the
squared Fréchet distance of 5,000 images from all 1,797, in the features of the classifier that ships, and "floor" is
what the 400 held-out digits are from those trained on. The ratio is to the teacher's own with 35 evaluations (Heun's
method). It is a bench, not a test: an hour or more on two cores. Runs that have finished are read.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from generator_rows import NEED_PAIRS, ONE_AND_TWO, Method, average, methods

SHARE, TUNING_SEED = 1 / 8, 1000
TRUE = 60_000  # points of the density itself
COMMON: dict[str, Any] = {
    "name": "generators", "objective": "denoise", "eval_samples": 0, "schedule": {"name": "cosine", "warmup": 0.02},
    "distances": [],
}  # fmt: skip


@dataclass(frozen=True)
class Ground:
    """What is drawn, by which network.

    Args:
        network: the denoiser's.
        data: the arrays.
        batch: arrays in a step.
        steps: that a teacher is trained for.
        pairs: of noise and array that a teacher draws for those who need them, part of their budget.
        drawn: arrays that are drawn to be measured.
        measure: distance of drawn arrays from the truth.
        floor: what real arrays come to.
        unit: a distance is shown as a multiple of its inverse.
        what: the distance, for the table.
    """

    network: dict[str, Any]
    data: dict[str, Any]
    batch: int
    steps: int
    pairs: int
    drawn: int
    measure: Callable[[Any], float]
    floor: Callable[[], float]
    unit: int
    what: str


@dataclass(frozen=True)
class Task:
    """One run.

    Args:
        method: what is trained, None for the teacher.
        seed: of everything.
        rate: learning rate.
        steps: optimizer steps.
        folder: where the runs of this seed are.
        ground: what is drawn.
    """

    method: Method | None
    seed: int
    rate: float
    steps: int
    folder: Path
    ground: Ground

    @property
    def run(self) -> Path:
        """Its folder."""
        if self.method is None:
            return self.folder / "teacher"
        label = "".join(c if c.isalnum() else "-" for c in self.method.label)
        return self.folder / f"{label}-{self.rate:g}-{self.steps}"

    def recipe(self) -> dict[str, Any]:
        """Return the recipe's fields."""
        ground = self.ground
        fields = {
            **COMMON, "data": ground.data, "batch_tokens": ground.batch,
            "seed": self.seed, "steps": self.steps, "out": str(self.run),
            "optimizer": {"name": "adamw", "lr": self.rate}, **average(0.99 if self.method else 0.999),
        }  # fmt: skip
        if self.method is None:
            fields["model"] = {"name": "denoiser", "network": ground.network}
            fields["solvers"] = [{"name": "heun", "steps": 18}, *ONE_AND_TWO]
        else:
            objective = dict(self.method.objective)
            if objective["name"] in NEED_PAIRS:
                objective["pairs"] = ground.pairs
            if self.method.taught:
                objective["teacher"] = str(self.folder / "teacher")
            teacher = {"name": "denoiser", "path": str(self.folder / "teacher")}
            fields["model"] = {"name": "denoiser", "network": ground.network} if self.method.scratch else teacher
            fields |= {"objective": objective, "solvers": list(self.method.solvers)}
            fields["optimizer"] |= self.method.adam
            fields |= {"adapter": self.method.adapter} if self.method.adapter else {}
        return fields


def train(task: Task) -> dict[str, Any]:
    """Train, and return the distances of what is drawn by "D@evaluations", or why the run stopped."""
    import torch

    from hone.engine.run import run
    from hone.errors import HoneError
    from hone.recipe import Recipe

    torch.set_num_threads(1)
    kept = task.run / "distances.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    shutil.rmtree(task.run, ignore_errors=True)
    recipe = Recipe.of(**task.recipe())
    began = time.perf_counter()
    try:
        run(recipe)
    except HoneError as error:  # a method that diverges is a result of this bench too
        return {"error": str(error)}
    draw(task, recipe)
    distances = {f"D@{calls}": task.ground.measure(arrays) for calls, arrays in drawn(task).items()}
    found = {**distances, "seconds": time.perf_counter() - began}
    kept.write_text(json.dumps(found))
    return found


def operations(task: Task) -> int:
    """Return the operations of a whole run."""
    import torch

    from hone.engine.flops import counting
    from hone.engine.run import run
    from hone.recipe import Recipe

    torch.set_num_threads(1)
    shutil.rmtree(task.run, ignore_errors=True)
    with counting() as counter:
        run(Recipe.of(**task.recipe()))
    return counter.get_total_flops()


@cache
def true_points(count: int, seed: int) -> Any:
    """Return points of the density itself (count, 2)."""
    import torch

    from hone.options import build_part

    density = build_part("data", {"name": "points", "density": "ring"}).truth()
    return density.sample(count, torch.Generator().manual_seed(seed))[0]


def from_density(points: Any) -> float:
    """Return the sliced Wasserstein distance of points (N, 2) from those of the density."""
    from hone.options import build_part

    ruler = build_part("distance", {"name": "sliced-wasserstein", "directions": 64, "most": TRUE})
    return ruler(points, true_points(TRUE, 1))


def floor_of_points() -> float:
    """Return the mean distance of five samples of the density from another."""
    return statistics.fmean(from_density(true_points(POINTS.drawn, 2 + n)) for n in range(5))


@cache
def true_digits(split: str) -> Any:
    """Return the digits of a split, or of "all"."""
    import torch

    from hone.options import build_part

    if split == "all":
        return torch.cat([true_digits("train"), true_digits("eval")])
    return build_part("data", "digits").collection(split).arrays


def from_digits(images: Any) -> float:
    """Return the Fréchet distance of images (N, 1, 8, 8) from all digits."""
    from hone.options import build_part

    return build_part("distance", {"name": "digit-frechet", "most": DIGITS.drawn})(images, true_digits("all"))


def floor_of_digits() -> float:
    """Return the Fréchet distance of the held-out digits from those trained on."""
    from hone.options import build_part

    return build_part("distance", "digit-frechet")(true_digits("eval"), true_digits("train"))


POINTS = Ground(
    network={"name": "mlp", "width": 64, "depth": 3}, data={"name": "points", "density": "ring"}, batch=256,
    steps=10_000, pairs=5000, drawn=20_000, measure=from_density, floor=floor_of_points, unit=1000,
    what="sliced Wasserstein distance of points x 1000 (lower is nearer to the density)",
)  # fmt: skip
DIGITS = Ground(
    network={"name": "mlp", "width": 256, "depth": 3}, data={"name": "digits"}, batch=128,
    steps=10_000, pairs=2500, drawn=5000, measure=from_digits, floor=floor_of_digits, unit=1,
    what="squared Fréchet distance of digits in the shipped classifier's features (lower is nearer to the data)",
)  # fmt: skip
GROUNDS = {"points": POINTS, "digits": DIGITS}


def draw(task: Task, recipe: Any) -> None:
    """Draw points with a run's solvers, into its folder."""
    from hone.diffusion.use import sample_arrays

    sample_arrays(task.run, task.run / "model", recipe, task.ground.drawn, task.seed)


def drawn(task: Task) -> dict[int, Any]:
    """Return the points (N, 2) that a run has drawn by evaluations of the network, fewest first."""
    from safetensors.torch import load_file

    files = (task.run / "drawn-1").glob("*.safetensors")
    found = {int(file.stem.rsplit("-", 1)[1]): load_file(file)["arrays"] for file in files}
    return dict(sorted(found.items()))


def steps_within(method: Method, budget: float, folder: Path, ground: Ground, pool: Any) -> int:
    """Return the steps of a method that a budget of operations pays for.

    Args:
        method: the method.
        budget: operations.
        folder: where the teacher is.
        ground: what is drawn.
        pool: runs it.
    """
    short, long = 5, 15  # both whole rounds of critics that are trained several times between
    tasks = [Task(method, TUNING_SEED, 1e-5, n, folder, ground) for n in (short, long)]
    spent = pool.map(operations, tasks, chunksize=1)
    each = (spent[1] - spent[0]) / (long - short)
    return max(1, int((budget - (spent[0] - short * each)) / each))


def first_score(row: dict[str, Any]) -> float:
    """Return the distance with fewest evaluations, infinite where the run failed."""
    found = {int(key.removeprefix("D@")): value for key, value in row.items() if key.startswith("D@")}
    value = found[min(found)] if found else math.inf
    return value if math.isfinite(value) else math.inf


def mean_score(row: dict[str, Any]) -> float:
    """Return the geometric mean of a run's distances, infinite where it failed."""
    found = [value for key, value in row.items() if key.startswith("D@")]
    good = bool(found) and all(math.isfinite(value) and value > 0 for value in found)
    return statistics.geometric_mean(found) if good else math.inf


def main() -> None:
    """Run the bench and write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=GROUNDS, default="points")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="")
    parser.add_argument("--scratch", type=Path, default=Path("runs/generators"))
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    given = parser.parse_args()
    ground = GROUNDS[given.task]
    rows = [m for m in methods(ground is DIGITS) if not given.only or m.label in given.only.split(";")]
    seeds = range(given.seeds)
    homes = {seed: given.scratch.resolve() / given.task / str(seed) for seed in (TUNING_SEED, *seeds)}
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        teachers = dict(zip(homes, pool.map(
            train, [Task(None, seed, 1e-3, ground.steps, home, ground) for seed, home in homes.items()], chunksize=1
        ), strict=True))  # fmt: skip
        print("teachers", {s: round(r["D@35"], 4) for s, r in teachers.items()}, flush=True)
        home = homes[TUNING_SEED]
        probe = Method("teacher's own step", {"name": "denoise"}, False, scratch=True)
        each = 1e9 / steps_within(probe, 1e9, home, ground, pool)
        found = []
        for method in rows:
            budget = each * ground.steps * (1 + SHARE if method.scratch else SHARE)
            found.append(measure(method, budget, homes, ground, pool))
            ratio = [first_score(r) / teachers[s]["D@35"] for s, r in zip(seeds, found[-1]["runs"], strict=True)]
            shown = f"{statistics.fmean(ratio):.2f} x the teacher with fewest evaluations"
            print(method.label, found[-1]["steps"], "steps, lr", found[-1]["lr"], shown, flush=True)
    result = {"task": given.task, "teachers": [teachers[seed] for seed in seeds], "methods": found,
              "teacher_steps": ground.steps, "floor": ground.floor()}  # fmt: skip
    if given.only:
        keep_others(result, given.out)
    write(result, homes[0], given.out)


def keep_others(result: dict[str, Any], out: Path) -> None:
    """Add the rows of an earlier table over the same teachers that were not renewed."""
    file = out / f"{stem(result)}.json"
    earlier = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"teachers": None}
    pairs = [[row["D@35"] for row in found] for found in (earlier["teachers"] or [], result["teachers"])]
    # The same teacher on another machine differs in the sixth digit.
    if len(pairs[0]) == len(pairs[1]) and all(math.isclose(*pair, rel_tol=1e-3) for pair in zip(*pairs, strict=True)):
        renewed = {row["label"] for row in result["methods"]}
        result["methods"] += [row for row in earlier["methods"] if row["label"] not in renewed]


def stem(result: dict[str, Any]) -> str:
    """Return what a task's files are called."""
    return "generators" if result["task"] == "points" else f"generators-{result['task']}"


def measure(method: Method, budget: float, homes: dict[int, Path], ground: Ground, pool: Any) -> dict[str, Any]:
    """Choose a method's learning rate, train it with every seed, and return its row."""
    seeds = [seed for seed in homes if seed != TUNING_SEED]
    steps = steps_within(method, budget, homes[TUNING_SEED], ground, pool)
    rate, tried = method.rates[0], []
    if len(method.rates) > 1:
        home = homes[TUNING_SEED]
        tried = pool.map(train, [Task(method, TUNING_SEED, r, steps, home, ground) for r in method.rates], chunksize=1)
        rate = min(zip(method.rates, tried, strict=True), key=lambda pair: mean_score(pair[1]))[0]
    runs = pool.map(train, [Task(method, seed, rate, steps, homes[seed], ground) for seed in seeds], chunksize=1)
    return {"label": method.label, "objective": method.objective, "scratch": method.scratch, "steps": steps, "lr": rate,
            "tried": tried, "runs": runs}  # fmt: skip


def write(result: dict[str, Any], home: Path, out: Path) -> None:
    """Write the figures, the table, and a picture of what every method draws with fewest evaluations."""
    from hone.engine.manifest import machine, versions

    out.mkdir(parents=True, exist_ok=True)
    result |= {"machine": machine(), "versions": versions()}
    ground = GROUNDS[result["task"]]
    name = stem(result)
    (out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    own, alone = ([row[f"D@{calls}"] for row in result["teachers"]] for calls in (35, 1))
    ranked = sorted(result["methods"], key=lambda row: statistics.fmean(first_score(r) for r in row["runs"]))
    times, best = ground.unit, statistics.fmean(own)
    lines = [
        "# Few-step generators side by side" + ("" if ground is POINTS else f": {result['task']}"), "",
        f"{len(own)} seeds; `python bench/generators.py --task {result['task']}` says how. D@n is the {ground.what} "
        "that n evaluations of the network draw, and in brackets is how many times the teacher's own distance with 35 "
        f"evaluations that is. The teacher's is {times * best:.3g}, and with one evaluation "
        f"{times * statistics.fmean(alone):.3g}; the floor is {times * result['floor']:.3g}. "
        "± is the standard error.", "",
        "| method | steps | lr | D@1 | D@2 |", "| --- | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for row in ranked:
        cells = [cell(row["runs"], own, count, times) for count in (1, 2)]
        mark = " (no teacher)" if row["scratch"] else ""
        lines.append(f"| {row['label']}{mark} | {row['steps']:,} | {row['lr']:g} | {' | '.join(cells)} |")
    failed = [row["label"] for row in ranked if any("error" in run for run in row["runs"])]
    lines += ["", f"Stopped before their end in some seed: {', '.join(failed)}." if failed else "No run was stopped."]
    lines += ["", f"![What each method draws with fewest evaluations, seed 0]({name}.png)", ""]
    (out / f"{name}.md").write_text("\n".join(lines), encoding="utf-8")
    draw_all(ranked, home, out / f"{name}.png", ground)


def cell(runs: list[dict[str, Any]], own: list[float], count: int, unit: int) -> str:
    """Return mean, standard error, and ratio to the teacher's of D@count."""
    pairs = [(r[f"D@{count}"], t) for r, t in zip(runs, own, strict=True) if f"D@{count}" in r]
    if not pairs:
        return ""
    values = [unit * value for value, _ in pairs]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    ratio = statistics.fmean(v for v, _ in pairs) / statistics.fmean(t for _, t in pairs)
    return f"{statistics.fmean(values):.3g} ± {error:.2g} ({ratio:.2f})"


def draw_all(ranked: list[dict[str, Any]], home: Path, file: Path, ground: Ground) -> None:
    """Draw a sheet of pictures, the teacher's with 35 evaluations first, then the methods as in the table."""
    import io

    from PIL import Image, ImageDraw

    from hone.diffusion.pictures import picture

    def fewest(task: Task) -> Any:
        return next(iter(drawn(task).values()))[:shown_each]

    known = {method.label: method for method in methods(ground is DIGITS)}
    shown_each = 2000 if ground is POINTS else 64
    real = drawn(Task(None, 0, 1e-3, ground.steps, home, ground))[35][:shown_each]
    shown = [("teacher, 35 evaluations", real)]
    for row in ranked:
        task = Task(known[row["label"]], 0, row["lr"], row["steps"], home, ground)
        if (task.run / "drawn-1").is_dir():
            shown.append((row["label"], fewest(task)))
    side, columns = 200, 6
    sheet = Image.new("L", (columns * side, -(-len(shown) // columns) * (side + 14)), 255)
    for place, (label, arrays) in enumerate(shown):
        corner = (place % columns * side, place // columns * (side + 14))
        made = Image.open(io.BytesIO(picture(arrays, real))).convert("L").resize((side, side))
        sheet.paste(made, (corner[0], corner[1] + 14))
        ImageDraw.Draw(sheet).text((corner[0] + 4, corner[1] + 2), label, fill=0)
    sheet.save(file)


if __name__ == "__main__":
    main()
