"""Consistency training against its published step written out plainly: steps per second, on one network and data.

    python bench/ct.py [--rounds 3] [--steps 51] [--out FILE]

Network: the U-shaped one of 48 channels on three levels, 64 random images of 1 x 32 x 32 a step, float32, Adam at 1e-4.
Sides: `ict` and `ect` (a step of hone's loop and one of the published training step as a loop of its own, in turn),
`scm` (in hone's loop: a step with a forward derivative and a plain denoising step, in turn), `kernels` (the share of an
iCT step that is spent in convolutions and matrix products, from torch's profiler). Two programs take turns step by
step in one process: in processes of their own, minutes apart, the drift of a machine's speed, 10%, drowned what there
was to see. The ratio is that of a whole run: medians over the pairs of each of its eighths, which are ECT's stages, and
their mean; hone's ECT leaves out work in the first two.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCH, SIDE, CHANNELS, WARM, PARTS = 64, 32, 48, 3, 8


def denoiser(kind: str = "consistency") -> Any:
    """Return the denoiser that all sides train."""
    import torch

    from hone.diffusion.denoiser import Denoiser
    from hone.diffusion.levels import Parameterisation
    from hone.diffusion.networks import UNet

    torch.manual_seed(0)
    plan, shape = UNet(channels=CHANNELS, levels=3), (1, SIDE, SIDE)
    return Denoiser(plan.build(shape, 0), Parameterisation(kind), shape, built=plan.record())  # type: ignore[arg-type]


def images() -> Any:
    """Return the images that all sides train on."""
    import torch

    return 0.5 * torch.randn(10 * BATCH, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


def hone_step(steps: int, objective: dict[str, Any], kind: str = "consistency") -> Callable[[], Any]:
    """Return a step of hone's own loop, of a run that begins when the first steps have warmed up."""
    from hone.engine.loop import Trainer

    run = hone_run(steps - WARM, objective, kind)
    trainer, calls = Trainer(run), itertools.count()

    def step() -> None:
        if next(calls) == WARM:
            run.step = 0
        trainer.train_step(next(run.loader))

    return step


def hone_run(steps: int, objective: dict[str, Any], kind: str) -> Any:
    """Return a run of hone's, ready to step."""
    from hone import options
    from hone.data.loader import Loader
    from hone.diffusion.items import Collection
    from hone.engine.devices import Cluster
    from hone.engine.loop import Player, Run
    from hone.recipe import Recipe

    recipe = Recipe.of(
        model="denoiser", data="digits", objective=objective, steps=steps, batch_tokens=BATCH, clip=None,
        optimizer={"name": "adamw", "lr": 1e-4, "weight_decay": 0.0}, schedule="constant",
    )  # fmt: skip
    model, part = denoiser(kind), options.build_part("objective", objective)
    part.equip(model)
    trees: Any = Collection(images())
    run = Run(recipe, Cluster("cpu", "float32"), model, part, Loader(trees, batch_tokens=BATCH, seed=0), steps)
    params = list(model.named_parameters())
    run.players["model"] = Player(params, recipe.build("optimizer").build(params, {}), lambda step, total: 1.0)
    part.setup(run)
    return run


def plain_step(kind: str) -> Callable[[], Any]:
    """Return the published step of iCT or ECT, written out as a script would."""
    import torch

    model, data = denoiser(), images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    c = 0.00054 * math.sqrt(SIDE * SIDE)
    ramp = torch.linspace(0, 1, 11)
    grid = (0.002 ** (1 / 7) + ramp * (80 ** (1 / 7) - 0.002 ** (1 / 7))) ** 7
    edges = torch.erf((grid.log() + 1.1) / (math.sqrt(2) * 2.0))
    chances = edges.diff()
    state = {"step": 0}

    def step() -> None:
        begin = (state["step"] * BATCH) % len(data)
        state["step"] += 1
        y = data[begin : begin + BATCH]
        if kind == "ict":
            place = torch.multinomial(chances, BATCH, replacement=True)
            t, r = grid[place + 1], grid[place]
        else:
            t = (torch.randn(BATCH) * 2.0 - 1.1).exp()
            r = (t * (1 - 0.5 * (1 + 8 * torch.sigmoid(-t)))).clamp(min=0)
        z = torch.randn_like(y)
        random = torch.get_rng_state()
        guess = model(y + t[:, None, None, None] * z, t)
        torch.set_rng_state(random)
        with torch.no_grad():
            aim = model(y + r[:, None, None, None] * z, r)
            aim = torch.where((r > 0)[:, None, None, None], aim.nan_to_num(), y)
        squared = (guess - aim).square().flatten(1).sum(1)
        distance = (squared + c**2).sqrt() - c if kind == "ict" else squared.sqrt()
        loss = (distance / (t - r)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def kernels_side(steps: int) -> dict[str, float]:
    """Return the share of an iCT step that its convolutions and matrix products take."""
    from torch.profiler import ProfilerActivity, profile

    from hone.engine.loop import Trainer

    run = hone_run(steps + 5, {"name": "ict"}, "consistency")
    trainer = Trainer(run)
    for _ in range(WARM):
        trainer.train_step(next(run.loader))
    with profile(activities=[ProfilerActivity.CPU]) as found:
        trainer.train_step(next(run.loader))
    events = found.key_averages()
    heavy = ("mkldnn_convolution", "convolution_backward", "aten::mm", "aten::bmm", "aten::addmm")
    inside = sum(e.self_cpu_time_total for e in events if any(name in e.key for name in heavy))
    return {"share_in_kernels": inside / sum(e.self_cpu_time_total for e in events)}


def in_turn(steps: int, ours: Callable[[], Any], other: Callable[[], Any]) -> dict[str, float]:
    """Return the median seconds of two steps that take turns, and how much longer the other's take over the run."""
    pairs = [(seconds(ours), seconds(other)) for _ in range(steps)][WARM:]
    first, second = (statistics.median(column) for column in zip(*pairs, strict=True))
    shares = [this / that for this, that in pairs]
    count = min(PARTS, len(shares))
    ends = [len(shares) * n // count for n in range(count + 1)]
    parts = [statistics.median(shares[begin:end]) for begin, end in itertools.pairwise(ends)]
    return {"seconds_per_step": first, "seconds_of_the_other": second, "ratio": 1 / statistics.mean(parts)}


def seconds(step: Callable[[], Any]) -> float:
    """Return how long a step takes."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def derivative_side(steps: int) -> dict[str, float]:
    """Run denoising steps and those of sCM in turn."""
    plain = hone_step(steps, {"name": "denoise"}, "trigflow")
    return in_turn(steps, plain, hone_step(steps, {"name": "scm"}, "trigflow"))


SIDES = {
    "ict": lambda steps: in_turn(steps, hone_step(steps, {"name": "ict"}), plain_step("ict")),
    "ect": lambda steps: in_turn(steps, hone_step(steps, {"name": "ect"}), plain_step("ect")),
    "scm": derivative_side,
    "kernels": kernels_side,
}  # fmt: skip


def ratios(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Return what the sides' figures come to."""
    return {
        "ict_speed_ratio": found["ict"]["ratio"], "ect_speed_ratio": found["ect"]["ratio"],
        "derivative_cost": found["scm"]["ratio"], "share_in_kernels": found["kernels"]["share_in_kernels"],
    }  # fmt: skip


if __name__ == "__main__":
    from side_by_side import compare

    compare(Path(__file__), __doc__, SIDES, 51, ratios)
