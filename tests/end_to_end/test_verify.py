"""Claims are put to the test: trials run, results are stored, and show when the code has changed since."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from end_to_end.comparisons import small
from end_to_end.support import Outcome, hone
from hone.evidence import claims, source
from hone.evidence.claims.base import REGISTRY
from hone.evidence.pool import Interrupted, LocalPool

TRIALS = '''"""Claims that a test makes."""

from hone.evidence.claims.base import Check, Side, Trial, claim

RECIPE = {recipe!r}
FULL = Side(label="full training", settings={{"adapter": "full"}})
LORA = Side(label="LoRA", settings={{"adapter": {{"name": "lora", "rank": 2}}}})
STEEP = Side(label="a steep one", settings={{"optimizer": {{"name": "adamw", "lr": 1e30}}}})
FEWER = Check(metric="trained", direction="lower", effect=0.5, relative=True)
MORE = Check(metric="trained", direction="higher", effect=10)
SAME = Check(metric="files", direction="same", effect=0.5)


def count(run):
    return {{"files": float(len(list(run.iterdir())))}}


@claim("adapter", "lora", "trains-less-here")
def trains_less(folder):
    """LoRA trains few
    tensors.

    Task: three steps of questions.

    Finding: it does.
    """
    paper = ("LoRA: Low-Rank Adaptation of Large Language Models", "arXiv:2106.09685")
    return Trial(recipe=RECIPE, baseline=FULL, method=LORA, checks=(FEWER, SAME), seeds=2, figures=count, paper=paper)


@claim("adapter", "lora", "trains-more-here")
def trains_more(folder):
    """LoRA trains more."""
    return Trial(recipe=RECIPE, baseline=FULL, method=LORA, checks=(FEWER, MORE), seeds=2)


@claim("optimizer", "adamw", "breaks-here")
def breaks(folder):
    """AdamW bears any learning rate."""
    return Trial(recipe=RECIPE, baseline=FULL, method=STEEP, checks=(Check(metric="loss", direction="lower"),), seeds=2)
'''
LESS, OTHER, BREAKS = "adapter.lora.trains-less-here", "adapter.lora.trains-more-here", "optimizer.adamw.breaks-here"
Edit = Callable[[str, str, str], None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, qa_file: Path) -> Iterator[Path]:
    """A folder to verify in, and a copy of the package with claims of its own that hashes are taken of."""
    top = tmp_path_factory.mktemp("verify")
    copy = shutil.copytree(source.ROOT, top / "hone", ignore=shutil.ignore_patterns("base", "__pycache__", "results"))
    recipe = small(tiny_model, qa_file, general_data=None, eval_samples=0, name="tiny", adapter="full")
    (copy / "evidence" / "claims" / "of_a_test.py").write_text(TRIALS.format(recipe=recipe))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(source, "ROOT", copy)
        patch.setattr(claims, "__path__", [*claims.__path__, str(copy / "evidence" / "claims")])
        patch.chdir(top)
        forget()
        yield top
    forget()
    for name in (LESS, OTHER, BREAKS):
        REGISTRY.pop(name, None)
    sys.modules.pop("hone.evidence.claims.of_a_test", None)


def forget() -> None:
    source._read.cache_clear()
    source.claims.cache_clear()


def verify(*arguments: str) -> Outcome:
    return hone("verify", *arguments, "--out", "found", "--jobs", "2")


def stored(name: str) -> dict[str, Any]:
    return json.loads(Path("found", f"{name}.json").read_text())


@pytest.fixture(scope="module")
def verified(home: Path) -> Outcome:
    """What was said of a claim that holds."""
    return verify(LESS)


def test_a_claim_that_holds_is_stored_with_all_that_it_rests_on(verified: Outcome) -> None:
    assert verified.status == 0, verified.err
    assert f"{LESS}: holds" in verified.out and "1 claims run, 0 up to date; results are in found" in verified.out
    assert "LoRA trains few tensors." in verified.err
    record = stored(LESS)
    about = [record[name] for name in ("kind", "name", "claim", "says", "task", "finding")]
    assert about == [
        "adapter", "lora", "trains-less-here", "LoRA trains few tensors.", "three steps of questions.", "it does.",
    ]  # fmt: skip
    assert (record["verdict"], record["reason"], record["seeds"]) == ("holds", "", [0, 1])
    assert record["paper"] == {
        "title": "LoRA: Low-Rank Adaptation of Large Language Models", "id": "arXiv:2106.09685"
    }  # fmt: skip
    fewer, same = record["checks"]
    assert fewer["expected"] == "lower by at least 50%" and fewer["verdict"] == same["verdict"] == "holds"
    sides = record["sides"]
    assert (
        fewer["difference"] == sides["method"]["values"]["trained"][0] - sides["baseline"]["values"]["trained"][0] < 0
    )
    assert same["difference"] == 0 and len(sides["method"]["values"]["files"]) == 2
    assert sides["method"]["label"] == "LoRA" and sides["baseline"]["settings"] == {"adapter": "full"}
    assert len(record["source"]) == 64 and record["seconds"] > 0 and record["versions"]["hone"] and record["machine"]
    assert not list(Path("runs/cells").rglob("*.safetensors"))  # figures are kept, models are not


def test_a_claim_is_due_again_when_its_code_has_changed(verified: Outcome, home: Path) -> None:
    def due() -> bool:
        forget()
        return LESS in verify(LESS, "--stale", "--list").out

    lora, file = home / "hone" / "adapters" / "lora.py", home / "hone" / "evidence" / "claims" / "of_a_test.py"
    before = {path: path.read_text() for path in (lora, file)}
    assert not due() and LESS in verify(LESS, "--list").out
    again = verify(LESS, "--stale")
    assert again.status == 0 and "0 claims run, 1 up to date" in again.out
    for path, old, new, changed in (
        (lora, '"""W x + s B A x, with W frozen.', '"""Something else.', False),
        (lora, "class Decomposed(LowRank):", "class Decomposed(LowRank):  # with a norm", False),
        (lora, "    def delta(self) -> Tensor:", "    extra = 1\n\n    def delta(self) -> Tensor:", True),
        (file, "seeds=2, figures", "seeds=3, figures", True),
        (file, '"""LoRA trains few', '"""LoRA trains very few', False),
    ):
        assert before[path].count(old) >= 1
        path.write_text(before[path].replace(old, new, 1))
        assert due() == changed, new
        path.write_text(before[path])
    assert not due()


def test_a_recheck_keeps_what_one_seed_gives_again(verified: Outcome, home: Path) -> None:
    lora = home / "hone" / "adapters" / "lora.py"
    before, kept = lora.read_text(), stored(LESS)
    lora.write_text(
        before.replace("    def delta(self) -> Tensor:", "    extra = 1\n\n    def delta(self) -> Tensor:", 1)
    )
    forget()
    said = verify(LESS, "--recheck")
    assert said.status == 0 and f"{LESS}: as before" in said.out and "1 of 1 stale results stand" in said.out
    now = stored(LESS)
    assert now["source"] != kept["source"] and now["checks"] == kept["checks"] and now["date"] == kept["date"]
    assert now["rechecked"]["seed"] == 0 and now["rechecked"]["measured_with"] == kept["source"]
    assert "0 claims run, 1 up to date" in verify(LESS, "--stale").out
    assert not list((home / "runs" / "cells").rglob("*.safetensors"))

    lora.write_text(before)  # stale once more, and a figure that did not come from this code
    forget()
    now["sides"]["method"]["values"]["loss"][0] *= 1.1
    path = Path("found", f"{LESS}.json")
    path.write_text(json.dumps(now))
    said = verify(LESS, "--recheck")
    assert f"{LESS}: differs" in said.out and "LoRA: loss was" in said.out and f"hone verify {LESS} --stale" in said.out
    assert json.loads(path.read_text()) == now
    path.write_text(json.dumps(kept))
    assert "0 of 0 stale results stand" in verify(LESS, "--recheck").out


def test_a_recheck_answers_the_question_that_was_asked_and_no_other(verified: Outcome, home: Path) -> None:
    path = Path("found", f"{LESS}.json")
    kept = path.read_text()
    for key, value, what in (
        ("seeds", [0, 1, 2], "the number of seeds has changed"),
        ("recipe", {"steps": 1}, "the recipe has changed"),
        ("checks", [], "the checks have changed"),
    ):
        path.write_text(json.dumps({**json.loads(kept), "source": "an older one", key: value}))
        assert what in verify(LESS, "--recheck").out
    path.write_text(kept)


def test_contradicted_claims_are_findings_and_share_the_cells_of_others(verified: Outcome, home: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (home / "runs" / "cells").rglob("*") if path.is_file()}
    said = verify("lora.trains-more-here")
    assert said.status == 0 and f"{OTHER}: contradicted" in said.out
    assert [check["verdict"] for check in stored(OTHER)["checks"]] == ["holds", "contradicted"]
    assert stored(OTHER)["paper"] is None and stored(OTHER)["verdict"] == "contradicted"
    after = {path: path.stat().st_mtime_ns for path in (home / "runs" / "cells").rglob("*") if path.is_file()}
    assert after == before


def test_a_side_that_fails_makes_the_claim_failed_with_its_reason(home: Path) -> None:
    said = verify(BREAKS, "--json")
    (record,) = json.loads(said.out)
    assert said.status == 1 and record == stored(BREAKS)
    assert record["verdict"] == "failed" and "nan" in record["reason"]
    assert record["checks"][0]["low"] is None and record["checks"][0]["verdict"] == ""
    assert record["sides"]["method"]["values"] == {} and len(record["sides"]["baseline"]["values"]["loss"]) == 2


def test_claims_are_listed_by_part_kind_and_name_without_running(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LocalPool, "run", None)
    listed = hone("verify", "lora", "--list").out.splitlines()
    assert f"{LESS}: LoRA trains few tensors." in listed and all(line.startswith("adapter.lora.") for line in listed)
    assert set(listed) <= set(hone("verify", "adapter", "--list").out.splitlines())
    assert set(listed) | {f"{BREAKS}: AdamW bears any learning rate."} <= set(
        hone("verify", "all", "--list").out.splitlines()
    )
    assert hone("verify", "adapter.lora", LESS, "--list").out.splitlines() == listed


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter.lora.trains-less-hree", f"(did you mean '{LESS}'?)"),
        ("lorra", "(did you mean 'lora'?)"),
        ("qqq", "(see: hone verify all --list)"),
    ],
)
def test_unknown_names_get_the_nearest_one(home: Path, name: str, said: str) -> None:
    found = hone("verify", name)
    assert found.status == 2 and found.err == f"hone: there is no claim about '{name}' {said}\n"


def test_a_stopped_verification_says_that_it_can_go_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*given: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(LocalPool, "run", stop)
    shutil.rmtree(home / "runs" / "cells", ignore_errors=True)
    said = verify(BREAKS)
    assert said.status == 130 and "stopped; finished runs are kept, and the same command goes on" in said.err
