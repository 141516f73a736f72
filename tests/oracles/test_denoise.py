"""Denoising: spans have T5's statistics, no token of a text is lost, packed tasks give what rows with a mask give."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hone.errors import DataError, ModelError
from hone.objectives.denoise import MIXTURES, MODES, UL2, UL2R, Denoiser, Marks
from hone.options import Places, check_part
from hone.text.generate import generate
from hone.text.model import LanguageModel
from hone.text.pack import Packed, Tree, pack
from hone.text.spans import corrupt, span_mask
from hone.text.special import mask_id, spare_ids
from hone.text.tokenizer import train_tokenizer

CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 200,
}  # fmt: skip
EXACT = {"rtol": 1e-10, "atol": 1e-10}
BEGIN, END = 0, 1
R: Denoiser = {"mode": "r", "rate": 0.15, "span": 3.0}
X: Denoiser = {"mode": "x", "rate": 0.5, "span": 4.0}
S: Denoiser = {"mode": "s", "rate": 0.25}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel.fresh(CONFIG, train_tokenizer(["some text"], 300)).to(dtype=torch.float64)


def text(length: int, seed: int = 0, begin: bool = True, end: bool = True) -> Tree:
    """Return a text of letters' tokens between what begins and what ends a text."""
    body = np.random.default_rng(seed).integers(20, 90, size=length)
    tokens = np.r_[[BEGIN] * begin, body, [END] * end].astype(np.int32)
    return Tree((tokens,), (np.ones(len(tokens), np.float32),), (-1,), where=f"text:{seed}")


def equipped(model: LanguageModel, **options: Any) -> UL2:
    objective = UL2(**options)
    objective.equip(model)
    return objective


def spans(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.r_[0, mask.astype(int), 0]))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def joined(given: list[int], target: list[int], sentinels: tuple[int, ...]) -> list[int]:
    """Return the text that input and target stand for: each sentinel of the input gives way to its span."""
    pieces: list[list[int]] = []
    for token in target:
        if token in sentinels:
            pieces.append([])
        else:
            pieces[-1].append(token)
    found, left = list[int](), iter(pieces)
    for token in given:
        found += next(left) if token in sentinels else [token]
    assert next(left, None) is None
    return found


@pytest.mark.parametrize(
    ("length", "rate", "span"), [(100, 0.15, 3.0), (64, 0.5, 8.0), (20, 0.15, 64.0), (7, 0.9, 1.0)]
)
def test_every_mask_takes_out_the_rate_in_spans_of_the_mean_length(length: int, rate: float, span: float) -> None:
    out = min(max(round(length * rate), 1), length - 1)
    number = min(max(round(out / span), 1), length - out)
    for seed in range(200):
        mask = span_mask(length, rate, span, np.random.default_rng(seed))
        found = spans(mask)
        assert mask.sum() == out and len(found) == number
        assert not mask[0] and mask[-1]
        assert all(first[1] < second[0] for first, second in pairwise(found))
        rolled = span_mask(length, rate, span, np.random.default_rng(seed), roll=True)
        assert rolled.sum() == out and number <= len(spans(rolled)) <= number + 1


def test_all_masks_are_equally_likely() -> None:
    """Of 8 tokens, 4 go out in 2 spans: 3 divisions of those that stay and 3 of those that go make 9 masks."""
    draws = 9000
    rng = np.random.default_rng(0)
    counts = Counter(tuple(span_mask(8, 0.5, 2.0, rng).tolist()) for _ in range(draws))
    expected = set()
    for stay, go in [(a, b) for a in combinations(range(1, 4), 1) for b in combinations(range(1, 4), 1)]:
        sizes = [stay[0], go[0], 4 - stay[0], 4 - go[0]]
        expected.add(tuple(np.tile([False, True], 2).repeat(sizes).tolist()))
    assert set(counts) == expected
    error = np.sqrt(draws * (1 / 9) * (8 / 9))
    assert all(abs(count - draws / 9) < 4.5 * error for count in counts.values())


def test_a_rolled_mask_favours_no_place() -> None:
    rng = np.random.default_rng(0)
    draws = 6000
    means = np.mean([span_mask(12, 0.25, 3.0, rng, roll=True) for _ in range(draws)], axis=0)
    assert np.abs(means - 0.25).max() < 4.5 * np.sqrt(0.25 * 0.75 / draws)


def test_of_one_token_nothing_is_taken_out() -> None:
    rng = np.random.default_rng(0)
    assert [span_mask(n, 0.5, 3.0, rng, roll=True).tolist() for n in (0, 1)] == [[], [False]]


def test_input_and_target_are_those_of_t5() -> None:
    tokens = np.arange(10, 17, dtype=np.int32)
    mask = np.array([0, 1, 1, 0, 0, 1, 1], bool)
    given, target, own = corrupt(tokens, mask, [90, 91])
    assert given.tolist() == [10, 90, 13, 14, 91]
    assert target.tolist() == [90, 11, 12, 91, 15, 16]
    assert own.tolist() == [False, True, True, False, True, True]
    given, target, own = corrupt(tokens, ~mask, [90, 91])  # it begins with a span and ends with what stays
    assert (given.tolist(), target.tolist()) == ([90, 11, 12, 91, 15, 16], [90, 10, 91, 13, 14])
    given, target, own = corrupt(tokens, np.zeros(7, bool), [90])
    assert given.tolist() == tokens.tolist() and len(target) == len(own) == 0


@pytest.mark.parametrize("roll", [True, False])
def test_input_and_target_give_the_text_back_however_often_sentinels_recur(roll: bool) -> None:
    for seed in range(100):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(100, size=int(rng.integers(2, 80)))
        mask = span_mask(len(tokens), 0.5, 1.5, rng, roll=roll)
        given, target, own = corrupt(tokens, mask, (200, 201))
        assert joined(given.tolist(), target.tolist(), (200, 201)) == tokens.tolist()
        assert own.sum() == mask.sum() and len(given) + int(own.sum()) == len(tokens) + len(target) - int(own.sum())


@pytest.mark.parametrize("end", [True, False])
def test_a_task_holds_every_token_of_its_text_once(model: LanguageModel, end: bool) -> None:
    marks = Marks.of(model)
    for seed, denoiser in enumerate([R, X, S] * 10):
        objective = equipped(model, denoisers=[denoiser], roll=seed % 2 == 1)
        whole = text(40 + seed, seed, end=end)
        batch = objective.corrupted(pack([whole])).batch
        given, target = (batch.tokens[batch.starts[n] : batch.starts[n + 1]].tolist() for n in (0, 1))
        assert given[:2] == [BEGIN, marks.flags[denoiser["mode"]]]
        if denoiser["mode"] == "s":
            assert [BEGIN, *given[2:], *target] == whole.tokens[0].tolist()
        else:
            assert target[-1] == END and (given[-1] == END) == end
            found = joined(given[2:], target[:-1], marks.sentinels)
            assert [BEGIN, *found] == whole.tokens[0].tolist()


def test_the_rest_of_a_cut_text_has_the_mean_length_and_a_uniform_one(model: LanguageModel) -> None:
    objective = equipped(model, denoisers=[S])
    lengths = Counter()
    for seed in range(3000):
        batch = objective.corrupted(pack([text(20, seed, end=False)])).batch
        lengths[int(batch.weights.sum())] += 1
    assert set(lengths) == set(range(1, 10))  # 1 to 2 (0.25 20) - 1, of mean 5
    assert all(abs(count - 3000 / 9) < 4.5 * np.sqrt(3000 * 8 / 81) for count in lengths.values())


def test_denoisers_are_drawn_by_their_weights(model: LanguageModel) -> None:
    objective = UL2R()
    objective.equip(model)
    batch = pack([text(30, seed) for seed in range(2000)])
    flags = Counter(
        objective.corrupted(batch).batch.tokens[objective.corrupted(batch).batch.starts[:-1:2] + 1].tolist()
    )
    marks = Marks.of(model)
    for mode, share in (("r", 0.25), ("x", 0.25), ("s", 0.5)):
        assert abs(flags[marks.flags[mode]] / 2000 - share) < 4.5 * np.sqrt(share * (1 - share) / 2000)  # type: ignore[index]


def plain_loss(model: LanguageModel, given: list[int], target: list[int], prefix: bool) -> Tensor:
    """Return the losses (n,) of a target behind an input, by transformers' own attention under a written-out mask."""
    length, first = len(given) + len(target), len(given)
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    if prefix:
        sees[:first, :first] = True
    mask = torch.zeros(length, length, dtype=torch.float64).masked_fill(~sees, float("-inf"))[None, None]
    model.packs = False
    try:
        logits = model.hf(input_ids=torch.tensor([given + target]), attention_mask=mask).logits[0]
    finally:
        model.packs = True
    return F.cross_entropy(logits[first - 1 : -1], torch.tensor(target), reduction="none")


@pytest.mark.parametrize("prefix", [True, False])
def test_loss_and_metrics_equal_rows_with_a_dense_mask(model: LanguageModel, prefix: bool) -> None:
    objective = equipped(model, denoisers=[R, X, S], prefix=prefix)
    marks = Marks.of(model)
    branching = Tree(
        tuple(text(n, n).tokens[0][1:] for n in (9, 5, 7)), tuple(np.ones(n + 1, np.float32) for n in (9, 5, 7)),
        (-1, 0, 0), where="branching",
    )  # fmt: skip
    batch = pack([*(text(n, n) for n in (3, 12, 25, 40, 33)), branching])
    made = objective.corrupted(batch)
    run = made.batch
    assert run.segments == 2 * 7  # the tree that branches is two texts
    total, sums = torch.zeros(()), Counter()
    for first in range(0, run.segments, 2):
        given, target = (run.tokens[run.starts[n] : run.starts[n + 1]].tolist() for n in (first, first + 1))
        losses = plain_loss(model, given, target, prefix)
        total = total + losses.sum()
        mode = next(mode for mode in MODES if marks.flags[mode] in given)
        for token, value in zip(target, losses.tolist(), strict=True):
            ends = mode != "s" and token == END
            if token not in marks.sentinels and not ends:
                sums[f"{mode}_loss"] += value
                sums[f"{mode}_tokens"] += 1
    loss, metrics = objective.loss(model, batch)
    torch.testing.assert_close(loss, total, **EXACT)
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {**dict.fromkeys(metrics, 0), **sums}
    )
    assert objective.count(batch) == float(run.weights.sum()) == sum(len(t) for t in (run.tokens[run.weights != 0],))


def test_what_is_taken_out_depends_on_text_and_step_and_in_evaluation_on_the_text_alone(model: LanguageModel) -> None:
    objective = equipped(model, denoisers=[X])
    alone, among = pack([text(40, 5)]), pack([text(33, 4), text(40, 5)])

    def tokens(batch: Packed, step: int) -> list[int]:
        objective.before_step(SimpleNamespace(recipe=SimpleNamespace(seed=1), step=step), [])
        made = objective.corrupted(batch).batch
        return made.tokens[made.starts[-3] :].tolist()

    try:
        model.train()
        assert tokens(alone, 0) == tokens(among, 0) != tokens(alone, 1)
        model.eval()
        assert tokens(alone, 0) == tokens(among, 1)
    finally:
        model.train()


def test_the_shipped_mixtures_are_those_of_the_papers() -> None:
    assert len(MIXTURES["ul2"]) == 7 and sum(d.get("weight", 1.0) for d in MIXTURES["ul2r"]) == 1.0
    assert {(d["rate"], d.get("span")) for d in MIXTURES["ul2"] if d["mode"] == "r"} == {(0.15, 3.0), (0.15, 8.0)}
    assert UL2R().mixture == MIXTURES["ul2r"] and UL2().mixture == MIXTURES["ul2"]


def test_answers_are_generated_behind_the_flag_of_cut_texts(model: LanguageModel) -> None:
    marks, prompt = Marks.of(model), np.array([BEGIN, 30, 31, 32], np.int32)
    flagged = np.array([BEGIN, marks.flags["s"], 30, 31, 32], np.int32)
    full = np.full(199, 40, np.int32)
    made = equipped(model).generate(model, [prompt, full], max_new_tokens=4)
    wanted = generate(model, [flagged], max_new_tokens=4, prefix=True)
    assert np.array_equal(made[0][0].tokens, wanted[0][0].tokens) and len(made[1][0].tokens) == 1
    plain = equipped(model, denoisers=[R], prefix=False).generate(model, [prompt], max_new_tokens=4)
    np.testing.assert_array_equal(plain[0][0].logprobs, generate(model, [prompt], max_new_tokens=4)[0][0].logprobs)


def test_texts_that_cannot_be_used_are_refused(model: LanguageModel) -> None:
    with pytest.raises(DataError, match=r"text:0: expected a text to take something out of, found none"):
        equipped(model).count(pack([text(0)]))
    lone = equipped(model, denoisers=[R]).corrupted(pack([text(1)])).batch
    assert lone.tokens[lone.weights != 0].tolist() == [END]  # as in T5, one token stays
    with pytest.raises(
        DataError, match=r"text:3: a text of 182 tokens becomes .* context of 200 .*max_tokens to about 1"
    ):
        equipped(model, denoisers=[{**X, "span": 3.0}]).count(pack([text(180, 3)]))


@pytest.mark.parametrize("prefix", [True, False])
def test_a_text_of_which_nothing_is_left_is_predicted_from_nothing(model: LanguageModel, prefix: bool) -> None:
    objective = equipped(model, denoisers=[{**S, "rate": 0.5}], flags=False, prefix=prefix)
    whole = [text(3, seed, begin=False, end=False) for seed in range(30)]
    made = objective.corrupted(pack(whole))
    wanted = [objective.corrupted(pack([one])) for one in whole]
    assert torch.equal(made.modes, torch.cat([one.modes for one in wanted]))
    assert len(made.modes) == len(made.batch) == 90
    bare = [one for one in wanted if bool((one.modes == MODES.index("s")).all())]
    assert 0 < len(bare) < 30
    assert all(one.batch.weights.tolist() == [0, 1, 1] for one in bare)  # its first token follows nothing
    loss, metrics = objective.loss(model, pack(whole))
    expected = torch.zeros((), dtype=torch.float64)
    for one in wanted:
        first = max(1, int(one.batch.weights.nonzero()[0]))
        ids = one.batch.tokens.tolist()
        expected = expected + plain_loss(model, ids[:first], ids[first:], prefix).sum()
    torch.testing.assert_close(loss, expected, **EXACT)
    assert (
        float(metrics["s_tokens"]) == objective.count(pack(whole)) == sum(float(o.batch.weights.sum()) for o in wanted)
    )


def test_denoisers_that_make_no_sense_are_refused() -> None:
    def problems(denoisers: Any) -> str:
        return " ".join(
            p.message for p in check_part("objective", {"name": "ul2", "denoisers": denoisers}, "o", Places())
        )

    assert not problems("ul2r") and not problems([R, {**X, "weight": 2.0}, S])
    assert "mode r needs a span of at least 1 token, got None" in problems([{"mode": "r", "rate": 0.2}])
    assert "give no span" in problems([{**S, "span": 2.0}]) and "at most 0.5, got 0.6" in problems([{**S, "rate": 0.6}])
    assert "expected mode: r, x or s, got 'y'" in problems([{**R, "mode": "y"}])
    assert "unknown option 'spam'" in problems([R, {**R, "spam": 1}])
    for wrong in ({"rate": 1.5}, {"rate": 0}, {"rate": True}, {"span": 0.5}, {"weight": 0}, {"weight": float("nan")}):
        assert f"mode x needs a {next(iter(wrong))}" in problems([{**X, **wrong}])
    assert problems([]) and problems("ul3")


def test_spare_tokens_are_those_that_no_text_is_made_of(model: LanguageModel) -> None:
    ids = spare_ids(model.tokenizer)
    assert len(ids) == 13 and mask_id(model.tokenizer) == ids[0] and spare_ids(model.tokenizer, 1, 2) == ids[:2]
    everything = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 7)]))
    assert not set(model.tokenizer(everything)["input_ids"]) & set(ids)
    marks = Marks.of(model)
    assert len({ids[0], *marks.flags.values(), *marks.sentinels}) == 13
    words = SimpleNamespace(get_vocab=lambda: {"[unused1]": 7, "a": 1, "À": 2, "[unused2]": 3}, decode=lambda t: "x",
                            mask_token_id=5)  # fmt: skip
    assert spare_ids(words) == [3, 7] and mask_id(words) == 5  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="needs 5 tokens that no text is made of, and the tokenizer has 2"):
        spare_ids(words, 5)  # type: ignore[arg-type]
