"""Rewards one by one, and what happens when one is bad: it is named with its sample, left out, or interrupted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import questions
from end_to_end.support import hone, train
from hone import options
from hone.data.chains import Chains
from hone.data.sample import Sample
from hone.errors import DataError, HoneError, ModelError
from hone.rewards import code, sandbox, text
from hone.rewards.base import Attempt, Reward, Score
from hone.rewards.code import Code, Efficiency, code_in, same
from hone.rewards.exact import Exact
from hone.rewards.models import ModelReward
from hone.rewards.process import FineGrained, Hackable, Process, TrueEquations, ends_of, refined

SOURCE: Any = Chains(skills=["add"])


def attempt(answer: str, tokens: int = 0, group: int = 0, where: str = "data.jsonl:1", **extra: Any) -> Attempt:
    sample = Sample(kind="prompt", prompt="ask: ", extra=extra, where=where)
    return Attempt(sample, answer, np.arange(tokens, dtype=np.int32), group=group)


def scores(reward: Reward, *answers: str | Attempt) -> list[Any]:
    return list(reward.score([one if isinstance(one, Attempt) else attempt(one) for one in answers], SOURCE))


# Text


def test_regex_searches_matches_and_counts() -> None:
    assert scores(text.Regex(pattern=r"\d+"), "a 12 b", "none") == [1, 0]
    assert scores(text.Regex(pattern=r"\d+", match="full", wrong=-1.0), "12", "a 12") == [1, -1]
    assert scores(text.Regex(pattern="a", match="count", most=4, right=2.0), "aa", "aaaaaa", "") == [1, 2, 0]
    assert (
        options.check_part("reward", {"name": "regex", "pattern": "("}, "r", options.Places())[0].field == "r.pattern"
    )


@pytest.mark.parametrize(
    ("layout", "good", "bad"),
    [
        ("final", ["answer: 5", "work\n#### 5\n", "Answer: a b"], ["5", "answer:", "answer: 5\nand more"]),
        ("worked", ["2+3=5\nanswer: 5", "a\nb\n#### 1\n"],
                   ["answer: 5", "2+3=5", "2+3=5\n\nanswer: 5", "a\nanswer: 5\nb"]),
        ("think", ["<think>so</think>\n<answer>5</answer>"], ["<answer>5</answer>", "<think>a</think>5",
                   "<think><think>a</think></think><answer>5</answer>", "<think>a</think><answer>5</answer> b"]),
        ("boxed", [r"so \boxed{5} it is"], ["boxed 5", r"\boxed{}"]),
        ("code", ["Here:\n```python\nf()\n```\n", "```python3\nf()\n```", " ```c++\r\n f()\r\n ```", "```\nf()```"],
                 ["f()", "```\n```", "```\nf()", "a ```b``` c"]),
    ],
)  # fmt: skip
def test_forms(layout: Any, good: list[str], bad: list[str]) -> None:
    assert scores(text.Form(layout=layout), *good) == [1] * len(good)
    assert scores(text.Form(layout=layout), *bad) == [0] * len(bad)


def test_a_form_takes_time_that_grows_with_the_length_alone() -> None:
    assert scores(text.Form(), "so we add the two\n" * 2000 + "thus seven") == [0]  # it took 14 times longer a line


def test_an_empty_answer_that_ends_earns_no_part() -> None:
    reward = Exact(partial=0.1, wrong=-1.0)
    sample = Chains(skills=["sum"]).train_sample(0)
    texts = [Attempt(sample, text, stopped=stopped) for text, stopped in (("c", True), (" \n", True), ("c", False))]
    assert reward.score(texts, SOURCE) == [0.1, -1.0, -1.0]


def test_what_chains_answers_has_the_form_of_worked_lines() -> None:
    own = [str(Chains(skills=["arithmetic"]).train_sample(i).answers[0]) for i in range(50)]
    assert np.mean(scores(text.Form(), *own)) > 0.9


def test_length_within_a_range() -> None:
    reward = text.Length(least=10, most=20, limit=40)
    found = scores(reward, *(attempt("x", n) for n in (1, 5, 10, 15, 20, 30, 39, 40, 80)))
    assert found == pytest.approx([0.1, 0.5, 1, 1, 1, 0.5, 0.05, 0, 0])
    assert scores(text.Length(most=4), *(attempt("x", n) for n in (4, 6, 8))) == [1, 0.5, 0]
    assert scores(reward, attempt("x", 30, min_tokens=30, max_tokens=50), attempt("x", 15, min_tokens=30)) == [1, 0.5]
    with pytest.raises(DataError, match=r"data.jsonl:1: column 'min_tokens': expected a number of tokens, got 'many'"):
        scores(reward, attempt("x", 3, min_tokens="many"))
    for wrong in ({"least": 9, "most": 8}, {"most": 8, "limit": 7}):
        assert options.check_part("reward", {"name": "length", **wrong}, "r", options.Places())


def test_length_is_charged_by_the_level_that_was_asked_for() -> None:
    reward = text.LengthPenalty(budget=100, budgets={"short": 20, "long": 200})
    found = scores(reward, attempt("x", 10), attempt("x", 10, level="short"), attempt("x", 10, level="long"),
                   attempt("x", 1000))  # fmt: skip
    assert found == pytest.approx([-0.1, -0.5, -0.05, -1])
    with pytest.raises(DataError, match=r"asks for level 'shrt', which has no budget .did you mean 'short'"):
        scores(reward, attempt("x", 10, level="shrt"))


def test_repetitions_and_steps() -> None:
    assert scores(text.Repetition(n=2), "a b c d", "a b a b a", "x") == pytest.approx([0, -0.5, 0])
    assert scores(text.Repetition(n=1, free=0.5), "a a a a") == pytest.approx([-0.25])
    lines = "1+1=2\n1+1=2\n2+2=4\nanswer: 4"
    assert scores(text.Steps(most=6), lines) == [0.5]
    assert scores(text.Steps(most=6, different=True), lines) == pytest.approx([1 / 3])
    assert scores(text.Steps(most=6, curve="inverse"), lines, "") == [-2, -6]
    assert scores(text.Steps(most=2), lines) == [1] and scores(text.Steps(most=4, of="tokens"), attempt("", 2)) == [0.5]


# Steps


def test_refinements_by_hand() -> None:
    values = [0.9, 0.4, 0.8, 0.7]
    assert refined(values, "none", 0.5) == values
    assert refined(values, "clip", 0.5) == pytest.approx([0, -0.1, 0, 0])
    assert refined(values, "delta", 0.0) == pytest.approx([0.5, -0.4, 0.8, 0])
    assert refined(values, "clip-delta", 0.5) == pytest.approx([0.1, -0.1, 0, 0])
    assert refined([], "clip-delta", 0) == [] and refined([0.7], "delta", 0) == [0]


@pytest.mark.parametrize("refine", ["clip", "delta", "clip-delta"])
def test_refined_sums_do_not_grow_with_the_number_of_steps(refine: str) -> None:
    drawn = np.random.default_rng(0).random
    for count in (1, 2, 5, 50, 500):
        values = drawn(count).tolist()
        worths = refined(values, refine, 1.0)
        assert sum(worths) <= 1 and sum(refined(values, "none", 0)) >= 0.2 * count * (count > 4)
        if refine == "delta" and count > 1:  # what is to come from step k on is v_k, whatever follows
            to_come = np.cumsum(worths[::-1])[::-1]
            assert to_come[:-1] == pytest.approx(values[:-1])


def test_the_hackable_reward_is_hacked_by_repetition_and_cured() -> None:
    honest, hacked = "4*7=28\n29-28=1\nanswer: 1", "4*7=28\n" * 40 + "29-28=1\nanswer: 1"
    totals = {refine: [one.total for one in scores(Hackable(refine=refine, threshold=1.0), honest, hacked)]
              for refine in ("none", "clip", "delta", "clip-delta")}  # fmt: skip
    assert totals["none"] == [2, 41]
    assert all(second <= first for first, second in (totals[name] for name in ("clip", "delta", "clip-delta")))


def test_true_equations() -> None:
    good = ["4+5=9", "f(7)=7+6=13", "6+9+0=15 c1 5", "8 - 0 - 0 = 8 b0", "29=4*7+1", "(2+3)*4=20 and 7//2=3", "-3+5=2",
            "10/4=2.5", "2.5+1=3.5", "0.05+0.10=0.15", "007+1=8", "3 \u00d7 4 = 12", "1,000+2=1,002", "- 3+4=7",
            "so, 3+4=7", "10/3=3.3333333333", "1000000000*2/4=500000000",
            "x + 3 = 7, so x = 7 - 3 = 4", "50% of 20 = 10, 3 apples + 4 = 7 and 10-7=3"]  # fmt: skip
    bad = [
        "4+5=8",
        "no equation",
        "answer: 5",
        "a=b",
        "1/0=1",
        "1000000000+1=1000000000",
        "3*333333334=1000000001",
        "1000000002/2=500000000",
        "4=4*1+1",
        "9" * 300 + "=1",
        "2**9=512",
        "10/4=2.05",
        "x + 3 = 7",
        "7 = 7",
        "1+" * 20_000,
        "-" * 20_000 + "1=1",
    ]
    assert scores(TrueEquations(), *good) == [1] * len(good)
    assert scores(TrueEquations(), *bad) == [0] * len(bad)
    own = [
        line for i in range(60) for line in str(Chains(skills=["arithmetic"]).train_sample(i).answers[0]).split("\n")
    ]
    equations = [line for line in own if "=" in line]
    assert len(equations) > 60 and np.mean(scores(TrueEquations(), *equations)) > 0.8


def test_segments_end_where_they_should() -> None:
    lines = "one\n\ntwo\nthree"
    assert [lines[:end] for end in ends_of(lines, "lines")] == ["one\n", "one\n\ntwo\n", lines]
    spoken = "Hello there. How? 3.5 ok!\nfine"
    ends = ends_of(spoken, "sentences")
    assert [spoken[a:b] for a, b in zip([0, *ends], ends, strict=False)] == [
        "Hello there. ",
        "How? ",
        "3.5 ok!\n",
        "fine",
    ]


def test_process_shows_steps_or_prefixes_and_adds_rewards() -> None:
    seen: list[str] = []

    class Seeing(text.Regex):
        def score(self, attempts: Sequence[Attempt], source: Any) -> list[float]:
            seen.extend(one.whole for one in attempts)
            return super().score(attempts, source)

    inner = Seeing(pattern="a", weight=0.5)
    found = scores(Process(of=[inner, text.Regex(pattern="b")]), "a\nab\n", "c", "")
    assert seen == ["a", "ab", "c"]
    assert found == [Score(0.0, ((2, 0.5), (5, 1.5))), Score(0.0, ((1, 0.0),)), Score(0.0)]
    seen.clear()
    scores(Process(of=inner, on="prefixes"), "a\nab\n")
    assert seen == ["a\n", "a\nab\n"]
    assert scores(FineGrained(of=[inner]), "a. b. a!")[0].steps == ((3, 0.5), (6, 0.0), (8, 0.5))


def test_process_checks_what_is_inside_it() -> None:
    def wrong(**given: Any) -> list[str]:
        return [str(p) for p in options.check_part("reward", {"name": "process", **given}, "reward", options.Places())]

    assert not wrong(of="exact", refine="clip-delta")
    assert "r" in wrong(of="exacct")[0] and "did you mean 'exact'" in wrong(of="exacct")[0]
    assert "scale: group is for whole answers" in wrong(of={"name": "exact", "scale": "group"})[0]
    assert "the list is empty" in wrong(of=[])[0]
    rollouts = {"name": "rollouts", "of": "chains", "rewards": []}
    assert "at least one reward" in str(options.check_part("data", rollouts, "data", options.Places())[0])


# Code


def coded(answer: str, **extra: Any) -> Attempt:
    tests = [{"call": "f", "args": [3], "expected": 6}, "assert f(-1) == 0"]
    return attempt(answer, **{"tests": tests, "reference": "def f(n):\n    return sum(range(1, n + 1))", **extra})


RIGHT = "def f(n): return n * (n + 1) // 2"
SLOW = "def f(n):\n    made = 0\n    for i in range(n + 1):\n        made += i\n    return made if n > 0 else 0"


def test_code_is_worth_its_passed_tests() -> None:
    fenced = f"Try this:\n```python\nx = 1\n```\nor better:\n```python\n{RIGHT}\n```\nGood luck!"
    answers = [coded(one) for one in (RIGHT, fenced, "def f(n): return 6", "def f(n) return", "f = 3", "1/0", "")]
    assert scores(Code(), *answers) == [1, 1, 0.5, 0, 0, 0, 0]
    assert scores(Code(worth="all"), *answers[:3]) == [1, 1, 0]
    program = "n = int(input())\nprint(n + 1)\nif n > 5: raise SystemExit\n"
    tests = [{"input": "4\n", "expected": "5"}, {"input": "9\n", "expected": "10\n"}, {"input": "1", "expected": "1"}]
    assert scores(Code(), coded(program, tests=tests)) == [pytest.approx(2 / 3)]
    assert scores(Code(), coded(program, tests=json.dumps(tests))) == [pytest.approx(2 / 3)]


def test_results_are_compared_as_values() -> None:
    body = "def f(k): return [(1, 2), {3, 1}, 0.1 + 0.2, {1: 'a'}, True, 'x', None, float('nan'), 10**400, object()][k]"
    expected = [[1, 2], [1, 3], 0.3, {"1": "a"}, True, "x", None]
    tests = [{"call": "f", "args": [k], "expected": value} for k, value in enumerate(expected)]
    assert scores(Code(), coded(body, tests=tests)) == [1]
    wrong = [{"call": "f", "args": [k], "expected": 0.5} for k in range(10)]
    assert scores(Code(), coded(body, tests=wrong)) == [0]
    assert same([1.0, {"a": 2}], [1, {"a": 2.0000001}], 1e-6) and not same([1], [1, 2], 0) and not same("1", 1, 0)
    assert same(6e-17, 0.0, 1e-6) and not same(0.0, 5e-7, 1e-6)
    assert not same(10**400, 1.0, 0) and not same({"a": 1}, {"b": 1}, 0)


@pytest.mark.parametrize(
    "tests",
    [None, [], "no json", [3], ["assert f(x) == 1"], ["assert f(1)"], ["import os"], [{"call": "f"}], ["f(1) == 1"],
     [{"call": "f()", "expected": 1}], [{"call": "f", "args": 3, "expected": 1}], [{"input": 3, "expected": "1"}],
     [{"input": "3", "expected": 1}], [{"call": "f", "run": 1, "expected": 1}], ["assert f(**{}) == 1"],
     ["assert f.g(1) == 1"], ["assert f(a=1, a=2) == 1"], ["assert f(*[1]) == 1"]],
)  # fmt: skip
def test_tests_of_another_form_are_refused(tests: Any) -> None:
    with pytest.raises(DataError, match=r"data.jsonl:1: .*column .tests.*"):
        scores(Code(), coded(RIGHT, tests=tests))


def test_assertions_of_literals_are_read() -> None:
    made = code.tests_of(coded("", tests=["assert f([1, 2], (3,), k={'a': -1}) == {2, 1}"]).sample, "tests")[0]
    assert made.asked == {"call": "f", "literals": "([[1, 2], (3,)], {'k': {'a': -1}})"} and made.expected == {1, 2}
    forged: list[Any] = [{"set": [[1]]}, {"dict": [1]}, {"tuple": 1}, {"bytes": "\u2192"}, {"else": []}, {}]
    assert not any(made.passed({"value": value}, 0.0) for value in [*forged, {"list": [1, 2]}, [1, 2]])
    assert made.passed({"value": {"set": [2, 1]}}, 0.0)


@pytest.mark.parametrize(
    ("body", "test"),
    [
        ("(a, b): return a + b + (9,)", "f((1, 2), (3,)) == (1, 2, 3, 9)"),
        ("(d, k): return d[k]", "f({1: 2}, 1) == 2"), ("(s, t): return s | t", "f({1}, t={2}) == {1, 2}"),
        ("(s): return len(s), s", "f(set()) == (0, set())"),
        ("(x): return {x: [None, True]}", "f(b'x') == {b'x': [None, True]}"), ("(x): return {x}", "f('a') == {'a'}"),
        ("(x): return x * 10", "f(1e999) == 1e999"), ("(x): return x * 1j", "f(2j) == -2"),
        ("(x): return x.keys()", "f({(1, 2): 3}) == {(1, 2)}"), ("(x): return 1", "f(1) == True, 'said'"),
        ("(x):\n from collections import Counter\n return Counter(x)", "f([(1, 2), (1, 2)]) == {(1, 2): 2}"),
    ],
)  # fmt: skip
def test_assertions_pass_and_compare_values_of_python(body: str, test: str) -> None:
    assert scores(Code(), coded(f"def f{body}", tests=[f"assert {test}"])) == [1]


def test_assertions_tell_types_apart_that_python_does() -> None:
    tests = ["assert f() == [1, 2]", "assert g() == (1, 2)", "assert h() == {1: 2}", "assert i() == 0.3"]
    other = "f = lambda: (1, 2)\ng = lambda: [1, 2]\nh = lambda: {'1': 2}\ni = lambda: 0.1 + 0.2"
    assert scores(Code(), coded(other, tests=tests)) == [0]


def test_sets_are_listed_by_value() -> None:
    body = "def f(k): return [{1, 2, 10}, {'b', 1}, {frozenset({10, 2}), frozenset({1})}][k]"
    expected: list[Any] = [[1, 2, 10], ["b", 1], [[1], [2, 10]]]
    tests = [{"call": "f", "args": [k], "expected": value} for k, value in enumerate(expected)]
    assert scores(Code(), coded(body, tests=tests)) == [1]
    assert scores(Code(), coded(body, tests=[{"call": "f", "args": [0], "expected": {10, 2, 1}}])) == [1]


def test_code_that_takes_longer_than_it_may_passes_nothing() -> None:
    burn = "import time\ndef f(n):\n    end = time.process_time() + 0.6\n    while time.process_time() < end: pass\n"
    answer = coded(f"{burn}    return n * (n + 1) // 2", tests=["assert f(3) == 6"])
    assert scores(Code(seconds=0.3), answer) == [0] and scores(Code(seconds=5.0), answer) == [1]
    assert scores(Efficiency(seconds=0.3), answer) == [-0.6]
    with pytest.raises(DataError, match="does not pass the sample's own tests: time"):
        scores(Efficiency(seconds=0.3), coded(RIGHT, reference=answer.text))


@pytest.mark.parametrize(
    ("answer", "inside"),
    [
        ("```\na\n", "a"), ("plain", "plain"), ("```python\r\na\r\nb\r\n```\r\n", "a\nb"), ("```c++\na\n```", "a"),
        ("1. So:\n   ```python\n   a\n     b\n   ```\n", "a\n  b"), ("```python\na\nb```\nmore", "a\nb"),
        ("```\na```\n```\nb\n```", "b"),
        ("```py\ns = '\n    ```\n    x\n    ```\n'\n```", "s = '\n    ```\n    x\n    ```\n'"),
        ("````\n```\na\n```\n````", "```\na\n```"), ("```\nuse ```x```\na\n```", "use ```x```\na"),
        ("```\na\n```\nGood luck ```\n", "a"), ("Here: ```python\na\n```", "a"), ("```\n\n```", ""),
    ],
)  # fmt: skip
def test_the_code_in_an_answer(answer: str, inside: str) -> None:
    assert code_in(answer) == inside


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ["`" * 50_000, "``` " * 20_000, "```\n" + " " * 50_000, "```\n" + "a`\n" * 30_000])
def test_finding_code_takes_time_that_grows_with_the_length_alone(text: str) -> None:
    assert code_in(text) is not None


def test_efficiency_is_stepped() -> None:
    answers = [coded(one) for one in (RIGHT, SLOW, "def f(n): return 1", "def f(n) return", "def f(n): return 1/0")]
    found = scores(Efficiency(), *answers)
    assert found[0] == 1 and 0.5 < found[1] < 0.8 and found[2:] == [-0.3, -1, -0.6]
    assert found == scores(Efficiency(), *answers)
    assert scores(Efficiency(cap=3.0), coded(RIGHT, reference=6, tests=["assert f(1) == 1"]))[0] == pytest.approx(
        0.5 + 0.5 * 3
    )
    with pytest.raises(DataError, match="needs a reference"):
        scores(Efficiency(), coded(RIGHT, reference=None))
    with pytest.raises(DataError, match="does not pass the sample's own tests"):
        scores(Efficiency(), coded(RIGHT, reference="def f(n): return 2"))


def test_lines_are_counted_exactly() -> None:
    source = "def f(n):\n    made = 0\n    for i in range(n):\n        made += i\n    return made\n"
    ran = [sandbox.run(source, [{"call": "f", "args": [n]}], sandbox.Limits(), count=True).lines for n in (10, 110)]
    assert ran[1] - ran[0] == 200  # type: ignore[operator]
    cheat = "import sys\ndef f(n):\n    sys.settrace(None)\n    return n"
    assert (
        "not allowed"
        in sandbox.run(cheat, [{"call": "f", "args": [1]}], sandbox.Limits(), count=True).results[0]["error"]
    )


def test_time_tells_much_work_from_little() -> None:
    tests, reference = ["assert f(3) == 6"], "def f(n):\n    for _ in range(200000): pass\n    return 6"
    much = reference.replace("200000", "3000000")
    found = scores(
        Efficiency(cost="time", seconds=5.0),
        *(coded(one, tests=tests, reference=reference) for one in (reference, much)),
    )
    assert found[0] > 0.7 and 0.5 <= found[1] < 0.65


# Models


@pytest.fixture(scope="module")
def reward_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned that animals answer, with its export for transformers."""
    folder = tmp_path_factory.mktemp("rewards")
    rows = [
        {"prompt": f"{row['question']} ", "chosen": row["answer"], "rejected": "I am an answer"}
        for row in questions(200)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(tiny_model, folder / "pairs.jsonl", folder / "run", objective="reward-model", steps=30, batch_tokens=384,
          adapter={"name": "lora", "rank": 4})  # fmt: skip
    done = hone("export", folder / "run", "--to", "hf")
    assert done.status == 0, done.err
    return folder / "run"


def asked(*pairs: tuple[str, str]) -> list[Attempt]:
    made = {prompt: Sample(kind="prompt", prompt=prompt, where="data.jsonl:1") for prompt, _ in pairs}
    return [Attempt(made[prompt], answer) for prompt, answer in pairs]


def test_a_reward_model_scores_as_it_was_trained_and_as_transformers_does(reward_model: Path) -> None:
    prompts = [f"What does animal {n} of the {name}s say? " for n, name in ((3, "owl"), (14, "whale"))]
    pairs = [(p, a) for p in prompts for a in ("I am a owl", "I am an answer", "I am a whale", "", "answer")]
    found = ModelReward(path=str(reward_model)).score(asked(*pairs), SOURCE)
    assert found[0] > found[1] and found[7] > found[6]
    alone = ModelReward(path=str(reward_model / "model"), batch_tokens=64)
    assert alone.score(asked(*pairs), SOURCE) == pytest.approx(found, abs=1e-4)
    theirs = ModelReward(path=str(reward_model / "export-hf")).score(asked(*pairs), SOURCE)
    assert theirs == pytest.approx(found, abs=1e-3)


def test_rewards_that_are_made_of_more_than_a_head_are_served_whole(reward_model: Path, tiny_model: Path) -> None:
    folder, pairs = reward_model.parent, reward_model.parent / "pairs.jsonl"
    row = json.loads(pairs.read_text().splitlines()[0])
    known = asked((row["prompt"], row["chosen"]), (row["prompt"], "no"))
    options: dict[str, Any] = {"steps": 2, "batch_tokens": 384, "adapter": "full"}
    train(tiny_model, pairs, folder / "fused", objective={"name": "reward-fusion", "alike": 0.0}, **options)
    fused, plain = (ModelReward(path=str(folder / "fused" / end)).score(known, SOURCE) for end in ("", "model"))
    assert abs(fused[0] - fused[1]) < abs(plain[0] - plain[1])  # both are averaged with the same known answers
    train(tiny_model, pairs, folder / "joined", objective="dmoerm", **options)
    joined = ModelReward(path=str(folder / "joined")).score(known, SOURCE)
    shown = hone("sample", folder / "joined", "--prompt", row["prompt"] + row["chosen"])
    assert f"reward {joined[0]:.2f}" in shown.out or len(set(joined)) == 2


def test_an_answer_that_was_cut_off_is_read_without_an_end(reward_model: Path) -> None:
    reward = ModelReward(path=str(reward_model))
    ended, cut = (
        Attempt(Sample(kind="prompt", prompt="a "), "I am a owl", stopped=stopped) for stopped in (True, False)
    )
    assert len(set(reward.score([ended, cut, ended], SOURCE))) == 2
    stepped = Process(of=reward, on="prefixes").score([ended, cut], SOURCE)
    assert stepped[0].steps[0][1] == pytest.approx(reward.score([ended], SOURCE)[0], abs=1e-5)
    assert stepped[1].steps[0][1] == pytest.approx(reward.score([cut], SOURCE)[0], abs=1e-5)


def test_what_is_no_reward_model_is_refused(tiny_model: Path, reward_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has 2 outputs; expected a classifier with one"):
        ModelReward(path=str(tiny_model)).score(asked(("a", "b")), SOURCE)
    config = json.loads((tiny_model / "config.json").read_text())
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in tiny_model.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    (copied / "config.json").write_text(json.dumps({**config, "id2label": {"0": "reward"}, "label2id": {"reward": 0}}))
    with pytest.raises(ModelError, match=r"is no reward model: missing: score\.weight"):
        ModelReward(path=str(copied)).score(asked(("a", "b")), SOURCE)
    with pytest.raises(ModelError, match="there is no model folder"):
        ModelReward(path="./nowhere").score(asked(("a", "b")), SOURCE)
    with pytest.raises(
        HoneError, match=r"the answer with its prompt has \d+ tokens, and the reward model .* reads 1024"
    ):
        ModelReward(path=str(reward_model)).score(asked(("a", "b c d " * 600)), SOURCE)
    assert torch.is_grad_enabled()
