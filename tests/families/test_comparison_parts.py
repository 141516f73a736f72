"""What a comparison is made of: variants, budgets, content keys, tuning, ranking and the table; nothing is trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from hone.errors import HoneError, RecipeError
from hone.evidence import compare as comparing
from hone.evidence import source
from hone.evidence.budget import Budget
from hone.evidence.cells import Job, Store, content_key
from hone.evidence.claims.tasks import GENERAL
from hone.evidence.command import Request
from hone.evidence.compare import compare, table
from hone.evidence.contest import TUNING_SEED, better
from hone.evidence.pool import Interrupted, Tick
from hone.evidence.variants import Variant, expand, grid, read_settings
from hone.files import write_whole
from hone.recipe import Recipe

Answer = dict[str, float] | str  # the figures of a run, or why it failed


@pytest.fixture
def recipe(tmp_path: Path, qa_file: Path) -> Path:
    return write(tmp_path / "mine.yaml", data=str(qa_file), adapter={"name": "lora", "rank": 4}, steps=10)


def write(path: Path, **fields: Any) -> Path:
    path.write_text(yaml.safe_dump(fields))
    return path


def variants(recipe: Path, *vary: str, common: Mapping[str, Any] | None = None, **others: Any) -> list[Variant]:
    settings = dict(read_settings(text, "--vary") for text in vary)
    return expand([str(recipe), *map(str, others.get("also", []))], others.get("overrides", []), settings, common or {})


# --- variants


def test_settings_multiply_and_one_that_a_part_lacks_is_left_out(recipe: Path) -> None:
    made = variants(recipe, "adapter=lora,full", "adapter.rank=2,8")
    assert [v.label for v in made] == ["adapter=lora adapter.rank=2", "adapter=lora adapter.rank=8", "adapter=full"]
    assert [v.recipe().adapter for v in made] == [{"name": "lora", "rank": 2}, {"name": "lora", "rank": 8}, "full"]
    assert [v.notes for v in made] == [(), (), ("has no adapter.rank",)]
    assert made[2].settings == {"adapter": "full"}


def test_a_part_comes_before_its_options_whatever_the_order(recipe: Path) -> None:
    made = variants(recipe, "adapter.rank=2,8", "adapter=full,lora")
    assert [v.label for v in made] == ["adapter=full", "adapter.rank=2 adapter=lora", "adapter.rank=8 adapter=lora"]


def test_the_recipes_own_options_stay_where_a_variant_names_the_same_part(recipe: Path) -> None:
    lora, full = variants(recipe, "adapter=lora,full")
    assert lora.recipe().build("adapter").rank == 4 and full.recipe().adapter == "full"


def test_a_variant_says_which_options_it_takes_from_its_own_defaults(recipe: Path) -> None:
    _, pissa, full = variants(recipe, "adapter=lora,pissa,full")
    assert pissa.notes == ("takes its own default rank 8, not lora's 4",) and full.notes == ()
    assert variants(recipe, "adapter=lora,pissa", "adapter.rank=2")[1].notes == ()
    tuned = expand([str(recipe)], [], {"adapter": ["lora", "pissa"]}, {}, ["adapter.rank"])
    assert tuned[1].notes == ()


def test_a_value_may_be_a_part_with_options_or_a_list(recipe: Path) -> None:
    made = variants(recipe, "adapter=[{name: lora, rank: 2}, full]", "metrics=[[], [accuracy]]")
    assert [v.label for v in made][:2] == ["adapter=lora(rank=2) metrics=[]", "adapter=lora(rank=2) metrics=[accuracy]"]
    assert made[0].recipe().build("adapter").rank == 2 and made[0].recipe().metrics == []


def test_fields_that_nobody_gives_follow_their_defaults(recipe: Path) -> None:
    (made,) = variants(recipe, overrides=["batch_tokens=512"])
    assert set(made.fields) == {"data", "adapter", "steps", "batch_tokens", "name"}
    assert made.recipe(**{"optimizer.lr": 0.5, "seed": 3}).build("optimizer").lr == 0.5
    with pytest.raises(RecipeError, match=r"optimizer\.lr"):
        made.recipe(**{"optimizer.lr": -1})


def test_whole_recipes_are_told_apart_by_their_names(recipe: Path, tmp_path: Path, qa_file: Path) -> None:
    other = write(tmp_path / "other.yaml", data=str(qa_file), adapter="full", steps=5)
    made = variants(recipe, "clip=1", also=[other])
    assert [v.label for v in made] == ["mine clip=1", "other clip=1"]
    assert [v.recipe().steps for v in made] == [10, 5]
    (tmp_path / "sub").mkdir()
    twin = write(tmp_path / "sub" / "mine.yaml", data=str(qa_file), steps=7)
    assert [v.label for v in variants(recipe, also=[twin])] == ["mine", "mine (2)"]
    assert [v.label for v in variants(recipe, also=[recipe])] == ["mine"]  # the same recipe twice is one variant


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("adapter", r"expected FIELD=value,value such as adapter=lora,full, got 'adapter'"),
        ("adapter=", r"expected FIELD=value,value"),
        ("adaptr=lora", r"'adaptr' is no field that can vary \(did you mean 'adapter'\?\)"),
        ("seed=1,2", r"'seed' is no field that can vary; give --seeds"),
        ("out=a,b", r"'out' is no field that can vary \(fields: "),
        ("adapter=lora,lora", r"adapter has a value twice"),
        ("optimizer.lr=1e-3,0.001", r"optimizer.lr has a value twice"),
        ("adapter=[lora", r"adapter: the value is not valid YAML: "),
    ],
)
def test_settings_that_cannot_be_read_are_refused(text: str, said: str) -> None:
    with pytest.raises(HoneError, match=f"^--vary: {said}"):
        read_settings(text, "--vary")


@pytest.mark.parametrize(
    ("vary", "said"),
    [
        ("adapter=lora,ful", r"--vary: adapter: there is no adapter called 'ful' \(did you mean 'full'\?\)"),
        ("adapter.rnk=2", r"--vary: adapter.rnk: unknown option \(did you mean 'rank'\?\)"),
        ("adapter.rank=2,many", r"--vary: adapter.rank: expected an integer, got 'many'"),
        ("data.path=none.jsonl", r"--vary: data.path: none.jsonl: there is no such file"),
    ],
)
def test_settings_that_do_not_fit_the_recipe_are_refused(recipe: Path, vary: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        variants(recipe, vary)


def test_a_grid_holds_every_combination_and_one_of_nothing() -> None:
    assert grid({}) == [{}] and grid({"a": [1, 2], "b": [3]}) == [{"a": 1, "b": 3}, {"a": 2, "b": 3}]


# --- budgets

MEASURED = {"steps": 12, "step_tokens": 100.0, "step_seconds": 0.5, "step_flops": 2e6, "setup_seconds": 2.0}


@pytest.mark.parametrize(
    ("budget", "steps"),
    [("", 12), ("steps=7", 7), ("tokens=1049", 10), ("tokens=1051", 11), ("seconds=12", 20), ("flops=1e9", 500)],
)
def test_a_budget_is_met_as_closely_as_whole_steps_allow(budget: str, steps: int) -> None:
    assert Budget.read(budget).steps(MEASURED) == steps


@pytest.mark.parametrize("budget", ["tokens=40", "seconds=2.1", "flops=10"])
def test_a_budget_below_one_step_is_an_error(budget: str) -> None:
    with pytest.raises(HoneError, match=r"does not suffice for one step"):
        Budget.read(budget).steps(MEASURED)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("step=10", r"such as steps=200, got 'step=10' \(did you mean 'steps'\?\)"),
        ("200", r"such as steps=200, got '200' \(budgets: steps, tokens, seconds, flops\)"),
        ("steps=2.5", r"a positive whole number after steps=, got '2.5'"),
        ("tokens=-1", r"a positive number after tokens=, got '-1'"),
        ("seconds=", r"a positive number after seconds=, got ''"),
        ("flops=inf", r"a positive number after flops=, got 'inf'"),
        ("tokens=nan", r"a positive number after tokens=, got 'nan'"),
    ],
)
def test_wrong_budgets_say_what_was_expected(text: str, said: str) -> None:
    with pytest.raises(HoneError, match=f"^--budget: expected .*{said}"):
        Budget.read(text)


# --- what a cell is found by


def key(**fields: Any) -> str:
    return content_key(Recipe.of(**{"data": "chains", "steps": 2, **fields}))


def test_a_key_follows_what_figures_depend_on(tmp_path: Path, qa_file: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"steps": 3}, {"seed": 1}, {"adapter": "lora"}, {"adapter": {"name": "lora", "rank": 2}},
        {"adapter": {"name": "lora", "rank": 4}}, {"data": str(qa_file)}, {"general_data": str(qa_file)},
        {"packing": False}, {"eval_samples": 3}, {"callbacks": ["average"]},
    ]  # fmt: skip
    keys = [key(), *(key(**change) for change in changes)]
    assert len(set(keys)) == len(keys)
    same: list[dict[str, Any]] = [
        {"out": "elsewhere"}, {"name": "other"}, {"about": {"text": "x"}}, {"trackers": ["tensorboard"]}, {"keep": 5},
        {"checkpoint_every": 1},
    ]  # fmt: skip
    assert {key(**change) for change in same} == {key()}


def test_a_key_follows_the_content_of_data_and_models_not_only_their_paths(tmp_path: Path, tiny_model: Path) -> None:
    data = tmp_path / "rows.jsonl"
    row = json.dumps({"question": "a", "answer": "b"}) + "\n"
    data.write_text(row * 20)
    before = key(data=str(data))
    assert key(data=str(data)) == before
    data.write_text(row * 19 + row.replace("b", "c"))
    assert key(data=str(data)) != before
    model = shutil.copytree(tiny_model, tmp_path / "model")
    before = key(model=str(model))
    assert key(model=str(model)) == before != key()
    merged = {"name": "merged", "base": "stage:0", "models": ["stage:1", str(model)], "merger": "task-arithmetic"}
    stages = {"steps": None, "stages": [{"steps": 1}, {"steps": 0, "model": merged}]}  # nothing is merged yet
    made = key(**stages)
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[::-1])
    assert key(model=str(model)) != before and key(**stages) != made


def test_a_key_follows_the_code_of_the_named_parts_and_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = {"steps": None, "stages": [{"steps": 1}, {"steps": 1, "adapter": "lora"}]}
    before = {name: key(adapter=name) for name in ("lora", "full")}, key(**stages)
    real = source.run_hash

    def changed(named: list[tuple[str, str]]) -> str:
        return real(named) + ("changed" if ("adapter", "lora") in named else "")

    monkeypatch.setattr(source, "run_hash", changed)
    assert key(adapter="full") == before[0]["full"] and key(adapter="lora") != before[0]["lora"]
    assert key(**stages) != before[1]


def test_a_store_finds_a_cell_whatever_it_was_called(tmp_path: Path, recipe: Path) -> None:
    store, made = Store(tmp_path / "cells"), Recipe.load(recipe)
    first = store.job("run", made, "lr=1e+30 seed 0")
    assert first.folder.name.startswith("mine-lr=1e+30-seed-0-") and not first.done
    first.prepare()
    assert store.job("run", made, "another label").folder == first.folder
    others = [
        store.job("measure", made, ""),
        store.job("run", made, "", keeps=""),
        store.job("run", made, "", also="x"),
    ]
    assert len({first.folder, *(job.folder for job in others)}) == 4
    first.fail("broke")
    assert first.done and first.failure() == "broke" and first.result() is None
    first.forget_failure()
    assert not first.done


def test_a_finished_run_that_kept_its_model_serves_who_wants_only_figures(tmp_path: Path, recipe: Path) -> None:
    store, made = Store(tmp_path / "cells"), Recipe.load(recipe)
    kept = store.job("run", made, "kept")
    kept.prepare()
    assert store.job("run", made, "bare", keeps="").folder != kept.folder  # it has not finished
    kept.run.mkdir()
    (kept.run / "result.json").write_text('{"status": "finished"}')
    assert store.job("run", made, "bare", keeps="").folder == kept.folder
    bare = store.job("run", made, "bare", keeps="", also="x")
    bare.prepare()
    bare.run.mkdir()
    (bare.run / "result.json").write_text('{"status": "finished"}')
    assert store.job("run", made, "kept", also="x").folder != bare.folder  # it has no model to give


# --- comparisons with figures made up


@dataclass
class Made:
    """A pool that makes figures up: nothing is trained."""

    answer: Callable[[Recipe], Answer]
    measured: Mapping[str, Any] = field(default_factory=lambda: {**MEASURED, "peak_memory": 1000})
    stop_after: int = 10**9
    computed: list[Job] = field(default_factory=list)

    def width(self, peak: int, jobs: int) -> int:
        return 1

    def threads(self, width: int) -> int:
        return 1

    def run(self, jobs: Sequence[Job], width: int, tick: Tick) -> None:
        for job in jobs:
            if len(self.computed) == self.stop_after:
                raise Interrupted
            tick([job], 0)
            self.computed.append(job)
            self._compute(job)

    def _compute(self, job: Job) -> None:
        if job.task == "measure":
            found = {**self.measured, "steps": job.recipe.steps}
            write_whole(job.folder / "measure.json", json.dumps(found).encode())
            return
        answer = self.answer(job.recipe)
        if isinstance(answer, str):
            job.fail(answer)
            return
        result = {
            "status": "finished", "steps": job.recipe.steps, "tokens": 100, "training_seconds": 1.0,
            "setup_seconds": 0.0, "peak_memory": 1000, "before": {"loss": 5.0, "general_loss": 2.0},
            "after": {"general_loss": 2.5, **answer},
        }  # fmt: skip
        job.run.mkdir()
        for name, content in (("result.json", result), ("manifest.json", {"model": {"trained": 7}})):
            write_whole(job.run / name, json.dumps(content).encode())
        (job.run / "recipe.yaml").write_text(yaml.safe_dump({"steps": job.recipe.steps}))


@pytest.fixture
def ask(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return what compares variants of the recipe with a made-up pool."""
    monkeypatch.setattr(comparing, "machine", lambda: "a machine")
    monkeypatch.setattr(comparing, "versions", dict)

    def asked(pool: Made, *vary: str, out: str = "out", retry: bool = False, **fields: Any) -> dict[str, Any]:
        recipes = fields.pop("recipes", [str(recipe)])
        request = Request(recipes=recipes, vary=vary, general="none", **fields)
        return compare(request.comparison(), tmp_path / out, pool, retry=retry)  # type: ignore[arg-type]

    return asked


def learned(recipe: Recipe) -> dict[str, float]:
    """Return figures that show the rank, the learning rate and the seed of a run."""
    rank, rate = recipe.build("adapter").rank, recipe.build("optimizer").lr
    return {"loss": 3 - rank / 10 + abs(rate - 0.01) + recipe.seed / 100, "accuracy": rank / 10}


def test_variants_are_ranked_with_paired_differences_to_the_baseline(ask: Callable[..., dict[str, Any]]) -> None:
    result = ask(Made(learned), "adapter.rank=2,8,4", metric="loss", seeds=4)
    assert [row["label"] for row in result["variants"]] == ["adapter.rank=8", "adapter.rank=4", "adapter.rank=2"]
    best = result["variants"][0]
    assert result["baseline"] == "adapter.rank=2" and result["variants"][2]["difference"] is None
    assert best["difference"]["mean"] == pytest.approx(-0.6) and best["difference"]["verdict"] == "better"
    assert best["difference"]["adjusted"] >= best["difference"]["p"]
    assert best["values"]["loss"] == pytest.approx([2.2098 + seed / 100 for seed in range(4)])
    assert best["values"]["forgetting"] == [0.5] * 4 and best["values"]["flops"] == [2e7] * 4
    assert best["values"]["trained"] == [7] * 4 and best["values"]["tokens_per_second"] == [100] * 4
    assert (result["metric"], result["better"], result["seeds"]) == ("loss", "lower", [0, 1, 2, 3])
    assert result["budget"] == {"kind": "steps", "amount": 10} and result["general"] == ""


def test_accuracy_ranks_where_there_is_one_and_the_highest_is_first(ask: Callable[..., dict[str, Any]]) -> None:
    result = ask(Made(learned), "adapter.rank=2,8", baseline="adapter.rank=8", seeds=2)
    assert (result["metric"], result["better"]) == ("accuracy", "higher")
    assert [row["label"] for row in result["variants"]] == ["adapter.rank=8", "adapter.rank=2"]
    assert result["variants"][1]["difference"]["mean"] == pytest.approx(-0.6)
    assert better("tokens_per_second") == "higher" and better("training_seconds") == better("general_loss") == "lower"


def test_failed_variants_come_last_with_their_reason_and_partial_ones_before_them(
    ask: Callable[..., dict[str, Any]],
) -> None:
    def answer(recipe: Recipe) -> Answer:
        rank = recipe.build("adapter").rank
        if rank == 8 or (rank == 4 and recipe.seed == 1):
            return f"rank {rank} broke"
        return learned(recipe) if rank != 6 else {**learned(recipe), "loss": float("nan")}

    result = ask(Made(answer), "adapter.rank=8,4,2,6", metric="loss", seeds=2)
    rows = {row["settings"]["adapter.rank"]: row for row in result["variants"]}
    assert list(rows) == [2, 4, 8, 6] or list(rows) == [2, 4, 6, 8]
    assert [rows[rank]["status"] for rank in (2, 4, 8, 6)] == ["finished", "partial", "failed", "failed"]
    assert rows[4]["values"]["loss"][1] is None and rows[4]["failures"] == [{"seed": 1, "reason": "rank 4 broke"}]
    assert rows[8]["reason"] == "rank 8 broke" and rows[8]["values"] == {} and rows[8]["difference"] is None
    assert "held-out loss is nan" in rows[6]["reason"]
    assert rows[2]["difference"] is None  # the baseline, rank 8, has nothing to be compared with
    text = "\n".join(table(result))
    assert "adapter.rank=8: failed: rank 8 broke" in text and "note: adapter.rank=4: rank 4 broke" in text


def test_failed_cells_stay_failed_until_retry_is_asked_for(ask: Callable[..., dict[str, Any]]) -> None:
    ask(Made(lambda recipe: "broke" if recipe.seed else learned(recipe)), seeds=2)
    again = Made(learned)
    assert ask(again, seeds=2)["variants"][0]["status"] == "partial" and again.computed == []
    assert ask(again, seeds=2, retry=True)["variants"][0]["status"] == "finished"
    assert [job.recipe.seed for job in again.computed] == [1]


def test_tuning_gives_all_the_same_trials_on_another_seed_and_keeps_the_best(
    ask: Callable[..., dict[str, Any]],
) -> None:
    pool = Made(lambda recipe: "diverged" if recipe.build("optimizer").lr > 1 else learned(recipe))
    result = ask(pool, "adapter.rank=2,4", tune=["optimizer.lr=0.1,0.01,0.001,9"], metric="loss", seeds=2)
    trials = [job.recipe for job in pool.computed if job.task == "run" and job.recipe.seed == TUNING_SEED]
    assert [recipe.build("adapter").rank for recipe in trials] == [2] * 4 + [4] * 4
    raced = [job.recipe for job in pool.computed if job.task == "run" and job.recipe.seed != TUNING_SEED]
    assert {recipe.build("optimizer").lr for recipe in raced} == {0.01} and len(raced) == 4
    for row in result["variants"]:
        assert row["tuned"] == {"optimizer.lr": 0.01} and row["note"] == ""
        assert [trial["reason"] for trial in row["trials"]] == ["", "", "", "diverged"]
        assert row["trials"][3]["value"] is None and row["trials"][1]["value"] < row["trials"][0]["value"]
    assert result["tune"] == {"optimizer.lr": [0.1, 0.01, 0.001, 9]}


def test_tuning_follows_the_metrics_direction_and_breaks_ties_by_the_loss(ask: Callable[..., dict[str, Any]]) -> None:
    def answer(recipe: Recipe) -> Answer:
        rate = recipe.build("optimizer").lr
        return {"loss": 1 / rate, "accuracy": 0.5 if rate > 0.1 else 0.2}

    (row,) = ask(Made(answer), tune=["optimizer.lr=0.1,0.2,0.3"], seeds=1)["variants"]
    assert [trial["value"] for trial in row["trials"]] == [0.2, 0.5, 0.5] and row["tuned"] == {"optimizer.lr": 0.3}
    assert row["note"] == "its best optimizer.lr, 0.3, is the largest that was tried"
    (row,) = ask(Made(learned), tune=["optimizer.lr=0.01,0.05"], metric="loss", seeds=1, out="other")["variants"]
    assert row["note"] == "its best optimizer.lr, 0.01, is the smallest that was tried"
    (row,) = ask(Made(learned), tune=["schedule=cosine,constant"], seeds=1, out="words")["variants"]
    assert row["note"] == ""  # words have no order


def test_a_variant_whose_trials_all_fail_is_a_failed_row(ask: Callable[..., dict[str, Any]]) -> None:
    pool = Made(lambda recipe: "too much" if recipe.build("adapter").rank == 8 else learned(recipe))
    result = ask(pool, "adapter.rank=8,2", tune=["optimizer.lr=0.1,0.2"], seeds=1)
    assert [row["label"] for row in result["variants"]] == ["adapter.rank=2", "adapter.rank=8"]
    failed = result["variants"][1]
    assert (failed["status"], failed["reason"]) == ("failed", "every trial failed; the first: too much")
    assert not [job for job in pool.computed if job.recipe.seed == 0 and job.task == "run" and "rank=8" in job.label]


def test_a_budget_sets_the_steps_of_every_run(ask: Callable[..., dict[str, Any]]) -> None:
    pool = Made(learned)
    result = ask(pool, "adapter.rank=2,8", budget="tokens=600", tune=["optimizer.lr=0.1,0.2"], seeds=1)
    assert {job.recipe.steps for job in pool.computed if job.task == "run"} == {6}
    assert result["budget"] == {"kind": "tokens", "amount": 600} and result["variants"][0]["steps"] == 6
    short = ask(Made(learned), budget="tokens=5", out="short", seeds=1)
    assert "does not suffice" in short["variants"][0]["reason"] and short["variants"][0]["status"] == "failed"


def test_what_was_stopped_goes_on_and_computes_the_rest_alone(ask: Callable[..., dict[str, Any]]) -> None:
    first, rest, none = Made(learned, stop_after=4), Made(learned), Made(learned)
    stopped = ask(first, "adapter.rank=2,8", seeds=2)
    assert stopped["status"] == "interrupted" and {row["status"] for row in stopped["variants"]} == {"running"}
    result = ask(rest, "adapter.rank=2,8", seeds=2)
    assert result["status"] == "finished" and len(first.computed) + len(rest.computed) == 2 + 4
    assert not {job.folder for job in first.computed} & {job.folder for job in rest.computed}
    assert ask(none, "adapter.rank=2,8", seeds=2)["variants"] == result["variants"] and none.computed == []
    assert len(ask(none, "adapter.rank=2,8", seeds=3)["seeds"]) == 3 and len(none.computed) == 2


def test_comparisons_share_cells_but_not_folders(ask: Callable[..., dict[str, Any]]) -> None:
    ask(Made(learned), "adapter.rank=2,8", seeds=2)
    with pytest.raises(HoneError, match=r"exists already and holds something else; give another folder with --out"):
        ask(Made(learned), "adapter.rank=2,4", seeds=2)
    other = Made(learned)
    ask(other, "adapter.rank=2,4", seeds=2, out="other")
    assert {job.recipe.build("adapter").rank for job in other.computed} == {4}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"baseline": "adapter.rank=22"}, r"--baseline: there is no variant .* \(did you mean 'adapter.rank=2'\?\)"),
        ({"metric": "acuracy"}, r"--metric: the runs have no 'acuracy' \(did you mean 'accuracy'\?\)"),
        ({"metric": "forgetting"}, r"--metric: the runs have no 'forgetting' \(metrics: accuracy, flops, loss"),
        ({"tune": ["adapter.rank=1,2"]}, r"--tune: adapter.rank is varied already"),
        ({"tune": ["optimizer.eps_=1,2"]}, r"--tune: does not fit 'adapter.rank=2': (.|\n)*did you mean 'eps'"),
        ({"tune": ["clip=1", "clip=2"]}, r"--tune: clip is given twice; put all its values into one"),
        ({"budget": "hours=1"}, r"--budget: expected KIND=AMOUNT"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    ask: Callable[..., dict[str, Any]], fields: dict[str, Any], said: str
) -> None:
    pool = Made(learned)
    with pytest.raises(HoneError, match=said):
        ask(pool, "adapter.rank=2,8", **fields)
    assert pool.computed == []


def test_stages_have_no_budget_but_their_own(ask: Callable[..., dict[str, Any]], tmp_path: Path, qa_file: Path) -> None:
    staged = write(tmp_path / "staged.yaml", data=str(qa_file), stages=[{"steps": 1}, {"steps": 2}])
    with pytest.raises(HoneError, match=r"--budget: 'staged' has stages, whose lengths only the recipe can give"):
        ask(Made(learned), recipes=[str(staged)], budget="steps=3")


def test_forgetting_is_measured_unless_it_is_switched_off(recipe: Path, tmp_path: Path, qa_file: Path) -> None:
    def general(asked: str, path: Path = recipe) -> Any:
        return Request(recipes=[str(path)], general=asked).comparison().variants[0].recipe().general_data

    assert general("") == general("pydocs") == GENERAL and general("none") is None
    assert general(str(qa_file)) == str(qa_file)
    own = write(tmp_path / "own.yaml", data=str(qa_file), steps=1, general_data=str(qa_file))
    assert general("", own) == str(qa_file) and general("none", own) is None


def test_the_table_shows_accuracies_as_percentages_and_a_lone_seed_without_interval(
    ask: Callable[..., dict[str, Any]],
) -> None:
    lines = table(ask(Made(learned), "adapter.rank=2,8", seeds=1))
    assert "accuracy (higher is better), steps=10 each, seeds [0]" in lines[0]
    shown = [line.split() for line in lines if line.startswith("adapter.rank")][:2]  # then come the costs
    assert [words[1] for words in shown] == ["80.0%", "20.0%"] and [words[2] for words in shown] == ["-", "-"]
    more = "\n".join(table(ask(Made(learned), "adapter.rank=2,8", seeds=3)))
    assert "+60 points: better (p " in more and "the baseline" in more
