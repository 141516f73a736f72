"""What a step computes does not depend on how it is divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from end_to_end.support import rows, train, weights
from hone.data.open import open_data
from hone.data.source import Source
from hone.options import build_part
from hone.text.model import LanguageModel
from hone.text.tokenizer import load_tokenizer

TOKENS = 400  # of a step: some twenty samples
# Llama's norms compute in float32 whatever the weights are; GPT-2 computes in the precision it is given.
CONFIG = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
          "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip


@pytest.fixture(scope="module")
def exact_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random GPT-2 with the tokenizer of the tiny model."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("exact") / "gpt2"
    LanguageModel.fresh(CONFIG, load_tokenizer(str(tiny_model))).save(folder)
    return folder


def one_step(model: Path, data: Path, out: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Return the weights after one step of plain gradient descent at rate 1, so that they show the gradient."""
    descent = {"name": "sgd", "lr": 1.0, "momentum": 0.0, "weight_decay": 0.0}
    train(
        model, data, out, adapter="full", optimizer=descent, schedule="constant", clip=None, precision="float64",
        steps=1, batch_tokens=TOKENS, eval_samples=0, **changes,
    )  # fmt: skip
    return weights(out / "model")


@pytest.mark.parametrize("objective", ["sft", "pretrain", {"name": "sft", "label_smoothing": 0.1}])
def test_any_split_into_micro_batches_gives_the_same_gradient(
    exact_model: Path, qa_file: Path, tmp_path: Path, objective: Any
) -> None:
    whole = one_step(exact_model, qa_file, tmp_path / "whole", objective=objective)
    before = weights(exact_model)
    assert max(float((whole[name] - before[name]).abs().max()) for name in before) > 1e-2
    for micro_tokens in (1, 50, 173):  # 1: every sample has a micro-batch of its own
        out = tmp_path / str(micro_tokens)
        split = one_step(exact_model, qa_file, out, objective=objective, micro_tokens=micro_tokens)
        assert max(float((whole[name] - split[name]).abs().max()) for name in whole) < 1e-12
        for name in ("loss", "token_accuracy", "grad_norm", "tokens", "units"):
            found, wanted = (rows(folder / "metrics.jsonl")[0][name] for folder in (out, tmp_path / "whole"))
            assert found == pytest.approx(wanted, rel=1e-12)


def test_packing_gives_the_gradient_of_separate_sequences(exact_model: Path, qa_file: Path, tmp_path: Path) -> None:
    """The gradient of a step equals that of transformers on each sample by itself, summed over trained tokens."""
    stepped = one_step(exact_model, qa_file, tmp_path / "run")
    source: Source = build_part("data", {"name": "files", "path": str(qa_file), "holdout": 20})
    ours = LanguageModel.load(exact_model)
    trees = next(open_data(source, ours.renderer, consumes="sequences").loader(TOKENS, seed=0))
    model = AutoModelForCausalLM.from_pretrained(exact_model, dtype=torch.float64)
    count = 0
    for tree in trees:
        ids, trained = torch.tensor(tree.tokens[0].tolist()), torch.tensor(tree.weights[0].tolist()) != 0
        labels = torch.where(trained, ids, -100)
        scores = model(input_ids=ids[None]).logits[0, :-1]
        torch.nn.functional.cross_entropy(scores, labels[1:], reduction="sum").backward()
        count += int((labels[1:] >= 0).sum())
    for name, parameter in model.named_parameters():
        expected = parameter.detach() - parameter.grad / count
        assert float((stepped[name] - expected).abs().max()) < 1e-12, name
