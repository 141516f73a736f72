"""Consistency objectives against closed forms: a Gaussian's flow map is known at every noise level."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hone.diffusion.critics import Critic
from hone.diffusion.denoiser import Denoiser
from hone.diffusion.items import Collection, collate
from hone.diffusion.levels import Parameterisation, from_trig_time, karras
from hone.diffusion.mixture import Mixture
from hone.diffusion.networks import MLP, DiT, UNet
from hone.errors import ModelError
from hone.objectives import noise_consistency
from hone.objectives.consistency import (
    ConsistencyTraining,
    EasyConsistencyTuning,
    ImprovedConsistencyTraining,
    lognormal_places,
    pseudo_huber,
)
from hone.objectives.consistency_distillation import ConsistencyDistillation, MultistepDistillation
from hone.objectives.continuous import ContinuousConsistency, SanaSprint, forward_derivative, tangent, trig_output
from hone.objectives.latent_consistency import RobustConsistencyTraining, cauchy, nearest_noise
from hone.objectives.noise_consistency import NoiseConsistency, quadrant
from hone.objectives.stochastic_consistency import StochasticDistillation
from hone.objectives.teachers import Truth
from hone.options import build_part
from oracles.small_denoisers import as_run, points, step_of, tiny

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
MEAN, SCALE, SIGMA_DATA = torch.tensor([0.3, -0.2], dtype=torch.float64), 0.6, 0.7


class FlowMap(nn.Module):
    """The exact map of a Gaussian's flow to no noise: m + s (x - m) / sqrt(s^2 + sigma^2)."""

    sigma_data, sigma_min, sigma_max, shape, classes = SIGMA_DATA, 0.01, 10.0, (2,), 0

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return MEAN + SCALE * (x - MEAN) / (SCALE**2 + sigma.reshape(-1, 1) ** 2).sqrt() + 0 * self.unused


def gaussian() -> Mixture:
    return Mixture(MEAN[None], torch.tensor([SCALE], dtype=torch.float64), torch.ones(1, dtype=torch.float64))


def batch(count: int = 64) -> Any:
    generator = torch.Generator().manual_seed(0)
    return collate(Collection(gaussian().sample(count, generator)[0])[:count])


def taught(objective: Any) -> Any:
    objective._teacher = Truth(gaussian(), FlowMap())  # type: ignore[arg-type]
    return objective


def test_distillation_loss_vanishes_at_the_exact_flow_map_with_the_order_of_heuns_step():
    losses = []
    for levels in (16, 31, 61):
        torch.manual_seed(1)
        objective = taught(ConsistencyDistillation(teacher="truth", levels=levels))
        losses.append(objective.loss(FlowMap(), batch())[0].item())
    assert losses[0] > losses[1] > losses[2] > 0
    # a step's error is of third order, its square of sixth; karras levels are not evenly refined near the ends
    assert losses[0] / losses[1] > 2**4.5 and losses[1] / losses[2] > 2**4.5


def test_eulers_step_has_a_lower_order():
    torch.manual_seed(1)
    heun = taught(ConsistencyDistillation(teacher="truth", levels=31)).loss(FlowMap(), batch())[0].item()
    torch.manual_seed(1)
    plain = taught(ConsistencyDistillation(teacher="truth", levels=31, step="euler"))
    euler = plain.loss(FlowMap(), batch())[0].item()
    assert euler > 10 * heun


class SegmentMap(FlowMap):
    """What leads in one step of first order from any level to the lower end of its segment on a Gaussian's flow."""

    def __init__(self, ends: Tensor) -> None:
        super().__init__()
        self.ends = ends

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        sigma = sigma.reshape(-1, 1)
        end = torch.stack([self.ends[self.ends < float(s) * (1 - 1e-9)].max() for s in sigma[:, 0]])[:, None]
        there = MEAN + (x - MEAN) * ((SCALE**2 + end**2) / (SCALE**2 + sigma**2)).sqrt()
        return (there - end / sigma * x) / (1 - end / sigma) + 0 * self.unused


@pytest.mark.parametrize(("steps", "schedule"), [(2, "trig"), (3, "flow")])
def test_distillation_in_segments_vanishes_at_the_exact_maps_to_their_ends(steps: int, schedule: Any):
    losses = []
    for levels in (12 * steps + 1, 24 * steps + 1, 48 * steps + 1):
        torch.manual_seed(1)
        objective = taught(MultistepDistillation(teacher="truth", levels=levels, steps=steps, schedule=schedule))
        exact = SegmentMap(objective.ends(FlowMap()))
        losses.append(objective.loss(exact, batch())[0].item())
        assert objective.loss(FlowMap(), batch())[0].item() > 100 * losses[-1]  # all the way down is not what is sought
    assert losses[0] / losses[1] > 2**4.5 and losses[1] / losses[2] > 2**4.5


def test_ddim_with_the_exact_maps_of_the_segments_draws_along_the_flow():
    objective = MultistepDistillation(teacher="truth", steps=3)
    noisy = 10 * torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    solver = build_part("solver", {"name": "ddim", "steps": 3, "schedule": "trig"})
    exact = SegmentMap(objective.ends(FlowMap()))
    drawn = solver.solve(lambda x, sigma: exact(x, sigma.expand(len(x))), noisy, solver.sigmas(exact), None)
    torch.testing.assert_close(drawn, FlowMap()(noisy, torch.full((64,), 10.0, dtype=torch.float64)))


def test_distillation_in_one_segment_is_consistency_distillation():
    losses = []
    for objective in (MultistepDistillation(teacher="truth", steps=1), ConsistencyDistillation(teacher="truth")):
        torch.manual_seed(1)
        losses.append(taught(objective).parts(denoiser(MLP(width=16, depth=2), (2,)), batch())[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=1e-12)


def test_no_level_of_a_grid_of_segments_is_beyond_the_end_that_it_stands_for():
    model = SimpleNamespace(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    for steps, levels in itertools.product((1, 2, 3, 7), (2, 9, 18, 50)):
        objective = MultistepDistillation(teacher="truth", steps=steps, levels=levels)
        grid, ends = objective.grid(model, levels), objective.ends(model)
        assert bool((grid.diff() > 0).all()) and set(ends[1:].tolist()) <= set(grid.tolist())
        assert float(grid[0]) == model.sigma_min and float(grid[-1]) == float(ends[-1])


def test_the_tangent_of_continuous_time_vanishes_at_the_exact_flow_map():
    model, data = FlowMap(), batch().arrays
    time = torch.linspace(0.02, 1.5, len(data), dtype=torch.float64)
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    scaled = time.cos()[:, None] * data + time.sin()[:, None] * SIGMA_DATA * noise
    sigma = from_trig_time(time, SIGMA_DATA)
    denoised = gaussian().denoise(scaled / time.cos()[:, None], sigma)
    velocity = (time.cos()[:, None] * scaled - denoised) / time.sin()[:, None]
    slope, value = tangent(model, scaled, time, velocity, None, 1.0)
    assert slope.abs().max() < 1e-10
    assert torch.equal(value, trig_output(model, scaled, time, None))
    cold, _ = tangent(model, scaled, time, velocity, None, 0.0)
    assert cold.abs().max() > 0.01  # without the second term it is not the derivative


def test_continuous_loss_at_the_exact_flow_map_is_nothing():
    objective = taught(ContinuousConsistency(teacher="truth", adaptive=False, warmup=0.0))
    torch.manual_seed(0)
    assert objective.loss(FlowMap(), batch())[0].item() < 1e-15


class Dropping(FlowMap):
    """The map with half of its answers left out at random."""

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return nn.functional.dropout(super().forward(x, sigma), 0.5)


def test_dropout_does_not_enter_the_aim_of_continuous_time():
    objective, some = ContinuousConsistency(adaptive=False, warmup=0.0), batch()
    time = torch.linspace(0.02, 1.5, 64, dtype=torch.float64)
    objective.times = lambda *_: time
    losses = objective.errors(Dropping(), some)
    assert (losses * 2 * SIGMA_DATA * time.tan()).max() < 1  # |g / (|g| + c)|^2, and nothing of another mask


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
def test_both_sides_of_a_pair_drop_out_the_same(device):
    class Masks(Dropping):
        def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
            return nn.functional.dropout(torch.ones_like(x), 0.5) + 0 * self.unused

    some = batch(256)
    some = replace(some, arrays=some.arrays.to(device))
    losses, guess = ImprovedConsistencyTraining().parts(Masks().to(device), some)
    assert guess.unique().tolist() == [0.0, 2.0] and not losses.any()


@pytest.mark.parametrize("objective", [ImprovedConsistencyTraining(), EasyConsistencyTuning(q=4.0)])
def test_autocast_does_not_drown_the_difference_of_neighbours(objective):
    model = denoiser(UNet(channels=8), (1, 8, 8), "edm").float()
    some, found = collate(Collection(torch.randn(8, 1, 8, 8))[:8]), []
    objective._progress = 0.99
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found.append(objective.parts(model, some)[0])
    torch.testing.assert_close(found[1], found[0], rtol=0.05, atol=0)


def test_sprints_critic_alone_sees_the_highest_level():
    found = []
    for highest in (0.0, 1.0):
        run = as_run(tiny("flow"), points(32))
        objective = SanaSprint(teacher="", highest=highest, adaptive=False)
        objective._teacher = tiny("flow", seed=1)
        objective._critic = Critic(objective._teacher).double()
        objective._critic.eval()
        some = step_of(objective, run)
        made = objective.judged(run.model, some)
        found.append((next(objective.turns(run.model, some)).metrics["consistency"], made))
    assert torch.equal(found[0][0], found[1][0]) and not torch.equal(found[0][1], found[1][1])


def test_a_step_of_continuous_time_in_bf16():
    model = denoiser(UNet(channels=8), (1, 8, 8)).float()
    some, time = collate(Collection(torch.randn(2, 1, 8, 8))[:2]), torch.tensor([0.3, 1.0])
    plain, _ = tangent(model, some.arrays, time, some.arrays, None, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, _ = tangent(model, some.arrays, time, some.arrays, None, 1.0)
        loss = ContinuousConsistency(adaptive=False).errors(model, some).sum()
    loss.backward()
    assert torch.equal(plain, again)  # the derivative is taken without autocast
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def denoiser(plan: Any, shape: tuple[int, ...], kind: Any = "trigflow") -> Denoiser:
    torch.manual_seed(0)
    made = Denoiser(plan.build(shape, 0), Parameterisation(kind, SIGMA_DATA), shape).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize(
    ("plan", "shape"),
    [(MLP(width=16, depth=2), (2,)), (UNet(channels=8), (1, 8, 8)), (DiT(width=16, depth=2), (1, 8, 8)),
     (UNet(channels=8), (3, 8))],
)  # fmt: skip
def test_forward_derivatives_equal_finite_differences(plan: Any, shape: tuple[int, ...]):
    model = denoiser(plan, shape)
    torch.manual_seed(3)
    x, along = torch.randn(3, *shape, dtype=torch.float64), torch.randn(3, *shape, dtype=torch.float64)
    time, rate = torch.tensor([0.2, 0.7, 1.3], dtype=torch.float64), torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64)

    def function(x: Tensor, t: Tensor) -> Tensor:
        return trig_output(model, x, t, None)

    with torch.no_grad():
        value, slope = forward_derivative(function, (x, time), (along, rate))
        step = 1e-5
        wanted = (function(x + step * along, time + step * rate) - function(x - step * along, time - step * rate)) / (
            2 * step
        )
    torch.testing.assert_close(slope, wanted, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(value, function(x, time), rtol=1e-12, atol=1e-12)


def test_a_flow_teacher_is_seen_as_trigflow_by_the_published_conversion():
    model = denoiser(MLP(width=16, depth=2), (2,), "flow")
    model.parameterisation = Parameterisation("flow", 1.0)  # the published formula is for data of unit deviation
    torch.manual_seed(4)
    scaled, time = torch.randn(5, 2, dtype=torch.float64), torch.linspace(0.1, 1.4, 5, dtype=torch.float64)
    flow = time.sin() / (time.sin() + time.cos())
    root = (flow**2 + (1 - flow) ** 2).sqrt()
    shown = scaled * root[:, None]
    with torch.no_grad():
        velocity = model.hf(shown, flow, None, None)
        flow_, root_ = flow[:, None], root[:, None]
        wanted = ((1 - 2 * flow_) * shown + (1 - 2 * flow_ + 2 * flow_**2) * velocity) / root_
        torch.testing.assert_close(trig_output(model, scaled, time, None), wanted, rtol=1e-12, atol=1e-12)


def test_grids_grow_as_published():
    ct = ConsistencyTraining(start=2, end=150, decay=0.9)
    found = []
    for progress in (0.0, 0.5, 0.999999):
        ct._progress = progress
        found.append(ct.levels_now())
    assert found == [2, math.ceil(math.sqrt(0.5 * (151**2 - 4) + 4) - 1) + 1, 151]
    ct._progress = 0.0
    assert ct.decay_now(None) == pytest.approx(math.exp(2 * math.log(0.9) / 2))
    ict = ImprovedConsistencyTraining(start=10, end=1280)
    steps, total = [], 400_000
    for step in (0, 49_999, 50_000, 349_999, 350_000, 399_999):
        ict._progress = step / total
        steps.append(ict.intervals_now())
    assert steps == [10, 10, 20, 640, 1280, 1280]  # K' = 400,000 / (log2(128) + 1) = 50,000


def test_lognormal_places_have_the_published_chances():
    grid = karras(11, 0.002, 80.0)[:-1].flip(0)
    uniforms = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    counts = torch.bincount(lognormal_places(uniforms, grid, -1.1, 2.0), minlength=10) / 200_000
    edges = [math.erf((math.log(s) + 1.1) / (math.sqrt(2) * 2.0)) for s in grid.tolist()]
    wanted = np.diff(edges) / (edges[-1] - edges[0])
    np.testing.assert_allclose(counts.numpy(), wanted, atol=1e-5)


def test_ects_second_level_nears_the_first():
    ect, model = EasyConsistencyTuning(q=2.0, k=8.0, b=1.0, stages=4), FlowMap()
    gaps = []
    for progress in (0.0, 0.3, 0.6, 0.9):
        ect._progress = progress
        torch.manual_seed(0)
        later, sooner, weight = ect.pair(model, batch())
        adjusted = 1 + 8 * torch.sigmoid(-later)
        wanted = (later * (1 - adjusted / 2 ** (int(progress * 4) + 1))).clamp(min=0)
        torch.testing.assert_close(sooner, wanted)
        torch.testing.assert_close(weight, 1 / (later - sooner))
        gaps.append(float((later - sooner).mean()))
    assert gaps == sorted(gaps, reverse=True)


class Watched(nn.Module):
    """A denoiser that notes how many arrays each pass had, and may drop out as adapters do, without a module for it."""

    sigma_data, sigma_min, sigma_max, shape, classes = SIGMA_DATA, 0.01, 10.0, (2,), 0

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.inner, self.dropout, self.passes = FlowMap(), dropout, []

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        self.passes.append(len(x))
        return nn.functional.dropout(self.inner(x, sigma), self.dropout, self.training and self.dropout > 0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_ect_runs_only_on_arrays_with_noise_left_unless_the_network_drops_out(dropout):
    ect, model, data = EasyConsistencyTuning(stages=4), Watched(dropout), batch()
    ect._progress = 0.3  # in the second of four stages, where the second level is 0 for about half of the arrays
    torch.manual_seed(0)
    sooner = ect.pair(model, data)[1]
    torch.manual_seed(0)
    found = ect.parts(model, data)[0]
    noisy = int((sooner > 0).sum())
    assert 10 < noisy < len(data) - 10
    assert model.passes == [len(data), 1, len(data) if dropout else noisy]
    ect.target = lambda network: network  # what the published step does: all arrays, and where(r > 0, ..., y)
    torch.manual_seed(0)
    torch.testing.assert_close(found, ect.parts(model, data)[0], atol=1e-12, rtol=0)


def test_distances_are_their_formulas():
    left, right = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2)
    assert float(pseudo_huber(left, right, 12.0)) == pytest.approx(1.0)
    assert float(cauchy(left, right, 1.0)) == pytest.approx(math.log(1 + 25 / 2 / 2))


def test_matched_noise_is_the_cheapest_of_all_orders():
    torch.manual_seed(0)
    arrays, noise = torch.randn(5, 3), torch.randn(5, 3)
    costs = {order: float((arrays - noise[list(order)]).square().sum()) for order in itertools.permutations(range(5))}
    assert tuple(nearest_noise(arrays, noise).tolist()) == min(costs, key=lambda order: costs[order])


def test_the_scale_of_the_robust_distance_is_the_authors():
    objective, found = RobustConsistencyTraining(end=640), []
    for progress in (0.0, 0.15):
        objective._progress = progress
        found.append(objective.scale_now(4096))
    assert found == pytest.approx([0.00054 * 64, math.sqrt(2) * math.exp(-1.15 * math.log(20) - 0.85)])


def test_the_denoising_loss_is_the_mean_over_arrays_at_small_noise():
    run, values = as_run(tiny("consistency"), points(64)), []
    for strength in (0.0, 1.0):
        objective = RobustConsistencyTraining(denoising=strength, early=0.5)
        some = step_of(objective, run)
        values.append(objective.loss(run.model, some)[0])
    later = objective._later
    small = later <= karras(11, 0.01, 5.0)[:-1].flip(0)[5]
    noisy = some.arrays + later[:, None] * objective.normal(some)
    scale = later * 0.7 / (later**2 + 0.49).sqrt()
    errors = (run.model(noisy, later, some.labels) - some.arrays).square().mean(1) / scale**2
    assert 0 < small.sum() < 64
    torch.testing.assert_close((values[1] - values[0]) / 64, errors[small].mean())


def test_matched_noise_is_still_that_noise():
    objective = RobustConsistencyTraining()
    items = Collection(gaussian().sample(16, torch.Generator().manual_seed(0))[0])[:16]
    model = SimpleNamespace(collate=collate, sigma_min=0.01, sigma_max=5.0)
    run = SimpleNamespace(recipe=SimpleNamespace(seed=0), step=0, total=10, model=model)
    objective.before_step(run, items)
    matched = objective.normal(collate(items))
    plain = RobustConsistencyTraining(transport=False)
    plain.before_step(run, items)
    free = plain.normal(collate(items))
    assert not torch.equal(matched, free)
    assert sorted(map(tuple, matched.tolist())) == sorted(map(tuple, free.tolist()))


def test_a_stochastic_step_without_noise_is_ddims():
    objective = taught(StochasticDistillation(teacher="truth", eta=0.0, substeps=1))
    some = batch()
    later, sooner = torch.full((64,), 2.0, dtype=torch.float64), torch.full((64,), 1.5, dtype=torch.float64)
    noisy = some.arrays + 2.0 * torch.randn(64, 2, dtype=torch.float64)
    found = objective.earlier(FlowMap(), some, noisy, noisy, later, sooner)
    denoised = gaussian().denoise(noisy, 2.0)
    torch.testing.assert_close(found, denoised + 0.75 * (noisy - denoised), rtol=1e-12, atol=1e-12)


def test_stochastic_steps_keep_the_distribution():
    generator = torch.Generator().manual_seed(0)
    data = gaussian().sample(40_000, generator)[0]
    some = collate(Collection(data)[:40_000])
    objective = taught(StochasticDistillation(teacher="truth", eta=1.0, substeps=8))
    torch.manual_seed(0)
    later, sooner = torch.full((40_000,), 1.0, dtype=torch.float64), torch.full((40_000,), 0.8, dtype=torch.float64)
    noisy = data + torch.randn(40_000, 2, dtype=torch.float64)
    found = objective.earlier(FlowMap(), some, noisy, noisy, later, sooner)
    assert float(found.std(0).mean()) == pytest.approx(math.sqrt(SCALE**2 + 0.64), rel=0.01)


def test_the_first_place_on_a_path_of_noises_aims_at_the_generator_itself():
    class Generator(FlowMap):
        classes = 4

    objective, model = NoiseConsistency(levels=2), Generator()
    some = batch(8)
    torch.manual_seed(0)
    loss, _ = objective.loss(model, some)  # two noises: the path goes from z, where f is G, to an independent one
    torch.manual_seed(0)
    noise, other = (torch.randn(8, 2, dtype=torch.float64) for _ in range(2))
    sigma = torch.full((8,), 10.0, dtype=torch.float64)
    aim, guess = model(10 * noise, sigma), model(10 * other, sigma)
    wanted = pseudo_huber(guess, aim, 0.00054 * math.sqrt(2)).sum()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-12)


def test_neighbours_on_a_path_of_noises_drop_out_the_same(monkeypatch):
    class Masks(FlowMap):
        classes = 4

        def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
            return nn.functional.dropout(torch.ones_like(x), 0.5)

    sides = []
    monkeypatch.setattr(noise_consistency, "pseudo_huber", lambda *both: sides.extend(both[:2]) or both[0].sum(1))
    NoiseConsistency(levels=50).loss(Masks(), batch(256))
    same = (sides[0] == sides[1]).all(1)  # but at the first place, where what was drawn before is the aim
    assert same.double().mean() > 0.9


def test_quadrants_want_two_numbers():
    model = SimpleNamespace(classes=4, shape=(1,))
    with pytest.raises(ModelError, match=r"quadrant looks at two halves of an array, and arrays \(1,\) have one"):
        NoiseConsistency().setup(SimpleNamespace(model=model))


@pytest.mark.parametrize("kind", ["x0", "consistency", "vp-v"])
def test_a_model_that_may_answer_the_same_to_everything_is_refused(kind: Any):
    for objective in (ConsistencyTraining(), ImprovedConsistencyTraining(), EasyConsistencyTuning()):
        run = as_run(tiny(kind), points(8))
        if kind == "x0" and not objective.anchored:
            with pytest.raises(ModelError, match="set it to consistency, or to edm, flow"):
                objective.setup(run)
        else:
            objective.setup(run)
    assert EasyConsistencyTuning.anchored  # most of its first pairs end at the array itself


def test_quadrants_are_told_by_signs():
    points = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])
    assert quadrant(points).tolist() == [0, 1, 2, 3]
