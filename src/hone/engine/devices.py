"""Where a run computes: the device, its arithmetic, and the processes that share the work.

Processes are started by `accelerate launch` or torchrun; Accelerate's PartialState reads their environment and sets up
the process group. Gradients are summed over processes after the backward pass of each turn, so that objectives with
several players and any number of forward calls need no wrapper around the model.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hone.errors import HoneError

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # the others wait this long while one reads its data or writes a large model
# Before torch 2.11 a pass with gradients is handed what one without has cast (pytorch issue 158232), and loses its own.
CASTS_KEPT = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)


class Cluster:
    """The processes of one run and the device of this one."""

    def __init__(self, device: str = "auto", precision: str = "auto", sharding: str = "auto") -> None:
        """Join the process group if a launcher started several processes, and pick device and arithmetic.

        Args:
            device: "auto", "cpu", "cuda" or "mps".
            precision: "auto", "float32", "bf16" or "float64".
            sharding: "none", "full" (FSDP), or "auto", which follows `accelerate launch --use_fsdp`.

        Raises:
            HoneError: the device, or bf16 on it, is not there.
        """
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        chosen = _pick(device)
        if self.world > 1:
            from accelerate import PartialState

            # Under `accelerate launch --use_fsdp` transformers would load weights on the first process only and leave
            # the others with arbitrary ones, on which they would try to prove that packing is exact.
            os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
            self.device = PartialState(cpu=chosen == "cpu", timeout=PATIENCE).device
        else:
            self.device = torch.device(chosen)
        self.precision = _precision(precision, self.device)
        asked = sharding == "full" or (sharding == "auto" and os.environ.get("ACCELERATE_USE_FSDP") == "true")
        self.sharded = asked and self.world > 1
        self.dtype = torch.float64 if self.precision == "float64" else torch.float32

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return the context for forward passes: bf16 autocast, or nothing."""
        if self.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=CASTS_KEPT)
        return contextlib.nullcontext()

    def sum(self, value: float) -> float:
        """Return the sum of a number over all processes."""
        if self.world == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def agree(self, text: str) -> str:
        """Return the text of the first process that has one, "" when none has; all processes call it together.

        Args:
            text: what this process has to say, "" for nothing.
        """
        if self.world == 1:
            return text
        said = torch.tensor(list(text.encode()), dtype=torch.uint8, device=self.device)
        sizes = torch.zeros(self.world, dtype=torch.int64, device=self.device)
        sizes[self.rank] = len(said)
        dist.all_reduce(sizes)
        speaker = next((rank for rank, size in enumerate(sizes.tolist()) if size), None)
        if speaker is None:
            return ""
        if speaker != self.rank:
            said = said.new_zeros(int(sizes[speaker]))
        dist.broadcast(said, speaker)
        return bytes(said.tolist()).decode()

    def from_main(self, value: T) -> T:
        """Return the main process's value on every process; all call it together.

        Args:
            value: what JSON can hold; only the main process's matters.
        """
        return value if self.world == 1 else json.loads(self.agree(json.dumps(value) if self.main else ""))

    def gather(self, value: T) -> list[T]:
        """Return every process's value, in the order of the processes; all call it together.

        Args:
            value: what JSON can hold.
        """
        if self.world == 1:
            return [value]
        said = (self.agree(json.dumps(value) if self.rank == rank else "") for rank in range(self.world))
        return [json.loads(text) for text in said]

    def on_main(self, action: Callable[[], T]) -> T | None:
        """Run an action on the main process while the others wait; they fail with it instead of waiting for ever.

        Args:
            action: takes nothing.

        Returns:
            What the action returned on the main process, None on the others.

        Raises:
            HoneError: the action raised it; every process raises it.
        """
        made: T | None = None
        failure: HoneError | None = None
        if self.main:
            try:
                made = action()
            except HoneError as error:
                failure = error
        if said := self.agree("" if failure is None else str(failure)):
            raise failure or HoneError(said)
        return made

    def align(self, module: nn.Module) -> None:
        """Give every process the first one's weights: factorisations may differ by a sign from machine to machine.

        Args:
            module: the same on every process but for the values of its parameters and persistent buffers, which some
                methods hold frozen factors in.
        """
        if self.world == 1:
            return
        for tensor in (*module.parameters(), *(buffer for _, buffer in persistent_buffers(module))):
            told = tensor.data.contiguous()
            dist.broadcast(told, 0)
            if told.data_ptr() != tensor.data_ptr():
                tensor.data.copy_(told)

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over all processes, in one flat message per dtype.

        A gradient that some processes lack counts as zero there; one that all lack stays absent, so that the optimizer
        passes over that tensor as it does in a single process.

        Args:
            parameters: the same on every process.
        """
        if self.world == 1 or self.sharded:  # FSDP sums them in the backward pass
            return
        groups: dict[torch.dtype, list[nn.Parameter]] = {}
        for parameter in parameters:
            groups.setdefault(parameter.dtype, []).append(parameter)
        for members in groups.values():
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in members]
            present = gradients[0].new_tensor([p.grad is not None for p in members])
            flat = torch.cat([*(g.reshape(-1) for g in gradients), present])
            dist.all_reduce(flat)
            *parts, present = flat.split([*(p.numel() for p in members), len(members)])
            for parameter, part, found in zip(members, parts, present.tolist(), strict=True):
                parameter.grad = part.view_as(parameter) if found else None

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world > 1:
            dist.barrier()

    def peak_memory(self) -> int:
        """Return the most bytes held so far: allocated on a GPU, resident in this process otherwise."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def describe(self) -> str:
        """Return the device in words."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        count = torch.get_num_threads()
        threads = f", {count} thread{'s' if count > 1 else ''}" if self.device.type == "cpu" else ""
        how = ", each with a share of the weights" if self.sharded else ""
        several = f", {self.world} processes{how}" if self.world > 1 else ""
        return f"{name}{threads}, {self.precision}{several}"


def persistent_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the named buffers of a module that are saved with it.

    Args:
        module: any.
    """
    kept = module.state_dict().keys()
    return [(name, value) for name, value in module.named_buffers() if name in kept]


def _pick(device: str) -> str:
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    missing = (device == "cuda" and not torch.cuda.is_available()) or (
        device == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise HoneError(f"device: this machine has no {device} device that torch can use; try --set device=auto")
    return device


def _precision(precision: str, device: torch.device) -> str:
    if precision == "auto":
        return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise HoneError("precision: this GPU has no bf16; use precision: float32")
    if precision == "float64" and device.type == "mps":
        raise HoneError("precision: mps has no float64; use precision: float32")
    return precision


def mixed_seed(seed: int, step: int, width: int = 1, number: int = 0) -> int:
    """Return a seed for one of several generators of a step, in the 63 bits that torch takes.

    Args:
        seed: the run's seed.
        step: the step.
        width: more than the generators of a step.
        number: which of them.
    """
    return ((seed * 1_000_003 + step) * width + number) % 2**63


def seed_all(seed: int, step: int, rank: int = 0) -> None:
    """Seed torch's generators for one step.

    The seed is a function of (seed, step, rank), so that a resumed run draws the same numbers with no generator state
    to save, whatever happened in between (evaluation, a preview, another number of workers).

    Args:
        seed: the run's seed.
        step: the step about to run, 0 before the first.
        rank: index of this process.
    """
    number = mixed_seed(seed, step, 1_009, rank)
    if _has_accelerator():
        torch.manual_seed(number)
    else:  # torch.manual_seed also leaves word for devices that may come, with a trace of its caller: 1 ms each time
        torch.default_generator.manual_seed(number)


@cache
def _has_accelerator() -> bool:
    return torch.accelerator.is_available()
