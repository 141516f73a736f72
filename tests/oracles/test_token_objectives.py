"""Losses over weighted tokens, noise and changed inputs equal their equations in plain PyTorch, in float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from conformance.test_objectives import make_model, make_teacher, sequences, tokenizer, tree
from hone.data.chains import Chains
from hone.data.correction import Correction
from hone.errors import HoneError, ModelError
from hone.networks import blocks_of
from hone.objectives import noise
from hone.objectives.base import trained
from hone.objectives.draws import per_tree, places, uniform
from hone.objectives.language import SFT
from hone.objectives.masked_thought import MaskedThought
from hone.objectives.self_tokens import ScheduledSampling, predicted_tokens
from hone.objectives.tokens import DynamicFT, Focal, Weighted, focal_loss, inverse_frequencies, rectified
from hone.text.inside import inside
from hone.text.model import LanguageModel
from hone.text.pack import Packed, pack
from hone.text.special import mask_id

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def logprobs(model: LanguageModel, batch: Packed) -> Tensor:
    """Return log p of the trained tokens (N,), with a graph, from whole logits."""
    predictors, targets, _ = trained(batch)
    logits = model.head(model.hidden(batch)[predictors])
    return logits.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)


def gradients(loss: Tensor, model: LanguageModel) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def same(mine: Tensor, expected: Tensor, model: LanguageModel) -> None:
    torch.testing.assert_close(mine, expected, **EXACT)
    torch.testing.assert_close(gradients(mine, model), gradients(expected, model), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_its_equation(gamma: float) -> None:
    model, batch = make_model(), pack(sequences())
    logp = logprobs(model, batch)
    expected = -(trained(batch).weights * (1 - logp.exp()) ** gamma * logp).sum()
    same(Focal(gamma=gamma).loss(model, batch)[0], expected, model)


@pytest.mark.parametrize(("objective", "power"), [(DynamicFT(), 1.0), (Weighted(power=0.5), 0.5), (Weighted(), 0.0)])
def test_a_tokens_probability_weighs_it_and_is_held_fixed(objective: Weighted, power: float) -> None:
    model, batch = make_model(), pack(sequences())
    logp = logprobs(model, batch)
    expected = -(trained(batch).weights * logp.detach().exp() ** power * logp).sum()
    same(objective.loss(model, batch)[0], expected, model)
    assert objective.count(batch) == float(batch.weights.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_finite_losses_and_gradients(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    targets = torch.zeros(3, dtype=torch.int64)
    for function in (
        lambda z: focal_loss(z, targets, 0.5),
        lambda z: focal_loss(z, targets, 2.0),
        lambda z: rectified(z, targets, 1.0),
        lambda z: noise.two_views(torch.cat([z, -z], -1), targets, z.detach().flip(-1), soft=0.5, consistency=0.1),
    ):
        loss = function(logits).sum()
        (gradient,) = torch.autograd.grad(loss, logits)
        assert torch.isfinite(loss) and torch.isfinite(gradient).all()


def test_weights_by_length_make_answers_count_alike() -> None:
    trees = [tree([n], [-1], seed=n, prompt=2) for n in (3, 7, 12)]
    objective, model, batch = Weighted(length=1.0), make_model(), pack(trees)
    assert objective.count(batch) == pytest.approx(3, rel=1e-6)
    each = [SFT().loss(model, pack([t]))[0] / t.trained for t in trees]
    torch.testing.assert_close(objective.loss(model, batch)[0], sum(each), rtol=1e-6, atol=0)


def test_a_samples_weight_multiplies_its_tokens() -> None:
    first, second = (tree([6], [-1], seed=n, prompt=2, **fields) for n, fields in ((1, {"weight": (3.0,)}), (2, {})))
    objective, model = Weighted(), make_model()
    one, other = (SFT().loss(model, pack([t]))[0] for t in (first, second))
    batch = pack([first, second])
    torch.testing.assert_close(objective.loss(model, batch)[0], 3 * one + other, **EXACT)
    assert objective.count(batch) == 3 * first.trained + second.trained


def test_weights_by_frequency_have_the_mean_one_and_even_tokens_out() -> None:
    counts = np.array([100.0, 10.0, 1.0, 0.0])
    assert inverse_frequencies(counts, 0.0).tolist() == [1.0] * 4
    whole = inverse_frequencies(counts, 1.0)
    np.testing.assert_allclose(whole * counts, [37.0, 37.0, 37.0, 0.0])
    half = inverse_frequencies(counts, 0.5)
    assert half[0] < half[1] < half[2] == half[3] and (half * counts).sum() == pytest.approx(111)


def run_of(model: LanguageModel, trees: Any = None, **more: Any) -> Any:
    """Return what an objective sees of a run."""
    start = SimpleNamespace(from_nothing=False, load=lambda **options: make_teacher())
    cluster = SimpleNamespace(device="cpu", dtype=torch.float64, precision="float64")
    recipe = SimpleNamespace(seed=0, build=lambda name: start)
    loader = None if trees is None else SimpleNamespace(trees=trees)
    return SimpleNamespace(
        model=model, recipe=recipe, loader=loader, cluster=cluster, **{"step": 0, "total": 10, **more}
    )


def test_frequencies_are_those_of_the_trained_tokens_and_need_known_data() -> None:
    model, trees = make_model(), sequences()
    objective = Weighted(frequency=1.0)
    objective.setup(run_of(model, trees))
    batch = pack([t for t in trees if len(t.tokens) == 1])
    chosen = batch.weights != 0
    tokens, counts = torch.cat([pack([t]).tokens[pack([t]).weights != 0] for t in trees]).unique(return_counts=True)
    count = dict(zip(tokens.tolist(), counts.tolist(), strict=True))
    weights = objective.weigh(batch)[chosen] * torch.tensor([count[t] for t in batch.tokens[chosen].tolist()])
    torch.testing.assert_close(weights, weights[:1].expand_as(weights), rtol=1e-5, atol=0)
    with pytest.raises(HoneError, match="frequency needs data of a known length"):
        objective.setup(run_of(model))


def test_the_last_line_of_an_answer_weighs_more() -> None:
    model = make_model()
    ids = [tokenizer()(text, add_special_tokens=False)["input_ids"] for text in ("ask\n", "work\n", "so: 8", "\n")]
    flat = np.array([*(token for part in ids for token in part), 1], np.int32)
    weights = np.ones(len(flat), np.float32)
    weights[: len(ids[0])] = 0
    batch = pack([replace(tree([2], [-1], seed=0), tokens=(flat,), weights=(weights,))])
    objective = Weighted(last=4.0)
    objective.setup(run_of(model))
    found = objective.weigh(batch).tolist()
    tail = len(ids[2]) + len(ids[3]) + 1
    middle = len(ids[1])
    # From the break that opens the last line to the end; the break before the end opens none.
    assert found == [0.0] * len(ids[0]) + [1.0] * (middle - 1) + [4.0] * (tail + 1)


def test_what_a_tree_draws_depends_on_nothing_beside_it() -> None:
    trees = sequences()
    whole = pack(trees)
    drawn = uniform(whole, "1:2", 3)
    assert drawn.shape == (len(whole), 3) and float(drawn.min()) >= 0 and float(drawn.max()) < 1
    for place, one in zip(places(whole), trees, strict=True):
        assert torch.equal(drawn[place], uniform(pack([one]), "1:2", 3))
    assert not torch.equal(drawn, uniform(whole, "1:3", 3))
    assert (
        per_tree(whole, "", lambda n, generator: torch.full((n,), float(n))).tolist() == noise.lengths(whole).tolist()
    )


@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_neftune_adds_uniform_noise_of_the_papers_size(packs: bool) -> None:
    model, batch = make_model(), pack(sequences())
    model.packs = packs
    objective, seen = NEFTuneSpy(alpha=5.0), []
    objective.before_step(run_of(model, step=3), sequences())
    clean, embedding = SFT().loss(model, batch)[0], model.hf.get_input_embeddings()
    loss, _ = objective.loss(model, batch)
    assert not torch.isclose(loss, clean)
    with inside(model, batch, {embedding: seen.append}):
        model.hidden(batch)
    torch.testing.assert_close(seen[0], embedding.weight[batch.tokens].detach())
    for place in places(batch):
        own = objective.added[place]
        bound = 5 / (own.numel() ** 0.5)
        assert 0.8 * bound < float(own.abs().max()) <= bound
    model.eval()
    assert torch.equal(objective.loss(model, batch)[0], SFT().loss(model, batch)[0])
    assert not embedding._forward_hooks


class NEFTuneSpy(noise.NEFTune):
    """Remembers what it has added."""

    added: Tensor

    def _noise(self, batch: Packed) -> Any:
        make = super()._noise(batch)

        def remember(states: Tensor) -> Tensor:
            self.added = make(states)
            return self.added

        return remember


def test_noise_inside_is_the_same_packed_and_padded() -> None:
    results = []
    for packs in (True, False):
        model, batch = make_model(), pack(sequences())
        model.packs = packs
        loss, _ = noise.NoiseFiT(noise=3.0).loss(model, batch)
        assert not torch.isclose(loss, noise.NoiseFiT(noise=0.0).loss(model, batch)[0], rtol=1e-4)
        results.append((loss, gradients(loss, model)))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)  # the stock layers round to float32


def test_the_scale_of_noisefit_is_that_of_its_authors() -> None:
    states = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    factor = torch.exp(states.var(-1) / (states.var(-1).mean() + 1e-6)).clamp(max=5)
    for token in range(5):
        ordered = states[token].sort().values
        median = ordered[3]  # torch's median is the lower one
        deviations = (states[token] - median).abs()
        spread = deviations.sort().values[3]
        expected = 0.1 * spread * torch.exp(-0.2 * deviations / spread) * factor[token]
        torch.testing.assert_close(noise.noise_scale(states, 0.1, 0.2)[token], expected, rtol=1e-9, atol=0)


def test_the_loss_of_noisefit_is_its_equation() -> None:
    model, batch = make_model(), pack(sequences())
    objective = noise.NoiseFiT(noise=3.0, hard=0.3, consistency=0.7, temperature=2.0, layers=1)
    predictors, targets, weights = trained(batch)
    loss, _ = objective.loss(model, batch)
    first, second = (model.head(objective._noisy(model, batch, view)[predictors]) for view in (1, 2))
    clean = model.head(model.hidden(batch)[predictors])
    assert not torch.allclose(first, second) and not torch.allclose(first, clean)
    soft = (clean.detach() / 2).softmax(-1)
    gaps = [F.kl_div(z.log_softmax(-1), soft, reduction="none").sum(-1) for z in (first, second)]
    apart = F.kl_div(first.log_softmax(-1), second.softmax(-1), reduction="none").sum(-1)
    hard = F.cross_entropy(clean, targets, reduction="none")
    same(loss, (weights * (0.3 * hard + 0.35 * (gaps[0] + gaps[1]) + 0.7 * apart)).sum(), model)


def test_noisefit_chooses_layers_by_their_ratio_of_signal_to_noise() -> None:
    torch.manual_seed(0)
    from conformance.test_objectives import CONFIG

    model = LanguageModel.fresh({**CONFIG, "num_hidden_layers": 3}, tokenizer()).to(dtype=torch.float64)
    batches = [pack(sequences()[:3]), pack(sequences()[3:])]
    objective = noise.NoiseFiT(layers=2)
    ratios = objective.ratios(model, batches)
    seen: list[Tensor] = []
    last = list(blocks_of(model.decoder).values())[-1]
    for batch in batches:
        with inside(model, batch, {last: lambda states, batch=batch: seen.extend(states[p] for p in places(batch))}):
            model.hidden(batch)
    draws = torch.Generator().manual_seed(1)
    added = [noise.noise_scale(s, 0.1, 0.1) * torch.randn(400, *s.shape, generator=draws) for s in seen]
    expected = sum(a.abs().mean(0).sum() for a in added) / sum(s.abs().sum() for s in seen)
    torch.testing.assert_close(ratios[-1], expected, rtol=1e-2, atol=0)  # as their mean over draws
    cluster = SimpleNamespace(device="cpu", autocast=lambda: torch.autocast("cpu", enabled=False))
    recipe = SimpleNamespace(seed=0, micro_tokens=40, batch_tokens=40)
    run = SimpleNamespace(model=model, cluster=cluster, recipe=recipe, step=0, total=10)
    for choose, wanted in (("high", ratios.argsort()[:2]), ("low", ratios.argsort()[1:])):
        objective = noise.NoiseFiT(layers=2, choose=choose)
        objective.before_step(run, sequences())
        assert objective.state_dict()["chosen"] == sorted(wanted.tolist())
        resumed = noise.NoiseFiT(layers=2, choose=choose)
        resumed.load_state_dict(objective.state_dict())
        assert resumed._chosen == objective._chosen


def spied(model: LanguageModel) -> list[Tensor]:
    """Return the list to which every batch of tokens is added that the model reads."""
    seen: list[Tensor] = []
    model.watchers.append(lambda batch, hidden: seen.append(batch.tokens))
    return seen


@pytest.mark.parametrize("replacement", ["mask", "random"])
def test_masked_thought_hides_a_share_of_the_answer_alone(replacement: str) -> None:
    model, batch = make_model(), pack([tree([60], [-1], seed=n, prompt=20) for n in range(20)])
    seen, objective = spied(model), MaskedThought(rate=0.4, warmup=0.5, replace=replacement)
    for step, rate in ((0, 0.0), (2, 0.16), (5, 0.4), (9, 0.4)):
        objective.before_step(run_of(model, step=step), [])
        loss, _ = objective.loss(model, batch)
        changed = seen[-1] != batch.tokens
        assert not changed[batch.weights == 0].any()
        assert float(changed[batch.weights != 0].double().mean()) == pytest.approx(rate, abs=0.05)
        if replacement == "mask":
            assert set(seen[-1][changed].tolist()) <= {mask_id(tokenizer())}
    hidden = model.hidden(replace(batch, tokens=seen[-1]))
    predictors, targets, weights = trained(batch)
    same(loss, (weights * F.cross_entropy(model.head(hidden[predictors]), targets, reduction="none")).sum(), model)
    model.eval()
    torch.testing.assert_close(objective.loss(model, batch)[0], SFT().loss(model, batch)[0], **EXACT)


def test_the_mask_token_is_one_that_no_text_holds() -> None:
    vocabulary = {"<s>": 0, "<pad>": 1, "<mask>": 2}

    def make(mask: int | None) -> Any:
        return SimpleNamespace(get_vocab=lambda: vocabulary, mask_token_id=mask)

    assert [mask_id(make(2)), mask_id(make(None), "<mask>")] == [2, 2]
    with pytest.raises(ModelError, match=r"no token '<mas>'.*<mask>"):
        mask_id(make(None), "<mas>")
    blind = SimpleNamespace(tokenizer=make(None))
    MaskedThought(replace="random").equip(blind)
    with pytest.raises(ModelError, match="needs 1 tokens that no text is made of"):
        MaskedThought().equip(blind)


def test_generated_tokens_are_those_of_one_pass_with_the_models_distribution() -> None:
    model = make_teacher()
    batch = pack([tree([30], [-1], seed=n, prompt=10) for n in range(40)])
    predictors, _, _ = trained(batch)
    chosen = batch.weights != 0
    probabilities = model.head(model.hidden(batch)[predictors]).softmax(-1).detach()
    coins = uniform(batch, "x")
    best = predicted_tokens(model, batch, batch.tokens, coins, 0.0)
    assert torch.equal(best[chosen], probabilities.argmax(-1)) and torch.equal(best[~chosen], batch.tokens[~chosen])
    drawn = predicted_tokens(model, batch, batch.tokens, coins, 1.0)[chosen]
    picked = probabilities.gather(1, drawn[:, None])
    # A token is drawn as often as it is probable: E p(drawn) = sum_v p_v^2.
    assert float(picked.mean()) == pytest.approx(float(probabilities.square().sum(-1).mean()), abs=0.03)


def test_scheduled_sampling_reads_a_mixture_and_learns_the_data() -> None:
    model, batch = make_model(), pack([tree([40], [-1], seed=n, prompt=10) for n in range(20)])
    objective = ScheduledSampling(rate=0.5, temperature=0.0, passes=2)
    objective.setup(run_of(model))
    teacher = make_teacher()
    objective.before_step(run_of(model, step=9), [])
    seen = spied(model)
    loss, _ = objective.loss(model, batch)
    read, chosen = seen[-1], batch.weights != 0
    coins = uniform(batch, "0:9:mix")
    once = predicted_tokens(teacher, batch, batch.tokens, coins, 0.0).where(chosen & (coins < 0.5), batch.tokens)
    twice = predicted_tokens(teacher, batch, once, coins, 0.0).where(chosen & (coins < 0.5), batch.tokens)
    assert torch.equal(read, twice) and not torch.equal(once, twice)
    logits = model.head(model.hidden(replace(batch, tokens=read))[trained(batch).predictors])
    same(loss, F.cross_entropy(logits, batch.tokens[chosen], reduction="sum"), model)
    objective.before_step(run_of(model, step=0), [])
    torch.testing.assert_close(objective.loss(model, batch)[0], SFT().loss(model, batch)[0], **EXACT)


def test_the_starting_model_must_be_readable() -> None:
    model = make_model()
    run = run_of(model)
    run.recipe.build = lambda name: SimpleNamespace(from_nothing=True)
    with pytest.raises(HoneError, match=r"generator: start loads the model .* use generator: current"):
        ScheduledSampling().setup(run)
    ScheduledSampling(generator="current").setup(run)


class Told(Correction):
    """Corrections of answers that are told instead of generated."""

    def answers(self, prompts: Any, purpose: str) -> Any:
        for sample in prompts:
            yield [sample.answers[0], "answer: 7777777", "answer: 7777777", " "]


def test_corrections_put_the_models_answer_before_the_reference() -> None:
    source = Chains(skills=["add"], count=2, holdout=2)
    plain = list(source.samples("train"))
    every = list(Told(of=source).samples("train"))
    assert [sample.prompt for sample in every[:3]] == [
        plain[0].prompt, plain[0].prompt + plain[0].answers[0] + "\ncorrected:\n",
        plain[0].prompt + "answer: 7777777\ncorrected:\n",
    ]  # fmt: skip
    assert len(every) == 6 and all(sample.answers == plain[0].answers for sample in every[:3])
    wrong = Told(of=source, wrong=True, plain=False)
    made = list(wrong.samples("train"))
    assert [sample.prompt for sample in made] == [p.prompt + "answer: 7777777\ncorrected:\n" for p in plain]
    assert wrong.grade(made[0], plain[0].answers[0]) == 1 and wrong.grade(made[0], "answer: 7777777") == 0
    assert [q.prompt for q in wrong.questions("eval")] == [s.prompt for s in source.samples("eval")]
    again = Told(of=source, asked="again")
    assert all(q.prompt.endswith("answer: 7777777\ncorrected:\n") for q in again.questions("eval"))
    assert all(q.prompt.endswith("answer: 7777777\ncorrected:\n") for q in again.samples("eval"))
    assert list(again.samples("train")) == every  # what is asked in evaluation changes nothing that trains
    assert list(Told(of=source, asked="again", plain=False).samples("train")) == [s for s in every if s not in plain]
    assert len({Told(of=source, **options).fingerprint() for options in ({}, {"wrong": True}, {"ask": "?"})}) == 3
    assert len(list(Told(of=source, limit=4).samples("train"))) == 4


def test_recomputed_layers_give_the_same_gradients_with_noise_inside() -> None:
    results = []
    for recompute in (False, True):
        model, batch = make_model(), pack(sequences())
        model.train()
        model.checkpoint_layers(recompute)
        loss, _ = noise.NoiseFiT(noise=3.0).loss(model, batch)
        results.append(gradients(loss, model))
    torch.testing.assert_close(*results, **EXACT)
