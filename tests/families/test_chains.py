"""The generated problems: exact answers, splits that never meet, and the same samples on every machine."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from dataclasses import replace

import pytest

from hone.data.chains import Chains, is_eval
from hone.data.skills import SKILLS, choose, final_answer, solve
from hone.errors import DataError, HoneError
from hone.metrics.accuracy import Accuracy
from hone.options import Places, build_part, check_part
from hone.parts import catalogue

EVERY = [(name, difficulty) for name in SKILLS for difficulty in range(1, 6)]
LONGEST = {1: 100, 2: 120, 3: 200, 4: 260, 5: 320}  # characters of a whole sample

# One prompt and its solution per skill, at seed 0: a change here changes what every recipe trains on.
GOLDEN = {
    "add": ("add 62 + 7 =\n", "2+7+0=9 c0 9\n6+0+0=6 c0 69\nanswer: 69"),
    "subtract": ("subtract 66 - 7 =\n", "16-7-0=9 b1 9\n6-0-1=5 b0 59\nanswer: 59"),
    "multiply": ("multiply 104 * 8 =\n", "4*8+0=32 c3 2\n0*8+3=3 c0 32\n1*8+0=8 c0 832\nanswer: 832"),
    "remainder": ("remainder 469 % 4 =\n", "4=4*1+0\n6=4*1+2\n29=4*7+1\nanswer: 1"),
    "compare": ("compare 767 789 =\n", "3=3\n7=7\n6<8\nanswer: <"),
    "evaluate": ("evaluate 2 + 16 + 7 =\n", "2+16=18\n18+7=25\nanswer: 25"),
    "precedence": ("precedence 10 + 9 * 8 =\n", "9*8=72\n10+72\n10+72=82\nanswer: 82"),
    "digitsum": ("digitsum 4368 =\n", "4+3=7\n7+6=13\n13+8=21\nanswer: 21"),
    "compose": ("compose f=x+6 g=x+7 : g(f(5)) =\n", "f(5)=5+6=11\ng(11)=11+7=18\nanswer: 18"),
    "story": ("story Tom has 3 pens. Tom finds 14. How many now? =\n", "3+14=17\nanswer: 17"),
    "maximum": ("maximum 47 13 5 =\n", "47 13 : 47\n47 5 : 47\nanswer: 47"),
    "minimum": ("minimum 36 7 21 =\n", "36 7 : 7\n7 21 : 7\nanswer: 7"),
    "first": ("first 13 20 38 =\n", "answer: 13"),
    "last": ("last 44 5 19 16 =\n", "answer: 16"),
    "length": ("length 36 3 27 =\n", "1 36\n2 3\n3 27\nanswer: 3"),
    "reverse": ("reverse 13 16 4 =\n", "4 : 13 16\n16 : 13\n13 :\nanswer: 4 16 13"),
    "sort": ("sort 47 16 40 =\n", "16 : 47 40\n40 : 47\n47 :\nanswer: 16 40 47"),
    "sum": ("sum 5 14 6 =\n", "5+14=19\n19+6=25\nanswer: 25"),
    "evens": ("evens 12 19 6 =\n", "12 yes\n19 no\n6 yes\nanswer: 12 6"),
    "unique": ("unique 40 40 40 40 =\n", "40 : 40\n40 : 40\n40 : 40\n40 : 40\nanswer: 40"),
    "pick": ("pick 3 : 37 4 25 =\n", "1 37\n2 4\n3 25\nanswer: 25"),
    "position": ("position 18 : 18 46 16 =\n", "1 18\nanswer: 1"),
    "merge": ("merge 47 49 | 2 41 =\n", "2 : 47 49 | 41\n41 : 47 49 |\n47 : 49 |\n49 : |\nanswer: 2 41 47 49"),
    "rotate": ("rotate 1 : 6 28 38 =\n", "28 38 6\nanswer: 28 38 6"),
}

# Prompts written by hand, with answers worked out by hand.
KNOWN = {
    "add 47 + 38 =\n": "85",
    "subtract 1002 - 7 =\n": "995",
    "multiply 47 * 36 =\n": "1692",
    "remainder 473 % 6 =\n": "5",
    "compare 120 99 =\n": ">",
    "evaluate 9 - 4 + 20 =\n": "25",
    "precedence 20 - 3 * 4 + 1 =\n": "9",
    "digitsum 9091 =\n": "19",
    "compose f=x+3 g=x*2 : f(g(g(5))) =\n": "23",
    "story Ann has 4 apples. Ann buys 3. Ann gives 2 away. Ann finds 2 bags of 5. How many now? =\n": "15",
    "maximum 31 7 22 9 =\n": "31",
    "minimum 31 7 22 9 =\n": "7",
    "first 31 7 22 9 =\n": "31",
    "last 31 7 22 9 =\n": "9",
    "length 31 7 22 9 =\n": "4",
    "reverse 31 7 22 9 =\n": "9 22 7 31",
    "sort 31 7 22 9 100 =\n": "7 9 22 31 100",
    "sum 31 7 22 9 =\n": "69",
    "evens 31 7 22 9 10 =\n": "22 10",
    "evens 31 7 =\n": "none",
    "unique 3 7 3 9 7 =\n": "3 7 9",
    "pick 3 : 31 7 22 9 =\n": "22",
    "position 22 : 31 7 22 9 =\n": "3",
    "merge 3 9 20 | 5 7 =\n": "3 5 7 9 20",
    "rotate 2 : 31 7 22 9 =\n": "22 9 31 7",
}


def train(count: int, **options: object) -> list:
    return list(Chains(count=count, **options).samples("train"))


def corrupted(answer: str) -> list[str]:
    """Answers that look like `answer` and are wrong."""
    if answer in "<=>":
        return [sign for sign in "<=>" if sign != answer] + [answer + answer]
    if answer == "none":
        return ["2", ""]
    last = answer[:-1] + str((int(answer[-1]) + 1) % 10)
    return [last, answer + " 1", "1" + answer, answer[:-1], ""]


@pytest.mark.parametrize(("name", "difficulty"), EVERY)
def test_the_checker_agrees_with_the_work_and_rejects_corrupted_answers(name, difficulty):
    skill = SKILLS[name]
    for index in range(200):
        problem = skill.generate(random.Random(f"check:{index}"), difficulty)
        assert problem.prompt.startswith(f"{name} ") and problem.prompt.endswith(" =\n")
        assert skill.check(problem.prompt, problem.answer), problem
        assert solve(problem.prompt) == problem.answer
        assert not any(skill.check(problem.prompt, wrong) for wrong in corrupted(problem.answer)), problem
        text = problem.solution()
        assert text.splitlines()[-1] == f"answer: {problem.answer}"
        assert final_answer(text) == problem.answer
        assert problem.solution(steps=False) == f"answer: {problem.answer}"
        assert len(problem.prompt + text) <= LONGEST[difficulty], problem
        assert all(step and step == step.strip() for step in problem.steps), problem


@pytest.mark.parametrize(("prompt", "answer"), KNOWN.items())
def test_known_problems(prompt, answer):
    assert solve(prompt) == answer


def test_every_skill_has_a_known_problem():
    assert {prompt.split()[0] for prompt in KNOWN} == set(SKILLS)
    assert len(SKILLS) >= 16 and {skill.family for skill in SKILLS.values()} == {"arithmetic", "list"}


def test_equations_in_the_steps_are_true():
    """Every step of the form a=b is an equation between what stands on its two sides."""
    for (name, difficulty), index in itertools.product(EVERY, range(20)):
        problem = SKILLS[name].generate(random.Random(f"steps:{index}"), difficulty)
        if name in ("compare", "compose"):
            continue
        for step in problem.steps:
            left, equals, right = step.partition(" ")[0].partition("=")
            if equals:
                assert evaluate(left) == evaluate(right), problem


def evaluate(text: str) -> int:
    """Value of sums, differences and products of integers, products first."""
    total = 0
    for term in text.replace("-", "+-").split("+"):
        factors = [int(factor) for factor in term.split("*")]
        product = 1
        for factor in factors:
            product *= factor
        total += product
    return total


def test_column_work_is_the_schoolbook_one():
    assert SKILLS["add"].work("47 + 38") == (["7+8+0=15 c1 5", "4+3+1=8 c0 85"], "85")
    assert SKILLS["add"].work("99 + 1")[0] == ["9+1+0=10 c1 0", "9+0+1=10 c1 00", "0+0+1=1 c0 100"]
    assert SKILLS["subtract"].work("102 - 98")[0] == ["12-8-0=4 b1 4", "10-9-1=0 b1 04", "1-0-1=0 b0 004"]
    assert SKILLS["sort"].work("31 7 22") == (["7 : 31 22", "22 : 31", "31 :"], "7 22 31")


@pytest.mark.parametrize("name", SKILLS)
def test_difficulty_makes_problems_longer(name):
    def length(difficulty: int) -> int:
        problems = (SKILLS[name].generate(random.Random(f"length:{i}"), difficulty) for i in range(100))
        return sum(len(problem.prompt + problem.solution()) for problem in problems)

    lengths = [length(difficulty) for difficulty in range(1, 6)]
    assert lengths == sorted(set(lengths))


def test_golden_values():
    found = {sample.extra["skill"]: (sample.prompt, sample.answers[0]) for sample in train(len(SKILLS))}
    assert found == GOLDEN


def test_same_samples_in_another_process():
    code = (
        "from hone.data.chains import Chains\n"
        "source = Chains(count=50, difficulty=[1, 3, 5], noise=0.5, seed=7)\n"
        "print([*source.samples('train'), *source.samples('eval')], source.fingerprint())"
    )
    source = Chains(count=50, difficulty=[1, 3, 5], noise=0.5, seed=7)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{[*source.samples('train'), *source.samples('eval')]} {source.fingerprint()}"


def test_a_training_sample_depends_on_its_index_alone():
    source = Chains(difficulty=[1, 2], noise=0.3, count=60)
    samples = list(source.samples("train"))
    assert [source.train_sample(index) for index in reversed(range(60))] == samples[::-1]
    assert list(replace(source, limit=10, count=20).samples("train")) == samples[:10]
    assert len({sample.where for sample in samples}) == 60


def test_seeds_differ_in_training_and_share_the_evaluation():
    first, second = Chains(count=100, seed=0), Chains(count=100, seed=1)
    prompts = [{sample.prompt for sample in source.samples("train")} for source in (first, second)]
    assert len(prompts[0] & prompts[1]) < 10
    assert list(first.samples("eval")) == list(second.samples("eval"))
    assert first.fingerprint() != second.fingerprint()


@pytest.mark.parametrize("difficulty", [1, 5])
def test_training_and_evaluation_never_meet(difficulty):
    source = Chains(difficulty=difficulty, count=3000, holdout=480)
    trained = {sample.prompt for sample in source.samples("train")}
    held = [sample.prompt for sample in source.samples("eval")]
    assert len(held) == len(set(held)) == 480
    assert not trained & set(held)
    assert all(map(is_eval, held)) and not any(map(is_eval, trained))


@pytest.mark.parametrize("name", SKILLS)
def test_every_skill_can_fill_both_splits_at_the_lowest_difficulty(name):
    source = Chains(skills=[name], count=300)
    assert len(list(source.samples("eval"))) == 200
    assert len({sample.prompt for sample in source.samples("train")}) > 250


def test_evaluation_is_spread_evenly_and_does_not_depend_on_the_other_skills():
    everything = list(Chains(holdout=240, difficulty=[1, 2]).samples("eval"))
    for name, difficulty in itertools.product(SKILLS, (1, 2)):
        mine = [s for s in everything if (s.extra["skill"], s.extra["difficulty"]) == (name, difficulty)]
        assert len(mine) == 5
    alone = [sample.prompt for sample in Chains(skills=["sort"], holdout=5).samples("eval")]
    assert alone == [s.prompt for s in everything if (s.extra["skill"], s.extra["difficulty"]) == ("sort", 1)]
    assert {sample.extra["skill"] for sample in everything[: len(SKILLS)]} == set(SKILLS)


def test_too_few_evaluation_problems_is_an_error_that_says_what_to_do():
    source = Chains(skills=["digitsum"], holdout=2000)
    with pytest.raises(DataError, match="lower `holdout`"):
        list(source.samples("eval"))


def test_noise_corrupts_its_share_of_the_training_data_alone():
    clean, noisy = train(2000, difficulty=2), train(2000, difficulty=2, noise=0.25)
    wrong = [index for index, sample in enumerate(noisy) if sample.extra["noisy"]]
    assert 0.22 < len(wrong) / 2000 < 0.28
    for index, (before, after) in enumerate(zip(clean, noisy, strict=True)):
        graded = Chains().grade(after, after.answers[0])
        assert before.prompt == after.prompt and before.extra["answer"] == after.extra["answer"]
        assert graded == float(index not in set(wrong))
        assert (before.answers == after.answers) == (index not in set(wrong))
    held = Chains(noise=1.0, holdout=48).samples("eval")
    assert all(not sample.extra["noisy"] for sample in held)
    assert all(sample.extra["noisy"] for sample in train(48, noise=1.0))


def test_grade():
    source = Chains()
    sample = next(source.samples("eval"))
    right = sample.extra["answer"]
    assert source.grade(sample, sample.answers[0]) == 1.0
    assert source.grade(sample, f"answer: {right}") == 1.0
    assert source.grade(sample, f"answer: 1{right}\nanswer:  {right} \n") == 1.0
    assert source.grade(sample, f"answer: {right}\nanswer: 1{right}") == 0.0
    assert source.grade(sample, right) == 0.0
    assert source.grade(sample, "") == 0.0
    assert source.grade(replace(sample, answers=("answer: 0",)), f"answer: {right}") == 1.0
    assert Accuracy()(source, sample, f"answer: {right}") == 1.0


def test_final_answer_is_the_last_answer_line():
    assert final_answer("1+1=2\nanswer: 2") == "2"
    assert final_answer("answer: 1\nanswer:  3   4 \nmore") == "3 4"
    assert final_answer("the answer: 2") is None
    assert final_answer("") is None
    assert final_answer("answer:") == ""


def test_without_steps_the_answer_is_one_line():
    for sample in train(48, steps=False):
        assert sample.answers[0] == f"answer: {sample.extra['answer']}"


def test_skills_are_chosen_by_name_family_and_ease():
    assert [skill.name for skill in choose(["sort", "add", "sort"])] == ["add", "sort"]
    assert {skill.family for skill in choose(["list"])} == {"list"}
    assert len(choose(["easy"])) + len(choose(["hard"])) == len(choose(None)) == len(SKILLS)
    assert "sort" in {skill.name for skill in choose(["hard"])}
    with pytest.raises(HoneError, match="did you mean 'sort'"):
        choose(["sorte"])
    with pytest.raises(HoneError, match="empty"):
        choose([])
    with pytest.raises(HoneError, match="begins with the name of a skill"):
        solve("paint 3 =")


def test_a_recipe_is_checked_before_anything_is_generated():
    def problems(**options: object) -> list[str]:
        return [str(problem) for problem in check_part("data", {"name": "chains", **options}, "data", Places())]

    assert problems(skills=["sort", "easy"], difficulty=[1, 5], noise=0.5) == []
    assert "'sort'" in problems(skills=["srot", "add"])[0]
    assert len(problems(difficulty=6)) == len(problems(difficulty=[])) == len(problems(noise=1.5)) == 1
    assert len(problems(count=0)) == len(problems(difficulty=[1, 0])) == 1
    source = build_part("data", {"name": "chains", "skills": ["sort"]})
    assert {sample.prompt.split()[0] for sample in source.samples("eval")} == {"sort"}


@pytest.mark.parametrize(
    "change", [{"skills": ["add"]}, {"difficulty": 2}, {"noise": 0.1}, {"count": 9}, {"steps": False}, {"limit": 5}]
)
def test_the_fingerprint_changes_with_the_samples(change):
    assert Chains().fingerprint() == Chains().fingerprint() == Chains(workers=2).fingerprint()
    assert Chains(**change).fingerprint() != Chains().fingerprint()


def test_the_catalogue_documents_every_option():
    records = {record.name: record for record in catalogue() if record.kind == "data"}
    for name in ("chains", "mix", "pydocs"):
        assert all(option.doc for option in records[name].options), name
