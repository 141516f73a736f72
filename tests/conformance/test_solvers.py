"""Every solver: samples of the right shape, the same ones for the same noise, and the evaluations that it reports."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from hone.data.arrays import Points
from hone.diffusion.denoiser import Denoiser
from hone.diffusion.drawing import draw
from hone.diffusion.levels import Parameterisation
from hone.diffusion.networks import MLP
from hone.errors import ModelError
from hone.objectives.trajectory import Jumps
from hone.options import Places, build_part, check_part
from hone.parts import catalogue

COUNT = 24
HEUN: dict[str, Any] = {"name": "heun", "steps": 6}
GUIDED = {"name": "ddim", "steps": 6, "guidance": 2.0}
# Options to test beside the defaults, and those that a solver needs or that keep it small; SMALL is a saved denoiser.
NEEDED: dict[str, dict[str, Any]] = {
    "t-stitch": {"small": "SMALL", "of": HEUN},
    "autodiffusion": {"of": {"name": "ddim", "steps": 3}, "grid": 12, "batch": 16, "population": 4, "generations": 2},
    "adaptive-guidance": {"of": GUIDED},
    "linear-guidance": {"of": GUIDED, "fit": 16},
    "noise-search": {"of": HEUN},
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "ddim": [{"eta": 1.0, "steps": 5, "schedule": "trig"}, {"guidance": 3.0, "schedule": "flow"}],
    "heun": [{"churn": 20.0, "steps": 5}, {"guidance": 2.0}],
    "dpm-solver": [{"order": 1}, {"order": 3, "guidance": 2.0}],
    "dpm-solver-pp": [{"order": 3, "steps": 5}],
    "multistep": [{"steps": 3}, {"steps": 2, "between": [1.0], "guidance": 2.0}],
    "gamma": [{"steps": 3, "gamma": 0.5}, {"steps": 2, "guidance": 2.0}],
    "edict": [{"steps": 4, "alternate": False, "guidance": 2.0}],
    "time-shift": [{"with_data": True, "window": 200, "cutoff": 0}],
    "t-stitch": [{"share": 1.0, "of": GUIDED}],
    "autodiffusion": [{"distance": "frechet", "of": {"name": "dpm-solver-pp", "steps": 4, "guidance": 2.0}}],
    "linear-guidance": [{"of": {**HEUN, "guidance": 2.0}, "every": 3, "second_half": "class"}],
    "adaptive-guidance": [{"of": {**HEUN, "guidance": 2.0}, "threshold": 0.5}],
    "noise-search": [
        {"algorithm": "zero-order", "verifier": "classifier", "of": {"name": "multistep", "steps": 2}, "rounds": 2},
        {"algorithm": "paths", "verifier": "nearest", "of": GUIDED},
    ],
}
NAMES = [record.name for record in catalogue() if record.kind == "solver"]
CASES = [(name, options) for name in NAMES for options in ({}, *VARIANTS.get(name, []))]
every_solver = pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n} {o}" if o else n for n, o in CASES])


class Seen(Denoiser):
    """A tiny denoiser that counts the arrays that it is shown."""

    rows = 0

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, extras: Tensor | None = None) -> Tensor:
        self.rows += len(x)
        return super().forward(x, sigma, labels, extras)


def data() -> Points:
    return Points(density="ring", count=200, holdout=40, conditional=True)


def make(kind: type[Denoiser] = Seen, seed: int = 0, extras: int = 0) -> Any:
    torch.manual_seed(seed)
    plan = MLP(width=8, depth=2)
    made = kind(
        plan.build((2,), 8), Parameterisation("edm", 0.7, 0.01), (2,), classes=8, sigma_max=10.0, built=plan.record()
    )
    made.widen(extras)
    made.double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("small")
    make(Denoiser, seed=1).save(folder)
    return str(folder)


def spec(name: str, options: dict[str, Any], small: str) -> dict[str, Any]:
    found = {"name": name, **NEEDED.get(name, {}), **options}
    return {key: small if value == "SMALL" else value for key, value in found.items()}


def ready(name: str, options: dict[str, Any], small: str) -> tuple[Any, Any, Seen]:
    """Return a solver, what it was prepared to draw from, and the denoiser in it."""
    jumps = name == "gamma"  # shows where a jump leads to
    solver, model = build_part("solver", spec(name, options, small)), make(extras=int(jumps))
    drawing = Jumps(model) if jumps else model
    solver.prepare(drawing, data())
    model.rows = 0
    return solver, drawing, model


def noise() -> Tensor:
    return torch.randn(COUNT, 2, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


@every_solver
def test_its_options_pass_the_check(name, options, small):
    assert check_part("solver", spec(name, options, small), "solvers.0", Places()) == []


@every_solver
@pytest.mark.parametrize("labelled", [True, False])
def test_samples_and_counts(name, options, labelled, small, monkeypatch):
    if options.get("verifier") == "classifier" and not labelled:
        pytest.skip("a classifier of no class in particular takes the likeliest")
    solver, drawing, model = ready(name, options, small)
    loaded: list[Any] = []
    read = Denoiser.load
    monkeypatch.setattr(Denoiser, "load", lambda *given, **more: loaded.append(read(*given, **more)) or loaded[-1])
    labels = torch.arange(COUNT) % 8 if labelled else None
    made, calls = solver.sample(drawing, noise(), labels, torch.Generator().manual_seed(1))
    assert made.shape == (COUNT, 2) and made.dtype == torch.float64 and not made.requires_grad
    assert bool(torch.isfinite(made).all())
    if name == "t-stitch":
        assert len(loaded) == 1 and model.rows < calls * COUNT
    else:
        assert calls == math.ceil(model.rows / COUNT)


@every_solver
def test_the_same_noise_gives_the_same_samples(name, options, small):
    labels, found = torch.arange(COUNT) % 8, []
    for seed in (0, 99):
        solver, model, _ = ready(name, options, small)
        torch.manual_seed(seed)  # nothing may depend on torch's own generator
        found.append(solver.sample(model, noise(), labels, torch.Generator().manual_seed(1)))
        again = solver.sample(model, noise(), labels, torch.Generator().manual_seed(1))  # nor on what it has drawn
        assert torch.equal(again[0], found[-1][0]) and again[1] == found[-1][1]
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


@every_solver
def test_it_draws_as_evaluation_does(name, options, small):
    solver, model, _ = ready(name, options, small)
    made, calls = draw(model, solver, 30, data().collection("eval").labels, seed=3)
    assert made.shape == (30, 2) and calls >= 1 and bool(torch.isfinite(made).all())


def test_solvers_inside_others_must_go_level_by_level(small):
    for name in ("t-stitch", "autodiffusion", "adaptive-guidance", "linear-guidance"):
        given = {**spec(name, {}, small), "of": {"name": "gamma", "steps": 2}}
        problems = check_part("solver", given, "solvers.0", Places())
        assert {problem.field for problem in problems} == {"solvers.0.of"}
    wrong = {"name": "noise-search", "algorithm": "paths", "back": 0.5, "of": "multistep"}
    assert {p.field for p in check_part("solver", wrong, "s", Places())} == {"s.of", "s.back"}


@pytest.mark.parametrize("name", ["heun", "ddim", "multistep"])
def test_a_model_that_is_shown_more_is_not_drawn_from_without(name):
    with pytest.raises(ModelError, match="trained with 1 more number beside the noise level"):
        draw(make(extras=1), build_part("solver", name), 4, data().collection("eval").labels)


def test_gamma_says_what_it_draws_from():
    with pytest.raises(ModelError, match="follows the jumps of a trajectory model, which the objectives ctm and"):
        draw(make(), build_part("solver", {"name": "gamma", "steps": 2}), 4)


def test_a_small_denoiser_that_is_shown_more_is_refused(tmp_path):
    make(Denoiser, extras=2).save(tmp_path)
    solver = build_part("solver", {"name": "t-stitch", "small": str(tmp_path), "of": HEUN})
    with pytest.raises(ModelError, match=r"trained with 2 more numbers.*no small denoiser of t-stitch"):
        draw(make(), solver, 4)


def test_a_small_denoiser_must_exist():
    problems = check_part("solver", {"name": "t-stitch", "small": "nowhere"}, "s", Places())
    assert [problem.field for problem in problems] == ["s.small"]


@every_solver
def test_guidance_without_classes_is_refused(name, options, small):
    if options.get("verifier") == "classifier":
        pytest.skip("a classifier says itself that it needs classes")
    solver, drawing, _ = ready(name, options, small)
    guided = "guidance" in str(spec(name, options, small)).replace(f"'{name}'", "")
    for labels in (None, torch.full((9,), -1)):
        if guided:
            with pytest.raises(ModelError, match=r"guidance: [23] leads to a class, and there are none here"):
                draw(drawing, solver, 9, labels)
        else:
            assert draw(drawing, solver, 9, labels)[0].shape == (9, 2)


def test_variants_name_solvers():
    assert {*VARIANTS, *NEEDED} <= set(NAMES)
