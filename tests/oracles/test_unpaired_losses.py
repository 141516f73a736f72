"""Losses of single answers equal TRL's, values and gradients; their reference points equal what plain loops find."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conformance.test_objectives import judged, pairs, tree
from conformance.test_penalties import gradients, new_run
from hone.engine.loop import Run
from hone.errors import DataError, HoneError
from hone.objectives.answers import answers_of
from hone.objectives.dpo import DPO
from hone.objectives.unpaired import BCO, KTO, Judged, bco_loss, kto_loss, mismatched, parts_of, verdicts
from hone.text.pack import Tree, pack

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

from trl.trainer.kto_trainer import KTOTrainer

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
GOOD = torch.tensor([True, False, False, True, True])


def trl_kto(ours: Tensor, theirs: Tensor, others: tuple[Tensor, Tensor], loss_type: str, weights: tuple) -> Tensor:
    """Return the loss of TRL's trainer, whose model is made to give these log-probabilities of five answers."""
    mask = torch.ones(5, 4)
    mask[:, 0] = 0

    def giving(values: Tensor) -> Any:
        nothing = torch.zeros(5, 3)
        return lambda **_: SimpleNamespace(
            log_probs=values, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool()
        )

    made = list(others)
    accelerator = SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda x: x, unwrap_model=lambda x: x)
    resting = torch.nn.Module().eval()
    resting.is_gradient_checkpointing = False
    stub = SimpleNamespace(
        model=resting, ref_model=giving(theirs), accelerator=accelerator, aux_loss_enabled=False, _tp_size=1,
        precompute_ref_logps=False, calculate_KL=loss_type == "kto", loss_type=loss_type, beta=0.3,
        desirable_weight=weights[0], undesirable_weight=weights[1], _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0, _compute_kl_logps=lambda model, batch: made.pop(0).sum(1),
        args=SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None),
    )  # fmt: skip
    inputs = {"completion_mask": mask, "input_ids": mask.long(), "attention_mask": mask, "label": GOOD}
    return KTOTrainer._compute_loss(stub, giving(ours), inputs, False)


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["divergence", "clamped"])
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_equals_trl(loss_type: str, sign: float) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs, first, second = (
        -3 * torch.rand(5, 3, generator=generator, dtype=torch.float64) for _ in range(4)
    )  # fmt: skip
    ours.requires_grad_()
    others = (first, first - sign * second.abs())  # the model likes the others' answers better, or worse
    expected = trl_kto(ours, theirs, others, loss_type, (1.5, 0.7))
    objective = KTO(beta=0.3, desirable=1.5, undesirable=0.7, point="kl" if loss_type == "kto" else "zero")
    if loss_type == "kto":
        objective.divergence = max(0.0, float((others[0] - others[1]).sum(1).mean()))
    mine = objective.answer_loss(0.3 * (ours - theirs).sum(1), GOOD).mean()
    torch.testing.assert_close(mine, expected, **CLOSE)
    own, other = (torch.autograd.grad(x, ours, retain_graph=True)[0] for x in (mine, expected))
    torch.testing.assert_close(own, other, **CLOSE)


def run_of(objective: Judged, micro: int | None = None) -> Run:
    """Return a run with an adapter off its start, whose base is the reference."""
    run = new_run(objective=objective, micro=micro)
    objective.setup(run)
    return run


def logratio(run: Run, prompt: np.ndarray, tokens: np.ndarray, weights: np.ndarray) -> float:
    """Return sum_t w_t [log pi - log pi_ref] of an answer by transformers itself, without packing."""
    ids = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))[None]
    padded = torch.from_numpy(weights).double()

    def score() -> Tensor:
        logits = run.model.hf(input_ids=ids, attention_mask=None).logits[0, len(prompt) - 1 : -1]
        return (padded * logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]).sum()

    run.model.packs = False
    with torch.no_grad():
        ours = score()
        with run.adapter.disabled(run.model.hf):
            theirs = score()
    run.model.packs = True
    return float(ours - theirs)


def test_the_reference_point_of_kto_is_the_mean_over_answers_of_the_prompt_before() -> None:
    run, trees = run_of(KTO(beta=0.3)), judged()
    parts = [parts_of(one) for one in trees]
    found = [
        logratio(run, prompt, *answer)
        for number, (prompt, _) in enumerate(parts) for answer in parts[number - 1][1]
    ]  # fmt: skip
    assert len(found) == sum(len(answers) for _, answers in parts) == len(answers_of(pack(trees)))
    run.objective.before_step(run, trees)
    assert run.objective.divergence == pytest.approx(max(0.0, np.mean(found)), abs=1e-6)
    run.objective.divergence = 0.25
    run.objective.before_step(run, trees[:1])
    assert run.objective.divergence == 0.25  # one prompt has no other's answers
    run.objective.before_step(run, [replace(t, weights=tuple(w * 0 for w in t.weights)) for t in trees])
    assert run.objective.divergence == 0.25


def test_a_divergence_below_zero_counts_as_none() -> None:
    run, signs = run_of(KTO()), []
    for trees in (judged(), pairs(), judged()[2:], judged()[::-1]):
        run.objective.divergence = 5.0
        run.objective.before_step(run, trees)
        total, _ = run.objective._logratios(run, mismatched(trees))
        signs.append(total < 0)
        assert (run.objective.divergence == 0) == (total < 0)
    assert any(signs) and not all(signs)


def test_mismatched_prompts_have_the_answers_of_the_one_before() -> None:
    single = tree([5], [-1], seed=1, prompt=2, label=(1.0,))
    double = tree([3, 2, 4], [-1, 0, 0], seed=2, prompt=3, chosen=(float("nan"), 1.0, 0.0))
    bare = tree([3, 4], [-1, -1], seed=3, prompt=1)  # two answers without a prompt: each begins with a token
    bare.weights[1][0] = 0
    made = mismatched([single, double, bare])
    assert [one.parents for one in made] == [(-1, 0, 0), (-1, 0), (-1, 0, 0)]
    assert np.array_equal(made[0].tokens[0], single.tokens[0][:2])
    assert np.array_equal(made[0].tokens[1], bare.tokens[0][1:]) and np.array_equal(
        made[0].tokens[2], bare.tokens[1][1:]
    )
    assert np.array_equal(made[1].tokens[0], double.tokens[0]) and np.array_equal(
        made[1].tokens[1], single.tokens[0][2:]
    )
    assert made[1].weights[1].tolist() == [1.0] * 3 and not made[1].weights[0].any()
    cut = mismatched([single, double], longest=4)
    assert [len(t) for t in cut[0].tokens] == [2, 2, 2] and [len(t) for t in cut[1].tokens] == [3, 1]
    assert [one.where for one in mismatched([single, double], longest=3)] == [single.where]  # no room behind the other


def test_the_shift_of_bco_is_the_mean_of_all_rewards_so_far() -> None:
    run, steps, seen = run_of(BCO(beta=0.3)), (judged(), pairs(), judged()[3:]), []
    for trees in steps:
        for one in trees:
            prompt, answers = parts_of(one)
            seen += [0.3 * logratio(run, prompt, *answer) for answer in answers]
        before = run.objective.state_dict()
        for _ in range(2):  # a step that breaks off is taken again, and counts once
            run.objective.before_step(run, trees)
            assert run.objective.shift() == pytest.approx(np.mean(seen), abs=1e-6)
            assert run.objective.state_dict() == before
        run.objective.after_step(run, {})
    other = BCO(beta=0.3)
    other.load_state_dict(run.objective.state_dict())
    assert (other.mean, other.seen) == (run.objective.mean, len(seen))
    reward = torch.tensor([1.0, 1.0], dtype=torch.float64)
    found = bco_loss(reward, torch.tensor([True, False]), 0.4)
    assert found.tolist() == pytest.approx([np.log1p(np.exp(-0.6)), np.log1p(np.exp(0.6))])


@pytest.mark.parametrize("objective", [KTO(beta=0.3, undesirable=2.0), BCO(beta=0.3)], ids=["kto", "bco"])
def test_micro_batches_change_neither_the_point_nor_the_gradient(objective: Judged) -> None:
    found = []
    for micro in (None, 12, 1):
        run = run_of(replace(objective), micro)
        found.append((gradients(run, judged()[2:]), run.objective.state_dict(), run.last))
    for other, state, row in found[1:]:
        for key, gradient in found[0][0].items():
            torch.testing.assert_close(other[key], gradient, rtol=1e-9, atol=1e-11)
        assert state == pytest.approx(found[0][1], rel=1e-9)
        assert row["pair_accuracy"] == pytest.approx(found[0][2]["pair_accuracy"])
    assert found[0][1] != replace(objective).state_dict()


def test_figures_of_pairs_are_those_of_dpo() -> None:
    run = run_of(KTO(beta=0.3))
    dpo = DPO(beta=0.3)
    dpo.setup(run)
    batch = pack(pairs())
    with torch.no_grad():
        _, mine = run.objective.loss(run.model, batch)
        _, theirs = dpo.loss(run.model, batch)
    for name, value in theirs.items():
        assert float(mine[name]) / run.objective.count(batch) == pytest.approx(float(value) / dpo.count(batch)), name
    single = [tree([5], [-1], seed=1, prompt=2, label=(1.0,))]
    assert set(run.objective.loss(run.model, pack(single))[1]) == {"answer_accuracy", "point"}


def test_answers_are_good_by_choice_score_or_label() -> None:
    batch = pack(judged())
    answers = answers_of(batch)
    assert verdicts(batch, answers, 0.5).tolist() == [True, False] * 3 + [False, True, True, True, False]
    assert verdicts(batch, answers, 0.8).tolist() == [True, False] * 3 + [False, True, False, True, False]
    unknown = pack([*pairs(), Tree((np.arange(3, dtype=np.int32),), (np.ones(3, np.float32),), (-1,), {}, "a.jsonl:7")])
    with pytest.raises(
        DataError, match=r"a.jsonl:7: expected an answer that is said to be good or bad.*columns: \{label"
    ):
        verdicts(unknown, answers_of(unknown), 0.5)


def test_stored_values_are_refused_where_other_answers_are_scored() -> None:
    with pytest.raises(
        HoneError, match=r"cached holds the values of the data's own answers.*use reference: adapter or copy"
    ):
        run_of(KTO(reference="cached"))
    assert type(run_of(KTO()).objective._reference).__name__ == "Disabled"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_log_ratios_give_finite_losses_and_gradients(dtype: torch.dtype) -> None:
    reward = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0], dtype=dtype, requires_grad=True)
    for point in (0.0, 1e4):
        for losses in (kto_loss(reward, GOOD, point, 1.0, 1.0), bco_loss(reward, GOOD, point)):
            (gradient,) = torch.autograd.grad(losses.sum(), reward)
            assert torch.isfinite(losses).all() and torch.isfinite(gradient).all()


def test_a_subclass_must_give_a_loss() -> None:
    with pytest.raises(NotImplementedError, match="Judged must define answer_loss"):
        Judged().answer_loss(torch.zeros(1), GOOD[:1])
