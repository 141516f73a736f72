"""Parameterisations: there and back, the published targets, and which of them are the same."""

from __future__ import annotations

import pytest
import torch

from hone.diffusion.levels import KINDS, Parameterisation, flow_time, from_flow_time, from_trig_time, trig_time
from oracles.known import Known, close, noise, numbers


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameterisation_and_back(kind):
    kept = Parameterisation(kind, 0.7, 0.01)
    sigma = torch.logspace(-1.5, 2, 60, dtype=torch.float64)[:, None]
    clean, noisy = noise(60, 1), noise(60, 2)
    c = kept.coefficients(sigma)
    close(c.skip * noisy + c.out * kept.output(clean, noisy, sigma), clean, 1e-12)


def test_network_outputs_are_the_published_targets():
    sigma = torch.logspace(-2, 2, 40, dtype=torch.float64)[:, None]
    clean, n, data = noise(40, 1), noise(40, 2), 0.7
    x, a = clean + sigma * n, 1 / (1 + sigma**2).sqrt()
    t = flow_time(sigma)
    close(Parameterisation("flow").coefficients(sigma).inside * x, (1 - t) * clean + t * n, 1e-12)
    close(Parameterisation("flow").output(clean, x, sigma), n - clean, 1e-9)
    t = trig_time(sigma, data)
    trig = Parameterisation("trigflow", data)
    close(trig.coefficients(sigma).inside * x * data, t.cos() * clean + t.sin() * data * n, 1e-12)
    close(trig.output(clean, x, sigma) * data, t.cos() * data * n - t.sin() * clean, 1e-9)
    close(Parameterisation("vp-eps").coefficients(sigma).inside * x, a * clean + a * sigma * n, 1e-12)
    close(Parameterisation("vp-eps").output(clean, x, sigma), n, 1e-9)
    close(Parameterisation("vp-v").output(clean, x, sigma), a * n - a * sigma * clean, 1e-9)
    close(Parameterisation("x0").output(clean, x, sigma), clean, 1e-12)


def test_times_and_back():
    sigma = torch.logspace(-3, 2, 40, dtype=torch.float64)
    close(from_flow_time(flow_time(sigma)) / sigma, torch.ones(40).double(), 1e-12)
    close(from_trig_time(trig_time(sigma, 0.5), 0.5) / sigma, torch.ones(40).double(), 1e-12)


def test_trigflow_of_unit_data_is_variance_preserving_v():
    sigma = torch.logspace(-2, 2, 40, dtype=torch.float64)
    left, right = (Parameterisation(kind, 1.0).coefficients(sigma) for kind in ("trigflow", "vp-v"))
    for one, other in zip(left[:3], right[:3], strict=True):
        close(one, other, 1e-12)


def test_a_flow_step_is_euler_on_this_scale():
    # One step of dv / dt = F(v, t) on v = (1 - t) x is DDIM's step on x
    model, sigma, then = Known(), numbers(3.0)[0], numbers(1.2)[0]
    x = 3 * noise(20)
    denoised = model(x, sigma)
    field = Parameterisation("flow").output(denoised, x, sigma)
    t, after = flow_time(sigma), flow_time(then)
    moved = ((1 - t) * x + (after - t) * field) / (1 - after)
    close(moved, denoised + then / sigma * (x - denoised), 1e-12)
