"""Edges of small parts: what is not finite, negative, padded, nested, or there in another number than usual."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hone.adapters.layers import Wrapped
from hone.callbacks.early_stop import EarlyStop
from hone.distances.features import DigitFrechet
from hone.distances.sets import Energy, Frechet, Precision, Wasserstein
from hone.engine.merging import merge_models, weight_files
from hone.errors import HoneError, ModelError
from hone.mergers.averages import Linear
from hone.mergers.deltas import Ties
from hone.optimizers.bridges import _EDGES
from hone.options import Places, build_part, check_part
from hone.penalties.weights import L1
from hone.samplers.guided import guided_scores
from hone.solvers.guidance import fit_guess
from hone.solvers.shifted import TimeShift, ddpm_levels
from hone.solvers.verifiers import make_verifier
from hone.text.model import EXTRAS_FILE, LanguageModel


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("distance", [Energy(), Wasserstein(), Frechet()], ids=lambda distance: distance.name)
def test_what_is_not_finite_has_no_distance(distance: Any, broken: float) -> None:
    real, drawn = torch.randn(2, 50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert distance.between(real, real) == pytest.approx(0, abs=1e-9) and distance.between(drawn, real) > 0
    drawn[3, 1] = broken
    assert math.isnan(distance.between(drawn, real))
    digits = torch.zeros(50, 1, 8, 8)
    digits[3, 0, 1, 1] = broken
    assert math.isnan(DigitFrechet()(digits, torch.randn(50, 1, 8, 8)))


class Mps(torch.Tensor):
    """A tensor on a device without float64."""

    def double(self) -> Any:
        raise TypeError("Cannot convert a MPS Tensor to float64")

    def cpu(self) -> Any:
        return self.as_subclass(torch.Tensor)


def test_float64_is_made_where_it_is_known() -> None:
    source = build_part("data", {"name": "points", "count": 200, "conditional": True})
    held = source.collection("eval")
    there, labels = held.arrays.as_subclass(Mps), held.labels
    assert Energy()(there, there) == Energy()(held.arrays, held.arrays)
    for kind in ("density", "classifier", "nearest"):
        judge = make_verifier(kind, source)
        assert torch.equal(judge(there, labels), judge(held.arrays, labels))
    torch.testing.assert_close(fit_guess(there, [there, there * 2], 0, 1e-6), torch.tensor([1.0, 0.0]).double())
    level = TimeShift(cutoff=0).shifted(there, torch.tensor(1.0, dtype=torch.float64), ddpm_levels(), 0.5)
    assert level.shape == (len(held),)


def test_neighbours_need_more_arrays_than_there_are_of_them() -> None:
    few = torch.randn(3, 2, dtype=torch.float64)
    with pytest.raises(HoneError, match="more than 3 arrays; there are 3: raise eval_samples"):
        Precision(neighbours=3).between(few, few)


def test_ties_leads_away_from_models_of_negative_weight() -> None:
    zero = torch.zeros(2)
    found = Ties(density=1.0, weights=[-1.0]).merge("w", zero, [torch.tensor([1.0, 2.0])])
    torch.testing.assert_close(found, torch.tensor([-1.0, -2.0]))
    both = Ties(density=1.0, weights=[1.0, -1.0]).merge("w", zero, [torch.full((2,), 2.0), torch.full((2,), -3.0)])
    torch.testing.assert_close(both, torch.full((2,), 2.5))  # 2 and -(-3), of one sign


def test_weights_that_lie_there_twice_are_read_once(tmp_path: Path) -> None:
    for name in ("consolidated", "model-1", "model-2", "extras"):
        save_file({name: torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    assert [file.stem for file in weight_files(tmp_path)] == ["consolidated", "model-1", "model-2"]
    places = {"a": "model-2.safetensors", "b": "model-1.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert [file.stem for file in weight_files(tmp_path)] == ["model-1", "model-2"]


def test_heads_are_merged_with_their_models_or_refused(tiny_model: Path, tmp_path: Path) -> None:
    models = [tmp_path / "a", tmp_path / "b"]
    for number, folder in enumerate(models):
        LanguageModel.load(str(tiny_model)).save(folder)
        save_file({"head.weight": torch.full((2, 3), float(number))}, folder / EXTRAS_FILE)
    names = [str(folder) for folder in models]
    merge_models(names, None, Linear(), tmp_path / "both")
    assert load_file(tmp_path / "both" / EXTRAS_FILE)["head.weight"].eq(0.5).all()
    save_file({"head.weight": torch.zeros(4, 3)}, models[1] / EXTRAS_FILE)
    with pytest.raises(ModelError, match="different heads beside the model"):
        merge_models(names, None, Linear(), tmp_path / "unlike")
    (models[1] / EXTRAS_FILE).unlink()
    with pytest.raises(ModelError, match="different heads beside the model"):
        merge_models(names, None, Linear(), tmp_path / "one")
    assert not (tmp_path / "one").exists()


def penalised(model: Any, name: str) -> tuple[L1, Any]:
    adapter = build_part("adapter", name)
    adapter.attach(model.hf)
    penalty = L1(strength=1.0)
    penalty.setup(SimpleNamespace(model=model, adapter=adapter))  # type: ignore[arg-type]
    return penalty, adapter


def test_l1_takes_added_biases_and_refuses_what_is_no_change_of_weights(tiny_model: Path) -> None:
    model = LanguageModel.load(str(tiny_model))
    penalty, _ = penalised(model, "bitfit")
    added = [m.added for m in model.modules() if isinstance(m, Wrapped) and getattr(m, "added", None) is not None]
    with torch.no_grad():
        added[0].fill_(0.5)
    total = penalty.of_weights(model)
    assert total is not None and total.item() == pytest.approx(0.5 * added[0].numel())
    total.backward()
    assert added[0].grad is not None and added[0].grad.eq(1).all()
    for name in ("bottleneck", "prompt-tuning"):
        with pytest.raises(HoneError, match="penalty 'l1' is on the change of weights"):
            penalised(LanguageModel.load(str(tiny_model)), name)


def test_guides_of_one_family_may_pad_their_vocabularies_otherwise() -> None:
    base, guide = torch.randn(2, 12, dtype=torch.float64), torch.randn(2, 10, dtype=torch.float64)
    found = guided_scores(base, [guide], [2.0])
    torch.testing.assert_close(found, base[:, :10].log_softmax(-1) + 2 * guide.log_softmax(-1))
    assert guided_scores(guide, [base], [1.0]).shape == (2, 10)


@pytest.mark.parametrize(("outer", "field"), [("stop-temperature", "sampler"), ("rule-based", "then")])
def test_samplers_inside_others_keep_their_readers(outer: str, field: str) -> None:
    guided = build_part("sampler", {"name": outer, field: {"name": "genarm", "guides": ["x"]}})
    getattr(guided, field)._loaded = ["read along"]
    assert guided.beside(SimpleNamespace(packs=True)) == ["read along"]
    assert build_part("sampler", outer).beside(None) == ()
    (problem,) = check_part("sampler", {"name": outer, field: {"name": "rerank"}}, "sampler", Places())
    assert "expected a sampler that picks tokens; 'rerank' chooses among whole answers" in problem.message


def test_a_guide_inside_a_guide_is_refused() -> None:
    spec = {"name": "genarm", "guides": ["x"], "then": {"name": "genarm", "guides": ["y"]}}
    (problem,) = check_part("sampler", spec, "sampler", Places())
    assert "put all guides into one genarm" in problem.message


def evaluated(watcher: EarlyStop, values: list[float]) -> Any:
    run = SimpleNamespace(stop="", interrupted=False, step=0, total=100)
    for value in values:
        run.step += 1
        watcher.on_eval(run, {"step": run.step, "loss": value})  # type: ignore[arg-type]
    return run


def test_early_stop_does_not_wait_for_what_never_was_a_number() -> None:
    assert evaluated(EarlyStop(patience=2), [math.nan, math.nan, math.nan, 3.0, 2.0]).stop == ""
    assert "did not improve on 2 in 2" in evaluated(EarlyStop(patience=2), [math.nan, 2.0, math.nan, math.inf]).stop


def test_heads_beside_a_model_do_not_go_to_muon() -> None:
    assert _EDGES.search("extras.head.weight") and not _EDGES.search("hf.model.layers.0.mlp.up_proj.weight")


def test_cheaper_guidance_wants_guidance_and_stitching_no_churn() -> None:
    for name in ("adaptive-guidance", "linear-guidance"):
        assert check_part("solver", name, "solvers.0", Places()) == []
        (problem,) = check_part("solver", {"name": name, "of": "heun"}, "solvers.0", Places())
        assert "expected a solver with guidance" in problem.message
    for of in ({"name": "heun", "churn": 5.0}, "time-shift"):
        (problem,) = check_part("solver", {"name": "t-stitch", "small": "base", "of": of}, "solvers.0", Places())
        assert "without churn, and not time-shift" in problem.message


def test_a_verifier_takes_no_class_for_any() -> None:
    source = build_part("data", {"name": "points", "conditional": True})
    judge = make_verifier("classifier", source)
    x = source.collection("train").arrays[:5]
    torch.testing.assert_close(judge(x, torch.full((5,), -1)), judge(x, None))
    told = torch.tensor([0, -1, 1, 0, 1])
    assert judge(x, told)[1] == judge(x, None)[1] and bool((judge(x, told) <= judge(x, None)).all())
