"""Solvers against what is known: their order on a mixture's flow, diffusers' schedulers, variances; its networks."""

from __future__ import annotations

import functools
import math

import diffusers
import pytest
import torch
from scipy import integrate

from hone.diffusion.denoiser import Denoiser
from hone.diffusion.levels import Parameterisation, karras
from hone.diffusion.networks import DiffusersNetwork
from hone.errors import HoneError
from hone.objectives.continuous import tangent, trig_output
from hone.solvers.base import Counted, levels
from hone.solvers.few import Multistep
from hone.solvers.ode import DDIM, DPMSolver, DPMSolverPP, Heun
from oracles.known import Known, close, noise, one_gaussian

# NumPy and diffusers warn of how the one asks the other for arrays, and of schedulers that are to go.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*algorithm_types=dpmsolver:FutureWarning"),
]


class Double(torch.Tensor):
    """A tensor that stays in float64 where a scheduler of diffusers asks for float32."""

    def to(self, *args, **kwargs):
        return self if torch.float32 in args else super().to(*args, **kwargs)


# --- order of convergence


@functools.cache
def truth(begin: float, end: float) -> torch.Tensor:
    """Return where the flow carries the noise of `order`."""
    return Known().mixture.flow(begin * noise(60), begin, end, steps=1500)


def order(solver, begin=10.0, end=0.05, counts=(64, 128)) -> float:
    """Return by how much the error falls from a number of steps to twice as many, as a power of two."""
    model, x = Known(), begin * noise(60)
    errors = []
    for count in counts:
        grid = torch.linspace(math.log(begin), math.log(end), count + 1, dtype=torch.float64).exp()
        found = solver.solve(Counted(model), x, grid, None)
        errors.append(float((found - truth(begin, end)).norm(dim=1).mean()))
    return math.log2(errors[0] / errors[1])


@pytest.mark.parametrize(
    ("solver", "wanted"),
    [
        (DDIM(), 1), (Heun(), 2), (DPMSolver(order=1), 1), (DPMSolver(order=2), 2), (DPMSolver(order=3), 3),
        (DPMSolverPP(order=1), 1), (DPMSolverPP(order=2), 2),
    ],
    ids=repr,
)  # fmt: skip
def test_solvers_show_their_order(solver, wanted):
    assert order(solver) == pytest.approx(wanted, abs=0.25)


class Polynomial(Known):
    """A denoiser that answers with a polynomial of ln sigma, whatever the array is."""

    def __init__(self, degree: int) -> None:
        super().__init__()
        self.degree = degree

    def forward(self, x, sigma, labels=None):
        return (sigma.log() ** self.degree).expand_as(x)

    def exact(self, begin: float, end: float, start: float) -> float:
        """Return x(end): (end / begin) x + end times the integral of (ln s)^degree / s^2 from end to begin."""
        found = integrate.quad(lambda s: math.log(s) ** self.degree / s**2, end, begin, epsabs=1e-13, epsrel=1e-13)[0]
        return end / begin * start + end * found


def one_step(solver, model, grid, count):
    """Return x after the last step of a multistep solver whose earlier states were exact."""
    x = torch.full((1, 2), 1.3, dtype=torch.float64)
    made = solver.solve(Counted(model), x, grid[: count + 1], None)
    before = solver.solve(Counted(model), x, grid[:count], None)
    return float(made[0, 0]) - float(grid[count] / grid[count - 1]) * float(before[0, 0])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_multistep_is_exact_on_polynomials_below_its_order(order):
    grid = torch.tensor([5.0, 2.9, 1.4, 0.9], dtype=torch.float64)
    begin, end = float(grid[2]), float(grid[3])
    for degree in range(order):
        if order == 2 and degree == 1:  # the slope is that of the last step and not of this one's middle
            continue
        model = Polynomial(degree)
        wanted = model.exact(begin, end, 0.0)
        assert one_step(DPMSolverPP(order=order), model, grid, 3) == pytest.approx(wanted, abs=1e-11)


def test_dpm_solver_pp_shows_order_three_where_its_start_costs_nothing():
    # Its first two steps are of lower order. At so much noise the denoiser hardly changes, and they make no error.
    assert order(DPMSolverPP(order=3), begin=1000.0, counts=(128, 256)) == pytest.approx(3, abs=0.25)


def test_order_one_of_both_families_is_ddim():
    model, x = Known(), 10 * noise(50)
    grid = levels("log", 12, 0.01, 10.0)
    wanted = DDIM().solve(Counted(model), x, grid, None)
    close(DPMSolver(order=1).solve(Counted(model), x, grid, None), wanted)
    close(DPMSolverPP(order=1).solve(Counted(model), x, grid, None), wanted)


def test_the_reference_flow_is_exact_on_one_gaussian():
    # dx / ds = s x / (c^2 + s^2) has x(s') = x(s) sqrt((c^2 + s'^2) / (c^2 + s^2))
    one = one_gaussian()
    x = 5 * noise(20)
    wanted = x * math.sqrt((0.16 + 0.01) / (0.16 + 25))
    close(one.flow(x, 5.0, 0.1, steps=500), wanted, 1e-10)


# --- diffusers' networks

BLOCKS = {
    "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "block_out_channels": [16],
    "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 8,
}  # fmt: skip
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "norm_num_groups": 4}


def test_continuous_time_passes_the_attention_of_diffusers():
    network = DiffusersNetwork(config=BLOCKS).build((1, 8, 8), 0)
    model = Denoiser(network, Parameterisation("trigflow", 0.7), (1, 8, 8))
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 1.0])
    slope, value = tangent(model, x, time, x, None, 1.0)
    assert slope.isfinite().all()
    torch.testing.assert_close(value, trig_output(model, x, time, None).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classes", [0, 3])
def test_a_transformer_of_diffusers_knows_classes(classes):
    model = DiffusersNetwork(kind="DiTTransformer2DModel", config=HEADS).build((1, 8, 8), classes).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    x, noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.1, 0.2]), torch.tensor([0, -1])
    found, again = model(x, noise, labels), model(x, noise, labels)
    assert found.shape == x.shape and torch.equal(found, again)  # it drops no classes of its own
    told = torch.isclose(found, model(x, noise)).flatten(1).all(1).tolist()
    assert told == ([False, True] if classes else [True, True])


@pytest.mark.parametrize("kind", ["UNet2DConditionModel", "PixArtTransformer2DModel", "DDIMScheduler"])
def test_networks_of_diffusers_that_want_more_are_refused(kind):
    with pytest.raises(HoneError, match="use UNet2DModel or DiTTransformer2DModel"):
        DiffusersNetwork(kind=kind, config={}).build((1, 8, 8), 0)


# --- diffusers' schedulers


def scheduler_grid(count: int = 10) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the times of a scheduler of 1000 levels, their noise levels with 0 behind, and the cumulative alphas."""
    kept = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)
    times = torch.arange(count - 1, -1, -1) * (1000 // count)
    sigmas = ((1 - kept[times]) / kept[times]).sqrt()
    return times, torch.cat([sigmas, torch.zeros(1).double()]), kept


def seen_noise(model, x, sigma):
    return (x - model(x, torch.as_tensor(sigma))) / sigma


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_is_diffusers_ddim(eta):
    model = Known(sigma_max=100.0)
    times, sigmas, kept = scheduler_grid()
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="leading")
    scheduler.set_timesteps(10)
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = kept, torch.tensor(1.0).double()
    assert torch.equal(scheduler.timesteps, times)
    x = noise(30)
    start = x / kept[times[0]].sqrt()
    found = DDIM(eta=eta).solve(Counted(model), start, sigmas, torch.Generator().manual_seed(3))
    draws = torch.Generator().manual_seed(3)
    for number, time in enumerate(times):
        guess = seen_noise(model, x / kept[time].sqrt(), sigmas[number])
        fresh = torch.randn(x.shape, generator=draws, dtype=x.dtype)
        x = scheduler.step(guess, int(time), x, eta=eta, variance_noise=fresh).prev_sample
    close(found, x)


@pytest.mark.parametrize("order", [1, 2])  # theirs of order 3 has half the second difference, and is of order 2
def test_dpm_solver_pp_is_diffusers_multistep(order):
    model, sigmas = Known(), karras(9, 0.01, 20.0)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=order, algorithm_type="dpmsolver++", lower_order_final=False, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(9)
    scheduler.sigmas = sigmas
    x = 20 * noise(30)
    found = DPMSolverPP(order=order).solve(Counted(model), x, sigmas, None)
    v = x / (1 + sigmas[0] ** 2).sqrt()
    for number, time in enumerate(scheduler.timesteps):
        sigma = sigmas[number]
        guess = seen_noise(model, v * (1 + sigma**2).sqrt(), sigma)
        v = scheduler.step(guess.as_subclass(Double), time, v.as_subclass(Double)).prev_sample.as_subclass(torch.Tensor)
    close(found, v)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpm_solver_is_diffusers_singlestep(order):
    model, steps = Known(), 4
    outer = levels("log", steps + 1, 0.05, 10.0)[:-1]
    inner = torch.linspace(math.log(10.0), math.log(0.05), steps * order + 1, dtype=torch.float64).exp()
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        solver_order=order, algorithm_type="dpmsolver", lower_order_final=False, final_sigmas_type="sigma_min"
    )
    scheduler.set_timesteps(steps * order)
    scheduler.sigmas = inner
    x = 10 * noise(30)
    found = DPMSolver(order=order).solve(Counted(model), x, outer, None)
    v = x / (1 + outer[0] ** 2).sqrt()
    for begin in range(0, steps * order, order):
        guesses, state = [], v
        for rank in range(order):
            sigma = inner[begin + rank]
            scheduler._step_index = begin + rank
            guess = seen_noise(model, state * (1 + sigma**2).sqrt(), sigma)
            guesses.append(scheduler.convert_model_output(guess, sample=state))
            # The paper's point at 2/3 of a step of order 3 is what they call heun, its end what they call midpoint.
            scheduler.register_to_config(solver_type="heun" if (order, rank) == (3, 1) else "midpoint")
            state = scheduler.singlestep_dpm_solver_update(guesses, sample=v, order=rank + 1)
        v = state
    close(found, v * (1 + outer[-1] ** 2).sqrt())


def test_heun_is_diffusers_heun():
    model, sigmas = Known(), karras(8, 0.01, 20.0)
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(8)
    inside = sigmas[1:-1].repeat_interleave(2)
    scheduler.sigmas = torch.cat([sigmas[:1], inside, sigmas[-1:]])
    x = 20 * noise(30)
    found = Heun().solve(Counted(model), x, sigmas, None)
    visited = [sigmas[0], *inside]
    for sigma, time in zip(visited, scheduler.timesteps, strict=True):
        x = scheduler.step(seen_noise(model, x, sigma), time, x).prev_sample
    close(found, x)


def test_first_order_is_diffusers_euler():
    model, sigmas = Known(), karras(8, 0.01, 20.0)
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(8)
    scheduler.sigmas = sigmas
    x = 20 * noise(30)
    found = DDIM().solve(Counted(model), x, sigmas, None)
    for sigma, time in zip(sigmas, scheduler.timesteps, strict=False):
        guess = seen_noise(model, x, sigma)
        x = scheduler.step(guess.as_subclass(Double), time, x.as_subclass(Double)).prev_sample.as_subclass(torch.Tensor)
    close(found, x)


@pytest.mark.parametrize("scheduler_name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm_schedulers_with_the_edm_parameterisation(scheduler_name):
    model, data = Known(sigma_min=0.002, sigma_max=80.0), 0.5
    sigmas = karras(9, 0.002, 80.0)
    kept = Parameterisation("edm", data)
    options = {} if "Euler" in scheduler_name else {"lower_order_final": False}
    scheduler = getattr(diffusers, scheduler_name)(sigma_data=data, **options)
    scheduler.set_timesteps(9)
    close(scheduler.sigmas.double(), sigmas, 1e-4)  # theirs are float32
    scheduler.sigmas = sigmas
    solver = DDIM() if "Euler" in scheduler_name else DPMSolverPP(order=2)
    x = 80 * noise(30)
    found = solver.solve(Counted(model), x, sigmas, None)
    for number, time in enumerate(scheduler.timesteps):
        raw = kept.output(model(x, sigmas[number]), x, sigmas[number])
        x = scheduler.step(raw.as_subclass(Double), time, x.as_subclass(Double)).prev_sample.as_subclass(torch.Tensor)
    close(found, x, 1e-8)


# --- stochastic solvers


@pytest.mark.parametrize("solver", [DDIM(eta=1.0, steps=400), DDIM(eta=0.5, steps=200), Heun(steps=100, churn=40.0)])
def test_fresh_noise_keeps_the_variance(solver):
    one = one_gaussian()
    solver.churn_scale = 1.0
    model = Known(one, 0.002, 20.0)
    made, _ = solver.sample(model, noise(20_000), None, torch.Generator().manual_seed(1))
    assert float(made.std()) == pytest.approx(0.4, rel=0.02)


def test_ancestral_variance_is_that_of_the_posterior():
    # q(x' | x, y) of x' = y + s' n', x = y + s n has variance s'^2 (s^2 - s'^2) / s^2
    class Clean(Known):
        def forward(self, x, sigma, labels=None):
            return torch.zeros_like(x)

    grid = torch.tensor([2.0, 0.7], dtype=torch.float64)
    start = torch.full((100_000, 2), 1.5, dtype=torch.float64)
    made = DDIM(eta=1.0).solve(Counted(Clean()), start, grid, torch.Generator().manual_seed(0))
    assert float(made.mean()) == pytest.approx(1.5 * 0.49 / 4.0, abs=0.01)
    assert float(made.var()) == pytest.approx(0.49 * (4 - 0.49) / 4, rel=0.02)


def test_multistep_adds_noise_of_the_next_level():
    model = Known()
    solver = Multistep(steps=2, between=[0.5])
    found, calls = solver.sample(model, noise(10), None, torch.Generator().manual_seed(2))
    first = model(20 * noise(10), torch.tensor(20.0))
    fresh = torch.randn(10, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    again = first + math.sqrt(0.25 - 0.01**2) * fresh
    close(found, model(again, torch.tensor(0.5)))
    assert calls == 2
