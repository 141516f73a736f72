"""Policy objectives against TRL, against plain arithmetic in float64, and against closed-form optima."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hone.data.groups import CREDIT, FOREIGN, HINT, LOGPROB, REWARD
from hone.errors import HoneError
from hone.objectives.advantages import ADVANTAGE, compared, discounted, generalised, group_advantages, rewards_of
from hone.objectives.grpo import GRPO, DrGRPO
from hone.objectives.hybrid import SASR, SRFT, UFT
from hone.objectives.policy import REFERENCE, Policy, View, kl_estimate, surrogate
from hone.objectives.ppo import CRITIC, PPO, RETURN, VALUE, value_loss
from hone.objectives.reinforce import RLOO
from hone.options import Places, check_part
from hone.samplers.text import Sample
from hone.text.flat import flatten, unflatten
from hone.text.generate import generate
from hone.text.model import LanguageModel
from hone.text.pack import Packed, Tree, pack
from hone.text.tokenizer import train_tokenizer

CONFIG = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
LIMIT = 12  # longest answer in tokens
EXACT = {"rtol": 1e-10, "atol": 1e-10}


def make_model(dtype: torch.dtype = torch.float64) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel.fresh(CONFIG, train_tokenizer(["nothing is rendered here"], 300)).to(dtype=dtype).eval()


def group(
    seed: int, lengths: tuple[int, ...], *, hint: int = 0, foreign: int = 0, values: tuple[str, ...] = ()
) -> Tree:
    """Return a prompt with answers of random tokens; `foreign` of them, the last ones, are not the model's own."""
    rng = np.random.default_rng(seed)
    sizes = [5, *([hint] if hint else []), *lengths]
    first = len(sizes) - len(lengths)
    tokens = tuple(rng.integers(3, 200, size).astype(np.int32) for size in sizes)
    weights = tuple(np.full(size, float(place > 0), np.float32) for place, size in enumerate(sizes))
    nan = math.nan
    rewards = [nan] * first + rng.integers(0, 2, len(lengths)).astype(float).tolist()
    rewards[first], rewards[-1] = 1.0, 0.0
    marks = [nan, *([1.0] if hint else []), *([0.0] * (len(lengths) - foreign)), *([1.0] * foreign)]
    credit = [np.zeros(size) for size in sizes]
    for place in range(first, len(sizes)):
        credit[place][-1] = rewards[place]
    random = {name: tuple(rng.normal(-5.7, 0.4, size) for size in sizes) for name in (LOGPROB, *values)}
    hints = (0.0, *([1.0] if hint else []), *([0.0] * len(lengths)))
    return Tree(
        tokens, weights, (-1, *([0] if hint else []), *([1 if hint else 0] * len(lengths))),
        {REWARD: tuple(rewards), FOREIGN: tuple(marks), HINT: hints}, f"row:{seed}", {**random, CREDIT: tuple(credit)},
    )  # fmt: skip


def groups(**options: Any) -> list[Tree]:
    return [group(seed, lengths, **options) for seed, lengths in enumerate([(4, 7, 3), (6, 2, 9)])]


def ready(objective: Policy, trees: list[Tree]) -> Packed:
    objective._longest = LIMIT
    return pack(group_advantages(trees, objective.advantage, objective.combine))


def rows_of(batch: Packed) -> dict[str, Tensor]:
    """Return answers as padded rows (A, n), as TRL has them: ids, mask, log-probabilities of the sampler and so on."""
    parts = [(int(batch.starts[s]), int(batch.starts[s + 1])) for s in range(batch.segments) if batch.parents[s] >= 0]
    longest = max(end - begin for begin, end in parts)

    def rows(whole: Tensor) -> Tensor:
        return torch.stack([torch.nn.functional.pad(whole[b:e], (0, longest - (e - b))) for b, e in parts])

    return {
        "ids": rows(batch.tokens),
        "mask": rows(torch.ones(len(batch))),
        **{n: rows(v) for n, v in batch.values.items()},
    }


def of_trl(
    batch: Packed, logprobs: Tensor, loss_type: str, *, level: str = "token", beta: float = 0.0, high: float = 0.2
) -> Tensor:
    """Return TRL's loss of the same log-probabilities."""
    from trl import GRPOTrainer

    rows = rows_of(batch)
    mask = rows["mask"]
    args = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logprobs, torch.zeros_like(logprobs), None),
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=beta, args=args,
        importance_sampling_level=level, epsilon_low=0.2, epsilon_high=high, loss_type=loss_type, use_vllm=False,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, max_completion_length=LIMIT,
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, **_: x, sync_gradients=True),
        _entropy_bonus_enabled=False, _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    advantages = rows[ADVANTAGE][:, 0]
    inputs = {
        "prompt_ids": rows["ids"][:, :1], "prompt_mask": mask[:, :1].long(), "completion_ids": rows["ids"],
        "completion_mask": mask, "advantages": advantages, "old_per_token_logps": rows[LOGPROB],
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    if beta:
        inputs["ref_per_token_logps"] = rows[REFERENCE]
    loss: Tensor = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss


def answer_rows(model: LanguageModel, batch: Packed) -> Tensor:
    """Return log-probabilities of answers as padded rows (A, n)."""
    whole = model.logprobs(batch)
    parts = [(int(batch.starts[s]), int(batch.starts[s + 1])) for s in range(batch.segments) if batch.parents[s] >= 0]
    longest = max(end - begin for begin, end in parts)
    return torch.stack([torch.nn.functional.pad(whole[b:e], (0, longest - (e - b))) for b, e in parts])


def gradients(loss: Tensor, model: LanguageModel) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.hf.parameters()))])


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (GRPO(), {"loss_type": "grpo"}),
        (GRPO(kl=0.3), {"loss_type": "grpo", "beta": 0.3}),
        (GRPO(ratio="answer"), {"loss_type": "grpo", "level": "sequence"}),
        (Policy(clip_high=0.28), {"loss_type": "dapo", "high": 0.28}),
        (DrGRPO(), {"loss_type": "dr_grpo"}),
    ],
    ids=["grpo", "kl", "one ratio for an answer", "dapo", "dr-grpo"],
)
def test_losses_and_gradients_are_those_of_trl(objective: Policy, options: dict[str, Any]) -> None:
    model, batch = make_model(), ready(objective, groups(values=(REFERENCE,)))
    loss = objective.loss(model, batch)[0] / objective.count(batch)
    expected = of_trl(batch, answer_rows(model, batch), **options)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(gradients(loss, model), gradients(expected, model), rtol=1e-6, atol=1e-8)


def test_advantages_are_those_of_trl() -> None:
    rewards = np.array([1.0, 0.0, 0.5, 0.0])
    whole = torch.tensor(rewards)
    expected = (whole - whole.mean()) / (whole.std() + 1e-4)
    np.testing.assert_allclose(compared(rewards, "group"), expected.numpy(), rtol=1e-12)
    others = [(rewards.sum() - r) / 3 for r in rewards]
    np.testing.assert_allclose(compared(rewards, "leave-one-out"), rewards - others, rtol=1e-12)
    np.testing.assert_allclose(compared(rewards, "centred"), rewards - 0.375, rtol=1e-12)
    with pytest.raises(HoneError, match="there is only one; use batch"):
        compared(rewards[:1], "group")


def test_rloo_has_the_gradient_of_reinforce_with_the_others_as_baseline() -> None:
    model, objective = make_model(), RLOO()
    batch = ready(objective, groups())
    own = model.logprobs(batch).detach()
    batch.values[LOGPROB] = own  # the sampler is the model
    loss = objective.loss(model, batch)[0] / objective.count(batch)
    rewards = torch.from_numpy(np.stack([rewards_of(tree)[1] for tree in groups()]))
    baseline = (rewards.sum(1, keepdim=True) - rewards) / 2
    sums = answer_rows(model, batch).sum(1)
    expected = -((rewards - baseline).flatten() * sums).mean() / LIMIT
    torch.testing.assert_close(gradients(loss, model), gradients(expected, model), **EXACT)


def test_several_rewards_are_compared_each_by_itself() -> None:
    tree = group(0, (2, 2, 2))
    large, small = (math.nan, 100.0, 0.0, 0.0), (math.nan, 0.0, 0.0, 0.01)
    tree.fields[f"{REWARD}/large"], tree.fields[f"{REWARD}/small"] = large, small
    (made,) = group_advantages([tree], "group", "advantages")
    first, second = compared(np.array(large[1:]), "group"), compared(np.array(small[1:]), "group")
    for place in range(3):
        np.testing.assert_allclose(made.values[ADVANTAGE][place + 1], (first[place] + second[place]) / 2, rtol=1e-12)


def rewarded(tree: Tree, **worth: tuple[float, ...]) -> Tree:
    """Return a group whose answers are worth, by each reward, so much, and the sum of it in all."""
    first = len(tree.tokens) - len(next(iter(worth.values())))
    fields = {f"{REWARD}/{name}": (math.nan,) * first + row for name, row in worth.items()}
    whole = (math.nan,) * first + tuple(map(sum, zip(*worth.values(), strict=True)))
    credit = tuple(np.zeros(len(tokens)) for tokens in tree.tokens)
    for row, total in zip(credit[first:], whole[first:], strict=True):
        row[-1] = total
    return replace(tree, fields={**tree.fields, **fields, REWARD: whole}, values={**tree.values, CREDIT: credit})


@pytest.mark.parametrize("how", ["group", "centred", "leave-one-out", "batch", "raw"])
def test_each_reward_by_itself_is_compared_less_the_divergence(how: Any) -> None:
    worth = [{"a": (1.0, 0.0, 0.5), "b": (0.1, 0.3, 0.2)}, {"a": (0.0, 0.0, 1.0), "b": (0.2, 0.9, 0.4)}]
    penalties = Policy(kl=0.3, kl_in="reward")._penalties

    def advantages(names: str, combine: Any) -> list[Tree]:
        plain = groups(values=(REFERENCE,))
        trees = [rewarded(one, **{n: row[n] for n in names}) for one, row in zip(plain, worth, strict=True)]
        return group_advantages(trees, how, combine, penalties(trees))

    alike = zip(advantages("ab", "advantages"), advantages("a", "sum"), advantages("b", "sum"), strict=True)
    for trees in alike:
        for own, one, other in zip(*(tree.values[ADVANTAGE] for tree in trees), strict=True):
            np.testing.assert_allclose(own, (one + other) / 2, rtol=1e-12)


def test_a_reward_of_parts_is_not_compared_by_itself() -> None:
    tree = rewarded(group(0, (3, 3)), whole=(1.0, 0.0))
    tree.values[CREDIT][1][:] = [0.5, 0.0, 0.5]
    with pytest.raises(HoneError, match=r"row:0: a reward credits parts of an answer.*set objective\.combine=sum"):
        group_advantages([tree], "centred", "advantages")


def partly_trained() -> tuple[Tree, list[np.ndarray], Any]:
    """Return a group with an answer that is masked and one of the data's own, a reference, and what the others lose."""
    tree, other = group(0, (4, 7, 3, 5), foreign=1), make_model()
    tree.weights[1][:] = 0.0
    tree.values[LOGPROB][-1][:] = 0.0
    torch.nn.init.normal_(next(other.hf.parameters()))
    batch = pack([tree])
    logprobs = other.logprobs(batch).detach().numpy()
    lost = [np.zeros(len(tokens)) for tokens in tree.tokens]
    for segment in (2, 3):
        begin, end = int(batch.starts[segment]), int(batch.starts[segment + 1])
        lost[segment] = 0.3 * (tree.values[LOGPROB][segment] - logprobs[begin:end])
    reference = SimpleNamespace(token_values=lambda m, batch: other.logprobs(batch)[batch.weights != 0])
    return tree, lost, reference


def test_the_divergence_comes_off_what_the_model_wrote_and_trains_on() -> None:
    tree, lost, reference = partly_trained()
    objective = RLOO(kl=0.3)
    objective._reference = reference
    (made,) = objective.appraise(fake_run(make_model()), [tree])
    earned = np.array([tree.values[CREDIT][s].sum() - lost[s].sum() for s in (1, 2, 3, 4)])
    for place, segment in enumerate((1, 2, 3, 4)):
        others = np.delete(earned, place).mean()
        expected = discounted(tree.values[CREDIT][segment] - lost[segment]) - others
        np.testing.assert_allclose(made.values[ADVANTAGE][segment], expected, rtol=1e-9, atol=1e-12)


def test_whitening_leaves_masked_answers_out() -> None:
    tree, _, reference = partly_trained()
    objective, model = PPO(kl=0.3), make_model()
    objective._reference = reference
    objective.equip(model)
    tree.values[CREDIT][1][-1] = 100.0
    (made,) = objective.appraise(fake_run(model), [tree])
    every = np.concatenate([made.values[ADVANTAGE][s] for s in (2, 3, 4)])
    assert abs(every.mean()) < 1e-12 and every.std() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("objective", "refused"),
    [
        ({"name": "ppo", "advantage": "batch"}, "advantage"),
        ({"name": "ppo", "combine": "advantages"}, "combine"),
        ({"name": "srft", "kl": 0.1}, "kl"),
        ({"name": "srft", "entropy": 0.1}, "entropy"),
        ({"name": "srft", "ratio": "answer"}, "ratio"),
        ({"name": "srft", "kl": 0.1, "kl_in": "reward"}, None),
        ({"name": "ppo", "kl": 0.1, "entropy": 0.1, "ratio": "answer"}, None),
    ],
)
def test_options_that_would_do_nothing_are_refused(objective: dict[str, Any], refused: str | None) -> None:
    problems = check_part("objective", objective, "objective", Places())
    assert [problem.field for problem in problems] == ([f"objective.{refused}"] if refused else [])


def test_estimators_agree_with_the_divergence_they_estimate() -> None:
    torch.manual_seed(0)
    p, q = (torch.randn(7, dtype=torch.float64).log_softmax(0) for _ in range(2))
    exact = (p.exp() * (p - q)).sum()
    for estimator in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * kl_estimate(p, q, estimator)).sum(), exact, **EXACT)
    assert (kl_estimate(p, q, "k3") >= 0).all()
    close = p + 1e-3 * (q - p)
    near = (p - close).square()
    torch.testing.assert_close(kl_estimate(p, close, "k2"), near / 2, **EXACT)


def test_the_ratio_stops_to_count_at_the_clip() -> None:
    logratio = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=torch.float64)
    terms, clipped = surrogate(logratio, advantage, 0.2, 0.3)
    assert clipped.tolist() == [True, False, False, True, False]
    expected = [-1.3, math.exp(0.5), -math.exp(-0.5), 0.8, -math.exp(0.1)]
    np.testing.assert_allclose(terms.detach().numpy(), expected, rtol=1e-12)
    (slope,) = torch.autograd.grad(terms.sum(), logratio)
    assert slope[0] == slope[3] == 0 and slope[1] != 0


@pytest.mark.parametrize(("kl_in", "estimator"), [("reward", "k1"), ("loss", "k2")])
def test_a_regularised_policy_reaches_its_closed_form(kl_in: Any, estimator: Any) -> None:
    """The optimum of E[r] - beta KL(p, q) is p proportional to q exp(r / beta)."""
    torch.manual_seed(1)
    beta, rewards = 0.5, torch.tensor([0.0, 1.0, 0.2, 0.7, 0.0], dtype=torch.float64)
    reference = torch.randn(5, dtype=torch.float64).log_softmax(0)
    logits = reference.clone().requires_grad_()
    objective = Policy(advantage="raw", clip_low=None, clip_high=None, kl=beta, kl_in=kl_in, estimator=estimator)
    count = 20_000
    for step in range(400):
        logprobs = logits.log_softmax(0)
        drawn = torch.multinomial(logprobs.detach().exp(), count, replacement=True)
        picked = logprobs[drawn]
        own = rewards[drawn]
        if kl_in == "reward":
            own = own - beta * kl_estimate(picked.detach(), reference[drawn], estimator)
        values = {LOGPROB: picked.detach(), ADVANTAGE: own - own.mean(), REFERENCE: reference[drawn]}
        alone = SimpleNamespace(tokens=torch.ones(count, dtype=torch.float64), token_answers=torch.arange(count))
        nothing = torch.zeros(count, dtype=torch.bool)
        view = View(None, None, alone, logits, picked, values, nothing, nothing, 1.0)  # type: ignore[arg-type]
        (slope,) = torch.autograd.grad(objective.policy_loss(view)[0] / count, logits)
        logits.data -= (2.0 if step < 300 else 0.3) * slope
    expected = (reference + rewards / beta).softmax(0)
    torch.testing.assert_close(logits.softmax(0).detach(), expected, rtol=0, atol=0.02)


def test_samplers_and_trainers_log_probabilities_are_the_same() -> None:
    for dtype, close in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        model = make_model(dtype)
        prompt = np.arange(5, 15, dtype=np.int32)
        (made,) = generate(model, [prompt], samples=6, max_new_tokens=16, sampler=Sample(temperature=0.7), stop=[7],
                           seed=3, scored_at=0.7)  # fmt: skip
        drawn = [one.trajectory() for one in made]
        weights = (np.zeros(10, np.float32), *(np.ones(len(ids), np.float32) for ids, _ in drawn))
        tree = Tree((prompt, *(ids for ids, _ in drawn)), weights, (-1, *(0 for _ in drawn)))
        trained = model.logprobs(pack([tree]), temperature=0.7)[10:]
        sampled = torch.from_numpy(np.concatenate([logprobs for _, logprobs in drawn]))
        torch.testing.assert_close(trained.double(), sampled, rtol=0, atol=close)


def test_generalised_advantages_equal_their_sum() -> None:
    rng = np.random.default_rng(0)
    credit, values = rng.normal(size=9), rng.normal(size=9)
    discount, trace = 0.9, 0.8
    later = np.append(values[1:], 0.0)
    errors = credit + discount * later - values
    expected = [sum((discount * trace) ** (s - t) * errors[s] for s in range(t, 9)) for t in range(9)]
    np.testing.assert_allclose(generalised(credit, values, discount, trace), expected, rtol=1e-12)
    np.testing.assert_allclose(generalised(credit, values, 1.0, 1.0) + values, discounted(credit), rtol=1e-12)


def test_ppo_adds_the_clipped_value_loss() -> None:
    model, objective = make_model(), PPO(value_weight=0.7)
    objective.equip(model)
    torch.nn.init.normal_(model.extras[CRITIC].weight)
    trees = group_advantages(groups(values=(VALUE, RETURN)), "group")
    batch = pack(trees)
    loss = objective.loss(model, batch)[0]
    plain = Policy(kl_in="reward", estimator="k1").loss(model, batch)[0]
    chosen = batch.weights.nonzero().squeeze(1)
    values = model.extras[CRITIC](model.hidden(batch)[batch.previous[chosen]]).squeeze(1)
    old, returns = (batch.values[name][chosen] for name in (VALUE, RETURN))
    near = old + (values - old).clamp(-0.2, 0.2)
    critic = 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2).sum()
    torch.testing.assert_close(loss, plain + 0.7 * critic, **EXACT)
    torch.testing.assert_close(value_loss(values, old, returns, None), (values - returns) ** 2 / 2, **EXACT)


def fake_run(model: LanguageModel, step: int = 0) -> Any:
    import contextlib

    cluster = SimpleNamespace(device="cpu", autocast=contextlib.nullcontext, world=1, rank=0)
    return SimpleNamespace(model=model, cluster=cluster, step=step, total=10,
                           recipe=SimpleNamespace(micro_tokens=16, batch_tokens=16, seed=0))  # fmt: skip


def test_ppo_appraises_a_phase_whatever_its_micro_batches() -> None:
    model, objective = make_model(), PPO(kl=0.2, whiten=False, discount=0.9)
    objective.equip(model)
    torch.nn.init.normal_(model.extras[CRITIC].weight)
    other = make_model()
    torch.nn.init.normal_(next(other.hf.parameters()))
    objective._reference = SimpleNamespace(  # type: ignore[assignment]
        token_values=lambda m, batch: other.logprobs(batch)[batch.weights != 0]
    )
    made = objective.appraise(fake_run(model), groups())
    for tree, before in zip(made, groups(), strict=True):
        batch = pack([before])
        reference, states = other.logprobs(batch), model.hidden(batch)
        for segment in rewards_of(tree)[0]:
            span = slice(int(batch.starts[segment]), int(batch.starts[segment + 1]))
            values = model.extras[CRITIC](states[batch.previous[span]]).squeeze(1).detach().numpy()
            kl = before.values[LOGPROB][segment] - reference[span].detach().numpy()
            expected = generalised(before.values[CREDIT][segment] - 0.2 * kl, values, 0.9, 0.95)
            np.testing.assert_allclose(tree.values[ADVANTAGE][segment], expected, rtol=1e-9)
            np.testing.assert_allclose(tree.values[RETURN][segment], expected + values, rtol=1e-9)
    objective.whiten = True
    white = objective.appraise(fake_run(model), groups())
    every = np.concatenate([tree.values[ADVANTAGE][s] for tree in white for s in rewards_of(tree)[0]])
    assert abs(every.mean()) < 1e-12 and abs(every.std() - 1) < 1e-3


def test_a_hint_is_learned_by_its_likelihood_and_no_policy_gradient() -> None:
    model, objective = make_model(), UFT(hint_weight=0.5)
    trees = groups(hint=3)
    batch = ready(objective, trees)
    objective.before_step(None, trees)
    loss = objective.loss(model, batch)[0] / objective.count(batch)
    logprobs = model.logprobs(batch)
    hints = torch.cat([logprobs[batch.starts[s] : batch.starts[s + 1]] for s in (1, 6)])
    own = torch.cat([torch.arange(int(batch.starts[s]), int(batch.starts[s + 1])) for s in (2, 3, 4, 7, 8, 9)])
    terms, _ = surrogate(logprobs[own] - batch.values[LOGPROB][own], batch.values[ADVANTAGE][own], 0.2, 0.2)
    assert objective.count(batch) == len(own)
    torch.testing.assert_close(loss, terms.mean() - 0.5 * hints.mean(), **EXACT)


def test_srft_has_its_four_terms() -> None:
    model, objective = make_model(), SRFT()
    trees = groups(foreign=1)
    for tree in trees:  # nobody knows how likely the one who wrote it found it: certain
        tree.values[LOGPROB][-1][:] = 0.0
    batch = ready(objective, trees)
    objective.before_step(None, trees)
    loss = objective.loss(model, batch)[0] / objective.count(batch)
    expected, demo, demo_tokens = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    logprobs, hidden = model.logprobs(batch), model.hidden(batch)
    for segment in (1, 2, 3, 5, 6, 7):
        span = slice(int(batch.starts[segment]), int(batch.starts[segment + 1]))
        p = model.head(hidden[batch.previous[span]]).softmax(-1)
        entropy = -(p * p.log()).sum(-1).mean().detach()
        if segment in (3, 7):
            demo = demo - 0.5 * (-entropy).exp() * logprobs[span].sum()
            demo_tokens += span.stop - span.start
            terms, _ = surrogate(logprobs[span], batch.values[ADVANTAGE][span], 0.2, 0.2)
            expected = expected + terms.sum()
        elif batch.fields[REWARD][segment] == 1:
            expected = expected - 0.1 * entropy.exp() * logprobs[span].sum()
        else:
            expected = expected + logprobs[span].sum()
    torch.testing.assert_close(loss, expected / objective.count(batch) + demo / demo_tokens, **EXACT)


def test_sasr_draws_its_turns_from_the_gradients() -> None:
    model, objective = make_model(), SASR(warmup=2, gamma=1.0)
    objective._longest = LIMIT
    assert objective.spares_rollouts(fake_run(model))
    shown = objective.appraise(fake_run(model), [group(0, (4,), foreign=1)])
    objective.before_step(fake_run(model), shown)
    batch = pack(shown)
    loss = objective.loss(model, batch)[0] / objective.count(batch)
    torch.testing.assert_close(loss, -model.logprobs(batch)[5:].mean(), **EXACT)
    for norm in (2.0, 4.0):
        objective.after_step(fake_run(model), {"grad_norm": norm})
    turns = [objective.spares_rollouts(fake_run(model, step)) for step in range(2000)]
    assert np.mean(turns) == pytest.approx(4 / (4 + 3), abs=0.03)
    again = SASR(warmup=2)
    again.load_state_dict(objective.state_dict())
    assert [again.spares_rollouts(fake_run(model, step)) for step in range(50)] == turns[:50]
    own = objective.appraise(fake_run(model), groups(foreign=1))
    assert [len(tree.tokens) for tree in own] == [3, 3] and all(ADVANTAGE in tree.values for tree in own)
    with pytest.raises(HoneError, match=r"data\.demonstrations=1"):
        objective.appraise(fake_run(model), [_without_answers(group(0, (4,)))])


def _without_answers(tree: Tree) -> Tree:
    fields = {name: row[:1] for name, row in tree.fields.items()}
    return Tree(tree.tokens[:1], tree.weights[:1], (-1,), fields, "row:0", {n: v[:1] for n, v in tree.values.items()})


def test_trees_survive_being_flattened() -> None:
    plain = Tree((np.arange(3, dtype=np.int32),), (np.ones(3, np.float32),), (-1,), where="x")
    trees = [*groups(values=("extra",)), plain]
    for one, other in zip(trees, unflatten(flatten(trees)), strict=True):
        assert one.parents == other.parents and one.where == other.where
        np.testing.assert_equal(one.fields, other.fields)
        np.testing.assert_equal(one.values, other.values)
        np.testing.assert_equal((one.tokens, one.weights), (other.tokens, other.weights))
        assert [part.dtype for part in (*one.tokens, *one.weights)] == [
            part.dtype for part in (*other.tokens, *other.weights)
        ]
    assert unflatten(flatten([])) == []
