"""Mergers equal their closed forms and hand-made cases; merging through files equals merging state dicts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conformance.test_objectives import CONFIG, make_model
from hone.adapters.lora import LoRA
from hone.engine import merging
from hone.errors import HoneError, ModelError, RecipeError
from hone.mergers.averages import Linear, Slerp
from hone.mergers.deltas import TaskArithmetic, Ties, agreed, dropped, trimmed
from hone.text.merged import Merged
from hone.text.model import LanguageModel
from hone.text.tokenizer import train_tokenizer

BASE = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0])
FIRST = BASE + torch.tensor([0.4, -0.3, 0.0, 0.2, 0.1])
SECOND = BASE + torch.tensor([0.2, 0.5, -0.1, -0.2, 0.0])


def test_a_soup_is_the_weighted_mean() -> None:
    torch.testing.assert_close(Linear().merge("w", None, [FIRST, SECOND]), (FIRST + SECOND) / 2)
    found = Linear(weights=[3.0, 1.0]).merge("w", None, [FIRST, SECOND])
    torch.testing.assert_close(found, (3 * FIRST + SECOND) / 4)


def test_task_arithmetic_adds_changes_and_takes_them_away() -> None:
    changes = (FIRST - BASE) + (SECOND - BASE)
    torch.testing.assert_close(TaskArithmetic(scale=0.4).merge("w", BASE, [FIRST, SECOND]), BASE + 0.4 * changes)
    torch.testing.assert_close(TaskArithmetic(weights=[-1.0]).merge("w", BASE, [FIRST]), 2 * BASE - FIRST)


def test_ties_trims_elects_and_joins() -> None:
    assert trimmed(FIRST - BASE, 0.4).nonzero().flatten().tolist() == [0, 1]  # the largest two of five entries
    assert trimmed(FIRST - BASE, 0.01).nonzero().flatten().tolist() == [0]
    found = Ties(density=0.4).merge("w", BASE, [FIRST, SECOND])
    # entry 0: both are positive, their mean; entry 1: 0.5 outweighs -0.3 and stands alone; the rest is trimmed
    torch.testing.assert_close(found, BASE + torch.tensor([0.3, 0.5, 0.0, 0.0, 0.0]))
    whole = Ties(density=1.0, scale=2.0).merge("w", BASE, [FIRST, SECOND])
    # entry 3: 0.2 and -0.2 cancel, and the positive one is taken; entries 2 and 4: one has not changed and has no say
    torch.testing.assert_close(whole, BASE + 2 * torch.tensor([0.3, 0.5, -0.1, 0.2, 0.1]))
    weighed = Ties(density=1.0, weights=[2.0, 1.0]).merge("w", BASE, [FIRST, SECOND])
    torch.testing.assert_close(weighed[:2], BASE[:2] + torch.tensor([(2 * 0.4 + 0.2) / 3, -0.3]))  # -0.6 outweighs 0.5


def test_where_signs_cancel_the_tensors_most_frequent_sign_counts() -> None:
    first, second = torch.tensor([-1.0, -1.0, 0.5]), torch.tensor([-1.0, -1.0, -0.5])
    base = torch.zeros(3)
    for sign in (1, -1):
        found = Ties(density=1.0).merge("w", base, [sign * first, sign * second])
        torch.testing.assert_close(found, sign * torch.tensor([-1.0, -1.0, -0.5]))
    assert Ties(density=1.0).merge("w", base[:1], [first[2:], second[2:]]).tolist() == [-0.5]  # as in the authors' code


def test_ties_equals_a_loop_over_entries() -> None:
    generator = torch.Generator().manual_seed(0)
    deltas, weights = torch.randn(4, 50, generator=generator, dtype=torch.float64), [1.0, 0.5, 2.0, 1.0]
    deltas[torch.rand(4, 50, generator=generator) < 0.4] = 0.0
    expected = []
    for entry in deltas.T.tolist():
        sign = math.copysign(1.0, sum(w * x for w, x in zip(weights, entry, strict=True)))
        joined = [(w, x) for w, x in zip(weights, entry, strict=True) if x * sign > 0]
        expected.append(sum(w * x for w, x in joined) / sum(w for w, _ in joined) if joined else 0.0)
    found = agreed(deltas, torch.tensor(weights, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_dropping_keeps_the_mean_and_depends_on_name_and_seed() -> None:
    delta = torch.full((200, 200), 0.5)
    found = dropped(delta, 0.9, "0:0:w")
    kept = found != 0
    assert kept.float().mean() == pytest.approx(0.1, abs=0.01)
    assert found[kept].unique().tolist() == pytest.approx([5.0])
    assert found.mean() == pytest.approx(0.5, abs=0.05)
    assert not torch.equal(found, dropped(delta, 0.9, "0:0:v")) and not torch.equal(found, dropped(delta, 0.9, "1:0:w"))
    assert dropped(delta, 0.0, "") is delta
    merged = TaskArithmetic(drop=0.5, seed=3).merge("w", torch.zeros(9, 9), [torch.ones(9, 9)] * 2)
    assert set(merged.flatten().tolist()) == {0.0, 2.0, 4.0}  # the two models drop other entries


def test_slerp_keeps_the_length_and_halves_the_angle() -> None:
    first, second = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(Slerp().merge("w", None, [first, second]), torch.full((2,), math.sqrt(0.5)))
    third = Slerp(t=1 / 3).merge("w", None, [first, second])
    torch.testing.assert_close(third, torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6)]))
    assert torch.equal(Slerp(t=0.0).merge("w", None, [first, second]), first)
    torch.testing.assert_close(Slerp(t=0.25).merge("w", None, [first, 2 * first]), 1.25 * first)  # parallel: the mean
    assert torch.equal(Slerp().merge("w", None, [0 * first, 2 * first]), first)


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(HoneError, match=r"merger.weights: expected 2 numbers, one for each model, got 1"):
        Linear(weights=[1.0]).check_count(2)
    with pytest.raises(HoneError, match="they sum to 0"):
        Linear(weights=[1.0, -1.0]).check_count(2)
    with pytest.raises(ValueError, match="needs a base"):
        Ties().merge("w", None, [FIRST])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A base, a model and an adapter trained from it, one of another shape and one with another tokenizer."""
    root = tmp_path_factory.mktemp("models")
    base = make_model().float()
    base.save(root / "base")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    base.save(root / "full")
    model, adapter = LanguageModel.load(root / "base"), LoRA(rank=2)
    adapter.attach(model.hf)
    with torch.no_grad():
        for _, parameter in adapter.trainable(model.hf):
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    adapter.save(model.hf, root / "lora", base=str(root / "base"))
    model.save_tokenizer(root / "lora")
    LanguageModel.fresh({**CONFIG, "hidden_size": 8}, base.tokenizer).save(root / "narrow")
    LanguageModel.fresh({**CONFIG, "tie_word_embeddings": False}, base.tokenizer).save(root / "untied")
    other = train_tokenizer(["quite another text, with other words"] * 9, 300)
    LanguageModel.fresh({**CONFIG, "vocab_size": base.hf.config.vocab_size}, other).save(root / "words")
    return {path.name: str(path) for path in root.iterdir()}


def state(path: str | Path) -> dict[str, Tensor]:
    return LanguageModel.load(path).hf.state_dict()


@pytest.mark.parametrize("shard", [2**30, 3000])
def test_merging_through_files_equals_merging_state_dicts(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: int
) -> None:
    monkeypatch.setattr(merging, "SHARD", shard)
    merger = Ties(density=0.5, scale=1.5)
    models = [folders["full"], folders["lora"]]  # an adapter is merged into its base first
    record = merging.merge_models(models, folders["base"], merger, tmp_path / "new" / "merged")
    start, first, second, found = (state(path) for path in (folders["base"], *models, tmp_path / "new" / "merged"))
    assert found.keys() == start.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, merger.merge(name, start[name], [first[name], second[name]]))
    assert len(list((tmp_path / "new" / "merged").glob("*.safetensors"))) == (1 if shard == 2**30 else 6)
    assert json.loads((tmp_path / "new" / "merged" / "merge.json").read_text())["merger"]["density"] == 0.5
    assert record["parameters"] == sum(p.numel() for p in LanguageModel.load(folders["base"]).hf.parameters())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["merged"]  # nothing is left beside it


def test_the_type_is_that_of_the_models(folders: dict[str, str], tmp_path: Path) -> None:
    for name in ("base", "full"):
        model = LanguageModel.load(folders[name], dtype=torch.bfloat16)
        model.save(tmp_path / name)
    halves = [str(tmp_path / "full"), str(tmp_path / "base")]
    merging.merge_models(halves, halves[1], TaskArithmetic(scale=0.5), tmp_path / "half")
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    merging.merge_models([folders["full"]], halves[1], TaskArithmetic(scale=0.5), tmp_path / "whole")
    assert {t.dtype for t in load_file(tmp_path / "whole" / "model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("narrow", r"'model.embed_tokens.weight' has the shape .* models are merged that were trained from one start"),
        ("untied", r"have other tensors, e.g. only '.*untied' has 'lm_head.weight'"),
        ("words", r"the tokenizers of '.*words' and '.*full' differ"),
        ("nowhere", "there is no model folder"),
    ],
)
def test_models_that_do_not_go_together_are_refused(
    folders: dict[str, str], tmp_path: Path, other: str, message: str
) -> None:
    path = folders.get(other, str(Path(folders["base"]).parent / other))
    with pytest.raises(ModelError, match=message):
        merging.merge_models([folders["full"], path], None, Linear(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_never_overwritten_and_a_base_is_asked_for(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(HoneError, match=r"exists already, and nothing is ever overwritten"):
        merging.merge_models([folders["full"]], None, Linear(), tmp_path)
    with pytest.raises(HoneError, match=r"'ties' adds up changes and needs to know of what: give the base"):
        merging.merge_models([folders["full"]], None, Ties(), tmp_path / "out")
    (tmp_path / "hollow").mkdir()
    (tmp_path / "hollow" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"hollow' has no weights in safetensors"):
        merging.merge_models([str(tmp_path / "hollow")], None, Linear(), tmp_path / "out")


def test_whole_numbers_must_agree(folders: dict[str, str], tmp_path: Path) -> None:
    paths = []
    for number in (1, 1, 2):
        folder = tmp_path / f"counts-{len(paths)}"
        LanguageModel.load(folders["base"]).save(folder)
        held = load_file(folder / "model.safetensors")
        save_file({**held, "counts": torch.tensor([number])}, folder / "model.safetensors", metadata={"format": "pt"})
        paths.append(str(folder))
    merging.merge_models(paths[:2], None, Linear(), tmp_path / "same")
    assert load_file(tmp_path / "same" / "model.safetensors")["counts"].tolist() == [1]
    with pytest.raises(ModelError, match=r"'counts' holds whole numbers, which differ"):
        merging.merge_models(paths, None, Linear(), tmp_path / "out")


def test_the_command_checks_the_method_and_its_options(folders: dict[str, str], tmp_path: Path) -> None:
    for method, settings, message in (
        ("tie", [], r"there is no merger called 'tie' \(did you mean 'ties'"),
        ("ties", ["densety=1"], r"densety: unknown option \(did you mean 'density'"),
        ("ties", ["density=2.0"], "expected less than or equal to 1"),
        ("ties", ["density"], "expected key=value"),
    ):
        with pytest.raises(RecipeError, match=message):
            merging.merge_command([folders["full"]], folders["base"], method, settings, tmp_path / "out")
    made = merging.merge_command([folders["full"]], None, "linear", ["weights=[2.0]"], tmp_path / "out")
    assert made["merger"] == {"name": "linear", "weights": [2.0]}


def test_a_run_may_start_from_a_merger(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HONE_CACHE", str(tmp_path))
    options: dict[str, Any] = {"models": [folders["full"], folders["lora"]], "base": folders["base"]}
    start = Merged(merger=TaskArithmetic(), **options)
    assert not list(start.check()) and not Path(start.path).exists()
    model = start.load(device="cpu", dtype=torch.float64, data=None)
    first, second, base = (state(path) for path in (folders["full"], folders["lora"], folders["base"]))
    for name, tensor in model.hf.state_dict().items():
        torch.testing.assert_close(tensor, (first[name] + second[name] - base[name]).to(tensor), rtol=1e-6, atol=1e-7)
    kept = Path(start.path)
    stamp = (kept / "model.safetensors").stat().st_mtime_ns
    assert Merged(merger=TaskArithmetic(), **options).path == start.path != Merged(merger=Ties(), **options).path
    start.load(device="cpu", dtype=torch.float32, data=None)
    assert (kept / "model.safetensors").stat().st_mtime_ns == stamp
    (kept / "model.safetensors").write_bytes(b"cut off")  # it is made anew
    start.load(device="cpu", dtype=torch.float32, data=None)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == [kept.name]
    wrong = Merged(models=["./nowhere"], merger=Ties(), base=None)
    assert [where for where, _ in wrong.check()] == ["models.0", "base"]
    assert [text for _, text in Merged(models=[folders["full"]], merger=Slerp()).check()] == [
        "merger: slerp goes from one model to another and takes two of them, got 1"
    ]
