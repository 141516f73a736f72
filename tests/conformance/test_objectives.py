"""Every registered objective: finite gradients, falls on a toy, splits into micro-batches exactly, deterministic."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hone.data.open import ACCEPTED
from hone.data.rollouts import Rollouts
from hone.objectives.base import Objective, Turn, trained
from hone.objectives.language import SFT, Pretrain
from hone.parts import catalogue, load
from hone.text.model import LanguageModel
from hone.text.pack import Packed, Tree, pack
from hone.text.tokenizer import train_tokenizer

EXACT = {"rtol": 1e-12, "atol": 1e-12}

# (objective, check) -> why it cannot hold for this objective.
EXCEPTIONS: dict[tuple[str, str], str] = {}
# Options to test beside the defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "sft": [{"label_smoothing": 0.1}],
    "pretrain": [{"z_loss": 1e-2}],
    "ldr": [{"temperature": 2.0, "margin": 0.5, "adapt": 2.0}],
    "classify": [
        {"pooling": "mean", "cost": "focal"},
        {"pooling": "max", "cost": "cross-entropy", "label_smoothing": 0.1},
        {"cost": "ldr"},
        {"cost": "aldr", "temperature": 1.0, "bounded": False, "unmask": "all"},
    ],
    "tag": [{"unmask": "all"}, {"unmask": [0]}],
    "reward-model": [{"margin": 1.0, "centring": 0.01}],
    "focal": [{"gamma": 0.5}],
    "weighted": [{"power": 0.5, "length": 1.0, "last": 3.0}],
    "mft": [{"replace": "random"}],
    "noisefit": [{"choose": "low", "hard": 0.0, "consistency": 1.0, "temperature": 2.0}],
    "scheduled-sampling": [{"passes": 2, "temperature": 0.0, "generator": "current"}],
    "ul2": [{"denoisers": "ul2r", "prefix": False, "flags": False}],
    "s2s-ft": [{"form": "causal", "label_smoothing": 0.1}, {"form": "masked"}],
    "coconut": [{"thoughts": 1, "uniform": 0.5}],
    "sequence-match": [{"alpha": 0.5, "gamma": 0.9, "noise": 0.5, "noise_from": "answer"}, {"backspace": "none"}],
    "lrec": [{"match": "mse", "cross_entropy": 0.0}],
    "minor-sft": [{"beta": 0.0}],
    "poft": [{"references": ["start", "start"], "beta": 4.0}],
    "dft": [{"score": "mean", "tau": 0.3}, {"gamma": 1.0}],
    "ovm": [{"nll": 1.0}],
    "alphamath": [{"beta": 1.0}],
    "step-apo": [{"flips": 0.1}],
    "grpo": [
        {"kl": 0.1},
        {"ratio": "answer", "normalise": "tokens"},
        {"kl": 0.1, "estimator": "k2", "entropy": 0.01},
        {"clip_low": None, "clip_high": None, "normalise": "length"},
    ],
    "ppo": [{"kl": 0.1, "value_clip": None}],
    "kto": [{"point": "zero", "undesirable": 2.0}],
    "aft": [{"constraint": "detached"}, {"constraint": "none", "sft": 0.0}],
}


CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


@cache
def tokenizer() -> Any:
    return train_tokenizer(["a tokenizer is needed, but no text is rendered here"], 300)


@cache
def built() -> tuple[LanguageModel, torch.Tensor]:
    """Return a tiny random Llama in float64, and the state of the random numbers behind it."""
    torch.manual_seed(0)
    return LanguageModel.fresh(CONFIG, tokenizer()).to(dtype=torch.float64), torch.get_rng_state()


def make_model() -> LanguageModel:
    """Return a copy of that model, the same one every time."""
    model, state = built()
    torch.set_rng_state(state)
    return copy.deepcopy(model, {id(model.tokenizer): model.tokenizer})


def make_teacher() -> LanguageModel:
    """Return a model that the run is said to start from: one that is sure of other tokens than `make_model`'s."""
    model = make_model()
    with torch.no_grad():
        model.hf.get_output_embeddings().weight.mul_(20)
    return model


def tree(lengths: Sequence[int], parents: Sequence[int], seed: int, prompt: int = 0, **fields: Any) -> Tree:
    """Return a tree of tokens that count upwards, so that there is something to learn, from a prompt of some tokens."""
    rng = np.random.default_rng(seed)
    tokens = tuple((rng.integers(200) + np.arange(n)).astype(np.int32) for n in lengths)
    weights = [np.ones(n, np.float32) for n in lengths]
    weights[0][: max(1, prompt)] = 0
    return Tree(tokens, tuple(weights), tuple(parents), fields, where=f"toy:{seed}")


def sequences() -> list[Tree]:
    branching = tree([3, 2, 4, 3], [-1, 0, 0, 2], seed=9, prompt=3)
    branching.weights[2][:] = 0.25
    return [tree([n], [-1], seed=n, prompt=n // 2) for n in (2, 5, 7, 8, 11)] + [branching]


def pairs() -> list[Tree]:
    fields = {"chosen": (float("nan"), 1.0, 0.0), "margin": (1.5,) * 3}
    return [tree([p, a, b], [-1, 0, 0], seed=p, prompt=p, **fields) for p, a, b in ((3, 4, 2), (2, 1, 5), (6, 3, 3))]


def judged() -> list[Tree]:
    ranked = tree([3, 2, 4, 3], [-1, 0, 0, 0], seed=4, prompt=3, score=(float("nan"), 0.2, 0.9, 0.7))
    single = [tree([n], [-1], seed=n, prompt=n // 2, label=(float(n % 2),)) for n in (5, 8)]
    return [*pairs(), ranked, *single]


def labelled() -> list[Tree]:
    return [tree([n], [-1], seed=n, prompt=n, **{"class": (float(n % 3),)}) for n in (2, 5, 7, 8, 12)]


def tagged() -> list[Tree]:
    def words(*sizes: int) -> Tree:
        made = tree(sizes, range(-1, len(sizes) - 1), seed=len(sizes), **{"class": [float(n % 3) for n in sizes]})
        return replace(made, weights=tuple(np.eye(1, n, n - 1, dtype=np.float32)[0] for n in sizes))

    return [words(2, 1, 3), words(3, 2), words(2, 2, 1, 1, 3)]


def steps() -> list[Tree]:
    def path(*sizes: int, right: float) -> Tree:
        values = (float("nan"), *(right - 0.1 * place for place in range(len(sizes) - 1)))
        label = ((right + 1) / 2,) * len(sizes)
        return tree(sizes, range(-1, len(sizes) - 1), seed=sum(sizes), prompt=sizes[0], value=values, label=label)

    return [path(3, 2, 5, right=1.0), path(2, 3, right=-0.6), path(4, 2, 3, 4, right=1.0)]


def rollouts() -> list[Tree]:
    """Return groups of answers as a phase leaves them: half are good, and the last one is not the model's own."""
    nothing = float("nan")

    def group(prompt: int, *answers: int) -> Tree:
        sizes, count = (prompt, *answers), len(answers)
        good = [float(place % 2 == 0) for place in range(count)]
        made = tree(
            sizes, [-1] + [0] * count, seed=prompt, prompt=prompt, reward=(nothing, *good),
            foreign=(nothing, *[0.0] * (count - 1), 1.0), hint=(0.0,) * len(sizes),
        )  # fmt: skip
        rng = np.random.default_rng(prompt)
        values = {
            name: tuple(rng.normal(centre, 0.3, size) for size in sizes)
            for name, centre in (
                ("logprob", -5.5),
                ("reference", -5.5),
                ("value", 0.2),
                ("return", 0.5),
                ("credit", 0.0),
            )
        }
        advantages = tuple(np.full(size, 2 * worth - 1.0) for size, worth in zip(sizes, [0.5, *good], strict=True))
        return replace(made, values={**values, "advantage": advantages})

    return [group(3, 4, 2, 5), group(2, 1, 6), group(5, 3, 3, 2)]


LOADER = SimpleNamespace(
    trees=None, source=Rollouts(of=None, rewards="exact", max_new_tokens=8, hints="binomial", demonstrations=1)
)

TOYS: dict[str, Callable[[], list[Tree]]] = {
    "sequences": sequences, "tokens": sequences, "pairs": pairs, "judged": judged,
    "labelled": labelled, "tagged": tagged, "streams": sequences, "steps": steps,
    "rollouts": rollouts,
}  # fmt: skip

NAMES = [r.name for r in catalogue() if r.kind == "objective" and load("objective", r.name).medium == "text"]
CASES = [(name, options) for name in NAMES for options in ({}, *VARIANTS.get(name, []))]
IDS = [name + "".join(f" {key}={value}" for key, value in options.items()) for name, options in CASES]
every_objective = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


@pytest.fixture
def case(request: pytest.FixtureRequest, name: str, options: dict[str, Any]) -> tuple[Callable[[], Any], list[Tree]]:
    """Return a maker of (objective, model) and the toy trees, unless the check is a known exception."""
    check = request.function.__name__.removeprefix("test_")
    if (name, check) in EXCEPTIONS:
        pytest.skip(EXCEPTIONS[name, check])
    cls = load("objective", name)
    if cls.consumes not in TOYS:
        pytest.fail(f"objective '{name}' consumes '{cls.consumes}': add toy trees for that to TOYS")

    def make() -> tuple[Objective, Any]:
        objective, model = cls(**options), make_model()
        seen = SimpleNamespace(kind=ACCEPTED[cls.consumes][0], labels=("0", "1", "2"))
        objective.look(SimpleNamespace(streaming=False, samples=lambda split: [seen], describe=lambda: "toys"))
        objective.equip(model)
        start = SimpleNamespace(from_nothing=False, load=lambda **options: make_teacher())
        objective.setup(SimpleNamespace(
            model=model, objective=objective, players={}, step=0, loader=LOADER, adapter=None,
            recipe=SimpleNamespace(build=lambda field: start),
            cluster=SimpleNamespace(device="cpu", dtype=torch.float64, precision="float64"),
        ))  # fmt: skip
        return objective, model

    return make, TOYS[cls.consumes]()


def play(
    objective: Objective, model: Any, groups: Sequence[Sequence[Tree]]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the gradients and the sums of every turn, over micro-batches, as the training loop takes them."""
    batches = [pack(group) for group in groups]
    units = sum(objective.count(batch) for batch in batches)
    gradients: dict[str, Tensor] = {}
    sums: dict[str, float] = {"units": units}
    for batch in batches:
        for index, turn in enumerate(objective.turns(model, batch)):
            model.zero_grad(set_to_none=True)
            (turn.loss / units).backward()
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    key = f"{index} {turn.player} {name}"
                    gradients[key] = gradients.get(key, torch.zeros_like(parameter)) + parameter.grad
            for name, value in {"loss": turn.loss.detach(), **turn.metrics}.items():
                key = f"{index} {turn.player} {name}"
                sums[key] = sums.get(key, 0.0) + float(value)
    return gradients, sums


@every_objective
def test_gradients_are_finite(case):
    make, trees = case
    objective, model = make()
    gradients, sums = play(objective, model, [trees])
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert all(np.isfinite(value) for value in sums.values())
    assert sums["units"] > 0 and any(g.any() for g in gradients.values())


@every_objective
def test_turns_are_scalars_and_metrics_carry_no_graph(case):
    make, trees = case
    objective, model = make()
    turns = list(objective.turns(model, pack(trees)))
    assert turns
    for turn in turns:
        assert turn.loss.shape == () and turn.loss.requires_grad
        assert all(value.shape == () and not value.requires_grad for value in turn.metrics.values())
        assert "loss" not in turn.metrics  # the loop reports it


@every_objective
def test_falls_on_a_toy(case):
    make, trees = case
    objective, model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
    batch = pack(trees)
    losses: list[float] = []
    for _ in range(30):
        turn = next(iter(objective.turns(model, batch)))
        losses.append(turn.loss.item())
        if losses[-1] < 0.7 * losses[0]:
            return
        optimizer.zero_grad()
        (turn.loss / objective.count(batch)).backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


@every_objective
@pytest.mark.parametrize("cut", ["halves", "singles"])
def test_any_split_into_micro_batches_gives_the_same_gradients(case, cut):
    make, trees = case
    groups = [trees[::2], trees[1::2]] if cut == "halves" else [[tree] for tree in trees]
    whole, whole_sums = play(*make(), [trees])
    split, split_sums = play(*make(), groups)
    assert whole.keys() == split.keys() and whole_sums.keys() == split_sums.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
    assert split_sums == pytest.approx(whole_sums, rel=1e-12, abs=1e-12)


@every_objective
def test_is_deterministic(case):
    make, trees = case
    runs = []
    for _ in range(2):
        objective, model = make()
        torch.manual_seed(7)
        runs.append(play(objective, model, [trees]))
    (first, first_sums), (second, second_sums) = runs
    assert first_sums == second_sums
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@every_objective
def test_evaluation_gives_the_training_loss_without_a_graph(case):
    make, trees = case
    objective, model = make()
    batch = pack(trees)
    trained_on = next(iter(objective.turns(model, batch))).loss
    with torch.no_grad():
        evaluated, _ = objective.loss(model, batch)
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, trained_on.detach(), **EXACT)


def test_exceptions_and_variants_name_what_exists():
    checks = {key.removeprefix("test_") for key in globals() if key.startswith("test_")}
    assert all(name in NAMES and check in checks and reason for (name, check), reason in EXCEPTIONS.items())
    assert set(VARIANTS) <= set(NAMES)


def plain_losses(model: Any, batch: Packed, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of every predicted token by plain PyTorch, and which tokens these are."""
    predicted = torch.tensor([t for t in range(len(batch)) if batch.previous[t] >= 0])
    logits = model.head(model.hidden(batch)[batch.previous[predicted]])
    return F.cross_entropy(logits, batch.tokens[predicted], reduction="none", **options), predicted


def test_trained_predictions_come_from_the_chain():
    batch = pack([tree([2], [-1], seed=1, prompt=1), tree([3, 2, 2], [-1, 0, 0], seed=2, prompt=3)])
    predictors, targets, weights = trained(batch)
    assert predictors.tolist() == [0, 4, 5, 4, 7]  # both children begin after token 4, the last of their parent
    assert torch.equal(targets, batch.tokens[[1, 5, 6, 7, 8]])
    assert weights.tolist() == [1.0] * 5


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sft_is_the_weighted_cross_entropy_of_trained_tokens(smoothing):
    model, batch = make_model(), pack(sequences())
    losses, predicted = plain_losses(model, batch, label_smoothing=smoothing)
    objective = SFT(label_smoothing=smoothing)
    loss, metrics = objective.loss(model, batch)
    torch.testing.assert_close(loss, (losses * batch.weights[predicted]).sum(), **EXACT)
    assert objective.count(batch) == float(batch.weights.sum()) == sum(w.sum() for t in sequences() for w in t.weights)
    best = model.head(model.hidden(batch)).argmax(-1)
    right = [float(w) * bool(best[p] == token)
             for p, token, w in zip(batch.previous, batch.tokens, batch.weights, strict=True)]  # fmt: skip
    assert float(metrics["token_accuracy"]) == pytest.approx(sum(right))


def test_sft_runs_the_head_on_trained_tokens_only():
    model, batch, seen = make_model(), pack(sequences()), []
    model.head.linear.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    SFT().loss(model, batch)
    assert max(seen) == int((batch.weights != 0).sum()) < len(batch) // 1.5


def test_pretrain_counts_every_token_that_has_a_predecessor():
    model = make_model()
    trees = [replace(t, weights=tuple(np.ones_like(w) for w in t.weights)) for t in sequences()]  # as rendered for it
    batch = pack(trees)
    losses, predicted = plain_losses(model, batch)
    log_z = model.head(model.hidden(batch)[batch.previous[predicted]]).logsumexp(-1)
    loss, _ = Pretrain(z_loss=0.5).loss(model, batch)
    torch.testing.assert_close(loss, losses.sum() + 0.5 * log_z.square().sum(), **EXACT)
    assert Pretrain().count(batch) == len(batch) - len(trees) == len(predicted)


def test_an_objective_without_a_loss_says_so():
    class Empty(Objective):
        pass

    with pytest.raises(NotImplementedError, match="Empty must define loss"):
        next(Empty().turns(make_model(), pack(sequences())))


def test_the_default_turn_is_the_loss_for_the_model():
    class Constant(Objective):
        def loss(self, model: Any, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
            return torch.tensor(2.0), {"extra": torch.tensor(3.0)}

    assert list(Constant().turns(make_model(), pack(sequences()))) == [
        Turn("model", torch.tensor(2.0), {"extra": torch.tensor(3.0)})
    ]
