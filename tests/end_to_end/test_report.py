"""The report page opens in a browser without a network, draws its charts and complains of nothing."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from end_to_end.pages import figures, loaded_from_elsewhere, opened, probed, shown, write_run
from end_to_end.support import hone, train
from hone.evidence.report import write_report


@pytest.fixture(scope="module")
def document(full_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The opened report of a finished run, and the browser's log."""
    yield opened(full_run / "report.html", tmp_path_factory.mktemp("browser"))


def test_nothing_is_loaded_from_elsewhere(full_run: Path) -> None:
    assert loaded_from_elsewhere(full_run / "report.html") == []


def test_the_page_is_no_wider_than_its_window(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    for found in probed(write_report(tmp_path / "run"), tmp_path / "browser"):
        assert found["log"] == [] and found["page"] <= found["window"]
        assert found["drawn"] == found["plots"] == 6


def test_a_loss_on_other_text_is_a_loss_and_no_share(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    page = write_report(tmp_path / "run").read_text()
    after = json.loads((tmp_path / "run" / "result.json").read_text())["after"]["general_loss"]
    assert f"<b>{after:.3f}</b>" in page and "general_loss" not in shown(page)


def test_every_chart_is_drawn_and_the_console_is_silent(document: tuple[str, str], full_run: Path) -> None:
    dom, log = document
    assert "CONSOLE" not in log and "Uncaught" not in log, log
    charts = re.findall(r'id="(chart-[a-z_]+)"', (full_run / "report.html").read_text())
    assert {"chart-loss", "chart-accuracy", "chart-lr", "chart-grad_norm", "chart-speed"} <= set(charts)
    for chart in charts:
        place = dom.index(f'id="{chart}"')
        assert 'class="main-svg"' in dom[place : place + 3000], f"{chart} was not drawn"
    assert dom.count('class="scatterlayer') >= len(set(charts))


def test_the_page_says_what_happened(document: tuple[str, str], full_run: Path) -> None:
    dom, _ = document
    text = shown(dom)
    for expected in ("held-out loss", "training time", "peak memory", "trained parameters", "batch_tokens: 256",
                     "What does animal", "transformers"):  # fmt: skip
        assert expected in text, expected


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    write_run(tmp_path / "run", status="failed")
    each_step = figures(write_report(tmp_path / "run"))["chart-loss"]["traces"][0]["y"]
    assert each_step[-1] is None and min(each_step[:-1]) > 0


def test_the_figures_of_two_stages_are_two_curves(tmp_path: Path) -> None:
    for number in (1, 2):
        write_run(tmp_path / "run" / f"stage-{number}", steps=30, seed=number)
    for name in ("recipe.yaml", "result.json"):
        shutil.copy(tmp_path / "run" / "stage-2" / name, tmp_path / "run" / name)
    charts = figures(write_report(tmp_path / "run"))
    each_step, smoothed, held = charts["chart-loss"]["traces"]
    assert each_step["x"] == smoothed["x"] == [*range(1, 31), 31, *range(31, 61)]
    assert each_step["y"].index(None) == smoothed["y"].index(None) == 30 and each_step["y"].count(None) == 1
    assert smoothed["y"][31] == each_step["y"][31]  # the second one's mean begins anew
    assert held["x"][held["y"].index(None) - 1] == held["x"][held["y"].index(None) + 1] == 30
    assert charts["chart-accuracy"]["traces"][0]["y"].count(None) == 1


@pytest.mark.parametrize("text", ["</script><script>console.error('out')</script>", "<img src=x onerror=alert(1)>"])
def test_data_cannot_break_out_of_the_page(tiny_model: Path, tmp_path: Path, text: str) -> None:
    data, out = tmp_path / "data.jsonl", tmp_path / "run"
    data.write_text((json.dumps({"question": text, "answer": text}) + "\n") * 20)
    train(tiny_model, data, out, steps=1, eval_samples=2, name=text[:20])
    assert text not in (out / "report.html").read_text()
    dom, log = opened(out / "report.html", tmp_path / "browser")
    assert "CONSOLE" not in log and "<img" not in dom


def test_a_report_is_there_for_an_interrupted_run_and_a_run_without_evaluation(
    tiny_model: Path, qa_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    data = {"name": "files", "path": str(qa_file), "holdout": 0}
    train(tiny_model, qa_file, out, data=data, steps=1)
    assert not (out / "evaluations.jsonl").exists() and (out / "report.html").stat().st_size > 1_000_000
    assert hone("resume", out).status == 0
