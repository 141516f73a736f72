"""Reward tuning: chains are the samplers', gradients are the expected reward's, and optima are where they must be."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from hone.diffusion.chains import consistency_chain, denoising_chain, follow, log_densities, means
from hone.diffusion.items import collate
from hone.errors import ModelError
from hone.objectives.reward_distillation import RewardGuidedDistillation, preference_divergence
from hone.objectives.reward_policies import DDPO, PRDP, RLCM, Worths, clipped_gradient, reward_differences
from hone.objectives.reward_tuning import AlignProp
from hone.options import Places, check_part
from hone.rewards.arrays import Brightness, Classifier, Near, Within, worth
from hone.solvers.few import Multistep
from hone.solvers.ode import DDIM
from oracles.small_denoisers import Guess, as_run, points, step_of, tiny

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_the_denoising_chain_is_the_sampler_ddim(eta: float) -> None:
    model, noise = tiny(), torch.randn(6, 2, dtype=torch.float64)
    sampled, calls = DDIM(steps=4, eta=eta).sample(model, noise, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    links = denoising_chain(model, 4, eta=eta)
    drawn = follow(model, links, noise, lambda _: torch.randn(6, 2, generator=generator, dtype=torch.float64), None)
    torch.testing.assert_close(drawn[-1], sampled, **EXACT)
    assert calls == len(links) == 4


def test_the_consistency_chain_is_the_sampler_multistep() -> None:
    model, noise = tiny("consistency"), torch.randn(6, 2, dtype=torch.float64)
    sampled, _ = Multistep(steps=3).sample(model, noise, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    links = consistency_chain(model, 3)
    drawn = follow(model, links, noise, lambda _: torch.randn(6, 2, generator=generator, dtype=torch.float64), None)
    torch.testing.assert_close(drawn[-1], sampled, **EXACT)


def test_means_and_densities_of_a_chain_are_those_of_its_steps() -> None:
    model = tiny(classes=3)
    links = denoising_chain(model, 3, eta=1.0, last=0.2)
    labels = torch.tensor([0, 1, 2, -1])
    start, noise = torch.randn(4, 2, dtype=torch.float64), torch.randn(3, 4, 2, dtype=torch.float64)
    states = torch.stack(follow(model, links, start, lambda step: noise[step], labels, guidance=1.5))
    logs = log_densities(links, states[1:], means(model, links, states[:-1], labels, guidance=1.5))
    torch.testing.assert_close(logs, -noise.square().sum(-1) / 2, **EXACT)


def test_a_step_without_noise_has_no_density_and_no_gradient() -> None:
    model = tiny()
    links = denoising_chain(model, 3, eta=0.0, last=0.2)
    start, noise = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    states = torch.stack(follow(model, links, start, lambda _: noise, None)).detach()
    expected = means(model, links, states[:-1], None)
    expected.retain_grad()
    logs = log_densities(links, states[1:], expected)
    torch.testing.assert_close(logs[2], -noise.square().sum(-1) / 2, **EXACT)
    assert not logs[:2].any()
    logs.exp().sum().backward()
    assert not expected.grad[:2].any() and bool(torch.isfinite(model.hf.leave.weight.grad).all())


def test_alignprop_has_the_gradient_of_the_reward_through_the_last_steps() -> None:
    model = tiny()
    run = as_run(model, points(5))
    objective = AlignProp(steps=4, eta=0.5, truncation="none", reward=Brightness())
    objective.setup(run)
    batch = step_of(objective, run)
    objective.loss(model, batch)[0].backward()
    weight: Any = model.hf.leave.weight
    found, before = weight.grad.clone(), weight.detach().clone()
    for index in ((0, 0), (1, 5)):
        ends = []
        for change in (1e-5, -1e-5):
            with torch.no_grad():
                weight.copy_(before)[index] += change
                ends.append(float(objective.loss(model, batch)[0]))
        assert float(found[index]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("kept", [1, 2])
def test_alignprop_cuts_the_gradient_where_it_shall(kept: int) -> None:
    model = tiny()
    run = as_run(model, points(5))
    objective = AlignProp(steps=4, eta=0.0, truncation="fixed", kept=kept, reward=Brightness())
    objective.setup(run)
    batch = step_of(objective, run)
    objective.loss(model, batch)[0].backward()
    links = denoising_chain(model, 4)
    with torch.no_grad():
        states = follow(model, links, objective.normal(batch), lambda _: torch.zeros(()), None)
    x = states[4 - kept].detach()
    parameter: Any = model.hf.leave.weight
    found = parameter.grad.clone()
    model.zero_grad()
    for link in links[4 - kept :]:
        x = link.ours * model(x, torch.tensor(link.sigma, dtype=torch.float64)) + link.stays * x
    (-x.mean(1).sum()).backward()
    torch.testing.assert_close(found, parameter.grad, **EXACT)


def test_alignprop_draws_how_far_it_goes_back() -> None:
    run = as_run(tiny(), points(5))
    for truncation, low, high in (("uniform", 1, 9), ("gaussian", 5, 9)):
        objective = AlignProp(steps=10, truncation=truncation)  # type: ignore[arg-type]
        found = []
        for run.step in range(300):
            found.append(objective.free(step_of(objective, run)))
        assert min(found) >= low and max(found) == high
        assert np.mean(found) == pytest.approx(5.0 if truncation == "uniform" else 7.9, abs=0.5)


def test_evaluation_reports_the_reward_of_what_is_drawn() -> None:
    model = Guess([0.3, -0.1])
    run = as_run(model, points(8))
    for objective in (AlignProp(steps=2), DDPO(steps=2), RLCM(), PRDP(steps=2)):
        objective.reward = Brightness()
        objective.setup(run)
        loss, figures = objective.loss(model, collate(list(run.loader.trees)))  # no places: not in a step
        assert float(figures["reward"]) == pytest.approx(8 * 0.1) and float(loss) == pytest.approx(-8 * 0.1)


@pytest.mark.parametrize("chain", [DDPO, RLCM])
def test_the_policy_gradient_is_that_of_the_expected_reward(chain: Any) -> None:
    # The guess m is the mean of the last action, so E R = -(|m - p|^2 + 2 c^2) / 2 and its gradient is -(m - p).
    model, place = Guess([0.3, -0.2]), [0.5, 0.4]
    run = as_run(model, points(100_000))
    objective = chain(steps=1, explore=0.8, reward=Near(place=place), least=10**9)
    objective.setup(run)
    batch = step_of(objective, run)
    objective.loss(model, batch)[0].backward()
    spread = float(objective._rolled.rewards.std(correction=0))
    gradient = model.place.grad * spread / len(batch)
    wanted = model.place.detach() - torch.tensor(place, dtype=torch.float64)  # the loss goes down where rewards go up
    torch.testing.assert_close(gradient, wanted, rtol=0.0, atol=0.01)


def test_every_step_of_a_chain_has_its_share_of_the_policy_gradient() -> None:
    model = tiny()
    run = as_run(model, points(40))
    objective = DDPO(steps=3, reward=Brightness(), clip=0.1)
    objective.setup(run)
    batch = step_of(objective, run)
    objective.loss(model, batch)[0].backward()
    rolled, advantages = objective._rolled, objective._advantages
    found = model.hf.leave.weight.grad.clone()
    model.zero_grad()
    total = torch.zeros(())
    for number, link in enumerate(rolled.links):
        x, then = rolled.states[number, :, 0], rolled.states[number + 1, :, 0]
        mean = link.ours * model(x, torch.tensor(link.sigma, dtype=torch.float64)) + link.stays * x
        total = total + (advantages * (then - mean).square().sum(1)).sum() / (2 * link.noise**2)
    total.backward()
    torch.testing.assert_close(found, model.hf.leave.weight.grad, **EXACT)


def test_the_clipped_surrogate_is_that_of_ppo() -> None:
    logs, old = torch.randn(3, 50, dtype=torch.float64), torch.randn(3, 50, dtype=torch.float64)
    advantages = torch.randn(50, dtype=torch.float64)
    losses, clipped = clipped_gradient(logs, old, advantages, 0.2)
    for number in range(50):
        total = 0.0
        for step in range(3):
            ratio, gain = math.exp(float(logs[step, number] - old[step, number])), float(advantages[number])
            total -= min(ratio * gain, min(max(ratio, 0.8), 1.2) * gain)
            assert bool(clipped[step, number]) == (abs(ratio - 1) > 0.2)
        assert float(losses[number]) == pytest.approx(total, rel=1e-12)


def test_rewards_are_compared_with_the_latest_of_their_class() -> None:
    worths = Worths(most=4, least=3)
    first = worths.advantages(torch.tensor([1.0, 2.0, 10.0]), torch.tensor([0, 0, 1]))
    every = np.array([1.0, 2.0, 10.0])
    np.testing.assert_allclose(first.numpy(), (every - every.mean()) / every.std(), rtol=1e-5)
    second = worths.advantages(torch.tensor([3.0, 4.0, 5.0]), torch.tensor([0, 0, 0]))
    np.testing.assert_allclose(second.numpy(), (np.array([3.0, 4, 5]) - 3.5) / np.std([2, 3, 4, 5]), rtol=1e-5)
    again = Worths(most=4, least=3)
    again.load_state_dict(worths.state_dict())
    assert again.kept == worths.kept


def test_prdp_is_zero_at_the_optimum_of_reward_less_divergence() -> None:
    # For R = mean of x over beta, the optimum of N(m, c^2) is N(m + c^2 / (2 beta), c^2): reward linear, same width.
    model = Guess([0.3, -0.2])
    run = as_run(model, points(30))
    objective = PRDP(steps=1, each=5, beta=0.5, explore=0.6, clip=None, reward=Brightness())
    objective.setup(run)
    noise = 0.6 * model.sigma_data
    with torch.no_grad():
        model.place += noise**2 / (2 * 0.5)
    batch = step_of(objective, run)
    loss, _ = objective.loss(model, batch)
    assert float(loss.detach()) < 1e-20
    loss.backward()
    assert float(model.place.grad.norm()) < 1e-9
    with torch.no_grad():
        model.place += 0.01
    assert float(objective.loss(model, batch)[0].detach()) > 1e-6


def test_prdp_takes_the_larger_of_the_plain_and_the_clipped_error() -> None:
    ratios, old = 0.3 * torch.randn(2, 7, 3, dtype=torch.float64), 0.3 * torch.randn(2, 7, 3, dtype=torch.float64)
    rewards = torch.randn(7, 3, dtype=torch.float64)
    found = reward_differences(ratios, old, rewards, 0.1)
    for b in range(7):
        errors = []
        for i, j in ((0, 1), (0, 2), (1, 2)):
            gap = float(rewards[b, i] - rewards[b, j])
            kept = [[min(max(float(ratios[t, b, c]), float(old[t, b, c]) - 0.1), float(old[t, b, c]) + 0.1)
                     for t in range(2)] for c in (i, j)]  # fmt: skip
            plain = (float(ratios[:, b, i].sum() - ratios[:, b, j].sum()) - gap) ** 2
            errors.append(max(plain, (sum(kept[0]) - sum(kept[1]) - gap) ** 2))
        assert float(found[b]) == pytest.approx(np.mean(errors), rel=1e-12)


def test_a_proxy_that_prefers_the_same_has_no_divergence() -> None:
    expert, other = torch.randn(3, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    assert float(preference_divergence(expert, expert + 5.0).abs().max()) < 1e-12
    found = preference_divergence(expert, other)
    total = torch.zeros(8, dtype=torch.float64)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        p, q = torch.sigmoid(expert[i] - expert[j]), torch.sigmoid(other[i] - other[j])
        total += p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    torch.testing.assert_close(found, total, **EXACT)


def test_the_models_turn_leaves_the_proxy_alone_and_the_reward_is_taken_off_the_distance() -> None:
    model = tiny("consistency")
    run = as_run(model, points(6))
    objective = RewardGuidedDistillation(teacher="", beta=2.0, proxy=False, reward=Brightness())
    objective._rewards = objective.named()
    objective._teacher = tiny("edm", seed=3).requires_grad_(False)
    batch = step_of(objective, run)
    with_reward = float(objective.loss(model, batch)[0].detach())
    guess = objective._seen[0]  # type: ignore[index]
    objective.beta = 0.0
    without = float(objective.loss(model, batch)[0].detach())
    assert with_reward == pytest.approx(without - 2.0 * float(guess.mean(1).sum()))
    from hone.objectives.reward_distillation import Proxy

    objective.beta, objective._proxy = 1.0, Proxy((2,), 0, 8).double()
    turns = objective.turns(model, batch)
    next(turns).loss.backward()
    assert all(p.grad is None and p.requires_grad for p in objective._proxy.parameters())
    model.zero_grad()
    next(turns).loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in objective._proxy.parameters())


def test_rewards_of_arrays_say_what_they_promise() -> None:
    labels = torch.arange(200) % 2
    trees = points(200, labels)
    trees.arrays += 4.0 * labels[:, None]
    run = as_run(tiny(classes=2), trees)
    arrays, asked = trees.arrays, torch.where(torch.arange(200) < 100, labels, torch.full_like(labels, -1))
    near, within = Near(width=2.0), Within(place=[4.0, 4.0], width=1.0)
    classifier = Classifier(steps=100, weight=3.0)
    for reward in (near, within, classifier):
        reward.setup(run)
    places = torch.stack([arrays[labels == 0].mean(0), arrays[labels == 1].mean(0), arrays.mean(0)])
    torch.testing.assert_close(near.of(arrays, asked), -(arrays - places[asked]).square().sum(1) / 8.0, **EXACT)
    inside = (arrays - 4.0).norm(dim=1) < 1.0
    assert torch.equal(within.of(arrays, asked), inside.double())
    found = classifier.of(arrays, asked)
    assert float(found[:100].exp().mean()) > 0.95 and not bool(found[100:].any())
    brightness = Brightness(wanted=1.0)
    total = worth([brightness, classifier], arrays, asked)
    torch.testing.assert_close(total, -(arrays.mean(1) - 1.0).abs() + 3.0 * found, **EXACT)
    with pytest.raises(ModelError, match="expected a class below 2, got 7"):
        Classifier(label=7, steps=1).setup(run)
    with pytest.raises(ModelError, match="expected 2 numbers, got 1"):
        Near(place=[1.0]).setup(run)
    with pytest.raises(ModelError, match="needs labelled data"):
        Classifier().setup(as_run(tiny(), points(9)))


def test_rewards_that_do_not_fit_are_refused_before_anything_is_loaded() -> None:
    def said(spec: dict[str, Any]) -> str:
        return " ".join(problem.message for problem in check_part("objective", spec, "objective", Places()))

    assert "judges text" in said({"name": "ddpo", "reward": "exact"})
    assert "has no gradient" in said({"name": "alignprop", "reward": ["near", "within"]})
    assert "has no gradient" in said({"name": "rg-lcd", "teacher": "x", "proxy": False, "reward": "within"})
    assert said({"name": "rg-lcd", "teacher": "x", "reward": "within"}) == ""
