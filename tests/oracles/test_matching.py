"""Distribution matching against closed forms: Gaussians whose scores, ratios and divergences are known."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hone.diffusion.mixture import Mixture
from hone.errors import ModelError
from hone.objectives import divergences
from hone.objectives.divergences import Divergence
from hone.objectives.generators import Drawn, level_weight
from hone.objectives.matching import DMD2, FDistill
from hone.objectives.mixture_scores import (
    MixtureDistillation,
    ScoreOfMixtures,
    odds,
    shares,
    shares_with_zeros,
    skew_discrimination,
    skew_gap,
    skew_persuasion,
)
from hone.objectives.particles import NoiseFree, ScoreDistillation, Variational
from hone.objectives.teachers import Truth
from hone.objectives.unified import UniInstruct, expanded
from oracles.known import Known, ring

NAMES = get_args(Divergence)
SIGMA = 0.7
every_divergence = pytest.mark.parametrize("name", NAMES)


def gaussian(mean: float, scale: float) -> Mixture:
    one = torch.ones(1, dtype=torch.float64)
    return Mixture(mean * one[:, None], scale * one, one)


class Judge(nn.Module):
    """A critic that knows both distributions: its body is the fake score, its logit the log of p / q."""

    def __init__(self, real: Mixture, fake: Mixture) -> None:
        super().__init__()
        self.mixture, self.ratio_of = fake, (real, fake)
        self.body: Any = Known(fake)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        real, fake = self.ratio_of
        return (real.log_density(x, sigma) - fake.log_density(x, sigma))[:, None]


class Scene:
    """A generator y = m + v z of one number, real arrays of another Gaussian, and exact means over z and n."""

    def __init__(self, mean: float = 0.3, scale: float = 0.9, real: tuple[float, float] = (0.0, 1.0)) -> None:
        self.theta = torch.tensor([mean, scale], dtype=torch.float64, requires_grad=True)
        self.real, self.fake = gaussian(*real), gaussian(mean, scale)
        nodes, weights = np.polynomial.hermite_e.hermegauss(48)
        x, w = torch.from_numpy(nodes), torch.from_numpy(weights / weights.sum())
        z, n = (grid.flatten()[:, None] for grid in torch.meshgrid(x, x, indexing="ij"))
        self.weights = torch.outer(w, w).flatten()
        sigma = torch.full((len(z),), SIGMA, dtype=torch.float64)
        clean = self.theta[0] + self.theta[1] * z
        self.drawn = Drawn(
            clean, n, clean + SIGMA * n, sigma, torch.full_like(sigma, 0.5), None, torch.zeros_like(sigma)
        )
        self.model = SimpleNamespace(sigma_data=1.0)

    def ready(self, objective: Any) -> Any:
        objective._teacher, objective._critic = Known(self.real), Judge(self.real, self.fake)
        return objective

    def gradient(self, losses: Tensor) -> Tensor:
        return torch.autograd.grad((self.weights * losses).sum(), self.theta, retain_graph=True)[0]

    def integral(self, density: Any, sigma: float = SIGMA) -> Tensor:
        """Return the integral over x of a function of (log p, log q, score of p, score of q), which theta moves."""
        grid = torch.linspace(-16, 16, 16001, dtype=torch.float64)
        mean, scale = self.real.means[0, 0], self.real.scales[0]
        given = [(mean, scale**2 + sigma**2), (self.theta[0], self.theta[1] ** 2 + sigma**2)]
        logs = [-((grid - m) ** 2) / (2 * v) - 0.5 * (2 * math.pi * v).log() for m, v in given]
        scores = [-(grid - m) / v for m, v in given]
        return density(*logs, *scores).sum() * float(grid[1] - grid[0])

    def divergence(self, name: Divergence, sigma: float = SIGMA) -> Tensor:
        return self.integral(lambda p, q, *_: q.exp() * divergences.convex(name, (p - q).exp()), sigma)

    def fisher(self, name: Divergence, sigma: float = SIGMA) -> Tensor:
        """Return E_q h(r) (score of q - score of p)^2."""
        return self.integral(lambda p, q, s, t: q.exp() * divergences.weight(name, (p - q).exp()) * (s - t) ** 2, sigma)

    def gradient_of(self, value: Tensor) -> Tensor:
        return torch.autograd.grad(value, self.theta)[0]


def test_dmd_is_the_gradient_of_the_reverse_kullback_leibler_divergence():
    scene = Scene()
    losses, _ = scene.ready(DMD2(teacher="", weight="score", gan_weight=0.0)).losses(scene.model, scene.drawn)
    torch.testing.assert_close(scene.gradient(losses), scene.gradient_of(scene.divergence("reverse-kl")))
    mean, scale = scene.theta.tolist()  # and the formula for Gaussians
    p, q = 1 + SIGMA**2, scale**2 + SIGMA**2
    expected = torch.tensor([mean / p, scale * (1 / p - 1 / q)], dtype=torch.float64)
    torch.testing.assert_close(scene.gradient(losses), expected)


@every_divergence
def test_f_distill_is_the_gradient_of_its_divergence(name):
    scene = Scene()
    objective = FDistill(
        teacher="", divergence=name, weight="score", gan_weight=0.0, bins=0, smallest=1e-9, largest=1e9
    )
    losses, figures = scene.ready(objective).losses(scene.model, scene.drawn)
    torch.testing.assert_close(scene.gradient(losses), scene.gradient_of(scene.divergence(name)), rtol=1e-6, atol=1e-8)
    assert figures["h"].shape == scene.weights.shape


@every_divergence
def test_weights_are_derivatives_of_the_convex_function(name):
    r = torch.logspace(-2, 2, 60, dtype=torch.float64).requires_grad_()

    def slope(values: Tensor) -> Tensor:
        if not values.requires_grad:
            return torch.zeros_like(r)
        found = torch.autograd.grad(values.sum(), r, create_graph=True, allow_unused=True)[0]
        return torch.zeros_like(r) if found is None else found

    h = divergences.weight(name, r)
    torch.testing.assert_close(r**2 * slope(slope(divergences.convex(name, r))), h)
    torch.testing.assert_close(h - r * slope(h), divergences.fisher_weight(name, r))
    torch.testing.assert_close(r**2 * slope(slope(h)), divergences.ratio_weight(name, r))
    assert abs(float(divergences.convex(name, torch.ones((), dtype=torch.float64)))) < 1e-15


def test_ratios_and_weights_are_divided_by_running_means():
    scene = Scene()
    objective = scene.ready(FDistill(teacher="", divergence="forward-kl", gan_weight=0.0, bins=4, memory=0.5))
    objective.judges, objective.watch = lambda: True, lambda *a: None
    _, figures = objective.losses(scene.model, scene.drawn)
    row = {name: float(value.mean()) for name, value in figures.items()}
    mean = float(objective.ratio(scene.drawn).detach().mean())
    objective.after_step(None, row)
    assert set(row) == {"h"}  # what only the means need is not reported
    expected = torch.tensor([1, 1, 0.5 + 0.5 * mean, 1, 0.5 + 0.5 * mean], dtype=torch.float64)  # place 0.5: bin 2
    torch.testing.assert_close(objective._means, expected, rtol=1e-5, atol=0)
    factor, again = objective.factor(scene.drawn)
    torch.testing.assert_close(again["h"], objective.ratio(scene.drawn).detach() / expected[2], rtol=1e-5, atol=0)
    torch.testing.assert_close(factor, again["h"] / expected[-1], rtol=1e-5, atol=0)


@every_divergence
def test_uni_instruct_is_the_gradient_of_the_expanded_divergence(name):
    scene = Scene()
    options: dict[str, Any] = {"weight": "score", "gan_weight": 0.0, "bins": 0, "smallest": 1e-9, "largest": 1e9}
    objective = scene.ready(UniInstruct(teacher="", divergence=name, exact=True, **options))
    losses, _ = objective.losses(scene.model, scene.drawn)
    torch.testing.assert_close(scene.gradient(losses), scene.gradient_of(scene.fisher(name)), rtol=1e-6, atol=1e-8)


@every_divergence
def test_divergences_expand_into_squared_differences_of_scores(name):
    scene = Scene()
    logs, step = np.linspace(math.log(1e-3), math.log(3e3), 401, retstep=True)
    with torch.no_grad():  # int s E[...] ds = int s^2 E[...] d ln s; the grid of x is wide enough up to s of 2 or so
        parts = [math.exp(log) ** 2 * float(wide_fisher(scene, name, math.exp(log))) for log in logs]
        expected = float(scene.divergence(name, 0.0))
    assert np.trapezoid(parts, dx=step) == pytest.approx(expected, rel=2e-4)


def wide_fisher(scene: Scene, name: Divergence, sigma: float) -> Tensor:
    """As `fisher`, on a grid that grows with the noise."""
    (m, v), (n, w) = [(float(d.means[0, 0]), float(d.scales[0]) ** 2 + sigma**2) for d in (scene.real, scene.fake)]
    x = n + math.sqrt(w) * torch.linspace(-12, 12, 4001, dtype=torch.float64)
    p, q = (-((x - a) ** 2) / (2 * b) - 0.5 * math.log(2 * math.pi * b) for a, b in ((m, v), (n, w)))
    apart = (x - m) / v - (x - n) / w
    return (q.exp() * divergences.weight(name, (p - q).exp()) * apart**2).sum() * (x[1] - x[0])


@every_divergence
def test_the_cheap_form_of_uni_instruct_follows_the_ratio_exactly(name):
    scene = Scene()
    drawn, judge = scene.drawn, Judge(scene.real, scene.fake)
    x = drawn.noisy.detach().requires_grad_()
    fake, real = scene.fake.denoise(x, drawn.sigma), scene.real.denoise(x, drawn.sigma)
    ratio = judge(x, drawn.sigma)[:, 0].exp()
    square = (fake - real).square()[:, 0].detach()
    expected = torch.autograd.grad((divergences.fisher_weight(name, ratio) * square).sum(), x, allow_unused=True)[0] \
        if name not in ("reverse-kl", "forward-kl", "jeffreys") else torch.zeros_like(x)  # fmt: skip
    fixed = Drawn(x.detach(), drawn.noise, x, drawn.sigma, drawn.place, None, drawn.free)
    found = expanded(name, fixed, fake.detach(), real.detach(), ratio, exact=False)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], expected)


def mixed(share: float, real: Mixture, fake: Mixture) -> Mixture:
    parts = [torch.cat([getattr(real, name), getattr(fake, name)]) for name in ("means", "scales")]
    return Mixture(*parts, torch.cat([share * real.weights, (1 - share) * fake.weights]))


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_score_of_a_mixture_is_a_mixture_of_scores(share):
    real, fake = ring(0.3), ring(0.5)
    objective = MixtureDistillation(teacher="")
    objective._critic = Judge(real, fake)
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma = torch.linspace(0.1, 2, 50, dtype=torch.float64)
    mix = objective.mixing(x, sigma, None, torch.full_like(sigma, share))[:, None]
    found = mix * real.denoise(x, sigma) + (1 - mix) * fake.denoise(x, sigma)
    torch.testing.assert_close(found, mixed(share, real, fake).denoise(x, sigma))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_smt_and_smd_are_gradients_of_the_skew_divergence(share):
    scene = Scene()
    drawn, a = scene.drawn, torch.full_like(scene.weights, share)

    def skew(p: Tensor, q: Tensor, *_: Tensor) -> Tensor:
        m = torch.logaddexp(p + math.log(share), q + math.log(1 - share))
        return q.exp() * (q - m) / share + p.exp() * (p - m) / (1 - share)

    expected = scene.gradient_of(scene.integral(skew))
    with torch.no_grad():
        fake, real = scene.fake.denoise(drawn.noisy, drawn.sigma), scene.real.denoise(drawn.noisy, drawn.sigma)
        both = mixed(share, scene.real, scene.fake).denoise(drawn.noisy, drawn.sigma)
        gap = skew_gap(fake, both, real, a, weighed=False) / SIGMA**2
    torch.testing.assert_close(scene.gradient(drawn.clean[:, 0] * gap[:, 0]), expected)
    objective = scene.ready(MixtureDistillation(teacher="", weight="score", gan_weight=0.0))
    objective.share = lambda _: a
    losses, _ = objective.losses(scene.model, drawn)
    torch.testing.assert_close(scene.gradient(losses), expected)


def test_uni_instructs_settings_are_the_authors():
    objective = UniInstruct(teacher="")
    assert (objective.critic_updates, objective.most, objective.gan_critic_weight) == (1, 0.8, 1.0)


@pytest.mark.parametrize("logit", [-20.0, 0.0, 20.0])
def test_smds_generator_is_pulled_at_most_twice_as_hard_as_by_the_score(logit):
    scene = Scene()
    objective = scene.ready(MixtureDistillation(teacher=""))
    objective._critic.forward = lambda x, *_: torch.full((len(x), 1), logit, dtype=torch.float64)
    free = torch.linspace(0, 0.999999, len(scene.weights), dtype=torch.float64)
    factor, _ = objective.factor(replace(scene.drawn, free=free))
    assert float(factor.min()) >= 0 and float(factor.max()) <= 2
    trained = shares_with_zeros(free, 0.25)
    assert float((trained == 0).double().mean()) == pytest.approx(0.25, abs=0.001) and float(trained.max()) == 1
    assert objective.gan_critic_weight == 1


def test_weighed_gaps_of_all_shares_pull_alike():
    fake, mixed_, real = (torch.randn(5, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
    gap = skew_gap(fake, mixed_, real, torch.full((5,), 0.3))
    torch.testing.assert_close(gap.norm(dim=1), (fake - real).norm(dim=1), rtol=1e-4, atol=0)
    torch.testing.assert_close(nn.functional.cosine_similarity(gap, fake - mixed_), torch.ones(5))


def test_discriminators_of_mixtures_are_best_at_the_log_of_the_ratio():
    p, q = torch.rand(2, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logit = (p / q).log().requires_grad_()
    for share in (0.1, 0.5, 0.8):
        a = torch.full_like(p, share)
        real, fake = (skew_discrimination(right, wrong, a) for right, wrong in (
            (logit[:, None], torch.full((20, 1), -1e9, dtype=torch.float64)),
            (torch.full((20, 1), 1e9, dtype=torch.float64), logit[:, None]),
        ))  # fmt: skip
        slope = torch.autograd.grad((p * real + q * fake).sum(), logit)[0]
        assert slope.abs().max() < 1e-12
        mix = torch.sigmoid(logit + odds(a))  # what smd minimises
        slope = torch.autograd.grad(((1 - a) * q * mix**2 + a * p * (1 - mix) ** 2).sum(), logit)[0]
        assert slope.abs().max() < 1e-12
        expected = -torch.log(torch.sigmoid(logit.detach() + math.log(share / (1 - share))))
        torch.testing.assert_close(skew_persuasion(logit[:, None], a).detach(), expected)
    found = shares(torch.linspace(0, 0.9999999, 5000, dtype=torch.float64), 1)
    assert float(found.min()) == 0.001 and float(found.max()) == 1.0 and len(found.unique()) == 1000


def everything(scene: Scene) -> list[tuple[str, Any]]:
    plain: dict[str, Any] = {"teacher": "", "gan_weight": 0.0}
    found: list[tuple[str, Any]] = [
        ("dmd2", DMD2(**plain)), ("vsd", Variational(**plain, guidance=1.0)), ("smd", MixtureDistillation(**plain)),
    ]  # fmt: skip
    for name in NAMES:
        found += [(f"f-distill {name}", FDistill(**plain, divergence=name))]
        found += [(f"uni {name} {e}", UniInstruct(**plain, divergence=name, exact=e)) for e in (True, False)]
    return [(name, scene.ready(objective)) for name, objective in found]


def test_every_gradient_vanishes_where_generated_arrays_are_distributed_as_real_ones():
    there, elsewhere = Scene(0.0, 1.0), Scene()
    for (name, right), (_, wrong) in zip(everything(there), everything(elsewhere), strict=True):
        assert there.gradient(right.losses(there.model, there.drawn)[0]).abs().max() < 1e-12, name
        assert elsewhere.gradient(wrong.losses(elsewhere.model, elsewhere.drawn)[0]).abs().max() > 1e-3, name
    smt, ring_ = ScoreOfMixtures(gan_weight=0.0), ring()
    smt._critic = SimpleNamespace(body=lambda x, s, labels, share: ring_.denoise(x, s))  # p = q: no share matters
    y = torch.randn(40, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    sigma, n = torch.linspace(0.05, 5, 40, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    drawn = Drawn(y, n, y + sigma[:, None] * n, sigma, sigma, None, torch.rand(40, dtype=torch.float64))
    assert torch.autograd.grad(smt.losses(there.model, drawn)[0].sum(), y)[0].abs().max() == 0


def test_sds_is_vsd_whose_fake_score_is_that_of_a_point():
    teacher, y = Known(), torch.tensor([[0.3, -0.5]], dtype=torch.float64, requires_grad=True)
    n = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigma, labels = torch.linspace(0.1, 8, 30, dtype=torch.float64), torch.arange(30) % 3
    clean = y.expand(30, 2)
    drawn = Drawn(clean, n, clean + sigma[:, None] * n, sigma, sigma, labels, sigma)
    point = Mixture(y.detach(), torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    sds, vsd = ScoreDistillation(teacher="", guidance=7.5), Variational(teacher="")
    sds._teacher = vsd._teacher = teacher
    vsd._critic = Judge(point, point)
    slopes = [torch.autograd.grad(o.losses(teacher, drawn)[0].sum(), y, retain_graph=True)[0] for o in (sds, vsd)]
    torch.testing.assert_close(*slopes)
    with torch.no_grad():  # DreamFusion's own words: w (n^ - n), w / s = s / (s^2 + d^2)
        noises = (drawn.noisy - teacher.guided(drawn.noisy, sigma, labels, 7.5)) / sigma[:, None]
        weight = (sigma**2 / (sigma**2 + teacher.sigma_data**2))[:, None]
        expected = (weight * (noises - n)).sum(0, keepdim=True) / 2
    torch.testing.assert_close(slopes[0], expected)


def test_data_without_classes_goes_without_the_usual_guidance_and_not_without_another():
    teacher, noise = Known(), torch.randn(4, 2, dtype=torch.float64)
    drawn = Drawn(noise, noise, noise, torch.ones(4).double(), torch.ones(4).double(), None, torch.zeros(4))
    told = Truth(teacher.mixture, teacher)
    for objective in (ScoreDistillation(teacher=""), Variational(teacher="")):
        objective._teacher = told
        torch.testing.assert_close(objective.real(drawn), told(noise, drawn.sigma))
    plain = DMD2(teacher="", guidance=2.0)
    plain._teacher = told
    with pytest.raises(ModelError, match="guidance: 2 leads to a class"):
        plain.real(drawn)


@pytest.mark.parametrize("unwanted", [None, 2])
def test_nfsd_is_its_formula_in_noises(unwanted):
    teacher, s, low = Known(), 7.5, 0.57
    y = torch.randn(30, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64, requires_grad=True)
    n = torch.randn(30, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sigma, labels = torch.linspace(0.1, 3, 30, dtype=torch.float64), torch.arange(30) % 2
    drawn = Drawn(y, n, y + sigma[:, None] * n, sigma, sigma, labels, sigma)
    objective = NoiseFree(teacher="", unwanted=unwanted, weight="noise")
    objective._teacher = teacher
    found = torch.autograd.grad(objective.losses(teacher, drawn)[0].sum(), y)[0]

    def noise_of(which: Tensor | None) -> Tensor:
        return ((drawn.noisy - teacher(drawn.noisy, sigma, which)) / sigma[:, None]).detach()

    told, untold = noise_of(labels), noise_of(None)
    domain = torch.zeros_like(n) if unwanted is None else untold - noise_of(torch.full((30,), unwanted))
    domain = torch.where((sigma < low * teacher.sigma_data)[:, None], untold, domain)
    torch.testing.assert_close(found, (domain + s * (told - untold)) / 2)


def test_weights_of_noise_levels():
    clean, real = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 1.0]])
    sigma = torch.tensor([2.0])
    for kind, expected in (("adaptive", 1 / 1.5), ("noise", 0.5), ("score", 0.25), ("sds", 2 / 4.25)):
        assert float(level_weight(kind, clean, real, sigma, 0.5)) == pytest.approx(expected, rel=1e-5)
