"""Guidance, inversion, shifted levels, stitched denoisers, searches and jumps, each against what must come out."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from hone.data.arrays import Points
from hone.diffusion.denoiser import Denoiser
from hone.diffusion.drawing import DRAWN_AT_ONCE, solve
from hone.diffusion.levels import Parameterisation
from hone.diffusion.networks import MLP, UNet
from hone.distances.sets import Energy
from hone.errors import HoneError, ModelError
from hone.solvers.base import Counted
from hone.solvers.edict import EDICT, ddim_inversion
from hone.solvers.few import Multistep
from hone.solvers.gamma import Gamma
from hone.solvers.guidance import AdaptiveGuidance, Gated, LinearGuidance, Noises, fit_guess
from hone.solvers.noise_search import NoiseSearch, best_of, neighbour
from hone.solvers.ode import DDIM, Heun
from hone.solvers.searched import AutoDiffusion, Evolution
from hone.solvers.shifted import TimeShift, ddpm_levels
from hone.solvers.stitched import TStitch
from hone.solvers.verifiers import linear_classifier, make_verifier
from oracles.known import Known, close, noise, numbers, one_gaussian, ring


def tiny(classes: int = 3) -> Denoiser:
    torch.manual_seed(0)
    plan = MLP(width=8, depth=1)
    made = Denoiser(
        plan.build((2,), classes), Parameterisation("edm", 0.7, 0.01), (2,), classes=classes, sigma_max=20.0
    )
    made = made.double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def test_guidance_is_its_formula():
    model, x, labels = tiny(), 2 * noise(9), torch.arange(9) % 3
    sigma = torch.tensor(2.0, dtype=torch.float64)
    told, untold = model(x, sigma, labels), model(x, sigma, torch.full((9,), -1))
    wanted = untold + 2.5 * (told - untold)
    close(model.guided(x, sigma, labels, 2.5).detach(), wanted.detach(), 1e-12)
    asked = Counted(model, labels, 2.5)
    close(asked(x, sigma).detach(), wanted.detach(), 1e-12)
    assert asked.calls == 2
    close(model(x, sigma).detach(), untold.detach(), 1e-12)
    with pytest.raises(ModelError, match=r"guidance: 2\.5 leads to a class, and there are none here"):
        model.guided(x, sigma, None, 2.5)


GUIDED = DDIM(steps=12, guidance=2.0)


def test_adaptive_guidance_between_its_limits():
    model, labels = Known(), torch.arange(60) % 3
    whole, calls = GUIDED.sample(model, noise(60), labels)
    never, never_calls = AdaptiveGuidance(of=GUIDED, threshold=1.0).sample(model, noise(60), labels)
    close(never, whole, 1e-12)
    assert never_calls == calls == 24
    plain, _ = DDIM(steps=12).sample(model, noise(60), labels)
    at_once = AdaptiveGuidance(of=GUIDED, threshold=-1.0)
    _, few = at_once.sample(model, noise(60), labels)
    assert few == 13  # the first evaluation is guided
    model.rows = 0
    some, fewer = AdaptiveGuidance(of=GUIDED, threshold=0.99).sample(model, noise(60), labels)
    assert fewer == math.ceil(model.rows / 60) and 12 < fewer < 24
    assert float((some - whole).norm(dim=1).mean()) < 0.25 * float((plain - whole).norm(dim=1).mean())


def test_adaptive_guidance_ends_for_each_array_by_itself():
    model, labels = Known(), torch.arange(60) % 3
    solver = AdaptiveGuidance(of=GUIDED, threshold=0.99)
    together, _ = solver.sample(model, noise(60), labels)
    alone = torch.cat([solver.sample(model, noise(60)[i : i + 1], labels[i : i + 1])[0] for i in range(60)])
    close(together, alone, 1e-12)


def test_evaluations_are_those_of_all_arrays_and_not_of_the_last_ones():
    class Parted(Known):
        """Answers the same for the first class as for none, and the opposite for the others."""

        def forward(self, x, sigma, labels=None):
            agrees = torch.ones(len(x)) if labels is None else (labels <= 0).double()
            return (1 - 2 * agrees)[:, None] * torch.tensor([1.0, -1.0]).to(x)

    solver = AdaptiveGuidance(of=DDIM(steps=10, guidance=2.0))
    classes = torch.arange(DRAWN_AT_ONCE + 1) // DRAWN_AT_ONCE  # one array of the second class, drawn last
    _, calls = solve(Parted(), solver, noise(len(classes)), classes, torch.Generator())
    assert calls == 12  # the first arrays take 11, the last one 20


def test_guidance_takes_a_level_for_each_array():
    torch.manual_seed(0)
    model = Denoiser(UNet(channels=8).build((1, 4, 4), 3), Parameterisation("edm", 0.7), (1, 4, 4), classes=3).double()
    x, labels = torch.randn(4, 1, 4, 4, dtype=torch.float64), torch.arange(4) % 3  # as many arrays as columns
    sigma = torch.tensor([0.2, 0.5, 1.0, 3.0], dtype=torch.float64)
    noises = Noises(model, labels, 2.5)
    with torch.no_grad():
        model.hf.leave.weight.normal_()
        for asked in (Gated(model, labels, 2.5, 1.0), noises):
            close(asked(x, sigma), model.guided(x, sigma, labels, 2.5), 1e-9)
        close(noises.told[0], (x - model(x, sigma, labels)) / sigma[:, None, None, None], 1e-9)


@pytest.mark.parametrize("around", [AdaptiveGuidance, LinearGuidance])
def test_guidance_goes_around_time_shift(around):
    source = Points(density="ring", count=64, holdout=8, conditional=True)
    model, inside = tiny(source.classes), TimeShift(steps=4, guidance=2.0)
    solver = around(of=inside, **({"every": 1, "fit": 8} if around is LinearGuidance else {"threshold": 1.0}))
    solver.prepare(model, source)
    made, _ = solver.sample(model, noise(2), torch.arange(2))
    assert made.isfinite().all()
    if around is AdaptiveGuidance:
        close(made, inside.sample(model, noise(2), torch.arange(2))[0], 1e-9)


def test_linear_guess_is_least_squares():
    known = [noise(50, seed) for seed in range(3)]
    target = 0.3 * known[0] - 1.2 * known[1] + 0.7 * known[2]
    close(fit_guess(target, known, 1), numbers(0.3, -1.2, 0.7), 1e-10)
    close(fit_guess(target, known, 1, 1e9), numbers(0, 1, 0), 1e-6)


def source(**options) -> Points:
    return Points(density="ring", count=4000, holdout=500, conditional=True, **options)


class Ring(Known):
    """The denoiser of the data of `source`."""

    def __init__(self) -> None:
        super().__init__(source().truth(), 0.01, 20.0)
        self.classes = 8


def test_linear_guidance_is_nearer_to_guidance_than_none():
    model, labels = Ring(), torch.arange(400) % 8
    whole, _ = GUIDED.sample(model, noise(400, 5), labels)
    plain, _ = DDIM(steps=12).sample(model, noise(400, 5), labels)
    solver = LinearGuidance(of=GUIDED)
    solver.prepare(model, source())
    made, calls = solver.sample(model, noise(400, 5), labels)
    assert calls == 12 + 3
    assert float((made - whole).norm(dim=1).mean()) < 0.25 * float((plain - whole).norm(dim=1).mean())
    always = LinearGuidance(of=GUIDED, every=1)
    always.prepare(model, source())
    assert [w is None for w in always._weights] == [True] * 6 + [False] * 6
    ends = LinearGuidance(of=GUIDED, every=1, second_half="class")
    ends.prepare(model, source())
    assert ends.sample(model, noise(400, 5), labels)[1] == 18


# --- EDICT


@pytest.mark.parametrize("alternate", [True, False])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_edict_inverts_to_rounding(alternate, guidance):
    model, labels = Known(), torch.arange(40) % 3
    clean, _ = model.mixture.sample(40, torch.Generator().manual_seed(0))
    solver = EDICT(steps=40, alternate=alternate, guidance=guidance)
    pair = solver.invert(model, clean, labels)
    for again in solver.rebuild(model, pair, labels):
        close(again, clean, 1e-10)
    made = solver.rebuild(model, [noise(40), noise(40)], labels)
    sigmas = solver.sigmas(model)
    back = solver.ascend(Counted(model, labels, guidance), made, sigmas)
    for state in back:
        close(state, noise(40), 1e-8)


def test_ddim_inversion_leaves_an_error_that_edict_does_not():
    model = Known()
    clean, _ = model.mixture.sample(200, torch.Generator().manual_seed(0))
    solver = EDICT(steps=20)
    sigmas = solver.sigmas(model)
    x = ddim_inversion(model, clean, sigmas)
    again = DDIM().solve(Counted(model), x, sigmas, None)
    assert float((again - clean).norm(dim=1).mean()) > 1e-3
    finer = EDICT(steps=160).sigmas(model)
    x = ddim_inversion(model, clean, finer)
    nearer = DDIM().solve(Counted(model), x, finer, None)
    assert float((nearer - clean).norm()) < 0.3 * float((again - clean).norm())  # it is right in the limit


def test_edict_approaches_the_flow():
    model = Known()
    truth = model.mixture.flow(20 * noise(100), 20.0, 0.0, steps=256)
    errors = []
    for steps in (40, 160):
        made, calls = EDICT(steps=steps).sample(model, noise(100))
        errors.append(float((made - truth).norm(dim=1).mean()))
        assert calls == 2 * steps
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.1


# --- time shift


def test_time_shift_without_a_window_is_ddim():
    model = Known()
    plain, _ = DDIM(steps=10).sample(model, noise(30))
    for solver in (TimeShift(steps=10, window=40, cutoff=1000), TimeShift(steps=10, window=0, cutoff=1000)):
        close(solver.sample(model, noise(30))[0], plain, 1e-12)


def test_time_shift_finds_the_level_of_noise():
    grid = ddpm_levels()
    planned, real = grid[420], grid[435]
    n = torch.randn(5, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # a state on the variance-preserving scale whose noise is that of level 435 where 420 was planned
    v = n * real / (1 + real**2).sqrt()
    x = v * (1 + planned**2).sqrt()
    found = TimeShift(window=100, cutoff=300).shifted(x, planned, grid, 0.5)
    assert all(abs(int((grid - level).abs().argmin()) - 435) <= 6 for level in found)
    near = TimeShift(window=20, cutoff=300).shifted(x, planned, grid, 0.5)
    close(near, grid[430].expand(5))  # the window ends there
    none = TimeShift(window=100, cutoff=421).shifted(x, planned, grid, 0.5)
    close(none, planned.expand(5))
    whole = 0.5 * torch.randn(5, 200_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (whole + real * n) / (1 + real**2).sqrt() * (1 + planned**2).sqrt()
    found = TimeShift(window=100, cutoff=300, with_data=True).shifted(x, planned, grid, 0.5)
    assert all(abs(int((grid - level).abs().argmin()) - 435) <= 6 for level in found)


def test_time_shift_needs_more_than_one_number():
    with pytest.raises(ModelError, match=r"variance of an array's numbers, and arrays of shape \(1,\) have one"):
        TimeShift(steps=3).sample(Known(), noise(5)[:, :1])


# --- T-Stitch, AutoDiffusion, search


def test_t_stitch_changes_over_where_it_says(tmp_path):
    small, large = tiny(), tiny()
    with torch.no_grad():
        large.hf.leave.weight.add_(0.3)
    small.built = MLP(width=8, depth=1).record()
    small.save(tmp_path)
    inner, x = DDIM(steps=10), noise(7)
    made, calls = TStitch(of=inner, small=str(tmp_path), share=0.4).sample(large, x)
    sigmas = inner.sigmas(large)
    state = inner.solve(Counted(small), x * sigmas[0], sigmas[:5], None)
    close(made, inner.solve(Counted(large), state, sigmas[4:], None).detach(), 1e-12)
    assert calls == 10
    none, _ = TStitch(of=inner, small=str(tmp_path), share=0.0).sample(large, x)
    close(none, inner.sample(large, x)[0], 1e-12)
    every, _ = TStitch(of=inner, small=str(tmp_path), share=1.0).sample(large, x)
    close(every, inner.sample(small, x)[0], 1e-12)


@pytest.mark.parametrize(("low", "high", "share", "fits"), [
    (0.01, 20.0, 1.0, True), (0.01, 5.0, 0.4, False), (2.0, 20.0, 0.4, False), (2.0, 20.0, 0.2, True),
    (2.0, 5.0, 0.0, True),
])  # fmt: skip
def test_t_stitch_asks_the_small_denoiser_where_it_was_trained(tmp_path, low, high, share, fits):
    small = tiny()
    small.built = MLP(width=8, depth=1).record()
    small.parameterisation, small.sigma_max = Parameterisation("edm", 0.7, low), high
    small.save(tmp_path)
    solver = TStitch(of=DDIM(steps=10), small=str(tmp_path), share=share)
    if fits:
        assert solver.sample(tiny(), noise(4))[1] == 10
    else:
        with pytest.raises(ModelError, match=rf"but it was trained for {low:g} to {high:g}"):
            solver.sample(tiny(), noise(4))


def test_evolution_finds_a_known_optimum():
    wanted = (3, 17, 40, 59)
    evolution = Evolution(lambda places: sum(abs(a - b) for a, b in zip(places, wanted, strict=True)), 60, 4)
    evolution.fill(evolution.fresh, 20)
    for _ in range(40):
        parents = evolution.best(6)
        evolution.fill(lambda parents=parents: evolution.mutated(parents, 0.25), 10)
        evolution.fill(lambda parents=parents: evolution.crossed(parents), 6)
    best = evolution.best(1)[0]
    assert evolution.scores[best] <= 4
    assert all(len(set(places)) == 4 and list(places) == sorted(places) for places in evolution.scores)


def test_autodiffusion_is_not_worse_than_its_own_spacing():
    model = Ring()
    solver = AutoDiffusion(of=DDIM(steps=4), grid=40, batch=400, population=8, generations=4)
    solver.prepare(model, source())
    assert len(solver.sigmas(model)) == 5 and solver._trace == sorted(solver._trace, reverse=True)
    truth = source().truth().sample(2000, torch.Generator().manual_seed(9))[0]
    labels = torch.arange(2000) % 8
    searched, even = (s.sample(model, noise(2000, 4), labels)[0] for s in (solver, DDIM(steps=4)))
    assert Energy()(searched, truth) < Energy()(even, truth)


def test_neighbours_keep_length_and_angle():
    pivot = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = neighbour(pivot, 0.95, torch.Generator().manual_seed(1))
    close(found.flatten(1).norm(dim=1), pivot.flatten(1).norm(dim=1), 1e-12)
    cosine = torch.nn.functional.cosine_similarity(found.flatten(1), pivot.flatten(1))
    close(cosine, numbers(*[0.95] * 6), 1e-12)


def test_best_of_takes_each_array_by_itself():
    states = torch.arange(6.0).reshape(3, 2, 1)
    scores = torch.tensor([[0.0, 5.0], [1.0, 3.0], [2.0, 4.0]])
    first, second = best_of(states, scores, 2)
    assert first[:, 0].tolist() == [4.0, 1.0] and second[:, 0].tolist() == [2.0, 5.0]


@pytest.mark.parametrize("verifier", ["density", "classifier", "nearest"])
@pytest.mark.parametrize("algorithm", ["random", "zero-order", "paths"])
def test_a_search_raises_what_its_verifier_says(algorithm, verifier):
    model, labels = Ring(), torch.arange(64) % 8
    inner = Heun(steps=8)
    solver = NoiseSearch(of=inner, algorithm=algorithm, verifier=verifier)
    solver.prepare(model, source())
    judge = make_verifier(verifier, source())
    plain, calls = inner.sample(model, noise(64), labels, torch.Generator().manual_seed(0))
    model.rows = 0
    found, more = solver.sample(model, noise(64), labels, torch.Generator().manual_seed(0))
    assert more == model.rows / 64
    assert calls == 15 and more == {"random": 60, "zero-order": 17 * 15}.get(algorithm, more)
    assert float(judge(found, labels).mean()) > float(judge(plain, labels).mean())
    if algorithm != "paths":  # the noise that was given is among the candidates
        assert bool((judge(found, labels) >= judge(plain, labels)).all())


def test_paths_that_go_above_the_noise_of_the_model_are_refused():
    model = Ring()
    model.sigma_max = 5.0
    solver = NoiseSearch(of=DDIM(steps=6), algorithm="paths")
    solver.prepare(model, source())
    with pytest.raises(HoneError, match=r"goes to noise 8.09, at time begin \+ forward, .* up to 5; lower begin"):
        solver.sample(model, noise(4))


def test_a_larger_search_is_never_worse():
    model, labels = Ring(), torch.arange(64) % 8
    judge, scores = make_verifier("density", source()), []
    for candidates in (1, 2, 8):
        solver = NoiseSearch(of=DDIM(steps=6), candidates=candidates)
        solver.prepare(model, source())
        made, _ = solver.sample(model, noise(64), labels, torch.Generator().manual_seed(0))
        scores.append(judge(made, labels))
    assert bool((scores[1] >= scores[0]).all()) and bool((scores[2] >= scores[1]).all())


def test_the_linear_classifier_is_that_of_scikit_learn():
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    rows, classes = source().truth().sample(800, torch.Generator().manual_seed(0))
    theirs = LinearDiscriminantAnalysis(solver="lsqr").fit(rows.numpy(), classes.numpy())
    wanted = torch.from_numpy(theirs.predict_proba(rows.numpy()))
    found = linear_classifier(rows, classes)(rows).exp()
    assert float((found.argmax(1) == wanted.argmax(1)).double().mean()) > 0.99
    assert float((found - wanted).abs().max()) < 0.1  # a thousandth of the variance is added to ours


# --- CTM


def exact_jump(model, x, now, then, labels):
    """Return the flow of the truth from one level to another, which is what a perfect CTM gives."""
    return model.mixture.flow(x, float(now[0]), float(then[0]), steps=150, labels=labels)


@pytest.fixture
def jumping(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "hone.objectives.trajectory", SimpleNamespace(jump=exact_jump, Jumps=Known))


def test_gamma_zero_with_exact_jumps_is_the_flow(jumping):
    model = Known(ring(), 0.01, 20.0)
    truth = model.mixture.flow(20 * noise(50), 20.0, 0.0, steps=256)
    for steps in (1, 3):
        made, calls = Gamma(steps=steps).sample(model, noise(50))
        close(made, truth, 1e-5)
        assert calls == steps


def test_gamma_one_is_multistep_consistency_sampling(jumping):
    model = Known(ring(), 1e-9, 20.0)  # multistep leaves sigma_min^2 out of the variance that it adds
    made, _ = Gamma(steps=3, gamma=1.0, between=[2.0, 0.5]).sample(
        model, noise(50), None, torch.Generator().manual_seed(4)
    )

    class Flow(Known):
        def forward(self, x, sigma, labels=None):
            return self.mixture.flow(x, float(sigma), 0.0, steps=150)

    wanted = Multistep(steps=3, between=[2.0, 0.5]).sample(
        Flow(ring(), 1e-9, 20.0), noise(50), None, torch.Generator().manual_seed(4)
    )[0]
    close(made, wanted, 1e-6)


def test_gamma_keeps_the_distribution_of_each_level(jumping):
    one = one_gaussian()
    made, _ = Gamma(steps=4, gamma=0.6).sample(
        Known(one, 0.01, 20.0), noise(10_000), None, torch.Generator().manual_seed(1)
    )
    assert float(made.std()) == pytest.approx(0.4, rel=0.03)
