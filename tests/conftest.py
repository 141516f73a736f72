"""What tests share: a tiny model folder, a small learnable data set, and an environment that touches nothing else."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

# Before anything imports torch or transformers, and for the processes that tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

# A job that a script starts with "&" ignores SIGINT, and so would all that it starts, which tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

# A killed process loses nothing that it has written; what a cut of the power loses, tests of checkpoints look at.
os.fsync = lambda handle: None

ANIMALS = ("cat", "dog", "horse", "owl", "whale")


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keep rendered tokens in a folder of this session, not in the user's."""
    folder = tmp_path_factory.mktemp("tokens")
    os.environ["HONE_CACHE"] = str(folder)
    return folder


def questions(count: int) -> list[dict[str, str]]:
    """Return questions with answers that a tiny model learns in some tens of steps."""
    rows = []
    for number in range(count):
        animal = ANIMALS[number % len(ANIMALS)]
        rows.append({"question": f"What does animal {number} of the {animal}s say?", "answer": f"I am a {animal}"})
    return rows


@pytest.fixture(scope="session")
def qa_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 200 questions and answers in JSON lines."""
    path = tmp_path_factory.mktemp("data") / "animals.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions(200)))
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers and width 32 with a byte-level tokenizer, saved in Hugging Face format."""
    import torch

    from hone.text.model import LanguageModel
    from hone.text.tokenizer import train_tokenizer

    texts = [f"Question: {row['question']}\nAnswer: {row['answer']}" for row in questions(200)]
    torch.manual_seed(0)
    config = {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024,
        "tie_word_embeddings": False, "initializer_range": 0.1,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "tiny"
    LanguageModel.fresh(config, train_tokenizer(texts, 500)).save(folder)
    return folder
