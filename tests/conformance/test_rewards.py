"""Every reward of the catalogue: a finite number for each answer, whatever their order, the same every time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hone import options, parts
from hone.data.chains import Chains
from hone.data.sample import Sample
from hone.rewards.base import Attempt, Reward, Score
from hone.rewards.judge import judge

RECORDS = [record for record in parts.catalogue() if record.kind == "reward"]  # those of arrays have tests of their own
NAMES = [record.name for record in RECORDS if issubclass(parts.load("reward", record.name), Reward)]
GIVEN: dict[str, dict[str, Any]] = {  # options that must be given
    "regex": {"pattern": "[0-9]+"},
    "process": {"of": "true-equations", "refine": "clip-delta", "threshold": 1.0},
    "fine-grained": {"of": [{"name": "repetition", "weight": 0.5}, "true-equations"]},
}
SOURCE: Any = Chains(skills=["arithmetic"])
TESTS = [{"call": "f", "args": [3], "expected": 6}, "assert f(4) == 10"]
CODE = "def f(n):\n    return sum(range(n + 1))"
TEXTS = ["", " ", "answer: 5", "1+1=2\n1+1=2\nanswer: 2", CODE, f"```python\n{CODE}\n```", "é 漢字 \x00 ½", "x" * 300]


@pytest.fixture(scope="module")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a classifier of transformers with one output and a random head."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = tmp_path_factory.mktemp("models") / "reward"
    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def attempts() -> list[Attempt]:
    """Return answers of all sorts to three prompts, among them those of the data."""
    made = []
    for group in range(3):
        own = SOURCE.train_sample(group)
        sample = Sample("completion", own.prompt, own.answers, extra={**own.extra, "tests": TESTS, "reference": CODE},
                        where=own.where)  # fmt: skip
        for text in (*TEXTS, str(own.answers[0])):
            tokens = np.frombuffer(text.encode(), np.uint8).astype(np.int32)
            made.append(Attempt(sample, text, tokens, stopped=len(text) < 200, group=group))
    return made


@pytest.fixture(params=NAMES)
def reward(request: pytest.FixtureRequest, reward_model: Path) -> Reward:
    given = dict(GIVEN.get(request.param, {}))
    if request.param == "reward-model":
        given["path"] = str(reward_model)
    spec = {"name": request.param, **given}
    assert options.check_part("reward", spec, "reward", options.Places()) == []
    built: Reward = options.build_part("reward", spec)
    return built


def test_each_answer_gets_a_finite_worth_whatever_the_order(reward: Reward) -> None:
    asked = attempts()
    first = [as_score(one) for one in reward.score(asked, SOURCE)]
    assert len(first) == len(asked)
    for attempt, score in zip(asked, first, strict=True):
        assert all(math.isfinite(worth) for worth in (score.value, *(worth for _, worth in score.steps)))
        assert all(0 < end <= len(attempt.text) for end, _ in score.steps)
    order = np.random.default_rng(0).permutation(len(asked))
    again = [as_score(one) for one in reward.score([asked[i] for i in order], SOURCE)]
    for place, number in enumerate(order):
        assert again[place].total == pytest.approx(first[number].total, abs=1e-5)
    if reward.name != "reward-model":
        assert [first[i] for i in order] == again
    alone = reward.score(asked[-1:], SOURCE)
    assert as_score(alone[0]).total == pytest.approx(first[-1].total, abs=1e-5)


def test_answers_are_told_apart_and_judged_together(reward: Reward) -> None:
    asked = attempts()
    judged = judge([reward], asked, SOURCE, on_error="raise", patience=120)
    totals = [one.total for one in judged if one is not None]
    assert len(totals) == len(asked) and len(set(totals)) > 1
    reward.scale = "group"
    scaled = [one.total for one in judge([reward], asked, SOURCE, on_error="raise", patience=120) if one is not None]
    for group in range(3):
        mine = [worth for worth, one in zip(scaled, asked, strict=True) if one.group == group]
        assert sum(mine) == pytest.approx(0, abs=1e-6)
        assert np.std(mine, ddof=1) == pytest.approx(1, abs=1e-6) or not any(mine)


def test_nothing_to_judge_is_no_error(reward: Reward) -> None:
    assert list(reward.score([], SOURCE)) == []


def as_score(given: float | Score) -> Score:
    return given if isinstance(given, Score) else Score(float(given))


def test_every_reward_is_described() -> None:
    assert json.dumps(NAMES) and {"exact", "regex", "code", "process", "reward-model"} <= set(NAMES)
