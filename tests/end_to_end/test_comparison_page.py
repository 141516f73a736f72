"""The page of a comparison says who won and by how much, opens without a network, and its controls work."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from end_to_end.pages import figures, loaded_from_elsewhere, opened, probed, shown, write_comparison_folder, write_run
from hone.engine.folder import RunFolder
from hone.errors import HoneError
from hone.evidence import comparison_page
from hone.evidence.charts import Clock, Curve, band, line, mean, read_logs, steep, trained
from hone.evidence.comparison_charts import pareto, read_variants
from hone.evidence.comparison_page import outcome, write_comparison
from hone.evidence.layout import compared, flat, quantity, scaled

FULL = {"settings": {"adapter": "full"}, "goal": 0.86}
LORA = {"settings": {"adapter": "lora", "adapter.rank": 8}, "goal": 0.7, "baseline": True,
        "recipe": {"adapter": {"name": "lora", "rank": 8}}}  # fmt: skip
BROKEN = {"settings": {"optimizer": "muon"}, "goal": 0.3, "statuses": ["failed"] * 3}
HOSTILE = ("</script><script>console.error('out')</script>", "<img src=x onerror=console.error(1)> %{x} {{ 7 * 7 }}")


def states(home: Path) -> dict[str, Path]:
    """Write comparisons in every state that a page must show; return their folders."""
    half = {**FULL, "statuses": ["finished", "finished", "running"]}
    rest = {**LORA, "statuses": ["finished", "running", "missing"]}
    lost = [{**side, "statuses": ["failed"] * 3} for side in (FULL, LORA)]
    sides: dict[str, tuple[Mapping[str, Any], dict[str, Any]]] = {
        "running": ({"full": half, "lora": rest, "none yet": {**BROKEN, "statuses": ["missing"] * 3}}, {}),
        "one seed": ({"full": FULL, "lora": LORA}, {"seeds": 1}),
        "failed": ({"full": lost[0], "lora": lost[1]}, {}),
        "hostile": (dict(zip(HOSTILE, (FULL, LORA), strict=True)), {"tune": {HOSTILE[1]: [*HOSTILE, "plain"]}}),
        "many": ({f"optimizer=number{i} " + "a.long.option=1000 " * i: {**FULL, "goal": 0.9 - i / 20}
                  for i in range(9)}, {"seeds": 2, "general": ""}),
    }  # fmt: skip
    return {name: write_comparison_folder(home / name, *given[:1], **given[1]) for name, given in sides.items()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Comparisons in other states, each with its page."""
    made = states(tmp_path_factory.mktemp("states"))
    for folder in made.values():
        write_comparison(folder)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of two variants and one that failed, tuned, with its page."""
    home = tmp_path_factory.mktemp("comparison") / "adapters"
    sides = {"adapter=full": FULL, "adapter=lora adapter.rank=8": LORA, "optimizer=muon": BROKEN}
    write_comparison_folder(home, sides, tune={"optimizer.lr": [0.001, 0.002, 0.004]})
    assert write_comparison(home) == home / "report.html"
    return home


def result(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def test_the_page_says_what_was_found(folder: Path) -> None:
    text = shown((folder / "report.html").read_text())
    lora = result(folder)["variants"][1]
    for expected in (
        "adapter=full is best: accuracy", "better than adapter=lora adapter.rank=8, the baseline, by",
        "(95% interval", "adjusted p 0.008", "1 variant failed", "60 steps", "step 20: the loss is not finite (nan)",
        "trained parameters", "49.2k", "MiB", f"{lora['summary']['accuracy']['mean']:.1%}", "Forgetting is",
        "hone compare quickstart --vary adapter=lora,full", "AMD EPYC, 2 cores",
        f"hone run {folder}/cell-0-0/recipe.yaml --set out=null", f"hone sample {folder}/cell-0-0",
        f"hone report {folder}/cell-0-0 {folder}/cell-1-0",
        "the best optimizer.lr lies at the end of those tried: 0.001",
    ):  # fmt: skip
        assert expected in text, expected
    assert loaded_from_elsewhere(folder / "report.html") == []


def test_every_chart_is_drawn_within_the_window_and_the_console_is_silent(folder: Path, tmp_path: Path) -> None:
    for found in probed(folder / "report.html", tmp_path / "browser"):
        assert found["log"] == []
        assert found["drawn"] == found["plots"] == 8
        assert found["page"] <= found["window"]


@pytest.mark.parametrize("state", ["running", "one seed", "failed", "hostile", "many"])
def test_the_page_works_in_every_state(folders: dict[str, Path], tmp_path: Path, state: str) -> None:
    charts = figures(folders[state] / "report.html")
    for found in probed(folders[state] / "report.html", tmp_path / "browser"):
        assert found["log"] == []
        assert found["drawn"] == found["plots"] == len(charts) >= 4
        assert found["page"] <= found["window"]


CHANGE = """
const pick = (name, value) => { const one = document.querySelector(`select[data-control=${name}]`); one.value = value;
  one.dispatchEvent(new Event('change')); };
const chart = id =>
  document.getElementById('chart-' + id).data.map(t => ({ x: t.x, role: t.mode, visible: t.visible }));
"""


def test_the_controls_change_what_the_charts_show(folder: Path, tmp_path: Path) -> None:
    act = CHANGE + (
        "const before = chart('accuracy'); pick('x', 'tokens'); pick('cost', 'trained'); pick('metric', 'loss');"
        "const picked = { before, after: chart('accuracy'), cost: chart('cost'), intervals: chart('intervals') };"
        "const chip = document.querySelector('button[data-series=\"0\"]'); chip.click();"
        "const pressed = chip.getAttribute('aria-pressed'), hidden = chart('cost').map(t => t.visible); chip.click();"
        "return { ...picked, pressed, hidden, again: chart('cost').map(t => t.visible), hash: location.hash };"
    )
    page = probed(folder / "report.html", tmp_path / "browser", act, widths=[900])[0]
    found, variants = page["found"], result(folder)["variants"]
    assert page["log"] == []
    steps, tokens = ([t["x"] for t in found[when] if t["role"] == "lines+markers"] for when in ("before", "after"))
    assert steps[0] == [0, 10, 20, 30, 40, 50, 60]
    spent = variants[0]["values"]["tokens"]
    assert tokens[0][0] == 0 and tokens[0][-1] == pytest.approx(sum(spent) / 3)
    assert [t["x"][0] for t in found["cost"][1:]] == [1_212_416, 49_152]
    means = [t["x"][0] for t in found["intervals"] if t["role"] == "markers" and len(t["x"]) == 1]
    assert means == pytest.approx([v["summary"]["loss"]["mean"] for v in variants[:2]])
    assert found["pressed"] == "false" and found["hidden"] == [True, False, True] and all(found["again"])
    assert all(part in found["hash"] for part in ("x=tokens", "cost=trained", "metric=loss"))


def test_an_address_with_a_view_opens_in_it(folder: Path, tmp_path: Path) -> None:
    act = CHANGE + "return { x: document.querySelector('select[data-control=x]').value, cost: chart('cost') };"
    view = "x=flops&cost=no-such&hide=1,"
    found = probed(folder / "report.html", tmp_path / "browser", act, view, widths=[900])[0]["found"]
    assert found["x"] == "flops" and [t["visible"] for t in found["cost"]] == [True, True, False]


def test_labels_cannot_break_out_of_the_page(folders: dict[str, Path], tmp_path: Path) -> None:
    page = folders["hostile"] / "report.html"
    assert not any(text in page.read_text() for text in HOSTILE)
    dom, log = opened(page, tmp_path / "browser")
    assert "CONSOLE" not in log and "<img" not in dom
    assert HOSTILE[0] in shown(page.read_text()) and "{{ 7 * 7 }}" in shown(page.read_text())
    for chart in figures(page).values():
        texts = [str(t.get("name")) + str(t.get("hovertemplate")) for t in chart["traces"]]
        assert not any("<img" in text or "<script" in text for text in texts)
        assert not any("%{x} {{" in str(t.get("hovertemplate")) for t in chart["traces"])


def test_a_value_that_is_not_finite_stands_in_no_script(folder: Path, folders: dict[str, Path]) -> None:
    assert "NaN" in (folder / "cell-2-0" / "metrics.jsonl").read_text()
    for one in (folder, *folders.values()):
        assert figures(one / "report.html")


@pytest.mark.parametrize(("state", "expected"), [
    ("running", "Not finished, so this may change. full has the best accuracy"),
    ("one seed", "With one seed, a difference cannot be told from chance."),
    ("failed", "Every variant failed; the table says why."),
    ("many", "the baseline, is best: accuracy"),
])  # fmt: skip
def test_the_outcome_is_said_in_words(folders: dict[str, Path], state: str, expected: str) -> None:
    assert expected in shown((folders[state] / "report.html").read_text())


def said(better: str, *, first: str = "a", base: str = "b", **difference: Any) -> str:
    """Return the outcome of a comparison of a and b in which the one that is not the baseline has a difference."""
    metric = "accuracy" if better == "higher" else "loss"
    variants = [{"label": label, "status": "finished", "values": {metric: [0.5, 0.6]},
                 "difference": None if label == base else difference}
                for label in (first, base if first != base else "a")]  # fmt: skip
    made = {"metric": metric, "better": better, "level": 0.9, "seeds": [0, 1], "baseline": base, "variants": variants}
    return outcome(made, read_variants(made, Path()))


def test_the_outcome_names_the_size_and_the_direction() -> None:
    gap = {"mean": 0.12, "low": 0.03, "high": 0.21, "p": 0.01, "adjusted": 0.02}
    assert said("higher", **gap, verdict="better") == (
        "a is best: accuracy 55.0%, better than b, the baseline, by 12.0 points (90% interval 3.0 to 21.0, "
        "adjusted p 0.020)."
    )
    less = {**gap, "mean": -0.12, "low": -0.21, "high": -0.03}
    assert "a is best: loss 0.550, better than b, the baseline, by 0.120 (90% interval 0.030" in said(
        "lower", **less, verdict="better"
    )
    assert "b, the baseline, is best: accuracy 55.0%; a is worse by 12.0 points (90% interval 3.0 to 21.0" in said(
        "higher", first="b", **less, verdict="worse"
    )
    none = {**gap, "low": -0.03, "adjusted": 0.3, "verdict": "no difference shown"}
    assert said("higher", **none).startswith("Nothing was shown to be better than the baseline: a has the best mean")
    assert said("higher", first="b", **none).startswith("No difference was shown: b, the baseline, has the best mean")


def test_a_comparison_whose_runs_were_moved_away_keeps_its_table(folder: Path, tmp_path: Path) -> None:
    home = tmp_path / "copy"
    home.mkdir()
    moved = result(folder)
    for variant in moved["variants"]:
        variant["cells"] = {seed: f"{path}-gone" for seed, path in variant["cells"].items()}
    (home / "result.json").write_text(json.dumps(moved))
    page = write_comparison(home)
    assert set(figures(page)) == {"chart-intervals", "chart-differences", "chart-cost", "chart-tuning"}
    assert "adapter=full is best" in shown(page.read_text()) and "adapter.rank" in page.read_text()
    shutil.copytree(folder / "cell-0-0", home / "cell-0-0")
    moved["variants"][0]["cells"] = {"0": "cell-0-0"}  # relative to the comparison
    (home / "result.json").write_text(json.dumps(moved))
    assert "chart-accuracy" in figures(write_comparison(home))


def test_what_is_no_comparison_is_refused(folder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with pytest.raises(HoneError, match="that of a run"):
        write_comparison(tmp_path / "run")
    with pytest.raises(HoneError, match=r"no result\.json \(did you mean 'adapters'\?\)"):
        write_comparison(folder.parent / "adapter")


def test_the_table_marks_failures_of_single_seeds_and_gives_units(tmp_path: Path) -> None:
    sides = {"full": {**FULL, "statuses": ["finished", "failed", "finished"]}, "lora": LORA}
    home = write_comparison_folder(tmp_path / "partial", sides)
    text = shown(write_comparison(home).read_text())
    assert "seed 1: step 20: the loss is not finite (nan)" in text and "2 of 3" in text
    heads = [column["head"] for column in comparison_page.contents(result(home), home)["columns"]]
    assert heads == ["accuracy", "difference, points", "verdict", "loss", "forgetting", "training time",
                     "tokens/s", "peak memory", "trained parameters", "FLOPs", "seeds"]  # fmt: skip


def test_the_mean_of_curves_is_taken_step_by_step() -> None:
    first = Curve({"step": [0, 10, 20], "tokens": [0, 100, 200]}, [1.0, 2.0, 3.0])
    second = Curve({"step": [0, 10], "tokens": [0, 120]}, [3.0, 6.0])
    average = mean([first, second])
    assert average == Curve({"step": [0, 10, 20], "tokens": [0, 110, 200]}, [2.0, 4.0, 3.0], (1.0, 2.0, 3.0),
                            (3.0, 6.0, 3.0), (2, 2, 1))  # fmt: skip
    assert band(average, 0)["y"] == [3.0, 6.0, 3.0, 3.0, 2.0, 1.0]
    assert line("loss", average, "points", "a", 0)["text"] == [
        " (1.000 to 3.000, 2 seeds)",
        " (2.000 to 6.000, 2 seeds)",
        "",
    ]
    assert mean([]) is None


def test_steps_lie_where_their_tokens_seconds_and_flops_were_spent() -> None:
    rows = [{"step": 1, "tokens": 10, "seconds": 0.5}, {"step": 2, "tokens": 30, "seconds": 1.5}]
    assert Clock(rows, 2.0).at(2) == {"step": 2, "tokens": 40, "seconds": 2.0, "flops": 80}
    assert Clock(rows).at(0) == {"step": 0, "tokens": 0, "seconds": 0}
    assert Clock(rows).at(7) == {"step": 7}
    curve = Clock(rows).curve({0: 1.0, 1: math.nan, 2: 3.0, 7: None})
    assert curve is not None and curve.x["tokens"] == [0, 40] and curve.y == [1.0, 3.0]
    assert Clock(rows).curve({1: math.inf}) is None


def test_long_curves_are_thinned_at_steps_that_all_share() -> None:
    rows = [{"step": step, "loss": float(step)} for step in range(1, 4001)]
    assert list(trained(rows, "loss", False))[:3] == [1, 10, 20] and 4000 in trained(rows, "loss", False)
    assert set(trained(rows[:1000], "loss", False, longest=4000)) < set(trained(rows, "loss", False))


def test_stages_are_counted_on(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        write_run(tmp_path / "run" / f"stage-{number}", steps=6, goal=number / 10)
    logs = read_logs(RunFolder(tmp_path / "run"))
    assert [row["step"] for row in logs.rows] == list(range(1, 19))
    assert logs.evaluations[-1]["step"] == 18 and logs.evaluations[-1]["accuracy"] > 0.85


@pytest.mark.parametrize(("lower", "front"), [
    (False, [(1, 0.5), (2, 0.8), (9, 0.9)]),
    (True, [(1, 0.5), (3, 0.2)]),
])  # fmt: skip
def test_the_front_is_what_nothing_cheaper_matches(lower: bool, front: list[tuple[float, float]]) -> None:
    places = [(9, 0.9), (1, 0.5), (2, 0.8), (2, 0.7), (3, 0.2), (9, 0.8), (10, 0.9)]
    assert pareto(places, lower) == front


def test_recipes_are_compared_by_what_they_say() -> None:
    assert flat({"adapter": {"name": "lora", "rank": 8}, "callbacks": [{"name": "ema", "decay": 0.9}, "early_stop"],
                 "trackers": ["a", "b"], "name": "mine", "clip": None}) == {
        "adapter": "lora", "adapter.rank": "8", "callbacks.0": "ema", "callbacks.0.decay": "0.9",
        "callbacks.1": "early_stop", "trackers": '["a", "b"]', "name": "mine", "clip": "null"}  # fmt: skip
    other = {"adapter": {"name": "lora", "rank": 8}, "steps": 5}
    found = compared([{"adapter": "full", "steps": 5, "out": "a"}, other], ["out"])
    assert found.differing == {"adapter": ["full", "lora"], "adapter.rank": [None, "8"]}
    assert found.same == {"steps": "5"}


def test_figures_are_in_units_for_people() -> None:
    assert [scaled(v) for v in (0, 7, 999, 999.6, 1234, 49_152, 2.5e12)] == [
        "0", "7", "999", "1.00k", "1.23k", "49.2k", "2.50T",
    ]  # fmt: skip
    given = [("peak_memory", 312 * 2**20), ("training_seconds", 200), ("training_seconds", 2.34), ("accuracy", 0.79),
             ("loss", 1e-4), ("loss", math.nan), ("loss", None), ("loss", 12345.0)]  # fmt: skip
    assert [quantity(metric, value) for metric, value in given] == [
        "312 MiB", "3 min 20 s", "2.3 s", "79.0%", "0.0001", "nan", "\N{EN DASH}", "12.3k",
    ]  # fmt: skip
    assert steep([1.0, 2.0]) == {} and steep([None, math.nan]) == {} and steep([0.0, 9.0]) == {}
    assert {"50k", "100k", "1M", "2M"} < set(steep([40_000, 1_200_000])["ticktext"])
