"""Fully sharded training: each process holds a share of every tensor, through torch's FSDP2.

Decoder layers are gathered one at a time. Everything else (embeddings, norms, head) is the root group, which the
language model's `hidden` gathers and the backward pass shares out again. Gradients are summed, not averaged: the loss
is divided by the count of the whole step already.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from hone.engine.devices import Cluster


def shard(model: nn.Module, cluster: Cluster) -> None:
    """Share a language model's tensors among the processes, in place.

    Args:
        model: the language model, its adapter attached, the same on every process.
        cluster: the processes.
    """
    mesh = init_device_mesh(cluster.device.type, (cluster.world,))
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    register_fsdp_forward_method(model, "hidden")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers: the items of the longest list of modules."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max((list(modules) for modules in lists), key=len, default=[])


def whole(state: Any) -> Any:
    """Return a state tree with every shared tensor gathered; all processes must call it together."""
    if isinstance(state, DTensor):
        return state.full_tensor()
    if isinstance(state, dict):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value) for value in state)
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


def gather(model: nn.Module) -> None:
    """Make a shared model whole again on every process, for saving; it cannot be trained any more."""
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, DTensor):
                full = nn.Parameter(parameter.full_tensor(), requires_grad=parameter.requires_grad)
                module._parameters[name] = full
    if dist.is_initialized():
        dist.barrier()
