"""Modes that a network is put in for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module in evaluation mode meanwhile, and give each its own mode back.

    Args:
        model: the network.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let no parameter of a network take gradients meanwhile, so that another player's loss can pass through it.

    Args:
        model: the network.
    """
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in training:
            parameter.requires_grad_(True)


def draws(run: Callable[[], Any], device: torch.device) -> bool:
    """Return whether running something draws random numbers, as dropout does; the generators stay as they were.

    Args:
        run: what is run once, without gradients.
        device: where it runs.
    """
    own = [] if device.type == "cpu" else [torch.get_device_module(device)]
    kind = "cuda" if device.type == "cpu" else device.type

    def states() -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(module.get_rng_state(device) for module in own)]

    with torch.random.fork_rng([device] if own else [], device_type=kind), torch.no_grad():
        before = states()
        run()
        return not all(torch.equal(now, then) for now, then in zip(states(), before, strict=True))
