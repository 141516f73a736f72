"""AFT's ranking loss equals a plain loop over its equation, and its constraints do what they are for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from conformance.test_objectives import make_model, pairs, tree
from hone.objectives.aft import AFT, Constraint, alignment_loss
from hone.objectives.answers import Pairs, answers_of, pairs_of
from hone.objectives.reference_free import RRHF
from hone.text.pack import Tree, pack

BOUNDARY = 0.3


def lists() -> list[Tree]:
    nan = float("nan")
    return [
        tree([3, 2, 4, 3, 5], [-1, 0, 0, 0, 0], seed=4, prompt=3, score=(nan, 0.0, 1.0, 1.0, 0.0)),  # right and wrong
        tree([2, 3, 2, 4], [-1, 0, 0, 0], seed=5, prompt=2, score=(nan, 0.2, 0.9, 0.7)),  # a ranking
    ]


def plain(scores: list[float], ranks: list[float], constraint: Constraint) -> float:
    """Return the loss of one prompt by the equation, the thresholds taken of whatever is better."""
    total = 1.0
    for worse, low in zip(scores, ranks, strict=True):
        above = [s for s, rank in zip(scores, ranks, strict=True) if rank > low]
        for better in above:
            total += math.exp(worse - better)
            if constraint == "boundary":
                total += math.exp(min(above) - 2 * BOUNDARY - worse)
    return math.log(total)


@pytest.mark.parametrize("constraint", ["boundary", "detached", "none"])
def test_the_loss_is_its_equation(constraint: Constraint) -> None:
    model, batch = make_model(), pack(lists())
    logprobs = model.logprobs(batch).detach()
    answers = answers_of(batch)
    scores = [float(logprobs[batch.starts[s] : batch.starts[s + 1]].mean()) for s in answers.segments]
    groups = [(scores[:4], [0.0, 1.0, 1.0, 0.0]), (scores[4:], [0.2, 0.9, 0.7])]
    expected = [plain(*group, constraint) for group in groups]
    found = alignment_loss(torch.tensor(scores, dtype=torch.float64), pairs_of(batch, answers), 2, constraint, BOUNDARY)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)
    objective = AFT(constraint=constraint, boundary=BOUNDARY, sft=0.5)
    loss, metrics = objective.loss(model, batch)
    best = [scores[1], scores[5]]  # the first of equals
    assert float(loss.detach()) == pytest.approx(sum(expected) - 0.5 * sum(best), rel=1e-6)
    assert objective.count(batch) == 2
    first = [(a, b) for a in scores[1:3] for b in (scores[0], scores[3])]
    second = [(scores[5], scores[6]), (scores[5], scores[4]), (scores[6], scores[4])]
    means = [sum(a - b for a, b in group) / len(group) for group in (first, second)]
    assert float(metrics["margin"]) == pytest.approx(sum(means), rel=1e-6)
    assert float(metrics["better"] - metrics["worse"]) == pytest.approx(sum(means), rel=1e-6)


def gradient(scores: list[float], constraint: Constraint, boundary: float = BOUNDARY) -> list[float]:
    """Return the gradient of the scores of one good and one bad answer."""
    made = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    one = torch.tensor([0])
    loss = alignment_loss(made, Pairs(one, one + 1, one), 1, constraint, boundary)
    (found,) = torch.autograd.grad(loss.sum(), made)
    return found.tolist()


def test_a_worse_answer_is_let_alone_at_the_boundary_and_held_below_it() -> None:
    good = -1.0
    assert gradient([good, good - BOUNDARY], "boundary")[1] == pytest.approx(0.0, abs=1e-12)
    assert gradient([good, good - BOUNDARY + 0.1], "boundary")[1] > 0  # still pushed down
    assert gradient([good, good - BOUNDARY - 0.1], "boundary")[1] < 0  # pulled up again
    assert gradient([good, -9.0], "none")[1] > 0  # without end
    assert gradient([good, -9.0], "detached")[1] == 0
    for constraint in ("boundary", "detached", "none"):
        assert gradient([good, -1.5], constraint)[0] < 0  # the better one rises in any case
    assert gradient([good, -1.5], "detached")[0] == pytest.approx(gradient([good, -1.5], "none")[0])


def test_the_gradient_of_the_boundary_leaves_the_threshold_alone() -> None:
    """Finite differences with the threshold held at its value."""
    scores, held = torch.tensor([-1.0, -1.4, -2.0], dtype=torch.float64), -1.4 - 2 * BOUNDARY
    ranked = Pairs(torch.tensor([0, 1]), torch.tensor([2, 2]), torch.zeros(2, dtype=torch.int64))

    def value(s: Tensor) -> Tensor:
        return torch.log(1 + torch.exp(s[2] - s[0]) + torch.exp(s[2] - s[1]) + 2 * torch.exp(held - s[2]))

    made = scores.clone().requires_grad_()
    (found,) = torch.autograd.grad(alignment_loss(made, ranked, 1, "boundary", BOUNDARY).sum(), made)
    step = 1e-6
    for index in range(3):
        moved = step * torch.eye(3, dtype=torch.float64)[index]
        assert float(found[index]) == pytest.approx(
            float(value(scores + moved) - value(scores - moved)) / (2 * step), rel=1e-6
        )


def test_prompts_do_not_mix_and_their_weights_count() -> None:
    model = make_model()
    heavy = [replace(one, fields={**one.fields, "weight": (2.5,) * len(one.tokens)}) for one in pairs()[:1]] + pairs()[
        1:
    ]
    apart = [float(AFT().loss(model, pack([one]))[0].detach()) for one in pairs()]
    assert float(AFT().loss(model, pack(pairs()))[0].detach()) == pytest.approx(sum(apart), rel=1e-9)
    assert float(AFT().loss(model, pack(heavy))[0].detach()) == pytest.approx(2.5 * apart[0] + sum(apart[1:]), rel=1e-9)
    assert AFT().count(pack(heavy)) == 4.5


def test_figures_of_pairs_are_those_of_other_rankings() -> None:
    model, batch = make_model(), pack(pairs())
    mine, theirs = (objective.loss(model, batch)[1] for objective in (AFT(), RRHF()))
    assert {name: float(v) for name, v in mine.items()} == pytest.approx({name: float(v) for name, v in theirs.items()})


@pytest.mark.parametrize("constraint", ["boundary", "detached", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_scores_give_finite_losses_and_gradients(constraint: Constraint, dtype: torch.dtype) -> None:
    for values in ((-1e4, -1.0), (-1.0, -1e4), (-1e4, -1e4), (-1e-9, -2e4)):
        scores = torch.tensor(values, dtype=dtype, requires_grad=True)
        one = torch.tensor([0])
        loss = alignment_loss(scores, Pairs(one, one + 1, one), 1, constraint, BOUNDARY).sum()
        (found,) = torch.autograd.grad(loss, scores)
        assert torch.isfinite(loss) and torch.isfinite(found).all()
