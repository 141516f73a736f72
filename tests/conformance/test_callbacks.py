"""Every callback of the catalogue: its hooks, its state through a checkpoint, and what each one promises."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hone import options, parts
from hone.callbacks.base import Callback
from hone.data.loader import Loader
from hone.engine import sharding
from hone.engine.checkpoint import decode, encode
from hone.engine.devices import Cluster
from hone.engine.loop import Player
from hone.errors import HoneError
from hone.objectives.base import Objective
from hone.text.pack import Packed, Tree, pack
from sharded import one_process, share

# Those that cannot run here, and why.
EXCEPTED = {"lcsc": "it searches by arrays that a denoiser draws: tests/oracles/test_lcsc.py has the same checks"}
NAMES = [r.name for r in parts.catalogue() if r.kind == "callback" and r.name not in EXCEPTED]
TOTAL, EVERY = 12, 2
LOSSES = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.1, 10: 2.4, 12: 1.0}  # the best is passed at step 4


class Weights(nn.Module):
    """A model of one layer, whose loss is the size of its weights."""

    collate = staticmethod(pack)

    def __init__(self) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)
        self.hf = nn.Module()
        self.hf.layer = nn.Linear(2, 3)
        self.hf.layer.weight = nn.Parameter(torch.randn(3, 2, generator=made))
        self.hf.layer.bias = nn.Parameter(torch.randn(3, generator=made).to(torch.bfloat16))


class Size(Objective):
    """The squared weights, once per token."""

    def loss(self, model: nn.Module, batch: Packed) -> tuple[Tensor, dict[str, Any]]:
        return sum(p.float().square().sum() for p in model.parameters()) * len(batch), {}

    def count(self, batch: Packed) -> float:
        return float(len(batch))


def new_run(**recipe: Any) -> Any:
    """Return what a callback sees of a run, with a model of two tensors."""
    model = Weights()
    weights = [("layer.weight", model.hf.layer.weight), ("layer.bias", model.hf.layer.bias)]
    trees = [Tree((np.arange(2, dtype=np.int32),), (np.ones(2, np.float32),), (-1,)) for _ in range(3)]
    fields = {"eval_every": EVERY, "final": "last", "seed": 0, "clip": None, "batch_tokens": 4, "micro_tokens": None}
    player = Player(weights, torch.optim.SGD([p for _, p in weights], lr=0.1), lambda step, total: 1.0)
    return SimpleNamespace(
        recipe=SimpleNamespace(**{**fields, **recipe}), cluster=Cluster("cpu", "float32", "none"), model=model,
        objective=Size(), loader=Loader(trees, batch_tokens=4, seed=0), players={"model": player}, trainable=weights,
        adapter=None, folder=None, step=0, total=TOTAL, stop="", interrupted=False,
    )  # fmt: skip


def train(run: Any, callbacks: list[Any], until: int) -> list[dict[str, Any]]:
    """Move the weights as a function of the step, call the hooks as the loop calls them, and return the rows."""
    rows = []
    while run.step < until and not run.stop:
        run.step += 1
        with torch.no_grad():
            for index, (_, weight) in enumerate(run.trainable):
                made = torch.Generator().manual_seed(run.step * 10 + index)
                weight += torch.randn(weight.shape, generator=made).to(weight.dtype)
        row = {"step": run.step, "loss": 1.0}
        rows.append(row)
        for callback in callbacks:
            callback.on_step(run, row)
        if run.step % EVERY == 0 and run.step < run.total:
            evaluate(run, callbacks)
    return rows


def evaluate(run: Any, callbacks: list[Any]) -> None:
    for callback in callbacks:
        callback.on_eval(run, {"step": run.step, "loss": LOSSES.get(run.step, 4.0), "accuracy": 0.5})


def finish(run: Any, callbacks: list[Any]) -> None:
    for callback in callbacks:
        callback.on_end(run)
    evaluate(run, callbacks)


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    return decode(json.loads(json.dumps(encode(state, tensors))), tensors)


def build(name: str, **given: Any) -> Any:
    return options.build_part("callback", {"name": name, **given})


def outcome(run: Any) -> tuple[int, str, list[list[float]]]:
    return run.step, run.stop, [weight.flatten().tolist() for _, weight in run.trainable]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cut", [1, 4, 7])
def test_a_run_that_was_stopped_and_resumed_ends_the_same(name: str, cut: int) -> None:
    whole, callback = new_run(), build(name)
    evaluate(whole, [callback])
    callback.on_start(whole)
    train(whole, [callback], TOTAL)
    finish(whole, [callback])

    first, stopped = new_run(), build(name)
    evaluate(first, [stopped])
    stopped.on_start(first)
    train(first, [stopped], cut)
    resumed, again = new_run(), build(name)
    resumed.step = first.step
    for (_, into), (_, kept) in zip(resumed.trainable, first.trainable, strict=True):
        into.data.copy_(kept)
    again.load_state_dict(through_a_file(stopped.state_dict()))
    again.on_start(resumed)
    train(resumed, [again], TOTAL)
    finish(resumed, [again])
    assert outcome(whole) == outcome(resumed)


@pytest.mark.parametrize("name", NAMES)
def test_ending_twice_is_ending_once(name: str) -> None:
    run, callback = new_run(), build(name)
    callback.on_start(run)
    train(run, [callback], TOTAL)
    finish(run, [callback])
    once = outcome(run)
    finish(run, [callback])
    assert outcome(run) == once


def test_the_base_does_nothing() -> None:
    run, callback = new_run(), Callback()
    before = outcome(new_run())
    callback.on_start(run)
    finish(run, [callback])
    callback.on_step(run, row := {"loss": 1.0})
    callback.load_state_dict(callback.state_dict())
    assert outcome(run) == before and row == {"loss": 1.0} and callback.state_dict() == {}


@pytest.mark.parametrize(
    ("given", "ends_at"),
    [({"patience": 2}, 8), ({"patience": 3}, 10), ({"patience": 4}, TOTAL), ({"patience": 2, "min_delta": 2.5}, 4),
     ({"patience": 1, "metric": "accuracy"}, 2), ({"patience": 1, "mode": "max"}, 2)],
)  # fmt: skip
def test_early_stop_counts_evaluations_without_an_improvement(given: dict[str, Any], ends_at: int) -> None:
    run, callback = new_run(), build("early_stop", **given)
    evaluate(run, [callback])
    callback.on_start(run)
    train(run, [callback], TOTAL)
    finish(run, [callback])
    assert run.step == ends_at
    assert run.stop.startswith("early stop") == (ends_at < TOTAL)


@pytest.mark.parametrize("cut", [6, 8])
def test_early_stop_counts_the_evaluation_in_which_a_signal_arrives(cut: int) -> None:
    run, callback = new_run(), build("early_stop", patience=2)
    evaluate(run, [callback])
    train(run, [callback], cut - 1)
    run.step, run.stop, run.interrupted = cut, "interrupted by SIGTERM", True
    evaluate(run, [callback])
    assert callback.waited == (cut - 4) // 2  # a resumed run does not evaluate this step again
    assert run.stop.startswith("early stop" if cut == 8 else "interrupted")


def test_early_stop_names_the_nearest_figure_and_what_the_recipe_lacks() -> None:
    with pytest.raises(HoneError, match=r"no figure 'acuracy' \(did you mean 'accuracy'"):
        evaluate(new_run(), [build("early_stop", metric="acuracy")])
    assert "set eval_every" in next(build("early_stop").conflicts({"eval_every": None}))
    assert not list(build("early_stop").conflicts({"eval_every": 10}))


def test_average_is_the_plain_mean_while_short_and_exponential_when_long() -> None:
    run, short, long = new_run(), build("average", decay=0.999), build("average", decay=0.5)
    run.trainable = run.trainable[:1]
    path = [run.trainable[0][1].detach().clone()]
    for callback in (short, long):
        callback.on_start(run)
    for step in range(1, 9):
        train(run, [short, long], step)
        path.append(run.trainable[0][1].detach().clone())
    assert torch.allclose(short.mean["layer.weight"], torch.stack(path).mean(0), atol=1e-6)
    shares = torch.tensor([0.5**8, *(0.5 ** (9 - n) for n in range(1, 9))])
    assert torch.allclose(long.mean["layer.weight"], torch.einsum("n,nij->ij", shares, torch.stack(path)), atol=1e-6)


def test_average_keeps_low_precision_weights_in_float32_and_gives_them_to_the_model() -> None:
    run, callback = new_run(), build("average")
    callback.on_start(run)
    train(run, [callback], TOTAL)
    assert callback.mean["layer.bias"].dtype == torch.float32
    finish(run, [callback])
    for name, weight in run.trainable:
        assert torch.equal(weight, callback.mean[name].to(weight.dtype))


def test_average_of_shared_weights_resumes_from_a_state_of_whole_ones() -> None:
    whole, callback = new_run(), build("average")
    callback.on_start(whole)
    train(whole, [callback], 3)
    with one_process() as mesh:
        run, resumed = new_run(), build("average")
        run.trainable = [(name, share(weight, mesh)) for name, weight in whole.trainable]
        resumed.load_state_dict(through_a_file(sharding.whole(callback.state_dict())))
        resumed.on_start(run)
        for some, average in ((whole, callback), (run, resumed)):
            average.on_step(some, {})
            average.on_end(some)
        for (_, p), (_, q) in zip(whole.trainable, run.trainable, strict=True):
            assert torch.equal(q.full_tensor(), p)


def test_average_refuses_to_replace_the_best_weights() -> None:
    assert "set final: last" in next(build("average").conflicts({"final": "best"}))
    assert not list(build("average").conflicts({}))
