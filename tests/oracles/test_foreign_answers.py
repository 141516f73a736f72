"""Answers that the model did not draw: no divergence is estimated from them, and a hint is no demonstration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hone.data.groups import FOREIGN, LOGPROB
from hone.objectives.hybrid import SASR
from hone.objectives.policy import REFERENCE, Policy
from hone.text.pack import Tree
from oracles.test_policy import EXACT, fake_run, groups, make_model, ready


def shown(**options: Any) -> list[Tree]:
    """Return groups whose last answers are the data's own, as sure as what somebody has written is."""
    trees = groups(foreign=1, values=(REFERENCE,), **options)
    for tree in trees:
        tree.values[LOGPROB][-1][:] = 0.0
    return trees


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_divergences_are_over_what_the_model_drew(estimator: Any) -> None:
    model, trees = make_model(), shown()
    objective = Policy(kl=0.5, kl_in="loss", estimator=estimator)
    first = objective.loss(model, ready(objective, trees))
    for tree in trees:
        tree.values[REFERENCE][-1][:] = -1e3
    second = objective.loss(model, ready(objective, trees))
    torch.testing.assert_close(first, second, **EXACT)
    gradients = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss, _ in (first, second)]
    torch.testing.assert_close(*gradients, **EXACT)
    assert torch.isfinite(first[1]["kl"]) and first[1]["kl"] < 10


def test_the_kl_to_the_sampler_is_nought_where_the_model_is_the_sampler() -> None:
    model, trees = make_model(), shown()
    objective = Policy()
    batch = ready(objective, trees)
    logprobs, starts = model.logprobs(batch).detach().numpy(), iter(batch.starts.tolist())
    for tree in trees:
        for place, tokens in enumerate(tree.tokens):
            begin = next(starts)
            if tree.fields[FOREIGN][place] == 0:
                tree.values[LOGPROB][place][:] = logprobs[begin : begin + len(tokens)]
    metrics = objective.loss(model, ready(objective, trees))[1]
    assert metrics["kl"].abs() < 1e-9


def test_groups_behind_hints_are_no_supervised_step() -> None:
    objective = SASR(warmup=1)
    objective.before_step(fake_run(make_model()), groups(hint=3))
    assert not objective._supervised
    objective.before_step(fake_run(make_model()), groups(hint=3, foreign=3))
    assert objective._supervised
