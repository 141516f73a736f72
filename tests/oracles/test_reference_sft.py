"""Fine-tuning that looks at other models' likelihoods: closed forms, the authors' equations, state and refusals."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from end_to_end.support import back_to, repeatable, rows, train
from hone import resume
from hone.errors import HoneError
from hone.objectives.anchored_sft import MinorSFT, PoFT, favour, learnt_less
from hone.objectives.discriminative import DFT, averaged, log_means, prompt_key
from hone.objectives.language import SFT
from hone.text.model import LanguageModel
from hone.text.pack import Packed, Tree, pack
from hone.text.tokenizer import train_tokenizer

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
DETACHED = SimpleNamespace(cluster=SimpleNamespace(sum=lambda value: value))


def make_model(seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    return LanguageModel.fresh(CONFIG, train_tokenizer(["no text is rendered here"], 300)).to(dtype=torch.float64)


class Fixed:
    """A reference whose values are those of another model."""

    def __init__(self, other: LanguageModel) -> None:
        self.other = other

    def token_values(self, model: LanguageModel, batch: Packed) -> Tensor:
        return trained_logprobs(self.other, batch).detach()


def trained_logprobs(model: LanguageModel, batch: Packed) -> Tensor:
    return model.logprobs(batch)[batch.weights.nonzero().squeeze(1)]


def single(prompt: int, answer: int, seed: int, **fields: tuple[float, ...]) -> Tree:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 250, prompt + answer).astype(np.int32)
    weights = np.r_[np.zeros(prompt), np.ones(answer)].astype(np.float32)
    return Tree((tokens,), (weights,), (-1,), dict(fields), f"toy:{seed}")


def ranked(sizes: Sequence[int], seed: int, prompt: int = 3, scores: Sequence[float] | None = None) -> Tree:
    """Return a prompt with answers, of which the first is the best unless scores say otherwise."""
    rng = np.random.default_rng(seed)
    tokens = tuple(rng.integers(0, 250, n).astype(np.int32) for n in (prompt, *sizes))
    weights = (np.zeros(prompt, np.float32), *(np.ones(n, np.float32) for n in sizes))
    worth = scores or (1.0, *(0.0 for _ in sizes[1:]))
    return Tree(tokens, weights, (-1, *(0 for _ in sizes)), {"score": (float("nan"), *worth)}, f"toy:{seed}")


def answer_sums(model: LanguageModel, trees: Sequence[Tree]) -> list[Tensor]:
    """Return log pi of each answer of each tree, each tree on its own."""
    found = []
    for tree in trees:
        batch = pack([tree])
        values, starts = model.logprobs(batch) * batch.weights, batch.starts.tolist()
        segments = [values[a:b].sum() for a, b in itertools.pairwise(starts)]
        found.append(torch.stack([s for s, w in zip(segments, tree.weights, strict=True) if w.any()]))
    return found


def gradient(loss: Tensor, model: LanguageModel) -> Tensor:
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


SINGLES = [single(3, 4, 1), single(2, 7, 2), single(4, 1, 3)]
LISTS = [ranked((4, 2, 5), 1), ranked((3, 6), 2), ranked((2, 2, 2, 4), 3)]


def test_minor_sft_has_the_gradient_of_the_papers_antiderivative() -> None:
    model, beta = make_model(), 0.7
    objective = MinorSFT(beta=beta)
    objective._reference = Fixed(make_model(1))  # type: ignore[assignment]
    loss, metrics = objective.loss(model, pack(SINGLES))
    ours, theirs = answer_sums(model, SINGLES), answer_sums(make_model(1), SINGLES)
    ratios = [(a - b.detach()).squeeze() for a, b in zip(ours, theirs, strict=True)]
    lengths = [4, 7, 1]
    whole = sum(2 / (beta * m) * F.softplus(-beta * r) for r, m in zip(ratios, lengths, strict=True))
    torch.testing.assert_close(gradient(loss, model), gradient(whole, model), **CLOSE)
    moved = sum(r.item() / m for r, m in zip(ratios, lengths, strict=True))
    assert float(metrics["deviation"]) == pytest.approx(moved)
    assert float(metrics["nll"]) == pytest.approx(-sum(a.item() / m for a, m in zip(ours, lengths, strict=True)))
    assert objective.count(pack(SINGLES)) == 3


def test_minor_sft_of_one_token_answers_is_torchrls_up_to_its_scale() -> None:
    """For single tokens its mean log-ratio is the sum: -log s(beta r), of which ours is 2 / beta times the gradient."""
    model, trees, beta = make_model(), [single(3, 1, 5), single(2, 1, 6)], 0.3
    objective = MinorSFT(beta=beta)
    objective._reference = Fixed(make_model(1))  # type: ignore[assignment]
    ours = trained_logprobs(model, pack(trees)) - trained_logprobs(make_model(1), pack(trees)).detach()
    torchrl = -F.logsigmoid(beta * ours).sum()
    mine = gradient(objective.loss(model, pack(trees))[0], model)
    # the network's norms are in float32, so that a gradient of another size is rounded otherwise
    torch.testing.assert_close(mine, 2 / beta * gradient(torchrl, model), rtol=1e-4, atol=1e-6)


def test_minor_sft_at_its_start_or_without_beta_is_sft_with_averaged_answers() -> None:
    model = make_model()
    mean = sum(-a.squeeze() / m for a, m in zip(answer_sums(model, SINGLES), (4, 7, 1), strict=True))
    for objective in (MinorSFT(beta=5.0), MinorSFT(beta=0.0)):  # without a reference, the model is its own
        if objective.beta == 0:
            objective._reference = Fixed(make_model(1))  # type: ignore[assignment]
        loss, _ = objective.loss(model, pack(SINGLES))
        torch.testing.assert_close(loss, mean, **CLOSE)
        torch.testing.assert_close(gradient(loss, model), gradient(mean, model), **CLOSE)
    tree = [single(3, 5, 9)]
    torch.testing.assert_close(MinorSFT().loss(model, pack(tree))[0] * 5, SFT().loss(model, pack(tree))[0], **CLOSE)


def test_a_sample_weighs_what_its_field_says() -> None:
    model = make_model()
    heavy = [single(3, 4, 1, weight=(3.0,)), SINGLES[1]]
    for objective in (MinorSFT(), PoFT()):
        both, alone = objective.loss(model, pack(heavy))[0], [objective.loss(model, pack([t]))[0] for t in SINGLES[:2]]
        torch.testing.assert_close(both, 3 * alone[0] + alone[1], **CLOSE)
        assert objective.count(pack(heavy)) == 4


def test_poft_is_the_bradley_terry_loss_against_each_reference() -> None:
    model, others = make_model(), [make_model(1), make_model(2)]
    objective = PoFT(beta=1.5)
    objective._references = [Fixed(other) for other in others]  # type: ignore[misc]
    loss, metrics = objective.loss(model, pack(SINGLES))
    expected, ahead = torch.zeros((), dtype=torch.float64), 0
    theirs = [answer_sums(other, SINGLES) for other in others]
    for number, length in enumerate((4, 7, 1)):
        score = answer_sums(model, SINGLES)[number].squeeze() / length
        scores = [found[number].squeeze().detach() / length for found in theirs]
        other = sum(scores) / 2
        expected = expected - (score.exp() ** 1.5 / (score.exp() ** 1.5 + other.exp() ** 1.5)).log()
        ahead += int(score > sum(scores) / 2)
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(gradient(loss, model), gradient(expected, model), **CLOSE)
    assert float(metrics["favoured"]) == ahead


def test_poft_trusts_an_answer_by_the_references_likelihood() -> None:
    score = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    (slopes,) = torch.autograd.grad(favour(score, [torch.tensor([-0.1, -1.0, -3.0])], 2.0).sum(), score)
    assert -slopes[0] > -slopes[1] > -slopes[2] > 0
    assert float(-slopes[1]) == pytest.approx(1.0)  # beta s(0)


def test_poft_compares_with_the_mean_of_its_references() -> None:
    others = [torch.tensor([other]) for other in (-0.2, -3.0, -4.0)]
    assert float(favour(torch.tensor([-1.0]), others, 1.0)) == pytest.approx(0.2204, abs=1e-4)  # the authors' figure


def dft_by_the_authors(model: LanguageModel, other: LanguageModel, before: float, **options: Any) -> Tensor:
    """Return the sum of the surrogate losses of the authors' trainer, tree by tree."""
    tau, gamma, mean = options["tau"], options["gamma"], options.get("score") == "mean"
    total = torch.zeros((), dtype=torch.float64)
    for tree in LISTS:
        lengths = torch.tensor([float(len(t)) for t in tree.tokens[1:]], dtype=torch.float64)
        scores, base = answer_sums(model, [tree])[0], answer_sums(other, [tree])[0].detach()
        scores = scores / lengths if mean else scores
        exponent = scores[1:] / tau - (0 if mean else base[1:])
        u = (1 - gamma) * math.exp(before) + gamma * float(exponent.detach().exp().mean())
        total = total - scores[0] + (exponent.detach().exp() / u * scores[1:]).mean()
    return total


@pytest.mark.parametrize(
    "options",
    [{"tau": 1.0, "gamma": 0.85}, {"tau": 0.3, "gamma": 0.9, "score": "mean"}, {"tau": 2.0, "gamma": 1.0}],
    ids=["dft", "dft2", "batch estimate"],
)
def test_dft_has_the_gradient_of_the_authors_surrogate(options: dict[str, Any]) -> None:
    model, other = make_model(), make_model(1)
    objective = DFT(**options)
    objective._reference = Fixed(other)  # type: ignore[assignment]
    objective._averages = {prompt_key(tree.tokens[0]): 0.4 for tree in LISTS}
    loss, _ = objective.loss(model, pack(LISTS))
    surrogate = dft_by_the_authors(model, other, 0.4, **options)
    torch.testing.assert_close(gradient(loss, model), gradient(surrogate, model), **CLOSE)
    assert objective.count(pack(LISTS)) == 3


def test_dft_without_an_average_follows_its_own_value() -> None:
    """Finite differences of -s(y) + tau log mean exp(s(y') / tau - log P0)."""
    model = make_model()
    objective = DFT(tau=0.7, gamma=1.0)
    objective._reference = Fixed(make_model(1))  # type: ignore[assignment]
    batch = pack(LISTS)
    loss, metrics = objective.loss(model, batch)
    assert float(metrics["pressure"]) == pytest.approx(3)
    weight = model.hf.model.norm.weight
    (slope,) = torch.autograd.grad(loss, weight)
    for place in (0, 7):
        ends = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                weight[place] += step
                ends.append(objective.loss(model, batch)[0].item())
                weight[place] -= step
        assert (ends[0] - ends[1]) / 2e-6 == pytest.approx(slope[place].item(), rel=1e-5, abs=1e-7)


def test_dft_takes_the_best_answer_for_the_right_one_and_worse_ones_for_negatives() -> None:
    model = make_model()
    objective = DFT(gamma=1.0)
    objective._reference = Fixed(make_model(1))  # type: ignore[assignment]
    mixed = ranked(
        (2, 3, 4, 2), 8, scores=(0.0, 1.0, 0.5, 1.0)
    )  # the second is the first of the best; the last equals it
    scores, base = answer_sums(model, [mixed])[0], answer_sums(make_model(1), [mixed])[0]
    exponents = torch.stack([scores[0] - base[0], scores[2] - base[2]])
    expected = -scores[1] + exponents.logsumexp(0) - math.log(2)
    torch.testing.assert_close(objective.loss(model, pack([mixed]))[0], expected, **CLOSE)


def test_averages_move_once_a_step_whatever_the_micro_batches_and_go_on_from_a_checkpoint() -> None:
    model, other, gamma = make_model(), make_model(1), 0.6
    twice = [*LISTS, ranked((5, 3), 1)]  # the prompt of the first once more, with other answers
    assert prompt_key(twice[0].tokens[0]) == prompt_key(twice[3].tokens[0])
    kept = []
    for groups in ([twice], [[tree] for tree in twice], [twice[::-1]]):
        objective = DFT(gamma=gamma)
        objective._reference = Fixed(other)  # type: ignore[assignment]
        for _ in range(2):
            objective.before_step(DETACHED, twice)
            for group in groups:
                objective.loss(model, pack(group))
                with torch.no_grad():
                    objective.loss(model, pack(group))  # evaluation moves nothing
            objective.after_step(DETACHED, {})
        kept.append(objective.state_dict())
    assert len(kept[0]["averages"]) == 3
    for state in kept[1:]:
        assert state["averages"] == pytest.approx(kept[0]["averages"], rel=1e-12)
    scores, base = answer_sums(model, LISTS[1:2])[0], answer_sums(other, LISTS[1:2])[0]
    estimate = (scores[1] - base[1]).exp().item()
    expected = (1 - gamma) * ((1 - gamma) * 1 + gamma * estimate) + gamma * estimate
    assert kept[0]["averages"][prompt_key(LISTS[1].tokens[0])] == pytest.approx(math.log(expected))
    again = DFT(gamma=gamma)
    again._reference = Fixed(other)  # type: ignore[assignment]
    again.load_state_dict(json.loads(json.dumps(kept[0])))
    objective.load_state_dict(kept[0])
    assert torch.equal(gradient(again.loss(model, pack(LISTS))[0], model),
                       gradient(objective.loss(model, pack(LISTS))[0], model))  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_extreme_log_ratios_stay_finite(dtype: torch.dtype) -> None:
    huge = torch.tensor([1e4, -1e4, 0.0], dtype=dtype)
    assert torch.isfinite(learnt_less(huge, 1.0)).all() and learnt_less(huge, 1.0)[1] == 2
    score = huge.clone().requires_grad_()
    loss = favour(score, [huge.flip(0)], 1.0).sum()
    assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, score)[0]).all()
    groups = torch.tensor([0, 0, 1])
    estimate = log_means(huge, groups, 2)
    after = averaged(estimate, torch.zeros(2, dtype=dtype), 0.9)
    assert torch.isfinite(after).all()
    pressure = (huge - after[groups]).exp()
    assert torch.isfinite(pressure).all() and float(pressure.max()) <= 2 / 0.9 + 1e-3


def test_log_means_are_those_of_each_group() -> None:
    exponents = torch.tensor([0.5, -2.0, 1.0, 3.0], dtype=torch.float64)
    expected = [math.log(np.exp([0.5, 1.0]).mean()), math.log(np.exp([-2.0, 3.0]).mean())]
    assert log_means(exponents, torch.tensor([0, 1, 0, 1]), 2).tolist() == pytest.approx(expected)


@pytest.fixture(scope="module")
def rivals_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    made = [{"prompt": f"Is {n} a number? ", "chosen": f"yes, {n}", "rejected": f"no, not {n}"} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def test_a_dft_run_goes_on_to_the_same_averages(tiny_model: Path, rivals_file: Path, tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    options = {"objective": "dft", "eval_samples": 0, "steps": 6, "adapter": "full", "checkpoint_every": 2}
    for out in (whole, again):
        train(tiny_model, rivals_file, out, optimizer={"name": "adamw", "lr": 1e-3}, **options)
    back_to(again, 4)
    resume(again)
    first, second = ([repeatable(row) for row in rows(out / "metrics.jsonl")] for out in (whole, again))
    assert first == second and len(first) == 6 and first[0]["pressure"] != first[-1]["pressure"]


def test_poft_scores_named_models_once_and_refuses_another_tokenizer(
    tiny_model: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HONE_CACHE", str(tmp_path / "cache"))
    results = []
    for number, names in enumerate((["start"], [str(tiny_model)], [str(tiny_model)])):
        objective = {"name": "poft", "references": names}
        if number == 2:  # what is stored is read and not computed again
            monkeypatch.setattr("hone.objectives.reference.Cached.fill", lambda self, *args: None)
        results.append(train(tiny_model, qa_file, tmp_path / str(number), objective=objective, steps=3, eval_samples=0))
    assert results[0]["before"]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for result in results[1:]:
        assert result["after"]["loss"] == pytest.approx(results[0]["after"]["loss"], abs=1e-5)
    with pytest.raises(HoneError, match="references: 'base' has another tokenizer than the model that trains"):
        train(tiny_model, qa_file, tmp_path / "other", objective={"name": "poft", "references": ["base"]}, steps=1)
