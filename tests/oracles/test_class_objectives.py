"""Losses over classes, heads and reward models equal other implementations, and refuse what they cannot use."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from hone.adapters.layered import Layered
from hone.data.sample import Sample
from hone.errors import DataError, HoneError, ModelError
from hone.objectives.class_losses import LDR, adapted_temperature, aldr_loss, bounded, focal_loss, ldr_loss
from hone.objectives.classify import Classify, Tag, pooled
from hone.objectives.heads import Labelled, in_order, unmasked_layers
from hone.objectives.language import SFT
from hone.objectives.reward_model import RewardModel, bradley_terry
from hone.text.heads import HEAD, as_classifier, classifier_error, saved_names
from hone.text.model import LanguageModel
from hone.text.pack import Packed, Tree, pack
from hone.text.tokenizer import train_tokenizer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # read when the module is imported

from trl.trainer.reward_trainer import RewardTrainer

EXACT = {"rtol": 1e-10, "atol": 1e-10}
CLASSES = 5
CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


def rows(count: int = 7, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Return logits (n, K) in float64 and targets (n,)."""
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(count, CLASSES, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(CLASSES, (count,), generator=generator)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["some text with words, and some more of them"], 300)
    return LanguageModel.fresh(CONFIG, tokenizer).to(dtype=torch.float64)


def text(count: int, number: float, seed: int, **fields: float) -> Tree:
    """Return a text of some tokens with the number of its class."""
    tokens = np.random.default_rng(seed).integers(6, 250, size=count).astype(np.int32)
    marked = {name: (value,) for name, value in {"class": number, **fields}.items()}
    return Tree((tokens,), (np.zeros(count, np.float32),), (-1,), marked, f"text:{seed}")


def equipped(objective: Any, model: LanguageModel) -> Any:
    """Return an objective with its head in the model, drawn anew."""
    torch.manual_seed(3)
    objective.equip(model)
    return objective


def source(*samples: Sample, streaming: bool = False) -> Any:
    return SimpleNamespace(streaming=streaming, samples=lambda split: iter(samples), describe=lambda: "toys")


# Losses.


def test_ldr_is_the_worst_case_over_label_distributions() -> None:
    logits, targets = rows(1, 1.0)
    gaps = logits[0].detach() - logits[0, targets[0]].detach() + 0.3
    gaps[targets[0]] = 0.0
    free = torch.zeros(CLASSES, dtype=torch.float64, requires_grad=True)  # maximise over q = softmax(free)
    optimizer = torch.optim.LBFGS(
        [free], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def worst() -> Tensor:
        q = free.softmax(0)
        return -((q * gaps).sum() - 0.7 * (q * (q * CLASSES).log()).sum())

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = worst()
        value.backward()
        return value

    optimizer.step(closure)
    torch.testing.assert_close(ldr_loss(logits, targets, 0.7, 0.3)[0], -worst(), rtol=1e-9, atol=1e-9)


def test_ldr_is_the_cross_entropy_and_the_hinge_loss_at_its_ends() -> None:
    logits, targets = rows()
    entropy = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(ldr_loss(logits, targets, 1.0, 0.0), entropy - math.log(CLASSES), **EXACT)
    others = logits.scatter(1, targets[:, None], float("-inf")).amax(1)
    hinge = (others - logits.gather(1, targets[:, None]).squeeze(1) + 0.5).clamp_min(0)
    torch.testing.assert_close(ldr_loss(logits, targets, 1e-4, 0.5), hinge, rtol=0, atol=2e-4)


def test_a_row_finds_the_temperature_at_which_its_loss_is_stationary() -> None:
    logits, targets = rows()
    own = adapted_temperature(logits, 4.0, 2.0, rounds=200).requires_grad_()
    assert (own >= 4.0 * (1 - 1 / 2.0)).all() and (own < 4.0).all()
    price = 2.0 * math.log(CLASSES) / (2 * 4.0)
    whole = ldr_loss(logits, targets, own, 0.0) - price * (own - 4.0).square()
    (slope,) = torch.autograd.grad(whole.sum(), own)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-10)
    torch.testing.assert_close(aldr_loss(logits, targets, 4.0, 0.0, 2.0, rounds=200), whole, **EXACT)
    sure = torch.tensor([[9.0, 0, 0, 0, 0], [0.1, 0, 0, 0, 0]], dtype=torch.float64)
    temperatures = adapted_temperature(sure, 4.0, 2.0)
    assert temperatures[0] < temperatures[1] < 4.0


def test_one_iteration_is_a_visit_of_the_authors_code() -> None:
    logits, targets = rows()
    lam, alpha, margin = 10.0, 2.0, 0.1
    positive = F.softplus(logits)
    scaled = positive / (positive.norm(p=1, dim=1, keepdim=True) / CLASSES)
    share = (scaled / lam).softmax(1)
    divergence = (share * (CLASSES * share).log()).sum(1, keepdim=True)
    own = (lam - lam * divergence / (alpha * math.log(CLASSES))).detach()
    truth = F.one_hot(targets, CLASSES).double()
    gaps = margin * (1 - truth) + scaled - (scaled * truth).sum(1, keepdim=True)
    extra = -alpha * math.log(CLASSES) / lam / 2 * (own - lam) ** 2
    expected = own * (gaps / own).exp().mean(1, keepdim=True).log() + extra
    mine = aldr_loss(bounded(logits), targets, lam, margin, alpha, rounds=1)
    torch.testing.assert_close(mine, expected.squeeze(1), **EXACT)
    first, second = (torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (mine, expected))
    torch.testing.assert_close(first, second, **EXACT)


def test_focal_loss_is_its_equation_and_at_zero_the_cross_entropy() -> None:
    logits, targets = rows()
    p = logits.softmax(1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(focal_loss(logits, targets, 2.0), -((1 - p) ** 2) * p.log(), **EXACT)
    entropy = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(focal_loss(logits, targets, 0.0), entropy, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cost", ["cross-entropy", "focal", "ldr", "aldr"])
def test_extreme_logits_give_finite_costs_and_gradients(cost: Any, dtype: torch.dtype) -> None:
    extreme = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [1e4, 1e4, 1e4], [0.0, 0.0, -1e4]], dtype=dtype)
    for squashed in (True, False):
        objective = Labelled(cost=cost, temperature=1.0, bounded=squashed, gamma=0.5)
        for target in range(3):
            logits = extreme.clone().requires_grad_()
            value = objective.costs(logits, torch.full((4,), target))
            value.sum().backward()
            assert torch.isfinite(value).all() and torch.isfinite(logits.grad).all(), (target, squashed)


def test_ldr_over_the_vocabulary_is_the_likelihood_less_a_constant(model: LanguageModel) -> None:
    tokens = np.arange(10, 22, dtype=np.int32)
    batch = pack([Tree((tokens,), (np.ones(12, np.float32),), (-1,))])
    likelihood, _ = SFT().loss(model, batch)
    constant = 11 * math.log(model.hf.config.vocab_size)
    torch.testing.assert_close(LDR().loss(model, batch)[0], likelihood - constant, **EXACT)
    logits = model.head(model.hidden(batch)[:-1])
    expected = aldr_loss(logits, batch.tokens[1:], 2.0, 0.5, 3.0).sum()
    torch.testing.assert_close(LDR(temperature=2.0, margin=0.5, adapt=3.0).loss(model, batch)[0], expected, **EXACT)


# Heads.


@pytest.mark.parametrize("pooling", ["last", "mean", "max"])
def test_a_text_is_classified_by_its_pooled_logits_alone(model: LanguageModel, pooling: Any) -> None:
    objective = equipped(Classify(classes=["a", "b", "c"], pooling=pooling), model)
    trees = [text(4, 0, 1), text(9, 2, 2, weight=0.5), text(2, 1, 3)]
    batch = pack(trees)
    head = model.extras[HEAD]
    expected, right = torch.zeros((), dtype=torch.float64), 0.0
    for tree, weight in zip(trees, (1.0, 0.5, 1.0), strict=True):
        scores = head(model.hidden(pack([tree])))
        logits = {"last": scores[-1], "mean": scores.mean(0), "max": scores.amax(0)}[pooling]
        number = int(tree.fields["class"][0])
        expected = expected + weight * F.cross_entropy(logits, torch.tensor(number))
        right += weight * (int(logits.argmax()) == number)
    loss, metrics = objective.loss(model, batch)
    torch.testing.assert_close(loss, expected, **EXACT)
    assert float(metrics["class_accuracy"]) == right and objective.count(batch) == 2.5


def test_pooling_is_torchs_own_by_segment() -> None:
    values, owners = torch.randn(6, 2, dtype=torch.float64), torch.tensor([0, 0, 0, 1, 2, 2])
    for how, own in (("mean", lambda x: x.mean(0)), ("max", lambda x: x.amax(0))):
        expected = torch.stack([own(values[owners == s]) for s in range(3)])
        torch.testing.assert_close(pooled(values, owners, 3, how), expected, **EXACT)  # type: ignore[arg-type]


def words(model: LanguageModel, tags: str) -> Tree:
    sample = Sample("tagged", answers=("some", "words", "of", "mine"), labels=tuple(tags.split()), where="t:1")
    return model.renderer.classified(sample, ["O", "B", "I"])


def test_words_are_tagged_at_their_last_token(model: LanguageModel) -> None:
    objective = equipped(Tag(classes=["O", "B", "I"]), model)
    tree = words(model, "O B I O")
    batch = pack([tree])
    ends = np.cumsum([len(part) for part in tree.tokens]) - 1
    logits = model.extras[HEAD](model.hidden(batch)[torch.from_numpy(ends)])
    targets = torch.tensor([0, 1, 2, 0])
    loss, metrics = objective.loss(model, batch)
    torch.testing.assert_close(loss, F.cross_entropy(logits, targets, reduction="sum"), **EXACT)
    best = logits.argmax(1)
    assert objective.count(batch) == 4 and float(metrics["class_accuracy"]) == int((best == targets).sum())
    from sklearn.metrics import f1_score

    f1 = 2 * float(metrics["tags_right"]) / float(metrics["tags_predicted"] + metrics["tags_there"])
    wanted = f1_score(targets.numpy(), best.numpy(), labels=[1, 2], average="micro", zero_division=0.0)
    assert f1 == pytest.approx(wanted)


def test_unmasking_shows_a_word_what_follows_it(model: LanguageModel) -> None:
    first, second = words(model, "O B I O"), words(model, "O B I O")
    second.tokens[-1][:] = 7  # another last word
    for unmask, differs in (("none", False), ("all", True), ([3], True), ("0001", True), ("1000", True)):
        objective = equipped(Tag(classes=["O", "B", "I"], unmask=unmask), model)  # type: ignore[arg-type]
        states = [objective.hidden(model, pack([tree]))[0] for tree in (first, second)]
        assert (not torch.equal(*states)) == differs, unmask


def test_groups_of_layers_are_named_from_below() -> None:
    assert unmasked_layers("0011", 6) == [3, 4, 5] and unmasked_layers("10", 5) == [0, 1, 2]
    assert unmasked_layers("all", 3) == [0, 1, 2] and unmasked_layers("none", 3) == []
    assert unmasked_layers([2, 0, 2], 3) == [0, 2]
    with pytest.raises(HoneError, match="layer 3 is not there: the layers are 0 to 2"):
        unmasked_layers([3], 3)
    with pytest.raises(HoneError, match="5 groups, but the model has only 4 layers"):
        unmasked_layers("10101", 4)


@pytest.mark.parametrize("kind", ["text", "token", "reward"])
def test_transformers_computes_the_same_with_the_head(model: LanguageModel, kind: str, tmp_path: Path) -> None:
    names = ["no", "yes", "perhaps"]
    made = {"text": Classify(classes=names), "token": Tag(classes=names), "reward": RewardModel()}[kind]
    objective = equipped(made, model)
    if objective.bias:
        torch.nn.init.normal_(model.extras[HEAD].bias)
    readout = objective.readout(model)
    as_classifier(model, readout).save_pretrained(tmp_path)
    auto = AutoModelForTokenClassification if kind == "token" else AutoModelForSequenceClassification
    again = auto.from_pretrained(tmp_path, dtype=torch.float64).eval()
    tree = text(9, 0, 5)
    own = model.extras[HEAD](model.hidden(pack([tree])))
    padding = again.config.pad_token_id
    ids = torch.tensor([[*tree.tokens[0].tolist(), padding, padding], [*tree.tokens[0].tolist(), 9, 9]])
    mask = (ids != padding).long()
    theirs = again(input_ids=ids, attention_mask=mask).logits[0]
    torch.testing.assert_close(theirs[:9] if kind == "token" else theirs, own if kind == "token" else own[-1], **EXACT)
    wanted = ["reward"] if kind == "reward" else names
    assert list(again.config.id2label.values()) == wanted and again.config.num_labels == len(wanted)
    with torch.no_grad():
        model.extras[HEAD].weight[0, 0] += 1.0
    assert classifier_error(model.to(torch.float32), readout, tmp_path, ids[0, :9]) > 1e-3
    model.to(torch.float64)


@pytest.mark.parametrize(
    ("objective", "reason"),
    [(Classify(classes=["a", "b"], pooling="mean"), "last token alone, and this run takes mean"),
     (Tag(classes=["a", "b"], unmask="all"), r"causal mask, and this run has removed it \(unmask\)")],
)  # fmt: skip
def test_what_transformers_cannot_compute_is_not_exported(model: LanguageModel, objective: Any, reason: str) -> None:
    with pytest.raises(HoneError, match=reason):
        as_classifier(model, equipped(objective, model).readout(model))


# Classes.


def test_classes_are_found_and_sorted_as_names_or_numbers() -> None:
    assert in_order({"10", "9", "1.5"}) == ["1.5", "9", "10"] and in_order({"b", "10", "9"}) == ["10", "9", "b"]
    objective = Classify()
    objective.look(source(*(Sample("text", answers=("x",), labels=(label,)) for label in ("2", "10", "2"))))
    assert objective.class_names() == ["2", "10"]
    given = Classify(classes=["z", "a"])
    given.look(source(streaming=True))
    assert given.class_names() == ["z", "a"]


@pytest.mark.parametrize(
    ("objective", "samples", "message"),
    [
        (Classify(), [Sample("text", answers=("x",), labels=("a",))], "two different classes, found a; a class"),
        (Classify(), [Sample("text", answers=("x",))], "found none"),
        (Classify(classes=["a", "a"]), [], "found a, a"),
        (Classify(), [Sample("completion", "x", ("y",), where="f:1")], "f:1: this is prompts with answers"),
        (Tag(), [Sample("text", answers=("x",), labels=("a",), where="f:2")], "f:2: this is plain text"),
    ],
)  # fmt: skip
def test_classes_that_cannot_be_told_are_refused(objective: Any, samples: list[Sample], message: str) -> None:
    with pytest.raises(DataError, match=message):
        objective.look(source(*samples))
    if not samples:
        return
    with pytest.raises(DataError, match="a stream is not read to its end"):
        type(objective)().look(source(*samples, streaming=True))


def test_labels_outside_the_classes_and_missing_ones_are_refused(model: LanguageModel) -> None:
    sample = Sample("text", answers=("x",), labels=("yess",), where="f:3")
    with pytest.raises(DataError, match=r"f:3: 'yess' is none of the classes .*yes"):
        model.renderer.classified(sample, ["no", "yes"])
    with pytest.raises(DataError, match="f:4: expected a class in a column called 'label', found none"):
        model.renderer.classified(Sample("text", answers=("x",), where="f:4"), ["no", "yes"])


def test_a_head_knows_its_classes(model: LanguageModel, tmp_path: Path) -> None:
    equipped(Classify(classes=["no", "yes"]), model)
    model.save_extras(tmp_path)
    assert saved_names(tmp_path) == ["no", "yes"] and saved_names(tmp_path / "nowhere") is None
    again = Classify()
    assert again.recall(tmp_path) and again.class_names() == ["no", "yes"]
    weight = model.extras[HEAD].weight.clone()
    equipped(again, model)
    torch.nn.init.zeros_(model.extras[HEAD].weight)
    model.load_extras(tmp_path)
    assert torch.equal(model.extras[HEAD].weight, weight)
    equipped(Classify(classes=["yes", "no"]), model)
    with pytest.raises(ModelError, match="tells the classes no, yes, but this run has yes, no; set the objective's"):
        model.load_extras(tmp_path)


# Reward models.


def pairs(*margins: float) -> Packed:
    trees = []
    for number, margin in enumerate(margins):
        sizes = (3 + number, 2, 4)
        rng = np.random.default_rng(number)
        tokens = tuple(rng.integers(6, 250, size=n).astype(np.int32) for n in sizes)
        weights = tuple((np.zeros if i == 0 else np.ones)(n, np.float32) for i, n in enumerate(sizes))
        fields = {"chosen": (float("nan"), 1.0, 0.0), "margin": (margin,) * 3}
        trees.append(Tree(tokens, weights, (-1, 0, 0), fields, f"pairs:{number}"))
    return pack(trees)


def test_the_reward_loss_equals_trl(model: LanguageModel) -> None:
    objective = equipped(RewardModel(margin=0.5, centring=0.02), model)
    torch.nn.init.normal_(model.extras[HEAD].weight)
    batch = pairs(1.0, 2.5, 0.0)

    def alone(leaf: int) -> Tensor:
        tokens = torch.cat([batch.tokens[batch.starts[s] : batch.starts[s + 1]] for s in batch.chain(leaf)]).numpy()
        tree = Tree((tokens,), (np.zeros(len(tokens), np.float32),), (-1,))
        return model.extras[HEAD](model.hidden(pack([tree])))[-1]

    rewards = [alone(leaf) for side in (1, 2) for leaf in range(side, 9, 3)]
    stub = SimpleNamespace(
        model=SimpleNamespace(training=False), args=SimpleNamespace(center_rewards_coefficient=0.02),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"eval": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    expected = RewardTrainer.compute_loss(
        stub, lambda **inputs: SimpleNamespace(logits=torch.stack(rewards)),
        {"margin": 0.5 * torch.tensor([1.0, 2.5, 0.0]), "attention_mask": torch.ones(1)},
    )  # fmt: skip
    loss, metrics = objective.loss(model, batch)
    torch.testing.assert_close(loss / 3, expected, **EXACT)
    assert float(metrics["pair_accuracy"]) / 3 == pytest.approx(stub._metrics["eval"]["accuracy"][0])
    first, second = (torch.autograd.grad(x, model.extras[HEAD].weight)[0] for x in (loss / 3, expected))
    torch.testing.assert_close(first, second, **EXACT)


def test_extreme_rewards_give_finite_losses() -> None:
    for chosen, rejected in ((1e4, -1e4), (-1e4, 1e4)):
        inputs = torch.tensor([chosen, rejected], requires_grad=True)
        loss = bradley_terry(inputs[:1], inputs[1:], 1.0, 0.0).sum()
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(inputs.grad).all()


def test_a_missing_margin_is_refused(model: LanguageModel) -> None:
    objective = equipped(RewardModel(margin=1.0), model)
    with pytest.raises(DataError, match=r"pairs:1: objective.margin needs by how much .* columns: {margin: COLUMN}"):
        objective.loss(model, pairs(1.0, float("nan")))


# Layers.


def test_layers_learn_at_rates_by_their_depth(model: LanguageModel) -> None:
    adapter = Layered(decay=0.5)
    adapter.attach(model.hf)
    rates = adapter.rates(model.hf)
    assert rates["model.embed_tokens.weight"] == 0.5**4 and rates["model.norm.weight"] == 1.0
    assert [rates[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(4)] == [0.125, 0.25, 0.5, 1.0]


def test_new_layers_start_as_the_architecture_says() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    hf = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=64, n_layer=8, n_head=2, n_positions=16))
    Layered(new_layers=1).attach(hf)
    deviations = [layer.mlp.c_proj.weight.std().item() for layer in hf.transformer.h]
    assert deviations == pytest.approx([0.02 / 4] * 8, rel=0.1)  # GPT-2 scales what is added to the residual


def test_lower_layers_freeze_and_upper_ones_start_anew() -> None:
    torch.manual_seed(0)
    hf = LanguageModel.fresh(CONFIG, train_tokenizer(["some text"], 300)).hf
    with torch.no_grad():
        for p in hf.parameters():
            p.add_(1.0)  # as if it had been trained
    before = {name: p.clone() for name, p in hf.named_parameters()}
    torch.manual_seed(5)
    Layered(frozen_layers=2, new_layers=1).attach(hf)
    frozen = {name for name, p in hf.named_parameters() if not p.requires_grad}
    assert frozen == {n for n in before if n.startswith(("model.embed", "model.layers.0.", "model.layers.1."))}
    changed = {name for name, p in hf.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if name.startswith("model.layers.3.")}
    block = dict(hf.named_parameters())
    assert block["model.layers.3.input_layernorm.weight"].tolist() == [1.0] * 16
    assert block["model.layers.3.mlp.up_proj.weight"].std().item() == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize(
    ("adapter", "message"),
    [(Layered(frozen_layers=5), "frozen_layers: 5, but the model has 4 layers"),
     (Layered(frozen_layers=3, new_layers=2), "are more than the model's 4: a frozen layer must not start anew")],
)  # fmt: skip
def test_more_layers_than_there_are_is_an_error(model: LanguageModel, adapter: Layered, message: str) -> None:
    with pytest.raises(HoneError, match=message):
        adapter.attach(model.hf)
