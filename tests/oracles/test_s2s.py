"""Sequence-to-sequence forms equal rows under the masks of attention of microsoft/unilm, and answers their own loss."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hone.errors import ModelError
from hone.objectives.s2s import S2S, masked_part, with_copies
from hone.options import Places, check_part
from hone.text.attention import TreePlan
from hone.text.model import LanguageModel
from hone.text.pack import Packed, Tree, as_prefixes, pack
from hone.text.special import mask_id
from hone.text.tokenizer import train_tokenizer

CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
EXACT = {"rtol": 1e-10, "atol": 1e-10}
FORMS = ["causal", "masked", "pseudo-masked"]


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel.fresh(CONFIG, train_tokenizer(["some text"], 300)).to(dtype=torch.float64)


def pair(source: int, target: int, seed: int) -> Tree:
    """Return a source and a trained target of random tokens, in one segment as the renderer makes it."""
    tokens = np.random.default_rng(seed).integers(20, 90, size=source + target).astype(np.int32)
    weights = np.r_[np.zeros(source), np.ones(target)].astype(np.float32)
    return Tree((tokens,), (weights,), (-1,), where=f"pair:{seed}")


PAIRS = [pair(4, 3, 0), pair(2, 6, 1), pair(7, 1, 2)]


def equipped(model: LanguageModel, form: Any, **options: Any) -> S2S:
    objective = S2S(form=form, **options)
    objective.equip(model)
    return objective


def rows(model: LanguageModel, tokens: Tensor, positions: Tensor, sees: Tensor) -> Tensor:
    """Return the logits (n, V) of a row by transformers' own attention under a mask that is written out."""
    mask = torch.zeros(sees.shape, dtype=torch.float64).masked_fill(~sees, float("-inf"))[None, None]
    model.packs = False
    try:
        return model.hf(input_ids=tokens[None], position_ids=positions[None], attention_mask=mask).logits[0]
    finally:
        model.packs = True


def unilm(source: int, target: int, masks: bool) -> tuple[Tensor, Tensor]:
    """Return positions and mask of attention of source, target and masks, as the toolkit makes them of span numbers."""
    ids = source + torch.arange(target)
    weight = torch.cat([torch.zeros(source, dtype=torch.int64), ids, *([-ids] if masks else [])])
    asks, there = weight[:, None], weight[None]
    true = (asks >= 0) & (there >= 0) & (there <= asks)
    pseudo = (asks < 0) & (((there >= 0) & (-there > asks)) | (there == asks))
    return torch.cat([torch.arange(source), ids, *([ids] if masks else [])]), true | pseudo


def expected(model: LanguageModel, form: str) -> Tensor:
    """Return the summed loss of `PAIRS`, pair by pair; a masked form predicts at the masks beside the target."""
    total = torch.zeros((), dtype=torch.float64)
    for tree in PAIRS:
        tokens, source = torch.from_numpy(tree.tokens[0]).long(), int((tree.weights[0] == 0).sum())
        target = len(tokens) - source
        masks = form != "causal"
        positions, sees = unilm(source, target, masks)
        filler = tokens.new_full((target if masks else 0,), mask_id(model.tokenizer))
        logits = rows(model, torch.cat([tokens, filler]), positions, sees)
        total = total + F.cross_entropy(
            logits[-target:] if masks else logits[source - 1 : -1], tokens[source:], reduction="sum"
        )
    return total


@pytest.mark.parametrize("form", FORMS)
def test_the_loss_of_an_answer_and_its_gradient_equal_rows_under_unilms_mask(model: LanguageModel, form: str) -> None:
    objective, batch = equipped(model, form), pack(PAIRS)
    model.eval()
    try:
        loss, _ = objective.loss(model, batch)
        assert objective.count(batch) == 10
    finally:
        model.train()
    wanted = expected(model, form)
    torch.testing.assert_close(loss, wanted, **EXACT)
    parameters = list(model.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_pseudo_masks_give_what_one_forward_pass_for_each_token_gives(model: LanguageModel) -> None:
    objective, batch = equipped(model, "pseudo-masked", keep=0.0, random=0.0), pack(PAIRS)
    total = torch.zeros((), dtype=torch.float64)
    for tree in PAIRS:
        tokens, source = torch.from_numpy(tree.tokens[0]).long(), int((tree.weights[0] == 0).sum())
        for place in range(source, len(tokens)):
            row = torch.cat([tokens[:place], torch.tensor([mask_id(model.tokenizer)])])
            sees = torch.ones(len(row), len(row), dtype=torch.bool).tril()
            sees[:source, :source] = True
            logits = rows(model, row, torch.arange(len(row)), sees)
            total = total + F.cross_entropy(logits[-1:], tokens[place : place + 1])
    torch.testing.assert_close(objective.loss(model, batch)[0], total, **EXACT)


def test_masked_tokens_are_recovered_at_their_own_places(model: LanguageModel) -> None:
    objective, batch = equipped(model, "masked", rate=0.5, keep=0.0, random=0.0), pack(PAIRS)
    total, start, count = torch.zeros((), dtype=torch.float64), 0, 0
    chosen = masked_part(batch, 0.5, "part:").tolist()
    for tree in PAIRS:
        tokens, source = torch.from_numpy(tree.tokens[0]).long(), int((tree.weights[0] == 0).sum())
        mine = torch.tensor([place - start for place in chosen if start <= place < start + len(tokens)])
        assert len(mine) == max(1, round(0.5 * (len(tokens) - source))) and mine.min() >= source
        positions, sees = unilm(source, len(tokens) - source, masks=False)
        logits = rows(model, tokens.index_fill(0, mine, mask_id(model.tokenizer)), positions, sees)
        total = total + F.cross_entropy(logits[mine], tokens[mine], reduction="sum")
        start, count = start + len(tokens), count + len(mine)
    torch.testing.assert_close(objective.loss(model, batch)[0], total, **EXACT)
    assert objective.count(batch) == count


def test_a_copy_sees_what_comes_before_its_token_on_every_kind_of_tree() -> None:
    branching = Tree(
        tuple(np.arange(begin, begin + n, dtype=np.int32) for begin, n in ((10, 3), (20, 4), (30, 2), (40, 3))),
        tuple(np.array(w, np.float32) for w in ([0, 0, 1], [0, 1, 1, 0], [1, 0], [1, 1, 1])), (-1, 0, 0, 2),
        {"score": (1.0, 2.0, 3.0, 4.0)}, "tree",
    )  # fmt: skip
    batch = as_prefixes(pack([*PAIRS[:1], branching, *PAIRS[1:]]))
    beside = batch.weights.nonzero().squeeze(1)
    made, found = with_copies(batch, beside, 1000 + beside)
    golden = sorted(set(range(len(made))) - set(found.tolist()))
    assert made.tokens[golden].equal(batch.tokens) and made.weights[golden].equal(batch.weights)
    assert not made.weights[found].any() and made.trees.equal(made.trees.sort().values)

    def chain(packed: Packed, place: int) -> tuple[list[int], int]:
        own = torch.arange(packed.segments).repeat_interleave(packed.starts.diff())
        path = packed.chain(int(own[place]))
        return [int(packed.tokens[t]) for t in range(len(packed)) if int(own[t]) in path and t <= place], int(
            own[place]
        )

    for place, copy in zip(beside.tolist(), found.tolist(), strict=True):
        wanted, old = chain(batch, place)
        seen, segment = chain(made, copy)
        assert seen == [*wanted[:-1], 1000 + place] and chain(made, golden[place])[0] == wanted
        assert made.positions[copy] == batch.positions[place] == made.positions[golden[place]]
        assert made.two_way is not None and not made.two_way[segment] and made.trees[segment] == batch.trees[old]
        assert made.fields["score"][segment].nan_to_num(0) == batch.fields["score"][old].nan_to_num(0)


def test_trees_of_short_segments_are_attended_to_under_a_mask_with_the_same_result(model: LanguageModel) -> None:
    batch = as_prefixes(pack(PAIRS))
    beside = batch.weights.nonzero().squeeze(1)
    made, _ = with_copies(batch, beside, 20 + beside)
    for forest in (made, replace(made, two_way=None)):
        assert (TreePlan(forest).open or TreePlan(forest)).trees
        found = []
        for kernel in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):  # the second goes chain by chain
            with sdpa_kernel([kernel, SDPBackend.MATH]):
                states = model.hidden(forest)
            loss = (states * torch.arange(states.numel()).view_as(states).sin()).sum()
            found.append((states, *torch.autograd.grad(loss, list(model.decoder.parameters()))))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, **EXACT)
    assert not TreePlan(pack(PAIRS)).trees


@pytest.mark.parametrize("form", FORMS)
def test_answers_are_as_likely_as_the_loss_says(model: LanguageModel, form: str) -> None:
    objective = equipped(model, form)
    prompts = [np.array([30, 31, 32], np.int32), np.array([40, 41, 42, 43, 44], np.int32)]
    uniform: Any = lambda logits, uniforms: (torch.softmax(logits, -1).cumsum(-1) < uniforms[:, None]).sum(-1)  # noqa: E731
    made = objective.generate(model, prompts, max_new_tokens=5, samples=2, sampler=uniform, seed=3, stop=[11, 12, 13])
    assert model.training
    model.eval()
    try:
        for prompt, group in zip(prompts, made, strict=True):
            assert len(group) == 2
            for one in group:
                ids, logprobs = one.trajectory()
                weights = np.zeros(len(prompt), np.float32), np.ones(len(ids), np.float32)
                batch = pack([Tree((prompt, ids.astype(np.int32)), weights, (-1, 0))])
                assert float(objective.loss(model, batch)[0].detach()) == pytest.approx(-logprobs.sum(), rel=1e-9)
    finally:
        model.train()


def test_shares_of_the_masks_are_kept_or_random_and_all_of_it_depends_on_the_step(model: LanguageModel) -> None:
    objective = equipped(model, "pseudo-masked", keep=0.2, random=0.3)
    batch = pack([pair(1, 40, seed) for seed in range(100)])
    chosen, mask = batch.weights.nonzero().squeeze(1), mask_id(model.tokenizer)

    def copies(training: bool) -> Tensor:
        run, predictions = objective._make(model, batch, training)
        return run.tokens[predictions.predictors]

    first = copies(True)
    kept, masked = (first == batch.tokens[chosen]).float().mean(), (first == mask).float().mean()
    assert abs(float(kept) - 0.2) < 0.03 and abs(float(masked) - 0.5) < 0.03
    assert first.max() < model.hf.config.vocab_size
    objective.before_step(SimpleNamespace(recipe=SimpleNamespace(seed=0), step=1), [])
    assert not torch.equal(copies(True), first)
    assert set(copies(False).tolist()) == {mask}


def test_what_cannot_be_done_is_refused(model: LanguageModel) -> None:
    found = check_part("objective", {"name": "s2s-ft", "keep": 0.6, "random": 0.5}, "objective", Places())
    assert "at most 1 together" in found[0].message
    bare: Any = SimpleNamespace(tokenizer=SimpleNamespace(get_vocab=dict, decode=lambda ids: "x", mask_token_id=None))
    S2S(form="causal").equip(bare)
    with pytest.raises(ModelError, match="no text is made of, and the tokenizer has 0"):
        S2S(form="masked").equip(bare)
    model.packs = False
    try:
        with pytest.raises(ModelError, match="runs padded instead of packed"):
            equipped(model, "pseudo-masked").loss(model, pack(PAIRS))
    finally:
        model.packs = True
