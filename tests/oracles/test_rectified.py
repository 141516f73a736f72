"""Rectified flow against straight couplings, plain two-step samples and the exact flow; low-rank one-step students."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from hone.adapters.lora import LoRA
from hone.data.arrays import Points
from hone.diffusion.denoiser import Denoiser
from hone.diffusion.items import Batch
from hone.diffusion.levels import Parameterisation
from hone.diffusion.networks import DiT, UNet
from hone.diffusion.spatial import edges, high_pass
from hone.errors import ModelError
from hone.objectives.rectified import AnnealedReflow, FlowGuided, HighFrequency, Reflow, velocity_error
from hone.solvers.guidance import LinearGuidance
from hone.solvers.ode import DDIM
from oracles.known import Known, noise
from oracles.small_denoisers import as_run, points, tiny

TOP = 20.0


def batch_of(count: int = 8, shape: tuple[int, ...] = (2,)) -> Batch:
    none = torch.full((count,), -1)
    return Batch(torch.zeros(count, *shape, dtype=torch.float64), none, none)


def given(objective, made, start, progress: float = 0.0):
    """Give an objective its pairs."""
    objective._noise, objective._clean, objective.pairs = start, made, len(start)
    objective._teacher, objective._progress = Known(), progress
    return objective


class Straight(Known):
    """The denoiser of the coupling y = 0.7 z, whose lines are straight."""

    def forward(self, x, sigma, labels=None):
        sigma = sigma.reshape(-1, 1)
        return 0.7 * x / (0.7 + sigma * (1 - 0.7 / TOP))


@pytest.mark.parametrize("times", ["even", "start"])
def test_a_straight_coupling_has_no_loss_at_its_velocity(times):
    start = noise(30)
    objective = given(Reflow(teacher="truth", times=times), 0.7 * start, start)
    torch.manual_seed(0)
    assert float(objective.loss(Straight(), batch_of())[0]) < 1e-24
    assert float(objective.loss(Known(), batch_of())[0]) > 1e-3
    one_step = Straight()(TOP * start, torch.tensor(TOP).double())
    torch.testing.assert_close(one_step, 0.7 * start)  # as it is drawn


def test_solvers_that_prepare_make_pairs_too():
    source = Points(density="ring", count=64, holdout=8, conditional=True)
    run = as_run(tiny("flow", classes=source.classes), points(4))
    run.recipe.build = lambda name: source
    solver = LinearGuidance(of=DDIM(steps=4, guidance=2.0), fit=8)
    objective = Reflow(teacher="truth", pairs=16, solver=solver)
    objective.setup(run)
    assert objective._clean.shape == (16, 2) and objective._clean.isfinite().all()


def test_the_loss_is_that_of_flow_matching_between_the_pairs():
    start, made = noise(8), noise(8, 1)
    objective = given(Reflow(teacher="truth"), made, start)
    torch.manual_seed(5)
    which = (torch.rand(8, dtype=torch.float64) * 8).long()
    low, high = 0.01 / 1.01, TOP / (1 + TOP)
    time = low + (high - low) * torch.rand(8, dtype=torch.float64)
    torch.manual_seed(5)
    found = float(objective.loss(Known(), batch_of())[0])
    clean, far = made[which], start[which] - made[which] / TOP
    state = (1 - time[:, None]) * clean + time[:, None] * far
    sigma = time / (1 - time)
    guess = Known()(state / (1 - time[:, None]), sigma)
    velocity = (state - guess) / time[:, None]
    assert found == pytest.approx(float((velocity - (far - clean)).square().mean(1).sum()))
    torch.testing.assert_close(velocity_error(guess, clean, sigma), (velocity - (far - clean)).square().mean(1))


def test_pairs_are_what_the_flow_leads_to_and_the_same_each_time():
    source = Points(density="mixture", size=2, modes=3, count=100, conditional=True)
    truth = source.truth()
    model = SimpleNamespace(
        shape=(2,), classes=3, sigma_min=0.01, sigma_max=TOP, sigma_data=truth.deviation(),
        parameters=lambda: iter([torch.zeros(1, dtype=torch.float64)]),
    )  # fmt: skip
    run = SimpleNamespace(model=model, recipe=SimpleNamespace(seed=3, build=lambda field: source))
    first, second = Reflow(teacher="truth", pairs=50), Reflow(teacher="truth", pairs=50)
    for objective in (first, second):
        objective.setup(run)
    assert torch.equal(first._clean, second._clean)
    exact = truth.flow(TOP * first._noise, TOP, 0.0, labels=first._labels)
    assert float((first._clean - exact).abs().median()) < 0.01  # 18 levels of Heun's method


def test_fresh_noise_gives_way_to_that_of_the_pairs():
    shares = {}
    for kind in ("linear", "cosine", "exp"):
        objective = AnnealedReflow(teacher="truth", warmup=0.5, anneal=kind)
        found = []
        for objective._progress in (0.0, 0.25, 0.5, 1.0):
            found.append(objective.fresh())
        shares[kind] = found
    assert shares["linear"] == [1.0, 0.5, 0.0, 0.0]
    assert shares["cosine"] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    assert shares["exp"] == pytest.approx([1.0, math.exp(-0.5), math.exp(-1), math.exp(-2)])
    objective = given(AnnealedReflow(teacher="truth"), noise(4000), noise(4000, 1), 0.2)
    mixed = objective.noise(batch_of(4000), objective._noise)
    assert float(mixed.std()) == pytest.approx(1.0, abs=0.03)
    share = float((mixed * objective._noise).mean())
    assert share == pytest.approx(math.sqrt(1 - 0.6**2), abs=0.03)
    start = noise(30)
    straight = given(AnnealedReflow(teacher="truth"), 0.7 * start, start, 0.5)  # now the pairs are as they are
    assert float(straight.loss(Straight(), batch_of())[0]) < 1e-24


@pytest.mark.parametrize("lead", ["teacher", "student"])
def test_online_targets_are_two_steps_of_euler_s_method_in_the_time_of_the_flow(lead):
    start = noise(8)
    objective = given(FlowGuided(teacher="truth", lead=lead), 0.7 * start, start)
    torch.manual_seed(2)
    torch.rand(8, dtype=torch.float64)  # the pairs
    fresh = torch.randn(8, 2, dtype=torch.float64)
    middle = (0.2 + 0.6 * torch.rand(8, dtype=torch.float64))[:, None]
    torch.manual_seed(2)
    found = float(objective.loss(Straight(), batch_of())[0])
    top = TOP / (1 + TOP)
    state = (1 - top) * TOP * fresh
    leader = Known() if lead == "teacher" else Straight()
    speed = (state - leader(state / (1 - top), torch.tensor(TOP).double())) / top
    between = state + (middle - top) * speed
    guess = Known()(between / (1 - middle), (middle / (1 - middle))[:, 0])
    end = between - middle * (between - guess) / middle
    student = Straight()(TOP * fresh, torch.tensor(TOP).double())
    assert found == pytest.approx(float(((student - end) / top).square().mean(1).sum()))


@pytest.mark.parametrize(("top", "reach"), [(TOP, 4.0), (2.0, 8 / 7)])
def test_the_level_between_two_steps_lies_below_the_largest(top, reach):
    seen: list[torch.Tensor] = []
    start = noise(400)
    objective = given(FlowGuided(teacher="truth"), 0.7 * start, start)
    objective.taught = lambda x, sigma, labels: seen.append(sigma) or x
    student = Straight()
    student.sigma_max = top
    objective.loss(student, batch_of(400))
    assert 0.9 * reach < float(seen[1].max()) < reach


def test_a_teacher_without_error_is_its_own_one_step_student_where_its_flow_is_straight():
    start = noise(8)
    objective = given(FlowGuided(teacher="truth"), 0.7 * start, start)
    objective._teacher = Straight()
    objective._teacher.guided = lambda x, sigma, labels, guidance: Straight()(x, sigma)
    assert float(objective.loss(Straight(), batch_of())[0]) < 1e-24


def test_high_frequencies_weigh_more():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    made = torch.randn(3, 1, 8, 8, generator=generator, dtype=torch.float64)
    objective = given(HighFrequency(teacher="truth", highs=5.0, edges=2.0), made, start)

    def model(x, sigma, labels):
        return 0.1 * x

    model.sigma_max = TOP
    torch.manual_seed(1)
    which = (torch.rand(4, dtype=torch.float64) * 3).long()
    torch.manual_seed(1)
    loss, metrics = objective.loss(model, batch_of(4, (1, 8, 8)))
    guess, clean = 0.1 * TOP * start[which], made[which]
    sharp = (high_pass(guess, 0.5) - high_pass(clean, 0.5)).square().mean((1, 2, 3))
    steep = (edges(guess) - edges(clean)).square().mean((1, 2, 3))
    plain = (guess - clean).square().mean((1, 2, 3)) + 5 * sharp + 2 * steep
    torch.testing.assert_close(loss, plain.sum())
    torch.testing.assert_close(metrics["high_frequencies"], sharp.sum())
    with pytest.raises(ModelError, match=r"objective\.highs"):
        HighFrequency(teacher="truth").setup(SimpleNamespace(model=SimpleNamespace(shape=(2,))))


@pytest.mark.parametrize(("plan", "options"), [
    (UNet(channels=16), {"targets": "all", "exclude": ["enter", "leave"]}), (UNet(channels=16), {}),
    (DiT(width=32, depth=2), {"rank": 4}),
])  # fmt: skip
def test_low_rank_adapters_go_around_a_denoiser_s_network_and_are_saved_with_it(plan, options, tmp_path):
    torch.manual_seed(0)
    made = Denoiser(
        plan.build((1, 8, 8), 3), Parameterisation("edm", 0.5), (1, 8, 8), classes=3, built=plan.record()
    )  # fmt: skip
    adapter = LoRA(**options)
    adapter.attach(made.hf)
    share = sum(p.numel() for p in made.parameters() if p.requires_grad) / sum(p.numel() for p in made.parameters())
    assert 0 < share < 0.35
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    made.save_merged(tmp_path, adapter)
    x, sigma, labels = torch.randn(4, 1, 8, 8), torch.full((4,), 2.0), torch.tensor([0, 1, 2, -1])
    with torch.no_grad():
        torch.testing.assert_close(
            Denoiser.load(tmp_path)(x, sigma, labels), made(x, sigma, labels), rtol=1e-4, atol=1e-5
        )
