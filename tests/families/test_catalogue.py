"""The catalogue: what it lists, how it shows evidence, that its snippets are recipes, and what a search finds."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
import yaml
from pydantic import ConfigDict, Field, TypeAdapter
from typer.testing import CliRunner

from hone import catalogue, cli, parts, search
from hone import options as opt
from hone.errors import HoneError
from hone.evidence import source, store
from hone.recipe import check, read_yaml, shipped

SIDES = {
    "baseline": {"label": "full training", "settings": {"adapter": "full"}, "tuned": {"optimizer.lr": 0.002},
                 "values": {"loss": [0.5, None], "forgetting": [0.51234567, 0.6], "peak_memory": [123456789, 1.0]}},
    "method": {"label": "LoRA rank 8", "settings": {"adapter.rank": 8, "optimizer.lr": 1}, "tuned": {"optimizer.lr": 2},
               "values": {"loss": [0.4, 0.5], "forgetting": [0.2, 0.25], "peak_memory": [1.0, 1.0]}},
}  # fmt: skip
CHECK = {"metric": "forgetting", "expected": "lower by at least 0.05", "difference": -0.3312, "low": -0.4,
         "high": -0.25, "p": 0.0001, "verdict": "holds"}  # fmt: skip
PEOPLE = CliRunner()


def record(kind: str, name: str, claim: str, verdict: str = "holds", **changes: Any) -> dict[str, Any]:
    """Return a stored result whose source is "now", which the fixture takes for the present one."""
    return {
        "kind": kind, "name": name, "claim": claim, "says": f"{name} is less of a nuisance.", "paper": None,
        "task": "a task", "verdict": verdict, "reason": "", "checks": [CHECK], "finding": "It is.", "seeds": [3, 7],
        "sides": SIDES, "recipe": {}, "seconds": 131.4, "machine": "AMD EPYC, 2 cores",
        "versions": {"hone": "0.1.0", "torch": "2.9"}, "source": "now", "date": "2026-11-21", **changes,
    }  # fmt: skip


Results = Callable[..., None]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    """Replace the stored results by those that a test gives; their code is as it was unless their source is old."""
    folder = tmp_path / "results"
    folder.mkdir()
    monkeypatch.setattr(store, "RESULTS", folder)
    monkeypatch.setattr(source, "current", lambda kind, name, claim: "now")

    def put(*records: dict[str, Any]) -> None:
        for one in records:
            path = folder / f"{one['kind']}.{one['name'].replace(':', '-')}.{one['claim']}.json"
            path.write_text(json.dumps(one))

    return put


def said(*arguments: str) -> str:
    """Return what a command prints."""
    done = PEOPLE.invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def listed(name: str, kind: str = "adapter") -> dict[str, Any]:
    return next(entry for entry in json.loads(said("list", kind, "--json")) if entry["name"] == name)


def test_every_entry_of_the_list_has_the_same_shape(results: Results) -> None:
    results(record("adapter", "lora", "forgets-less"), record("recipe", "quickstart", "learns"))
    everything = json.loads(said("list", "--json"))
    assert len(everything) == len(parts.catalogue()) + len(shipped())
    for entry in everything:
        assert list(entry) == ["kind", "name", "summary", "papers", "claim", "verdict", "stale", "evidence",
                               "deviations", "options"]  # fmt: skip
        assert all(isinstance(entry[key], str) for key in ("kind", "name", "summary", "claim", "deviations"))
        assert all(paper.keys() == {"title", "id"} for paper in entry["papers"]) and entry["summary"]
        assert all(option.keys() == {"name", "type", "default", "doc"} for option in entry["options"])
        assert all(found.keys() == {"claim", "says", "verdict", "stale", "file"} for found in entry["evidence"])
        assert (entry["verdict"] is None) == (not entry["evidence"])
    with_evidence = {(entry["kind"], entry["name"]) for entry in everything if entry["evidence"]}
    assert with_evidence == {("adapter", "lora"), ("recipe", "quickstart")}
    assert Path(listed("lora")["evidence"][0]["file"]).name == "adapter.lora.forgets-less.json"


@pytest.mark.parametrize(
    ("verdicts", "common"),
    [([], None), (["holds"], "holds"), (["failed", "failed"], "failed"), (["holds", "contradicted"], "mixed"),
     (["not at this scale", "not at this scale", "holds"], "mixed")],
)  # fmt: skip
def test_the_verdict_is_what_all_claims_share(results: Results, verdicts: list[str], common: str | None) -> None:
    results(*(record("adapter", "lora", f"claim-{i}", verdict) for i, verdict in enumerate(verdicts)))
    assert listed("lora")["verdict"] == common
    (line,) = [line for line in said("list", "adapter").splitlines() if line.split()[:2] == ["adapter", "lora"]]
    assert line.split("lora", 1)[1].strip().startswith(f"{common or '-'}  ")


def test_one_changed_source_makes_the_part_stale(results: Results) -> None:
    results(
        record("adapter", "lora", "a"), record("adapter", "lora", "b", source="then"), record("adapter", "full", "c")
    )
    assert [found["stale"] for found in listed("lora")["evidence"]] == [False, True]
    assert listed("lora")["stale"] is True and listed("full")["stale"] is False and listed("peft:")["stale"] is False
    lines = {line.split()[1]: line for line in said("list", "adapter").splitlines()}
    assert "holds (stale)" in lines["lora"] and "stale" not in lines["full"] + lines["peft:"]
    shown = said("show", "lora")
    assert "a: holds\n" in shown and "b: holds (stale)\n" in shown


def test_a_claim_that_is_gone_is_stale(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "current", lambda kind, name, claim: None)
    results(record("adapter", "lora", "a"))
    assert listed("lora")["stale"] is True


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[1]", "lacks kind"), ('{"kind": "adapter"}', "lacks name"),
     (json.dumps(record("adapter", "lora", "a", "maybe")), "got 'maybe'")],
)  # fmt: skip
def test_a_file_that_is_no_result_is_named(results: Results, content: str, message: str) -> None:
    (store.RESULTS / "adapter.lora.a.json").write_text(content)
    with pytest.raises(HoneError, match=f"adapter.lora.a.json: .*{message}"):
        catalogue.entries()


def test_results_are_found_by_kind_and_name(results: Results) -> None:
    results(record("optimizer", "sgd", "b"), record("adapter", "lora", "z"), record("adapter", "lora", "a"))
    assert [e.claim for e in store.stored()] == ["a", "z", "b"]
    assert [e.claim for e in store.stored("adapter", "lora")] == ["a", "z"]
    assert store.stored("optimizer", "lora") == []


def test_what_is_stored_belongs_to_parts_that_exist() -> None:
    there = {(entry.kind, entry.name) for entry in catalogue.entries()}
    assert [e.path.name for e in store.stored() if (e.kind, e.name) not in there] == []


def test_a_page_shows_the_equation_the_options_and_all_evidence(results: Results) -> None:
    results(record("adapter", "lora", "forgets-less"), record("adapter", "lora", "z", "failed", reason="no memory"))
    shown = said("show", "lora")
    assert "W' = W + s B A with A (rank, in)" in shown and "Args:" not in shown
    assert "  rank: integer (at least 1), default 8\n      rank of the product.\n" in shown
    assert "  dropout: number (at least 0 and below 1), default 0.0\n" in shown
    assert "paper: LoRA: Low-Rank Adaptation of Large Language Models (arXiv:2106.09685)" in shown
    assert "claim: Training low-rank" in shown and "deviations: alpha" in shown
    evidence = shown[shown.index("evidence:") :]
    for text in (
        "forgets-less: holds", "expected lower by at least 0.05; difference found -0.3312 (interval -0.4 to -0.25, "
        "p 0.0001): holds", "finding: It is.", "settings of full training: adapter=full, optimizer.lr=0.002 (tuned)",
        "settings of LoRA rank 8: adapter.rank=8, optimizer.lr=2 (tuned)", "hone verify lora", "failed: no memory",
        "2026-11-21, AMD EPYC, 2 cores, 131 s, hone 0.1.0, torch 2.9",
    ):  # fmt: skip
        assert text in evidence, text
    rows = [" ".join(line.split()) for line in evidence.splitlines() if line.startswith("    forgetting  ")]
    assert rows[:2] == ["forgetting full training 0.5123 0.6", "forgetting LoRA rank 8 0.2 0.25"]
    assert re.search(r"metric +side +seed 3 +seed 7\n", evidence)


def test_a_result_without_figures_is_shown_as_far_as_it_goes(results: Results) -> None:
    bare = record("adapter", "lora", "a", "failed", reason="it broke", checks=[], sides={}, seeds=[], versions={})
    unknown = {**CHECK, "difference": None, "low": None, "high": None, "p": None, "verdict": ""}
    results(bare, record("adapter", "lora", "b", "failed", checks=[unknown]), record("adapter", "lora", "c", checks=[]))
    first, second, third = store.stored()
    assert "  failed: it broke" in first.text() and first.figures() == []
    assert second.checks() == [("forgetting", "lower by at least 0.05", "-", "")]
    assert ("loss", "full training", ["0.5", "-"]) in third.figures() and len(third.figures()) == 6
    assert ("peak_memory", "full training", ["123,456,789", "1"]) in third.figures()


def test_a_recipe_is_shown_alone_whatever_is_known_of_it(results: Results) -> None:
    results(record("recipe", "quickstart", "learns"))
    text = (catalogue.SHIPPED / "quickstart.yaml").read_text()
    assert said("show", "quickstart") == text
    assert json.loads(said("show", "quickstart", "--json"))[0]["verdict"] == "holds"


@pytest.fixture
def beside_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be in a folder that has the file which the snippet of `files` asks for."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "entry", [e for e in catalogue.entries() if e.kind != "recipe"], ids=lambda e: f"{e.kind}.{e.name}"
)
def test_the_snippet_of_every_part_is_a_recipe(
    entry: catalogue.Entry, tmp_path: Path, beside_data: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    snippet = entry.snippet()
    (tmp_path / "mine.yaml").write_text(snippet)
    raw, lines = read_yaml(tmp_path / "mine.yaml")
    assert check(raw, opt.Places(lines, "mine.yaml")) == []
    monkeypatch.setattr(source, "current", lambda kind, name, claim: "now")  # reading all code again takes most of it
    shown = "\n".join(line.strip() for line in entry.text().splitlines())  # without its indentation
    assert entry.name in snippet and snippet.strip() in shown


def test_the_snippet_of_a_bridge_takes_the_name_that_was_asked_for() -> None:
    assert "  adapter: peft:loha\n" in said("show", "peft:loha")
    assert "  optimizer: {name: 'torch:nadam', lr: 0.0002}\n" in said("show", "torch:nadam")


TYPES: dict[str, tuple[Any, str]] = {
    "int": (int, "integer"),
    "bool": (bool, "true or false"),
    "str | None": (str | None, "text or null"),
    "Any": (Any, "anything"),
    "Annotated[int, Field(gt=3)]": (Annotated[int, Field(gt=3)], "integer (above 3)"),
    "Annotated[int, Field(lt=-3)] | None": (Annotated[int, Field(lt=-3)] | None, "integer (below -3) or null"),
    "Annotated[float, Field(gt=0, lt=1)]": (Annotated[float, Field(gt=0, lt=1)], "number (above 0 and below 1)"),
    "Annotated[float, Field(ge=0.5, le=1)]": (Annotated[float, Field(ge=0.5, le=1)],
                                              "number (at least 0.5 and at most 1)"),
    "Annotated[float, Field(gt=2)]": (Annotated[float, Field(gt=2)], "number (above 2)"),
    "Annotated[float, Field(le=-2)]": (Annotated[float, Field(le=-2)], "number (at most -2)"),
    "Literal['a', 'b'] | None": (Literal["a", "b"] | None, "one of a, b, or null"),
    "list[Annotated[int, Field(ge=7)]]": (list[Annotated[int, Field(ge=7)]], "list of integer (at least 7)"),
    "Annotated[list[str], Field(min_length=1)]": (Annotated[list[str], Field(min_length=1)],
                                                  "list of text (length at least 1)"),
    "dict[str, float]": (dict[str, float], "mapping of text to number"),
}  # fmt: skip


def an_entry(option: parts.Option, kind: str = "sampler", body: str = "One line.") -> catalogue.Entry:
    return catalogue.Entry(kind, "made_up", "One line.", (), "", "", (option,), body, ())


@pytest.mark.parametrize("text", TYPES)
def test_a_type_is_put_into_words_and_its_placeholder_fits(text: str) -> None:
    hint, words = TYPES[text]
    assert catalogue.spoken(text) == words
    given = yaml.safe_load(an_entry(parts.Option("strange", text, "", "no example")).snippet())["sampler"]
    assert given["name"] == "made_up"
    TypeAdapter(hint, config=ConfigDict(strict=True)).validate_python(given["strange"])


@pytest.mark.parametrize(
    ("text", "doc", "value"),
    [
        ("str", 'a name, e.g. "north"; or "south"', "north"),
        ("dict[str, Any]", "words, e.g. {a: one, b: 2, ...}", {"a": "one", "b": 2}),
        ("list[int]", 'one of "x", e.g. [3, 4, ...]', [3, 4]),
        ("Literal['a', 'b']", 'not "c" but "b"', "b"),
        ("Annotated[float, Field(gt=0)]", "brackets [0, 1) and {a: [b} are prose", 1.0),
        ("Annotated[list[Any], Nested('data')]", "sources", ["chains"]),
        ("Annotated[Any, Nested('optimizer')]", "within", "adamw"),
        ("Annotated[Any, Nested('callback')]", "beside", "average"),
    ],
)
def test_a_placeholder_takes_the_example_of_the_description(text: str, doc: str, value: Any) -> None:
    given = yaml.safe_load(an_entry(parts.Option("strange", text, "", doc)).snippet())["sampler"]
    assert given["strange"] == value


def test_a_placeholder_takes_what_the_usual_part_of_its_kind_has() -> None:
    option = parts.Option("lr", "Annotated[float, Field(gt=0, allow_inf_nan=False)]", "", "learning rate")
    assert yaml.safe_load(an_entry(option, "optimizer").snippet())["optimizer"]["lr"] == 0.0002
    assert yaml.safe_load(an_entry(option, "reward").snippet())["data"]["rewards"]["lr"] == 1.0


@pytest.mark.parametrize("record", parts.catalogue(), ids=lambda r: f"{r.kind}.{r.name}")
def test_the_listed_types_are_those_that_recipes_are_checked_by(record: parts.Record) -> None:
    names = {"Annotated": Annotated, "Field": Field, "Literal": Literal, "Any": Any, "Nested": opt.Nested}
    known = opt.hints(parts.load(record.kind, record.name))
    assert [option.name for option in record.options] == list(known)
    for option in record.options:
        listed_type = eval(option.type, names)  # of the project's own source
        assert TypeAdapter(listed_type).json_schema() == TypeAdapter(known[option.name]).json_schema(), option.name
        assert opt.nested_kind(listed_type) == opt.nested_kind(known[option.name])
        assert not re.search(r"Annotated|Literal|Field|\b[A-Z]", catalogue.spoken(option.type)), option.name


NEEDS = {
    "frozen weights in 4 bits": "qlora",
    "sparse fine-tuning": "spiel",
    "soft prompt": "prompt-tuning",
    "side network": "qst",
    "rank allocation over layers": "adalora",
    "reduce activation density": "activation-density",
    "intruder dimensions": "intruders",
    "transfer an adapter to another base model without data": "trans-lora",
    "long context fine-tuning": "sinklora",
    "train all the weights": "full",
    "use a method of PEFT": "peft:",
    "learning rate decay at the end": "wsd",
    "one run that can serve any training length": "wsd",
    "restart the learning rate several times": "cosine",
    "constant learning rate": "constant",
    "sublinear memory of the optimizer": "adafactor",
    "weight decay decoupled from the gradient": "adamw",
    "momentum": "sgd",
    "other optimizers from torch": "torch:",
    "stop training when the evaluation no longer improves": "early_stop",
    "average the weights over training": "average",
    "exponential moving average": "average",
    "nucleus sampling": "sample",
    "most probable token": "greedy",
    "label smoothing": "sft",
    "keep the softmax normaliser from drifting": "pretrain",
    "start from random weights": "fresh",
    "start from a model folder or a finished run": "pretrained",
    "load my own csv file": "files",
    "dataset from the Hugging Face hub": "hub",
    "mix two data sources": "mix",
    "arithmetic problems": "chains",
    "accuracy of generated answers": "accuracy",
    "teach the model a new skill quickly": "quickstart",
}
HARDER = {  # their words say as much about a neighbour
    "combine several datasets in proportions": "mix",
    "python documentation as training text": "pydocs",
    "learning rate falls in a straight line": "linear",
    "low-rank adaptation": "lora",
    "share of correct answers": "accuracy",
}


@pytest.mark.parametrize("need", NEEDS)
def test_a_search_finds_the_obvious_part_first(results: Results, need: str) -> None:
    found = search.find(need)
    assert found[0].entry.name == NEEDS[need], [(match.entry.name, match.score) for match in found]
    assert [match.score for match in found] == sorted((match.score for match in found), reverse=True)


@pytest.mark.parametrize("need", HARDER)
def test_a_search_finds_what_is_said_in_other_words_among_the_first_three(results: Results, need: str) -> None:
    assert HARDER[need] in [match.entry.name for match in search.find(need, 3)]


def test_a_search_looks_into_what_was_tested_and_shows_the_verdict(results: Results) -> None:
    need = "what a zebra knows is not forgotten"
    assert "sgd" not in [match.entry.name for match in search.find(need)]
    results(record("optimizer", "sgd", "a", "contradicted", says="Forgets less of what the zebra knew.", source="then"))
    row = json.loads(said("find", need, "--json"))[0]
    assert row.keys() == {"kind", "name", "summary", "verdict", "score", "match"}
    assert (row["kind"], row["name"], row["verdict"]) == ("optimizer", "sgd", "contradicted") and row["score"] > 0
    assert row["match"] == "Forgets less of what the zebra knew."
    shown = said("find", need, "--limit", "1")
    assert "optimizer sgd [contradicted]" in shown and "> Forgets less" in shown and shown.count("\n") == 2
    assert len(json.loads(said("find", "learning rate", "--limit", "3", "--json"))) == 3


def test_a_search_without_a_match_says_so_with_the_nearest_names(results: Results) -> None:
    assert "nothing in the catalogue matches 'lorra' (nearest names: lora, " in said("find", "lorra")
    assert "(see: hone list)" in said("find", "the of") and json.loads(said("find", "xyzzy", "--json")) == []


BASE = '''
Share = Annotated[float, Field(ge=0, le=1)]


class Base:
    """What all are.

    Args:
        size: number of things.
    """

    size: int = 1
'''
FAMILY = """
from hone.roots.base import Base, Share

{classes}
"""
PART = '''
@part("metric", "m{n}", papers=[("Paper {n}", "arXiv:2101.{n:05d}")], claim="Claim {n}.")
@dataclass(kw_only=True)
class M{n}(Base):
    """Metric number {n}.

    Args:
        share: of something, in [0, 1].
    """

    share: Share = 0.5
'''


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, results: Results) -> Counter[str]:
    """Put 500 parts in 50 files into the catalogue, each with a stored claim, and count the work."""
    root, work = tmp_path / "hone", Counter[str]()
    (root / "roots").mkdir(parents=True)
    (root / "roots" / "base.py").write_text(BASE)
    for family in range(50):
        classes = "".join(PART.format(n=family * 10 + k) for k in range(10))
        (root / f"family{family}.py").write_text(FAMILY.format(classes=classes))
    results(*(record("metric", f"m{n}", "c") for n in range(500)))

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            work[name] += 1
            return function(*given, **named)

        return call

    monkeypatch.setattr(parts, "ROOT", root)
    monkeypatch.setattr(parts, "ast", SimpleNamespace(**{**vars(ast), "parse": counted("parsed", ast.parse)}))
    monkeypatch.setattr(store, "_read", counted("read", store._read))
    monkeypatch.setattr(source, "current", counted("hashed", lambda *_: "now"))
    parts.catalogue.cache_clear()
    yield work
    parts.catalogue.cache_clear()


def test_a_list_of_500_parts_reads_every_file_and_hashes_every_claim_once(large: Counter[str]) -> None:
    assert said("list", "metric").count(" holds ") == 500
    assert large == {"parsed": 51, "read": 500, "hashed": 500}
    entry = listed("m499", "metric")
    types = [(option["name"], option["type"]) for option in entry["options"]]
    assert types == [("size", "int"), ("share", "Annotated[float, Field(ge=0, le=1)]")]
    assert large["parsed"] == 51  # the catalogue is kept


def test_a_search_among_500_parts_hashes_nothing(large: Counter[str]) -> None:
    assert search.find("metric number 123")[0].entry.name == "m123"
    assert large == {"parsed": 51, "read": 500}


def test_a_method_that_is_an_option_of_another_is_named() -> None:
    with pytest.raises(HoneError, match=r"an option of adapter 'lora': weight_decomposed"):
        catalogue.named("dora")
    with pytest.raises(HoneError, match=r"an option of objective 'dpo': length_penalty"):
        catalogue.named("R-DPO", "objective")
