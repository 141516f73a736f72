"""Other denoisers beside the one that trains: a teacher from an earlier run, and a running mean of the student."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hone.diffusion.mixture import Mixture
from hone.diffusion.views import View
from hone.errors import ModelError

if TYPE_CHECKING:
    from hone.diffusion.denoiser import Denoiser


class Truth(View):
    """The distribution that generated data comes from, called like a denoiser: a teacher without error."""

    def __init__(self, mixture: Mixture, student: Denoiser) -> None:
        """Hold the distribution.

        Args:
            mixture: the data's.
            student: gives shape, classes and noise range.
        """
        super().__init__(student)
        parameter = next(student.parameters())
        self.mixture = mixture.to(parameter)
        self.like = nn.Parameter(torch.empty(0).to(parameter), requires_grad=False)  # solvers draw what is like it

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return D (B, d).

        Args:
            x: (B, d) noisy points.
            sigma: (B,) noise levels, or one number.
            labels: (B,) classes, -1 for none; None for none at all.
        """
        return self.mixture.denoise(x, sigma, labels)


def load_teacher(path: str, run: Any, what: str = "objective.teacher") -> Any:
    """Return a frozen denoiser from an earlier run that can teach the run's model.

    Args:
        path: the earlier run, or its `model` folder; "truth" is the known distribution of generated points.
        run: the run in progress.
        what: the option that names it, for messages.

    Raises:
        ModelError: it is for other arrays, knows other classes, was trained for a narrower range of noise, or nobody
            knows the truth.
    """
    from hone.diffusion.denoiser import Denoiser

    student: Denoiser = run.model
    if path == "truth":
        source = run.recipe.build("data")
        if (mixture := source.truth()) is None:
            raise ModelError(f"{what}: nobody knows the true distribution of {source.describe()}; name a run")
        return Truth(mixture, student)
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
