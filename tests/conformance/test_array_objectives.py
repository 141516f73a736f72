"""Every objective of arrays, in the real loop: splits into micro-batches exactly, resumes exactly, is deterministic."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hone.data.arrays import Points
from hone.data.loader import Loader
from hone.diffusion.denoiser import Denoiser
from hone.diffusion.levels import Parameterisation
from hone.diffusion.networks import MLP
from hone.diffusion.starts import Denoisers
from hone.engine.checkpoint import Checkpoints, read_state
from hone.engine.devices import Cluster
from hone.engine.loop import Player, Run, Trainer
from hone.objectives.base import Objective
from hone.options import build_part, hints
from hone.parts import catalogue, load
from hone.recipe import Recipe

# (objective, check) -> why it cannot hold for this objective.
EXCEPTIONS: dict[tuple[str, str], str] = {}
# Options to test beside the defaults, and those that an objective needs.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "denoise": [{"levels": "flow"}, {"levels": "trig-lognormal", "drop_labels": 0.5}],
    "ect": [{"huber": 0.03}],
    "cd": [{"guidance": 2.0}],
    "multistep-cd": [{"steps": 3, "schedule": "flow", "decay": 0.0}],
    "scm": [{"teacher": "truth"}, {"adaptive": False}],
    "slct": [{"transport": False}],
    "scott": [{"adversarial": 0.5}],
    "nct": [{"control": "amount"}],
    "dmd2": [{"student_steps": 3, "guidance": 2.0}, {"gan_weight": 0.0, "teacher": "truth"}],
    "f-distill": [{"divergence": "forward-kl"}],
    "uni-instruct": [{"divergence": "jensen-shannon"}, {"divergence": "pearson", "exact": True}],
    "smt": [{"gan_weight": 0.0}],
    "nfsd": [{"unwanted": 1}],
    "nitrofusion": [{"real": "data", "refresh": 0.3}],
    "ctm": [{"adversarial": 0.1, "distance": "huber"}, {"teacher": "truth", "adaptive": False, "hops": 2}],
    "progressive": [{"weight": "v", "schedule": "flow"}, {"plan": [4, 2], "teacher": "truth", "guidance": 2.0}],
    "soundctm": [{"distance": "squared", "least": 0.0}],
    "lightning": [{"plan": [4, 2, 1], "relax": 0.0}],
    "sfd": [{"analytic": False, "finer": 2}],
    "reflow": [{"times": "start"}, {"teacher": "truth"}],
    "annealed-reflow": [{"anneal": "cosine"}],
    "flow-guided": [{"lead": "student"}],
    "alignprop": [{"steps": 3, "truncation": "gaussian", "wanted": 0.5}],
    "ddpo": [{"steps": 3, "updates": 2, "reward": {"name": "within", "width": 0.5}}, {"steps": 3, "eta": 0.0}],
    "rlcm": [{"steps": 2, "updates": 2, "least": 2, "guidance": 2.0}],
    "prdp": [{"steps": 2, "each": 3, "updates": 2, "clip": None}, {"steps": 2, "eta": 0.0}],
    "rg-lcd": [{"proxy": False, "reward": "brightness"}],
    "mmd-ddm": [{"kernel": "cubic", "features": "classifier", "encoder_steps": 20}],
    "ddo": [{"rounds": 3, "drawn": 30}],
    "repa": [{"encoder": "patches"}],
}
NEEDED: dict[str, dict[str, Any]] = {
    "prodiff": {"ssim": 0.0}, "reconstruct": {"ssim": 0.0},  # points have no neighbours
    "hipa": {"highs": 0.0, "edges": 0.0, "pairs": 32},
    "reflow": {"pairs": 32}, "annealed-reflow": {"pairs": 32}, "flow-guided": {"pairs": 32},
    "ddo": {"drawn": 60}, "repa": {"encoder_steps": 20},
}  # fmt: skip
# The parameterisation that an objective needs its model to have, where it is not "consistency".
PARAMETERISATION: dict[str, str] = {
    "scm": "trigflow",
    "sana-sprint": "flow",
    "ctm": "edm",
    "soundctm": "edm",
    "progressive": "vp-v",
    "lightning": "vp-v",
    "prodiff": "x0",
    "reconstruct": "x0",
    "sfd": "edm",
    "sfd-v": "edm",
    "reflow": "flow",
    "annealed-reflow": "flow",
    "flow-guided": "flow",
    "hipa": "edm",
    "repa": "edm",
    "ddo": "edm",
}  # fmt: skip
BATCH, STEPS = 12, 3

NAMES = [r.name for r in catalogue() if r.kind == "objective" and load("objective", r.name).medium == "arrays"]
CASES = [(name, options) for name in NAMES for options in ({}, *VARIANTS.get(name, []))]
IDS = [name + "".join(f" {key}={value}" for key, value in options.items()) for name, options in CASES]
WHOLE: dict[str, dict[str, torch.Tensor]] = {}  # by case, the weights that a run in one piece ends with
every_objective = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


def data() -> Points:
    return Points(density="ring", count=200, holdout=40, conditional=True)


def make_denoiser(kind: str = "edm", seed: int = 0, width: int = 8) -> Denoiser:
    """Return a tiny denoiser in float64 whose output is not zero, the same one every time."""
    torch.manual_seed(seed)
    plan, source = MLP(width=width, depth=2), data()
    made = Denoiser(
        plan.build(source.shape, source.classes), Parameterisation(kind, 0.7, 0.01), source.shape,
        classes=source.classes, sigma_max=10.0, built=plan.record(),
    ).double()  # fmt: skip
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


@cache
def teacher_folder(base: Path) -> str:
    folder = base / "teacher"
    folder.mkdir()
    make_denoiser("edm", seed=1).save(folder)
    return str(folder)


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("teachers")


class Case:
    """Makes runs of one objective."""

    def __init__(self, name: str, options: dict[str, Any], teachers: Path) -> None:
        self.cls = load("objective", name)
        self.options = {**NEEDED.get(name, {}), **options}
        if "teacher" in hints(self.cls):
            self.options = {"teacher": teacher_folder(teachers), **self.options}
        self.kind = PARAMETERISATION.get(name, "consistency")
        self.key, self.defaults = f"{name} {options}", not options

    def whole(self) -> dict[str, torch.Tensor]:
        """Return the weights that a run in one piece ends with, which several checks compare theirs with."""
        if self.key not in WHOLE:
            run = self.run()
            train(run, STEPS)
            WHOLE[self.key] = weights(run)
        return WHOLE[self.key]

    def run(self, micro: int | None = None, steps: int = STEPS, precision: str = "float64") -> Run:
        """Return a run at its beginning."""
        cluster = Cluster("cpu", precision)
        objective: Objective = build_part("objective", {"name": self.cls.name, **self.options})
        model, source = make_denoiser(self.kind).to(cluster.dtype), data()
        recipe = Recipe.of(
            model="denoiser", data="points", objective="denoise", steps=steps, batch_tokens=BATCH,
            micro_tokens=micro, optimizer={"name": "adamw", "lr": 1e-3}, schedule="constant", precision=precision,
        )  # fmt: skip
        trees: Any = source.collection("train")
        objective.equip(model)
        torch.manual_seed(5)
        run = Run(recipe, cluster, model, objective, Loader(trees, batch_tokens=BATCH, seed=0), steps)
        params = list(model.named_parameters())
        run.players["model"] = Player(params, recipe.build("optimizer").build(params, {}), lambda step, total: 1.0)
        objective.setup(run)
        return run


@pytest.fixture
def case(request: pytest.FixtureRequest, name: str, options: dict[str, Any], teachers: Path) -> Case:
    check = request.function.__name__.removeprefix("test_")
    if (name, check) in EXCEPTIONS:
        pytest.skip(EXCEPTIONS[name, check])
    return Case(name, options, teachers)


def train(run: Run, steps: int) -> list[dict[str, Any]]:
    trainer = Trainer(run)
    rows = []
    for _ in range(steps):
        items: Any = next(run.loader)  # in float32, whatever the run's precision is
        rows.append(trainer.train_step(items))
    return rows


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {f"{who} {name}": p.detach().clone() for who, player in run.players.items() for name, p in player.params}


@every_objective
def test_moves_every_player_and_stays_finite(case):
    run = case.run()
    before = weights(run)
    rows = train(run, STEPS)
    after = weights(run)
    for player in run.players:
        assert any(not torch.equal(before[key], after[key]) for key in before if key.startswith(f"{player} "))
    assert all(torch.isfinite(value).all() for value in after.values())
    numbers = [v for row in rows for v in row.values() if isinstance(v, float)]
    assert np.isfinite(numbers).all()


@every_objective
def test_trains_in_bf16(case):
    run = case.run(precision="bf16")
    numbers = [value for row in train(run, 1) for value in row.values() if isinstance(value, float)]
    assert np.isfinite(numbers).all()
    assert all(value.dtype == torch.float32 and torch.isfinite(value).all() for value in weights(run).values())


@every_objective
@pytest.mark.parametrize("micro", [5, 1])
def test_any_split_into_micro_batches_gives_the_same_weights(case, micro):
    if micro == 1 and not case.defaults:
        pytest.skip("one array at a time is tried with the defaults")
    split = case.run(micro)
    train(split, STEPS)
    one, other = case.whole(), weights(split)
    assert one.keys() == other.keys()
    for name, value in one.items():  # Adam divides by the root of a mean square, which makes rounding larger
        torch.testing.assert_close(
            other[name], value, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}"
        )


@every_objective
def test_is_deterministic_and_resumes_exactly(case, tmp_path):
    begun = case.run()
    train(begun, 1)
    saved = Checkpoints(tmp_path, keep=1).save(1, begun.state())
    resumed = case.run()
    torch.manual_seed(99)  # nothing may depend on what the generator was left at
    resumed.restore(read_state(saved))
    train(resumed, STEPS - 1)
    one, other = case.whole(), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


@every_objective
def test_a_saved_model_draws_the_same(case, tmp_path):
    run = case.run()
    train(run, 1)
    (tmp_path / "model").mkdir()
    run.model.save(tmp_path / "model")
    run.model.save_extras(tmp_path / "model")
    again = Denoiser.load(tmp_path / "model", dtype=torch.float64)
    run.objective.equip(again)
    again.load_extras(tmp_path / "model")
    x, sigma = torch.randn(5, 2, dtype=torch.float64), torch.full((5,), 2.0, dtype=torch.float64)
    labels = torch.arange(5)
    first, second = run.objective.drawn_by(run.model), run.objective.drawn_by(again)
    with torch.no_grad():
        assert torch.equal(first(x, sigma, labels), second(x, sigma, labels))


def test_exceptions_and_variants_name_what_exists():
    checks = {key.removeprefix("test_") for key in globals() if key.startswith("test_")}
    assert all(name in NAMES and check in checks and reason for (name, check), reason in EXCEPTIONS.items())
    assert {*VARIANTS, *NEEDED, *PARAMETERISATION} <= set(NAMES)
    assert Denoisers.medium == "arrays"
