"""Fully sharded training: each process holds a share of every tensor, through torch's FSDP2.

Decoder layers are gathered one at a time. Everything else (embeddings, norms, head) is the root group, which the
language model's `hidden` gathers and the backward pass shares out again. Gradients are summed, not averaged: the loss
is divided by the count of the whole step already. Evaluation gathers everything once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from hone.errors import HoneError
from hone.networks import blocks_of
from hone.text.pack import Tree, pack

if TYPE_CHECKING:
    from hone.engine.devices import Cluster


def shard(model: Any, cluster: Cluster) -> None:
    """Share a language model's tensors among the processes, in place.

    Args:
        model: the language model, its adapter attached, the same on every process.
        cluster: the processes.

    Raises:
        HoneError: it is no language model, this torch is too old, or layers hold a tensor together.
    """
    if model.medium != "text":
        raise HoneError("sharding: denoisers are trained whole on every process; set sharding: none")
    check_apart(model)
    if not hasattr(FSDPModule, "set_force_sum_reduction_for_comms"):
        raise HoneError(f"sharding: sums of gradients need a newer torch than {torch.__version__}; upgrade torch")
    mesh = init_device_mesh(cluster.device.type, (cluster.world,))
    for layer in blocks_of(model).values():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for part in _parts(model):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sums
    hidden = model.hidden
    model.hidden = lambda batch: hidden(batch).clone()  # the backward hooks of FSDP2 go on tensors that are no views
    register_fsdp_forward_method(model, "hidden")
    one_token = Tree((np.zeros(1, np.int32),), (np.zeros(1, np.float32),), (-1,))
    with torch.no_grad():
        model.hidden(pack([one_token]).to(cluster.device))  # FSDP2 takes what runs first for the root
    model.reshard()


def check_apart(model: nn.Module) -> None:
    """Refuse a trained tensor that several decoder layers hold: each would be left with a copy of its own.

    Args:
        model: the language model, its adapter attached.

    Raises:
        HoneError: names the tensor.
    """
    holders: dict[int, int] = {}
    for number, layer in enumerate(blocks_of(model).values()):
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad and holders.setdefault(id(parameter), number) != number:
                raise HoneError(
                    f"sharding: decoder layers {holders[id(parameter)]} and {number} train the tensor '{name}' "
                    "together, which sharding would part; set sharding: none, or use an adapter that shares nothing"
                )


def _parts(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Hold the whole weights on every process meanwhile, for forward passes without gradient in any number and order.

    Generation makes one pass per token, and not as many on each process; none of them has to communicate. All processes
    must enter together. A model that is not shared is left alone.

    Args:
        model: the language model, shared or not.
    """
    parts = _parts(model)
    inner = [part for part in parts if part is not model]
    try:
        for part in inner:
            part.set_reshard_after_forward(False, recurse=False)
        for part in parts:
            part.unshard()
        yield
    finally:
        for part in inner:
            part.set_reshard_after_forward(True, recurse=False)
        for part in parts:
            part.reshard()


def whole(state: Any, keep: bool = True) -> Any:
    """Return a state tree with every shared tensor gathered; all processes must call it together.

    Args:
        state: nested dicts, lists and tuples.
        keep: False returns None in place of what was gathered, on processes that have no use for it.
    """
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else None  # one by one: all of them might not fit on the device
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, keep) for value in state)
    return state


def copy_into(live: Tensor, saved: Tensor) -> None:
    """Copy a whole tensor into a live one, or each process's share of it into a shared one."""
    if isinstance(live, DTensor):
        saved = distribute_tensor(saved.to(live.device), live.device_mesh, live.placements)
    live.copy_(saved)


def share_like(state: dict[str, Any], parameters: list[nn.Parameter]) -> dict[str, Any]:
    """Return an optimizer's state with the tensors of shared parameters shared out in the same way.

    Args:
        state: an optimizer's state_dict with whole tensors.
        parameters: its parameters, in order.
    """
    out = dict(state["state"])
    for index, own in state["state"].items():
        parameter = parameters[index]
        if isinstance(parameter, DTensor):
            out[index] = {
                key: distribute_tensor(value, parameter.device_mesh, parameter.placements)
                if isinstance(value, Tensor) and value.shape == parameter.shape
                else value
                for key, value in own.items()
            }
    return {**state, "state": out}


def gather(model: nn.Module, keep: bool) -> None:
    """Make a shared model whole on the CPU, for saving; it cannot be used otherwise any more.

    Args:
        model: the language model, shared or not.
        keep: False on the processes that do not save; all must call it together.
    """
    made: dict[int, nn.Parameter] = {}  # tied tensors stay tied
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in made:
                full = whole(parameter.detach(), keep)
                made[id(parameter)] = nn.Parameter(full, parameter.requires_grad) if keep else parameter
            module._parameters[name] = made[id(parameter)]
