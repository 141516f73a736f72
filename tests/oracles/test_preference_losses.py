"""Losses over pairs equal TRL's on the same log-probabilities, values and gradients, or else their equations."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hone.errors import DataError
from hone.objectives import surrogates
from hone.objectives.anchored import APO, NCA, SPPO, BCOPair
from hone.objectives.answers import answers_of, best_of, pairs_of
from hone.objectives.dpo import DPO, EXO, IPO, MMDPO, RSO, DiscoPOP, margin_scale
from hone.objectives.preference import Preference, Side
from hone.objectives.reference_free import ASFT, CPO, ORPO, RRHF, SimPO, SLiC
from hone.parts import load
from hone.text.pack import Tree, pack

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # read when the module is imported

from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
PAIRS, LENGTH = 5, 7
# What TRL calls it, with its settings; ours.
DPO_LOSSES: dict[str, tuple[dict[str, Any], Preference]] = {
    "sigmoid": ({}, DPO(beta=0.3)),
    "robust": ({"smoothing": 0.2}, DPO(beta=0.3, flips=0.2, debias=True)),
    "hinge": ({}, RSO(beta=0.3)),
    "ipo": ({}, IPO(beta=0.3)),
    "exo_pair": ({"smoothing": 0.1}, EXO(beta=0.3, flips=0.1)),
    "nca_pair": ({}, NCA(beta=0.3)),
    "bco_pair": ({}, BCOPair(beta=0.3)),
    "sppo_hard": ({}, SPPO(beta=0.3)),
    "apo_zero": ({}, APO(beta=0.3)),
    "apo_down": ({}, APO(beta=0.3, anchor="down")),
    "discopop": ({}, DiscoPOP(beta=0.3)),
    "sigmoid_norm": ({}, DPO(beta=0.3, normalised=True)),
    "forward": ({"loss": "sigmoid", "divergence": "forward_kl"}, DPO(beta=0.3, divergence="forward_kl")),
    "js": ({"loss": "sigmoid", "divergence": "js_divergence"}, DPO(beta=0.3, divergence="js")),
    "alpha": ({"loss": "sigmoid", "divergence": "alpha_divergence", "single": True},
              DPO(beta=0.3, divergence="alpha", alpha=0.7)),
    "tail": ({"loss": "sigmoid", "ld": 0.4}, DPO(beta=0.3, tail=0.4)),
}  # fmt: skip


def token_logprobs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Return the policy's and the reference's log-probabilities (2 P, n), chosen answers first, and the mask."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 5, 7, 2, 6, 4, 5, 2, 7, 1])
    mask = (torch.arange(LENGTH)[None] < lengths[:, None]).to(dtype)
    ours, theirs = (
        -torch.rand(2 * PAIRS, LENGTH, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    return (ours.to(dtype) * mask).requires_grad_(), theirs.to(dtype) * mask, mask


def trl_dpo(name: str, options: dict[str, Any], ours: Tensor, theirs: Tensor, mask: Tensor, beta: float) -> Tensor:
    """Return the mean loss of TRL's trainer, whose model is made to give these log-probabilities."""
    nothing = torch.zeros_like(mask)
    made = [ours, theirs]

    def model(**kwargs: Any) -> Any:
        return SimpleNamespace(
            log_probs=made.pop(0),
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
            log_sum_sq_probs=nothing,
        )

    resting = torch.nn.Module().eval()
    resting.is_gradient_checkpointing = False
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x, unwrap_model=lambda x: x
    )
    stub = SimpleNamespace(
        model=resting, ref_model=model, accelerator=accelerator,
        aux_loss_enabled=False, ld_alpha=options.get("ld"), precompute_ref_logps=False,
        f_divergence_type=options.get("divergence", "reverse_kl"), f_alpha_divergence_coef=0.7,
        loss_types=[options.get("loss", name)], loss_weights=[1.0], beta=beta,
        label_smoothing=options.get("smoothing", 0.0), use_weighting=False, _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        args=SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None, discopop_tau=0.05),
    )  # fmt: skip
    completion = torch.cat([torch.zeros(len(mask), 1), mask], 1)
    inputs = {"completion_mask": completion, "input_ids": completion.long(), "attention_mask": completion}
    return DPOTrainer._compute_loss(stub, model, inputs, False)


def sides(ours: Tensor, theirs: Tensor, mask: Tensor) -> tuple[Side, Side]:
    made = [Side(*(x.sum(1).chunk(2)[which] for x in (ours, theirs, mask))) for which in (0, 1)]
    return made[0], made[1]


def packed_sides(objective: Preference, ours: Tensor, theirs: Tensor, mask: Tensor) -> tuple[Side, Side]:
    """Return the sides as the objective itself makes them of packed token values."""
    lengths = mask.sum(1).long()
    trees = []
    for pair in range(PAIRS):
        rows = [lengths[pair], lengths[PAIRS + pair]]
        arrays = [torch.ones(int(n), dtype=torch.int32).numpy() for n in (1, *rows)]
        weights = [torch.zeros(1).numpy(), *(torch.ones(int(n)).numpy() for n in rows)]
        trees.append(Tree(tuple(arrays), tuple(weights), (-1, 0, 0), {"chosen": (float("nan"), 1.0, 0.0)}, f"t:{pair}"))
    batch = pack(trees)
    answers = answers_of(batch)
    order = [row for pair in range(PAIRS) for row in (pair, PAIRS + pair)]
    values, reference = (torch.cat([x[row][: lengths[row]] for row in order]) for x in (ours, theirs))
    return objective._sides(answers, pairs_of(batch, answers), values, reference)


def compare(mine: Tensor, other: Tensor, inputs: Tensor) -> None:
    """Compare values, and gradients of the tokens that there are."""
    torch.testing.assert_close(mine, other, **CLOSE)
    own, theirs = (torch.autograd.grad(x, inputs, retain_graph=True)[0] for x in (mine, other))
    torch.testing.assert_close(own * (inputs != 0), theirs * (inputs != 0), **CLOSE)


@pytest.mark.parametrize("name", DPO_LOSSES)
def test_losses_with_a_reference_equal_trl(name: str) -> None:
    options, objective = DPO_LOSSES[name]
    dtype = torch.float32 if options.get("single") else torch.float64
    ours, theirs, mask = token_logprobs(dtype)
    expected = trl_dpo(name, options, ours, theirs, mask, objective.beta)
    chosen, rejected = packed_sides(objective, ours, theirs, mask)
    mine = objective.pair_loss(chosen, rejected, torch.full((PAIRS,), float("nan"), dtype=dtype)).mean()
    compare(mine, expected, ours)


@pytest.mark.parametrize(
    ("settings", "objective", "averaged"),
    [
        ({"loss_type": "sigmoid"}, CPO(beta=0.3), False),
        ({"loss_type": "sigmoid", "label_smoothing": 0.2}, CPO(beta=0.3, flips=0.2), False),
        ({"loss_type": "simpo", "simpo_gamma": 0.5}, SimPO(beta=0.3, gamma=0.5), True),
        ({"loss_type": "simpo", "simpo_gamma": 0.5, "alpha": 0.25}, SimPO(beta=0.3, gamma=0.5, alpha=0.25), True),
        ({"loss_type": "hinge"}, SLiC(delta=1 / 0.3), False),
    ],
    ids=["cpo", "cpo smoothed", "simpo", "alphapo", "slic"],
)
def test_reference_free_losses_equal_trl(settings: dict[str, Any], objective: Preference, averaged: bool) -> None:
    ours, theirs, mask = token_logprobs()
    chosen, rejected = sides(ours, theirs * 0, mask)
    stub = SimpleNamespace(
        **{"alpha": 0.0, "beta": 0.3, "label_smoothing": 0.0, "simpo_gamma": 0.0, **settings},
        accelerator=SimpleNamespace(device="cpu"),
    )
    given = (chosen.mean, rejected.mean) if averaged else (chosen.logprob, rejected.logprob)
    expected = CPOTrainer.cpo_loss(stub, *given)[0].mean()
    mine = objective.pair_loss(chosen, rejected, torch.zeros(PAIRS)).mean()
    compare(mine * (0.3 if settings["loss_type"] == "hinge" else 1.0), expected, ours)


def test_orpo_equals_trl() -> None:
    ours, theirs, mask = token_logprobs(torch.float32)  # TRL rounds to float32 itself
    chosen, rejected = sides(ours, theirs * 0, mask)
    stub = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    expected = -ORPOTrainer.odds_ratio_loss(stub, chosen.mean, rejected.mean)[0].mean()
    compare(ORPO(beta=0.3).pair_loss(chosen, rejected, torch.zeros(PAIRS)).mean(), expected, ours)


def test_conservative_dpo_is_the_mean_over_flipped_labels() -> None:
    ours, theirs, mask = token_logprobs()
    chosen, rejected = sides(ours, theirs, mask)
    nothing = torch.zeros(PAIRS)
    plain = DPO(beta=0.3)
    expected = 0.8 * plain.pair_loss(chosen, rejected, nothing) + 0.2 * plain.pair_loss(rejected, chosen, nothing)
    compare(DPO(beta=0.3, flips=0.2).pair_loss(chosen, rejected, nothing).mean(), expected.mean(), ours)


def test_asft_is_the_likelihood_of_one_answer_and_the_unlikelihood_of_the_other() -> None:
    ours, theirs, mask = token_logprobs()
    chosen, rejected = sides(ours, theirs, mask)
    first, second = chosen.mean.exp(), rejected.mean.exp()
    odds = -F.logsigmoid(torch.log(first / (1 - first))) - F.logsigmoid(-torch.log(second / (1 - second)))
    compare(ASFT(beta=0.3).pair_loss(chosen, rejected, torch.zeros(PAIRS)).mean(), 0.3 * odds.mean(), ours)


def test_margins_lengths_and_scaled_betas_enter_as_their_equations_say() -> None:
    ours, theirs, mask = token_logprobs()
    chosen, rejected = sides(ours, theirs, mask)
    margin = torch.tensor([0.0, 0.5, 1.0, 2.0, 9.0], dtype=torch.float64)
    gap = 0.3 * (chosen.logratio - rejected.logratio)
    cases = [
        (DPO(beta=0.3, margin=0.7), gap - 0.7 * margin),
        (DPO(beta=0.3, length_penalty=0.05), gap + 0.05 * (chosen.tokens - rejected.tokens)),
        (MMDPO(beta=0.3, scale=0.5, rate=2.0), gap * (1 + 0.5 * (1 - torch.exp(-2.0 * margin)))),
    ]
    for objective, expected in cases:
        compare(objective.pair_loss(chosen, rejected, margin).mean(), torch.log1p(torch.exp(-expected)).mean(), ours)
    assert margin_scale(torch.tensor([0.0, 1e9]), 0.5, 2.0).tolist() == [1.0, 1.5]
    with pytest.raises(DataError, match="margin"):
        MMDPO().pair_loss(chosen, rejected, margin * float("nan"))


def test_a_length_penalty_pulls_less_on_a_longer_preferred_answer() -> None:
    def pull(penalty: float) -> float:
        logprob = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
        chosen, rejected = (Side(one, torch.zeros_like(one), torch.tensor([tokens])) for one, tokens in
                            ((logprob, 60), (torch.zeros_like(logprob), 20)))  # fmt: skip
        DPO(beta=0.1, length_penalty=penalty).pair_loss(chosen, rejected, torch.zeros(1)).backward()
        return abs(float(logprob.grad))

    assert pull(0.05) == pytest.approx(0.1 / (1 + math.exp(2))) and pull(0.0) == pytest.approx(0.05)


def test_rrhf_ranks_every_pair_of_a_list_and_learns_the_best() -> None:
    scores = (float("nan"), 0.2, 0.9, 0.5)
    sizes = (2, 1, 3, 2)
    tree = Tree(
        tuple(torch.arange(n, dtype=torch.int32).numpy() + 1 for n in sizes),
        tuple((torch.zeros if i == 0 else torch.ones)(n).numpy() for i, n in enumerate(sizes)), (-1, 0, 0, 0),
        {"score": scores}, "t:0",
    )  # fmt: skip
    batch = pack([tree, tree])
    answers = answers_of(batch)
    pairs = pairs_of(batch, answers)
    met = sorted(zip(pairs.chosen.tolist(), pairs.rejected.tolist(), strict=True))
    assert met == [(1, 0), (1, 2), (2, 0), (4, 3), (4, 5), (5, 3)]
    assert best_of(batch, answers).tolist() == [1, 4]
    logprob = torch.tensor([-1.0, -6.0, -1.0])
    side = [Side(logprob[i], torch.zeros(3), torch.tensor([1.0, 3.0, 2.0])[i]) for i in ([1, 1, 2], [0, 2, 0])]
    assert RRHF().pair_loss(side[0], side[1], torch.zeros(3)).tolist() == [1.0, 1.5, 0.0]


def test_answers_that_nothing_tells_apart_are_refused() -> None:
    one = torch.ones(1)
    tree = Tree((one.int().numpy(),) * 3, (0 * one.numpy(), one.numpy(), one.numpy()), (-1, 0, 0),
                {"chosen": (float("nan"), 1.0, 1.0)}, "pairs.jsonl:7")  # fmt: skip
    batch = pack([tree])
    with pytest.raises(DataError, match=r"pairs.jsonl:7: expected a preferred answer and another"):
        pairs_of(batch, answers_of(batch))


REFERENCED = ["dpo", "rso", "ipo", "exo", "discopop", "mm-dpo", "apo", "nca", "sppo", "bco-pair"]
FREE = ["cpo", "simpo", "orpo", "asft", "slic", "rrhf"]


@pytest.mark.parametrize("name", REFERENCED + FREE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_extreme_log_ratios_give_finite_losses_and_gradients(name: str, dtype: torch.dtype) -> None:
    cases = [load("objective", name)()]
    if name == "dpo":
        cases += [DPO(divergence=d) for d in ("forward_kl", "js", "alpha")] + [DPO(flips=0.1, debias=True)]
    if name == "simpo":
        cases.append(SimPO(alpha=0.25))
    for objective in cases:
        for first, second in ((-1e4, -1.0), (-1.0, -1e4), (-1e4, -2e4), (-2e4, -1e4), (-1e-9, -1e-9), (-1e4, -1e4)):
            inputs = [torch.tensor([value], dtype=dtype, requires_grad=True) for value in (first, second)]
            middle = torch.full((1,), -1e4 if name in REFERENCED else 0.0, dtype=dtype)
            chosen, rejected = (Side(x, middle, torch.ones(1, dtype=dtype)) for x in inputs)
            loss = objective.pair_loss(chosen, rejected, torch.ones(1, dtype=dtype)).sum()
            gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
            assert torch.isfinite(loss), (objective, first, second)
            assert all(g is None or torch.isfinite(g).all() for g in gradients), (objective, first, second)


def test_scores_of_divergences_are_the_derivatives_of_their_generators() -> None:
    u = torch.tensor([0.1, 0.5, 1.0, 3.0], dtype=torch.float64, requires_grad=True)
    alpha = 0.3
    generators = {
        "reverse_kl": u * u.log(), "forward_kl": -u.log(),
        "js": u * u.log() - (u + 1) * ((u + 1) / 2).log(),
        "alpha": (u**alpha - alpha * u - (1 - alpha)) / (alpha * (alpha - 1)),
    }  # fmt: skip
    for name, value in generators.items():
        (slope,) = torch.autograd.grad(value.sum(), u, retain_graph=True)
        score = surrogates.divergence_score(u.log(), name, alpha)  # type: ignore[arg-type]
        shift = slope - score
        torch.testing.assert_close(shift, shift[:1].expand(4), rtol=1e-12, atol=1e-12)


def test_log1mexp_is_exact_at_both_ends() -> None:
    x = torch.tensor([-1e-12, -1e-3, -0.5, -0.7, -5.0, -50.0, -1000.0], dtype=torch.float64)
    exact = [float((1 - Decimal(value).exp()).ln()) for value in x.tolist()]
    expected = torch.tensor(exact, dtype=torch.float64)
    torch.testing.assert_close(surrogates.log1mexp(x), expected, rtol=1e-12, atol=1e-27)


def test_the_tail_of_the_longer_answer_weighs_less() -> None:
    ours, theirs, mask = token_logprobs()
    objective = DPO(tail=0.0)
    chosen, rejected = packed_sides(objective, ours, theirs, mask)
    shorter = torch.minimum(*mask.sum(1).chunk(2))
    kept = torch.arange(LENGTH)[None] < torch.cat([shorter, shorter])[:, None]
    both = (ours * kept).sum(1).chunk(2)
    torch.testing.assert_close(chosen.logprob, both[0])
    torch.testing.assert_close(rejected.logprob, both[1])
