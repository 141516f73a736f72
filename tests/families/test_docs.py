"""The documentation: its pages are those of the present catalogue, and the site needs nothing from elsewhere."""

from __future__ import annotations

import functools
import html
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import markdown
import pytest

from families.test_catalogue import CHECK, SIDES, Results, record, results  # noqa: F401 - the fixture is used by name
from hone import catalogue
from hone.errors import HoneError
from hone.evidence import pages, store
from hone.evidence.verify import every_claim

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@functools.cache
def committed() -> dict[str, str]:
    """Return the pages that belong to what is committed."""
    return pages.pages(DOCS)


def test_the_committed_pages_are_those_of_the_catalogue() -> None:
    made = committed()
    stale = [path for path, text in made.items() if not (DOCS / path).exists() or (DOCS / path).read_text() != text]
    gone = sorted(pages.existing(DOCS) - made.keys())
    assert not stale + gone, f"these pages are not those of the catalogue, run `make docs`: {stale + gone}"


def test_stored_results_tell_what_their_claims_say() -> None:
    for one in every_claim().values():
        file = DOCS / "evidence" / "claims" / one.file
        kept = json.loads(file.read_text()) if file.exists() else {}
        about = one.about()
        assert {key: kept.get(key, told) for key, told in about.items()} == about, f"run: hone verify {one.id} --stale"


def test_every_entry_has_a_page_of_its_own_with_a_safe_name() -> None:
    addresses = [pages.address(entry.kind, entry.name) for entry in catalogue.entries()]
    assert len(set(addresses)) == len(addresses) and set(addresses) < committed().keys()
    assert all(re.fullmatch(r"methods/[a-z]+/[a-z0-9_.-]+\.md", address) for address in addresses)
    assert pages.address("adapter", "peft:") == "methods/adapter/peft-bridge.md"


def test_two_parts_never_share_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = [entry for entry in catalogue.entries("adapter") if entry.name == "lora"] * 2
    monkeypatch.setattr(pages, "entries", lambda kind=None: twice)
    with pytest.raises(HoneError, match="rename adapter 'lora'"):
        pages.pages(DOCS)


def test_writing_again_changes_nothing_and_removes_only_what_was_generated(tmp_path: Path) -> None:
    (tmp_path / "design.md").write_text("# By hand\n")
    assert sorted(pages.write(tmp_path)) == sorted(pages.pages(tmp_path))
    assert pages.write(tmp_path) == []
    old = tmp_path / "methods" / "adapter" / "gone.md"
    old.write_text(f"{pages.MARKER}\n\n# gone\n")
    (tmp_path / "methods" / "mine.md").write_text("# By hand, with the marker later\n" + pages.MARKER)
    (tmp_path / "papers.md").write_text(f"{pages.MARKER}\nold\n")
    assert pages.write(tmp_path) == ["papers.md", "methods/adapter/gone.md"]
    assert not old.exists() and (tmp_path / "methods" / "mine.md").exists() and (tmp_path / "design.md").exists()


def test_a_page_by_hand_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "papers.md").write_text("# Mine\n")
    with pytest.raises(HoneError, match=r"papers\.md was written by hand"):
        pages.write(tmp_path)
    assert (tmp_path / "papers.md").read_text() == "# Mine\n"


def test_a_part_has_all_of_it_on_its_page(results: Results, tmp_path: Path) -> None:  # noqa: F811
    results(record("adapter", "lora", "forgets-less", source="then"), record("adapter", "lora", "z", "contradicted"))
    page = pages.pages(tmp_path)["methods/adapter/lora.md"]
    for text in (
        "# lora", "verdict: **mixed (stale)**", "| `rank` | integer (at least 1) | `8` | rank of the product. |",
        "```yaml\nadapter: lora\ndata: chains\nsteps: 100\n```",
        "[LoRA: Low-Rank Adaptation of Large Language Models](https://arxiv.org/abs/2106.09685)", "## Claim",
        "## Deviations", "### forgets-less: holds (stale)", "### z: contradicted\n", "hone verify lora",
        "| forgetting | lower by at least 0.05 | -0.3312 (interval -0.4 to -0.25, p 0.0001) | holds |",
        "| metric | side | seed 3 | seed 7 |", "| forgetting | full training | 0.5123 | 0.6 |",
        "- LoRA rank 8: `adapter.rank=8, optimizer.lr=2 (tuned)`",
        "[all figures](../../evidence/claims/adapter.lora.forgets-less.json)",
    ):  # fmt: skip
        assert text in page, text
    assert page == pages.pages(tmp_path)["methods/adapter/lora.md"]
    assert "Args:" not in page and page.startswith(pages.MARKER + "\n")


def test_the_indexes_show_every_paper_and_verdict(results: Results, tmp_path: Path) -> None:  # noqa: F811
    results(record("adapter", "lora", "a", "not at this scale"), record("adapter", "gone", "b"))
    made = pages.pages(tmp_path)
    assert "| [lora](adapter/lora.md) | not at this scale |" in made["methods/index.md"]
    rows = [line for line in made["papers.md"].splitlines() if line.startswith("| [")]
    titles = {title for e in catalogue.entries() for title, _ in e.papers}
    assert len(rows) == len(titles) and _titles(rows) == sorted(_titles(rows))
    (dora,) = [row for row in rows if "DoRA" in row]
    assert "(https://arxiv.org/abs/2402.09353) | [adapter lora](methods/adapter/lora.md) | not at this scale |" in dora
    assert "| [adapter lora](../methods/adapter/lora.md) | lora is less of a nuisance. |" in made["evidence/index.md"]
    assert "| adapter gone | gone is less" in made["evidence/index.md"]  # no link to a page that is not there


def _titles(rows: list[str]) -> list[str]:
    return [row.partition("](")[0].casefold() for row in rows]


def test_a_comparison_has_a_page_with_its_variants_from_best_to_worst(tmp_path: Path) -> None:
    source = DOCS / "evidence" / "compare-quickstart.json"
    (tmp_path / "evidence").mkdir()
    shutil.copy(source, tmp_path / "evidence" / "compare-mine.json")
    made = pages.pages(tmp_path)
    page, result = made["evidence/compare-mine.md"], json.loads(source.read_text())
    ranked = [f"| {row['label']} | {row['summary']['accuracy']['mean']:.1%} | " for row in result["variants"]]
    places = [page.index(start) for start in ranked]
    assert places == sorted(places) and result["command"] in page and "(compare-mine.json)" in page
    assert "- [compare-mine.md](compare-mine.md)" in made["evidence/index.md"]


def test_a_recipe_has_its_file_on_its_page() -> None:
    text = (catalogue.SHIPPED / "quickstart.yaml").read_text()
    page = committed()["methods/recipe/quickstart.md"]
    assert f"```yaml\n{text}```" in page and "hone run quickstart" in page


@pytest.mark.parametrize(
    ("paper", "address"),
    [("arXiv:2106.09685", "https://arxiv.org/abs/2106.09685"), ("doi:10.1/x", "https://doi.org/10.1/x"),
     ("https://a.b/c", "https://a.b/c")],
)  # fmt: skip
def test_an_identifier_becomes_a_link(paper: str, address: str) -> None:
    assert pages.link(paper) == address


TEXTS = [
    "a * b * c, x_i and _y_, [0, 1) [a](b), <b>bold</b> & w <- w - 1", 'a glob such as "data/**/*.jsonl" ~~no~~ | yes',
    "# no title", "- no list", "1. no list", "3) no list", "+ no list", r"\* stays", "sum_t w_t [(1 - s) (-log p_t)]",
    *(text for e in catalogue.entries() for text in (e.summary, e.claim, e.deviations, *(o.doc for o in e.options))),
    *(block for e in catalogue.entries() if e.kind != "recipe" for block in e.prose.split("\n\n")),
]  # fmt: skip


def test_prose_comes_through_markdown_as_it_is() -> None:
    """One test for all 2,000 texts: as one each they took more time to be counted than to be read."""
    assert [text for text in dict.fromkeys(TEXTS) if text and not _as_it_is(text)] == []


def _as_it_is(text: str) -> bool:
    shown = markdown.markdown(pages.plain(text), extensions=["tables"])
    marks = set(re.findall(r"</?(\w+)", shown))
    read = html.unescape(re.sub(r"<[^>]*>", "", shown))
    return shown.startswith("<p>") and marks <= {"p", "code"} and read == " ".join(text.replace("`", "").split())


def test_equations_are_set_apart_from_prose() -> None:
    made = committed()
    assert "```text\nm <- b1 m + (1 - b1) g;  v <- b2 v" in made["methods/optimizer/adamw.md"]
    assert "```text\nheight = (1 + cos(pi t / T_i)) / 2" in made["methods/schedule/cosine.md"]
    assert made["methods/data/files.md"].count("```") == 2  # the recipe alone


@pytest.mark.parametrize(
    ("link", "moved"),
    [("docs/design.md#x", "design.md#x"), ("docs/evidence", "evidence/index.md"),
     ("docs/evidence/", "evidence/index.md"),
     ("docs/evidence/claims", "evidence/index.md"), ("docs/evidence/b.json", "evidence/b.json"),
     ("CONTRIBUTING.md", "CONTRIBUTING.md"), ("README.md#a", "guide.md#a"), ("https://a.b/docs/x", "https://a.b/docs/x")],
)  # fmt: skip
def test_links_of_the_root_lead_on_from_the_documentation(link: str, moved: str) -> None:
    assert pages.relinked(f"see [this]({link}), docs/x") == f"see [this]({moved}), docs/x"


class Page(HTMLParser):
    """Collects what a page loads, what it links to, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.loads += [given[name] for name in ("src", "data", "poster", "background") if name in given]
        self.loads += [part.split()[0] for part in given.get("srcset", "").split(",") if part.strip()]
        self.loads += re.findall(r"url\(([^)]*)\)", given.get("style", ""))
        if "href" in given:
            (self.links if tag == "a" else self.loads).append(given["href"])
        if tag == "form" and "action" in given:
            self.links.append(given["action"])


def external(address: str) -> bool:
    return urlsplit(address.strip("'\" ")).scheme not in ("", "data") or address.strip("'\" ").startswith("//")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the documentation with two more results, as `make docs` does."""
    project = tmp_path_factory.mktemp("project")
    shutil.copytree(DOCS, project / "docs")
    for name in ("mkdocs.yml", *pages.ROOT_PAGES):
        shutil.copy(ROOT / name, project / name)
    (project / "src").symlink_to(ROOT / "src")
    with pytest.MonkeyPatch.context() as patch:
        folder = project / "docs" / "evidence" / "claims"
        folder.mkdir(exist_ok=True)
        patch.setattr(store, "RESULTS", folder)
        for one in (record("adapter", "lora", "made-up"), record("optimizer", "torch:", "made-up")):
            (folder / f"{one['kind']}.{one['name'].replace(':', '-')}.made-up.json").write_text(json.dumps(one))
        pages.write(project / "docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(project / "site")]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # a notice of the theme's authors, not about this site
    done = subprocess.run(command, cwd=project, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return project / "site"


@pytest.fixture(scope="module")
def parsed(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text()) for path in site.rglob("*.html")}


def test_the_site_loads_nothing_from_elsewhere(site: Path, parsed: dict[Path, Page]) -> None:
    assert len(parsed) > len(catalogue.entries()) and all(page.loads for page in parsed.values())
    assert [(path.name, a) for path, page in parsed.items() for a in page.loads if external(a)] == []
    styles = list(site.rglob("*.css"))
    for path in styles:
        text = path.read_text()
        assert "@import" not in text and [a for a in re.findall(r"url\(([^)]*)\)", text) if external(a)] == []
    assert styles and not any("mermaid" in path.read_text() for path in parsed)  # the theme would fetch its renderer


def test_every_link_inside_the_site_leads_somewhere(site: Path, parsed: dict[Path, Page]) -> None:
    seen, checked = set(), set()
    for path, page in parsed.items():
        if path.name == "404.html":  # is served from any depth, so its links are absolute
            continue
        for address in (*page.links, *page.loads):
            if (path.parent, address) in seen:  # the navigation is the same on all pages of a folder
                continue
            seen.add((path.parent, address))
            target = unquote(urlsplit(address).path)
            if not external(address) and target:
                assert (path.parent / target).exists(), f"{path.relative_to(site)}: {address}"
                checked.add((path.parent / target).resolve().relative_to(site.resolve()).as_posix())
    made_up = {f"evidence/claims/{part}.made-up.json" for part in ("adapter.lora", "optimizer.torch-")}
    named = {"guide", "papers", "design", "evidence/index", "CONTRIBUTING", "methods/optimizer/torch-bridge"}
    assert {*made_up, "evidence/quickstart.json", *(f"{page}.html" for page in named)} <= checked


def test_every_method_is_in_the_table_and_beside_the_others_of_its_kind(site: Path) -> None:
    table = (site / "methods" / "index.html").read_text()
    beside: dict[str, str] = {}
    for entry in catalogue.entries():
        target = pages.address(entry.kind, entry.name).replace(".md", ".html")
        assert f'href="{target.removeprefix("methods/")}"' in table, target
        beside.setdefault(entry.kind, (site / target).read_text())  # the navigation shows the kind that one is in
        assert f'href="{Path(target).name}"' in beside[entry.kind], target
