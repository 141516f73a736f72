"""REPA: the states that are aligned are those of the loss's own pass, and the loss is what its equation says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from hone.diffusion.denoiser import Denoiser
from hone.diffusion.items import Collection
from hone.diffusion.levels import Parameterisation, spread
from hone.diffusion.networks import MLP, DiT, UNet
from hone.errors import ModelError
from hone.objectives.alignment import PROJECTOR, RepresentationAlignment, overheard
from hone.objectives.denoising import Denoise
from oracles.small_denoisers import as_run, step_of, tiny

SHAPE = (1, 8, 8)


def made(plan: Any) -> Denoiser:
    torch.manual_seed(0)
    found = Denoiser(plan.build(SHAPE, 3), Parameterisation("flow", 0.7, 0.01), SHAPE, classes=3).double().train()
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return found


def images() -> Collection:
    return Collection(torch.randn(6, *SHAPE, dtype=torch.float64), torch.arange(6) % 3)


@pytest.mark.parametrize("plan", [DiT(width=16, depth=4, heads=2, patch=2), UNet(channels=8)])
@pytest.mark.parametrize("encoder", ["classifier", "digits", "patches"])
def test_the_loss_is_denoising_less_the_mean_cosine(plan: Any, encoder: Any) -> None:
    model = made(plan)
    objective = RepresentationAlignment(
        encoder=encoder, encoder_steps=2, alignment=0.7, depth=2, drop_labels=0.5, levels="flow", projector=12
    )
    objective.equip(model)
    run = as_run(model, images())
    objective.setup(run)
    batch = step_of(objective, run)
    with overheard(model.hf) as heard:
        found, figures = objective.loss(model, batch)
    assert len(heard) == 1  # the loss's own pass, or one more where a forward pass does not show its states
    plain = Denoise(levels="flow", drop_labels=0.5)
    plain.before_step(run, list(run.loader.trees))
    denoising, _ = plain.loss(model, batch)
    sigma, labels = plain.sigmas(model, batch), plain.some_labels(model, batch, 0.5)
    noisy = batch.arrays + spread(sigma, batch.arrays) * plain.normal(batch)
    scaled = model.parameterisation.coefficients(sigma)
    states = model.hf.inner(spread(scaled.inside, noisy) * noisy, scaled.noise, labels)[1]
    states = states.flatten(2).transpose(1, 2)
    projected, wanted = model.extras[PROJECTOR](states), objective.features(batch.arrays)
    assert projected.shape == wanted.shape
    alike = (F.normalize(projected, dim=-1) * F.normalize(wanted, dim=-1)).sum(-1).mean(1).sum()
    torch.testing.assert_close(found, denoising - 0.7 * alike, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(figures["denoising"], denoising.detach())
    found.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.extras[PROJECTOR].parameters())
    model.eval()
    assert objective.loss(model, batch)[1] == {}


def test_the_projector_is_as_wide_as_the_digits_network_whatever_the_width_of_a_classifier() -> None:
    model = made(DiT(width=16, depth=4, heads=2, patch=2))
    objective = RepresentationAlignment(encoder="digits", width=8)
    objective.equip(model)
    run = as_run(model, images())
    objective.setup(run)
    assert bool(torch.isfinite(objective.loss(model, step_of(objective, run))[0]))


def test_the_early_layer_of_the_paper_is_taken_and_one_that_is_not_there_refused() -> None:
    objective = RepresentationAlignment()
    objective.equip(made(DiT(width=16, depth=7, heads=2)))
    assert objective._layer == 1  # the second of 7, as the 8th of 28
    with pytest.raises(ModelError, match="shows 4 states, 5 is not among them"):
        RepresentationAlignment(depth=5).equip(made(DiT(width=16, depth=4, heads=2)))
    with pytest.raises(ModelError, match=r"the states of PointNet for arrays \(1, 8, 8\) have no places"):
        RepresentationAlignment().equip(made(MLP(width=16, depth=2)))
    with pytest.raises(ModelError, match="the digits' network sees"):
        RepresentationAlignment(encoder="digits").setup(as_run(tiny(), images()))
