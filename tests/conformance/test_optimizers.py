"""Every optimizer of the catalogue, bridged ones included: converges, resumes exactly, moves only what it is given."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hone import options, parts
from hone.engine.checkpoint import decode, encode
from hone.errors import HoneError
from hone.optimizers.bridges import Bridge
from sharded import one_process, share

GIVEN = {  # options that a method has no default for, or whose default is far from this problem's scale
    "pytorch_optimizer:ranger21": {"num_iterations": 400},
    "pytorch_optimizer:dadaptsgd": {"d0": 1e-2},  # its first guess of the distance to the bottom
    **{f"pytorch_optimizer:{method}": {"adamw_lr": 0.1} for method in ("adago", "adamuon", "muon", "normuon")},
}
MATRICES_ONLY = {"torch:muon", "pytorch_optimizer:spectralsphere"}  # orthogonalise every tensor, so vectors are refused
SLOW = {  # steps until the loss halves, where 60 are not enough
    "torch:adadelta": 400,  # its steps begin at sqrt(eps) and grow
    "torch:asgd": 200,
    "pytorch_optimizer:adadelta": 400,
    "pytorch_optimizer:adamod": 200,  # bounds every step by the mean of the steps so far
    "pytorch_optimizer:ranger21": 100,  # warms its rate up by itself
    "pytorch_optimizer:dadaptadagrad": 200,  # estimates its rate from 1e-6 upwards
}
NO_BOWL = {  # methods that this problem is not for
    "pytorch_optimizer:kate": "its first step is the inverse of the gradient, which throws small coordinates far away",
    "pytorch_optimizer:spectralsphere": "it keeps the spectral norm of every matrix, so none can shrink",
}


def specs() -> list[str]:
    found = []
    for record in parts.catalogue():
        if record.kind == "optimizer" and record.name.endswith(":"):
            found += [record.name + method for method in parts.load("optimizer", record.name).methods()]
        elif record.kind == "optimizer":
            found.append(record.name)
    return found


def weights(name: str) -> list[tuple[str, nn.Parameter]]:
    made = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (6, 4), "layer.weight": (4, 4), "layer.up": (8, 4), "layer.bias": (4,)}
    kept = {k: s for k, s in shapes.items() if len(s) == 2 or name not in MATRICES_ONLY}
    return [(key, nn.Parameter(torch.randn(shape, generator=made))) for key, shape in kept.items()]


def part(name: str, lr: float) -> Any:
    return options.build_part("optimizer", {"name": name, "lr": lr, **GIVEN.get(name, {})})


def descend(params: list[tuple[str, nn.Parameter]], optimizer: torch.optim.Optimizer, begin: int, end: int) -> None:
    """Take steps down a bowl whose bottom moves a little from step to step, as the loop takes them."""
    for step in range(begin, end):
        torch.default_generator.manual_seed(step)  # what some methods draw from
        loss = sum(((p - 0.1 * torch.randn_like(p)) ** 2).sum() for _, p in params)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def height(params: list[tuple[str, nn.Parameter]]) -> float:
    return float(sum((p.detach() ** 2).sum() for _, p in params))


def copies(params: list[tuple[str, nn.Parameter]]) -> list[Tensor]:
    return [p.detach().clone() for _, p in params]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    plain = json.loads(json.dumps(encode(state, tensors)))
    return decode(plain, tensors)


def identical(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", [name for name in specs() if name not in NO_BOWL])
def test_the_loss_of_a_quadratic_halves_at_some_rate(name: str) -> None:
    steps = SLOW.get(name, 60)
    left = []
    for lr in (0.1, 1.0, 0.01, 0.001):
        params = weights(name)
        start = height(params)
        descend(params, part(name, lr).build(params), 0, steps)
        left.append(height(params) / start)
        if left[-1] < 0.5:
            return
    pytest.fail(f"the loss went to {left} of its start")


@pytest.mark.parametrize("name", specs())
def test_a_resumed_run_is_bit_identical_and_only_given_tensors_move(name: str) -> None:
    straight, outside = weights(name), nn.Parameter(torch.ones(3, 3))
    optimizer = part(name, 0.01).build(straight)
    outside.grad = torch.ones(3, 3)
    descend(straight, optimizer, 0, 13)
    assert torch.equal(outside, torch.ones(3, 3))
    assert not identical(copies(straight), copies(weights(name)))

    first = weights(name)
    stopped = part(name, 0.01).build(first)
    descend(first, stopped, 0, 7)
    resumed = [(key, nn.Parameter(p.detach().clone())) for key, p in first]
    again = part(name, 0.01).build(resumed)
    again.load_state_dict(through_a_file(stopped.state_dict()))
    descend(resumed, again, 7, 13)
    assert identical(copies(straight), copies(resumed))


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor"])
def test_standard_optimizers_reach_the_bottom(name: str) -> None:
    params = weights(name)
    start = height(params)
    optimizer = part(name, 0.05).build(params)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / 300)
        sum((p**2).sum() for _, p in params).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert height(params) < 0.01 * start


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "torch:adamw", "pytorch_optimizer:lion"])
def test_vectors_decay_only_when_asked(name: str) -> None:
    for decay_all in (False, True):
        spec = {"name": name, "lr": 0.01, "weight_decay": 0.5, "decay_all": decay_all}
        params = weights(name)
        before = copies(params)
        optimizer = options.build_part("optimizer", spec).build(params)
        for _, p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        shrunk = [bool((p.norm() < old.norm() * 0.999).item()) for (_, p), old in zip(params, before, strict=True)]
        assert shrunk == [True, True, True, decay_all]


@pytest.mark.parametrize("name", ["adamw", "sgd", "torch:radam", "pytorch_optimizer:lion", "pytorch_optimizer:muon"])
def test_shared_tensors_move_as_whole_ones_do(name: str) -> None:
    whole = weights(name)
    with one_process() as mesh:
        shares = [(key, share(p, mesh)) for key, p in whole]
        steppers = [part(name, 0.01).build(whole), part(name, 0.01).build(shares)]
        for step in range(3):
            for (_, p), (_, q) in zip(whole, shares, strict=True):
                p.grad = torch.sin(p.detach() + step)
                q.grad = share(p.grad, mesh)
            for optimizer in steppers:
                optimizer.step()
        for (_, p), (_, q) in zip(whole, shares, strict=True):
            torch.testing.assert_close(q.full_tensor(), p)


def test_adafactor_refuses_shared_tensors() -> None:
    with one_process() as mesh, pytest.raises(HoneError, match="set sharding: none"):
        part("adafactor", 0.01).build([(key, share(p, mesh)) for key, p in weights("adafactor")])


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(HoneError, match="nothing trains"):
        part("adamw", 0.1).build([])


def bridges() -> list[type[Bridge]]:
    names = [r.name for r in parts.catalogue() if r.kind == "optimizer" and r.name.endswith(":")]
    return [parts.load("optimizer", name) for name in names]


@pytest.mark.parametrize("bridge", bridges())
def test_every_class_of_the_library_is_usable_or_refused_with_a_reason(bridge: type[Bridge]) -> None:
    classes = bridge.classes()
    usable = set(bridge.methods())
    for method in set(classes) - usable:
        ((where, message),) = bridge.problems(method, {})
        assert where == "" and "cannot be used: it" in message
        with pytest.raises(HoneError, match="cannot be used"):
            bridge(method=method, lr=0.1).build(weights("adamw"))
    for method in usable:
        assert bridge.problems(method, GIVEN.get(f"{bridge.library}:{method}", {})) == []


def test_wrong_names_and_options_are_told_with_the_nearest_right_one() -> None:
    torch_bridge = parts.load("optimizer", "torch:")
    assert torch_bridge.problems("adamww", {})[0][1].endswith("(did you mean 'adamw'?)")
    ((option, message),) = torch_bridge.problems("RMSprop", {"alhpa": 0.9})
    assert option == "alhpa" and "did you mean 'alpha'?" in message
    ((_, message),) = torch_bridge.problems("rmsprop", {"alpha": -1.0})
    assert "Invalid alpha" in message
    ((_, message),) = torch_bridge.problems("adamw", {"betas": 0.9})
    assert "float" in message
    with pytest.raises(HoneError, match=r"'alhpa'.*did you mean 'alpha'"):
        torch_bridge(method="rmsprop", lr=0.1, options={"alhpa": 0.9}).build(weights("adamw"))
    ((option, message),) = parts.load("optimizer", "pytorch_optimizer:").problems("ranger21", {})
    assert option == "num_iterations" and "is required" in message


def test_a_recipe_is_told_where_a_bridged_option_is_wrong() -> None:
    spec = {"name": "torch:radam", "lr": 1e-3, "bettas": [0.9, 0.99]}
    (problem,) = options.check_part("optimizer", spec, "optimizer", options.Places())
    assert problem.field == "optimizer.bettas" and "did you mean 'betas'?" in str(problem)
    (problem,) = options.check_part("optimizer", "torch:radam", "optimizer", options.Places())
    assert problem.field == "optimizer.lr" and "required" in problem.message


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    ((_, message),) = parts.load("optimizer", "pytorch_optimizer:").problems("lion", {})
    assert "pip install 'hone-ml[peers]'" in message


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon")
def test_matrices_are_asked_for_where_a_method_takes_nothing_else() -> None:
    with pytest.raises(HoneError, match=r"torch:muon.*\[1, 2\] dimensions.*2D"):
        part("torch:muon", 0.1).build(weights("adamw"))


def test_muon_gets_hidden_matrices_and_its_adamw_the_rest() -> None:
    optimizer = options.build_part("optimizer", {"name": "pytorch_optimizer:muon", "lr": 0.02}).build(weights("adamw"))
    shapes = [([tuple(p.shape) for p in g["params"]], g["use_muon"]) for g in optimizer.param_groups]
    assert shapes == [([(4, 4), (8, 4)], True), ([(6, 4)], False), ([(4,)], False)]
    assert [g["lr"] for g in optimizer.param_groups] == [0.02, 3e-4, 3e-4]


def test_nesterov_without_momentum_is_a_problem_of_the_recipe() -> None:
    spec = {"name": "sgd", "nesterov": True, "momentum": 0.0}
    (problem,) = options.check_part("optimizer", spec, "optimizer", options.Places())
    assert problem.field == "optimizer.nesterov"
