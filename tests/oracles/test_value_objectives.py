"""Value heads and step preferences in double precision against their equations; what searches are made into."""

from __future__ import annotations

import itertools
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

from hone.data.formats import CONTINUES
from hone.data.sample import Sample
from hone.data.sampled import Texts
from hone.data.searched import ENDED, OPEN, Grown, Searched, lines, lowest_advantage
from hone.data.source import Source, Split
from hone.errors import DataError, HoneError, ModelError
from hone.objectives.dpo import DPO
from hone.objectives.preference import Side
from hone.objectives.step_preference import MCTSDPO, StepAPO
from hone.objectives.values import OVM, AlphaMath
from hone.text.heads import HEAD
from hone.text.model import LanguageModel
from hone.text.pack import Tree, pack
from hone.text.tokenizer import train_tokenizer
from hone.text.values import load_valued, value_head

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
NAN = float("nan")


def make_model(seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    texts = ["add 1 =\n1+1=2\nanswer: 2\n", "answer: 3\n"]
    return LanguageModel.fresh(CONFIG, train_tokenizer(texts, 300)).to(dtype=torch.float64)


def tree(sizes: Sequence[int], parents: Sequence[int], seed: int, **fields: Any) -> Tree:
    rng = np.random.default_rng(seed)
    tokens = tuple(rng.integers(0, 250, n).astype(np.int32) for n in sizes)
    weights = tuple(np.full(n, float(place > 0), np.float32) for place, n in enumerate(sizes))
    return Tree(tokens, weights, tuple(parents), fields, f"toy:{seed}")


def states_and_logprobs(model: LanguageModel, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the state after each token of a text, and log p of each but the first, by transformers alone."""
    out = model.hf(input_ids=torch.tensor([list(ids)]), output_hidden_states=True)
    logprobs = out.logits[0].log_softmax(-1)
    return out.hidden_states[-1][0], logprobs[:-1].gather(1, torch.tensor(list(ids))[1:, None])[:, 0]


def plain_values(model: LanguageModel, states: Tensor, squash: bool) -> Tensor:
    head = model.extras[HEAD]
    found = states @ head.weight[0] + head.bias[0]
    return torch.tanh(found) if squash else found


@pytest.mark.parametrize("nll", [0.0, 0.7])
def test_ovm_is_the_squared_error_of_every_token_of_an_answer(nll: float) -> None:
    model, objective = make_model(), OVM(nll=nll)
    objective.equip(model)
    torch.nn.init.normal_(model.extras[HEAD].bias)
    trees = [
        tree([3, 4, 2], [-1, 0, 0], 1, chosen=(NAN, 1.0, 0.0)),
        tree([2, 3, 5, 1], [-1, 0, 0, 0], 2, score=(NAN, 0.2, 0.9, 0.5), weight=(2.0,) * 4),
    ]
    expected, units = torch.zeros((), dtype=torch.float64), 0.0
    judged = [(0, 1, 1.0), (0, 2, 0.0), (1, 1, 0.0), (1, 2, 1.0), (1, 3, 0.0)]
    for number, segment, right in judged:
        prompt, answer = trees[number].tokens[0], trees[number].tokens[segment]
        states, logprobs = states_and_logprobs(model, [*prompt, *answer])
        weight = 2.0 if number else 1.0
        values = plain_values(model, states[len(prompt) :], squash=False)
        expected = expected + weight * (values - right).square().sum()
        expected = expected - weight * nll * right * logprobs[len(prompt) - 1 :].sum()
        units += weight * len(answer)
    loss, metrics = objective.loss(model, pack(trees))
    torch.testing.assert_close(loss, expected, **CLOSE)
    assert objective.count(pack(trees)) == units and 0 <= float(metrics["end_accuracy"]) <= units
    gradients = [torch.autograd.grad(value, list(model.parameters()), allow_unused=True) for value in (loss, expected)]
    for ours, plain in zip(*gradients, strict=True):
        assert (ours is None) == (plain is None)
        if ours is not None:
            torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)  # transformers norms in single precision


def test_the_figures_of_ovm_are_shares_of_tokens() -> None:
    model, objective = make_model(), OVM()
    objective.equip(model)
    torch.nn.init.zeros_(model.extras[HEAD].weight)
    torch.nn.init.constant_(model.extras[HEAD].bias, 0.8)  # everything is held to be right
    _, metrics = objective.loss(model, pack([tree([3, 4, 2], [-1, 0, 0], 1, chosen=(NAN, 1.0, 0.0))]))
    assert float(metrics["value_accuracy"]) == float(metrics["end_accuracy"]) == 4.0  # tokens of the right answer


def test_alphamath_is_the_likelihood_of_right_paths_and_the_error_at_the_ends_of_steps() -> None:
    model, objective = make_model(), AlphaMath(beta=0.3)
    objective.equip(model)
    torch.nn.init.normal_(model.extras[HEAD].weight)
    paths: list[tuple[list[int], list[float], float, float]] = [
        ([3, 2, 4, 1], [0.5, -0.2, 1.0], 1.0, 1.0), ([2, 3, 3], [-0.1, -1.0], 0.0, 1.0), ([4, 5], [1.0], 1.0, 0.5),
    ]  # fmt: skip
    trees = [
        tree(sizes, range(-1, len(sizes) - 1), at, value=(NAN, *q), label=(y,) * len(sizes), weight=(w,) * len(sizes))
        for at, (sizes, q, y, w) in enumerate(paths)
    ]
    expected = torch.zeros((), dtype=torch.float64)
    for made, (sizes, q, y, w) in zip(trees, paths, strict=True):
        states, logprobs = states_and_logprobs(model, np.concatenate(made.tokens).tolist())
        ends = np.cumsum(sizes)[1:] - 1
        error = (plain_values(model, states[ends], squash=True) - torch.tensor(q, dtype=torch.float64)).square().mean()
        expected = expected + w * (-y * logprobs[sizes[0] - 1 :].mean() + 0.3 * error)
    loss, metrics = objective.loss(model, pack(trees))
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-7)  # Q is kept in single precision
    assert objective.count(pack(trees)) == 2.5 and set(metrics) == {"nll", "value_error"}


def sides(seed: int = 0) -> tuple[Side, Side, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(6, generator=generator, dtype=torch.float64) * 3 - 9 for _ in range(4)]
    counts = [torch.randint(1, 9, (6,), generator=generator).double() for _ in range(2)]
    chosen, rejected = (Side(draws[i].requires_grad_(), draws[i + 2], counts[i]) for i in range(2))
    return chosen, rejected, torch.randn(6, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("normalised", [False, True])
def test_mcts_dpo_smooths_labels_by_the_ratio_of_visits(normalised: bool) -> None:
    chosen, rejected, _ = sides()
    better, worse = torch.tensor([5.0, 3, 1, 9, 2, 4]).double(), torch.tensor([1.0, 3, 2, 1, 8, 3]).double()
    expected = []
    for n in range(6):
        doubt = min(1 / (better[n].item() / worse[n].item() + 1), 0.5)
        parts = [(s.logprob[n] - s.reference[n]) / (s.tokens[n] if normalised else 1) for s in (chosen, rejected)]
        odds = torch.exp(0.2 * (parts[0] - parts[1]))
        expected.append(-(1 - doubt) * torch.log(odds / (1 + odds)) - doubt * torch.log(1 / (1 + odds)))
    objective = MCTSDPO(beta=0.2, normalised=normalised)
    found = objective.pair_loss(chosen, rejected, (better / worse).log())
    torch.testing.assert_close(found, torch.stack(expected), **CLOSE)
    (gradient,) = torch.autograd.grad(found.sum(), [chosen.logprob])
    assert gradient[1] != 0 and torch.sign(gradient).unique().numel() == 2  # what is surer than its label is held back


def test_step_apo_asks_for_a_margin_of_the_advantages() -> None:
    chosen, rejected, margin = sides(1)
    odds = torch.exp(0.3 * (chosen.logratio - rejected.logratio) - 0.5 * margin)
    found = StepAPO(margin=0.5).pair_loss(chosen, rejected, margin)
    torch.testing.assert_close(found, -torch.log(odds / (1 + odds)), **CLOSE)
    plain = DPO(beta=0.3).pair_loss(chosen, rejected, margin)
    torch.testing.assert_close(StepAPO(margin=0.0).pair_loss(chosen, rejected, margin), plain, **CLOSE)
    smoothed = StepAPO(flips=0.2).pair_loss(chosen, rejected, margin)  # the authors' code smooths the same margin
    gap = 0.3 * (chosen.logratio - rejected.logratio) - margin
    torch.testing.assert_close(smoothed, -0.8 * F.logsigmoid(gap) - 0.2 * F.logsigmoid(-gap), **CLOSE)


@pytest.mark.parametrize("objective", [MCTSDPO(), StepAPO()])
def test_pairs_without_a_margin_are_refused(objective: MCTSDPO | StepAPO) -> None:
    chosen, rejected, margin = sides()
    margin[2] = NAN
    with pytest.raises(DataError, match="a number in a column called 'margin'"):
        objective.pair_loss(chosen, rejected, margin)


def test_steps_are_rendered_as_a_chain_with_values_at_their_ends() -> None:
    renderer = make_model().renderer
    sample = Sample("steps", "add 1 =\n", ("1+1=2\n", "answer: 2"), (0.5, 1.0), fields={"label": 1.0}, where="here")
    (made,) = renderer.render(sample)
    assert made.parents == (-1, 0, 1) and made.fields["label"] == (1.0,) * 3
    assert math.isnan(made.fields["value"][0]) and made.fields["value"][1:] == (0.5, 1.0)
    assert [renderer.decode(part) for part in made.tokens[1:]] == ["1+1=2\n", "answer: 2"]
    assert made.tokens[2][-1] == renderer.eos and made.tokens[1][-1] != renderer.eos
    assert made.tokens[0].tolist() == renderer.prompt_ids(sample).tolist()
    assert [part.tolist() for part in made.weights] == [
        [0] * len(made.tokens[0]),
        *([1] * len(t) for t in made.tokens[1:]),
    ]


class Sums(Source):
    """One problem, whose right answers end with "2"."""

    def samples(self, split: Split) -> Any:
        yield Sample("completion", "add 1 =\n", ("1+1=2\nanswer: 2",), where="sums:0")

    def fingerprint(self) -> str:
        return "sums"

    def grade(self, sample: Sample, text: str) -> float:
        return float(text.endswith("2"))


ROWS = [  # parent, step, state, visits, Q
    [-1, "", OPEN, 9, 0.2], [0, "1+1=2\n", OPEN, 6, 0.6], [0, "1+1=3\n", OPEN, 2, -0.8], [0, "1\n", OPEN, 0, 0.0],
    [1, "answer: 2", ENDED, 4, 1.0], [1, "answer: 3", ENDED, 1, -1.0], [2, "answer: 3", ENDED, 2, -1.0],
    [1, "and on", 2, 1, -1.0],
]  # fmt: skip


def searched(make: str, **options: Any) -> list[Sample]:
    source = Searched(of=Sums(), make=make, cache=False, **options)  # type: ignore[arg-type]
    source._search = lambda wave, purpose: [ROWS for _ in wave]  # type: ignore[method-assign]
    return list(source.samples("train"))


def test_a_tree_is_made_into_paths_with_values() -> None:
    right, *wrong = searched("paths")
    assert right.kind == "steps" and right.prompt == "add 1 =\n" and right.fields == {"label": 1.0}
    assert right.answers == ("1+1=2\n", "answer: 2") and right.scores == (0.6, 1.0)
    assert [path.answers[-1] for path in wrong] == ["answer: 3"] * 2 and all(p.fields == {"label": 0.0} for p in wrong)
    assert wrong[1].scores == (-0.8, -1.0)
    assert len(searched("paths", most=1)) == 2


def test_a_tree_is_made_into_pairs_of_siblings() -> None:
    first, second = searched("pairs")
    assert first.prompt == "add 1 =\n" and first.answers == ("1+1=2\n", "1+1=3\n") and first.extra[CONTINUES]
    assert first.fields["margin"] == pytest.approx(math.log(6 / 2))
    assert second.prompt == "add 1 =\n1+1=2\n" and second.answers == ("answer: 2", "answer: 3")
    assert second.fields["margin"] == pytest.approx(math.log(4)) and not second.extra[CONTINUES]
    first, second = searched("advantages")
    assert first.answers == ("1+1=2\n", "1+1=3\n") and first.fields["margin"] == pytest.approx(1.4)
    assert second.fields["margin"] == pytest.approx(2.0)
    assert len(searched("pairs", most=1)) == len(searched("advantages", most=1)) == 1
    assert Grown(ROWS).text(6) == "1+1=3\nanswer: 3"


def test_a_wrong_answer_is_cut_at_the_step_that_costs_most() -> None:
    says: dict[str, Texts] = {
        "add 1 =\n": ["1+1=2\n2+1=3\nanswer: 3", "1+1=2\nanswer: 2"],
        "add 1 =\n1+1=2\n": ["2+1=3\nanswer: 2", "answer: 2"], "add 1 =\n1+1=2\n2+1=3\n": ["answer: 3", "answer: 4"],
    }  # fmt: skip
    source = Searched(of=Sums(), make="pivots", cache=False)
    asked = []

    def answer(wave: Sequence[Sample], purpose: str) -> list[Texts]:
        asked.extend(str(sample.prompt) for sample in wave)
        return [says[str(sample.prompt)] for sample in wave]

    source._answer = answer  # type: ignore[method-assign]
    (pair,) = source.samples("train")  # shares of right rollouts: 1/4, 1/2, 0, and 0 at the end
    assert asked == ["add 1 =\n", *says]
    assert pair.prompt == "add 1 =\n1+1=2\n" and pair.answers == ("answer: 2", "2+1=3\n") and pair.extra[CONTINUES]
    says["add 1 =\n1+1=2\n"] = ["2+1=3\nanswer: 2"]  # the same step was right another time, which says nothing
    assert list(source.samples("train")) == []
    says["add 1 =\n"] += ["so answer: 2"] * 2  # 3/4 are right, and then 1/4, since three were cut
    (pair,) = source.samples("train")
    assert pair.prompt == "add 1 =\n" and pair.answers == ("so answer: 2", "1+1=2\n")


def test_advantages_are_differences_of_values() -> None:
    rng = np.random.default_rng(0)
    for values in (*itertools.product([0.0, 0.5, 1.0], repeat=4), *rng.uniform(size=(9, 6)).tolist()):
        falls = np.diff(values)
        assert lowest_advantage(values) == int(falls.argmin())
    assert lines("a\nb\n", "\n") == ["a\n", "b\n"] and lines("a\nb", "\n") == ["a\n", "b"] and lines("a", "\n") == ["a"]


def test_a_search_asks_only_a_head_that_has_learnt(tmp_path: Path) -> None:
    model = make_model()
    OVM().equip(model)
    source = Searched(of=Sums(), values="head", samples_each=2, simulations=2, max_new_tokens=8, cache=False)
    source.meet(lambda: model, "one")
    with pytest.raises(DataError, match=r"no value head that has learnt.*Set value_model: FOLDER"):
        list(source.samples("train"))
    model.save(tmp_path)
    model.save_extras(tmp_path)
    again = load_valued(str(tmp_path), "cpu")
    found, before = value_head(again), value_head(model)
    assert found is not None and before is not None and found.known and not found.squashed
    torch.testing.assert_close(found.weight.double(), before.weight)
    model.load_extras(tmp_path)
    tree = source._search(list(Sums().samples("train")), "search:train")[0]
    assert tree[0][0] == -1 and tree[0][3] >= 2 and len(tree) > 1
    again.extras.clear()
    (tmp_path / "extras.safetensors").unlink()
    with pytest.raises(ModelError, match="expected the value head of a model"):
        load_valued(str(tmp_path), "cpu")
    assert list(Searched(of=Sums(), values="zero", value_model="x").check())


def test_the_hardest_prompts_are_those_whose_answers_surprise() -> None:
    model = make_model()
    texts = ["1+1=2\nanswer: 2", "answer: 3", "zzzz 2", "answer: 2"]
    many = [Sample("completion", "add 1 =\n", (text,), where=f"sums:{at}") for at, text in enumerate(texts)]
    surprise = []
    for sample in many:
        (made,) = model.renderer.render(sample)
        ids, begin = made.tokens[0].tolist(), int(np.argmax(made.weights[0] != 0))
        surprise.append(-states_and_logprobs(model, ids)[1][begin - 1 :].mean().item())
    source = Searched(of=SimpleNamespace(samples=lambda split: many), hardest=0.5)
    source.meet = lambda load, identity: None  # type: ignore[method-assign]
    source._load = lambda: model
    expected = sorted(sorted(range(4), key=lambda at: -surprise[at])[:2])
    assert [sample.where for sample in source._asked("train")] == [f"sums:{at}" for at in expected]
    assert source._asked("eval") == []
    source.search_held_out = 3
    assert source._asked("eval") == many[:3]


def test_answers_come_from_the_beam_or_from_another_generator(tmp_path: Path) -> None:
    model, objective = make_model(), OVM(width=2, expansions=3)
    objective.equip(model)
    prompts = [np.array([3, 4, 5], np.int32), np.array([6], np.int32)]
    options: dict[str, Any] = {"max_new_tokens": 9, "stop": model.renderer.stop_ids}
    made = objective.generate(model, prompts, samples=2, **options)
    assert [len(group) for group in made] == [2, 2] and all(len(one.tokens) <= 9 for group in made for one in group)
    with pytest.raises(HoneError, match="a beam of 2 has no 3 answers"):
        objective.generate(model, prompts, samples=3, **options)
    other = make_model(5)
    other.save(tmp_path)
    objective = OVM(width=1, expansions=1, generate_with=str(tmp_path))
    found = objective.generate(model, prompts, **options)
    plain = OVM(width=1, expansions=1).generate(other, prompts, **options)
    assert [g[0].tokens.tolist() for g in found] == [g[0].tokens.tolist() for g in plain]
