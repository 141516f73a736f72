"""Progressive distillations against plain two-step computations, and what they look at in images against loops."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hone.diffusion.items import Batch
from hone.diffusion.spatial import edges, high_pass, ssim
from hone.errors import ModelError
from hone.objectives.lightning import Lightning
from hone.objectives.progressive import (
    ProDiff,
    ProgressiveDistillation,
    Reconstruct,
    implied,
    snr_weight,
    spectral,
    step,
)
from hone.objectives.simple_distillation import SimpleDistillation, Steps, VariableDistillation
from hone.solvers.base import Counted, levels
from hone.solvers.edict import EDICT
from hone.solvers.few import Multistep
from hone.solvers.guidance import AdaptiveGuidance
from hone.solvers.ode import DDIM, DPMSolverPP, Heun
from hone.solvers.shifted import TimeShift
from hone.solvers.simple import FewEuler, timestamps
from oracles.known import Known, noise


def batch_of(count: int = 8) -> Batch:
    arrays, labels = Known().mixture.sample(count, torch.Generator().manual_seed(3))
    return Batch(arrays, labels, torch.full((count,), -1))


def with_teacher(objective, teacher=None, progress: float = 0.0):
    objective._teacher = Known() if teacher is None else teacher
    objective._progress = progress
    return objective


def test_the_implied_array_is_that_of_the_paper_on_the_variance_preserving_scale():
    x, known = 3 * noise(6), Known()
    sigmas = torch.tensor([4.0, 2.5, 1.2], dtype=torch.float64)
    ahead = x
    for now, then in ((0, 1), (1, 2)):
        ahead = step(ahead, known(ahead, sigmas[now]), sigmas[now], sigmas[then])
    alpha, sd = 1 / (1 + sigmas**2).sqrt(), sigmas / (1 + sigmas**2).sqrt()
    # two steps of DDIM as published, on z = alpha x
    z = alpha[0] * x
    for now, then in ((0, 1), (1, 2)):
        guess = known(z / alpha[now], sigmas[now])
        z = alpha[then] * guess + sd[then] / sd[now] * (z - alpha[now] * guess)
    torch.testing.assert_close(alpha[2] * ahead, z)
    ratio = sd[2] / sd[0]
    published = (z - ratio * alpha[0] * x) / (alpha[2] - ratio * alpha[0])
    found = implied(x, ahead, sigmas[0].expand(6), sigmas[2].expand(6))
    torch.testing.assert_close(found, published)
    torch.testing.assert_close(step(x, found, sigmas[0], sigmas[2]), ahead)  # one step leads where two did
    assert torch.equal(implied(x, ahead, sigmas[0].expand(6), torch.zeros(6)), ahead)


class OneForTwo(Known):
    """A student that has learned two steps of its teacher: of `many` steps on the schedule."""

    def __init__(self, schedule: str, many: int, each: int = 2) -> None:
        super().__init__()
        self.grid = levels(schedule, many, self.sigma_min, self.sigma_max, sigma_data=self.sigma_data)
        self.each = each

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        rows = []
        for row, level in zip(x, sigma.tolist(), strict=True):
            place = int((self.grid - level).abs().argmin())
            path = self.grid[place : place + self.each + 1]
            kept = None if labels is None else labels[len(rows)][None]
            there = DDIM().solve(Counted(Known(), kept), row[None], path, None)
            rows.append(implied(row[None], there, path[:1], path[-1:])[0])
        return torch.stack(rows)


@pytest.mark.parametrize("schedule", ["trig", "flow"])
def test_the_loss_is_zero_for_a_student_that_makes_two_steps_in_one(schedule):
    objective = with_teacher(ProgressiveDistillation(teacher="truth", plan=[8, 4], schedule=schedule))
    torch.manual_seed(0)
    assert float(objective.loss(OneForTwo(schedule, 8), batch_of(16))[0]) < 1e-20
    assert float(objective.loss(Known(), batch_of(16))[0]) > 1e-4
    spectrogram = with_teacher(ProDiff(teacher="truth", ssim=0.0, schedule=schedule))
    assert float(spectrogram.loss(OneForTwo(schedule, 4), batch_of(16))[0]) < 1e-9


@pytest.mark.parametrize("schedule", ["trig", "flow"])
def test_each_second_level_of_a_schedule_is_one_of_half_as_many_steps(schedule):
    fine, coarse = (levels(schedule, steps, 0.002, 80.0, sigma_data=0.5) for steps in (8, 4))
    torch.testing.assert_close(fine[::2], coarse)


def test_weights_are_those_of_squared_errors_of_array_noise_and_v():
    sigma = torch.tensor([0.3, 1.0, 4.0], dtype=torch.float64)
    clean, guess = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    x = clean + sigma[:, None] * torch.randn(3, 5, dtype=torch.float64)
    alpha, sd = 1 / (1 + sigma**2).sqrt()[:, None], (sigma / (1 + sigma**2).sqrt())[:, None]
    noises = [(alpha * x - alpha * y) / sd for y in (clean, guess)]
    speeds = [alpha * e - sd * y for e, y in zip(noises, (clean, guess), strict=True)]
    array = (clean - guess).square().mean(1)
    of_noise = (noises[0] - noises[1]).square().mean(1)
    torch.testing.assert_close(snr_weight("snr", sigma) * array, of_noise)
    torch.testing.assert_close(snr_weight("truncated-snr", sigma) * array, torch.maximum(array, of_noise))
    torch.testing.assert_close(snr_weight("v", sigma) * array, (speeds[0] - speeds[1]).square().mean(1))


def test_students_have_their_share_of_the_run():
    objective = ProgressiveDistillation(teacher="truth", plan=[16, 8, 4, 2, 1], late=2.0)
    found = []
    for progress in (0.0, 0.16, 0.17, 0.34, 0.66, 0.67, 0.99):  # shares 1 : 1 : 2 : 2
        objective._progress = progress
        found.append(objective.now()[0])
    assert found == [0, 0, 1, 2, 2, 3, 3]
    assert objective.now()[1] == pytest.approx(0.97)
    assert dict(ProgressiveDistillation(teacher="a", plan=[8, 3]).check()).keys() == {"plan"}
    assert dict(ProgressiveDistillation(teacher="a", plan=[8]).check()).keys() == {"plan"}


def test_a_student_takes_over_with_a_fresh_optimizer():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    run = SimpleNamespace(
        recipe=SimpleNamespace(seed=0), step=5, total=10, model=model,
        players={"model": SimpleNamespace(optimizer=optimizer)},
    )  # fmt: skip
    objective = with_teacher(ProgressiveDistillation(teacher="truth", plan=[4, 2, 1], late=1.0))
    objective._student = model
    objective.before_step(run, [])
    assert not optimizer.state
    assert torch.equal(objective._teacher.weight, model.weight)
    again = ProgressiveDistillation(teacher="truth", plan=[4, 2, 1])
    again._student = torch.nn.Linear(2, 2)
    again.load_state_dict(objective.state_dict())
    assert again._stage == 1
    assert torch.equal(again._teacher.weight, model.weight)


def test_structural_similarity_is_that_of_plain_loops():
    torch.manual_seed(0)
    left, right = 2 * torch.rand(2, 1, 6, 5, dtype=torch.float64) - 1, 2 * torch.rand(2, 1, 6, 5).double() - 1
    window = [math.exp(-((k - 2) ** 2) / 4.5) for k in range(5)]
    window = [value / sum(window) for value in window]

    def local(values: Tensor, row: int, column: int) -> float:
        total = 0.0
        for i in range(5):
            for j in range(5):
                a, b = row + i - 2, column + j - 2
                if 0 <= a < 6 and 0 <= b < 5:
                    total += window[i] * window[j] * float(values[a, b])
        return total

    plain = []
    for one, other in zip(left[:, 0] + 1, right[:, 0] + 1, strict=True):
        places = []
        for row in range(6):
            for column in range(5):
                m, n = local(one, row, column), local(other, row, column)
                v, w = local(one * one, row, column) - m * m, local(other * other, row, column) - n * n
                c = local(one * other, row, column) - m * n
                places.append((2 * m * n + 4e-4) * (2 * c + 36e-4) / ((m * m + n * n + 4e-4) * (v + w + 36e-4)))
        plain.append(sum(places) / len(places))
    torch.testing.assert_close(ssim(left, right, window=5), torch.tensor(plain).double())
    torch.testing.assert_close(ssim(left[:, 0], right[:, 0], window=5), ssim(left, right, window=5))
    torch.testing.assert_close(ssim(left, left), torch.ones(2).double())
    loss = spectral(left, right, 0.5, 0.25)
    torch.testing.assert_close(loss, 0.5 * (left - right).abs().flatten(1).mean(1) + 0.25 * (1 - ssim(left, right)))


def test_high_frequencies_and_edges_are_what_they_say():
    row = torch.arange(8, dtype=torch.float64)
    slow, fast = torch.cos(2 * math.pi * row / 8), torch.cos(math.pi * row)  # an eighth of a cycle a pixel, and half
    image = (0.3 + slow + fast).expand(1, 1, 8, 8)
    torch.testing.assert_close(high_pass(image, 0.5), fast.expand(1, 1, 8, 8))
    torch.testing.assert_close(high_pass(image, 0.0), image.contiguous())
    torch.testing.assert_close(high_pass(image[:, 0], 0.5), fast.expand(1, 8, 8))
    ramp = (3 * row).expand(1, 1, 8, 8)
    found = edges(ramp)[0, 0, :, 1:-1]
    torch.testing.assert_close(found, torch.full_like(found, 3.0), rtol=1e-6, atol=1e-6)
    assert float(edges(torch.ones(1, 4, 4)).max()) < 1e-3


def test_points_have_no_structure_to_be_similar_in():
    for objective in (ProDiff(teacher="truth"), Reconstruct()):
        with pytest.raises(ModelError, match="set it to 0"):
            objective.setup(SimpleNamespace(model=SimpleNamespace(shape=(2,))))


@pytest.mark.parametrize("solver", [DPMSolverPP(order=3), Heun(), DDIM()])
def test_the_trajectory_of_the_teacher_is_that_of_its_solver(solver):
    objective = with_teacher(SimpleDistillation(teacher="truth", steps=3, finer=4, solver=solver))
    grid = timestamps(12, 0.006, 20.0, 7.0)
    x = 20 * noise(5)
    found = objective.trajectory(batch_of(5), x, grid, None)
    assert len(found) == 3
    for number, there in enumerate(found, start=1):
        whole = solver.solve(Counted(Known()), x, grid[: 4 * number + 1], None)
        torch.testing.assert_close(there, whole)


@pytest.mark.parametrize(
    "solver", [AdaptiveGuidance(), Multistep(), Heun(churn=5.0), DDIM(eta=1.0), TimeShift(), EDICT()]
)
def test_a_solver_whose_way_cannot_be_followed_is_refused(solver):
    assert [option for option, _ in SimpleDistillation(teacher="truth", solver=solver).check()] == ["solver"]
    for fits in (None, DPMSolverPP(order=3), Heun(), DDIM()):
        assert not list(SimpleDistillation(teacher="truth", solver=fits).check())


def test_the_student_of_as_many_steps_with_the_same_solver_has_no_loss():
    objective = with_teacher(SimpleDistillation(teacher="truth", steps=4, finer=1, solver=DDIM(), analytic=False))
    assert float(objective.loss(Known(), batch_of())[0]) < 1e-12
    far = with_teacher(SimpleDistillation(teacher="truth", steps=4, finer=4, analytic=False))
    assert float(far.loss(Known(), batch_of())[0]) > 0.01


def test_each_step_of_the_student_is_a_turn_and_starts_where_it_got_itself():
    objective = with_teacher(SimpleDistillation(teacher="truth", steps=3, lowest=0.01))
    torch.manual_seed(0)
    walked = list(objective.turns(Known(), batch_of()))
    assert [turn.player for turn in walked] == ["model", "model"]  # the first step is analytic
    torch.manual_seed(0)
    x = 20.0 * torch.randn(8, 2, dtype=torch.float64)
    grid = timestamps(3, 0.01, 20.0, 7.0)
    goals = objective.trajectory(batch_of(), x, timestamps(12, 0.01, 20.0, 7.0), batch_of().labels)
    x = x + (grid[1] - grid[0]) * x / (1 + grid[0] ** 2).sqrt()
    for turn, now, then, goal in zip(walked, grid[1:], grid[2:], goals[1:], strict=False):
        x = x + (then - now) * (x - Known()(x, now, batch_of().labels)) / now
        torch.testing.assert_close(turn.loss, (x - goal).abs().mean(1).sum())


def test_the_solver_visits_what_was_trained():
    known = Known()
    made, calls = FewEuler(steps=3, lowest=0.01).sample(known, noise(5))
    assert calls == 2
    grid, x = timestamps(3, 0.01, 20.0, 7.0), 20 * noise(5)
    assert float(grid[-1]) == pytest.approx(0.01)
    x = x + (grid[1] - grid[0]) * x / (1 + grid[0] ** 2).sqrt()
    for now, then in pairwise(grid[1:]):
        x = x + (then - now) * (x - known(x, now)) / now
    torch.testing.assert_close(made, x)


def test_a_model_of_several_numbers_of_steps_is_shown_the_solver_s():
    shown = []

    class Widened(Known):
        def forward(self, x, sigma, labels=None, extras=None):
            shown.append(extras)
            return super().forward(x, sigma, labels)

    FewEuler(steps=5).sample(Steps(Widened(), 3), noise(2))
    assert all(torch.equal(extras, torch.full((2, 1), 0.5, dtype=torch.float64)) for extras in shown)
    objective = VariableDistillation(teacher="truth", steps=2, most=4)
    torch.manual_seed(0)
    assert {objective.steps_now(batch_of()) for _ in range(50)} == {2, 3, 4}


def test_clean_steps_are_judged_with_noise_of_one_of_the_levels():
    objective = Lightning(teacher="truth", judged=[0.5, 2.0])
    made, real = torch.zeros(400, 2, dtype=torch.float64), torch.ones(400, 2, dtype=torch.float64)
    batch = Batch(made, torch.full((400,), -1), torch.full((400,), -1))
    then = torch.cat([torch.zeros(200), torch.full((200,), 1.5)]).double()
    torch.manual_seed(0)
    one, other, level = objective.shown(batch, made, real, then)
    torch.testing.assert_close(other - one, real - made)  # the same noise on both
    assert torch.equal(one[200:], made[200:])
    assert torch.equal(level[200:], then[200:])
    assert set(level[:200].tolist()) == {0.5, 2.0}
    assert float((one[:200] / level[:200, None]).std()) == pytest.approx(1.0, abs=0.1)


def test_a_step_of_several_of_the_teacher_s():
    objective = with_teacher(Lightning(teacher="truth", plan=[8, 2]))
    torch.manual_seed(0)
    x, now, ahead, then, labels = objective.lesson(Known(), batch_of(6))
    student = OneForTwo("trig", 8, each=4)
    torch.testing.assert_close(step(x, student(x, now, labels), now, then), ahead)
