"""Other denoisers beside the one that trains: a teacher from an earlier run, and a running mean of the student."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hone.errors import ModelError

if TYPE_CHECKING:
    from hone.diffusion.denoiser import Denoiser


def load_teacher(path: str, run: Any, what: str = "objective.teacher") -> Denoiser:
    """Return a frozen denoiser from an earlier run that can teach the run's model.

    Args:
        path: the earlier run, or its `model` folder.
        run: the run in progress.
        what: the option that names it, for messages.

    Raises:
        ModelError: it is for other arrays, knows other classes, or was trained for a narrower range of noise.
    """
    from hone.diffusion.denoiser import Denoiser

    student: Denoiser = run.model
    parameter = next(student.parameters())
    teacher = Denoiser.load(path, device=parameter.device, dtype=parameter.dtype).eval().requires_grad_(False)
    if teacher.shape != student.shape:
        raise ModelError(f"{what}: the teacher's arrays are {teacher.shape}, the student's are {student.shape}")
    if teacher.classes != student.classes:
        raise ModelError(
            f"{what}: the teacher knows {teacher.classes} classes, the student {student.classes}; set "
            f"data.conditional: {'true' if teacher.classes else 'false'}"
        )
    if student.sigma_max > teacher.sigma_max * 1.001 or student.sigma_min < teacher.sigma_min * 0.999:
        raise ModelError(
            f"{what}: the student's noise goes from {student.sigma_min} to {student.sigma_max}, but the teacher was "
            f"trained for {teacher.sigma_min} to {teacher.sigma_max}; set model.sigma_min and sigma_max within that"
        )
    return teacher


def add_player(run: Any, name: str, module: nn.Module, rate: float = 1.0) -> None:
    """Let another network train beside the model, with the recipe's optimizer and schedule.

    Its loss is what the objective yields in a `Turn` of that name; checkpoints hold its weights.

    Args:
        run: the run in progress.
        name: of the player.
        module: what trains; parameters without gradient stay as they are.
        rate: factor on the recipe's learning rate.
    """
    from hone.engine.loop import Player

    params = [(key, p) for key, p in module.named_parameters() if p.requires_grad]
    optimizer = run.recipe.build("optimizer").build(params, {key: rate for key, _ in params})
    run.players[name] = Player(params, optimizer, run.recipe.build("schedule").factor)


class Mean:
    """A running mean of a network's weights, as a network of its own that does not train.

    mean <- decay mean + (1 - decay) weights
    """

    def __init__(self, model: nn.Module) -> None:
        """Begin with a copy of the model.

        Args:
            model: the network that trains.
        """
        self.model: Any = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def move(self, model: nn.Module, decay: float) -> None:
        """Take the mean further.

        Args:
            model: the network that trains.
            decay: share of the mean that stays.
        """
        old, new = list(self.model.parameters()), [p.detach() for p in model.parameters()]
        torch._foreach_lerp_(old, new, 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def state_dict(self) -> dict[str, Any]:
        """Return its weights."""
        return dict(self.model.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over weights.

        Args:
            state: as `state_dict` returned them.
        """
        self.model.load_state_dict(state)
