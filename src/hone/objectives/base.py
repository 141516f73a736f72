"""What every objective is: sums over a batch, one turn for each player that trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

    from hone.data.source import Source
    from hone.text.generate import Generation
    from hone.text.heads import Readout
    from hone.text.model import LanguageModel
    from hone.text.pack import Packed, Tree


@dataclass(frozen=True)
class Turn:
    """One loss for one player; the loop does its backward pass and that player's optimizer step.

    Args:
        player: name of the player whose tensors move, "model" for the model itself.
        loss: scalar, summed over the batch's units.
        metrics: numbers to report by name, summed over the batch's units and without gradient.
    """

    player: str
    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective:
    """What is minimised: a sum over the units of a batch, which the loop divides by their count over the whole step.

    A subclass gives `loss`, and `count` where its unit is not the trained token. One with several players gives `turns`
    as well; `loss` is then what evaluation reports.
    """

    medium: ClassVar[str] = "text"  # or "arrays": what the model makes
    consumes: ClassVar[str] = "sequences"  # or "tokens", "pairs", "rollouts", ...: what the data must be rendered as
    measured: ClassVar[bool] = True  # whether evaluation of arrays reports the loss on held-out ones
    generates: ClassVar[bool] = True  # whether a model trained so answers prompts; one with a head says a verdict

    def look(self, source: Source) -> None:
        """Learn from the data what must be known before it is rendered, e.g. the names of classes; here nothing.

        Args:
            source: the training data.
        """

    def recall(self, folder: Path) -> bool:
        """Learn from a saved model what `look` learns from the data; return whether that worked, here not.

        Args:
            folder: of a model that was trained for this objective.
        """
        return False

    def class_names(self) -> Sequence[str]:
        """Return the names of the classes of labelled data in the order of their numbers, known after `look`."""
        return ()

    def equip(self, model: LanguageModel) -> None:
        """Put into `model.extras` what trains beside the network, e.g. a classification head; here nothing.

        It is called once before the adapter is attached and the optimizer made, and when a saved model is used again.

        Args:
            model: the language model, as the run starts from it.
        """

    def setup(self, run: Any) -> None:
        """Prepare once before the first step, e.g. add players or cache a reference model's values.

        Args:
            run: the run in progress (`engine/loop.py: Run`).
        """

    def spares_rollouts(self, run: Any) -> bool | None:
        """Return whether the coming phase of on-policy data needs no answers of the model's own; here never.

        Args:
            run: the run in progress.
        """

    def appraise(self, run: Any, trees: list[Tree]) -> list[Tree]:
        """Work out once a phase what its rollouts are credited with, e.g. advantages; here they stay as they are.

        Args:
            run: the run in progress.
            trees: all groups of a phase: a prompt with its answers, their rewards and their log-probabilities.
        """
        return trees

    def before_step(self, run: Any, trees: Sequence[Tree]) -> None:
        """Look at a whole step before its micro-batches, for what a loss needs to know of all of it.

        Args:
            run: the run in progress; `run.step` does not count this step.
            trees: all trees of the step, the same on every process.
        """

    def after_step(self, run: Any, row: dict[str, Any]) -> None:
        """Act after an optimizer step, e.g. take a running mean further.

        Args:
            run: the run in progress; `run.step` counts the step.
            row: its metrics, which are means over the units of the whole step.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs that is neither option nor weight: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state.

        Args:
            state: as `state_dict` returned it.
        """

    def count(self, batch: Packed) -> float:
        """Return the number of units that `loss` sums over; here the sum of the tokens' weights.

        Args:
            batch: B trees as a packed forest of T tokens.
        """
        return float(batch.weights.sum())

    def loss(self, model: LanguageModel, batch: Packed) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and metrics, both summed over the batch's units.

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.

        Raises:
            NotImplementedError: the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define loss(model, batch)")

    def generate(self, model: LanguageModel, prompts: Sequence[np.ndarray], **options: Any) -> list[list[Generation]]:
        """Answer prompts as a model that was trained for this objective does; here like any other.

        Args:
            model: the language model.
            prompts: token ids of each prompt.
            options: those of `hone.text.generate.generate`.
        """
        from hone.text.generate import generate

        return generate(model, prompts, **options)

    def drawn_by(self, model: Any) -> Any:
        """Return the denoiser that draws arrays in evaluation, for objectives of arrays; here the model itself.

        Args:
            model: the denoiser that trains.
        """
        return model

    def verdicts(self, model: LanguageModel, texts: Sequence[str]) -> list[str]:
        """Return what a model that does not generate says of texts, for those whose `generates` is False.

        Args:
            model: the trained model.
            texts: what it shall judge.

        Raises:
            NotImplementedError: the subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define verdicts(model, texts)")

    def readout(self, model: LanguageModel) -> Readout | None:
        """Return how the head that stands beside a model is read, for other libraries; None without one.

        Args:
            model: the trained model.
        """
        return None

    def turns(self, model: LanguageModel, batch: Packed) -> Iterator[Turn]:
        """Yield the batch's turns in order: one loss for each player that trains; here one, for "model".

        Args:
            model: the language model that trains.
            batch: B trees as a packed forest of T tokens.
        """
        yield Turn("model", *self.loss(model, batch))


class Predictions(NamedTuple):
    """The N predictions of a batch that count, as indices into its T tokens.

    Args:
        predictors: (N,) index of the token whose hidden state predicts; one token may predict several.
        targets: (N,) id of the predicted token.
        weights: (N,) weight of the prediction, never 0.
    """

    predictors: Tensor
    targets: Tensor
    weights: Tensor


def trained(batch: Packed, weights: Tensor | None = None) -> Predictions:
    """Return the predictions whose weight is not 0, so that the head runs on no other token.

    Args:
        batch: packed forest of T tokens.
        weights: (T,) weight of predicting each token, 0 where nothing precedes it; by default the batch's own.
    """
    weights = batch.weights if weights is None else weights
    chosen = weights.nonzero().squeeze(1)
    return Predictions(batch.previous[chosen], batch.tokens[chosen], weights[chosen])
