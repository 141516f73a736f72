"""Any runs side by side on one page: their figures, curves, settings and answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from end_to_end.pages import loaded_from_elsewhere, opened, probed, shown, write_run
from hone.errors import HoneError
from hone.evidence.runs_page import labels, write_runs

HOSTILE = "<img src=x onerror=console.error(1)>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three runs: two finished ones of the same name, and one on other data that is not finished."""
    home = tmp_path_factory.mktemp("runs")
    folders = [home / "here" / "sort-1", home / "there" / "sort-1", home / "other"]
    write_run(folders[0], goal=0.9)
    write_run(folders[1], goal=0.4, seed=1, rate=0.004, recipe={"adapter": {"name": "lora", "rank": 8}})
    write_run(folders[2], goal=0.7, seed=2, steps=120, status="running", data="elsewhere", general=False)
    return folders


@pytest.fixture(scope="module")
def page(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the three runs."""
    out = tmp_path_factory.mktemp("page") / "new" / "runs.html"
    assert write_runs(runs, out) == out
    return out


def test_the_page_shows_every_run(page: Path, runs: list[Path]) -> None:
    text = shown(page.read_text())
    after = json.loads((runs[1] / "result.json").read_text())["after"]
    for expected in ("3 runs side by side", "1 here/sort-1", "2 there/sort-1", "3 other", "finished", "not finished",
                     f"{after['accuracy']:.1%}", f"{after['general_loss']:.3f}", "49.2k", "MiB", "tokens/s",
                     "optimizer.lr 0.002 0.004 0.002", "adapter.rank not set 8 not set",
                     "chains elsewhere: 4,000 samples", f"hone sample {runs[0]}"):  # fmt: skip
        assert expected in text, expected
    assert "objective sft" in text.split("settings that are the same")[1]
    assert loaded_from_elsewhere(page) == []


def test_its_charts_are_drawn_within_the_window_and_its_controls_work(page: Path, tmp_path: Path) -> None:
    act = (
        "const one = document.querySelector('select[data-control=x]'); one.value = 'seconds';"
        "one.dispatchEvent(new Event('change')); document.querySelector('button[data-series=\"1\"]').click();"
        "return document.getElementById('chart-loss').data.map(t => [t.x[6], t.visible]);"
    )
    for found in probed(page, tmp_path / "browser", act):
        assert found["log"] == [] and found["page"] <= found["window"]
        assert found["drawn"] == found["plots"] == 7
        (first, shows), (_, hidden), (third, _) = found["found"]
        assert 5.9 < first < 7.3 and shows and not hidden
        assert third is None  # half of its evaluations are still to come


def test_runs_on_other_data_say_so(page: Path, runs: list[Path], tmp_path: Path) -> None:
    for said in ("The runs trained on different data", "evaluated on different data"):
        assert said in page.read_text()
        assert said not in write_runs(runs[:2], tmp_path / "same.html").read_text()


def test_answers_stand_side_by_side_where_they_differ(runs: list[Path], tmp_path: Path) -> None:
    last = [
        {row["where"]: row for row in map(json.loads, (run / "samples.jsonl").read_text().splitlines())}
        for run in runs[:2]
    ]
    differ = [where for where in last[0] if last[0][where]["accuracy"] != last[1][where]["accuracy"]]
    text = shown(write_runs(runs[:2], tmp_path / "runs.html").read_text()).split("Answers at the end")[1]
    assert differ and text.count(" prompt ") == min(12, len(differ))
    for where in differ[:12]:
        assert last[0][where]["prompt"] in text
        assert f"sort-1 · {'right' if last[1][where]['accuracy'] else 'wrong'} {last[1][where]['answer']}" in text


def test_one_run_is_a_page_too_and_one_given_twice_is_shown_once(runs: list[Path], tmp_path: Path) -> None:
    text = shown(write_runs([runs[0], runs[0].parent / "." / "sort-1"], tmp_path / "one.html").read_text())
    assert text.count("1 sort-1") >= 1 and "2 sort-1" not in text and "side by side" not in text


def test_runs_that_have_written_nothing_yet_are_shown(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(f"model: base\nsteps: {len(name)}\nseed: {ord(name)}\n")
    text = shown(write_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "runs.html").read_text())
    assert "seed 97 98" in text and "not finished" in text and "Curves" not in text


def test_names_and_answers_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    script = {"name": "</script><script>console.error('out')</script>"}
    write_run(tmp_path / HOSTILE, recipe={"adapter": script})
    write_run(tmp_path / "plain", seed=1)
    for name in (HOSTILE, "plain"):
        path = tmp_path / name / "samples.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, "answer": f"{script['name']} {name}"}) + "\n" for row in rows))
    page = write_runs([tmp_path / HOSTILE, tmp_path / "plain"], tmp_path / "runs.html")
    assert script["name"] not in page.read_text() and HOSTILE not in page.read_text()
    assert HOSTILE in shown(page.read_text())
    dom, log = opened(page, tmp_path / "browser")
    assert "CONSOLE" not in log and "<img" not in dom


def test_only_its_own_page_is_ever_replaced(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "runs.html"
    write_runs(runs[:1], out)
    assert "2 runs side by side" in write_runs(runs[:2], out).read_text()
    for text in ("", "mine", "<meta name=generator>" + "x" * 9000, (runs[0] / "recipe.yaml").read_text()):
        out.write_text(text)
        with pytest.raises(HoneError, match="is not a page of runs side by side"):
            write_runs(runs, out)
        assert out.read_text() == text
    with pytest.raises(HoneError, match="is a folder"):
        write_runs(runs, tmp_path)


def test_what_is_no_run_is_refused_and_nothing_is_written(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(HoneError, match="is not a run folder"):
        write_runs([runs[0], runs[0].parent / "sort-2"], tmp_path / "runs.html")
    with pytest.raises(HoneError, match="there is no run to show"):
        write_runs([], tmp_path / "runs.html")
    assert list(tmp_path.iterdir()) == []


def test_runs_of_a_comparison_are_called_by_their_cells(tmp_path: Path) -> None:
    for name in ("lora-seed-0", "full-seed-0"):
        write_run(tmp_path / "cells" / name / "run")
        (tmp_path / "cells" / name / "cell.json").write_text("{}")
    runs = [tmp_path / "cells" / name / "run" for name in ("lora-seed-0", "full-seed-0")]
    assert "1 lora-seed-0 2 full-seed-0" in shown(write_runs(runs, tmp_path / "runs.html").read_text())


def test_labels_are_as_short_as_they_can_be() -> None:
    assert labels([Path("/r/a"), Path("/r/b")]) == ["a", "b"]
    assert labels([Path("/x/r/a"), Path("/y/r/a"), Path("/y/r/b")]) == ["x/r/a", "y/r/a", "b"]
    assert labels([Path("/a"), Path("/x/a")]) == ["/a", "x/a"]
