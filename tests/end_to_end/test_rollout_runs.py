"""On-policy runs from a recipe: they learn, go on exactly from the middle of a phase, and name a reward that fails."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from end_to_end.support import back_to, files, heard, hone, repeatable, rows, train, write_recipe
from end_to_end.test_processes import launched
from hone import Recipe, resume
from hone.data.groups import Group, made_of, own_answer
from hone.data.phases import Asked, Phases
from hone.data.rollouts import Rollouts
from hone.data.sample import Message, Sample
from hone.engine.preflight import measure
from hone.engine.progress import Display
from hone.engine.summary import summary
from hone.engine.use import eval_run
from hone.errors import HoneError
from hone.objectives.advantages import ADVANTAGE
from hone.objectives.hybrid import SASR
from hone.objectives.policy import Policy
from hone.rewards.base import Reward, from_function
from hone.rewards.judge import Appraised
from hone.text.generate import Generation
from hone.text.model import LanguageModel
from hone.text.pack import CHOSEN, SCORE, Tree

FULL = {"name": "adamw", "lr": 3e-3}
CALLS: list[str] = []


def vowels(prompt: str, text: str, sample: Any) -> float:
    """Return the share of vowels in an answer, which a tiny random model can learn to raise."""
    return sum(letter in "aeiou" for letter in text) / max(1, len(text))


def failing(prompt: str, text: str, sample: Any) -> float:
    """Return a worth for some answers, then fail for good."""
    CALLS.append(text)
    if len(CALLS) > 16:
        raise ValueError("the judge has left")
    return float(len(CALLS) % 2)


def sometimes(prompt: str, text: str, sample: Any) -> float:
    """Return a worth, which is no number for some prompts."""
    return math.nan if sample.where.endswith(("2", "3")) else vowels(prompt, text, sample)


def crowded(prompt: str, text: str, sample: Any) -> float:
    """Return 1 for every answer."""
    return 1.0


def slow(prompt: str, text: str, sample: Any) -> float:
    """Return the share of vowels after some time."""
    time.sleep(0.02)
    return vowels(prompt, text, sample)


for function in (vowels, failing, sometimes, crowded, slow):
    from_function(function.__name__, function)


def roll(model: Path, source: Path, out: Path, **changes: Any) -> dict[str, Any]:
    data = {
        "name": "rollouts", "of": {"name": "files", "path": str(source), "max_tokens": 64}, "rewards": "vowels",
        "prompts": 4, "samples_each": 4, "max_new_tokens": 8, **changes.pop("data", {}),
    }  # fmt: skip
    given = {
        "objective": "grpo", "eval_samples": 0, "steps": 8, "adapter": "full", "optimizer": FULL, "eval_every": None,
        **changes,
    }  # fmt: skip
    return train(model, source, out, **{**given, "data": data})


def test_the_reward_rises_and_the_sampler_is_the_policy(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    roll(tiny_model, qa_file, tmp_path / "run", steps=25, data={"samples_each": 8})
    found = rows(tmp_path / "run" / "metrics.jsonl")
    rewards = [row["rollout/reward"] for row in found]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.05
    assert all(row["ratio"] == pytest.approx(1, abs=1e-4) and row["kl"] < 1e-6 for row in found)
    shown = rows(tmp_path / "run" / "rollouts.jsonl")
    assert {"prompt", "answer", "reward", "vowels", "where", "phase"} <= shown[0].keys()
    assert "Reward of the model&#39;s own answers" in (tmp_path / "run" / "report.html").read_text()


def test_rewards_that_tell_no_answers_apart_are_told(
    tiny_model: Path, qa_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with heard(caplog):
        result = roll(tiny_model, qa_file, tmp_path / "run", data={"rewards": "crowded"})
    assert caplog.text.count("step 5: the gradient was exactly 0 in the last 5 steps") == 1
    assert result["still_steps"] == 8
    assert "the gradient was exactly 0 in 8 of these steps" in "\n".join(summary(result))
    assert roll(tiny_model, qa_file, tmp_path / "other", steps=2)["still_steps"] == 0


def test_a_rehearsal_counts_the_time_of_sampling(tiny_model: Path, qa_file: Path) -> None:
    data = {"name": "rollouts", "of": str(qa_file), "rewards": "slow", "prompts": 2, "samples_each": 4,
            "max_new_tokens": 4}  # fmt: skip
    recipe = Recipe.of(model=str(tiny_model), data=data, objective="grpo", steps=2, eval_samples=0)
    assert measure(recipe, Display(False)).step_seconds > 2 * 4 * 0.02


def test_prompts_without_room_for_an_answer_are_left_out(
    tiny_model: Path, qa_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = json.dumps({"question": "why " * 3000, "answer": "so"})
    source = tmp_path / "long.jsonl"
    source.write_text(f"{long}\n{qa_file.read_text()}")
    with heard(caplog):
        asked = {"of": {"name": "files", "path": str(source)}}
        result = roll(tiny_model, source, tmp_path / "run", steps=2, data=asked)
    assert result["status"] == "finished" and "(data.max_tokens) and are not asked" in caplog.text


@pytest.mark.parametrize(
    ("objective", "data"),
    [
        ("grpo", {"updates": 2, "passes": 2, "replay": 0.5}),
        ({"name": "ppo", "kl": 0.1}, {"updates": 4, "drop": "even", "refill": 1}),
        ({"name": "sasr", "warmup": 2}, {"demonstrations": 1}),
        ("sft", {"most": 0.5, "solved": 0.1, "make": "curated"}),
        ("grpo", {"unfinished": "mask", "prompts": 2, "updates": 2, "max_new_tokens": 32}),
    ],
    ids=["replay", "a critic", "turns", "a curriculum", "answers that run out of tokens"],
)
def test_a_run_goes_on_to_the_same_bytes_from_the_middle_of_a_phase(
    tiny_model: Path, qa_file: Path, tmp_path: Path, objective: Any, data: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    whole, again = tmp_path / "whole", tmp_path / "again"
    for out in (whole, again):
        roll(tiny_model, qa_file, out, objective=objective, data=data, checkpoint_every=3)
    back_to(again, 6)
    resume(again)
    assert files(again / "model") == files(whole / "model")
    figures = [[_steady(row) for row in rows(out / "metrics.jsonl")] for out in (again, whole)]
    assert figures[0] == figures[1]
    assert rows(again / "rollouts.jsonl") == rows(whole / "rollouts.jsonl")  # a phase that comes again is there once
    assert ("left nothing to train on" in caplog.text) == ("unfinished" in data)


def _steady(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in repeatable(row).items() if name != "rollout/seconds"}


def test_a_reward_that_fails_is_named_with_its_sample_and_the_run_keeps_its_state(
    tiny_model: Path, qa_file: Path, tmp_path: Path
) -> None:
    CALLS.clear()
    with pytest.raises(HoneError, match=r"animals\.jsonl:\d+: reward 'failing' raised ValueError: the judge has left"):
        roll(tiny_model, qa_file, tmp_path / "run", data={"rewards": "failing"})
    assert len(rows(tmp_path / "run" / "metrics.jsonl")) == 1
    CALLS.clear()  # the judge is back for one more phase
    with pytest.raises(HoneError, match="the judge has left"):
        resume(tmp_path / "run")
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


def test_samples_on_which_a_reward_fails_are_left_out_and_counted(
    tiny_model: Path, qa_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(HoneError, match=r"animals\.jsonl:\d+: reward 'sometimes' gave nan"):
        roll(tiny_model, qa_file, tmp_path / "strict", data={"rewards": "sometimes", "prompts": 16})
    roll(tiny_model, qa_file, tmp_path / "run", steps=2,
         data={"rewards": "sometimes", "on_error": "skip", "prompts": 16})  # fmt: skip
    found = rows(tmp_path / "run" / "metrics.jsonl")
    assert 0 < found[0]["rollout/skipped"] <= found[1]["rollout/skipped"]
    assert found[0]["rollout/groups"] + found[0]["rollout/skipped"] == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "classify"}, "rollouts make nothing for an objective that consumes labelled"),
        ({"objective": "dpo", "data": {"make": "best"}}, "'best' is not what an objective that consumes pairs can use"),
        ({"objective": {"name": "grpo", "kl": 0.1}, "data": {"temperature": 0.7}}, "set data.temperature=1"),
        ({"adapter": {"name": "eva", "rank": 2}}, "nothing can look at them before"),
        ({"objective": "dpo", "data": {"rewards": "crowded"}}, "are all worth the same"),
        ({"objective": {"name": "sasr", "warmup": 1}}, "data.demonstrations=1"),
        ({"objective": "sasr", "data": {"demonstrations": 1, "replay": 0.5}}, "data.replay: .*set it to 0, got 0.5"),
        ({"objective": "sasr", "data": {"demonstrations": 1, "updates": 2}}, "data.updates: .*set it to 1, got 2"),
        ({"objective": "uft"}, "data.hints: objective 'uft' learns behind hints; set it to binomial"),
        ({"objective": "srft"}, "data.demonstrations: objective 'srft' .*; set it to 1"),
        ({"objective": {"name": "rloo", "kl": 0.1, "kl_in": "loss"}}, "k1 is 0 on average"),
        (
            {"data": {"unfinished": "mask", "prompts": 1, "samples_each": 2, "max_new_tokens": 1}},
            "in the last of 9 tries every answer ran out of tokens.*raise data.max_new_tokens, which is 1, or set "
            "data.unfinished=train",
        ),
    ],
)
def test_what_does_not_fit_is_said(
    tiny_model: Path, qa_file: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(HoneError, match=message):
        roll(tiny_model, qa_file, tmp_path / "run", **changes)


def answered(*answers: tuple[float, bool], shown: float | None = None) -> Group:
    """Return a group of answers: what each is worth and whether it ended; and what the data's own is worth."""
    ids = np.arange(3, dtype=np.int32)
    made = [Generation(ids, np.full(3, -1.0), ended, 7 if ended else -1, -1.0) for _, ended in answers]
    worth = [worth for worth, _ in answers] + ([] if shown is None else [shown])
    asked: Any = Asked(0, SimpleNamespace(where="row:0"), ids, ids, 0)  # type: ignore[arg-type]
    return Group(0, asked, made, [Appraised(each, {"own": each}) for each in worth])


def made(groups: list[Group], consumes: str, make: str) -> list[Tree]:
    source = Rollouts(of=SimpleNamespace(suit=lambda consumes: None), make=make, unfinished="mask", curation=1e-3)  # type: ignore[arg-type]
    source.suit(consumes)
    return made_of(groups, source, None, np.random.default_rng(0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("consumes", "make", "worth"),
    [
        ("sequences", "best", (2.0,)),
        ("sequences", "curated", (2.0,)),
        ("pairs", "pairs", (2.0, 1.0)),
        ("judged", "list", (1.0, 2.0, 1.5)),
    ],
)
def test_answers_that_ran_out_of_tokens_are_not_chosen(consumes: str, make: str, worth: tuple[float, ...]) -> None:
    group = answered((9.0, False), (1.0, True), (2.0, True), (1.5, True), (-9.0, False))
    cut = answered((1.0, False), (0.0, False))
    (tree,) = made([group, cut], consumes, make)
    assert tree.parents == (-1,) + (0,) * len(worth)
    assert not tree.weights[0].any() and all(weight.all() for weight in tree.weights[1:])
    if make == "list":
        assert tree.fields[SCORE][1:] == worth
    if make == "pairs":
        assert tree.fields[CHOSEN][1:] == (1.0, 0.0)
    one = answered((9.0, False), (1.0, True))
    assert len(made([one], consumes, make)) == (0 if make == "pairs" else 1)
    assert made([one], "pairs", "list") == []


@pytest.mark.parametrize("shown", [9.0, -9.0])
def test_real_data_are_mixed_with_what_is_curated_whatever_they_are_worth(shown: float) -> None:
    (tree,) = made([answered((1.0, True), (2.0, True), shown=shown)], "sequences", "curated")
    assert tree.parents == (-1, 0, 0) and all(weight.all() for weight in tree.weights[1:])


def test_what_the_data_demonstrate_solves_no_prompt() -> None:
    phases = Phases(Rollouts(of=None, drop="unsolved"), [object()], None, 0)  # type: ignore[list-item, arg-type]
    assert not phases._keeps(answered((0.0, True), shown=1.0))
    assert phases._keeps(answered((1.0, True), shown=0.0)) and phases._keeps(answered(shown=1.0))


def test_the_own_answer_to_a_conversation_is_its_last_turn(tiny_model: Path) -> None:
    renderer = LanguageModel.load(str(tiny_model), template="chatml").renderer
    turns = [Message(role, text) for role, text in (("user", "a"), ("assistant", "I am"), ("user", "b"))]
    sample = Sample("messages", (*turns, Message("assistant", "an owl")))
    assert renderer.decode(own_answer(renderer, sample)).strip() == "an owl"


def test_the_own_answer_to_a_conversation_is_a_hint_and_a_demonstration_without_its_end(tiny_model: Path) -> None:
    renderer = LanguageModel.load(str(tiny_model), template="chatml").renderer
    sample = Sample("messages", (Message("user", "a"), Message("assistant", "I am\nan owl")), where="row:0")
    seen: list[Any] = []

    class Looking(Reward):
        name = "looking"

        def score(self, attempts: Any, source: Any) -> list[float]:
            seen.extend(attempts)
            return [float(len(attempt.tokens)) for attempt in attempts]

    source = Rollouts(of=None, rewards=Looking(), hints="binomial", hint_from=1.0, hint_to=1.0, demonstrations=1)
    phases = Phases(source, [sample], renderer, 0)
    cluster = SimpleNamespace(world=1, rank=0)
    run: Any = SimpleNamespace(step=0, total=9, cluster=cluster, objective=SASR(warmup=1))
    asked = phases._ask(0, run)
    assert 0 < asked.given < len(asked.own) and asked.own[-1] in renderer.stop_ids
    (group,) = phases._answer(run, [asked], 0)
    assert [list(one.tokens) for one in seen] == [list(asked.own[asked.given : -1])]
    assert group.judged[0].total == len(asked.own) - asked.given - 1


def test_answers_of_the_datas_own_that_have_no_room_are_no_hints(
    tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    renderer = LanguageModel.load(str(tiny_model)).renderer
    samples = [Sample("completion", "why ", ("so it is\n" * times,), where=f"row:{times}") for times in (100, 2)]
    source = Rollouts(of=None, hints="binomial", hint_from=1.0, hint_to=1.0, max_tokens=64)
    run: Any = SimpleNamespace(step=0, total=9)
    with heard(caplog):
        asked = [Phases(source, samples, renderer, 0)._ask(number, run) for number in (0, 1)]
    assert [len(one.question) < 64 for one in asked] == [True, True] and asked[0].given == 0 < asked[1].given
    assert "row:100: the prompt with its own answer has" in caplog.text


def test_objectives_that_learn_from_the_datas_own_answers_say_that_there_are_none(
    tiny_model: Path, tmp_path: Path
) -> None:
    asks = tmp_path / "asks.jsonl"
    asks.write_text("".join(json.dumps({"prompt": f"{n} is "}) + "\n" for n in range(20)))
    with pytest.raises(HoneError, match="none has an answer of its own to learn from"):
        roll(tiny_model, asks, tmp_path / "run", objective={"name": "sasr", "warmup": 2}, data={"demonstrations": 1})


def test_what_nothing_trains_on_is_compared_with_and_in_no_step() -> None:
    run: Any = SimpleNamespace(objective=Policy(advantage="batch"))
    phases = Phases(Rollouts(of=None, unfinished="mask"), [object()], None, 0)  # type: ignore[list-item, arg-type]
    phases.source.suit("rollouts")
    cut, kept = answered((3.0, False), (3.0, False)), answered((0.0, True), (1.0, False))
    (tree,) = phases._trees(run, [cut, kept])
    assert [bool(weight.any()) for weight in tree.weights] == [False, True, False]
    worth = np.array([3.0, 3.0, 0.0, 1.0])
    np.testing.assert_allclose(tree.values[ADVANTAGE][1], -worth.mean() / (worth.std(ddof=1) + 1e-4))
    assert phases._trees(run, [cut]) == []
    run.objective = SASR(warmup=1)  # its own phases leave the demonstrations out, which alone would train
    assert phases._trees(run, [answered((0.0, False), (1.0, False), shown=1.0)]) == []


def test_prompts_on_all_of_whose_answers_a_reward_fails_are_passed_over(
    tiny_model: Path, qa_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = {"rewards": "sometimes", "on_error": "skip", "prompts": 1, "shuffle": False}
    with heard(caplog):
        result = roll(tiny_model, qa_file, tmp_path / "run", steps=6, data=alone)
    assert result["status"] == "finished" and "left nothing to train on" in caplog.text
    shown = {row["where"] for row in rows(tmp_path / "run" / "rollouts.jsonl")}
    assert len(shown) == 6 and not any(place.endswith((":2", ":3")) for place in shown)


@pytest.mark.parametrize("objective", [{"name": "grpo", "kl": 0.1}, "ppo"], ids=["grpo", "ppo"])
def test_a_policy_run_is_evaluated_again(tiny_model: Path, qa_file: Path, tmp_path: Path, objective: Any) -> None:
    roll(tiny_model, qa_file, tmp_path / "run", steps=1, objective=objective, eval_samples=8)
    found = rows(tmp_path / "run" / "evaluations.jsonl")[-1]
    again = eval_run(tmp_path / "run", [], Display(False))
    assert again and all(found[name] == pytest.approx(value) for name, value in again.items() if name in found)


def test_values_are_learned_from_answers_without_the_beam(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    data = {"samples_each": 6, "make": "list"}
    result = roll(tiny_model, qa_file, tmp_path / "run", steps=2, objective={"name": "ovm", "width": 4}, data=data)
    assert result["status"] == "finished"  # a beam of 4 would have no 6 answers


def test_a_step_that_breaks_off_before_the_weights_move_keeps_the_state(
    tiny_model: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Policy.loss

    def breaks(self: Policy, model: Any, batch: Any) -> Any:
        if breaks.calls == 3:  # type: ignore[attr-defined]
            raise HoneError("d.jsonl:7: cannot be used")
        breaks.calls += 1  # type: ignore[attr-defined]
        return whole(self, model, batch)

    breaks.calls = 0  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "loss", breaks)
        with pytest.raises(HoneError, match="cannot be used"):
            roll(tiny_model, qa_file, tmp_path / "broken")
    resume(tmp_path / "broken")
    roll(tiny_model, qa_file, tmp_path / "whole")
    assert files(tmp_path / "broken" / "model") == files(tmp_path / "whole" / "model")


def test_an_objective_of_rollouts_says_what_to_write(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    with pytest.raises(HoneError, match=r"write data: \{name: rollouts, of: YOUR DATA, rewards: \[exact\]\}"):
        train(tiny_model, qa_file, tmp_path / "run", objective="grpo")


class FakeVLLM:
    """What hone uses of vLLM, answering each prompt with its own last token and the end."""

    made: ClassVar[list[FakeVLLM]] = []

    def __init__(self, **options: Any) -> None:
        self.options, self.loaded, self.seeds = options, [], []
        inner = SimpleNamespace(load_weights=lambda pairs: self.loaded.append({name for name, _ in pairs}))
        runner = SimpleNamespace(model_runner=SimpleNamespace(model=inner))
        within = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"  # else its weights are in another process
        self.llm_engine = SimpleNamespace(**{"model_executor": SimpleNamespace(driver_worker=runner)} if within else {})
        self.made.append(self)

    def reset_prefix_cache(self) -> None:
        """Forget nothing, since nothing is kept."""

    def generate(self, rows: list[dict[str, Any]], *, sampling_params: list[Any], use_tqdm: bool) -> list[Any]:
        def answer(last: int, stop: int) -> Any:
            ids = [last, stop]
            return SimpleNamespace(token_ids=ids, logprobs=[{token: SimpleNamespace(logprob=-1.5)} for token in ids])

        self.seeds.append([each.seed + number for each in sampling_params for number in range(each.n)])  # as vLLM does
        return [
            SimpleNamespace(outputs=[answer(row["prompt_token_ids"][-1], each.stop_token_ids[0])] * each.n)
            for row, each in zip(rows, sampling_params, strict=True)
        ]


def test_vllm_samples_where_it_is_installed_and_gets_the_weights_of_now(
    tiny_model: Path, qa_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(HoneError, match="pip install vllm"):
        roll(tiny_model, qa_file, tmp_path / "none", data={"engine": "vllm"})
    module = SimpleNamespace(LLM=FakeVLLM, SamplingParams=lambda **options: SimpleNamespace(**options))
    monkeypatch.setitem(sys.modules, "vllm", module)
    with pytest.raises(HoneError, match="needs an adapter that trains them"):
        roll(tiny_model, qa_file, tmp_path / "lora", adapter={"name": "lora", "rank": 2}, data={"engine": "vllm"})
    roll(tiny_model, qa_file, tmp_path / "run", steps=2, data={"engine": "vllm"})
    (engine,) = FakeVLLM.made
    assert len(engine.loaded) == 2 and "model.embed_tokens.weight" in engine.loaded[0]
    assert engine.options["model"] == str(tiny_model)
    assert len(engine.seeds) == 2 and all(len(seeds) == len(set(seeds)) > 4 for seeds in engine.seeds)
    found = rows(tmp_path / "run" / "metrics.jsonl")
    assert found[0]["rollout/length"] == 1 and found[0]["rollout/ended"] == 1 and found[0]["ratio"] != 1


def test_two_processes_share_the_sampling_of_a_phase(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    data = {
        "name": "rollouts", "of": {"name": "files", "path": str(qa_file)}, "prompts": 3, "samples_each": 4,
        "rewards": {"name": "length", "least": 4, "most": 6, "limit": 12}, "max_new_tokens": 8, "updates": 2,
    }  # fmt: skip
    recipe = write_recipe(tmp_path / "recipe.yaml", {
        "model": str(tiny_model), "data": data, "objective": {"name": "ppo", "kl": 0.1}, "adapter": "full", "steps": 4,
        "eval_samples": 0, "precision": "float64", "device": "cpu", "out": str(tmp_path / "run"),
    })  # fmt: skip
    (first, second) = launched(tmp_path / "both", {"run": ["run", str(recipe)]})["run"]
    assert first.status == second.status == 0, first.err + second.err
    found = rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in found] == [1, 2, 3, 4]
    assert all(row["rollout/groups"] == 3 for row in found[::2]) and "rollout/groups" not in found[1]
    assert sum(row["tokens"] for row in found[:2]) > 3 * 4  # both processes' answers are trained on


def test_answers_improve_on_a_recipe_of_the_command_line(tiny_model: Path, qa_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {tiny_model}\ndata:\n  name: rollouts\n  of: {{name: files, path: {qa_file}}}\n"
        "  rewards: [{name: length, least: 4, most: 6, limit: 12}]\n  prompts: 2\n  samples_each: 4\n"
        "  max_new_tokens: 12\nobjective: grpo\nadapter: full\nsteps: 2\neval_samples: 2\nmax_new_tokens: 8\n"
        f"out: {tmp_path / 'run'}\n"
    )
    checked = hone("check", recipe)
    assert checked.status == 0, checked.err
    assert "start it with: hone run" in checked.out
    ran = hone("run", recipe)
    assert ran.status == 0, ran.err
    assert (tmp_path / "run" / "report.html").is_file()
