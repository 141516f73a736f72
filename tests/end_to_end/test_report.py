"""The report page opens in a browser without a network, draws its charts and complains of nothing."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from end_to_end.support import hone, train

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr",
    "--v=0", "--dump-dom", "--virtual-time-budget=5000",
)  # fmt: skip


class Resources(HTMLParser):
    """Collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        for name in ("src", "href", "data", "srcset", "poster"):
            if given.get(name) and not (tag == "a" and name == "href"):
                self.loaded.append(str(given[name]))


def opened(page: Path, folder: Path) -> tuple[str, str]:
    """Return the document that a browser makes of a page, and what it logs."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        pytest.skip("there is no Chromium here")
    command = [browser, *QUIET, f"--user-data-dir={folder}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout, done.stderr


@pytest.fixture(scope="module")
def document(full_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The opened report of a finished run, and the browser's log."""
    yield opened(full_run / "report.html", tmp_path_factory.mktemp("browser"))


def test_nothing_is_loaded_from_elsewhere(full_run: Path) -> None:
    page = (full_run / "report.html").read_text()
    found = Resources()
    found.feed(page)
    assert all(source.startswith(("#", "data:")) for source in found.loaded), found.loaded
    styles = "".join(re.findall(r"<style.*?</style>", page, re.DOTALL))
    assert "@import" not in styles and not re.search(r"url\((?!['\"]?data:)", styles)


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
    text = re.sub(r"<[^>]*>", " ", re.sub(r"<(script|style).*?</\1>", " ", dom, flags=re.DOTALL))
    for expected in ("held-out loss", "training time", "peak memory", "trained parameters", "batch_tokens: 256",
                     "What does animal", "transformers"):  # fmt: skip
        assert expected in text, expected


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
