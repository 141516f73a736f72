"""Trajectory models against the exact flow of a Gaussian mixture, and against plain computations."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from hone.diffusion.denoiser import Denoiser
from hone.diffusion.items import Batch
from hone.diffusion.levels import Parameterisation
from hone.diffusion.mixture import Mixture
from hone.diffusion.networks import MLP
from hone.engine.devices import Cluster
from hone.errors import ModelError
from hone.objectives.soundctm import SoundTrajectory, alike
from hone.objectives.trajectory import (
    LOWEST,
    Balance,
    ConsistencyTrajectory,
    Jumps,
    destination,
    intensity,
    jump,
)
from hone.solvers.gamma import Gamma

LOW, HIGH = 0.01, 5.0


def mixture() -> Mixture:
    means = torch.tensor([[1.0, 0.0], [-0.6, 0.8], [-0.2, -0.9]], dtype=torch.float64)
    return Mixture(means, torch.tensor([0.3, 0.4, 0.25]).double(), torch.tensor([0.5, 0.3, 0.2]).double())


class Exact:
    """A student whose jumps are the flow of the mixture; called like a widened denoiser."""

    shape, classes, sigma_min, sigma_max, sigma_data, training = (2,), 0, LOW, HIGH, 0.7, False
    parameterisation = Parameterisation("edm", 0.7, LOW)

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None, extras: Tensor) -> Tensor:
        shown = extras[:, 0].exp().pow(4)
        end = torch.where(shown < LOWEST * 1.001, torch.zeros_like(shown), shown)
        stays = end >= t * (1 - 1e-12)
        ratio = torch.where(stays, torch.zeros_like(end), end / t)[:, None]
        there = flows(x, t, torch.where(stays, t / 2, end))
        return torch.where(stays[:, None], mixture().denoise(x, t), (there - ratio * x) / (1 - ratio))


def flows(x: Tensor, begin: Tensor, end: Tensor, steps: int = 96) -> Tensor:
    """Return rows carried from levels of their own to others, as the mixture's `flow` carries all from one."""
    known, low = mixture(), torch.where(end > 0, end, begin.clamp(max=1e-6))
    step = (low.log() - begin.log()) / steps
    width = step[:, None]

    def slope(state: Tensor, level: Tensor) -> Tensor:
        return state - known.denoise(state, level.exp())

    for number in range(steps):
        now = begin.log() + number * step
        first = slope(x, now)
        second = slope(x + width / 2 * first, now + step / 2)
        third = slope(x + width / 2 * second, now + step / 2)
        x = x + width / 6 * (first + 2 * second + 2 * third + slope(x + width * third, now + step))
    return torch.where((end > 0)[:, None], x, known.denoise(x, low))


def batch_of(count: int) -> Batch:
    arrays, _ = mixture().sample(count, torch.Generator().manual_seed(3))
    none = torch.full((count,), -1)
    return Batch(arrays, none, none)


def network(seed: int = 0, classes: int = 0, extras: int = 1) -> Denoiser:
    torch.manual_seed(seed)
    plan = MLP(width=16, depth=2)
    made = Denoiser(
        plan.build((2,), classes), Parameterisation("edm", 0.7, LOW), (2,), classes=classes, sigma_max=HIGH,
        built=plan.record(),
    ).double()  # fmt: skip
    made.widen(extras)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


class Half(ConsistencyTrajectory):
    """From the largest level half of the grid down, and then on to 0."""

    def places(self, batch):
        first = torch.zeros(len(batch), dtype=torch.int64)
        return first, self.levels // 2, torch.full_like(first, self.levels)


def exact_loss(kind: type[ConsistencyTrajectory], levels: int, **options: object) -> float:
    objective = kind(teacher="truth", levels=levels, denoising=0.0, **options)
    objective._teacher = lambda x, sigma, labels=None: mixture().denoise(x, sigma)
    objective._mean = SimpleNamespace(model=Exact())
    torch.manual_seed(1)
    return float(objective.loss(Exact(), batch_of(12))[0])


def test_the_loss_vanishes_at_the_exact_flow_with_the_order_of_the_solver():
    coarse, middle, fine = (exact_loss(Half, levels) for levels in (8, 16, 32))
    assert coarse > 8 * middle > 64 * fine > 0  # Heun's method is of second order and the distance is squared
    assert fine / 12 < 1e-5


def test_random_places_lie_in_order_and_cover_the_grid():
    objective = ConsistencyTrajectory(teacher="truth", levels=5)
    torch.manual_seed(0)
    seen: set[int] = set()
    for _ in range(60):
        first, hops, last = objective.places(batch_of(40))
        seen.add(hops)
        assert bool(((first >= 0) & (first + hops <= last) & (last <= 5)).all())
    assert seen == {1, 2, 3, 4, 5}
    assert exact_loss(ConsistencyTrajectory, 40) < 1e-4


def test_hops_have_a_chance_in_proportion_to_their_number():
    objective = ConsistencyTrajectory(teacher="truth", levels=4)
    torch.manual_seed(0)
    counts = torch.zeros(4)
    for _ in range(1500):
        counts[objective.places(batch_of(1))[1] - 1] += 1
    torch.testing.assert_close(counts / 1500, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.05, rtol=0)


def test_jumps_stay_where_they_are_and_the_exact_ones_compose():
    x = batch_of(4).arrays * 3
    t, u, s = (torch.full((4,), value, dtype=torch.float64) for value in (3.0, 1.0, 0.2))
    model = network()
    assert torch.equal(jump(model, x, t, t), x)
    assert torch.equal(jump(model, x, torch.zeros(4), torch.zeros(4)), x)
    shown = destination(torch.zeros(4, 1, dtype=torch.float64))
    torch.testing.assert_close(jump(model, x, t, torch.zeros(4)), model(x, t, None, shown), rtol=0, atol=0)
    exact = Exact()
    torch.testing.assert_close(
        jump(exact, jump(exact, x, t, u), u, s), mixture().flow(x, 3.0, 0.2), rtol=1e-6, atol=1e-6
    )


def test_gamma_sampling_of_exact_jumps_is_the_flow_however_many_steps():
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = mixture().flow(HIGH * noise, HIGH, 0.0)
    for steps in (1, 3):
        made, calls = Gamma(steps=steps).sample(Jumps(Exact()), noise)
        assert calls == steps
        torch.testing.assert_close(made, whole, rtol=1e-5, atol=1e-5)


def test_a_trajectory_model_knows_its_guidance_where_it_was_trained_with_one():
    model = network(classes=3, extras=2)
    x, labels = batch_of(4).arrays, torch.arange(4) % 3
    t, s = torch.tensor(2.0), torch.tensor(0.5)
    drawn = jump(Jumps(model, 3.0), x, t, s, labels)
    torch.testing.assert_close(drawn, jump(model, x, t, s, labels, torch.tensor(3.0)))
    assert not torch.allclose(drawn, jump(Jumps(model, 1.0), x, t, s, labels))
    told, untold = Jumps(model, 3.0)(x, t, labels), Jumps(model, 3.0)(x, t, torch.full((4,), -1))
    torch.testing.assert_close(Jumps(model, 3.0).guided(x, t, labels, 0.4), 0.4 * told + 0.6 * untold)
    assert float(intensity(torch.tensor(0.0))) == 0.0


def test_weights_of_terms_are_ratios_of_gradients_over_a_whole_step():
    layer = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    inputs = torch.randn(10, 4, dtype=torch.float64)
    balance = Balance({"other": (0.0, 1e4)})
    for rows in inputs.split(4):
        out = rows @ layer.T
        balance.look({"main": out.square().sum(), "other": out.abs().sum()}, layer)
    balance.settle(Cluster("cpu"))
    out = inputs @ layer.T
    first = torch.autograd.grad(out.square().sum(), layer, retain_graph=True)[0].norm()
    second = torch.autograd.grad(out.abs().sum(), layer)[0].norm()
    assert balance.weights["other"] == pytest.approx(float(first / (second + 1e-4)))


def test_weights_of_terms_are_those_of_all_processes_gradients_together():
    layer = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    inputs = torch.randn(6, 4, dtype=torch.float64)
    whole, mine, other = (Balance({"other": (0.0, 1e4)}) for _ in range(3))

    def look(balance, rows, counts=True):
        out = rows @ layer.T
        balance.look({"main": out.square().sum(), "other": out.abs().sum()}, layer, counts)

    look(whole, inputs)
    look(mine, inputs[:4])
    look(other, inputs[4:])
    look(other, inputs[:1], counts=False)  # keeps step with a process that has more left

    def reduce(held):
        for tensor, theirs in zip(held, other.sums.values(), strict=True):
            tensor.grad = tensor.grad + theirs

    whole.settle(Cluster("cpu"))
    mine.settle(SimpleNamespace(reduce_gradients=reduce))
    assert mine.weights["other"] == pytest.approx(whole.weights["other"], rel=1e-12)


def test_soundctms_weights_go_up_to_a_thousand():
    layer = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    for cls, wanted in ((SoundTrajectory, 1000.0), (ConsistencyTrajectory, 5000.0)):
        balance = cls(teacher="truth")._balance
        balance.look({"main": 5000 * layer.sum(), "denoising": layer.sum()}, layer)
        balance.settle(Cluster("cpu"))
        assert balance.weights["denoising"] == pytest.approx(wanted, rel=1e-4)


def test_the_gradient_passes_through_the_mean_and_stays_out_of_it():
    objective = ConsistencyTrajectory(teacher="truth", levels=6, denoising=0.0)
    objective._teacher = lambda x, sigma, labels=None: mixture().denoise(x, sigma)
    model, mean = network(), network(1).requires_grad_(False)
    objective._mean = SimpleNamespace(model=mean)
    batch = batch_of(6)
    torch.manual_seed(4)
    objective.loss(model, batch)[0].backward()
    assert all(p.grad is None for p in mean.parameters())
    layer = model.hf.leave.weight
    ahead, step = layer.grad[0, 0].item(), 1e-6
    before = network()
    objective.aimer = lambda _: before  # only the guess moves: the aim is made by the model as it was
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            layer[0, 0] += sign * step
        torch.manual_seed(4)
        values.append(objective.loss(model, batch)[0].item())
        with torch.no_grad():
            layer[0, 0] -= sign * step
    assert ahead == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_features_are_compared_by_direction():
    one, other = torch.randn(2, 5, 3, 3, dtype=torch.float64), torch.randn(2, 5, 3, 3, dtype=torch.float64)
    plain = []
    for left, right in zip(one, other, strict=True):
        total = 0.0
        for i in range(3):
            for j in range(3):
                a, b = left[:, i, j], right[:, i, j]
                total += float((a / a.norm() - b / b.norm()).square().sum())
        plain.append(total / 45)
    torch.testing.assert_close(alike([one], [other]), torch.tensor(plain).double())
    assert float(alike([one], [2 * one]).abs().max()) < 1e-15


def test_the_guided_teacher_leads_between_its_answers():
    objective = SoundTrajectory(teacher="stage:1", least=3.0, most=3.0)
    objective._teacher = network(2, classes=3, extras=0)
    batch = batch_of(5)
    batch = Batch(batch.arrays, torch.arange(5) % 3, batch.places)
    sigma = torch.full((5,), 1.5, dtype=torch.float64)
    found = objective.lead(batch, batch.arrays, sigma, batch.labels)
    torch.testing.assert_close(found, objective._teacher.guided(batch.arrays, sigma, batch.labels, 3.0))


def test_what_cannot_teach_features_or_guidance_is_refused():
    objective = SoundTrajectory(teacher="truth")
    with pytest.raises(ModelError, match="conditional: true"):
        objective.setup(SimpleNamespace(model=network()))
    assert dict(SoundTrajectory(teacher="a", least=4.0, most=2.0).check()).keys() == {"least"}
    assert dict(ConsistencyTrajectory(teacher="a", levels=3, hops=4).check()).keys() == {"hops"}
