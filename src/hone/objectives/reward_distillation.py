"""Consistency distillation that is drawn to a reward: on its one-step outputs, directly or through a proxy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from hone.diffusion.encoders import Encoder
from hone.diffusion.levels import spread
from hone.modes import frozen
from hone.objectives.arrays import Positive
from hone.objectives.base import Turn
from hone.objectives.consistency import Count
from hone.objectives.consistency_distillation import Distillation
from hone.objectives.reward_tuning import Rewarded
from hone.objectives.teachers import add_player
from hone.parts import part

NotNegative = Annotated[float, Field(ge=0)]


class Proxy(nn.Module):
    """A small network that learns to prefer what a reward prefers: features of the array, weighed by the class."""

    def __init__(self, shape: tuple[int, ...], classes: int, width: int) -> None:
        """Make the layers.

        Args:
            shape: of one array.
            classes: of the data, 0 for none.
            width: channels of the features.
        """
        super().__init__()
        self.encoder = Encoder(shape, classes + 1, width)

    def forward(self, arrays: Tensor, labels: Tensor) -> Tensor:
        """Return the score (B,) of each array.

        Args:
            arrays: (B, *shape).
            labels: (B,) classes that were asked for, -1 for none.
        """
        scores = self.encoder(arrays)
        return scores.gather(1, torch.where(labels < 0, scores.shape[1] - 1, labels)[:, None])[:, 0]


def preference_divergence(expert: Tensor, proxy: Tensor) -> Tensor:
    """Return the divergence of two judges' preferences for each array (B,), summed over pairs of candidates.

    sum over pairs of KL(softmax(expert's two scores) || softmax(the proxy's))

    Args:
        expert: (k, B) scores of k candidates, constants.
        proxy: (k, B) the same of the proxy.
    """
    total = torch.zeros_like(proxy[0])
    for one, other in itertools.combinations(range(len(proxy)), 2):
        wanted = torch.stack([expert[one], expert[other]]).softmax(0)
        found = torch.stack([proxy[one], proxy[other]]).log_softmax(0)
        total = total + F.kl_div(found, wanted, reduction="none").sum(0)
    return total


@part(
    "objective", "rg-lcd",
    papers=[("Reward Guided Latent Consistency Distillation", "arXiv:2403.11027")],
    claim="Distillation that also maximises a reward of the one-step output draws arrays of two steps that are "
    "preferred to the teacher's of many, and a proxy that learns the reward's preferences keeps it from being "
    "over-optimised.",
    deviations="Arrays stand for latents, and there is no decoder between them and the reward; the proxy starts from "
    "fresh weights where the authors' starts from a pretrained CLIP. With drop_labels the teacher's step still sees "
    "the class. The teacher's guidance is one number that the student is not shown; the authors draw w for each array "
    "from a range, lead by D + w (D - D(none)), and show the student an embedding of w.",
    draws=[{"name": "multistep", "steps": 1}, {"name": "multistep", "steps": 2}],
)  # fmt: skip
@dataclass(kw_only=True)
class RewardGuidedDistillation(Rewarded, Distillation):
    """Reward-guided consistency distillation, with a proxy reward that is learned on the fly.

    mean(sqrt((f(x_t, t) - f_mean(x_r, r))^2 + huber^2) - huber) - beta R(f(x_t, t)),  x_r by the teacher's Euler step
    proxy: sum over pairs of {f(x_t, t), f_mean(x_r, r), y} of KL(softmax(sharpness R) || softmax(sharpness proxy))

    Args:
        levels: of the grid.
        beta: weight of the reward.
        proxy: whether the model follows a proxy in the place of the reward itself.
        sharpness: factor on scores before they become preferences.
        width: channels of the proxy's features.
        proxy_rate: factor on the learning rate for the proxy.
        huber: where the distance turns from square to linear.
    """

    levels: Count = 50
    beta: NotNegative = 1.0
    proxy: bool = True
    sharpness: Positive = 1.0
    width: Count = 32
    proxy_rate: Positive = 1.0
    huber: Positive = 0.001
    _proxy: Any = field(init=False, default=None, repr=False)
    _seen: tuple[Tensor, Tensor] | None = field(init=False, default=None, repr=False)

    def needs_gradients(self) -> bool:
        """Return whether gradients go through the reward; a proxy has them where the reward has none."""
        return not self.proxy

    def setup(self, run: Any) -> None:
        """Load the teacher, prepare the rewards and let the proxy play.

        Args:
            run: the run in progress.
        """
        super().setup(run)
        if self.proxy and run.loader is not None:
            model = run.model
            with torch.random.fork_rng():
                torch.manual_seed(run.recipe.seed)
                self._proxy = Proxy(model.shape, model.classes, self.width).to(next(model.parameters()))
            add_player(run, "proxy", self._proxy, self.proxy_rate)

    def earlier(self, model: Any, batch: Any, noisy: Tensor, noise: Tensor, later: Tensor, sooner: Tensor) -> Tensor:
        """Return where the teacher's step leads (B, *shape).

        Args:
            model: the denoiser.
            batch: B arrays.
            noisy: (B, *shape) x_t.
            noise: (B, *shape) z.
            later: (B,) t.
            sooner: (B,) r.
        """
        return noisy + spread(sooner - later, noisy) * self.slope(batch, noisy, later)

    def apart(self, guess: Tensor, aim: Tensor) -> Tensor:
        """Return the pseudo-Huber distance of each array (B,), a number at a time.

        Args:
            guess: (B, *shape).
            aim: (B, *shape).
        """
        self._seen = guess.detach(), aim  # for the proxy's turn, which comes right after
        return (((guess - aim).square() + self.huber**2).sqrt() - self.huber).flatten(1).mean(1)

    def total(self, model: Any, batch: Any, losses: Tensor, guess: Tensor) -> Tensor:
        """Return the sum of the losses (B,), less what the reward or its proxy says of the guesses.

        Args:
            model: the denoiser.
            batch: B arrays.
            losses: (B,) weighted distances.
            guess: (B, *shape) f(x_t, t).
        """
        if self._proxy is None or bool((batch.places < 0).any()):  # evaluation asks the reward itself
            return (losses - self.beta * self.worth(guess, batch.labels)).sum()
        with frozen(self._proxy):
            return (losses - self.beta * self._proxy(guess, batch.labels)).sum()

    def loss(self, model: Any, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss, summed over the arrays, and the reward of guesses; in evaluation of one-step samples.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        found, figures = super().loss(model, batch)
        assert self._seen is not None
        with torch.no_grad():
            judged = self._seen[0]
            if bool((batch.places < 0).any()):
                level = torch.tensor(model.sigma_max, dtype=torch.float64).to(batch.arrays)
                judged = model(level * self.normal(batch, "once"), level, self.some_labels(model, batch))
            return found, {**figures, "reward": self.worth(judged, batch.labels).sum()}

    def turns(self, model: Any, batch: Any) -> Iterator[Turn]:
        """Yield the model's turn, and the proxy's on what the model has just said.

        Args:
            model: the denoiser.
            batch: B arrays.
        """
        found, figures = self.loss(model, batch)
        assert self._seen is not None
        candidates = torch.stack([*self._seen, batch.arrays])
        yield Turn("model", found, figures)
        if self._proxy is not None:
            yield Turn("proxy", *self.preferences(candidates, batch.labels))

    def preferences(self, candidates: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the proxy's loss, summed over the arrays, and how often it prefers what the reward prefers.

        Args:
            candidates: (k, B, *shape) arrays for the same classes.
            labels: (B,) classes that were asked for.
        """
        flat, told = candidates.flatten(0, 1), labels.repeat(len(candidates))
        with torch.no_grad():
            expert = self.sharpness * self.worth(flat, told).unflatten(0, (len(candidates), -1))
        found = self.sharpness * self._proxy(flat, told).unflatten(0, (len(candidates), -1))
        agree = (found.argmax(0) == expert.argmax(0)).to(found)
        return preference_divergence(expert, found).sum(), {"agreement": agree.sum()}
