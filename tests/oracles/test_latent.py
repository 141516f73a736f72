"""Continuous thoughts over packed trees equal a loop over single samples through the model of transformers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hone.engine.checkpoint import read_state, staged, write_state
from hone.engine.loop import Run
from hone.errors import DataError, ModelError
from hone.objectives.coconut import NAME, Coconut
from hone.text.latent import Insertion, make_room
from hone.text.model import EXTRAS_FILE, LanguageModel
from hone.text.pack import Tree, pack
from hone.text.tokenizer import train_tokenizer

EXACT = {"rtol": 1e-9, "atol": 1e-10}
CONFIG = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 96, "tie_word_embeddings": True,
}  # fmt: skip
QUESTIONS = ["2 3 1\n", "9 9\n", "1 2 3 4 5\n"]
ANSWERS = ["2+3=5\n5+1=6\nanswer: 6", "9+9=18\nanswer: 18", "1+2=3\n3+3=6\n6+4=10\n10+5=15\nanswer: 15"]


@pytest.fixture
def model() -> LanguageModel:
    torch.manual_seed(0)
    made = LanguageModel.fresh(CONFIG, train_tokenizer([*QUESTIONS, *ANSWERS], 300)).to(dtype=torch.float64)
    with torch.no_grad():
        for parameter in made.parameters():  # far from the start, where all attention is even
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def equipped(model: LanguageModel, stage: int | None = None, **options: Any) -> Coconut:
    objective = Coconut(**options)
    objective.equip(model)
    with torch.no_grad():
        model.extras[NAME].weight.add_(torch.randn(2, 16, dtype=torch.float64))
    if stage is not None:
        model.extras[NAME].stage.fill_(stage)
    return objective


def trees(model: LanguageModel) -> list[Tree]:
    made = []
    for number, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS, strict=True)):
        ask, say = (model.tokenizer.encode(text, add_special_tokens=False) for text in (question, answer))
        ids = np.array([model.tokenizer.bos_token_id, *ask, *say, model.tokenizer.eos_token_id], np.int32)
        weights = np.r_[np.zeros(1 + len(ask)), np.ones(len(say) + 1)].astype(np.float32)
        made.append(Tree((ids,), (weights,), (-1,), where=f"toy:{number}"))
    return made


def embeddings_by_hand(model: LanguageModel, question: list[int], thoughts: int) -> Tensor:
    """Return the embeddings (1, n, D) of a question, the markers and the thoughts between them, one pass a thought."""
    embed, markers = model.hf.get_input_embeddings(), model.extras[NAME].weight
    row = torch.cat([embed(torch.tensor(question)), markers[:1]])
    for _ in range(thoughts):
        states = model.hf.model(inputs_embeds=row[None]).last_hidden_state[0]
        row = torch.cat([row, states[-1:]])
    return torch.cat([row, markers[1:]])[None]


def loss_by_hand(model: LanguageModel, number: int, thoughts: int, skipped: int) -> Tensor:
    tokenizer = model.tokenizer
    question = [tokenizer.bos_token_id, *tokenizer.encode(QUESTIONS[number], add_special_tokens=False)]
    lines = ANSWERS[number].splitlines(keepends=True)
    rest = "".join([*lines[:-1][skipped:], lines[-1]])
    target = torch.tensor([*tokenizer.encode(rest, add_special_tokens=False), tokenizer.eos_token_id])
    begun = embeddings_by_hand(model, question, thoughts)
    row = torch.cat([begun, model.hf.get_input_embeddings()(target)[None]], 1)
    logits = model.hf(inputs_embeds=row).logits[0, begun.shape[1] - 1 : -1]
    return nn.functional.cross_entropy(logits, target, reduction="sum")


@pytest.mark.parametrize(("stage", "skipped"), [(0, 0), (1, 1), (2, 2), (3, 99)])
def test_packed_thoughts_equal_a_loop_over_samples(model: LanguageModel, stage: int, skipped: int) -> None:
    objective = equipped(model, stage, thoughts=2, stages=2)
    batch = pack(trees(model))
    loss, _ = objective.loss(model, batch)
    expected = sum(loss_by_hand(model, n, 2 * min(stage, 2), skipped) for n in range(3))
    torch.testing.assert_close(loss, expected, **EXACT)
    parameters = [*model.hf.parameters(), model.extras[NAME].weight]
    for ours, theirs in zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True
    ):
        torch.testing.assert_close(ours, theirs, **EXACT)


def test_what_is_counted_is_what_is_left(model: LanguageModel) -> None:
    left = []
    for stage in range(4):
        objective = equipped(model, stage, stages=2)
        lines = [answer.splitlines(keepends=True) for answer in ANSWERS]
        skipped = stage if stage < 3 else 99
        texts = ["".join([*each[:-1][skipped:], each[-1]]) for each in lines]
        left.append(sum(len(model.tokenizer.encode(text, add_special_tokens=False)) + 1 for text in texts))
        assert objective.count(pack(trees(model))) == left[-1]
    assert left == sorted(left, reverse=True) and left[0] > left[3]


def test_stages_go_by_the_step_and_the_optimizer_is_reset_when_one_begins(model: LanguageModel) -> None:
    objective = equipped(model, thoughts=1, stages=3)
    assert [objective.stage_at(step, 50) for step in (0, 9, 10, 29, 30, 40, 49)] == [0, 0, 1, 2, 3, 4, 4]
    assert [Coconut(first=2, stages=3).stage_at(step, 30) for step in (0, 9, 10, 20, 29)] == [2, 2, 3, 4, 4]
    assert [Coconut(steps_per_stage=4).stage_at(step, 100) for step in (3, 4, 15, 16, 99)] == [0, 1, 3, 4, 4]
    optimizer = torch.optim.Adam(model.parameters())
    run = SimpleNamespace(
        step=9, total=50, model=model, recipe=SimpleNamespace(seed=0), players={"model": SimpleNamespace()}
    )
    run.players["model"].optimizer = optimizer
    objective.loss(model, pack(trees(model)))[0].backward()
    optimizer.step()
    objective.before_step(run, trees(model))
    assert optimizer.state and objective.stage == 0
    run.step = 10
    objective.before_step(run, trees(model))
    assert not optimizer.state and objective.stage == 1
    assert Coconut(stages=3).stage == 4


def test_the_stage_goes_with_the_weights_back_to_the_best_and_into_the_saved_model(
    model: LanguageModel, tmp_path: Path
) -> None:
    def run_of(objective: Coconut) -> Any:
        run = Run(SimpleNamespace(seed=0), SimpleNamespace(sharded=False), model, objective, None, total=50)  # type: ignore[arg-type]
        run.loader = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
        return run

    objective = equipped(model, thoughts=1, stages=3, reset_optimizer=False)
    run = run_of(objective)
    objective.setup(run)
    run.step = 19
    objective.before_step(run, trees(model))
    assert objective.stage == 1
    with staged(tmp_path / "best") as folder:
        write_state(folder, run.state())
    run.step = 49
    objective.before_step(run, trees(model))
    assert objective.stage == 4
    best = read_state(tmp_path / "best")
    run.take_weights(best)  # as `final: best` does
    assert objective.stage == 1

    model.save_extras(tmp_path)
    again = equipped(model, thoughts=1, stages=3)
    assert again.stage == 4
    model.load_extras(tmp_path)
    again.setup(SimpleNamespace(model=model, step=0, total=0))  # an evaluation of the saved model
    assert again.stage == 1

    resumed = equipped(model, thoughts=1, stages=3)
    run = run_of(resumed)
    resumed.setup(run)
    assert resumed.stage == 0
    run.restore(best)
    assert resumed.stage == 1

    tensors = load_file(tmp_path / EXTRAS_FILE)
    del tensors[f"{NAME}.stage"]
    save_file(tensors, tmp_path / EXTRAS_FILE)
    old = equipped(model, thoughts=1, stages=3)  # saved without a stage, which answers with all thoughts
    model.load_extras(tmp_path)
    assert old.stage == 4 and torch.equal(model.extras[NAME].weight, tensors[f"{NAME}.weight"])


@torch.no_grad()
@pytest.mark.parametrize("stage", [0, 2])
def test_generation_equals_the_loop(model: LanguageModel, stage: int) -> None:
    objective = equipped(model, stage, thoughts=2, stages=2)
    prompts = [np.array(model.tokenizer.encode(question), np.int32) for question in QUESTIONS]
    made = objective.generate(model, prompts, max_new_tokens=8)
    for prompt, (found,) in zip(prompts, made, strict=True):
        row = embeddings_by_hand(model, prompt.tolist(), 2 * stage)
        expected, logprobs = [], []
        for _ in range(8):
            logits = model.hf(inputs_embeds=row).logits[0, -1].log_softmax(-1)
            expected.append(int(logits.argmax()))
            logprobs.append(float(logits.max()))
            row = torch.cat([row, model.hf.get_input_embeddings()(torch.tensor([[expected[-1]]]))], 1)
        assert found.tokens.tolist() == expected
        np.testing.assert_allclose(found.logprobs, logprobs, rtol=1e-9)


@torch.no_grad()
def test_thoughts_that_are_taken_away_change_what_is_said(model: LanguageModel) -> None:
    prompts = [np.array(model.tokenizer.encode(question), np.int32) for question in QUESTIONS]
    seen = {}
    for ablate in ("none", "zero", "drop"):
        objective = equipped(model, 2, thoughts=2, stages=2, ablate=ablate)
        model.extras[NAME].weight.data.fill_(0.1)
        seen[ablate] = np.concatenate([g[0].logprobs for g in objective.generate(model, prompts, max_new_tokens=1)])
    model.extras[NAME].weight.data.fill_(0.1)
    zeros = embeddings_by_hand(model, prompts[0].tolist(), 4)
    zeros[:, -5:-1] = 0
    expected = model.hf(inputs_embeds=zeros).logits[0, -1].log_softmax(-1).max()
    assert seen["zero"][0] == pytest.approx(float(expected), rel=1e-9)
    assert abs(seen["none"] - seen["zero"]).min() > 1e-4 and abs(seen["none"] - seen["drop"]).min() > 1e-4
    assert not model.hf.get_input_embeddings()._forward_hooks


def test_uniform_stages_are_a_function_of_the_sample_and_of_the_step(model: LanguageModel) -> None:
    objective = equipped(model, 0, thoughts=1, stages=2, uniform=1.0)
    own = trees(model) * 40
    draws = []
    for step in (1, 2):
        objective._now = (0, step)
        whole = objective.arrange(pack(own)).counts
        split = torch.cat([objective.arrange(pack([tree])).counts for tree in own])
        assert torch.equal(whole, split)
        draws.append(whole[:3].tolist())
    objective.uniform = 0.0
    assert objective.arrange(pack(own)).counts.max() == 0
    objective.uniform = 1.0
    seen = set()
    for step in range(60):
        objective._now = (0, step)
        seen.add(tuple(objective.arrange(pack(trees(model))).counts.tolist()))
    assert {counts[1] for counts in seen} == {0, 1}  # one step: none or one of them is replaced
    assert {counts[2] for counts in seen} == {0, 1, 2} and len(seen) > 6
    model.eval()
    assert objective.arrange(pack(trees(model))).counts.max() == 0


def test_room_is_made_in_roots_and_their_children_move_along() -> None:
    ids = tuple(np.arange(n, dtype=np.int32) + 10 * n for n in (4, 2, 3))
    weights = (np.zeros(4, np.float32), np.ones(2, np.float32), np.ones(3, np.float32))
    batch = pack([Tree(ids, weights, (-1, 0, 0)), Tree((ids[2],), (weights[2],), (-1,))])
    made = make_room(batch, {0: Insertion(4, 3), 3: Insertion(1, 0, 1)})
    assert made.batch.tokens.tolist() == [40, 41, 42, 43, *[43] * 5, 20, 21, 30, 31, 32, 30, 30, 30, 32]
    assert made.batch.positions.tolist() == [*range(9), 9, 10, 9, 10, 11, 0, 1, 2, 3]
    assert made.batch.weights.tolist() == [0.0] * 9 + [1.0] * 5 + [0.0] * 3 + [1.0]
    assert (made.begins.tolist(), made.counts.tolist()) == ([4, 15], [3, 0])
    assert made.batch.previous[[9, 11, 17]].tolist() == [8, 8, 16]


def test_answers_without_steps_and_models_that_do_not_pack_are_refused(model: LanguageModel) -> None:
    objective = equipped(model, separator="###")
    run = SimpleNamespace(step=0, total=10, model=model, recipe=SimpleNamespace(seed=0))
    with pytest.raises(DataError, match=r"toy:0: expected worked steps.*separator \(now '###'\)"):
        objective.before_step(run, trees(model))
    model.packs = False
    with pytest.raises(ModelError, match="runs padded instead of packed"):
        objective.loss(model, pack(trees(model)))
    with pytest.raises(ModelError, match="hold thoughts"):
        objective.generate(model, [np.array([1, 2], np.int32)])
