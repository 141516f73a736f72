"""Shared tensors in one process, for tests of what sharded training meets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


@contextmanager
def one_process() -> Iterator[DeviceMesh]:
    """Yield the mesh of a process group that this process is alone in."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def share(tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    """Return a tensor whose rows the mesh shares, a parameter when it was one."""
    made = distribute_tensor(tensor.detach().clone(), mesh, [Shard(0)])
    return nn.Parameter(made) if isinstance(tensor, nn.Parameter) else made
